"""The report: its numbers against published tables, scipy and EvalPlus, its page against attack."""

import csv
import html.parser
import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import evalplus.eval
import markdown_it
import numpy as np
import pytest
import scipy.stats

from align_jax.report import page, stats, tables

HOSTILE = (
    '</pre></style><script>alert(1)</script><img src=x onerror="a">\u202e\x1b[31m\ud800 $x$ & |'
)


def outcomes(*passed):
    return {f"t/{i}": [bool(x)] for i, x in enumerate(passed)}


def run(stage, passed, start="pretrained", **changes):
    fields = {"name": f"{start}-{stage}", "model": "pocket", "benchmark": "PocketEval"}
    fields |= {"objective": "functional", "start": start, "stage": stage, "outcomes": passed}
    return tables.Run(**fields | changes)


def paired(both, gained, lost, neither):
    """Start and aligned outcomes with these cells of the paired 2x2 table."""
    start = [1] * both + [0] * gained + [1] * lost + [0] * neither
    aligned = [1] * both + [1] * gained + [0] * lost + [0] * neither
    return outcomes(*start), outcomes(*aligned)


def study():
    """Pretrained: DPO gains 25, SFT and BoNBoN gain 3 and lose 2. Instruct: DPO loses 20."""
    start, better = paired(20, 25, 0, 55)
    _, similar = paired(18, 0, 2, 80)
    similar |= {f"t/{i}": [True] for i in range(20, 23)}
    _, worse = paired(0, 0, 20, 80)
    return [
        run("dpo", worse, "instruct"),
        run("bonbon", similar, metadata={"seed": 3}),
        run("sft", similar),
        run("base", start),
        run("base", start, "instruct"),
        run("dpo", better, base_outcomes=better),
    ]


# Statistics


def test_pass_at_k_equals_evalplus():
    rng = np.random.default_rng(0)
    scored = {f"t/{i}": list(rng.random(20) < rng.random()) for i in range(50)}
    correct = [sum(passed) for passed in scored.values()]
    for k in (1, 2, 10, 20):
        expected = evalplus.eval.estimate_pass_at_k(20, correct, k).mean()
        assert stats.pass_at_k(scored, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [0, 2])
def test_pass_at_k_refuses_too_few_samples(k):
    with pytest.raises(ValueError, match=f"pass@{k} .*t/0" if k else "k >= 1"):
        stats.pass_at_k(outcomes(1), k)


# Newcombe, Stat Med 1998;17:857, Table I, method 3.
WILSON = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611)}


@pytest.mark.parametrize("count, n", WILSON)
def test_interval_of_single_samples_is_wilsons(count, n):
    found = stats.interval(outcomes(*[1] * count + [0] * (n - count)))
    assert found == pytest.approx(WILSON[count, n], abs=5e-5)


def test_interval_of_several_samples_agrees_with_normal_theory():
    rng = np.random.default_rng(1)
    scored = {f"t/{i}": list(rng.random(8) < rng.random()) for i in range(400)}
    rates = np.array([np.mean(passed) for passed in scored.values()])
    expected = scipy.stats.norm.interval(0.95, rates.mean(), rates.std(ddof=1) / 20)
    assert stats.interval(scored, seed=5) == pytest.approx(expected, abs=2e-3)
    assert stats.interval(scored, seed=5) == stats.interval(scored, seed=5)


def test_interval_never_claims_certainty():
    low, high = stats.interval({f"t/{i}": [False] * 4 for i in range(20)})
    assert (low, high) == pytest.approx(WILSON[0, 20], abs=5e-5)


def test_relative_change_is_the_papers():
    assert stats.relative_change(0.48, 0.84) == pytest.approx(0.75)  # CodeLlama-7b, section 4.3.1
    assert stats.relative_change(0.0, 0.3) is None


@pytest.mark.parametrize(
    "cells, p",
    [((9, 5, 0, 6), 2 / 2**5), ((4, 6, 1, 9), 2 * 8 / 2**7), ((7, 0, 0, 3), 1), ((0, 2, 2, 0), 1)],
)
def test_mcnemar_by_hand(cells, p):
    found = stats.compare(*paired(*cells))
    assert (found.gained, found.lost, found.test) == (cells[1], cells[2], "mcnemar")
    assert found.p == pytest.approx(p)
    assert found.difference == pytest.approx((cells[1] - cells[2]) / sum(cells))


