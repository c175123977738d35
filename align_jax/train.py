"""The trainer, read from top to bottom: SFT, DPO and BoNBoN are one loop with another loss.

    python -m align_jax.train --config=configs/dpo.py --config.start=PATH --config.data.path=pairs.jsonl

Reads a Hugging Face checkpoint and a JSONL file of examples or pairs. Writes a run folder with metrics, orbax
checkpoints (a killed run continues from the newest; SIGTERM saves one first) and, at the end, `hf/`, a checkpoint
that transformers loads.
"""

import contextlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from align_jax import checkpoint, data, hf, log, lora, mesh, optim, records, text
from align_jax.step import Compute, TrainState, make_scorer, make_step, objective

KINDS = {  # data.kind -> the records in the file, what of them is trained on, and its completions
    "examples": (records.Example, lambda record: record, 1),
    "pairs": (records.Pair, lambda record: record, 2),
    "chosen": (records.Pair, lambda r: records.Example(id=r.id, prompt=r.prompt, completion=r.chosen), 1),
}
FREE = ("run", "start", "data.path", "mesh", "ckpt", "optim.offload",  # change no number but by rounding; of files
        *(f"compute.{name}" for name in (  # content is bound
            "remat", "unroll", "attention", "chunk", "keep_logits", "accumulate")))
FOR_ROWS = ("rows_per_batch", "epochs")  # keys of the data section that say how the rows are served
GAP = {"float32": 1e-3, "bfloat16": 0.1}  # nats by the square root of the tokens: rounding adds up as a random walk


