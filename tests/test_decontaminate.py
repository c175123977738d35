"""Decontamination: each kind of planted overlap is found as what it is; look-alikes and small talk are not."""

import ast
import json
import random
import re
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from align_jax import records
from align_jax.records import Overlap
from align_jax.synth import decontaminate, filters, near, stream

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
POCKET = str(Path(decontaminate.__file__).parents[1] / "pocket" / "PocketEval.jsonl.gz")

TASK = ("You are given the heights of a row of hills, from west to east. Count the hills from which somebody can look "
        "as far as the sea in the west, over all the hills between, and return how many there are.")
SOLUTION = """    tallest, count = float("-inf"), 0
    for height in heights:
        if height > tallest:
            tallest, count = height, count + 1
    return count
"""
PROBLEMS = [
    {"task_id": "B/0", "prompt": f'def seaside(heights):\n    """{TASK}\n    """\n', "canonical_solution": SOLUTION},
    {"task_id": "B/1", "prompt": 'def add(a, b):\n    """Add."""\n', "canonical_solution": "    return a + b\n"},
]


@pytest.fixture
def bench(tmp_path) -> decontaminate.Index:
    records.write(tmp_path / "bench.jsonl", PROBLEMS)
    return decontaminate.index((str(tmp_path / "bench.jsonl"),))


def measures(bench, text: str) -> list[tuple[str, str]]:
    return [(overlap.part, overlap.measure) for overlap in decontaminate.find(bench, "r", text)]


def replaced(text: str, every: int) -> str:
    """The text with every so many words another one."""
    words = text.split()
    return " ".join(f"word{i}" if i % every == every - 1 else word for i, word in enumerate(words))


# --- the measures


@pytest.mark.parametrize("text, part, measure", [
    (TASK, "task", "exact"),
    (f"Please solve this:\n\n{TASK.upper()}\n\nThank you.", "task", "exact"),
    ("\n    ".join(TASK.split()), "task", "exact"),
    (f"Here:\n```python\ndef g(x):\n{SOLUTION.replace(' = ', '=').replace('    ', '  ')}```", "solution", "exact"),
    (" ".join(TASK.split()[:30]) + " and now for something else", "task", "share"),
    ("I once read: " + " ".join(TASK.split()[6:21]) + ". It was long ago.", "task", "run"),
])
def test_planted_overlaps_are_found_as_what_they_are(bench, text, part, measure):
    assert measures(bench, text) == [(part, measure)]


def test_a_rewritten_text_is_near_without_ten_words_in_a_row(bench):
    text = replaced(TASK, 10)
    assert near.jaccard(near.shingles(text), near.shingles(TASK)) < 0.5 and measures(bench, text) == []
    longer = replaced(TASK, 18)
    assert near.jaccard(near.shingles(longer), near.shingles(TASK)) > 0.5
    assert measures(bench, longer) in ([("task", "share")], [("task", "near")], [("task", "run")])
    program = PROBLEMS[0]["prompt"] + SOLUTION
    renamed = re.sub(r"\bheight\b", "h", program)  # cuts the solution's 10-grams, not its task's
    assert measures(bench, renamed)[0][1] in ("exact", "share")


def test_near_alone(tmp_path):
    """Two sentences of nine words, the other way round: no ten words in a row, 10 of 18 shingles."""
    one, two = "Count hills that can see the far western sea", "from left to right over every lower hill between"
    records.write(tmp_path / "s.jsonl", [
        {"task_id": 0, "prompt": f"{one}, {two}."},
        {"task_id": 1, "prompt": 'def mean(a, b):\n    """Mean of two."""\n',
         "canonical_solution": "    return (a + b) / 2\n"},
    ])
    index = decontaminate.index((str(tmp_path / "s.jsonl"),))
    text = f"{two}: {one}"
    assert decontaminate.find(index, "r", text) == [
        Overlap(record="r", problem="s/0", part="task", measure="near", value=10 / 18, snippet=text)]
    # Both parts are too short to be looked for alone, their program is not.
    found = decontaminate.find(index, "r", 'def mean(a, b):\n    "Mean of two."\n    return (a + b) / 2  # so there\n')
    assert [(o.problem, o.part, o.measure) for o in found] == [("s/1", "program", "near")]


