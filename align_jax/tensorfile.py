"""Safetensors files, mapped into memory to read and written array by array: neither takes memory for the whole.

The format is its length in 8 bytes, a JSON text that says where each tensor is, and the tensors' bytes.
"""

import ctypes
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Stored(NamedTuple):
    """A tensor in a file: what is touched of it gets read, and is page cache, not memory of this process."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    bytes: np.ndarray

    def array(self) -> np.ndarray:
        return self.bytes.view(jnp.dtype(DTYPES[self.dtype])).reshape(self.shape)


def read(path: Path) -> dict[str, Stored]:
    """Map a file; FileNotFoundError or safetensors.SafetensorError if it is not there or not whole."""
    safetensors.safe_open(path, framework="np")  # raises
    with open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(begin - 8))
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    pages.madvise(mmap.MADV_SEQUENTIAL)  # the disk reads ahead while the processor works
    data = np.frombuffer(pages, np.uint8, offset=begin)
    return {name: Stored(said["dtype"], tuple(said["shape"]), data[slice(*said["data_offsets"])])
            for name, said in header.items() if name != "__metadata__"}


def touch(array: np.ndarray) -> None:
    """Have the pages of a mapped array read: what comes to use it does not wait for the disk."""
    array.reshape(-1).view(np.uint8)[::mmap.PAGESIZE].sum()


def write(path: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, arrays: Iterable[np.ndarray]) -> None:
    """Write the tensors, each while the next one is made. All processes make them, the first one writes.

    The arrays come in the order of `shapes`; several in a row may make up one tensor.
    """
    is_first = jax.process_index() == 0
    with open(path if is_first else os.devnull, "wb") as file, ThreadPoolExecutor(1) as aside:
        writing = aside.submit(file.write, _header(shapes, dtype))
        for array in tidily(arrays):
            writing.result()
            writing = aside.submit(file.write, array.view(np.uint8).data)
        writing.result()
        file.flush()
        if is_first:
            os.fsync(file.fileno())


def _header(shapes: dict[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    said, end = {"__metadata__": {"format": "pt"}}, 0  # which transformers wants
    spelling = {ours: theirs for theirs, ours in DTYPES.items()}[dtype.name]
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        said[name] = {"dtype": spelling, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(said).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tidily(items: Iterable) -> Iterator:
    """Yield the items, and give back what was freed: glibc keeps blocks of up to 32 MB, each thread its own."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    for number, item in enumerate(items):
        if trim and number % 8 == 0:  # each time would cost as much as the copying
            trim(0)
        yield item
