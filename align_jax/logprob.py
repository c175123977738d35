"""Log-probs of tokens without an array of logits: fused with the output matrix, a chunk of tokens at a time.

Only tokens that are scored are computed. Every device takes those of its own rows together, so that prompt and padding
cost nothing, and goes through them in chunks: as many as it has, whatever the static shapes. The vocabulary may be
split over the mesh's tensor axis; maximum, sum and the target's logit are then reduced over it. The backward pass
makes each chunk's logits again from the log of their normaliser, which is kept (4 bytes a token), and adds up the
gradient of the matrix in fp32. The idea of both is Cut Cross-Entropy's (arXiv:2411.09009) and Liger's.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from align_jax import mesh
from align_jax.mesh import spec

VOCAB = mesh.RULES["vocab"]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def of_tokens(head: Float[Array, "V D"], x: Float[Array, "R T D"], tokens: Int[Array, "R T"],
              sources: Int[Array, "R T"], is_scored: Bool[Array, "R T"], chunk: int) -> Float[Array, "R T"]:
    """Log-prob, fp32, of token t at the state x[:, sources[t]] where `is_scored`, 0 elsewhere.

    `chunk` is how many tokens a device has logits for at once: chunk * V / tensor fp32 numbers.
    """
    return _forward(head, x, tokens, sources, is_scored, chunk)[0]


def _forward(head, x, tokens, sources, is_scored, chunk):
    logps, normaliser = _on_every_device(partial(_local_forward, chunk=chunk), (spec("rows", None),) * 2)(
        head, x, tokens, sources, is_scored)
    return logps, (head, x, tokens, sources, is_scored, normaliser)


def _backward(chunk, kept, g):
    head, x = kept[:2]
    grads = _on_every_device(partial(_local_backward, chunk=chunk), (spec("vocab", "embed"), spec("rows", None, None)),
                             )(*kept, g)
    return grads[0].astype(head.dtype), grads[1].astype(x.dtype), *(None,) * 3


of_tokens.defvjp(_forward, _backward)


def _on_every_device(f, out_specs):
    """Run f(head, x, rows ...) on each device's own rows and its part of the vocabulary."""
    def run(head, x, *rows):
        in_specs = (spec("vocab", "embed"), spec("rows", None, None), *(spec("rows", None) for _ in rows))
        return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)(head, x, *rows)
    return run


def _local_forward(head, x, tokens, sources, is_scored, *, chunk: int):
    head, scored, take = mesh.whole(head, axis=1), *_chunks(x, tokens, sources, is_scored, chunk)

    def one(i, logps):
        states, targets, at = take(i)
        logits, is_target = _logits(head, states, targets)
        most = jax.lax.pmax(logits.max(-1), VOCAB)
        normaliser = most + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(logits - most[:, None]), -1), VOCAB))
        picked = jax.lax.psum(jnp.sum(jnp.where(is_target, logits, 0.0), -1), VOCAB)
        return logps.at[at].set(jnp.stack([picked - normaliser, normaliser], -1), mode="drop")

    nothing = jnp.zeros((tokens.size, 2), jnp.float32)
    both = jax.lax.fori_loop(0, _num_chunks(scored, chunk), one, nothing).reshape(*tokens.shape, 2)
    return both[..., 0], both[..., 1]


def _local_backward(head, x, tokens, sources, is_scored, normaliser, g, *, chunk: int):
    head, scored, take = mesh.whole(head, axis=1), *_chunks(x, tokens, sources, is_scored, chunk)
    flat_g, flat_normaliser = g.reshape(-1), normaliser.reshape(-1)

    def one(i, grads):
        states, targets, at = take(i)
        logits, is_target = _logits(head, states, targets)
        weight = flat_g.at[at].get(mode="fill", fill_value=0)[:, None]  # behind the last token: no gradient
        probs = jnp.exp(logits - flat_normaliser.at[at].get(mode="fill", fill_value=jnp.inf)[:, None])  # and no inf
        d = (weight * (jnp.where(is_target, 1.0, 0.0) - probs)).astype(head.dtype)
        d_head = jnp.einsum("BV,BD->VD", d, states, preferred_element_type=jnp.float32)
        d_states = jnp.einsum("BV,VD->BD", d, head, preferred_element_type=jnp.float32)
        return grads[0] + d_head, grads[1].at[_where(x, sources, at)].add(d_states, mode="drop")

    nothing = jnp.zeros(head.shape, jnp.float32), jnp.zeros((tokens.size, x.shape[-1]), jnp.float32)
    d_head, d_x = jax.lax.fori_loop(0, _num_chunks(scored, chunk), one, nothing)
    return mesh.sum_over_rows(d_head), jax.lax.psum(d_x, VOCAB).reshape(x.shape)


def _chunks(x, tokens, sources, is_scored, chunk: int):
    """The number of scored tokens here, and take(i) -> the i-th chunk's states, targets and places in the flat rows."""
    size = tokens.size
    places = jnp.flatnonzero(is_scored, size=-(-size // chunk) * chunk, fill_value=size)
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
