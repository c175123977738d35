"""Verdicts and scores to preference pairs, by one of three rules; every pair that is not made is counted by reason.

    pairs.make(path, judged, rule="dimension", by="readability", margin=1.0, seed=0)   # judged comes task by task

`pass_fail` is the study's rule: one random passing response is chosen, one random failing non-empty one rejected. On
answers to the prompts of a dimension it makes the study's non-functional pairs, whose labels say which answer is
right under such a prompt, and nothing of the dimension. `best_worst` is BoNBoN's: the best and the worst of the n by
`by`, which is "reward" (share of the tests passed) or a dimension's score. `dimension` compares that score among
answers that do the same in the tests: all passed, or with `even="reward"` passed the same share.

Ties and margin: `best_worst` and `dimension` take the widest gap first, draw among equal gaps, and take no gap below
`margin`, nor a gap of zero. Several pairs a task: the first is the one that would be made alone; each further one takes
the responses that were used least, so that none is used twice while others are left. Draws follow the seed and the
task's id alone.

A verdict for the wrong reason makes no label (`faults`): such responses stand on neither side. Nor is a failing
response rejected whose very code passed beside it: then its tests are wrong. beta*_n would be too sure of the best and
the worst of fewer than n, so `best_worst` wants all n usable, or the share `min_usable` of them. The failure class,
both scores and the number of usable responses are kept in the pair's `made`.
"""

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein

