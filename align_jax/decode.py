"""Sampling: prompts in, n completions each out, every prompt run once for all its completions.

The local engine of engine.py; the command that answers a file of prompts is sample.py's, what runs on the device is
slots.py's. Here is the host's part: whichever slot is free gets the next completion that is wanted, so that short and
long answers mix, and a prompt's completions are yielded when the last of them ends. A completion depends on (seed,
prompt id, k) alone, not on what it was decoded with.
"""

import dataclasses
import itertools
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from align_jax import hf, log, mesh, slots, text
from align_jax.model import ModelConfig, Params
from align_jax.records import Text

WORTH_SHARING = 64  # tokens; a shorter common start costs every step more than it saves
PROMPTS_AT_ONCE = 16  # that are run together
FREE_SHARE = 8  # one slot in so many may stand idle until others are free too: admitting costs about a step


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one sequence wrote. `ids` and `logps` (temperature 1) include the EOS; `text` ends before it."""

    text: str
    finish: str  # "stop" (EOS or a stop string) or "length"; an endpoint also says "content_filter"
    ids: list[int]  # these two are empty from an endpoint
    logps: list[float]


@dataclasses.dataclass
class Work:
    """What a call of `sample` has done: tokens of finished answers, seconds, and steps of all slots, busy or not."""

    tokens: int = 0
    seconds: float = 0.0
    slot_steps: int = 0

    @property
    def rate(self) -> float:
        """New tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def busy(self) -> float:
        """The share of the slots' steps that wrote a token of an answer."""
        return self.tokens / max(self.slot_steps, 1)

    def __str__(self):
        return f"{self.rate:,.0f} new tokens/s, slots {self.busy:.0%} busy"


@dataclasses.dataclass(eq=False)
class Sampler:
    """A model ready to sample, its weights laid out for decoding; `work` is that of the newest call."""

    cfg: ModelConfig
    params: Params
    tokenizer: object
    stop_ids: tuple[int, ...]
    batch_size: int = 128
    work: Work = dataclasses.field(default_factory=Work, init=False)

    @classmethod
    def of(cls, cfg: ModelConfig, params: Params, tokenizer, stop_ids: Sequence[int], *, keep: bool = True,
           **settings) -> "Sampler":
        """Lay out the weights of a model; `keep` them as they are too, or delete those of its layers."""
        return cls(cfg, slots.prepare(cfg, params, keep=keep), tokenizer, tuple(stop_ids), **settings)

    @classmethod
    def load(cls, folder: str | Path, *, dtype: str, **settings) -> "Sampler":
        """Load a Hugging Face checkpoint to sample from."""
        tokenizer = text.load(folder)
        cfg, params = hf.load(folder, dtype=dtype)
        return cls.of(cfg, params, tokenizer, text.stop_ids(tokenizer, folder), keep=False, **settings)

    def generate(self, prompts: Sequence[tuple[str, Text]], **settings) -> Iterator[tuple[str, list[Completion]]]:
        """Answer prompts as an engine: `sample` with this batch size; say at the end how fast that was."""
        answers = sample(self, prompts, **{"batch_size": self.batch_size} | settings)

        def told():
            yield from answers
            log.say(f"sampled {self.work.tokens:,} tokens in {log.minutes(self.work.seconds)}: {self.work}")

        return told()

    def too_long(self, prompts: Sequence[tuple[str, Text]], *, max_tokens: int) -> set[str]:
        """The ids of prompts that leave no room for an answer in the positions the model was trained for."""
        room = self.cfg.max_length - max_tokens
        return {name for name, prompt in prompts if len(text.encode_prompt(self.tokenizer, prompt)) > room}


