"""Packing and batching: what goes in comes out once, whole, in its place, on any number of hosts."""

import contextlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from align_jax import data
from align_jax.records import Example, Pair

KINDS = {"example": 1, "pair": 2}


def random_lengths(rng: np.random.Generator, row_length: int) -> list[int]:
    """As mixed as real ones: uniform, all tiny, all just over a half, all full, or skewed."""
    count = int(rng.integers(1, 200))
    shape = rng.integers(5)
    if shape == 0:
        return rng.integers(1, row_length + 1, count).tolist()
    if shape == 1:
        return rng.integers(1, min(4, row_length + 1), count).tolist()
    if shape == 2:
        return [row_length // 2 + 1] * count
    if shape == 3:
        return [row_length] * count
    return np.clip(rng.lognormal(2, 1, count), 1, row_length).astype(int).tolist()


def made_up(rng: np.random.Generator, count: int, *, C: int, longest: int = 12) -> list[data.Encoded]:
    """Examples whose tokens are all different numbers from 1 on, so that a misplaced one shows."""
    number = itertools.count(1)

    def ids(n):
        return np.array(list(itertools.islice(number, int(n))), np.int32)

    return [data.Encoded(str(index), ids(rng.integers(0, longest)),
                         tuple(ids(rng.integers(2, longest)) for _ in range(C)), index)  # with EOS two at least
            for index in range(count)]


def unpack(batch: dict) -> list[tuple]:
    """Read examples back out of a batch by `segments`, `branches`, `positions`, `slots` and `sources` alone.

    Returns (row, p, prompt ids, [completion ids]).
    """
    found = []
    names = ("tokens", "positions", "segments", "branches", "slots", "sources")
    C = batch["weight"].shape[2]
    for r, columns in enumerate(zip(*(batch[name] for name in names), strict=True)):
        tokens, positions, segments, branches, slots, sources = columns
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert (np.diff(at) == 1).all() and (np.diff(branches[at]) >= 0).all()  # prompt, chosen, rejected
            parts = [at[branches[at] == branch] for branch in range(C + 1)]
            prompt, n = parts[0], len(parts[0])
            assert (positions[prompt] == np.arange(n)).all() and (slots[prompt] == -1).all()
            for c, part in enumerate(parts[1:]):
                assert (positions[part] == n + np.arange(len(part))).all()  # positions restart behind the prompt
                expected = np.full(len(part), (segment - 1) * C + c)
                before = np.concatenate([prompt[-1:], part])[:-1] if n else part[:-1]
                if not n:
                    expected[0] = -1  # nothing precedes it
                assert (slots[part] == expected).all()
                assert (sources[part][len(part) - len(before):] == before).all()
            found.append((r, segment - 1, tokens[prompt].tolist(), [tokens[part].tolist() for part in parts[1:]]))
        is_padding = segments == 0
        for name, value in (("tokens", 0), ("positions", 0), ("branches", 0), ("slots", -1), ("sources", 0)):
            assert (batch[name][r][is_padding] == value).all()
    return found


def packed(lengths, *, R: int = 1, **settings) -> list[list[int]]:
    """All rows of a packing, one behind the other."""
    return [row for batch in data.Packing(lengths, rows_per_batch=R, **settings) for row in batch]


# --- pack


@pytest.mark.parametrize("seed", range(60))
def test_packing_keeps_everything_once_and_nothing_too_long(seed):
    rng = np.random.default_rng(seed)
    T = int(rng.integers(1, 300))
    lengths, most = random_lengths(rng, T), int(rng.choice([1, 3, 64]))
    settings = {"row_length": T, "seed": seed, "max_per_row": most, "open_rows": int(rng.choice([1, 4, 1000]))}
    rows = packed(lengths, **settings)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(rows) and max(map(len, rows)) <= min(most, data.Packing(lengths, rows_per_batch=1, **settings).P)
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= T
    open_rows = [u for u, row in zip(used, rows, strict=True) if len(row) < most]
    if settings["open_rows"] == 1000 and len(open_rows) > 1:  # two half empty: they would have shared a row
        assert sorted(open_rows)[0] + sorted(open_rows)[1] > T
    assert rows == packed(lengths, **settings)


@pytest.mark.parametrize("mean", [5.5, 6.3, 6.8])  # logs: examples of some 300, 650 and 1,000 tokens
def test_packing_fills_rows_of_code_like_lengths(mean):
    """The bar is 0.95, also with pairs of half a row, of which only two fit."""
    lengths = np.clip(np.random.default_rng(0).lognormal(mean, 0.6, 20_000), 20, 2048).astype(int)
    _, fill = data.plan(data.Packing(lengths, row_length=2048, rows_per_batch=8, seed=0))
    assert fill > 0.95


def test_packing_is_a_stream():
    """A row is given away long before the last example is looked at, and few are open at once."""
    lengths = np.random.default_rng(0).integers(10, 200, 100_000)
    batches = iter(data.Packing(lengths, row_length=512, rows_per_batch=8, seed=0))
    next(batches)
    assert batches.next < 1000
    for _ in range(500):
        next(batches)
        assert len(batches.open) <= 64


def test_packing_depends_on_the_seed():
    lengths = list(range(1, 50))
    assert packed(lengths, row_length=64, seed=0) != packed(lengths, row_length=64, seed=1)


def test_packing_takes_the_best_fit():
    """Against best fit said plainly: the fullest row that still has room."""
    rng = np.random.default_rng(0)
    for seed in range(30):
        lengths, used = random_lengths(rng, 40), []
        for index in np.random.default_rng([seed, 0]).permutation(len(lengths)):
            fitting = [i for i, u in enumerate(used) if u + lengths[index] <= 40]
            row = max(fitting, key=lambda i: used[i], default=None)
            if row is None:
                used.append(lengths[index])
            else:
                used[row] += lengths[index]
        rows = packed(lengths, row_length=40, seed=seed, max_per_row=1000, open_rows=1000)
        assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(used)


def test_an_example_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="11 tokens does not fit a row of 10"):
        packed([3, 11], row_length=10)
    assert packed([], row_length=10) == packed([], row_length=10, epochs=None) == []


