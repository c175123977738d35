"""The report page: one self-contained report.html: headline, table, plots, samples, what was run.

The last stage of the flow. The page loads nothing and runs nothing (its own content policy forbids
both), reads in light and dark, and prints. Model output is hostile text: jinja2 escapes everything,
and control characters are spelled out.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from align_jax.report import stats, tables

Runs, Rows = Sequence[tables.Run], Sequence[tables.Row]
Named = Mapping[str, tables.Run]
Code = Mapping[str, Mapping[str, Sequence[str]]]


def write(path: str | Path, runs: Runs, notes: Sequence[str] = (), **sections: Any) -> None:
    """Write the page of `runs` to `path`; `sections` are the keywords of `render`."""
    Path(path).write_text(render(runs, notes=notes, **sections), encoding="utf-8")


def render(
    runs: Runs,
    *,
    notes: Sequence[str] = (),
    families: Mapping[str, str] | None = None,
    curves: Mapping[str, Sequence[tuple]] | None = None,
    code: Code | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    details: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Return the page as HTML; the same input gives the same bytes.

    families: task id -> family. curves: name -> (step, loss, margin, accuracy), None where a stage
    has no such number. code: run name -> task id -> the program of each sample, in the order of the
    outcomes; a task without code is not shown. stages: one mapping per stage that was run (name,
    counts, drops by reason). details: titled mappings, such as config and versions.
    """
    rows = tables.rows(runs)
    columns = tables.visible(rows)
    named = {run.name: run for run in runs}
    groups = groupby(rows, lambda row: (row.model, row.benchmark))
    panels = [(" on ".join(key), list(panel)) for key, panel in groups]
    return TEMPLATE.render(
        headline=tables.headline(rows),
        notes=notes,
        columns=columns,
        rows=[(row, [tables.cell(row, column) for column in columns]) for row in rows],
        is_single=all(row.samples == row.n for row in rows),
        plots=[(title, forest(panel)) for title, panel in panels],
        families=[(t, panel, breakdown(panel, named, families)) for t, panel in panels if families],
        curves=training(curves) if curves else "",
        examples=list(examples(rows, named, code or {})),
        stages=stages,
        runs=[{"run": run.name, **run.metadata} for run in runs if run.metadata],
        details=details or {},
    )


# Colours in figures are placeholders that become CSS variables: one figure serves light and dark.
INK, MUTED, RULE, PAPER, PTA, FTA = (f"#{i:02}{i:02}{i:02}" for i in range(1, 7))
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper", PTA: "pta", FTA: "fta"}
PATHWAY = {"pretrained": PTA, "instruct": FTA}
DASHES = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (4, 3))}
STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, and in the page's own font
    "svg.hashsalt": "align_jax",  # stable ids
    "text.parse_math": False,  # a "$" in a name is a dollar sign
    "text.color": INK,
    "font.size": 9,
    "axes.axisbelow": True,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@matplotlib.rc_context(STYLE)
def forest(rows: Rows) -> markupsafe.Markup:
    """Draw pass@1 and, beside it, the paired difference to the own start; a group per pathway."""
    groups = [list(group) for _, group in groupby(rows, lambda row: row.start)]
    height = 0.5 + 0.29 * (len(rows) + 1.5 * len(groups))
    figure = Figure(figsize=(8.4, height), layout="constrained")
    rate, change = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    y, ticks = 0.0, {}
    for first, *rest in groups:
        title = f"{tables.STARTS[first.start]}, from {first.start}"
        rate.annotate(title, (0, y), xycoords=("axes fraction", "data"), weight="bold")
        if first.stage == "base":
            rate.vlines(first.pass_plus, y + 0.5, y + len(rest) + 1.5, **DASHES)
        for row in (first, *rest):
            y += 1
            ticks[y] = tables.STAGES[row.stage]
            _dot(rate, row, y, (row.low, row.pass_plus, row.high))
            _dot(change, row, y, (row.difference_low, row.difference, row.difference_high))
        y += 1.5
    rate.set(xlabel="pass@1", ylim=(y - 0.7, -0.8))
    rate.set_yticks(list(ticks), list(ticks.values()), color=INK)
    change.set(xlabel="paired difference to own start")
    change.axvline(0, **DASHES)
    for axes in (rate, change):
        axes.grid(True, axis="x")
    return _svg(
        figure, "pass@1 of every run and its paired difference to the start, with intervals"
    )


