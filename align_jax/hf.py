"""Hugging Face checkpoints to parameters and back; `TABLE` is the whole mapping, read both ways.

    python -m align_jax.hf import SRC DST    # safetensors -> safetensors of our stacked arrays, for `load`
    python -m align_jax.hf export SRC DST    # either of the two -> safetensors for transformers

A field of config.json that is not known here is refused, never ignored. Weights stream: beside the arrays on the
devices a host holds at most two tensors at a time, whatever the model (`tools/bench_convert.py` measures it).
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from align_jax import log, mesh, model, records, tensorfile
from align_jax.hf_config import FIELDS, config, config_json, read_json, several
from align_jax.model import ModelConfig, Params
from align_jax.tensorfile import DTYPES, Stored

TABLE = [  # HF name, our path, HF layout -> ours. {} is the layer: our array has it as a leading L.
    ("model.embed_tokens.weight", "embed", "V D -> V D"),
    ("model.layers.{}.input_layernorm.weight", "layers/attn_norm", "D -> D"),
    ("model.layers.{}.self_attn.q_proj.weight", "layers/q", "(N H) D -> D N H"),
    ("model.layers.{}.self_attn.k_proj.weight", "layers/k", "(K H) D -> D K H"),
    ("model.layers.{}.self_attn.v_proj.weight", "layers/v", "(K H) D -> D K H"),
    ("model.layers.{}.self_attn.q_proj.bias", "layers/q_bias", "(N H) -> N H"),
    ("model.layers.{}.self_attn.k_proj.bias", "layers/k_bias", "(K H) -> K H"),
    ("model.layers.{}.self_attn.v_proj.bias", "layers/v_bias", "(K H) -> K H"),
    ("model.layers.{}.self_attn.o_proj.weight", "layers/o", "D (N H) -> N H D"),
    ("model.layers.{}.self_attn.o_proj.bias", "layers/o_bias", "D -> D"),
    ("model.layers.{}.post_attention_layernorm.weight", "layers/mlp_norm", "D -> D"),
    ("model.layers.{}.mlp.gate_proj.weight", "layers/gate", "F D -> D F"),
    ("model.layers.{}.mlp.up_proj.weight", "layers/up", "F D -> D F"),
    ("model.layers.{}.mlp.down_proj.weight", "layers/down", "D F -> F D"),
    ("model.norm.weight", "final_norm", "D -> D"),
    ("lm_head.weight", "head", "V D -> V D"),
]
BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # follows from config
STACKED = "params.safetensors"  # what `import` writes: the name of a tensor is its path in the params

COMPANIONS = (  # files that go with the weights
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template*", "additional_chat_templates", "generation_config.json",
)


class Tensor(NamedTuple):
    """One HF tensor and its place: a leaf of the params and, where that is stacked, its layer."""

    name: str
    path: str
    layer: int | None
    pattern: str


def tensors(cfg: ModelConfig) -> list[Tensor]:
    """Expand TABLE for this config, layer by layer, so that files are read about in order.

    The embedding is first and the head last: the two largest are never on their way at once.
    """
    absent = {"head": cfg.tied, "layers/o_bias": not cfg.o_bias,
              **{f"layers/{name}_bias": not cfg.qkv_bias for name in "qkv"}}
    rows = [row for row in TABLE if not absent.get(row[1])]
    stacked = [row for row in rows if "{}" in row[0]]
    first, *last = (Tensor(name, path, None, pattern) for name, path, pattern in rows if "{}" not in name)
    return [first, *(Tensor(name.format(layer), path, layer, pattern)
                     for layer in range(cfg.L) for name, path, pattern in stacked), *last]


def hf_shape(cfg: ModelConfig, pattern: str) -> tuple[int, ...]:
    """Shape of the HF tensor; the axes of a pattern are fields of the config."""
    axes = re.findall(r"\(.*?\)|\w", pattern.split(" -> ")[0])
    return tuple(math.prod(getattr(cfg, axis) for axis in axis.strip("()").split()) for axis in axes)


def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of our array."""
    ours = {path: pattern.split(" -> ")[1].split() for _, path, _, pattern in tensors(cfg)}
    return {path: tuple(getattr(cfg, axis) for axis in ["L"] * path.startswith("layers/") + axes)
            for path, axes in ours.items()}


def _rearrange(cfg: ModelConfig, array, pattern: str):
    sizes = {axis: getattr(cfg, axis) for axis in re.findall(r"\w", pattern)}
    return einops.rearrange(array, pattern, **sizes)


# --- in -------------------------------------------------------------------------------------------


