"""How far a model's own tests can be trusted: it answers a benchmark's problems with tests, and EvalPlus judges too.

    python -m align_jax.synth.ground_truth --config=configs/synth.py --config.run=FOLDER --config.start=CHECKPOINT \\
        --config.truth.benchmark=humaneval

The problems take the place of invented tasks; responses and their verdicts are made as for pairs. Nothing of this is
for training. Writes FOLDER/truth/truth.jsonl, the verdicts of EvalPlus on the same programs, and agreement.json.
"""

import ast
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from align_jax import log, records, sandbox
from align_jax.records import Judged, Problem, Task
from align_jax.score import evalplus
from align_jax.synth import pipeline, stream, validate


def agreement(c: Mapping) -> validate.Agreement:
    """Let a model answer a benchmark with its own tests; compare their verdicts with EvalPlus'."""
    truth, folder = c["truth"], Path(c["run"]) / "truth"  # apart from what is for training
    path = evalplus.locate(truth["benchmark"], truth["path"])
    log.claim(folder, {"truth": truth, "problems": records.fingerprint(path)})
    problems = evalplus.problems(truth["benchmark"], path)
    records.write(folder / "tasks" / "tasks.jsonl", map(task, problems[:truth["count"]]))
    pipeline.make(c | {"run": str(folder), "stages": "responses,verdicts"})
    work = functools.partial(judge, folder, problems, truth["benchmark"], path, c["sandbox"]["backend"],
                             **truth["evalplus"])
    log.once(folder / "stages.json", "truth", work)
    found, dropped = validate.labels(records.read(folder / "verdicts" / "verdicts.jsonl", Judged),
                                     records.read(folder / "truth.jsonl", Judged))
    log.write_json(folder / "agreement.json", dataclasses.asdict(found) | {"dropped": dict(dropped)})
    return found


def task(problem: Problem) -> Task:
    """A problem as a task: what a function is called and given, and what it does, in words."""
    return Task(id=problem.task_id, seed_id=problem.task_id, category="function", difficulty="", concepts=[],
                instruction=instruction(problem))


def instruction(problem: Problem) -> str:
    """Say a problem's prompt as an instruction: a documented function in words, a docstring (MBPP) as its text."""
    try:
        body = ast.parse(problem.prompt).body
    except SyntaxError:
        return problem.prompt.strip()
    match [statement for statement in body if not isinstance(statement, ast.Import | ast.ImportFrom)]:
        case [ast.FunctionDef(name=problem.entry_point, args=args) as function] if ast.get_docstring(function):
            return f"Write a Python function `{function.name}({ast.unparse(args)})`. {ast.get_docstring(function)}"
        case [ast.Expr(value=ast.Constant(value=str(text)))]:
            return text.strip()
    return problem.prompt.strip()


def judge(folder: Path, problems: Iterable[Problem], benchmark: str, path: Path, backend: str, **settings) -> dict:
    """Write EvalPlus' verdicts, on the base and the plus tests, on the programs of the responses."""
    responses = [row for row in stream.rows(folder / "responses" / "responses.jsonl")]
    programs = defaultdict(list)
    for row in responses:
        programs[row["task_id"]].append(row["program"])
    asked = {problem.task_id: programs[problem.task_id] or [""] for problem in problems}  # EvalPlus wants all tasks
    out = (folder / "evalplus").resolve()
    out.mkdir(parents=True, exist_ok=True)
    wrap = sandbox.prefix(backend, reads=[path.resolve()], writes=out)
    scores = evalplus.score({"responses": asked}, benchmark, out, path=path, wrap=wrap, **settings)
    right = {(s.task_id, s.index): s.base == s.plus == "pass" for s in scores}

    def verdicts() -> Iterator[Judged]:
        index = defaultdict(int)
        for row in responses:
            is_right = right[row["task_id"], index[row["task_id"]]]
            index[row["task_id"]] += 1
            yield Judged(id=row["id"], task_id=row["task_id"], prompt=row["prompt"], completion=row["completion"],
                         finish=row["finish"], status="passed" if is_right else "assertion", detail="EvalPlus",
                         reward=float(is_right))

    count = records.write(folder / "truth.jsonl", verdicts())
    return {"in": len(responses), "out": count, "dropped": {}, "right": sum(right.values())}


def main(c: Mapping) -> None:
    """Print the agreement of a model's own labels with a benchmark's."""
    log.check_set(c)
    for name, value in dataclasses.asdict(agreement(c)).items():
        log.say(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    log.say(f"{c['run']}/truth: wrote truth.jsonl and agreement.json; precision: how many of those that pass their own "
            "tests are right; rejected_precision: how many that fail them are wrong; recall: how many right ones pass")


if __name__ == "__main__":
    log.command(main)
