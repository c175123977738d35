"""The factory, from seeds to pairs: every stage reads its left neighbours' files, and is done once.

    python -m align_jax.synth.pipeline --config=configs/synth.py --config.run=FOLDER --config.start=CHECKPOINT

    seeds -> concepts -> tasks -> responses -> verdicts [-> drafts -> rewrites -> rewritten] [-> scores] -> pairs

A stage has a folder in the run folder, bound to its settings and to the content of what it reads: with other ones it is
refused there, and after a kill it goes on. FOLDER/pairs-RULE/pairs.jsonl is what training takes; FOLDER/stages.json
says of every stage what came in, went out and was dropped, by reason.
"""

import dataclasses
import functools
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax

from align_jax import engine as engines
from align_jax import hf, log, mesh, records, sandbox, text
from align_jax.engine import Engine
from align_jax.records import Judged
from align_jax.score import static
from align_jax.synth import decontaminate, dimensions, instruct, pairs, respond, scores, seeds, stream, verify
from align_jax.synth.write import Asking

FREE = ("asking.shard", "asking.unanswered", "sandbox.workers", "sandbox.runner", "sandbox.chunk")  # change no record

ASKED = ("docstrings", "concepts", "instruction", "response", "rewrite")  # sections on what a model is asked


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's config, what names its model, and the engine, which is loaded when a stage first asks for it."""

    c: Mapping
    model: Mapping
    engine: Callable[[], Engine]

    def asking(self, section: str) -> Asking:
        """How the model is asked in the stage of a section."""
        own = {key: self.c[section][key] for key in ("shots", "n", "temperature", "top_p", "max_tokens")}
        return Asking(**self.c["asking"], **own, seed=self.c["seed"])


def make(c: Mapping, *, book: Path | None = None, label: str = "") -> None:
    """Run the stages that a config names, and count them in the book under their names behind the label.

    Raises:
      ValueError: settings that cannot work, all of them, before anything is done.
    """
    check(c)
    kind, folder = c["engine"]["kind"], Path(c["run"])
    book, todo = book or folder / "stages.json", wanted(c)
    settings, benchmarks = c["engine"][kind], decontaminate.find_files(c["seeds"]["benchmarks"])
    run = Run(c, engines.identity(kind, c["start"], **settings),
              functools.cache(lambda: engines.make(kind, c["start"], **settings)))
    known = c | {"model": run.model, "benchmarks": {str(path): records.fingerprint(path) for path in benchmarks},
                 "judge": _identity(c["judge"]), "by": c["pairs"]["by"],
                 "pairs": {key: value for key, value in c["pairs"].items() if key != "rules"}}
    log.say(f"{folder}: benchmarks compared with: {decontaminate.told(c['seeds']['benchmarks'])}")
    with jax.set_mesh(mesh.make(**c["mesh"])):
        for number, (name, reads) in enumerate(todo.items(), 1):
            work, sections = STAGES[name.split("-")[0]]
            out, sources = file(c, name), [file(c, read) for read in reads]
            _check_inputs(name, sources, book)
            inputs = {read: records.fingerprint(source) for read, source in zip(reads, sources, strict=True)}
            if name == "seeds":
                seeds.claim(*_seeding(run, out))
            else:
                log.claim(folder / name, {key: known[key] for key in sections} | {"reads": inputs}, free=FREE)
            if jax.process_index() == 0 or work in SHARED:
                log.say(f"{label}{name}, stage {number} of {len(todo)}")
                log.once(book, label + name, functools.partial(work, run, out, *sources))
            mesh.wait_for_hosts(name)


def file(c: Mapping, name: str) -> Path:
    """The records of a stage; several runs may share their seeds."""
    folder = Path(c["run"]) / name
    return Path(c["seeds"]["run"] or folder if name == "seeds" else folder) / f"{name.split('-')[0]}.jsonl"