def test_only_the_examples_named_are_packed():
    assert packed([4, 5, 6, 7], row_length=10, only=[3, 1]) == [[3], [1]]


# --- rows


@pytest.mark.parametrize("C", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("seed", range(10))
def test_rows_hold_every_example_whole(C, seed):
    rng = np.random.default_rng(seed)
    examples = made_up(rng, int(rng.integers(1, 80)), C=C)
    ref = {e.id: rng.normal(size=C).astype(np.float32).tolist() for e in examples}
    T = 12 * (C + 1) + int(rng.integers(0, 60))
    packing = data.Packing([len(e) for e in examples], row_length=T, rows_per_batch=int(rng.integers(1, 6)), seed=seed)
    rows = [row for batch in packing for row in batch]
    batch = data.batch(examples, rows, T=T, P=packing.P, C=C, ref_logps=ref)
    ints = ("tokens", "positions", "segments", "branches", "sources", "slots")
    assert {name: (v.shape, str(v.dtype)) for name, v in batch.items()} == {
        **dict.fromkeys(ints, ((len(rows), T), "int32")),
        **dict.fromkeys(("ref_logps", "weight"), ((len(rows), packing.P, C), "float32"))}
    by_tokens = {tuple(itertools.chain(e.prompt, *e.completions)): e for e in examples}
    seen = Counter()
    for r, p, prompt, completions in unpack(batch):
        example = by_tokens[tuple(itertools.chain(prompt, *completions))]
        assert prompt == example.prompt.tolist()
        assert completions == [ids.tolist() for ids in example.completions]
        assert batch["weight"][r, p].tolist() == [1.0] * C
        assert batch["ref_logps"][r, p].tolist() == ref[example.id]
        seen[example.id] += 1
    assert seen == Counter(e.id for e in examples)
    assert batch["weight"].sum() == C * len(examples)
    assert data.plan(packing)[1] == pytest.approx((batch["segments"] > 0).sum() / (T * sum(map(bool, rows))))


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def test_prompt_and_padding_are_never_scored():
    row = data.row([data.Encoded("a", ids(5, 6, 7), (ids(8, 9),))], T=8, P=1, C=1)
    assert row["slots"].tolist() == [-1, -1, -1, 0, 0, -1, -1, -1]
    assert row["segments"].tolist() == [1] * 5 + [0] * 3
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_a_pair_shares_its_prompt():
    pair = data.Encoded("a", ids(5, 6), (ids(7), ids(8, 9)))
    row = data.row([pair, pair], T=12, P=2, C=2)
    assert row["tokens"].tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 0, 0]
    assert row["segments"].tolist() == [1] * 5 + [2] * 5 + [0, 0]
    assert row["branches"].tolist() == [0, 0, 1, 2, 2] * 2 + [0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 2, 3] * 2 + [0, 0]
    assert row["slots"].tolist() == [-1, -1, 0, 1, 1, -1, -1, 2, 3, 3, -1, -1]
    assert row["sources"].tolist() == [0, 0, 1, 1, 3, 0, 0, 6, 6, 8, 0, 0]
    assert row["weight"].tolist() == [[1, 1], [1, 1]]
    empty = data.row([], T=10, P=1, C=2)
    assert not empty["segments"].any() and (empty["slots"] == -1).all() and not empty["weight"].any()


