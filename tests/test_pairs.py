"""synth/pairs.py and faults.py: pairs follow their rule, and no response is labelled for the wrong reason."""

import dataclasses
import itertools
import math
import random
from collections import Counter

import datasets
import pytest

from align_jax import records, sandbox
from align_jax.records import Judged, Pair
from align_jax.synth import answers, faults, pairs
from align_jax.text import Unusable


def judged_of(task_id: str, *outcomes) -> list[Judged]:
    """Outcomes are (status, reward), or with other fields."""
    made = []
    for k, (status, reward, *rest) in enumerate(outcomes):
        judged = Judged(id=f"{task_id}/{k}", task_id=task_id, prompt="p", completion=f"{task_id}-{k}-{reward}",
                        finish="stop", status=status, detail="", reward=reward)
        made.append(dataclasses.replace(judged, **rest[0] if rest else {}))
    return made


def make(folder, judged, **settings) -> tuple[list[Pair], dict]:
    report = pairs.make(folder / "pairs.jsonl", judged, **{"seed": 0} | settings)
    found = records.read(folder / "pairs.jsonl", Pair)
    assert report["in"] == report["out"] + sum(report["dropped"].values()) and report["out"] == len(found)
    return found, report


def sides(pair: Pair) -> tuple[str, str]:
    return pair.made["chosen"]["id"].split("/")[1], pair.made["rejected"]["id"].split("/")[1]


def scored(value: float | None, status: str = "passed", reward: float = 1.0, **fields):
    return status, reward, {"scores": {"style": value}} | fields


PASS, HALF, NONE = ("passed", 1.0), ("assertion", 0.5), ("exception", 0.0)
CUT, BLANK, NOT_RUN = {"finish": "length"}, {"completion": " \n"}, ("sandbox", 0.0)
SETTINGS = [{"rule": "pass_fail"}, {"rule": "best_worst"}, {"rule": "dimension", "by": "style"}]

# --- the rules


@pytest.mark.parametrize("rule, outcomes, reason", [
    ("pass_fail", [PASS, PASS], "no response failed"),
    ("pass_fail", [HALF, NONE], "no response passed"),
    ("pass_fail", [PASS, NOT_RUN], "no response failed"),
    ("pass_fail", [PASS, (*NONE, CUT)], "no response failed"),
    ("pass_fail", [PASS, (*NONE, BLANK)], "no response failed"),
    ("pass_fail", [NONE, (*PASS, CUT)], "no response passed"),
    ("pass_fail", [NOT_RUN], "no response passed"),
    ("best_worst", [PASS, PASS], "equal in reward"),
    ("best_worst", [HALF, HALF, HALF], "equal in reward"),
    ("best_worst", [HALF], "fewer than two usable responses"),
    ("best_worst", [HALF, PASS, NOT_RUN], "fewer than n usable responses"),
    ("best_worst", [HALF, PASS, (*PASS, CUT)], "fewer than n usable responses"),
    ("best_worst", [HALF, PASS, (*NONE, BLANK)], "fewer than n usable responses"),
])
def test_every_reason_for_no_pair_is_counted(tmp_path, rule, outcomes, reason):
    judged = judged_of("a", *outcomes) + judged_of("b", PASS, NONE)
    (pair,), report = make(tmp_path, judged, rule=rule)
    assert report["dropped"] == {reason: 1}
    assert (pair.id, pair.prompt, pair.chosen, pair.rejected) == ("b", "p", "b-0-1.0", "b-1-0.0")


def test_best_and_worst_are_of_the_n_that_were_asked_for(tmp_path):
    """What was dropped before it ran, as truncated or without tests, is not here to be counted."""
    judged = judged_of("a", PASS, HALF, NONE)
    for settings, want in (({}, 1), ({"n": 3}, 1), ({"n": 4}, 0), ({"n": 4, "min_usable": 0.75}, 1)):
        made, report = make(tmp_path, judged, rule="best_worst", **settings)
        assert len(made) == want and report["dropped"] == ({} if want else {"fewer than n usable responses": 1})


