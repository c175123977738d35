"""Flash attention on a GPU, written in Pallas and compiled by Triton: blocks outside of a segment are not touched.

FlashAttention-2 (arXiv:2307.08691) under the mask of FlashMask (arXiv:2410.01359): the query at t sees the key at s iff
s <= t < until[s]. Logits are in base 2. A gradient is two kernels, which compute the weights again: one goes over the
keys of a block of queries, and one over the queries of a block of keys. `of_ring` is attention for sampling.

Pallas' Triton backend is deprecated since jax 0.11 and there up to the bound of jax in setup.py; its heir, Mosaic, has
no kernels for GPUs before Hopper. compute.attention=cudnn needs neither.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from align_jax import mesh

HEADS = 16, 32, 64, 128, 256  # sizes H that there are kernels for, of at most HEAD_BYTES
HEAD_BYTES = 512
BLOCK = 64  # queries, and keys, at a time: the best of those tried on an H200, and not too many for an L4
SMALL = 32  # of them, in fp32 and with heads above 128
RING_BLOCKS = 64, 32, 16  # columns of a ring at a time: the first that divides it, in at most RING_BYTES of keys
RING_BYTES = 2**14
WARPS = {"forward": 4, "d_queries": 4, "d_keys": 4, "of_ring": 2}
STAGES = {"forward": 3, "d_queries": 2, "d_keys": 2, "of_ring": 3}  # blocks that are on their way at once; of SMALL 1
LOW = -1e30  # a logit that nothing sees; finite, so that a block without a visible key stays a number


def has_kernels(H: int, dtype) -> bool:
    """Whether there are kernels for these heads, which fit the memory of a core."""
    return H in HEADS and H * jnp.dtype(dtype).itemsize <= HEAD_BYTES


def prepare(until: Int[Array, "R T"]) -> dict:
    """Where the kernels' loops begin and end; T is a multiple of BLOCK."""
    return {"until": until, "ends": {size: ends(until, size) for size in (BLOCK, SMALL)}}