def load(folder: str | Path, *, dtype) -> tuple[ModelConfig, Params]:
    """Read a checkpoint, HF's or `import`'s, onto the mesh that is set, as arrays of `dtype`.

    One ValueError names everything that is missing, extra, misshapen, unreadable or indivisible.
    """
    cfg = config(folder)
    stored, leaves, flat = _stored(cfg, Path(folder), mesh_problems(cfg)), _leaves(cfg, dtype), {}
    for tensor, array in _arrays(cfg, stored, tensors(cfg)):
        flat[tensor.path] = _place(flat.get(tensor.path), array, tensor.layer, leaves[tensor.path])
        flat[tensor.path].block_until_ready()  # else the host runs ahead and holds many tensors
    return cfg, traverse_util.unflatten_dict(flat, sep="/")


def mesh_problems(cfg: ModelConfig) -> list[str]:
    """What of a model does not divide over the mesh that is set."""
    shape = jax.sharding.get_mesh().shape
    if not shape:
        return ["no mesh is set; call this within `jax.set_mesh(mesh.make(...))`"]
    split = {"num_key_value_heads": "heads", "num_attention_heads": "heads",
             "intermediate_size": "mlp", "vocab_size": "vocab", "hidden_size": "embed"}
    problems = []
    for name, logical in split.items():
        size, axis = getattr(cfg, FIELDS[name]), mesh.RULES[logical]
        if size % shape[axis]:
            problems.append(f"{name}: {size} is not divisible by the mesh's {axis} axis of {shape[axis]}")
    return problems


def _stored(cfg: ModelConfig, folder: Path, problems: list[str]) -> dict[str, Stored]:
    """Find every tensor of the checkpoint, or raise the problems with all others."""
    stacked = (folder / STACKED).is_file()
    expected = (_shapes(cfg) if stacked else
                {tensor.name: hf_shape(cfg, tensor.pattern) for tensor in tensors(cfg)})
    index = folder / "model.safetensors.index.json"
    weight_map = (read_json(index).get("weight_map", {}) if index.is_file() else
                  dict.fromkeys(expected, STACKED if stacked else "model.safetensors"))
    stored, unreadable = _open(folder, weight_map)
    problems = problems + unreadable + _tensor_problems(expected, stored)
    if problems:
        raise ValueError(several(f"{folder}: cannot be loaded", problems))
    return stored


def _open(folder: Path, weight_map: dict[str, str]) -> tuple[dict[str, Stored | None], list[str]]:
    """Map the files: tensor name -> where it is, None if the file that should hold it is bad."""
    stored, problems = {}, []
    for file in sorted(set(weight_map.values())):
        lost = {name: None for name, where in weight_map.items() if where == file}
        try:
            found = tensorfile.read(folder / file)
        except FileNotFoundError:
            stored |= lost
            problems.append(f"{file}: not there; the folder has "
                            f"{', '.join(sorted(path.name for path in folder.iterdir()))}")
        except safetensors.SafetensorError as error:
            stored |= lost
            problems.append(f"{file}: truncated or damaged ({error})")
        else:
            twice = stored.keys() & found.keys()
            problems += [f"{name}: also in {file}" for name in sorted(twice)]
            stored |= found
    return stored, problems


def _tensor_problems(expected: dict[str, tuple[int, ...]], stored: dict[str, Stored | None]) -> list[str]:
    problems = [f"{name}: missing, expected shape {shape}" for name, shape in expected.items() if name not in stored]
    for name, found in stored.items():
        if found is None:
            continue
        if name not in expected:
            problems += _extra(name, stored)
        elif found.shape != expected[name]:
            problems.append(f"{name}: got shape {found.shape}, expected {expected[name]}")
        elif found.dtype not in DTYPES:
            problems.append(f"{name}: got {found.dtype}, implemented: {', '.join(DTYPES)}")
    return problems


def _extra(name: str, stored: dict[str, Stored | None]) -> list[str]:
    """Complain of a tensor that the model has no place for, unless it says nothing new."""
    embed = TABLE[0][0]
    if BUFFERS.fullmatch(name):
        return []
    if name == TABLE[-1][0] and stored.get(embed):  # tied, and yet written out
        head, table = stored[name], stored[embed]
        same = head.dtype == table.dtype and np.array_equal(head.bytes, table.bytes)
        return [] if same else [f"{name}: differs from {embed} though tie_word_embeddings is true"]
    return [f"{name}: extra, the model of config.json has no such tensor"]


