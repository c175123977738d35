"""From a Python file to seeds, and why most functions are none: pure steps, Seed -> Seed or the reason to drop it.

The steps of SelfCodeAlign's seed gathering (SCA@045354e seed_gathering/, reference: arXiv:2410.24198 App. B), told from
the syntax tree and the tokens instead of from substrings. On purpose different from it:
- words are words (`debug` has no bug) in comments, docstring and names, and not in other strings;
- a module is banned when it is imported, under any spelling (`import oslo` and `from osgeo import x` are fine);
- a value is returned by the function itself, not by one defined within it, and `return None` returns none;
- missing imports come from the file that the function stood in, which knows, then from a table of what everybody
  calls the same; the library of the original, autoimport, asks which installed module has the name, so that a
  global called `code` imports the standard library's `code` (and it is GPL);
- decorators are kept; a name that stays undefined, often a helper of the same file, drops the function, as
  Pyright would, without Pyright.
"""

import ast
import functools
import importlib
import io
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator, Sequence

from pyflakes import checker, messages

from align_jax import records
from align_jax.records import Seed

Step = Callable[[Seed], Seed | str]
Function = ast.FunctionDef | ast.AsyncFunctionDef

# What a snippet means by a name that it does not import.
CONVENTIONS = {
    **{name: f"import {module} as {name}" for name, module in {
        "np": "numpy", "pd": "pandas", "plt": "matplotlib.pyplot", "sns": "seaborn", "tf": "tensorflow"}.items()},
    **{name: f"from {module} import {name}" for module, names in {
        "typing": "Any Callable Dict Iterable Iterator List Mapping Optional Sequence Set Tuple TypeVar Union",
        "collections": "Counter OrderedDict defaultdict deque namedtuple", "dataclasses": "dataclass",
        "decimal": "Decimal", "fractions": "Fraction", "functools": "reduce wraps", "math": "sqrt",
        "pathlib": "Path"}.items() for name in names.split()},
}
# These mean themselves, if they have the attributes that are asked of them: `string.ascii_letters`, not `string.strip`.
MODULES = ("base64", "bisect", "collections", "copy", "csv", "datetime", "decimal", "fractions", "functools", "hashlib",
           "heapq", "io", "itertools", "json", "math", "operator", "random", "re", "statistics", "string", "struct",
           "textwrap", "time", "typing", "unicodedata")


def extract(where: str, text: str | bytes) -> list[Seed] | str:
    """Take the top-level functions of a Python file, each with those of the file's imports that it uses."""
    try:
        text = _decode(text)
        tree = parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "not Python"
    lines, imports, seeds = text.split("\n"), _imports(tree), []
    for node in tree.body:
        if isinstance(node, Function):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            code = "\n".join(lines[first - 1:node.end_lineno]) + "\n"
            used = [line for name in sorted(undefined(code) or ()) for line in imports.get(name, ())]
            seeds.append(named(_with_imports(used, code), f"{where}:{first}"))
    return seeds


def named(code: str, source: str) -> Seed:
    """Make a seed; its id is its content's, the same wherever it stood and however it was laid out."""
    return Seed(id=records.fingerprint(code.split()), code=code, source=source)


def steps(*, max_lines: int, banned_words: Sequence[str], banned_imports: Sequence[str]) -> list[Step]:
    """List the filters in their order."""
    return [documented, returns, takes_arguments, functools.partial(is_short, max_lines=max_lines),
            functools.partial(has_no_word, words=frozenset(banned_words)), complete,
            functools.partial(imports_none, modules=frozenset(banned_imports))]


def sift(seed: Seed, steps: Sequence[Step]) -> Seed | str:
    """Take a seed through the steps, to the first reason to drop it."""
    for step in steps:
        seed = step(seed)
        if isinstance(seed, str):
            break
    return seed


def documented(seed: Seed) -> Seed | str:
    """Keep what has a docstring with a word in it."""
    return seed if re.search(r"\w", _docstring(seed)) else "no docstring"


def returns(seed: Seed) -> Seed | str:
    """Keep what returns a value itself."""
    found = (node.value for node in _own(_function(seed)) if isinstance(node, ast.Return))
    is_value = (value is not None and not (isinstance(value, ast.Constant) and value.value is None) for value in found)
    return seed if any(is_value) else "no value returned"


def takes_arguments(seed: Seed) -> Seed | str:
    """Keep what has at least one parameter, of any kind."""
    of = _function(seed).args
    return seed if of.posonlyargs or of.args or of.vararg or of.kwonlyargs or of.kwarg else "no arguments"