@pytest.mark.parametrize("text", [
    "", "x", "def add(a, b):\n    return a + b\n", "Add.", "    return count\n",
    " ".join(TASK.split()[:10]),  # ten words are nobody's
    " ".join(sorted(TASK.split())),
    "You are given a list of numbers, from left to right. Return how many there are above all before them.",
    "def lookout(hills):\n    best, n = 0, 0\n    for hill in hills:\n        if hill > best:\n"
    "            best = hill\n            n += 1\n    return n\n",
])
def test_look_alikes_are_clean(bench, text):
    assert measures(bench, text) == []


def test_the_snippet_is_what_stands_in_the_text(bench):
    text = f"Well, {' '.join(TASK.split()[6:21])}!"
    overlap, = decontaminate.find(bench, "r7", text)
    assert overlap.record == "r7" and overlap.problem == "bench/B/0" and overlap.value == 15
    assert overlap.snippet in text and len(overlap.snippet.split()) == 15


def test_runs_of_numbers_and_letters_say_nothing(tmp_path):
    numbers, letters = " ".join(map(str, range(40))), " ".join("xyzijk"[i % 6] for i in range(40))
    records.write(tmp_path / "n.jsonl", [{"task_id": 0, "prompt": f"{TASK} {numbers} {letters}"}])
    index = decontaminate.index((str(tmp_path / "n.jsonl"),))
    assert measures(index, f"x = [{', '.join(map(str, range(30)))}]") == []
    assert measures(index, letters[:60]) == []


def test_what_many_problems_say_is_no_overlap(tmp_path):
    phrase = "Write one function that takes the following list of things and gives back exactly what"
    rows = [{"task_id": i, "prompt": f"{phrase} {' '.join(f'w{i}x{j}' for j in range(40))}"} for i in range(11)]
    for count, found in ((10, 10), (11, 0)):
        records.write(tmp_path / f"{count}.jsonl", rows[:count])
        index = decontaminate.index((str(tmp_path / f"{count}.jsonl"),))
        assert len(decontaminate.find(index, "r", f"{phrase} I mean.")) == found


def test_of_several_overlaps_with_a_problem_the_strongest_is_told(bench):
    found = decontaminate.find(bench, "r", " ".join(TASK.split()[:30]) + "\n" + SOLUTION)
    assert [(o.part, o.measure) for o in found] == [("solution", "exact")]


# --- the benchmarks' formats


def test_every_published_format_is_read(tmp_path):
    import datasets

    mbpp = {"text": TASK, "code": f"def f(heights):\n{SOLUTION}", "task_id": 3, "test_list": []}
    codal = {"instruction": TASK, "preference": "style", "gpt-4-turbo_response": "No."}
    records.write(tmp_path / "mbpp.jsonl.gz", [mbpp])
    (tmp_path / "sanitized.json").write_text(json.dumps([{"prompt": TASK, "code": mbpp["code"], "task_id": 3}]))
    datasets.Dataset.from_list([codal]).to_parquet(tmp_path / "codal.parquet")
    for name, problem in (("mbpp.jsonl.gz", "mbpp/3"), ("sanitized.json", "sanitized/3"), ("codal.parquet", "codal/0")):
        index = decontaminate.index((str(tmp_path / name),))
        assert [o.problem for o in decontaminate.find(index, "r", TASK)] == [problem]


def test_files_that_are_not_there_or_no_benchmark(tmp_path):
    with pytest.raises(ValueError, match="benchmarks: no such file: .*gone.jsonl"):
        decontaminate.index((str(tmp_path / "gone.jsonl"),))
    assert decontaminate.index((str(tmp_path / "*.jsonl"),)).parts == ()
    assert decontaminate.find(decontaminate.index(()), "r", TASK) == []
    records.write(tmp_path / "other.jsonl", [{"question": "?"}])
    with pytest.raises(ValueError, match=r"other.jsonl: other/0 has none of the columns prompt, text, instruction; it "
                                         r"has \['question'\]"):
        decontaminate.index((str(tmp_path / "other.jsonl"),))


