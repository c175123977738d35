r"""How fast, beside what users would pick instead: every contender in a process of its own, in turn, on one machine.

    python tools/bench.py --cases=dpo,generate,spread --model=CASE --peers=FOLDER \
        --python=trl=ENV/bin/python,transformers=ENV/bin/python,tunix=ENV/bin/python --out=bench.json
    python tools/bench.py --cases=overhead --model=CASE
    python tools/bench.py --cases=accelerator_sft,accelerator_dpo,accelerator_decode,accelerator_overhead \
        --model=CASE --shape=deepseek-coder-1.3b [--rows=8] [--remat=mixed] [--unroll] [--rank=0] [--new=256] \
        [--python=trl=ENV/bin/python]

CASE is a checkpoint with pairs.jsonl in it, FOLDER has the peers' scripts (make_case.py among them makes a CASE), and
an ENV is a virtual environment with that peer. A peer without an interpreter is left out, and said to be. Rounds are
interleaved, A B C A B C, and the ratios are those of medians, for the machine's speed drifts. Real tokens are those of
prompt and completion of both sides of a pair, padding not counted, whatever a contender computes.

The accelerator cases need a GPU or TPU with room for the shape (full training: 1.3B 40 GB for 8 rows with remat dots,
7B 120 GB for 8 with mixed, 134 GB for 4 with dots; with --rank=16 5 and 20 GB) and, for TRL, an environment with torch,
trl and liger-kernel (and peft for --rank); --trl="--batch 16 --checkpointing" makes it smaller. A peer that fails is
left out, and says why.
They report MFU: FLOPs of the matrices and of attention under the diagonal, counted once, without those of remat, by the
chip's dense bf16 peak. Decoding is measured by the bytes of the weights and of every slot's cache, its prompt included:
all that `generate` does, and a step alone at the mean of the lengths.
"""

import dataclasses
import itertools
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from align_jax import data, decode, fit, hf, hf_config, log, lora, mesh, model, optim, records, slots, text, train
from align_jax.step import Compute, TrainState, make_scorer, make_step, objective

HERE = Path(__file__).parent
PEERS = {  # case -> what is compared, and the peers: (environment, script, arguments)
    "dpo": ("real_tokens_per_s", {
        "TRL, precomputed reference": ("trl", "trl_dpo.py", "--batch 8 --steps 6 --precompute"),
        "TRL": ("trl", "trl_dpo.py", "--batch 8 --steps 6"),
        "Tunix": ("tunix", "tunix_dpo.py", "--batch 8 --steps 5")}),
    "generate": ("new_tokens_per_s", {
        "transformers": ("transformers", "hf_generate.py", "--prompts 4 --n 8 --new 128"),
        "Tunix": ("tunix", "tunix_generate.py", "--prompts 4 --n 8 --new 128")}),
    "spread": ("new_tokens_per_s", {
        "transformers": ("transformers", "hf_generate.py", "--prompts 4 --n 8 --new 512")}),
    "overhead": ("device_share", {}),
    "accelerator_sft": ("real_tokens_per_s", {
        "TRL": ("trl", HERE / "bench_trl.py", "{shape} --goal sft --rank {rank} {trl}")}),
    "accelerator_dpo": ("real_tokens_per_s", {
        "TRL": ("trl", HERE / "bench_trl.py", "{shape} --rank {rank} {trl}")}),
    "accelerator_decode": ("share_of_bandwidth", {}),
    "accelerator_overhead": ("device_share", {}),
}

_CASES = flags.DEFINE_list("cases", ["dpo", "generate", "spread"], "which of the cases")
_MODEL = flags.DEFINE_string("model", None, "a checkpoint with pairs.jsonl in it: a CASE")
_SHAPE = flags.DEFINE_enum("shape", "deepseek-coder-1.3b", [*fit.SHAPES], "of the model, in the accelerator cases")
_RANK = flags.DEFINE_integer("rank", 0, "of LoRA, in the accelerator cases; 0: full training", lower_bound=0)
_ROWS = flags.DEFINE_integer("rows", 8, "rows of 2,048 tokens a step, in the accelerator cases", lower_bound=1)
_UNROLL = flags.DEFINE_bool("unroll", False, "the layers, in the accelerator cases")
_NEW = flags.DEFINE_integer("new", 256, "tokens of an answer, in accelerator_decode", lower_bound=1)
_REMAT = flags.DEFINE_enum("remat", "mixed", [*model.REMAT], "in the accelerator cases")
_TRL = flags.DEFINE_string("trl", "--batch 32", "arguments of bench_trl.py: as many pairs as the card has room for")
_PEERS = flags.DEFINE_string("peers", "../shared/bench", "the folder of the peers' scripts")
_PYTHON = flags.DEFINE_list("python", [], "PEER=INTERPRETER of its environment")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "runs of every contender", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "a JSON file for all that was measured")
_WORKER = flags.DEFINE_enum("worker", None, [*PEERS], "measure this case in this process, print JSON and stop")