def _arrays(cfg: ModelConfig, stored: dict[str, Stored], order: list[Tensor]) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Give each tensor in our layout, as a view of its file; the disk reads the next one meanwhile."""
    def here(tensor: Tensor) -> np.ndarray:
        if tensor.name in stored:
            return stored[tensor.name].array()
        array = stored[tensor.path].array()
        return array if tensor.layer is None else array[tensor.layer]

    steps = list(itertools.pairwise([*order, order[-1]]))
    with ThreadPoolExecutor(1) as aside:
        for tensor, following in tensorfile.tidily(tqdm(steps, "load", unit="tensor", disable=None)):
            if jax.process_count() == 1:  # of several, each reads its own parts alone
                aside.submit(tensorfile.touch, here(following))
            array = here(tensor)
            yield tensor, _rearrange(cfg, array, tensor.pattern) if tensor.name in stored else array


def _place(stack: jax.Array | None, array: np.ndarray, layer: int | None, leaf) -> jax.Array:
    """Give each device its part of the tensor, as `leaf` or, of a stacked one, as a layer of it.

    A process reads its devices' parts from the file: no weights go over the network.
    """
    spec = leaf.sharding.spec if layer is None else PartitionSpec(*leaf.sharding.spec[1:])
    sharding = NamedSharding(leaf.sharding.mesh, spec)
    x = jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])
    if layer is None:
        return jnp.array(x, leaf.dtype)  # a copy: on a CPU, x may be the pages of the file themselves
    if stack is None:
        stack = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    return _set_layer(stack, x, layer)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stack, x, layer):
    """Set a layer of the stack in place; as bits, as XLA for CPUs computes bfloat16 in float32: all of the stack."""
    bits = jnp.dtype(f"uint{8 * stack.dtype.itemsize}")
    x = x.astype(stack.dtype).view(bits)
    return jax.lax.dynamic_update_index_in_dim(stack.view(bits), x, layer, 0).view(stack.dtype)


def _leaves(cfg: ModelConfig, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, dtype and sharding on the mesh that is set."""
    flat, here = traverse_util.flatten_dict(model.abstract(cfg), sep="/"), jax.sharding.get_mesh()
    return {path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=NamedSharding(here, leaf.sharding.spec))
            for path, leaf in flat.items()}


# --- out ------------------------------------------------------------------------------------------


def fingerprint(folder: str | Path) -> str:
    """Name a checkpoint by every byte of what `load` and the tokenizer read of it."""
    read = ("config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS)
    files = sorted({path for pattern in read for path in Path(folder).glob(pattern) if path.is_file()})
    return records.fingerprint(*files)


def export(cfg: ModelConfig, params: Params, folder: str | Path, *, like: str | Path | None = None,
           dtype=None, max_shard_gb: float = 5) -> None:
    """Write a new folder that transformers loads, whole or not at all.

    `like` is a folder whose config.json, tokenizer, chat template and generation config go along;
    `dtype` None keeps that of the arrays. Every process of the mesh calls this; the first writes.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    _check_params(cfg, flat)
    dtype = jnp.dtype(dtype or params["embed"].dtype)
    files = _split(cfg, dtype.itemsize, max_shard_gb * 1e9)
    gathered = (_gather(cfg, flat[tensor.path], tensor, dtype)
                for tensor in tqdm(tensors(cfg), "export", unit="tensor", disable=None))
    with _new_folder(folder) as scratch:
        _companions(cfg, scratch, like, dtype)
        weight_map = {}
        for number, group in enumerate(files, 1):
            file = f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1 else "model.safetensors"
            shapes = {tensor.name: hf_shape(cfg, tensor.pattern) for tensor in group}
            weight_map |= dict.fromkeys(shapes, file)
            tensorfile.write(scratch / file, shapes, dtype, itertools.islice(gathered, len(group)))
        if len(files) > 1:
            size = cfg.num_params * dtype.itemsize
            _write_json(scratch / "model.safetensors.index.json",
                        {"metadata": {"total_size": size}, "weight_map": weight_map})


def _check_params(cfg: ModelConfig, flat: dict) -> None:
    expected = _shapes(cfg)
    got = {path: leaf.shape for path, leaf in flat.items()}
    problems = [f"{path}: got {got.get(path, 'none')}, expected {expected.get(path, 'none')}"
                for path in sorted(expected.keys() | got.keys())
                if got.get(path) != expected.get(path)]
    if problems:
        raise ValueError(several("export: the parameters are not of this config", problems))


def _split(cfg: ModelConfig, itemsize: int, limit: float) -> list[list[Tensor]]:
    """Share the tensors out, in order, to files of at most `limit` bytes."""
    files, room = [[]], limit
    for tensor in tensors(cfg):
        size = math.prod(hf_shape(cfg, tensor.pattern)) * itemsize
        if size > room and files[-1]:
            files.append([])
            room = limit
        files[-1].append(tensor)
        room -= size
    return files


def _gather(cfg: ModelConfig, leaf: jax.Array, tensor: Tensor, dtype) -> np.ndarray:
    """Bring a tensor to every host; the devices have rearranged it, as numpy takes ten times as long."""
    theirs, ours = tensor.pattern.split(" -> ")
    x = _rearrange(cfg, _layer(leaf, tensor.layer, dtype), f"{ours} -> {theirs}")
    return multihost_utils.process_allgather(x, tiled=True)


@functools.partial(jax.jit, static_argnames="dtype")
def _layer(leaf, layer, dtype):
    if layer is not None:
        leaf = jax.lax.dynamic_index_in_dim(leaf, layer, 0, keepdims=False)
    return leaf.astype(dtype)


@contextlib.contextmanager
def _new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a scratch folder that becomes `folder` if all goes well and goes away if not."""
    folder = Path(folder).absolute()
    _check_new(folder)
    scratch = folder.with_name(f".{folder.name}.partial")
    first = jax.process_index() == 0
    multihost_utils.sync_global_devices("hf: all have seen that the folder is not there")
    if first:
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        scratch.mkdir(parents=True)
    multihost_utils.sync_global_devices("hf: the scratch folder is there")
    try:
        yield scratch
    except BaseException:
        if first:
            shutil.rmtree(scratch)
        raise
    multihost_utils.sync_global_devices("hf: all is written")
    if first:
        scratch.rename(folder)
    multihost_utils.sync_global_devices("hf: the folder is there")


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder}: already there; name a folder that is not")


