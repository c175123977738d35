"""A sheet for people to review pairs, blind: which side is better?

    python -m align_jax.synth.review make PAIRS FOLDER [--count=100] [--seed=0]
    python -m align_jax.synth.review score FOLDER REVIEWED.csv [REVIEWED.csv]

`make` writes review.html, a page that loads nothing and saves what was answered as a CSV file; review.csv, the same
sheet for a spreadsheet; and key.csv, which says where chosen stands and is not for the reviewer. Pairs, their order,
and their sides are drawn by the seed. `score` says how often a reviewer agrees with the labels and, of two, how often
with each other.
"""

import argparse
import base64
import csv
import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from statsmodels.stats.proportion import proportion_confint

from align_jax import records
from align_jax.records import Pair, Text
from align_jax.synth import validate

ANSWERS = {"left": "Left is better", "right": "Right is better", "tie": "No difference", "unclear": "Cannot tell"}


def make(folder: Path, pairs: Sequence[Pair], *, seed: int, count: int = 100, question: str = "") -> int:
    """Write the sheets and the key of `count` random pairs; return how many there are."""
    if not pairs:
        raise ValueError("no pairs to review")
    drawn = random.Random(seed).sample(list(pairs), min(count, len(pairs)))
    rows, key = [], []
    for number, pair in enumerate(drawn, 1):
        sides = [("chosen", pair.chosen), ("rejected", pair.rejected)]
        random.Random(f"{seed}/{pair.id}").shuffle(sides)
        (chosen_is_left, left), (_, right) = (sides[0][0] == "chosen", sides[0][1]), sides[1]
        rows.append({"number": number, "prompt": _plain(pair.prompt), "left": _plain(left), "right": _plain(right),
                     "answer": "", "comment": ""})
        key.append({"number": number, "id": pair.id, "chosen": "left" if chosen_is_left else "right",
                    "why": pair.made.get("why", "")})
    folder.mkdir(parents=True, exist_ok=True)
    sheet = records.fingerprint([row["left"] for row in rows])  # so that answers are saved under this sheet's name
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    (folder / "review.html").write_text(TEMPLATE.render(
        rows=rows, answers=ANSWERS, question=question or "Which answer is better?", sheet=sheet, script=SCRIPT,
        digest=digest), encoding="utf-8")
    _write(folder / "review.csv", [{name: _cell(value) for name, value in row.items()} for row in rows])
    _write(folder / "key.csv", key)
    return len(rows)


def score(folder: Path, reviewed: Sequence[Path]) -> dict:
    """Say how often each reviewer agrees with the labels, ties apart, and what two say of each other."""
    key = {row["number"]: row["chosen"] for row in _read(folder / "key.csv")}
    answers = [{row["number"]: row["answer"].strip().lower() for row in _read(path)} for path in reviewed]
    wrong = [f"{path}: {number}: {answer!r}" for path, given in zip(reviewed, answers, strict=True)
             for number, answer in given.items() if number not in key or answer not in ("", *ANSWERS)]
    if wrong:
        raise ValueError(f"{len(wrong)} answers are unknown, expected one of {list(ANSWERS)}: " + "; ".join(wrong[:10]))
    report = {str(path): _against(key, given) for path, given in zip(reviewed, answers, strict=True)}
    if len(answers) == 2:
        points = {"left": 0, "tie": 1, "right": 2}  # ordinal
        found = validate.raters(*([points.get(given.get(number)) for number in key] for given in answers))
        report["between the two"] = {"n": found.n, "kappa": found.kappa, "95 %": (found.kappa_low, found.kappa_high)}
    return report


def _against(key: Mapping[str, str], given: Mapping[str, str]) -> dict:
    decided = {number: answer for number, answer in given.items() if answer in ("left", "right")}
    agreed = sum(answer == key[number] for number, answer in decided.items())
    low, high = proportion_confint(agreed, len(decided), method="wilson") if decided else (None, None)
    others = {name: sum(answer == name for answer in given.values()) for name in ("tie", "unclear", "")}
    return {"agrees": agreed, "of": len(decided), "share": agreed / len(decided) if decided else None,
            "95 %": (low, high), "tie": others["tie"], "unclear": others["unclear"],
            "open": others[""] + len(key.keys() - given.keys())}


def _plain(shown: Text) -> str:
    """Text, or messages under their roles; control characters spelled out, but for line ends and tabs."""
    if not isinstance(shown, str):
        shown = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in shown)
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\u{ord(c):04x}" for c in shown.replace("\r\n", "\n"))


