"""AdamW, the learning-rate schedule, which weights decay, and where the optimiser's memory is kept."""

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
          clip: float = 1.0, offload: bool = False) -> optax.GradientTransformation:
    """Make AdamW behind a global-norm clip; norms and biases do not decay. `offload` keeps its state in host memory."""
    rate = schedule(lr=lr, steps=steps, warmup=warmup, decay=decay, final=final)
    adam = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(clip), offloaded(adam) if offload else adam)


def decays(params):
    """Which leaves weight decay shrinks: all but norms and biases, as in transformers."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(part in jax.tree_util.keystr(path) for part in NO_DECAY), params)


def offloaded(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the arrays that `tx` remembers in the host's memory; `tx` has to treat every element by itself.

    The layers, stacked on L, are updated one after the other, so that the device holds one layer's share, while the
    next one's comes and the last one's goes. A loop that writes in place: `lax.scan` would copy it all, on either side.
    The state has the structure of that of `tx`; updates and state are its, bit for bit.
    """
    def init(params):
        return _to(HOST, tx.init(params))

    def update(grads, state, params):
        (grads, others_grads), (state, others_state), (layers, others) = map(_apart, (grads, state, params))

        def one(l, carry):
            updates, new = tx.update(_at(l, carry[0]), _to(DEVICE, _at(l, carry[1])), _at(l, layers))
            return _put(l, carry, (updates, _to(HOST, new)))

        L = jax.tree.leaves(layers)[0].shape[0]
        updates, state = jax.lax.fori_loop(0, L, one, (grads, state))
        others_updates, others_state = tx.update(others_grads, _to(DEVICE, others_state), others)
        return _together(updates, others_updates), _together(state, _to(HOST, others_state))

    return optax.GradientTransformation(init, update)


HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def _to(space: jax.memory.Space, state):
    """Move the arrays; counts stay on the device."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, state)


def _at(l, stacked):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, l, 0, keepdims=False) if x.ndim else x, stacked)


def _put(l, stacked, one):
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, l, 0) if x.ndim else x, stacked, one)


def _apart(tree):
    """What is of the layers and what is not, of parameters or of a state, whose dicts are like them."""
    return (jax.tree.map(lambda x: x["layers"] if _is_dict(x) else x, tree, is_leaf=_is_dict),
            jax.tree.map(lambda x: {key: x[key] for key in x if key != "layers"} if _is_dict(x) else x, tree,
                         is_leaf=_is_dict))


def _together(layers, others):
    return jax.tree.map(lambda x, stacked: x | {"layers": stacked} if _is_dict(x) else x, others, layers,
                        is_leaf=_is_dict)


def _is_dict(x) -> bool:
    return isinstance(x, dict)
