"""Find what training text shares with the benchmarks: seeds, instructions and responses, all that a model is taught.

    python -m align_jax.synth.decontaminate --config=configs/decontaminate.py --config.run=FOLDER --config.path=FILE

A problem has three parts that a text can share: its `task` (the docstring or the instruction), its `solution`, and the
`program` of both. A text is compared with each part by four measures, of which the strongest is reported:
- `exact`: the part stands in the text, white space and case aside;
- `share`: at least half of the part's word 10-grams stand in the text (words are \\w+ in lower case);
- `run`: 13 words of the part or more in a row stand in the text (GPT-3's measure), one in three of them a word of
  letters alone, three characters at least: a run of numbers or of `x i j` is none;
- `near`: the Jaccard index of the word 5-grams of text and part is at least 0.5 (candidates come from MinHash);
and, where an embedding is given, `semantic`: cosine of text and task.

Parts under 10 words are not looked for (`return a + b` is everybody's) but are in their `program`; nor are 10-grams
that more than 10 different parts have. SelfCodeAlign looks for substrings only, and leaves out four trivial solutions
by name. HumanEval(+), MBPP(+), EvoEval, PocketEval and CODAL are read as they are published.
"""

import ast
import dataclasses
import functools
import glob
import gzip
import itertools
import json
import os
import pkgutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import rensa

from align_jax import log, records
from align_jax.records import Overlap, Text
from align_jax.synth import filters, near, stream

N, RUN, SHARE, NEAR, COMMON = 10, 13, 0.5, 0.5, 10
SHOWN = 300  # characters of a snippet
MEASURES = ("exact", "share", "run", "near", "semantic")  # the strongest first

# The columns of the benchmarks: EvalPlus and EvoEval, MBPP, CODAL.
TASK = ("prompt", "text", "instruction")
SOLUTION = ("canonical_solution", "code")


Embed = Callable[[list[str]], np.ndarray]  # [N] texts to [N D]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a benchmark problem, ready to be looked for."""

    problem: str
    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Index:
    """The benchmarks: their parts, which of them have a 10-gram, and the MinHash table of them."""

    parts: tuple[Part, ...]
    grams: dict[str, tuple[int, ...]]
    near: rensa.RMinHashLSH
    problems: dict[str, int]  # by benchmark
    too_short: int


@functools.cache
def index(paths: tuple[str, ...]) -> Index:
    """Read benchmark files; a pattern (with * in it) may match none, a path must be there."""
    parts, problems, too_short = [], Counter(), 0
    for file in find_files(paths):
        name = file.name.split(".")[0]
        for number, row in enumerate(_rows(file)):
            problems[name] += 1
            for part in _parts(f"{name}/{row.get('task_id', number)}", row, file):
                if len(near.words(part.text)) >= N:
                    parts.append(part)
                else:
                    too_short += 1
    table = rensa.RMinHashLSH(NEAR, near.NUM_PERM, near.NUM_BANDS)
    holders = defaultdict(list)
    for i, part in enumerate(parts):
        table.insert(i, near.digest(part.text))
        for gram in _ten_grams(part.text) if part.name != "program" else ():
            holders[gram].append(i)
    grams = {gram: tuple(held) for gram, held in holders.items() if len({parts[i].text for i in held}) <= COMMON}
    return Index(tuple(parts), grams, table, dict(problems), too_short)


def find_files(paths: Iterable[str]) -> list[Path]:
    """List the files that paths and patterns stand for."""
    found, missing = [], []
    for path in map(os.path.expanduser, paths):
        files = [path] if os.path.isfile(path) else sorted(glob.glob(path))
        found += map(Path, files)
        missing += [path] if not files and not glob.has_magic(path) else []
    if missing:
        raise ValueError(f"benchmarks: no such file: {', '.join(missing)}")
    return found


def told(paths: Iterable[str]) -> str:
    """Say which files the paths and patterns stand for, and which of them for none."""
    nothing = [path for path in paths if not find_files([path])]
    return ", ".join(file.name for file in find_files(paths)) + (
        f"; NOTHING MATCHES {', '.join(nothing)}" if nothing else "")


def resolved(paths: Iterable[str]) -> tuple[str, ...]:
    """Name the files themselves: a pattern could match others, or none, where the work is done."""
    return tuple(str(path.absolute()) for path in find_files(paths))


def find(benchmarks: Index, record: str, *texts: str) -> list[Overlap]:
    """Return what texts share with the benchmarks, at most one overlap a problem: by the strongest measure."""
    found = [overlap for text in texts for measure in (_grams, _near) for overlap in measure(benchmarks, record, text)]
    best = {}
    for overlap in sorted(found, key=lambda o: (MEASURES.index(o.measure), -o.value)):
        best.setdefault(overlap.problem, overlap)
    return list(best.values())


