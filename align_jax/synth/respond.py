"""Tasks to responses: n answers to each, with the tests that the model wrote for its own code.

    python -m align_jax.synth.pipeline --config=configs/synth.py --config.run=FOLDER --config.start=CHECKPOINT

Stage I->R of SelfCodeAlign (arXiv:2410.24198, section 2). For a non-functional data set every task is dealt one
dimension in turn, whose principle the model is shown (arXiv:2606.28998, section 3.2); the pair's prompt is the
instruction alone, as a trained model will be asked.

`rewrite` is the second of two passes: one response of each task that passed is the draft that the model improves for a
dimension. What comes of it is judged by the tests that the draft has passed, and stands beside the draft.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from align_jax import records
from align_jax.engine import Engine
from align_jax.records import Response, Sample
from align_jax.synth import answers, dimensions, stream, write
from align_jax.synth.write import Asking


def respond(out: Path, tasks: Path, engine: Engine, asking: Asking, *, prompt: str,
            names: Sequence[str] = ()) -> dict:
    """Write n responses to every task, taken apart; return the counts.

    `prompt` is what a pair will show to a model, with "{instruction}" in it; `names` are dimensions.
    """
    check(prompt)

    def parse(row: Mapping, written: Sample) -> Response:
        found = answers.answer(written.completion, finish=written.finish)
        shown = prompt.replace("{instruction}", row["instruction"])
        return Response(id=written.id, task_id=row["id"], completion=written.completion,
                        prompt=[{"role": "user", "content": shown.strip()}] if asking.chat else shown,
                        finish=written.finish, solution_text=found.response, program=found.program,
                        tests=[*found.tests], instruction=row["instruction"], dimension=row["dimension"])

    return write.stage(out, dimensions.deal(stream.rows(tasks), names), engine, name="response", asking=asking,
                       fields=lambda row: {"instruction": row["instruction"]} | _principle(row), parse=parse,
                       total=stream.count(tasks))


def drafts(out: Path, responses: Path, judged: Path, *, names: Sequence[str], seed: int) -> dict:
    """Write one response of each task that passed, drawn by its id, with the dimension it is to be rewritten for."""
    num_tasks = itertools.count()

    def passing() -> Iterator[dict]:
        both = zip(stream.rows(responses), stream.rows(judged), strict=True)
        for _, group in itertools.groupby(both, key=lambda sides: sides[0]["task_id"]):
            next(num_tasks)
            passed = [response for response, verdict in group if _passed(response, verdict)]
            if passed:
                yield min(passed, key=lambda row: records.fingerprint(seed, row["id"]))

    count = records.write(out, dimensions.deal(passing(), names))
    of = next(num_tasks)
    return {"in": of, "out": count, "dropped": {"no response passed": of - count} if of > count else {}}


def rewrite(out: Path, drafts: Path, engine: Engine, asking: Asking) -> dict:
    """Write n rewritten responses to every draft, to be run against its tests."""
    def fields(row: Mapping) -> dict[str, str]:
        return {"instruction": row["instruction"], "draft": row["solution_text"]} | _principle(row)

    def parse(row: Mapping, written: Sample) -> Response:
        found = answers.rewritten(written.completion, finish=written.finish)
        return Response(**row | {"id": written.id, "completion": written.completion, "finish": written.finish,
                                 "solution_text": found.response, "program": found.program})

    return write.stage(out, stream.rows(drafts), engine, name="rewrite", fields=fields, parse=parse, asking=asking,
                       total=stream.count(drafts))


def side_by_side(drafts: Path, rewrites: Path) -> Iterator[dict]:
    """Each draft that was rewritten, with what came of it: the responses of one task."""
    first = stream.rows(drafts)
    for task_id, group in itertools.groupby(stream.rows(rewrites), key=itemgetter("task_id")):
        yield next(draft for draft in first if draft["task_id"] == task_id)
        yield from group


def _passed(response: Mapping, verdict: Mapping) -> bool:
    if response["id"] != verdict["id"]:
        raise ValueError(f"verdicts: got that on {verdict['id']!r}, expected that on {response['id']!r}")
    return verdict["status"] == "passed"


def check(prompt: str) -> None:
    """Refuse a prompt that would not show the instruction."""
    if prompt.count("{instruction}") != 1:
        raise ValueError(f"response.prompt: got {prompt!r}, expected text with {{instruction}} in it, once")


def _principle(row: Mapping) -> dict[str, str]:
    name = row["dimension"]
    return {"principle": dimensions.principle(name, row["task_id"] if "task_id" in row else row["id"])} if name else {}
