"""Flash attention on a GPU, written in Pallas and compiled by Triton: blocks that nobody sees are not touched.

FlashAttention-2 (arXiv:2307.08691) under the mask of FlashMask (arXiv:2410.01359): the query at t sees the key at s iff
s <= t < until[s]. Logits are in base 2. A gradient is two kernels, which compute the weights again: one goes over the
keys of a block of queries, and one over the queries of a block of keys.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Int

from align_jax import mesh

LOW = -1e30  # a logit that nothing sees; finite, so that a block without a visible key stays a number


@dataclasses.dataclass(frozen=True, order=True)
class Tile:
    """Queries and keys at a time, and what Triton is told of a kernel."""

    q: int
    k: int
    warps: int
    stages: int


TILES = {  # for 2 bytes a number and heads of up to 128: the best of those tried on an H200, and small enough for an L4
    "forward": Tile(64, 64, 4, 3),
    "dq": Tile(64, 64, 4, 2),
    "dkv": Tile(64, 64, 4, 2),
}
SMALL = Tile(32, 32, 4, 1)  # for others
LONGEST = max(max(tile.q, tile.k) for tile in TILES.values())  # what T must be a multiple of


def prepare(until: Int[Array, "R T"]) -> dict:
    """Where the kernels' loops begin and end."""
    return {"until": until, "ends": {tile: _ends(until, tile) for tile in (*TILES.values(), SMALL)}}