def train(c: Mapping, *, params=None) -> Path:
    """Run the training that a config of configs/ describes; return the exported checkpoint's folder.

    `params` replaces the weights of `c.start` (a model made on the spot), whose config and tokenizer are used. With
    `lora.rank` they are frozen, and the policy is they and adapters; the reference is they alone, the same arrays.
    """
    # -- run folder ------------------------------------------------------------------------------------------
    began = time.perf_counter()
    c = json.loads(json.dumps(c if isinstance(c, dict) else c.to_dict()))
    log.check_set(c)
    check(c)
    if not Path(c["data"]["path"]).is_file():
        raise ValueError(f"data.path: no such file: {c['data']['path']}; expected JSONL, a record a line")
    cfg = hf.config(c["start"])
    R, goal, compute = c["data"]["rows_per_batch"], objective(**c["objective"]), Compute(**c["compute"])
    inputs = {"weights": hf.fingerprint(c["start"]), "data": records.fingerprint(Path(c["data"]["path"]))}
    mesh.check_same("config, weights or data", [c, inputs])
    run = log.claim(c["run"], c | {"inputs": inputs}, free=FREE, scratch=("examples", "lock"))
    exported = run / "hf"
    if exported.is_dir():
        log.say(f"{run}: already finished")
        return exported

    with one_writer(run), jax.set_mesh(mesh.make(**c["mesh"])):
        # -- data --------------------------------------------------------------------------------------------
        mesh.check_rows(R, compute.accumulate)
        tokenizer = text.load(c["start"])
        settings = {k: v for k, v in c["data"].items() if k not in FOR_ROWS}
        bound_to = inputs | {"tokenizer": text.fingerprint(tokenizer), "settings": settings | {"path": ""}}
        examples, dropped = load_data(run / "examples" / records.fingerprint(bound_to), tokenizer, **settings)
        check_examples(c, cfg, goal, examples, dropped)
        shape, epochs = {"row_length": c["data"]["row_length"], "rows_per_batch": R}, c["data"]["epochs"]
        planned, fill = data.plan(data.Packing(examples.lengths, seed=c["seed"], epochs=epochs, **shape))
        steps = c["steps"] or planned
        packing = data.Packing(examples.lengths, seed=c["seed"], epochs=None if c["steps"] else epochs, **shape)

        # -- weights and optimiser ---------------------------------------------------------------------------
        if params is None:
            _, params = hf.load(c["start"], dtype=c["lora"]["base_dtype"] if c["lora"]["rank"] else "float32")
        tx = optim.adamw(steps=steps, **c["optim"])
        if jax.process_index() == 0:  # behind every check: a run folder with a second file is a run that was begun
            log.write_json(run / "data.json", {"examples": len(examples), "dropped": dict(dropped)})
        ref_logps = None
        if goal.completions == 2:
            ref_logps = reference(run / "reference.jsonl", make_scorer(cfg, compute=compute), params, examples,
                                  bound_to | {"dtype": compute.dtype}, **shape)
        adapted = lora.config(cfg, rank=c["lora"]["rank"], alpha=c["lora"]["alpha"])
        params, frozen = lora.split(lora.add(adapted, params, seed=c["seed"]))
        state = TrainState(jax.device_put(np.int32(0), mesh.sharding()), params, jax.jit(tx.init)(params))
        del params  # the first step donates them

        # -- resume ------------------------------------------------------------------------------------------
        saved = checkpoint.Checkpoints(run / "checkpoints", keep=c["ckpt"]["keep"], gives_up=log.has_lost_a_host)
        with saved as ckpts, log.Termination() as ended, \
                contextlib.closing(batches_of(examples, packing, ref_logps)) as batches:
            first, state, place = ckpts.restore(state) or (0, state, None)
            if place:
                batches.set_state(place)
                log.say(f"{run}: continuing after step {first}")
            log.say(f"{run}: {c['objective']['name']} on {len(examples)} examples, {steps} steps of {R} rows x "
                    f"{packing.T} tokens ({fill:.0%} filled), dropped {dict(dropped) or 'nothing'}; "
                    f"{cfg.num_params:,} parameters on {jax.device_count()} device(s), trained "
                    f"{sum(leaf.size for leaf in jax.tree.leaves(state.params)):,}")

            # -- loop ----------------------------------------------------------------------------------------
            step = make_step(adapted, goal, tx, compute=compute)
            metrics, rates = log.Metrics(run, first_step=first, steps=steps), optim.rates(steps, c["optim"])
            pending, number = None, first  # all steps may be done already: a run that was killed in its export
            for number in range(first + 1, steps + 1):
                state, values = step(state, to_devices(next(batches)), frozen)
                if number == first + 1:
                    jax.block_until_ready(values)
                    log.say(f"{run}: first step {time.perf_counter() - began:.0f} s after the start")
                if pending:
                    record(metrics, *pending, goal, compute)  # one step late: the device never waits for the log
                pending = (number, values | {"learning_rate": rates[number - 1], "epoch": number * epochs / planned})
                is_last = number == steps or ended.at(number)
                if number % c["ckpt"]["every"] == 0 or is_last:
                    # Before the save: no checkpoint of a diverged step, none whose metrics a kill could lose.
                    record(metrics, *pending, goal, compute)
                    pending = None
                    ckpts.save(number, state, batches.get_state())
                if is_last:
                    break
            metrics.close()
        if number < steps:
            log.say(f"{run}: terminated, saved step {number} of {steps}; the same command continues")
            raise SystemExit(log.TERMINATED)

        # -- export ------------------------------------------------------------------------------------------
        params = lora.merge(adapted, lora.join(state.params, frozen), dtype=c["ckpt"]["export"])
        hf.export(cfg, params, exported, like=c["start"], dtype=c["ckpt"]["export"])
    if jax.process_index() == 0:
        shutil.rmtree(run / "examples")
    log.say(f"{run}: wrote {exported} ({c['ckpt']['export']}) after {steps} steps, {metrics.tokens:,.0f} tokens; "
            f"{step._cache_size()} compilation(s); {sum(dropped.values())} completions cut or examples dropped")
    return exported


def one_writer(run: Path):
    """Hold the run folder: two trainings in it would destroy each other's checkpoints."""
    return records.hold((run / "lock").open("a")) if jax.process_index() == 0 else contextlib.nullcontext()