def semantic(benchmarks: Index, embed: Embed | None, *,
             threshold: float = 0.9) -> Callable[[Mapping[str, str]], list[Overlap]]:
    """Make the measure of an embedding: of texts {record: text}, what is near to a task; nothing without one."""
    if not embed:
        return lambda texts: []
    tasks = [part for part in benchmarks.parts if part.name == "task"]
    theirs = _unit(embed([part.text for part in tasks])) if tasks else None

    def find(texts: Mapping[str, str]) -> list[Overlap]:
        if not tasks or not texts:
            return []
        cosine = _unit(embed([*texts.values()])) @ theirs.T
        best = cosine.argmax(axis=1)
        return [Overlap(record=record, problem=tasks[j].problem, part="task", measure="semantic",
                        value=float(cosine[i, j]), snippet=text[:SHOWN])
                for i, ((record, text), j) in enumerate(zip(texts.items(), best, strict=True))
                if cosine[i, j] >= threshold]

    return find


def clean(run: Path, path: Path, *, fields: Sequence[str], benchmarks: Sequence[str],
          embed: Embed | None = None, semantic_threshold: float = 0.9,
          runner: str = "local", workers: int = 1, chunk: int = 256) -> dict[str, Counter]:
    """Write the records of a JSONL file whose `fields` share nothing with the benchmarks into `run`, and the report."""
    out, part, overlaps = (run / f"{name}.jsonl" for name in ("clean", "clean.partial", "contamination"))
    if out.is_file():
        return stream.counts(run / "progress.json")
    benchmarks = resolved(benchmarks)
    meaning = semantic(index(benchmarks), embed, threshold=semantic_threshold)
    for first in itertools.islice(enumerate(stream.rows(path), 1), 1):
        check([first], fields=tuple(fields), benchmarks=())  # a wrong field is said here, not in a process
    work = functools.partial(check, fields=tuple(fields), benchmarks=benchmarks)

    def take(checked) -> stream.Growth:
        rows, found = checked
        for k in range(len(fields)):
            known = {overlap.record for overlap in found}
            found = found + meaning({name: texts[k] for name, texts, _ in rows if name not in known})
        reasons = {overlap.record: f"in a benchmark: {overlap.measure}" for overlap in reversed(found)}
        fresh = [row for name, _, row in rows if name not in reasons]
        return {part: fresh, overlaps: found}, len(rows), {
            "in": Counter(records=len(rows)), "out": Counter(records=len(fresh)), "dropped": Counter(reasons.values())}

    with stream.Journal(run / "progress.json", [part, overlaps]) as journal:
        journal.extend(work, itertools.islice(enumerate(stream.rows(path), 1), journal.done, None), take, chunk=chunk,
                       lost=_lost, runner=runner, workers=workers, what=f"decontaminate {path.name}", unit="record",
                       total=stream.count(path))
    report(run, index(benchmarks), checked=journal.done)
    os.replace(part, out)
    return journal.counts


def check(rows: list[tuple[int, dict]], *, fields: tuple[str, ...], benchmarks: tuple[str, ...]):
    """Look at numbered rows: [(name, texts, row)] and their overlaps. Pure, so any engine maps it.

    Each field is looked at alone: beside others, a short one would be little of the whole. A name is the row's id, with
    its line where others of the chunk have the same.
    """
    wrong = [f"line {number} has {sorted(row)}" for number, row in rows if not all(name in row for name in fields)]
    if wrong:
        raise ValueError(f"fields: got {list(fields)}, but {len(wrong)} record(s) lack one: {wrong[0]}")
    ids = [str(row.get("id") or number) for number, row in rows]
    times = Counter(ids)
    named = [(name if times[name] == 1 else f"{name}, line {number}",
              [_plain(row[field]) for field in fields], row) for name, (number, row) in zip(ids, rows, strict=True)]
    return named, [overlap for name, texts, _ in named for overlap in find(index(benchmarks), name, *texts)]


def report(run: Path, benchmarks: Index, *, checked: int) -> None:
    """Sum contamination.jsonl up in contamination.json, and for people in contamination.txt."""
    by_measure, by_problem, found, examples = Counter(), Counter(), set(), {}
    for row in stream.rows(run / "contamination.jsonl"):
        by_measure[row["measure"]] += 1
        by_problem[row["problem"]] += 1
        found.add(row["record"])
        examples.setdefault(row["problem"], row)
    told = {"records checked": checked, "records that share": len(found), "problems by benchmark": benchmarks.problems,
            "parts too short to look for": benchmarks.too_short, "by measure": dict(by_measure.most_common()),
            "by problem": dict(by_problem.most_common()),
            "limits": {"n": N, "share": SHARE, "run": RUN, "near": NEAR, "common": COMMON}}
    log.write_json(run / "contamination.json", told | {"first of each problem": list(examples.values())})
    lines = [f"{key}: {value}" for key, value in told.items() if key != "by problem"]
    for problem, number in by_problem.most_common():
        row = examples[problem]
        lines.append(f"\n{problem}: {number} record(s), the first is {row['record']}, {row['measure']} "
                     f"{row['value']:.2f} of the {row['part']}:\n{row['snippet']}")
    log.replace(run / "contamination.txt", "\n".join(lines) + "\n")


