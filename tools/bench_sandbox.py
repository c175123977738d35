"""How many isolated executions a second the sandbox makes, and whether many of them leave anything behind.

    python tools/bench_sandbox.py --workers=1,2            # trivial programs a second, with the load of the machine
    python tools/bench_sandbox.py --mixed=10000            # 10,000 good, failing and hostile programs: what is left?

The first answers what a run costs when the program itself costs nothing. The second compares this process' children,
descriptors and threads, the mounts and the temporary files, before and after.
"""

import collections
import ctypes
import itertools
import os
import pathlib
import tempfile
import time

from absl import app, flags

from align_jax import log, sandbox

_WORKERS = flags.DEFINE_list("workers", [str(len(os.sched_getaffinity(0)))], "numbers of workers to measure")
_RUNS = flags.DEFINE_integer("runs", 600, "trivial programs of one measurement")
_MIXED = flags.DEFINE_integer("mixed", 0, "run so many mixed programs and look what they left, instead")
_BACKEND = flags.DEFINE_string("backend", "auto", "a backend of sandbox.py")

TRIVIAL = ("def f(x):\n    return x + 1", ["assert f(1) == 2", "assert f(2) == 3"])
RIGHT, WRONG, ANY = ["assert f(1) == 2"], ["assert f(1) == 3"], ["assert True"]
THREADS = "import threading, time\nfor _ in range(3): threading.Thread(target=time.sleep, args=[99]).start()"
DAEMONS = "import os, time\nfor _ in range(3):\n    if not os.fork():\n        os.setsid()\n        time.sleep(99)"
KINDS = {  # a program and its tests, and the verdict
    "right": (("def f(x): return x + 1", RIGHT), "passed"),
    "wrong": (("def f(x): return x + 1", WRONG), "assertion"),
    "raises": (("def f(x): return x / 0", RIGHT), "exception"),
    "broken": (("def f(x: return", RIGHT), "syntax"),
    "leaves": (("import os; os._exit(0)", ANY), "exited"),
    "aborts": (("import os; os.abort()", ANY), "killed"),
    "writes files": (("for i in range(50): open(f'{i}', 'w').write('x' * 9999)", ANY), "passed"),
    "leaves daemons": ((DAEMONS, ANY), "passed"),
    "leaves threads": ((THREADS, ANY), "passed"),
    "floods": (("import os\nwhile True: os.write(1, b'x' * 65536)", ANY), "output"),
    "eats memory": (("x = bytearray(10**10)", ANY), "memory"),
    "listens": (("import socket\ns = socket.create_server(('127.0.0.1', 8000))", ANY), "passed"),
}


def main(argv: list[str]) -> None:
    del argv
    if _MIXED.value:
        return mixed(_MIXED.value, int(_WORKERS.value[0]))
    for workers in map(int, _WORKERS.value):
        load, begin = os.getloadavg()[0], time.monotonic()
        verdicts = sandbox.run_many([TRIVIAL] * _RUNS.value, backend=_BACKEND.value, workers=workers)
        seconds = time.monotonic() - begin
        wrong = [verdict for verdict in verdicts if verdict.status != "passed"]
        if wrong:
            raise RuntimeError(f"{len(wrong)} of {len(verdicts)} did not pass, the first: {wrong[0]}")
        print(f"{sandbox.backend(_BACKEND.value)}: {workers} workers: {len(verdicts) / seconds:.0f} a second"
              f" ({len(os.sched_getaffinity(0))} cores, load before: {load:.1f})")


def mixed(num: int, workers: int) -> None:
    """Run `num` programs, every kind in turn, and raise where a verdict is wrong or anything is left."""
    sandbox.backend(_BACKEND.value)
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what loses its parent becomes our child, and is seen
    kinds = [kind for kind, _ in zip(itertools.cycle(KINDS.values()), range(num), strict=False)]
    jobs, expected = zip(*kinds, strict=True)
    with log.progress(total=num, what="mixed programs", unit="program") as bar:
        before, begin = traces(), time.monotonic()
        verdicts = sandbox.run_many(jobs, backend=_BACKEND.value, workers=workers, on_done=lambda _: bar.update(1))
    seconds = time.monotonic() - begin
    time.sleep(1)  # for the kernel to end the last process namespaces, whose first processes are now ours to reap
    while children() and os.waitpid(-1, os.WNOHANG)[0]:
        pass
    left = {what: sorted(after - before[what]) for what, after in traces().items() if after - before[what]}
    wrong = [(status, verdict) for status, verdict in zip(expected, verdicts, strict=True) if verdict.status != status]
    print(f"{sandbox.backend(_BACKEND.value)}: {num} programs in {seconds:.0f} s, {workers} workers:"
          f" {dict(collections.Counter(verdict.status for verdict in verdicts))}; left behind: {left or 'nothing'}")
    if wrong or left:
        raise RuntimeError(f"{len(wrong)} wrong verdicts, the first: {wrong[:1]}; left behind: {left}")


def traces() -> dict[str, set]:
    """What a leak would show up in."""
    return {
        "processes": children(),
        "descriptors": set(os.listdir("/proc/self/fd")),
        "threads": set(os.listdir("/proc/self/task")),
        "mounts": set(pathlib.Path("/proc/self/mounts").read_text().splitlines()),
        "files": {str(path) for path in pathlib.Path(tempfile.gettempdir()).glob("align_jax_sandbox_*")},
    }


def children() -> set[str]:
    """Numbers of this process' children, also of those that lost their parents."""
    return {stat.parent.name for stat in pathlib.Path("/proc").glob("[0-9]*/stat") if parent(stat) == os.getpid()}


def parent(stat: pathlib.Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended meanwhile
        return 0


if __name__ == "__main__":
    app.run(main)
