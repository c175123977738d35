"""What is kept where: the optimiser's arrays on the host, remat by name, sums in fp32."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_mesh
from jax.ad_checkpoint import checkpoint_name

from align_jax import attention, checkpoint, mesh, model, optim
from align_jax.step import TrainState, _accumulate

CFG = model.ModelConfig(L=3, D=32, N=4, K=2, H=8, F=48, V=96, init_scale=0.3)
SETTINGS = {"steps": 10, "lr": 1e-2, "warmup": 0.3, "weight_decay": 0.1, "clip": 1.0}


def updates(offload: bool):
    """Updates and state of three steps."""
    params, tx = model.init(CFG, 0), optim.adamw(**SETTINGS, offload=offload)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update, donate_argnums=1)
    for i in range(1, 4):
        made, state = update(jax.tree.map(lambda x, i=i: x * i, params), state, params)
    assert update._cache_size() == 1
    return made, state


def differences():
    """The largest, relative, between an optimiser that is offloaded and one that is not; array by array."""
    plain, offloaded = updates(False), updates(True)
    assert jax.tree.structure(plain) == jax.tree.structure(offloaded)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(offloaded[1]) if x.ndim} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(offloaded[0])} == {"device"}
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(offloaded), strict=True):
        assert a.sharding.spec == b.sharding.spec
        a, b = np.asarray(a), np.asarray(b)
        yield np.max(np.abs(a - b) / np.maximum(np.abs(a), 1e-30))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_an_offloaded_optimiser_gives_the_same_numbers(shape):
    with on_mesh(*shape):
        assert max(differences()) < 1e-6


@pytest.mark.slow
def test_an_offloaded_optimiser_gives_the_same_bits_where_no_multiply_is_fused_with_an_add():
    """The compiler fuses them where it likes, on a processor that can: told of none, it leaves the arithmetic alone."""
    root = Path(__file__).parents[1]
    program = "import sys; sys.path.insert(0, 'tests'); import conftest, test_memory\n" \
              "with conftest.on_mesh(1, 1, 1): print('largest', max(test_memory.differences()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root,
                          env=os.environ | {"XLA_FLAGS": "--xla_cpu_max_isa=AVX"})
    assert "largest 0.0" in done.stdout, done.stdout + done.stderr


def test_an_offloaded_state_is_saved_and_restored_where_it_was(tmp_path):
    with on_mesh(1, 4, 2):
        params = model.init(CFG, 0)
        state = TrainState(jnp.int32(1), params, jax.jit(optim.adamw(**SETTINGS, offload=True).init)(params))
        state.opt = jax.tree.map(lambda x: x + 1, state.opt)
        saved = jax.tree.map(np.asarray, state.opt)
        with checkpoint.Checkpoints(tmp_path) as ckpts:
            ckpts.save(1, state, {})
        with checkpoint.Checkpoints(tmp_path) as ckpts:
            _, restored, _ = ckpts.restore(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, restored.opt, saved))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(restored.opt) if x.ndim} == {"pinned_host"}


def gradient(remat: str):
    tokens = jnp.reshape(jnp.arange(16, dtype=jnp.int32) * 5, (2, 8), out_sharding=mesh.spec("rows", None))
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8), out_sharding=mesh.spec("rows", None))

    def states(params):
        def attend(q, k, v):
            return checkpoint_name(jax.nn.dot_product_attention(q, k, v, is_causal=True), attention.SAVED)
        return jnp.sum(model.hidden(CFG, params, tokens, positions, attend, remat=remat)[..., :7] ** 2)

    return jax.jit(jax.grad(states))(model.init(CFG, 0))


def test_remat_changes_no_gradient(one_device):
    expected = gradient("none")
    for remat in model.REMAT.keys() - {"none"}:
        for a, b in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0, err_msg=remat)


def test_micro_batches_add_up_in_fp32_whatever_the_weights(one_device):
    """256 + 1 is 256 in bfloat16, so that the sum of 300 ones would stop there."""
    rows = {"tokens": jnp.ones((300, 4), out_sharding=mesh.spec("rows", None))}

    def grad(params, rows):
        return {"w": params["w"] * rows["tokens"].sum().astype(jnp.bfloat16) / 4}, {"loss": 0.0, "ref_gap": 0.0}

    total, _ = jax.jit(lambda params: _accumulate(grad, params, rows, 300))({"w": jnp.ones(3, jnp.bfloat16)})
    assert total["w"].dtype == jnp.float32 and (total["w"] == 300).all()
