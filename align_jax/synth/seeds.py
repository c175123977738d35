"""Source code to seeds: documented functions that return a value, filtered, each kept once, none of a benchmark.

    python -m align_jax.synth.seeds --config=configs/seeds.py [--config.source.path=FOLDER_FILE_OR_DATASET]

The first stage of the factory. A document (a Python file, or a row with Python in a column) gives functions; the steps
of `filters` and `decontaminate` and, if asked for, Pyright judge each alone, in processes; then, in the order of the
source, near-duplicates of what was kept are dropped, a judge of docstrings is asked about the rest, and what it likes
is kept. What grows with the source is on disk.

What is kept does not depend on the number of workers, nor on kills: the table of kept digests is made again from the
file, since what the judge turned down is not in it. Writes seeds.jsonl, contamination.{jsonl,json,txt}, unread.jsonl
and progress.json, whose counts add up: documents = read + unread, functions = kept + dropped.
"""

import dataclasses
import functools
import gzip
import itertools
import json
import os
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align_jax import log, records
from align_jax.records import Overlap, Seed
from align_jax.synth import decontaminate, filters, near, stream, typecheck

Document = tuple[str, str | bytes | None]  # where it stands, and its text; None if there is none
Judge = Callable[[list[str]], list[bool]]


@dataclasses.dataclass(frozen=True)
class Sifted:
    """What became of a chunk of documents: seeds with their digests, in the order of the source."""

    seeds: list[tuple[Seed, Any]]
    overlaps: list[Overlap]
    unread: list[dict]
    counts: dict[str, Counter]
    done: int


def gather(run: Path, source: Mapping, *, filtering: Mapping, benchmarks: Sequence[str], near_duplicate: float,
           pyright: bool = False, judge: Judge | None = None, runner: str = "local",
           workers: int = 1, chunk: int = 64) -> dict[str, Counter]:
    """Write the seeds of a source into `run`; return the counts. A killed run continues behind its last chunk.

    `judge` says of each program whether its docstring describes it; it is asked about the seeds of a chunk at once.
    """
    names = ("seeds", "seeds.partial", "contamination", "unread")
    path, part, overlaps, unread = (run / f"{name}.jsonl" for name in names)
    if path.is_file():
        return stream.counts(run / "progress.json")
    typecheck.check(pyright)
    benchmarks = decontaminate.resolved(benchmarks)
    work = functools.partial(sift, filtering=dict(filtering), benchmarks=benchmarks, pyright=pyright)
    with stream.Journal(run / "progress.json", [part, overlaps, unread]) as journal:
        kept = near.seen(near_duplicate)
        for row in stream.rows(part):
            kept.add(row["id"], near.digest(row["code"]))

        def take(found: Sifted) -> stream.Growth:
            fresh, dropped = choose(found.seeds, kept, judge)
            counts = found.counts | {"unread": Counter(row["why"] for row in found.unread),
                                     "dropped": found.counts["dropped"] + dropped, "out": Counter(seeds=len(fresh))}
            return {part: fresh, overlaps: found.overlaps, unread: found.unread}, found.done, counts

        journal.extend(work, documents(source, skip=journal.done), take, chunk=chunk, lost=_lost, runner=runner,
                       workers=workers, what="seeds", unit="document", total=size(source))
    counts = journal.counts
    decontaminate.report(run, decontaminate.index(benchmarks), checked=counts.get("in", Counter())["checked"])
    os.replace(part, path)
    return counts


def sift(chunk: list[Document], *, filtering: Mapping, benchmarks: tuple[str, ...], pyright: bool) -> Sifted:
    """Make seeds of documents: all that can be said of one alone, and its digest. Pure, so any engine maps it."""
    steps, index = filters.steps(**filtering), decontaminate.index(benchmarks)
    found = {place: "no text" if text is None else filters.extract(place, text) for place, text in chunk}
    unread = [{"document": place, "why": why} for place, why in found.items() if isinstance(why, str)]
    functions = [function for functions in found.values() if not isinstance(functions, str) for function in functions]
    tally = {"in": Counter(documents=len(chunk)), "dropped": Counter()}
    seeds = _keep((filters.sift(seed, steps) for seed in functions), tally["dropped"])
    tally["in"] += Counter(functions=len(functions), checked=len(seeds))
    overlaps = [decontaminate.find(index, seed.id, seed.code) for seed in seeds]
    seeds = _keep(("in a benchmark" if shared else seed for seed, shared in zip(seeds, overlaps, strict=True)),
                  tally["dropped"])
    if pyright:
        seeds = _keep(typecheck.well_typed(seeds), tally["dropped"])
    return Sifted([(seed, near.digest(seed.code)) for seed in seeds], list(itertools.chain(*overlaps)), unread,
                  tally, len(chunk))


def choose(seeds: list[tuple[Seed, Any]], kept, judge: Judge | None) -> tuple[list[Seed], Counter]:
    """Take the seeds that are near no kept one and that the judge likes; put them into `kept`.

    What the judge turns down stands in nobody's way, and the judge is not asked about near-duplicates of kept seeds;
    so the result is that of asking about every seed first, however the source is cut into chunks.
    """
    dropped = Counter()
    new = _keep((_again(seed, digest, kept) or (seed, digest) for seed, digest in seeds), dropped)
    liked = judge([seed.code for seed, _ in new]) if judge and new else [True] * len(new)
    if len(liked) != len(new):
        raise ValueError(f"judge: got {len(liked)} answers, expected one for each of {len(new)} programs")
    fresh = []
    for (seed, digest), is_liked in zip(new, liked, strict=True):
        reason = _again(seed, digest, kept) if is_liked else "poor docstring"  # again: the chunk may repeat itself
        if reason:
            dropped[reason] += 1
        else:
            kept.add(seed.id, digest)
            fresh.append(seed)
    return fresh, dropped


