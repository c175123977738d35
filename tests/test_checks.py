"""Tests in all the forms that models write: right programs pass, wrong ones fail, and what says nothing is refused."""

import textwrap

import pytest

from align_jax import sandbox
from align_jax.synth import checks
from align_jax.text import Unusable

RIGHT = "def double(x):\n    if x is None:\n        raise ValueError\n    y = 2 * x\n    return y"
WRONG = RIGHT.replace("2", "3")
BROKEN = "def double(x):\n    return undefined"

# Each is to pass with RIGHT, and to fail with WRONG by an assertion and with BROKEN by an exception.
FORMS = {
    "asserts": "assert double(1) == 2\nassert double(2) == 4",
    "statements between": "import math\nx = math.floor(1.5)\ny = double(x)\nassert y == 2\nprint('done')",
    "a loop": "for x in range(1, 4):\n    assert double(x) == x + x",
    "future first": "from __future__ import annotations\nassert double(1) == 2\nassert double(2) == 4",
    "future not first": "import math\nfrom __future__ import annotations\nassert double(1) == 2",
    "a function, called": "def test():\n    assert double(1) == 2\n\ntest()",
    "a function, never called": "def test_one():\n    assert double(1) == 2",
    "a function with defaults": "def test_one(x=1, *, y=2):\n    assert double(x) == y",
    "a helper with arguments": "def check(x, y):\n    assert double(x) == y\n\ndef test_all():\n    check(1, 2)",
    "a runner, never called": "def test_a():\n    assert double(1) == 2\ndef run():\n    test_a()",
    "functions in a list": "def a():\n    assert double(1) == 2\nfor test in [a]:\n    test()",
    "functions in a list that has a name": "def a():\n    assert double(1) == 2\ntests = [a]\nfor t in tests:\n    t()",
    "two that call each other": "def a():\n    b()\ndef b(x=1):\n    assert double(x) == 2\n    if x > 1: a()\na()",
    "async": "async def test_one():\n    assert double(1) == 2",
    "a main guard": "if __name__ == '__main__':\n    assert double(1) == 2\n    print('ok')",
    "a main guard that calls": "def test_one():\n    assert double(1) == 2\nif __name__ == '__main__':\n    test_one()",
    "unittest": """
        import unittest
        class TestDouble(unittest.TestCase):
            def setUp(self):
                self.x = 1
            def test_one(self):
                self.assertEqual(double(self.x), 2)
            def test_two(self):
                for x in (3, 4):
                    with self.subTest(x=x):
                        self.assertEqual(double(x), x + x)
        if __name__ == '__main__':
            unittest.main()""",
    "unittest.main without a guard": """
        from unittest import TestCase, main
        import unittest
        class Double(TestCase):
            @classmethod
            def setUpClass(cls):
                cls.x = 1
            def test_one(self):
                assert double(self.x) == 2
        unittest.main(argv=[''], exit=False)""",
    "unittest with a helper": """
        import unittest
        def check(x):
            assert double(x) == x + x
        class T(unittest.TestCase):
            def test_one(self):
                check(1)""",
    "a pytest class": "class TestDouble:\n    def test_one(self):\n        assert double(1) == 2",
    "the import of a made-up module": "from my_solution import double\nassert double(1) == 2",
    "the import of a made-up module, or else a stand-in":
        "try:\n    from my_solution import double\nexcept ImportError:\n    def double(x): return 2 * x\n\n"
        "assert double(1) == 2",
    "all of a made-up module": "from my_solution import *\nassert double(1) == 2",
    "a copy of the solution": RIGHT + "\n\nassert double(1) == 2",
    "raise": "if double(1) != 2:\n    raise AssertionError('no')",
    "numpy": "import numpy as np\nnp.testing.assert_allclose(double(np.ones(2)), [2, 2])",
    "an error that is expected": """
        try:
            double(None)
            assert False, "no error"
        except ValueError:
            pass
        assert double(1) == 2""",
    "a handler that passes the failure on": """
        try:
            assert double(1) == 2
        except AssertionError:
            print('wrong')
            raise""",
    "a variable named input": "input_list = [1, 2]\nif __name__ == '__main__':\n    assert double(input_list[0]) == 2",
    "several on a line": "x = 1; assert double(x) == 2; y = 2",
}


@pytest.fixture(scope="module")
def verdicts():
    """What the sandbox says of every form with the right, the wrong and the broken program."""
    try:
        backend = sandbox.backend()
    except RuntimeError as error:
        pytest.skip(str(error))
    jobs = [(program, checks.of(textwrap.dedent(tests), RIGHT)) for tests in FORMS.values()
            for program in (RIGHT, WRONG, BROKEN)]
    found = sandbox.run_many(jobs, limits=sandbox.Limits(wall_s=60, cpu_s=60, memory_mb=2048), backend=backend)
    return {name: found[3 * i:3 * i + 3] for i, name in enumerate(FORMS)}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_labels_programs_rightly(form, verdicts):
    assert [v.status for v in verdicts[form]] == ["passed", "assertion", "exception"], verdicts[form]