def _ends(until, tile: Tile) -> tuple:
    """The first block of keys [R T/q] that a block of queries sees, and the end of the queries [R T/k] that see one."""
    R, T = until.shape
    most = until.reshape(R, T // tile.k, tile.k).max(-1)
    first = jnp.argmax(most[:, None, :] > jnp.arange(0, T, tile.q)[:, None], axis=-1)
    return first.astype(jnp.int32), (most + tile.q - 1) // tile.q


def forward(rows: dict, q, k, v) -> tuple:
    """The output [R T N H], and the log, to base 2, of each softmax's sum [R N T]."""
    R, T, N, H = q.shape
    tile = _tile("forward", q)
    of_queries, of_keys = _block(tile.q, H), _whole(T, H, N // k.shape[2])
    return _call(_forward, tile, (T // tile.q, N, R),
                 [_row(T), _row(T // tile.q), of_queries, of_keys, of_keys], [of_queries, _line(tile.q)],
                 [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((R, N, T), jnp.float32)])(
        rows["until"], rows["ends"][tile][0], q, k, v)


def backward(rows: dict, q, k, v, out, logsumexp, d_out) -> tuple:
    """The gradients of q, k and v."""
    R, T, N, H = q.shape
    K = k.shape[2]
    slope = jnp.einsum("RTNH,RTNH->RNT", out, d_out, preferred_element_type=jnp.float32)  # what the softmax takes off

    tile = _tile("dq", q)
    mine, theirs, line = _block(tile.q, H), _whole(T, H, N // K), _line(tile.q)
    d_q = _call(_d_queries, tile, (T // tile.q, N, R),
                [_row(T), _row(T // tile.q), mine, theirs, theirs, mine, line, line], mine,
                jax.ShapeDtypeStruct(q.shape, q.dtype))(
        rows["until"], rows["ends"][tile][0], q, k, v, d_out, logsumexp, slope)

    tile = _tile("dkv", q)
    mine = _block(tile.k, H)
    group = pl.BlockSpec((None, T, N // K, H), lambda j, h, r: (r, 0, h, 0))
    lines = pl.BlockSpec((None, N // K, T), lambda j, h, r: (r, h, 0))
    d_k, d_v = _call(_d_keys, tile, (T // tile.k, K, R),
                     [pl.BlockSpec((None, tile.k), lambda j, h, r: (r, j)), _row(T // tile.k), mine, mine, group, group,
                      lines, lines], [mine, mine], [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2)(
        rows["until"], rows["ends"][tile][1], k, v, q, d_out, logsumexp, slope)
    return d_q, d_k, d_v


def of_ring(q, keys, values, column, age) -> tuple:
    """Attend [R K G H] to a ring's columns [R K S H], of which row r sees the age[r] + 1 that end with `column`.

    Returns the weighted sum [R K G H] of the values, each softmax's largest logit, to base e, and its sum [R K G].
    """
    R, K, G, H = q.shape
    S = keys.shape[2]
    tile = Tile(max(16, pl.next_power_of_2(G)), next(k for k in (64, 32, 16) if S % k == 0), 4, 3)
    heads, ring = (pl.BlockSpec((None, None, size, H), lambda h, r: (r, h, 0, 0)) for size in (G, S))
    line = pl.BlockSpec((None, None, G), lambda h, r: (r, h, 0))
    numbers = jax.ShapeDtypeStruct((R, K, G), jnp.float32)
    return _call(_of_ring, tile, (K, R), [pl.BlockSpec((1,), lambda h, r: (0,)), pl.BlockSpec((1,), lambda h, r: (r,)),
                                          heads, ring, ring], [heads, line, line],
                 [jax.ShapeDtypeStruct(q.shape, jnp.float32), numbers, numbers])(column[None], age, q, keys, values)


# --- the kernels: one block each of queries or of keys, one head, one row ------------------------------


def _forward(until, first, q, k, v, out, logsumexp, *, tile: Tile):
    i, queries = pl.program_id(0), q[...]

    def add(j, sums):
        at = pl.ds(j * tile.k, tile.k)
        logits = jnp.where(_seen(i, j, until[at], tile), _dot(queries, k[at, :], trans_b=True) * _scale(q), LOW)
        return _add(sums, logits, v[at, :])

    top, total, mixed = lax.fori_loop(first[i], pl.cdiv((i + 1) * tile.q, tile.k), add, _nothing(queries))
    out[...] = (mixed / total[:, None]).astype(out.dtype)
    logsumexp[...] = top + jnp.log2(total)


def _d_queries(until, first, q, k, v, d_out, logsumexp, slope, d_q, *, tile: Tile):
    i, queries, up = pl.program_id(0), q[...], d_out[...]
    logsumexp, slope = logsumexp[...][:, None], slope[...][:, None]

    def add(j, total):
        at = pl.ds(j * tile.k, tile.k)
        keys = k[at, :]
        weights = jnp.exp2(_dot(queries, keys, trans_b=True) * _scale(q) - logsumexp)
        weights = jnp.where(_seen(i, j, until[at], tile), weights, 0.0)
        d_logits = weights * (_dot(up, v[at, :], trans_b=True) - slope)
        return total + _dot(d_logits.astype(keys.dtype), keys)

    total = lax.fori_loop(first[i], pl.cdiv((i + 1) * tile.q, tile.k), add, jnp.zeros(queries.shape, jnp.float32))
    d_q[...] = (total * q.shape[-1]**-0.5).astype(d_q.dtype)


def _d_keys(until, end, k, v, q, d_out, logsumexp, slope, d_k, d_v, *, tile: Tile):
    j, keys, values, until = pl.program_id(0), k[...], v[...], until[...]
    start = lax.div(j * tile.k, tile.q)
    count = end[j] - start  # blocks of queries, of each head of the group

    def add(n, sums):  # keys down, queries across
        g, i = lax.div(n, count), start + lax.rem(n, count)
        at = pl.ds(i * tile.q, tile.q)
        queries, up = q[at, g, :], d_out[at, g, :]
        weights = jnp.exp2(_dot(keys, queries, trans_b=True) * _scale(q) - logsumexp[g, at][None, :])
        weights = jnp.where(_seen(i, j, until, tile, keys_down=True), weights, 0.0)
        d_logits = weights * (_dot(values, up, trans_b=True) - slope[g, at][None, :])
        return (sums[0] + _dot(d_logits.astype(queries.dtype), queries),
                sums[1] + _dot(weights.astype(up.dtype), up))

    none = jnp.zeros(keys.shape, jnp.float32)
    total_k, total_v = lax.fori_loop(0, q.shape[1] * count, add, (none, none))
    d_k[...] = (total_k * q.shape[-1]**-0.5).astype(d_k.dtype)
    d_v[...] = total_v.astype(d_v.dtype)


def _of_ring(column, age, q, keys, values, out, top_out, total_out, *, tile: Tile):
    G, S = q.shape[0], keys.shape[0]
    column, age, is_head = column[0], age[0], jnp.arange(tile.q) < G
    queries = triton.load(q.at[pl.ds(0, tile.q), :], mask=is_head[:, None], other=0.0)
    oldest = lax.rem(column - age + S, S)
    count = jnp.minimum(pl.cdiv(lax.rem(oldest, tile.k) + age + 1, tile.k), S // tile.k)

    def add(n, sums):
        j = lax.rem(lax.div(oldest, tile.k) + n, S // tile.k)
        at = pl.ds(j * tile.k, tile.k)
        seen = lax.rem(column - (j * tile.k + jnp.arange(tile.k)) + S, S) <= age
        logits = jnp.where(seen[None, :], _dot(queries, keys[at, :], trans_b=True) * _scale(q), LOW)
        return _add(sums, logits, values[at, :])

    top, total, mixed = lax.fori_loop(0, count, add, _nothing(queries))
    triton.store(out.at[pl.ds(0, tile.q), :], mixed, mask=is_head[:, None])
    triton.store(top_out.at[pl.ds(0, tile.q)], top / math.log2(math.e), mask=is_head)
    triton.store(total_out.at[pl.ds(0, tile.q)], total, mask=is_head)


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


def _seen(i, j, until, tile: Tile, keys_down: bool = False):
    """Which of a block of keys each of a block of queries sees [q k], or [k q]."""
    t, s = i * tile.q + jnp.arange(tile.q), j * tile.k + jnp.arange(tile.k)
    t, s, until = (t[None, :], s[:, None], until[:, None]) if keys_down else (t[:, None], s[None, :], until[None, :])
    return (s <= t) & (t < until)


def _scale(q) -> float:
    return math.log2(math.e) * q.shape[-1]**-0.5


def _dot(a, b, **settings):
    return triton.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None, **settings)


# --- how they are called: on a grid of (blocks, heads, rows) -------------------------------------------


def _tile(kernel: str, q) -> Tile:
    return TILES[kernel] if q.dtype.itemsize == 2 and q.shape[-1] <= 128 else SMALL


def _call(kernel, tile: Tile, grid, in_specs, out_specs, out_shape):
    return pl.pallas_call(
        partial(kernel, tile=tile), grid=grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape,
        interpret=mesh.platform() == "cpu", name=kernel.__name__.strip("_"),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages))


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
