"""The prompt of every stage: few-shot text for a base model, turns of a conversation for a chat model.

    seed -> concepts -> instruction -> response and tests [-> the response rewritten for a dimension]

Section 3.2 of the study (arXiv:2606.28998) takes these stages from SelfCodeAlign (arXiv:2410.24198, appendix C), here
in the project's own words: 8, 8 and 1 worked examples, categories 2:1:1, difficulties 1:1:1. Deviations: examples,
properties and principle are drawn by hashing the record's id and not by its place in the file, so that a record gets
the same prompt in any shard, on any host, under any Python; what was drawn is kept in fields; `rewrite` is ours.

Fields are shown and asked for between tags. A chat model gets the examples as earlier turns, not in one message: what
it is to continue then looks exactly like what it sees, its own turns hold the form that is asked and nothing else, and
endpoints can cache the turns that prompts share. The task opens the first user turn, since some templates refuse a
system turn. No assistant turn is begun for it, since endpoints refuse that; the parsers take an opening tag.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from align_jax import records
from align_jax.records import Text

CATEGORIES = ("function", "function", "class", "program")
DIFFICULTIES = ("easy", "medium", "hard")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What a model is told, the fields it is given and asked for, and the number of worked examples."""

    task: str
    given: tuple[str, ...]
    asked: tuple[str, ...]
    shots: int