def plan(c: Mapping) -> dict[str, tuple[str, ...]]:
    """The stages that lead to a config's pairs, in order, and what each reads."""
    two_passes, is_scored = bool(c["rewrite"]["dimensions"]), c["pairs"]["by"] != "reward"
    stages = {"seeds": (), "concepts": ("seeds",), "tasks": ("concepts",), "responses": ("tasks",),
              "verdicts": ("responses",)}
    if two_passes:
        stages |= {"drafts": ("responses", "verdicts"), "rewrites": ("drafts",), "rewritten": ("drafts", "rewrites")}
    if is_scored:
        stages |= {"scores": ([*stages][-1],)}
    return stages | dict.fromkeys((f"pairs-{rule}" for rule in c["pairs"]["rules"]), ([*stages][-1],))


def wanted(c: Mapping) -> dict[str, tuple[str, ...]]:
    """The stages of the plan that a config names."""
    names = None if c["stages"] == "all" else c["stages"].split(",")
    return {name: reads for name, reads in plan(c).items() if names is None or name in names}


def check(c: Mapping) -> None:
    """Refuse at the start what would fail at the end."""
    names = () if c["stages"] == "all" else c["stages"].split(",")
    wrong = [f"stages: got {name!r}, available are {[*plan(c)]}" for name in names if name not in plan(c)]
    tries = [lambda: respond.check(c["response"]["prompt"]), lambda: sandbox.backend(c["sandbox"]["backend"]),
             *(functools.partial(stream.ordered_by, c[name]["runner"]) for name in ("seeds", "sandbox")),
             *(functools.partial(pair_settings, c, rule) for rule in c["pairs"]["rules"]),
             *(functools.partial(Run(c, {}, None).asking, name) for name in ASKED),
             lambda: dimensions.check(*c["dimensions"], *c["rewrite"]["dimensions"], *_scored(c)),
             lambda: _check_start(c)]
    for attempt in tries:
        try:
            attempt()
        except ValueError as error:
            wrong.append(str(error))
    if c["pairs"]["by"] == "dimension" and not _dealt(c):
        wrong.append("pairs.by: got 'dimension', but neither dimensions nor rewrite.dimensions names one")
    if jax.process_count() > 1 and (c["docstrings"]["ask"] or c["judge"]["kind"] == "engine"):
        wrong.append("docstrings.ask, judge.kind: a model judges on one host only")
    if c["judge"]["kind"] == "engine" and not c["judge"]["start"]:
        wrong.append("judge.start: expected the name or the folder of the model that judges")
    if c["judge"]["second"]["start"] and c["judge"]["kind"] != "engine":
        wrong.append("judge.second: a second judge is compared with a first one of kind 'engine'")
    if c["judge"]["second"]["start"] and c["pairs"]["by"] == "reward":
        wrong.append("judge.second: nothing is judged where pairs.by is 'reward'")
    if c["judge"]["start"] and c["judge"]["second"]["start"] == c["judge"]["start"]:
        wrong.append("judge.second.start: expected another model than judge.start")
    if c["judge"]["kind"] not in JUDGES:
        wrong.append(f"judge.kind: got {c['judge']['kind']!r}, available are {[*JUDGES]}")
    if wrong:
        raise ValueError("; ".join(wrong))


def pair_settings(c: Mapping, rule: str) -> dict:
    """How pairs of a rule are made; of rewrites, a task has as many as its draft passed for."""
    settings = {key: value for key, value in c["pairs"].items() if key not in ("rules", "balance")}
    if settings["margin"] is None:
        settings["margin"] = _margin(c)
    settings |= {"rule": rule, "seed": c["seed"], "n": 0 if c["rewrite"]["dimensions"] else c["response"]["n"]}
    pairs.Settings(**settings)
    return settings


def _margin(c: Mapping) -> float | Mapping[str, float]:
    """By how much chosen is better by default: a scorer's own margins, or a point of a judge's ten."""
    by, is_static = c["pairs"]["by"], c["judge"]["kind"] == "static"
    if by == "reward":
        return 0.0
    return (static.MARGINS if by == "dimension" else static.MARGINS.get(by, 0.0)) if is_static else 1.0


