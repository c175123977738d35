"""Low-rank adapters beside the matrices of a frozen model, LoRA: y = x W + (alpha / r) (x A) B; arXiv:2106.09685.

Only A and B are trained. B starts at 0, so that the model with its adapters starts as the model without: the base is
policy and reference at once, and one copy of the weights is in memory. The adapters of the matrix `q` are
`params["layers"]["q_a"]` [L D r] and `["q_b"]` [L r N H]; a config with r > 0 says that they are there.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from align_jax import model
from align_jax.model import MATRICES, ModelConfig, Params

F32 = jnp.float32


def config(cfg: ModelConfig, *, rank: int, alpha: float) -> ModelConfig:
    """The config of a model with adapters; rank 0: without."""
    most = min(cfg.D, cfg.N * cfg.H, cfg.K * cfg.H, cfg.F)
    if not 0 <= rank <= most:
        raise ValueError(f"lora.rank: got {rank}, expected 0 to {most}, the smallest side of a matrix")
    return dataclasses.replace(cfg, r=rank, alpha=alpha) if rank else cfg


def add(cfg: ModelConfig, params: Params, *, seed: int) -> Params:
    """Put the adapters of this config beside the weights: fp32, whatever the dtype of those."""
    if not cfg.r:
        return params
    adapters = jax.jit(lambda: split(model.init(cfg, seed))[0])()  # of the rest nothing is made
    return join(adapters, params)


def split(params: Params) -> tuple[Params, Params]:
    """What is trained and what is frozen: the adapters and the rest or, where there are none, all and nothing."""
    layers = params["layers"]
    adapters = {name for name in layers if name.endswith(("_a", "_b"))}
    if not adapters:
        return params, {}
    trained, frozen = ({name: layers[name] for name in names} for names in (adapters, layers.keys() - adapters))
    return {"layers": trained}, params | {"layers": frozen}


def join(trained: Params, frozen: Params) -> Params:
    """Undo `split`."""
    return frozen | trained | {"layers": frozen.get("layers", {}) | trained["layers"]}


def merge(cfg: ModelConfig, params: Params, *, dtype) -> Params:
    """Plain parameters with W + (alpha / r) A B, summed in fp32 and rounded once, to `dtype`.

    Every W is given up for its sum: both copies of a large model at once would not fit.
    """
    if not cfg.r:
        return params
    layers = dict(params["layers"])
    for name, (inner, outer) in MATRICES.items():
        W, A, B = layers[name], layers.pop(name + "_a"), layers.pop(name + "_b")
        layers[name] = _merged(W, A, B, equation=f"{inner}r,r{outer}->{inner}{outer}", scale=cfg.alpha / cfg.r,
                               dtype=dtype)
        W.delete()
    return params | {"layers": layers}


@partial(jax.jit, static_argnames=("equation", "scale", "dtype"))
def _merged(W, A, B, *, equation: str, scale: float, dtype):
    def one(layer):  # layer by layer: A B of all would be as large as the fp32 weights
        w, a, b = (x.astype(F32) for x in layer)
        added = jnp.einsum(equation, a, b, precision="highest", out_sharding=jax.typeof(w).sharding.spec)
        return (w + scale * added).astype(dtype)

    return jax.lax.map(one, (W, A, B))
