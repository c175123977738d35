"""Score programs with the real EvalPlus, on HumanEval+, MBPP+ or any file in EvalPlus' format.

The way is `problems` -> `prompt` -> a sampler -> `solutions` -> `score` -> `records.Score`.
Prompts, stop strings and sanitizer are those of `evalplus.codegen`; `evalplus.evaluate` runs as a
process of its own.

Where this differs from typing `evalplus.evaluate`:
- one process scores every run (model), and a program that several samples share is executed once:
  equal programs have equal verdicts, so the runs differ by their models, not by the machine;
- the reference times, which bound the samples' time, are measured anew each time; EvalPlus keeps
  them in the user's cache, and with it takes them to other machines;
- samples see neither the user's environment nor the standard input, and hash seeds are fixed.

EvalPlus' guard is no security sandbox: `wrap` takes the command prefix of one.

With EvalPlus 0.3.1 an entry point named `find_zero` (HumanEval/32) fails whatever the program does:
its special oracle records no test as passed (fixed in evalplus#241, after 0.3.1).
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from align_jax import records

OFFICIAL = {"humaneval": ("HumanEvalPlus", "v0.1.10"), "mbpp": ("MbppPlus", "v0.2.0")}

# Local variables of evalplus.codegen.run_codegen, so not to be imported; a test holds them equal.
INSTRUCTION = ("Please provide a self-contained Python script that solves the following problem "
               "in a markdown code block:")
RESPONSE = ("Below is a Python script with a self-contained function that solves the problem "
            "and passes corresponding tests:")

# EvalPlus' sanitizer tries every window of lines: 0.8 s for 200 lines of prose, 5 s for 400.
MAX_LINES = 200

# EvalPlus' watchdog thread keeps a finished process for up to 20 s more, and a failed one for ever.
LAUNCH = """
import os, traceback
from evalplus import evaluate
try:
    evaluate.main()
except BaseException:
    traceback.print_exc()
    os._exit(1)
os._exit(0)
"""


def problems(benchmark: str, path: str | Path | None = None) -> list[records.Problem]:
    """Read "humaneval" or "mbpp" as EvalPlus has them, or a file in its format under any name."""
    return records.read(locate(benchmark, path), records.Problem)


def prompt(problem: records.Problem, *, chat: bool) -> str | list[dict]:
    """Build EvalPlus' prompt; a chat ends in an assistant message that the model is to continue."""
    task = problem.prompt.strip()
    if not chat:
        return f"{task}\n"
    return [{"role": "user", "content": f"{INSTRUCTION}\n```\n{task}\n```\n"},
            {"role": "assistant", "content": f"{RESPONSE}\n```python\n"}]


def stops(benchmark: str, *, chat: bool) -> list[str]:
    """List the strings at which EvalPlus ends a completion; they are not part of it."""
    from evalplus.provider import utility

    if chat:
        return [*utility.EOS, "\n```\n"]
    return [*utility.EOS, *utility.extra_eos_for_direct_completion(_format(benchmark))]


def solution(problem: records.Problem, completion: str, *, chat: bool) -> str:
    """Make the program to score from a completion; `solutions` also counts what this loses."""
    return _sanitize(_program(problem, completion, chat=chat), problem.entry_point)[0]


def solutions(
    tasks: Iterable[records.Problem], samples: Iterable[records.Sample], *, chat: bool
) -> tuple[dict[str, list[str]], Counter]:
    """Make {task_id: [program, ...]} of samples, in their order; count what the sanitizer lost.

    EvalPlus' sanitizer removes functions that are decorated or lack a `return`; without its entry
    point a sample fails, however right it was. The reasons counted: "entry point removed",
    "cut to 200 lines", "not sanitized: <error>".
    """
    by_id = {problem.task_id: problem for problem in tasks}
    found, lost = defaultdict(list), Counter()
    for sample in samples:
        problem = by_id[sample.task_id]
        program = _program(problem, sample.completion, chat=chat)
        clean, reason = _sanitize(program, problem.entry_point)
        found[sample.task_id].append(clean)
        lost.update([reason] if reason else [])
    return dict(found), lost


