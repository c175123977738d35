"""Batched decoding: prompts in, n completions each out, the prompt run once for all its completions.

The local engine of engine.py; the command that answers a file of prompts is sample.py's.

Keys and values of a prompt [B S K H] are shared by its n sequences; each of the M = B * n sequences has its own
[M T K H] for what it has written. Decoding goes in jitted chunks of steps; between chunks the host looks for
stop strings. A completion depends on (seed, prompt id, k) alone, not on what it was batched with.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from align_jax import hf, mesh, model, text
from align_jax.mesh import spec
from align_jax.model import ModelConfig, Params
from align_jax.records import Text


@dataclasses.dataclass(frozen=True)
class Completion:
    """What one sequence wrote. `ids` and `logps` (temperature 1) include the EOS; `text` ends before it."""

    text: str
    finish: str  # "stop" (EOS or a stop string) or "length"; an endpoint also says "content_filter"
    ids: list[int]  # these two are empty from an endpoint
    logps: list[float]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """A model ready to sample: weights per layer, so that decoding can update its caches in place."""

    cfg: ModelConfig
    params: Params
    tokenizer: object
    stop_ids: tuple[int, ...]
    batch_size: int = 128

    @classmethod
    def of(cls, cfg: ModelConfig, params: Params, tokenizer, stop_ids: Sequence[int], **settings) -> "Sampler":
        """Take the weights of a model apart by layer."""
        by_layer = params | {"layers": _by_layer(params["layers"], cfg.L)}
        return cls(cfg, by_layer, tokenizer, tuple(stop_ids), **settings)

    @classmethod
    def load(cls, folder: str | Path, *, dtype: str, **settings) -> "Sampler":
        """Load a Hugging Face checkpoint to sample from."""
        cfg, params = hf.load(folder, dtype=dtype)
        tokenizer = text.load(folder)
        return cls.of(cfg, params, tokenizer, text.stop_ids(tokenizer, folder), **settings)

    def generate(self, prompts: Sequence[tuple[str, Text]], **settings) -> Iterator[tuple[str, list[Completion]]]:
        """Answer prompts as an engine: `sample` with this batch size."""
        return sample(self, prompts, **{"batch_size": self.batch_size} | settings)

    def too_long(self, prompts: Sequence[tuple[str, Text]], *, max_tokens: int) -> set[str]:
        """The ids of prompts that leave no room for an answer in the positions the model was trained for."""
        room = self.cfg.max_length - max_tokens
        return {name for name, prompt in prompts if len(text.encode_prompt(self.tokenizer, prompt)) > room}


def sample(sampler: Sampler, prompts: Sequence[tuple[str, Text]], *, n: int = 1, temperature: float = 1.0,
           top_p: float = 1.0, max_tokens: int = 256, stops: Sequence[str] = (), seed: int = 0,
           batch_size: int = 128, chunk: int = 32) -> Iterator[tuple[str, list[Completion]]]:
    """Yield (id, n completions) for every (id, prompt), batch by batch, in order of prompt length.

    `temperature` 0 is greedy. `batch_size` is the number of sequences at once. Stop strings are cut off.

    Raises:
      ValueError, at once: a setting out of its range; a prompt and its answer cannot fit the positions the model
        was trained for.
    """
    _check_settings(n=n, max_tokens=max_tokens, batch_size=batch_size, temperature=temperature, top_p=top_p)
    encoded = sorted(_encode(sampler, prompts, max_tokens), key=lambda item: len(item[1]))
    shards = mesh.num_row_shards()
    B = -(-max(batch_size // n, 1) // shards) * shards
    B = min(B, -(-len(encoded) // shards) * shards)
    B = max(B, 2)  # jax 0.10 cannot fold a key into an axis of one row

    def answers():
        for at in range(0, len(encoded), B):
            batch = encoded[at:at + B]
            ids, logps = _generate(sampler, batch, B, n, temperature, top_p, max_tokens, stops, seed, chunk)
            for b, (name, _) in enumerate(batch):
                rows = range(b * n, b * n + n)
                yield name, [_finish(sampler, ids[row], logps[row], stops) for row in rows]

    return answers()


def _check_settings(*, temperature: float, top_p: float, **counts: int) -> None:
    wrong = [f"{name}: got {value}, expected 1 or more" for name, value in counts.items() if value < 1]
    wrong += [f"temperature: got {temperature}, expected 0 or more"] * (not temperature >= 0)
    wrong += [f"top_p: got {top_p}, expected a share above 0, at most 1"] * (not 0 < top_p <= 1)
    if wrong:
        raise ValueError("sampling: " + "; ".join(wrong))


def _generate(sampler, batch, B, n, temperature, top_p, max_tokens, stops, seed,
              chunk) -> tuple[np.ndarray, np.ndarray]:
    """Run one batch to its end: ids and logps [M T], ids -1 behind the end."""
    S = -(-max(len(ids) for _, ids in batch) // 64) * 64  # few shapes, few compilations
    tokens, lengths = np.zeros((B, S), np.int32), np.ones(B, np.int32)
    for b, (_, ids) in enumerate(batch):
        tokens[b, :len(ids)], lengths[b] = ids, len(ids)
    names = np.array([zlib.crc32(name.encode()) for name, _ in batch] + [0] * (B - len(batch)), np.uint32)
    tokens, lengths, names = (jax.device_put(x, mesh.sharding("rows", *(None,) * (x.ndim - 1)))
                              for x in (tokens, lengths, names))
    prompt, state = _start(sampler.cfg, sampler.params, tokens, lengths, n=n, max_tokens=max_tokens)
    is_padding = np.repeat(np.arange(B) >= len(batch), n)
    state["done"] = jax.device_put(is_padding, mesh.sharding("rows"))
    for t in range(0, max_tokens, chunk):
        state = _steps(sampler.cfg, sampler.params, prompt, lengths, names, state, np.int32(min(t + chunk, max_tokens)),
                       np.int32(seed), temperature=temperature, top_p=top_p, stop_ids=sampler.stop_ids, n=n)
        done = _to_host(state["done"])
        if stops and not done.all():
            ids = _to_host(state["ids"])
            done = np.array([d or _has_stop(sampler.tokenizer, row, stops) for d, row in zip(done, ids, strict=True)])
            state["done"] = jax.device_put(done, mesh.sharding("rows"))
        if done.all():
            break
    return _to_host(state["ids"]), _to_host(state["logps"])


@partial(jax.jit, static_argnames=("cfg", "n", "max_tokens"))
def _start(cfg, params, tokens, lengths, *, n: int, max_tokens: int):
    """Run the prompts once: their keys and values by layer, and the state of the M sequences."""
    B, S = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(S), (B, S), out_sharding=spec("rows", None))
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    dtype = params["embed"].dtype
    mask = model.segment_mask(segments)
    keep = [lambda q, k, v: (model.attention(q, k, v, mask), (k, v))] * cfg.L
    x, prompt = model.cached(cfg, params, tokens, positions, keep, dtype=dtype)
    last = jnp.sum(jnp.where((positions == lengths[:, None] - 1)[..., None], x, 0), axis=1)  # [B D]

    M = B * n
    own = jnp.zeros((M, max_tokens, cfg.K, cfg.H), dtype, out_sharding=spec("rows", None, "heads", None))
    rows = spec("rows", None)
    state = {"x": _repeat(last, n), "t": jnp.int32(0), "caches": [(own, own)] * cfg.L,
             "ids": jnp.full((M, max_tokens), -1, jnp.int32, out_sharding=rows),
             "logps": jnp.zeros((M, max_tokens), jnp.float32, out_sharding=rows)}
    return prompt, state


@partial(jax.jit, static_argnames=("cfg", "temperature", "top_p", "stop_ids", "n"), donate_argnums=5)
def _steps(cfg, params, prompt, lengths, names, state, until, seed, *, temperature, top_p, stop_ids, n: int):
    """Decode until step `until`, or until every sequence is done."""
    keys = jax.vmap(lambda name: jax.random.fold_in(jax.random.key(seed), name))(names)
    keys = jax.vmap(lambda key: jax.vmap(lambda k: jax.random.fold_in(key, k))(jnp.arange(n)))(keys)
    keys = keys.reshape(-1, out_sharding=spec("rows"))
    starts = _repeat(lengths, n)
    head = model.head(params, state["x"].dtype)

    def body(state):
        t, done = state["t"], state["done"]
        logits = jax.sharding.reshard(model.unembed(head, state["x"]), spec("rows", None))
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys)
        token = _choose(logits, uniform, temperature=temperature, top_p=top_p)
        logp = _pick(jax.nn.log_softmax(logits), token)
        ids = state["ids"].at[:, t].set(jnp.where(done, -1, token))
        logps = state["logps"].at[:, t].set(jnp.where(done, 0.0, logp))
        attends = [partial(_attend, *theirs, lengths, *own, t)
                   for theirs, own in zip(prompt, state["caches"], strict=True)]
        x, caches = model.cached(cfg, params, token[:, None], (starts + t)[:, None], attends,
                                 dtype=state["x"].dtype)
        done = done | jnp.any(token[:, None] == jnp.array(stop_ids), axis=1)
        return {"x": x[:, 0], "t": t + 1, "done": done, "caches": caches, "ids": ids, "logps": logps}

    return jax.lax.while_loop(lambda s: (s["t"] < until) & ~jnp.all(s["done"]), body, state)


def _attend(their_k, their_v, lengths, own_k, own_v, t, q, k, v):
    """Attend to the shared prompt [B S K H] and to the own past [M T K H], k and v of step t included."""
    own_k, own_v = (jax.lax.dynamic_update_slice_in_dim(own, new, t, axis=1) for own, new in ((own_k, k), (own_v, v)))
    M, _, N, H = q.shape
    B, S, K, _ = their_k.shape
    split = spec("rows", None, "heads", None, None)
    q = q[:, 0].reshape(B, M // B, K, N // K, H, out_sharding=split)
    mine_k, mine_v = (own.reshape(B, M // B, *own.shape[1:], out_sharding=spec("rows", None, None, "heads", None))
                      for own in (own_k, own_v))
    f32 = {"preferred_element_type": jnp.float32}
    theirs = jnp.einsum("BnKGH,BSKH->BnKGS", q, their_k, **f32) * H**-0.5  # in float32, as training does
    mine = jnp.einsum("BnKGH,BnTKH->BnKGT", q, mine_k, **f32) * H**-0.5
    theirs = jnp.where((jnp.arange(S) < lengths[:, None])[:, None, None, None], theirs, -jnp.inf)
    mine = jnp.where(jnp.arange(own_k.shape[1]) <= t, mine, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([theirs, mine], axis=-1), axis=-1).astype(q.dtype)
    mixed = (jnp.einsum("BnKGS,BSKH->BnKGH", weights[..., :S], their_v)
             + jnp.einsum("BnKGT,BnTKH->BnKGH", weights[..., S:], mine_v))
    return mixed.reshape(M, 1, N, H, out_sharding=spec("rows", None, "heads", None)), (own_k, own_v)


def _choose(logits, uniform, *, temperature: float, top_p: float):
    """Pick a token of each [M V] row by inverting its cumulative distribution at `uniform` in [0, 1)."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    probs = jax.nn.softmax(logits / temperature)
    order = jnp.argsort(-probs, axis=-1) if top_p < 1 else None
    if order is not None:  # the smallest set of tokens that holds top_p of the mass
        probs = jnp.take_along_axis(probs, order, axis=-1)
        probs = jnp.where(jnp.cumsum(probs, axis=-1) - probs < top_p, probs, 0.0)
    mass = jnp.cumsum(probs, axis=-1)
    index = jnp.sum(mass <= uniform[:, None] * mass[:, -1:], axis=-1).astype(jnp.int32)
    index = jnp.minimum(index, logits.shape[-1] - 1)
    return index if order is None else _pick(order, index)