# --- meaning


def test_an_embedding_finds_what_words_do_not(bench):
    def embed(texts):  # a stand-in that knows which words mean hills
        return np.array([[len(re.findall("hill|mount|peak", text)), len(re.findall("add|sum", text)), 0.1]
                         for text in texts])

    find = decontaminate.semantic(bench, embed, threshold=0.95)
    found = find({"a": "Which peaks and mountains have a view?", "b": "Nothing of the kind.", "c": "sum hills"})
    assert [(o.record, o.problem, o.measure) for o in found] == [("a", "bench/B/0", "semantic")]
    assert found[0].value == pytest.approx(1, abs=0.01) and find({}) == []


# --- the stage


def rows() -> list[dict]:
    rng = random.Random(0)
    made = [{"id": f"r{i}", "prompt": " ".join(f"w{rng.randrange(9999)}" for _ in range(40)), "completion": "ok"}
            for i in range(50)]
    made[7]["prompt"] = f"Hello! {TASK}"
    made[20]["completion"] = SOLUTION
    made[33]["prompt"] = [{"role": "user", "content": " ".join(TASK.split()[6:21])}]
    return made


@pytest.mark.parametrize("workers, chunk", [(1, 256), (1, 4), (2, 7)])
def test_the_stage_drops_counts_and_reports(tmp_path, workers, chunk):
    records.write(tmp_path / "bench.jsonl", PROBLEMS)
    records.write(tmp_path / "in.jsonl", rows())
    run = tmp_path / "run"
    settings = dict(fields=("prompt", "completion"), benchmarks=(str(tmp_path / "bench.jsonl"),), workers=workers,
                    chunk=chunk)
    counts = decontaminate.clean(run, tmp_path / "in.jsonl", **settings)
    assert counts == {"in": {"records": 50}, "out": {"records": 47},
                      "dropped": {"in a benchmark: exact": 2, "in a benchmark: run": 1}}
    want = [row for i, row in enumerate(rows()) if i not in (7, 20, 33)]
    assert list(stream.rows(run / "clean.jsonl")) == want
    told = json.loads((run / "contamination.json").read_text())
    assert told["records checked"] == 50 and told["records that share"] == 3
    assert told["by measure"] == {"exact": 2, "run": 1} and told["by problem"] == {"bench/B/0": 3}
    assert told["parts too short to look for"] == 3  # B/1's, alone and together
    text = (run / "contamination.txt").read_text()
    assert "bench/B/0: 3 record(s), the first is r7, exact 1.00 of the task" in text and "You are given" in text
    assert decontaminate.clean(run, tmp_path / "in.jsonl", **settings) == counts


def test_rows_of_one_id_are_told_apart(tmp_path):
    records.write(tmp_path / "bench.jsonl", PROBLEMS)
    records.write(tmp_path / "in.jsonl", [row | {"id": "same"} for row in rows()])
    counts = decontaminate.clean(tmp_path / "run", tmp_path / "in.jsonl", fields=("prompt", "completion"),
                                 benchmarks=(str(tmp_path / "bench.jsonl"),))
    assert counts["in"]["records"] == 50 and counts["out"]["records"] == 47 and counts["dropped"].total() == 3
    said = (tmp_path / "run" / "contamination.txt").read_text()
    assert "3 record(s), the first is same, line 8, exact" in said


def test_the_stage_with_an_embedding(tmp_path):
    records.write(tmp_path / "bench.jsonl", PROBLEMS)
    records.write(tmp_path / "in.jsonl", rows())

    def embed(texts):
        return np.array([[1.0, 0.0] if "w1234" in text or "hills" in text else [0.0, 1.0] for text in texts])

    counts = decontaminate.clean(tmp_path / "run", tmp_path / "in.jsonl", fields=("prompt",), embed=embed,
                                 benchmarks=(str(tmp_path / "bench.jsonl"),), semantic_threshold=0.9, chunk=10)
    semantic = sum("w1234" in str(row["prompt"]) for row in rows())
    assert counts["dropped"]["in a benchmark: semantic"] == semantic
    assert counts["in"]["records"] == counts["out"]["records"] + counts["dropped"].total()