SMALL = Compute("float32", remat="dots", chunk=256, keep_logits=True)  # the fastest found for the shared case
SLOTS = 32
LIMITS = np.random.default_rng(0).integers(16, 513, 8 * SLOTS).tolist()  # answer lengths of `spread`


# --- on the shared case -------------------------------------------------------------------------------


def dpo() -> dict:
    """Steps in float32 on as many of the peers' pairs as two rows hold: 9 to 10, where a step of theirs has 8."""
    return _steps("dpo", SMALL, rows=2, row_length=1024, count=6,
                  weights=lambda: hf.load(_MODEL.value, dtype="float32"))


def overhead() -> dict:
    """The share of the trainer's loop that is the device's: eight steps with data, transfer and log, and without."""
    return _overhead(SMALL, rows=2, row_length=1024, weights=lambda: hf.load(_MODEL.value, dtype="float32"))


def _overhead(compute: Compute, *, rows: int, row_length: int, weights) -> dict:
    goal = objective("dpo", beta=0.1)
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh.make()):
        step, state, batches = _trainer("dpo", compute, rows, row_length, *weights())
        metrics = log.Metrics(Path(folder), first_step=0, steps=100)
        beginning = batches.get_state()
        held = [train.to_devices(next(batches)) for _ in range(8)]

        def bare(state):
            for batch in held:
                state, _ = step(state, batch)
            return state

        def whole(state):
            pending = None
            for _ in range(8):
                state, values = step(state, train.to_devices(next(batches)))
                if pending:
                    train.record(metrics, 2, pending, goal, compute)
                pending = values
            return state

        seconds = {bare: [], whole: []}
        state = jax.block_until_ready(bare(state))
        for run in [bare, whole] * 3:
            if run is whole:
                batches.set_state(beginning)  # the same eight
            began = time.perf_counter()
            state = jax.block_until_ready(run(state))
            seconds[run].append(time.perf_counter() - began)
        metrics.close()
        batches.close()
    return {"device_share": statistics.median(seconds[bare]) / statistics.median(seconds[whole]),
            "bare_s": seconds[bare], "whole_s": seconds[whole]}


def generate() -> dict:
    """Four prompts with eight answers of 128 tokens each."""
    return _sample(prompts=4, n=8, limits=[128] * 4)


def spread() -> dict:
    """Answers of 16 to 512 tokens, eight for every slot, in an order that does not know their lengths."""
    decode.sorted = lambda asked, key: list(asked)  # which would serve the longest limits first
    return _sample(prompts=len(LIMITS), n=1, limits=LIMITS)


def _sample(*, prompts: int, n: int, limits) -> dict:
    """On a device a core, as configs/sample.py has it for CPUs: attention's products take one core of a device."""
    jax.config.update("jax_num_cpu_devices", math.gcd(os.cpu_count(), hf.config(_MODEL.value).K))
    texts = [r["prompt"] for r in records.rows(Path(_MODEL.value) / "pairs.jsonl")][:4]  # the peers' four
    asked = [(str(i), texts[i % len(texts)]) for i in range(prompts)]
    with jax.set_mesh(mesh.make(fsdp=1, tensor=-1)):
        sampler = decode.Sampler.load(_MODEL.value, dtype="float32", batch_size=SLOTS)
        sampler = dataclasses.replace(sampler, stop_ids=(-1,))  # a random model's end is of no use here
        for _ in range(2):  # the first compiles
            list(sampler.generate(asked, n=n, temperature=0.7, limits={str(i): m for i, m in enumerate(limits)}))
    return {"new_tokens_per_s": sampler.work.rate, "slots_busy": sampler.work.busy, "tokens": sampler.work.tokens}


