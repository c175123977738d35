"""Two real processes, joined over the loopback device: the numbers of one process, on any number of hosts."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from conftest import QUICK

from align_jax import log, records

ROOT = Path(__file__).parents[1]
ENDING = """
import os, runpy, signal, sys, time
import jax
from align_jax import log
host, step, name = sys.argv.pop(1).split(",")
write = log.Metrics.write
def write_and_end(metrics, number, values):
    write(metrics, number, values)
    if number == int(step) and jax.process_index() == int(host):
        while name == "SIGKILL" and not (metrics.path.parent / "checkpoints" / "4").exists():  # saved on the side
            time.sleep(0.1)
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(3)  # jax looks for the notice once a second
log.Metrics.write = write_and_end
runpy.run_module("align_jax.train", run_name="__main__")
"""
EARLY = """
import os, runpy, signal
from jax.experimental import multihost_utils
from align_jax import data
def end(*_, **__):  # both at once: a slower one would see that the other has gone
    multihost_utils.sync_global_devices("end")
    os.kill(os.getpid(), signal.SIGTERM)
data.encode_all = end
runpy.run_module("align_jax.train", run_name="__main__")
"""
FACTORY = """
import runpy, sys
sys.path.insert(0, "tests")
import test_pipeline
from align_jax import engine
from align_jax.synth import verify
verify.SHARE = 9
engine.make = lambda *a, **k: test_pipeline.Author()
engine.identity = lambda *a, **k: {}
runpy.run_module("align_jax.synth.pipeline", run_name="__main__")
"""
PERMUTED = """
import runpy
import jax
from align_jax import mesh
make = mesh.make
mesh.make = lambda **shape: make(**shape, devices=[jax.devices()[i] for i in (2, 0, 3, 1)])
runpy.run_module("align_jax.train", run_name="__main__")
"""


def start(*command: str, hosts: int, devices: int = 1) -> list[tuple[int, str]]:
    """Run the same command on every host; return exit status and output of each. None outlives this."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
                        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if hosts > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    running = [subprocess.Popen([sys.executable, *command], env=env | {"JAX_PROCESS_ID": str(host)}, cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for host in range(hosts)]
    try:
        outputs = []
        for process in running:
            outputs.append(process.communicate(timeout=240)[0])  # jax by itself gives up after five minutes
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(process.returncode, output) for process, output in zip(running, outputs, strict=True)]


def train(run: Path, mesh: tuple[int, int, int], *, hosts: int, program=("-m", "align_jax.train"), **settings):
    axes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    return start(*program, "--config=configs/dpo.py:smoke", f"--config.run={run}", *axes, hosts=hosts, **settings)


def finished(ended: list[tuple[int, str]], status: int = 0) -> str:
    """The output of the first host, once all of them came to the same end."""
    assert [found for found, _ in ended] == [status] * len(ended), "\n".join(output for _, output in ended)
    return ended[0][1]


def same_losses(run: Path, one: Path) -> None:
    for got, expected in zip(log.read_metrics(run), log.read_metrics(one), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], abs=1e-5), got["step"]
        # Equal counts: every host fed examples of its own, and all of them were fed.
        assert [got[k] for k in ("step", "examples", "num_tokens")] == [
            expected[k] for k in ("step", "examples", "num_tokens")]


EIGHT = (1, 4, 2)  # four row shards, two hosts with two each; the tensor axis stays within a host


def on_two(run: Path, **settings):
    return train(run, EIGHT, hosts=2, devices=4, **settings)


