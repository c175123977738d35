"""What a model wrote, parsed: concepts, an instruction, or a response with its tests.

Models leave the form that was asked (SelfCodeAlign has a second splitter for Llama-3), so every parser takes what is
meant beyond doubt: a tag that was repeated or forgotten, a heading or a sentence in place of a tag, a last fence left
open. What stays in doubt raises `text.Unusable`, whose reason the caller counts. A program that is wrong is no reason:
it becomes an answer, runs, and is labelled as failing.
"""

import ast
import contextlib
import dataclasses
import io
import itertools
import re
import tokenize
from collections.abc import Iterator, Sequence

from align_jax.synth import checks
from align_jax.text import Unusable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """A response as a pair shows it, without its tests, and what `sandbox.run` takes: its program and the tests."""

    response: str
    program: str
    tests: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language in lower case, its code, and where it stands, fences included."""

    language: str
    code: str
    start: int
    end: int

    @property
    def is_python(self) -> bool:
        """Whether it says that it is Python; a fence that says nothing may be output or a shell."""
        return self.language in ("python", "py", "python3")


_LABEL = re.compile(r"^\W*(?:(?:key|main|core|programming|coding|the|your|new|task) )*"
                    r"(?:concepts?|instructions?|tasks?|problem)(?: \d+)?\W*?[:\n][\s*_]*", re.IGNORECASE)
_NEXT = re.compile(r"^## Example \d", re.MULTILINE)  # a base model goes on with an example of its own


def verdict(written: str) -> bool | None:
    """Parse a yes or a no; None if it is neither."""
    said = re.match(r"\W*(?:<verdict>)?\W*(yes|no)\b", written, re.IGNORECASE)
    return said and said[1].lower() == "yes"


def concepts(written: str, *, finish: str = "stop") -> list[str]:
    """Parse a list of concepts: commas, lines, bullets or numbers; each once, at most 8 words, no explanations."""
    listed = _LABEL.sub("", _field(written, "concepts", finish))
    found = {}
    for item in re.split(r"\n|[,;](?![^(\n]*\))", re.sub(r"(?<!\S)\d+[.)]\s", "", listed)):
        name = re.split(r":\s|\s[-–—]\s", re.sub(r"^\s*[-*•+]+\s*|[*`\"]+", "", item))[0]
        name = re.sub(r"^(?:and|or)\s+", "", name.strip(" \t.'_"))
        if name and not item.rstrip().endswith(":"):
            found.setdefault(name.lower(), name)
    if not found or max(len(name.split()) for name in found) > 8:
        raise Unusable("no list of concepts", repr(written[:60]))
    if len(found) > 10:
        raise Unusable("too many concepts", f"{len(found)}, at most 10")
    return list(found.values())


def instruction(written: str, *, finish: str = "stop", words: tuple[int, int] = (10, 200)) -> str:
    """Parse the text of a task that has a number of words within `words`; SelfCodeAlign's bound is 200."""
    found = _LABEL.sub("", _field(written, "instruction", finish)).strip()
    found = re.split(r"<(?:response|tests)>", found)[0].strip()
    if not words[0] <= len(found.split()) <= words[1]:
        raise Unusable("instruction length", f"{len(found.split())} words, expected {words[0]} to {words[1]}")
    return found


def answer(written: str, *, finish: str = "stop") -> Answer:
    """Parse a response with tests.

    Raises:
      Unusable: "truncated", "empty", "no code block", "several code blocks", "empty program", "placeholder",
        "no tests", or a reason of checks.py.
    """
    return _answer(written, finish, is_tested=True)


def rewritten(written: str, *, finish: str = "stop") -> Answer:
    """Parse a rewritten response; its `tests` are empty, since it has to pass those of its draft."""
    return _answer(written, finish, is_tested=False)


def blocks(written: str) -> list[Block]:
    """Find the fenced blocks of a text, also one that is left open at the end.

    A fence or a tag within a string of a Python program does not end its block: the block ends at the first place that
    leaves a program which parses or, where there is none, at the first one.
    """
    found, at = [], 0
    while opening := _OPENING.search(written, at):
        found.append(_block(written, opening))
        at = found[-1].end
    return found


_OPENING = re.compile(r"^([ \t]*)(`{3,})[ \t]*\{?\.?(\w*)[^`\n]*\n", re.MULTILINE)


def _block(written: str, opening: re.Match) -> Block:
    indent, fence, language = opening.groups()
    closing = re.compile(rf"^[ \t]*(?:{fence}`*[ \t]*(?=$|<)|(?=</?(?:response|tests)>))", re.MULTILINE)
    ends = [(m.start(), m.end()) for m in itertools.islice(closing.finditer(written, opening.end()), 20)]
    ends.append((len(written), len(written)))
    margin = re.compile(rf"^[ \t]{{0,{len(indent)}}}", re.MULTILINE)
    found = [Block(language=language.lower(), code=margin.sub("", written[opening.end():last]), start=opening.start(),
                   end=end) for last, end in ends]
    return next((b for b in found if not b.is_python or checks.statements(b.code) is not None), found[0])


def _field(written: str, tag: str, finish: str) -> str:
    """The text inside a tag that was opened by the prompt, or once more by the model."""
    whole = _whole(written, finish)
    inside = whole.split(f"<{tag}>", 1)[-1].split(f"</{tag}>")[0].strip()
    if not inside:
        raise Unusable("empty", f"no text in <{tag}>")
    return inside


