"""Two real processes, joined over the loopback device: the numbers of one process, on any number of hosts."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from align_jax import log, records

ROOT = Path(__file__).parents[1]
DYING = """
import os, runpy, signal, sys, time
from align_jax import log
write = log.Metrics.write
def write_and_die(metrics, step, values):
    write(metrics, step, values)
    if step == 6:
        while not (metrics.path.parent / "checkpoints" / "4").exists():  # which is being saved on the side
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
log.Metrics.write = write_and_die
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
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": str(ROOT)}
    if hosts > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(hosts)}
    running = [subprocess.Popen([sys.executable, *command], env=env | {"JAX_PROCESS_ID": str(host)}, cwd=ROOT,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for host in range(hosts)]
    try:
        outputs = []
        for process in running:
            outputs.append(process.communicate(timeout=150)[0])
            if process.returncode == -signal.SIGKILL:
                break  # what becomes of the others is the cluster's business; here they end with it
    finally:
        for process in running:
            process.kill()
            process.wait()
    outputs += [process.stdout.read() for process in running[len(outputs):]]
    return [(process.returncode, output) for process, output in zip(running, outputs, strict=True)]


def train(run: Path, mesh: tuple[int, int, int], *, hosts: int, program=("-m", "align_jax.train"), **settings):
    axes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)]
    return start(*program, "--config=configs/dpo.py:smoke", f"--config.run={run}", *axes, hosts=hosts, **settings)


def finished(ended: list[tuple[int, str]]) -> str:
    """The output of the first host, once all of them came to their end."""
    assert [status for status, _ in ended] == [0] * len(ended), "\n".join(output for _, output in ended)
    return ended[0][1]


def same_losses(run: Path, one: Path) -> None:
    for got, expected in zip(log.read_metrics(run), log.read_metrics(one), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], abs=1e-5), got["step"]
        # Equal counts: every host fed examples of its own, and all of them were fed.
        assert [got[k] for k in ("step", "examples", "num_tokens")] == [
            expected[k] for k in ("step", "examples", "num_tokens")]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process, to compare with."""
    run = tmp_path_factory.mktemp("one") / "run"
    finished(train(run, (1, 1, 1), hosts=1))
    return run


@pytest.mark.parametrize("mesh, devices, program", [
    pytest.param((1, 2, 1), 1, ("-m", "align_jax.train"), id="in order"),
    # The devices of the mesh are not in the order of the hosts, as on a TPU.
    pytest.param((2, 2, 1), 2, ("-c", PERMUTED), id="permuted", marks=pytest.mark.slow),
])
def test_two_processes_train_as_one_does(one, tmp_path, mesh, devices, program):
    run = tmp_path / "run"
    output = finished(train(run, mesh, hosts=2, devices=devices, program=program))
    assert "1 compilation(s)" in output
    same_losses(run, one)
    assert (run / "hf" / "model.safetensors").is_file()
    references = [{r.id: r.logps for r in records.read(folder / "reference.jsonl", records.Reference)}
                  for folder in (run, one)]
    assert references[0].keys() == references[1].keys()
    assert all(references[0][name] == pytest.approx(logps, abs=1e-4) for name, logps in references[1].items())


def test_a_run_killed_on_two_hosts_continues_on_one(one, tmp_path):
    run = tmp_path / "run"
    (status, output), _ = train(run, (1, 2, 1), hosts=2, program=("-c", DYING))
    assert status == -signal.SIGKILL, output
    assert not (run / "hf").exists()
    output = finished(train(run, (1, 1, 1), hosts=1))
    assert re.search("continuing after step 4", output)
    same_losses(run, one)


def test_a_tensor_axis_across_hosts_is_refused(tmp_path):
    for status, output in train(tmp_path / "run", (1, 1, 2), hosts=2):
        assert status != 0
        assert "mesh: data x fsdp = 1 does not divide over 2 hosts; the tensor axis has to stay within a" in output


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
    for status, output in start("-m", "align_jax.study", "--config=configs/quickstart.py:smoke",
                                f"--config.run={tmp_path / 'run'}", hosts=2):
        assert status != 0
        assert "a study runs on one host; train and sample run on several" in output
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