def _dot(axes: Axes, row: tables.Row, y: float, limits: tuple[float | None, ...]) -> None:
    low, value, high = limits
    color = MUTED if row.stage == "base" else PATHWAY[row.start]
    if low is not None:
        axes.hlines(y, low, high, color=color, linewidth=1.6)
    if value is not None:
        axes.plot(value, y, "o", color=color, mfc=color if row.verdict else PAPER, mew=1.6)


@matplotlib.rc_context(STYLE | {"ytick.labelsize": 8, "xtick.labelsize": 8})
def training(curves: Mapping[str, Sequence[tuple]]) -> markupsafe.Markup:
    """Draw loss, margin and accuracy by step: panels per run, own scales, as losses differ."""
    figure = Figure(figsize=(8.4, 0.4 + 1.1 * len(curves)), layout="constrained")
    grid = figure.subplots(len(curves), 3, squeeze=False)
    for panels, (name, points) in zip(grid, curves.items(), strict=True):
        panels[0].set_ylabel(_visible(name), rotation=0, ha="right", va="center", color=INK)
        for i, measure in enumerate(("loss", "margin", "accuracy")):
            known = [(point[0], point[i + 1]) for point in points if point[i + 1] is not None]
            if not known:
                panels[i].set_axis_off()
                continue
            panels[i].plot(*zip(*known, strict=True), color=INK, linewidth=1.1)
            panels[i].set_title(f"{measure}, last {known[-1][1]:.3g}", loc="left", color=MUTED)
            panels[i].grid(True, axis="y")
    return _svg(figure, "loss, margin and accuracy by training step")


def _svg(figure: Figure, label: str) -> markupsafe.Markup:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    box = re.search(r'<svg[^>]* (viewBox="[^"]*")[^>]*>', out.getvalue())
    svg = f'<svg role="img" aria-label="{label}" {box[1]}>{out.getvalue()[box.end() :]}'
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # unused, and two figures would share them
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return markupsafe.Markup(svg)


def breakdown(panel: Rows, named: Named, families: Mapping[str, str]) -> list:
    """List (family, number of tasks, (pass@1, its change from the own start) of each row)."""
    rates = {row.run: stats.rates(named[row.run].outcomes) for row in panel}
    starts = {row.start: row.run for row in panel if row.stage == "base"}
    members: dict[str, list[str]] = {}
    for task in rates[panel[0].run]:
        if all(task in rate for rate in rates.values()):
            members.setdefault(families.get(task, "other"), []).append(task)
    lines = []
    for family, tasks in sorted(members.items()):
        mean = {run: float(np.mean([rate[task] for task in tasks])) for run, rate in rates.items()}
        own = [mean[starts.get(row.start, row.run)] for row in panel]
        cells = [
            (mean[row.run], mean[row.run] - start) for row, start in zip(panel, own, strict=True)
        ]
        lines.append((family, len(tasks), cells))
    return lines


def examples(rows: Rows, named: Named, code: Code, limit: int = 2) -> Iterator[dict[str, Any]]:
    """Yield the first `limit` tasks gained and lost by each start's best aligned run.

    In task order, so that nothing is picked for its looks.
    """
    for _, group in groupby(rows, lambda row: (row.model, row.benchmark, row.start)):
        start, *aligned = group
        compared = [row for row in aligned if row.difference is not None]
        best = max(compared, key=lambda row: (row.stage != "sft", row.difference), default=start)
        before, after = named[start.run].outcomes, named[best.run].outcomes
        gain = {task: np.mean(after[task]) - np.mean(before[task]) for task in before}
        shown = code.get(start.run, {}).keys() & code.get(best.run, {}).keys()
        for kind, sign in (("gained", 1), ("lost", -1)):
            moved = (task for task in before if sign * gain[task] > 0 and task in shown)
            for task in islice(moved, limit):
                sides = []
                for row, passed in ((start, sign < 0), (best, sign > 0)):
                    sample = list(named[row.run].outcomes[task]).index(passed)
                    sides.append((row, code[row.run][task][sample], passed))
                yield {"task": task, "kind": kind, "programs": sides}