def documents(source: Mapping, *, skip: int = 0) -> Iterator[Document]:
    """Stream the documents of a folder of Python files, of a JSONL or parquet file, or of a `datasets` name.

    They come in an order that does not change, behind the first `skip`.
    """
    path = str(source["path"])
    if os.path.isdir(path):
        for file in itertools.islice(_files(path, source["exclude"]), skip, None):
            yield file.relative_to(path).as_posix(), _bytes(file)
    elif path.endswith((".jsonl", ".jsonl.gz")):
        yield from _texts(itertools.islice(_lines(path), skip, None), source, skip)
    else:
        yield from _texts(_dataset(path, source).skip(skip), source, skip)


def size(source: Mapping) -> int | None:
    """Count the documents, where that is quick."""
    path = str(source["path"])
    return sum(1 for _ in _files(path, source["exclude"])) if os.path.isdir(path) else None


def _listing(source: Mapping) -> str | None:
    """What names the documents of a folder or a file, from which a killed run goes on; None of a data set."""
    path = Path(source["path"])
    files = _files(str(path), source["exclude"]) if path.is_dir() else filter(Path.is_file, [path])
    sizes = [(str(file.relative_to(path)), file.lstat().st_size) for file in files]
    return records.fingerprint(sizes) if sizes else None


def _keep(results: Iterable, dropped: Counter) -> list:
    """Sort the reasons out of a list of results, and count them."""
    results = list(results)
    dropped.update(reason for reason in results if isinstance(reason, str))
    return [result for result in results if not isinstance(result, str)]


def _again(seed: Seed, digest, kept) -> str:
    found = kept.get_duplicates(digest)
    return "exact duplicate" if seed.id in found else "near-duplicate" if found else ""


def _lost(document: Document) -> Sifted:
    unread = [{"document": document[0], "why": "killed its process"}]
    return Sifted([], [], unread, {"in": Counter(documents=1), "dropped": Counter()}, 1)


def _files(folder: str, exclude: Sequence[str]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in exclude)
        yield from (Path(place) / name for name in sorted(names) if name.endswith(".py"))


def _bytes(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:  # a link to nowhere, or somebody else's: counted as a document without text
        return None


def _texts(rows: Iterable[Any], source: Mapping, skip: int) -> Iterator[Document]:
    column = source["column"]
    for number, row in enumerate(rows, skip + 1):
        text = row.get(column) if isinstance(row, dict) else None
        if number == 1 and text is None:
            raise ValueError(f"source.column: got {column!r}, the first row of {source['path']} has "
                             f"{sorted(row) if isinstance(row, dict) else type(row).__name__}")
        yield f"{source['path']}:{number}", text if isinstance(text, str) else None


def _lines(path: str) -> Iterator[Any]:
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        for raw in file:
            try:
                yield json.loads(raw)
            except ValueError:  # counted as a row without text
                yield None


def _dataset(path: str, source: Mapping):
    import datasets

    if path.endswith(".parquet"):
        return datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
    try:
        return datasets.load_dataset(path, data_dir=source["data_dir"], split=source["split"], streaming=True)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"source.path: got {path!r}, expected a folder, a .jsonl(.gz) or .parquet file, or a dataset "
                         f"that can be reached: {error}") from error


def claim(c: Mapping, judged_by: Mapping | None = None) -> Path:
    """Make or take up the folder of a config's seeds."""
    files = decontaminate.find_files(c["benchmarks"])
    deciding = {key: c[key] for key in c if key not in ("run", "runner", "workers", "chunk")}
    deciding |= {"benchmarks": {str(f): records.fingerprint(f) for f in files}, "judged_by": judged_by,
                 "documents": _listing(c["source"])}
    return log.claim(c["run"], deciding)


def main(c: Mapping, *, judge: Judge | None = None, judged_by: Mapping | None = None) -> dict:
    """Gather seeds as a config says, unless that was done; return the counts."""
    log.check_set(c)
    run = claim(c, judged_by)
    judge = pkgutil.resolve_name(c["judge"]) if c["judge"] else judge
    counts = gather(run, **{key: c[key] for key in c if key not in ("run", "judge")}, judge=judge)
    if "in" not in counts:
        raise ValueError(f"source.path: got {c['source']['path']!r}, in which there is no Python to read")
    log.say(f"{run / 'seeds.jsonl'}: {counts['out']['seeds']:,} seeds of {counts['in']['functions']:,} functions "
            f"in {counts['in']['documents']:,} documents; dropped {stream.tell(counts['dropped'])}; "
            f"unread {stream.tell(counts['unread'])}{', see unread.jsonl' if counts['unread'] else ''}")
    return {"in": counts["in"]["functions"], "out": counts["out"]["seeds"], "dropped": dict(counts["dropped"])}


if __name__ == "__main__":
    log.command(main)