def _pick(values, index):
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]


def _repeat(x, n: int):
    """[B ...] to [B * n ...], the n copies of a row side by side."""
    B, *rest = x.shape
    wide = jnp.broadcast_to(x[:, None], (B, n, *rest), out_sharding=spec("rows", None, *(None,) * len(rest)))
    return wide.reshape(B * n, *rest, out_sharding=spec("rows", *(None,) * len(rest)))


def _finish(sampler, ids: np.ndarray, logps: np.ndarray, stops: Sequence[str]) -> Completion:
    """Cut a sequence at its EOS or first stop string."""
    ids = ids[ids >= 0].tolist()
    ended = bool(ids) and ids[-1] in sampler.stop_ids
    written = text.decode(sampler.tokenizer, ids[:-1] if ended else ids)
    was_stopped = any(stop in written for stop in stops)
    if was_stopped:  # as if looked for behind every token, so that `chunk` changes nothing
        ids = _ids_up_to(sampler.tokenizer, ids, stops)
        written = text.decode(sampler.tokenizer, ids)
        written = written[:min(at for at in map(written.find, stops) if at >= 0)]
    finish = "stop" if ended or was_stopped else "length"
    return Completion(written, finish, ids, logps[:len(ids)].tolist())


def _ids_up_to(tokenizer, ids: list[int], stops: Sequence[str]) -> list[int]:
    """The shortest prefix of ids whose text holds a stop string."""
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        held = any(stop in text.decode(tokenizer, ids[:middle]) for stop in stops)
        low, high = (low, middle) if held else (middle + 1, high)
    return ids[:low]


