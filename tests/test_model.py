"""The Transformer: who sees whom, what packing and remat may not change, the same numbers on every mesh.

That its numbers are those of the checkpoints is in test_hf.py, against transformers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import attention, mesh, model

CFG = model.ModelConfig(L=2, D=32, N=4, K=2, H=8, F=48, V=96, qkv_bias=True, init_scale=0.3)
T = 24
SEGMENTS = np.array([1] * 9 + [2] * 10 + [0] * 5)
POSITIONS = np.array([*range(9), *range(10), *range(5)])


def on(*shape):
    return jax.set_mesh(mesh.make(*shape, devices=jax.devices()[:int(np.prod(shape))]))


def rows(*arrays):
    """Place [R T] arrays as rows of a batch."""
    return [jax.device_put(np.asarray(a, np.int32), mesh.sharding("rows", None)) for a in arrays]


def run_rows(cfg, params, tokens, positions, segments, **settings):
    """The states of rows in which every segment is a sequence of its own."""
    attend = attention.make(segments, jnp.zeros_like(segments))
    return model.hidden(cfg, params, tokens, positions, attend, **settings)


def hidden(params, tokens, positions, segments, **settings):
    run = jax.jit(lambda params, *batch: run_rows(CFG, params, *batch, **settings))
    return np.asarray(run(params, *rows(tokens, positions, segments)))


def test_a_position_is_moved_by_its_own_segment_up_to_itself_and_by_nothing_else(one_device):
    params = model.init(CFG, 0)
    tokens = np.random.default_rng(0).permutation(CFG.V)[:T][None]  # all different: a row of the table is a position
    batch = rows(tokens, POSITIONS[None], SEGMENTS[None])

    @jax.jit
    @jax.grad
    def moved(table, at):
        x = run_rows(CFG, params | {"embed": table}, *batch)
        return jnp.where((jnp.arange(T) == at)[:, None], x, 0.0).sum()

    slopes = np.stack([np.abs(np.asarray(moved(params["embed"], t))[tokens[0]]).max(-1) for t in range(T)])  # [T S]
    seen = np.tril(SEGMENTS[:, None] == SEGMENTS[None, :])
    assert (slopes[~seen] == 0.0).all()
    assert (slopes[seen] > 1e-6).all()


def test_a_segment_has_the_states_it_has_alone(one_device):
    params, tokens = model.init(CFG, 1), np.random.default_rng(1).integers(0, CFG.V, (1, T))
    packed = hidden(params, tokens, POSITIONS[None], SEGMENTS[None])
    for start, end in [(0, 9), (9, 19)]:
        n = end - start
        alone = hidden(params, tokens[:, start:end], np.arange(n)[None], np.ones((1, n)))
        np.testing.assert_allclose(packed[:, start:end], alone, atol=1e-5, rtol=0)


def test_only_distances_between_positions_count(one_device):
    params, tokens = model.init(CFG, 2), np.random.default_rng(2).integers(0, CFG.V, (1, T))
    here, there = (hidden(params, tokens, np.arange(T)[None] + by, np.ones((1, T))) for by in (0, 100))
    np.testing.assert_allclose(here, there, atol=2e-5, rtol=0)
    stretched = hidden(params, tokens, 2 * np.arange(T)[None], np.ones((1, T)))
    assert np.abs(here - stretched).max() > 1e-2


@pytest.fixture(scope="module")
def on_one_device():
    with on(1, 1, 1):
        return logits_and_gradient()


def logits_and_gradient(remat="none"):
    params = model.init(CFG, 3)
    R = 8
    tokens = np.random.default_rng(3).integers(0, CFG.V, (R, T))
    batch = rows(tokens, np.tile(POSITIONS, (R, 1)), np.tile(SEGMENTS, (R, 1)))

    def score(params):
        logits = model.unembed(model.head(params, jnp.float32), run_rows(CFG, params, *batch, remat=remat))
        return jnp.mean(jnp.square(logits)), logits

    gradient, logits = jax.jit(jax.grad(score, has_aux=True))(params)
    return jax.tree.map(np.asarray, (logits, gradient))


def assert_close(got, expected, rtol):
    """Largest difference within rtol of the largest value, leaf by leaf."""
    def check(path, a, b):
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), jax.tree_util.keystr(path)
    jax.tree_util.tree_map_with_path(check, got, expected)


def test_every_mesh_gives_the_same_weights_logits_and_gradient(any_mesh, on_one_device):
    assert_close(logits_and_gradient(), on_one_device, 1e-5)


@pytest.mark.parametrize("remat", [name for name in model.REMAT if name != "none"])
def test_remat_gives_the_same_gradient(remat, on_one_device, one_device):
    assert_close(logits_and_gradient(remat), on_one_device, 1e-6)


def test_unrolled_layers_are_no_loop(one_device):
    batch = rows(*np.ones((3, 1, 4)))
    text = lambda **how: jax.jit(lambda p: run_rows(CFG, p, *batch, **how)).lower(model.init(CFG, 0)).as_text()
    assert text().count("stablehlo.while") == text(unroll=True).count("stablehlo.while") + 1


def test_remat_keeps_less(one_device):
    cfg = dataclasses.replace(CFG, L=8, D=64, F=256)
    params = model.init(cfg, 0)
    batch = rows(*np.ones((3, 4, 128)))

    def kept(remat):
        loss = jax.jit(jax.grad(lambda params: run_rows(cfg, params, *batch, remat=remat).sum()))
        return loss.lower(params).compile().memory_analysis().temp_size_in_bytes

    full, mixed, dots, none = (kept(remat) for remat in ("full", "mixed", "dots", "none"))
    assert max(full, mixed) < 0.6 * dots < 0.4 * none, (full, mixed, dots, none)


def test_activations_have_the_dtype_asked_for_and_logits_are_fp32(one_device):
    params = model.init(CFG, 4)
    batch = rows(*np.ones((3, 1, T)))
    x = jax.eval_shape(lambda: run_rows(CFG, params, *batch, dtype=jnp.bfloat16))
    assert x.dtype == jnp.bfloat16
    assert jax.eval_shape(model.unembed, model.head(params, x.dtype), x).dtype == jnp.float32


def test_bf16_is_near_fp32(one_device):
    params, tokens = model.init(CFG, 5), np.random.default_rng(5).integers(0, CFG.V, (1, T))
    batch = tokens, POSITIONS[None], SEGMENTS[None]
    exact, rounded = (hidden(params, *batch, dtype=dtype).astype(np.float32) for dtype in (jnp.float32, jnp.bfloat16))
    assert 0 < np.abs(exact - rounded).mean() < 0.02 * np.abs(exact).mean()


def test_initial_weights(one_device):
    cfg = dataclasses.replace(CFG, L=4, D=128, F=256, init_scale=0.02, o_bias=True)
    params = model.init(cfg, 0)
    layers = params["layers"]
    assert set(params) == {"embed", "layers", "final_norm", "head"}
    for norm in (params["final_norm"], layers["attn_norm"], layers["mlp_norm"]):
        assert (norm == 1).all()
    assert all((layers[f"{name}_bias"] == 0).all() for name in "qkvo")
    assert float(layers["gate"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(layers["down"].std()) == pytest.approx(0.02 / 8**0.5, rel=0.02)  # two residual writes a layer
    assert not np.array_equal(layers["q"][0], layers["q"][1])
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, model.init(cfg, 0))), strict=True))


def test_num_params_is_that_of_the_published_checkpoints(one_device):
    llama3 = model.ModelConfig(L=32, D=4096, N=32, K=8, H=128, F=14336, V=128256)
    qwen = model.ModelConfig(L=28, D=3584, N=28, K=4, H=128, F=18944, V=152064, qkv_bias=True)
    deepseek = model.ModelConfig(L=24, D=2048, N=16, K=16, H=128, F=5504, V=32256)
    # The sizes that the Hugging Face hub shows for Meta-Llama-3-8B, Qwen2.5-Coder-7B and deepseek-coder-1.3b.
    assert [cfg.num_params for cfg in (llama3, qwen, deepseek)] == [8_030_261_248, 7_615_616_512, 1_346_471_936]


def test_a_tied_model_has_no_head(one_device):
    cfg = dataclasses.replace(CFG, tied=True)
    params = model.init(cfg, 0)
    assert "head" not in params
    x = jax.device_put(np.ones((1, CFG.D), np.float32), mesh.sharding("rows", None))
    logits = model.unembed(model.head(params, jnp.float32), x)
    np.testing.assert_allclose(logits[0], params["embed"].sum(-1), rtol=1e-5, atol=1e-5)


def test_an_unknown_remat_policy_says_which_there_are(one_device):
    with pytest.raises(ValueError, match=r"remat: got 'some', available are \['dots', 'full', 'mixed', 'none', 'off"):
        run_rows(CFG, model.init(CFG, 0), *rows(*np.ones((3, 1, 4))), remat="some")
