"""The slots of a decode step: each holds one sequence, and is given the next one while the others go on.

All slots write keys and values into the same column of a ring, so that a step updates its caches in place by one slice
and needs no scatter. A slot sees the columns no older than its own tokens: admitting a prompt writes them behind the
current column. What all prompts begin with is kept once for all slots. Shapes never change: nothing is recompiled.

Activations are [D R T], features first, and weights have a row for every output: on a CPU a fifth faster than the
training layout for the few rows that a step has, and no different elsewhere.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from align_jax import attention, model
from align_jax.mesh import spec
from align_jax.model import ModelConfig, Params


@partial(jax.jit, static_argnames="cfg")
def prepare(cfg: ModelConfig, params: Params) -> Params:
    """Lay weights out for decoding: layers apart, and side by side what is multiplied with the same input."""
    def of_layer(w):
        q, k, v = (jnp.moveaxis(w[name], 0, -1) for name in "qkv")
        made = {"attn_norm": w["attn_norm"], "mlp_norm": w["mlp_norm"], "qkv": _by_head(cfg, q, k, v),
                "o": jnp.moveaxis(w["o"], -1, 0).reshape(cfg.D, -1, out_sharding=spec("embed", "heads")),
                "gate_up": jnp.stack([w["gate"].T, w["up"].T]), "down": w["down"].T}
        if cfg.qkv_bias:
            made["qkv_bias"] = _by_head(cfg, *(w[name + "_bias"] for name in "qkv"))
        return made | ({"o_bias": w["o_bias"]} if cfg.o_bias else {})

    return params | {"layers": [of_layer({name: stack[l] for name, stack in params["layers"].items()})
                                for l in range(cfg.L)]}


def _by_head(cfg: ModelConfig, q, k, v):
    """[N H ..] and twice [K H ..] to [K G+2 H ..]: whatever splits the heads splits all three."""
    split = spec("heads", None, None, *["embed"] * (q.ndim - 2))
    q = q.reshape(cfg.K, cfg.N // cfg.K, *q.shape[1:], out_sharding=split)
    return jnp.concatenate([q, k[:, None], v[:, None]], axis=1)


@partial(jax.jit, static_argnames="cfg")
def prefill(cfg: ModelConfig, params: Params, prefix: list, offset, tokens, lengths) -> dict:
    """Run prompts [B T], padded in front, that stand `offset` tokens behind their common start.

    Returns what `admit` takes: the last hidden states "x" [D B], "caches" of keys [B K H T] and values [B K T H].
    """
    T = tokens.shape[1]
    at = jnp.arange(T) - (T - lengths[:, None])
    is_real = (at >= 0).astype(jnp.int32)
    mask = attention.visible(is_real, jnp.zeros_like(is_real))[:, None, None]

    def keep(q, k, v, before):
        own = jnp.moveaxis(k, 1, 3), jnp.moveaxis(v, 1, 2)
        return _attention(q, *before, (*own, mask)), own

    attends = [partial(keep, before=before) for before in prefix]
    x, caches = _run(cfg, params, tokens, offset + jnp.maximum(at, 0), attends)
    everywhere = spec(None, "heads", None, None)
    return {"x": jax.sharding.reshard(x[:, :, -1], spec(None, None)),
            "caches": jax.tree.map(lambda own: jax.sharding.reshard(own, everywhere), caches)}


@jax.jit
def shared(prefilled: dict, length) -> list:
    """The part that everyone sees, layer by layer, of a common start of `length` tokens that was prefilled."""
    padded = prefilled["caches"][0][0].shape[3]
    return [((keys[0], values[0], jnp.arange(padded) >= padded - length),) for keys, values in prefilled["caches"]]


@partial(jax.jit, static_argnames=("cfg", "slots", "ring", "dtype"))
def empty(cfg: ModelConfig, *, slots: int, ring: int, dtype) -> dict:
    """M slots before anything was admitted; `ring` columns hold the longest prompt and its answer."""
    split = spec("rows", "heads", None, None)
    keys, values = (jnp.zeros(shape, dtype, out_sharding=split)
                    for shape in ((slots, cfg.K, cfg.H, ring), (slots, cfg.K, ring, cfg.H)))
    return {"x": jnp.zeros((cfg.D, slots), dtype, out_sharding=spec(None, "rows")),
            "caches": [(keys, values)] * cfg.L}


def resize(state: dict, column, *, ring: int) -> None:
    """Give the slots a ring of another size, layer by layer; what comes next goes into its column 0."""
    for layer, (keys, values) in enumerate(state["caches"]):
        state["caches"][layer] = _resized(keys, column, axis=3, ring=ring), _resized(values, column, axis=2, ring=ring)


@partial(jax.jit, static_argnames=("axis", "ring"))
def _resized(cache, column, *, axis: int, ring: int):
    cache = jnp.roll(cache, -column, axis)  # the oldest first
    width = [(0, 0)] * axis + [(max(ring - cache.shape[axis], 0), 0)] + [(0, 0)] * (3 - axis)
    return jax.lax.slice_in_dim(jnp.pad(cache, width), -ring, None, axis=axis)


@partial(jax.jit, donate_argnums=0)
def admit(state: dict, prefilled: dict, which, column) -> dict:
    """Give slot m the prompt of row `which[m]`, -1 to let it go on; its tokens end before `column`."""
    which = jax.sharding.reshard(which, spec("rows"))
    x = prefilled["x"].at[:, which].get(out_sharding=spec(None, "rows"))
    put = partial(_put, which=which, column=column)
    caches = [(put(*keys, axis=3), put(*values, axis=2)) for keys, values in
              (zip(ring, new, strict=True) for ring, new in zip(state["caches"], prefilled["caches"], strict=True))]
    return {"x": jnp.where(which >= 0, x, state["x"]), "caches": caches}


def _put(ring, new, which, column, axis: int):
    """Write prompts into the columns before `column`: where they wrap around, some at the end, some at the start."""
    columns, width = ring.shape[axis], min(new.shape[axis], ring.shape[axis])
    new = jax.lax.slice_in_dim(new, new.shape[axis] - width, None, axis=axis)
    new = new.at[which].get(out_sharding=spec("rows", "heads", None, None))
    first = (column - width) % columns
    for start in (jnp.minimum(first, columns - width), 0):
        source = (start + jnp.arange(width) - first) % columns  # below width: which of the new columns comes here
        along = tuple(None if d != axis else slice(None) for d in range(4))
        is_new = (source < width)[along] & (which >= 0)[:, None, None, None]
        fresh = jnp.take(new, jnp.minimum(source, width - 1), axis=axis)
        old = jax.lax.dynamic_slice_in_dim(ring, start, width, axis)
        ring = jax.lax.dynamic_update_slice_in_dim(ring, jnp.where(is_new, fresh, old), start, axis)
    return ring


@partial(jax.jit, static_argnames=("cfg", "temperature", "top_p", "stop_ids", "chunk"), donate_argnums=3)
def decode(cfg: ModelConfig, params: Params, prefix: list, state: dict, table: dict, column, enough, *,
           temperature: float, top_p: float, stop_ids: tuple[int, ...], chunk: int):
    """Decode `chunk` steps, or until `enough` slots have nothing to do.

    `table` says of every slot [M] its `key` words (seed, name, k), the tokens it has seen (`age` in its ring,
    `offset` before), those it has written, and its `limit`; one that has reached it does nothing.
    Returns the state, tokens and logps [chunk M], -1 where nothing was written, and the number of steps.
    """
    uniforms = jax.sharding.reshard(_uniforms(table, chunk), spec(None, None, "rows"))
    age, written, limit = (jax.sharding.reshard(table[name], spec("rows")) for name in ("age", "written", "limit"))
    head = model.head(params, state["x"].dtype)
    ring = jnp.arange(state["caches"][0][0].shape[3])

    def write(q, k, v, before, cache, at, mask):
        cache = tuple(jax.lax.dynamic_update_slice_in_dim(ring, jnp.moveaxis(new, 1, axis), at, axis)
                      for ring, new, axis in zip(cache, (k, v), (3, 2), strict=True))
        return _attention(q, *before, (*cache, mask)), cache

    def step(s):
        i, at = s["i"], (column + s["i"]) % len(ring)
        logits = jnp.einsum("VD,DM->VM", head, s["x"], preferred_element_type=jnp.float32,
                            out_sharding=spec("vocab", "rows"))
        token, logp = _choose(jax.sharding.reshard(logits, spec(None, "rows")), uniforms[i],
                              temperature=temperature, top_p=top_p)
        mask = ((at - ring) % len(ring) <= (age + i)[:, None])[:, None, None, None]
        attends = [partial(write, before=before, cache=cache, at=at, mask=mask)
                   for before, cache in zip(prefix, s["caches"], strict=True)]
        x, caches = _run(cfg, params, token[:, None], (table["offset"] + age + i)[:, None], attends)
        done = s["done"] | (written + i + 1 >= limit) | jnp.any(token == jnp.array(stop_ids)[:, None], axis=0)
        return {"i": i + 1, "x": x[:, :, 0], "caches": caches, "done": done,
                "tokens": s["tokens"].at[i].set(jnp.where(s["done"], -1, token)),
                "logps": s["logps"].at[i].set(jnp.where(s["done"], 0.0, logp))}

    blank = partial(jnp.zeros, (chunk, len(age)), out_sharding=spec(None, "rows"))
    start = state | {"i": jnp.int32(0), "done": written >= limit, "tokens": blank(jnp.int32) - 1,
                     "logps": blank(jnp.float32)}
    end = jax.lax.while_loop(lambda s: (s["i"] < chunk) & (jnp.sum(s["done"]) < enough), step, start)
    return {"x": end["x"], "caches": end["caches"]}, end["tokens"], end["logps"], end["i"]


def _uniforms(table: dict, chunk: int):
    """Two numbers in [0, 1) for every step and slot, [chunk 2 M], that depend on its seed, name, k and token alone."""
    def draw(name, k, written):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(table["seed"]), name), k)
        return jax.random.uniform(jax.random.fold_in(key, written), (2,))

    at = table["written"] + jnp.arange(chunk)[:, None]
    drawn = jax.vmap(jax.vmap(draw), (None, None, 0))(table["name"], table["k"], at)
    return jnp.moveaxis(drawn, 2, 1)


# --- the model, features first ---------------------------------------------------------------------------------------


def _run(cfg: ModelConfig, params: Params, tokens, positions, attends) -> tuple:
    """Run tokens [R T] to hidden states [D R T]; layer l attends, and keeps what it keeps, by `attends[l]`.

    The layers are unrolled and their caches separate arrays, so that a loop updates them in place; through
    `lax.scan` every step would copy every cache whole.
    """
    x = jnp.moveaxis(model.embed(params, tokens, params["embed"].dtype), -1, 0)
    rotate = model.rotation(cfg.rope, positions, cfg.H, x.dtype)
    kept = []
    for weights, attend in zip(params["layers"], attends, strict=True):
        x, own = _layer(cfg, weights, x, rotate, attend)
        kept.append(own)
    return _norm(x, params["final_norm"], cfg.norm_eps), kept


def _layer(cfg: ModelConfig, w: dict, x, rotate, attend) -> tuple:
    """One layer of model.Layers on [D R T]."""
    G, narrow = cfg.N // cfg.K, spec(None, "rows", None)
    qkv = jnp.einsum("KAHD,DRT->KAHRT", w["qkv"], _norm(x, w["attn_norm"], cfg.norm_eps),
                     out_sharding=spec("heads", None, None, "rows", None))
    qkv = qkv + w["qkv_bias"][..., None, None] if "qkv_bias" in w else qkv
    qkv = jnp.moveaxis(qkv, (3, 4), (0, 1))
    q = qkv[:, :, :, :G].reshape(*qkv.shape[:2], cfg.N, cfg.H, out_sharding=spec("rows", None, "heads", None))
    mixed, kept = attend(rotate(q), rotate(qkv[:, :, :, G]), qkv[:, :, :, G + 1])
    y = jnp.einsum("DA,RTA->DRT", w["o"], mixed, out_sharding=narrow)
    x = x + (y + w["o_bias"][:, None, None] if "o_bias" in w else y)

    wide = jnp.einsum("CFD,DRT->CFRT", w["gate_up"], _norm(x, w["mlp_norm"], cfg.norm_eps),
                      out_sharding=spec(None, "mlp", "rows", None))
    return x + jnp.einsum("DF,FRT->DRT", w["down"], jax.nn.silu(wide[0]) * wide[1], out_sharding=narrow), kept


def _norm(x, weight, eps: float):
    """model.rms_norm over the leading axis."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, 0, keepdims=True) + eps)
    return y.astype(x.dtype) * weight[:, None, None]