def test_mcnemar_equals_the_sign_test():
    rng = np.random.default_rng(2)
    for gained, lost in rng.integers(0, 40, (20, 2)):
        expected = scipy.stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1
        assert stats.compare(*paired(30, gained, lost, 30)).p == pytest.approx(expected)


@pytest.mark.parametrize("cells, tolerance", [((9, 6, 1, 6), 1e-9), ((90, 30, 15, 60), 0.01)])
def test_sign_flip_generalises_mcnemar(cells, tolerance):
    start, aligned = paired(*cells)
    doubled = ({task: passed * 2 for task, passed in x.items()} for x in (start, aligned))
    found = stats.compare(*doubled)
    assert found.test == "sign flip"
    assert found.p == pytest.approx(stats.compare(start, aligned).p, abs=tolerance)


# Newcombe, Stat Med 1998;17:2635, Table III, method 10; the last by CRAN's contingencytables.
NEWCOMBE = {
    (36, 12, 2, 0): (0.0569, 0.3404),
    (20, 12, 2, 16): (0.0562, 0.3292),
    (36, 14, 0, 0): (0.1528, 0.4167),
    (18, 14, 0, 18): (0.1441, 0.3963),
    (2, 97, 1, 0): (0.8721, 0.9854),
    (0, 30, 0, 0): (0.8395, 1.0),
    (54, 0, 0, 0): (-0.0664, 0.0664),
    (59, 6, 16, 80): (-0.1186, -0.0046),
}


@pytest.mark.parametrize("cells", NEWCOMBE)
def test_newcombe_equals_the_published_intervals(cells):
    assert stats.newcombe(*cells) == pytest.approx(NEWCOMBE[cells], abs=6e-5)


@pytest.mark.parametrize(
    "cells", [(0.3, 0.1, 0.05, 0.55), (0.3, 0.05, 0.05, 0.6), (0.1, 0.3, 0, 0.6)]
)
def test_newcombe_covers_95_percent(cells):
    draws = np.random.default_rng(3).multinomial(164, cells, 2000)
    limits = np.array([stats.newcombe(*map(int, draw)) for draw in draws])
    truth = cells[1] - cells[2]
    covered = ((limits[:, 0] <= truth) & (truth <= limits[:, 1])).mean()
    assert 0.935 < covered < 0.97  # binomial error of 2000 draws: 0.5 points


def test_bootstrap_of_the_difference_covers_95_percent():
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(150):
        skill = rng.beta(1, 1, 80)
        draw = {
            name: rng.random((80, 4)) < skill[:, None] ** power
            for name, power in (("a", 1), ("b", 0.5))
        }
        a, b = ({str(i): list(x) for i, x in enumerate(draw[name])} for name in ("a", "b"))
        found = stats.compare(a, b)
        covered.append(found.difference_low <= 2 / 3 - 1 / 2 <= found.difference_high)
    assert 0.90 <= np.mean(covered) <= 0.99  # binomial error of 150 draws: 1.8 points


def test_unequal_problem_sets_are_refused_by_name():
    start, aligned = outcomes(1, 0, 1), outcomes(1, 0, 1)
    del start["t/2"], aligned["t/0"]
    with pytest.raises(ValueError, match="base lacks 1 .*: t/2; dpo lacks 1 .*: t/0"):
        stats.compare(start, aligned, names=("base", "dpo"))


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


# Tables


def test_rows_compare_with_their_own_start():
    table = tables.rows(study())
    order = [(row.start, row.stage) for row in table]
    stages = ["base", "sft", "dpo", "bonbon"]
    assert order == [("pretrained", s) for s in stages] + [
        ("instruct", "base"),
        ("instruct", "dpo"),
    ]
    start, sft, dpo, _, _, worse = table
    assert (start.p, start.relative, start.verdict) == (None, None, "")
    assert (dpo.pass_plus, dpo.pass_base, dpo.relative) == pytest.approx((0.45, 0.45, 1.25))
    assert (dpo.gained, dpo.lost, dpo.verdict) == (25, 0, "better")
    assert dpo.p == pytest.approx(2 / 2**25)
    assert dpo.holm == pytest.approx(4 * dpo.p)  # smallest of four comparisons
    assert (sft.gained, sft.lost, sft.p, sft.verdict) == (3, 2, 1.0, "")
    assert (worse.gained, worse.lost, worse.verdict) == (0, 20, "worse")