def _plain(value: Any) -> str:
    """Text of a metadata value: mappings as `key value` pairs, floats to four digits."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(x)}" for key, x in value.items()) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Control characters, direction overrides, zero-width characters and lone surrogates.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def _visible(value: Any) -> Any:
    """Spell out characters that hide text, reorder it, or cannot be written as UTF-8."""
    if not isinstance(value, str):
        return value
    spelled = HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), value)
    return type(value)(spelled)


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Alignment report</title>
<style>
:root { color-scheme: light dark; --paper: light-dark(#fff, #15171a);
  --ink: light-dark(#1a1a1a, #e6e6e3); --muted: light-dark(#666, #9a9a96);
  --rule: light-dark(#dcdcd8, #34373b); --pta: light-dark(#1f5fa8, #74aef2);
  --fta: light-dark(#a8501f, #f0a070); --good: light-dark(#23784a, #4fb37c);
  --bad: light-dark(#b93224, #e5705f); }
body { max-width: 62rem; margin: 3rem auto; padding: 0 1.5rem; background: var(--paper);
  color: var(--ink); font: 17px/1.5 Charter, "Bitstream Charter", Georgia, serif; }
h1 { font-size: 1.05rem; font-weight: normal; color: var(--muted); margin: 0; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.headline { font-size: 1.4rem; line-height: 1.35; margin: .4rem 0 1.5rem; text-wrap: pretty; }
.caption { font-size: .85rem; line-height: 1.4; color: var(--muted); margin: .5rem 0; }
table, svg text { font-family: system-ui, "Helvetica Neue", Arial, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; border-block: 1.5px solid var(--ink); min-width: 100%;
  font-size: .82rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
th { font-weight: 600; border-bottom: 1px solid var(--ink); vertical-align: bottom; }
th, td { padding: .3rem .5rem; text-align: left; }
.number { text-align: right; white-space: nowrap; }
.first > td { border-top: 1px solid var(--rule); }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
td small { display: inline-block; width: 2.9em; color: var(--muted); }
svg { display: block; width: 100%; height: auto; }
.programs { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
pre { font: 12px/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; tab-size: 4;
  margin: .2rem 0; padding: .6rem .8rem; border-left: 3px solid var(--rule); max-height: 26rem;
  overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print { :root { color-scheme: light; } body { margin: 0; font-size: 11pt; max-width: none; }
  pre { max-height: none; } .wide { overflow: visible; } table { font-size: 7pt; }
  th, td { padding: 2pt 3pt; } tr, svg, .example { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
</style>
{% macro grid(entries) %}
{% set keys = entries | map("list") | sum(start=[]) | unique | list %}
<div class="wide"><table><tr>{% for key in keys %}<th>{{ key }}</th>{% endfor %}</tr>
{% for entry in entries %}
<tr>{% for key in keys %}<td>{{ entry[key] | plain if key in entry }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endmacro %}
<h1>Alignment report</h1>
<p class="headline">{{ headline }}</p>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}

<h2>Results</h2>
<div class="wide"><table><tr>
{% for c in columns %}
<th class="{{ "number" if is_number(c) }}">{{ c.title }}</th>
{% endfor %}
</tr>
{% for row, cells in rows %}
<tr class="{{ "first" if row.stage == "base" and not loop.first }}">
{% for text in cells %}
{% set kind = "number" if is_number(columns[loop.index0]) %}
<td class="{{ kind }} {{ row.verdict if loop.last }}">{{ text }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
<p class="caption">n: problems. pass@1: share solved under all tests (“base tests”: under the
benchmark's original tests alone), with a 95 % interval: {{ "Wilson's, one sample per problem"
if is_single else "a BCa bootstrap over problems, or Wilson's for one sample per problem" }}.
vs start: relative change of pass@1 from the start the model was trained from. gained/lost: problems
solved more, and less, often than by that start. p: exact McNemar test on the same problems{{ ""
if is_single else ", or for several samples the sign-flip permutation test that generalises it" }};
Holm p: adjusted for every comparison in this table. Coloured where Holm p &lt; 0.05.</p>

{% for title, svg in plots %}
<h2>{{ title }}</h2>
{{ svg }}
{% endfor %}
<p class="caption">Bars are 95 % intervals; dots are filled where Holm p &lt; 0.05; the dashed line
is the own start. PTA: pretrained to aligned, FTA: finetuned to aligned. Left, each run alone, so
overlapping bars do not mean equal runs; right, the difference on the same problems
({{ "Newcombe's paired interval" if is_single else "Newcombe's or a bootstrap interval" }}), which
is what the test judges.</p>

{% if families %}<h2>By problem family</h2>{% endif %}
{% for title, panel, lines in families %}
<h3>{{ title }}</h3>
<div class="wide"><table><tr><th>family</th><th class="number">n</th>
{% for row in panel %}
<th class="number">{{ STARTS[row.start] }}<br>{{ STAGES[row.stage] }}</th>
{% endfor %}
</tr>
{% for family, n, cells in lines %}
<tr><td>{{ family }}</td><td class="number">{{ n }}</td>
{% for rate, change in cells %}
{% set share = [100 * change | abs, 60] | min %}
{% set tint = "--good" if change > 0 else "--bad" %}
<td class="number" style="background: color-mix(in srgb, var({{ tint }})
{{ "%.0f" | format(share) }}%, transparent)">{{ "%.2f" | format(rate) }}
{% if panel[loop.index0].stage != "base" %}<small>{{ "%+.2f" | format(change) }}</small>{% endif %}
</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
<p class="caption">pass@1, and its change from the own start. No test is made on families.</p>
{% endfor %}
{% if curves %}
<h2>Training</h2>
{{ curves }}
<p class="caption">By optimizer step; every panel has its own scale.</p>
{% endif %}
{% if examples %}
<h2>Samples</h2>
<p class="caption">For each start and its best aligned model, the first problems in benchmark order
that were gained and that were lost; none was chosen by hand.</p>
{% endif %}
{% for example in examples %}
<div class="example"><h3>{{ example.task }}, {{ example.kind }}</h3><div class="programs">
{% for row, program, passed in example.programs %}
<div><span class="caption">{{ row.start }} {{ STAGES[row.stage] }}:
<b class="{{ "better" if passed else "worse" }}">{{ "pass" if passed else "fail" }}</b></span>
<pre style="border-color: var(--{{ "good" if passed else "bad" }})">
{{ program }}</pre></div>
{% endfor %}
</div></div>
{% endfor %}
{% if stages %}<h2>What was run</h2>{{ grid(stages) }}{% endif %}
{% if runs %}<h2>Runs</h2>{{ grid(runs) }}{% endif %}
{% for title, entries in details.items() %}
<h2>{{ title }}</h2>
<div class="wide"><table>
{% for key, value in entries.items() %}
<tr><td>{{ key }}</td><td>{{ value | plain }}</td></tr>
{% endfor %}
</table></div>
{% endfor %}
</html>
"""
ENVIRONMENT = jinja2.Environment(
    autoescape=True, finalize=_visible, trim_blocks=True, lstrip_blocks=True
)
ENVIRONMENT.filters["plain"] = _plain
ENVIRONMENT.globals |= {name: getattr(tables, name) for name in ("STAGES", "STARTS", "is_number")}
TEMPLATE = ENVIRONMENT.from_string(PAGE)
