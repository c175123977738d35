"""Responses to verdicts: every program runs against its tests, in the sandbox.

    python -m align_jax.synth.pipeline --config=configs/synth.py --config.run=FOLDER --config.start=CHECKPOINT

Tests are those that came with a response (`execute`), or those of a benchmark's problem (`verify`). Identical programs
with identical tests run once in a chunk. A chunk is judged on its own, so that it can be judged anywhere; of several
hosts, each takes its share of the chunks, and the first one puts them together.
"""

import ast
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from align_jax import log, mesh, records, sandbox, text
from align_jax.records import Judged, Problem, Sample
from align_jax.synth import checks, stream

UNTESTED = sandbox.Verdict(status="untested", detail="its tests pass without the solution", stdout="", stderr="",
                           seconds=0.0, reward=0.0)
SHARE = 256  # responses in a row that one of several hosts takes
KEPT = ("id", "task_id", "prompt", "completion", "finish", "solution_text", "instruction", "dimension")  # of a response


def execute(out: Path, responses: Iterable[dict], *, backend: str = "auto", workers: int = 1, runner: str = "local",
            chunk: int = 256, total: int | None = None, **limits) -> dict:
    """Run every response's program against its own tests; write a verdict for each, in order; return the counts.

    A killed run continues behind its last chunk, on as many hosts as before.
    """
    host, hosts = jax.process_index(), jax.process_count()
    names = [f"{out.stem}-{k}-of-{hosts}" for k in range(hosts)]
    if not out.is_file():
        part, mine = out.with_name(f"{names[host]}.jsonl"), _share(responses, host, hosts)
        work = functools.partial(judge, backend=sandbox.backend(backend), limits=sandbox.Limits(**limits))
        take = lambda judged: ({part: judged}, len(judged), {"verdicts": Counter(j.status for j in judged)})
        with stream.Journal(out.with_name(f"{names[host]}.json"), [part]) as journal:
            journal.extend(work, itertools.islice(mine, journal.done, None), take, chunk=chunk, lost=_lost,
                           runner=runner, workers=workers, what="execute", unit="program", total=total)
        mesh.wait_for_hosts("executed")
        if host == 0:
            records.write(out, _joined([out.with_name(f"{name}.jsonl") for name in names]))
        mesh.wait_for_hosts("joined")
    counts = [stream.counts(out.with_name(f"{name}.json")) for name in names]  # {} of a host whose share was empty
    verdicts = sum((count.get("verdicts", Counter()) for count in counts), Counter())
    return {"in": verdicts.total(), "out": verdicts.total(), "dropped": {}, "verdicts": dict(verdicts.most_common())}


def judge(responses: Sequence[Mapping], *, backend: str, limits: sandbox.Limits) -> list[Judged]:
    """Judge responses by their own tests. Pure but for the machine's load, so any engine maps it.

    Tests that pass run again without the solution: if they still pass, the status is "untested".
    """
    run = functools.partial(run_distinct, backend=backend, limits=limits, workers=1)
    jobs = [(row["program"], tuple(row["tests"])) for row in responses]
    verdict_of = run(jobs)
    passed = [job for job, verdict in verdict_of.items() if verdict.status == "passed"]
    alone = {job: (checks.without(job[0]), job[1]) for job in passed}
    control = run(alone.values())
    verdict_of |= {job: UNTESTED for job in passed if control[alone[job]].status == "passed"}
    return [_judged({name: row[name] for name in KEPT}, verdict_of[job])
            for row, job in zip(responses, jobs, strict=True)]


def verify(path: Path, samples: Sequence[Sample], problems: Mapping[str, Problem], *, backend: str = "auto",
           workers: int | None = None, **limits) -> list[Judged]:
    """Run every sample against the tests of its problem, and write what became of each to `path`."""
    if path.is_file():
        return records.read(path, Judged)
    tests = {task_id: asserts(problem) for task_id, problem in problems.items()}
    jobs = [(f"{program(s)}\ncandidate = {problems[s.task_id].entry_point}\n", tests[s.task_id]) for s in samples]
    with log.progress(total=len(set(jobs)), what=f"execute {path.parent.name}", unit="program") as bar:
        verdict_of = run_distinct(jobs, backend=backend, limits=sandbox.Limits(**limits), workers=workers,
                                  on_done=lambda verdict: bar.update(1))
    judged = [_judged({name: getattr(s, name) for name in KEPT if hasattr(s, name)}, verdict_of[job])
              for s, job in zip(samples, jobs, strict=True)]
    records.write(path, judged)
    return judged


def run_distinct(jobs: Iterable[tuple[str, tuple[str, ...]]], **how) -> dict[tuple, sandbox.Verdict]:
    """Run (program, tests) jobs, identical ones once; return the verdict of each."""
    distinct = list(dict.fromkeys(jobs))
    return dict(zip(distinct, sandbox.run_many(distinct, **how), strict=True))


def _share(rows: Iterable[dict], host: int, hosts: int) -> Iterator[dict]:
    """The rows of a host, whatever its chunks."""
    for number, rows_of_one in enumerate(stream.chunks(rows, SHARE)):
        if number % hosts == host:
            yield from rows_of_one


def _joined(parts: Sequence[Path]) -> Iterator[dict]:
    """The rows of all hosts in the order that `_share` found them in."""
    for rows in itertools.cycle([stream.rows(part) for part in parts]):
        found = list(itertools.islice(rows, SHARE))
        yield from found
        if len(found) < SHARE:
            return


def _judged(fields: Mapping, verdict: sandbox.Verdict) -> Judged:
    return Judged(**fields, status=verdict.status, detail=verdict.detail, reward=verdict.reward)


def _lost(row: Mapping) -> list[Judged]:
    """The verdict on a response whose program ended the process that ran it, twice: no fault of its own."""
    verdict = sandbox.Verdict(status="sandbox", detail="the process that judged it was killed", stdout="", stderr="",
                              seconds=0.0, reward=0.0)
    return [_judged({name: row[name] for name in KEPT}, verdict)]


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
