"""What every stage has in common in which a model writes: prompts out, answers parsed, kept or dropped by reason.

    seeds -> concepts -> tasks -> responses [-> rewrites]

A stage goes through its input by shards. A shard's answers are on disk before any of them is parsed (`sample.to_file`),
its records are appended to the output at once (`stream.Journal`), and nothing of it stays in memory; so a stage of any
length needs the memory of one shard, and one that was killed goes on behind the last answer it got. Several hosts that
run one model go through this together: each has all answers, the first one writes.
"""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from align_jax import engine as engines
from align_jax import log, mesh, records, sample
from align_jax.engine import Engine
from align_jax.records import Overlap, Sample, Text
from align_jax.synth import prompts, stream
from align_jax.text import Unusable

UNANSWERED = ("stop", "drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asking:
    """How a model is asked in one stage."""

    chat: bool
    brief: bool  # no task, no worked examples: for a model that was trained on the stages
    shots: int  # worked examples
    n: int  # answers to each prompt
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    shard: int  # prompts a shard
    unanswered: str  # what to do about a prompt that an endpoint never answers: "stop", or "drop" and count it

    def __post_init__(self):
        wrong = [f"{name}: got {getattr(self, name)}, expected 1 or more" for name in ("n", "shard")
                 if getattr(self, name) < 1]
        if self.unanswered not in UNANSWERED:
            wrong.append(f"unanswered: got {self.unanswered!r}, expected one of {UNANSWERED}")
        if wrong:
            raise ValueError("; ".join(wrong))

    def prompt(self, stage: str, id: str, fields: Mapping[str, str]) -> Text:
        """What the model is shown in a stage."""
        return prompts.build(stage, id, fields, chat=self.chat, shots=self.shots, brief=self.brief)

    def sampling(self, stage: str) -> dict:
        """What an engine is told about the answers."""
        return {"n": self.n, "temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens,
                "seed": self.seed, "stops": prompts.stops(stage, shots=0 if self.brief else self.shots)}


Row = dict  # a record as it stands on disk
# The records of a shard -> those to keep, why not the others, and what these share with benchmarks.
Choose = Callable[[list[Any]], tuple[list[Any], Counter, list[Overlap]]]


def stage(out: Path, source: Iterable[Row], engine: Engine, *, name: str, fields: Callable[[Row], dict[str, str]],
          parse: Callable[[Row, Sample], Any], asking: Asking,
          chooser: Callable[[Iterator[Row]], Choose] | None = None, total: int | None = None) -> dict:
    """Ask the stage `name` of every row, and write what `parse` makes of each answer to `out`.

    `fields` gives what `prompts.build` shows; `parse` returns a record or raises `Unusable`. A stage that looks at its
    records together has a `chooser`, which is given what a killed run had kept. Returns the counts, and of them
    in x n = out + sum of dropped.
    """
    part, overlaps = out.with_name(f"{out.stem}.partial.jsonl"), out.with_name("contamination.jsonl")
    if out.is_file():
        return told(stream.counts(out.with_name("progress.json")))
    is_writer = jax.process_index() == 0
    files = [part, overlaps] if chooser else [part]
    with stream.Journal(out.with_name("progress.json"), files, is_writer=is_writer) as journal:
        mesh.wait_for_hosts("open")
        choose = chooser(stream.rows(part)) if chooser else None
        mesh.wait_for_hosts("read")  # only now may the first one append
        rows = itertools.islice(source, journal.done, None)
        with log.progress(what=out.stem, unit="record", total=total, done=journal.done) as bar:
            for shard in stream.chunks(rows, asking.shard):
                # Named by what is asked: with another `shard` the next one is not the one that was begun.
                ids = records.fingerprint([row["id"] for row in shard])
                answers = out.with_name(f"answers-{journal.done}-{ids}.jsonl")
                found, dropped = _shard(answers, shard, engine, name, fields, parse, asking)
                new, refused = {part: found}, Counter()
                if choose:
                    new[part], refused, new[overlaps] = choose(found)
                counts = {"in": Counter(records=len(shard)), "out": Counter(records=len(new[part])),
                          "dropped": dropped + refused}
                journal.commit(new, done=len(shard), counts=counts)
                mesh.wait_for_hosts("committed")
                if is_writer:
                    answers.unlink()
                bar.update(len(shard))
    if is_writer:
        for stale in out.parent.glob("answers-*"):  # of a shard that was committed just before a kill
            stale.unlink()
        os.replace(part, out)
    mesh.wait_for_hosts("done")
    return told(journal.counts)


def _shard(answers: Path, shard: Sequence[Row], engine: Engine, name: str, fields, parse,
           asking: Asking) -> tuple[list, Counter]:
    by_id = {row["id"]: row for row in shard}
    asked = {id: asking.prompt(name, id, fields(row)) for id, row in by_id.items()}
    misfits = engine.too_long([*asked.items()], max_tokens=asking.max_tokens)
    asked = {id: prompt for id, prompt in asked.items() if id not in misfits}
    if misfits:
        log.say(f"{name}: {len(misfits)} of {len(shard)} prompts and max_tokens={asking.max_tokens} do not fit into "
                "the model's positions; fewer `shots` make prompts shorter, asking.brief=True leaves all examples out")
    samples = _answers(answers, engine, name, asked, asking)
    found, dropped = [], Counter({"prompt too long": asking.n * len(misfits)})
    dropped["unanswered"] = asking.n * len(asked) - len(samples)
    for written in samples:
        try:
            found.append(parse(by_id[written.task_id], written))
        except Unusable as error:
            dropped[error.reason] += 1
    return found, +dropped


def _answers(path: Path, engine: Engine, name: str, asked: dict[str, Text], asking: Asking) -> list[Sample]:
    try:
        return sample.to_file(path, engine, asked, **asking.sampling(name))
    except engines.Unanswered as error:
        if asking.unanswered == "stop" or error.is_halted:
            raise
        left = {id: prompt for id, prompt in asked.items() if id not in error.failures}
        return sample.to_file(path, engine, left, **asking.sampling(name))


def told(counts: dict[str, Counter]) -> dict:
    """What a journal counted, as a stage reports it."""
    return {"in": counts.get("in", {}).get("records", 0), "out": counts.get("out", {}).get("records", 0),
            "dropped": dict(counts.get("dropped", Counter()).most_common())}