def _check_inputs(name: str, sources: list[Path], book: Path) -> None:
    for source in sources:
        if not source.is_file():
            raise ValueError(f"stage {name!r} reads {source}, which is not there; run the stage before it")
        if not source.stat().st_size:
            raise ValueError(f"stage {name!r} reads {source}, which has no records; {book} says why they were dropped")


def _check_start(c: Mapping) -> None:
    if c["engine"]["kind"] == "local":
        hf.config(c["start"])
        if c["asking"]["chat"] and text.load(c["start"]).chat_template is None:
            raise ValueError(f"asking.chat: {c['start']} has no chat template")


# --- the work of the stages: (run, file to write, files to read) -> counts


def _seeds(run: Run, out: Path) -> dict:
    c, judged_by = _seeding(run, out)
    judge = instruct.docstring_judge(run.engine(), run.asking("docstrings")) if judged_by else None
    return seeds.main(c, judge=judge, judged_by=judged_by)


def _seeding(run: Run, out: Path) -> tuple[dict, dict | None]:
    """The config of the seeds, which share their folder's rules with `seeds` run alone, and who judges docstrings."""
    judged_by = {"model": run.model, "docstrings": run.c["docstrings"],
                 "asking": {key: run.c["asking"][key] for key in ("chat", "brief")}}
    return run.c["seeds"] | {"run": str(out.parent)}, judged_by if run.c["docstrings"]["ask"] else None


def _concepts(run: Run, out: Path, seeds: Path) -> dict:
    return instruct.concepts(out, seeds, run.engine(), run.asking("concepts"), count=run.c["concepts"]["count"])


def _tasks(run: Run, out: Path, concepts: Path) -> dict:
    own = {key: run.c["instruction"][key] for key in ("categories", "words", "near_duplicate")}
    return instruct.tasks(out, concepts, run.engine(), run.asking("instruction"), **own,
                          benchmarks=run.c["seeds"]["benchmarks"], embed=_embed(run.c))


def _responses(run: Run, out: Path, tasks: Path) -> dict:
    return respond.respond(out, tasks, run.engine(), run.asking("response"), prompt=run.c["response"]["prompt"],
                           names=run.c["dimensions"])


def _verdicts(run: Run, out: Path, responses: Path) -> dict:
    return verify.execute(out, stream.rows(responses), total=stream.count(responses), **run.c["sandbox"])


def _drafts(run: Run, out: Path, responses: Path, verdicts: Path) -> dict:
    return respond.drafts(out, responses, verdicts, names=run.c["rewrite"]["dimensions"], seed=run.c["seed"])


def _rewrites(run: Run, out: Path, drafts: Path) -> dict:
    return respond.rewrite(out, drafts, run.engine(), run.asking("rewrite"))


def _rewritten(run: Run, out: Path, drafts: Path, rewrites: Path) -> dict:
    return verify.execute(out, respond.side_by_side(drafts, rewrites), **run.c["sandbox"])


def _scores(run: Run, out: Path, judged: Path) -> dict:
    how = run.c["judge"]
    run.engine.cache_clear()  # nobody is going to ask the model again: room for one that judges
    where = {"chunk": 2000}  # a model is asked from this process, about many at once
    if how["kind"] == "static":
        where = {key: run.c["sandbox"][key] for key in ("runner", "workers")}
    counts = scores.score(out, stream.rows(judged), judge=JUDGES[how["kind"]](how), dimensions=_scored(run.c),
                          total=stream.count(judged), **where)
    if how["second"]["start"]:
        judges = {how["start"]: _rater(how), how["second"]["start"]: _rater(how["second"])}
        counts |= scores.compare(out.with_name("judges.json"), stream.rows(judged), judges, seed=run.c["seed"],
                                 count=how["second"]["count"], dimensions=_scored(run.c))
    return counts


