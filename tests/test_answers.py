"""What models write is read as it was meant, or refused for a reason that is counted."""

import random

import pytest

from align_jax import sandbox, text
from align_jax.synth import answers, prompts
from align_jax.text import Unusable

CODE = "def double(x):\n    return 2 * x\n"
PROSE = f"Twice the number.\n\n```python\n{CODE}```\n\nIt adds nothing."
TEST = "```python\nassert double(1) == 2\n```"


def reason(parse, *arguments, **settings) -> str:
    with pytest.raises(Unusable) as refused:
        parse(*arguments, **settings)
    return refused.value.reason


# --- concepts and instructions


@pytest.mark.parametrize("written", [
    "recursion, hash maps, two pointers", "recursion, hash maps, two pointers\n</concepts>\n\n## Example 3\n\nmore",
    "<concepts>\nrecursion, hash maps, two pointers\n</concepts>", "recursion\nhash maps\ntwo pointers",
    "- recursion\n- hash maps\n- two pointers",
    "1. recursion\n2. **hash maps**: constant-time lookups\n3) two pointers.",
    "1) recursion, 2) hash maps, 3) two pointers",
    "Concepts: recursion, hash maps, and two pointers.", "### Key concepts\n* `recursion`\n* hash maps - for lookups\n"
    "* two pointers", "**Concepts:**\n- recursion\n- hash maps\n- two pointers", "recursion; hash maps; two pointers",
    "recursion, Recursion, hash maps, two pointers, hash maps",
    "Here they are:\nrecursion,\nhash maps,\ntwo pointers\n",
])
def test_lists_of_concepts(written):
    assert answers.concepts(written) == ["recursion", "hash maps", "two pointers"]


def test_a_concept_keeps_its_brackets_and_signs():
    assert answers.concepts("sorting (merge, quick), C-style loops, O(n) scans") == [
        "sorting (merge, quick)", "C-style loops", "O(n) scans"]


def test_what_is_no_list_of_concepts():
    assert reason(answers.concepts, "recursion", finish="length") == "truncated"
    assert reason(answers.concepts, " \n") == "empty"
    assert reason(answers.concepts, "- \n- ") == "no list of concepts"
    assert reason(answers.concepts, "This piece of code shows how one walks over a tree") == "no list of concepts"
    assert reason(answers.concepts, ", ".join(f"c{i}" for i in range(11))) == "too many concepts"


TASK = "`clip(x)` is wanted: write it in Python, so that it returns x between 0 and 1."


@pytest.mark.parametrize("written", [
    TASK, f"\n{TASK}\n</instruction>\n\n## Example 10\n\n<properties>", f"<instruction>\n{TASK}\n</instruction> Done!",
    f"### Task\n\n{TASK}", f"**Instruction:** {TASK}", f"Task 2: {TASK}", f"{TASK}\n\n<response>\nSure",
    f"{TASK}\n\n## Example 10\n\n<properties>\ncategory: class",
])
def test_instructions(written):
    assert answers.instruction(written) == TASK


def test_what_is_no_instruction():
    assert reason(answers.instruction, TASK, finish="length") == "truncated"
    assert reason(answers.instruction, "<instruction></instruction>") == "empty"
    assert reason(answers.instruction, "Write a function.") == "instruction length"
    assert reason(answers.instruction, "word " * 201) == "instruction length"
    assert answers.instruction("word " * 5, words=(5, 5)) == "word word word word word"


# --- responses and tests


