"""Decoding: transformers' greedy tokens, training's log-probs, the right distribution, one prefill a prompt."""

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from align_jax import data, decode, hf, mesh, model, records, slots, text
from align_jax.step import Compute, score_tokens

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = GOLDEN / "tiny"
PROMPTS = [(pair.id, pair.prompt) for pair in records.read(GOLDEN / "pairs.jsonl", records.Pair)]
MESHES = [(1, 1, 1), (2, 2, 2)]


def on(*shape):
    return jax.set_mesh(mesh.make(*shape, devices=jax.devices()[:math.prod(shape)]))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A random Qwen2 model, with biases that matter and a tied head, behind the tiny checkpoint's tokenizer."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(1)
    config = transformers.Qwen2Config(
        vocab_size=288, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, use_sliding_window=False)
    lm = transformers.Qwen2ForCausalLM(config)
    for name, bias in lm.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias, std=0.5)
    lm.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


def sampler(folder=TINY) -> decode.Sampler:
    cfg, params = hf.load(folder, dtype="float32")
    tokenizer = text.load(folder)
    return decode.Sampler.of(cfg, params, tokenizer, text.stop_ids(tokenizer, folder))


def drawn(prompts=PROMPTS, *, who=None, **settings) -> dict[str, list[decode.Completion]]:
    settings = {"n": 3, "temperature": 0.9, "top_p": 0.95, "max_tokens": 64, "batch_size": 48, "seed": 7} | settings
    return dict(decode.sample(who or sampler(), prompts, **settings))


def ids_of(answers) -> dict[str, list[list[int]]]:
    return {name: [c.ids for c in completions] for name, completions in answers.items()}


@pytest.fixture(scope="module")
def expected():
    """What the settings of `drawn` give on one device, in one batch."""
    with on(1, 1, 1):
        return drawn()


# --- against transformers and against training ----------------------------------------------------


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("family", ["tiny", "qwen"])
def test_greedy_is_transformers_token_for_token(family, shape, qwen):
    folder = {"tiny": TINY, "qwen": qwen}[family]
    tokenizer = text.load(folder)
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with on(*shape):
        got = drawn(who=sampler(folder), n=1, temperature=0.0, max_tokens=40)
    for name, prompt in PROMPTS:
        ids = text.encode_prompt(tokenizer, prompt)
        theirs = lm.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=40, eos_token_id=2, pad_token_id=0)
        assert got[name][0].ids == theirs[0, len(ids):].tolist(), name


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"temperature": 1.0, "top_p": 1.0}, {"n": 1}], ids=str)
def test_logps_are_those_of_score_tokens(settings, shape):
    with on(*shape):
        answers = drawn(**settings)
        assert settings.get("temperature") == 0.0 or any(c.ids[-1] == 2 for row in answers.values() for c in row)
        scored = score(answers)
    for (name, k), logps in scored.items():
        np.testing.assert_allclose(answers[name][k].logps, logps, rtol=0, atol=1e-4)


def score(answers) -> dict[tuple[str, int], np.ndarray]:
    """Log-probs of the answers by the function that training uses, one answer a row."""
    cfg, params = hf.load(TINY, dtype="float32")
    tokenizer, prompts = text.load(TINY), dict(PROMPTS)
    rows = {(name, k): data.row([data.Encoded(name, np.array(text.encode_prompt(tokenizer, prompts[name]), np.int32),
                                              (np.array(c.ids, np.int32),))], T=128, P=1, C=1)
            for name, completions in answers.items() for k, c in enumerate(completions)}
    filled = [*rows.values(), *[data.row([], T=128, P=1, C=1)] * (-len(rows) % 8)]
    batch = {name: jax.device_put(np.stack([row[name] for row in filled]),
                                  mesh.sharding("rows", *(None,) * filled[0][name].ndim)) for name in filled[0]}
    compute = Compute(dtype="float32", remat="none", chunk=128)
    logps = np.asarray(jax.jit(lambda params: score_tokens(cfg, params, batch, compute=compute))(params))
    return {key: logps[i, row["slots"] >= 0] for i, (key, row) in enumerate(rows.items())}


