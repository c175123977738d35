"""Packing and batching: what goes in comes out once, whole, in its place, on any number of hosts."""

import itertools
from collections import Counter

import numpy as np
import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from align_jax import data, text
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
    number, examples = itertools.count(1), []
    for index in range(count):
        sides = []
        for _ in range(C):
            prompt, completion = rng.integers(0, longest), rng.integers(2, longest)  # with EOS two at least
            sides.append(text.Tokens(*(np.array(list(itertools.islice(number, int(n))), np.int32)
                                       for n in (prompt, completion))))
        examples.append(data.Encoded(str(index), tuple(sides)))
    return examples


def unpack(batch: dict) -> list[tuple]:
    """Read examples back out of a batch by `segments`, `positions` and `slots` alone.

    Returns (row, p, sides), a side being (ids that are not scored, ids that are).
    """
    found = []
    for r, (tokens, positions, segments, slots) in enumerate(zip(
            *(batch[name] for name in ("tokens", "positions", "segments", "slots")), strict=True)):
        C = batch["weight"].shape[2]
        sides = {}
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            assert (np.diff(at) == 1).all() and (positions[at] == np.arange(len(at))).all()
            scored = slots[at] >= 0
            [slot] = set(slots[at][scored].tolist())
            start = int(np.argmax(scored))
            assert scored[start:].all() and start >= 1  # a suffix, and never the first of a segment
            sides[slot] = (tokens[at][:start].tolist(), tokens[at][start:].tolist())
        for p in range(len(sides) // C):
            found.append((r, p, [sides[p * C + c] for c in range(C)]))
        assert len(sides) % C == 0 and set(sides) == set(range(len(sides)))
        is_padding = segments == 0
        for name, value in (("tokens", 0), ("positions", 0), ("slots", -1)):
            assert (batch[name][r][is_padding] == value).all()
    return found


# --- pack


@pytest.mark.parametrize("seed", range(60))
def test_packing_keeps_everything_once_and_nothing_too_long(seed):
    rng = np.random.default_rng(seed)
    T = int(rng.integers(1, 300))
    lengths, most = random_lengths(rng, T), int(rng.choice([1, 3, 64]))
    rows = data.pack(lengths, row_length=T, seed=seed, max_per_row=most)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(rows) and max(map(len, rows)) <= most
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= T
    open_rows = [u for u, row in zip(used, rows, strict=True) if len(row) < most]
    if len(open_rows) > 1:  # were two rows half empty, the later one's examples would have gone into the earlier
        assert sorted(open_rows)[0] + sorted(open_rows)[1] > T
    assert rows == data.pack(lengths, row_length=T, seed=seed, max_per_row=most)


def test_packing_fills_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.7, 20_000), 20, 2048).astype(int).tolist()
    rows = data.pack(lengths, row_length=2048, seed=0)
    assert sum(lengths) / (len(rows) * 2048) > 0.99


def test_packing_depends_on_the_seed():
    lengths = list(range(1, 50))
    assert data.pack(lengths, row_length=64, seed=0) != data.pack(lengths, row_length=64, seed=1)


def test_packing_takes_the_best_fit():
    """Against best fit said plainly: the fullest row that still has room."""
    rng = np.random.default_rng(0)
    for seed in range(30):
        lengths, used = random_lengths(rng, 40), []
        for index in np.random.default_rng(seed).permutation(len(lengths)):
            fitting = [i for i, u in enumerate(used) if u + lengths[index] <= 40]
            row = max(fitting, key=lambda i: used[i], default=None)
            if row is None:
                used.append(lengths[index])
            else:
                used[row] += lengths[index]
        rows = data.pack(lengths, row_length=40, seed=seed, max_per_row=1000)
        assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(used)


def test_an_example_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="11 tokens does not fit a row of 10"):
        data.pack([3, 11], row_length=10, seed=0)
    assert data.pack([], row_length=10, seed=0) == []


# --- rows


