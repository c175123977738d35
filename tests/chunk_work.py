"""Work on chunks for tests/test_stream.py: a file of its own, so that a worker starts quickly."""

import contextlib
import os
import time
from pathlib import Path


def square(chunk: list[int]) -> list[int]:
    return [item * item for item in chunk]


def deadly(chunk: list[int], *, poison: tuple[int, ...]) -> list[int]:
    if set(chunk) & set(poison):
        os._exit(1)
    return square(chunk)


def waiting(chunk: list[int], *, item: int, told: Path) -> list[int]:
    """Whoever meets the item first tells its process, and waits to be killed."""
    if item in chunk:
        with contextlib.suppress(FileExistsError), told.open("x") as file:
            print(os.getpid(), file=file, flush=True)
            time.sleep(600)
    return square(chunk)


def wrong(chunk: list[int]) -> list[int]:
    raise ValueError(f"got {chunk}")


def execute(chunk: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, str, float]]:
    from align_jax import sandbox

    limits = sandbox.Limits(wall_s=30.0, cpu_s=30.0)
    return [(v.status, v.detail, v.reward) for v in sandbox.run_many(chunk, limits=limits, workers=1)]
