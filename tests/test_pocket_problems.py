"""The problems are right, their bugs are wrong, and nothing that is held out is trained on."""

import collections
import hashlib
import importlib.util
import itertools
import json
import random
import re
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "pocket_problems", Path(__file__).parents[1] / "tools" / "pocket_problems.py")
pocket = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pocket)

# of the first 200 problems; changes whenever a table or the grammar does
GOLDEN = "2ec76383e68c8433dc31f8e03b7742364d2e0ebda9ca405ea364e8f3dd291aad"


@pytest.fixture(scope="module")
def problems():
    return list(itertools.islice(pocket.stream(0), 400))


@pytest.fixture(scope="module")
def lists():
    return pocket.split(0, train=150, preference=150, evaluation=270)


def passes(problem: dict, body: str) -> bool:
    """Run the problem's own `check` as HumanEval does; loops that never end are cut by the generator's guard."""
    space: dict = {}
    exec(problem["test"], space)
    try:
        space["check"](pocket._load(problem["prompt"] + body, problem["entry_point"]))
    except Exception:
        return False
    return True


def results(problem: dict, body: str) -> list:
    function = pocket._load(problem["prompt"] + body, problem["entry_point"])
    return [function(*args) for args in problem["base_input"] + problem["plus_input"]]


def test_same_seed_same_problems_on_every_machine(problems):
    digest = hashlib.sha256(json.dumps(problems[:200]).encode()).hexdigest()
    assert digest == GOLDEN
    again = list(itertools.islice(pocket.stream(0), 20))
    assert again == problems[:20] and problems[:20] != list(itertools.islice(pocket.stream(1), 20))


def test_every_style_is_right_and_every_bug_wrong(problems):
    for problem in problems:
        assert passes(problem, problem["canonical_solution"])
        want = [(type(value), value) for value in results(problem, problem["canonical_solution"])]
        for style in problem["styles"]:
            assert [(type(value), value) for value in results(problem, style)] == want, problem["prompt"] + style
        assert problem["bugs"] and not [bug for bug in problem["bugs"] if passes(problem, bug)]


def test_bugs_are_the_problems_own_in_random_order(problems):
    assert sorted(pocket.bugs(problems[0], random.Random(3))) == sorted(problems[0]["bugs"])


def test_problems_survive_json_and_leave_their_inputs_alone(problems):
    for problem in problems:
        assert json.loads(json.dumps(problem)) == problem
        before = json.dumps(problem)
        results(problem, problem["canonical_solution"])
        assert json.dumps(problem) == before


def test_limits(problems):
    for problem in problems:
        assert len(pocket.docstring(problem["prompt"]).split()) <= pocket.MAX_WORDS
        assert 3 <= len(problem["base_input"]) <= 5 and 8 <= len(problem["plus_input"]) <= 15
        assert 4 <= problem["test"].count("assert") <= 8
        assert not re.search(r"[$«»#|~]\w|\(s\)", pocket.docstring(problem["prompt"]))
    bodies = [problem["canonical_solution"] for problem in problems]
    assert sum(len(re.findall(r"\w+|[^\w\s]", body)) for body in bodies) / len(bodies) <= 45
    assert sum(body.count("\n") <= 7 for body in bodies) >= 0.97 * len(bodies)


def test_evalplus_accepts_the_solutions_and_rejects_the_bugs(problems):
    evaluate = pytest.importorskip("evalplus.eval")
    from evalplus.gen.util import trusted_exec

    for problem in problems[:24]:
        inputs = problem["base_input"] + problem["plus_input"]
        code = problem["prompt"] + problem["canonical_solution"]
        expected, times = trusted_exec(code, inputs, problem["entry_point"], record_time=True)

        def check(body, problem=problem, inputs=inputs, expected=expected, times=times):
            return evaluate.untrusted_check(
                "humaneval", problem["prompt"] + body, inputs, problem["entry_point"], expected,
                problem["atol"], times, fast_check=True, min_time_limit=1.0)[0]

        assert check(problem["canonical_solution"]) == "pass"
        assert check(problem["bugs"][0]) != "pass"


