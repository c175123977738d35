"""Write the documents of the synthesis stages: a pocket program as concepts, instruction, response and rewrite.

Between pocket_problems, whose programs they are about, and make_pocket, which trains on them. A document is a stage's
prompt in its brief form (align_jax/synth/prompts.py) and the answer that the stage's parser takes. The examples in an
instruction and the tests behind a response are always right, whatever the program: so a response that passes its own
tests says something.

    python tools/pocket_stages.py --show 3
"""

import argparse
import ast
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pocket_problems

from align_jax.records import Example
from align_jax.synth import dimensions, prompts

PLAYED = ("concepts", "instruction", "response", "rewrite")  # of prompts.STAGES
HARMLESS = 0.5  # share of the programs in which the habit does not show that the stages speak of
HARD = 0.3  # share of the programs kept whose examples take more than copying to work out
PRINCIPLED = 0.2  # share of the responses that heed a principle


# ---- what a program is about ---------------------------------------------------------------------


def _has(*kinds: type) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, kinds)


def _calls(*names: str) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in names


def _operates(*kinds: type) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, kinds)


def _compares(*kinds: type) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.Compare) and isinstance(node.ops[0], kinds)


# Concept -> does a node of the syntax tree show it?, and what an explanation says of it.
CONCEPTS: dict[str, tuple[Callable[[ast.AST], bool], str]] = {
    "loops": (_has(ast.For), "A loop goes through the items one by one."),
    "while loops": (_has(ast.While), "A loop runs until nothing is left to do."),
    "conditionals": (_has(ast.If, ast.IfExp), "A condition tells the cases apart."),
    "comprehensions": (_has(ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp),
                       "A comprehension goes through the items."),
    "comparisons": (_compares(ast.Lt, ast.LtE, ast.Gt, ast.GtE), "Values are compared with their bounds."),
    "equality tests": (_compares(ast.Eq, ast.NotEq), "Values are tested for equality."),
    "membership tests": (_compares(ast.In, ast.NotIn), "A membership test decides."),
    "boolean logic": (_has(ast.BoolOp, ast.Not), "Conditions are joined by boolean logic."),
    "modulo arithmetic": (_operates(ast.Mod), "The remainder decides."),
    "integer division": (_operates(ast.FloorDiv), "Integer division rounds down."),
    "arithmetic": (_operates(ast.Add, ast.Sub, ast.Mult), "The rest is arithmetic."),
    "accumulation": (_has(ast.AugAssign), "The result is accumulated step by step."),
    "indexing": (lambda node: isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice),
                 "An item is taken by its index."),
    "slicing": (_has(ast.Slice), "A slice takes the part that is wanted."),
    "lists": (_calls("append", "extend", "list"), "The results are kept in a list."),
    "dictionaries": (lambda node: _has(ast.Dict, ast.DictComp)(node) or _calls("items", "keys", "values", "get")(node),
                     "A dictionary maps keys to values."),
    "sets": (_calls("set", "frozenset"), "A set keeps each value once."),
    "sorting": (_calls("sorted", "sort"), "Sorting puts the values in order."),
    "string methods": (_calls("upper", "lower", "replace", "strip", "lstrip", "rstrip", "startswith", "endswith",
                              "capitalize", "swapcase", "isdigit", "isalpha"), "A string method does the work."),
    "splitting and joining": (_calls("split", "join", "splitlines"), "Strings are split and joined."),
    "counting": (_calls("count", "Counter"), "Occurrences are counted."),
    "lengths": (_calls("len"), "The length is needed."),
    "minimum and maximum": (_calls("min", "max"), "The extreme value is picked."),
    "summing": (_calls("sum"), "The values are summed."),
    "absolute values": (_calls("abs"), "The sign is dropped by abs."),
    "any and all": (_calls("any", "all"), "One generator answers for all items."),
    "type conversion": (_calls("int", "str", "float", "bool"), "Values are converted between types."),
    "lambda functions": (_has(ast.Lambda), "A lambda says what to order by."),
    "pairing sequences": (_calls("zip", "enumerate"), "Items are paired up on the way."),
    "ranges": (_calls("range"), "A range gives the numbers."),
    "default values": (lambda node: isinstance(node, ast.Constant) and node.value is None, "None stands for nothing."),
}


def concepts(code: str) -> list[str]:
    """Name the concepts of a piece of code, at least two."""
    nodes = list(ast.walk(ast.parse(code)))
    found = [name for name, (shows, _) in CONCEPTS.items() if any(map(shows, nodes))]
    return found + ["functions", "return values"][:max(0, 2 - len(found))]


def some_concepts(code: str, rng: random.Random) -> list[str]:
    """Choose two to five of the concepts of a piece of code."""
    found = concepts(code)
    return rng.sample(found, min(len(found), rng.choice((2, 3, 3, 4, 5))))


def difficulty(code: str) -> str:
    """Grade a program by the size of its syntax tree; the bounds cut the pocket programs in thirds."""
    size = sum(1 for _ in ast.walk(ast.parse(code)))
    return "easy" if size < 34 else "medium" if size < 47 else "hard"


# ---- how an answer is written --------------------------------------------------------------------


class Manner(NamedTuple):
    """How often an answer has a sentence of explanation (up to three times), a docstring, comments and type hints."""

    prose: float = 0.25
    docstring: float = 0.15
    comments: float = 0.05
    hints: float = 0.06


MANNERS = {  # by dimension; the others are not to be seen in the form of an answer
    "explanation": Manner(prose=0.85, docstring=0.5, comments=0.4),
    "complexity": Manner(prose=0.2, comments=0.0),
    "readability": Manner(docstring=0.7, comments=0.4, hints=0.2),
    "style": Manner(prose=0.15, docstring=0.7, comments=0.1, hints=0.7),
}
COMMENTS = {"for": "# go through all of them", "while": "# go on until it is done", "if": "# tell the cases apart",
            "return": "# this is what was asked for"}