from align_jax import records
from align_jax.records import Judged, Pair
from align_jax.synth import faults, stream
from align_jax.text import Unusable

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Sides = tuple[Judged, Judged]  # chosen, rejected


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How pairs are made; see the module."""

    rule: str
    seed: int
    by: str = "reward"  # or a dimension, or "dimension": that under whose principle the responses were written
    margin: float | Mapping[str, float] = 0.0  # in the unit of `by`; of by="dimension", one for each
    n: int = 0  # responses that were asked for a task, some of which were dropped before they ran; 0: those here
    min_usable: float = 1.0  # share of these, for `best_worst`
    even: str = "passed"  # what `dimension` compares among: "passed", or equal "reward"
    per_task: int = 1
    rejectable: Sequence[str] = faults.REJECTABLE
    min_distance: float = 0.0  # edits over the longer side's characters, 0 to 1
    max_length_ratio: float = math.inf  # of the longer side to the shorter
    length: Callable[[str], int] = len  # characters, or a tokenizer's count

    def __post_init__(self):
        checks = {
            f"rule: got {self.rule!r}, available are {sorted(RULES)}": self.rule in RULES,
            f"even: got {self.even!r}, expected 'passed' or 'reward'": self.even in ("passed", "reward"),
            f"per_task: got {self.per_task}, expected at least 1": self.per_task >= 1,
            "rejectable: 'sandbox' says nothing about a response": "sandbox" not in self.rejectable,
            "by: rule 'dimension' wants the name of one, got 'reward'": (self.rule, self.by) != ("dimension", "reward"),
        }
        if not all(checks.values()):
            raise ValueError("; ".join(f"pairs.{what}" for what, is_met in checks.items() if not is_met))


def make(path: Path, judged: Iterable[Judged], **settings) -> dict:
    """Write up to `per_task` pairs a task to `path`; return the counts and what the pairs are like.

    in = out + sum of dropped, where `in` is the pairs wanted: tasks x per_task. Holds one task at a time.

    Raises:
      ValueError: wrong settings, all of them; a task whose responses do not stand together.
    """
    s, dropped, unusable, shapes, num_tasks = Settings(**settings), Counter(), Counter(), [], itertools.count()

    def pairs() -> Iterator[Pair]:
        for task_id, responses in by_task(judged):
            next(num_tasks)
            kept = usable(responses, s, unusable)
            is_short = s.rule == "best_worst" and len(kept) < s.min_usable * max(s.n, len(responses))
            candidates = RULES[s.rule](kept, s, random.Random(f"{s.seed}/{task_id}"))
            found, reason = draw("fewer than n usable responses" if is_short else candidates, s)
            dropped[reason] += s.per_task - len(found)
            for k, sides in enumerate(found):
                shapes.append(shape(sides, s))
                yield pair(f"{task_id}#{k}" if k else task_id, sides, s, n=len(kept))

    count = records.write(path, pairs())
    report = {"in": next(num_tasks) * s.per_task, "out": count, "dropped": dict(+dropped),
              "responses left out": dict(unusable), **statistics(shapes)}
    return report


def balance(out: Path, path: Path, *, seed: int, names: Sequence[str]) -> dict:
    """Write as many pairs of each of these dimensions as the rarest has, drawn by their ids: the study's 12k of each.

    Of no dimensions, all are written. One without any pair is named, and does not count as the rarest.
    """
    ids = defaultdict(list)
    for row in stream.rows(path):
        ids[row["made"]["dimension"]].append(row["id"])
    total = sum(map(len, ids.values()))
    least, rarest = min((len(ids[name]), name) for name in ids) if names and ids else (total, "")
    kept = {id for found in ids.values()
            for id in sorted(found, key=lambda id: records.fingerprint(seed, id))[:least]}
    count = records.write(out, (row for row in stream.rows(path) if row["id"] in kept))
    missing = [name for name in names if name not in ids]
    dropped = {f"more than of {rarest}, the rarest of those here": total - count}
    return {"in": total, "out": count, "dropped": dropped} | ({"NO PAIR OF": missing} if missing else {})


def describe(path: Path) -> dict:
    """What the pairs of a file are like: how many of each dimension, their lengths and distances in characters."""
    dimensions, shapes = Counter(), []
    for row in stream.rows(path):
        dimensions[row["made"]["dimension"]] += 1
        shapes.append(_shape(row["chosen"], row["rejected"], len))
    by_dimension = {"of each dimension": dict(dimensions)} if [*dimensions] not in ([], [""]) else {}
    return by_dimension | statistics(shapes)


def by_task(judged: Iterable[Judged]) -> Iterator[tuple[str, list[Judged]]]:
    """Group the responses of a task, which stand together."""
    seen = set()
    for task_id, responses in itertools.groupby(judged, key=attrgetter("task_id")):
        if task_id in seen:
            raise ValueError(f"responses of {task_id!r} stand in several places; expected a file sorted by task_id")
        seen.add(task_id)
        yield task_id, list(responses)


def usable(responses: Sequence[Judged], s: Settings, left_out: Counter) -> list[Judged]:
    """The responses whose labels can be trusted; counts why the others cannot."""
    programs = {}  # id -> program, by its lines that are not blank
    for response in responses:
        try:
            lines = faults.check(response, s.rejectable).splitlines()
            programs[response.id] = tuple(line.rstrip() for line in lines if line.strip())
        except Unusable as error:
            left_out[error.reason] += 1
    formed = [r for r in responses if r.id in programs]
    right = {programs[r.id] for r in formed if r.status == "passed"}
    reasons = {r.id: "failed, but its code passed beside it" for r in formed
               if r.status != "passed" and programs[r.id] in right}
    reasons |= {r.id: f"no score of {s.by}" for r in formed if r.id not in reasons and value(r, s) is None}
    left_out.update(reasons.values())
    return [r for r in formed if r.id not in reasons]


def value(response: Judged, s: Settings) -> float | None:
    """What `by` says of a response."""
    if s.by == "reward":
        return response.reward
    return response.scores.get(response.dimension if s.by == "dimension" else s.by)


# --- the rules: usable responses -> candidates, the best first, or why there are none


def pass_fail(responses: list[Judged], s: Settings, rng: random.Random) -> list[Sides] | str:
    """Every passing with every failing response, in random order."""
    passing = [r for r in responses if r.status == "passed"]
    failing = [r for r in responses if r.status != "passed"]
    if not passing or not failing:
        return "no response passed" if not passing else "no response failed"
    candidates = list(itertools.product(passing, failing))
    rng.shuffle(candidates)
    return candidates


def best_worst(responses: list[Judged], s: Settings, rng: random.Random) -> list[Sides] | str:
    """Every two responses, the widest gap first."""
    return _gaps([responses], s, rng) if len(responses) > 1 else "fewer than two usable responses"


def dimension(responses: list[Judged], s: Settings, rng: random.Random) -> list[Sides] | str:
    """Every two responses that do the same in the tests, the widest gap first."""
    even = [r for r in responses if r.status == "passed" or s.even == "reward"]
    groups = [[r for r in even if r.reward == reward] for reward in sorted({r.reward for r in even})]
    if max(map(len, groups), default=0) < 2:
        return f"no two responses even by {s.even}"
    return _gaps(groups, s, rng)


def _gaps(groups: Sequence[list[Judged]], s: Settings, rng: random.Random) -> list[Sides] | str:
    gaps = [(value(a, s) - value(b, s), rng.random(), (a, b)) for group in groups
            for a, b in itertools.permutations(group, 2) if value(a, s) > value(b, s)]
    margin = s.margin[groups[0][0].dimension] if isinstance(s.margin, Mapping) and gaps else s.margin
    wide = sorted((gap for gap in gaps if gap[0] >= margin), key=lambda gap: (-gap[0], gap[1]))
    if not wide:
        return f"no gap of {margin:g} in {s.by}" if gaps else f"equal in {s.by}"
    return [sides for _, _, sides in wide]


RULES = {"pass_fail": pass_fail, "best_worst": best_worst, "dimension": dimension}


# --- from candidates to pairs


def draw(candidates: list[Sides] | str, s: Settings) -> tuple[list[Sides], str]:
    """Take up to `per_task` candidates within the bounds, least used responses first; say why there are no more."""
    if isinstance(candidates, str):
        return [], candidates
    allowed, refused = [], Counter()
    for sides in candidates:
        reason = bound(sides, s)
        refused[reason] += 1
        allowed += [] if reason else [sides]
        if allowed and s.per_task == 1:
            break
    found, uses = [], Counter()
    while allowed and len(found) < s.per_task:
        least = min(range(len(allowed)), key=lambda k: sum(uses[side.id] for side in allowed[k]))
        found.append(allowed.pop(least))
        uses.update(side.id for side in found[-1])
    del refused[None]
    return found, refused.most_common(1)[0][0] if refused else "no further pair"


def bound(sides: Sides, s: Settings) -> str | None:
    """Why two responses make no pair to learn from, or None."""
    if faults.target(sides[0]) == faults.target(sides[1]):
        return "sides identical"
    ratio, distance = shape(sides, s)
    if distance < s.min_distance:
        return "sides too near"
    return "lengths too unequal" if max(ratio, 1 / ratio) > s.max_length_ratio else None


def shape(sides: Sides, s: Settings) -> tuple[float, float]:
    """Length of chosen over length of rejected, and their edit distance (Levenshtein) over the longer one's length."""
    return _shape(*map(faults.target, sides), s.length)


