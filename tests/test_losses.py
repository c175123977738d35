"""Losses against the papers' formulas in float64 numpy, TRL's numbers, and at known points."""

import doctest
import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import losses

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text())

# n, target margin 1 / (2 beta*), beta*, irreducible IPO loss (n-1)^2 sum 1/k^2
BEST_OF_N = [
    (2, 1.0, 0.5, 1.00),
    (3, 3.0, 0.1666667, 5.00),
    (4, 5.5, 0.0909091, 12.25),
    (6, 11.4167, 0.0437956, 36.59),
    (8, 18.15, 0.0275482094, 74.08),
    (16, 49.7734, 0.0100455, 355.60),
    (32, 124.845, 0.0040050, 1550.3),
]


# --- the papers' formulas; w is the winner (chosen), l the loser (rejected), x log-probs, y lengths


def neg_log_sigmoid(x):
    return np.logaddexp(0.0, -x)


def log_ratios(policy, ref):
    return np.moveaxis(policy - ref, -1, 0)


def paper_dpo(policy, ref, lengths, *, beta, smoothing=0.0):
    w, l = log_ratios(policy, ref)
    right, wrong = neg_log_sigmoid(beta * w - beta * l), neg_log_sigmoid(beta * l - beta * w)
    return (1 - smoothing) * right + smoothing * wrong


def paper_dpo_norm(policy, ref, lengths, *, beta):
    w, l = log_ratios(policy, ref)
    return neg_log_sigmoid(beta / lengths[..., 0] * w - beta / lengths[..., 1] * l)


def paper_ipo(policy, ref, lengths, *, beta):
    model, reference = policy[..., 0] - policy[..., 1], ref[..., 0] - ref[..., 1]
    return (model - reference - 1 / (2 * beta)) ** 2


def paper_ipo_mean(policy, ref, lengths, *, beta):
    w, l = log_ratios(policy, ref)
    return (w / lengths[..., 0] - l / lengths[..., 1] - 1 / (2 * beta)) ** 2


def paper_bonbon(policy, ref, lengths, *, n, alpha):
    beta = 1 / (2 * (n - 1) * np.sum(1 / np.arange(1, n)))
    return -alpha * policy[..., 0] + (1 - alpha) * paper_ipo(policy, ref, lengths, beta=beta)


def released_bonbon(policy, ref, lengths, *, n, alpha):
    beta = 1 / (2 * (n - 1) * np.sum(1 / np.arange(1, n)))
    return -alpha * policy[..., 0] + (1 - alpha) * paper_dpo(policy, ref, lengths, beta=beta)


CASES = [
    ("sft", {}, lambda policy, ref, lengths: -policy[..., 0]),
    ("dpo", {"beta": 0.1}, paper_dpo),
    ("dpo", {"beta": 0.3, "smoothing": 0.1}, paper_dpo),
    ("dpo_norm", {"beta": 5.0}, paper_dpo_norm),
    ("ipo", {"beta": 0.1}, paper_ipo),
    ("ipo_mean", {"beta": 0.1}, paper_ipo_mean),
    ("bonbon", {"n": 8, "alpha": 0.005}, paper_bonbon),
    ("bonbon", {"n": 2, "alpha": 0.5}, paper_bonbon),
    ("bonbon_released", {"n": 8, "alpha": 0.005}, released_bonbon),
]
every_case = pytest.mark.parametrize(("name", "hyper", "formula"), CASES)
every_pair_case = pytest.mark.parametrize(
    ("name", "hyper", "formula"), [case for case in CASES if case[0] != "sft"]
)


def example(name, seed=0, spread=20.0):
    """[R P C] log-probs of completions of 20 to 400 tokens, exact in float32."""
    rng = np.random.default_rng(seed)
    shape = (3, 4, losses.COMPLETIONS[name])
    lengths = rng.integers(20, 400, shape)
    ref = np.float32(-rng.uniform(0.3, 1.5, shape) * lengths)
    policy = np.float32(ref + rng.normal(0, spread, shape))
    return policy, ref, lengths


def total(name, hyper, ref, lengths):
    return lambda policy: losses.LOSSES[name](policy, ref, lengths, **hyper)[0].sum()


def slopes(formula, policy, step=1e-4):
    """Central differences of sum(formula(policy)) in float64."""
    out = np.empty(policy.shape)
    for index in np.ndindex(policy.shape):
        nudge = np.zeros(policy.shape)
        nudge[index] = step
        out[index] = (formula(policy + nudge) - formula(policy - nudge)).sum() / (2 * step)
    return out


# --- values and gradients


