"""score/static.py: better is higher, on pairs made by hand and on code and verdicts that nobody here wrote."""

import ast
import importlib
import inspect
import pkgutil
import re

import bandit.plugins
import pytest
import python_minifier

from align_jax.score import facts, static

MODULES = ("bisect", "calendar", "colorsys", "fnmatch", "heapq", "posixpath", "shlex", "statistics", "textwrap",
           "tokenize", "urllib.parse", "difflib", "fractions", "pprint", "quopri", "html")
DIMENSIONS = tuple(static.DIMENSIONS_SCORERS)


def scores(dimension: str, *answers: str, instruction: str = "Write it.") -> list[float | None]:
    return static.judge(dimension, [(instruction, answer) for answer in answers])


def stdlib() -> list[str]:
    """Documented functions of the standard library, the same on every run of one Python."""
    sources = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    return [ast.get_source_segment(source, node) for source in sources for node in ast.parse(source).body
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)][:80]


STDLIB = stdlib()

# --- by hand: (worse, better)

CODE = "def mean(values):\n    return sum(values) / len(values)\n"
DOCUMENTED = 'def mean(values):\n    """Return the mean of the values."""\n    return sum(values) / len(values)\n'
HAND = {
    "readability": [
        ("def m(v):\n    return sum(v) / len(v)\n", CODE),
        (CODE, DOCUMENTED),
        ("def f(rate):\n    if rate > 0.0725: return rate\n    return 0.0\n",
         "LIMIT = 0.0725\n\n\ndef f(rate):\n    if rate > LIMIT:\n        return rate\n    return 0.0\n"),
        ("def f(a):\n    # b = a + 1\n    # return b\n    return a\n", "def f(a):\n    return a\n")],
    "style": [
        ("def f(a):\n    if a == None: return 1\n    return 2\n",
         "def f(a):\n    if a is None:\n        return 1\n    return 2\n"),
        ("def Mean(Values):\n    return sum(Values)\n", "def mean(values):\n    return sum(values)\n"),
        ("def f(a, b=[]):\n    return b\n", "def f(a, b=()):\n    return b\n"),
        ("def f(a):\n    try:\n        return a()\n    except:\n        return None\n",
         "def f(a):\n    try:\n        return a()\n    except ValueError:\n        return None\n")],
    "complexity": [
        ("def f(a):\n    if a:\n        if a > 1:\n            return 2\n        return 1\n    return 0\n",
         "def f(a):\n    return min(max(a, 0), 2)\n"),
        ("def f(a):\n    for x in a:\n        for y in a:\n            if x + y == 0:\n"
         "                return x\n    return 0\n",
         "def f(a):\n    seen = set()\n    for x in a:\n        if -x in seen:\n            return x\n"
         "        seen.add(x)\n    return 0\n")],
    "explanation": [
        (CODE, DOCUMENTED),
        (f"```python\n{CODE}```",
         f"The function `mean` divides the sum of values by their number.\n```python\n{CODE}```"),
        (f"Here is some code, I hope that it helps you.\n```python\n{CODE}```",
         f"Here mean adds up the values and divides by how many.\n```python\n{CODE}```")],
    "security": [
        ("import subprocess\n\n\ndef f(a):\n    return subprocess.run(a, shell=True)\n",
         "import subprocess\n\n\ndef f(a):\n    return subprocess.run([a])\n"),
        ("def f(a):\n    return eval(a)\n", "import ast\n\n\ndef f(a):\n    return ast.literal_eval(a)\n")],
    "compliance": [
        ('def f():\n    password = "hunter2-Xq9"\n    return password\n',
         'import os\n\n\ndef f():\n    password = os.environ["DB"]\n    return password\n'),
        ("# Licensed under the GNU General Public License, version 3\n" + CODE, CODE),
        ('def f():\n    return "jane.roe@acme.com"\n', 'def f():\n    return "jane.roe@example.com"\n'),
        ("def f(user, password):\n    print(user, password)\n", "def f(user, password):\n    print(user)\n")],
    "instruction_following": [(CODE, "def average(values):\n    return sum(values) / len(values)\n")],
}


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_the_better_of_two_scores_higher(dimension):
    worse, better = zip(*HAND[dimension], strict=True)
    instruction = "Write a function named `average`."
    low, high = scores(dimension, *worse, instruction=instruction), scores(dimension, *better, instruction=instruction)
    assert all(a < b for a, b in zip(low, high, strict=True)), (low, high)