def test_headline_tells_what_happened():
    assert tables.headline(tables.rows(study())) == (
        "1 of 3 aligned models beat their own start at p < 0.05 (Holm over 4 comparisons); "
        "1 did significantly worse. Best change: pretrained DPO, pass@1 0.200 to 0.450, "
        "Holm p < 0.001."
    )
    same = outcomes(1, 0)
    table = tables.rows([run("base", same), run("dpo", same), run("sft", same)])
    assert tables.headline(table).startswith("None of 1 aligned model beat their own start")
    assert "none did significantly worse" in tables.headline(table)
    alone = "No aligned model was compared with its own start."
    assert tables.headline(tables.rows([run("base", same), run("sft", same)])) == alone
    assert tables.headline(tables.rows([run("dpo", same)])) == alone


def test_text_is_aligned_and_marks_what_is_undefined():
    text = tables.to_text(tables.rows([run("base", outcomes(0, 0)), run("dpo", outcomes(1, 0))]))
    head, rule, base, dpo = text.splitlines()
    assert head.split("  ")[0] == "benchmark" and "model" not in head  # one model: not repeated
    assert base.split()[-4:] == ["–"] * 4
    undefined = "n/a"  # a relative change from 0
    assert re.split("  +", dpo)[-4:] == [undefined, "1/0", "1.000", "1.000"]
    ends = [match.end() for match in re.finditer("-+", rule)]
    assert ends[-1] == max(map(len, text.splitlines()))


def test_several_samples_name_their_test():
    two = {task: passed * 2 for task, passed in outcomes(0, 1).items()}
    assert "1.000 (sign flip)" in tables.to_text(tables.rows([run("base", two), run("dpo", two)]))


def test_markdown_parses_to_the_same_cells():
    table = tables.rows([*study(), run("base", outcomes(1), model="a|b <i>", name="other")])
    tokens = markdown_it.MarkdownIt().enable("table").parse(tables.to_markdown(table))
    cells = [token.content for token in tokens if token.type == "inline"]
    columns = tables.visible(table)
    assert len(cells) == len(columns) * (len(table) + 1)
    assert cells[: len(columns)] == [column.title for column in columns]
    assert cells[-len(columns)] == "a|b &lt;i>"
    assert cells.count("**&lt; 0.001**") == 2


def test_csv_and_json_carry_every_number():
    table = tables.rows(study())
    lines = list(csv.DictReader(io.StringIO(tables.to_csv(table))))
    loaded = json.loads(tables.to_json(table))
    assert [line["run"] for line in lines] == [line["run"] for line in loaded]
    assert float(lines[2]["p"]) == loaded[2]["p"] == table[2].p
    assert lines[0]["p"] == "" and loaded[0]["p"] is None


