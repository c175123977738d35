"""Seeds to tasks: a model names the concepts in a function, and invents a task that needs them.

    python -m align_jax.synth.pipeline --config=configs/synth.py --config.run=FOLDER --config.start=CHECKPOINT

Stages S->C and C->I of SelfCodeAlign (arXiv:2410.24198, section 2). The properties of a task are drawn by its record's
id and kept as fields. Deviation: tasks are compared with the benchmarks and with each other here (Jaccard index of word
5-grams, 0.7 as there at the end), before a single response to them is paid for.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from align_jax import records
from align_jax.engine import Engine, answered
from align_jax.records import Concepts, Sample, Task
from align_jax.synth import answers, decontaminate, near, prompts, stream, write
from align_jax.synth.decontaminate import Embed
from align_jax.synth.write import Asking, Choose

IN_A_BENCHMARK, NEAR = "in a benchmark", "near-duplicate"  # why a task is not kept


def docstring_judge(engine: Engine, asking: Asking) -> Callable[[list[str]], list[bool]]:
    """Make a judge for `seeds`: functions -> whether a model finds that the docstring describes each.

    It is asked `asking.n` times; a tie is a no, as in SelfCodeAlign's filter.
    """
    def judge(functions: list[str]) -> list[bool]:
        ids = {records.fingerprint(code): code for code in functions}
        asked = [(id, asking.prompt("docstring", id, {"function": code})) for id, code in ids.items()]
        misfits = engine.too_long(asked, max_tokens=asking.max_tokens)
        asked = [item for item in asked if item[0] not in misfits]  # whom nobody can ask about is not kept
        said = answered(engine, asked, stop=asking.unanswered == "stop", **asking.sampling("docstring"))
        votes = {id: Counter(answers.verdict(c.text) for c in said.get(id, ())) for id in ids}
        return [votes[records.fingerprint(code)][True] > votes[records.fingerprint(code)][False]
                for code in functions]

    return judge


def concepts(out: Path, seeds: Path, engine: Engine, asking: Asking, *, count: int | None = None) -> dict:
    """Write the concepts that a model sees in each of the first `count` seeds; return the counts."""
    def parse(seed: Mapping, written: Sample) -> Concepts:
        return Concepts(id=written.id, seed_id=seed["id"],
                        concepts=answers.concepts(written.completion, finish=written.finish))

    return write.stage(out, itertools.islice(stream.rows(seeds), count), engine, name="concepts",
                       fields=lambda seed: {"seed": seed["code"]}, parse=parse, asking=asking,
                       total=min(stream.count(seeds), count or stream.count(seeds)))


def tasks(out: Path, named: Path, engine: Engine, asking: Asking, *, categories: Sequence[str],
          words: tuple[int, int], near_duplicate: float, benchmarks: Sequence[str], embed: Embed | None = None) -> dict:
    """Write tasks that need the concepts of a seed, none of them like another or like a benchmark's."""
    draw = functools.partial(prompts.draw_properties, categories=categories)

    def fields(row: Mapping) -> dict[str, str]:
        return {"properties": prompts.properties(concepts=row["concepts"], **draw(row["id"]))}

    def parse(row: Mapping, written: Sample) -> Task:
        found = answers.instruction(written.completion, finish=written.finish, words=words)
        return Task(id=written.id, seed_id=row["seed_id"], concepts=row["concepts"], instruction=found,
                    **draw(row["id"]))

    counts = write.stage(out, stream.rows(named), engine, name="instruction", fields=fields, parse=parse, asking=asking,
                         total=stream.count(named),
                         chooser=functools.partial(new, near_duplicate=near_duplicate, benchmarks=tuple(benchmarks),
                                                   embed=embed))
    checked = sum(counts["dropped"].get(reason, 0) for reason in (IN_A_BENCHMARK, NEAR)) + counts["out"]
    if jax.process_index() == 0:
        decontaminate.report(out.parent, decontaminate.index(tuple(benchmarks)), checked=checked)
    return counts


def new(kept: Iterator[Mapping], *, near_duplicate: float, benchmarks: tuple[str, ...],
        embed: Embed | None = None) -> Choose:
    """Make the choice of tasks that share nothing with a benchmark and are near to none that was kept."""
    index, seen = decontaminate.index(benchmarks), near.seen(near_duplicate)
    meaning = decontaminate.semantic(index, embed)
    for row in kept:
        seen.add(row["id"], near.digest(row["instruction"]))

    def choose(found: list[Task]):
        overlaps = [overlap for task in found for overlap in decontaminate.find(index, task.id, task.instruction)]
        known = {overlap.record for overlap in overlaps}
        overlaps += meaning({task.id: task.instruction for task in found if task.id not in known})
        shared = {overlap.record for overlap in overlaps}
        own = [task for task in found if task.id not in shared]
        fresh = [task for task in own if seen.add(task.id, near.digest(task.instruction))]
        dropped = Counter({IN_A_BENCHMARK: len(found) - len(own), NEAR: len(own) - len(fresh)})
        return fresh, dropped, overlaps

    return choose