@pytest.mark.parametrize("written", [
    f"{PROSE}\n</response>\n\n<tests>\nIt is tried.\n{TEST}\n",
    f"{PROSE}\n</response>\n\n<tests>\n{TEST}\n</tests>\nBye.",
    f"<response>\n{PROSE}\n</response>\n<tests>\n{TEST}\n</tests>", f"{PROSE}\n\n<tests>\n{TEST}",
    f"{PROSE}\n<test>\n{TEST}",
    f"{PROSE}\n</response>\n\nNow the tests.\n\n{TEST}", f"{PROSE}\r\n</response>\r\n\r\n<tests>\r\n{TEST}",
    f"Sure!\n<response>\n{PROSE}\n\n### Tests\n\n{TEST}\n</response>", f"{PROSE}\n\n## Test Cases\n{TEST}",
    f"{PROSE}\n\n**Tests:**\n{TEST}", f"{PROSE}\n\n[Tests]\n{TEST}", f"{PROSE}\n\n### 3. Unit tests\n{TEST}",
    f"{PROSE}\n\nTests:\n{TEST}", f"{PROSE}\n\nWe can verify this as follows:\n{TEST}",
    f"{PROSE}\n\nTo check that it is correct, the following\nassertions can be run.\n\n{TEST}",
    f"{PROSE}\n\n{TEST}", f"{PROSE}\n</response>\n\n<tests>\n```python\nassert double(1) == 2",
    f"{PROSE}\n</response>\n\n<tests>\n```python\nassert double(1) == 2\n</tests>\n```",
    f"{PROSE}\n</response>\n\n<tests>\n{TEST}\n\n## Example 3\n\n<instruction>\nWrite g.\n```python\nassert 0\n```",
    f"{PROSE}\n</response>\n<tests>\n```bash\npytest\n```\n{TEST}\nIt prints:\n```\nassert False, 'ok'\n```",
    f"<instruction>\nWrite double.\n</instruction>\n\n<response>\n{PROSE}\n</response>\n\n<tests>\n{TEST}\n</tests>",
    f"{PROSE}\n</response>\n\n<tests>\n```py\nassert double(1) == 2\n```",
    f"{PROSE}\n</response><tests>\n{TEST}</tests>",
])
def test_a_response_is_told_from_its_tests(written):
    assert answers.answer(written) == answers.Answer(response=PROSE, program=CODE, tests=("assert double(1) == 2",))


@pytest.mark.parametrize("seam", ["\n</response>\n\n<tests>\n", "\n\n### Tests\n\n", "\n\n[Tests]\n", "\n\n"])
@pytest.mark.parametrize("shot", prompts.shots(), ids=lambda shot: shot.name)
def test_the_worked_examples_in_other_forms(shot, seam):
    found = answers.answer(shot.response + seam + shot.tests)
    assert found.response == shot.response or seam == "\n\n" and found.response.startswith(shot.response)
    assert found.program == text.extract_code(found.response)  # what an evaluation will run


def test_a_missing_fence_before_the_end_of_the_response():
    found = answers.answer(f"Twice.\n```python\n{CODE}</response>\n<tests>\n{TEST}")
    assert (found.program, found.tests) == (CODE.strip(), ("assert double(1) == 2",))


@pytest.mark.parametrize("code", [
    'def f():\n    return "```python\\nx\\n```"\n',
    'def f():\n    """Example:\n\n```\n</response>\n<tests>\n```\n    """\n    return 1\n',
    "PAGE = '''\n```python\nassert False\n```\n### Tests\n'''\n\n\ndef f():\n    return PAGE\n",
    '# <tests>\ndef f():\n    return """\n<tests>\n    """\n',
])
def test_fences_and_tags_within_strings_of_the_program(code):
    found = answers.answer(f"So.\n\n```python\n{code}```\n</response>\n<tests>\n```python\nassert f() is not 0\n```")
    assert found.program == code and found.response == f"So.\n\n```python\n{code}```"
    assert answers.answer(f"````python\n{code}````\n\n<tests>\n```python\nassert f() is not 0\n```").program == code


def test_an_indented_block_loses_its_indent():
    item = "1. So:\n   ```python\n   def double(x):\n       return 2 * x\n   ```"
    assert answers.answer(f"{item}\n<tests>\n{TEST}").program == CODE


@pytest.mark.parametrize(("expected", "written"), [
    ("empty", "  \n"), ("no code block", "I cannot."), ("no code block", f"```\n{CODE}```\n<tests>\n{TEST}"),
    ("no code block", f"```js\nlet f\n```\n</response>\n<tests>\n{TEST}"), ("no tests", PROSE),
    ("no tests", f"{PROSE}\n</response>\n<tests>\n```\nassert double(1) == 2\n```"),
    ("no tests", f"{PROSE}\n</response>\n<tests>\nassert double(1) == 2"),
    ("no tests", f"{PROSE}\n```python\ndouble(3)\n```"),
    ("several code blocks", f"{PROSE}\n```python\nclass A:\n    pass\n```\n<tests>\n{TEST}"),
    ("empty program", f"```python\n# nothing\n```\n<tests>\n{TEST}"),
    ("empty program", f"```python\n```\n<tests>\n{TEST}"),
    ("placeholder", f"```python\ndef double(x):\n    pass\n```\n<tests>\n{TEST}"),
    ("placeholder", f"```python\ndef double(x):\n    ''\n    raise NotImplementedError('x')\n```\n<tests>\n{TEST}"),
    ("placeholder", f"```python\ndef double(x):\n    # Your code here\n    return x\n```\n<tests>\n{TEST}"),
    ("placeholder", f"```python\n{CODE}# TODO: negative numbers\n```\n<tests>\n{TEST}"),
    ("tests without assert", f"{PROSE}\n<tests>\n```python\nprint(double(1))\n```"),
    ("tests never called", f"{PROSE}\n<tests>\n```python\ndef test(x):\n    assert double(x)\n```"),
    ("tests: syntax", f"{PROSE}\n<tests>\n```python\nassert double(1) ==\n```"),
])
def test_what_is_no_answer(expected, written):
    assert reason(answers.answer, written) == expected