def sample(sampler: Sampler, prompts: Sequence[tuple[str, Text]], *, n: int = 1, temperature: float = 1.0,
           top_p: float = 1.0, max_tokens: int = 256, limits: Mapping[str, int] | None = None,
           stops: Sequence[str] = (), seed: int = 0, batch_size: int = 128,
           chunk: int = 32) -> Iterator[tuple[str, list[Completion]]]:
    """Yield (id, n completions) for every (id, prompt), as soon as the n have ended; the longest limits go first.

    `temperature` 0 is greedy. `limits` names the prompts with another limit than `max_tokens`. `batch_size` is the
    number of slots, sequences decoded at once. Stop strings are looked for every `chunk` tokens and cut off.

    Raises:
      ValueError, at once: a setting out of its range; a prompt and its answer cannot fit the positions the model
        was trained for.
    """
    limits = limits or {}
    _check_settings(n=n, max_tokens=max_tokens, batch_size=batch_size, temperature=temperature, top_p=top_p,
                    **{f"limits[{name!r}]": limit for name, limit in limits.items()})
    asked = sorted(_encode(sampler, prompts, limits, max_tokens), key=lambda p: (-p.limit, len(p.ids)))
    sampler.work = work = Work()
    settings = {"temperature": temperature, "top_p": top_p, "stop_ids": sampler.stop_ids, "chunk": chunk,
                "look": slots.before_a_look(max((p.limit for p in asked), default=1))}
    return _answers(sampler, work, asked, n, min(batch_size, n * len(asked)), stops, seed, settings)


def _check_settings(*, temperature: float, top_p: float, **counts: int) -> None:
    wrong = [f"{name}: got {value}, expected 1 or more" for name, value in counts.items() if value < 1]
    wrong += [f"temperature: got {temperature}, expected 0 or more"] * (not temperature >= 0)
    wrong += [f"top_p: got {top_p}, expected a share above 0, at most 1"] * (not 0 < top_p <= 1)
    if wrong:
        raise ValueError("sampling: " + "; ".join(wrong))


@dataclasses.dataclass(frozen=True)
class _Prompt:
    name: str
    ids: list[int]  # without the common start
    limit: int  # tokens of an answer
    answers: dict[int, Completion] = dataclasses.field(default_factory=dict, init=False)


@dataclasses.dataclass
class _Slot:
    """The k-th completion of a prompt, in the making."""

    prompt: _Prompt
    k: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)

    def take(self, sampler: Sampler, ids: np.ndarray, logps: np.ndarray, stops: Sequence[str]) -> bool:
        """Append what was written; tell whether that was the end: the limit, EOS, or a stop string."""
        fresh = int(np.sum(ids >= 0))
        self.ids += ids[:fresh].tolist()
        self.logps += logps[:fresh].tolist()
        if len(self.ids) == self.prompt.limit or self.ids[-1] in sampler.stop_ids:
            return True
        tail = self.ids[-fresh - 4 * max(map(len, stops), default=0):]  # a character has up to 4 bytes, each a token
        return _has_stop(sampler.tokenizer, tail, stops) and _has_stop(sampler.tokenizer, self.ids, stops)

    def columns(self, chunk: int) -> int:
        """How many columns of the ring it takes after `chunk` more tokens."""
        return len(self.prompt.ids) + min(len(self.ids) + chunk, self.prompt.limit)


