"""Attention of every platform, against the formula in float64: who sees whom, values and gradients, on every mesh."""

import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_mesh
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from align_jax import attention, flash, mesh, slots

R, N, K, H = 8, 4, 2, 16


def layout(*examples: tuple[int, ...], T: int):
    """Segments and branches of one row of examples (prompt length, completion lengths...)."""
    segments, branches = np.zeros((2, T), np.int32)
    at = 0
    for number, lengths in enumerate(examples, 1):
        for branch, length in enumerate(lengths):
            segments[at:at + length], branches[at:at + length] = number, branch
            at += length
    assert at <= T
    return segments, branches


def batch(T: int):
    """Segments and branches [R T] of eight different rows."""
    eighth = T // 8
    rows = [
        [(T,)],  # one unshared example
        [(1,), (eighth,), (T // 3,), (T // 4,)],
        [(eighth, eighth, eighth)],  # a pair, then padding
        [(1, T // 2, eighth), (2, 1, 1), (eighth, 3, 4)],
        [(0, eighth, 2 * eighth), (eighth, T // 4, T // 4)],  # no prompt at all; filled to the end
        [(eighth, eighth, 1, T // 4), (5, 3, 2, 3)],  # three completions
        [(3,), (eighth, 2, eighth), (4,), (2, eighth, 1)],  # both kinds in one row
        [],  # padding alone
    ]
    return [np.stack(x) for x in zip(*(layout(*examples, T=T) for examples in rows), strict=True)]


def arrays(T: int, seed: int = 0):
    """Random q, k, v and the gradient that comes in from above, float64."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((R, T, heads, H)) for heads in (N, K, K, N)]


def dense(segments, branches, q, k, v, up):
    """The formula, float64: the output, and the gradients of sum(output * up) by hand."""
    T = segments.shape[1]
    t, s = np.arange(T)[:, None], np.arange(T)[None, :]
    same = segments[:, :, None] == segments[:, None, :]
    own = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    seen = (same & own & (s <= t))[:, None]  # [R 1 T S]
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    logits = np.where(seen, np.einsum("RTNH,RSNH->RNTS", q, k) / np.sqrt(H), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    slope = np.einsum("RTNH,RSNH->RNTS", up, v)
    slope = weights * (slope - (slope * weights).sum(-1, keepdims=True)) / np.sqrt(H)
    of_group = lambda x: x.reshape(R, T, K, N // K, H).sum(3)
    return (np.einsum("RNTS,RSNH->RTNH", weights, v), np.einsum("RNTS,RSNH->RTNH", slope, k),
            of_group(np.einsum("RNTS,RTNH->RSNH", slope, q)), of_group(np.einsum("RNTS,RTNH->RSNH", weights, up)))


def put(x, dtype, *axes):
    return jax.device_put(jnp.asarray(x, dtype), mesh.sharding(*axes))


def run(impl: str, segments, branches, *arrays, dtype="float32"):
    """The same four arrays by attention.make, inside a scan over one layer with remat, as the model has it."""
    rows = [put(x, "int32", "rows", None) for x in (segments, branches)]
    return [np.asarray(x, np.float32)
            for x in values_and_gradients(impl, *rows, *(put(x, dtype, "rows", None, "heads", None) for x in arrays))]


@partial(jax.jit, static_argnums=0)
def values_and_gradients(impl, segments, branches, q, k, v, up):
    def mixed(qkv):
        attend = attention.make(segments, branches, impl)
        layer = jax.checkpoint(lambda x, _: (x + attend(*qkv), None))
        return jax.lax.scan(layer, 0 * qkv[0], length=1)[0]

    out, pull = jax.vjp(mixed, (q, k, v))
    return out, *pull(up)[0]


def assert_close(got, expected, rtol):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), name


def test_xla_is_the_formula_on_every_mesh(any_mesh):
    rows = batch(200)  # several blocks, and filled up to the last one
    assert_close(run("xla", *rows, *arrays(200)), dense(*rows, *arrays(200)), 2e-6)


@pytest.mark.parametrize("T", [1, 64, 300])
def test_no_loop_of_a_kernel_goes_beyond_the_row(T):
    """A CPU that interprets it would not notice; a GPU would read what lies behind."""
    layout = batch(T) if T > 100 else [np.ones((1, T), np.int32)] * 2
    rows = attention._triton_prepare(attention._until(*map(jnp.asarray, layout)))
    for size, (first, end) in rows["ends"].items():
        blocks = np.arange(rows["until"].shape[1] // size)
        assert (first <= blocks).all() and (first >= 0).all() and (end > blocks).all() and (end <= len(blocks)).all()


@pytest.mark.parametrize("impl", ["xla", "cudnn", "triton"])
def test_short_rows_and_what_a_gpu_lacks_are_the_formula_too(impl, monkeypatch):
    monkeypatch.setattr(flash, "HEADS", ())
    rows = batch(48)
    with on_mesh(2, 2, 2):
        assert_close(run(impl, *rows, *arrays(48)), dense(*rows, *arrays(48)), 2e-6)


def test_splash_is_the_formula(monkeypatch):
    """Interpreted; rows of 300 in blocks of 128 hold full, partial and empty blocks, and are filled up."""
    monkeypatch.setattr(attention, "TPU_BLOCK", 128)
    rows = batch(300)
    with on_mesh(2, 2, 2):
        assert_close(run("splash", *rows, *arrays(300)), dense(*rows, *arrays(300)), 2e-6)


def test_triton_is_the_formula():
    """Interpreted; rows of 300 in blocks of 32 hold full, partial and empty blocks, and are filled up."""
    rows = batch(300)
    with on_mesh(2, 2, 2):
        assert_close(run("triton", *rows, *arrays(300)), dense(*rows, *arrays(300)), 2e-6)


@pytest.mark.parametrize("impl", ["xla", "triton"])
def test_bf16_has_bf16_errors_only(one_device, impl):
    rows = batch(200)
    assert_close(run(impl, *rows, *arrays(200), dtype="bfloat16"), dense(*rows, *arrays(200)), 2e-2)


def test_a_shared_prompt_is_as_one_in_each_copy(one_device):
    """Pairs of one prompt against the same pairs with the prompt twice; gradients of the copies add up."""
    T, lengths = 200, [(20, 30, 40), (5, 3, 50)]
    shared = [np.tile(x, (R, 1)) for x in layout(*lengths, T=T)]
    apart = [np.tile(x, (R, 1)) for x in layout(*((p + c,) for p, *sides in lengths for c in sides), T=T)]
    origin, at = [], 0  # of every position with the prompt twice, the one with it once
    for prompt, chosen, rejected in lengths:
        first = np.arange(at, at + prompt + chosen)
        origin += [*first, *first[:prompt], *range(at + prompt + chosen, at + prompt + chosen + rejected)]
        at += prompt + chosen + rejected
    q, k, v, up = ([np.zeros((R, T, x.shape[2], H)), x] for x in arrays(T))
    for copies, x in (q, k, v, up):
        copies[:, :len(origin)], x[:, at:] = x[:, origin], 0.0
    first_seen = np.sort(np.unique(origin, return_index=True)[1])
    up[0][:, np.setdiff1d(np.arange(T), first_seen)] = 0.0  # each output counts once
    got, expected = (run("xla", *rows, *(x[i] for x in (q, k, v, up))) for i, rows in ((1, shared), (0, apart)))
    np.testing.assert_allclose(got[0][:, origin], expected[0][:, :len(origin)], atol=2e-6)
    for a, b in zip(got[1:], expected[1:], strict=True):
        added = np.zeros_like(a)
        np.add.at(added, (slice(None), origin), b[:, :len(origin)])
        np.testing.assert_allclose(a, added, atol=1e-5)


def grad_of_layers(impl: str, T: int, *, policy=None, dtype="float32", shape=(R, N, K, H)):
    """The gradient of two layers with remat, and its arguments as shapes."""
    rows, N, K, H = shape
    of = lambda shape, *axes, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=mesh.sharding(*axes))
    qkv = [of((rows, T, heads, H), "rows", None, "heads", None) for heads in (N, K, K)]

    def score(q, k, v, segments, branches):
        attend = attention.make(segments, branches, impl)
        layer = jax.checkpoint(lambda x, _: (x + attend(x, k, v), None), policy=policy)
        return jax.lax.scan(layer, q, length=2)[0].sum()

    return jax.jit(jax.grad(score, argnums=(0, 1, 2))), [*qkv, *[of((rows, T), "rows", None, dtype="int32")] * 2]


def test_long_rows_never_hold_all_their_logits(one_device):
    T = 1024
    grad, shapes = grad_of_layers("xla", T)
    assert grad.lower(*shapes).compile().memory_analysis().temp_size_in_bytes < R * N * T * T * 4 / 4


def test_what_is_kept_by_name_is_not_made_again(one_device):
    def made(policy):  # exponentials: two in a forward pass, one in the backward pass
        grad, shapes = grad_of_layers("xla", 256, policy=policy)
        return grad.lower(*shapes).as_text().count("stablehlo.exponential")

    assert made(jax.checkpoint_policies.nothing_saveable) == 5
    assert made(jax.checkpoint_policies.save_only_these_names(attention.SAVED)) == 3


def test_cudnn_takes_our_shapes(one_device, monkeypatch):
    """Lowered for CUDA without a GPU: jax finds forward and backward kernels, told causal, with K heads unrepeated."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    grad, shapes = grad_of_layers("cudnn", 2048, dtype="bfloat16", shape=(2, 32, 8, 128))
    calls = [line for line in grad.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text().splitlines()
             if "@__cudnn$fmhaScaleBiasSoftmax" in line]
    assert ["Backward(" in line for line in calls] == [False, False, True]
    for line in calls:
        assert "CAUSAL" in line
        assert line.count("tensor<2x2048x8x128xbf16>") >= 2 and "tensor<2x1x2048x2048xbf16>" in line


def on_a_gpu_of_nobody(monkeypatch):
    """Kernels are lowered for a GPU and not interpreted."""
    monkeypatch.setattr(flash, "mesh", SimpleNamespace(platform=lambda: "gpu"))
    if find_spec("jax._src.pallas.triton.gpu_info"):  # jax 0.11 asks which GPU it is for
        from jax._src.pallas.triton import gpu_info
        monkeypatch.setattr(gpu_info, "get_gpu_info", lambda *_: SimpleNamespace(compute_capability=90))


def test_triton_takes_our_shapes(one_device, monkeypatch):
    """Lowered for CUDA without a GPU: Triton's kernels, nothing of [T T], no use for a second forward pass."""
    on_a_gpu_of_nobody(monkeypatch)
    keep = jax.checkpoint_policies.save_only_these_names(attention.SAVED)
    grad, shapes = grad_of_layers("triton", 2048, dtype="bfloat16", policy=keep, shape=(2, 32, 8, 128))
    with jax.default_matmul_precision("default"):
        lowered = grad.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r'%(\d+)(?::2)? = stablehlo.custom_call @__gpu\$xla.gpu.triton.*name = "(\w+)"', lowered)
    assert [name for _, name in calls] == ["forward", "forward", "d_queries", "d_keys"]
    assert f"%{calls[0][0]}#0" in lowered and f"%{calls[1][0]}#" not in lowered  # which XLA leaves out
    assert "2048x2048" not in lowered


def test_a_ring_is_written_in_place(one_device, monkeypatch):
    """Lowered for CUDA without a GPU: the rings that come out are those that went in."""
    on_a_gpu_of_nobody(monkeypatch)
    of = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)
    shapes = [of(128, 8, 6, 128), *[of(128, 8, 320, 128)] * 2, of(dtype="int32"), of(128, dtype="int32")]
    with jax.default_matmul_precision("default"):
        lowered = jax.jit(flash.of_ring).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", lowered) == [("2", "3"), ("3", "4")]


def ring_is_the_formula(dtype: str, rtol: float, H: int = 64):
    """Slots of every age, in rings whose newest column is anywhere, groups that are no power of two."""
    rng = np.random.default_rng(0)
    for G, S in ((1, 96), (3, 128), (7, 64)):
        qkv, *caches = (rng.standard_normal((16, 2, n, H)) for n in (G + 2, S, S))
        for column in (0, 40, S - 1):
            age = rng.integers(0, S, 16).astype(np.int32)
            age[:2] = 0, S - 1
            arrays = [put(x, dtype, "rows", "heads", None, None) for x in (qkv, *caches)]
            found, (new_keys, new_values) = slots._by_flash(
                arrays[1:], arrays[0][:, None], jnp.int32(column), put(age, "int32", "rows"))
            mixed, top, total = (np.asarray(x[:, :, :, 0], np.float64) for x in found)
            q, k, v = np.split(np.asarray(arrays[0], np.float64), [G, G + 1], axis=2)
            keys, values = (np.array(x, np.float64) for x in arrays[1:])
            keys[:, :, [column]], values[:, :, [column]] = k, v
            np.testing.assert_array_equal(new_keys, keys)
            np.testing.assert_array_equal(new_values, values)
            seen = (column - np.arange(S)) % S <= age[:, None]
            logits = np.where(seen[:, None, None], np.einsum("RKGH,RKSH->RKGS", q, keys) * H**-0.5, -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            expected = np.einsum("RKGS,RKSH->RKGH", weights / weights.sum(-1, keepdims=True), values)
            assert np.abs(mixed - expected).max() <= rtol * np.abs(expected).max()
            expected = logits.max(-1) + np.log(weights.sum(-1))
            assert np.abs(top + np.log(total) - expected).max() <= rtol * np.abs(expected).max()


def test_a_ring_is_the_formula(one_device):
    ring_is_the_formula("float32", 2e-6)


GPU = """
import os
import test_attention as t
os.environ["XLA_FLAGS"] = ""  # conftest's are for CPUs
from align_jax import mesh
import jax
t.H = 64
rows, inputs = t.batch(500), t.arrays(500)  # not whole blocks
with jax.set_mesh(mesh.make(1, 1, 1, devices=jax.devices()[:1])):
    t.assert_close(t.run("triton", *rows, *inputs), t.dense(*rows, *inputs), 1e-5)
    for impl in ("triton", "cudnn"):
        t.assert_close(t.run(impl, *rows, *inputs, dtype="bfloat16"), t.dense(*rows, *inputs), 2e-2)
    t.ring_is_the_formula("float32", 1e-5)
    for H in (64, 128):
        t.ring_is_the_formula("bfloat16", 2e-2, H)
"""


@pytest.mark.skipif(not Path("/dev/nvidia0").exists() or not any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)),
                    reason="needs an NVIDIA GPU and jax[cuda13]")
def test_on_a_gpu_its_kernels_are_the_formula():
    subprocess.run([sys.executable, "-c", GPU], check=True, cwd=Path(__file__).parent,
                   env=os.environ | {"JAX_PLATFORMS": "cuda"})


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="needs libtpu, the compiler for TPUs: pip install libtpu")
@pytest.mark.parametrize("topology, shape, heads, policy, kernels", [
    ("v5e:8x8", (1, 64, 1), (32, 8), jax.checkpoint_policies.nothing_saveable, 4),  # forward twice, dq, dk and dv
    ("v5p:2x2x1", (1, 2, 2), (16, 16), jax.checkpoint_policies.save_only_these_names(attention.SAVED), 3),
], ids=["8B on v5e", "1.3B on v5p"])
def test_splash_compiles_for_a_tpu_that_is_not_here(topology, shape, heads, policy, kernels, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # the lock is for those who have a TPU
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    devices = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    rows = shape[0] * shape[1]
    with jax.set_mesh(Mesh(devices, mesh.AXES, axis_types=(AxisType.Explicit,) * 3)):
        grad, shapes = grad_of_layers("auto", 2048, policy=policy, dtype="bfloat16", shape=(rows, *heads, 128))
        with jax.default_matmul_precision("default"):  # what conftest asks for is not for bf16
            compiled = grad.lower(*shapes).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == kernels
    logits = heads[0] * 2048 * 2048 * 4  # bytes of one row's
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 2


def test_auto_is_by_the_platform_of_the_mesh_and_a_wrong_name_is_named(one_device):
    rows = put(np.ones((2, 8, 16)), "int32", None, "rows", None)
    heads = put(np.ones((3, 8, 16, 2, 8)), "float32", None, "rows", None, "heads", None)
    traced = lambda impl: str(jax.make_jaxpr(lambda *heads: attention.make(*rows, impl)(*heads))(*heads))
    assert traced("auto") == traced("xla") != traced("splash")
    with pytest.raises(ValueError, match="got 'flash', available are 'auto', 'xla', 'splash', 'triton', 'cudnn'"):
        attention.make(*rows, "flash")