def _attention(q, *parts):
    """Attend [R T N H] to parts of what came before: keys [R K H S], values [R K S H], a mask that fits [R K G T S].

    Parts without R are seen by all rows. One softmax in fp32 over all parts, divided by its sum at the end; the result
    has its heads in one axis [R T N*H].
    """
    R, T, N, H = q.shape
    K = parts[0][0].shape[-3]
    q = q.reshape(R, T, K, N // K, H, out_sharding=spec("rows", None, "heads", None, None))
    f32 = {"preferred_element_type": jnp.float32}
    scores = [jnp.where(mask, jnp.einsum(f"RKGTH,{'RKHS'[-keys.ndim:]}->RKGTS", jnp.moveaxis(q, 1, 3), keys, **f32)
                        * H**-0.5, -jnp.inf) for keys, _, mask in parts]
    top = jnp.max(jnp.stack([jnp.max(s, axis=-1) for s in scores]), axis=0)[..., None]
    weights = [jnp.exp(s - top) for s in scores]
    mixed = sum(jnp.einsum(f"RKGTS,{'RKSH'[-values.ndim:]}->RKGTH", w.astype(q.dtype), values, **f32)
                for w, (_, values, _) in zip(weights, parts, strict=True))
    mixed = (mixed / sum(jnp.sum(w, axis=-1) for w in weights)[..., None]).astype(q.dtype)
    return jnp.moveaxis(mixed, 3, 1).reshape(R, T, N * H, out_sharding=spec("rows", None, "heads"))


# --- the choice ------------------------------------------------------------------------------------------------------


def _choose(logits, uniform, *, temperature: float, top_p: float) -> tuple:
    """Pick a token of each column [V M] by inverting its distribution at `uniform` [2 M]; its log-prob at T = 1 too.

    In two steps, a block of tokens and a token of the block, so that no running sum goes over the vocabulary.
    """
    V, M = logits.shape
    top = jnp.max(logits, axis=0)
    mass = jnp.exp(logits - top)
    total = jnp.log(jnp.sum(mass, axis=0))
    if temperature == 0:
        token = jnp.argmax(logits, axis=0)
    else:
        mass = mass if temperature == 1 else jnp.exp((logits - top) / temperature)
        mass = _nucleus(mass, top_p) if top_p < 1 else mass
        size = max(size for size in range(1, math.isqrt(V) + 1) if V % size == 0)
        mass = mass.reshape(V // size, size, M)
        block = _invert(jnp.sum(mass, axis=1), uniform[0])
        within = jnp.take_along_axis(mass, block[None, None], axis=0)[0]
        token = block * size + _invert(within, uniform[1])
    logp = jnp.take_along_axis(logits, token[None], axis=0)[0] - top - total
    return token.astype(jnp.int32), logp


def _invert(mass, uniform):
    """The first index [M] where the running sum of [S M] exceeds a share of the whole; never one of no mass."""
    sums = jnp.where(mass > 0, jnp.cumsum(mass, axis=0), 0.0)
    return jnp.argmax(sums > uniform * jnp.max(sums, axis=0), axis=0)


def _nucleus(mass, top_p: float):
    """Keep the smallest set of most probable tokens that holds top_p of the mass [V M] in (0, 1].

    By bisection over the bits of a float, which order as integers do: no sort, and ties stay together.
    """
    as_float = partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    wanted = top_p * jnp.sum(mass, axis=0)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low + 1) // 2
        is_held = jnp.sum(jnp.where(mass >= as_float(middle), mass, 0.0), axis=0) >= wanted
        return jnp.where(is_held, middle, low), jnp.where(is_held, high, middle - 1)

    zero = jnp.zeros_like(wanted, jnp.int32)
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    low, _ = jax.lax.fori_loop(0, 30, halve, (zero, zero + one))
    return jnp.where(mass >= as_float(low), mass, 0.0)
