"""AdamW, the learning-rate schedule, and which weights decay."""

from collections.abc import Mapping

import jax
import numpy as np
import optax

DECAYS = ("constant", "linear", "cosine")
NO_DECAY = ("norm", "bias")  # parts of a parameter's name that exempt it from weight decay


def rates(steps: int, optim: Mapping) -> np.ndarray:
    """The learning rate of every step under the optim section of a config."""
    rate = schedule(steps=steps, **{key: optim[key] for key in optim.keys() & {"lr", "warmup", "decay", "final"}})
    return np.asarray(jax.vmap(rate)(np.arange(steps)))


def schedule(*, lr: float, steps: int, warmup: float = 0.0, decay: str = "cosine", final: float = 0.0):
    """Linear warm-up over a share of the steps, then a decay that would reach `final` * lr a step after the last."""
    if decay not in DECAYS:
        raise ValueError(f"optim.decay: got {decay!r}, available are {DECAYS}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"optim.lr: got {lr}, expected a positive number")
    if not 0 <= warmup < 1:
        raise ValueError(f"optim.warmup: got {warmup}, expected a share of the steps in [0, 1)")
    rise = round(warmup * steps)
    rest = max(steps - rise, 1)
    fall = {"constant": optax.constant_schedule(lr),
            "linear": optax.linear_schedule(lr, final * lr, rest),
            "cosine": optax.cosine_decay_schedule(lr, rest, alpha=final)}[decay]
    # The first step trains: warm-up counts 1/rise, 2/rise, ... 1.
    return optax.join_schedules([lambda step: lr * (step + 1) / max(rise, 1), fall], [rise])


def adamw(*, steps: int, lr: float, warmup: float = 0.0, decay: str = "cosine", final: float = 0.0,
          b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
          clip: float = 1.0) -> optax.GradientTransformation:
    """Make AdamW behind a global-norm clip; norms and biases do not decay."""
    rate = schedule(lr=lr, steps=steps, warmup=warmup, decay=decay, final=final)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays))


def decays(params):
    """Which leaves weight decay shrinks: all but norms and biases, as in transformers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(part in jax.tree_util.keystr(path) for part in NO_DECAY), params)