# --- on an accelerator --------------------------------------------------------------------------------


def accelerator_sft() -> dict:
    """Steps of SFT on rows of 2,048 tokens with random weights, in bfloat16."""
    return _accelerator("sft")


def accelerator_dpo() -> dict:
    """Steps of DPO on rows of 2,048 tokens with random weights, in bfloat16."""
    return _accelerator("dpo")


def accelerator_overhead() -> dict:
    """`overhead` at the size of a real model."""
    return _overhead(_compute(), rows=_ROWS.value, row_length=2048, weights=_random)


def _accelerator(goal: str) -> dict:
    return _steps(goal, _compute(), rows=_ROWS.value, row_length=2048, count=10, weights=_random)


def _compute() -> Compute:
    return Compute("bfloat16", remat=_REMAT.value, unroll=_UNROLL.value)


def _random():
    if jax.default_backend() == "cpu":
        raise SystemExit("error: the accelerator cases need a GPU or TPU, got a CPU; the others are for one")
    cfg, dtype = fit.SHAPES[_SHAPE.value], "bfloat16" if _RANK.value else "float32"
    return cfg, jax.tree.map(lambda x: x.astype(dtype), model.init(cfg, 0))


def accelerator_decode() -> dict:
    """128 sequences of --new tokens from 16 prompts: bytes that a step must read, by what the memory can give."""
    texts = [r["prompt"] for r in records.rows(Path(_MODEL.value) / "pairs.jsonl")][:16]
    with jax.set_mesh(mesh.make(data=-1, fsdp=1)):
        cfg, params = _random()
        params = jax.tree.map(lambda x: x.astype("bfloat16"), params)
        sampler = decode.Sampler.of(cfg, params, text.load(_MODEL.value), (-1,), batch_size=128)
        for _ in range(2):
            list(sampler.generate([(str(i), t) for i, t in enumerate(texts)], n=8, max_tokens=_NEW.value))
        weights = 2 * (cfg.num_params - cfg.V * cfg.D * (not cfg.tied))
        half = _NEW.value / 2  # of the answer, in the mean
        seen = statistics.mean(len(text.encode_prompt(sampler.tokenizer, t)) + half for t in texts)
        alone = _decode_step(sampler, round(seen))
    read = weights + 2 * 2 * cfg.L * cfg.K * cfg.H * 128 * seen / jax.device_count()  # the weights by every device
    limit = read / _chip().bandwidth
    return {"new_tokens_per_s": sampler.work.rate, "bytes_per_step": read, "tokens_seen": seen, "step_s": alone,
            "share_of_bandwidth": limit * sampler.work.rate / 128, "share_of_bandwidth_in_steps": limit / alone}