def test_best_and_worst_are_of_all_and_pass_and_fail_are_drawn(tmp_path):
    outcomes = [HALF, PASS, NONE, HALF, PASS, NONE, NOT_RUN, (*NONE, CUT)]
    judged = [j for task in range(400) for j in judged_of(str(task), *outcomes)]
    drawn = {}
    for rule in ("pass_fail", "best_worst"):
        made, report = make(tmp_path, judged, rule=rule, min_usable=0.75)  # 6 of 8
        assert len(made) == 400 and not report["dropped"]
        assert report["responses left out"] == {"status sandbox": 400, "truncated": 400}
        drawn[rule] = [Counter(side) for side in zip(*map(sides, made), strict=True)]
    assert [set(side) for side in drawn["best_worst"]] == [{"1", "4"}, {"2", "5"}]
    assert [set(side) for side in drawn["pass_fail"]] == [{"1", "4"}, {"0", "2", "3", "5"}]
    for side in itertools.chain(*drawn.values()):  # ties are drawn evenly: 5 standard deviations
        share = 1 / len(side)
        assert all(abs(count - 400 * share) < 5 * (400 * share * (1 - share)) ** 0.5 for count in side.values())


@pytest.mark.parametrize("outcomes, settings, want", [
    ([scored(-3), scored(-1), scored(-2)], {}, ("1", "0")),
    ([scored(-3), scored(-1), scored(0, "assertion", 0.5)], {}, ("1", "0")),  # the failing one is not even with them
    ([scored(-3, "assertion", 0.5), scored(-1, "exception", 0.5), scored(9, "assertion", 0.0)], {"even": "reward"},
     ("1", "0")),
    ([scored(-3), scored(-1), scored(None)], {"margin": 2.0}, ("1", "0")),
    ([scored(-3), scored(-1)], {"margin": 2.1}, "no gap of 2.1 in style"),
    ([scored(-1), scored(-1)], {}, "equal in style"),
    ([scored(-3), scored(-1, "assertion", 0.5)], {}, "no two responses even by passed"),
    ([scored(-3), scored(-1, "assertion", 0.5)], {"even": "reward"}, "no two responses even by reward"),
    ([PASS, PASS], {}, "no two responses even by passed"),  # nobody scored them
])
def test_a_dimension_decides_between_what_does_the_same_in_the_tests(tmp_path, outcomes, settings, want):
    made, report = make(tmp_path, judged_of("a", *outcomes), rule="dimension", by="style", **settings)
    assert (sides(made[0]) if made else next(iter(report["dropped"]))) == want
    assert report["responses left out"].get("no score of style", 0) == sum(
        len(rest) < 3 or rest[2]["scores"]["style"] is None for rest in outcomes)


def test_best_and_worst_by_a_dimension_and_the_plain_rule_under_its_prompt(tmp_path):
    judged = judged_of("a", scored(-3), scored(-1), scored(0, "assertion", 0.5))
    (pair,), _ = make(tmp_path, judged, rule="best_worst", by="style")
    assert sides(pair) == ("2", "0") and pair.made["why"] == "style" and pair.made["n"] == 3
    (pair,), _ = make(tmp_path, judged, rule="pass_fail")
    assert pair.made["why"] == "assertion" and pair.made["chosen"]["status"] == "passed"


# --- several pairs a task


@pytest.mark.parametrize("settings", SETTINGS)
def test_pairs_depend_on_the_seed_and_the_task_alone(tmp_path, settings):
    outcomes = [scored(-2), scored(-1), scored(-2, *HALF), scored(-1, *NONE), scored(-1, *NONE), scored(-2)]
    judged = {str(task): judged_of(str(task), *outcomes) for task in range(50)}
    tasks = list(judged)

    def by_id(order, seed=0, per_task=3):
        made, _ = make(tmp_path, [j for task in order for j in judged[task]], seed=seed, per_task=per_task, **settings)
        return {pair.id: pair for pair in made}

    want = by_id(tasks)
    random.Random(0).shuffle(tasks)
    assert by_id(tasks) == want and by_id(tasks, seed=1) != want
    assert all(want[name] == pair for name, pair in by_id(tasks[:7]).items())
    assert by_id(tasks, per_task=1) == {name: pair for name, pair in want.items() if "#" not in name}


