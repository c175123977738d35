"""The whole grid in miniature: killed in every stage, refused with a reason, and untrusted code behind a wall."""

import importlib.util
import inspect
import json
import shutil
import socket
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from align_jax import decode, hf, log, mesh, records, sandbox, study, train
from align_jax.records import Pair, Problem, Sample, Score
from align_jax.report import tables
from align_jax.score import evalplus
from align_jax.step import Compute, objective
from align_jax.synth import pipeline

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "golden" / "tiny"
BACKENDS = []
for name in ("bwrap", "userns"):
    try:
        BACKENDS.append(sandbox.backend(name))
    except RuntimeError:
        continue
STOP, DIGIT, LETTER = 2, 25, 90  # tiny's ids of EOS, "7" and "x"


def quickstart(arg: str = ""):
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Keep what is compiled: the second study runs the programs of the first."""
    wanted = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
              "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Tiny, with a chat template, and made to write a few of "7" and "x", then to stop."""
    folder = shutil.copytree(TINY, tmp_path_factory.mktemp("model") / "tiny")
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 10.0  # a constant in the stream, so the head has a bias
    weights["lm_head.weight"][:, 0] = -2.0
    weights["lm_head.weight"][[STOP, DIGIT, LETTER], 0] = [2.0, 2.1, 2.0]
    safetensors.numpy.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}</s>")
    return folder


def preference(number: int) -> Problem:
    """Any expression passes, any name fails, for a base model and in a chat."""
    return Problem(task_id=f"Pref/{number}", prompt=f'"""Write abs, {number}."""\n', entry_point="abs",
                   canonical_solution="0\n", base_input=[], plus_input=[],
                   test="def check(candidate):\n    assert candidate(-3) == 3\n    assert candidate(4) == 4\n")


def task(number: int) -> Problem:
    """The prompt of an even one already has the answer, so what a base model adds to it passes."""
    body = "    return a + b\n" if number % 2 == 0 else ""
    return Problem(task_id=f"Four/{number}", entry_point="add", canonical_solution="    return a + b\n",
                   prompt=f'def add(a, b):\n    """Add, {number}."""\n{body}', base_input=[[1, 2]],
                   plus_input=[[3, 4], [-5, 6]])


@pytest.fixture(scope="module")
def config(checkpoint, tmp_path_factory):
    """The smoke quickstart on the miniature."""
    folder = tmp_path_factory.mktemp("inputs")
    records.write(folder / "pref.jsonl", map(preference, range(6)))
    records.write(folder / "four.jsonl", map(task, range(4)))

    def make(run: Path, **changes) -> dict:
        c = quickstart("smoke")
        c.update_from_flattened_dict({
            "run": str(run), "starts.pretrained.model": str(checkpoint), "starts.instruct.model": str(checkpoint),
            "pairs.source": "problems", "pairs.problems.path": str(folder / "pref.jsonl"),
            "pairs.problems.count": 6, "pairs.problems.sampling.max_tokens": 8,
            "benchmark.path": str(folder / "four.jsonl"), "benchmark.name": "Four",
            "benchmark.sampling.max_tokens": 8, "sandbox.wall_s": 20.0, "sandbox.cpu_s": 20.0,
            "evalplus.min_time_limit": 5.0})
        for recipe in c.train.values():
            recipe.data.update({"row_length": 512, "rows_per_batch": 8, "epochs": 1})  # eight devices
            recipe.ckpt.export = "float32"
        c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        return c

    return make


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    assert study.study(config(run)) == run / "report.html"
    return run


def stages(run: Path) -> dict:
    return {name: {key: value for key, value in did.items() if key != "seconds"}
            for name, did in json.loads((run / "stages.json").read_text()).items()}


# --- the grid -------------------------------------------------------------------------------------

STARTS, TECHNIQUES = ("pretrained", "instruct"), ("sft", "dpo", "bonbon")
MODELS = [f"{start}-{stage}" for start in STARTS for stage in ("base", *TECHNIQUES)]