def _has_stop(tokenizer, ids: np.ndarray, stops: Sequence[str]) -> bool:
    written = text.decode(tokenizer, ids[ids >= 0])
    return any(stop in written for stop in stops)


def _encode(sampler, prompts, max_tokens: int) -> list[tuple[str, list[int]]]:
    """Tokenise the prompts; name all that cannot be answered at once."""
    encoded, bad, room = [], [], sampler.cfg.max_length - max_tokens
    for name, prompt in prompts:
        try:
            encoded.append((name, text.encode_prompt(sampler.tokenizer, prompt)))
            if not 0 < len(encoded[-1][1]) <= room:
                bad.append(f"{name}: {len(encoded[-1][1])} tokens")
        except text.Unusable as error:
            bad.append(f"{name}: {error}")
    if bad:
        raise ValueError(f"{len(bad)} prompt(s) cannot be answered, expected 1 to {room} tokens, for "
                         f"max_tokens={max_tokens} are kept of the model's {sampler.cfg.max_length} positions: "
                         f"{'; '.join(bad[:5])}")
    return encoded


def _by_layer(stacked: dict, L: int) -> list[dict]:
    """[L ...] arrays to a list of layers."""
    return [{name: stack[i] for name, stack in stacked.items()} for i in range(L)]


def _to_host(x) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