@pytest.mark.parametrize("passed, failed, per_task", [
    (5, 5, 5), (2, 8, 4), (1, 3, 3), (3, 1, 2), (4, 6, 24), (2, 2, 9)])
def test_no_response_is_used_twice_while_others_are_left(tmp_path, passed, failed, per_task):
    judged = judged_of("a", *[PASS] * passed, *[NONE] * failed)
    made, report = make(tmp_path, judged, rule="pass_fail", per_task=per_task)
    wanted = min(per_task, passed * failed)
    assert len({sides(pair) for pair in made}) == len(made) == wanted
    assert [pair.id for pair in made] == ["a", *(f"a#{k}" for k in range(1, wanted))]
    assert report["dropped"] == ({"no further pair": per_task - wanted} if per_task > wanted else {})
    first = [sides(pair) for pair in made[:min(passed, failed)]]
    assert len({name for pair in first for name in pair}) == 2 * len(first)


def test_the_next_best_and_worst_follow_the_best_and_worst(tmp_path):
    made, _ = make(tmp_path, judged_of("a", *(scored(k) for k in range(6))), rule="dimension", by="style", per_task=3,
                   margin=1.0)
    assert [sides(pair) for pair in made] == [("5", "0"), ("4", "1"), ("3", "2")]


# --- bounds and shape


@pytest.mark.parametrize("bounds, reason", [
    ({}, None), ({"min_distance": 0.5}, "sides too near"), ({"max_length_ratio": 1.1}, "lengths too unequal"),
    ({"max_length_ratio": 1.1, "length": lambda text: len(text.split())}, None)])
def test_a_pair_out_of_bounds_is_dropped_by_its_reason(tmp_path, bounds, reason):
    judged = judged_of("a", (*PASS, {"completion": "return x + 1000"}), (*NONE, {"completion": "return x + 1"}))
    made, report = make(tmp_path, judged, rule="pass_fail", **bounds)
    assert (not made) is bool(reason) and report["dropped"] == ({reason: 1} if reason else {})


def test_a_pair_out_of_bounds_leaves_its_place_to_another(tmp_path):
    near, far = {"completion": "a-0-1.1"}, {"completion": "something else entirely"}
    made, _ = make(tmp_path, judged_of("a", PASS, (*NONE, near), (*NONE, far)), rule="pass_fail", min_distance=0.5,
                   per_task=2)
    assert [sides(pair) for pair in made] == [("0", "2")]


def test_the_shape_of_the_pairs_is_reported(tmp_path):
    judged = [j for k in range(1, 101) for j in judged_of(
        str(k), (*PASS, {"completion": "x" * k}), (*NONE, {"completion": "x" * (k + 1)}))]
    _, report = make(tmp_path, judged, rule="pass_fail")
    assert report["longer side chosen"] == 0
    assert report["distance"]["50%"] == pytest.approx(1 / 51.5, abs=1e-3)  # one letter of k + 1
    assert report["chosen / rejected length"]["50%"] == pytest.approx(1 - 1 / 51.5, abs=1e-3)


# --- never for the wrong reason


@pytest.mark.parametrize("status", sandbox.STATUSES)
def test_which_failures_make_a_rejected_response(tmp_path, status):
    """A wrong program may time out or want memory or a package, and so may a right one on a busy or bare machine."""
    judged = judged_of("a", PASS, (status, 0.0, {"detail": "test 1: it said"}))
    made, report = make(tmp_path, judged, rule="pass_fail")
    if status in ("assertion", "exception", "syntax", "output", "exited"):
        assert made[0].made["why"] == status and made[0].made["rejected"]["detail"] == "test 1: it said"
    else:
        assert not made and report["responses left out"] == ({} if status == "passed" else {f"status {status}": 1})
    if status not in ("passed", "sandbox"):
        made, _ = make(tmp_path, judged, rule="pass_fail", rejectable=[status])
        assert made[0].made["why"] == status


