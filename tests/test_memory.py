"""What is kept where: the optimiser's arrays on the host, remat by name, sums in fp32."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_mesh
from jax.experimental import topologies

from align_jax import attention, checkpoint, mesh, model, optim
from align_jax.step import TrainState, _accumulate

CFG = model.ModelConfig(L=2, D=32, N=4, K=2, H=8, F=48, V=96, init_scale=0.3)
SETTINGS = {"steps": 10, "lr": 1e-2, "warmup": 0.3, "weight_decay": 0.1, "clip": 1.0}


def updates(offload: bool):
    """Updates and state of three steps of some of a model's parameters."""
    shapes, rng = model.abstract(CFG), np.random.default_rng(0)
    shapes["layers"] = {name: shapes["layers"][name] for name in ("attn_norm", "q", "down")}
    params = jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(np.float32), x.sharding.spec), shapes)
    tx = optim.adamw(**SETTINGS, offload=offload)
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


def test_an_offloaded_optimiser_gives_the_same_numbers():
    with on_mesh(2, 2, 2):
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


@pytest.mark.slow
def test_remat_changes_no_gradient_and_keeps_what_its_name_says():
    row = [np.arange(16) * 5, [*range(8), *range(8)], [1] * 16, [0] * 8 + [1] * 8]

    def gradient(params, remat):
        def loss(params):
            tokens, positions, segments, branches = (
                jax.device_put(np.tile(x, (4, 1)).astype(np.int32), mesh.spec("rows", None)) for x in row)
            attend = attention.make(segments, branches)
            return jnp.sum(model.hidden(CFG, params, tokens, positions, attend, remat=remat)[..., :7] ** 2)
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    with on_mesh(2, 2, 2):
        params = model.init(CFG, 0)
        expected, most = gradient(params, "none")
        sizes = {"none": most}
        for remat in model.REMAT.keys() - {"none"}:
            got, sizes[remat] = gradient(params, remat)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0, err_msg=remat)
    assert sizes["none"] > sizes["dots"] > sizes["mixed"] > sizes["full"]


def test_micro_batches_add_up_in_fp32_whatever_the_weights(one_device):
    """256 + 1 is 256 in bfloat16, so that the sum of 300 ones would stop there."""
    rows = {"tokens": jnp.ones((300, 4), out_sharding=mesh.spec("rows", None))}

    def grad(params, rows):
        return {"w": params["w"] * rows["tokens"].sum().astype(jnp.bfloat16) / 4}, {"loss": 0.0, "ref_gap": 0.0}

    total, _ = jax.jit(lambda params: _accumulate(grad, params, rows, 300))({"w": jnp.ones(3, jnp.bfloat16)})
    assert total["w"].dtype == jnp.float32 and (total["w"] == 300).all()


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="needs libtpu, the compiler for TPUs")
def test_on_a_tpu_an_offloaded_update_leaves_the_state_on_the_host(monkeypatch):
    """Compiled for one: the host holds the 8 bytes a parameter, and the device a few layers' share of them."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    cfg = model.ModelConfig(L=16, D=1024, N=8, K=8, H=128, F=2816, V=256)
    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    with jax.set_mesh(mesh.make(1, 4, 1, devices=devices)):
        params, tx = model.abstract(cfg), optim.adamw(**SETTINGS, offload=True)

        def placed(leaf, kind=None):
            sharding = jax.NamedSharding(jax.sharding.get_mesh(), leaf.sharding.spec if leaf.ndim else jax.P())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.with_memory_kind(kind))

        state = jax.tree.map(lambda x: placed(x, "pinned_host" if x.ndim else None), jax.eval_shape(tx.init, params))
        params = jax.tree.map(placed, params)
        used = jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile().memory_analysis()
        size = 4 * cfg.num_params / 4  # fp32, over four devices
    assert used.host_argument_size_in_bytes == pytest.approx(2 * size, rel=0.01)
    assert used.host_temp_size_in_bytes < 0.01 * size
    assert used.argument_size_in_bytes == pytest.approx(2 * size, rel=0.01)  # gradients and parameters
    assert used.temp_size_in_bytes < 4 * 2 * size / cfg.L


def test_what_is_added_up_over_data_was_scattered_over_fsdp():
    with on_mesh(2, 2, 2):
        add_up = jax.shard_map(mesh.sum_over_rows, in_specs=mesh.spec("vocab", None), check_vma=False,
                               out_specs=mesh.spec("vocab", "embed"))
        x = jax.device_put(jnp.ones((8, 64)), mesh.sharding("vocab", None))
        hlo = jax.jit(add_up).lower(x).compile().as_text()
    assert re.findall(r"= (f32\S+){\S+ (all-reduce|reduce-scatter)\(", hlo) == [
        ("f32[4,32]", "reduce-scatter"), ("f32[4,32]", "all-reduce")]