def test_a_truncated_answer_is_refused_whatever_it_holds():
    assert reason(answers.answer, f"{PROSE}\n<tests>\n{TEST}", finish="length") == "truncated"


@pytest.mark.parametrize("code", [
    'def todo_list(items):\n    """Return what is still to do (TODO, FIXME)."""\n    return [*items, "todo"]\n',
    "class Shape:\n    def area(self):\n        raise NotImplementedError\n\n    def __eq__(self, other):\n"
    "        return NotImplemented\n\n\ndef todo_list(x):\n    return Shape()\n",
    "class Empty(Exception):\n    pass\n\n\ndef todo_list(x):\n    return [x for x in x]\n",
])
def test_words_that_are_no_placeholders(code):
    tests = "```python\nassert todo_list([1])\n```"
    assert answers.answer(f"```python\n{code}```\n<tests>\n{tests}").program == code


def test_a_later_block_that_only_uses_the_solution_does_not_run():
    use = "```python\nprint(double(input()))\n```\n```text\ndef double(\n```"
    found = answers.answer(f"{PROSE}\n{use}\n<tests>\n{TEST}")
    assert found.program == CODE and "input()" in found.response


def test_a_program_that_does_not_parse_is_an_answer_and_fails():
    found = answers.answer(f"```python\ndef double(x:\n```\n</response>\n<tests>\n{TEST}")
    assert found.program == "def double(x:\n" and found.tests == ("assert double(1) == 2",)


@pytest.mark.parametrize(("code", "status"), [
    ("from __future__ import annotations\n\n\ndef double(x: Later) -> Later:\n    return 2 * x\n", "passed"),
    ("def double(input_list):\n    return 2 * input_list\n\n\nif __name__ == '__main__':\n    input()\n", "passed"),
    ("def double(x:\n", "syntax"), ("import no_such_package\n\n\ndef double(x):\n    return 2\n", "missing_package"),
    ("def double(x):\n    return x\n", "assertion"), ("def double(x):\n    return y\n", "exception"),
])
def test_an_answer_is_labelled_for_the_right_reason(code, status):
    found = answers.answer(f"```python\n{code}```\n</response>\n<tests>\n{TEST}")
    try:
        assert sandbox.run(found.program, found.tests, limits=sandbox.Limits(wall_s=60)).status == status
    except RuntimeError as error:
        pytest.skip(str(error))


def test_a_rewritten_answer_needs_no_tests_and_loses_those_it_has():
    expected = answers.Answer(response=PROSE, program=CODE, tests=())
    for written in (PROSE, f"<response>\n{PROSE}\n</response>", f"{PROSE}\n</response>\n\n<tests>\n{TEST}\n</tests>",
                    f"{PROSE}\n\n### Tests\n\n{TEST}"):
        assert answers.rewritten(written) == expected
    assert reason(answers.rewritten, "Nothing to improve.") == "no code block"


def test_whatever_is_written_is_parsed_or_refused():
    pieces = ["```python\n", "```\n", "```", "<response>", "</response>\n", "<tests>\n", "</tests>", "### Tests\n",
              CODE, TEST, "\n\n", "assert double(1) == 2\n", "Prose. ", "'''", "'", "\\", "\0", "\r\n", "   ", "async ",
              "def double(x):\n", "## Example 3", "class T(TestCase):\n", "    def test(self): assert double\n",
              "yield\n", "(" * 300, "1+" * 300, "é\u2028"]
    rng, outcomes = random.Random(0), set()
    for _ in range(500):
        written = "".join(rng.choices(pieces, k=rng.randrange(14)))
        for parse in (answers.answer, answers.rewritten, answers.concepts, answers.instruction):
            try:
                outcomes.add(type(parse(written)).__name__)
            except Unusable as error:
                outcomes.add(error.reason)
    assert outcomes >= {"Answer", "list", "str", "no tests", "no code block", "empty"}