@pytest.mark.parametrize("C", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("seed", range(10))
def test_rows_hold_every_example_whole(C, seed):
    rng = np.random.default_rng(seed)
    examples = made_up(rng, int(rng.integers(1, 80)), C=C)
    ref = {e.id: rng.normal(size=C).astype(np.float32).tolist() for e in examples}
    T, R = 24 * C + int(rng.integers(0, 60)), int(rng.integers(1, 6))
    rows = data.Rows(examples, row_length=T, rows_per_batch=R, seed=seed, ref_logps=ref)
    assert len(rows) % R == 0 and rows.C == C
    batch = rows.batch(range(len(rows)))
    P = rows.P
    assert {name: (v.shape, str(v.dtype)) for name, v in batch.items()} == {
        **dict.fromkeys(("tokens", "positions", "segments", "slots"), ((len(rows), T), "int32")),
        **dict.fromkeys(("ref_logps", "weight"), ((len(rows), P, C), "float32"))}

    by_tokens = {tuple(side.prompt) + tuple(side.completion): (example, c)
                 for example in examples for c, side in enumerate(example.completions)}
    seen = Counter()
    for r, p, sides in unpack(batch):
        whose = {by_tokens[(*prompt, *completion)][0].id for prompt, completion in sides}
        assert len(whose) == 1  # both completions of an example in one row, in the order of C
        for c, (prompt, completion) in enumerate(sides):
            example, was_c = by_tokens[(*prompt, *completion)]
            tokens = example.completions[c]
            assert was_c == c
            if len(tokens.prompt):
                assert prompt == tokens.prompt.tolist() and completion == tokens.completion.tolist()
            else:  # a first token has nothing before it to be predicted from
                assert prompt == tokens.completion[:1].tolist() and completion == tokens.completion[1:].tolist()
        seen.update(whose)
        assert batch["weight"][r, p].tolist() == [1.0] * C
        assert batch["ref_logps"][r, p].tolist() == ref[example.id]
    assert seen == Counter(e.id for e in examples)
    assert batch["weight"].sum() == C * len(examples)
    assert rows.fill == pytest.approx((batch["segments"] > 0).sum() / (T * sum(map(bool, rows.packed))))


def test_prompt_and_padding_are_never_scored():
    side = text.Tokens(np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32))
    rows = data.Rows([data.Encoded("a", (side,))], row_length=8, rows_per_batch=1, seed=0)
    assert rows[0]["slots"].tolist() == [-1, -1, -1, 0, 0, -1, -1, -1]
    assert rows[0]["segments"].tolist() == [1] * 5 + [0] * 3
    assert rows[0]["positions"].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


