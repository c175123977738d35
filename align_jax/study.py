"""The grid: every start point through every technique, as stages that each run once.

    python -m align_jax.study --config=configs/quickstart.py

For each start: pairs of the model's own making -> SFT -> DPO and BoNBoN; then every model answers the benchmark,
one EvalPlus run scores all of them, and the report compares each with its own start. Pairs come from the factory
(`synth.pipeline`), where the model also invents the tasks and tests, or from problems that have tests.
The answers in the pairs are the start model's, as in the study, while the reference of DPO and BoNBoN is the model
after SFT: for BoNBoN, whose beta*_n assumes one model for both, that is an approximation. What a stage did
is kept in `stages.json`; a killed study continues with the stage that it was in.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from align_jax import engine, hf, log, mesh, records, sandbox, text
from align_jax.records import Pair, Problem, Sample, Score
from align_jax.report import page, tables
from align_jax.sample import to_file
from align_jax.score import evalplus
from align_jax.synth import pairs, pipeline, verify
from align_jax.train import check as check_recipe
from align_jax.train import train

FREE = ("run", "mesh", "sampling_mesh", "evalplus.parallel", "evalplus.timeout",  # settings that change no number
        *(f"pairs.synth.{name}" for name in pipeline.FREE))


def study(c: Mapping) -> Path:
    """Run the grid that a config describes; return the report's path."""
    c = json.loads(json.dumps(c if isinstance(c, dict) else c.to_dict()))
    check(c)
    c["starts"] = {start: c["starts"][start] for start in tables.STARTS if start in c["starts"]}  # the table's order
    c["benchmark"]["path"] = str(evalplus.locate(c["benchmark"]["name"], c["benchmark"]["path"]))
    read = [c["benchmark"]["path"]] + [c["pairs"]["problems"]["path"]] * (c["pairs"]["source"] == "problems")
    inputs = {path: records.fingerprint(Path(path)) for path in read}
    inputs |= {start: hf.fingerprint(settings["model"]) for start, settings in c["starts"].items()}
    folder = log.claim(c["run"], c | {"inputs": inputs}, free=FREE)
    book = folder / "stages.json"
    models = {}  # (start, stage) -> checkpoint folder
    for start, settings in c["starts"].items():
        models[start, "base"] = Path(settings["model"])
        SOURCES[c["pairs"]["source"]](c, folder / start, start, settings, book)
        models[start, "sft"] = train_once(c, folder / start, "sft", models[start, "base"], book)
        for technique in c["techniques"]:
            models[start, technique] = train_once(c, folder / start, technique, models[start, "sft"], book)
    for (start, stage), model in models.items():
        answer(c, folder / "answers" / f"{start}-{stage}.jsonl", model, c["starts"][start]["chat"], book)
    log.once(book, "EvalPlus", lambda: score(c, folder, models))
    report = write_report(c, folder, models)
    seconds = sum(did["seconds"] for did in json.loads(book.read_text()).values())
    log.say(f"wrote {report} and {folder / 'table.md'}; its stages took {log.minutes(seconds)}")
    return report


def check(c: Mapping) -> None:
    """Refuse at the start what would fail at the end."""
    sandbox.backend(c["sandbox"]["backend"])
    source, wrong = c["pairs"]["source"], []
    if source not in SOURCES:
        raise ValueError(f"study: pairs.source: got {source!r}, available are {sorted(SOURCES)}")
    n = c["pairs"]["synth"]["response"]["n"] if source == "synth" else c["pairs"]["problems"]["sampling"]["n"]
    if jax.process_count() > 1:
        wrong.append("a study runs on one host; train and sample run on several")
    wrong += [f"starts.{start}: expected {' or '.join(tables.STARTS)}"
              for start in c["starts"].keys() - tables.STARTS.keys()]
    known = sorted(tables.STAGES.keys() & c["train"].keys())
    wrong += [f"techniques: got {name!r}, with a recipe and a name in the table are {known}"
              for name in ("sft", *c["techniques"]) if name not in known]
    wrong += [f"train.{stage}.objective.n: got {recipe['objective']['n']}, but best and worst are of {n} samples, "
              f"pairs.{source}" for stage, recipe in c["train"].items() if recipe["objective"].get("n", n) != n]
    wrong += [f"train.{stage}.rule: got {recipe['rule']!r}, available are {sorted(pairs.RULES)}"
              for stage, recipe in c["train"].items() if recipe["rule"] not in pairs.RULES]
    for stage, recipe in c["train"].items():
        try:
            check_recipe(recipe)
        except ValueError as error:
            wrong.append(f"train.{stage}: {error}")
    for start, settings in c["starts"].items():
        hf.config(settings["model"])
        if settings["chat"] and text.load(settings["model"]).chat_template is None:
            wrong.append(f"starts.{start}.chat: {settings['model']} has no chat template")
        if source == "synth":
            try:
                pipeline.check(factory(c, Path(c["run"]) / start, settings))
            except ValueError as error:
                wrong.append(f"pairs.synth: {error}")
    if wrong:
        raise ValueError("study: " + "; ".join(wrong))