def test_every_stage_is_in_the_book_and_adds_up(unbroken):
    book = stages(unbroken)
    assert list(book) == [
        *(f"{start}: {what}" for start in STARTS
          for what in ("sample", "execute", "pairs, best_worst", "pairs, pass_fail", *TECHNIQUES)),
        *(f"answer {model}" for model in MODELS), "EvalPlus"]
    for start in STARTS:
        assert [book[f"{start}: sample"][key] for key in ("in", "out", "samples")] == [6, 6, 6 * 8]
        executed = book[f"{start}: execute"]
        assert executed["in"] == executed["out"] == sum(executed["verdicts"].values()) == 48
        for rule in ("pass_fail", "best_worst"):
            made = book[f"{start}: pairs, {rule}"]
            assert made["in"] == 6 == made["out"] + sum(made["dropped"].values())
            assert made["out"] == len(records.read(unbroken / start / f"pairs-{rule}" / "pairs.jsonl", Pair)) > 0
        for stage in TECHNIQUES:
            did = book[f"{start}: {stage}"]
            assert did["in"] == did["out"] + sum(did["dropped"].values())
            assert did["steps"] == len(log.read_metrics(unbroken / start / stage)) > 0
    assert all(book[f"answer {model}"]["in"] == book[f"answer {model}"]["out"] == 4 for model in MODELS)
    assert book["EvalPlus"]["in"] == book["EvalPlus"]["out"] == 4 * len(MODELS)


def test_each_model_starts_where_it_should(unbroken, checkpoint):
    for start in STARTS:
        came = {stage: json.loads((unbroken / start / stage / "config.json").read_text()) for stage in TECHNIQUES}
        assert came["sft"]["start"] == str(checkpoint)
        assert came["dpo"]["start"] == came["bonbon"]["start"] == str(unbroken / start / "sft" / "hf")
        assert [Path(c["data"]["path"]).parent.name for c in came.values()] == [
            "pairs-pass_fail", "pairs-pass_fail", "pairs-best_worst"]
        heads = [safetensors.numpy.load_file(folder / "model.safetensors")["lm_head.weight"] for folder in
                 (checkpoint, *(unbroken / start / stage / "hf" for stage in came))]
        assert not any(np.array_equal(a, b) for i, a in enumerate(heads) for b in heads[:i])


def test_the_answers_of_a_chat_begin_in_a_code_block_and_those_of_a_base_model_do_not(unbroken):
    for start, kind in (("pretrained", str), ("instruct", list)):
        for path in (unbroken / start / "samples.jsonl", unbroken / "answers" / f"{start}-dpo.jsonl"):
            prompts = [s.prompt for s in records.read(path, Sample)]
            assert all(isinstance(prompt, kind) for prompt in prompts)
    assert prompts[0][-1]["content"].endswith("```python\n")


def test_scores_are_those_of_evalplus_and_are_all_reported(unbroken):
    found = {}
    for s in records.read(unbroken / "scores.jsonl", Score):
        found.setdefault(s.run, []).append((s.base, s.plus))
    passed, failed = ("pass", "pass"), ("fail", "fail")
    assert found == {model: [passed, failed] * 2 if model.startswith("pretrained") else [failed] * 4
                     for model in MODELS}
    report, table = (unbroken / "report.html").read_text(), (unbroken / "table.md").read_text()
    assert all(model in report for model in MODELS)
    assert table.count("Four") == len(MODELS) == len((unbroken / "table.csv").read_text().splitlines()) - 1
    assert json.loads((unbroken / "evalplus" / "evalplus.json").read_text())["wrap"], "no sandbox"


