"""Problems to samples: the model being aligned answers every prompt n times."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from align_jax import log, records
from align_jax.records import Sample, Text
from align_jax.sample import Sampler, sample


def respond(path: Path, sampler: Sampler, prompts: Mapping[str, Text], *, n: int, seed: int,
            **settings) -> list[Sample]:
    """Sample n completions of every {task_id: prompt} into `path`; what is already there is kept.

    Resumes by task: a completion depends on (seed, task_id, k) alone, so a killed run ends in the same file.
    """
    part = path.with_name(path.name + ".partial")
    if path.is_file():
        return records.read(path, Sample)
    found = records.read(part, Sample, bad_lines="skip") if part.is_file() else []
    counts = Counter(s.task_id for s in found)
    left = [(task_id, prompt) for task_id, prompt in prompts.items() if counts[task_id] != n]
    found = [s for s in found if s.task_id in prompts and counts[s.task_id] == n]
    records.write(part, found)
    bar = log.progress(total=len(prompts), what=f"sample {path.parent.name}/{path.stem}", unit="prompt",
                       done=len(prompts) - len(left))
    with part.open("a", encoding="utf-8") as out:
        for task_id, completions in sample(sampler, left, n=n, seed=seed, **settings):
            fresh = [Sample(id=f"{task_id}/{k}", task_id=task_id, prompt=prompts[task_id], completion=c.text,
                            finish=c.finish, logp=sum(c.logps), num_tokens=len(c.ids))
                     for k, c in enumerate(completions)]
            out.writelines(records.line(s) for s in fresh)
            out.flush()
            found += fresh
            bar.update(1)
    bar.close()
    order = {task_id: index for index, task_id in enumerate(prompts)}
    found.sort(key=lambda s: order[s.task_id])
    records.write(path, found)
    part.unlink()
    return found
