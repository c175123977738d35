"""Records on disk: every kind of bad line is named, nothing half written, ids that can be relied on."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from align_jax import records
from align_jax.records import Example, Judged, Pair, Problem, Prompt, Sample, Score

DATA = Path(__file__).parents[2] / "shared" / "data"
GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT = {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}

# what is wrong with the line, the line, what it is counted under
BAD_PAIRS = {
    "not JSON": (b"{'prompt': 'p'}", "not JSON"),
    "cut short": (json.dumps(GOOD).encode()[:-5], "not JSON"),
    "two objects": (b"{}{}", "not JSON"),
    "nested without end": (b"[" * 100_000, "not JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "not JSON"),
    "bad UTF-8": (b'{"prompt": "\xff", "chosen": "c", "rejected": "r"}', "not UTF-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "not UTF-8"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d", "chosen": "c", "rejected": "r"}', "not UTF-8"),
    "list": (b"[1, 2]", "not an object"),
    "string": (b'"prompt"', "not an object"),
    "null": (b"null", "not an object"),
    "missing field": ({"prompt": "p", "chosen": "c"}, "missing field 'rejected'"),
    "number for text": ({**GOOD, "chosen": 1}, "wrong type in 'chosen'"),
    "null for text": ({**GOOD, "prompt": None}, "wrong type in 'prompt'"),
    "object for text": ({**GOOD, "prompt": USER}, "wrong type in 'prompt'"),
    "list for id": ({**GOOD, "id": [7]}, "wrong type in 'id'"),
    "empty completion": ({**GOOD, "chosen": ""}, "empty chosen"),
    "blank completion": ({**GOOD, "rejected": " \n\t"}, "empty rejected"),
    "empty message": ({**CHAT, "rejected": [{**ANSWER, "content": ""}]}, "empty rejected"),
    "no messages": ({**GOOD, "prompt": []}, "bad messages in 'prompt'"),
    "message is text": ({**GOOD, "prompt": ["q"]}, "bad messages in 'prompt'"),
    "message without role": ({**GOOD, "prompt": [{"content": "q"}]}, "bad messages in 'prompt'"),
    "message in parts": ({**GOOD, "prompt": [{**USER, "content": [{"text": "q"}]}]}, "bad messages in 'prompt'"),
    "message of null": ({**GOOD, "prompt": [{**USER, "content": None}]}, "bad messages in 'prompt'"),
    "plain prompt, chat answer": ({**GOOD, "chosen": [ANSWER]}, "bad messages in 'chosen'"),
    "answer with its prompt": ({**CHAT, "chosen": [USER, ANSWER]}, "bad messages in 'chosen'"),
    "answer of the user": ({**CHAT, "rejected": [USER]}, "bad messages in 'rejected'"),
    "duplicate id": ({**GOOD, "id": "first"}, "duplicate id"),
}


def write_lines(path: Path, *lines) -> Path:
    raw = b"".join((json.dumps(line).encode() if isinstance(line, dict) else line) + b"\n" for line in lines)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def test_ids_of_elsewhere_are_numbers_or_null(tmp_path):
    found = records.read(write_lines(tmp_path / "pairs.jsonl", {**GOOD, "id": 7}, {**GOOD, "id": None}), Pair)
    assert found[0].id == "7" and found[1].id.startswith("2-")


# --- bad lines


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("what", BAD_PAIRS)
def test_bad_line_stops_with_file_and_number_or_is_counted(tmp_path, what, suffix):
    line, reason = BAD_PAIRS[what]
    path = write_lines(tmp_path / f"x.{suffix}", {**GOOD, "id": "first"}, b"", line, {**GOOD, "id": "last"})
    with pytest.raises(ValueError) as caught:
        records.read(path, Pair)
    assert f"{path}:3: {reason}" in str(caught.value) and "1 bad line(s)" in str(caught.value)

    found, dropped = records.read_counted(path, Pair, bad_lines="skip")
    assert [pair.id for pair in found] == ["first", "last"]
    assert dropped == {reason: 1}


def test_all_bad_lines_are_in_one_error_and_all_are_counted(tmp_path):
    lines = [line for what, (line, _) in BAD_PAIRS.items() if what != "duplicate id"]
    path = write_lines(tmp_path / "x.jsonl", *lines, GOOD)
    with pytest.raises(ValueError) as caught:
        records.read(path, Pair)
    for number in range(1, 11):
        assert f"{path}:{number}: " in str(caught.value)
    assert f"{len(lines)} bad line(s)" in str(caught.value) and f"and {len(lines) - 10} more" in str(caught.value)

    found, dropped = records.read_counted(path, Pair, bad_lines="skip")
    assert len(found) + dropped.total() == len(lines) + 1


@pytest.mark.parametrize("kind, field, value", [
    (Sample, "num_tokens", True), (Sample, "num_tokens", 1.0), (Sample, "logp", "0"), (Sample, "logp", False),
    (Sample, "finish", None), (Judged, "reward", True), (Score, "index", True), (Score, "index", "0"),
    (Problem, "base_input", "[]"), (Problem, "base_input", {}), (Problem, "plus_input", None), (Problem, "atol", True),
])
def test_types_are_exact(tmp_path, kind, field, value):
    row = {f.name: {float: 0.5, int: 3, list: [], list | dict: [], dict: {}}.get(f.type, "x")
           for f in dataclasses.fields(kind)}
    path = write_lines(tmp_path / "x.jsonl", row, row | {"id": "other", field: value})
    with pytest.raises(ValueError, match=f":2: wrong type in {field!r}: got {type(value).__name__}, ") as caught:
        records.read(path, kind)
    assert "1 bad line(s)" in str(caught.value)


def test_a_prompts_own_limit_is_one_or_more(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"prompt": "a", "max_tokens": 1}, {"prompt": "b", "max_tokens": 0})
    with pytest.raises(ValueError, match="x.jsonl:2: max_tokens: got 0, expected 1 or more"):
        records.read(path, Prompt)


def test_int_is_a_float(tmp_path):
    row = {"id": "a", "task_id": "t", "prompt": "p", "completion": "", "finish": "stop", "logp": -3}
    assert records.read(write_lines(tmp_path / "x.jsonl", row), Sample)[0].logp == -3


def test_missing_field_says_what_is_there(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(ValueError, match=r"missing field 'prompt': the line has \['answer', 'question'\]"):
        records.read(path, Example)


def test_a_sample_may_be_empty_a_target_may_not(tmp_path):
    row = {"id": "a", "task_id": "t", "prompt": "p", "completion": "", "finish": "stop"}
    path = write_lines(tmp_path / "x.jsonl", row)
    assert records.read(path, Sample)[0].completion == ""
    with pytest.raises(ValueError, match="empty completion"):
        records.read(path, Example)


def test_duplicate_id_names_both_lines_and_ignores_bad_ones(tmp_path):
    row = {**GOOD, "id": "a"}
    path = write_lines(tmp_path / "x.jsonl", row | {"chosen": ""}, row, row)
    with pytest.raises(ValueError, match=r":3: duplicate id: 'a' is also on line 2"):
        records.read(path, Pair)
    assert len(records.read(path, Pair, bad_lines="skip")) == 1


@pytest.mark.parametrize("bad_lines", ["stop", "skip"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_damaged_gzip_always_stops(tmp_path, damage, bad_lines):
    path = write_lines(tmp_path / "x.jsonl.gz", *({**GOOD, "id": str(os.urandom(20))} for _ in range(200)))
    raw = bytearray(path.read_bytes())
    if damage == "flipped":
        raw[-6] ^= 1  # in the checksum
    path.write_bytes({"cut": raw[:len(raw) // 2], "flipped": raw, "not gzip": b'{"a": 1}\n'}[damage])
    with pytest.raises(ValueError, match=rf"{path}:\d+: damaged gzip"):
        records.read(path, Pair, bad_lines=bad_lines)


def test_no_such_file_and_no_such_choice(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        records.read(tmp_path / "x.jsonl", Pair)
    with pytest.raises(ValueError, match="got 'ignore', expected 'stop' or 'skip'"):
        records.read(write_lines(tmp_path / "y.jsonl", GOOD), Pair, bad_lines="ignore")


# --- what loads


def test_trl_conversational_rows_load_and_round_trip(tmp_path):
    row = {"prompt": [{"role": "system", "content": "s"}, USER], "chosen": [ANSWER],
           "rejected": [{**ANSWER, "content": "b"}], "score_chosen": 9.5, "source": None}
    [pair] = records.read(write_lines(tmp_path / "x.jsonl", row), Pair)
    assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt"], row["chosen"], row["rejected"])
    records.write(tmp_path / "y.jsonl", [pair])
    assert records.read(tmp_path / "y.jsonl", Pair) == [pair]


def test_blank_lines_line_ends_and_a_missing_last_one(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n \n" + json.dumps(GOOD).encode() + b"\r\n\r\n" + json.dumps(GOOD).encode())
    assert len(records.read(path, Pair)) == 2
    path.write_bytes(b"\r\n{}\r\n")
    with pytest.raises(ValueError, match=":2: missing field"):
        records.read(path, Pair)


def test_text_survives_as_it_is(tmp_path):
    rows = [Example(id=str(i), prompt=p, completion="x") for i, p in enumerate(
        ["\u2028\u2029\x85\x0b\x0c", "\r\n\t", "\x00\x1f", "é 你好 \U0001f600", '"\\', ""])]
    for name in ("x.jsonl", "x.jsonl.gz"):
        assert records.write(tmp_path / name, rows) == len(rows)
        assert records.read(tmp_path / name, Example) == rows
    path = write_lines(tmp_path / "y.jsonl", b'{"prompt": "\\ud83d\\ude00", "chosen": "c", "rejected": "r"}')
    [pair] = records.read(path, Pair)
    assert pair.prompt == "\U0001f600"  # a whole pair of escapes is one character


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_evalplus_files_load():
    for file, count in (("humaneval_plus/HumanEvalPlus.jsonl.gz", 164), ("mbpp_plus/MbppPlus.jsonl.gz", 378)):
        assert len(records.read(DATA / file, Problem)) == count


def test_reading_streams(tmp_path):
    path = write_lines(tmp_path / "x.jsonl.gz", *({**GOOD, "extra": "x" * 10_000} for _ in range(1000)))
    tracemalloc.start()
    records.read(path, Pair)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # of 10 MB


# --- ids


def test_made_ids_are_unique_for_repeated_rows_and_the_same_every_time(tmp_path):
    other = {**GOOD, "prompt": "other"}
    path = write_lines(tmp_path / "x.jsonl", GOOD, GOOD, {**GOOD, "id": ""}, other, {**GOOD, "id": "own"})
    ids = [pair.id for pair in records.read(path, Pair)]
    assert len(set(ids)) == 5 and ids[-1] == "own"
    packed = write_lines(tmp_path / "x.jsonl.gz", *path.read_bytes().splitlines())
    assert [pair.id for pair in records.read(packed, Pair)] == ids
    code = f"from align_jax.records import *; print([p.id for p in read({str(path)!r}, Pair)])"
    again = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": "1"}, check=True,
                           cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    assert again.stdout.strip() == str(ids)

    changed = write_lines(tmp_path / "y.jsonl", GOOD, other, GOOD, other, {**GOOD, "id": "own"})
    same = [a.id == b for a, b in zip(records.read(changed, Pair), ids, strict=True)]
    assert same == [True, False, False, True, True]


def test_fingerprint_tells_contents_apart(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"x" * 10**6)
    a, b = (records.fingerprint(tmp_path / name) for name in "ab")
    assert a == b and len(a) == 16
    (tmp_path / "b").write_bytes(b"x" * (10**6 - 1) + b"y")
    assert records.fingerprint(tmp_path / "b") != a
    assert records.fingerprint({"a": 1, "b": 2}) == records.fingerprint({"b": 2, "a": 1})
    different = [("ab",), ("a", "b"), (["a", "b"],), (1,), ("1",), (None,), ()]
    assert len({records.fingerprint(*parts) for parts in different}) == len(different)


# --- writing


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_failed_write_leaves_the_old_file(tmp_path, name):
    path = tmp_path / "new" / name
    old = [Pair(id="a", **GOOD)]
    assert records.write(path, old) == 1
    before = path.read_bytes()

    def rows():
        yield from old * 1000
        assert path.read_bytes() == before  # not touched while it is written anew
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write(path, rows())
    assert path.read_bytes() == before and records.read(path, Pair) == old
    assert records.write(path, []) == 0 and records.read(path, Pair) == []
    assert os.listdir(path.parent) == [name]


def test_a_full_disk_is_an_error_and_no_file(tmp_path):
    code = ("import os, resource, signal; from align_jax.records import write\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "write('x.jsonl.gz', ({'a': os.urandom(40).hex()} for _ in range(100)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode and "File too large" in done.stderr
    assert not (tmp_path / "x.jsonl.gz").exists()


def test_gzip_bytes_depend_on_the_records_only(tmp_path):
    rows = [Pair(id="a", **GOOD)]
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        records.write(tmp_path / name, rows)
        os.utime(tmp_path / name, (0, 0))
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == records.line(rows[0]).encode()
