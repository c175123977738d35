"""Log-probs of packed rows, and the sharded train step that every objective shares.

`score_tokens` is the one function that makes log-probs: training, reference passes and evaluation use it. No
[R T V] array exists, unless `Compute.keep_logits` asks for one: see logprob.py.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from align_jax import attention, logprob, lora, losses, mesh, model
from align_jax.model import ModelConfig, Params

Batch = dict  # tokens positions segments branches sources slots [R T], ref_logps weight [R P C]; see data.py


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint holds but the place in the data."""

    step: Array
    params: Params
    opt: optax.OptState


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the numbers are made; `chunk` is of tokens that a device has logits of at once.

    To `keep_logits`, as what their gradient needs, takes R * T * V / tensor numbers of `dtype` for a device's rows of a
    micro-batch.
    """

    dtype: str = "bfloat16"
    remat: str = "full"
    unroll: bool = False
    chunk: int = 1024
    keep_logits: bool = False
    attention: str = "auto"
    accumulate: int = 1

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute.dtype: got {self.dtype!r}, available are 'float32' and 'bfloat16'")
        if self.remat not in model.REMAT:
            raise ValueError(f"compute.remat: got {self.remat!r}, available are {sorted(model.REMAT)}")
        if self.attention not in ("auto", *attention.KERNELS):
            raise ValueError(f"compute.attention: got {self.attention!r}, available are {['auto', *attention.KERNELS]}")
        if self.chunk < 1 or self.accumulate < 1:
            raise ValueError(f"compute: got chunk {self.chunk}, accumulate {self.accumulate}, expected 1 or more")


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with its hyper-parameters bound, and what the step and the logs need to know of it."""

    loss: Callable  # (policy, ref, lengths) [R P C] -> ([R P], {part: [R P]})
    completions: int
    reward_scale: float  # beta in rewards = beta (policy - ref); TRL's rewards/*
    per_token: bool  # the loss is divided by scored tokens, not by examples


RANGES = {  # of the hyper-parameters
    "beta": ("a number above 0", lambda beta: 0 < beta < float("inf")),
    "n": ("2 or more", lambda n: n >= 2),
    "alpha": ("a share", lambda alpha: 0 <= alpha <= 1),
    "smoothing": ("a share below 0.5", lambda smoothing: 0 <= smoothing < 0.5),
}


def objective(name: str, **hyper) -> Objective:
    """Look a loss up by name; `n` of BoNBoN gives the beta that scales the logged rewards."""
    if name not in losses.LOSSES:
        raise ValueError(f"objective: got {name!r}, available are {sorted(losses.LOSSES)}")
    takes = inspect.getfullargspec(losses.LOSSES[name])
    missing = set(takes.kwonlyargs) - set(takes.kwonlydefaults or ()) - set(hyper)
    if missing or set(hyper) - set(takes.kwonlyargs):
        raise ValueError(f"objective {name!r}: got {sorted(hyper)}, expected {takes.kwonlyargs}")
    wrong = [f"{key} = {hyper[key]}, expected {expected}" for key, (expected, is_right) in RANGES.items()
             if key in hyper and not is_right(hyper[key])]
    if wrong:
        raise ValueError(f"objective {name!r}: got {'; '.join(wrong)}")
    beta = losses.beta_star(hyper["n"]) if "n" in hyper else hyper.get("beta", 1.0)
    return Objective(partial(losses.LOSSES[name], **hyper), losses.COMPLETIONS[name], beta, name == "sft")


def score_tokens(cfg: ModelConfig, params: Params, batch: Batch, *, compute: Compute) -> Float[Array, "R T"]:
    """Log-probability, fp32, of every token that has a slot, given what it sees; 0 of the others."""
    attend = attention.make(batch["segments"], batch["branches"], compute.attention)
    x = model.hidden(cfg, params, batch["tokens"], batch["positions"], attend, dtype=jnp.dtype(compute.dtype),
                     remat=compute.remat, unroll=compute.unroll)
    head = params.get("head", params["embed"]).astype(x.dtype)
    return logprob.of_tokens(head, x, batch["tokens"], batch["sources"], batch["slots"] >= 0, compute.chunk,
                             compute.keep_logits)


def completion_logps(cfg: ModelConfig, params: Params, batch: Batch, *, compute: Compute):
    """Summed log-probs and token counts of every completion slot: two arrays [R P C]."""
    logps = score_tokens(cfg, params, batch, compute=compute)
    shape = batch["weight"].shape
    is_of_slot = batch["slots"][..., None] == jnp.arange(shape[1] * shape[2])  # [R T PC]
    sums = jnp.sum(jnp.where(is_of_slot, logps[..., None], 0.0), axis=1)
    return sums.reshape(shape), jnp.sum(is_of_slot, axis=1).reshape(shape)


