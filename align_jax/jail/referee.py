"""Judge a program's tests from outside its process, as far as a test lets itself be judged there.

Part of the sandbox: sandbox.py starts a warden.py in a jail, that forks a process for each program, and this
decides what the two say to each other and what it is worth. A program shares its interpreter with its tests, so it
can do to them what it likes. Therefore
  1. `assert f(1) == 2` at the top of a test is taken apart: its process gets `assert tell(f(1))` and sends the
     value; it is compared here, and what it should be never gets there. So with every literal, `not`, and operator.
  2. An assert of another kind, and a value that is no plain data, is judged by that process. It has to answer with a
     number that came with just this test, and what equals two things that differ (`__eq__` always true) equals nothing.
  3. Between the tests and after the last, asserts are sent that must fail. Where one does not, nothing had passed.
  4. Every message is answered once. Where a second answer to one comes (from a thread that spoke first, and then from
     the process' own end of the test), nothing had passed.
What is left: a program written against this very driver, that finds it by its frames and reads a test of kind 2
in memory, or steps over its asserts with a trace function set while the test runs, can answer for it. It could as well
have read there what its function has to return.
"""

import ast
import random
import warnings
from collections.abc import Generator

# What a process may report of itself, see sandbox.STATUSES; "tampered" is said of it.
REPORTS = ("passed", "assertion", "exception", "syntax", "memory", "missing_package", "exited")
TELL, REAL, VALUE = "<tell>", "<real>", "_"  # no program can use the first two by accident

Outcome = tuple[str, str]  # a status and its detail
Talk = Generator[tuple[str, object], Outcome, Outcome | None]  # yields what to send, is sent what comes back


def trial(program: str, tests: list[str], outcomes: list[Outcome]) -> Talk:
    """Try a program, then each test; append an outcome for the program, one for each test, and ("end", "")."""
    reply = yield "program", program
    outcomes.append(reply if reply[0] in REPORTS else ("tampered", "told before it was asked"))
    if reply[0] == "passed":
        for test in tests:
            outcomes.append((yield from _try(test)))
            if random.random() < 0.5:
                yield from _control(outcomes)
        yield from _control(outcomes)
    outcomes.append(("end", ""))


def verdict(outcomes: list[Outcome], *, num_tests: int, how: Outcome) -> tuple[str, str, float]:
    """Return status, detail and reward; where the outcomes break off, the next is `how` the process ended.

    How much passed before an output flood was noticed is chance, so it is worth 0, as is all of a tampered trial.
    """
    if how[0] in ("output", "sandbox"):
        return *how, 0.0
    ran = outcomes[:-1] if outcomes and outcomes[-1][0] == "end" else [*outcomes, how]
    tampered = [outcome for outcome in ran if outcome[0] == "tampered"]
    if tampered or ran[0][0] != "passed":
        return *(tampered or ran)[0], 0.0
    reward = [status for status, _ in ran[1:]].count("passed") / num_tests if num_tests else 1.0
    for index, (status, detail) in enumerate(ran):
        if status != "passed":
            return status, f"test {index}: {detail}", reward
    return "passed", "", reward


def split(source: str) -> tuple[object, list[object]]:
    """Take a test apart: code for the program's process, and for each assert at its top one for a value of `_`.

    Raises what `compile` raises, and ValueError for a test without a statement.
    """
    tree, questions = ast.parse(source, "<test>"), []
    if not tree.body:
        raise ValueError("empty test")
    tree = _Wary().visit(tree)
    for statement in tree.body:
        if isinstance(statement, ast.Assert):
            value, question = _part(statement.test)
            questions.append(compile(ast.fix_missing_locations(ast.Expression(question)), "<assert>", "eval"))
            statement.test = ast.Call(ast.Name(TELL, ast.Load()), [value], [])
    return compile(ast.fix_missing_locations(tree), "<test>", "exec", 0, True), questions


def holds(question: object, text: str) -> bool | None:
    """Say whether a question is answered by a value in writing; None where only the program's process can tell."""
    try:
        return bool(eval(question, {"__builtins__": {"set": set}, VALUE: ast.literal_eval(text)}))
    except Exception:  # no data, or not to be compared: there it raises what the assert would have raised
        return None


def _try(source: str) -> Talk:
    """Send one test, judge each value that it tells, and return its outcome."""
    try:
        with warnings.catch_warnings(action="ignore"):
            code, questions = split(source)
    except Exception as error:
        empty = str(error) == "empty test"
        return ("exception", "empty test") if empty else ("syntax", f"{type(error).__name__}: {error}")
    reply, wrong = (yield "test", code), ""
    while reply[0] in ("tells", "asks"):
        if not questions:
            return "tampered", "told more than was asked"
        question = questions.pop(0)
        right = holds(question, reply[1]) if reply[0] == "tells" else None
        if right is False:
            wrong = wrong or f"AssertionError: got {reply[1][:200]}"
        reply = yield ("question", question) if right is None else ("answer", right)
    if wrong:
        return "assertion", reply[1] if reply[1].strip() not in ("", "AssertionError:") else wrong
    if reply[0] == "passed" and questions:
        return "tampered", "reported a pass before the end of the test"
    return reply


def _control(outcomes: list[Outcome]) -> Talk:
    """Send an assert that must fail; where it does not, say so in the outcomes."""
    one, other = random.sample(range(10**9), 2)
    reply = yield "test", compile(f"assert {one} == {other}", "<test>", "exec")
    if reply[0] != "assertion":
        outcomes.append(("tampered", "a false assert passed as well"))


def _part(test: ast.expr) -> tuple[ast.expr, ast.expr]:
    """Part an assert's expression into what the program has to do with, and the rest, where that is called `_`."""
    hole = ast.Name(VALUE, ast.Load())
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value, rest = _part(test.operand)
        return value, ast.UnaryOp(ast.Not(), rest)
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, (right,), singletons = test.left, test.comparators, isinstance(test.ops[0], ast.Is | ast.IsNot)
        if _is_literal(right, singletons):
            return left, ast.Compare(hole, test.ops, [right])
        if _is_literal(left, singletons):
            return right, ast.Compare(left, test.ops, [hole])
    return test, hole


def _is_literal(node: ast.expr, singleton: bool = False) -> bool:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return not singleton or value is None or value is ... or isinstance(value, bool)


class _Wary(ast.NodeTransformer):
    """Look twice at what a test compares, or has an `assert...` compare, but for literals and unittest.mock's ANY."""

    def visit_Compare(self, node: ast.Compare) -> ast.Compare:
        self.generic_visit(node)
        if not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            node.left, *node.comparators = map(self.wary, (node.left, *node.comparators))
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if getattr(node.func, "attr", getattr(node.func, "id", "")).startswith("assert"):
            node.args = [arg if isinstance(arg, ast.Starred) else self.wary(arg) for arg in node.args]
        return node

    def wary(self, node: ast.expr) -> ast.expr:
        if _is_literal(node) or getattr(node, "attr", getattr(node, "id", "")) == "ANY":
            return node
        return ast.Call(ast.Name(REAL, ast.Load()), [node], [])
