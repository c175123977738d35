"""Does it fit? The train step, compiled for an accelerator that is not here, and what it would take there.

    python -m align_jax.train --config=configs/dpo.py --config.start=Meta-Llama-3-8B --fit=v5e-64

Needs no TPU, no weights and no data: the public libtpu package is the compiler, and the step is lowered on shapes.
`start` is a checkpoint's folder, of which config.json is read, or one of SHAPES. Ends with status 0 if it fits, else 1.
What is printed, and how far it can be trusted:

- Memory of a device is the compiler's, which refuses what does not fit, here as on the TPU. Weights, optimizer state
  and batch are told from the rest by shapes and shardings; gradients cannot be: most are kept in bf16 for a while.
- FLOPs are from the shapes: 6 a weight and token, attention under the diagonal only, nothing again for remat, as if
  every row were one example and all its tokens were scored.
- Seconds are the cycles that the compiler expects of its instructions, loops multiplied, at the chip's clock. It knows
  none of a Pallas kernel (attention's FLOPs are taken at the chip's peak), and what waiting for other chips or for the
  host's memory costs is not in it. `cost_analysis()` has nothing better: it counts the body of a loop once, and its
  "optimal_seconds" loses a second for every instruction whose time it does not know.

For a GPU jax compiles only where there is one. GPUS get an estimate: the memory of the step compiled for TPU v5p chips.
"""

import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from align_jax import data, hf, lora, mesh, model, optim
from align_jax.model import ModelConfig, Rope
from align_jax.step import Compute, TrainState, make_step, objective

GIB = 2**30
SHAPES = {  # the models of the study, base and instruct alike
    "deepseek-coder-1.3b": ModelConfig(
        L=24, D=2048, N=16, K=16, H=128, F=5504, V=32256, norm_eps=1e-6, max_length=16384,
        rope=Rope(theta=100_000, scaling="linear", factor=4.0)),
    "deepseek-coder-7b": ModelConfig(  # v1.5
        L=30, D=4096, N=32, K=32, H=128, F=11008, V=102400, norm_eps=1e-6, max_length=4096, rope=Rope(theta=10_000)),
    "CodeLlama-7b": ModelConfig(
        L=32, D=4096, N=32, K=32, H=128, F=11008, V=32016, max_length=16384, rope=Rope(theta=1_000_000)),
    "Meta-Llama-3-8B": ModelConfig(
        L=32, D=4096, N=32, K=8, H=128, F=14336, V=128256, max_length=8192, rope=Rope(theta=500_000)),
    "Qwen2.5-Coder-7B": ModelConfig(
        L=28, D=3584, N=28, K=4, H=128, F=18944, V=152064, norm_eps=1e-6, max_length=32768, qkv_bias=True,
        rope=Rope(theta=1_000_000)),
}


# --- accelerators -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """What jax calls a chip (a pattern), and what it has: GiB for a program, dense bf16 FLOP/s, bytes/s, and Hz."""

    kind: str
    memory: float
    flops: float
    bandwidth: float
    clock: float = 0.0


CHIPS = {  # memory: what libtpu says is available
    "v5e": Chip("TPU v5( lite|e)", 15.75, 197e12, 819e9, 1.5e9),
    "v5p": Chip("TPU v5p?", 95.73, 459e12, 2765e9, 1.75e9),
    "v6e": Chip("TPU v6( lite|e)", 31.24, 918e12, 1640e9, 1.75e9),
}
FLAT, CUBES = "1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16", "2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16"
SLICES = {  # as Cloud spells a kind: the chip, the slices that are made of it, and what the number counts per chip
    "v5e": ("v5e", FLAT, 1), "v5litepod": ("v5e", FLAT, 1), "v5p": ("v5p", CUBES, 2), "v6e": ("v6e", FLAT, 1),
}
TPUS = {f"{name}-{count * math.prod(map(int, layout.split('x')))}": (chip, layout)
        for name, (chip, layouts, count) in SLICES.items() for layout in layouts.split()}
