"""Adapters beside frozen weights: peft's log-probs and steps, autodiff's gradient, one base that nothing changes."""

import functools
import importlib.util
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import on_mesh

from align_jax import data, hf, log, lora, mesh, model, optim, records, text, train
from align_jax.step import Compute, TrainState, make_scorer, make_step, objective

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = GOLDEN / "tiny"
PEFT = json.loads((GOLDEN / "peft.json").read_text())
PAIRS = json.loads((GOLDEN / "trl.json").read_text())["pairs"]
FP32 = Compute(dtype="float32", remat="none", chunk=64)
RANK, ALPHA = PEFT["lora"]["r"], PEFT["lora"]["lora_alpha"]
SMALL = model.ModelConfig(L=2, D=32, N=4, K=2, H=8, F=48, V=96, qkv_bias=True, o_bias=True, init_scale=0.3)


def batch_of(layout) -> dict:
    """A batch whose rows hold these pairs; the references are the base's, in float64."""
    pairs = list(data.encode_all(enumerate(records.read(GOLDEN / "pairs.jsonl", records.Pair)), text.load(TINY),
                                 dropped=Counter(), max_length=384))
    ref = {pair["id"]: pair["logps"] for pair in PAIRS}
    return {name: jax.device_put(value, mesh.sharding("rows", *(None,) * (value.ndim - 1)))
            for name, value in data.batch(pairs, layout, T=256, P=1, C=2, ref_logps=ref).items()}


def to_host(tree):
    return jax.tree.map(np.array, tree)


@functools.cache
def loaded():
    """The tiny checkpoint with fresh adapters, on the host."""
    with on_mesh(1, 1, 1):
        cfg, params = hf.load(TINY, dtype="float32")
        cfg = lora.config(cfg, rank=RANK, alpha=ALPHA)
        return cfg, to_host(lora.add(cfg, params, seed=0))


def adapted(b: float):
    """With the adapters of the tool that made peft.json: in peft's layout, the k-th is a sine of k times 0, 1, 2 ..."""
    cfg, params = loaded()
    names = [(layer, name + side) for layer in range(cfg.L) for name in ("q", "k", "v", "o", "gate", "up", "down")
             for side in ("_a", "_b")]
    for k, (layer, name) in enumerate(names, 1):
        into = params["layers"][name][layer]
        sine = np.sin(k * np.arange(into.size, dtype=np.float64))
        is_a = name.endswith("_a")  # [r in] there, and B [out r]
        into[:] = (0.2 * sine.reshape(RANK, -1).T if is_a else b * sine.reshape(-1, RANK).T).reshape(into.shape)
    return cfg, jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding.spec), params, model.abstract(cfg))


# --- what peft makes of the same adapters ---------------------------------------------------------


@functools.cache
def dpo_step(cfg, shape):
    """Compiled once for the runs on a mesh."""
    tx = optim.adamw(steps=3, lr=1e-3, decay="constant")
    return make_step(cfg, objective("dpo", beta=0.1), tx, compute=FP32), tx


@functools.cache
def scorer():
    """Log-probs of the twelve pairs by a model without adapters, [12 C]."""
    score = make_scorer(hf.config(TINY), compute=FP32)
    return lambda params: np.asarray(score(params, batch_of([[i] for i in range(12)])))[:, 0]


@pytest.mark.parametrize("name, shape", [("fresh", (1, 1, 1)), ("underway", (1, 1, 1)), ("underway", (2, 2, 2))])
def test_three_steps_are_those_of_trl_with_peft(name, shape):
    golden = PEFT["runs"][name]["steps"]
    with on_mesh(*shape):
        cfg, params = adapted(PEFT["runs"][name]["b"])
        trained, frozen = lora.split(params)
        before, (step, tx) = to_host(frozen), dpo_step(cfg, shape)
        state = TrainState(jax.device_put(np.int32(0), mesh.sharding()), trained, jax.jit(tx.init)(trained))
        for at, theirs in zip((0, 4, 8), golden, strict=True):
            state, metrics = step(state, batch_of([[at], [at + 1], [at + 2], [at + 3]]), frozen)
            for key in ("loss", "logps/chosen", "logps/rejected"):
                assert metrics[key] == pytest.approx(theirs[key], rel=1e-5), key
            assert metrics["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
            assert metrics["rewards/margins"] == pytest.approx(theirs["rewards/margins"], rel=1e-4, abs=1e-5)
        assert step._cache_size() == 1
        assert jax.tree.all(jax.tree.map(np.array_equal, to_host(frozen), before))  # bit for bit
        if shape == (1, 1, 1):
            merged = lora.merge(cfg, lora.join(state.params, frozen), dtype="float32")
            np.testing.assert_allclose(scorer()(merged), PEFT["runs"][name]["after"], rtol=1e-5)
    assert (golden[0]["loss"] == pytest.approx(math.log(2))) == (name == "fresh")


def test_a_merged_model_has_the_log_probs_of_pefts_adapters(one_device):
    merged = lora.merge(*adapted(PEFT["runs"]["underway"]["b"]), dtype="float32")
    np.testing.assert_allclose(scorer()(merged), PEFT["runs"]["underway"]["before"], rtol=1e-6)


# --- gradients ------------------------------------------------------------------------------------


def states(cfg, params):
    """Sum of the squared final states, of two rows of different tokens."""
    tokens = jnp.reshape(jnp.arange(14, dtype=jnp.int32) * 5, (2, 7), out_sharding=mesh.spec("rows", None))
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7), out_sharding=mesh.spec("rows", None))

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    return jnp.sum(model.hidden(cfg, params, tokens, positions, attend)[..., :7] ** 2)


