"""The tests a model wrote, as what `sandbox.run` takes: groups of statements, each of which really checks something.

A test that passes whatever the program does labels a response for no reason, and so does one that fails whatever it
does. So tests are taken apart by their syntax tree, what nobody would call is called, and the rest is refused:

    assert f(1) == 2                         a group, with the statements since the last one
    def test_f(): ...      never called      a group that calls it; refused where it needs arguments (fixtures)
    class T(TestCase): ... unittest.main()   a group a method, run so that its exception comes through
    if __name__ == "__main__": ...           its body, as the sandbox's module has another name
    from solution import f                   left out, the program runs in the same module
    def f(): ...           as in the program left out; refused where it differs, for it would be tested instead
    try: from solution import f / except: ..  left out as well, with what stands in for the solution
    assert (f(1) == 2, "is two")             no check, nor is one whose failure an `except` swallows

What no syntax tells (an empty loop, an early return) a second run does: tests that pass `without` the solution say
nothing (`verify`).
"""

import ast
import functools
import importlib.util
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

from align_jax.text import Unusable

_FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
_LATER = (*_FUNCTION, ast.ClassDef, ast.Lambda)  # what they hold runs when they are called
_INNER = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # what they bind stays in them
_RUNNER = re.compile(r"(sys\.exit\(|raise SystemExit\()?(unittest|pytest)\.main\(")


def of(tests: str, program: str) -> tuple[str, ...]:
    """Return the tests as groups of statements to be run in turn behind the program.

    Raises:
      Unusable: "tests: syntax", "tests redefine the solution", "tests never use the solution", "tests never called"
        or "tests without assert".
    """
    body = _relevant(parse(tests, reason="tests: syntax"), statements(program) or ())
    future = [s for s in body if isinstance(s, ast.ImportFrom) and s.module == "__future__"]
    functions = {s.name: s for s in body if isinstance(s, _FUNCTION)}
    checking = _checking(functions)
    groups, group = [], []
    for statement in (s for s in body if s not in future):
        group.append(ast.unparse(statement))
        if _checks(statement, checking):
            groups.append(group)
            group = []
    for call in _calls(body, functions, checking):
        groups.append([*group, call])
        group = []
    if not groups:
        raise Unusable("tests without assert", repr(tests[:60]))
    first = [ast.unparse(s) for s in future]
    return tuple("\n".join([*first, *statements]) for statements in groups)


def without(program: str) -> str:
    """A program that has the same names and imports, and ends whoever uses one of the names."""
    body = statements(program) or ()
    imports = [ast.unparse(s) for s in body if isinstance(s, ast.Import | ast.ImportFrom)]
    return "\n".join([*imports, _GONE, *(f"{name} = _Gone()" for name in sorted(_bound(body)))])


# An end that no `except Exception` and no `pytest.raises` of a test takes for its own.
_GONE = """
class _Used(BaseException): pass
class _Gone:
    def _use(self, *args, **kwargs): raise _Used
    __call__ = __getattr__ = __getitem__ = __setitem__ = __iter__ = __len__ = __contains__ = __bool__ = _use
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __enter__ = __mro_entries__ = _use
"""


