"""Log-probs of tokens without an array of logits: fused with the output matrix, a chunk of tokens at a time.

Only tokens that are scored are computed. Every device takes those of its own rows together, so that prompt and padding
cost nothing, and goes through them in chunks: as many as it has, whatever the static shapes. The vocabulary may be
split over the mesh's tensor axis; maximum, sum and the target's logit are then reduced over it. The backward pass
makes each chunk's logits again from the log of their normaliser, which is kept (4 bytes a token), and adds up the
gradient of the matrix in fp32. The idea of both is Cut Cross-Entropy's (arXiv:2411.09009) and Liger's. Where there is
memory for such an array, the slopes of log-probs by every logit can be kept: three products with the matrix for four.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from align_jax import mesh
from align_jax.mesh import spec

VOCAB = mesh.RULES["vocab"]
HEAD, STATES, ROWS, SLOPES = spec("vocab", "embed"), spec("rows", None, None), spec("rows", None), spec("rows", "vocab")


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def of_tokens(head: Float[Array, "V D"], x: Float[Array, "R T D"], tokens: Int[Array, "R T"],
              sources: Int[Array, "R T"], is_scored: Bool[Array, "R T"], chunk: int,
              keep: bool = False) -> Float[Array, "R T"]:
    """Log-prob, fp32, of token t at the state x[:, sources[t]] where `is_scored`, 0 elsewhere.

    `chunk` is how many tokens a device has logits for at once: chunk * V / tensor fp32 numbers. To `keep` their slopes
    takes R * T * V / tensor numbers of the head's dtype until the backward pass, which then makes no logits.
    """
    return _forward(head, x, tokens, sources, is_scored, chunk, False)[0]


def _forward(head, x, tokens, sources, is_scored, chunk, keep):
    given = head, x, tokens, sources, is_scored
    logps, kept = jax.shard_map(
        partial(_local_forward, chunk=chunk, keep=keep), in_specs=(HEAD, STATES, ROWS, ROWS, ROWS),
        out_specs=(ROWS, SLOPES if keep else ROWS), check_vma=False)(*given)
    return logps, (*given, kept)


def _backward(chunk, keep, given, g):
    d_head, d_x = jax.shard_map(
        partial(_local_backward, chunk=chunk, keep=keep), out_specs=(HEAD, STATES), check_vma=False,
        in_specs=(HEAD, STATES, ROWS, ROWS, ROWS, SLOPES if keep else ROWS, ROWS))(*given, g)
    head, x = given[:2]
    return d_head.astype(head.dtype), d_x.astype(x.dtype), *(None,) * 3


of_tokens.defvjp(_forward, _backward)


def _local_forward(head, x, tokens, sources, is_scored, *, chunk: int, keep: bool):
    """Log-probs [R T], and of each the log of its normaliser [R T], or to `keep` slopes of them in order [R*T V]."""
    head, scored, take = mesh.whole(head, axis=1), *_chunks(x, tokens, sources, is_scored, chunk)

    def one(i, made):
        logps, kept = made
        states, targets, at = take(i)
        logits, is_target = _logits(head, states, targets)
        most = jax.lax.pmax(logits.max(-1), VOCAB)
        normaliser = most + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits - most[:, None]), -1), VOCAB))
        picked = jax.lax.psum(jnp.sum(jnp.where(is_target, logits, 0.0), -1), VOCAB)
        if keep:
            slopes = _slopes(logits, is_target, normaliser).astype(head.dtype)
            kept = jax.lax.dynamic_update_slice_in_dim(kept, slopes, i * chunk, 0)
        else:
            kept = kept.at[at].set(normaliser, mode="drop")
        return logps.at[at].set(picked - normaliser, mode="drop"), kept

    nothing = jnp.zeros(tokens.size, jnp.float32)
    of_all = jnp.zeros((_num_chunks(tokens.size, chunk) * chunk, head.shape[0]), head.dtype) if keep else nothing
    logps, kept = jax.lax.fori_loop(0, _num_chunks(scored, chunk), one, (nothing, of_all))
    return logps.reshape(tokens.shape), kept if keep else kept.reshape(tokens.shape)


def _local_backward(head, x, tokens, sources, is_scored, kept, g, *, chunk: int, keep: bool):
    head, scored, take = mesh.whole(head, axis=1), *_chunks(x, tokens, sources, is_scored, chunk)

    def one(i, grads):
        states, targets, at = take(i)
        if keep:
            slopes = jax.lax.dynamic_slice_in_dim(kept, i * chunk, chunk)
        else:  # behind the last token no inf
            normaliser = kept.reshape(-1).at[at].get(mode="fill", fill_value=jnp.inf)
            slopes = _slopes(*_logits(head, states, targets), normaliser)
        weight = g.reshape(-1).at[at].get(mode="fill", fill_value=0)[:, None]  # and no gradient
        d = (weight * slopes).astype(head.dtype)
        d_head = jnp.einsum("BV,BD->VD", d, states, preferred_element_type=jnp.float32)
        d_states = jnp.einsum("BV,VD->BD", d, head, preferred_element_type=jnp.float32)
        return grads[0] + d_head, grads[1].at[_where(x, sources, at)].add(d_states, mode="drop")

    nothing = jnp.zeros(head.shape, jnp.float32), jnp.zeros((tokens.size, x.shape[-1]), jnp.float32)
    d_head, d_x = jax.lax.fori_loop(0, _num_chunks(scored, chunk), one, nothing)
    return mesh.sum_over_rows(d_head), mesh.sum_over(VOCAB, d_x).reshape(x.shape)


def _chunks(x, tokens, sources, is_scored, chunk: int):
    """The number of scored tokens here, and take(i) -> the i-th chunk's states, targets and places in the flat rows."""
    size = tokens.size
    places = jnp.flatnonzero(is_scored, size=_num_chunks(size, chunk) * chunk, fill_value=size)
    flat_x, flat_tokens = x.reshape(size, -1), tokens.reshape(-1)

    def take(i):
        at = jax.lax.dynamic_slice(places, [i * chunk], [chunk])
        return flat_x.at[_where(x, sources, at)].get(mode="clip"), flat_tokens.at[at].get(mode="clip"), at

    return jnp.sum(is_scored), take


def _where(x, sources, at):
    """The place in the flat rows of the state that predicts the token at `at`; beyond them for one beyond them."""
    T = x.shape[1]
    return at // T * T + sources.reshape(-1).at[at].get(mode="fill", fill_value=0)


def _num_chunks(count, chunk: int):
    return (count + chunk - 1) // chunk


def _logits(head, states, targets):
    """fp32 logits [chunk V / tensor] of this device's part of the vocabulary, and which one is the target's."""
    logits = jnp.einsum("BD,VD->BV", states, head, preferred_element_type=jnp.float32)
    first = jax.lax.axis_index(VOCAB) * head.shape[0]
    return logits, first + np.arange(head.shape[0]) == targets[:, None]


def _slopes(logits, is_target, normaliser):
    """The derivative of each log-prob by each of its logits, fp32."""
    return jnp.where(is_target, 1.0, 0.0) - jnp.exp(logits - normaliser[:, None])