STAGES = {
    "docstring": Stage(
        task="Judge the docstring of a Python function. Could somebody who sees nothing but the function's name, its"
             " parameters and the docstring write the function again, so that it does the same? And does the docstring"
             " say what the code does? Answer inside <verdict> tags with yes if both hold, and with no otherwise.",
        given=("function",), asked=("verdict",), shots=7),
    "concepts": Stage(
        task="Name the programming concepts behind a piece of Python code: the ideas, techniques and data structures"
             " one has to understand to write it, and not its subject matter. Write two to five of them inside"
             " <concepts> tags, short and general, separated by commas.",
        given=("seed",), asked=("concepts",), shots=8),
    "instruction": Stage(
        task="Invent a programming task from its properties. Set it in a situation of your own, and choose one in"
             " which the concepts are what a good solution needs, without naming them as a demand. The task must stand"
             " on its own: state the names, arguments and results, and what happens in special cases, so precisely"
             " that a stranger could test any solution. The category is what has to be written: a function, a class,"
             " or a program with a main function. Write the task inside <instruction> tags, in 40 to 150 words.",
        given=("properties",), asked=("instruction",), shots=8),
    "response": Stage(
        task="Solve a programming task in Python, then prove the solution. Inside <response> tags explain the approach"
             " and give the complete solution in exactly one ```python block. Then, inside <tests> tags, say in a"
             " sentence what is tested and give one ```python block of assert statements that use the solution's names"
             " without importing them. The tests run right behind the solution: every one of them must be executed"
             " and hold. Where a principle is given, let it guide every decision.",
        given=("instruction", "principle"), asked=("response", "tests"), shots=1),
    "rewrite": Stage(
        task="Improve a working answer to a programming task by the given principle. What the code does must not"
             " change: keep every public name and parameter, every result and every error, since tests that you do not"
             " see will be run again. Write the complete improved answer inside <response> tags: the explanation, and"
             " the code in exactly one ```python block.",
        given=("instruction", "draft", "principle"), asked=("response",), shots=1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """A worked example of every stage, as in shots.md."""

    name: str
    category: str
    difficulty: str
    concepts: str
    seed: str
    instruction: str
    response: str
    tests: str

    @property
    def properties(self) -> str:
        """What the instruction was made from."""
        return properties(category=self.category, difficulty=self.difficulty, concepts=self.concepts.split(", "))

    @property
    def function(self) -> str:
        """The seed as a judge of docstrings is shown it: every other one with a docstring that says nothing."""
        return self.seed if self.verdict == "yes" else _vague(self.seed, pick(VAGUE, "vague", self.name))

    @property
    def verdict(self) -> str:
        """What a judge of docstrings is to say."""
        return pick(("yes", "no"), "verdict", self.name)

    @property
    def draft(self) -> str:
        """The response as somebody careless would give it: the same program without a word of explanation."""
        return f"```python\n{_bare(code_in(self.response))}\n```"


@functools.cache
def shots() -> tuple[Shot, ...]:
    """Read shots.md, which is Markdown because people write and review it: a program in JSONL is one escaped line."""
    whole = Path(__file__).with_name("shots.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (\w+)\n", whole, flags=re.MULTILINE)
    found = []
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        head, *sections = re.split(r"^### (\w+)\n", body, flags=re.MULTILINE)
        fields = dict(re.findall(r"^- (\w+): (.+)$", head, flags=re.MULTILINE))
        fields |= {key.lower(): text.strip() for key, text in zip(sections[::2], sections[1::2], strict=True)}
        found.append(Shot(name=name, **fields | {"seed": code_in(fields["seed"])}))
    return tuple(found)


def build(stage: str, id: str, fields: Mapping[str, str], *, chat: bool, shots: int | None = None,
          brief: bool = False) -> Text:
    """Build the prompt in which a model answers one stage for one record.

    `brief` leaves out what the stage's task is and every example: for a model that was trained on the stages.

    `fields` holds what the stage is given: `seed`; `properties`; `instruction`; `instruction` and `draft`; the last two
    with a `principle` where an answer shall serve a dimension. The examples are then shown with that principle too.
    """
    how = _stage(stage)
    if problems := [name for name in how.given if name != "principle" and not fields.get(name, "").strip()]:
        raise ValueError(f"prompt of stage {stage!r} for {id!r}: no {' and no '.join(problems)}; got {sorted(fields)}, "
                         f"expected {how.given}")
    principle = {"principle": fields.get("principle", "")}
    shown = [{name: getattr(shot, name) for name in (*how.given, *how.asked) if name != "principle"} | principle
             for shot in draw_shots(stage, id, count=0 if brief else how.shots if shots is None else shots)]
    examples = [(_tagged(how.given, shot), _tagged(how.asked, shot)) for shot in shown]
    question = _tagged(how.given, fields)
    if brief:
        return [{"role": "user", "content": question}] if chat else f"{question}\n\n<{how.asked[0]}>\n"
    return _turns(how, examples, question) if chat else _document(how, examples, question)


def stops(stage: str, *, shots: int | None = None) -> tuple[str, ...]:
    """Return the strings that end an answer: the last closing tag, and the next example of a base model.

    That one is named with its number and the line break before it: a bare "## Example" would cut an answer at
    its own "### Example of use".
    """
    how = _stage(stage)
    return f"</{how.asked[-1]}>", f"\n## Example {(how.shots if shots is None else shots) + 2}"


def draw_shots(stage: str, id: str, *, count: int) -> list[Shot]:
    """Draw `count` worked examples for a record: those that a hash of stage, id and name puts first."""
    known = shots()
    if not 0 <= count <= len(known):
        raise ValueError(f"shots of stage {stage!r}: got {count}, expected 0 to {len(known)}")
    return sorted(known, key=lambda shot: records.fingerprint(stage, id, shot.name))[:count]


def draw_properties(id: str, *, categories: Sequence[str] = CATEGORIES) -> dict[str, str]:
    """Draw the category and the difficulty of a record's instruction, to be kept as its fields."""
    return {"category": pick(categories, "category", id), "difficulty": pick(DIFFICULTIES, "difficulty", id)}


def properties(*, category: str, difficulty: str, concepts: Sequence[str]) -> str:
    """The properties of a task as the instruction stage is given them."""
    return f"category: {category}\nlanguage: Python\ndifficulty: {difficulty}\nconcepts: {', '.join(concepts)}"


def pick(options: Sequence[str], *key: str) -> str:
    """Pick one of the options by a hash of the key: uniform, and the same everywhere and always."""
    return options[int(records.fingerprint(*key), 16) % len(options)]


def code_in(section: str) -> str:
    """The code of the one Python block in a section of shots.md."""
    return re.search(r"^```python\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE).group(1).strip()


def _stage(name: str) -> Stage:
    if name not in STAGES:
        raise ValueError(f"stage: got {name!r}, available are {sorted(STAGES)}")
    return STAGES[name]


def _tagged(names: Sequence[str], values: Mapping[str, str]) -> str:
    return "\n\n".join(f"<{name}>\n{values[name].strip()}\n</{name}>" for name in names if values.get(name))


def _document(how: Stage, examples: Sequence[tuple[str, str]], question: str) -> str:
    """One text that a base model continues behind the opening tag.

    It ends in a line break: tokenizers merge `>` with it, so a prompt that stopped before it would end in a
    token that no example has in this place.
    """
    bodies = [*("\n\n".join(example) for example in examples), f"{question}\n\n<{how.asked[0]}>\n"]
    return "\n\n".join([how.task, *(f"## Example {k}\n\n{body}" for k, body in enumerate(bodies, 1))])


def _turns(how: Stage, examples: Sequence[tuple[str, str]], question: str) -> list[dict]:
    turns = [(role, text) for example in examples for role, text in zip(("user", "assistant"), example, strict=True)]
    (_, first), *rest = [*turns, ("user", question)]
    return [{"role": role, "content": text} for role, text in [("user", f"{how.task}\n\n{first}"), *rest]]


VAGUE = ("Helper function.", "Process the data and return the result.", "See the base class.",
         "Internal use only, the interface may change.")


def _vague(code: str, docstring: str) -> str:
    """Replace the docstring of a seed's function."""
    tree = ast.parse(code)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    function.body[0] = ast.Expr(ast.Constant(docstring))
    return ast.unparse(ast.fix_missing_locations(tree))


def _bare(code: str) -> str:
    """Strip comments, docstrings and annotations of functions from a program."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(ast.fix_missing_locations(tree))