GPUS = {  # memory: 0.9 of the card's; the launchers let jax have 0.92
    "l4-24gb": Chip("NVIDIA L4", 20.2, 121e12, 300e9),
    "rtx4090-24gb": Chip("NVIDIA GeForce RTX 4090", 21.6, 165e12, 1008e9),
    "a100-40gb": Chip("NVIDIA A100.*40GB", 36.0, 312e12, 1555e9),
    "a100-80gb": Chip("NVIDIA A100.*80GB.*", 72.0, 312e12, 2.0e12),
    "h100-80gb": Chip("NVIDIA H100 80GB HBM3", 71.7, 989e12, 3.35e12),
    "h200-141gb": Chip("NVIDIA H200", 125.8, 989e12, 4.8e12),
}
# libtpu looks for a TPU around it, tells at length that there is none, and would be alone on the machine.
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_WORKER_ID": "0", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def accelerator(name: str) -> tuple[Chip, list[jax.Device]]:
    """The chip of an accelerator, and its devices, which can be compiled for and nothing else.

    "v5e-64" is a TPU slice as Cloud spells it, "2xv5e-64" are two of them; "h100-80gb" and "8xh100-80gb" are GPUs.
    """
    times, one = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", name).groups()
    count = int(times or 1)
    if one in GPUS and count in (1, 2, 4, 8, 16):  # a power of two has a slice of as many chips
        return GPUS[one], _topology("v5p", {1: "1x1x1", 2: "1x2x1"}.get(count) or TPUS[f"v5p-{2 * count}"][1])
    if one not in TPUS:
        raise ValueError(f"fit: got {name!r}, available are {', '.join(TPUS)}, also as 2x{next(iter(TPUS))}; and "
                         f"as estimates {', '.join(GPUS)}, of which 2x, 4x, 8x and 16x")
    chip, layout = TPUS[one]
    return CHIPS[chip], _topology(chip, layout, **({"num_slices": count} if count > 1 else {}))


def of_kind(kind: str) -> Chip:
    """The chip that jax calls so; of one that stands in no table every number is nan."""
    known = (chip for chip in (CHIPS | GPUS).values() if re.fullmatch(chip.kind, kind))
    return next(known, Chip(kind, math.nan, math.nan, math.nan))


def _topology(chip: str, layout: str, **settings) -> list[jax.Device]:
    os.environ.update(ALONE | os.environ)
    host = [min(int(size), 2) for size in layout.split("x")[:2]] + [1]  # chips of a host, along x, y, z
    try:
        return topologies.get_topology_desc(f"{chip}:{layout}", platform="tpu", chips_per_host_bounds=host,
                                            **settings).devices
    except RuntimeError as error:
        raise ValueError(f"fit: libtpu, the compiler, does not start: {error}; the extra tpu installs it") from error


# --- the step -----------------------------------------------------------------------------------------


def lower(c: Mapping, cfg: ModelConfig) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """The step of a training's config on the mesh that is set, not compiled, and the bytes that shapes tell."""
    mesh.check_rows(c["data"]["rows_per_batch"], c["compute"]["accumulate"])
    problems = hf.mesh_problems(cfg)
    if problems:
        raise ValueError(hf.several(f"{c['start']}: cannot be split", problems))
    goal, tx = objective(**c["objective"]), optim.adamw(steps=1, **c["optim"])
    params, frozen = lora.split(_placed(model.abstract(cfg)))
    frozen = jax.tree.map(lambda leaf: leaf.update(dtype=c["lora"]["base_dtype"]), frozen)
    opt = _placed(jax.jit(tx.init).lower(params).out_info)
    state = TrainState(jax.ShapeDtypeStruct((), np.int32, sharding=mesh.sharding()), params, opt)
    one = data.row([], T=c["data"]["row_length"], P=64, C=goal.completions)  # P: the most that data.py packs
    batch = {name: jax.ShapeDtypeStruct((c["data"]["rows_per_batch"], *value.shape), value.dtype,
                                        sharding=mesh.sharding("rows", *(None,) * value.ndim))
             for name, value in one.items()}
    lowered = make_step(cfg, goal, tx, compute=Compute(**c["compute"])).lower(state, batch, frozen)
    return lowered, {"weights": num_bytes((params, frozen)), "optimizer state": num_bytes(opt),
                     "batch": num_bytes(batch)}


