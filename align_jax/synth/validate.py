"""How far labels can be trusted: against ground truth, and between two raters.

    python -m align_jax.synth.validate OWN TRUTH   # two files of verdicts on the same responses, joined by id

OWN was judged by the tests that the responses wrote themselves, TRUTH by tests that somebody wrote for the task
(PocketEval, HumanEval+, MBPP+). A right solution with a wrong test and a wrong one with a weak test are the two ways
in which self-made labels lie; the table tells them apart. For a sheet that people fill in, see `review`.
"""

import argparse
import dataclasses
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.stats
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.proportion import proportion_confint

from align_jax import records
from align_jax.records import Judged

Judge = Callable[[str, Sequence[tuple[str, str]]], list[float | None]]  # dimension, [(instruction, answer)]
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Labels "passed" against the truth; None where the responses leave a number undefined."""

    both_pass: int
    own_only: int  # passed by its own tests, wrong: the tests are weak
    truth_only: int  # failed by its own tests, right: a test is wrong
    both_fail: int
    tasks: int
    accuracy: float
    precision: float | None  # of those labelled "passed", the share that is right: what chosen rests on
    recall: float | None
    rejected_precision: float | None  # of those labelled failing, the share that is wrong: what rejected rests on
    kappa: float | None
    kappa_low: float | None  # 95 %, by a bootstrap over tasks: responses to one task err together
    kappa_high: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rating:
    """Two raters on one ordinal scale."""

    n: int
    missing: int  # one of the two gave no rating
    kappa: float | None  # Cohen's, linear weights, as the study has it
    kappa_low: float | None  # 95 %, asymptotic
    kappa_high: float | None
    within: dict[int, float]  # tolerance in points -> share of ratings that differ by no more
    within_95: dict[int, tuple[float, float]]  # Wilson


def labels(own: Iterable[Judged], truth: Iterable[Judged]) -> tuple[Agreement, Counter]:
    """Compare two verdicts on the same responses; return why the others could not be compared, too.

    Raises:
      ValueError: there is no response to compare.
    """
    known, dropped, tables = {j.id: j.status for j in truth}, Counter(), defaultdict(Counter)
    for judged in own:
        if judged.id not in known:
            dropped["not in the truth"] += 1
        elif "sandbox" in (judged.status, known[judged.id]):
            dropped["not run"] += 1
        elif judged.status == "untested":
            dropped["untested"] += 1
        else:
            tables[judged.task_id][judged.status == "passed", known[judged.id] == "passed"] += 1
    if not tables:
        raise ValueError(f"no response has both verdicts: {dict(dropped)}; expected two files with the same ids")
    return _agreement(np.array([[table[cell] for cell in CELLS] for table in tables.values()])), dropped


CELLS = ((True, True), (True, False), (False, True), (False, False))  # passed by own tests, passed by the truth


def _agreement(tables) -> Agreement:
    """Make the numbers of one 2 x 2 table a task, [tasks 4] in the order of CELLS."""
    both, own_only, truth_only, neither = (int(x) for x in tables.sum(0))
    kappa, low, high = _share(*tables.sum(0)), None, None
    if kappa is not None and len(tables) > 1:
        interval = scipy.stats.bootstrap(tuple(tables.T), _kappa, paired=True, method="percentile", batch=100,
                                         n_resamples=RESAMPLES, rng=np.random.default_rng(0)).confidence_interval
        low, high = (None if np.isnan(limit) else float(limit) for limit in interval)
    return Agreement(
        both_pass=both, own_only=own_only, truth_only=truth_only, both_fail=neither, tasks=len(tables),
        accuracy=(both + neither) / int(tables.sum()), precision=_ratio(both, own_only),
        recall=_ratio(both, truth_only), rejected_precision=_ratio(neither, truth_only), kappa=kappa, kappa_low=low,
        kappa_high=high)


def _ratio(part: int, rest: int) -> float | None:
    return part / (part + rest) if part + rest else None


def _share(*cells) -> float | None:
    kappa = float(_kappa(*(np.array([cell]) for cell in cells)))
    return None if np.isnan(kappa) else kappa


def _kappa(a, b, c, d, axis: int = -1):
    """Cohen's kappa of summed 2 x 2 tables; NaN where both raters always say the same one thing."""
    a, b, c, d = (cell.sum(axis) for cell in (a, b, c, d))
    n = a + b + c + d
    by_chance = ((a + b) * (a + c) + (c + d) * (b + d)) / n**2
    with np.errstate(invalid="ignore"):
        return ((a + d) / n - by_chance) / (1 - by_chance)


def raters(first: Sequence[float | None], second: Sequence[float | None]) -> Rating:
    """Compare the ratings that two raters gave the same items, on a scale of whole points.

    Raises:
      ValueError: ratings that are no whole points; lists of different lengths; no item that both rated.
    """
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not both or any(rating % 1 for ratings in both for rating in ratings):
        raise ValueError(f"got {len(both)} items that both rated, {both[:3]}...; expected some, in whole points")
    low, high = min(map(min, both)), max(map(max, both))
    points, table = np.arange(low, high + 1), np.zeros((int(high - low) + 1,) * 2)
    for a, b in both:
        table[int(a - low), int(b - low)] += 1
    result = cohens_kappa(table, weights=points, wt="linear") if len(points) > 1 else None
    apart = np.array([abs(a - b) for a, b in both])
    counts = {tolerance: int((apart <= tolerance).sum()) for tolerance in range(4)}
    return Rating(
        n=len(both), missing=len(first) - len(both), kappa=result and float(result.kappa),
        kappa_low=result and float(result.kappa_low), kappa_high=result and float(result.kappa_upp),
        within={tolerance: count / len(both) for tolerance, count in counts.items()},
        within_95={tolerance: tuple(map(float, proportion_confint(count, len(both), method="wilson")))
                   for tolerance, count in counts.items()})


def judges(named: Mapping[str, Judge], dimension: str, items: Sequence[tuple[str, str]]) -> dict[str, Rating]:
    """Let every judge rate all items on a dimension; compare each two of them, under "first / second"."""
    ratings = {name: judge(dimension, items) for name, judge in named.items()}
    return {f"{a} / {b}": raters(ratings[a], ratings[b]) for a, b in itertools.combinations(ratings, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m align_jax.synth.validate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("own", metavar="OWN", type=Path)
    parser.add_argument("truth", metavar="TRUTH", type=Path)
    args = parser.parse_args()
    found, dropped = labels(records.read(args.own, Judged), records.read(args.truth, Judged))
    for name, value in dataclasses.asdict(found).items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    print(f"{args.own}: compared {sum(dataclasses.astuple(found)[:4])} responses; dropped {dict(dropped)}")


if __name__ == "__main__":
    main()
