"""Records to packed rows: tokenise, store, shuffle, pack, and hand every host its share, resumably.

A batch is R rows of T tokens; a row holds whole examples one behind the other, and an example is its prompt, once,
and then its completions:

    tokens     p p p p c c c r r | p p c c c r r . .     positions  0 1 2 3 4 5 6 4 5 | 0 1 2 3 4 2 3 . .
    branches   0 0 0 0 1 1 1 2 2 | 0 0 1 1 1 2 2 . .     segments   1 1 1 1 1 1 1 1 1 | 2 2 2 2 2 2 2 0 0

A token sees the earlier tokens of its own segment that are prompt (branch 0) or of its own branch, so the completions
share their prompt and do not see each other. `slots` says which (example, completion) = p * C + c a token's log-prob
is summed into, -1 for prompt and padding, and `sources` where it is predicted: in general one position before, for the
first token of a completion at the end of the prompt. All five, and `tokens`, are int32 [R T]; `ref_logps` and `weight`
are float32 [R P C].
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import grain
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from grain.experimental import ThreadPrefetchIterDataset

from align_jax import text
from align_jax.records import Example, Pair

COMPLETIONS = {Example: ("completion",), Pair: ("chosen", "rejected")}


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A record as int32 ids; a completion ends in the one EOS unless it was cut. `line` is its place in the file."""

    id: str
    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    line: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.completions))

    @property
    def longest(self) -> int:
        """Tokens of the prompt and its longest completion: the positions that a model needs."""
        return len(self.prompt) + max(map(len, self.completions))


def encode(record: Example | Pair, tokenizer, *, max_length: int, too_long: str = "drop",
           line: int = 0) -> tuple[Encoded, int]:
    """Tokenise a record; return it and how many of its completions were cut.

    An example must fit a row whole: `max_length` bounds the prompt and all completions together. With `too_long`
    "cut", what is left behind the prompt is shared equally between the completions.

    Raises:
      text.Unusable: the record cannot become training tokens.
    """
    fields = COMPLETIONS[type(record)]
    room = max_length
    if too_long == "cut":
        prompt = len(text.encode_prompt(tokenizer, record.prompt))
        room = prompt + (max_length - prompt) // len(fields)
    sides = [text.encode(tokenizer, record.prompt, getattr(record, field), max_length=room, too_long=too_long)
             for field in fields]
    encoded = Encoded(record.id, sides[0].prompt, tuple(side.completion for side in sides), line)
    if len(encoded) > max_length:
        raise text.Unusable("too long", f"{len(encoded)} tokens with all completions, max_length is {max_length}")
    return encoded, sum(side.was_cut for side in sides)


def encode_all(records: Iterable[tuple[int, Example | Pair]], tokenizer, *, dropped: Counter, max_length: int,
               too_long: str = "drop") -> Iterable[Encoded]:
    """Tokenise (line, record) pairs as they come; what is cut or dropped is counted into `dropped`, by reason."""
    if too_long not in ("drop", "cut"):
        raise ValueError(f"too_long: got {too_long!r}, expected 'drop' or 'cut'")
    for line, record in records:
        try:
            encoded, num_cut = encode(record, tokenizer, max_length=max_length, too_long=too_long, line=line)
        except text.Unusable as error:
            dropped[error.reason] += 1
            continue
        if num_cut:
            dropped["completion cut"] += num_cut
        yield encoded


# --- on disk ------------------------------------------------------------------------------------------


