"""synth/validate.py and review.py: agreement by published numbers, and a sheet that gives nothing away."""

import csv
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from align_jax import records
from align_jax.records import Judged, Pair, Problem, Sample
from align_jax.synth import review, validate, verify

POCKET = "align_jax.pocket", "PocketPref.jsonl.gz"


def verdicts(task_id: str, statuses: str, first: int = 0) -> list[Judged]:
    """One response a letter: p passed, f failed, s not run."""
    names = {"p": "passed", "f": "assertion", "s": "sandbox"}
    return [Judged(id=f"{task_id}/{k}", task_id=task_id, prompt="", completion="", finish="stop", status=names[letter],
                   detail="", reward=0.0) for k, letter in enumerate(statuses, first)]


# --- labels against the truth


def test_the_table_and_what_follows_from_it():
    """20, 5, 10, 15 and its kappa of 0.4: the example of Wikipedia's article on Cohen's kappa."""
    own, truth = verdicts("t", "p" * 25 + "f" * 25), verdicts("t", "p" * 20 + "f" * 5 + "p" * 10 + "f" * 15)
    found, dropped = validate.labels(own, truth)
    assert (found.both_pass, found.own_only, found.truth_only, found.both_fail) == (20, 5, 10, 15) and not dropped
    assert (found.accuracy, found.precision, found.recall, found.rejected_precision) == (0.7, 0.8, 20 / 30, 0.6)
    assert found.kappa == pytest.approx(0.4) and found.kappa_low is None  # one task says nothing of others


def test_what_cannot_be_compared_is_counted():
    found, dropped = validate.labels(verdicts("t", "ppsf") + verdicts("u", "p"), verdicts("t", "psff"))
    assert (found.both_pass, found.both_fail) == (1, 1) and dropped == {"not run": 2, "not in the truth": 1}
    with pytest.raises(ValueError, match="no response has both verdicts"):
        validate.labels(verdicts("u", "p"), verdicts("t", "p"))


def test_undefined_numbers_are_none():
    found, _ = validate.labels(verdicts("t", "pp") + verdicts("u", "p"), verdicts("t", "pp") + verdicts("u", "p"))
    assert found.kappa is found.kappa_low is found.rejected_precision is None and found.accuracy == 1.0


def test_the_interval_covers_though_the_responses_of_a_task_err_together():
    """Whole tasks flip: 100 draws of 30 tasks; an interval that took responses for independent covers about half."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        own, truth = [], []
        for task in range(30):
            right, flipped = rng.random(10) < 0.5, rng.random() < 0.2
            truth += verdicts(str(task), "".join("pf"[int(x)] for x in right))
            own += verdicts(str(task), "".join("pf"[int(x) ^ flipped] for x in right))
        found, _ = validate.labels(own, truth)
        covered += found.kappa_low <= 0.6 <= found.kappa_high  # 1 - 2 x 0.2
    assert covered >= 88


def test_weak_tests_against_all_tests_of_real_problems(tmp_path):
    """PocketPref's right and wrong programs, by its first assertion alone and by all of them."""
    from importlib import resources

    rows = records.rows(resources.files(POCKET[0]) / POCKET[1])[:12]
    problems = {row["task_id"]: Problem(**{f.name: row[f.name] for f in dataclasses.fields(Problem)}) for row in rows}
    weak = {name: dataclasses.replace(p, test="\n".join(p.test.splitlines()[:2])) for name, p in problems.items()}
    samples = [Sample(id=f"{row['task_id']}/{k}", task_id=row["task_id"], prompt=row["prompt"], completion=body,
                      finish="stop") for row in rows for k, body in enumerate(row["styles"][:1] + row["bugs"][:2])]
    limits = {"wall_s": 60.0, "cpu_s": 60.0}
    own, truth = (verify.verify(tmp_path / f"{name}.jsonl", samples, tests, **limits)
                  for name, tests in (("own", weak), ("truth", problems)))
    found, dropped = validate.labels(own, truth)
    assert not dropped and found.truth_only == 0 and found.recall == 1.0  # a weaker test fails no right program
    assert found.own_only > 0 and found.rejected_precision == 1.0 and found.kappa < 1


# --- raters


def test_weighted_kappa_is_the_formula_and_one_between_equals():
    rng = np.random.default_rng(0)
    a = rng.integers(1, 11, 400)
    b = np.clip(a + rng.integers(-2, 3, 400), 1, 10)
    found = validate.raters(a.tolist(), b.tolist())
    apart = np.abs(a[:, None] - b[None])  # every rating of one with every rating of the other: chance
    assert found.kappa == pytest.approx(1 - np.abs(a - b).mean() / apart.mean())
    assert found.kappa_low < found.kappa < found.kappa_high and found.n == 400
    assert [found.within[t] for t in range(4)] == [float((np.abs(a - b) <= t).mean()) for t in range(4)]
    assert validate.raters([1, 5, 9], [1, 5, 9]).kappa == 1


def test_a_rating_that_is_missing_is_counted_and_one_that_is_no_point_refused():
    found = validate.raters([1, None, 3, 4], [1, 2, None, 3])
    assert (found.n, found.missing) == (2, 2)
    assert validate.raters([5, 5], [5, 5]).kappa is None
    for first, second in (([1.5], [1.0]), ([None], [1]), ([], [])):
        with pytest.raises(ValueError, match="in whole points"):
            validate.raters(first, second)