def _companions(cfg: ModelConfig, folder: Path, like: str | Path | None, dtype) -> None:
    """Write config.json and copy what `like` has beside its weights."""
    fields, like = config_json(cfg), Path(like) if like else None
    if like and (like / "config.json").is_file():
        fields, theirs = read_json(like / "config.json"), config(like)
        differ = [f"{field.name}: got {ours!r}, there {there!r}"
                  for field in dataclasses.fields(cfg)
                  if (ours := getattr(cfg, field.name)) != (there := getattr(theirs, field.name))]
        if differ:
            raise ValueError(several(f"{like}/config.json: another model", differ))
    keys = [key for key in ("dtype", "torch_dtype") if key in fields] or ["torch_dtype"]
    _write_json(folder / "config.json", fields | dict.fromkeys(keys, jnp.dtype(dtype).name))
    if like and jax.process_index() == 0:
        for path in (path for pattern in COMPANIONS for path in like.glob(pattern)):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)


# --- files and the command line -------------------------------------------------------------------


def _write_json(path: Path, value: dict) -> None:
    if jax.process_index() == 0:
        path.write_text(json.dumps(value, indent=2) + "\n")


def convert(source: str | Path, folder: str | Path, *, dtype) -> ModelConfig:
    """Write a checkpoint as stacked arrays, which `load` takes without rearranging them; the first process does it."""
    cfg, dtype = config(source), jnp.dtype(dtype)
    stored, shapes = _stored(cfg, Path(source), []), dict(sorted(_shapes(cfg).items()))
    order = sorted(tensors(cfg), key=lambda tensor: tensor.path)  # the layers of a path stay in order
    with _new_folder(folder) as scratch:
        _companions(cfg, scratch, source, dtype)
        if jax.process_index() == 0:
            arrays = (np.asarray(jax.device_put(array).astype(dtype)) for _, array in _arrays(cfg, stored, order))
            tensorfile.write(scratch / STACKED, shapes, dtype, arrays)
    return cfg


def _stored_dtype(folder: str | Path) -> str:
    fields = read_json(Path(folder) / "config.json")
    return fields.get("dtype") or fields.get("torch_dtype") or "float32"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m align_jax.hf", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("import", "export"))
    parser.add_argument("source", metavar="SRC", help="folder of a checkpoint, HF's or import's")
    parser.add_argument("folder", metavar="DST", type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=DTYPES.values(),
                        help="what to write; what SRC/config.json says if left out")
    args = parser.parse_args()
    _check_new(args.folder)  # before the long way
    dtype = args.dtype or _stored_dtype(args.source)
    with jax.set_mesh(mesh.make()):
        if args.direction == "import":
            cfg = convert(args.source, args.folder, dtype=dtype)
        else:
            cfg, params = load(args.source, dtype=dtype)
            export(cfg, params, args.folder, like=args.source)
        size = cfg.num_params * jnp.dtype(dtype).itemsize / 1e9
        print(f"{args.folder}: wrote {len(tensors(cfg))} tensors, {cfg.num_params:,} parameters, "
              f"{size:.3g} GB of {dtype}")


if __name__ == "__main__":
    with log.faults_in_one_line():
        main()