def make_step(cfg: ModelConfig, objective: Objective, tx: optax.GradientTransformation, *,
              compute: Compute) -> Callable[..., tuple[TrainState, dict]]:
    """Make the jitted step(state, batch, frozen) -> (state, metrics).

    The state is donated. `frozen` are the parameters that no gradient is taken of, those that `lora.split` leaves;
    without it all are trained.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Batch, frozen: Params | None = None):
        def sums_of(params, rows):
            return _sums(cfg, objective, compute, lora.join(params, frozen or {}), rows)

        grads, sums = _accumulate(jax.grad(sums_of, has_aux=True), state.params, batch, compute.accumulate)
        # Σ over Σ: with packing, micro-batches hold different numbers of examples.
        counted = sums["scored"] if objective.per_token else sums["examples"]
        grads = jax.tree.map(lambda g: g / jnp.maximum(counted, 1.0), grads)
        updates, opt = tx.update(grads, state.opt, state.params)
        metrics = _means(sums, counted) | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt), metrics

    return step


def make_scorer(cfg: ModelConfig, *, compute: Compute) -> Callable[[Params, Batch], Array]:
    """Make the jitted reference pass: (params, batch) -> summed log-probs [R P C].

    In the step's micro-batches, so that it has room where the step has.
    """
    @jax.jit
    def score(params: Params, batch: Batch):
        logps = jax.lax.map(lambda rows: completion_logps(cfg, params, rows, compute=compute)[0],
                            _micro(batch, compute.accumulate))
        return jnp.moveaxis(logps, 0, 1).reshape(batch["weight"].shape[0], *logps.shape[2:],
                                                 out_sharding=mesh.spec("rows", None, None))

    return score


def _sums(cfg, objective, compute, params, batch):
    """Sum of the weighted losses over the batch, and the sums of everything that is logged."""
    policy, lengths = completion_logps(cfg, params, batch, compute=compute)
    ref, weight = batch["ref_logps"], batch["weight"][..., 0]
    each, parts = objective.loss(policy, ref, lengths)
    logged = {"loss": each} | {f"loss/{name}": value for name, value in parts.items()}
    logged |= _pair_metrics(policy, ref, objective.reward_scale) if objective.completions == 2 else {
        "logps/completion": policy[..., 0]}
    sums = {name: jnp.sum(weight * value) for name, value in logged.items()}
    sums |= {"examples": jnp.sum(weight), "scored": jnp.sum(weight[..., None] * lengths),
             "tokens": _count_tokens(batch),
             "ref_gap": jnp.max(jnp.abs(policy - ref) / jnp.sqrt(jnp.maximum(lengths, 1)) * weight[..., None])}
    return sums["loss"], sums


def _count_tokens(batch):
    """Tokens of all completions with their prompts, as if no prompt were shared: TRL's num_tokens."""
    times = jnp.where(batch["branches"] == 0, batch["weight"].shape[-1], 1)
    return jnp.sum(times * (batch["segments"] > 0)).astype(jnp.float32)


def _pair_metrics(policy, ref, scale: float) -> dict:
    """What TRL users look at, under TRL's names."""
    return losses.rewards(policy, ref, beta=scale) | {"logps/chosen": policy[..., 0], "logps/rejected": policy[..., 1]}


_COUNTS = ("examples", "scored", "tokens", "ref_gap")


def _means(sums: dict, counted) -> dict:
    examples = jnp.maximum(sums["examples"], 1.0)
    means = {name: value / examples for name, value in sums.items() if name not in _COUNTS}
    return means | {"loss": sums["loss"] / jnp.maximum(counted, 1.0)} | {name: sums[name] for name in _COUNTS}


def _accumulate(grad: Callable, params: Params, batch: Batch, num_micro: int):
    """Sum gradients and metrics over micro-batches, in fp32; each takes rows from every device."""
    if num_micro == 1:
        return grad(params, batch)
    micro = _micro(batch, num_micro)

    def add(total, rows):
        grads, sums = grad(params, rows)
        gap = jnp.maximum(total[1]["ref_gap"], sums["ref_gap"])
        grads, sums = jax.tree.map(jnp.add, total, (grads, sums))
        return (grads, sums | {"ref_gap": gap}), None

    names = jax.eval_shape(grad, params, jax.tree.map(lambda value: value[0], micro))[1]
    nothing = optax.tree.zeros_like(params, dtype=jnp.float32), {name: jnp.zeros(()) for name in names}
    return jax.lax.scan(add, nothing, micro)[0]


def _micro(batch: Batch, num: int) -> Batch:
    """Split every array [R ...] into micro-batches [num R/num ...], every device keeping its rows."""
    R = batch["tokens"].shape[0]
    if R % (num * mesh.num_row_shards()):
        raise ValueError(f"{R} rows do not divide into {num} micro-batches on {mesh.num_row_shards()} row shards")

    def split(value):
        shape = (R // num, num, *value.shape[1:])
        return jnp.moveaxis(value.reshape(shape, out_sharding=mesh.spec("rows", *(None,) * value.ndim)), 1, 0)

    return {name: split(value) for name, value in batch.items()}
