"""The records on disk: one dataclass a kind, JSONL in and out, every bad line named.

Every arrow of the pipeline is a file of these. Fields are the common preference format, so data from
elsewhere loads unchanged and ours loads elsewhere; columns we do not know are left alone.
"""

import contextlib
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import json
import os
import types
import typing
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Text = str | list[dict]  # plain text, or chat messages [{"role": ..., "content": ...}, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A programming task with tests: one line of an EvalPlus HumanEval+ or MBPP+ file."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    base_input: list
    plus_input: list | dict  # Mbpp/793 has {}
    atol: float = 0.0
    contract: str = ""
    test: str = ""  # HumanEval's `def check(candidate): assert ...`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seed:
    """A documented function that starts a task; `source` is file:line, or file or dataset:row:line."""

    id: str
    code: str
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concepts:
    """The concepts that a model named in a seed."""

    id: str
    seed_id: str
    concepts: list


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A programming task that a model invented from its properties; the concepts are those of a seed."""

    id: str
    seed_id: str
    category: str
    difficulty: str
    concepts: list
    instruction: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
    """A sample that answers a task with code and tests, taken apart: what is shown, and what is run."""

    id: str
    task_id: str
    prompt: Text  # as a trained model will be asked: the instruction alone
    completion: str
    finish: str
    solution_text: str  # the completion without its tests
    program: str
    tests: list
    instruction: str = ""  # of its task, as it stands in the prompt
    dimension: str = ""  # under whose principle it was written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """A text that shares with a benchmark: `part` of which problem, by which measure, and the words it was seen in."""

    record: str
    problem: str
    part: str
    measure: str
    value: float
    snippet: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked: a line of the file that `sample` answers."""

    id: str = ""
    prompt: Text
    max_tokens: int | None = None  # of its answers, where not the run's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and the completion to imitate (SFT); an empty prompt is plain language modelling."""

    id: str = ""
    prompt: Text
    completion: Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt with a preferred and a dispreferred completion (DPO, BoNBoN)."""

    id: str = ""
    prompt: Text
    chosen: Text
    rejected: Text
    made: dict = dataclasses.field(default_factory=dict)  # how the labels came about, see `synth.pairs`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """Summed log-probs of an example's completions under the reference model."""

    id: str
    logps: list


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion a model wrote; `finish` is "stop" (EOS or a stop string) or "length"."""

    id: str
    task_id: str
    prompt: Text
    completion: str
    finish: str
    logp: float = 0.0  # sum over its tokens at temperature 1
    num_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
    """A sample with what the sandbox said of it; `reward` is the share of the tests it passed."""

    id: str
    task_id: str
    prompt: Text
    completion: str
    finish: str
    status: str
    detail: str
    reward: float
    solution_text: str | None = None  # the completion without the tests that it wrote; None where it wrote none
    instruction: str = ""  # of a task; "" where the prompt is all that there is
    dimension: str = ""  # under whose principle it was written
    scores: dict = dataclasses.field(default_factory=dict)  # dimension -> score, higher is better, None: no verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """What EvalPlus said of one solution: "pass", "fail" or "timeout" on the base and plus tests."""

    run: str
    task_id: str
    index: int
    base: str
    plus: str


def read(path: str | Path, kind: type, *, bad_lines: str = "stop") -> list:
    """Read a JSONL file (.gz too) of `kind`; see `read_counted`."""
    return read_counted(path, kind, bad_lines=bad_lines)[0]


def read_counted(path: str | Path, kind: type, *, bad_lines: str = "stop") -> tuple[list, Counter]:
    """Read a JSONL file of `kind` whole; see `stream`. Also return what was skipped, by reason."""
    bad = Counter()
    return [record for _, record in stream(path, kind, bad_lines=bad_lines, bad=bad)], bad


def stream(path: str | Path, kind: type, *, bad_lines: str = "stop", bad: Counter | None = None,
           share: tuple[int, int] = (0, 1)) -> Iterator[tuple[int, Any]]:
    """Yield (line number, record) of a JSONL file (.gz too); bad lines stop the run, or are skipped and counted.

    A line is bad when it is not UTF-8, not a JSON object, lacks a field, has a field of another type, has
    an empty completion, or repeats an explicit id. A record without `id` gets one from its line and content.
    `bad` counts what is skipped, by reason. `share` (i, n) parses every n-th line from the i-th on, and no other.

    Raises:
      ValueError: how many lines are bad, with file, number and reason of the first ten, behind the last record
        when `bad_lines="stop"`; and always at a gzip file that breaks off, since nobody can count what it lost.
    """
    if bad_lines not in ("stop", "skip"):
        raise ValueError(f"bad_lines: got {bad_lines!r}, expected 'stop' or 'skip'")
    problems, seen = [], {}
    for number, raw in _lines(path):
        if number == 1 and raw.lstrip().startswith(b"["):
            raise ValueError(f"{path}: begins with '[', a JSON array; expected JSONL, one object a line")
        if number % share[1] != share[0]:
            continue
        try:
            record = _parse(raw, kind, number)
            key = getattr(record, "id", None)
            if key is not None and seen.setdefault(key, number) != number:
                raise ValueError(f"duplicate id: {key!r} is also on line {seen[key]}")
        except ValueError as error:
            problems.append((number, str(error)))
            continue
        yield number, record
    if bad is not None:
        bad.update(what.split(":")[0] for _, what in problems)
    if problems and bad_lines == "stop":
        shown = "\n".join(f"  {path}:{number}: {what}" for number, what in problems[:10])
        more = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{len(problems)} bad line(s) in {path}, expected {kind.__name__}:\n{shown}{more}")


def count(path: str | Path) -> int:
    """Count the lines that hold something."""
    return sum(1 for _ in _lines(path))


def rows(path: str | Path) -> list[dict]:
    """Read a JSONL file (.gz too) of our own making as plain dicts."""
    return [json.loads(raw) for _, raw in _lines(path)]


def write(path: str | Path, rows: Iterable[Any]) -> int:
    """Write dataclasses or dicts as JSONL (.gz too), whole or not at all; return how many."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    count = 0
    with _open(part, "wb", gz=path.suffix == ".gz") as out:
        for row in rows:
            out.write(line(row).encode())
            count += 1
    os.replace(part, path)
    return count


