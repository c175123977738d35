"""The train step: torch's log-probs, TRL's three steps, the same numbers on every mesh, and no [R T V] array."""

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from align_jax import data, hf, logprob, losses, mesh, model, optim, records, text
from align_jax.step import Compute, TrainState, completion_logps, make_scorer, make_step, objective, score_tokens

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
TRL = json.loads((GOLDEN / "trl.json").read_text())
FP32 = Compute(dtype="float32", remat="none", chunk=64)
T = 384  # holds the two longest pairs


def on(*shape):
    return jax.set_mesh(mesh.make(*shape, devices=jax.devices()[:math.prod(shape)]))


@functools.cache
def encoded(kind=records.Pair) -> list[data.Encoded]:
    """The twelve pairs, or their chosen sides as examples, as ids."""
    pairs = records.read(GOLDEN / "pairs.jsonl", records.Pair)
    if kind is records.Example:
        pairs = [records.Example(id=p.id, prompt=p.prompt, completion=p.chosen) for p in pairs]
    dropped = Counter()
    found = list(data.encode_all(enumerate(pairs), text.load(TINY), dropped=dropped, max_length=T))
    assert not dropped
    return found


def batch_of(layout: Sequence[Sequence[int]], kind=records.Pair, *, P=2, T=T, row=data.row) -> dict:
    """A batch whose rows hold exactly these examples, on the mesh that is set; the references are TRL's, in float64."""
    C = len(data.COMPLETIONS[kind])
    ref = {pair["id"]: pair["logps"][:C] for pair in TRL["pairs"]}
    made = [row([encoded(kind)[i] for i in members], T=T, P=P, C=C, ref_logps=ref) for members in layout]
    stacked = {name: np.stack([row[name] for row in made]) for name in made[0]}
    return {name: jax.device_put(value, mesh.sharding("rows", *(None,) * (value.ndim - 1)))
            for name, value in stacked.items()}


def unshared_row(examples, *, T: int, P: int, C: int, ref_logps) -> dict[str, np.ndarray]:
    """The layout in which every completion has a prompt of its own: a segment each."""
    sides = [data.Encoded(f"{p}-{c}", e.prompt, (e.completions[c],)) for p, e in enumerate(examples) for c in range(C)]
    row = data.row(sides, T=T, P=P * C, C=1)
    pairs = data.row(examples, T=T, P=P, C=C, ref_logps=ref_logps)
    return row | {name: pairs[name] for name in ("ref_logps", "weight")}  # slots p * C + c are the same numbers


def load():
    return hf.load(TINY, dtype="float32")


def start(params, tx) -> TrainState:
    return TrainState(jax.device_put(np.int32(0), mesh.sharding()), params, jax.jit(tx.init)(params))


def flat(params) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def to_floats(metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


# --- log-probs ------------------------------------------------------------------------------------


def test_token_logps_are_those_of_torch(one_device):
    cfg, params = load()
    lm = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float64)
    layout = [[0, 1], [2, 3], [4], [10, 11]]
    batch = batch_of(layout)
    got = np.asarray(jax.jit(lambda params: score_tokens(cfg, params, batch, compute=FP32))(params))
    slots, checked = np.asarray(batch["slots"]), 0
    assert (got[slots < 0] == 0).all()
    for row, where, members in zip(got, slots, layout, strict=True):
        for p, i in enumerate(members):
            for c, completion in enumerate(encoded()[i].completions):
                ids = torch.tensor(np.concatenate([encoded()[i].prompt, completion]))[None].long()
                with torch.no_grad():
                    logps = lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                np.testing.assert_allclose(row[where == 2 * p + c], logps[-len(completion):], rtol=0, atol=1e-5)
                checked += len(completion)
    assert checked == (slots >= 0).sum()


def test_completion_logps_are_those_of_trl(any_mesh):
    cfg, params = load()
    layout = [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9], [], [10, 11]]
    got = np.asarray(make_scorer(cfg, compute=FP32)(params, batch_of(layout)))
    for row, values in zip(layout, got, strict=True):
        for i, logps in zip(row, values, strict=False):
            np.testing.assert_allclose(logps, TRL["pairs"][i]["logps"], rtol=1e-6)