def parse(code: str, *, reason: str) -> list[ast.stmt]:
    """Parse untrusted code, without its warnings."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unusable(reason, f"{type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=16)  # taking a response apart asks for those of the same blocks again and again
def statements(program: str) -> tuple[ast.stmt, ...] | None:
    """The statements of a program; None for one that does not parse, which is for the sandbox to say."""
    try:
        return tuple(parse(program, reason="syntax"))
    except Unusable:
        return None


def _relevant(body: Sequence[ast.stmt], program: Sequence[ast.stmt]) -> list[ast.stmt]:
    """What of the tests is to be run, refused where that does not test the program."""
    own = {name: ast.dump(s) for s in program for name in _bound([s]) if isinstance(_value(s), _LATER)}
    names = _bound([s for s in program if not _is_guard(s)])
    kept = []
    for statement in _unguarded(body):
        if _imports_only(statement, names) or _RUNNER.match(ast.unparse(statement)):
            continue
        if again := _bound([statement]) & own.keys():
            if {ast.dump(statement)} != {own[name] for name in again}:
                raise Unusable("tests redefine the solution", ", ".join(sorted(again)))
        else:
            kept.append(statement)
    if program and not names & {name for s in kept for name in _loaded(s)}:
        raise Unusable("tests never use the solution", f"which defines {sorted(names)}")
    return kept


def _unguarded(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        yield from statement.body if _is_guard(statement) else [statement]


def _is_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and "__name__" in _loaded(statement.test)


def _imports_only(statement: ast.stmt, names: set[str]) -> bool:
    """Whether it imports the solution, from a module that the model made up, or else defines it."""
    if isinstance(statement, ast.Try):
        return all(_imports_only(inner, names) for inner in statement.body)
    if not isinstance(statement, ast.ImportFrom):
        return False
    if [alias.name for alias in statement.names] == ["*"]:
        return bool(statement.level) or importlib.util.find_spec(statement.module.split(".")[0]) is None
    return all(alias.name in names and not alias.asname for alias in statement.names)


def _bound(body: Iterable[ast.stmt]) -> set[str]:
    """The names that statements bind where they stand; those of imports apart."""
    nodes = [node for statement in body for node in _at_once(statement)]
    return ({node.name for node in nodes if isinstance(node, (*_FUNCTION, ast.ClassDef))}
            | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)})


def _at_once(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, (*_LATER, *_INNER)):
        for child in ast.iter_child_nodes(node):
            yield from _at_once(child)


def _value(statement: ast.stmt) -> ast.AST | None:
    """What a definition, or an assignment, binds."""
    return statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else statement


def _calls(body: Sequence[ast.stmt], functions: Mapping, checking: set[str]) -> Iterator[str]:
    """Call what checks and is not called yet."""
    reached = {name for s in body if not isinstance(s, _LATER) for name in _called(s)}
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            yield from (calls := list(_method_calls(statement, checking)))
            reached |= _called(statement) if calls else set()
    reached = _closure(reached, functions)
    for name in functions:
        callers = (functions[other] for other in checking - reached - {name})
        if name in checking - reached and not any(name in _called(caller) for caller in callers):
            yield _call(name, functions[name])
            reached = _closure(reached | {name}, functions)
    if left := checking - reached:
        raise Unusable("tests never called", f"{sorted(left)} call each other only")


def _call(name: str, function: ast.FunctionDef | ast.AsyncFunctionDef, *, given: int = 0) -> str:
    """The statement that runs a function of no arguments but the `given` ones."""
    needed = len(function.args.posonlyargs + function.args.args) - len(function.args.defaults) - given
    is_generator = any(isinstance(n, ast.Yield | ast.YieldFrom) for s in function.body for n in _runs(s))
    if needed > 0 or None in function.args.kw_defaults or is_generator:
        raise Unusable("tests never called", f"{name}({ast.unparse(function.args)})")
    return f"__import__('asyncio').run({name}())" if isinstance(function, ast.AsyncFunctionDef) else f"{name}()"


def _method_calls(cls: ast.ClassDef, checking: set[str]) -> Iterator[str]:
    """Call the test methods of a unittest or pytest class, one by one."""
    methods = [s for s in cls.body if isinstance(s, _FUNCTION)]
    tests = [method for method in methods if method.name.startswith("test")]
    if not tests or not any(_checks(s, checking) for method in methods for s in method.body):
        return
    is_unittest = any(ast.unparse(parent).endswith("TestCase") for parent in cls.bases)
    is_async = any(ast.unparse(parent).endswith("IsolatedAsyncioTestCase") for parent in cls.bases)
    for method in tests:
        if is_unittest and not is_async and isinstance(method, ast.AsyncFunctionDef):
            raise Unusable("tests never called", f"{cls.name}.{method.name} is async, its class is not")
        if skipped := [ast.unparse(d) for d in method.decorator_list if re.search(r"skip|expectedFailure|xfail",
                                                                                 ast.unparse(d))]:
            raise Unusable("tests never called", f"{cls.name}.{method.name}: {skipped[0]}")
    if not is_unittest and (cls.bases or any(m.name.lower().startswith("setup") for m in methods)):
        raise Unusable("tests never called", f"class {cls.name} needs a test runner")
    for method in tests:
        # `debug` is unittest's way to run a test and let its exception through, set-up and clean-up included.
        debug = f"__import__('unittest').TestSuite([{cls.name}({method.name!r})]).debug()"
        yield debug if is_unittest else _call(f"{cls.name}().{method.name}", method, given=1)


def _closure(names: set[str], functions: Mapping) -> set[str]:
    """The names, and all that the functions among them call."""
    while more := {name for f in names & functions.keys() for name in _called(functions[f])} - names:
        names = names | more
    return names


def _checking(functions: Mapping) -> set[str]:
    """The functions that check something when they are called, be it by calling another one."""
    found = set()
    while more := {name for name, function in functions.items()
                   if name not in found and any(_checks(s, found) for s in function.body)}:
        found |= more
    return found


def _checks(statement: ast.stmt, checking: set[str]) -> bool:
    """Whether running the statement can fail for what the program did."""
    return any(_is_check(node, checking) for node in _runs(statement))


def _is_check(node: ast.AST, checking: set[str]) -> bool:
    match node:
        case ast.Assert(test=ast.Constant(value=value)):
            return not value
        case ast.Assert(test=ast.Tuple(elts=elements)):  # (condition, message): never false
            return not elements
        case ast.Assert():
            return True
        case ast.Raise(exc=error):
            return error is not None and ast.unparse(error).startswith("AssertionError")
        case ast.Call(func=ast.Name(id=name)):
            return name in checking or name.startswith("assert_")
        case ast.Call(func=ast.Attribute(attr=name)):  # self.assertEqual, numpy.testing.assert_allclose, pytest.raises
            return name.startswith("assert") or name in ("raises", "fail")
    return False


def _runs(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what is run together with a statement and whose failure is not swallowed."""
    if isinstance(node, _LATER):
        return
    yield node
    is_swallowed = ((isinstance(node, ast.Try) and any(map(_swallows, node.handlers)))
                    or (isinstance(node, ast.With) and any("suppress(" in ast.unparse(item) for item in node.items)))
    swallowed = node.body if is_swallowed else ()
    for child in ast.iter_child_nodes(node):
        if child not in swallowed:
            yield from _runs(child)


def _swallows(handler: ast.ExceptHandler) -> bool:
    """Whether it catches a failed assertion and does not fail in its turn."""
    caught = {"Exception"} if handler.type is None else _loaded(handler.type)
    fails = any(isinstance(node, ast.Raise | ast.Assert) for s in handler.body for node in _runs(s))
    return not fails and bool(caught & {"AssertionError", "Exception", "BaseException"})


def _loaded(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def _called(node: ast.AST) -> set[str]:
    """The names that are called; a function that is only mentioned may never be."""
    return {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