def _decode_step(sampler: decode.Sampler, seen: int) -> float:
    """Seconds of a step whose slots all see so many tokens, without what the host does between chunks of steps."""
    cfg, M, chunk = sampler.cfg, sampler.batch_size, 32
    state = slots.empty(cfg, slots=M, ring=64 * math.ceil((seen + chunk) / 64), dtype=sampler.params["embed"].dtype)
    prompt = decode._Prompt("", [0] * (seen - chunk // 2), limit=2**20)
    table = decode._table([decode._Slot(prompt, k) for k in range(M)], offset=0, seed=0)
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        state, *_ = jax.block_until_ready(slots.decode(
            cfg, sampler.params, [()] * cfg.L, state, table, np.int32(0), np.int32(M), temperature=1.0, top_p=1.0,
            stop_ids=(-1,), chunk=chunk, look=slots.before_a_look(prompt.limit)))
        seconds.append((time.perf_counter() - began) / chunk)
    return statistics.median(seconds[2:])


# --- a step -------------------------------------------------------------------------------------------


def _steps(goal: str, compute: Compute, *, rows: int, row_length: int, count: int, weights) -> dict:
    with jax.set_mesh(mesh.make()):
        cfg, params = weights()
        step, state, batches = _trainer(goal, compute, rows, row_length, cfg, params)
        del params
        seconds, totals = [], Counter()
        for number in range(count + 1):
            batch = next(batches)
            began = time.perf_counter()
            state, values = jax.block_until_ready(step(state, train.to_devices(batch)))
            seconds.append(time.perf_counter() - began)
            if number:
                totals.update({name: float(values[name]) for name in ("tokens", "scored", "examples")})
                totals["flops"] += _flops(cfg, batch)
        batches.close()
    spent = sum(seconds[1:])
    return {"real_tokens_per_s": totals["tokens"] / spent, "examples_per_s": totals["examples"] / spent,
            "flops_per_s": totals["flops"] / spent, "mfu": totals["flops"] / spent / jax.device_count() / _chip().flops,
            "first_step_s": seconds[0], "step_s": seconds[1:], "examples_per_step": totals["examples"] / count,
            "loss": float(values["loss"]), "memory": jax.devices()[0].memory_stats()}


def _trainer(goal: str, compute: Compute, rows: int, row_length: int, cfg, params):
    """A step, its state, and batches of the case's pairs, or of their chosen sides, over and over."""
    kind, select, completions = train.KINDS["pairs" if goal == "dpo" else "chosen"]
    pairs = records.stream(Path(_MODEL.value) / "pairs.jsonl", kind)
    pairs = [(line, select(r)) for line, r in itertools.islice(pairs, 48)]  # what the peers take
    copies = 3 if row_length < 2048 else 40  # so many that the last rows of an epoch, which are not full, do not count
    pairs = [(line, dataclasses.replace(r, id=f"{copy}/{r.id}")) for copy in range(copies) for line, r in pairs]
    shape, ref_logps = {"row_length": row_length, "rows_per_batch": rows}, None
    with tempfile.TemporaryDirectory() as folder:
        data.store(Path(folder) / "0.arrow", data.encode_all(
            pairs, text.load(_MODEL.value), dropped=Counter(), max_length=row_length), completions=completions)
        examples = data.Stored([Path(folder) / "0.arrow"])
        if completions == 2:
            score = make_scorer(cfg, compute=compute)
            ref_logps = train.reference(Path(folder) / "reference.jsonl", score, params, examples, {}, **shape)
    packing = data.Packing(examples.lengths, seed=0, epochs=None, **shape)
    cfg, tx = _adapted(cfg), optim.adamw(steps=1000, lr=1e-6)
    params, frozen = lora.split(lora.add(cfg, params, seed=0))
    step = make_step(cfg, objective(goal, **({"beta": 0.1} if goal == "dpo" else {})), tx, compute=compute)
    state = TrainState(jax.device_put(np.int32(0), mesh.sharding()), params, jax.jit(tx.init)(params))
    return partial(step, frozen=frozen), state, train.batches_of(examples, packing, ref_logps)


def _adapted(cfg: model.ModelConfig) -> model.ModelConfig:
    return lora.config(cfg, rank=_RANK.value, alpha=16.0)


def _flops(cfg: model.ModelConfig, batch: dict) -> float:
    """FLOPs that a step needs of what is computed, and not of padding."""
    is_real = batch["segments"] > 0
    seen = np.sum((batch["positions"] + 1) * is_real)  # its prompt, its own branch so far, and itself
    return sum(fit.num_flops(_adapted(cfg), tokens=np.sum(is_real), scored=np.sum(batch["slots"] >= 0), seen=seen))


def _chip() -> fit.Chip:
    return fit.of_kind(jax.devices()[0].device_kind)


# --- all of them --------------------------------------------------------------------------------------


def contenders(case: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The command of every contender of a case, and why others are left out."""
    ours = [f"--{name}={flags.FLAGS[name].value}" for name in
            ("model", "shape", "rank", "rows", "remat", "unroll", "new")]
    commands, absent = {"align_jax": [sys.executable, __file__, f"--worker={case}", *ours]}, {}
    interpreters = dict(item.split("=", 1) for item in _PYTHON.value)  # main has looked at them
    for name, (peer, script, arguments) in PEERS[case][1].items():
        path = Path(_PEERS.value) / script
        if peer not in interpreters:
            absent[name] = f"--python={peer}=INTERPRETER is not given"
        elif not path.is_file():
            absent[name] = f"{path} is not there"
        else:
            arguments = arguments.format(shape=shape_file(), rank=_RANK.value, trl=_TRL.value)
            commands[name] = [interpreters[peer], str(path), _MODEL.value, *arguments.split()]
    return commands, absent


def shape_file() -> Path:
    """config.json of --shape, for a peer."""
    path = Path(tempfile.gettempdir()) / f"{_SHAPE.value}.json"
    log.write_json(path, hf_config.config_json(fit.SHAPES[_SHAPE.value]))
    return path


def run(command: list[str]) -> dict:
    """Run a contender in a process of its own; the last line that it prints is its JSON."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(case: str) -> dict:
    """Measure a case in rounds; return it all, medians, and our ratio to every peer that did not fail."""
    commands, absent = contenders(case)
    for name, why in absent.items():
        print(f"{case:18} {name:28} left out: {why}", flush=True)
    found = {name: [] for name in commands}
    for name in log.progress([*commands] * _ROUNDS.value, what=case, unit="run"):
        if name in absent:
            continue
        log.say(f"{case:18} {name:28} runs")
        try:
            found[name].append(run(commands[name]))
        except RuntimeError as error:
            if name == "align_jax":
                raise SystemExit(f"error: {error}") from None
            absent[name] = str(error)
            print(f"{case:18} {name:28} left out: {error}", flush=True)
    found = {name: runs for name, runs in found.items() if name not in absent}
    measure = PEERS[case][0]
    if case == "spread" and "transformers" in found:
        for one in found["transformers"]:  # which computes batches to their end
            one |= {"computed_tokens_per_s": one[measure], measure: one[measure] * spread_of_batches()}
    medians = {name: statistics.median(one[measure] for one in runs) for name, runs in found.items()}
    memory = {name: max(one.get("peak_gib") or one["peak_rss_gib"] for one in runs) for name, runs in found.items()}
    return {"measure": measure, "medians": medians, "peak_gib": memory, "absent": absent, "runs": found,
            "ratios": {name: medians["align_jax"] / median for name, median in medians.items() if name != "align_jax"}}


def spread_of_batches() -> float:
    """Useful tokens by computed ones where batches of SLOTS run until their longest answer ends, out of 512 steps."""
    batches = [LIMITS[at:at + SLOTS] for at in range(0, len(LIMITS), SLOTS)]
    return sum(LIMITS) / sum(max(batch) * SLOTS for batch in batches)


def main(argv) -> None:
    if argv[1:]:
        raise SystemExit(f"error: unexpected arguments {argv[1:]}; settings are --flag=value")
    if not _MODEL.value:
        raise SystemExit("error: --model: expected a CASE, which make_case.py in the peers' folder makes; see --help")
    absent = [file for file in ("config.json", "pairs.jsonl") if not Path(_MODEL.value, file).is_file()]
    if absent:
        raise SystemExit(f"error: --model: {_MODEL.value} has no {' and no '.join(absent)}, expected a folder with a "
                         "checkpoint and pairs.jsonl")
    if _WORKER.value:
        found = globals()[_WORKER.value]()
        peak, device = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, jax.devices()[0]
        of_device = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30  # a CPU does not say
        print(json.dumps({"device": device.device_kind, "peak_rss_gib": round(peak, 2),
                          "peak_gib": round(of_device, 2)} | found))
        return
    unknown = set(_CASES.value) - set(PEERS)
    if unknown or not _CASES.value:
        raise SystemExit(f"error: --cases: got {sorted(unknown)}, available are {', '.join(PEERS)}")
    known = {peer for _, peers in PEERS.values() for peer, *_ in peers.values()}
    wrong = [item for item in _PYTHON.value
             if item.split("=", 1)[0] not in known or not os.access(item.partition("=")[2], os.X_OK)]
    if wrong:
        raise SystemExit(f"error: --python: got {', '.join(wrong)}, expected PEER=INTERPRETER, an interpreter that is "
                         f"there and one of {', '.join(sorted(known))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # subprocess.run ends the contender then
    jax.config.update("jax_platforms", "cpu")  # the devices are the contenders'
    results = {"versions": log.versions() | {"device": "each run's own"}, "cores": os.cpu_count()}
    for case in _CASES.value:
        results[case] = result = compare(case)
        for name, median in result["medians"].items():
            ratio = f"  {result['ratios'][name]:6.2f} times" if name in result["ratios"] else ""
            print(f"{case:18} {name:28} {median:10,.3f} {result['measure']}  "
                  f"{result['peak_gib'][name]:6.2f} GiB{ratio}")
        if _OUT.value:
            log.write_json(Path(_OUT.value), results)


if __name__ == "__main__":
    app.run(main)
