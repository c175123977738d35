"""The results table: one row per run, defined once and rendered as text, Markdown, CSV and JSON.

`rows(runs)` computes, `COLUMNS` says what a reader sees of it, and CSV and JSON carry every number
unrounded.
"""

import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from align_jax.report import stats

STARTS = {"pretrained": "PTA", "instruct": "FTA"}  # start point -> the pathway that begins there
STAGES = {"base": "Start", "sft": "SFT", "dpo": "DPO", "bonbon": "BoNBoN"}
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model scored on one benchmark, by all of its tests and by its original ones alone."""

    name: str
    model: str
    start: str
    stage: str
    objective: str
    benchmark: str
    outcomes: stats.Outcomes
    base_outcomes: stats.Outcomes = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The numbers of one run; those against its own start are None for a start, or without one."""

    run: str
    model: str
    objective: str
    benchmark: str
    start: str
    stage: str
    n: int
    samples: int
    pass_base: float | None
    pass_plus: float
    low: float
    high: float
    relative: float | None = None
    gained: int | None = None
    lost: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    test: str | None = None
    holm: float | None = None

    @property
    def verdict(self) -> str:
        """`better` or `worse` than its own start after Holm's correction, else empty."""
        if self.holm is None or self.holm >= ALPHA:
            return ""
        return "better" if self.difference > 0 else "worse"


@dataclass(frozen=True)
class Column:
    """What a reader sees of some fields of a Row; hidden where all rows are `same` or `empty`."""

    title: str
    fields: tuple[str, ...]
    form: Callable[..., str] = "{}".format
    hide: Literal["never", "same", "empty"] = "never"


def p_value(p: float, test: str = "mcnemar") -> str:
    """Text of a p value, with its test named where that is not the one in the column's title."""
    return ("< 0.001" if p < 0.001 else f"{p:.3f}") + ("" if test == "mcnemar" else f" ({test})")


COLUMNS = (
    Column("model", ("model",), hide="same"),
    Column("objective", ("objective",), hide="same"),
    Column("benchmark", ("benchmark",)),
    Column("start", ("start",)),
    Column("stage", ("stage",)),
    Column("n", ("n",)),
    Column("base tests", ("pass_base",), "{:.3f}".format, hide="empty"),
    Column("pass@1", ("pass_plus",), "{:.3f}".format),
    Column("95 % CI", ("low", "high"), "[{:.3f}, {:.3f}]".format),
    Column("vs start", ("relative",), "{:+.1%}".format),
    Column("gained/lost", ("gained", "lost"), "{}/{}".format),
    Column("McNemar p", ("p", "test"), p_value),
    Column("Holm p", ("holm",), p_value),
)


def rows(runs: Sequence[Run]) -> list[Row]:
    """Compute the table by model, benchmark, start, stage; its comparisons are Holm's family."""
    _check(runs)
    starts = {_start_key(run): run for run in runs if run.stage == "base"}
    table = [_row(run, starts.get(_start_key(run))) for run in sorted(runs, key=_order(runs))]
    ps = {row.run: row.p for row in table if row.p is not None}
    holm = dict(zip(ps, stats.holm(list(ps.values())), strict=True))
    return [dataclasses.replace(row, holm=holm.get(row.run)) for row in table]


def headline(table: Sequence[Row]) -> str:
    """Say what happened: how many aligned models ended above, and below, their own start."""
    family = [row for row in table if row.p is not None]
    aligned = [row for row in family if row.stage != "sft"]
    if not aligned:
        return "No aligned model was compared with its own start."
    pair = "" if len({row.benchmark for row in table}) == 1 else " and benchmark pair"
    counts = Counter(row.verdict for row in aligned)
    best = max(aligned, key=lambda row: row.difference)
    start = next(x for x in table if _start_key(x) == _start_key(best) and x.stage == "base")
    p = p_value(best.holm)
    return (
        f"{counts['better'] or 'None'} of {len(aligned)} aligned model{pair}"
        f"{'s' * (len(aligned) > 1)} beat their own start at p < {ALPHA} (Holm over {len(family)} "
        f"comparisons); {counts['worse'] or 'none'} did significantly worse. Best change: "
        f"{best.start} {STAGES[best.stage]}, pass@1 {start.pass_plus:.3f} to {best.pass_plus:.3f}, "
        f"Holm p {p if p.startswith('<') else '= ' + p}."
    )


