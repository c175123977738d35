"""Score answers on a dimension by static analysis: higher is better, whatever the dimension.

    static.judge("readability", [(instruction, answer), ...])   # [float | None], one an answer

It has the signature of every judge, so that an LLM behind an engine can take its place. None is no verdict: the
answer holds no program that parses, nothing that can be checked, or what a tool fails on. `annotate` writes the
scores into the records of which `synth.pairs` makes pairs.

Fair to length: a score is a share, or a density per statement, or (security, compliance: a hole is not diluted by
what stands around it) a sum over distinct kinds of finding. So an answer and the same answer twice over have the same
score, and to say more pays only up to a stated point. Statements are counted and not lines, because layout does not
change them. The exception is `complexity`: a long function has more branches, which is what it measures (rank
correlation with the number of statements -0.88, over 200 functions of the standard library), so look at the lengths
that `pairs` reports. Of radon only the cyclomatic complexity is used: its maintainability index falls with length by
definition, and its Halstead counts see operators alone. What no score here can see is whether a name or a comment
tells the truth, or whether the program does what was asked: hence pairs whose sides do the same in the tests.
"""

import ast
import re
from collections.abc import Callable, Iterator, Sequence

from radon.visitors import ComplexityVisitor

from align_jax.score import facts as facts_of
from align_jax.score.facts import FUNCTIONS, Facts

Judge = Callable[[str, Sequence[tuple[str, str]]], list[float | None]]  # dimension, [(instruction, answer)]

# Rules of ruff by what they speak of; a rule may count for two dimensions.
STYLE = ("E4", "E5", "E7", "E9", "W", "F", "I", "N", "UP", "B", "A", "C4", "PIE", "PLR5501", "RET", "SIM")
READABILITY = ("E501", "E70", "E74", "N", "A", "C90", "D10", "ERA", "F841", "PLR0911", "PLR0912", "PLR0915", "PLR2004",
               "SIM102", "SIM108", "RET505")
EFFICIENCY = ("PERF", "C4", "SIM110", "SIM118", "PLR1714")
WORDS = 5  # of explanation for a statement; more earns nothing
PLAIN_NAMES = frozenset("_ijkxyzn")  # one letter that a reader knows: indices, coordinates, counts


def judge(dimension: str, items: Sequence[tuple[str, str]]) -> list[float | None]:
    """Score (instruction, answer) pairs on a dimension with the scorer of DIMENSIONS_SCORERS."""
    if dimension not in DIMENSIONS_SCORERS:
        raise ValueError(f"dimension: got {dimension!r}, available are {sorted(DIMENSIONS_SCORERS)}")
    measured = facts_of.measure(items, tools=TOOLS.get(dimension, ()))
    return [facts and _score(DIMENSIONS_SCORERS[dimension], facts) for facts in measured]


def _score(scorer: Callable[[Facts], float | None], facts: Facts) -> float | None:
    try:
        return scorer(facts)
    except RecursionError:  # nested so deeply that no tool walks its tree
        return None


# --- the scorers: Facts -> float, higher is better


def readability(facts: Facts) -> float:
    """Minus what hinders a reader: findings per 10 statements + one-letter names per 10 names.

    Findings are of layout, names, undocumented public functions, magic numbers, dead code in comments, and branching.
    """
    names = _bound_names(facts.tree)
    short = {name for name in names if len(name) == 1} - PLAIN_NAMES
    return 0.0 - _density(facts, READABILITY) - 10 * len(short) / max(len(names), 1)


def style(facts: Facts) -> float:
    """Minus breaches per 10 statements of conventions and idioms: PEP 8, naming, likely bugs, outdated forms."""
    return 0.0 - _density(facts, STYLE)


def complexity(facts: Facts) -> float:
    """Minus the mean over statements of (cyclomatic complexity + loop nesting) of the function in which they stand,
    and minus findings of wasteful forms per 10 statements.

    The mean over statements, not functions: trivial functions beside a tangled one do not hide it.
    """
    units = [(_branches(unit) + _loop_depth(unit), facts_of.size(unit)) for unit in _units(facts.tree)]
    mean = sum(points * size for points, size in units) / max(sum(size for _, size in units), 1)
    return -mean - _density(facts, EFFICIENCY)


