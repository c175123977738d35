"""Attention over packed rows, one function over a kernel per platform.

A row holds examples one after the other, each as prompt, completion 0, completion 1, ...; the completions of an
example share its one prompt and do not see each other. Two int32 arrays [R T] say so: `segments`, the number of
the example in its row (0 is padding), and `branches`, 0 in the prompt and c + 1 in completion c. Query t sees key s
iff s <= t, both are of one segment, and s is of the prompt or of t's own branch. With all branches 0 a segment is
an ordinary causal sequence. So a key is seen by the queries from its own place on `until` its branch ends, or its
segment if it is of a prompt; one int32 array [R T] says it all (FlashMask, arXiv:2410.01359), and kernels get that.

A kernel is two functions that run on each device's own rows and heads: `prepare(until)` makes what all layers share,
once, and `attend(prepared, q, k, v)` is one layer. Both get whole rows: time is never split.
"""

from collections.abc import Callable
from functools import partial

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Int

from align_jax import flash, mesh
from align_jax.flash import LOW
from align_jax.mesh import spec

SAVED = "mixed"  # the name, for remat policies, of what the backward pass wants kept: the output and [R N T]
SHORT = 128  # rows up to here are attended at once by "xla": quicker to compile, and small
BLOCK = 64  # queries, and keys, at a time in longer ones: on short examples a third less work than 128
TPU_BLOCK, LANES = 512, 128  # the same of "splash": at most, and what it must be a multiple of


def make(segments: Int[Array, "R T"], branches: Int[Array, "R T"], impl: str = "auto") -> Callable:
    """Return attend(q [R T N H], k [R T K H], v [R T K H]) -> [R T N H] for these rows, made once for all layers.

    Logits and softmax are fp32. `impl` is a name of KERNELS or "auto", which goes by the platform of the mesh.
    Any T is taken. Heads that "triton" does not have (flash.has_kernels) are cuDNN's; what that does not have (fp32,
    H above 128 or not a multiple of 8, odd T) is computed with logits in memory.
    """
    impl = BY_PLATFORM[mesh.platform()] if impl == "auto" else impl
    if impl not in KERNELS:
        raise ValueError(f"attention: got {impl!r}, available are 'auto', {', '.join(map(repr, KERNELS))}")
    if mesh.platform() not in ("cpu", ONLY_ON.get(impl, mesh.platform())):  # a CPU interprets them
        raise ValueError(f"attention: {impl!r} is for a {ONLY_ON[impl]}, got a {mesh.platform()}; 'auto' is for all")
    prepare, attend = KERNELS[impl]
    rows, heads = spec("rows"), spec("rows", None, "heads", None)
    segments, branches = (jax.sharding.reshard(x, spec("rows", None)) for x in (segments, branches))
    prepared = jax.shard_map(lambda *layout: prepare(_until(*layout)), in_specs=(rows, rows), out_specs=rows,
                             check_vma=False)(segments, branches)
    return partial(jax.shard_map(attend, in_specs=(rows, heads, heads, heads), out_specs=heads, check_vma=False),
                   prepared)


def visible(segments: Int[Array, "R T"], branches: Int[Array, "R T"]) -> Bool[Array, "R T S"]:
    """The dense mask, True where query t sees key s."""
    return _visible(_until(segments, branches))


def _until(segments, branches):
    """The place [R T] behind the last query that sees a key."""
    T = segments.shape[1]

    def next_start(*runs):
        starts = sum(x[:, 1:] != x[:, :-1] for x in runs) > 0
        places = jnp.where(starts, jnp.arange(1, T), T)
        return lax.cummin(jnp.pad(places, [(0, 0), (0, 1)], constant_values=T), axis=1, reverse=True)

    return jnp.where(branches == 0, next_start(segments), next_start(segments, branches)).astype(jnp.int32)


def _visible(until) -> Bool[Array, "R T S"]:
    T = until.shape[1]
    return jnp.tril(jnp.ones((T, T), bool)) & (jnp.arange(T)[:, None] < until[:, None, :])


def _dense(mask, q, k, v, *, implementation="xla"):
    mixed = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], is_causal=True, implementation=implementation)
    return checkpoint_name(mixed, SAVED)