def _grams(benchmarks: Index, record: str, text: str) -> Iterator[Overlap]:
    """The measures that rest on 10-grams. Who has a part whole has all its 10-grams, so `exact` is looked for here."""
    spans = [match.span() for match in near.WORD.finditer(text)]
    words = [text[a:b].lower() for a, b in spans]
    at = defaultdict(list)  # part -> where in the text its 10-grams start
    for i in range(len(words) - N + 1):
        for part in benchmarks.grams.get(" ".join(words[i:i + N]), ()):
            at[part].append(i)
    squeezed = _squeeze(text) if at else ""
    for number, starts in at.items():
        part = benchmarks.parts[number]
        first, length = _longest(starts)
        snippet = text[spans[first][0]:spans[first + length - 1][1]][:SHOWN]
        share = len({" ".join(words[i:i + N]) for i in starts}) / len(_ten_grams(part.text))
        told = functools.partial(Overlap, record=record, problem=part.problem, part=part.name, snippet=snippet)
        if _squeeze(part.text) in squeezed:
            yield told(measure="exact", value=1.0)
        elif share >= SHARE:
            yield told(measure="share", value=share)
        elif length >= RUN and _says_something(words[first:first + length]):
            yield told(measure="run", value=float(length))


def _near(benchmarks: Index, record: str, text: str) -> Iterator[Overlap]:
    shingles = near.shingles(text)
    for number in sorted(benchmarks.near.query(near.digest(text))):
        part = benchmarks.parts[number]
        value = near.jaccard(shingles, near.shingles(part.text))
        if value >= NEAR:
            yield Overlap(record=record, problem=part.problem, part=part.name, measure="near", value=value,
                          snippet=text[:SHOWN])


def _longest(starts: Sequence[int]) -> tuple[int, int]:
    """(first word, number of words) of the longest stretch that consecutive 10-grams cover."""
    best, first = (starts[0], N), starts[0]
    for before, here in zip(starts, starts[1:], strict=False):
        first = first if here == before + 1 else here
        best = max(best, (first, here - first + N), key=lambda run: run[1])
    return best


def _says_something(words: Sequence[str]) -> bool:
    return 3 * sum(len(word) >= 3 and word.isalpha() for word in words) >= len(words)


def _parts(problem: str, row: dict, file: Path) -> Iterator[Part]:
    task, solution = (next((row[name] for name in names if row.get(name)), "") for names in (TASK, SOLUTION))
    if not task:
        raise ValueError(f"{file}: {problem} has none of the columns {', '.join(TASK)}; it has {sorted(row)}")
    yield Part(problem, "task", _docstring(task))
    if solution:
        yield Part(problem, "solution", solution)
        yield Part(problem, "program", task + solution)


def _docstring(task: str) -> str:
    """The last docstring of a task that is code (HumanEval: helpers may come first; MBPP: it is nothing else)."""
    try:
        tree = filters.parse(task)
    except (SyntaxError, ValueError):
        return task
    found = [ast.get_docstring(node) for node in [tree, *tree.body]
             if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)]
    return [task, *filter(None, found)][-1]


def _ten_grams(text: str) -> set[str]:
    words = near.words(text)
    return {" ".join(words[i:i + N]) for i in range(len(words) - N + 1)}


def _squeeze(text: str) -> str:
    return "".join(text.lower().split())


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL (.gz), JSON or parquet file."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        yield from parquet.read_table(path).to_pylist()
    elif path.suffix == ".json":
        yield from json.loads(path.read_text())
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n\n".join(message["content"] for message in text)


def _lost(row: tuple[int, dict]):
    raise RuntimeError(f"record {row[0]} killed the process that looked at it: {str(row[1])[:200]}")


def main(c: Mapping) -> None:
    """Decontaminate a file of records as the config says; a killed run continues."""
    log.check_set(c)
    path, files = Path(c["path"]), find_files(c["benchmarks"])
    deciding = {key: c[key] for key in c if key not in ("run", "path", "runner", "workers", "chunk")}
    run = log.claim(c["run"], deciding | {"input": records.fingerprint(path), "benchmarks": {
        str(file): records.fingerprint(file) for file in files}})
    embed = pkgutil.resolve_name(c["embed"]) if c["embed"] else None
    counts = clean(run, path, embed=embed, **{key: c[key] for key in c if key not in ("run", "path", "embed")})
    kept, read, dropped = (counts.get(name, Counter()) for name in ("out", "in", "dropped"))
    log.say(f"{run / 'clean.jsonl'}: wrote {kept['records']:,} of {read['records']:,} records; "
            f"dropped {stream.tell(dropped)}; compared with {told(c['benchmarks'])}")


if __name__ == "__main__":
    log.command(main)