def _answers(sampler: Sampler, work: Work, asked: list[_Prompt], n: int, batch_size: int, stops: Sequence[str],
             seed: int, settings: dict):
    """Decode until all is answered: fill the free slots, run until enough are free again, look who has ended."""
    if not asked:
        return
    began, M = time.perf_counter(), _up(max(batch_size, 2), mesh.num_row_shards())  # an axis of one is not split
    prefix, offset = _common_start(sampler, asked)
    asked = [dataclasses.replace(p, ids=p.ids[offset:]) for p in asked]
    most = _up(max(len(p.ids) + p.limit for p in asked), 32)
    state = slots.empty(sampler.cfg, slots=M, ring=_columns(0, most), dtype=sampler.params["embed"].dtype)
    waiting = _waiting(sampler, prefix, offset, asked, n, min(-(-M // n), PROMPTS_AT_ONCE))
    left, column, running = n * len(asked), 0, [None] * M
    while left or any(running):
        fresh = _fill(running, waiting)
        left -= len(fresh)
        needed = max(slot.columns(settings["chunk"]) for slot in running if slot)
        state, column = _fit(sampler, state, column, needed, most)
        state = _admit(state, column, fresh)
        enough = min(max(M // FREE_SHARE, 1), left) or M
        state, *written = slots.decode(sampler.cfg, sampler.params, prefix, state, _table(running, offset, seed),
                                       np.int32(column), np.int32(enough), **settings)
        ids, logps, steps = _to_host(written)
        column += int(steps)
        work.slot_steps += int(steps) * M
        done = []
        for m, slot in enumerate(running):
            if slot and slot.take(sampler, ids[:, m], logps[:, m], stops):
                running[m] = None
                completion = slot.prompt.answers[slot.k] = _finish(sampler, slot.ids, slot.logps, stops)
                work.tokens += len(completion.ids)
                done += [slot.prompt] * (len(slot.prompt.answers) == n)
        work.seconds += time.perf_counter() - began
        for prompt in done:
            yield prompt.name, [prompt.answers.pop(k) for k in range(n)]
        began = time.perf_counter()


def _common_start(sampler: Sampler, asked: list[_Prompt]) -> tuple[list, int]:
    """What all the prompts begin with, run once for all of them, and its number of tokens; () and 0 if it is short."""
    length = min(len(os.path.commonprefix([p.ids for p in asked])), min(len(p.ids) for p in asked) - 1)
    nothing = [()] * sampler.cfg.L
    if length < WORTH_SHARING:
        return nothing, 0
    start = _prefill(sampler, nothing, 0, [asked[0].ids[:length]] * mesh.num_row_shards())
    return slots.shared(start, np.int32(length)), length


def _waiting(sampler: Sampler, prefix: list, offset: int, asked: list[_Prompt], n: int,
             count: int) -> Iterator[tuple[_Slot, dict, int]]:
    """Everything that is wanted, in turn, with the row in which its prompt was run: `count` prompts at once."""
    count = _up(min(count, len(asked)), mesh.num_row_shards())
    for at in range(0, len(asked), count):
        batch = asked[at:at + count]
        rows = [p.ids for p in batch] + [[0]] * (count - len(batch))
        prefilled = _prefill(sampler, prefix, offset, rows)
        yield from ((_Slot(prompt, k), prefilled, row) for row, prompt in enumerate(batch) for k in range(n))


def _prefill(sampler: Sampler, prefix: list, offset: int, rows: list[list[int]]) -> dict:
    lengths = np.array([len(ids) for ids in rows], np.int32)
    tokens = np.zeros((len(rows), _padded(max(lengths))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[-len(ids):] = ids
    tokens, lengths = (jax.device_put(x, mesh.sharding("rows", *(None,) * (x.ndim - 1))) for x in (tokens, lengths))
    return slots.prefill(sampler.cfg, sampler.params, prefix, np.int32(offset), tokens, lengths)


def _fill(running: list[_Slot | None], waiting: Iterator) -> list[tuple[int, dict, int]]:
    """Put what waits next into the free slots; return these with where their prompts were run."""
    free = [m for m, slot in enumerate(running) if slot is None]
    fresh = []
    for m, (slot, prefilled, row) in zip(free, itertools.islice(waiting, len(free)), strict=False):
        running[m] = slot
        fresh.append((m, prefilled, row))
    return fresh


def _fit(sampler: Sampler, state: dict, column: int, needed: int, most: int) -> tuple[dict, int]:
    """Let the ring have the columns that are needed, and few more, for every step reads all of them.

    It shrinks when long answers end: that costs a step or two, and if it has not been of that size a compilation. Not
    where a step reads only what its slots see; there a column too many costs nothing but memory.
    """
    ring, fitting = slots.columns(state), _columns(needed, most)
    if fitting == ring or fitting < ring and slots.reads_what_is_seen(sampler.cfg):
        return state, column % ring
    slots.resize(state, np.int32(column), ring=fitting)
    return state, 0


def _columns(needed: int, most: int) -> int:
    """The size of a ring, 128, 256, 384, 512, 768, ...: for each there is a compilation."""
    return min(_up(_padded(needed), 128), most)


def _admit(state: dict, column: int, fresh: list[tuple[int, dict, int]]) -> dict:
    """Copy prompts into slots, at once all that were run at once."""
    for _, group in itertools.groupby(fresh, key=lambda item: id(item[1])):
        slot, (prefilled, *_), row = zip(*group, strict=True)
        which = np.full(state["x"].shape[1], -1, np.int32)
        which[list(slot)] = row
        state = slots.admit(state, prefilled, which, np.int32(column))
    return state


def _table(running: list[_Slot | None], offset: int, seed: int) -> dict:
    """What slots.decode has to know of every slot."""
    rows = [(zlib.crc32(s.prompt.name.encode()), s.k, s.columns(0), len(s.ids), s.prompt.limit) if s else (0,) * 5
            for s in running]
    names = ("name", "k", "age", "written", "limit")
    table = {name: np.array(column, np.uint32 if name == "name" else np.int32)
             for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    return table | {"offset": np.int32(offset), "seed": np.int32(seed)}


def _finish(sampler: Sampler, ids: list[int], logps: list[float], stops: Sequence[str]) -> Completion:
    """Cut a sequence at its EOS or first stop string."""
    ended = ids[-1] in sampler.stop_ids
    written = text.decode(sampler.tokenizer, ids[:-1] if ended else ids)
    was_stopped = any(stop in written for stop in stops)
    if was_stopped:  # as if looked for behind every token, so that `chunk` changes nothing
        ids = _ids_up_to(sampler.tokenizer, ids, stops)
        written = text.decode(sampler.tokenizer, ids)
        written = written[:min(at for at in map(written.find, stops) if at >= 0)]
    finish = "stop" if ended or was_stopped else "length"
    return Completion(written, finish, ids, logps[:len(ids)])


def _ids_up_to(tokenizer, ids: list[int], stops: Sequence[str]) -> list[int]:
    """The shortest prefix of ids whose text holds a stop string."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _has_stop(tokenizer, ids[:middle], stops) else (middle + 1, high)
    return ids[:low]


def _has_stop(tokenizer, ids: list[int], stops: Sequence[str]) -> bool:
    written = text.decode(tokenizer, ids) if stops else ""
    return any(stop in written for stop in stops)


def _encode(sampler, prompts, limits: Mapping[str, int], max_tokens: int) -> list[_Prompt]:
    """Tokenise the prompts; name all that cannot be answered at once."""
    encoded, bad, length = [], [], sampler.cfg.max_length
    for name, prompt in prompts:
        try:
            encoded.append(_Prompt(name, text.encode_prompt(sampler.tokenizer, prompt), limits.get(name, max_tokens)))
            if not 0 < len(encoded[-1].ids) <= length - encoded[-1].limit:
                bad.append(f"{name}: {len(encoded[-1].ids)} tokens and {encoded[-1].limit} of an answer")
        except text.Unusable as error:
            bad.append(f"{name}: {error}")
    if bad:
        raise ValueError(f"{len(bad)} prompt(s) cannot be answered, expected at least 1 token and, with max_tokens of "
                         f"an answer, at most the model's {length} positions: {'; '.join(bad[:5])}")
    return encoded


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _padded(length: int) -> int:
    """The next of 24, 32, 48, 64, 96, 128, ...: few shapes, few compilations."""
    size = max(32, 1 << int(length - 1).bit_length())
    return size * 3 // 4 if length <= size * 3 // 4 else size


def _to_host(tree):
    return multihost_utils.process_allgather(tree, tiled=True)
