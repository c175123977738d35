"""The worked examples are right programs with tests that notice wrong ones; prompts are the same everywhere."""

import ast
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from align_jax import records, sandbox, text
from align_jax.records import Problem
from align_jax.synth import answers, dimensions, prompts
from align_jax.text import Unusable

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
SHOTS = prompts.shots()
BY_NAME = pytest.mark.parametrize("shot", SHOTS, ids=lambda shot: shot.name)
FIELDS = {"function": 'def f(x):\n    """Add one."""\n    return x + 1',
          "seed": "def f(x):\n    return x", "properties": "category: class", "instruction": "Write f.", "draft": "x"}


def parsed(shot: prompts.Shot) -> answers.Answer:
    """The example's answer, read back as a model's would be."""
    return answers.answer(f"{shot.response}\n</response>\n\n<tests>\n{shot.tests}\n</tests>")


# --- the worked examples


def test_there_are_enough_examples_of_every_kind():
    assert len(SHOTS) >= 16 and len({shot.name for shot in SHOTS}) == len(SHOTS)
    kinds = Counter((shot.category, shot.difficulty) for shot in SHOTS)
    assert kinds.keys() == {(c, d) for c in set(prompts.CATEGORIES) for d in prompts.DIFFICULTIES}
    assert len(set(Counter(shot.difficulty for shot in SHOTS).values())) == 1
    assert min(Counter(shot.category for shot in SHOTS).values()) >= 5


@BY_NAME
def test_an_example_has_the_form_that_is_asked_of_models(shot):
    assert 2 <= len(shot.concepts.split(", ")) <= 5
    assert answers.concepts(shot.concepts) == shot.concepts.split(", ")
    assert 40 <= len(shot.instruction.split()) <= 150 and "\n" not in shot.instruction
    assert answers.instruction(shot.instruction) == shot.instruction
    for section in (shot.response, shot.tests):
        assert [block.language for block in answers.blocks(section)] == ["python"]
        assert not section.startswith("```")  # prose comes first
    assert re.match(r"[A-Z].+\.\n\n```python\n", shot.tests)
    assert parsed(shot).response == shot.response
    assert ("def main(" in shot.response) == (shot.category == "program")
    assert bool(re.search(r"^class [A-Z]", parsed(shot).program, re.MULTILINE)) or shot.category != "class"


@BY_NAME
def test_a_seed_is_a_documented_function_that_returns_a_value(shot):
    *_, function = ast.parse(shot.seed).body
    assert isinstance(function, ast.FunctionDef) and ast.get_docstring(function) and function.args.args
    assert any(isinstance(node, ast.Return) and node.value for node in ast.walk(function))


def test_every_example_runs(any_backend):
    jobs = [(shot.seed, ()) for shot in SHOTS] + [(parsed(shot).program, parsed(shot).tests) for shot in SHOTS]
    jobs += [(answers.rewritten(shot.draft).program, parsed(shot).tests) for shot in SHOTS]
    verdicts = sandbox.run_many(jobs, limits=sandbox.Limits(wall_s=60, cpu_s=60), backend=any_backend)
    names = [f"{kind} of {shot.name}" for kind in ("seed", "response", "draft") for shot in SHOTS]
    assert [(name, v.status, v.detail) for name, v in zip(names, verdicts, strict=True) if v.status != "passed"] == []


SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.In: ast.NotIn}


def mutants(program: str) -> Iterator[str]:
    """The program with one operator or one result changed."""
    tree = ast.parse(program)
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=old) if type(old) in SWAPPED:
                node.op = SWAPPED[type(old)]()
                yield ast.unparse(tree)
                node.op = old
            case ast.Compare(left=left, ops=[old]) if type(old) in SWAPPED and getattr(left, "id", "") != "__name__":
                node.ops = [SWAPPED[type(old)]()]
                yield ast.unparse(tree)
                node.ops = [old]
            case ast.Return(value=ast.expr() as old):
                node.value = ast.Constant(None)
                yield ast.unparse(tree)
                node.value = old