# --- on disk


def test_what_is_stored_comes_back_in_the_order_of_the_file(tmp_path):
    examples = made_up(np.random.default_rng(0), 2500, C=2)
    for host in (0, 1, 2):
        data.store(tmp_path / f"{host}.arrow", examples[host::3], completions=2)
    stored = data.Stored([tmp_path / f"{host}.arrow" for host in (0, 1, 2)])
    assert len(stored) == 2500 and stored.C == 2 and not stored.repeated
    assert stored.ids == [e.id for e in examples]
    assert stored.lengths.tolist() == [len(e) for e in examples]
    assert stored.longest.tolist() == [e.longest for e in examples]
    for i in (0, 1, 999, 1000, 2499):
        got, want = stored[i], examples[i]
        assert (got.id, got.line, got.prompt.tolist()) == (want.id, want.line, want.prompt.tolist())
        assert [c.tolist() for c in got.completions] == [c.tolist() for c in want.completions]
    assert not list(tmp_path.glob("*.part"))


def test_an_id_that_two_hosts_have_counts_once(tmp_path):
    a, b = (data.Encoded("same", ids(1), (ids(2),), line) for line in (8, 3))
    for host, example in enumerate((a, b)):
        data.store(tmp_path / f"{host}.arrow", [example], completions=1)
    stored = data.Stored([tmp_path / "0.arrow", tmp_path / "1.arrow"])
    assert stored.repeated == ["same"] and [e.line for e in stored] == [3]


def test_storing_nothing_gives_nothing(tmp_path):
    data.store(tmp_path / "0.arrow", [], completions=2)
    assert len(data.Stored([tmp_path / "0.arrow"])) == 0


# --- epochs, hosts, resuming

R = 8


def source(count: int = 100, *, C: int = 1):
    return made_up(np.random.default_rng(count), count, C=C)


def packing_of(examples, *, epochs: int | None = 1, seed: int = 0) -> data.Packing:
    return data.Packing([len(e) for e in examples], row_length=48, rows_per_batch=R, seed=seed, epochs=epochs)


def batches_of(examples, packing, *, C: int = 1, **settings) -> list[dict]:
    with contextlib.closing(data.iterator(examples, packing, C=C, **settings)) as batches:
        return list(batches)


