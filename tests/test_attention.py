"""Attention of every platform, against the formula in float64: who sees whom, values and gradients, on every mesh."""

import jax
import numpy as np
import pytest

from align_jax import attention, mesh

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


def run(impl: str, segments, branches, q, k, v, up):
    """The same four arrays by attention.make, fp32, inside a scan over one layer with remat, as the model has it."""
    put = lambda x, *axes: jax.device_put(x, mesh.sharding(*axes))
    heads = [put(np.asarray(x, np.float32), "rows", None, "heads", None) for x in (q, k, v, up)]
    rows = [put(x, "rows", None) for x in (segments, branches)]

    @jax.jit
    def both(segments, branches, q, k, v, up):
        def mixed(qkv):
            attend = attention.make(segments, branches, impl)
            layer = jax.checkpoint(lambda x, _: (x + attend(*qkv), None))
            return jax.lax.scan(layer, 0 * qkv[0], length=1)[0]
        out, pull = jax.vjp(mixed, (q, k, v))
        return out, *pull(up)[0]

    return [np.asarray(x) for x in both(*rows, *heads)]


def assert_close(got, expected, rtol):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert np.abs(a - b).max() <= rtol * np.abs(b).max(), name


def test_xla_is_the_formula_on_every_mesh(any_mesh):
    rows = batch(48)
    assert_close(run("xla", *rows, *arrays(48)), dense(*rows, *arrays(48)), 2e-6)


def test_auto_is_by_the_platform_of_the_mesh_and_a_wrong_name_is_named(one_device):
    rows = np.ones((2, 8, 16), np.int32)
    assert attention.make(*rows).__qualname__ == attention.make(*rows, "xla").__qualname__
    with pytest.raises(ValueError, match="got 'flash', available are 'auto', 'xla'"):
        attention.make(*rows, "flash")
