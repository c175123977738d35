"""The embedded pair and its benchmark are what the README says of them."""

import ast
import importlib
import itertools
import random
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from align_jax import attention, hf, mesh, model, records, text
from align_jax.decode import Sampler
from align_jax.records import Problem
from align_jax.sample import to_file
from align_jax.score import evalplus
from align_jax.synth import verify

ROOT = Path(__file__).parents[1]
POCKET = ROOT / "align_jax" / "pocket"
PAIR = {"pocket": False, "pocket-instruct": True}  # name -> is a chat model


def tool(name: str):
    """Import a program of tools/."""
    sys.path.insert(0, str(ROOT / "tools"))
    return importlib.import_module(name)


def shape_of(code: str) -> str:
    """A program without docstrings, annotations and names of its own: equal iff only those differ."""
    tree = ast.parse(code)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body, node.returns = node.body[ast.get_docstring(node) is not None:], None
        bound = (node.name if isinstance(node, ast.FunctionDef) else node.arg if isinstance(node, ast.arg) else
                 node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None)
        if bound:
            names.setdefault(bound, f"n{len(names)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.arg, node.annotation = names[node.arg], None
        elif isinstance(node, ast.FunctionDef):
            node.name = names[node.name]
        elif isinstance(node, ast.Name):
            node.id = names.get(node.id, node.id)
    return ast.dump(tree)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return evalplus.problems("PocketEval", POCKET / "PocketEval.jsonl.gz")


def test_the_pair_is_small():
    assert sum(f.stat().st_size for name in PAIR for f in (POCKET / name).iterdir()) <= 8_000_000


def test_the_benchmark_has_enough_problems_of_many_families(problems):
    rows = records.rows(POCKET / "PocketEval.jsonl.gz")
    assert len(problems) >= 300 and len({row["family"] for row in rows}) >= 20
    assert len({shape_of(p.prompt + p.canonical_solution) for p in problems}) == len(problems)


def test_no_problem_of_the_benchmark_is_trained_on(problems):
    """By program shape and by what is asked, in the preference problems and the start of what both runs read."""
    make, families = tool("make_pocket"), tool("pocket_problems")
    held = {shape_of(p.prompt + p.canonical_solution) for p in problems}
    asked = {families.docstring(p.prompt) for p in problems}
    preference = records.read(POCKET / "PocketPref.jsonl.gz", Problem)
    assert not held & {shape_of(p.prompt + p.canonical_solution) for p in preference}
    held_out = families.held_out(records.rows(POCKET / "PocketEval.jsonl.gz"))
    for seed, (run, slips) in enumerate(make.SLIPS.items(), 1):
        stream = make.documents(families.corpus(seed, held_out, **slips), ["def f(x):\n    return x\n"], make.MIX[run],
                                random.Random(seed), chat=run == "instruct")
        kinds = set()
        for document in itertools.islice(stream, 3000):
            whole = "\n".join(m["content"] for m in document.prompt or ()) + "\n" + document.completion
            shapes = {shape_of(code) for code in re.findall(r"^def .*(?:\n    .*)+", whole, re.MULTILINE)}
            assert not shapes & held and not [text for text in asked if text in whole]
            kinds.add(document.id.split("-")[0])
        assert kinds == set(make.MIX[run])


@pytest.mark.slow
def test_the_problem_sets_are_what_the_tool_makes():
    sets = tool("pocket_problems").split(0, train=0, preference=1200, evaluation=400)
    for name, key in (("PocketEval", "evaluation"), ("PocketPref", "preference")):
        assert records.rows(POCKET / f"{name}.jsonl.gz") == sets[key]


@pytest.mark.parametrize("name", PAIR)
def test_transformers_loads_it_and_gives_the_same_logits(name, one_device):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(POCKET / name, dtype=torch.float32)
    tokenizer = text.load(POCKET / name)
    ids = text.encode_prompt(tokenizer, "def f(x):\n    \"\"\"Return the sum of the squares of x.\"\"\"\n")
    cfg, params = hf.load(POCKET / name, dtype="float32")
    tokens = np.array([ids], np.int32)
    tokens, positions, segments, branches = (jax.device_put(x, mesh.sharding("rows", None)) for x in (
        tokens, np.arange(len(ids), dtype=np.int32)[None], np.ones_like(tokens), np.zeros_like(tokens)))
    states = model.hidden(cfg, params, tokens, positions, attention.make(segments, branches))
    ours = model.unembed(model.head(params, "float32"), states)
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor([ids])).logits.numpy(), atol=2e-4)


@pytest.mark.slow
def test_pocket_solves_a_fifth_to_three_fifths_and_instruct_more(problems, one_device, tmp_path):
    solved = {}
    for name, chat in PAIR.items():
        prompts = {p.task_id: evalplus.prompt(p, chat=chat) for p in problems}
        samples = to_file(tmp_path / f"{name}.jsonl", Sampler.load(POCKET / name, dtype="float32"), prompts, n=1,
                          seed=0, temperature=0.0, max_tokens=160, stops=evalplus.stops("humaneval", chat=chat))
        judged = verify.verify(tmp_path / f"{name}-judged.jsonl", samples, {p.task_id: p for p in problems})
        solved[name] = np.mean([j.status == "passed" for j in judged])
    assert 0.2 <= solved["pocket"] <= 0.6 and solved["pocket-instruct"] > solved["pocket"], solved
