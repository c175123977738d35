"""`stream.ordered` on Ray: the same records, on more machines than one.

    RAY_ADDRESS=HEAD:6379 python -m align_jax.synth.seeds --config=configs/seeds.py --config.runner=ray

Without RAY_ADDRESS a Ray of this machine with `workers` CPUs is started, and stopped at the end; a program that has
called `ray.init` itself keeps its own. Needs `pip install align_jax[ray]`. On a cluster, this align_jax is sent to the
nodes with the job; what it imports must be installed there, and files that the work reads (benchmarks) must stand at
the same path. The source is read, and records are written, here. Ray 2.60 gives clusters a token: RAY_AUTH_MODE=token.

Why Ray: killing a worker of its local runner loses nothing, while Apache Beam's (FnApiRunner of 2.77, two processes)
ends the pipeline, "Channel closed prematurely", with nothing written; Beam has no order in a collection, and reads a
generator of this process to its end before any work. Both have wheels for Python 3.11 to 3.13, Ray's of 79 MB, Beam's
of 19. Beam needs Flink, Spark or Dataflow behind it; Ray is `ray start` on each machine.

Why tasks, and not the operators of `ray.data` (2.60): a Dataset reads in tasks, which can be done again elsewhere, so a
generator of this process goes in as one Dataset a window of chunks, with a barrier behind each: 64 chunks of 50 ms on
2 CPUs took 3.9 s, the same as tasks 1.8 s, at best 1.6 s. And a record that kills its worker is tried for ever
(`max_retries` of its tasks is -1) or, at 0, ends the whole Dataset without telling which it was.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import align_jax

TRIES = 3  # of a record alone; a cluster takes workers away for reasons of its own


def ordered(work: Callable[[list], Any], chunks: Iterable[list], *, workers: int,
            lost: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield work(chunk) of every chunk, in order, with at most two chunks a worker handed out.

    All that is handed out runs at once where the cluster has the CPUs. When a worker or its node dies, its chunk is
    done again in halves; of a record that TRIES workers died of, alone and in a row, lost(record) is the result.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("runner: got 'ray', but Ray is not installed; pip install 'align_jax[ray]', or "
                         "--config.runner=local") from None
    return _ordered(ray, work, chunks, workers, lost)


def _ordered(ray, work: Callable, chunks: Iterable[list], workers: int, lost: Callable) -> Iterator[Any]:
    with _session(ray, workers):
        # Tries are counted here: Ray itself would try for ever what dies of memory.
        call, work, handed = ray.remote(max_retries=0)(_call), ray.put(work), deque()

        def hand(chunk: list) -> tuple[list, Any]:
            return chunk, call.remote(work, chunk)

        try:
            for chunk in chunks:
                handed.append(hand(chunk))
                if len(handed) >= 2 * workers:
                    yield from _take(ray, hand, *handed.popleft(), lost)
            while handed:
                yield from _take(ray, hand, *handed.popleft(), lost)
        finally:
            for _, result in handed:  # nobody wants them any more
                ray.cancel(result, force=True)


def _call(work: Callable[[list], Any], chunk: list) -> Any:
    return work(chunk)


def _take(ray, hand: Callable, chunk: list, result, lost: Callable, tries: int = TRIES) -> Iterator[Any]:
    died = (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError,
            ray.exceptions.ObjectLostError)  # the last: of a node that died when the work was done
    try:
        result = ray.get(result)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except died:
        half = len(chunk) // 2
        if half:
            for part in (chunk[:half], chunk[half:]):
                yield from _take(ray, hand, *hand(part), lost)
        elif tries > 1:
            yield from _take(ray, hand, *hand(chunk), lost, tries - 1)
        else:
            yield lost(chunk[0])
    else:
        yield result


@contextlib.contextmanager
def _session(ray, workers: int) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local Ray would report to its makers
    if address := os.environ.get("RAY_ADDRESS"):
        place = {"address": address, "runtime_env": {"py_modules": [str(Path(align_jax.__file__).parent)]}}
    else:
        place = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    ray.init(**place, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