def small():
    """A model with adapters, B too of random numbers, as what is trained and what is frozen."""
    cfg, rng = lora.config(SMALL, rank=3, alpha=6.0), np.random.default_rng(0)
    return cfg, lora.split(jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(0, 0.3, leaf.shape).astype(np.float32), leaf.sharding.spec),
        model.abstract(cfg)))


def test_the_gradient_is_that_of_the_sum_written_out(one_device):
    cfg, (trained, frozen) = small()

    def written_out(trained):
        layers, adapters = dict(frozen["layers"]), trained["layers"]
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            W, A, B = layers[name], adapters[name + "_a"], adapters[name + "_b"]
            added = A.reshape(2, -1, 3) @ B.reshape(2, 3, -1)  # [L in r] [L r out]
            layers[name] = W + 6.0 / 3 * added.reshape(W.shape)
        return states(SMALL, frozen | {"layers": layers})

    got = jax.jit(jax.grad(lambda trained: states(cfg, lora.join(trained, frozen))))(trained)
    expected = jax.jit(jax.grad(written_out))(trained)
    for name, leaf in expected["layers"].items():
        np.testing.assert_allclose(got["layers"][name], leaf, atol=1e-5 * np.abs(leaf).max(), rtol=0, err_msg=name)
        assert np.abs(leaf).min() != np.abs(leaf).max()


def test_no_frozen_matrix_has_a_gradient(one_device):
    """Nor does the product of two adapters exist: no product of arrays anywhere is as large as a matrix."""
    cfg, (trained, frozen) = small()
    sizes = {frozen["layers"][name][0].size for name in model.MATRICES}

    def products(trained, frozen):
        """Sizes of what the matrix products in the compiled program give."""
        gradient = jax.jit(jax.grad(lambda trained: states(cfg, lora.join(trained, frozen))))
        shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", gradient.lower(trained).compile().as_text())
        return {math.prod(map(int, shape.split(","))) for shape in shapes}

    assert not sizes & products(trained, frozen)
    assert sizes <= products(lora.join(trained, frozen), {})  # where all are trained they are found


# --- a run ----------------------------------------------------------------------------------------


def recipe(run: Path, **lora_settings) -> dict:
    spec = importlib.util.spec_from_file_location("dpo", ROOT / "configs" / "dpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config("smoke").to_dict()
    c["lora"] |= {"rank": 4} | lora_settings
    paths = {"run": str(run), "start": str(TINY), "data": c["data"] | {"path": str(GOLDEN / "pairs.jsonl")}}
    return c | paths | {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "optim": c["optim"] | {"lr": 1e-2}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("lora") / "run"
    train.train(recipe(run))
    return run


def metrics(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in log.read_metrics(run)]


def test_a_run_starts_at_ln_2_learns_and_leaves_the_base(unbroken):
    losses = [row["loss"] for row in log.read_metrics(unbroken)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.6
    base, merged = (safetensors.numpy.load_file(folder / "model.safetensors") for folder in (TINY, unbroken / "hf"))
    assert base.keys() == merged.keys()
    for name, tensor in base.items():
        loaded = tensor.astype(jnp.bfloat16).astype(np.float32)  # lora.base_dtype
        assert np.array_equal(merged[name], loaded) == ("_proj" not in name), name


def test_a_checkpoint_holds_the_adapters_and_their_optimiser_alone(unbroken):
    kept = json.loads((unbroken / "checkpoints" / "8" / "state" / "_METADATA").read_text())["tree_metadata"]
    names = {key.split("'")[-2] for key in kept if "layers" in key}
    assert names == {name + side for name in model.MATRICES for side in ("_a", "_b")}
    assert not any(name in key for key in kept for name in ("embed", "head", "norm"))


@pytest.mark.slow
def test_a_run_that_was_killed_continues_to_the_same_bits(unbroken, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "run")
    for late in ("hf", "checkpoints/8"):  # as if it had ended while it saved its last step
        shutil.rmtree(run / late)
    train.train(recipe(run))
    assert metrics(run) == metrics(unbroken)
    assert (run / "hf" / "model.safetensors").read_bytes() == (unbroken / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("settings, problem", [
    ({"rank": -1}, "lora.rank: got -1, expected 0 or more"),
    ({"base_dtype": "int8"}, r"lora.base_dtype: got 'int8', available are \['bfloat16'"),
])
def test_settings_that_mean_nothing_are_refused(settings, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        train.train(recipe(tmp_path / "run", **settings))
