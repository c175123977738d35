"""Records to packed rows: tokenise, pack, shuffle, and hand every host its share, resumably.

A batch is R rows of T tokens; a row holds whole examples, and the completions of one example are always in the
same row, so the loss needs no communication. Arrays: `tokens, positions, segments, slots` [R T] and
`ref_logps, weight` [R P C]. `slots` says which (example, completion) = p * C + c a token's log-prob is summed
into, -1 for prompt and padding, so that neither counts anywhere. `segments` 0 is padding.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import grain
import numpy as np

from align_jax import text
from align_jax.records import Example, Pair

COMPLETIONS = {Example: ("completion",), Pair: ("chosen", "rejected")}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A record as ids: one `Tokens` a completion."""

    id: str
    completions: tuple[text.Tokens, ...]

    def __len__(self) -> int:
        return sum(map(len, self.completions))


def encode(records: Sequence[Example | Pair], tokenizer, *, max_length: int, too_long: str = "drop",
           progress=lambda items: items) -> tuple[list[Encoded], Counter]:
    """Tokenise records; return what can be trained on, and what was cut or dropped, by reason.

    An example must fit a row whole, so `max_length` bounds the sum over its completions.
    """
    if too_long not in ("drop", "cut"):
        raise ValueError(f"too_long: got {too_long!r}, expected 'drop' or 'cut'")
    encoded, dropped = [], Counter()
    for record in progress(records):
        fields = COMPLETIONS[type(record)]
        room = max_length if too_long == "drop" else max_length // len(fields)
        try:
            sides = tuple(text.encode(tokenizer, record.prompt, getattr(record, field), max_length=room,
                                      too_long=too_long) for field in fields)
            if sum(map(len, sides)) > max_length:
                raise text.Unusable("too long", "its completions together")
        except text.Unusable as error:
            dropped[error.reason] += 1
            continue
        dropped["completion cut"] += sum(side.was_cut for side in sides)
        encoded.append(Encoded(record.id, sides))
    return encoded, +dropped


def pack(lengths: Sequence[int], *, row_length: int, seed: int, max_per_row: int = 64) -> list[list[int]]:
    """Put examples into rows of at most `row_length` tokens, best fit over a shuffled order.

    Deterministic in the seed. Returns rows of example indices.
    """
    if max(lengths, default=0) > row_length:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit a row of {row_length}")
    rows: list[list[int]] = []
    having = [[] for _ in range(row_length + 1)]  # free tokens -> rows with that much room
    rooms = 0  # bit n is set while having[n] is not empty: best fit is then one shift
    for index in map(int, np.random.default_rng(seed).permutation(len(lengths))):
        need = lengths[index]
        fitting = rooms >> need
        if fitting:
            free = need + (fitting & -fitting).bit_length() - 1
            row = having[free].pop()
            rooms ^= (not having[free]) << free
        else:
            row, free = len(rows), row_length
            rows.append([])
        rows[row].append(index)
        if free > need and len(rows[row]) < max_per_row:
            having[free - need].append(row)
            rooms |= 1 << (free - need)
    return rows


class Rows:
    """Random access to packed rows (a grain source); short epochs end in empty rows, not in lost ones."""

    def __init__(self, encoded: Sequence[Encoded], *, row_length: int, rows_per_batch: int, seed: int,
                 ref_logps: dict[str, Sequence[float]] | None = None):
        if not encoded:
            raise ValueError("no examples")
        self.encoded, self.row_length, self.ref_logps = encoded, row_length, ref_logps
        self.C = len(encoded[0].completions)
        self.packed = pack([len(e) for e in encoded], row_length=row_length, seed=seed)
        self.P = max(map(len, self.packed))
        self.fill = sum(map(len, encoded)) / (len(self.packed) * row_length)
        self.packed += [[]] * (-len(self.packed) % rows_per_batch)

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.assemble([self.encoded[i] for i in self.packed[index]])

    def assemble(self, examples: Sequence[Encoded]) -> dict[str, np.ndarray]:
        """Lay examples out one behind the other; positions restart with every completion."""
        T, P, C = self.row_length, self.P, self.C
        row = {name: np.zeros(T, np.int32) for name in ("tokens", "positions", "segments")}
        row |= {"slots": np.full(T, -1, np.int32), "ref_logps": np.zeros((P, C), np.float32),
                "weight": np.zeros((P, C), np.float32)}
        at, segment = 0, 0
        for p, example in enumerate(examples):
            for c, side in enumerate(example.completions):
                end, segment = at + len(side), segment + 1
                row["tokens"][at:end] = np.concatenate([side.prompt, side.completion])
                row["positions"][at:end] = np.arange(len(side))
                row["segments"][at:end] = segment
                # A first token has nothing before it to be predicted from.
                row["slots"][at + max(len(side.prompt), 1):end] = p * C + c
                at = end
            row["weight"][p] = 1.0
            if self.ref_logps is not None:
                row["ref_logps"][p] = self.ref_logps[example.id]
        return row

    def batch(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Stack the rows of these indices."""
        columns = [self[i] for i in rows]
        return {name: np.stack([column[name] for column in columns]) for name in columns[0]}


class _HostShare:
    """The rows of this host: an equal, contiguous part of every global batch, whatever the number of hosts."""

    def __init__(self, rows: grain.MapDataset, *, rows_per_batch: int, host: int, num_hosts: int):
        if rows_per_batch % num_hosts:
            raise ValueError(f"rows_per_batch {rows_per_batch} does not divide over {num_hosts} hosts")
        self.rows, self.R, self.host = rows, rows_per_batch, host
        self.here = rows_per_batch // num_hosts

    def __len__(self) -> int:
        return len(self.rows) // self.R * self.here

    def __getitem__(self, index: int):
        batch, offset = divmod(index, self.here)
        return self.rows[batch * self.R + self.host * self.here + offset]


def iterator(rows: Rows, *, rows_per_batch: int, seed: int, epochs: int, host: int = 0, num_hosts: int = 1):
    """Iterate this host's part of every batch; `get_state` / `set_state` count batches, not hosts."""
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(epochs)
    share = _HostShare(order, rows_per_batch=rows_per_batch, host=host, num_hosts=num_hosts)
    return iter(grain.MapDataset.source(share).batch(share.here).to_iter_dataset())