def rules(c: Mapping) -> list[str]:
    """The rules by which the recipes want pairs made."""
    return sorted({recipe["rule"] for recipe in c["train"].values()})


def factory(c: Mapping, folder: Path, settings: Mapping) -> dict:
    """The factory's config for a start model: what the study decides, and the rest as configured.

    The starts share their seeds, unless each judges them.
    """
    own = c["pairs"]["synth"]
    shared = folder if own["docstrings"]["ask"] else folder.parent
    kept_out = dict.fromkeys((*own["seeds"]["benchmarks"], *filter(None, [c["benchmark"]["path"]])))
    return own | {"run": str(folder), "start": settings["model"], "seed": c["seed"], "stages": "all",
                  "mesh": c["sampling_mesh"],
                  "seeds": own["seeds"] | {"run": own["seeds"]["run"] or str(shared / "seeds"),
                                           "benchmarks": [*kept_out]},
                  "response": own["response"] | {"prompt": settings["prompt"]},
                  "asking": own["asking"] | {"chat": settings["chat"]}, "pairs": own["pairs"] | {"rules": rules(c)}}


def synth_pairs(c: Mapping, folder: Path, start: str, settings: Mapping, book: Path) -> None:
    """The start model invents tasks, answers them with tests of its own, and its programs run."""
    pipeline.make(factory(c, folder, settings), book=book, label=f"{start}: ")


def problem_pairs(c: Mapping, folder: Path, start: str, settings: Mapping, book: Path) -> None:
    """The start model answers problems that have tests, and its programs run."""
    own, chat = c["pairs"]["problems"], settings["chat"]
    problems = records.read(own["path"], Problem)[:own["count"]]
    by_id = {problem.task_id: problem for problem in problems}

    def sample() -> dict:
        # A base model has to be stopped; a chat model ends its answer, and the pair should show it.
        stops = [] if chat else evalplus.stops("humaneval", chat=False)
        return respond(c, folder / "samples.jsonl", settings["model"], problems, chat, stops=stops, **own["sampling"])

    def execute() -> dict:
        samples = records.read(folder / "samples.jsonl", Sample)
        judged = verify.verify(folder / "judged.jsonl", samples, by_id, **c["sandbox"])
        return {"in": len(samples), "out": len(judged), "dropped": {},
                "verdicts": dict(Counter(j.status for j in judged).most_common())}

    def pair(rule: str) -> dict:
        judged = records.read(folder / "judged.jsonl", records.Judged)
        return pairs.make(folder / f"pairs-{rule}" / "pairs.jsonl", judged, rule=rule, seed=c["seed"])

    log.once(book, f"{start}: sample", sample)
    log.once(book, f"{start}: execute", execute)
    for rule in rules(c):
        log.once(book, f"{start}: pairs, {rule}", lambda rule=rule: pair(rule))


SOURCES = {"synth": synth_pairs, "problems": problem_pairs}  # of pairs


def train_once(c: Mapping, folder: Path, stage: str, start: Path, book: Path) -> Path:
    """Train one stage from `start`; return its checkpoint."""
    settings = dict(c["train"][stage])
    path = folder / f"pairs-{settings.pop('rule')}" / "pairs.jsonl"
    recipe = settings | {"run": str(folder / stage), "start": str(start), "seed": c["seed"], "mesh": c["mesh"]}
    recipe["data"] = settings["data"] | {"path": str(path)}

    def work() -> dict:
        train(recipe)
        last, data = log.read_metrics(folder / stage)[-1], json.loads((folder / stage / "data.json").read_text())
        return {"in": len(records.read(path, Pair)), "out": data["examples"], "dropped": data["dropped"],
                "steps": last["step"], "tokens": int(last["num_tokens"])}

    log.once(book, f"{folder.name}: {stage}", work)
    return folder / stage / "hf"