# --- what may not change a sample -----------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"batch_size": 13}, {"chunk": 5}], ids=str)
def test_batch_and_chunk_change_no_sample(settings, expected, one_device):
    assert ids_of(drawn(**settings)) == ids_of(expected)


@pytest.mark.parametrize("shape", [pytest.param(MESHES[0], marks=pytest.mark.slow), MESHES[1]], ids=str)
def test_what_a_gpu_runs_changes_no_sample(shape, qwen, monkeypatch):
    """Interpreted: rings by flash.py, activations with their features last, several steps between two looks."""
    def written(prompts):
        jax.clear_caches()  # what was compiled for another platform
        limits = {name: 5 + 9 * i for i, (name, _) in enumerate(prompts)}
        with on(*shape):
            return ids_of(drawn(prompts, who=sampler(qwen), n=2, batch_size=4, limits=limits, chunk=16))

    prompts = [(name, prompt) for name, prompt in PROMPTS if isinstance(prompt, str)][:3]
    alike = [(name, "x = 1\n" * 40 + prompt) for name, prompt in prompts]  # with a common start
    expected, calls = [written(prompts), written(alike)], []
    of_ring = slots.flash.of_ring
    monkeypatch.setattr(slots, "mesh", SimpleNamespace(platform=lambda: "gpu"))
    monkeypatch.setattr(slots.flash, "of_ring", lambda *args: calls.append(0) or of_ring(*args))
    try:
        assert [written(prompts), written(alike)] == expected and calls
    finally:
        jax.clear_caches()


def test_the_mesh_changes_no_sample(expected, any_mesh):
    assert ids_of(drawn()) == ids_of(expected)


def test_neither_order_nor_company_nor_n_changes_a_sample(expected, one_device):
    few = ids_of(drawn(PROMPTS[7:2:-2], n=2))
    assert few == {name: ids_of(expected)[name][:2] for name in few}
    assert len(few) == 3


def test_seed_id_and_number_give_different_samples(expected, one_device):
    assert ids_of(drawn(seed=8)) != ids_of(expected)
    same_prompt = drawn([(str(i), PROMPTS[0][1]) for i in range(4)], n=4)
    assert len({tuple(c.ids) for completions in same_prompt.values() for c in completions}) == 16


# --- ends -----------------------------------------------------------------------------------------


def test_eos_ends_an_answer_and_is_not_in_its_text(expected):
    tokenizer = text.load(TINY)
    ended = 0
    for c in (c for completions in expected.values() for c in completions):
        assert len(c.ids) == len(c.logps) <= 64
        assert 2 not in c.ids[:-1]
        assert c.finish == ("stop" if c.ids[-1] == 2 else "length")
        assert c.finish == "stop" or len(c.ids) == 64
        assert c.text == tokenizer.decode([i for i in c.ids if i != 2], skip_special_tokens=True)
        ended += c.finish == "stop"
    assert 0 < ended < 36


@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_stop_strings_cut_at_their_first_occurrence(chunk, expected, one_device):
    """Stops are taken from what was written: one within a token, one over two tokens; overlapping ones too."""
    tokenizer = text.load(TINY)
    plain = re.compile("[!-~]{5}")
    name, k, c, found = next(
        (name, k, c, found[0]) for name, completions in expected.items() for k, c in enumerate(completions)
        if (found := plain.search(c.text)) and not any(found[0][1:4] in tokenizer.decode([i]) for i in c.ids))
    spanning = found[1:4]
    for stops in ([spanning], [spanning, found[2]], ["no such text", found[4], spanning]):
        got = drawn([(name, dict(PROMPTS)[name])], stops=stops, chunk=chunk)[name][k]
        assert got.finish == "stop"
        assert got.ids == c.ids[:len(got.ids)] and got.logps == pytest.approx(c.logps[:len(got.ids)], abs=1e-5)
        # As if somebody had looked after every token.
        texts = [tokenizer.decode(c.ids[:n], skip_special_tokens=True) for n in range(1, len(c.ids) + 1)]
        first = next(n for n, written in enumerate(texts) if any(stop in written for stop in stops))
        assert len(got.ids) == first + 1
        assert got.text == texts[first][:min(texts[first].find(stop) for stop in stops if stop in texts[first])]