@every_case
def test_value_and_gradient_are_the_papers(name, hyper, formula):
    policy, ref, lengths = example(name)
    exact = functools.partial(formula, ref=np.float64(ref), lengths=lengths, **hyper)
    want, slope = exact(np.float64(policy)), slopes(exact, np.float64(policy))
    got, _ = jax.jit(functools.partial(losses.LOSSES[name], **hyper))(policy, ref, lengths)
    assert got.shape == policy.shape[:-1] and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
    gradient = jax.grad(total(name, hyper, ref, lengths))(policy)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-6 * np.abs(slope).max())


@pytest.mark.parametrize("run", GOLDEN["runs"])
def test_trl_computes_the_same_loss_and_rewards(run):
    made, lengths = GOLDEN["runs"][run], {}
    for pair in GOLDEN["pairs"]:
        lengths[pair["id"]] = [len(pair["chosen_ids"]), len(pair["rejected_ids"])]
    for step in made["steps"]:
        policy = jnp.array(step["policy"])
        counts = jnp.array([lengths[i] for i in step["ids"]])[:, : policy.shape[-1]]
        if made["loss"] == "sft":
            each, _ = losses.sft(policy, policy, counts)
            assert each.sum() / counts.sum() == pytest.approx(step["loss"], rel=1e-6)
            continue
        ref, beta = jnp.array(step["ref"]), made["trl"]["beta"]
        each, _ = losses.LOSSES[made["loss"]](policy, ref, counts, beta=beta)
        assert each.mean() == pytest.approx(step["loss"], rel=1e-6)
        for key, value in losses.rewards(policy, ref, beta=beta).items():
            assert value.mean() == pytest.approx(step[key], rel=1e-6, abs=1e-7), key


@every_case
def test_parts_add_up(name, hyper, formula):
    policy, ref, lengths = example(name)
    loss, parts = losses.LOSSES[name](policy, ref, lengths, **hyper)
    if "alpha" not in hyper:
        assert parts == {}
        return
    (first, sft), (_, other) = parts.items()
    assert first == "sft" and (sft == -policy[..., 0]).all()
    alpha = hyper["alpha"]
    np.testing.assert_allclose(loss, alpha * sft + (1 - alpha) * other, rtol=1e-6)


# --- known points


def test_at_the_start_the_loss_is_a_constant():
    _, ref, lengths = example("dpo")
    start = functools.partial(lambda loss, **hyper: loss(ref, ref, lengths, **hyper)[0])
    for smoothing in (0.0, 0.2):
        loss = start(losses.dpo, beta=0.3, smoothing=smoothing)
        np.testing.assert_allclose(loss, math.log(2), rtol=1e-7)
    np.testing.assert_allclose(start(losses.dpo_norm, beta=5.0), math.log(2), rtol=1e-7)
    np.testing.assert_allclose(start(losses.ipo, beta=0.3), 1 / (4 * 0.3**2), rtol=1e-6)
    np.testing.assert_allclose(start(losses.ipo_mean, beta=0.3), 1 / (4 * 0.3**2), rtol=1e-6)
    np.testing.assert_allclose(start(losses.bonbon, n=8, alpha=0.0), 18.15**2, rtol=1e-6)
    released = start(losses.bonbon_released, n=8, alpha=0.0)
    np.testing.assert_allclose(released, math.log(2), rtol=1e-7)


def test_bonbon_starts_as_nearly_pure_ipo():
    _, ref, lengths = example("bonbon")
    pull = jax.grad(total("bonbon", {"n": 8, "alpha": 0.005}, ref, lengths))(ref)
    np.testing.assert_allclose(pull[..., 0], -(0.005 + 0.995 * 2 * 18.15), rtol=1e-6)
    np.testing.assert_allclose(pull[..., 1], 0.995 * 2 * 18.15, rtol=1e-6)
    pull = jax.grad(total("bonbon_released", {"n": 8, "alpha": 0.005}, ref, lengths))(ref)
    np.testing.assert_allclose(pull[..., 1], 0.995 * 0.0275482094 / 2, rtol=1e-6)


@pytest.mark.parametrize(("n", "margin", "beta", "irreducible"), BEST_OF_N)
def test_beta_star_makes_best_of_n_the_optimum(n, margin, beta, irreducible):
    assert losses.beta_star(n) == pytest.approx(beta, abs=6e-8)
    assert 1 / (2 * losses.beta_star(n)) == pytest.approx(margin, rel=5e-6)
    # The best-of-n policy is ref * U^(n-1), U the reward's quantile. Worst over best quantile of n
    # uniforms is the least of n-1 uniforms: take its quantiles on a fine grid.
    grid = (np.arange(1_000_000) + 0.5) / 1_000_000
    worst = np.log(-np.expm1(np.log1p(-grid) / (n - 1)))
    policy = np.float32(np.stack([np.zeros_like(worst), (n - 1) * worst], axis=-1))
    ref, lengths = np.zeros_like(policy), np.ones_like(policy)
    hyper = {"beta": losses.beta_star(n)}
    loss, _ = losses.ipo(policy, ref, lengths, **hyper)
    assert np.float64(loss).mean() == pytest.approx(irreducible, rel=3e-4)
    pull = jax.grad(total("ipo", hyper, ref, lengths))(policy)
    assert abs(np.float64(pull[:, 0]).mean()) < 1e-4 * 2 * margin


