"""Samples to verdicts: every program runs against its problem's tests, in the sandbox."""

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path

from align_jax import log, records, sandbox, text
from align_jax.records import Judged, Problem, Sample


def verify(path: Path, samples: Sequence[Sample], problems: Mapping[str, Problem], *, backend: str = "auto",
           workers: int | None = None, **limits) -> list[Judged]:
    """Run every sample, identical programs once, and write what became of each to `path`."""
    if path.is_file():
        return records.read(path, Judged)
    tests = {task_id: asserts(problem) for task_id, problem in problems.items()}
    jobs = [(f"{program(s)}\ncandidate = {problems[s.task_id].entry_point}\n", tests[s.task_id]) for s in samples]
    distinct = list(dict.fromkeys(jobs))
    with log.progress(total=len(distinct), what=f"execute {path.parent.name}", unit="program") as bar:
        verdicts = sandbox.run_many(distinct, limits=sandbox.Limits(**limits), backend=backend, workers=workers,
                                    on_done=lambda verdict: bar.update(1))
    verdict_of = dict(zip(distinct, verdicts, strict=True))
    judged = [Judged(id=s.id, task_id=s.task_id, prompt=s.prompt, completion=s.completion, finish=s.finish,
                     status=verdict_of[job].status, detail=verdict_of[job].detail, reward=verdict_of[job].reward)
              for s, job in zip(samples, jobs, strict=True)]
    records.write(path, judged)
    return judged


def program(sample: Sample) -> str:
    """The program a sample stands for: prompt and completion, or the code in a chat answer."""
    if isinstance(sample.prompt, str):
        return sample.prompt + sample.completion
    start = sample.prompt[-1]["content"] if sample.prompt[-1]["role"] == "assistant" else ""
    return text.extract_code(start + sample.completion)


def asserts(problem: Problem) -> tuple[str, ...]:
    """The tests of a HumanEval-style `def check(candidate)`: each assertion, with what stands between it and the last.

    A statement that asserts nothing is no test of its own: any program would pass it.
    """
    body = ast.parse(problem.test).body
    checks = [s for s in body if isinstance(s, ast.FunctionDef) and s.name == "check"]
    tests, setup = [], [s for s in body if s not in checks]
    for statement in checks[0].body if len(checks) == 1 else ():
        setup.append(statement)
        if any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
            tests.append("\n".join(map(ast.unparse, setup)))
            setup = []
    if not tests:
        raise ValueError(f"{problem.task_id}: test is no `def check(candidate)` that asserts: {problem.test[:60]!r}")
    return tuple(tests)
