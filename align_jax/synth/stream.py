"""How a stage of pure per-record work runs over more records than fit: in order, bounded, and resumable.

`ordered` maps chunks over processes, and `cluster.ordered` over machines: `runner` chooses; `Journal` holds the stage's
files. Together they make the output a function of the input alone: not of where the work was done, of the number of
workers, of which of them died, or of how often the stage was killed.
"""

import itertools
import json
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from align_jax import log, records
from align_jax.synth import cluster


def chunks(items: Iterable, size: int) -> Iterator[list]:
    """Cut a stream into lists of `size`."""
    items = iter(items)
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def ordered(work: Callable[[list], Any], chunks: Iterable[list], *, workers: int,
            lost: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield work(chunk) of every chunk, in order, with at most two chunks a worker read ahead.

    When a worker dies, what was handed out is done again, each chunk in a process of its own; a chunk that kills it
    is halved until one item is left, and lost(item) is its result. One worker works in this process.
    """
    if workers == 1:
        yield from map(work, chunks)
        return
    chunks, handed, died = iter(chunks), deque(), True

    def read() -> Iterator[list]:
        for chunk in chunks:
            handed.append(chunk)
            yield chunk

    while died:
        died, results, pool = False, deque(), _pool(workers)
        try:
            for chunk in read():
                results.append(pool.submit(work, chunk))
                if len(results) >= 2 * workers:
                    yield _take(results, handed)
            while results:
                yield _take(results, handed)
        except BrokenProcessPool:
            died = True
        finally:
            pool.shutdown(cancel_futures=True)
        while handed:
            yield from _alone(work, handed.popleft(), lost)


RUNNERS = {"local": ordered, "ray": cluster.ordered}


def ordered_by(name: str) -> Callable[..., Iterator]:
    """Return the `ordered` of that name."""
    if name not in RUNNERS:
        raise ValueError(f"runner: got {name!r}, expected one of {', '.join(RUNNERS)}")
    return RUNNERS[name]


def _take(results: deque, handed: deque) -> Any:
    result = results.popleft().result()
    handed.popleft()  # only now: a chunk without a result is done again
    return result


def _alone(work: Callable, chunk: list, lost: Callable) -> Iterator[Any]:
    try:
        with _pool(1) as pool:
            yield pool.submit(work, chunk).result()
    except BrokenProcessPool:
        half = len(chunk) // 2
        if not half:
            yield lost(chunk[0])
            return
        yield from _alone(work, chunk[:half], lost)
        yield from _alone(work, chunk[half:], lost)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, since a process that has started jax has threads and must not be forked.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


# New rows by file, the number of items that they come of, and what is counted of these.
Growth = tuple[Mapping[Path, Iterable], int, Mapping[str, Counter]]


class Journal:
    """The files of a stage that grow together, and what was counted so far.

    `commit` appends rows and then, whole or not at all, writes down how long every file is now. Opened again after a
    kill, files are cut back to that length: `done` items are in them, each once.
    """

    def __init__(self, path: Path, files: Iterable[Path], *, is_writer: bool = True):
        self.path, self._is_writer = path, is_writer  # one of several hosts writes, all count
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files = {file: records.hold(file.open("ab")) for file in files if is_writer}
        state = json.loads(path.read_text()) if path.is_file() else {"done": 0, "counts": {}, "bytes": {}}
        self.done: int = state["done"]
        self.counts = counts(path)
        for file_path, file in self._files.items():
            _cut(file, state["bytes"].get(file_path.name, 0))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        for file in self._files.values():
            file.close()

    def extend(self, work: Callable[[list], Any], items: Iterable, take: Callable[[Any], Growth], *, chunk: int,
               lost: Callable[[Any], Any], runner: str = "local", workers: int = 1, **shown) -> None:
        """Do `work` on chunks of the items that are left, and commit what `take` makes of each result, in order.

        The progress bar is told `shown`: what, unit, total.
        """
        with log.progress(done=self.done, **shown) as bar:
            for result in ordered_by(runner)(work, chunks(items, chunk), workers=workers, lost=lost):
                new, done, counts = take(result)
                self.commit(new, done=done, counts=counts)
                bar.update(done)

    def commit(self, new: Mapping[Path, Iterable], *, done: int, counts: Mapping[str, Counter]) -> None:
        """Append rows to their files, add to what is done and counted, and make it last."""
        self.done += done
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, Counter()) + count
        if not self._is_writer:
            return
        for path, rows in new.items():
            self._files[path].writelines(records.line(row).encode() for row in rows)
            self._files[path].flush()
        log.write_json(self.path, {"done": self.done, "counts": self.counts,
                                   "bytes": {path.name: file.tell() for path, file in self._files.items()}})


def counts(path: Path) -> dict[str, Counter]:
    """Read what a journal counted; nothing, if nothing was committed."""
    if not path.is_file():
        return {}
    return {name: Counter(count) for name, count in json.loads(path.read_text())["counts"].items()}


def rows(path: Path) -> Iterator[dict]:
    """Stream the rows of a JSONL file of our own making."""
    with path.open("rb") as file:
        yield from map(json.loads, file)


def count(path: Path) -> int:
    """Count the rows of a JSONL file of our own making."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def tell(count: Counter) -> str:
    """Say a count by reason, the most frequent first."""
    return ", ".join(f"{number:,} {reason}" for reason, number in count.most_common()) or "none"


def _cut(file, length: int) -> None:
    """Cut a file back to the length of the last commit."""
    if file.tell() < length:
        raise ValueError(f"{file.name}: got {file.tell()} bytes, expected at least the {length} of the last commit; "
                         "delete the run folder to start again")
    file.truncate(length)
    file.seek(length)