def is_short(seed: Seed, *, max_lines: int) -> Seed | str:
    """Keep what has at most `max_lines` lines, its imports included."""
    return seed if seed.code.count("\n") <= max_lines else "too long"


def has_no_word(seed: Seed, *, words: frozenset[str]) -> Seed | str:
    """Keep what has none of these words in its comments, docstring and names, nor as a part of a name."""
    try:
        comments = [token.string for token in tokenize.generate_tokens(io.StringIO(seed.code).readline)
                    if token.type == tokenize.COMMENT]
    except (tokenize.TokenError, SyntaxError):
        return "no tokens"
    text = " ".join([*comments, _docstring(seed), *_names(parse(seed.code))])
    return "banned word" if words & _words(text) else seed


def complete(seed: Seed) -> Seed | str:
    """Keep what defines every name it uses, once the imports that anybody would guess are added."""
    missing = undefined(seed.code)
    if missing is None:
        return "nested too deep"
    guesses = [_guess(name, parse(seed.code)) for name in sorted(missing)]
    if not all(guesses):
        return "undefined name"
    return named(_with_imports(guesses, seed.code), seed.source) if guesses else seed


def imports_none(seed: Seed, *, modules: frozenset[str]) -> Seed | str:
    """Keep what imports none of these packages, nor anything in them, under whatever name."""
    return "banned import" if modules & set(_imported(parse(seed.code))) else seed


@functools.lru_cache(maxsize=4)  # one seed goes through all steps before the next
def parse(code: str) -> ast.Module:
    """Parse without the warnings that old code gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


@functools.lru_cache(maxsize=4)
def undefined(code: str) -> frozenset[str] | None:
    """Return the names that a program uses and nothing defines, as pyflakes scopes them; None if it is too deep."""
    try:
        found = checker.Checker(parse(code)).messages
    except RecursionError:
        return None
    return frozenset(m.message_args[0] for m in found if isinstance(m, messages.UndefinedName))


def _decode(text: str | bytes) -> str:
    if isinstance(text, bytes):
        encoding, _ = tokenize.detect_encoding(io.BytesIO(text).readline)
        text = text.decode(encoding)
    # What the parser counts as lines: str.splitlines would also cut at form feeds.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _function(seed: Seed) -> Function:
    return parse(seed.code).body[-1]  # behind its imports


def _docstring(seed: Seed) -> str:
    return ast.get_docstring(_function(seed)) or ""


def _own(root: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope, without those of the scopes within it."""
    left = [root]
    while left:
        for node in ast.iter_child_nodes(left.pop()):
            if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
                left.append(node)
                yield node


def _imports(tree: ast.Module) -> dict[str, list[str]]:
    """The import statements of a file by the name that they bind; relative and star imports mean nothing elsewhere."""
    found = {}
    for node in sorted((n for n in _own(tree) if isinstance(n, ast.Import | ast.ImportFrom)), key=lambda n: n.lineno):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__"):
            continue
        for alias in node.names:
            before = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
            after = f" as {alias.asname}" if alias.asname else ""
            is_path = not before and not after
            lines = found.setdefault(alias.asname or (alias.name.split(".")[0] if is_path else alias.name), [])
            if not lines or is_path:  # `import xml.dom, xml.sax` adds up; else what comes later is a fallback
                lines.append(f"{before}import {alias.name}{after}")
    found.pop("*", None)
    return found


def _with_imports(lines: Sequence[str], code: str) -> str:
    gap = "" if code.startswith(("import ", "from ")) else "\n\n"
    return "".join(f"{line}\n" for line in dict.fromkeys(lines)) + gap * bool(lines) + code


def _imported(tree: ast.AST) -> Iterator[str]:
    """The packages that are imported anywhere, also by name: importlib.import_module("os")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("__import__", "import_module"):
                yield str(node.args[0].value).split(".")[0]


def _guess(name: str, tree: ast.Module) -> str | None:
    """The import that a name without one stands for, if there is one answer."""
    if name not in MODULES:
        return CONVENTIONS.get(name)
    nodes = list(ast.walk(tree))
    asked = [n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", None) == name]
    uses = [n for n in nodes if isinstance(n, ast.Name) and n.id == name]
    module = importlib.import_module(name)
    return f"import {name}" if len(asked) == len(uses) and all(hasattr(module, a) for a in asked) else None


def _names(tree: ast.AST) -> Iterator[str]:
    """Every identifier: names, attributes, arguments, keywords, imports."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant):
            for _, value in ast.iter_fields(node):
                yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str))


def _words(text: str) -> set[str]:
    """The words of a text, and those that names are put together from: fix_bug, FixBug."""
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)
    return {part.lower() for part in parts} | set(re.findall(r"[a-z]+", text.lower()))