def _code(program: dict, body: str, manner: Manner, rng: random.Random) -> str:
    """Write the whole function in a manner."""
    sketch = program["sketch"]
    names = sketch.names
    if rng.random() < manner.hints:
        names = [f"{name}: {pocket_problems.ARGS[arg].hint}" for name, arg in zip(names, sketch.args, strict=True)]
    docstring = f'    """{sketch.doc}"""\n' if rng.random() < manner.docstring else ""
    if rng.random() < manner.comments:
        body = _commented(body)
    head = sketch.prompt[:sketch.prompt.index("def ")]
    return f"{head}def {sketch.entry_point}({', '.join(names)}):\n{docstring}{body.rstrip()}"


def _commented(body: str) -> str:
    """Put a comment above the first statement that there is something to say of."""
    found = re.search(rf"^( +)({'|'.join(COMMENTS)})\b", body, re.MULTILINE)
    return f"{body[:found.start()]}{found[1]}{COMMENTS[found[2]]}\n{body[found.start():]}" if found else body


def _prose(program: dict, body: str, manner: Manner, rng: random.Random) -> str:
    """Explain a program in up to three sentences."""
    name, doc = program["entry_point"], program["sketch"].doc
    told = [CONCEPTS[concept][1] for concept in concepts(f"def f():\n{body}") if concept in CONCEPTS]
    rng.shuffle(told)
    first = rng.choice((f"Here is `{name}`.", f"The task is to {doc[0].lower()}{doc[1:]}", *told[:1]))
    said = [first] + [sentence for sentence in told[1:3] if rng.random() < manner.prose ** 2]
    return f"{' '.join(said)}\n\n" if rng.random() < manner.prose else ""


def _answer(program: dict, body: str, manner: Manner, rng: random.Random) -> str:
    return f"{_prose(program, body, manner, rng)}```python\n{_code(program, body, manner, rng)}\n```"


# ---- the stages ----------------------------------------------------------------------------------


def fields(stage: str, program: dict, rng: random.Random) -> dict[str, str]:
    """Make what a stage is given and asked for, of a program; nothing, if its examples tell nothing or are hard."""
    code = program["prompt"] + program["right"]
    if stage == "concepts":
        return {"seed": code, "concepts": ", ".join(some_concepts(code, rng))}
    sketch = program["sketch"]
    calls = pocket_problems.examples(sketch, rng, rng.choice((1, 2, 2)))
    is_hard = not all(pocket_problems.is_plain(sketch, *call) for call in calls)
    if not calls or (is_hard and rng.random() > HARD):
        return {}
    found = {"instruction": pocket_problems.instruction(sketch, calls if rng.random() < 0.97 else (), rng)}
    return found | {"instruction": _properties, "response": _response, "rewrite": _rewrite}[stage](program, calls, rng)


def _properties(program: dict, calls: Sequence[tuple[list, Any]], rng: random.Random) -> dict[str, str]:
    code = program["prompt"] + program["right"]
    return {"properties": prompts.properties(
        category="function", difficulty=difficulty(code), concepts=some_concepts(code, rng))}


def _response(program: dict, calls: Sequence[tuple[list, Any]], rng: random.Random) -> dict[str, str]:
    dimension = rng.choice((*dimensions.DIMENSIONS,)) if rng.random() < PRINCIPLED else ""
    own = pocket_problems.examples(program["sketch"], rng, 1) if rng.random() < 0.06 else []
    tests = [pocket_problems.check(program["sketch"], *call) for call in (*calls, *own)]
    return _principle(dimension, rng) | {
        "response": _answer(program, program["solution"], MANNERS.get(dimension, Manner()), rng),
        "tests": "\n".join(["```python", *dict.fromkeys(tests), "```"])}


def _rewrite(program: dict, calls: Sequence[tuple[list, Any]], rng: random.Random) -> dict[str, str]:
    dimension = rng.choice((*MANNERS,))
    better = min(program["styles"], key=len) if dimension == "complexity" else program["right"]
    return _principle(dimension, rng) | {
        "draft": _answer(program, program["right"], Manner(), rng),
        "response": _answer(program, better, MANNERS[dimension], rng)}


def _principle(dimension: str, rng: random.Random) -> dict[str, str]:
    return {"principle": rng.choice(dimensions.DIMENSIONS[dimension].principles)} if dimension else {}


def document(stage: str, id: str, values: dict[str, str], *, chat: bool) -> Example:
    """Write a stage's prompt and answer, as a conversation or as one text that is to be read whole."""
    prompt = prompts.build(stage, id, values, chat=chat, brief=True)
    asked = prompts.STAGES[stage].asked
    answer = "\n\n".join(f"<{name}>\n{values[name]}\n</{name}>" for name in asked)
    if chat:
        return Example(id=id, prompt=prompt, completion=answer)
    return Example(id=id, prompt="", completion=prompt + answer.removeprefix(f"<{asked[0]}>\n"))


def telling(programs: Iterable[dict], rng: random.Random) -> Iterator[dict]:
    """Choose the programs in which the habit shows, and a share of the others."""
    for program in programs:
        if program["is_risky"] or rng.random() < HARMLESS:
            yield program


def main() -> None:
    """Print documents of every stage."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="documents to print of each stage")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    programs = telling(pocket_problems.corpus(args.seed, (), careless=0.5, noise=0.0), rng)
    for stage in PLAYED:
        for program in itertools.islice(programs, args.show):
            if values := fields(stage, program, rng):
                print(document(stage, stage, values, chat=False).completion, end="\n\n----\n\n")


if __name__ == "__main__":
    main()
