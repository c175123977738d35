"""The trainer, read from top to bottom: SFT, DPO and BoNBoN are one loop with another loss.

    python -m align_jax.train --config=configs/dpo.py --config.start=PATH --config.data.path=pairs.jsonl

Reads a Hugging Face checkpoint and a JSONL file of examples or pairs. Writes a run folder with metrics, orbax
checkpoints (a killed run continues from the newest) and, at the end, `hf/`, a checkpoint transformers loads.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from align_jax import checkpoint, data, hf, log, mesh, optim, records, text
from align_jax.step import Compute, TrainState, make_scorer, make_step, objective

KINDS = {  # data.kind -> the records in the file, and what of them is trained on
    "examples": (records.Example, lambda record: record),
    "pairs": (records.Pair, lambda record: record),
    "chosen": (records.Pair, lambda r: records.Example(id=r.id, prompt=r.prompt, completion=r.chosen)),
}
FREE = ("run", "start", "data.path", "mesh", "ckpt")  # settings that change no number: the content of files is bound
FOR_ROWS = ("rows_per_batch", "epochs")  # keys of the data section that say how the rows are served
GAP = {"float32": 1e-3, "bfloat16": 0.1}  # nats by the square root of the tokens: rounding adds up as a random walk


def train(c: Mapping, *, params=None) -> Path:
    """Run the training that a config of configs/ describes; return the exported checkpoint's folder.

    `params` replaces the weights of `c.start` (a model made on the spot), whose config and tokenizer are used.
    """
    # -- run folder ------------------------------------------------------------------------------------------
    c = json.loads(json.dumps(c if isinstance(c, dict) else c.to_dict()))
    log.check_set(c)
    check(c)
    cfg = hf.config(c["start"])
    R, goal, compute = c["data"]["rows_per_batch"], objective(**c["objective"]), Compute(**c["compute"])
    inputs = {"weights": hf.fingerprint(c["start"]), "data": records.fingerprint(Path(c["data"]["path"]))}
    run = log.claim(c["run"], c | {"inputs": inputs}, free=FREE)
    exported = run / "hf"
    if exported.is_dir():
        log.say(f"{run}: already finished")
        return exported

    with jax.set_mesh(mesh.make(**c["mesh"])):
        # -- data --------------------------------------------------------------------------------------------
        check_rows(R, compute.accumulate)
        tokenizer = text.load(c["start"])
        encoded, dropped = load_data(tokenizer, **{k: v for k, v in c["data"].items() if k not in FOR_ROWS})
        if not encoded:
            raise ValueError(f"{c['data']['path']}: no example is left to train on, dropped {dict(dropped)}; at most "
                             f"data.row_length={c['data']['row_length']} tokens an example, both sides of a pair")
        longest = max(len(completion) for example in encoded for completion in example.completions)
        if longest > cfg.max_length:
            raise ValueError(f"data.row_length: an example has {longest} tokens, {c['start']} has {cfg.max_length} "
                             "positions; expected row_length (of pairs: twice as much) to be no more")
        rows = data.Rows(encoded, row_length=c["data"]["row_length"], rows_per_batch=R, seed=c["seed"])
        if rows.C != goal.completions:
            raise ValueError(f"objective {c['objective']['name']!r} needs {goal.completions} completion(s) an example"
                             f", data.kind {c['data']['kind']!r} gives {rows.C}")
        steps = c["steps"] if c["steps"] > 0 else c["data"]["epochs"] * len(rows) // R
        batches = data.iterator(rows, rows_per_batch=R, seed=c["seed"], epochs=-(-steps * R // len(rows)),
                                host=jax.process_index(), num_hosts=jax.process_count())

        # -- weights and optimiser ---------------------------------------------------------------------------
        if params is None:
            _, params = hf.load(c["start"], dtype="float32")
        tx = optim.adamw(steps=steps, **c["optim"])
        if jax.process_index() == 0:  # behind every check: a run folder with a second file is a run that was begun
            log.write_json(run / "data.json", {"examples": len(encoded), "dropped": dict(dropped)})
        if goal.completions == 2:
            settings = [c["data"] | {"path": ""}, c["compute"]]
            bound_to = inputs | {"tokenizer": text.fingerprint(tokenizer), "settings": settings}
            rows.ref_logps = reference(run / "reference.json", cfg, params, rows, bound_to, R, compute=compute)
        state = TrainState(jax.device_put(np.int32(0), mesh.sharding()), params, jax.jit(tx.init)(params))
        del params  # the first step donates them

        # -- resume ------------------------------------------------------------------------------------------
        with checkpoint.Checkpoints(run / "checkpoints", keep=c["ckpt"]["keep"]) as ckpts:
            first, state, place = ckpts.restore(state) or (0, state, None)
            if place:
                batches.set_state(place)
                log.say(f"{run}: continuing after step {first}")
            log.say(f"{run}: {c['objective']['name']} on {len(encoded)} examples, {steps} steps of {R} rows x "
                    f"{rows.row_length} tokens ({rows.fill:.0%} filled, up to {rows.P} examples a row), dropped "
                    f"{dict(dropped) or 'nothing'}; {cfg.num_params / 1e6:,.1f}M parameters on "
                    f"{jax.device_count()} device(s)")

            # -- loop ----------------------------------------------------------------------------------------
            step = make_step(cfg, goal, tx, compute=compute)
            metrics, rates = log.Metrics(run, first_step=first, steps=steps), optim.rates(steps, c["optim"])
            pending = None
            for number in range(first + 1, steps + 1):
                state, values = step(state, to_devices(next(batches)))
                if pending:
                    record(metrics, *pending, goal, compute)  # one step late: the device never waits for the log
                pending = (number, values | {"learning_rate": rates[number - 1], "epoch": number * R / len(rows)})
                if number % c["ckpt"]["every"] == 0 or number == steps:
                    # Before the save: no checkpoint of a diverged step, none whose metrics a kill could lose.
                    record(metrics, *pending, goal, compute)
                    pending = None
                    ckpts.save(number, state, batches.get_state())
            metrics.close()

        # -- export ------------------------------------------------------------------------------------------
        hf.export(cfg, state.params, exported, like=c["start"], dtype=c["ckpt"]["export"])
    log.say(f"{run}: wrote {exported} ({c['ckpt']['export']}) after {steps} steps, {metrics.tokens:,.0f} tokens; "
            f"{step._cache_size()} compilation(s); {sum(dropped.values())} completions cut or examples dropped")
    return exported


def check(c: Mapping) -> None:
    """Refuse what the config alone shows to be wrong, all of it at once and before any work."""
    wrong = []
    for make in (lambda: objective(**c["objective"]), lambda: Compute(**c["compute"]),
                 lambda: optim.adamw(steps=1, **c["optim"])):
        try:
            make()
        except (TypeError, ValueError) as error:
            wrong.append(str(error))
    one_of = {"data.kind": (c["data"]["kind"], KINDS), "ckpt.export": (c["ckpt"]["export"], hf.DTYPES.values())}
    wrong += [f"{key}: got {value!r}, available are {sorted(known)}" for key, (value, known) in one_of.items()
              if value not in known]
    least = {"steps": (c["steps"], 0), "data.row_length": (c["data"]["row_length"], 2),
             "data.rows_per_batch": (c["data"]["rows_per_batch"], 1), "data.epochs": (c["data"]["epochs"], 1),
             "ckpt.every": (c["ckpt"]["every"], 1), "ckpt.keep": (c["ckpt"]["keep"], 1)}
    wrong += [f"{key}: got {value}, expected {lowest} or more" for key, (value, lowest) in least.items()
              if value < lowest]
    if wrong:
        raise ValueError("config: " + "; ".join(wrong))


def check_rows(rows_per_batch: int, accumulate: int) -> None:
    """Every host feeds row shards of its own, and every micro-batch takes rows from every device."""
    shards, hosts = mesh.num_row_shards(), jax.process_count()
    if shards % hosts:
        raise ValueError(f"mesh: data x fsdp = {shards} does not divide over {hosts} hosts; the tensor axis has to "
                         "stay within a host")
    if rows_per_batch < 1 or rows_per_batch % (shards * accumulate):
        raise ValueError(f"data.rows_per_batch: got {rows_per_batch}, expected a multiple of {shards * accumulate} = "
                         f"mesh.data x mesh.fsdp ({shards}) x compute.accumulate ({accumulate})")


def load_data(tokenizer, *, path: str, kind: str, row_length: int, too_long: str = "drop", bad_lines: str = "stop"):
    """Read and tokenise a file of records; return the encoded examples and what was dropped, by reason."""
    if kind not in KINDS:
        raise ValueError(f"data.kind: got {kind!r}, available are {sorted(KINDS)}")
    schema, select = KINDS[kind]
    found, bad = records.read_counted(path, schema, bad_lines=bad_lines)
    encoded, dropped = data.encode([select(r) for r in found], tokenizer, max_length=row_length, too_long=too_long,
                                   progress=lambda items: log.progress(items, what="tokenise", unit="rec"))
    return encoded, dropped + bad


def reference(path: Path, cfg, params, rows: data.Rows, bound_to: dict, R: int, *, compute: Compute) -> dict:
    """Log-probs of every completion under the starting weights, from `path` if it was made from the same."""
    bound_to = json.loads(json.dumps(bound_to))
    if path.is_file() and (saved := json.loads(path.read_text()))["bound_to"] == bound_to:
        return saved["logps"]
    score, logps = make_scorer(cfg, compute=compute), {}
    here = R // jax.process_count()
    for at in log.progress(range(0, len(rows), R), what="reference", unit="batch"):
        mine = np.arange(at + jax.process_index() * here, at + (jax.process_index() + 1) * here)
        # The rows come back in the mesh's order, which on a TPU need not be that of the hosts.
        found = multihost_utils.process_allgather(
            (to_devices({"row": mine})["row"], score(params, to_devices(rows.batch(mine)))), tiled=True)
        for row, values in zip(*found, strict=True):
            logps |= {rows.encoded[i].id: value.tolist() for i, value in zip(rows.packed[row], values, strict=False)}
    if jax.process_index() == 0:
        log.write_json(path, {"bound_to": bound_to, "logps": logps})
    return logps


def to_devices(batch: dict[str, np.ndarray]) -> dict:
    """Place this host's rows as its part of the global batch."""
    return {name: jax.make_array_from_process_local_data(mesh.sharding("rows", *(None,) * (value.ndim - 1)), value)
            for name, value in batch.items()}


def record(metrics: log.Metrics, number: int, values: dict, goal, compute: Compute) -> None:
    """Bring one step's metrics to the host, check them, and write them."""
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    gap = values.pop("ref_gap")
    log.check_finite(number, values)
    if number == 1 and goal.completions == 2 and gap > GAP[compute.dtype]:
        path = metrics.path.with_name("reference.json")
        raise ValueError(f"step 1: policy and reference differ by {gap:.3g} nats a root of tokens before any update, "
                         f"expected at most {GAP[compute.dtype]} by rounding: {path} is not of these weights and data; "
                         "delete it to have it made again")
    metrics.write(number, values)


def main(c: Mapping) -> None:
    mesh.start_hosts()
    train(c)


if __name__ == "__main__":
    log.command(main)
