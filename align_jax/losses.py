"""The objectives, as pure functions of sequence log-probabilities.

`step.score_tokens` makes the log-probs, the step weights and averages what comes back; here are
only the formulas. Every loss has one signature, so the trainer picks one by name from `LOSSES`:

    loss(policy, ref, lengths, *, <hyper-parameters>) -> (each example's loss, its unweighted parts)

`policy` and `ref` [*B C] are log-probs SUMMED over the tokens of a completion (end of sequence
included), of the model in training and of the frozen reference; `lengths` [*B C] counts those
tokens. C is `COMPLETIONS[name]`: 1, or 2 for a pair (chosen 0, rejected 1). A loss whose formula
needs no lengths or no reference ignores them. Only a loss that mixes several names its parts.

An empty slot of a packed row (all zeros, length 0) gives a finite loss, so weight 0 removes it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

Each = Float[Array, "*B"]
One = Float[Array, "*B 1"]
Pair = Float[Array, "*B 2"]
Lengths = Real[Array, "*B C"]
Loss = tuple[Each, dict[str, Each]]


def sft(policy: One, ref: One, lengths: Lengths) -> Loss:
    """Negative log-likelihood of the completion: eq. 4.1 of arXiv:2406.00832.

    A sum; for the usual mean over tokens the step divides by the number of scored tokens.

    >>> loss, _ = sft(jnp.array([-7.25]), jnp.array([-8.0]), jnp.array([5]))
    >>> print(f"{loss:.4f}")
    7.2500
    """
    (chosen,) = jnp.unstack(policy, axis=-1)
    return -chosen, {}


def dpo(policy: Pair, ref: Pair, lengths: Lengths, *, beta: float, smoothing: float = 0.0) -> Loss:
    """DPO: eq. 7 of arXiv:2305.18290; with smoothing, cDPO: eq. 3 of ericmitchell.ai/cdpo.pdf.

    Smoothing is the assumed share of flipped labels, below 0.5. TRL's "sigmoid" ignores its own.

    >>> pair = jnp.array([-4.0, -9.0]), jnp.array([-5.0, -8.0]), jnp.array([2, 4])
    >>> loss, _ = dpo(*pair, beta=0.5)
    >>> print(f"{loss:.4f}")
    0.3133
    """
    margin = beta * _difference(policy - ref)
    return _logistic(margin, smoothing), {}


def dpo_norm(policy: Pair, ref: Pair, lengths: Lengths, *, beta: float) -> Loss:
    """Length-normalised DPO of Tülu 3, arXiv:2411.15124: log-ratios per token. TRL: "sigmoid_norm".

    Its beta is not DPO's: a log-ratio per token is small, and open-instruct takes 5.

    >>> pair = jnp.array([-4.0, -9.0]), jnp.array([-5.0, -8.0]), jnp.array([2, 4])
    >>> loss, _ = dpo_norm(*pair, beta=4.0)
    >>> print(f"{loss:.4f}")
    0.0486
    """
    margin = beta * _difference(_per_token(policy - ref, lengths))
    return _logistic(margin), {}


def ipo(policy: Pair, ref: Pair, lengths: Lengths, *, beta: float) -> Loss:
    """IPO: eq. 17 of arXiv:2310.12036, with beta its tau.

    Of sums, as the paper writes it and as eric-mitchell/direct-preference-optimization@f8b8c0f and
    BoNBoN compute it. TRL's "ipo" averages over tokens: that is `ipo_mean`, with another beta.

    >>> pair = jnp.array([-4.0, -9.0]), jnp.array([-5.0, -8.0]), jnp.array([2, 4])
    >>> loss, _ = ipo(*pair, beta=0.1)
    >>> print(f"{loss:.4f}")
    9.0000
    """
    return (_difference(policy - ref) - 1 / (2 * beta)) ** 2, {}


def ipo_mean(policy: Pair, ref: Pair, lengths: Lengths, *, beta: float) -> Loss:
    """IPO with each log-ratio averaged over its tokens. TRL: "ipo".

    Deviates from eq. 17 of arXiv:2310.12036 as printed; TRL's source says that the authors of IPO
    confirmed the average.

    >>> pair = jnp.array([-4.0, -9.0]), jnp.array([-5.0, -8.0]), jnp.array([2, 4])
    >>> loss, _ = ipo_mean(*pair, beta=0.1)
    >>> print(f"{loss:.4f}")
    18.0625
    """
    return (_difference(_per_token(policy - ref, lengths)) - 1 / (2 * beta)) ** 2, {}


def bonbon(policy: Pair, ref: Pair, lengths: Lengths, *, n: int, alpha: float) -> Loss:
    """BoNBoN as in the paper: alpha SFT-BoN + (1 - alpha) IPO-BoN, eq. 4.4 of arXiv:2406.00832.

    Deviates from the released code, which trains `bonbon_released`. Chosen and rejected are the
    best and the worst of n samples of the reference itself; the paper's alpha is 0.005. At
    policy == ref the IPO part pulls with (1 - alpha) / beta_star(n), 36.1 at n = 8, and the SFT
    part with alpha: nearly pure IPO, so watch both parts.

    >>> pair = jnp.array([-4.0, -9.0]), jnp.array([-5.0, -8.0]), jnp.array([2, 4])
    >>> loss, parts = bonbon(*pair, n=2, alpha=0.1)
    >>> print(f"{loss:.4f} = 0.1 * {parts['sft']:.4f} + 0.9 * {parts['ipo']:.4f}")
    1.3000 = 0.1 * 4.0000 + 0.9 * 1.0000
    """
    nll, _ = sft(policy[..., :1], ref[..., :1], lengths[..., :1])
    square, _ = ipo(policy, ref, lengths, beta=beta_star(n))
    return alpha * nll + (1 - alpha) * square, {"sft": nll, "ipo": square}


def bonbon_released(policy: Pair, ref: Pair, lengths: Lengths, *, n: int, alpha: float) -> Loss:
    """BoNBoN as released: DPO stands where eq. 4.4 of arXiv:2406.00832 has IPO.

    In gl-ybnbxb/BoNBoN@e30a4ba preference_loss() takes `bonbon=True` and never reads it, so the
    pair term is logistic with beta_star(n), although logged as "ipo". Here to repeat its results.

    >>> pair = jnp.array([-4.0, -9.0]), jnp.array([-5.0, -8.0]), jnp.array([2, 4])
    >>> loss, parts = bonbon_released(*pair, n=2, alpha=0.1)
    >>> print(f"{loss:.4f} = 0.1 * {parts['sft']:.4f} + 0.9 * {parts['dpo']:.4f}")
    0.6819 = 0.1 * 4.0000 + 0.9 * 0.3133
    """
    nll, _ = sft(policy[..., :1], ref[..., :1], lengths[..., :1])
    logistic, _ = dpo(policy, ref, lengths, beta=beta_star(n))
    return alpha * nll + (1 - alpha) * logistic, {"sft": nll, "dpo": logistic}


_ALL = (sft, dpo, dpo_norm, ipo, ipo_mean, bonbon, bonbon_released)
LOSSES = {loss.__name__: loss for loss in _ALL}
COMPLETIONS = {name: 1 if name == "sft" else 2 for name in LOSSES}


def beta_star(n: int) -> float:
    """The beta whose IPO optimum is best-of-n: 1 / (2 (n-1) H_{n-1}), eq. 4.2 of arXiv:2406.00832.

    Then 1 / (2 beta) is the mean log-ratio between best and worst, for a reward without ties.

    >>> print(f"{beta_star(8):.10f}")
    0.0275482094
    """
    if n < 2:
        raise ValueError(f"beta_star: got n = {n}, expected n >= 2 (best and worst of n samples)")
    return 1 / (2 * (n - 1) * sum(1 / k for k in range(1, n)))


def rewards(policy: Pair, ref: Pair, *, beta: float) -> dict[str, Each]:
    """Implicit rewards beta log(policy / ref), for the log, under TRL's names; a tie is a miss.

    >>> pair = rewards(jnp.array([-4.0, -9.0]), jnp.array([-5.0, -8.0]), beta=0.5)
    >>> print(*(f"{name} {value}" for name, value in pair.items()))
    rewards/chosen 0.5 rewards/rejected -0.5 rewards/margins 1.0 rewards/accuracies 1.0
    """
    chosen, rejected = jnp.unstack(beta * (policy - ref), axis=-1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(chosen.dtype),
    }


def _difference(ratios: Pair) -> Each:
    # Of log-ratios, not of log-probs: policy - ref is exact in fp32 while the two are close.
    chosen, rejected = jnp.unstack(ratios, axis=-1)
    return chosen - rejected


def _per_token(ratios: Pair, lengths: Lengths) -> Pair:
    return ratios / jnp.maximum(lengths, 1)  # an empty slot has length 0


def _logistic(margin: Each, smoothing: float = 0.0) -> Each:
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