def test_the_tests_of_every_example_notice_wrong_programs(any_backend):
    jobs, names = [], []
    for shot in SHOTS:
        wrong = list(mutants(parsed(shot).program))
        chosen = wrong[::max(1, len(wrong) // 3)][:3]
        jobs += [(program, parsed(shot).tests) for program in chosen]
        names += [shot.name] * len(chosen)
    verdicts = sandbox.run_many(jobs, limits=sandbox.Limits(wall_s=5, cpu_s=5), backend=any_backend)
    noticed = [name for name, v in zip(names, verdicts, strict=True) if v.status in ("assertion", "exception")]
    assert {shot.name for shot in SHOTS} == set(noticed)
    assert len(noticed) >= 0.75 * len(jobs)  # some mutants do the same as the original


@pytest.fixture
def any_backend():
    try:
        return sandbox.backend()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_no_example_is_from_a_benchmark():
    files = ("humaneval_plus/HumanEvalPlus.jsonl.gz", "mbpp_plus/MbppPlus.jsonl.gz")
    problems = [p for path in files for p in records.read(DATA / path, Problem)]
    mbpp = [json.loads(line) for line in (DATA / "base" / "mbpp.jsonl").read_text().splitlines()]
    titles = {p.entry_point.replace("_", "").lower() for p in problems}
    titles |= {name.replace("_", "").lower() for p in mbpp for name in re.findall(r"def (\w+)\(", p["code"])}
    grams = {gram for p in problems for gram in words(p.prompt)} | {gram for p in mbpp for gram in words(p["text"])}
    assert len(titles) > 900 and len(grams) > 10_000
    titles -= {"main", "value"}  # of no problem in particular
    for shot in SHOTS:
        defined = re.findall(r"^(?:def|class) (\w+)", f"{shot.seed}\n{parsed(shot).program}", re.MULTILINE)
        assert not {name.replace("_", "").lower() for name in defined} & titles, shot.name
        assert not words(shot.instruction) & grams, shot.name


def words(prose: str, *, count: int = 7) -> set[tuple[str, ...]]:
    """The runs of `count` words in a text."""
    found = re.findall(r"[a-z0-9]+", prose.lower())
    return {tuple(found[i:i + count]) for i in range(len(found) - count + 1)}


def test_the_examples_are_installed_with_the_package():
    assert '"synth/*.md"' in (ROOT / "setup.py").read_text()


# --- prompts


def test_a_base_model_continues_behind_the_opening_tag():
    prompt = prompts.build("response", "r1", FIELDS, chat=False)
    [shot] = prompts.draw_shots("response", "r1", count=1)
    assert prompt == (
        f"{prompts.STAGES['response'].task}\n\n## Example 1\n\n<instruction>\n{shot.instruction}\n</instruction>\n\n"
        f"<response>\n{shot.response}\n</response>\n\n<tests>\n{shot.tests}\n</tests>\n\n"
        "## Example 2\n\n<instruction>\nWrite f.\n</instruction>\n\n<response>\n")
    answer = prompt.split("<response>\n")[1].split("</tests>")[0]
    assert answers.answer(answer) == parsed(shot)


@pytest.mark.parametrize("stage", prompts.STAGES)
def test_a_chat_model_sees_examples_as_earlier_turns(stage):
    how = prompts.STAGES[stage]
    turns = prompts.build(stage, "r1", FIELDS, chat=True)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * how.shots + ["user"]
    assert turns[0]["content"].startswith(how.task) and how.task not in turns[-1]["content"]
    assert all(turn["content"].startswith(f"<{how.asked[0]}>") for turn in turns[1::2])
    assert all(turn["content"].endswith(f"</{how.asked[-1]}>") for turn in turns[1::2])
    alone = prompts.build(stage, "r1", FIELDS, chat=True, shots=0)
    assert len(alone) == 1 and alone[0]["content"] == f"{how.task}\n\n{turns[-1]['content']}"


def test_the_template_of_a_checkpoint_takes_the_turns():
    tokenizer = text.load(ROOT / "align_jax" / "pocket" / "pocket-instruct")
    turns = prompts.build("concepts", "r1", FIELDS, chat=True, shots=2)
    rendered = text.render(tokenizer, turns)
    places = [rendered.index(turn["content"]) for turn in turns]
    assert places == sorted(places)


def test_the_draw_is_the_same_everywhere():
    program = ("from align_jax.synth import dimensions, prompts\n"
               "for id in ('a', 'b/7'):\n"
               "    print([s.name for s in prompts.draw_shots('concepts', id, count=3)], prompts.draw_properties(id))\n"
               "    print(dimensions.principle('style', id)[:20])\n")
    outputs = {subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True,
                              env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}).stdout
               for seed in ("1", "2")}
    assert len(outputs) == 1
    # What `printf '"a"\0"b"\0' | sha256sum` says: it must outlive this Python too.
    assert prompts.pick(range(1000), "a", "b") == 0x1e473158537b6031 % 1000


def test_the_draw_is_uniform_and_depends_on_the_stage():
    ids = [f"seed-{i}" for i in range(3000)]
    first = Counter(prompts.draw_shots("response", id, count=1)[0].name for id in ids)
    expected = len(ids) / len(SHOTS)
    assert sum((first[shot.name] - expected)**2 / expected for shot in SHOTS) < 40.8  # chi-square, 17 df, p = 0.001
    assert prompts.draw_shots("concepts", "a", count=8) != prompts.draw_shots("instruction", "a", count=8)
    drawn = [prompts.draw_properties(id) for id in ids]
    categories, difficulties = (Counter(d[key] for d in drawn) for key in ("category", "difficulty"))
    assert abs(categories["function"] / len(ids) - 0.5) < 0.03
    assert all(abs(count / len(ids) - 1 / 3) < 0.03 for count in difficulties.values())


def test_shots_are_distinct_and_the_first_do_not_change_with_their_number():
    few, many = (prompts.draw_shots("concepts", "a", count=count) for count in (3, len(SHOTS)))
    assert many[:3] == few and len({shot.name for shot in many}) == len(SHOTS)