def store(path: Path, encoded: Iterable[Encoded], *, completions: int) -> None:
    """Write examples as an Arrow file, a thousand at a time, whole or not at all."""
    ids = pa.list_(pa.int32())
    columns = {"line": pa.int64(), "id": pa.string(), "prompt": ids, **{f"{c}": ids for c in range(completions)}}
    schema = pa.schema(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with pa.ipc.new_file(str(part), schema) as out:
        waiting = []
        for e in encoded:
            waiting.append({"line": e.line, "id": e.id, "prompt": e.prompt,
                            **{f"{c}": ids for c, ids in enumerate(e.completions)}})
            if len(waiting) == 1000:
                out.write_batch(pa.RecordBatch.from_pylist(waiting, schema))
                waiting.clear()
        out.write_batch(pa.RecordBatch.from_pylist(waiting, schema))
    part.rename(path)


class Stored(Sequence[Encoded]):
    """What the hosts have stored, in the order of the file it came from; memory-mapped, read where it is touched.

    Of records that repeat an id only the first is kept, for each host has seen but its share: `repeated` names them.
    """

    def __init__(self, paths: Iterable[Path]):
        self.table = pa.concat_tables(pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths)
        self.columns = [self.table[name] for name in self.table.column_names[2:]]
        self.C = len(self.columns) - 1
        order = np.argsort(self.table["line"].to_numpy(), kind="stable")
        ids = self.table["id"].to_pylist()
        first = {}
        self.order = [at for at in order.tolist() if first.setdefault(ids[at], at) == at]
        self.repeated = [ids[at] for at in order.tolist() if first[ids[at]] != at]
        self.ids = [ids[at] for at in self.order]
        each = [pc.list_value_length(column).to_numpy()[self.order] for column in self.columns]
        self.lengths = np.sum(each, axis=0)
        self.longest = each[0] + np.max(each[1:], axis=0)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Encoded:
        at = self.order[index]
        prompt, *completions = (column[at].values.to_numpy() for column in self.columns)
        return Encoded(self.ids[index], prompt, tuple(completions), self.table["line"][at].as_py())


# --- packing ------------------------------------------------------------------------------------------


class Packing(grain.IterDataset):
    """Examples, by number, packed into batches of R rows: best fit over a bounded number of open rows.

    A stream: it needs the examples' lengths, holds `open_rows` rows at most, and gives a row away when it is full or
    as the fullest one when there are too many. Every epoch has its own order, set by the seed (None: as they come),
    and ends with all of its rows given away; the last batch of all is filled up with empty rows. `only` names the
    examples to pack. What an iterator yields, [[example, ...] * R], and its state do not depend on hosts.
    """

    def __init__(self, lengths: Sequence[int], *, row_length: int, rows_per_batch: int, seed: int | None = None,
                 epochs: int | None = 1, only: Sequence[int] | None = None, max_per_row: int = 64, open_rows: int = 64):
        super().__init__()
        if max(lengths, default=0) > row_length:
            raise ValueError(f"an example of {max(lengths)} tokens does not fit a row of {row_length}")
        self.lengths, self.T, self.R = np.asarray(lengths, np.int64).tolist(), row_length, rows_per_batch
        self.members = list(range(len(lengths)) if only is None else only)
        self.seed, self.epochs, self.max_per_row, self.open_rows = seed, epochs, max_per_row, open_rows

    def __iter__(self):
        return _Packer(self)

    def order(self, epoch: int) -> list[int]:
        """The examples of an epoch."""
        if self.seed is None:
            return self.members
        return np.random.default_rng([self.seed, epoch]).permutation(self.members).tolist()

    @property
    def P(self) -> int:
        """The most examples that a row can hold: example slots of a batch."""
        smallest = np.cumsum(np.sort(self.lengths)[:self.max_per_row])
        return max(int(np.searchsorted(smallest, self.T, side="right")), 1)


class _Packer(grain.DatasetIterator):
    """The place in a `Packing`: epoch, number within it, rows that are open, rows that wait for their batch."""

    def __init__(self, packing: Packing):
        super().__init__()
        self.packing = packing
        self.set_state({"epoch": 0, "next": 0, "open": [], "ready": []})

    def get_state(self) -> dict:
        return {"epoch": self.epoch, "next": self.next, "open": [list(row) for row in self.open],
                "ready": [list(row) for row in self.ready]}

    def set_state(self, state: dict) -> None:
        self.epoch, self.next = state["epoch"], state["next"]
        self.open, self.ready = ([list(row) for row in state[name]] for name in ("open", "ready"))
        lengths = self.packing.lengths
        self.free = [self.packing.T - sum(lengths[i] for i in row) for row in self.open]
        self.order = self.packing.order(self.epoch)

    def __next__(self) -> list[list[int]]:
        R, epochs = self.packing.R, self.packing.epochs
        while len(self.ready) < R and (epochs is None or self.epoch < epochs) and self.order:
            if self.next < len(self.order):
                self._put(self.order[self.next])
                self.next += 1
            else:
                while self.open:
                    self._close(0)
                self.epoch, self.next = self.epoch + 1, 0
                self.order = self.packing.order(self.epoch)
        if not self.ready:
            raise StopIteration
        batch, self.ready = self.ready[:R], self.ready[R:]
        return batch + [[]] * (R - len(batch))

    def _put(self, index: int) -> None:
        need = self.packing.lengths[index]
        free, at = min(((free, at) for at, free in enumerate(self.free) if free >= need), default=(self.packing.T, -1))
        if at < 0:
            self.open.append([])
            self.free.append(free)
            at = len(self.open) - 1
        self.open[at].append(index)
        self.free[at] -= need
        if not self.free[at] or len(self.open[at]) == self.packing.max_per_row:
            self._close(at)
        elif len(self.open) > self.packing.open_rows:
            self._close(self.free.index(min(self.free)))

    def _close(self, at: int) -> None:
        self.ready.append(self.open.pop(at))
        self.free.pop(at)


def plan(packing: Packing) -> tuple[int, float]:
    """Pack without reading an example: the number of batches, and the filled share of the rows that are not empty."""
    batches, rows, tokens = 0, 0, 0
    for batch in packing:
        batches += 1
        rows += sum(map(bool, batch))
        tokens += sum(packing.lengths[i] for row in batch for i in row)
    return batches, tokens / max(rows * packing.T, 1)


# --- batches ------------------------------------------------------------------------------------------


def row(examples: Sequence[Encoded], *, T: int, P: int, C: int,
        ref_logps: Mapping[str, Sequence[float]] | None = None) -> dict[str, np.ndarray]:
    """Lay examples out one behind the other, as the head of this file shows."""
    names = ("tokens", "positions", "segments", "branches", "sources")
    out = {name: np.zeros(T, np.int32) for name in names} | {"slots": np.full(T, -1, np.int32)}
    out |= {name: np.zeros((P, C), np.float32) for name in ("ref_logps", "weight")}
    at = 0
    for p, example in enumerate(examples):
        start, n = at, len(example.prompt)
        for branch, ids in enumerate((example.prompt, *example.completions)):
            end, first = at + len(ids), n if branch else 0
            out["tokens"][at:end] = ids
            out["positions"][at:end] = np.arange(first, first + len(ids))
            out["segments"][at:end], out["branches"][at:end] = p + 1, branch
            if branch:
                out["slots"][at:end] = p * C + branch - 1
                out["sources"][at:end] = np.arange(at - 1, end - 1)
                out["sources"][at] = max(start + n - 1, 0)
                if not n:
                    out["slots"][at] = -1  # a first token has nothing before it to be predicted from
            at = end
        out["weight"][p] = 1.0
        if ref_logps is not None:
            out["ref_logps"][p] = ref_logps[example.id]
    return out


def batch(examples: Sequence[Encoded], rows: Sequence[Sequence[int]], **layout) -> dict[str, np.ndarray]:
    """Read the examples of these rows, and stack the rows."""
    columns = [row([examples[i] for i in members], **layout) for members in rows]
    return {name: np.stack([column[name] for column in columns]) for name in columns[0]}


def iterator(examples: Sequence[Encoded], packing: Packing, *, C: int, host: int = 0, num_hosts: int = 1,
             ref_logps: Mapping[str, Sequence[float]] | None = None):
    """Iterate this host's part of every batch, made on the side; `get_state` / `set_state` know of no hosts."""
    if packing.R % num_hosts:
        raise ValueError(f"rows_per_batch {packing.R} does not divide over {num_hosts} hosts")
    here = packing.R // num_hosts
    layout = {"T": packing.T, "P": packing.P, "C": C, "ref_logps": ref_logps}
    mine = packing.map(lambda rows: batch(examples, rows[host * here:(host + 1) * here], **layout))
    return iter(ThreadPrefetchIterDataset(mine, prefetch_buffer_size=2))