# Flash attention with its own backward pass, (forward, backward) of a platform.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(kernel, rows, q, k, v):
    return _flash_forward(kernel, rows, q, k, v)[0]


def _flash_forward(kernel, rows, q, k, v):
    out, logsumexp = (checkpoint_name(x, SAVED) for x in kernel[0](rows, q, k, v))
    return out, (rows, q, k, v, out, logsumexp)


def _flash_backward(kernel, kept, d_out):
    return None, *kernel[1](*kept, d_out)


_flash.defvjp(_flash_forward, _flash_backward)


# On a GPU: Pallas' Triton, which skips empty blocks; or cuDNN, told by the whole mask.


def _triton_prepare(until) -> dict:
    return flash.prepare(_pad_until(until, flash.BLOCK))


def _triton(rows, q, k, v):
    T, H = q.shape[1], q.shape[3]
    if not flash.has_kernels(H, q.dtype):
        return _cudnn(_visible(rows["until"])[:, :T, :T], q, k, v)
    return _flash((flash.forward, flash.backward), rows, *(_pad(x, flash.BLOCK) for x in (q, k, v)))[:, :T]


def _cudnn(mask, q, k, v):
    T, H = q.shape[1], q.shape[3]
    has_kernel = q.dtype in (jnp.bfloat16, jnp.float16) and H % 8 == 0 and H <= 128 and T % 2 == 0
    return _dense(mask, q, k, v, implementation="cudnn" if has_kernel else "xla")


# On a TPU: splash attention, which skips the blocks where the mask is empty.


def _splash_prepare(until):
    block = _splash_block(until.shape[1])
    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = partial(splash.make_splash_mha, block_sizes=splash.BlockSizes(**dict.fromkeys(sizes, block)),
                     head_shards=1, q_seq_shards=1, residual_checkpoint_name=SAVED, interpret=mesh.platform() == "cpu")
    # One mask for all heads of a row.
    return jax.vmap(lambda mask: kernel(mask[None]))(_visible(_pad_until(until, block)))


def _splash(kernels, q, k, v):
    T, scale = q.shape[1], q.shape[-1]**-0.5
    q, k, v = (_pad(x, _splash_block(T)).swapaxes(1, 2) for x in (q * scale, k, v))
    return jax.vmap(_splash_row)(kernels, q, k, v).swapaxes(1, 2)[:, :T]


def _splash_block(T: int) -> int:
    return min(TPU_BLOCK, T + -T % LANES)


def _splash_row(kernel, q, k, v):
    kernel.fwd_mask_info = kernel.fwd_mask_info._replace(is_dynamic_mask=True)  # vmap made an array of its flag
    return kernel(q, k, v)


# By XLA, on a CPU: blocks of queries, each over the blocks of keys from its segment's start to the diagonal.


def _xla_prepare(until) -> dict:
    if until.shape[1] <= SHORT:
        return {"mask": _visible(until)}
    until = _pad_until(until, BLOCK)
    return {"until": until, "first": flash.ends(until, BLOCK)[0]}


def _xla(rows, q, k, v):
    if "mask" in rows:
        return _dense(rows["mask"], q, k, v)
    return _flash((_xla_forward, _xla_backward), rows, *(_pad(x, BLOCK) for x in (q, k, v)))[:, :q.shape[1]]


def _xla_forward(*rows):
    return lax.map(lambda row: _forward(*row), rows)


def _xla_backward(*rows):
    return lax.map(lambda row: _backward(*row), rows)


def _forward(row, q, k, v):
    """One row: the output [T N H], and the log of each softmax's sum [blocks K G BLOCK]."""
    dtype, K = q.dtype, k.shape[1]
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))  # a CPU has no bf16 product with an fp32 result
    q, k, v = _query_blocks(q, K), _heads_first(k), _heads_first(v)

    def of_block(block):
        i, q = block

        def add(j, sums):  # one block of keys to the softmax over those before it
            top, total, out = sums
            logits = jnp.where(_seen(row, i, j), jnp.einsum("KGTH,KSH->KGTS", q, _at(k, j)) * q.shape[-1]**-0.5, LOW)
            new = jnp.maximum(top, logits.max(-1))
            weights, shrunk = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
            mixed = jnp.einsum("KGTS,KSH->KGTH", weights, _at(v, j))
            return new, total * shrunk + weights.sum(-1), out * shrunk[..., None] + mixed

        none = jnp.zeros_like(q)
        top, total, out = lax.fori_loop(row["first"][i], i + 1, add, (none[..., 0] + LOW, none[..., 0], none))
        return (out / total[..., None]).astype(dtype), top + jnp.log(total)

    out, logsumexp = lax.map(of_block, (jnp.arange(len(q)), q))
    return _join(out), logsumexp