def test_a_field_is_found_whatever_stands_beside_it(tmp_path):
    one, two = "Count hills that can see the far western sea", "from left to right over every lower hill between"
    records.write(tmp_path / "bench.jsonl", [{"task_id": 0, "prompt": f"{one}, {two}."}])
    long = " ".join(f"a{i}" for i in range(200))
    records.write(tmp_path / "in.jsonl", [{"id": name, "prompt": prompt, "chosen": long, "rejected": long}
                                          for name, prompt in (("a", f"{two}: {one}"), ("b", long))])
    counts = decontaminate.clean(tmp_path / "run", tmp_path / "in.jsonl", fields=("prompt", "chosen", "rejected"),
                                 benchmarks=(str(tmp_path / "bench.jsonl"),))
    assert [row["id"] for row in stream.rows(tmp_path / "run" / "clean.jsonl")] == ["b"]
    assert counts["dropped"] == {"in a benchmark: near": 1}


def test_a_field_that_is_not_there(tmp_path):
    records.write(tmp_path / "in.jsonl", rows())
    with pytest.raises(ValueError, match=r"fields: got \['chosen'\], but 1 record\(s\) lack one: line 1 has "):
        decontaminate.clean(tmp_path / "run", tmp_path / "in.jsonl", fields=("chosen",), benchmarks=())
    records.write(tmp_path / "late.jsonl", [{"chosen": "x"}, *rows()])
    with pytest.raises(ValueError, match=r"fields: got \['chosen'\], but 50 record\(s\) lack one: line 2 has "):
        decontaminate.clean(tmp_path / "late", tmp_path / "late.jsonl", fields=("chosen",), benchmarks=())


# --- the real benchmarks


def all_benchmarks() -> tuple[str, ...]:
    return tuple(str(DATA / name) for name in (
        "humaneval_plus/HumanEvalPlus.jsonl.gz", "mbpp_plus/MbppPlus.jsonl.gz", "evoeval/*.jsonl.gz"))


@needs_data
def test_humaneval_finds_all_of_itself():
    index = decontaminate.index(all_benchmarks())
    assert index.problems["HumanEvalPlus"] == 164 and index.problems["MbppPlus"] == 378 and sum(
        count for name, count in index.problems.items() if name.startswith("EvoEval")) == 828
    for row in records.rows(DATA / "humaneval_plus" / "HumanEvalPlus.jsonl.gz"):
        own = f"HumanEvalPlus/{row['task_id']}"
        whole = f"Sure!\n```python\n{row['prompt']}{row['canonical_solution']}```\nIt works."
        assert own in {o.problem for o in decontaminate.find(index, "r", whole)}
        laid_out = "\n\n".join(row["prompt"].upper().split())
        assert own in {o.problem for o in decontaminate.find(index, "r", laid_out)}


@needs_data
@pytest.mark.skipif(sys.version_info[:2] > (3, 13), reason="looked through by hand for 3.11 to 3.13")
def test_the_standard_library_is_clean_of_the_real_benchmarks():
    index = decontaminate.index(all_benchmarks())
    stdlib = Path(sysconfig.get_path("stdlib"))
    looked, found = 0, []
    for file in sorted(stdlib.glob("*.py")) + sorted(stdlib.glob("email/*.py")):
        lines = file.read_text("utf-8").splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if isinstance(node, ast.FunctionDef):
                looked += 1
                code = "\n".join(lines[node.lineno - 1:node.end_lineno])
                found += decontaminate.find(index, f"{file.name}:{node.lineno}", code)
    assert looked > 500 and found == []


def test_the_standard_librarys_leap_years_are_in_pocketeval():
    """A true overlap in the wild: `calendar.isleap` is the solution of one of our own problems."""
    calendar = Path(sysconfig.get_path("stdlib")) / "calendar.py"
    seeds = filters.extract("calendar.py", calendar.read_bytes())
    found = [o for seed in seeds for o in decontaminate.find(decontaminate.index((POCKET,)), seed.source, seed.code)]
    assert {o.measure for o in found} == {"share"} and all("year % 4" in o.snippet for o in found) and found