class Appender:
    """A JSONL file that begins with some rows and takes more, flushed after every write."""

    def __init__(self, path: Path, first: Iterable[Any]):
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold(path.open("a", encoding="utf-8")):
            write(path, first)
            self._file = hold(path.open("a", encoding="utf-8"))

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def write(self, rows: Iterable[Any]) -> None:
        """Append rows; a kill can cut the last one short, which `read(bad_lines="skip")` leaves out."""
        self._file.writelines(map(line, rows))
        self._file.flush()


def hold(file):
    """Take an open file for this process alone, until it is closed: two runs in one folder would write all twice."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file.name} is being written by another process") from None
    return file


def line(row: Any) -> str:
    """One dataclass or dict as a line of JSON."""
    row = dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row
    return json.dumps(row, ensure_ascii=False) + "\n"


def fingerprint(*parts: Any) -> str:
    """16 hex digits that name this content: files by their bytes, anything else by its JSON."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _open(path: Path, mode: str, *, gz: bool):
    with open(path, mode) as file:
        if not gz:
            yield file
            return
        # mtime=0 and no name: the same records give the same bytes.
        with gzip.GzipFile(filename="", fileobj=file, mode=mode, mtime=0) as zipped:
            yield zipped


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    number = 0
    try:
        with _open(Path(path), "rb", gz=Path(path).suffix == ".gz") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    yield number, raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: damaged gzip: {error}") from error


def _parse(raw: bytes, kind: type, number: int):
    try:
        row = json.loads(raw.decode("utf-8"))
        if b"\\u" in raw:
            line(row).encode("utf-8")  # JSON can spell half a surrogate pair, no tokenizer can take it
    except UnicodeError as error:
        raise ValueError(f"not UTF-8: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"not an object: got {type(row).__name__}")
    values = {}
    hints = _hints(kind)
    if isinstance(row.get("id", ""), int | None):  # elsewhere ids are numbers, or null
        row["id"] = "" if row["id"] is None else str(row["id"])
    for field in dataclasses.fields(kind):
        if field.name in row:
            _check(field.name, row[field.name], hints[field.name])
            values[field.name] = row[field.name]
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing field {field.name!r}: the line has {sorted(row)}")
    for name in ("completion", "chosen", "rejected"):
        # A sample may be empty (the model stopped at once); a training target may not.
        if name in values and kind in (Example, Pair):
            _check_target(name, values["prompt"], values[name])
    if values.get("max_tokens") is not None and values["max_tokens"] < 1:
        raise ValueError(f"max_tokens: got {values['max_tokens']}, expected 1 or more")
    if kind is Pair and values["chosen"] == values["rejected"]:
        raise ValueError("chosen equals rejected")
    if "id" in hints and not values.get("id"):
        values["id"] = f"{number}-{fingerprint(row)}"
    return kind(**values)


_hints = functools.cache(typing.get_type_hints)


def _check(name: str, value: Any, hint: Any) -> None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(option) or option for option in options)
    accepted = (*plain, int) if float in plain else plain
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in plain):
        wanted = " or ".join(option.__name__ for option in plain)
        raise ValueError(f"wrong type in {name!r}: got {type(value).__name__}, expected {wanted}")
    if hint == Text and isinstance(value, list):
        _check_messages(name, value)


def _check_messages(name: str, messages: list) -> None:
    good = all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
               for m in messages)
    if not messages or not good:
        raise ValueError(f"bad messages in {name!r}: expected a non-empty list of "
                         "{'role': str, 'content': str}")


def _check_target(name: str, prompt: Text, target: Text) -> None:
    messages = [{"role": "assistant", "content": target}] if isinstance(target, str) else target
    if not "".join(message["content"] for message in messages).strip():
        raise ValueError(f"empty {name}: nothing to train on")
    roles = [message["role"] for message in messages]
    if roles != ["assistant"] or (isinstance(prompt, str) and not isinstance(target, str)):
        # Common: the whole conversation, its prompt included.
        raise ValueError(f"bad messages in {name!r}: got {roles} after a {type(prompt).__name__} prompt, expected "
                         "text, or one assistant message after a list of messages")
