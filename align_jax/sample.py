"""Sampling as a stage: a file of prompts in, n completions each out, from whatever engine there is.

    python -m align_jax.sample --config=configs/sample.py --config.run=FOLDER --config.start=PATH --config.prompts=FILE

What a killed run has written is kept (`to_file`), as preference samples, benchmark answers and the command need it.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jax

from align_jax import engine, log, mesh, records
from align_jax.records import Text

FREE = ("run", "start", "prompts", "mesh", "engine")  # settings that change no answer; content is bound


def to_file(path: Path, who: engine.Engine, prompts: Mapping[str, Text], *, n: int, seed: int,
            **settings) -> list[records.Sample]:
    """Get n completions of every {task_id: prompt} into `path`; what is already there is kept.

    Resumes by task: a killed run ends in the same samples, but for ties within rounding. What an engine raises
    leaves all that it yielded before for the next run.
    """
    part = path.with_name(path.name + ".partial")
    if path.is_file():
        return records.read(path, records.Sample)
    found = records.read(part, records.Sample, bad_lines="skip") if part.is_file() else []
    counts = Counter(s.task_id for s in found)
    left = [(task_id, prompt) for task_id, prompt in prompts.items() if counts[task_id] != n]
    found = [s for s in found if s.task_id in prompts and counts[s.task_id] == n]
    answers = who.generate(left, n=n, seed=seed, **settings)  # a sampler refuses before anything is written
    is_writer = jax.process_index() == 0
    out = records.Appender(part, found) if is_writer else contextlib.nullcontext()
    with out, log.progress(total=len(prompts), what=f"sample {path.parent.name}/{path.stem}", unit="prompt",
                           done=len(prompts) - len(left)) as bar:
        for task_id, completions in answers:
            fresh = [records.Sample(id=f"{task_id}/{k}", task_id=task_id, prompt=prompts[task_id], completion=c.text,
                                    finish=c.finish, logp=sum(c.logps), num_tokens=len(c.ids))
                     for k, c in enumerate(completions)]
            found += fresh
            bar.set_postfix_str(str(getattr(who, "work", "")), refresh=False)
            bar.update(1)
            if is_writer:
                out.write(fresh)
    order = {task_id: index for index, task_id in enumerate(prompts)}
    found.sort(key=lambda s: order[s.task_id])
    if is_writer:
        records.write(path, found)
        part.unlink()
    return found


def main(c: Mapping) -> None:
    """Answer a file of prompts; a killed run continues with the prompts that are left."""
    mesh.start_hosts()
    log.check_set(c)
    kind, start = c["engine"]["kind"], c["start"]
    settings = c["engine"].get(kind, {})
    asked = records.read(c["prompts"], records.Prompt)
    prompts, limits = {p.id: p.prompt for p in asked}, {p.id: p.max_tokens for p in asked if p.max_tokens is not None}
    if not prompts:
        raise ValueError(f"{c['prompts']}: no prompts")
    inputs = {"prompts": records.fingerprint(Path(c["prompts"])), "engine": engine.identity(kind, start, **settings)}
    mesh.check_same("config, model or prompts", [c, inputs])
    run = log.claim(c["run"], c | {"inputs": inputs}, free=FREE)
    with jax.set_mesh(mesh.make(**c["mesh"])):
        found = to_file(run / "samples.jsonl", engine.make(kind, start, **settings), prompts, limits=limits,
                        **c["sample"])
    log.say(f"{run / 'samples.jsonl'}: wrote {len(found)} samples of {len(prompts)} prompts, "
            f"{sum(s.num_tokens for s in found):,} tokens, finished by {dict(Counter(s.finish for s in found))}")


if __name__ == "__main__":
    log.command(main)