def test_a_pairs_sides_share_no_segment():
    chosen, rejected = (text.Tokens(np.array([5, 6], np.int32), np.array(ids, np.int32)) for ids in ([7], [8, 9]))
    rows = data.Rows([data.Encoded("a", (chosen, rejected))], row_length=10, rows_per_batch=2, seed=0)
    assert rows[0]["tokens"].tolist() == [5, 6, 7, 5, 6, 8, 9, 0, 0, 0]
    assert rows[0]["segments"].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0, 0]
    assert rows[0]["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 0, 0]
    assert rows[0]["slots"].tolist() == [-1, -1, 0, -1, -1, 1, 1, -1, -1, -1]
    assert not rows[1]["segments"].any() and (rows[1]["slots"] == -1).all() and not rows[1]["weight"].any()


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        data.Rows([], row_length=8, rows_per_batch=1, seed=0)


# --- epochs, hosts, resuming

R = 8


def rows_of(count: int = 100, *, C: int = 1, **settings) -> data.Rows:
    examples = made_up(np.random.default_rng(count), count, C=C)
    return data.Rows(examples, row_length=48, rows_per_batch=R, seed=3, **settings)


def take(batches, count: int) -> list[dict]:
    return [next(batches) for _ in range(count)]


def join(*parts: dict) -> dict:
    """What the hosts hold together, as the device array of a global batch has it."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("C", KINDS.values(), ids=KINDS)
def test_every_example_exactly_once_an_epoch_in_a_new_order(C):
    rows = rows_of(C=C)
    per_epoch = len(rows) // R
    batches = list(data.iterator(rows, rows_per_batch=R, seed=0, epochs=3))
    assert len(batches) == 3 * per_epoch
    epochs = [join(*batches[at:at + per_epoch]) for at in range(0, len(batches), per_epoch)]
    want = sorted(s for e in rows.encoded for side in e.completions for s in [*side.prompt, *side.completion])
    for epoch in epochs:
        assert epoch["weight"].sum() == C * len(rows.encoded)
        assert sorted(epoch["tokens"][epoch["segments"] > 0].tolist()) == want
    assert not any((a["tokens"] == b["tokens"]).all() for a, b in itertools.combinations(epochs, 2))
    for batch in batches:
        assert batch["weight"].any()  # fewer empty rows than a batch has


def test_the_shuffle_is_global_and_set_by_the_seed():
    rows = rows_of(400)
    place = {rows[i]["tokens"].tobytes(): i for i, examples in enumerate(rows.packed) if examples}

    def order(seed):
        batches = data.iterator(rows, rows_per_batch=R, seed=seed, epochs=1)
        return [place[row.tobytes()] for batch in batches for row in batch["tokens"] if row.any()]

    first = order(0)
    assert first == order(0) and first != order(1) and sorted(first) == list(range(len(place)))
    moved = np.abs(np.array(first) - np.arange(len(first)))
    assert moved.mean() > len(first) / 5  # a random permutation: 1/3; within a window of R rows: far less


@pytest.mark.parametrize("C", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_together_hold_the_batch_of_one(hosts, C):
    rows = rows_of(C=C)
    alone = data.iterator(rows, rows_per_batch=R, seed=0, epochs=2)
    shares = [data.iterator(rows, rows_per_batch=R, seed=0, epochs=2, host=h, num_hosts=hosts) for h in range(hosts)]
    count = 0
    for whole, *parts in zip(alone, *shares, strict=True):
        assert {len(part["tokens"]) for part in parts} == {R // hosts}
        assert_same(join(*parts), whole)
        count += 1
    assert count == 2 * len(rows) // R


def test_rows_that_do_not_divide_over_hosts_are_an_error():
    with pytest.raises(ValueError, match="rows_per_batch 8 does not divide over 3 hosts"):
        data.iterator(rows_of(), rows_per_batch=R, seed=0, epochs=1, num_hosts=3)


@pytest.mark.parametrize("then", [1, 2, 4])
@pytest.mark.parametrize("before", [1, 2])
def test_resuming_anywhere_also_on_another_number_of_hosts(before, then):
    rows = rows_of()
    per_epoch = len(rows) // R
    want = list(data.iterator(rows, rows_per_batch=R, seed=0, epochs=3))
    for done in (0, 1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch + 2, 3 * per_epoch - 1):
        old = data.iterator(rows, rows_per_batch=R, seed=0, epochs=3, host=before - 1, num_hosts=before)
        take(old, done)
        state = old.get_state()
        take(old, min(2, 3 * per_epoch - done))  # what it did after the checkpoint is done again
        fresh = [data.iterator(rows_of(), rows_per_batch=R, seed=0, epochs=3, host=h, num_hosts=then)
                 for h in range(then)]
        for share in fresh:
            share.set_state(state)
        rest = [join(*parts) for parts in zip(*fresh, strict=True)]
        assert len(rest) == len(want) - done
        for a, b in zip(rest, want[done:], strict=True):
            assert_same(a, b)


def test_reference_log_probs_may_come_after_the_iterator():
    rows = rows_of()
    batches = data.iterator(rows, rows_per_batch=R, seed=0, epochs=1)
    rows.ref_logps = {e.id: [7.0] for e in rows.encoded}  # as the trainer does it
    for batch in batches:
        assert (batch["ref_logps"] == 7.0 * batch["weight"]).all()


# --- records to ids


def letters():
    """A tokenizer of single characters: lengths can be counted by eye."""
    chars = ["</s>", *map(chr, range(32, 127)), "\n"]
    raw = Tokenizer(models.WordLevel({char: i for i, char in enumerate(chars)}, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return tokenizer


def test_in_is_out_plus_dropped_and_cuts_are_counted():
    tokenizer = letters()
    chat = [{"role": "user", "content": "q"}]
    found = [Example(id="fits", prompt="ab", completion="c" * 7), Example(id="long", prompt="ab", completion="c" * 8),
             Example(id="all prompt", prompt="a" * 10, completion="c"), Example(id="lm", prompt="", completion="abc"),
             Example(id="eos", prompt="a", completion="b</s>c"), Example(id="chat", prompt=chat, completion="a")]
    kept, dropped = data.encode(found, tokenizer, max_length=10)
    assert [e.id for e in kept] == ["fits", "lm", "chat"] and dropped == {"too long": 2, "EOS inside": 1}
    assert len(found) == len(kept) + dropped.total()
    kept, dropped = data.encode(found, tokenizer, max_length=10, too_long="cut")
    assert [e.id for e in kept] == ["fits", "long", "lm", "chat"]
    assert dropped == {"too long": 1, "EOS inside": 1, "completion cut": 1}
    assert [len(e) for e in kept] == [10, 10, 4, 3]


def test_a_pair_fits_a_row_whole_or_is_dropped_whole():
    tokenizer = letters()
    found = [Pair(id="fits", prompt="a", chosen="bbb", rejected="c"),
             Pair(id="long", prompt="a", chosen="b", rejected="cccc"),
             Pair(id="both", prompt="a", chosen="bbbb", rejected="cccc")]
    kept, dropped = data.encode(found, tokenizer, max_length=11)
    assert [e.id for e in kept] == ["fits", "long"] and dropped == {"too long": 1}
    kept, dropped = data.encode(found, tokenizer, max_length=11, too_long="cut")
    assert [e.id for e in kept] == ["fits", "long", "both"] and dropped == {"completion cut": 3}
    assert all(len(side) <= 5 for e in kept for side in e.completions)
    data.Rows(kept, row_length=11, rows_per_batch=1, seed=0)
    assert data.encode([], tokenizer, max_length=11) == ([], {})
    with pytest.raises(ValueError, match="got 'keep', expected 'drop' or 'cut'"):
        data.encode(found, tokenizer, max_length=11, too_long="keep")


def test_records_to_batches_and_back_to_text():
    tokenizer = letters()
    found = [Pair(id=str(i), prompt=f"p{i}:", chosen=f" good {i}", rejected=f" bad {i}\n") for i in range(30)]
    encoded, _ = data.encode(found, tokenizer, max_length=64)
    rows = data.Rows(encoded, row_length=64, rows_per_batch=4, seed=0)
    read = set()
    for batch in data.iterator(rows, rows_per_batch=4, seed=0, epochs=1):
        for _, _, sides in unpack(batch):
            read.add(tuple("".join(tokenizer.convert_ids_to_tokens(ids)) for side in sides for ids in side))
    assert read == {(p.prompt, p.chosen + "</s>", p.prompt, p.rejected + "</s>") for p in found}