# --- killed and continued -------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_killed_in_every_stage_it_ends_as_if_never_killed(config, unbroken, tmp_path, monkeypatch):
    """Each stage is killed once, with its work done and not yet written down."""
    killed, once = [], log.once

    def once_and_die(book: Path, name: str, work) -> None:
        if name not in killed and not (book.is_file() and name in json.loads(book.read_text())):
            killed.append(name)
            work()
            raise Killed
        once(book, name, work)

    monkeypatch.setattr(log, "once", once_and_die)
    while len(killed) < len(stages(unbroken)):
        with pytest.raises(Killed):
            study.study(config(tmp_path / "run"))
    study.study(config(tmp_path / "run"))
    assert killed == list(stages(unbroken))
    assert stages(tmp_path / "run") == stages(unbroken)
    for name in ("scores.jsonl", "programs.jsonl", "table.md", "table.csv", "pretrained/pairs-pass_fail/pairs.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (unbroken / name).read_bytes(), name


def test_a_finished_study_only_writes_its_report_again(config, unbroken, monkeypatch):
    monkeypatch.setattr(study.engine, "make", None)
    monkeypatch.setattr(study, "train", None)
    monkeypatch.setattr(evalplus, "score", None)
    before = (unbroken / "report.html").read_text()
    study.study(config(unbroken))
    assert (unbroken / "report.html").read_text() == before
    # What changes no number may change.
    study.study(config(unbroken, mesh__data=2, mesh__fsdp=4, evalplus__parallel=1))


# --- refused --------------------------------------------------------------------------------------


def test_what_would_fail_at_the_end_is_refused_at_the_start(config, checkpoint, tmp_path):
    c = config(tmp_path / "run", pairs__problems__sampling__n=4, techniques=("dpo", "ipo")).to_dict()
    c["starts"] = {"instruct": {"model": str(TINY), "chat": True}, "distilled": {"model": str(TINY), "chat": False}}
    del c["train"]["sft"]
    with pytest.raises(ValueError) as refused:
        study.study(c)
    for problem in ("starts.distilled: expected pretrained or instruct", "techniques: got 'ipo'", "got 'sft'",
                    "train.bonbon.objective.n: got 8, but best and worst are of 4 samples",
                    f"starts.instruct.chat: {TINY} has no chat template"):
        assert problem in str(refused.value)
    with pytest.raises(ValueError, match="nowhere.config.json: not there"):
        study.study(config(tmp_path / "run", starts__instruct__model=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()


def test_what_the_factory_would_refuse_is_refused_before_any_start_is_sampled(config, tmp_path):
    with pytest.raises(ValueError) as refused:
        study.study(config(tmp_path / "run", pairs__source="synth", starts__instruct__prompt="Solve it.",
                           pairs__synth__dimensions=("beauty",), pairs__synth__response__n=4))
    for problem in ("pairs.synth: ", "dimension: got ['beauty']", "response.prompt: got 'Solve it.'",
                    "best and worst are of 4 samples, pairs.synth"):
        assert problem in str(refused.value)
    with pytest.raises(ValueError, match=r"pairs.source: got 'web', available are \['problems', 'synth'\]"):
        study.study(config(tmp_path / "run", pairs__source="web"))
    assert not (tmp_path / "run").exists()


def test_every_start_gets_the_pairs_that_its_recipes_want_from_a_factory_of_its_own(config, tmp_path):
    c = config(tmp_path / "run", pairs__source="synth").to_dict()
    for start, settings in c["starts"].items():
        own = study.factory(c, tmp_path / "run" / start, settings)
        assert pipeline.file(own, "seeds") == tmp_path / "run" / "seeds" / "seeds.jsonl"
        assert own["asking"]["chat"] == (start == "instruct") and own["start"] == settings["model"]
        for recipe in c["train"].values():
            wanted = tmp_path / "run" / start / f"pairs-{recipe['rule']}" / "pairs.jsonl"
            assert pipeline.file(own, f"pairs-{recipe['rule']}") == wanted
            assert f"pairs-{recipe['rule']}" in pipeline.wanted(own)
        assert c["benchmark"]["path"] in own["seeds"]["benchmarks"]
    c["pairs"]["synth"]["docstrings"]["ask"] = True  # then they are not the same seeds
    assert pipeline.file(study.factory(c, tmp_path / "a", settings), "seeds").parent == tmp_path / "a" / "seeds"


def test_without_a_sandbox_nothing_begins(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        sandbox._probe.cache_clear()
        patch.setattr(sandbox.shutil, "which", lambda name: None)
        with pytest.raises(RuntimeError, match="untrusted code will not be run"):
            study.study(config(tmp_path / "run"))
    sandbox._probe.cache_clear()
    assert not (tmp_path / "run").exists()


def test_another_recipe_problem_or_weight_under_the_same_name_is_another_study(config, unbroken, tmp_path):
    with pytest.raises(ValueError, match=r"another config.*\n  seed: this run 1, in the folder 0"):
        study.study(config(unbroken, seed=1))
    c = config(unbroken)
    for path in map(Path, (c.pairs.problems.path, c.benchmark.path, c.starts.instruct.model + "/model.safetensors")):
        was = path.read_bytes()
        path.write_bytes(was[:-2] + b" " + was[-2:] if path.suffix == ".jsonl" else was[:-1] + bytes([was[-1] ^ 1]))
        try:
            with pytest.raises(ValueError, match="another config.*\n  inputs"):
                study.study(c)
        finally:
            path.write_bytes(was)


# --- behind the wall ------------------------------------------------------------------------------

HOSTILE = {
    "read": "import io\n    assert io.open({secret!r}).read() == 'secret'",
    "write": "import io\n    io.open({target!r}, 'w').write('here')",
    "connect": "import socket\n    socket.create_connection(('127.0.0.1', {port}), 2)",
}
ESCAPES = {"none": {"read", "write", "connect"}, "userns": {"read"}, "bwrap": set()}


@pytest.mark.parametrize("backend", ["none", *BACKENDS])
def test_a_hostile_answer_reaches_nothing_from_evalplus(backend, tmp_path):
    """It is right only if it gets out; with no wall it does, so that the test tests something."""
    records.write(tmp_path / "four.jsonl", [task(0)])
    (tmp_path / "secret").write_text("secret")
    out, target = tmp_path / "out", tmp_path / "written"
    out.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"secret": str(tmp_path / "secret"), "target": str(target), "port": server.getsockname()[1]}
        bodies = {name: code.format(**names) for name, code in HOSTILE.items()} | {"honest": "pass"}
        programs = {name: {"Four/0": [f"def add(a, b):\n    {code}\n    return a + b\n"]}
                    for name, code in bodies.items()}
        wrap = sandbox.prefix(backend, reads=[tmp_path / "four.jsonl"], writes=out)
        scores = evalplus.score(programs, "Four", out, path=tmp_path / "four.jsonl", wrap=wrap, min_time_limit=5.0)
    passed = {s.run for s in scores if s.plus == "pass"} - {"write"}  # it may write to a /tmp that nobody else sees
    assert passed | ({"write"} if target.exists() else set()) == ESCAPES[backend] | {"honest"}


# --- the config -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arg", ["", "smoke"])
def test_the_quickstart_config_fits_the_functions_that_take_it(arg):
    c = quickstart(arg).to_dict()
    assert set(c["starts"]) <= tables.STARTS.keys() and {"sft", *c["techniques"]} <= tables.STAGES.keys()
    fits(sandbox.Limits, **{key: value for key, value in c["sandbox"].items() if key != "backend"})
    fits(decode.sample, None, None, stops=(), seed=0, **c["pairs"]["problems"]["sampling"])
    fits(decode.sample, None, None, n=1, temperature=0.0, stops=(), seed=0, **c["benchmark"]["sampling"])
    fits(evalplus.score, {}, "", "", path="", wrap=(), **c["evalplus"])
    fits(mesh.make, **c["mesh"])
    fits(mesh.make, **c["sampling_mesh"])
    fits(hf.load, "", dtype=c["sampling_dtype"])
    for stage, recipe in c["train"].items():
        assert set(recipe) == {"rule", "steps", "data", "objective", "optim", "lora", "compute", "ckpt"}, stage
        assert recipe["rule"] in study.pairs.RULES and Compute(**recipe["compute"])
        wanted = train.KINDS[recipe["data"]["kind"]][0]
        assert wanted is Pair and objective(**recipe["objective"])
    assert Path(c["pairs"]["problems"]["path"]).is_file() and Path(c["benchmark"]["path"]).is_file()
    assert quickstart("").run != quickstart("smoke").run


def fits(function, *args, **kwargs) -> None:
    inspect.signature(function).bind(*args, **kwargs)