def test_beta_star_is_the_readmes_and_refuses_one_sample():
    assert f"{losses.beta_star(8):.10f}" == "0.0275482094"
    for n in (1, 0, -3):
        with pytest.raises(ValueError, match=f"got n = {n}, expected n >= 2"):
            losses.beta_star(n)


# --- symmetries


def test_swapping_chosen_and_rejected():
    policy, ref, lengths = example("dpo")
    gap = np.subtract(*np.moveaxis(np.float64(policy) - ref, -1, 0))

    def both(loss, **hyper):
        ways = [(policy, ref, lengths), [x[..., ::-1] for x in (policy, ref, lengths)]]
        return [np.float64(loss(*way, **hyper)[0]) for way in ways]

    loss, swapped = both(losses.dpo, beta=0.1)  # -log s(x) + log s(-x) = -x
    np.testing.assert_allclose(loss - swapped, -0.1 * gap, rtol=1e-5, atol=1e-5)
    loss, swapped = both(losses.dpo, beta=0.1, smoothing=0.5)  # labels that say nothing
    np.testing.assert_allclose(loss, swapped, rtol=1e-6)
    loss, swapped = both(losses.dpo, beta=0.1, smoothing=0.3)
    flipped, _ = both(losses.dpo, beta=0.1, smoothing=0.7)
    np.testing.assert_allclose(swapped, flipped, rtol=1e-6)
    loss, swapped = both(losses.ipo, beta=0.1)  # (x - 5)^2 - (-x - 5)^2 = -20 x
    np.testing.assert_allclose(loss - swapped, -20 * gap, rtol=1e-5, atol=1e-3)


@every_pair_case
def test_only_the_log_ratio_matters_but_for_the_sft_part(name, hyper, formula):
    policy, ref, lengths = (np.round(x) for x in example(name))
    plain, _ = losses.LOSSES[name](policy, ref, lengths, **hyper)
    shifted, _ = losses.LOSSES[name](policy - 64, ref - 64, lengths, **hyper)
    np.testing.assert_allclose(shifted, plain + 64 * hyper.get("alpha", 0), rtol=1e-6)


def test_rewards():
    policy = jnp.array([[[-3.0, -5.0], [-5.0, -3.0], [-4.0, -4.0]]])
    got = losses.rewards(policy, jnp.full((1, 3, 2), -4.0), beta=0.5)
    assert got["rewards/chosen"].tolist() == [[0.5, -0.5, 0.0]]
    assert got["rewards/rejected"].tolist() == [[-0.5, 0.5, 0.0]]
    assert got["rewards/margins"].tolist() == [[1.0, -1.0, 0.0]]
    assert got["rewards/accuracies"].tolist() == [[1.0, 0.0, 0.0]]


# --- edges


@every_case
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_huge_margins_stay_finite_and_right(name, hyper, formula, gap):
    _, ref, lengths = example(name)
    policy = ref + np.float32([gap, -gap][: ref.shape[-1]])
    loss, _ = losses.LOSSES[name](policy, ref, lengths, **hyper)
    want = formula(np.float64(policy), np.float64(ref), lengths, **hyper)
    np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-30)
    assert np.isfinite(jax.grad(total(name, hyper, ref, lengths))(policy)).all()


@every_case
def test_an_empty_slot_stays_finite(name, hyper, formula):
    empty = jnp.zeros((2, 1, losses.COMPLETIONS[name]))
    for counts in (empty, empty.astype(jnp.int32)):
        loss, _ = losses.LOSSES[name](empty, empty, counts, **hyper)
        assert np.isfinite(loss).all()
        assert np.isfinite(jax.grad(total(name, hyper, empty, counts))(empty)).all()


@every_case
def test_a_wrong_number_of_completions_is_an_error(name, hyper, formula):
    wrong = jnp.zeros((2, 3 - losses.COMPLETIONS[name]))
    with pytest.raises(ValueError, match="unpack"):
        losses.LOSSES[name](wrong, wrong, wrong, **hyper)


def test_the_table_names_every_loss():
    assert set(losses.LOSSES) == {name for name, _, _ in CASES} == set(losses.COMPLETIONS)


def test_docstrings():
    result = doctest.testmod(losses)
    assert result.failed == 0 and result.attempted > 2 * len(losses.LOSSES)