def join(*parts: dict) -> dict:
    """What the hosts hold together, as the device array of a global batch has it."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("C", KINDS.values(), ids=KINDS)
def test_every_example_exactly_once_an_epoch_in_a_new_order(C):
    examples = source(C=C)
    packing = packing_of(examples, epochs=3)
    order = [i for batch in packing for row in batch for i in row]
    epochs = [order[at:at + 100] for at in (0, 100, 200)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    batches = batches_of(examples, packing, C=C)
    assert len(batches) == data.plan(packing)[0]
    found = Counter(tuple(itertools.chain(prompt, *completions)) for batch in batches
                    for _, _, prompt, completions in unpack(batch))
    assert found == {tuple(itertools.chain(e.prompt, *e.completions)): 3 for e in examples}
    assert all(batch["weight"].any(axis=(1, 2)).all() for batch in batches[:-1])  # only the last has empty rows


def test_the_shuffle_is_global_and_set_by_the_seed():
    def order(seed):
        return [i for batch in packing_of(source(400), seed=seed) for row in batch for i in row]

    first = order(0)
    assert first == order(0) and first != order(1) and sorted(first) == list(range(400))
    moved = np.abs(np.array(first) - np.arange(len(first)))
    assert moved.mean() > len(first) / 5  # a random permutation: 1/3; within a window of R rows: far less


@pytest.mark.parametrize("C", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_together_hold_the_batch_of_one_and_read_no_other_example(hosts, C):
    class Watched(list):
        def __getitem__(self, index):
            touched[-1].add(index)
            return super().__getitem__(index)

    examples = source(C=C)
    packing, touched = packing_of(examples), []
    alone = batches_of(examples, packing, C=C)
    shares = []
    for host in range(hosts):
        touched.append(set())
        shares.append(batches_of(Watched(examples), packing, C=C, host=host, num_hosts=hosts))
    for whole, *parts in zip(alone, *shares, strict=True):
        assert {len(part["tokens"]) for part in parts} == {R // hosts}
        assert_same(join(*parts), whole)
    assert sorted(itertools.chain(*touched)) == list(range(100))  # each example on one host alone


def test_rows_that_do_not_divide_over_hosts_are_an_error():
    examples = source()
    with pytest.raises(ValueError, match="rows_per_batch 8 does not divide over 3 hosts"):
        data.iterator(examples, packing_of(examples), C=1, num_hosts=3)


@pytest.mark.parametrize("then", [1, 4])
@pytest.mark.parametrize("before", [1, 2])
@pytest.mark.parametrize("epochs", [3, None])
def test_resuming_anywhere_also_on_another_number_of_hosts(before, then, epochs):
    examples, total = source(), data.plan(packing_of(source(), epochs=3))[0] - 1
    packing = packing_of(examples, epochs=epochs)
    with contextlib.closing(data.iterator(examples, packing, C=1)) as batches:
        want = list(itertools.islice(batches, total))
    for done in (0, 1, total // 3, total // 2 + 1, total - 1):
        with contextlib.closing(data.iterator(examples, packing, C=1, host=before - 1, num_hosts=before)) as old:
            for _ in range(done):
                next(old)
            state = json.loads(json.dumps(old.get_state()))
            next(old)  # what it did after the checkpoint is done again
        rest = []
        for host in range(then):
            fresh = data.iterator(examples, packing_of(source(), epochs=epochs), C=1, host=host, num_hosts=then)
            fresh.set_state(state)
            rest.append(list(itertools.islice(fresh, total - done)))
            fresh.close()
        for parts, b in zip(zip(*rest, strict=True), want[done:], strict=True):
            assert_same(join(*parts), b)


# --- records to ids


def letters():
    """A tokenizer of single characters: lengths can be counted by eye."""
    chars = ["</s>", *map(chr, range(32, 127)), "\n"]
    raw = Tokenizer(models.WordLevel({char: i for i, char in enumerate(chars)}, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def encode(records, **settings) -> tuple[list[data.Encoded], Counter]:
    dropped = Counter()
    found = list(data.encode_all(enumerate(records, 1), letters(), dropped=dropped, **settings))
    return found, dropped


def test_in_is_out_plus_dropped_and_cuts_are_counted():
    chat = [{"role": "user", "content": "q"}]
    found = [Example(id="fits", prompt="ab", completion="c" * 7), Example(id="long", prompt="ab", completion="c" * 8),
             Example(id="all prompt", prompt="a" * 10, completion="c"), Example(id="lm", prompt="", completion="abc"),
             Example(id="eos", prompt="a", completion="b</s>c"), Example(id="chat", prompt=chat, completion="a")]
    kept, dropped = encode(found, max_length=10)
    assert [e.id for e in kept] == ["fits", "lm", "chat"] and dropped == {"too long": 2, "EOS inside": 1}
    assert [e.line for e in kept] == [1, 4, 6]
    assert len(found) == len(kept) + dropped.total()
    kept, dropped = encode(found, max_length=10, too_long="cut")
    assert [e.id for e in kept] == ["fits", "long", "lm", "chat"]
    assert dropped == {"too long": 1, "EOS inside": 1, "completion cut": 1}
    assert [len(e) for e in kept] == [10, 10, 4, 3]


def test_a_pair_fits_a_row_whole_or_is_dropped_whole():
    found = [Pair(id="fits", prompt="a", chosen="bbb", rejected="cccc"),  # 1 + 4 + 5
             Pair(id="long", prompt="a", chosen="b", rejected="ccccccc"),
             Pair(id="both", prompt="a", chosen="bbbb", rejected="cccc")]
    kept, dropped = encode(found, max_length=10)
    assert [e.id for e in kept] == ["fits"] and dropped == {"too long": 2}
    assert [len(e) for e in kept] == [10] and kept[0].longest == 6
    kept, dropped = encode(found, max_length=10, too_long="cut")
    assert [e.id for e in kept] == ["fits", "long", "both"] and dropped == {"completion cut": 4}
    assert [[len(c) for c in e.completions] for e in kept] == [[4, 4], [2, 4], [4, 4]]
    assert encode([], max_length=11) == ([], {})
    with pytest.raises(ValueError, match="got 'keep', expected 'drop' or 'cut'"):
        encode(found, max_length=11, too_long="keep")


def test_records_to_batches_and_back_to_text():
    tokenizer = letters()
    found = [Pair(id=str(i), prompt=f"p{i}:", chosen=f" good {i}", rejected=f" bad {i}\n") for i in range(30)]
    encoded, _ = encode(found, max_length=64)
    packing = data.Packing([len(e) for e in encoded], row_length=64, rows_per_batch=4, seed=0)
    read = set()
    for batch in batches_of(encoded, packing, C=2):
        for _, _, prompt, completions in unpack(batch):
            read.add(tuple("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (prompt, *completions)))
    assert read == {(p.prompt, p.chosen + "</s>", p.rejected + "</s>") for p in found}
