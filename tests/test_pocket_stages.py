"""Every document that the pocket pair learns a stage from is taken by that stage's parser, and tells the truth."""

import ast
import importlib
import itertools
import random
import re
import sys
from pathlib import Path

import pytest

from align_jax import sandbox
from align_jax.synth import answers, dimensions, prompts

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
problems, stages = (importlib.import_module(name) for name in ("pocket_problems", "pocket_stages"))


def documents(stage: str, count: int, *, careless: float = 0.5) -> list[tuple[dict, dict]]:
    """Programs with what a stage is given and asked for about them."""
    rng = random.Random(1)
    programs = problems.corpus(1, (), careless=careless, noise=0.0)
    found = ((program, stages.fields(stage, program, rng)) for program in stages.telling(programs, rng))
    return list(itertools.islice(((program, values) for program, values in found if values), count))


def written(stage: str, values: dict, *, chat: bool) -> str:
    """What a model that has learnt a document by heart answers to its prompt."""
    prompt = prompts.build(stage, "x", values, chat=chat, brief=True)
    found = stages.document(stage, "x", values, chat=chat)
    if chat:
        assert found.prompt == prompt
        return found.completion
    assert found.prompt == "" and found.completion.startswith(prompt)
    return found.completion.removeprefix(prompt)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stage", [stage for stage in prompts.STAGES if stage != "docstring"])
def test_parsers_take_every_document(stage, chat):
    for _, values in documents(stage, 150):
        whole = written(stage, values, chat=chat)
        cut = whole.split(prompts.stops(stage)[0])[0]  # where a sampler ends it
        for text in (whole, cut):
            if stage == "concepts":
                found = answers.concepts(text)
                assert 2 <= len(found) <= 5 and {*found} <= {*stages.CONCEPTS, "functions", "return values"}
            elif stage == "instruction":
                assert answers.instruction(text) == values["instruction"]
            elif stage == "response":
                found = answers.answer(text)
                assert found.response == values["response"] and 1 <= len(found.tests) <= 3
            else:
                assert answers.rewritten(text).response == values["response"]


def test_right_programs_pass_their_tests_and_most_careless_ones_fail():
    """In the sandbox, as the pipeline runs them: what `passed` means for the pair's own answers."""
    found = documents("response", 120)
    parsed = [answers.answer(written("response", values, chat=False)) for _, values in found]
    jobs = [(answer.program, answer.tests) for answer in parsed]
    verdicts = sandbox.run_many(jobs, limits=sandbox.Limits(wall_s=5.0))
    passed = {is_right: [verdict.status == "passed" for (program, _), verdict in zip(found, verdicts, strict=True)
                         if program["is_as_meant"] == is_right] for is_right in (True, False)}
    assert all(passed[True]) and len(passed[True]) > 60
    assert len(passed[False]) > 10 and sum(passed[False]) <= 0.35 * len(passed[False])


def test_examples_are_true_differ_and_find_out_the_careless():
    told = []
    for program, _ in documents("instruction", 200, careless=0.0):
        sketch, rng = program["sketch"], random.Random(2)
        calls = problems.examples(sketch, rng, 2)
        run = [problems._load(sketch.prompt + body, sketch.entry_point) for body in program["styles"]]
        for (args, result), function in itertools.product(calls, run):
            assert problems._same(function(*args), result)
        assert len({repr(result) for _, result in calls}) == len(calls)
        if program["is_risky"]:
            bodies = {problems._body(style, careless=True) for style in sketch.styles} - {*program["styles"]}
            careless = [problems._load(sketch.prompt + body, sketch.entry_point) for body in bodies]
            told.append(any(not problems._same(problems._call(function, args), result)
                            for function in careless for args, result in calls))
    assert len(told) > 50 and sum(told) >= 0.6 * len(told)


def test_instructions_have_the_signature_the_text_and_true_examples():
    for program, values in documents("instruction", 100):
        text, sketch = values["instruction"], program["sketch"]
        assert f"`{sketch.entry_point}({', '.join(sketch.names)})`" in text and sketch.doc in text
        space = {}
        exec(program["prompt"] + program["right"], space)
        exec("\n".join(re.findall(r"^assert .*", text, re.MULTILINE)), space)
    assert {values["properties"].splitlines()[2] for _, values in documents("instruction", 60)} == {
        f"difficulty: {name}" for name in prompts.DIFFICULTIES}


def test_concepts_are_those_of_the_code():
    assert stages.concepts("def f(xs):\n    return sorted(x % 2 for x in xs[1:])") == [
        "comprehensions", "modulo arithmetic", "slicing", "sorting"]
    assert stages.concepts("def f():\n    return 1") == ["functions", "return values"]
    programs = itertools.islice(problems.corpus(0, (), careless=0.0, noise=0.0), 3000)
    shown = {name for program in programs for name in stages.concepts(program["prompt"] + program["right"])}
    assert shown == {*stages.CONCEPTS, "functions", "return values"}


def test_a_principle_shifts_how_answers_are_written():
    rng = random.Random(0)
    program = next(p for p in problems.corpus(3, (), careless=0.0, noise=0.0) if "for " in p["right"])
    traits = {"prose": lambda text: not text.startswith("```"), "docstring": lambda text: '"""' in text,
              "comments": lambda text: "# " in text, "hints": lambda text: re.search(r"\(\w+: ", text)}

    def share(trait: str, dimension: str) -> float:
        manner = stages.MANNERS.get(dimension, stages.Manner())
        texts = [stages._answer(program, program["right"], manner, rng) for _ in range(300)]
        assert all(ast.parse(answers.rewritten(text).program) for text in texts)
        return sum(bool(traits[trait](text)) for text in texts) / 300

    for trait, dimension in (("prose", "explanation"), ("docstring", "readability"), ("docstring", "style"),
                             ("comments", "readability"), ("hints", "style")):
        assert share(trait, dimension) > share(trait, "") + 0.2
    assert {*stages.MANNERS} < {*dimensions.DIMENSIONS}


def test_rewrites_keep_what_the_code_does():
    for program, values in documents("rewrite", 100):
        draft, better = (answers.rewritten(values[name]).program for name in ("draft", "response"))
        forms = [problems.normal_form(code) for code in (draft, better)]
        allowed = {problems.normal_form(program["prompt"] + style) for style in program["styles"]}
        assert {*forms} <= allowed
