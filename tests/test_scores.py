"""synth/scores.py: what a judge is shown, and that every record gets its scores, once."""

import dataclasses
from pathlib import Path

import pytest

from align_jax import records
from align_jax.records import Judged
from align_jax.score import static
from align_jax.synth import scores, stream


def judged(k: int, completion: str, **fields) -> Judged:
    made = Judged(id=f"t/{k}", task_id="t", prompt=[{"role": "user", "content": "Write f."}], completion=completion,
                  finish="stop", status="passed", detail="", reward=1.0, dimension="style")
    return dataclasses.replace(made, **fields)


def rows(responses: list[Judged]):
    return map(dataclasses.asdict, responses)


def test_a_judge_sees_the_answer_without_its_tests():
    begun = [{"role": "user", "content": "Write f."}, {"role": "assistant", "content": "```python\n"}]
    assert scores.item(judged(0, "code <tests>", solution_text="code")) == ("Write f.", "code")
    assert scores.item(judged(0, "code", prompt=begun)) == ("Write f.", "```python\ncode")
    assert scores.item(judged(0, "    return 1\n", prompt="def f():\n")) == ("def f():\n", "def f():\n    return 1\n")


def test_scores_are_written_into_the_records_and_a_killed_run_continues(tmp_path):
    responses, asked = [judged(k, "x" * k) for k in range(10)], []

    def judge(dimension, items):
        asked.append((dimension, len(items)))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return [None if answer == "xxx" else float(len(answer)) for _, answer in items]

    path = tmp_path / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        scores.score(path, rows(responses), judge=judge, chunk=2)
    assert not path.exists()
    report = scores.score(path, rows(responses), judge=judge, chunk=2)
    assert asked == [("style", 2)] * 6
    assert report == {"in": 10, "out": 10, "dropped": {}, "no verdict": {"style": 1}}
    assert records.read(path, Judged) == [dataclasses.replace(r, scores={"style": None if k == 3 else float(k)})
                                          for k, r in enumerate(responses)]
    assert scores.score(path, rows(responses), judge=judge) == report and len(asked) == 6


def test_every_response_is_scored_on_its_own_dimension_or_on_those_that_are_named(tmp_path):
    mixed = [judged(k, f"```python\ndef f():\n    return {k}\n```", dimension=name)
             for k, name in enumerate(["style", "readability", "style"])]
    scores.score(tmp_path / "own" / "scores.jsonl", rows(mixed), judge=static.judge)
    scores.score(tmp_path / "all" / "scores.jsonl", rows(mixed), judge=static.judge, dimensions=("style", "security"))
    assert [[*row["scores"]] for row in stream.rows(tmp_path / "own" / "scores.jsonl")] == [
        ["style"], ["readability"], ["style"]]
    assert [[*row["scores"]] for row in stream.rows(tmp_path / "all" / "scores.jsonl")] == [["style", "security"]] * 3


def test_processes_score_as_this_one_does(tmp_path: Path):
    responses = [judged(k, f"```python\ndef f(x):\n    y = {k}\n    return x\n```") for k in range(8)]
    found = []
    for workers in (1, 2):
        path = tmp_path / str(workers) / "scores.jsonl"
        scores.score(path, rows(responses), judge=static.judge, workers=workers, chunk=3)
        found.append(path.read_bytes())
    assert found[0] == found[1]


def test_records_from_before_there_were_scores_are_read(tmp_path):
    old = {name: value for name, value in dataclasses.asdict(judged(0, "x", dimension="")).items()
           if name not in ("scores", "solution_text", "dimension")}
    records.write(tmp_path / "old.jsonl", [old])
    assert records.read(tmp_path / "old.jsonl", Judged) == [judged(0, "x", dimension="")]