def score(
    programs: Mapping[str, Mapping[str, Sequence[str]]],
    benchmark: str,
    out_dir: str | Path,
    *,
    path: str | Path | None = None,
    parallel: int = 2,
    min_time_limit: float = 4.0,
    memory_bytes: int = 4 << 30,
    timeout: float = 3600.0,
    wrap: Sequence[str] = (),
) -> list[records.Score]:
    """Run EvalPlus once on {run: {task_id: [program, ...]}}; score every program, in that order.

    A test may take `min_time_limit` seconds, or 4 times the reference's if that is more;
    `memory_bytes` bounds a sample's address space (-1: no bound; Mbpp/255 needs that). Statuses are
    EvalPlus': a test that is too slow is a "fail"; "timeout" is a program that never returned or
    whose process died. The plus benchmark is solved where `base` and `plus` are both "pass".

    Leaves in `out_dir` samples.jsonl and samples_eval_results.json (the distinct programs),
    evalplus.log, and evalplus.json (versions and settings). `wrap` is a command prefix, say a
    sandbox's, that shows the interpreter and the benchmark's file and lets `out_dir` be written.

    Raises:
      ValueError: a run lacks a task or names an unknown one, or the benchmark's file is not there.
      RuntimeError, TimeoutError: EvalPlus failed, or took more than `timeout` seconds in all.
    """
    file, out = locate(benchmark, path).resolve(), Path(out_dir).resolve()
    _check(programs, [problem.task_id for problem in problems(benchmark, file)])
    wanted = [(run, task, index, program) for run, tasks in programs.items()
              for task, answers in tasks.items() for index, program in enumerate(answers)]
    distinct = dict.fromkeys((task, program) for _, task, _, program in wanted)
    lines = [json.dumps({"task_id": task, "solution": program}) for task, program in distinct]
    out.mkdir(parents=True, exist_ok=True)
    (out / "samples.jsonl").write_text("\n".join(lines) + "\n")  # ASCII: lone surrogates pass too

    command = [*wrap, sys.executable, "-uP", "-c", LAUNCH, "--dataset", _format(benchmark),
               "--samples", "samples.jsonl", "--parallel", str(parallel),
               "--min_time_limit", str(min_time_limit)]
    began = time.monotonic()
    _run(command, out, file=file, memory_bytes=memory_bytes, timeout=timeout)
    seconds = round(time.monotonic() - began, 1)

    md5, verdicts = _results(out, file)
    note = {"evalplus": importlib.metadata.version("evalplus"), "benchmark": benchmark,
            "file": file.name, "md5": md5, "parallel": parallel, "min_time_limit": min_time_limit,
            "memory_bytes": memory_bytes, "wrap": list(wrap), "runs": list(programs),
            "programs": len(wanted), "distinct": len(distinct), "seconds": seconds}
    (out / "evalplus.json").write_text(json.dumps(note, indent=1) + "\n")
    # A program that EvalPlus did not echo is a KeyError here, never a silent loss.
    return [records.Score(run=run, task_id=task, index=index, base=base, plus=plus)
            for run, task, index, program in wanted for base, plus in [verdicts[task, program]]]


def _format(benchmark: str) -> str:
    return "mbpp" if benchmark == "mbpp" else "humaneval"


def locate(benchmark: str, path: str | Path | None) -> Path:
    """Find a benchmark: `path`, else EvalPlus' override variable, else its cache or download."""
    if path is not None:
        return Path(path)
    if benchmark not in OFFICIAL:
        raise ValueError(f"benchmark: got {benchmark!r} without a path, expected a path to a file "
                         f"in EvalPlus' format, or one of {sorted(OFFICIAL)}")
    from evalplus.data import utils

    variable = f"{benchmark.upper()}_OVERRIDE_PATH"
    if variable in os.environ:
        return Path(os.environ[variable])
    url, cached = utils.get_dataset_metadata(*OFFICIAL[benchmark], mini=False)
    try:
        utils.make_cache(url, cached)
    except OSError as error:
        raise ValueError(f"{benchmark}: cannot download {url} ({error}). Offline, give the file as "
                         f"`path` or in {variable}, or put it, unpacked, at {cached}") from error
    return Path(cached)