def explanation(facts: Facts) -> float:
    """0 to 100, the mean of three shares: words said of the WORDS that a statement wants, names of the program that
    the words mention, functions and classes with a docstring.

    The words are those of prose, docstrings and comments. A readability formula for prose (Flesch) is not used: it
    counts the syllables of identifiers.
    """
    said = re.findall(r"[^\W\d]\w*", "\n".join((facts.prose, facts.comments, *facts.docstrings)))
    names = {name for name in _bound_names(facts.tree) | {scope.name for scope in facts.scopes} if len(name) > 1}
    shares = [min(1.0, len(said) / (WORDS * facts.size))]
    shares += [len(names & set(said)) / len(names)] if names else []
    shares += [sum(bool(ast.get_docstring(s)) for s in facts.scopes) / len(facts.scopes)] if facts.scopes else []
    return 100 * sum(shares) / len(shares)


def security(facts: Facts) -> float | None:
    """Minus the sum over bandit's tests of the worst finding: severity (1, 3, 9) x confidence (1/3, 2/3, 1)."""
    found = facts.findings.get("bandit")
    return None if found is None else 0.0 - sum(found.values())


def compliance(facts: Facts) -> float:
    """Minus the number of kinds of breach: secrets in the source, licences that bind, personal data, logged secrets."""
    everything = "\n".join((facts.prose, ast.unparse(facts.tree), facts.comments, *facts.docstrings))
    breaches = set(facts.findings["detect_secrets"])
    breaches |= {name for name, pattern in BREACHES.items() if pattern.search(everything)}
    return 0.0 - len(breaches | ({"logged secret"} if _logs_secrets(facts.tree) else set()))


def instruction_following(facts: Facts) -> float | None:
    """0 to 100: the share of what the instruction demands in checkable words that the answer does; see DEMANDS."""
    met = [check(facts, *match.groups()) for pattern, check in DEMANDS for match in pattern.finditer(facts.instruction)]
    return 100 * sum(met) / len(met) if met else None


DIMENSIONS_SCORERS: dict[str, Callable[[Facts], float | None]] = {
    "instruction_following": instruction_following,
    "explanation": explanation,
    "complexity": complexity,
    "readability": readability,
    "style": style,
    "security": security,
    "compliance": compliance,
}
TOOLS = {"complexity": ("ruff",), "readability": ("ruff",), "style": ("ruff",), "security": ("bandit",),
         "compliance": ("detect_secrets",)}
# What a pair's sides should differ by, in each scorer's unit: a difference that a reviewer would see.
MARGINS = {"instruction_following": 10.0, "explanation": 15.0, "complexity": 1.0, "readability": 1.0, "style": 1.0,
           "security": 1.0, "compliance": 1.0}

BREACHES = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in {
    "copyleft licence": r"\b([AL]?GPL(v?[23])?|GNU (Affero |Lesser )?General Public Licen[cs]e|CC[- ]BY[- ](NC|SA))\b",
    "proprietary notice": r"all rights reserved|\bproprietary and confidential\b|\bconfidential and proprietary\b",
    "copyright of others": r"copyright\s*(\(c\)|©|\d{4})",
    "e-mail address": r"\b[\w.+-]+@(?!([\w-]+\.)*(example|test|domain|email)\b)([\w-]+\.)+(com|org|net|edu|io|de|uk)\b",
    "social security number": r"\b(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}\b",
}.items()}
SENSITIVE = re.compile(r"passw(or)?d|secret|api_?key|private_?key|access_?token|credit_?card|ssn\b", re.IGNORECASE)
OUTPUTS = frozenset({"print", "debug", "info", "warning", "error", "exception", "critical", "log"})


# --- what is read from the tree


def _density(facts: Facts, prefixes: tuple[str, ...]) -> float:
    """ruff's findings under these prefixes, per 10 statements."""
    found = sum(count for rule, count in facts.findings["ruff"].items() if rule and rule.startswith(prefixes))
    return 10 * found / facts.size