def test_normal_form_forgets_names_and_docstring_only():
    form = pocket.normal_form
    one = 'def f(xs):\n    """Sum."""\n    t = 0\n    for x in xs:\n        t += x\n    return t\n'
    renamed = one.replace("Sum.", "Add up.").replace("xs", "zs").replace("t ", "u ").replace("return t", "return u")
    assert form(one) == form(renamed.replace("def f", "def g").replace("zs", "numbers"))
    assert form(one) != form(one.replace("0", "1"))
    assert form(one) != form(one.replace("+=", "-="))
    assert form("def f(a, b):\n    return a - b") != form("def f(a, b):\n    return b - a")
    assert form("def f(a):\n    return max(a)") != form("def f(a):\n    return min(a)")
    assert form("def f(a):\n    return max(a, key=len)") != form("def f(key):\n    return max(key, default=len)")


def test_split_is_disjoint_by_code_and_docstring(lists):
    forms = {name: {pocket.normal_form(p["prompt"] + p["canonical_solution"]) for p in items}
             for name, items in lists.items()}
    docs = {name: {pocket.docstring(p["prompt"]) for p in items} for name, items in lists.items()}
    for one, two in itertools.combinations(lists, 2):
        assert not forms[one] & forms[two] and not docs[one] & docs[two]
    assert [len(items) for items in lists.values()] == [270, 150, 150]
    assert [p["task_id"] for p in lists["evaluation"][:2]] == ["PocketEval/0", "PocketEval/1"]
    assert [p["task_id"] for p in lists["preference"][:2]] == ["PocketPref/0", "PocketPref/1"]


def test_evaluation_has_all_families_and_mostly_new_combinations(lists):
    families = collections.Counter(problem["family"] for problem in lists["evaluation"])
    assert set(families) == set(pocket.FAMILIES) and set(families.values()) == {10}
    assert 0.6 <= sum(problem["novel"] for problem in lists["evaluation"]) / 270 <= 0.8
    assert len({problem["combination"] for problem in lists["evaluation"]}) == 270


def test_corpus_shows_nothing_that_is_held_out(lists):
    held = pocket.held_out(lists["evaluation"])
    styles = {pocket.normal_form(p["prompt"] + style) for p in lists["evaluation"] for style in p["styles"]}
    assert styles <= held
    records = list(itertools.islice(pocket.corpus(5, held, careless=0.0, noise=0.3), 4000))
    for record in records:
        assert pocket.normal_form(record["prompt"] + record["solution"]) not in held
        assert pocket.docstring(record["prompt"]) not in held
    assert 0.2 <= sum(not record["is_as_meant"] for record in records) / 4000 <= 0.3
    assert {record["family"] for record in records} == set(pocket.FAMILIES)


def test_corpus_would_show_it_otherwise():
    """The guard is needed: without it a program of the stream turns up again."""
    first = next(pocket.corpus(5, (), careless=0.0, noise=0.0))
    form = pocket.normal_form(first["prompt"] + first["solution"])
    again = next(pocket.corpus(5, {form}, careless=0.0, noise=0.0))
    assert pocket.normal_form(again["prompt"] + again["solution"]) != form


def test_a_careless_author_forgets_the_boundary_the_end_and_the_sign():
    for right, wrong in (("$a «<=|<» $b", "a < b"), ("$a «>=|>|<=» 3", "a > 3"), ("range(«$n + 1|$n»)", "range(n)"),
                         ("str(«abs($x)|$x»)", "str(x)"), ("$a «<|<=» $b", "a < b"), ("$x[«1|0»:]", "x[1:]")):
        assert pocket._write(right.replace("$", ""), careless=True) == wrong
    rng, changed = random.Random(0), 0
    for sketch in (pocket._sketch(rng) for _ in range(1000)):
        for style in sketch.styles:
            body = pocket._body(style, careless=True)
            compile(sketch.prompt + body, "careless", "exec")
        changed += body != pocket._body(style)
    assert 200 <= changed <= 400


def test_every_block_is_drawn():
    """No row of a table is dead: each turns up in some combination of a long stream."""
    rng = random.Random(0)
    text = " ".join({pocket._sketch(rng).combination for _ in range(15_000)})
    for table in (pocket.FILTERS, pocket.MAPS, pocket.CONSUMERS, pocket.PROGRAMS, pocket.COMPARISONS, pocket.ENTRIES):
        assert not [block.key for block in table if not re.search(rf"(?<![a-z]){block.key}(?![a-z])", text)]
