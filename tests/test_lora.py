"""Adapters beside frozen weights: peft's log-probs and steps, autodiff's gradient, one base that nothing changes."""

import functools
import json
import math
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from align_jax import data, hf, lora, mesh, model, optim, records, text
from align_jax.step import Compute, TrainState, make_scorer, make_step, objective

GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"
PEFT = json.loads((GOLDEN / "peft.json").read_text())
PAIRS = json.loads((GOLDEN / "trl.json").read_text())["pairs"]
FP32 = Compute(dtype="float32", remat="none", chunk=64)
DPO = objective("dpo", beta=0.1)
RANK, ALPHA = PEFT["lora"]["r"], PEFT["lora"]["lora_alpha"]
EVERY = [[0, 1], [2], [3, 9], [4], [5, 6], [7], [8, 10], [11]]


def batch_of(layout) -> dict:
    """A batch whose rows hold these pairs; the references are the base's, in float64."""
    pairs = list(data.encode_all(enumerate(records.read(GOLDEN / "pairs.jsonl", records.Pair)), text.load(TINY),
                                 dropped=Counter(), max_length=384))
    ref = {pair["id"]: pair["logps"] for pair in PAIRS}
    return {name: jax.device_put(value, mesh.sharding("rows", *(None,) * (value.ndim - 1)))
            for name, value in data.batch(pairs, layout, T=384, P=2, C=2, ref_logps=ref).items()}


def adapted(b: float, dtype="float32"):
    """The tiny checkpoint with the adapters that the tool of peft.json made: the k-th is a sine of k times 0, 1, 2 ..."""
    cfg, params = lora.add(*hf.load(TINY, dtype=dtype), rank=RANK, alpha=ALPHA, seed=0)
    layers, k = dict(params["layers"]), 0
    made = {name: np.zeros(leaf.shape, np.float32) for name, leaf in layers.items()}
    for layer in range(cfg.L):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            for side, size in (("_a", 0.2), ("_b", b)):
                k += 1
                into = made[name + side][layer]
                wide = size * np.sin(k * np.arange(into.size, dtype=np.float64))
                into[:] = (wide.reshape(RANK, -1).T if side == "_a" else wide.reshape(-1, RANK).T).reshape(into.shape)
    layers |= {name: jax.device_put(made[name], leaf.sharding) for name, leaf in layers.items() if name[-2:] in ("_a", "_b")}
    return cfg, params | {"layers": layers}


def start(trained, tx) -> TrainState:
    return TrainState(jax.device_put(np.int32(0), mesh.sharding()), trained, jax.jit(tx.init)(trained))


def in_order(layout, values) -> np.ndarray:
    """[R P C] log-probs as [pairs C]."""
    found = {i: logps for row, slots in zip(layout, np.asarray(values), strict=True)
             for i, logps in zip(row, slots, strict=False)}
    return np.stack([found[i] for i in sorted(found)])


@pytest.mark.parametrize("name", PEFT["runs"])
def test_log_probs_three_steps_and_the_merged_model_are_those_of_peft(name, any_mesh):
    golden = PEFT["runs"][name]
    cfg, params = adapted(golden["b"])
    tx = optim.adamw(steps=3, lr=1e-3, decay="constant")
    np.testing.assert_allclose(in_order(EVERY, make_scorer(cfg, compute=FP32)(params, batch_of(EVERY))),
                               golden["before"], rtol=1e-6)
    trained, frozen = lora.split(params)
    step, state = make_step(cfg, DPO, tx, compute=FP32), start(trained, tx)
    for at, theirs in zip((0, 4, 8), golden["steps"], strict=True):
        state, metrics = step(state, batch_of([[at], [at + 1], [at + 2], [at + 3], [], [], [], []]), frozen)
        assert metrics["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert metrics["rewards/margins"] == pytest.approx(theirs["rewards/margins"], rel=1e-4, abs=1e-5)
    merged = lora.merge(cfg, lora.join(state.params, frozen), dtype="float32")
    plain = hf.config(TINY)
    np.testing.assert_allclose(in_order(EVERY, make_scorer(plain, compute=FP32)(merged, batch_of(EVERY))),
                               golden["after"], rtol=1e-5)