def visible(table: Sequence[Row]) -> list[Column]:
    """The columns that say something about these rows."""
    values = {c: {getattr(row, c.fields[0]) for row in table} for c in COLUMNS}
    hidden = {
        "never": lambda _: False,
        "same": lambda x: len(x) == 1,
        "empty": lambda x: x == {None},
    }
    return [c for c in COLUMNS if not hidden[c.hide](values[c])]


def cell(row: Row, column: Column) -> str:
    """Text of one cell: a dash in a start's own row, elsewhere `n/a`, where nothing is defined."""
    values = [getattr(row, name) for name in column.fields]
    if None in values:
        return "–" if row.stage == "base" else "n/a"
    return column.form(*values)


def is_number(column: Column) -> bool:
    return column.fields[0] not in ("model", "objective", "benchmark", "start", "stage")


def to_text(table: Sequence[Row]) -> str:
    """Aligned columns for a terminal."""
    columns = visible(table)
    grid = [[c.title for c in columns], *([cell(row, c) for c in columns] for row in table)]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    grid.insert(1, ["-" * width for width in widths])
    aligns = [str.rjust if is_number(c) else str.ljust for c in columns]
    padded = ([a(x, w) for a, x, w in zip(aligns, line, widths, strict=True)] for line in grid)
    return "".join("  ".join(line).rstrip() + "\n" for line in padded)


def to_markdown(table: Sequence[Row]) -> str:
    """A GitHub table; significant rows have their Holm p in bold."""
    columns = visible(table)
    lines = [[c.title for c in columns], ["--:" if is_number(c) else ":--" for c in columns]]
    for row in table:
        lines.append([" ".join(cell(row, c).split()) for c in columns])
        lines[-1] = [x.replace("|", "\\|").replace("<", "&lt;") for x in lines[-1]]
        if row.verdict:
            lines[-1][-1] = f"**{lines[-1][-1]}**"
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def to_csv(table: Sequence[Row]) -> str:
    """Every field of every row at full precision; None is an empty cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, table))
    return out.getvalue()


def to_json(table: Sequence[Row]) -> str:
    """Every field of every row at full precision, as a list of objects."""
    return json.dumps(list(map(dataclasses.asdict, table)), indent=1, ensure_ascii=False) + "\n"


def _row(run: Run, start: Run | None) -> Row:
    rate = stats.pass_at_k(run.outcomes, 1)
    low, high = stats.interval(run.outcomes)
    versus = {}
    if start is not None and run.stage != "base":
        found = stats.compare(start.outcomes, run.outcomes, names=(start.name, run.name))
        change = stats.relative_change(stats.pass_at_k(start.outcomes, 1), rate)
        versus = dataclasses.asdict(found) | {"relative": change}
    return Row(
        run=run.name,
        model=run.model,
        objective=run.objective,
        benchmark=run.benchmark,
        start=run.start,
        stage=run.stage,
        n=len(run.outcomes),
        samples=sum(map(len, run.outcomes.values())),
        pass_base=stats.pass_at_k(run.base_outcomes, 1) if run.base_outcomes else None,
        pass_plus=rate,
        low=low,
        high=high,
        **versus,
    )


def _start_key(run: Run | Row) -> tuple[str, str, str]:
    return run.model, run.start, run.benchmark


def _order(runs: Sequence[Run]) -> Callable[[Run], tuple]:
    models, benchmarks = ([getattr(run, name) for run in runs] for name in ("model", "benchmark"))

    def key(run: Run) -> tuple:
        start, stage = list(STARTS).index(run.start), list(STAGES).index(run.stage)
        place = models.index(run.model), benchmarks.index(run.benchmark)
        return *place, start, stage, run.objective, run.name

    return key


def _check(runs: Sequence[Run]) -> None:
    problems = [] if runs else ["no runs were given"]
    for run in runs:
        if run.start not in STARTS or run.stage not in STAGES:
            known = f"{list(STARTS)} and {list(STAGES)}"
            problems.append(f"{run.name}: got {run.start}, {run.stage}; expected of {known}")
        if run.base_outcomes and run.base_outcomes.keys() != run.outcomes.keys():
            problems.append(f"{run.name}: base_outcomes and outcomes are not of the same tasks")
    names = [run.name for run in runs]
    starts = [_start_key(run) for run in runs if run.stage == "base"]
    problems += [f"{name}: used {n} times" for name, n in Counter(names).items() if n > 1]
    problems += [f"{key}: {n} base runs" for key, n in Counter(starts).items() if n > 1]
    if problems:
        raise ValueError("cannot tabulate these runs:\n  " + "\n  ".join(problems))
