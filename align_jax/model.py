"""One Llama-family Transformer: every checkpoint of the study is a setting of `ModelConfig`.

Written in flax.nnx and split once into a pure dict (`abstract`, `init`); everything outside this file sees
pytrees of arrays. Layers are stacked on a leading L axis and run with `lax.scan`. Weights keep their storage
dtype (fp32 masters in training, bf16 otherwise) and are cast to the dtype of the activations where used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from align_jax import mesh
from align_jax.mesh import spec

Params = dict  # {"embed", "final_norm", "head"?, "layers": {...}} of arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding: base frequency and how it is stretched past the trained length."""

    theta: float = 10_000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a checkpoint. Hashable, so that it can be a static argument."""

    L: int  # layers
    D: int  # model width
    N: int  # query heads
    K: int  # key-value heads
    H: int  # head dim; N * H need not be D
    F: int  # mlp width
    V: int  # vocabulary
    rope: Rope = Rope()
    norm_eps: float = 1e-5
    qkv_bias: bool = False  # Qwen2, and Llama with attention_bias
    o_bias: bool = False  # Llama with attention_bias
    tied: bool = False  # the output head is the embedding
    max_length: int = 2048  # positions the checkpoint was trained for
    init_scale: float = 0.02
    r: int = 0  # rank of the adapters beside the matrices of a layer, see lora.py; 0: there are none
    alpha: float = 16.0  # what they add is scaled by alpha / r

    @property
    def num_params(self) -> int:
        shapes = abstract(self)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _weight(rngs: nnx.Rngs, shape, axes, scale: float) -> nnx.Param:
    init = jax.nn.initializers.normal(scale)
    return nnx.Param(init(rngs.params(), shape, jnp.float32, out_sharding=spec(*axes)))


def _matrix(cfg: ModelConfig, rngs: nnx.Rngs, axes: str, scale: float) -> nnx.Param:
    return _weight(rngs, (cfg.L, *(getattr(cfg, axis) for axis in axes)), (None, *map(STORED.get, axes)), scale)


def _fill(value: float, shape, axes) -> nnx.Param:
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=spec(*axes)))


MATRICES = {  # of a layer: the axes that each takes in, and those that it gives
    "q": ("D", "NH"), "k": ("D", "KH"), "v": ("D", "KH"), "o": ("NH", "D"),
    "gate": ("D", "F"), "up": ("D", "F"), "down": ("F", "D"),
}
SPLIT = {"N": "heads", "K": "heads", "F": "mlp"}  # axes of activations on the mesh; others are whole
STORED = SPLIT | {"D": "embed"}  # and of weights


class Layers(nnx.Module):
    """All the decoder layers, each array stacked on L; inside a scan the same object is one layer."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        L, D, N, K, H = cfg.L, cfg.D, cfg.N, cfg.K, cfg.H
        small = cfg.init_scale / math.sqrt(2 * L)  # GPT-2's: keeps the residual stream's scale at any depth
        self.attn_norm = _fill(1.0, (L, D), (None, None))
        self.mlp_norm = _fill(1.0, (L, D), (None, None))
        for name, (inner, outer) in MATRICES.items():
            setattr(self, name, _matrix(cfg, rngs, inner + outer, small if outer == "D" else cfg.init_scale))
        if cfg.qkv_bias:
            self.q_bias = _fill(0.0, (L, N, H), (None, "heads", None))
            self.k_bias = _fill(0.0, (L, K, H), (None, "heads", None))
            self.v_bias = _fill(0.0, (L, K, H), (None, "heads", None))
        if cfg.o_bias:
            self.o_bias = _fill(0.0, (L, D), (None, None))
        if cfg.r:
            self.adapter_scale = cfg.alpha / cfg.r
            for name, (inner, outer) in MATRICES.items():
                fan_in = math.prod(getattr(cfg, axis) for axis in inner)
                setattr(self, name + "_a", _matrix(cfg, rngs, inner + "r", (3 * fan_in) ** -0.5))  # peft's variance
                setattr(self, name + "_b", _matrix(cfg, rngs, "r" + outer, 0.0))

    def __call__(self, x, rotate: Callable, attend: Callable, eps: float):
        """Run one layer; `attend(q, k, v) -> (mixed, kept)` decides what is seen and what is kept."""
        y = rms_norm(x, self.attn_norm, eps)
        q, k, v = (self._project(y, name) for name in "qkv")
        mixed, kept = attend(rotate(q), rotate(k), v)
        x = x + self._project(mixed, "o")
        y = rms_norm(x, self.mlp_norm, eps)
        y = jax.nn.silu(self._project(y, "gate")) * self._project(y, "up")
        return x + self._project(y, "down"), kept

    def _project(self, x, name: str):
        """x W + bias, and (alpha / r) (x A) B where there are adapters."""
        inner, outer = MATRICES[name]
        y = _times(x, getattr(self, name)[...], inner, outer)
        if hasattr(self, name + "_bias"):
            y += _cast(getattr(self, name + "_bias"), x)
        if hasattr(self, name + "_a"):
            low = _times(x, getattr(self, name + "_a")[...], inner, "r")
            y += _times(self.adapter_scale * low, getattr(self, name + "_b")[...], "r", outer)
        return checkpoint_name(y, "product")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _times(x, W, inner: str, outer: str):
    """x [R T *inner] times W [*inner *outer], in the dtype of x."""
    return jnp.einsum(f"RT{inner},{inner}{outer}->RT{outer}", x, _cast(W, x), out_sharding=_activation(outer))