def test_stops_end_an_answer_and_nothing_within_it():
    closing, following = prompts.stops("response")
    assert closing == "</tests>" and following in prompts.build("response", "a", FIELDS, chat=False, shots=2)
    assert following not in "It works.\n\n### Example 3\n\n## Example of use"
    assert prompts.stops("concepts", shots=0) == ("</concepts>", "\n## Example 2")


def test_a_principle_stands_in_the_examples_and_in_the_question():
    with_one = FIELDS | {"principle": "Be brief."}
    prompt = prompts.build("rewrite", "a", with_one, chat=False)
    assert prompt.count("<principle>\nBe brief.\n</principle>\n\n<response>") == 2
    assert "principle>" not in prompts.build("response", "a", FIELDS, chat=False)


def test_a_draft_is_the_bare_program():
    shot = next(shot for shot in SHOTS if shot.name == "clock_text")
    code = answers.rewritten(shot.draft).program
    assert code.startswith("def clock_text(seconds):\n    if seconds < 0:")


@pytest.mark.parametrize(("arguments", "message"), [
    (("summary", FIELDS), "stage: got 'summary', available are"),
    (("rewrite", {"instruction": " "}), "for 'r1': no instruction and no draft; got"),
    (("response", FIELDS, 99), "got 99, expected 0 to 18"),
])
def test_a_prompt_that_cannot_be_built_says_why(arguments, message):
    stage, fields, *shots = arguments
    with pytest.raises(ValueError, match=message):
        prompts.build(stage, "r1", fields, chat=True, **({"shots": shots[0]} if shots else {}))


# --- dimensions


def test_dimensions_are_dealt_out_evenly():
    rows = [{"id": f"i{i}"} for i in range(103)]
    dealt = [*dimensions.deal(iter(rows))]
    names = [row["dimension"] for row in dealt]
    assert [row["id"] for row in dealt] == [row["id"] for row in rows] and set(names) == set(dimensions.CODAL)
    for end in range(1, len(rows)):
        counts = Counter(names[:end])
        assert max(counts.values()) - (min(counts.values()) if len(counts) == 5 else 0) <= 1
    assert {row["dimension"] for row in dimensions.deal(rows, ("security", "compliance"))} == {"security", "compliance"}
    assert {row["dimension"] for row in dimensions.deal(rows, ())} == {""}
    with pytest.raises(ValueError, match=r"got \['beauty'\], available are"):
        next(dimensions.deal(rows, ("beauty",)))


@pytest.mark.parametrize("name", dimensions.DIMENSIONS)
def test_every_paraphrase_of_a_principle_is_drawn(name):
    principles = dimensions.DIMENSIONS[name].principles
    drawn = Counter(dimensions.principle(name, str(i)) for i in range(600))
    assert len(principles) >= 5 and drawn.keys() == set(principles) and min(drawn.values()) > 60


def test_a_judge_is_given_the_rubric_of_one_dimension():
    [turn] = dimensions.judge("style", instruction="Write {f}.", response="```python\nd = {}\n```")
    rubric = dimensions.DIMENSIONS["style"]
    for part in (rubric.criterion, rubric.poor, rubric.excellent, "Write {f}.", "d = {}"):
        assert part in turn["content"]
    assert '{"rationale": "two to four sentences", "rating": a number from 1 to 10}' in turn["content"]
    assert "<reference>" not in turn["content"]
    [turn] = dimensions.judge("style", instruction="a", response="b", reference="better")
    assert "<reference>\nbetter\n</reference>\n\n<answer>\nb\n</answer>" in turn["content"]


@pytest.mark.parametrize(("written", "rating"), [
    ('{"rationale": "Clear names.", "rating": 8}', 8),
    ('Sure:\n```json\n{"rationale": "Two\nlines", "rating": "7/10"}\n```', 7),
    ('{"Rationale": "uses {braces}", "Rating": 6.5} Hope this helps', 6.5),
    ('First {"rating": 3}, no: {"rating": 4, "rationale": ""}', 4),
    ("**Rating:** 9\nGood.", 9),
    ("It is fine. Score: 5 / 10", 5),
    ("Final [[2]]", 2),
    ('{"rationale": "cut off", "rating": 10', 10),
])
def test_a_rating_is_found_in_what_judges_write(written, rating):
    assert dimensions.judgement(written).rating == rating


@pytest.mark.parametrize(("written", "reason"), [
    ("", "no rating"), ("I cannot judge that.", "no rating"), ('{"rating": null}', "no rating"),
    ('{"rating": true}', "no rating"), ("Rating: 1-10", "no rating"), ('{"rating": "high"}', "no rating"),
    ('{"rating": 0}', "rating out of range"), ("Rating: 11", "rating out of range"),
    ('{"rating": -3}', "rating out of range"),
])
def test_what_is_no_rating_is_refused(written, reason):
    with pytest.raises(Unusable) as refused:
        dimensions.judgement(written)
    assert refused.value.reason == reason
    with pytest.raises(Unusable, match="truncated"):
        dimensions.judgement('{"rating": 8}', finish="length")
