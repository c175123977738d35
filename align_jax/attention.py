"""Attention over packed rows, per platform behind one function.

A row holds examples one after the other, each as prompt, completion 0, completion 1, ...; all completions of an
example share its one prompt and do not see each other. Two int32 arrays [R T] say so: `segments`, the number of
the example in its row (0 is padding), and `branches`, 0 in the prompt and c + 1 in completion c. Query t sees key s
iff s <= t, both are of one segment, and s is of the prompt or of t's own branch. With all branches 0 a segment is
an ordinary causal sequence.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from align_jax.mesh import spec


def make(segments: Int[Array, "R T"], branches: Int[Array, "R T"], impl: str = "auto") -> Callable:
    """Return attend(q [R T N H], k [R T K H], v [R T K H]) -> [R T N H] for these rows, made once for all layers.

    Logits and softmax are fp32. `impl` is a name of IMPLS or "auto", which picks by the platform of the mesh.
    """
    if impl == "auto":
        impl = BY_PLATFORM[jax.sharding.get_abstract_mesh().abstract_device.platform]
    if impl not in IMPLS:
        raise ValueError(f"attention: got {impl!r}, available are 'auto', {', '.join(map(repr, IMPLS))}")
    return IMPLS[impl](segments, branches)


def visible(segments: Int[Array, "R T"], branches: Int[Array, "R T"]) -> Bool[Array, "R T S"]:
    """The dense mask, True where query t sees key s."""
    T = segments.shape[1]
    own = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    return (segments[:, :, None] == segments[:, None, :]) & own & jnp.tril(jnp.ones((T, T), bool))


def _xla(segments, branches) -> Callable:
    mask = visible(segments, branches)[:, None, None]

    def attend(q: Float[Array, "R T N H"], k: Float[Array, "R S K H"], v: Float[Array, "R S K H"]):
        R, T, N, H = q.shape
        K = k.shape[2]
        q = q.reshape(R, T, K, N // K, H, out_sharding=spec("rows", None, "heads", None, None))
        logits = jnp.einsum("RTKGH,RSKH->RKGTS", q, k, preferred_element_type=jnp.float32) * H**-0.5
        weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1).astype(q.dtype)
        mixed = jnp.einsum("RKGTS,RSKH->RTKGH", weights, v)
        return mixed.reshape(R, T, N, H, out_sharding=spec("rows", None, "heads", None))

    return attend


IMPLS = {"xla": _xla}
BY_PLATFORM = {"cpu": "xla"}