def _program(problem: records.Problem, completion: str, *, chat: bool) -> str:
    completion = completion.replace("\t", "    ")  # as EvalPlus does to every output
    return completion if chat else prompt(problem, chat=False) + completion


def _sanitize(program: str, entry_point: str) -> tuple[str, str]:
    """Return what EvalPlus' sanitizer leaves of a program, and what went wrong ("": nothing)."""
    from evalplus import sanitize

    lines = program.split("\n")
    text = "\n".join(lines[:MAX_LINES])
    with warnings.catch_warnings():
        # It parses the sample: were warnings errors, an odd escape would be a syntax error.
        warnings.simplefilter("ignore")
        try:
            clean = sanitize.sanitize(text, entry_point)
            removed = not _defines(clean, entry_point) and _defines(
                sanitize.code_extract(text), entry_point)
        except (ValueError, RecursionError) as error:  # null bytes, lone surrogates; deep nesting
            return program, f"not sanitized: {type(error).__name__}"
    if len(lines) > MAX_LINES:
        return clean, f"cut to {MAX_LINES} lines"
    return clean, "entry point removed" if removed else ""


def _defines(program: str, name: str) -> bool:
    return re.search(rf"^(async +)?def +{name}\b", program, re.MULTILINE) is not None


def _check(programs: Mapping[str, Mapping[str, Sequence[str]]], tasks: Sequence[str]) -> None:
    """Refuse what EvalPlus would stop at without a name, or leave out with a warning."""
    wrong = [] if programs else ["no run at all"]
    for run, answers in programs.items():
        missing = [task for task in tasks if not answers.get(task)]
        unknown = sorted(answers.keys() - set(tasks))
        for what, names in (("lacks", missing), ("has unknown", unknown)):
            if names:
                more = ", ..." if len(names) > 5 else ""
                wrong.append(f"run {run!r} {what} {len(names)}: {', '.join(names[:5])}{more}")
    if wrong:
        raise ValueError(f"expected of every run a program for each of the {len(tasks)} tasks:\n  "
                         + "\n  ".join(wrong))


def _run(
    command: Sequence[str], out: Path, *, file: Path, memory_bytes: int, timeout: float
) -> None:
    """Run EvalPlus in `out`, its output to evalplus.log; leave no process and no cache of it."""
    log = out / "evalplus.log"
    (out / "samples_eval_results.json").unlink(missing_ok=True)  # EvalPlus would report it again
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
            if name in os.environ}
    for left_by_a_kill in out.glob("cache-*"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    # The cache also holds the samples' folders; one just killed may still be writing there.
    with tempfile.TemporaryDirectory(dir=out, prefix="cache-", ignore_cleanup_errors=True) as cache:
        env = kept | {"HUMANEVAL_OVERRIDE_PATH": str(file), "MBPP_OVERRIDE_PATH": str(file),
                      "EVALPLUS_MAX_MEMORY_BYTES": str(memory_bytes), "HOME": cache,
                      "XDG_CACHE_HOME": cache, "TMPDIR": cache, "OMP_NUM_THREADS": "1",
                      "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, cwd=out, env=env, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"EvalPlus took more than {timeout} s; {_tail(log)}") from None
        finally:
            if process.returncode != 0:  # Ctrl-C too: the samples' processes must not outlive us
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"EvalPlus ended with status {process.returncode}; {_tail(log)}")


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace").replace("\r", "\n")  # tqdm rewrites its line
    return f"the end of {log}:\n" + "\n".join(text.splitlines()[-20:])


def _results(out: Path, file: Path) -> tuple[str, dict[tuple[str, str], tuple[str, str]]]:
    """Read the scored file's md5 and {(task_id, program): (base, plus)}."""
    results = json.loads((out / "samples_eval_results.json").read_text())
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    assert results["hash"] == md5, f"EvalPlus scored {results['hash']}, not {file} ({md5})"
    return md5, {(row["task_id"], row["solution"]): (row["base_status"], row["plus_status"])
                 for rows in results["eval"].values() for row in rows}