def _times_backward(inner, outer, kept, g):
    # Autodiff says (g, x) and transposes, and sums over more than one axis, for which XLA's CPU compiler copies g or x;
    # and it would keep W cast.
    x, W = kept
    dx = jnp.einsum(f"RT{outer},{inner}{outer}->RT{inner}", g, _cast(W, g), out_sharding=_activation(inner))
    dW = jnp.einsum("ti,to->io", _as_matrix(x, inner), _as_matrix(g, outer),
                    out_sharding=spec(STORED.get(inner[0]), STORED.get(outer[0])))
    return dx, _cast(dW.reshape(W.shape, out_sharding=jax.typeof(W).sharding), W)


def _as_matrix(x, axes: str):
    """Of x [R T *axes] a row for every token."""
    return x.reshape(-1, math.prod(x.shape[2:]), out_sharding=spec("rows", SPLIT.get(axes[0])))


def _activation(axes: str):
    return spec("rows", None, *map(SPLIT.get, axes))


_times.defvjp(lambda x, W, inner, outer: (_times(x, W, inner, outer), (x, W)), _times_backward)


class Transformer(nnx.Module):
    """Token ids to final hidden states; `head` and `unembed` turn those into logits, a few positions at a time."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        self.embed = _weight(rngs, (cfg.V, cfg.D), ("vocab", "embed"), cfg.init_scale)
        self.layers = Layers(cfg, rngs)
        self.final_norm = _fill(1.0, (cfg.D,), (None,))
        if not cfg.tied:
            self.head = _weight(rngs, (cfg.V, cfg.D), ("vocab", "embed"), cfg.init_scale)


def init(cfg: ModelConfig, seed: int) -> Params:
    """Make random fp32 parameters, each on its own shard of the mesh that is set."""
    return _init(cfg, seed)


@partial(jax.jit, static_argnames="cfg")
def _init(cfg: ModelConfig, seed):
    return _pure(Transformer(cfg, nnx.Rngs(jax.random.key(seed))))


def abstract(cfg: ModelConfig) -> Params:
    """Shapes of the parameters, with their `.sharding.spec`, without making them."""
    return jax.eval_shape(lambda: _pure(Transformer(cfg, nnx.Rngs(0))))


def hidden(cfg: ModelConfig, params: Params, tokens: Int[Array, "R T"], positions: Int[Array, "R T"],
           attend: Callable, *, dtype=jnp.float32, remat: str = "none",
           unroll: bool = False) -> Float[Array, "R T D"]:
    """Run packed rows; `attend(q [R T N H], k [R T K H], v) -> [R T N H]` says which token sees which.

    `unroll` makes no loop of the layers: what the backward pass needs of each is not copied into an array of all. It is
    for remat "none": with the others XLA may keep more than they say.
    """
    if remat not in REMAT:
        raise ValueError(f"remat: got {remat!r}, available are {sorted(REMAT)}")
    rotate = rotation(cfg.rope, positions, cfg.H, dtype)

    def layer(x, weights):
        x = checkpoint_name(x, "layer_input")
        return _layer(cfg, weights)(x, rotate, lambda q, k, v: (attend(q, k, v), None), cfg.norm_eps)

    if remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=unroll)
    x, _ = jax.lax.scan(layer, embed(params, tokens, dtype), params["layers"], unroll=unroll)
    return rms_norm(x, params["final_norm"], cfg.norm_eps)


def embed(params: Params, tokens: Int[Array, "R T"], dtype) -> Float[Array, "R T D"]:
    """Look the tokens up."""
    return _lookup(params["embed"], tokens, jnp.dtype(dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table, tokens, dtype):
    # Tokens are fewer than V: a device takes its part of D for the rows of all and they exchange; no table is gathered.
    return jax.shard_map(partial(_take, dtype=dtype), in_specs=(spec("vocab", "embed"), spec("rows", None)),
                         out_specs=spec("rows", None, None), check_vma=False)(table, tokens)


def _take(table, tokens, *, dtype):
    at, is_here = _places(table, tokens)
    x = jnp.where(is_here[..., None], table.at[at].get(mode="clip").astype(dtype), 0)
    return mesh.with_rows_split(mesh.sum_over(mesh.RULES["vocab"], x))


def _lookup_backward(dtype, kept, g):
    specs = spec("vocab", "embed"), spec("rows", None), spec("rows", None, None)
    return jax.shard_map(_add_up, in_specs=specs, out_specs=specs[0], check_vma=False)(*kept, g), None


def _add_up(table, tokens, g):
    """The gradient of this device's part of the table, summed in fp32: in bf16 a frequent token's stops growing."""
    at, is_here = _places(table, tokens)
    at = jnp.where(is_here, at, len(table))  # beyond the end, and so dropped
    g = mesh.with_embed_split(g).astype(jnp.float32)
    sums = jnp.zeros(table.shape, jnp.float32).at[at].add(g, mode="drop")
    return mesh.sum_over("data", sums).astype(table.dtype)


def _places(table, tokens):
    """Where the rows' tokens stand in this device's part of V, and which do; the rows of all that have a part of D."""
    at = mesh.whole(tokens, axis=0) - jax.lax.axis_index(mesh.RULES["vocab"]) * len(table)
    return at, (at >= 0) & (at < len(table))


_lookup.defvjp(lambda table, tokens, dtype: (_lookup(table, tokens, dtype), (table, tokens)), _lookup_backward)


def head(params: Params, dtype) -> Float[Array, "V D"]:
    """The output matrix, gathered over fsdp: once, and not again in every chunk of a loop over logits."""
    return jax.sharding.reshard(params.get("head", params["embed"]).astype(dtype), spec("vocab", None))


def unembed(head: Float[Array, "V D"], x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Project hidden states to fp32 logits; the vocabulary stays split over the tensor axis."""
    middle = (None,) * (x.ndim - 2)
    return jnp.einsum("...D,VD->...V", x, head, preferred_element_type=jnp.float32,
                      out_sharding=spec("rows", *middle, "vocab"))