@pytest.mark.parametrize("instruction, answer, score", [
    ("Write a function `add`.", "def add(a, b): return a + b", 100),
    ("Write a function called add with type hints and a docstring.", "def add(a, b): return a + b", 100 / 3),
    ("Write a function called add with type hints.", "def add(a: int, b: int) -> int: return a + b", 100),
    ("Write a class named 'Pile' that raises an IndexError.", "class Pile:\n    def pop(self): raise IndexError", 100),
    ("Sum a list without using `sum`.", "def f(a): return sum(a)", 0),
    ("Sum a list; do not use loops.", "def f(a):\n    for x in a: pass", 0),
    ("Sum a list, using `reduce`.", "from functools import reduce\ndef f(a): return reduce(int.__add__, a)", 100),
    ("Add two numbers and explain it.", "It adds.\n```python\ndef f(a, b): return a + b\n```", 100),
    ("Add two numbers.", "def f(a, b): return a + b", None),
])
def test_what_an_instruction_demands_is_checked(instruction, answer, score):
    assert scores("instruction_following", answer, instruction=instruction) == [score and pytest.approx(score)]


# --- what nobody here wrote


def test_the_studys_own_readable_and_unreadable_implementation():
    """Figure 6 of the study."""
    readable = ('def longest_common_prefix(strings):\n    if not strings:\n        return ""\n\n'
                "    shortest_string = min(strings, key=len)\n\n    for index, char in enumerate(shortest_string):\n"
                "        for string in strings:\n            if string[index] != char:\n"
                "                return shortest_string[:index]\n\n    return shortest_string\n")
    unreadable = ('def lcp(s):\n    if not s: return ""\n    m = min(s, key=len)\n    for i, c in enumerate(m):\n'
                  "        for st in s:\n            if st[i] != c: return m[:i]\n    return m\n")
    for dimension in ("readability", "style"):
        good, bad = scores(dimension, readable, unreadable)
        assert good - bad >= static.MARGINS[dimension]
    assert len(set(scores("complexity", readable, unreadable))) == 1  # the same algorithm


@pytest.mark.parametrize("dimension, share", [("readability", 0.9), ("style", 0.75), ("explanation", 1.0)])
def test_the_standard_library_is_better_than_its_minified_self(dimension, share):
    small = [python_minifier.minify(code, remove_literal_statements=True, rename_globals=False) for code in STDLIB]
    pairs = list(zip(scores(dimension, *STDLIB), scores(dimension, *small), strict=True))
    assert len(pairs) == 80 and all(original >= minified for original, minified in pairs)
    assert sum(original > minified for original, minified in pairs) >= share * len(pairs)


def test_security_is_what_bandits_documentation_says_of_its_examples():
    """Each quoted line costs what the documentation says: its severity times its confidence."""
    quote = re.compile(r"Severity: (\w+)\s+Confidence: (\w+).*?examples/\S+?\.py:(\d+).*?\n(.*?)(?:\n\s*\n|\Z)",
                       re.DOTALL)
    modules = "os|yaml|hashlib|logging|open"
    found = []
    for module in pkgutil.iter_modules(bandit.plugins.__path__):
        doc = importlib.import_module(f"bandit.plugins.{module.name}").__doc__ or ""
        for severity, confidence, number, lines in quote.findall(doc):
            line = re.search(rf"^\s*{number}\s+((?:\w+ = )?(?:{modules})\b.*)$", lines, re.MULTILINE)
            if line:
                weight = facts.SEVERITY[severity.upper()] * facts.CONFIDENCE[confidence.upper()]
                found.append((f"import os, yaml, hashlib, logging.config\n{line[1]}\n", weight))
    assert len(found) >= 6 and len({weight for _, weight in found}) >= 3
    items = [("", code) for code, _ in found]
    weights = [fact.findings["bandit"].values() for fact in facts.measure(items, tools=["bandit"])]
    assert all(weight in said for said, (_, weight) in zip(weights, found, strict=True))  # one line breaks two rules
    assert static.judge("security", items) == [-sum(said) for said in weights]