def test_every_problem_with_the_runs_is_named_at_once():
    one = outcomes(1)
    runs = [
        run("base", one),
        run("base", one),
        run("ppo", one),
        run("sft", one, base_outcomes=outcomes(1, 1)),
    ]
    with pytest.raises(ValueError) as error:
        tables.rows(runs)
    for part in (
        "pretrained-base: used 2 times",
        "2 base runs",
        "ppo; expected",
        "not of the same tasks",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no runs"):
        tables.rows([])


# Page


class Reader(html.parser.HTMLParser):
    """Collects the tags, attributes and text a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.pieces = [], [], []
        self.feed(text)
        self.text = "".join(self.pieces)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.pieces.append(data)


def full_page(text="x"):
    """A page with every section, with `text` wherever a model or a user could put it."""
    runs = [
        run(s, o, name=f"{text} {s}", model=text, benchmark=text, metadata={text: text})
        for s, o in (
            ("base", {text: [False, True], "b": [True, True]}),
            ("dpo", {text: [True, True], "b": [False, True]}),
        )
    ]
    code = {runs[0].name: {text: ["wrong" + text, "right"], "b": ["r", "r"]}}
    code |= {runs[1].name: {text: ["right" + text, "right"], "b": ["bad", "r"]}}
    return page.render(
        runs,
        notes=[text],
        families={text: text},
        curves={text: [(1, 0.7, None, 0.5), (2, 0.6, None, 0.6)]},
        code=code,
        stages=[{"stage": text, "in": 3, "dropped": {text: 1}}],
        details={text: {text: {"lr": 1e-6, text: text}}},
    )


def test_page_shows_hostile_text_and_obeys_none_of_it():
    text = full_page(HOSTILE)
    reader = Reader(text)
    assert not {"script", "img", "link", "iframe", "object"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name == "src"]
    assert all(value[0] == "#" for name, value in reader.attributes if name.endswith("href"))
    visible = HOSTILE
    for character in "\u202e\x1b\ud800":
        visible = visible.replace(character, character.encode("unicode_escape").decode())
    assert reader.text.count(visible) > 10
    assert "wrong" + visible in reader.text and "right" + visible in reader.text
    text.encode("utf-8")


def test_page_loads_nothing_and_is_the_same_every_time(tmp_path):
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]; import test_report as t; "
        "t.Path(sys.argv[1]).write_text(t.full_page(), encoding='utf-8')"
    )
    other, tests = tmp_path / "other.html", Path(__file__).parent
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", program, other, tests.parent, tests]
    subprocess.run(command, check=True, env=environment)
    text = full_page()
    assert other.read_text(encoding="utf-8") == text
    assert "default-src 'none'" in text
    targets = re.findall(r"(?:url\(|src=|href=)[\"']?([^\"')>]+)", text)
    assert targets and all(target[0] == "#" for target in targets) and "@import" not in text


def test_figures_are_well_formed_and_follow_the_theme():
    svg = page.forest(tables.rows(study()))
    root = ElementTree.fromstring(re.sub(r"\sxlink:href", " href", svg))
    assert root.get("aria-label")
    labels = {element.text for element in root.iter("text")}
    assert {"Start", "SFT", "DPO", "BoNBoN", "PTA, from pretrained", "FTA, from instruct"} <= labels
    assert not re.search("#0[1-6]0[1-6]0[1-6]", svg)
    assert "var(--pta)" in svg and "var(--fta)" in svg


def test_breakdown_is_the_mean_of_each_family():
    runs = [run("base", outcomes(0, 0, 1, 1)), run("dpo", outcomes(1, 0, 1, 0))]
    families = {"t/0": "strings", "t/1": "strings", "t/2": "lists"}
    lines = page.breakdown(tables.rows(runs), {r.name: r for r in runs}, families)
    assert lines == [
        ("lists", 1, [(1, 0), (1, 0)]),
        ("other", 1, [(1, 0), (0, -1)]),
        ("strings", 2, [(0, 0), (0.5, 0.5)]),
    ]


def test_examples_show_the_samples_that_differ():
    runs = [
        run("base", {"a": [True, False], "b": [True, True]}),
        run("dpo", {"a": [True, True], "b": [True, False]}),
    ]
    code = {
        r.name: {task: [f"{r.stage} {task} {i}" for i in range(2)] for task in "ab"} for r in runs
    }
    found = list(page.examples(tables.rows(runs), {r.name: r for r in runs}, code))
    assert [(x["task"], x["kind"]) for x in found] == [("a", "gained"), ("b", "lost")]
    shown = [[(program, passed) for _, program, passed in x["programs"]] for x in found]
    assert shown == [
        [("base a 1", False), ("dpo a 0", True)],
        [("base b 0", True), ("dpo b 1", False)],
    ]


def test_write_makes_a_page_without_optional_sections(tmp_path):
    page.write(tmp_path / "report.html", study(), ["A note."])
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 of 3 aligned models beat their own start" in text and "A note." in text
    assert re.findall("<h2>(.*?)</h2>", text) == ["Results", "pocket on PocketEval", "Runs"]