def test_tokens_are_trls():
    for mine, theirs in zip(encoded(), TRL["pairs"], strict=True):
        assert mine.prompt.tolist() == theirs["prompt_ids"]
        assert [ids.tolist() for ids in mine.completions] == [theirs["chosen_ids"], theirs["rejected_ids"]]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_shared_prompt_changes_no_logp_and_no_gradient(shape):
    """Against rows in which every completion has a prompt of its own: equal, but for the order of float32 sums."""
    layout = [[0, 1], [2], [3, 9], [4]]
    with on(*shape):
        cfg, params = load()
        score = make_scorer(cfg, compute=FP32)
        shared, unshared = (np.asarray(score(params, batch_of(layout, row=row))) for row in (data.row, unshared_row))
        np.testing.assert_allclose(shared, unshared, rtol=1e-6, atol=0)
        got, expected = (one_step("dpo", layout, row=row) for row in (data.row, unshared_row))
    assert np.linalg.norm(got[0] - expected[0]) <= 1e-5 * np.linalg.norm(expected[0])
    assert got[1] == pytest.approx(expected[1] | {"tokens": got[1]["tokens"]}, rel=1e-5, abs=1e-4)


def test_neighbours_and_padding_change_no_logp(one_device):
    cfg, params = load()
    score = make_scorer(cfg, compute=FP32)
    alone = score(params, batch_of([[0], [1], [3], [9]]))[:, 0]
    first = score(params, batch_of([[0, 1, 3, 9]], P=4))[0]
    last = score(params, batch_of([[9, 3, 1, 0]], P=4))[0][::-1]
    roomy = score(params, batch_of([[0], [1], [3], [9]], P=3, T=500))[:, 0]
    for packed in (first, last, roomy):
        np.testing.assert_allclose(packed, alone, rtol=1e-6, atol=0)


def test_neither_side_of_a_pair_sees_the_other(one_device):
    """Another rejected completion leaves every bit of the chosen one's log-probs, and the other way round."""
    cfg, params = load()
    score = jax.jit(lambda params, batch: score_tokens(cfg, params, batch, compute=FP32))
    batch = batch_of([[0, 1]])
    slots = np.asarray(batch["slots"])
    before = np.asarray(score(params, batch))
    for c in (0, 1):
        changed = np.where(slots % 2 == c, (np.asarray(batch["tokens"]) + 7) % cfg.V, np.asarray(batch["tokens"]))
        tokens = jax.device_put(np.where(slots >= 0, changed, batch["tokens"]).astype(np.int32),
                                mesh.sharding("rows", None))
        after = np.asarray(score(params, batch | {"tokens": tokens}))
        mine, other = (slots >= 0) & (slots % 2 == c), (slots >= 0) & (slots % 2 != c)
        assert (after[other] == before[other]).all() and (after[mine] != before[mine]).mean() > 0.9


