"""Measure hf.py on a random checkpoint of a real shape: seconds beside the raw disk's, and memory beyond the arrays.

    python tools/bench_convert.py [--shape=deepseek-coder-1.3b] [--shape=L=2,D=512,N=8,K=8,H=64,F=2048,V=8192]
        [--held=bfloat16,float32] [--rounds=3] [--folder=DISK] [--out=convert.json]

Writes bfloat16 files of at most 1 GB and then, in every round: the same bytes, plain, to the disk and back; `import`;
and, for each dtype to hold them in, `load` and `export` to bfloat16, each command in a process of its own. What is
read is first dropped from the page cache, what is written is synced. Needs three times the checkpoint on the disk.

Memory is RssAnon of the process, sampled from outside: the pages of mapped files are the page cache's. What it was
when jax had started is taken off, and on a CPU the bytes of the arrays; the compiler's and malloc's stay in. It is
counted in the largest tensors of the destination. `of_disk` is the raw seconds by ours: for `import` of reading and
writing, for the others of reading or of writing. `same` says whether what was exported has the bits of the first.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from align_jax import fit, hf, hf_config, mesh, tensorfile
from align_jax.model import ModelConfig

_SHAPE = flags.DEFINE_string("shape", "deepseek-coder-1.3b", "one of fit.SHAPES, or the sizes")
_HELD = flags.DEFINE_list("held", ["bfloat16", "float32"], "dtypes to load as")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "of everything; medians are told, and the largest memory")
_FOLDER = flags.DEFINE_string("folder", None, "where to make the files; the system's temporary folder if left out")
_OUT = flags.DEFINE_string("out", None, "a JSON file for what is printed, and every round")
_WORKER = flags.DEFINE_list("worker", [], "what, source, destination, dtype: measure it in this process")

PIECE, SHARD, BFLOAT16 = 2**24, 10**9, jnp.dtype("bfloat16")


def shape(said: str) -> ModelConfig:
    if "=" not in said:
        return fit.shape(said)
    return ModelConfig(**{name: int(size) for name, _, size in (part.partition("=") for part in said.split(","))})


def make(cfg: ModelConfig, folder: Path) -> None:
    """Write a checkpoint of random numbers of modest size, tensor by tensor."""
    rng, groups, weight_map = np.random.default_rng(0), [{}], {}
    for name, _, _, pattern in hf.tensors(cfg):
        size = hf.hf_shape(cfg, pattern)
        if sum(map(np.prod, [*groups[-1].values(), size])) * BFLOAT16.itemsize > SHARD:
            groups.append({})
        groups[-1][name] = size
    folder.mkdir()
    for number, group in enumerate(groups):
        weight_map |= dict.fromkeys(group, f"{number}.safetensors")
        bits = (rng.integers(0, 2**16, size, np.uint16) & 0xBFFF | 0x3000 for size in group.values())
        tensorfile.write(folder / f"{number}.safetensors", group, BFLOAT16, bits)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(hf_config.config_json(cfg) | {"torch_dtype": "bfloat16"}))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def raw_write(path: Path, size: int) -> dict:
    piece, begin = os.urandom(PIECE), time.monotonic()
    with open(path, "wb", buffering=0) as file:
        for done in range(0, size, PIECE):
            file.write(piece[:size - done])
        os.fsync(file.fileno())
    return {"seconds": time.monotonic() - begin}


def raw_read(folder: Path) -> dict:
    forget(folder)
    piece, begin = bytearray(PIECE), time.monotonic()
    for path in files(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(piece):
                pass
    return {"seconds": time.monotonic() - begin}


def worker(what: str, source: str, folder: str, dtype: str) -> None:
    """Do it, and print of each part when it began and ended (on the clock of all processes) and what it took."""
    parts = {}

    def timed(name, do, *args, **kwargs):
        begin, cpu = time.monotonic(), time.process_time()
        result = do(*args, **kwargs)
        parts[name] = {"begin": begin, "end": time.monotonic(), "cpu_seconds": time.process_time() - cpu, "arrays": 0}
        return result

    with jax.set_mesh(mesh.make()):
        jnp.zeros(1).block_until_ready()
        if what == "import":
            timed("import", hf.convert, source, folder, dtype=dtype)
        else:
            cfg, params = timed("load", hf.load, source, dtype=dtype)
            timed("export", hf.export, cfg, params, folder, like=source, dtype="bfloat16")
            if jax.default_backend() == "cpu":  # where the arrays are memory of this process too
                for part in parts.values():
                    part["arrays"] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps(parts))


def measured(what: str, source: Path, folder: Path, dtype: str) -> dict[str, dict]:
    """Run a worker, from whose memory it is read what each part took at most: part -> figures."""
    forget(source)
    shutil.rmtree(folder, ignore_errors=True)
    process = subprocess.Popen([sys.executable, __file__, f"--worker={what},{source},{folder},{dtype}"],
                               stdout=subprocess.PIPE, text=True)
    status, seen = Path(f"/proc/{process.pid}/status"), []
    while process.poll() is None:
        if found := re.search(r"RssAnon:\s+(\d+) kB", status.read_text()):
            seen.append((time.monotonic(), 1024 * int(found[1])))
        time.sleep(0.002)
    if process.returncode:
        raise RuntimeError(f"{what}: ended with {process.returncode}")
    parts = json.loads(process.stdout.read())
    started = max(size for at, size in seen if at < min(part["begin"] for part in parts.values()))
    return {name: {"seconds": part["end"] - part["begin"], "cpu_seconds": part["cpu_seconds"],
                   "memory": max(size for at, size in seen if part["begin"] <= at <= part["end"])
                   - started - part["arrays"]} for name, part in parts.items()}


def same(*folders: Path) -> bool:
    one, two = ({name: found for path in files(folder) for name, found in tensorfile.read(path).items()}
                for folder in folders)
    return one.keys() == two.keys() and all(np.array_equal(one[name].bytes, two[name].bytes) for name in one)


def one_round(source: Path, work: Path) -> dict[str, dict]:
    size = sum(path.stat().st_size for path in files(source))
    found = {"raw write": raw_write(work / "raw", size), "raw read": raw_read(source)}
    (work / "raw").unlink()
    found |= measured("import", source, work / "stacked", "bfloat16")
    for dtype in _HELD.value:
        parts = measured("export", source, work / "out", dtype)
        found |= {f"{name}, {dtype}": part | {"same": same(source, work / "out")} for name, part in parts.items()}
    read, write = found["raw read"]["seconds"], found["raw write"]["seconds"]
    raw = {"import": read + write, "load": read, "export": write}
    for name, part in found.items():
        if (what := name.partition(",")[0]) in raw:
            part["of_disk"] = raw[what] / part["seconds"]
    return found


def main(argv) -> None:
    if _WORKER.value:
        return worker(*_WORKER.value)
    cfg = shape(_SHAPE.value)
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder:
        source = Path(folder) / "source"
        make(cfg, source)
        rounds = [one_round(source, Path(folder)) for _ in range(_ROUNDS.value)]
        size = sum(path.stat().st_size for path in files(source))
    largest = max(np.prod(hf.hf_shape(cfg, tensor.pattern)) for tensor in hf.tensors(cfg))
    summary = defaultdict(dict)
    for name in rounds[0]:
        figures = {key: [found[name][key] for found in rounds] for key in rounds[0][name]}
        summary[name] = {key: statistics.median(values) for key, values in figures.items()}
        summary[name] |= {"GB/s": size / 1e9 / summary[name]["seconds"]}
        if "memory" in figures:
            itemsize = 4 if name == "load, float32" else 2
            summary[name] |= {"memory": max(figures["memory"]), "same": all(figures.get("same", [True])),
                              "largest_tensors": max(figures["memory"]) / (largest * itemsize)}
    found = {"shape": _SHAPE.value, "bytes": size, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0],
             "jax": jax.__version__, **summary}
    text = json.dumps(found, indent=2, default=float)
    print(text)
    if _OUT.value:
        Path(_OUT.value).write_text(json.dumps(json.loads(text) | {"rounds": rounds}, indent=2, default=float))


if __name__ == "__main__":
    app.run(main)