REFUSED = {
    "tests without assert": [
        "", "double(1)", "print(double(1) == 2)", "assert True, double(1)", "assert (double(1) == 3, 'not two')",
        "assert 'text', double", "def test():\n    print(double(1))\ntest()",
        "try:\n    assert double(1) == 3\nexcept AssertionError as error:\n    print('failed', double, error)",
        "try:\n    assert double(1) == 3\nexcept:\n    pass",
        "try:\n    double(None)\n    assert False\nexcept Exception:\n    pass",
        "import contextlib\nwith contextlib.suppress(Exception):\n    assert double(1) == 3",
        "if False:\n    f = lambda: double(1)\n", "import unittest\nclass T(unittest.TestCase):\n"
        "    def test_one(self):\n        double(1)\nunittest.main()",
    ],
    "tests never called": [
        "def test_one(x):\n    assert double(x) == 2",
        "import pytest\n@pytest.mark.parametrize('x', [1])\ndef test_one(x):\n    assert double(x) == 2",
        "def test_one(*, x):\n    assert double(x) == 2",
        "def test_one():\n    yield\n    assert double(1) == 2",
        "assert double(1) == 2\ndef test_more(tmp_path):\n    assert double(2) == 4",
        "def check(x):\n    assert double(x) == 2\nlist(map(check, [1]))\nprint(check)",
        "class TestOne:\n    def setup_method(self):\n        self.x = 1\n    def test_one(self):\n"
        "        assert double(self.x) == 2",
        "def a(x):\n    b(x)\n    assert double(x) == 2\ndef b(x):\n    a(x)",
        "import unittest\nclass T(unittest.TestCase):\n    async def test_one(self):\n"
        "        self.assertEqual(double(1), 2)",
        "import unittest\nclass T(unittest.TestCase):\n    @unittest.skip('later')\n    def test_one(self):\n"
        "        self.assertEqual(double(1), 2)",
    ],
    "tests redefine the solution": [
        "def double(x):\n    return x + x\nassert double(1) == 2",
        "if __name__ == '__main__':\n    class double:\n        pass\n    assert double(1) == 2",
        "double = lambda x: x + x\nassert double(1) == 2",
        "try:\n    from math import tau as t\nexcept ImportError:\n    def double(x): return 2\nassert double(1) == 2",
    ],
    "tests never use the solution": [
        "assert 1 + 1 == 2", "def test():\n    assert sum([1, 1]) == 2", "y = sorted([2, 1])\nassert y == [1, 2]"],
    "tests: syntax": ["assert double(1) == ", "assert double(1) = 2", "x\0", "(" * 500 + ")" * 500],
}


@pytest.mark.parametrize(("reason", "tests"), [(reason, tests) for reason in REFUSED for tests in REFUSED[reason]])
def test_tests_that_say_nothing_are_refused(reason, tests):
    with pytest.raises(Unusable) as refused:
        checks.of(tests or "double", RIGHT)
    assert refused.value.reason == reason


SILENT = ["for x in []:\n    assert double(x) == 2", "def test():\n    return\n    assert double(1) == 2",
          "def outer():\n    def inner():\n        assert double(1) == 2\n    assert callable(inner)",
          "print(double)\nassert 1 == 1", "assert callable(double)"]


@pytest.mark.parametrize("tests", [*SILENT, "assert double(1) == 3"])
def test_tests_that_pass_without_the_solution_label_nothing(tests):
    from align_jax.synth import verify

    row = dict.fromkeys(verify.KEPT, "") | {"program": WRONG, "tests": checks.of(tests, WRONG)}
    (judged,) = verify.judge([row], backend=sandbox.backend(), limits=sandbox.Limits(wall_s=60))
    assert (judged.status, judged.reward) == (("untested", 0.0) if tests in SILENT else ("passed", 1.0))


def test_a_program_without_itself_has_its_names_and_imports():
    program = "import math\nfrom os import path as p\nK = 3\ndef f(): return [x for x in 'a']\nclass A: z = 1\n"
    names = {}
    exec(checks.without(program), names)
    assert {"math", "p", "K", "f", "A"} <= names.keys() and not {"x", "z"} & names.keys()
    for use in ("f()", "A.z", "K + 1", "K == 3", "bool(K)", "[*f]", "isinstance(1, A)"):
        with pytest.raises(BaseException, match="^$|isinstance"):
            eval(use, names)


def test_groups_hold_what_stands_before_their_assert_and_nothing_behind():
    tests = "from __future__ import annotations\nx = 1\nassert double(x) == 2\nx = 2\nassert double(x) == 4\nprint(x)"
    first, second = checks.of(tests, RIGHT)
    assert first.splitlines() == ["from __future__ import annotations", "x = 1", "assert double(x) == 2"]
    assert second.splitlines() == ["from __future__ import annotations", "x = 2", "assert double(x) == 4"]


def test_a_program_that_does_not_parse_is_no_fault_of_the_tests():
    assert checks.of("assert double(1) == 2", "def double(x:") == ("assert double(1) == 2",)