def _backward(row, q, k, v, out, logsumexp, d_out):
    """The gradients of one row; time is last in the logits here, which makes four of five products plain ones."""
    dtype, K, scale = q.dtype, k.shape[1], q.shape[-1]**-0.5
    q, k, v, out, d_out = (x.astype(jnp.float32) for x in (q, k, v, out, d_out))
    slope = _query_blocks(d_out * out, K).sum(-1)  # what the softmax takes off
    q, d_out, k, v = _query_blocks(q, K), _query_blocks(d_out, K), _heads_first(k), _heads_first(v)

    def of_block(d_kv, block):
        i, q, d_out, logsumexp, slope = block

        def add(j, sums):
            d_q, d_k, d_v = sums
            logits = jnp.einsum("KSH,KGTH->KSGT", _at(k, j), q) * scale
            weights = jnp.where(_seen(row, i, j).T[:, None], jnp.exp(logits - logsumexp[:, None]), 0.0)
            d_weights = jnp.einsum("KSH,KGTH->KSGT", _at(v, j), d_out)
            d_logits = weights * (d_weights - slope[:, None]) * scale
            d_q = d_q + jnp.einsum("KHS,KSGT->KHGT", _at(k, j).swapaxes(1, 2), d_logits)
            d_k = _add_at(d_k, j, jnp.einsum("KSGT,KGTH->KSH", d_logits, q))
            return d_q, d_k, _add_at(d_v, j, jnp.einsum("KSGT,KGTH->KSH", weights, d_out))

        d_q = jnp.zeros_like(q, shape=(K, q.shape[-1], *q.shape[1:3]))
        d_q, *d_kv = lax.fori_loop(row["first"][i], i + 1, add, (d_q, *d_kv))
        return d_kv, d_q

    (d_k, d_v), d_q = lax.scan(of_block, [jnp.zeros_like(k)] * 2, (jnp.arange(len(q)), q, d_out, logsumexp, slope))
    d_q = _join(einops.rearrange(d_q, "i K H G t -> i K G t H"))
    return tuple(x.astype(dtype) for x in (d_q, _heads_first(d_k), _heads_first(d_v)))


def _seen(row, i, j) -> Bool[Array, "T S"]:
    """`visible` between block i of queries and block j of keys."""
    t, s = (at * BLOCK + jnp.arange(BLOCK) for at in (i, j))
    until = lax.dynamic_slice_in_dim(row["until"], j * BLOCK, BLOCK)
    return (s <= t[:, None]) & (t[:, None] < until)


def _pad(x, to: int, value=0):
    """Fill axis 1 to a multiple."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % to), *[(0, 0)] * (x.ndim - 2)], constant_values=value)


def _pad_until(until, block: int):
    """Keys that fill a row up are seen to its new end, by queries that do so too."""
    return _pad(until, block, until.shape[1] + block)


def _query_blocks(x, K: int):
    return einops.rearrange(x, "(i t) (K G) H -> i K G t H", t=BLOCK, K=K)


def _join(x):
    return einops.rearrange(x, "i K G t H -> (i t) (K G) H")


def _heads_first(x):
    return x.swapaxes(0, 1)


def _at(x, j):
    return lax.dynamic_slice_in_dim(x, j * BLOCK, BLOCK, axis=1)


def _add_at(x, j, y):
    return lax.dynamic_update_slice_in_dim(x, _at(x, j) + y, j * BLOCK, axis=1)


KERNELS = {"xla": (_xla_prepare, _xla), "splash": (_splash_prepare, _splash), "triton": (_triton_prepare, _triton),
           "cudnn": (_visible, _cudnn)}
ONLY_ON = {"splash": "tpu", "triton": "gpu", "cudnn": "gpu"}
BY_PLATFORM = {"cpu": "xla", "gpu": "triton", "tpu": "splash"}