def _bound_names(tree: ast.AST) -> set[str]:
    """The names that a program gives: arguments and variables."""
    nodes = list(ast.walk(tree))
    return {n.arg for n in nodes if isinstance(n, ast.arg) and n.arg not in ("self", "cls")} | {
        n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _used_names(tree: ast.AST) -> set[str]:
    nodes = list(ast.walk(tree))
    return ({n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}
            | {part for n in nodes if isinstance(n, ast.alias) for part in n.name.split(".")}
            | {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module})


def _units(tree: ast.Module) -> Iterator[ast.AST]:
    """The functions and methods that stand in no other, and one module of all the other statements."""
    rest, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, FUNCTIONS):
            yield node
        elif isinstance(node, ast.ClassDef):
            todo += node.body
        else:
            rest.append(node)
    yield ast.Module(body=rest, type_ignores=[])


def _branches(unit: ast.AST) -> int:
    """The cyclomatic complexity of a function, its inner ones included, or of loose statements."""
    visitor = ComplexityVisitor.from_ast(unit)
    return visitor.functions[0].complexity if isinstance(unit, FUNCTIONS) else visitor.complexity


def _loop_depth(node: ast.AST) -> int:
    """How many loops and comprehensions stand inside each other at the deepest place."""
    here = len(getattr(node, "generators", ())) or isinstance(node, (ast.For, ast.AsyncFor, ast.While))
    return int(here) + max((_loop_depth(child) for child in ast.iter_child_nodes(node)), default=0)


def _logs_secrets(tree: ast.AST) -> bool:
    """Is a variable with the name of a secret printed or logged?"""
    calls = (n for n in ast.walk(tree) if isinstance(n, ast.Call)
             and getattr(n.func, "id", getattr(n.func, "attr", "")) in OUTPUTS)
    shown = (_used_names(argument) for call in calls for argument in call.args)
    return any(SENSITIVE.search(name) for names in shown for name in names)


def _defines(facts: Facts, name: str) -> bool:
    return name in {scope.name for scope in facts.scopes}


def _is_annotated(facts: Facts) -> bool:
    functions = [scope for scope in facts.scopes if isinstance(scope, FUNCTIONS)]
    arguments = [a for f in functions for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)
                 if a.arg not in ("self", "cls")]
    return bool(functions) and all(a.annotation for a in arguments) and all(
        f.returns or f.name == "__init__" for f in functions)


def _uses(facts: Facts, name: str) -> bool:
    kinds = CONSTRUCTS.get(name.lower().rstrip("s"))
    return any(isinstance(n, kinds) for n in ast.walk(facts.tree)) if kinds else name in _used_names(facts.tree)


CONSTRUCTS = {"loop": (ast.For, ast.While, ast.AsyncFor), "lambda": ast.Lambda, "generator": (ast.Yield, ast.YieldFrom),
              "comprehension": (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp), "clas": ast.ClassDef}
# What an instruction can demand -> does the answer do it?  Groups of the pattern are the check's arguments.
DEMANDS = [(re.compile(pattern, re.IGNORECASE), check) for pattern, check in (
    (r"\b(?:function|method|class)\s+(?:(?:called|named)\s+[`'\"]?|[`'\"])(?:def |class )?(\w+)", _defines),
    (r"^\s*(?:async )?(?:def|class)\s+(\w+)", _defines),
    (r"\braises?\s+(?:an?\s+)?`?(\w+(?:Error|Exception))", _uses),
    (r"\b(?:without|not|n't|never|avoid)\s+(?:us(?:e|ing)\s+)(?:the\s+|an?\s+|any\s+)?(?:built-?in\s+)?[`'\"]?(\w+)",
     lambda facts, name: not _uses(facts, name)),
    (r"(?<!not )(?<!n't )(?<!without )(?<!avoid )(?<!never )\bus(?:e|ing)\s+(?:the\s+)?`(\w+)", _uses),
    (r"\btype (?:hint|annotation)s?\b", _is_annotated),
    (r"\bdocstrings?\b", lambda facts: all(ast.get_docstring(scope) for scope in facts.scopes)),
    (r"\bexplain\b|\bexplanation\b", lambda facts: bool(facts.prose.strip())),
)]