def answer(c: Mapping, path: Path, model: Path, chat: bool, book: Path) -> None:
    """One model answers the benchmark, by greedy decoding."""
    def work() -> dict:
        problems = evalplus.problems(c["benchmark"]["name"], c["benchmark"]["path"])
        return respond(c, path, model, problems, chat, stops=evalplus.stops(c["benchmark"]["name"], chat=chat),
                       n=1, temperature=0.0, **c["benchmark"]["sampling"])

    log.once(book, f"answer {path.stem}", work)


def respond(c: Mapping, path: Path, model: Path, problems: Sequence[Problem], chat: bool, *, batch_size: int,
            **settings) -> dict:
    """A model answers problems into `path`; return the counts for the book."""
    with jax.set_mesh(mesh.make(**c["sampling_mesh"])):
        samples = to_file(path, engine.make("local", model, dtype=c["sampling_dtype"], batch_size=batch_size),
                          {p.task_id: evalplus.prompt(p, chat=chat) for p in problems}, seed=c["seed"], **settings)
    return {"in": len(problems), "out": len({s.task_id for s in samples}), "dropped": {}, "samples": len(samples),
            "kept, but cut at the length limit": sum(s.finish == "length" for s in samples)}


def score(c: Mapping, folder: Path, models: Mapping) -> dict:
    """Score the answers of all models in one EvalPlus run."""
    name, path = c["benchmark"]["name"], c["benchmark"]["path"]
    problems, programs, lost = evalplus.problems(name, path), {}, Counter()
    for start, stage in models:
        samples = records.read(folder / "answers" / f"{start}-{stage}.jsonl", Sample)
        programs[f"{start}-{stage}"], gone = evalplus.solutions(problems, samples, chat=c["starts"][start]["chat"])
        lost += gone
    records.write(folder / "programs.jsonl", ({"run": run, "programs": p} for run, p in programs.items()))
    out = (folder / "evalplus").resolve()
    out.mkdir(exist_ok=True)
    wrap = sandbox.prefix(c["sandbox"]["backend"], reads=[Path(path).resolve()], writes=out)
    scores = evalplus.score(programs, name, out, path=path, wrap=wrap, **c["evalplus"])
    records.write(folder / "scores.jsonl", scores)
    return {"in": sum(map(len, programs.values())), "out": len(scores), "dropped": {},
            "the sanitizer's losses (scored as failures)": dict(lost)}


def write_report(c: Mapping, folder: Path, models: Mapping) -> Path:
    """Write table.md, table.csv and report.html; print the table."""
    base, plus = defaultdict(dict), defaultdict(dict)
    for s in records.read(folder / "scores.jsonl", Score):
        base[s.run].setdefault(s.task_id, []).append(s.base == "pass")
        plus[s.run].setdefault(s.task_id, []).append(s.base == s.plus == "pass")
    runs = [tables.Run(name=f"{start}-{stage}", model=c["model"], start=start, stage=stage, objective="functional",
                       benchmark=c["benchmark"]["name"], outcomes=plus[f"{start}-{stage}"],
                       base_outcomes=base[f"{start}-{stage}"], metadata={"seed": c["seed"]}) for start, stage in models]
    rows = tables.rows(runs)
    (folder / "table.md").write_text(tables.to_markdown(rows) + "\n")
    (folder / "table.csv").write_text(tables.to_csv(rows))
    curves = {f"{start}-{stage}": [(m["step"], m["loss"], m.get("rewards/margins"), m.get("rewards/accuracies"))
                                   for m in log.read_metrics(folder / start / stage)]
              for start, stage in models if stage != "base"}
    stages = [{"stage": name} | did for name, did in json.loads((folder / "stages.json").read_text()).items()]
    families = {p["task_id"]: p["family"] for p in records.rows(c["benchmark"]["path"]) if "family" in p}
    code = {row["run"]: row["programs"] for row in records.rows(folder / "programs.jsonl")}
    page.write(folder / "report.html", runs, [], families=families, curves=curves, code=code, stages=stages,
               details={"Config": c, "Versions": log.versions()})
    log.say(tables.to_text(rows))
    log.say(tables.headline(rows))
    return folder / "report.html"


def main(c: Mapping) -> None:
    mesh.start_hosts()
    study(c)


if __name__ == "__main__":
    log.command(main)