def test_a_stop_string_of_another_prompt_stops_nobody_else(expected, one_device):
    stop = expected[PROMPTS[0][0]][0].text[3:6]
    for name, completions in drawn(stops=[stop]).items():
        for got, free in zip(completions, expected[name], strict=True):
            assert stop not in got.text
            assert stop in free.text or (got.ids, got.finish) == (free.ids, free.finish)


def test_a_prompt_that_leaves_no_room_is_named_with_all_others(one_device):
    prompts = [("fits", "def f():\n"), ("long", "x" * 600), ("longer", "y" * 700)]
    with pytest.raises(ValueError, match=r"2 prompt\(s\).*512 positions: long: 601 tokens and 64 .*longer: 701"):
        drawn(prompts)


# --- one prefill, few compilations ----------------------------------------------------------------


def test_what_leaves_no_room_is_known_before_it_is_asked(one_device):
    who = sampler()
    room = who.cfg.max_length - 8
    prompts = [(str(size), "x" * size) for size in (1, room // 2, 2 * room, 3 * room)]
    lengths = {name: len(text.encode_prompt(who.tokenizer, prompt)) for name, prompt in prompts}
    assert who.too_long(prompts, max_tokens=8) == {name for name, length in lengths.items() if length > room} != set()
    left = [item for item in prompts if item[0] not in who.too_long(prompts, max_tokens=8)]
    assert len([*who.generate(left, n=1, max_tokens=8)]) == len(left) > 0


@pytest.fixture
def prefills(monkeypatch):
    """The shapes of prompts that are run, as they are run."""
    shapes, run = [], slots.prefill

    def prefill(cfg, params, prefix, offset, tokens, lengths):
        shapes.append(tokens.shape)
        return run(cfg, params, prefix, offset, tokens, lengths)

    monkeypatch.setattr(slots, "prefill", prefill)
    return shapes


def test_a_prompt_is_run_once_for_all_its_samples(prefills, one_device):
    answers = drawn(n=4, batch_size=16)
    assert [rows for rows, _ in prefills] == [4, 4, 4]  # 12 prompts, 4 at a time, whatever n is
    assert all(len(completions) == 4 for completions in answers.values())


SHOT = "# Double it.\ndef double(x):\n    return 2 * x\n\n\n# Halve it.\ndef halve(x):\n    return x / 2\n\n\n"


def test_a_common_start_is_run_once_and_changes_nothing(prefills, monkeypatch):
    prompts = [(name, SHOT + prompt[-60:]) for name, prompt in PROMPTS]
    settings = {"prompts": prompts, "max_tokens": 24, "batch_size": 12}
    with on(2, 2, 2):
        shared = drawn(**settings)
        assert prefills[0] == (4, 96) and {width for _, width in prefills[1:]} <= {24, 32, 48, 64}
        monkeypatch.setattr(decode, "WORTH_SHARING", 10**6)
        alone = drawn(**settings)
        assert ids_of(shared) == ids_of(alone)
        for one, other in zip(shared[PROMPTS[0][0]], alone[PROMPTS[0][0]], strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_one_prompt_alone_shares_all_but_its_last_token(prefills, one_device):
    name, prompt = PROMPTS[0]
    size = len(text.encode_prompt(text.load(TINY), prompt * 3))
    drawn([(name, prompt * 3)], n=2, max_tokens=4)
    assert size > 64 and prefills[0][1] >= size - 1 and prefills[1:] == [(1, 24)]


def test_a_second_call_compiles_nothing(one_device):
    """Neither for other prompts, seeds and limits; nor does a slot that is filled again."""
    who, functions = sampler(), (slots.prefill, slots.admit, slots.decode)
    drawn(who=who, seed=1)
    before = [function._cache_size() for function in functions]
    drawn(PROMPTS[::-1], who=who, seed=2, limits=SPREAD | {PROMPTS[10][0]: 64})  # the longest stays the longest
    assert [function._cache_size() for function in functions] == before


# --- slots ----------------------------------------------------------------------------------------

SPREAD = {name: 3 + 7 * (5 * i % 12) % 61 for i, (name, _) in enumerate(PROMPTS)}


@pytest.mark.parametrize("batch_size, chunk", [(5, 32), (16, 3)])
def test_limits_of_their_own_cut_the_same_samples(batch_size, chunk, expected, one_device):
    """Slots are filled again and again, at other columns of the ring, beside others that go on."""
    got = drawn(limits=SPREAD, batch_size=batch_size, chunk=chunk)
    assert len(set(SPREAD.values())) > 8 and max(SPREAD.values()) <= 64
    for name, completions in got.items():
        for mine, whole in zip(completions, expected[name], strict=True):
            assert mine.ids == whole.ids[:SPREAD[name]]
            assert mine.finish == ("stop" if mine.ids[-1] == 2 else "length")


def test_a_ring_has_one_of_few_sizes():
    sizes = [decode._columns(needed, 2000) for needed in (0, 128, 129, 257, 384, 385, 513, 769, 1025, 1537, 2000)]
    assert sizes == [128, 128, 256, 384, 384, 512, 768, 1024, 1536, 2000, 2000]


def test_a_ring_that_grows_and_shrinks_changes_no_sample(monkeypatch, expected, one_device):
    resized = []
    columns = decode._columns
    monkeypatch.setattr(decode, "_columns", lambda needed, most: min(columns(4 * needed, 4096) // 4, most))
    resize = slots.resize
    monkeypatch.setattr(slots, "resize", lambda *args, ring: (resized.append(ring), resize(*args, ring=ring)))
    assert ids_of(drawn(limits=SPREAD | {PROMPTS[0][0]: 64}, batch_size=4, chunk=8)) == {
        name: [ids[:64 if name == PROMPTS[0][0] else SPREAD[name]] for ids in rows]
        for name, rows in ids_of(expected).items()}
    steps = np.sign(np.diff(resized))
    assert 1 in steps and -1 in steps


def test_the_layout_of_another_platform_gives_the_same_samples(monkeypatch, expected, one_device):
    monkeypatch.setattr(slots, "LAYOUTS", {"cpu": slots.LAYOUTS["tpu"]})
    jax.clear_caches()  # what was compiled before knows nothing of it
    got = drawn(limits=SPREAD, batch_size=8)
    jax.clear_caches()
    assert ids_of(got) == {name: [ids[:SPREAD[name]] for ids in rows] for name, rows in ids_of(expected).items()}


@pytest.mark.parametrize("platform, least, apart", [
    ("cpu", 4, 11), pytest.param("gpu", 4, 11, marks=pytest.mark.slow), ("gpu", 8, 3), ("gpu", 4, 1)])
def test_slots_stay_busy_while_long_and_short_answers_mix(platform, least, apart, one_device, monkeypatch):
    """Also where it is looked for ended answers as seldom as on a GPU."""
    with monkeypatch.context() as there:
        there.setattr(slots, "mesh", SimpleNamespace(platform=lambda: platform))
        look = slots.before_a_look(least + 11 * apart)
    monkeypatch.setattr(slots, "before_a_look", lambda limit: look)
    who = dataclasses.replace(sampler(), stop_ids=(-1,))  # nothing ends but by its limit
    limits = {name: least + apart * i for i, (name, _) in enumerate(PROMPTS)}
    answers = drawn(who=who, n=8, limits=limits, batch_size=16)
    assert all(len(c.ids) == limits[name] for name, completions in answers.items() for c in completions)
    assert who.work.tokens == 8 * sum(limits.values()) and who.work.seconds > 0
    assert who.work.busy == who.work.tokens / who.work.slot_steps > 0.85


def test_slots_stay_busy_where_nobody_knows_when_an_answer_ends(one_device):
    """By one token of sixteen that ends it: most answers are short, some ten times as long."""
    who = dataclasses.replace(sampler(), stop_ids=tuple(range(0, sampler().cfg.V, 16)))
    lengths = [len(c.ids) for answers in drawn(who=who, n=32, max_tokens=128, batch_size=16).values() for c in answers]
    assert np.std(lengths) > 0.8 * np.mean(lengths) and max(lengths) > 64
    assert who.work.busy > 0.85


@pytest.mark.parametrize("biases", [False, True])
def test_weights_are_laid_out_without_being_held_twice(biases, any_mesh):
    cfg = model.ModelConfig(L=2, D=32, N=4, K=2, H=16, F=48, V=64, qkv_bias=biases, o_bias=biases)
    params = model.init(cfg, 0)
    kept = slots.prepare(cfg, params)
    taken = slots.prepare(cfg, params, keep=False)
    jax.tree.map(np.testing.assert_array_equal, taken, kept)
    assert all(stack.is_deleted() for stack in params["layers"].values()) and not taken["embed"].is_deleted()


def test_the_caches_are_updated_in_place(one_device):
    """No step may copy a cache: what the compiler sets aside is less than one layer's."""
    cfg = model.ModelConfig(L=2, D=32, N=4, K=2, H=16, F=48, V=64)
    params = slots.prepare(cfg, model.init(cfg, 0))
    state = slots.empty(cfg, slots=8, ring=2048, dtype="float32")
    table = decode._table([None] * 8, 0, 0)
    compiled = slots.decode.lower(cfg, params, [()] * 2, state, table, 0, 8, temperature=1.0, top_p=1.0,
                                  stop_ids=(2,), chunk=4).compile().memory_analysis()
    caches = sum(x.nbytes for x in jax.tree.leaves(state["caches"]))
    assert compiled.alias_size_in_bytes >= caches
    assert compiled.temp_size_in_bytes < caches / 2


# --- the distribution -----------------------------------------------------------------------------


def nucleus(probs: np.ndarray, top_p: float) -> np.ndarray:
    """The definition: the smallest set of most probable tokens whose mass reaches top_p, renormalised."""
    order = np.argsort(-probs)
    size = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1 if top_p < 1 else len(probs)
    kept = np.zeros_like(probs)
    kept[order[:size]] = probs[order[:size]]
    return kept / kept.sum()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """The p-value of the counts, cells of fewer than five pooled; a token that cannot be drawn must not be."""
    assert (counts[expected == 0] == 0).all()
    large = expected >= 5
    cells = np.array([[*x[large], x[~large].sum()] for x in (counts, expected)])
    return scipy.stats.chisquare(*cells[:, cells[1] > 0]).pvalue if large.sum() > 1 else 1.0


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.9), (1.0, 0.5), (1.0, 1e-6)])
def test_tokens_are_drawn_with_their_probabilities(temperature, top_p, one_device):
    draws, logits = 50_000, np.random.default_rng(0).normal(size=40)
    uniform = jax.random.uniform(jax.random.key(0), (2, draws))
    tiled = jnp.tile(logits.astype(np.float32)[:, None], draws)
    got, logps = slots._choose(tiled, uniform, temperature=temperature, top_p=top_p)
    counts = np.bincount(np.asarray(got), minlength=40)
    assert chi_square(counts, draws * nucleus(scipy.special.softmax(logits / temperature), top_p)) > 1e-3
    np.testing.assert_allclose(logps, scipy.special.log_softmax(logits)[got], atol=1e-5)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("V", [5, 6, 36])  # blocks of 1, 2 and 6 tokens
def test_the_ends_of_the_unit_interval_give_possible_tokens(top_p, V):
    logits = jnp.full((V, 2), -1e9).at[jnp.array([1, 3])].set(jnp.array([[3.0], [2.0]]))
    ends = jnp.array([[0.0, 1.0 - 2.0**-24]] * 2)
    token, _ = slots._choose(logits, ends, temperature=1.0, top_p=top_p)
    assert sorted(token.tolist()) == [1, 3]


@pytest.mark.parametrize("top_p", [0.999, 0.95, 0.5, 1e-6])
def test_the_nucleus_is_the_smallest_set(top_p):
    probs = scipy.special.softmax(np.random.default_rng(1).normal(scale=4, size=(1000, 20)), axis=0)
    mass = jnp.array(probs / probs.max(0), jnp.float32)
    kept = np.asarray(jnp.log(mass) >= slots._nucleus(jnp.log(mass), mass, top_p))
    for column, mine in zip(probs.T, kept.T, strict=True):
        assert (mine == (nucleus(column, top_p) > 0)).all()


def test_first_tokens_follow_the_model(one_device):
    """End to end: 2,000 first tokens of one prompt against the softmax of transformers."""
    name, prompt = PROMPTS[0]
    ids = text.encode_prompt(text.load(TINY), prompt)
    lm = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.no_grad():
        probs = nucleus(lm(torch.tensor([ids])).logits[0, -1].double().softmax(-1).numpy(), 0.8)
    answers = drawn([(name, prompt)], n=2000, batch_size=2000, temperature=1.0, top_p=0.8, max_tokens=1)[name]
    counts = np.bincount([c.ids[0] for c in answers], minlength=288)
    assert chi_square(counts, 2000 * probs) > 1e-3


# --- the command ----------------------------------------------------------------------------------


COMMAND = [sys.executable, "-m", "align_jax.sample", "--config=configs/sample.py:smoke"]
HOW = {"cwd": ROOT, "text": True, "env": {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}}


def command(*overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *overrides], capture_output=True, timeout=300, **HOW)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_interrupted_command_ends_in_one_line_and_continues(tmp_path):
    run = f"--config.run={tmp_path}"
    # What is started in the background of a shell ignores Ctrl-C, and so would its children.
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); " \
              "runpy.run_module('align_jax.sample', run_name='__main__')"
    asked = subprocess.Popen([sys.executable, "-c", heeding, *COMMAND[3:], run, "--config.sample.n=4",
                              "--config.sample.max_tokens=128"], stderr=subprocess.PIPE, **HOW)
    part = tmp_path / "samples.jsonl.partial"
    while asked.poll() is None and not (part.is_file() and part.stat().st_size):
        time.sleep(0.01)
    asked.send_signal(signal.SIGINT)
    assert asked.communicate()[1].splitlines()[-1] == "interrupted; the same command continues"
    assert asked.returncode == 130 and part.stat().st_size
    done = command(run, "--config.sample.n=4", "--config.sample.max_tokens=128")
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(300)
def test_the_command_answers_a_file_resumes_and_refuses_another_setting(tmp_path):
    run = f"--config.run={tmp_path}"
    done = command(run)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    found = records.read(path, records.Sample)
    assert [s.id for s in found] == [f"{name}/{k}" for name, _ in PROMPTS for k in (0, 1)]
    assert f"{path}: wrote 24 samples of 12 prompts" in done.stdout + done.stderr

    # Killed halfway: some prompts are answered, one in part, the last line is torn.
    lines = whole.splitlines(keepends=True)
    (tmp_path / "samples.jsonl.partial").write_bytes(b"".join(lines[:9]) + lines[9][:30])
    path.unlink()
    again = command(run)
    assert again.returncode == 0, again.stderr
    rows, before = ([json.loads(line) for line in raw.splitlines()] for raw in (path.read_bytes(), whole))
    assert [row | {"logp": None} for row in rows] == [row | {"logp": None} for row in before]
    assert [row["logp"] for row in rows] == pytest.approx([row["logp"] for row in before], abs=1e-3)

    other = command(run, "--config.sample.n=3")
    assert other.returncode != 0 and "sample.n: this run 3, in the folder 2" in other.stderr