def check(c: Mapping) -> None:
    """Refuse what the config alone shows to be wrong, all of it at once and before any work."""
    wrong = []
    for make in (lambda: objective(**c["objective"]), lambda: Compute(**c["compute"]),
                 lambda: optim.adamw(steps=1, **c["optim"])):
        try:
            make()
        except (TypeError, ValueError) as error:
            wrong.append(str(error))
    one_of = {"data.kind": (c["data"]["kind"], KINDS), "ckpt.export": (c["ckpt"]["export"], hf.DTYPES.values()),
              "lora.base_dtype": (c["lora"]["base_dtype"], hf.DTYPES.values())}
    wrong += [f"{key}: got {value!r}, available are {sorted(known)}" for key, (value, known) in one_of.items()
              if value not in known]
    least = {"steps": (c["steps"], 0), "data.row_length": (c["data"]["row_length"], 2),
             "data.rows_per_batch": (c["data"]["rows_per_batch"], 1), "data.epochs": (c["data"]["epochs"], 1),
             "ckpt.every": (c["ckpt"]["every"], 1), "ckpt.keep": (c["ckpt"]["keep"], 1),
             "lora.rank": (c["lora"]["rank"], 0)}
    wrong += [f"lora.alpha: got {c['lora']['alpha']}, expected a number above 0"] * (not c["lora"]["alpha"] > 0)
    wrong += [f"{key}: got {value}, expected {lowest} or more" for key, (value, lowest) in least.items()
              if value < lowest]
    if wrong:
        raise ValueError("config: " + "; ".join(wrong))


def check_examples(c: Mapping, cfg, goal, examples: data.Stored, dropped: Counter) -> None:
    """Refuse data that the objective, or the model's positions, do not fit."""
    if examples.C != goal.completions:
        raise ValueError(f"objective {c['objective']['name']!r} needs {goal.completions} completion(s) an example, "
                         f"data.kind {c['data']['kind']!r} gives {examples.C}")
    if not len(examples):
        raise ValueError(f"{c['data']['path']}: no example is left to train on, dropped {dict(dropped)}; at most "
                         f"data.row_length={c['data']['row_length']} tokens an example, both sides of a pair")
    if max(examples.longest) > cfg.max_length:
        raise ValueError(f"data.row_length: an example has {max(examples.longest)} tokens, {c['start']} has "
                         f"{cfg.max_length} positions; expected row_length to be no more")
    longest, row_length = int(max(examples.lengths)), c["data"]["row_length"]
    if row_length > max(cfg.max_length, 8 * longest):  # a row of many examples is right, and a typo is slow
        log.say(f"warning: data.row_length={row_length} is {row_length // longest} times the longest example, "
                f"{longest} tokens: attention and memory are those of the row, padding included")