def _whole(written: str, finish: str) -> str:
    if finish != "stop":
        raise Unusable("content filter" if finish == "content_filter" else "truncated", f"finish is {finish!r}")
    whole = _NEXT.split(written.replace("\r\n", "\n"))[0]
    if not whole.strip():
        raise Unusable("empty", "the model wrote nothing")
    return whole


def _answer(written: str, finish: str, *, is_tested: bool) -> Answer:
    try:
        whole = _opened(_whole(written, finish))
        seam = _seam(whole)
        if seam is None and is_tested:
            raise Unusable("no tests", "no second part with a ```python block")
        end, start = seam or (_closed(whole), len(whole))
        response = whole[:end].strip()
        program = _program(blocks(response))
        tests = "\n".join(block.code for block in blocks(whole[start:]) if block.is_python)
        return Answer(response=response, program=program, tests=checks.of(tests, program) if is_tested else ())
    except RecursionError as error:
        raise Unusable("nested too deeply", str(error)) from error


def _opened(whole: str) -> str:
    """What follows the opening tag, where the model wrote it again, up to the end of the tests."""
    if opened := re.search(r"<response>", _prose(whole)):
        whole = whole[opened.end():]
    return whole[:end.start()] if (end := re.search(r"</tests?>|<instruction>", _prose(whole))) else whole


def _closed(whole: str) -> int:
    """Where a response without tests ends."""
    closing = re.search(r"</response>", _prose(whole))
    return closing.start() if closing else len(whole)


def _prose(whole: str) -> str:
    """The text with its blocks blanked out, so that places stay the same."""
    for block in blocks(whole):
        whole = whole[:block.start] + re.sub(r"[^\n]", " ", whole[block.start:block.end]) + whole[block.end:]
    return whole


_TAG = re.compile(r"</response>|<tests?>", re.IGNORECASE)
_HEADING = re.compile(  # ### Tests, **Unit tests:**, [Tests], Test cases:
    r"^[ \t]*(?:[#*_\[]+[ \t]*(?:[\w.]+[ \t]+){0,2}test(?:s|ing)?(?:[ \t]+\w+){0,2}[ \t]*[\]*_:# \t]*"
    r"|(?:\w+[ \t]+){0,2}tests?(?:[ \t]+\w+){0,2}[ \t]*:[ \t]*)$", re.IGNORECASE | re.MULTILINE)
_ANNOUNCED = re.compile(r"\b(?:test|assert|verif|check|compar|expect|tried|example|usage)", re.IGNORECASE)


def _seam(whole: str) -> tuple[int, int] | None:
    """Where the response ends and where its tests start; None if either has no Python block."""
    found = [block for block in blocks(whole) if block.is_python]
    if not found:
        raise Unusable("no code block", "no ```python block")
    for end, start in _seams(whole, found):
        before, after = any(b.end <= end for b in found), any(b.start >= start for b in found)
        if before and after:
            return end, start
        if after and whole[end] == "<":
            raise Unusable("no code block", "no ```python block before the tests")
    return None


def _seams(whole: str, found: Sequence[Block]) -> Iterator[tuple[int, int]]:
    """Places where the tests may start, the most certain first: a tag, a heading, a sentence before asserts."""
    prose = _prose(whole)
    for pattern in (_TAG, _HEADING):
        yield from ((match.start(), match.end()) for match in pattern.finditer(prose))
    for before, block in itertools.pairwise(found):
        if re.search(r"^[ \t]*(?:assert\b|self\.assert)", block.code, re.MULTILINE):
            paragraph = max(prose.rfind("\n\n", 0, len(prose[:block.start].rstrip())), before.end)
            is_announced = _ANNOUNCED.search(prose, paragraph, block.start)
            yield (paragraph if is_announced else block.start), block.start


def _program(found: Sequence[Block]) -> str:
    """The program of a response: its first Python block. Later ones may show how it is used, and do not run."""
    python = [block.code for block in found if block.is_python]
    if not python:
        raise Unusable("no code block", "no ```python block before the tests")
    for code in python[1:]:
        if re.search(r"^(?:async def|def|class) ", code, re.MULTILINE):
            raise Unusable("several code blocks", f"a later one defines something: {code[:40]!r}")
    body = checks.statements(python[0])
    if body == ():
        raise Unusable("empty program", repr(python[0][:60]))
    if gap := _placeholder(python[0], body or ()):
        raise Unusable("placeholder", gap)
    return python[0]


_GAP = re.compile(r"\b(?:todo|fixme)\b|\byour (?:code|implementation|logic)\b|\brest of the (?:code|implementation)\b"
                  r"|\b(?:add|implement|write) (?:the |your )?(?:code|logic|implementation)? ?here\b", re.IGNORECASE)


def _placeholder(code: str, body: Sequence[ast.stmt]) -> str:
    """A comment that says that something is missing, or a function that does nothing; "" if there is none.

    Looked for by parsing: to-do lists are a fine subject, and classes raise NotImplementedError for good reasons.
    """
    with contextlib.suppress(tokenize.TokenError, SyntaxError):  # a program may break off: then up to there
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.COMMENT and _GAP.search(token.string):
                return token.string
    for function in body:
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            is_documented = ast.get_docstring(function) is not None
            if all(ast.unparse(s).split("(")[0] in _NOTHING for s in function.body[is_documented:]):
                return f"def {function.name} does nothing"
    return ""


_NOTHING = {"pass", "...", "raise NotImplementedError"}
