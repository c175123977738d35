"""Verdicts to preference pairs, by one of two rules; every task that gives none is counted by reason.

`pass_fail` is the study's rule: one random passing response is chosen, one random failing non-empty one
rejected. `best_worst` is BoNBoN's: the responses of highest and lowest reward (share of tests passed) of the n;
ties, which its analysis assumes away, are drawn at random; a task whose n rewards are all equal gives no pair, nor
does one of which fewer than n responses are usable. Two things are no verdict on a
response and are left out by both: a sandbox that did not start, and an answer that was cut at the length limit
(as a rejected side it would teach length).
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from align_jax import records
from align_jax.records import Judged, Pair


def make(path: Path, judged: Sequence[Judged], *, rule: str, seed: int) -> tuple[list[Pair], Counter]:
    """Make at most one pair a task; return the pairs and why the other tasks gave none."""
    if rule not in RULES:
        raise ValueError(f"pairs.rule: got {rule!r}, available are {sorted(RULES)}")
    by_task = defaultdict(list)
    for response in judged:
        by_task[response.task_id].append(response)
    pairs, dropped = [], Counter()
    for task_id, responses in by_task.items():
        usable = [r for r in responses if r.status != "sandbox" and r.finish == "stop" and r.completion.strip()]
        found = RULES[rule](usable, len(responses), random.Random(f"{seed}/{task_id}"))
        if isinstance(found, str):
            dropped[found] += 1
            continue
        chosen, rejected = found
        pairs.append(Pair(id=task_id, prompt=chosen.prompt, chosen=chosen.completion, rejected=rejected.completion))
    records.write(path, pairs)
    return pairs, dropped


def pass_fail(responses: list[Judged], n: int, rng: random.Random):
    """(passing, failing), or the reason why there is no such pair."""
    passing = [r for r in responses if r.status == "passed"]
    failing = [r for r in responses if r.status != "passed"]
    if not passing or not failing:
        return "no response passed" if not passing else "no response failed"
    return rng.choice(passing), rng.choice(failing)


def best_worst(responses: list[Judged], n: int, rng: random.Random):
    """(best of n, worst of n), or the reason why there is no such pair; beta*_n would be too sure of fewer than n."""
    if len(responses) < n:
        return "fewer than n usable responses"
    rewards = sorted({r.reward for r in responses})
    if len(rewards) < 2:
        return "all rewards equal"
    return tuple(rng.choice([r for r in responses if r.reward == reward]) for reward in (rewards[-1], rewards[0]))


RULES = {"pass_fail": pass_fail, "best_worst": best_worst}