_policies = jax.checkpoint_policies
REMAT = {  # what is kept of a layer for the backward pass, beside its input
    "none": None,  # all of it
    "dots": _policies.save_only_these_names("product", "mixed"),  # what products with weights, and attention, gave
    "mixed": _policies.save_only_these_names("mixed"),  # what attention gave: it is not run again (but by cuDNN)
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(  # the inputs too wait in the host's memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input", "mixed"],
        offload_src="device", offload_dst="pinned_host"),
}


def _layer(cfg: ModelConfig, weights: dict) -> Layers:
    return nnx.merge(_layer_graph(cfg), weights)


@functools.cache
def _layer_graph(cfg: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Layers(cfg, nnx.Rngs(0))), nnx.Param)[0]


def _pure(module: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.split(module, nnx.Param)[1])


def _cast(weight, like):
    return weight.astype(like.dtype)


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Normalise in fp32 and scale in the dtype of x, as transformers' LlamaRMSNorm does."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * _cast(weight, x)


def rotation(rope: Rope, positions: Int[Array, "R T"], H: int, dtype) -> Callable:
    """Return the function that turns [R T N H] by its positions, halves paired as in transformers."""
    angles = positions[..., None, None].astype(jnp.float32) * _frequencies(rope, H)
    cos, sin = jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)

    def rotate(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    return rotate


def _frequencies(rope: Rope, H: int) -> Array:
    """Angles per position [H / 2]; the llama3 form is that of transformers/modeling_rope_utils.py."""
    freq = 1.0 / rope.theta ** (jnp.arange(0, H, 2, dtype=jnp.float32) / H)
    if rope.scaling == "linear":
        return freq / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_length * freq / (2 * math.pi)  # full turns within the trained length
        span = rope.high_freq_factor - rope.low_freq_factor
        blend = jnp.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
        return blend * freq + (1 - blend) * freq / rope.factor
    return freq