def test_only_completion_tokens_count(one_device):
    """The counts are the lengths of the completions; slots without an example count nothing."""
    cfg, params = load()
    _, lengths = completion_logps(cfg, params, batch_of([[0, 1], [4], []]), compute=FP32)
    ids = [[len(pair[side]) for side in ("chosen_ids", "rejected_ids")] for pair in TRL["pairs"]]
    assert lengths.tolist() == [[ids[0], ids[1]], [ids[4], [0, 0]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_chunk_changes_no_logp(chunk, one_device):
    cfg, params = load()
    batch = batch_of([[0, 1], [2, 3]])
    whole, chunked = (make_scorer(cfg, compute=Compute(dtype="float32", remat="none", chunk=size))(params, batch)
                      for size in (T, chunk))
    np.testing.assert_allclose(chunked, whole, rtol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
def test_large_logits_have_a_finite_gradient(keep, one_device):
    """Also where the last chunk has places left over, whose logits would overflow."""
    rng = np.random.default_rng(0)
    head, x = (jnp.asarray(rng.normal(size=shape) * 20, jnp.float32, out_sharding=mesh.sharding(*axes))
               for shape, axes in (((64, 8), ("vocab", "embed")), ((1, 16, 8), ("rows", None, None))))
    tokens, sources = (jax.device_put(np.arange(16, dtype=np.int32)[None] - by, mesh.sharding("rows", None))
                       for by in (0, 0))
    is_scored = tokens < 10

    def loss(logps):
        return lambda head, x: jnp.sum(jnp.where(is_scored, logps(head, x), 0.0))

    fused = loss(lambda head, x: logprob.of_tokens(head, x, tokens, sources, is_scored, 8, keep))
    got = jax.grad(fused, (0, 1))(head, x)
    dense = jax.grad(loss(lambda head, x: jax.nn.log_softmax(x @ head.T)[0, jnp.arange(16), tokens[0]]), (0, 1))
    expected = dense(np.asarray(head), np.asarray(x))
    assert np.abs(np.asarray(x)[0] @ np.asarray(head).T).max() > 1000
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-3)


def test_the_embedding_of_a_frequent_token_has_its_whole_gradient_in_bfloat16(any_mesh):
    """Summed in bfloat16, 4,096 equal parts would stop growing at 256."""
    table = jax.device_put(np.ones((96, 8), np.float32), mesh.sharding("vocab", "embed"))
    tokens = jax.device_put(np.full((8, 512), 7, np.int32), mesh.sharding("rows", None))
    gradient = jax.jit(jax.grad(lambda table: jnp.sum(
        model.embed({"embed": table}, tokens, jnp.bfloat16).astype(jnp.float32))))(table)
    assert (np.asarray(gradient) == 4096 * (np.arange(96) == 7)[:, None]).all()


# --- three steps of TRL ---------------------------------------------------------------------------


def kind_of(name: str) -> type:
    return records.Example if name == "sft" else records.Pair


def trl_steps(name: str) -> list[dict]:
    """Three steps of a golden run, each on exactly the examples of TRL's step, as make_step logs them."""
    golden = TRL["runs"][name]
    hyper = {key: value for key, value in golden["trl"].items() if key == "beta"}
    rates = jnp.array([step["learning_rate"] for step in golden["steps"]])
    tx = optim.adamw(steps=3, lr=1e-3, decay="constant")
    if name.endswith("_schedule"):  # ours but for the schedule: TRL's first step has rate 0, ours trains
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(
            lambda step: rates[step], weight_decay=golden["trl"]["weight_decay"], mask=optim.decays))
    cfg, params = load()
    step = make_step(cfg, objective(golden["loss"], **hyper), tx, compute=FP32)
    state, logged = start(params, tx), []
    for at in (0, 4, 8):
        state, metrics = step(state, batch_of([[at, at + 1], [at + 2, at + 3]], kind_of(name)))
        logged.append(to_floats(metrics))
    assert step._cache_size() == 1
    return logged


@pytest.mark.parametrize("name", TRL["runs"])
def test_three_steps_are_trls(name, one_device):
    golden, beta = TRL["runs"][name]["steps"], TRL["runs"][name]["trl"].get("beta")
    for mine, theirs in zip(trl_steps(name), golden, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)  # before the clip at 1
        assert mine["examples"] == len(theirs["ids"])
        for key in (key for key in theirs if key.startswith(("rewards/", "logps/"))):
            if key == "rewards/accuracies" and theirs["rewards/margins"] == 0:
                continue  # ties, and here the references have other rounding errors
            nats = 1e-4 * (beta if key.startswith("rewards") else 1)
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=nats), key
        if name == "sft":
            assert mine["logps/completion"] == pytest.approx(np.mean(theirs["policy"]), rel=1e-5)