def test_the_standard_librarys_functions_break_no_rule_of_compliance():
    assert sum(score == 0 for score in scores("compliance", *STDLIB)) >= 0.97 * len(STDLIB)


# --- fair to length


@pytest.mark.parametrize("dimension", ["explanation", "security", "compliance"])
def test_the_same_twice_over_scores_the_same(dimension):
    hand = [code for pair in HAND[dimension] for code in pair if "```" not in code]
    assert scores(dimension, *(f"{code}\n\n{code}" for code in hand)) == scores(dimension, *hand)


@pytest.mark.parametrize("dimension", ["style", "complexity"])
def test_a_long_answer_scores_what_its_parts_score(dimension):
    """Functions of the standard library by eights: the mean of their scores, weighted by their statements."""
    sizes = [fact.size for fact in facts.measure([("", code) for code in STDLIB], tools=())]
    each, want = scores(dimension, *STDLIB), []
    for k in range(0, len(STDLIB), 8):
        total = sum(size * score for size, score in zip(sizes[k:k + 8], each[k:k + 8], strict=True))
        want.append(total / sum(sizes[k:k + 8]))
    eights = ["\n\n".join(STDLIB[k:k + 8]) for k in range(0, len(STDLIB), 8)]
    assert scores(dimension, *eights) == pytest.approx(want, abs=0.3)  # ruff names a shadowed builtin once a file


def test_more_words_than_enough_earn_nothing():
    said = "The function mean divides the sum of values by their number. "
    short, long = (f"{said * times}\n```python\n{CODE}```" for times in (2, 40))
    assert len(set(scores("explanation", short, long))) == 1


# --- what is no verdict, and what silences no tool


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("answer", [
    "", "I cannot.", "```python\ndef f(:\n```", "def f(\0): pass", "(" * 5000, '"""Only words."""'])
def test_an_answer_without_a_program_has_no_score(dimension, answer):
    assert scores(dimension, answer, instruction="Write a function `f`.") == [None]


@pytest.mark.parametrize("answer, failing", [
    ("def f(x):\n    return " + "-" * 900 + "x\n", {"complexity", "compliance"}),  # too deep for a recursive walk
    ("# coding: nonesuch\ndef f(x):\n    return x\n", {"security"}),  # bandit reads bytes
])
def test_what_a_tool_fails_on_has_no_score_and_takes_none_from_its_neighbours(answer, failing):
    for dimension in DIMENSIONS:
        of_odd, of_other = scores(dimension, answer, CODE, instruction="Write a function `f`.")
        assert of_other is not None and (of_odd is None) is (dimension in failing), dimension


@pytest.mark.parametrize("dimension, loud, silent", [
    ("style", "def f(a):\n    return a == None\n", "# ruff: noqa\ndef f(a):\n    return a == None  # noqa\n"),
    ("security", "def f(a):\n    return eval(a)\n", "def f(a):\n    return eval(a)  # nosec\n"),
    ("compliance", 'password = "hunter2-Xq9"\n', 'password = "hunter2-Xq9"  # pragma: allowlist secret\n')])
def test_a_comment_silences_no_tool(dimension, loud, silent):
    before, after = scores(dimension, loud, silent)
    assert after <= before < 0


def test_asserts_and_undefined_names_are_not_held_against_an_answer():
    assert scores("security", "assert f(1) == 2\n") == scores("style", "assert f(1) == 2\n") == [0]


def test_a_batch_scores_as_one_by_one():
    for dimension in ("style", "security", "compliance"):
        answers = [HAND[dimension][0][0], "", HAND[dimension][1][1], "def f(:", HAND[dimension][1][0]]
        assert scores(dimension, *answers) == [scores(dimension, answer)[0] for answer in answers]
    assert scores("style") == []


def test_a_dimension_that_is_not_there():
    with pytest.raises(ValueError, match=r"got 'beauty', available are \['compl"):
        static.judge("beauty", [])
    assert static.DIMENSIONS_SCORERS.keys() == static.MARGINS.keys() > static.TOOLS.keys()