@pytest.mark.parametrize("detail", [
    "test 0: PermissionError: [Errno 13] Permission denied: '/home'", "program: OSError: [Errno 30] Read-only",
    "test 0: URLError: <urlopen error [Errno 101]>", "program: EOFError: EOF when reading a line"])
def test_what_the_sandbox_refused_is_no_fault_of_the_program(tmp_path, detail):
    _, report = make(tmp_path, judged_of("a", PASS, (*NONE, {"detail": detail})), rule="pass_fail")
    assert report["responses left out"] == {"refused by the sandbox": 1}
    made, _ = make(tmp_path, judged_of("a", PASS, ("assertion", 0.0, {"detail": detail})), rule="pass_fail")
    assert len(made) == 1


@pytest.mark.parametrize("program", [
    "import threading, time\nfor _ in range(99): threading.Thread(target=time.sleep, args=[9], daemon=True).start()",
    "import os\nwhile True: os.dup(1)", "open('big', 'wb').write(bytes(1 << 26))",
    "for i in range(99): open(f'{i}', 'wb').write(bytes(1 << 20))", "open('/etc/motd', 'w')", "input()",
    "import urllib.request\nurllib.request.urlopen('http://example.com')", "import os\nwhile True: os.fork()",
    "import socket\nsocket.create_connection(('127.0.0.1', 80))",
    "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
], ids=lambda program: program.split("\n")[-1][:40])
def test_what_a_real_sandbox_refuses_is_told(tmp_path, program):
    """Programs that a bare machine of the user's would run, or fail otherwise."""
    verdict = sandbox.run(program, ["assert True"], limits=sandbox.Limits(wall_s=60, cpu_s=60))
    assert verdict.status == "exception", verdict
    _, report = make(tmp_path, judged_of("a", PASS, (*NONE, {"detail": verdict.detail})), rule="pass_fail")
    assert report["responses left out"] == {"refused by the sandbox": 1}, verdict


def test_a_failing_response_whose_code_passed_beside_it_has_wrong_tests(tmp_path):
    chat = [{"role": "user", "content": "Write f."}]
    same = ["One:\n```python\ndef f(x):\n    return x\n```", "Two:\n```python\ndef f(x):  \n\n    return x\n```"]
    judged = judged_of("a", (*PASS, {"completion": same[0]}), (*NONE, {"completion": same[1]}))
    judged = [dataclasses.replace(j, prompt=chat) for j in judged]
    _, report = make(tmp_path, judged, rule="pass_fail")
    assert report["responses left out"] == {"failed, but its code passed beside it": 1}


WRITTEN = {  # what a model writes -> its label, or why it has none
    "```python\nfrom __future__ import annotations\n\n\ndef f(x):\n    return x + 1\n```\n</response>\n\n<tests>\n"
    "```python\nassert f(1) == 2\n```": "passed",
    "```python\ndef f(x):\n    return x + 1\n```\nIt prints:\n```\n>>> 2\n```\n</response>\n\n<tests>\n"
    "```python\nassert f(1) == 2\n```": "passed",
    "```text\n2\n```\n</response>\n\n<tests>\n```python\nassert f(1) == 2\n```": "no code block",
    "```python\ndef f(x):\n    return x + 2\n```\n</response>\n\n<tests>\n```python\nimport unittest\n\n\n"
    "class T(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f(1), 2)\n\n\n"
    "if __name__ == '__main__':\n    input_list = []\n    unittest.main()\n```": "assertion",
    "```python\ndef f(x):\n    return x + 2\n```\n</response>\n\n<tests>\n```python\ndef test_f():\n"
    "    assert f(1) == 2\n```": "assertion",
    "```python\ndef f(x):\n    return x\n```\n</response>\n\n<tests>\n"
    "```python\nprint(f(1))\n```": "tests without assert",
    "```python\ndef f(x):\n    return x\n```\n</response>\n\n<tests>\n```python\nassert True\n```": None,
    "```python\n# nothing yet\n```\n</response>\n\n<tests>\n```python\nassert True\n```": None,
    "```python\ndef f(x):\n    # TODO: your code here\n    pass\n```\n</response>\n\n<tests>\n"
    "```python\nassert f(1) == 2\n```": "placeholder",
}