def test_judges_are_compared_two_by_two():
    kind = lambda dimension, items: [float(len(answer)) for _, answer in items]
    harsh = lambda dimension, items: [float(max(len(answer) - 1, 1)) for _, answer in items]
    items = [("", "x" * k) for k in range(1, 9)]
    found = validate.judges({"kind": kind, "harsh": harsh, "third": kind}, "style", items)
    assert list(found) == ["kind / harsh", "kind / third", "harsh / third"]
    assert found["kind / third"].kappa == 1 and found["kind / harsh"].within[1] == 1


# --- the sheet

NASTY = "</pre><script>alert(1)</script>\x07 \u202e =1+1\n<b>&amp;</b>"


def some_pairs(count: int) -> list[Pair]:
    return [Pair(id=f"p{k}", prompt=[{"role": "user", "content": f"Task {k}"}], chosen=f"good {k} {NASTY}",
                 rejected=f"=bad {k}", made={"why": "assertion"}) for k in range(count)]


def read(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_sheet_is_blind_and_the_key_opens_it(tmp_path):
    assert review.make(tmp_path, some_pairs(300), seed=0) == 100
    sheet, key = read(tmp_path / "review.csv"), read(tmp_path / "key.csv")
    assert [row["number"] for row in sheet] == [row["number"] for row in key] == [str(k + 1) for k in range(100)]
    for row, side in zip(sheet, key, strict=True):
        assert row[side["chosen"]].startswith("good") and row["prompt"].endswith(f"Task {side['id'][1:]}")
        assert side["why"] == "assertion"
    assert 30 < sum(side["chosen"] == "left" for side in key) < 70 and len({side["id"] for side in key}) == 100
    assert not re.search("chosen|rejected|assertion|p[0-9]", (tmp_path / "review.html").read_text())
    before = (tmp_path / "review.html").read_bytes(), (tmp_path / "key.csv").read_bytes()
    review.make(tmp_path, some_pairs(300), seed=0)
    assert before == ((tmp_path / "review.html").read_bytes(), (tmp_path / "key.csv").read_bytes())
    review.make(tmp_path, some_pairs(300), seed=1)
    assert before[1] != (tmp_path / "key.csv").read_bytes()


def test_what_a_model_wrote_runs_nowhere(tmp_path):
    review.make(tmp_path, some_pairs(3), seed=0)
    page = (tmp_path / "review.html").read_text()

    class Tags(HTMLParser):
        found = []

        def handle_starttag(self, tag, attrs):
            self.found.append(tag)

    Tags().feed(page)
    assert Tags.found.count("script") == 1 and "b" not in Tags.found and Tags.found.count("fieldset") == 3
    assert "\x07" not in page and "\u202e" not in page and "\\u202e" in page
    assert "default-src 'none'" in page and "http" not in page.replace("http-equiv", "")
    assert all(not row[side].startswith("=") for row in read(tmp_path / "review.csv") for side in ("left", "right"))


@pytest.mark.parametrize("paths, told", [("none.jsonl sheet", "error: no such file: none.jsonl"),
                                         ("empty.jsonl sheet", "error: no pairs to review")])
def test_nothing_to_review_is_an_error_in_one_line(paths, told, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    command = [sys.executable, "-m", "align_jax.synth.review", "make", *paths.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 1 and done.stderr == f"{told}\n" and not (tmp_path / "sheet").exists()


def test_reviews_are_scored(tmp_path):
    review.make(tmp_path, some_pairs(10), seed=0)
    key = read(tmp_path / "key.csv")
    other = {"left": "right", "right": "left"}

    def reviewed(name: str, answers: list[str]):
        path = tmp_path / name
        path.write_text("\ufeffnumber,answer,comment\n" + "".join(
            f"{row['number']},{answer},\n" for row, answer in zip(key, answers, strict=True)))
        return path

    right = [row["chosen"] for row in key]
    first = reviewed("a.csv", right)
    second = reviewed("b.csv", [*right[:5], other[right[5]], "tie", "unclear", "", "Left"])
    report = review.score(tmp_path, [first, second])
    assert report[str(first)] | {"95 %": 0} == {"agrees": 10, "of": 10, "share": 1.0, "95 %": 0, "tie": 0, "unclear": 0,
                                                "open": 0}
    agreed = 5 + (right[9] == "left")
    assert [report[str(second)][name] for name in ("agrees", "of", "tie", "unclear", "open")] == [agreed, 7, 1, 1, 1]
    assert report["between the two"]["n"] == 8 and 0 < report["between the two"]["kappa"] < 1
    assert review.score(tmp_path, [first, first])["between the two"]["kappa"] == 1
    with pytest.raises(ValueError, match=r"1 answers are unknown.*'better'"):
        review.score(tmp_path, [reviewed("c.csv", [*right[:9], "better"])])


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not here")
def test_the_page_works_in_a_browser(tmp_path):
    """Its script is let run by its own policy, and counts."""
    review.make(tmp_path, some_pairs(2), seed=0)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user"]
    page = subprocess.run([*command, "--dump-dom", f"file://{tmp_path}/review.html"], capture_output=True, text=True)
    assert '<span id="done"></span>' in (tmp_path / "review.html").read_text()
    assert '<span id="done">0</span>' in page.stdout and page.stdout.count("<fieldset") == 2
