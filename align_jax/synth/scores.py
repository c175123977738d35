"""Verdicts to scores: how good each response is in the dimension under whose principle it was written.

The scorer of a dimension is static analysis (`score.static.judge`) or a model behind an engine (`dimensions.rater`);
either takes a dimension and (instruction, answer) items. Two models can be compared as judges (`compare`). Nothing is
dropped: a response of which the scorer can say nothing has the score None, and `pairs` counts it.
"""

import functools
import heapq
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from align_jax import log, records
from align_jax.records import Judged
from align_jax.score.static import Judge
from align_jax.synth import stream, validate


def score(out: Path, judged: Iterable[Mapping], *, judge: Judge, dimensions: Sequence[str] = (), runner: str = "local",
          workers: int = 1, chunk: int = 256, total: int | None = None) -> dict:
    """Write the judged responses with a score for each of the dimensions, or for their own; return the counts.

    A killed run continues behind its last chunk.
    """
    part, journal_path = out.with_name(f"{out.stem}.partial.jsonl"), out.with_name("progress.json")
    if not out.is_file():
        work = functools.partial(annotate, judge=judge, dimensions=tuple(dimensions))

        def take(scored: list[Judged]) -> stream.Growth:
            silent = Counter(name for response in scored for name, value in response.scores.items() if value is None)
            return {part: scored}, len(scored), {"in": Counter(records=len(scored)), "no verdict": silent}

        with stream.Journal(journal_path, [part]) as journal:
            journal.extend(work, itertools.islice(judged, journal.done, None), take, chunk=chunk, lost=_lost,
                           runner=runner, workers=workers, what="score", unit="answer", total=total)
        os.replace(part, out)
    counts = stream.counts(journal_path)
    num = counts["in"]["records"]
    return {"in": num, "out": num, "dropped": {}, "no verdict": dict(counts["no verdict"])}


def compare(out: Path, judged: Iterable[Mapping], judges: Mapping[str, Judge], *, count: int, seed: int,
            dimensions: Sequence[str] = ()) -> dict:
    """Let two judges rate the same `count` responses, drawn by their ids; write how far they agree, by dimension.

    On each of the dimensions, or on the responses' own. Ratings are rounded to whole points, for Cohen's kappa
    (`validate.raters`); None where there is no response that both rated.
    """
    drawn = heapq.nsmallest(count, judged, key=lambda row: records.fingerprint(seed, row["id"]))
    whole = {name: functools.partial(_in_points, judge) for name, judge in judges.items()}
    found = {}
    for dimension in dimensions or sorted({row["dimension"] for row in drawn}):
        items = [item(Judged(**row)) for row in drawn if dimensions or row["dimension"] == dimension]
        try:
            (rating,) = validate.judges(whole, dimension, items).values()
            found[dimension] = asdict(rating)
        except ValueError as error:
            found[dimension] = {"kappa": None, "why": str(error)}
    log.write_json(out, found)
    return {"kappa of two judges": {dimension: rating["kappa"] for dimension, rating in found.items()}}


def _in_points(judge: Judge, dimension: str, items: Sequence[tuple[str, str]]) -> list[float | None]:
    return [None if rating is None else float(round(rating)) for rating in judge(dimension, items)]


def annotate(rows: Sequence[Mapping], *, judge: Judge, dimensions: tuple[str, ...]) -> list[Judged]:
    """Score responses. Pure if the judge is, so any engine maps it."""
    batch = [Judged(**row) for row in rows]
    scores = [dict(response.scores) for response in batch]
    for dimension in dimensions or sorted({response.dimension for response in batch}):
        asked = [k for k, response in enumerate(batch) if dimensions or response.dimension == dimension]
        for k, value in zip(asked, judge(dimension, [item(batch[k]) for k in asked]), strict=True):
            scores[k][dimension] = value
    return [replace(response, scores=scored) for response, scored in zip(batch, scores, strict=True)]


def item(response: Judged) -> tuple[str, str]:
    """What a judge is shown of a response: the instruction, and the answer as it stands in a pair, without tests.

    A plain prompt is continued, and a chat may have begun the answer: the program starts there.
    """
    answer = response.completion if response.solution_text is None else response.solution_text
    if response.instruction:
        return response.instruction, answer
    if isinstance(response.prompt, str):
        return response.prompt, answer if "```" in answer else response.prompt + answer
    start = response.prompt[-1]["content"] if response.prompt[-1]["role"] == "assistant" else ""
    asked = [message["content"] for message in response.prompt if message["role"] == "user"]
    return "\n\n".join(asked), start + answer


def _lost(row: Mapping) -> list[Judged]:
    """A response that ends the process of whoever looks at it gets no verdict."""
    return [replace(Judged(**row), scores=row["scores"] | {row["dimension"]: None})]