def _shape(chosen: str, rejected: str, length: Callable[[str], int]) -> tuple[float, float]:
    return length(chosen) / length(rejected), Levenshtein.normalized_distance(chosen, rejected)


def pair(name: str, sides: Sides, s: Settings, *, n: int) -> Pair:
    """The record of a pair; `made` says of both sides what their labels rest on."""
    chosen, rejected = ({"id": side.id, "status": side.status, "reward": float(side.reward),
                         "score": float(value(side, s)), "detail": side.detail} for side in sides)
    why = s.by if rejected["status"] == "passed" else rejected["status"]
    return Pair(id=name, prompt=sides[0].prompt, chosen=faults.target(sides[0]), rejected=faults.target(sides[1]),
                made={"rule": s.rule, "by": s.by, "dimension": sides[0].dimension, "why": why, "n": n,
                      "chosen": chosen, "rejected": rejected})


def statistics(shapes: Sequence[tuple[float, float]]) -> dict:
    """Quantiles of the pairs' length ratios and distances, and the share with the longer side chosen.

    Short rejected answers teach length, and near-identical sides push down what they share: look here before training.
    """
    if not shapes:
        return {}
    ratios, distances = np.array(shapes).T

    def spread(values) -> dict[str, float]:
        return {f"{q:.0%}": round(float(x), 3) for q, x in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}

    return {"longer side chosen": round(float(np.mean(ratios > 1)), 3), "chosen / rejected length": spread(ratios),
            "distance": spread(distances)}
