"""What carries the stages: the same records from the local pool and from Ray, whatever is killed; a journal that lasts.

Ray is its local runner with two workers. Everything asked of one runner is asked of the other.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import chunk_work
import pytest

from align_jax import records
from align_jax.synth import decontaminate, seeds, stream

ROOT = Path(__file__).parents[1]
POCKET = (str(ROOT / "align_jax" / "pocket" / "PocketEval.jsonl.gz"),)
FILTERING = {"max_lines": 150, "banned_words": ("todo", "bug"), "banned_imports": ("argparse", "os", "sys")}


@pytest.fixture(scope="module")
def two_workers():
    """A Ray of this machine, once for all tests; gives the folder that names its processes, and its address."""
    ray = pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: the path of a socket has 107 characters at most
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", f"{ROOT}:{Path(__file__).parent}", prepend=":")  # chunk_work is not installed
        here = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
                        logging_level="ERROR", object_store_memory=2**27, _temp_dir=folder)
        yield folder, here.address_info["gcs_address"]
        ray.shutdown()
    assert not processes(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["local", "ray"])
def runner(request) -> str:
    if request.param == "ray":
        request.getfixturevalue("two_workers")
    return request.param


def processes(folder: str, *, seconds: float = 30.0) -> list[str]:
    """The command lines that name a folder, once they had time to end."""
    until = time.monotonic() + seconds
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                found += [line for line in [path.read_text()] if folder in line and int(path.parts[2]) != os.getpid()]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def flat(results) -> list:
    return list(itertools.chain.from_iterable(results))


# --- the runners


def test_results_come_in_order_and_little_is_read_ahead(runner):
    read = []
    items = (read.append(i) or i for i in range(10**9))
    results = stream.ordered_by(runner)(chunk_work.square, stream.chunks(items, 5), workers=2, lost=None)
    for n, result in enumerate(itertools.islice(results, 60)):
        assert result == [i * i for i in range(5 * n, 5 * n + 5)] and len(read) <= 5 * (n + 4)
    results.close()
    assert n == 59 and len(read) <= 5 * 63


def test_what_kills_its_worker_is_found_and_the_rest_is_done(runner):
    work = partial(chunk_work.deadly, poison=(6, 12))
    results = stream.ordered_by(runner)(work, stream.chunks(range(13), 4), workers=2,
                                         lost=lambda item: [f"lost {item}"])
    assert flat(results) == [f"lost {i}" if i in (6, 12) else i * i for i in range(13)]


def test_a_worker_that_is_killed_loses_nothing(runner, tmp_path):
    told = tmp_path / "pid"

    def kill():
        while not (told.is_file() and told.read_text().endswith("\n")):
            time.sleep(0.01)
        os.kill(int(told.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    results = stream.ordered_by(runner)(partial(chunk_work.waiting, item=17, told=told), stream.chunks(range(40), 1),
                                    workers=2, lost=lambda item: [f"lost {item}"])
    assert flat(results) == [i * i for i in range(40)]
    killer.join()


def test_an_error_of_the_work_is_its_own(runner):
    with pytest.raises(ValueError, match=r"^got \[0, 1\]$"):
        list(stream.ordered_by(runner)(chunk_work.wrong, stream.chunks(range(6), 2), workers=2, lost=None))


def test_runners_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match="runner: got 'dask', expected one of local, ray"):
        stream.ordered_by("dask")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'align_jax\[ray\]'"):
        stream.ordered_by("ray")(chunk_work.square, [[1]], workers=2, lost=None)


# --- the stages: seeds, decontamination, execution


def contents(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in run.iterdir()}


def test_seeds_are_the_same_on_both(two_workers, tmp_path):
    lib = tmp_path / "lib"
    lib.mkdir()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[b-h]*.py")):
        shutil.copy(file, lib)
    counts = [seeds.gather(tmp_path / name, {"path": str(lib), "exclude": ()}, filtering=FILTERING, benchmarks=POCKET,
                           near_duplicate=0.5, runner=name, workers=2, chunk=5) for name in stream.RUNNERS]
    assert counts[0] == counts[1] and counts[1]["out"]["seeds"] > 10 and counts[1]["dropped"]["in a benchmark"]
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")


def test_decontamination_is_the_same_on_both(two_workers, tmp_path):
    rng = random.Random(0)
    task = " ".join(f"w{i}" for i in range(40))
    rows = [{"id": i, "text": task if i % 7 == 3 else " ".join(f"v{rng.randrange(999)}" for _ in range(40))}
            for i in range(60)]
    records.write(tmp_path / "bench.jsonl", [{"task_id": 0, "prompt": task, "canonical_solution": "return 0"}])
    records.write(tmp_path / "rows.jsonl", rows)
    counts = [decontaminate.clean(tmp_path / name, tmp_path / "rows.jsonl", fields=("text",), runner=name, workers=2,
                                  benchmarks=(str(tmp_path / "*nch.jsonl"),), chunk=4) for name in stream.RUNNERS]
    assert counts[0] == counts[1] and counts[1]["dropped"] == {"in a benchmark: exact": 9}
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")


def test_executions_are_the_same_on_both(two_workers):
    jobs = [(f"def f(x):\n    return x {'+-'[n % 2]} {n}\n", (f"assert f({n}) == {2 * n}", f"assert f(0) <= {n}"))
            for n in range(8)] + [("1 / 0", ()), ("def f(:", ()), ("import os\nos._exit(0)", ("assert True",))]
    want = chunk_work.execute(jobs)
    assert Counter(status for status, *_ in want) == {
        "passed": 4, "assertion": 4, "exception": 1, "syntax": 1, "exited": 1}
    for name, ordered in stream.RUNNERS.items():
        assert flat(ordered(chunk_work.execute, stream.chunks(jobs, 3), workers=2, lost=None)) == want, name


@pytest.mark.slow
@pytest.mark.parametrize("cluster", [False, True])
def test_the_command_starts_a_ray_or_joins_a_cluster(two_workers, tmp_path, cluster):
    (tmp_path / "lib").mkdir()
    for n in range(6):
        (tmp_path / "lib" / f"{n}.py").write_text(f'def f(x):\n    """Add {n}."""\n    return x + {n}\n')
    folder, address = two_workers if cluster else (tempfile.mkdtemp(prefix="ray", dir="/tmp"), None)
    env = os.environ | {"RAY_TMPDIR": folder} | ({"RAY_ADDRESS": address} if address else {})
    done = subprocess.run(
        [sys.executable, "-m", "align_jax.synth.seeds", "--config=configs/seeds.py", "--config.runner=ray",
         f"--config.run={tmp_path / 'run'}", f"--config.source.path={tmp_path / 'lib'}", "--config.chunk=1",
         "--config.near_duplicate=1.0"], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    assert "6 seeds of 6 functions in 6 documents" in done.stdout.splitlines()[-1]
    if not cluster:
        assert not processes(folder)
        shutil.rmtree(folder)


# --- the journal


def write(folder: Path, items: range, *, chunk: int, kill_after: int | None = None) -> stream.Journal:
    """A stage in small: two files, a count, continued behind what is done."""
    even, odd = folder / "even.jsonl", folder / "odd.jsonl"
    with stream.Journal(folder / "progress.json", [even, odd]) as journal:
        for n, part in enumerate(stream.chunks(items[journal.done:], chunk)):
            if n == kill_after:
                even.open("ab").write(b'{"half": "a li')  # what a kill between write and commit leaves
                return journal
            counts = {"in": Counter(items=len(part)), "odd": Counter(str(i % 4) for i in part)}
            journal.commit({even: [{"n": i} for i in part if not i % 2], odd: [{"n": i} for i in part if i % 2]},
                           done=len(part), counts=counts)
    return journal


@pytest.mark.parametrize("kills", [(0,), (1, 0, 2), (3, 3, 1)])
def test_a_journal_taken_up_again_is_as_if_never_killed(tmp_path, kills):
    whole = write(tmp_path / "whole", range(50), chunk=4)
    for after in kills:
        write(tmp_path / "killed", range(50), chunk=3, kill_after=after)
    resumed = write(tmp_path / "killed", range(50), chunk=7)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert resumed.done == whole.done == 50 and stream.counts(tmp_path / "killed" / "progress.json") == {
        "in": {"items": 50}, "odd": {"0": 13, "1": 13, "2": 12, "3": 12}}
    assert [row["n"] for row in stream.rows(tmp_path / "killed" / "odd.jsonl")] == [*range(1, 50, 2)]


def test_a_kill_within_a_commit_is_before_or_after_it(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole", range(20), chunk=5)
    replace, calls = os.replace, []

    def dying(src, dst):
        calls.append(dst)
        if len(calls) == 3:
            raise KeyboardInterrupt  # rows are in their files; what counts them is not
        replace(src, dst)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "killed", range(20), chunk=5)
    monkeypatch.undo()
    assert json.loads((tmp_path / "killed" / "progress.json").read_text())["done"] == 10
    assert write(tmp_path / "killed", range(20), chunk=5).counts == whole.counts
    assert contents(tmp_path / "killed").items() >= contents(tmp_path / "whole").items()


def test_two_processes_do_not_write_one_folder(tmp_path):
    held = tmp_path / "odd.jsonl"
    with stream.Journal(tmp_path / "progress.json", [held]) as journal:
        journal.commit({held: [{"n": 1}]}, done=1, counts={})
        program = ("import sys; from pathlib import Path; from align_jax.synth import stream; "
                   "stream.Journal(Path(sys.argv[1]), [Path(sys.argv[2])])")
        other = subprocess.run([sys.executable, "-c", program, str(tmp_path / "progress.json"), str(held)],
                               capture_output=True, text=True)
        assert f"ValueError: {held} is being written by another process" in other.stderr
    with stream.Journal(tmp_path / "progress.json", [held]) as journal:
        assert journal.done == 1 and [*stream.rows(held)] == [{"n": 1}]


def test_a_file_that_lost_what_was_committed_is_refused(tmp_path):
    write(tmp_path, range(6), chunk=3)
    (tmp_path / "odd.jsonl").write_text("")
    with pytest.raises(ValueError, match="odd.jsonl: got 0 bytes, expected at least the 27 of the last commit"):
        stream.Journal(tmp_path / "progress.json", [tmp_path / "odd.jsonl"])
