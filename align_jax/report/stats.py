"""The statistics of scored samples: pass@k, intervals, and paired tests against a start model.

Pure functions of outcomes, a mapping `task id -> one bool per sample`; scipy and statsmodels do the
numerics. The unit of inference is the task. `report.tables` calls these once per row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Outcomes = Mapping[str, Sequence[bool]]
LEVEL = 0.95
RESAMPLES = 9999


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An aligned run against its start on the same tasks; undefined limits are None."""

    gained: int  # tasks the aligned run solves more often: McNemar's discordant count b
    lost: int  # tasks it solves less often: McNemar's c
    difference: float
    difference_low: float | None
    difference_high: float | None
    p: float
    test: str  # "mcnemar" (exact) or "sign flip"


def rates(outcomes: Outcomes) -> dict[str, float]:
    """Share of a task's samples that pass, by task."""
    empty = [task for task, passed in outcomes.items() if not len(passed)]
    if empty or not outcomes:
        raise ValueError(
            f"every task needs a sample; got {len(outcomes)} tasks, without: {_some(empty)}"
        )
    return {task: sum(passed) / len(passed) for task, passed in outcomes.items()}


def pass_at_k(outcomes: Outcomes, k: int) -> float:
    """Unbiased pass@k, 1 - C(n-c, k) / C(n, k) averaged over tasks (arXiv:2107.03374, eq. 1)."""
    short = [task for task, passed in outcomes.items() if len(passed) < k]
    if k < 1 or short or not outcomes:
        raise ValueError(
            f"pass@{k} needs k >= 1 and at least k samples of every task; fewer for: {_some(short)}"
        )
    miss = [math.comb(len(x) - sum(x), k) / math.comb(len(x), k) for x in outcomes.values()]
    return 1 - sum(miss) / len(miss)


def interval(outcomes: Outcomes, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of pass@1: Wilson for one sample per task, else a BCa bootstrap over tasks.

    Where every task has the same rate a bootstrap would claim certainty; Wilson over tasks stands
    in, which is conservative, because a mean of samples varies less than one of them.
    """
    values = np.array(list(rates(outcomes).values()))
    if _is_single(outcomes) or np.ptp(values) == 0:
        return _wilson(values.sum(), len(values))
    return _bootstrap(values, seed)


def relative_change(before: float, after: float) -> float | None:
    """Relative improvement, as a fraction (section 3.5 of the paper); None from a baseline of 0."""
    return (after - before) / before if before else None


def compare(
    start: Outcomes,
    aligned: Outcomes,
    *,
    names: tuple[str, str] = ("start", "aligned"),
    seed: int = 0,
) -> Comparison:
    """Compare two runs task by task.

    With one sample per task: exact McNemar and Newcombe's interval. With several: the sign-flip
    permutation test of the mean difference, of which exact McNemar is the special case, and a BCa
    bootstrap over tasks (None if the difference is the same everywhere).
    """
    _require_same_tasks(start, aligned, names)
    before, after = rates(start), rates(aligned)
    change = np.array([after[task] - before[task] for task in sorted(before)])
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    is_single = _is_single(start) and _is_single(aligned)
    if is_single:
        both = int(sum(before.values())) - lost
        neither = len(change) - both - gained - lost
        low, high = newcombe(both, gained, lost, neither)
        p = float(mcnemar([[both, gained], [lost, neither]], exact=True).pvalue)
    else:
        low, high = _bootstrap(change, seed) if np.ptp(change) > 1e-12 else (None, None)
        p = _sign_flip(change, seed)
    return Comparison(
        gained=gained,
        lost=lost,
        difference=float(change.mean()),
        difference_low=low,
        difference_high=high,
        p=p,
        test="mcnemar" if is_single else "sign flip",
    )


def newcombe(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """95 % interval of a paired difference: method 10 of Newcombe, Stat Med 1998;17:2635."""
    n = both + gained + lost + neither
    new, old = (both + gained) / n, (both + lost) / n
    new_low, new_high = _wilson(both + gained, n)
    old_low, old_high = _wilson(both + lost, n)
    covariance = both * neither - gained * lost
    if covariance > 0:
        covariance = max(covariance - n / 2, 0)
    spread = math.sqrt((both + gained) * (lost + neither) * (both + lost) * (gained + neither))
    phi = covariance / spread if spread else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(a**2 - 2 * phi * a * b + b**2)

    below, above = reach(new - new_low, old_high - old), reach(new_high - new, old - old_low)
    return new - old - below, new - old + above


def holm(ps: Sequence[float]) -> list[float]:
    """Holm-adjusted p values of one family of comparisons, in the order given."""
    return multipletests(ps, method="holm")[1].tolist() if len(ps) else []


def _wilson(count: float, n: int) -> tuple[float, float]:
    low, high = proportion_confint(count, n, alpha=1 - LEVEL, method="wilson")
    return float(low), float(high)


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    result = scipy.stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _sign_flip(change: np.ndarray, seed: int) -> float:
    """Two-sided p of the mean change under random signs; exact for up to 13 changed tasks."""
    moved = change[change != 0]
    if not len(moved):
        return 1.0
    result = scipy.stats.permutation_test(
        (moved, np.zeros_like(moved)),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def _is_single(outcomes: Outcomes) -> bool:
    return all(len(passed) == 1 for passed in outcomes.values())


def _require_same_tasks(start: Outcomes, aligned: Outcomes, names: tuple[str, str]) -> None:
    missing = sorted(aligned.keys() - start.keys()), sorted(start.keys() - aligned.keys())
    gaps = [
        f"{name} lacks {len(ids)} tasks the other has: {_some(ids)}"
        for name, ids in zip(names, missing, strict=True)
        if ids
    ]
    if gaps:
        raise ValueError("a paired comparison needs the same tasks; " + "; ".join(gaps))


def _some(ids: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(ids) - limit} more" if len(ids) > limit else ""
    return ", ".join(ids[:limit]) + more or "none"
