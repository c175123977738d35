"""Whole runs: killed and continued to the same bits, checked against their reference, and refused with a reason."""

import dataclasses
import importlib.util
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import QUICK

from align_jax import checkpoint, data, decode, engine, hf, log, mesh, optim, records, text, train
from align_jax.step import Compute, make_scorer, objective

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = GOLDEN / "tiny"
TRL = json.loads((GOLDEN / "trl.json").read_text())["runs"]["dpo"]["steps"]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
TRAINING = ("sft", "dpo", "bonbon")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # smoke configs name the golden files from here


def get_config(name: str, arg: str = ""):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    c = module.get_config(arg)
    c.lock()
    return c


def smoke(name: str, run: Path, **changes):
    """A smoke config on the eight devices of the tests; `optim__lr` is optim.lr."""
    c = get_config(name, "smoke")
    c.update_from_flattened_dict({"run": str(run), "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2})
    c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return c


# --- killed and continued -------------------------------------------------------------------------

STEPS = 24
SETTINGS = [f"--config.steps={STEPS}", "--config.ckpt.every=4", "--config.optim.warmup=0.2"]
KILLED = """
import os, runpy, signal
from align_jax import checkpoint, log
write = log.Metrics.write
def write_and_die(metrics, step, values):
    write(metrics, step, values)
    if step == int(os.environ["KILL_AT"]) and not os.environ["KILL_IN_SAVE"]:
        os.kill(os.getpid(), signal.SIGKILL)
log.Metrics.write = write_and_die
save = checkpoint.Checkpoints.save
def save_and_die(ckpts, step, state, place):
    save(ckpts, step, state, place)  # asynchronous: returns before the files are whole
    is_under_way = any("tmp" in path.name for path in ckpts.folder.iterdir())  # if not, it dies in the next one
    if step >= int(os.environ["KILL_AT"]) and is_under_way:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = save_and_die
runpy.run_module("align_jax.train", run_name="__main__")
"""


def command(*overrides: str, kill_at: int | None = None, in_save=False, config="dpo",
            program: str | None = None) -> subprocess.CompletedProcess:
    """The real command, on one device; kills itself when the metrics of step `kill_at` are written, or in its save."""
    program = program or (KILLED if kill_at else None)
    program = ["-c", program] if program else ["-m", "align_jax.train"]
    env = os.environ | {"XLA_FLAGS": QUICK, "KILL_AT": str(kill_at), "PYTHONPATH": str(ROOT),
                        "KILL_IN_SAVE": "yes" * in_save}
    return subprocess.run([sys.executable, *program, f"--config=configs/{config}.py:smoke", *overrides], env=env,
                          cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    done = command(f"--config.run={run}", *SETTINGS)
    assert done.returncode == 0, done.stderr
    return run, done.stdout + done.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder of a run that was killed once, at a random step."""
    run = tmp_path_factory.mktemp("runs") / "killed"
    done = command(f"--config.run={run}", *SETTINGS, kill_at=random.Random(0).randint(9, 15))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (run / "hf").exists()
    return run


def same_on_eight(run: Path):
    """The config of `unbroken`, on eight devices."""
    return smoke("dpo", run, steps=STEPS, ckpt__every=4, optim__warmup=0.2)


def metrics_of(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in log.read_metrics(run)]


@pytest.mark.timeout(300)
def test_a_run_killed_twice_has_the_bits_of_an_unbroken_one(unbroken, killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    again = command(f"--config.run={run}", *SETTINGS, kill_at=random.Random(1).randint(17, 23))
    assert again.returncode == -signal.SIGKILL, again.stderr
    assert int(re.search(r"continuing after step (\d+)", again.stdout)[1]) in (4, 8, 12)
    last = command(f"--config.run={run}", *SETTINGS)
    assert last.returncode == 0, last.stderr
    assert int(re.search(r"continuing after step (\d+)", last.stdout)[1]) in (12, 16, 20)
    assert metrics_of(run) == metrics_of(unbroken[0])
    assert [row["step"] for row in metrics_of(run)] == list(range(1, STEPS + 1))
    name = "hf/model.safetensors"
    assert (run / name).read_bytes() == (unbroken[0] / name).read_bytes()

    # And a finished run is left as it is.
    before = (run / "metrics.jsonl").read_bytes()
    done = command(f"--config.run={run}", *SETTINGS)
    assert done.returncode == 0 and "already finished" in done.stdout
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_killed_while_it_saves_continues_from_a_whole_checkpoint(unbroken, killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    again = command(f"--config.run={run}", *SETTINGS, kill_at=16, in_save=True)
    assert again.returncode == -signal.SIGKILL, again.stderr
    assert any("tmp" in path.name for path in (run / "checkpoints").iterdir())  # it was in the middle
    last = command(f"--config.run={run}", *SETTINGS)
    assert last.returncode == 0 and re.search(r"continuing after step (12|16|20)\n", last.stdout), last.stderr
    assert metrics_of(run) == metrics_of(unbroken[0])


def test_a_run_continues_on_another_mesh(unbroken, killed, tmp_path, capsys):
    run = shutil.copytree(killed, tmp_path / "run")
    train.train(same_on_eight(run))
    assert "continuing after step" in capsys.readouterr().out
    for got, expected in zip(metrics_of(run), metrics_of(unbroken[0]), strict=True):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-3)
    got, expected = (safetensors.numpy.load_file(folder / "hf" / "model.safetensors") for folder in (run, unbroken[0]))
    for name, tensor in expected.items():
        np.testing.assert_allclose(got[name], tensor, atol=1e-4, rtol=0, err_msg=name)


def test_a_run_learns_and_logs_under_trls_names(unbroken):
    run, output = unbroken
    rows = log.read_metrics(run)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(rows[0]["rewards/margins"]) < 1e-5
    assert rows[-1]["loss"] < 0.5 and rows[-1]["rewards/accuracies"] == 1.0
    names = set(TRL[0]) - {"ids", "policy", "ref", "learning_rate"}
    assert len(names) == 8
    assert all(names | {"step", "num_tokens", "tokens_per_second"} <= set(row) for row in rows)
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_a_run_shows_what_it_does_and_ends_with_what_it_wrote(unbroken):
    run, output = unbroken
    assert re.search(r"unbroken: dpo on 12 examples, 24 steps of 4 rows x 256 tokens \(\d+% filled\), dropped "
                     r"nothing; 37,024 parameters on 1 device\(s\), trained 37,024\n", output)
    assert re.search(r"unbroken:.*step/s|unbroken:.*s/step", output) and "tok/s" in output  # the bar
    assert re.search(r"unbroken: first step \d+ s after the start", output)
    assert f"wrote {run / 'hf'} (float32) after 24 steps" in output
    assert "1 compilation(s); 0 completions cut or examples dropped" in output
    assert " I1" not in output and "orbax" not in output


def test_a_run_killed_in_its_export_exports(unbroken, tmp_path):
    run = shutil.copytree(unbroken[0], tmp_path / "run")
    shutil.rmtree(run / "hf")
    done = command(f"--config.run={run}", *SETTINGS, "--config.compute.remat=none")  # which changes no number
    assert done.returncode == 0 and "continuing after step 24" in done.stdout, done.stderr
    assert "compute.remat: this run 'none', in the folder" in done.stdout
    name = "hf/model.safetensors"
    assert (run / name).read_bytes() == (unbroken[0] / name).read_bytes()


def test_what_is_exported_is_what_was_trained(unbroken):
    import torch
    import transformers

    lm = transformers.AutoModelForCausalLM.from_pretrained(unbroken[0] / "hf", dtype=torch.float32)
    with jax.set_mesh(mesh.make(1, 1, 1, devices=jax.devices()[:1])):
        cfg, params = hf.load(unbroken[0] / "hf", dtype="float32")
    assert not np.array_equal(params["head"], safetensors.numpy.load_file(TINY / "model.safetensors")["lm_head.weight"])
    np.testing.assert_array_equal(params["head"], lm.lm_head.weight.detach())


def test_only_the_newest_checkpoints_are_kept(unbroken):
    assert sorted(int(path.name) for path in (unbroken[0] / "checkpoints").iterdir()) == [20, 24]


# --- other objectives -----------------------------------------------------------------------------


def test_an_sft_run_sees_every_example_once_an_epoch(tmp_path, capsys):
    train.train(smoke("sft", tmp_path / "run", steps=0, data__epochs=3, data__row_length=80))
    examples = [records.Example(id=p.id, prompt=p.prompt, completion=p.chosen)
                for p in records.read(GOLDEN / "pairs.jsonl", records.Pair)]
    dropped = Counter()
    encoded = list(data.encode_all(enumerate(examples), text.load(TINY), dropped=dropped, max_length=80))
    rows, output = log.read_metrics(tmp_path / "run"), capsys.readouterr().out
    assert dropped == {"too long": 3} and len(encoded) == 9
    assert sum(row["examples"] for row in rows) == 3 * 9
    assert rows[-1]["num_tokens"] == 3 * sum(map(len, encoded))
    assert sum(row["scored"] for row in rows) == 3 * sum(len(e.completions[0]) for e in encoded)
    assert "dropped {'too long': 3}" in output and "3 completions cut or examples dropped" in output
    assert "1 compilation(s)" in output


def test_a_bonbon_run_logs_its_parts(tmp_path, capsys):
    train.train(smoke("bonbon", tmp_path / "run"))
    rows = log.read_metrics(tmp_path / "run")
    assert rows[0]["loss/ipo"] == pytest.approx(18.15**2, rel=1e-4)
    assert all(r["loss"] == pytest.approx(0.005 * r["loss/sft"] + 0.995 * r["loss/ipo"], rel=1e-5) for r in rows)
    assert rows[-1]["rewards/margins"] > 0
    assert "1 compilation(s)" in capsys.readouterr().out


# --- the reference --------------------------------------------------------------------------------


def test_a_reference_that_is_not_of_these_weights_stops_the_run(unbroken, tmp_path):
    run = tmp_path / "run"
    made = records.read(unbroken[0] / "reference.jsonl", records.Reference)
    wrong = [dataclasses.replace(r, logps=[r.logps[0] + 0.5, r.logps[1]]) for r in made]
    records.write(run / "reference.jsonl", wrong)
    shutil.copy(unbroken[0] / "reference.json", run)
    says = r"step 1: .* differ by (.*) nats a root of tokens .*reference\.jsonl is not of"
    with pytest.raises(ValueError, match=says) as error:
        train.train(same_on_eight(run))
    examples, _ = pairs_in(tmp_path / "examples")
    possible = [0.5 / math.sqrt(len(example.completions[0])) for example in examples]
    assert any(float(re.search(says, str(error.value))[1]) == pytest.approx(gap, rel=5e-3) for gap in possible)
    assert not (run / "hf").exists()


def pairs_in(folder: Path):
    return train.load_data(folder, text.load(TINY), path=GOLDEN / "pairs.jsonl", kind="pairs", row_length=256)


def test_a_reference_is_of_its_weights_and_goes_on_where_it_was_killed(tmp_path, one_device):
    cfg, params = hf.load(TINY, dtype="float32")
    examples, _ = pairs_in(tmp_path / "examples")
    path, score, scored = tmp_path / "reference.jsonl", make_scorer(cfg, compute=Compute("float32", chunk=64)), []

    def reference(bound_to):
        def counting(params, batch):
            scored.append(int(batch["weight"][..., 0].sum()))
            return score(params, batch)
        scored.clear()
        return train.reference(path, counting, params, examples, bound_to, row_length=256, rows_per_batch=2)

    first = reference({"data": "a"})
    golden = {pair["id"]: pair["logps"] for pair in json.loads((GOLDEN / "trl.json").read_text())["pairs"]}
    assert first.keys() == golden.keys() and sum(scored) == len(golden)
    assert all(first[name] == pytest.approx(golden[name], rel=1e-6) for name in golden)
    assert reference({"data": "a"}) == first and not scored
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:20])  # as a kill leaves it
    assert reference({"data": "a"}).keys() == first.keys() and sum(scored) == len(golden) - 5
    assert {r.id: r.logps for r in records.read(path, records.Reference)} == reference({"data": "a"})
    reference({"data": "b"})
    assert sum(scored) == len(golden)
    assert json.loads((tmp_path / "reference.json").read_text()) == {"data": "b"}


# --- the examples on disk -------------------------------------------------------------------------


def test_a_file_is_tokenised_once_and_counted(tmp_path):
    first, dropped = pairs_in(tmp_path / "a")
    (tmp_path / "a" / "0.arrow").rename(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        pairs_in(tmp_path / "a")  # it would not have been missed if it were made again
    settings = {"path": GOLDEN / "pairs.jsonl", "kind": "pairs", "row_length": 120}
    fewer, dropped = train.load_data(tmp_path / "b", text.load(TINY), **settings)
    assert len(fewer) + dropped["too long"] == len(first) and dropped["too long"]


def test_a_finished_run_keeps_no_tokens(unbroken):
    assert not (unbroken[0] / "examples").exists()


# --- SIGTERM ----------------------------------------------------------------------------------------

TERMINATED = """
import os, runpy, signal
from align_jax import log
write = log.Metrics.write
def write_and_ask(metrics, step, values):
    write(metrics, step, values)
    if step == 10:
        os.kill(os.getpid(), signal.SIGTERM)
log.Metrics.write = write_and_ask
runpy.run_module("align_jax.train", run_name="__main__")
"""


def test_a_terminated_run_saves_and_continues_to_the_same_bits(unbroken, tmp_path):
    run = tmp_path / "run"
    done = command(f"--config.run={run}", *SETTINGS, program=TERMINATED)
    assert done.returncode == log.TERMINATED == 143, done.stderr
    step = int(re.search(r"terminated, saved step (\d+) of 24; the same command continues", done.stdout)[1])
    assert step in (10, 11) and step % 4  # no step at which it would have saved anyway
    last = command(f"--config.run={run}", *SETTINGS)
    assert f"continuing after step {step}\n" in last.stdout, last.stderr
    assert metrics_of(run) == metrics_of(unbroken[0])
    name = "hf/model.safetensors"
    assert (run / name).read_bytes() == (unbroken[0] / name).read_bytes()


# --- refused --------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_before_it_is_saved(tmp_path):
    with pytest.raises(FloatingPointError, match=r"step 2: \{.*'loss': nan.*lower optim.lr"):
        train.train(smoke("sft", tmp_path, optim__lr=1e30, ckpt__every=1))
    assert [row["step"] for row in log.read_metrics(tmp_path)] == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


@pytest.mark.parametrize("name, kind, problem", [
    ("sft", "pairs", "objective 'sft' needs 1 completion.*data.kind 'pairs' gives 2"),
    ("dpo", "chosen", "objective 'dpo' needs 2 completion.*data.kind 'chosen' gives 1"),
    ("dpo", "examples", r"12 bad line\(s\) in .*, expected Example:\n.*pairs.jsonl:1: missing field 'completion'"),
    ("dpo", "triples", r"data.kind: got 'triples', available are \['chosen', 'examples', 'pairs'\]"),
])
def test_data_that_does_not_fit_the_objective(name, kind, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        train.train(smoke(name, tmp_path, data__kind=kind))


def test_a_correction_of_what_failed_at_once_is_no_other_run(tmp_path):
    log.claim(tmp_path, {"optim": {"lr": 1.0}})
    log.claim(tmp_path, {"optim": {"lr": 0.1}})
    assert json.loads((tmp_path / "config.json").read_text()) == {"optim": {"lr": 0.1}}


def test_a_setting_that_fails_a_check_may_be_corrected_in_the_same_folder(tmp_path):
    start = shutil.copytree(TINY, tmp_path / "start")
    raw = json.loads((start / "config.json").read_text())
    log.write_json(start / "config.json", raw | {"max_position_embeddings": 100})
    for wrong, problem in [
        ({"data__kind": "chosen"}, "needs 2 completion"),
        ({"data__row_length": 256}, "data.row_length: an example has 125 tokens, .* has 100 positions"),
        ({"mesh__data": 1, "mesh__fsdp": 1, "mesh__tensor": 8}, "cannot be loaded"),
    ]:
        with pytest.raises(ValueError, match=problem):  # and not that the folder holds another run
            train.train(smoke("dpo", tmp_path / "run", **{"start": str(start), "data__row_length": 100} | wrong))


def test_data_that_is_not_there_is_named_with_its_setting(tmp_path):
    with pytest.raises(ValueError, match="data.path: no such file: gone.jsonl; expected JSONL"):
        train.train(smoke("dpo", tmp_path / "run", data__path="gone.jsonl"))


@pytest.mark.parametrize("row_length, is_warned", [(512, False), (16_000, True)])
def test_a_row_far_longer_than_what_it_holds_is_warned_of(row_length, is_warned, tmp_path, capsys):
    examples, dropped = pairs_in(tmp_path / "examples")
    c = smoke("dpo", tmp_path / "run", data__row_length=row_length)
    train.check_examples(c, hf.config(TINY), objective("dpo", beta=0.1), examples, dropped)
    said = re.search(r"warning: data.row_length=16000 is (\d+) times the longest", capsys.readouterr().out)
    assert bool(said) == is_warned and (not said or int(said[1]) == 16_000 // max(examples.lengths))


def test_two_trainings_in_one_folder_are_refused(tmp_path):
    c = smoke("sft", tmp_path / "run")
    (tmp_path / "run").mkdir()
    with records.hold((tmp_path / "run" / "lock").open("a")), \
            pytest.raises(ValueError, match="run/lock is being written by another process"):
        train.train(c)


def test_the_folder_of_another_run_is_refused_by_key(unbroken):
    before = (unbroken[0] / "config.json").read_bytes()
    c = smoke("bonbon", unbroken[0], steps=STEPS, ckpt__every=4, optim__warmup=0.2, seed=3)
    with pytest.raises(ValueError) as error:
        train.train(c)
    assert str(error.value).splitlines()[1:] == [
        "  objective.alpha: this run 0.005, in the folder None",
        "  objective.beta: this run None, in the folder 0.1",
        "  objective.n: this run 8, in the folder None",
        "  objective.name: this run 'bonbon', in the folder 'dpo'",
        "  seed: this run 3, in the folder 0",
    ]
    assert (unbroken[0] / "config.json").read_bytes() == before


def test_settings_left_open_are_named_together():
    with pytest.raises(ValueError, match="without a value: --config.data.path= --config.run= --config.start="):
        train.train(get_config("dpo"))


def test_a_typo_on_the_command_line_is_refused_with_a_suggestion():
    done = command("--config.optim.lrr=1e-5")
    assert done.returncode != 0
    assert 'Did you mean "lr" instead of "lrr"?' in done.stderr


@pytest.mark.parametrize("name, hyper", [("dpo", {}), ("ipo", {"beta": 0.1, "smoothing": 0.1}), ("bonbon", {"n": 8})])
def test_an_objective_with_wrong_settings_says_what_it_takes(name, hyper):
    with pytest.raises(ValueError, match=rf"objective '{name}': got .*, expected \["):
        objective(name, **hyper)


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("arg", ["", "smoke"])
@pytest.mark.parametrize("name", TRAINING)
def test_a_training_config_fits_the_functions_that_take_it(name, arg):
    c = get_config(name, arg).to_dict()
    assert set(c) == {"run", "start", "seed", "steps", "data", "objective", "optim", "lora", "compute", "mesh",
                      "ckpt"}
    fits(train.load_data, None, None, **{k: v for k, v in c["data"].items() if k not in train.FOR_ROWS})
    fits(mesh.make, **c["mesh"])
    fits(checkpoint.Checkpoints, "", keep=c["ckpt"]["keep"])
    assert set(c["ckpt"]) == {"every", "keep", "export"} and c["ckpt"]["export"] in train.GAP
    compute, goal = Compute(**c["compute"]), objective(**c["objective"])
    assert compute.dtype in train.GAP
    assert goal.completions == train.KINDS[c["data"]["kind"]][2]
    optim.adamw(steps=100, **c["optim"])


def fits(function, *args, **kwargs) -> None:
    inspect.signature(function).bind(*args, **kwargs)


@pytest.mark.parametrize("arg", ["", "smoke"])
def test_the_sampling_config_fits_the_functions_that_take_it(arg):
    c = get_config("sample", arg).to_dict()
    assert set(c) == {"run", "start", "prompts", "mesh", "sample", "engine"}
    fits(decode.sample, None, None, **c["sample"])
    fits(engine.ENGINES["local"], "", **c["engine"]["local"])
    fits(engine.ENGINES["endpoint"], "", **c["engine"]["endpoint"])
    fits(mesh.make, **c["mesh"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_says_how_to_run_it_and_knows_its_arguments(name):
    source = (ROOT / "configs" / f"{name}.py").read_text()
    assert f"--config=configs/{name}.py" in source.split('"""')[1]
    assert get_config(name).to_dict() != get_config(name, "smoke").to_dict()
    with pytest.raises(ValueError, match="got :?'?big'?, expected .*smoke"):
        get_config(name, "big")