def _cell(value) -> str:
    """Keep a spreadsheet from running what a model wrote as a formula."""
    return f"'{value}" if str(value).startswith(("=", "+", "-", "@", "\t")) else str(value)


def _write(path: Path, rows: Sequence[Mapping]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ["number"])
        writer.writeheader()
        writer.writerows(rows)


def _read(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin theirs with a mark
        return list(csv.DictReader(file))


SCRIPT = """
const form = document.forms[0], name = "review-" + form.dataset.sheet, saved = JSON.parse(localStorage[name] || "{}");
const count = () => document.querySelectorAll("input[type=radio]:checked").length;
const show = () => document.getElementById("done").textContent = count();
for (const [field, value] of Object.entries(saved)) if (form.elements[field]) form.elements[field].value = value;
form.addEventListener("input", () => {
  localStorage[name] = JSON.stringify(Object.fromEntries(new FormData(form)));
  show();
});
document.getElementById("save").addEventListener("click", () => {
  const data = new FormData(form), quote = text => '"' + (text || "").replaceAll('"', '""') + '"';
  const rows = [...document.querySelectorAll("fieldset")].map(f => f.dataset.number).map(
    n => [n, data.get("answer-" + n) || "", quote(data.get("comment-" + n))].join(","));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(["number,answer,comment\\n" + rows.join("\\n") + "\\n"]));
  link.download = "reviewed.csv";
  link.click();
});
show();
"""

TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{{ digest }}'">
<title>Review of {{ rows | length }} pairs</title>
<style>
:root { color-scheme: light dark; --rule: light-dark(#d8d8d8, #444); --soft: light-dark(#f6f6f4, #1d1d1f) }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 90rem; padding: 0 1.5rem 4rem }
header { background: Canvas; border-bottom: 1px solid var(--rule); padding: .6rem 0; position: sticky; top: 0 }
header p { display: inline; margin-right: 1.5rem }
fieldset { border: 0; border-bottom: 1px solid var(--rule); margin: 0; min-width: 0; padding: 2rem 0 }
legend { float: left; font-weight: 600; margin-bottom: .5rem; width: 100% }
pre { background: var(--soft); border-radius: 4px; font: 13px/1.45 ui-monospace, monospace; margin: 0 0 1rem;
      overflow-x: auto; padding: .8rem; tab-size: 4; white-space: pre-wrap; overflow-wrap: anywhere }
.sides { clear: both; display: grid; gap: 1rem; grid-template-columns: 1fr 1fr }
.sides h3 { font-size: .9rem; margin: 0 0 .3rem }
.prompt { clear: both }
label { margin-right: 1.2rem; white-space: nowrap }
input[type=text] { min-width: 16rem }
@media (max-width: 50rem) { .sides { grid-template-columns: 1fr } }
</style>
</head>
<body>
<form data-sheet="{{ sheet }}">
<header>
<p><strong>{{ question }}</strong></p>
<p><span id="done"></span> of {{ rows | length }} answered</p>
<button type="button" id="save">Save as CSV</button>
</header>
{% for row in rows %}
<fieldset data-number="{{ row.number }}">
<legend>{{ row.number }}</legend>
<pre class="prompt">{{ row.prompt }}</pre>
<div class="sides">
<div><h3>Left</h3><pre>{{ row.left }}</pre></div>
<div><h3>Right</h3><pre>{{ row.right }}</pre></div>
</div>
{% for value, label in answers.items() %}
<label><input type="radio" name="answer-{{ row.number }}" value="{{ value }}"> {{ label }}</label>
{% endfor %}
<label>Comment <input type="text" name="comment-{{ row.number }}"></label>
</fieldset>
{% endfor %}
</form>
<script>{{ script | safe }}</script>
</body>
</html>
""")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m align_jax.synth.review", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "score"))
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--question", default="", help="what the reviewer is asked; of a dimension, say")
    args = parser.parse_args()
    if len(args.paths) < 2 or (args.what == "make" and len(args.paths) > 2):
        parser.error("expected: make PAIRS FOLDER, or: score FOLDER REVIEWED.csv [REVIEWED.csv]")
    if args.what == "make":
        path, folder = args.paths
        count = make(folder, records.read(path, Pair), seed=args.seed, count=args.count, question=args.question)
        print(f"{folder}: wrote review.html, review.csv and key.csv with {count} pairs")
    else:
        for name, found in score(args.paths[0], args.paths[1:]).items():
            print(f"{name}: " + ", ".join(f"{what} {value}" for what, value in found.items()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