def ends(until: Int[Array, "R T"], size: int) -> tuple:
    """Of every block [R T/size]: the first block of keys that it sees, and the end of those of queries that see it."""
    R, T = until.shape
    most = until.reshape(R, T // size, size).max(-1)
    first = jnp.argmax(most[:, None, :] > jnp.arange(0, T, size)[:, None], axis=-1)
    return first.astype(jnp.int32), jnp.minimum((most + size - 1) // size, T // size)  # padding's are never beyond T


def forward(rows: dict, q: Float[Array, "R T N H"], k: Float[Array, "R T K H"], v: Float[Array, "R T K H"]) -> tuple:
    """The output [R T N H], and the log, to base 2, of each softmax's sum [R N T]; for heads that `has_kernels`."""
    R, T, N, H = q.shape
    size = _size(q)
    mine, theirs = _block(size, H), _whole(T, H, N // k.shape[2])
    return _call(_forward, size, (T // size, N, R), [_row(T), _row(T // size), mine, theirs, theirs],
                 [mine, _line(size)], [_like(q), jax.ShapeDtypeStruct((R, N, T), jnp.float32)])(
        rows["until"], rows["ends"][size][0], q, k, v)


def backward(rows: dict, q, k, v, out, logsumexp, d_out) -> tuple:
    """The gradients of q, k and v."""
    R, T, N, H = q.shape
    K, size = k.shape[2], _size(q)
    slope = jnp.einsum("RTNH,RTNH->RNT", out, d_out, preferred_element_type=jnp.float32)  # what the softmax takes off
    until, (first, end) = rows["until"], rows["ends"][size]
    mine, theirs, line, loops = _block(size, H), _whole(T, H, N // K), _line(size), _row(T // size)

    d_q = _call(_d_queries, size, (T // size, N, R), [_row(T), loops, mine, theirs, theirs, mine, line, line], mine,
                _like(q))(until, first, q, k, v, d_out, logsumexp, slope)

    group = pl.BlockSpec((None, T, N // K, H), lambda j, h, r: (r, 0, h, 0))
    lines = pl.BlockSpec((None, N // K, T), lambda j, h, r: (r, h, 0))
    own = pl.BlockSpec((None, size), lambda j, h, r: (r, j))
    d_k, d_v = _call(_d_keys, size, (T // size, K, R), [own, loops, mine, mine, group, group, lines, lines],
                     [mine, mine], [_like(k), _like(v)])(until, end, k, v, q, d_out, logsumexp, slope)
    return d_q, d_k, d_v


def of_ring(qkv: Float[Array, "R K G+2 H"], keys: Float[Array, "R K S H"], values: Float[Array, "R K S H"],
            column: Int[Array, ""], age: Int[Array, " R"]) -> tuple:
    """Attend, from a row's newest token, to itself and to the age[r] < S columns of its ring before `column`.

    Of a key's head `qkv` has the G queries, the key and the value. Returns the output [R K G H], the log, to base e, of
    each softmax's sum [R K G], and keys and values with the new ones in `column`: in the rings' own memory, where the
    caller has no more use for them.
    """
    R, K, A, H = qkv.shape
    G, S = A - 2, keys.shape[2]
    size = next(size for size in RING_BLOCKS if S % size == 0 and size * H * keys.dtype.itemsize <= RING_BYTES)
    all_heads, heads, ring = (pl.BlockSpec((None, None, n, H), lambda h, r: (r, h, 0, 0)) for n in (A, G, S))
    line = pl.BlockSpec((None, None, G), lambda h, r: (r, h, 0))
    one = pl.BlockSpec((1,), lambda h, r: (0,)), pl.BlockSpec((1,), lambda h, r: (r,))
    shapes = [jax.ShapeDtypeStruct((R, K, G, H), qkv.dtype), jax.ShapeDtypeStruct((R, K, G), jnp.float32)]
    return _call(_of_ring, size, (K, R), [*one, all_heads, ring, ring], [heads, line, ring, ring],
                 [*shapes, _like(keys), _like(values)], input_output_aliases={3: 2, 4: 3})(
        column[None], age, qkv, keys, values)


# --- the kernels: a block of queries or of keys, of one head of one row --------------------------------


def _forward(until, first, q, k, v, out, logsumexp, *, size: int):
    i, queries = pl.program_id(0), q[...]

    def add(j, sums):
        at = pl.ds(j * size, size)
        logits = jnp.where(_seen(i, j, until[at], size), _dot(queries, k[at, :], trans_b=True) * _scale(q), LOW)
        return _add(sums, logits, v[at, :])

    top, total, mixed = lax.fori_loop(first[i], i + 1, add, _nothing(queries))
    out[...] = (mixed / total[:, None]).astype(out.dtype)
    logsumexp[...] = top + jnp.log2(total)


def _d_queries(until, first, q, k, v, d_out, logsumexp, slope, d_q, *, size: int):
    i, queries, up = pl.program_id(0), q[...], d_out[...]
    logsumexp, slope = logsumexp[...][:, None], slope[...][:, None]

    def add(j, total):
        at = pl.ds(j * size, size)
        keys = k[at, :]
        weights = jnp.exp2(_dot(queries, keys, trans_b=True) * _scale(q) - logsumexp)
        weights = jnp.where(_seen(i, j, until[at], size), weights, 0.0)
        d_logits = weights * (_dot(up, v[at, :], trans_b=True) - slope)
        return total + _dot(d_logits.astype(keys.dtype), keys)

    total = lax.fori_loop(first[i], i + 1, add, jnp.zeros(queries.shape, jnp.float32))
    d_q[...] = (total * q.shape[-1]**-0.5).astype(d_q.dtype)


def _d_keys(until, end, k, v, q, d_out, logsumexp, slope, d_k, d_v, *, size: int):
    j, keys, values, until = pl.program_id(0), k[...], v[...], until[...]
    count = end[j] - j  # blocks of queries, of each head of the group

    def add(n, sums):  # keys down, queries across
        g, i = lax.div(n, count), j + lax.rem(n, count)
        at = pl.ds(i * size, size)
        queries, up = q[at, g, :], d_out[at, g, :]
        weights = jnp.exp2(_dot(keys, queries, trans_b=True) * _scale(q) - logsumexp[g, at][None, :])
        weights = jnp.where(_seen(i, j, until, size, keys_down=True), weights, 0.0)
        d_logits = weights * (_dot(values, up, trans_b=True) - slope[g, at][None, :])
        return (sums[0] + _dot(d_logits.astype(queries.dtype), queries),
                sums[1] + _dot(weights.astype(up.dtype), up))

    none = jnp.zeros(keys.shape, jnp.float32)
    total_k, total_v = lax.fori_loop(0, q.shape[1] * count, add, (none, none))
    d_k[...] = (total_k * q.shape[-1]**-0.5).astype(d_k.dtype)
    d_v[...] = total_v.astype(d_v.dtype)


def _of_ring(column, age, qkv, keys, values, out, logsumexp, new_keys, new_values, *, size: int):
    G, S = out.shape[0], keys.shape[0]
    column, age = column[0], age[0]
    heads = max(16, pl.next_power_of_2(G))  # at least what the processor multiplies
    mine, is_head = pl.ds(0, heads), jnp.arange(heads) < G
    queries = triton.load(qkv.at[mine, :], mask=is_head[:, None], other=0.0)
    key, value = qkv[G, :], qkv[G + 1, :]
    new_keys[column, :], new_values[column, :] = key, value
    oldest = lax.rem(column - age + S, S)
    count = jnp.minimum(pl.cdiv(lax.rem(oldest, size) + age, size), S // size)

    def add(n, sums):
        j = lax.rem(lax.div(oldest, size) + n, S // size)
        at = pl.ds(j * size, size)
        back = lax.rem(column - (j * size + jnp.arange(size)) + S, S)
        seen = (0 < back) & (back <= age)  # nothing else is read: the new token is here already
        own_keys, own_values = (triton.load(ring.at[at, :], mask=seen[:, None], other=0.0) for ring in (keys, values))
        logits = jnp.where(seen[None, :], _dot(queries, own_keys, trans_b=True) * _scale(keys), LOW)
        return _add(sums, logits, own_values)

    own = jnp.sum(queries.astype(jnp.float32) * key.astype(jnp.float32)[None, :], 1) * _scale(keys)
    sums = own, jnp.ones_like(own), jnp.zeros(queries.shape, jnp.float32) + value.astype(jnp.float32)[None, :]
    top, total, mixed = lax.fori_loop(0, count, add, sums)
    triton.store(out.at[mine, :], (mixed / total[:, None]).astype(out.dtype), mask=is_head[:, None])
    triton.store(logsumexp.at[mine], top * math.log(2) + jnp.log(total), mask=is_head)


def _nothing(queries) -> tuple:
    """A softmax over no keys yet: its largest logit, its sum, and the weighted sum of the values."""
    none = jnp.zeros(queries.shape[0], jnp.float32)
    return none + LOW, none, jnp.zeros(queries.shape, jnp.float32)


def _add(sums: tuple, logits, values) -> tuple:
    """One block of keys to the softmax over those before it."""
    top, total, mixed = sums
    new = jnp.maximum(top, logits.max(1))
    weights, shrunk = jnp.exp2(logits - new[:, None]), jnp.exp2(top - new)
    return new, total * shrunk + weights.sum(1), mixed * shrunk[:, None] + _dot(weights.astype(values.dtype), values)


def _seen(i, j, until, size: int, keys_down: bool = False):
    """Which of block j of keys each of block i of queries sees: queries down and keys across, or the other way."""
    t, s = i * size + jnp.arange(size), j * size + jnp.arange(size)
    t, s, until = (t[None, :], s[:, None], until[:, None]) if keys_down else (t[:, None], s[None, :], until[None, :])
    return (s <= t) & (t < until)


def _scale(q) -> float:
    return math.log2(math.e) * q.shape[-1]**-0.5


def _dot(a, b, **settings):
    return triton.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None, **settings)


# --- how they are called: on a grid of (blocks, heads, rows) -------------------------------------------


def _size(q) -> int:
    return BLOCK if q.dtype.itemsize == 2 and q.shape[-1] <= 128 else SMALL


def _call(kernel, size: int, grid, in_specs, out_specs, out_shape, **settings):
    name = kernel.__name__.removeprefix("_")
    stages = 1 if size == SMALL and kernel is not _of_ring else STAGES[name]
    return pl.pallas_call(
        partial(kernel, size=size), grid=grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape, name=name,
        interpret=mesh.platform() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=WARPS[name], num_stages=stages), **settings)


def _block(size: int, H: int) -> pl.BlockSpec:
    """The program's own block of one head of [R T heads H]."""
    return pl.BlockSpec((None, size, None, H), lambda i, h, r: (r, i, h, 0))


def _whole(T: int, H: int, G: int) -> pl.BlockSpec:
    """All the keys of a query's head."""
    return pl.BlockSpec((None, T, None, H), lambda i, h, r: (r, 0, lax.div(h, G), 0))


def _line(size: int) -> pl.BlockSpec:
    """The program's own block of one head of [R heads T]."""
    return pl.BlockSpec((None, None, size), lambda i, h, r: (r, h, i))


def _row(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, size), lambda i, h, r: (r, 0))


def _like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