def ending(host: int, step: int, how: str) -> dict:
    """The program that ends `host` by a signal behind a step."""
    return {"program": ("-c", ENDING, f"{host},{step},{how}")}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process with eight devices, to compare with."""
    run = tmp_path_factory.mktemp("one") / "run"
    finished(train(run, EIGHT, hosts=1, devices=8))
    return run


@pytest.mark.parametrize("mesh, devices, program", [
    pytest.param(EIGHT, 4, ("-m", "align_jax.train"), id="in order"),
    # The devices of the mesh are not in the order of the hosts, as on a TPU.
    pytest.param((2, 2, 1), 2, ("-c", PERMUTED), id="permuted", marks=pytest.mark.slow),
    pytest.param((1, 2, 2), 2, ("-c", PERMUTED), id="permuted across tensor", marks=pytest.mark.slow),
])
def test_two_processes_train_as_one_does(one, tmp_path, mesh, devices, program):
    run = tmp_path / "run"
    output = finished(train(run, mesh, hosts=2, devices=devices, program=program))
    assert "1 compilation(s)" in output
    same_losses(run, one)
    got, expected = (safetensors.numpy.load_file(folder / "hf" / "model.safetensors") for folder in (run, one))
    assert got.keys() == expected.keys()
    assert all(np.allclose(got[name], weight, atol=1e-3) for name, weight in expected.items())
    references = [{r.id: r.logps for r in records.read(folder / "reference.jsonl", records.Reference)}
                  for folder in (run, one)]
    assert references[0].keys() == references[1].keys()
    assert all(references[0][name] == pytest.approx(logps, abs=1e-4) for name, logps in references[1].items())


@pytest.mark.parametrize("host", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_host_that_dies_is_told_and_the_run_continues_on_one(one, tmp_path, host):
    run = tmp_path / "run"
    ended = on_two(run, **ending(host, 6, "SIGKILL"))
    (victim, _), ((status, output),) = ended.pop(host), ended
    bound = 150 if status == -signal.SIGABRT else 90  # jax's heartbeat gives up after 100
    assert time.time() - (run / "metrics.jsonl").stat().st_mtime < bound  # of the last step that both took
    assert victim == -signal.SIGKILL
    if status != -signal.SIGABRT:  # where a collective does not see it jax ends the process, from a thread of its own
        assert status == 1 and f"error: host {1 - host} of 2 has lost another one: " in output, output
        assert "start the same command on every host again: it continues from what was saved last" in output
    else:
        assert "This most likely indicates that another task died" in output
    assert not (run / "hf").exists()
    output = finished(train(run, EIGHT, hosts=1, devices=8))
    assert re.search("continuing after step 4", output)
    same_losses(run, one)


@pytest.mark.slow
def test_a_run_goes_from_two_hosts_to_one_and_back_by_sigterm(one, tmp_path):
    """The notice reaches one host; all of them save the same step, which is none of every fourth, and end."""
    run, at = tmp_path / "run", 0
    for launch, step in ((on_two, 2), (partial(train, mesh=EIGHT, hosts=1, devices=8), 6)):
        output = finished(launch(run, **ending(0, step, "SIGTERM")), log.TERMINATED)
        assert f"continuing after step {at}" in output or not at
        at = int(re.search(r"terminated, saved step (\d+) of 8", output)[1])
    assert f"continuing after step {at}" in finished(on_two(run))
    same_losses(run, one)


def test_sigterm_ends_at_once_what_has_nothing_to_save(tmp_path):
    ended = on_two(tmp_path / "run", program=("-c", EARLY))
    assert [status for status, _ in ended] == [-signal.SIGTERM] * 2, ended  # 143, as a shell has it


@pytest.mark.slow
def test_a_terminated_run_on_two_hosts_continues_to_the_same_bits(tmp_path):
    finished(on_two(tmp_path / "ended", **ending(1, 3, "SIGTERM")), log.TERMINATED)
    for name in ("ended", "unbroken"):
        finished(on_two(tmp_path / name))
    rows = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in log.read_metrics(tmp_path / name)]
            for name in ("ended", "unbroken")]
    assert rows[0] == rows[1]
    ended, unbroken = ((tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("ended", "unbroken"))
    assert ended == unbroken


def test_a_bad_line_in_the_share_of_one_host_is_named_by_all(tmp_path):
    lines = (ROOT / "tests" / "golden" / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pairs.jsonl").write_text("".join([*lines[:2], '{"prompt": 3}\n', *lines[2:]]))
    ended = start("-m", "align_jax.train", "--config=configs/dpo.py:smoke", f"--config.run={tmp_path / 'run'}",
                  f"--config.data.path={tmp_path / 'pairs.jsonl'}", hosts=2)
    for status, output in ended:
        assert status == 1 and re.search(r"error: host \d: 1 bad line\(s\) in .*\n.*pairs.jsonl:3: ", output), output


def test_hosts_with_other_settings_are_refused(tmp_path):
    program = ("import os, runpy, sys\nsys.argv.append('--config.optim.lr=0.00' + os.environ['JAX_PROCESS_ID'] + '1')\n"
               "runpy.run_module('align_jax.train', run_name='__main__')")
    for status, output in train(tmp_path / "run", (1, 2, 1), hosts=2, program=("-c", program)):
        assert status == 1 and "hosts: config, weights or data differ: the same command has to" in output, output


def test_a_tensor_axis_across_hosts_is_refused(tmp_path):
    for status, output in train(tmp_path / "run", (1, 1, 2), hosts=2):
        assert status != 0
        assert "mesh: got tensor = 2, which does not divide the devices of a host; the tensor axis has to" in output


def test_two_processes_sample_as_one_does(tmp_path):
    for hosts in (1, 2):
        finished(start("-m", "align_jax.sample", "--config=configs/sample.py:smoke",
                       f"--config.run={tmp_path / str(hosts)}", hosts=hosts))
    one, two = (records.read(tmp_path / name / "samples.jsonl", records.Sample) for name in "12")
    assert len(one) == 24
    for got, expected in zip(two, one, strict=True):
        assert got.logp == pytest.approx(expected.logp, abs=1e-3)
        assert (got.id, got.completion, got.finish) == (expected.id, expected.completion, expected.finish)
    assert not list((tmp_path / "2").glob("*.partial"))


def test_a_study_on_two_hosts_is_refused(tmp_path):
    ends = start("-m", "align_jax.study", "--config=configs/quickstart.py:smoke", f"--config.run={tmp_path / 'run'}",
                 hosts=2)
    assert all(status for status, _ in ends)  # a slow one may only see that the other has gone
    assert any("a study runs on one host; train and sample run on several" in output for _, output in ends)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_hosts_make_the_pairs_of_one(tmp_path):
    """Both ask the model, each executes its share of the programs, one writes."""
    for hosts in (1, 2):
        run = tmp_path / str(hosts)
        settings = {"run": run, "start": "someone", "engine.kind": "endpoint", "asking.chat": True, "response.n": 6,
                    "asking.shard": 7, "seeds.source.path": ROOT / "align_jax" / "synth", "seeds.workers": 1,
                    "sandbox.workers": 1, "sandbox.chunk": 9, "sandbox.memory_mb": 512, "concepts.count": 6,
                    "seeds.filtering.banned_words": ()}
        found = start("-c", FACTORY, "--config=configs/synth.py",
                      *(f"--config.{key}={value}" for key, value in settings.items()), hosts=hosts)
        assert [status for status, _ in found] == [0] * hosts, found
    one, two = ({path.relative_to(tmp_path / hosts): path.read_bytes() for path in (tmp_path / hosts).glob("*/*.jsonl")
                 if "-of-" not in path.name} for hosts in "12")
    assert one == two and len([row for row in one if row.name == "pairs.jsonl"]) == 1
    shares = [records.rows(tmp_path / "2" / "verdicts" / f"verdicts-{host}-of-2.jsonl") for host in (0, 1)]
    assert all(shares) and sum(map(len, shares)) == len(records.rows(tmp_path / "1" / "verdicts" / "verdicts.jsonl"))
