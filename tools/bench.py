"""How fast, beside what users would pick instead: every contender in a process of its own, in turn, on one machine.

    python tools/bench.py --cases=dpo,generate,spread --model=CASE --peers=FOLDER \
        --python=trl=ENV/bin/python,transformers=ENV/bin/python,tunix=ENV/bin/python --out=bench.json
    python tools/bench.py --cases=overhead --model=CASE
    python tools/bench.py --cases=accelerator --shapes=deepseek-coder-1.3b [--python=trl=ENV/bin/python]

CASE is a checkpoint with pairs.jsonl in it, FOLDER has the peers' scripts (make_case.py among them makes a CASE), and
an ENV is a virtual environment with that peer. A peer without an interpreter is left out, and said to be. Rounds are
interleaved, A B C A B C, and the ratios are those of medians, for the machine's speed drifts. Real tokens are those of
prompt and completion of both sides of a pair, padding not counted, whatever a contender computes.

`accelerator` needs a GPU or TPU with room for the shape (1.3B: 24 GB, 7B: 120 GB for full training) and for the
comparison an environment with torch, trl, flash-attn and liger-kernel. It reports MFU: FLOPs of the matrices and of
attention under the diagonal, counted once, without those of remat, by the chip's dense bf16 peak.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from align_jax import data, decode, hf, log, mesh, optim, records, text, train
from align_jax.step import Compute, TrainState, make_step, objective

_CASES = flags.DEFINE_list("cases", ["dpo", "generate", "spread"], "which of CASES")
_MODEL = flags.DEFINE_string("model", None, "a checkpoint with pairs.jsonl in it")
_PEERS = flags.DEFINE_string("peers", "../shared/bench", "the folder of the peers' scripts")
_PYTHON = flags.DEFINE_list("python", [], "PEER=INTERPRETER of its environment")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "runs of every contender")
_OUT = flags.DEFINE_string("out", None, "a JSON file for all that was measured")
_WORKER = flags.DEFINE_string("worker", None, "measure one of WORKERS in this process and print it as JSON")

CASES = {  # case -> our worker, what is compared (a larger one is better), and the peers: (interpreter, script, flags)
    "dpo": ("dpo", "real_tokens_per_s", {
        "TRL, precomputed reference": ("trl", "trl_dpo.py", "--batch 8 --steps 6 --precompute"),
        "TRL": ("trl", "trl_dpo.py", "--batch 8 --steps 6"),
        "Tunix": ("tunix", "tunix_dpo.py", "--batch 8 --steps 5")}),
    "generate": ("generate", "new_tokens_per_s", {
        "transformers": ("transformers", "hf_generate.py", "--prompts 4 --n 8 --new 128"),
        "Tunix": ("tunix", "tunix_generate.py", "--prompts 4 --n 8 --new 128")}),
    "spread": ("spread", "new_tokens_per_s", {
        "transformers": ("transformers", "hf_generate.py", "--prompts 4 --n 8 --new 512")}),
    "overhead": ("overhead", "device_share", {}),
}
SLOTS = 32
LIMITS = np.random.default_rng(0).integers(16, 513, 8 * SLOTS).tolist()  # answer lengths of `spread`


# --- ours ---------------------------------------------------------------------------------------------


def dpo() -> dict:
    """Train steps on about 8 pairs each, as the peers take them."""
    with jax.set_mesh(mesh.make()):
        step, state, batches = _dpo_parts()
        seconds, tokens, losses = [], [], []
        for _ in range(7):
            batch = train.to_devices(next(batches))
            began = time.perf_counter()
            state, values = jax.block_until_ready(step(state, batch))
            seconds.append(time.perf_counter() - began)
            tokens.append(float(values["tokens"]))
            losses.append(round(float(values["loss"]), 4))
        batches.close()
    return {"real_tokens_per_s": sum(tokens[1:]) / sum(seconds[1:]), "first_step_s": seconds[0],
            "median_step_s": statistics.median(seconds[1:]), "pairs_per_step": float(values["examples"]),
            "losses": losses[:4]}


def overhead() -> dict:
    """The share of the trainer's loop that is the device's: the same steps with data, transfer and log, and without."""
    with jax.set_mesh(mesh.make()):
        step, state, batches = _dpo_parts()
        folder = Path(_MODEL.value).absolute().parent / "bench-overhead"
        metrics = log.Metrics(folder, first_step=0, steps=100)
        held = [train.to_devices(next(batches)) for _ in range(8)]
        state, values = jax.block_until_ready(step(state, held[0]))

        def bare(state):
            for batch in held:
                state, values = step(state, batch)
            return jax.block_until_ready(state)

        def whole(state):
            pending = None
            for number in range(1, 9):
                state, values = step(state, train.to_devices(next(batches)))
                if pending:
                    train.record(metrics, *pending, objective("dpo", beta=0.1), Compute("float32"))
                pending = number + 1, values
            return jax.block_until_ready(state)

        seconds = {"bare": [], "whole": []}
        for _ in range(3):
            for name, run in (("bare", bare), ("whole", whole)):
                began = time.perf_counter()
                state = run(state)
                seconds[name].append(time.perf_counter() - began)
        metrics.close()
        batches.close()
    return {"device_share": statistics.median(seconds["bare"]) / statistics.median(seconds["whole"])} | seconds


def _dpo_parts():
    """A step, its state, and batches of two rows: about 8 pairs."""
    start, dropped = _MODEL.value, Counter()
    pairs = list(records.stream(Path(start) / "pairs.jsonl", records.Pair))[:48]
    examples = list(data.encode_all(pairs, text.load(start), dropped=dropped, max_length=1024))
    packing = data.Packing([len(e) for e in examples], row_length=1024, rows_per_batch=2, seed=0, epochs=None)
    cfg, params = hf.load(start, dtype="float32")
    tx = optim.adamw(steps=1000, lr=1e-6)
    step = make_step(cfg, objective("dpo", beta=0.1), tx, compute=Compute("float32", remat="none", chunk=512))
    state = TrainState(jax.device_put(np.int32(0), mesh.sharding()), params, jax.jit(tx.init)(params))
    return step, state, data.iterator(examples, packing, C=2)


WORKERS = {"dpo": dpo, "overhead": overhead}


# --- all of them --------------------------------------------------------------------------------------


def contenders(case: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The command of every contender of a case, and why others are left out."""
    worker, _, peers = CASES[case]
    flags_of_ours = [f"--model={_MODEL.value}", f"--worker={worker}"]
    commands, absent = {"align_jax": [sys.executable, __file__, *flags_of_ours]}, {}
    pythons = dict(item.split("=", 1) for item in _PYTHON.value)
    for name, (peer, script, arguments) in peers.items():
        path = Path(_PEERS.value) / script
        if peer not in pythons:
            absent[name] = f"--python={peer}=INTERPRETER is not given"
        elif not path.is_file():
            absent[name] = f"{path} is not there"
        else:
            commands[name] = [pythons[peer], str(path), _MODEL.value, *arguments.split()]
    return commands, absent


def measure(command: list[str]) -> dict:
    """Run a contender; the last line that it prints is its JSON. Its peak memory is what the kernel says."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": _platform()})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{done.stderr[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"cpu_s": round(cpu, 1)}


def main(argv) -> None:
    if _WORKER.value:
        print(json.dumps(WORKERS[_WORKER.value]() | {
            "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}))
        return