def test_what_decays_is_what_decays_in_transformers(one_device):
    """Hugging Face's rule, all but norms and biases, through the table of names: nothing is listed twice."""
    cfg, params = load()
    leaves = {path: decays for path, decays in
              ((jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
               for path, leaf in jax.tree_util.tree_leaves_with_path(optim.decays(params)))}
    ours = {name.format(layer) for name, path, _ in hf.TABLE if leaves.get(path) for layer in range(cfg.L)}
    assert ours == set(TRL["decayed"])
    biased = model.init(model.ModelConfig(L=1, D=8, N=2, K=2, H=4, F=8, V=8, qkv_bias=True, o_bias=True), 0)
    assert not any(optim.decays(biased)["layers"][f"{name}_bias"] for name in "qkvo")


# --- meshes, accumulation, remat ------------------------------------------------------------------

OBJECTIVES = {"sft": {}, "dpo": {"beta": 0.1}, "bonbon": {"n": 8, "alpha": 0.005}}
LAYOUT = [[0, 1], [2], [3, 9], [4], [5, 6], [7], [8, 10], [11]]


def five_steps(name: str) -> list[dict]:
    cfg, params = load()
    tx = optim.adamw(steps=5, lr=1e-4, warmup=0.2)
    step = make_step(cfg, objective(name, **OBJECTIVES[name]), tx, compute=FP32)
    state, logged = start(params, tx), []
    for i in range(5):
        state, metrics = step(state, batch_of(LAYOUT[i:] + LAYOUT[:i], kind_of(name)))
        logged.append(to_floats(metrics))
    assert step._cache_size() == 1
    return logged


@pytest.fixture(scope="module")
def on_one_device():
    @functools.cache
    def run(name):
        with on(1, 1, 1):
            return five_steps(name)
    return run


@pytest.mark.parametrize("name", OBJECTIVES)
def test_five_steps_on_every_mesh(name, any_mesh, on_one_device):
    expected = on_one_device(name)
    got = expected if any_mesh == (1, 1, 1) else five_steps(name)
    assert [m["loss"] for m in got] == pytest.approx([m["loss"] for m in expected], rel=1e-5)
    assert [m["grad_norm"] for m in got] == pytest.approx([m["grad_norm"] for m in expected], rel=1e-4)
    assert expected[-1]["loss"] < expected[0]["loss"] * (1 - 1e-3)  # it trains: equal losses are not frozen ones


@functools.cache
def descent(name: str, compute: Compute):
    """Plain descent: what it takes off the parameters is the gradient. One compilation for all tests of a mesh."""
    cfg, tx = hf.config(TINY), optax.sgd(1.0)
    return make_step(cfg, objective(name, **OBJECTIVES[name]), tx, compute=compute), tx


def one_step(name: str, layout, *, shift=1.0, row=data.row, **compute):
    """The gradient, by one step of plain descent, and the metrics; `shift` takes the references off the policy."""
    step, tx = descent(name, Compute(**{"dtype": "float32", "remat": "none", "chunk": 64} | compute))
    _, params = load()
    before = flat(params)
    batch = batch_of(layout, kind_of(name), row=row)
    batch["ref_logps"] = batch["ref_logps"] + shift * jnp.arange(-1.0, 1.0, 2 / batch["weight"].shape[-1])
    state, metrics = step(start(params, tx), batch)
    return before - flat(state.params), to_floats(metrics)


UNEVEN = [[0, 1], [9], [4], []]  # micro-batches of other numbers of examples and tokens


@pytest.fixture(scope="module")
def plain():
    @functools.cache
    def run(name):
        with on(1, 1, 1):
            return one_step(name, UNEVEN)
    return run


def assert_same_step(got, expected, rtol):
    assert np.linalg.norm(got[0] - expected[0]) <= rtol * np.linalg.norm(expected[0])
    assert got[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name, num_micro", [("sft", 2), ("sft", 4), ("dpo", 4), ("bonbon", 2)])
def test_accumulation_gives_the_update_of_the_whole_batch(name, num_micro, plain, one_device):
    assert_same_step(one_step(name, UNEVEN, accumulate=num_micro), plain(name), 1e-5)


def test_the_reference_pass_takes_micro_batches_too(any_mesh):
    cfg, params = load()
    whole, parts = (make_scorer(cfg, compute=dataclasses.replace(FP32, accumulate=count))(params, batch_of(LAYOUT * 2))
                    for count in (1, 2))
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-5)


def test_accumulation_over_a_mesh(plain):
    with on(1, 2, 2):
        assert_same_step(one_step("dpo", UNEVEN, accumulate=2), plain("dpo"), 1e-5)


def test_accumulation_that_does_not_divide_is_refused():
    with on(1, 4, 1), pytest.raises(ValueError, match="4 rows do not divide into 2 micro-batches on 4 row shards"):
        one_step("dpo", UNEVEN, accumulate=2)


@pytest.mark.parametrize("remat", ["full", "mixed", "dots", "offload"])
def test_remat_and_chunk_give_the_same_gradient(remat, plain, one_device):
    assert_same_step(one_step("dpo", UNEVEN, remat=remat, chunk=32), plain("dpo"), 1e-5)


@pytest.mark.parametrize("sizes, compute", [
    ((1, 1, 1), {"chunk": 50, "accumulate": 2}), ((2, 1, 2), {"chunk": 32}), ((1, 2, 2), {"chunk": 50})], ids=str)
def test_kept_logits_give_the_same_gradient(sizes, compute, plain):
    with on(*sizes):
        assert_same_step(one_step("dpo", UNEVEN, keep_logits=True, **compute), plain("dpo"), 1e-5)


def test_kept_logits_in_bfloat16_change_gradients_by_their_rounding(one_device):
    rng = np.random.default_rng(0)

    def put(x, *axes):
        return jax.device_put(x, mesh.sharding(*axes))

    head = put(rng.normal(size=(512, 64)).astype(jnp.bfloat16), "vocab", "embed")
    x = put(rng.normal(size=(2, 40, 64)).astype(jnp.bfloat16), "rows", None, None)
    tokens, sources = (put(rng.integers(0, size, (2, 40)).astype(np.int32), "rows", None) for size in (512, 40))

    def gradients(keep: bool):
        return jax.grad(lambda head, x: jnp.sum(logprob.of_tokens(head, x, tokens, sources, tokens > 100, 16, keep) *
                                                jnp.sin(tokens)), (0, 1))(head, x)

    for again, kept in zip(gradients(False), gradients(True), strict=True):
        again, kept = (np.asarray(x, np.float32) for x in (again, kept))
        assert 0 < np.linalg.norm(kept - again) < 2**-8 * np.linalg.norm(again)


@pytest.mark.parametrize("remat", ["none", "mixed"])
def test_unrolled_layers_give_the_same_gradient(remat, plain, one_device):
    assert_same_step(one_step("dpo", UNEVEN, remat=remat, unroll=True), plain("dpo"), 1e-5)


def test_an_example_counts_the_same_wherever_it_lies(plain, one_device):
    assert_same_step(one_step("bonbon", [[], [4, 9], [], [1, 0]]), plain("bonbon"), 1e-5)


# --- memory ---------------------------------------------------------------------------------------


def lowered_step(chunk: int, **compute):
    """Logits of all tokens, and the DPO step of a model whose vocabulary is its largest axis."""
    R, T, V = 4, 512, 32_000
    cfg = model.ModelConfig(L=2, D=32, N=1, K=1, H=32, F=64, V=V)
    tx = optim.adamw(steps=1, lr=1e-3)
    batch = {name: jnp.zeros((R, T), jnp.int32, out_sharding=mesh.sharding("rows", None))
             for name in ("tokens", "positions", "segments", "branches", "sources", "slots")}
    batch |= {name: jnp.zeros((R, 4, 2), out_sharding=mesh.sharding("rows", None, None))
              for name in ("ref_logps", "weight")}
    compute = Compute(dtype="float32", remat="full", chunk=chunk, **compute)
    step = make_step(cfg, objective("dpo", beta=0.1), tx, compute=compute)
    return R * T * V, step.lower(start(model.init(cfg, 0), tx), batch)


def largest(compiled) -> int:
    """Elements of the largest array anywhere in the compiled program, fused ones included."""
    shapes = re.findall(r"\b(?:pred|[subf]f?\d+)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_no_array_of_rows_by_positions_by_vocabulary(one_device):
    logits, lowered = lowered_step(chunk=64)
    compiled = lowered.compile()
    assert largest(compiled) == logits // 32  # the logits of one chunk, [64 V]
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * logits / 4
    # The same two measures do see it where it is.
    logits, lowered = lowered_step(chunk=2048)
    whole = lowered.compile()
    assert largest(whole) == logits
    assert whole.memory_analysis().temp_size_in_bytes > 4 * logits


def test_kept_logits_are_made_once(one_device):
    def products(**compute):
        return len(re.findall(r"dot_general.*32000", lowered_step(chunk=64, **compute)[1].as_text()))

    assert (products(), products(keep_logits=True)) == (4, 3)


# --- objectives and metrics -----------------------------------------------------------------------


def test_at_the_reference_dpo_is_ln_2_and_bonbon_its_closed_form(one_device):
    assert one_step("dpo", UNEVEN, shift=0.0)[1]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    metrics = one_step("bonbon", UNEVEN, shift=0.0)[1]
    nll = -np.mean([TRL["pairs"][i]["logps"][0] for row in UNEVEN for i in row])
    assert metrics["loss/ipo"] == pytest.approx((1 / (2 * losses.beta_star(8))) ** 2, rel=1e-4)
    assert metrics["loss/sft"] == pytest.approx(nll, rel=1e-5)
    assert metrics["loss"] == pytest.approx(0.005 * metrics["loss/sft"] + 0.995 * metrics["loss/ipo"], rel=1e-6)


def test_counts_are_of_real_examples_and_tokens(plain):
    metrics = plain("dpo")[1]
    pairs = [TRL["pairs"][i] for row in UNEVEN for i in row]
    answers = sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)
    assert metrics["examples"] == len(pairs)
    assert metrics["scored"] == answers
    assert metrics["tokens"] == answers + 2 * sum(len(p["prompt_ids"]) for p in pairs)


def test_a_batch_without_examples_changes_nothing(one_device):
    gradient, metrics = one_step("dpo", [[], [], [], []])
    assert (gradient == 0).all() and metrics["loss"] == 0


def test_an_unknown_objective_says_which_there_are():
    with pytest.raises(ValueError, match="objective: got 'ppo', available are .*'bonbon'.*'dpo'"):
        objective("ppo")