def test_every_trap_of_self_written_tests_ends_in_the_right_label(tmp_path):
    """The traps of SelfCodeAlign's execution and filter, through parsing and the sandbox to the pair."""
    judged, chat = [], [{"role": "user", "content": "Write f."}]
    for k, (written, want) in enumerate(WRITTEN.items()):
        try:
            answer = answers.answer(written)
        except Unusable as error:
            assert want in (None, error.reason), (written, error.reason)
            continue
        verdict = sandbox.run(answer.program, answer.tests, limits=sandbox.Limits(wall_s=60, cpu_s=60))
        assert verdict.status == want, (written, verdict)
        judged += judged_of(f"{k:02}", (verdict.status, verdict.reward, {
            "prompt": chat, "completion": written, "solution_text": answer.response, "detail": verdict.detail}))
    assert len(judged) == 4
    judged = [dataclasses.replace(j, task_id="t") for j in judged]
    made, _ = make(tmp_path, judged, rule="pass_fail", per_task=2)
    assert [p.made["why"] for p in made] == ["assertion", "assertion"]
    assert all("assert" not in side and "<tests>" not in side for p in made for side in (p.chosen, p.rejected))


@pytest.mark.parametrize("shown, reason", [
    ("I cannot.", "no code block"), ("```text\n1\n```", "no code block"), (" ", "empty"),
    ("```python\ndef f(x):\n    pass  # TODO\n```", "placeholder")])
def test_the_form_is_asked_of_both_sides(shown, reason):
    """What was judged elsewhere, or before a filter was there, is asked again."""
    chat = [{"role": "user", "content": "Write f."}]
    for status in ("passed", "assertion"):
        (response,) = judged_of("a", (status, 0.0, {"prompt": chat, "completion": "raw", "solution_text": shown}))
        with pytest.raises(Unusable, match=f"^{reason}"):
            faults.check(response)


# --- files


def test_pairs_are_what_other_trainers_load(tmp_path):
    judged = judged_of("a", scored(-3), scored(-1)) + judged_of("b", scored(-2), scored(1))
    make(tmp_path, judged, rule="dimension", by="style")
    table = datasets.load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train",
                                  cache_dir=str(tmp_path / "cache"))
    assert {"prompt", "chosen", "rejected"} <= set(table.column_names)
    assert table["chosen"] == ["a-1-1.0", "b-1-1.0"] and table[1]["made"]["chosen"]["score"] == 1.0
    elsewhere = {"prompt": "p", "chosen": "c", "rejected": "r", "score": 1}
    records.write(tmp_path / "theirs.jsonl", [elsewhere])
    assert records.read(tmp_path / "theirs.jsonl", Pair)[0].made == {}


def test_wrong_settings_are_named_together(tmp_path):
    with pytest.raises(ValueError, match=r"got 'best', available are \['best_worst'.*even: .*per_task: .*'sandbox'"):
        make(tmp_path, [], rule="best", even="x", per_task=0, rejectable=["sandbox"])
    with pytest.raises(ValueError, match="wants the name of one, got 'reward'"):
        make(tmp_path, [], rule="dimension")
    with pytest.raises(TypeError, match="margine"):
        make(tmp_path, [], rule="best_worst", margine=1)


def test_a_task_in_two_places_is_an_error_and_leaves_no_file(tmp_path):
    judged = judged_of("a", PASS) + judged_of("b", PASS, NONE) + judged_of("a", NONE)
    with pytest.raises(ValueError, match="responses of 'a' stand in several places"):
        make(tmp_path, judged, rule="pass_fail")
    assert not (tmp_path / "pairs.jsonl").exists()


def test_no_responses_no_pairs(tmp_path):
    assert make(tmp_path, [], rule="pass_fail") == ([], {"in": 0, "out": 0, "dropped": {}, "responses left out": {}})
    assert math.isinf(pairs.Settings(rule="pass_fail", seed=0).max_length_ratio)