def _placed(tree):
    """The same shapes on the mesh that is set: some know an abstract one, and scalars none."""
    def place(leaf):
        spec, memory = (leaf.sharding.spec, leaf.sharding.memory_kind) if leaf.sharding else (PartitionSpec(), None)
        sharding = NamedSharding(jax.sharding.get_mesh(), spec, memory_kind=memory)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree)


def num_bytes(tree) -> int:
    """Bytes that arrays of these shapes and shardings take of every device's own memory."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != "pinned_host")


def num_flops(cfg: ModelConfig, *, tokens: int, scored: int, seen: float) -> tuple[float, float]:
    """FLOPs of a train step, in its matrices and in attention.

    Forward, as much again backward, and as much again for the gradient of what is trained. Of the tokens those that
    are scored pass through the head; `seen` counts, over all of them, the tokens that one attends to.
    """
    size = {axes: math.prod(getattr(cfg, axis) for axis in axes) for axes in ("D", "F", "NH", "KH")}
    matrices = tokens * cfg.L * sum(size[inner] * size[outer] for inner, outer in model.MATRICES.values())
    matrices += scored * cfg.V * cfg.D
    adapters = tokens * cfg.L * cfg.r * sum(size[inner] + size[outer] for inner, outer in model.MATRICES.values())
    return 2.0 * (2 * matrices + 3 * adapters if cfg.r else 3 * matrices), 12.0 * cfg.L * cfg.N * cfg.H * seen


def num_cycles(hlo: str, trips: int) -> int:
    """Cycles that libtpu expects, from the text of a compiled module.

    `trips` is how often loops run whose end depends on the data.
    """
    blocks = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}$", hlo, re.M | re.S))

    @functools.cache
    def of(name: str) -> int:
        found = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', blocks[name])))
        for condition, body in re.findall(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", blocks[name]):
            ends = re.search(r"constant\((\d+)\)", blocks[condition])
            found += of(body) * (int(ends[1]) if ends else trips)
        return found

    return of(re.search(r"^ENTRY %?([\w.-]+)", hlo, re.M)[1])


# --- what it takes ------------------------------------------------------------------------------------


REST = "gradients, activations, the program"  # what shapes do not tell


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a step takes: bytes of every device, and seconds."""

    mesh: dict[str, int]
    parts: dict[str, float]  # bytes of the device's memory, by kind
    capacity: float
    host: float  # bytes of the host's memory, a device
    flops: float  # of the step, on all devices
    at_peak: float  # seconds that they take at the peak of the chips
    seconds: float  # that the compiler expects; 0 where it does not say: of a step that it refuses, and for a GPU
    compiling: float  # seconds, here
    is_estimate: bool = False  # by another chip's compiler

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def measure(c: Mapping, name: str, tell: Callable[[str], None] = lambda line: None) -> Fit:
    """Compile the step of a training's config for the accelerator of this name; `tell` when nothing was refused."""
    chip, devices = accelerator(name)
    is_estimate = chip in GPUS.values()
    cfg = lora.config(shape(c["start"]), rank=c["lora"]["rank"], alpha=c["lora"]["alpha"])
    chunk, accumulate = c["compute"]["chunk"], c["compute"]["accumulate"]
    rows, T = c["data"]["rows_per_batch"], c["data"]["row_length"]
    made = mesh.make(**c["mesh"], devices=devices)
    with jax.set_mesh(made):
        began = time.perf_counter()
        lowered, parts = lower(c if chip.clock else c | {"compute": c["compute"] | {"attention": "auto"}}, cfg)
        compiler = "as many TPU v5p chips, an estimate for " if is_estimate else ""
        tell(f"{c['start']}, {c['objective']['name']}: compiling the step for {compiler}{name}")
        total, host, hlo = _compile(lowered)
        compiling = time.perf_counter() - began
        chunks = math.ceil(rows * T / mesh.num_row_shards() / accumulate / chunk)
    parts[REST] = total - sum(parts.values())
    flops = num_flops(cfg, tokens=rows * T, scored=rows * T, seen=rows * T * T / 2)
    matrices, attention = (each / len(devices) / chip.flops for each in flops)
    seconds = 0.0
    if hlo and chip.clock:
        seconds = num_cycles(hlo, chunks) / chip.clock + (attention if "tpu_custom_call" in hlo else 0.0)
    return Fit(dict(made.shape), parts, chip.memory * GIB, host, sum(flops), matrices + attention, seconds, compiling,
               is_estimate)