def load_data(folder: Path, tokenizer, *, path: str, kind: str, row_length: int, too_long: str = "drop",
              bad_lines: str = "stop") -> tuple[data.Stored, Counter]:
    """Tokenise a file of records into `folder`, every host its share of the lines, unless that is done.

    Returns the examples, and what was cut or dropped, by reason. What is wrong in one host's share is raised on all.
    """
    if kind not in KINDS:
        raise ValueError(f"data.kind: got {kind!r}, available are {sorted(KINDS)}")
    schema, select, completions = KINDS[kind]
    book, host, hosts = folder / "book.json", jax.process_index(), jax.process_count()
    if not book.is_file():
        counts, wrong = Counter(), ""
        found = log.progress(records.stream(path, schema, bad_lines=bad_lines, bad=counts, share=(host, hosts)),
                             total=records.count(path) // hosts, what="tokenise", unit="rec")
        encoded = data.encode_all(((line, select(record)) for line, record in found), tokenizer, dropped=counts,
                                  max_length=row_length, too_long=too_long)
        try:
            data.store(folder / f"{host}.arrow", encoded, completions=completions)
        except ValueError as error:
            wrong = str(error)
        log.write_json(folder / f"{host}.json", {"dropped": counts, "wrong": wrong})
        mesh.wait_for_hosts("examples are tokenised")
        shares = [json.loads((folder / f"{h}.json").read_text()) for h in range(hosts)]
        if any(share["wrong"] for share in shares):
            raise ValueError("\n".join(share["wrong"] for share in shares if share["wrong"]))
        if host == 0:
            total = sum((Counter(share["dropped"]) for share in shares), Counter())
            log.write_json(book, {"hosts": hosts, "dropped": total})
        mesh.wait_for_hosts("examples are counted")
    done = json.loads(book.read_text())
    examples = data.Stored([folder / f"{h}.arrow" for h in range(done["hosts"])])
    if examples.repeated and bad_lines == "stop":
        raise ValueError(f"{path}: {len(examples.repeated)} line(s) repeat the id of another: "
                         f"{', '.join(examples.repeated[:10])}")
    return examples, Counter(done["dropped"]) + Counter({"duplicate id": len(examples.repeated)})


def reference(path: Path, score, params, examples: data.Stored, bound_to: Mapping, *, row_length: int,
              rows_per_batch: int) -> dict[str, list[float]]:
    """Log-probs of every completion under the starting weights, by id; a killed pass goes on where it was.

    `path` takes a line an example; the .json beside it says of which weights, data and settings they are.
    """
    book, bound_to = path.with_suffix(".json"), json.loads(json.dumps(bound_to))
    is_of_these = book.is_file() and json.loads(book.read_text()) == bound_to and path.is_file()
    logps = {r.id: r.logps for r in records.read(path, records.Reference, bad_lines="skip")} if is_of_these else {}
    mesh.wait_for_hosts("what there is of the reference is read")
    left = [i for i, name in enumerate(examples.ids) if name not in logps]
    packing = data.Packing(examples.lengths, only=left, row_length=row_length, rows_per_batch=rows_per_batch)
    here = rows_per_batch // jax.process_count()
    mine = np.arange(here) + jax.process_index() * here
    out = contextlib.nullcontext()
    if jax.process_index() == 0:
        out = records.Appender(path, [records.Reference(id=name, logps=values) for name, values in logps.items()])
        log.write_json(book, bound_to)
    with out, contextlib.closing(batches_of(examples, packing)) as batches, \
            log.progress(total=len(examples), what="reference", unit="example", done=len(logps)) as bar:
        for rows, batch in zip(packing, batches, strict=True):
            # The rows come back in the mesh's order, which on a TPU need not be that of the hosts.
            found = multihost_utils.process_allgather(
                (to_devices({"row": mine})["row"], score(params, to_devices(batch))), tiled=True)
            fresh = {examples.ids[i]: value.tolist() for row, values in zip(*found, strict=True)
                     for i, value in zip(rows[row], values, strict=False)}
            logps |= fresh
            bar.update(len(fresh))
            if jax.process_index() == 0:
                out.write([records.Reference(id=name, logps=values) for name, values in fresh.items()])
    return logps


def batches_of(examples: data.Stored, packing: data.Packing, ref_logps: Mapping | None = None):
    """This host's part of every batch."""
    return data.iterator(examples, packing, C=examples.C, ref_logps=ref_logps, host=jax.process_index(),
                         num_hosts=jax.process_count())


def to_devices(batch: dict[str, np.ndarray]) -> dict:
    """Place this host's rows as its part of the global batch."""
    def place(value):
        whole = (len(value) * jax.process_count(), *value.shape[1:])
        return jax.make_array_from_process_local_data(mesh.sharding("rows", *(None,) * (value.ndim - 1)), value, whole)

    return {name: place(value) for name, value in batch.items()}


def record(metrics: log.Metrics, number: int, values: dict, goal, compute: Compute) -> None:
    """Bring one step's metrics to the host, check them, and write them."""
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    gap = values.pop("ref_gap")
    log.check_finite(number, values)
    if number == 1 and goal.completions == 2 and gap > GAP[compute.dtype]:
        path = metrics.path.with_name("reference.jsonl")
        raise ValueError(f"step 1: policy and reference differ by {gap:.3g} nats a root of tokens before any update, "
                         f"expected at most {GAP[compute.dtype]} by rounding: {path} is not of these weights and data; "
                         "delete it to have it made again")
    metrics.write(number, values)


def main(c: Mapping, accelerator: str | None = None) -> None:
    if accelerator is not None:  # an empty name, of a variable that is not set, trains nothing
        from align_jax import fit  # sets libtpu up as a compiler, which must not meet a training on TPUs

        check(c)
        raise SystemExit(0 if fit.main(c, accelerator) else 1)
    mesh.start_hosts()
    train(c)


if __name__ == "__main__":
    wanted = flags.DEFINE_string("fit", None, "Train nothing: compile the step for an accelerator, e.g. v5e-64, which "
                                 "need not be here, and say what it takes of it.")
    log.command(lambda c: main(c, wanted.value))