def _pairs(run: Run, out: Path, judged: Path) -> dict:
    """Make pairs, drop those that share with a benchmark, and keep as many of each dimension."""
    made_by_rule, how = out.with_name("by_rule.jsonl"), run.c["seeds"]
    settings = pair_settings(run.c, out.parent.name.removeprefix("pairs-"))
    made = pairs.make(made_by_rule, _judged(judged), **settings)
    clean = decontaminate.clean(out.parent, made_by_rule, fields=("prompt", "chosen", "rejected"),
                                benchmarks=how["benchmarks"], runner=how["runner"],
                                workers=min(how["workers"], 1 + made["out"] // 1000), embed=_embed(run.c))
    names = _dealt(run.c) if run.c["pairs"]["balance"] else ()
    even = pairs.balance(out, out.with_name("clean.jsonl"), seed=run.c["seed"], names=names)
    dropped = Counter(made["dropped"]) + clean.get("dropped", Counter()) + Counter(even["dropped"])
    if missing := even.get("NO PAIR OF"):
        log.say(f"no pair of {', '.join(missing)}: more tasks, or a model as judge (judge.kind), may give some")
    return made | even | {"in": made["in"], "dropped": dict(dropped.most_common())} | pairs.describe(out)


def _embed(c: Mapping) -> decontaminate.Embed | None:
    return pkgutil.resolve_name(c["embed"]) if c["embed"] else None


def _judged(path: Path) -> Iterator[Judged]:
    return (Judged(**row) for row in stream.rows(path))


def _dealt(c: Mapping) -> tuple[str, ...]:
    """The dimensions that the pairs are of."""
    return tuple(c["rewrite"]["dimensions"] or c["dimensions"])


def _scored(c: Mapping) -> tuple[str, ...]:
    """The dimension that every response is scored on; none if each is scored on its own."""
    return () if c["pairs"]["by"] in ("reward", "dimension") else (c["pairs"]["by"],)


def _identity(how: Mapping) -> dict:
    """What names a judge."""
    kind = how["engine"]["kind"]
    return {"kind": how["kind"]} | (engines.identity(kind, how["start"], **how["engine"][kind])
                                    if how["kind"] == "engine" else {})


def _rater(how: Mapping) -> Callable:
    kind = how["engine"]["kind"]
    return dimensions.rater(engines.make(kind, how["start"], **how["engine"][kind]))


JUDGES = {"static": lambda how: static.judge, "engine": _rater}

SHARED = (_concepts, _tasks, _responses, _verdicts, _rewrites, _rewritten)  # what several hosts do together

STAGES = {  # the work, and what decides what it writes
    "seeds": (_seeds, ()),
    "concepts": (_concepts, ("model", "asking", "concepts", "seed")),
    "tasks": (_tasks, ("model", "asking", "instruction", "benchmarks", "embed", "seed")),
    "responses": (_responses, ("model", "asking", "response", "dimensions", "seed")),
    "verdicts": (_verdicts, ("sandbox",)),
    "drafts": (_drafts, ("rewrite", "seed")),
    "rewrites": (_rewrites, ("model", "asking", "rewrite", "seed")),
    "rewritten": (_rewritten, ("sandbox",)),
    "scores": (_scores, ("judge", "by")),
    "pairs": (_pairs, ("pairs", "benchmarks", "embed", "seed")),
}


def main(c: Mapping) -> None:
    mesh.start_hosts()
    log.check_set(c)
    make(c)
    made = {file(c, name): stream.count(file(c, name)) for name in wanted(c) if name.startswith("pairs")}
    if empty := [str(path) for path, count in made.items() if not count]:
        raise ValueError(f"no pairs in {', '.join(empty)}; stages.json says why")
    log.say(f"{c['run']} has {', '.join(wanted(c))}; stages.json counts what each one dropped, by reason; to train on: "
            + (", ".join(f"{path} ({count:,} pairs)" for path, count in made.items()) or "no pairs yet"))


if __name__ == "__main__":
    log.command(main)