def shape(start: str) -> ModelConfig:
    """The model of a checkpoint's folder, or one of SHAPES."""
    if start not in SHAPES and not Path(start, "config.json").is_file():
        raise ValueError(f"start: got {start!r}, expected a checkpoint's folder or one of {', '.join(SHAPES)}")
    return SHAPES.get(start) or hf.config(start)


def _compile(lowered: jax.stages.Lowered) -> tuple[float, float, str]:
    """Bytes of a device's and of its host's memory, and the module; "" where the compiler refuses it for its size."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
        if not needed:
            raise
        return float(needed[1]) * 1024 ** " KMGT".index(needed[2]), 0.0, ""
    try:
        hlo = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # of a libtpu newer than this jax is made for
        hlo = ""
    used = compiled.memory_analysis()
    device = (used.argument_size_in_bytes + used.temp_size_in_bytes + used.generated_code_size_in_bytes
              + used.output_size_in_bytes - used.alias_size_in_bytes)
    return device, used.host_argument_size_in_bytes + used.host_temp_size_in_bytes, hlo


# --- in words -----------------------------------------------------------------------------------------


def main(c: Mapping, name: str) -> bool:
    """Print what the step of a training's config takes of an accelerator; return whether it fits."""
    jax.config.update("jax_platforms", "cpu")  # what else is here is not needed
    fit = measure(c, name, tell=partial(print, flush=True))
    print(report(fit))
    verdict = f"fits {name}" if fit.fits else f"does not fit {name}; what may help: {'; '.join(hints(c, fit))}"
    print(f"by this estimate it {verdict}" if fit.is_estimate else verdict)
    return fit.fits


def report(fit: Fit) -> str:
    """A fit as a table."""
    size = " x ".join(f"{axis} {size}" for axis, size in fit.mesh.items())
    lines = [f"GiB a device, mesh {size}"] + [f"{value / GIB:9.2f}  {kind}" for kind, value in fit.parts.items()]
    lines += [f"{fit.total / GIB:9.2f}  in all, {fit.total / fit.capacity:.0%} of {fit.capacity / GIB:.2f}"]
    lines += [f"{fit.host / GIB:9.2f}  of the host's memory"] if fit.host else []
    lines += ["seconds a step", f"{fit.at_peak:9.3f}  at the peak of all chips, {fit.flops:.3g} FLOPs"]
    lines += [f"{fit.seconds:9.3f}  computing, as the compiler expects it, {fit.at_peak / fit.seconds:.0%} of peak"
              if fit.seconds else "        –  computing: the compiler says no time for a GPU, nor of what it refuses"]
    return "\n".join([*lines, f"compiled in {fit.compiling:.0f} s"])


def hints(c: Mapping, fit: Fit) -> list[str]:
    """What would make the step of a config smaller and is not in use: for its largest part first, cheapest first."""
    compute, is_lora = c["compute"], c["lora"]["rank"] > 0
    row_shards = fit.mesh["data"] * fit.mesh["fsdp"]
    remat = {"none": "mixed", "dots": "mixed", "mixed": "full", "full": "offload"}.get(compute["remat"])
    split = ("less of mesh.data (one a slice, at least) and more of mesh.fsdp", fit.mesh["data"] > 1)
    adapters = ("lora.rank=16", not is_lora)
    known = {
        "weights": [split, ("lora.base_dtype=bfloat16", is_lora and c["lora"]["base_dtype"] == "float32"), adapters],
        "optimizer state": [split, ("optim.offload=True", not c["optim"]["offload"]), adapters],
        REST: [("compute.dtype=bfloat16", compute["dtype"] == "float32"),
               ("more of compute.accumulate", c["data"]["rows_per_batch"] > row_shards * compute["accumulate"]),
               ("compute.keep_logits=False", compute["keep_logits"]),
               ("compute.unroll=False", compute["unroll"]), (f"compute.remat={remat}", remat),
               split, adapters, ("a shorter data.row_length", True)],
    }
    large = sorted((part for part in known if fit.parts[part] > fit.total / 10), key=fit.parts.get, reverse=True)
    return [*dict.fromkeys(hint for part in large for hint, is_open in known[part] if is_open), "more chips"]
