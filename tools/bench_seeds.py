"""Measure align_jax.synth.seeds: functions a second through all steps, and the memory that it takes.

    python tools/bench_seeds.py [--functions=5000,10000,100000] [--workers=2] [--runner=ray] [--benchmarks=FILE,..]

The functions are made up, one a row of a JSONL file, each with about 25 lines and words of its own, so that all of them
are kept: the worst case for the table of digests. Type check and judge are off. Prints, for each count, seconds (wall,
and CPU of all processes), functions a second, and the peak memory of this process before and after, with what a seed
took; the workers' is the largest of them. What Ray's workers take is not in it: they are no children of ours.
"""

import os
import random
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import app, flags

from align_jax import records
from align_jax.synth import seeds

CONFIG = Path(__file__).parents[1] / "configs" / "seeds.py"
_FUNCTIONS = flags.DEFINE_list("functions", ["5000", "10000", "100000"], "how many, one run each")
_WORKERS = flags.DEFINE_integer("workers", 2, "processes")
_RUNNER = flags.DEFINE_string("runner", "local", "what maps the chunks")
_BENCHMARKS = flags.DEFINE_list("benchmarks", [], "files to decontaminate against, beside those of the config")


def functions(count: int) -> Iterator[dict]:
    """Make documented functions; the same for the same count."""
    rng = random.Random(0)

    def word() -> str:
        return "".join(rng.choices("bcdfglmnprstvz", k=2)) + "".join(rng.choices("aeiou", k=2)) + str(rng.randrange(99))

    for _ in range(count):
        names = [word() for _ in range(8)]
        doc = "\n    ".join(" ".join(word() for _ in range(10)) for _ in range(4))
        lines = ["    {} = {} + math.sqrt({})".format(*rng.choices(names, k=3)) + f" * {rng.randrange(999)}"
                 for _ in range(16)]
        yield {"content": f'import math\n\n\ndef {word()}({", ".join(names)}):\n    """{doc}"""\n' + "\n".join(lines)
                          + f"\n    return {names[0]}\n"}


def measure(count: int, *, workers: int, runner: str, benchmarks: Sequence[str]) -> str:
    """Gather seeds from so many functions, in this process."""
    settings = runpy.run_path(str(CONFIG))["get_config"]().to_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "functions.jsonl"
        records.write(path, functions(count))
        before, began = peak(resource.RUSAGE_SELF), time.perf_counter()
        counts = seeds.gather(Path(folder) / "run", settings["source"] | {"path": str(path)},
                              filtering=settings["filtering"], benchmarks=(*settings["benchmarks"], *benchmarks),
                              near_duplicate=settings["near_duplicate"], runner=runner, workers=workers, chunk=250)
        seconds, after = time.perf_counter() - began, peak(resource.RUSAGE_SELF)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)
    return (f"{count:,} functions, {counts['out']['seeds']:,} kept, {workers} {runner} workers, "
            f"load {os.getloadavg()[0]:.1f}: {seconds:.1f} s wall, {cpu:.1f} s CPU, {count / seconds:,.0f} a second; "
            f"peak {before:.0f} -> {after:.0f} MB ({1024 * (after - before) / count:.1f} KB a seed), workers' largest "
            f"{peak(resource.RUSAGE_CHILDREN):.0f} MB")


def peak(who: int) -> float:
    """Megabytes of resident memory at its highest."""
    return resource.getrusage(who).ru_maxrss / 1024


def main(argv) -> None:
    """Measure each count in a process of its own, so that each has its own peak."""
    if len(_FUNCTIONS.value) == 1:
        print(measure(int(_FUNCTIONS.value[0]), workers=_WORKERS.value, runner=_RUNNER.value,
                      benchmarks=_BENCHMARKS.value), flush=True)
        return
    for count in _FUNCTIONS.value:
        subprocess.run([*sys.orig_argv, f"--functions={count}"], check=True)  # the last of a flag counts


if __name__ == "__main__":
    app.run(main)
