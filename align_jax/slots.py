"""The slots of a decode step: each holds one sequence, and is given the next one while the others go on.

All slots write keys and values into the same column of a ring, so that a step updates its caches in place by one slice
and needs no scatter. A slot sees the columns no older than its own tokens: admitting a prompt writes them behind the
current column. What all prompts begin with is kept once for all slots. Only a ring of another size is recompiled for.

Weights have a row for every output and activations are [D R T], features first: on a CPU a fifth faster than the
training layout for the few rows that a step has. On a GPU they are [R T D], and a kernel writes a ring's new column and
reads only what its slot sees.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from align_jax import attention, flash, mesh, model
from align_jax.mesh import spec
from align_jax.model import ModelConfig, Params

AXES = {"R": "rows", "K": "heads", "F": "mlp"}  # on the mesh
PLAIN = "RKHS", "RKSH"  # the axes of keys and of values: prompts' everywhere, and the slots' where not said otherwise
LAYOUTS = {
    "tpu": ("SKHR", "SKHR"),  # what XLA wants there; any other it would copy whole at both ends of `decode`
    "gpu": ("RKSH", "RKSH"),  # what flash.py reads, and a column is written at once
}


def prepare(cfg: ModelConfig, params: Params, *, keep: bool = True) -> Params:
    """Lay weights out for decoding: layers apart, and side by side what is multiplied with the same input.

    Not to `keep` them deletes the stacks of `params["layers"]` in turn: no more than gate and up are held twice.
    """
    layers = [{} for _ in range(cfg.L)]
    for name, (sources, _) in WEIGHTS.items():
        stacks = [params["layers"][source] for source in sources if source in params["layers"]]
        if not stacks:
            continue
        for layer, weight in zip(layers, _weights(cfg, name, stacks), strict=True):
            layer[name] = weight
        if not keep:
            jax.block_until_ready(layers)
            for stack in stacks:
                stack.delete()
    return params | {"layers": layers}


@partial(jax.jit, static_argnames=("cfg", "name"))
def _weights(cfg: ModelConfig, name: str, stacks: list) -> list:
    return [WEIGHTS[name][1](cfg, *(stack[l] for stack in stacks)) for l in range(cfg.L)]


def _by_head(cfg: ModelConfig, q, k, v):
    """[N H ..] and twice [K H ..] to [K G+2 H ..]: whatever splits the heads splits all three."""
    split = spec("heads", None, None, *["embed"] * (q.ndim - 2))
    q = q.reshape(cfg.K, cfg.N // cfg.K, *q.shape[1:], out_sharding=split)
    return jnp.concatenate([q, k[:, None], v[:, None]], axis=1)


WEIGHTS = {  # a layer's weight -> the model's weights it is made of, and how
    "qkv": (("q", "k", "v"), lambda cfg, *qkv: _by_head(cfg, *(jnp.moveaxis(weight, 0, -1) for weight in qkv))),
    "qkv_bias": (("q_bias", "k_bias", "v_bias"), _by_head),
    "o": (("o",), lambda cfg, o: jnp.moveaxis(o, -1, 0).reshape(cfg.D, -1, out_sharding=spec("embed", "heads"))),
    "gate_up": (("gate", "up"), lambda cfg, gate, up: jnp.stack([gate.T, up.T])),
    "down": (("down",), lambda cfg, down: down.T),
} | {name: ((name,), lambda cfg, weight: weight) for name in ("o_bias", "attn_norm", "mlp_norm")}


@partial(jax.jit, static_argnames="cfg")
def prefill(cfg: ModelConfig, params: Params, prefix: list, offset, tokens, lengths) -> dict:
    """Run prompts [B T], padded in front, that stand `offset` tokens behind their common start.

    Returns what `admit` takes: the last hidden states "x" [D B], "caches" of keys [B K H T] and values [B K T H].
    """
    T = tokens.shape[1]
    at = jnp.arange(T) - (T - lengths[:, None])
    is_real = (at >= 0).astype(jnp.int32)
    mask = attention.visible(is_real, jnp.zeros_like(is_real))[:, None, None]

    def own(qkv):
        q, *new = _apart(qkv)
        kept = _laid_out(new, PLAIN)
        return _softmax(q, kept, mask, PLAIN), kept

    attends = [partial(_attention, before=before, own=own) for before in prefix]
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
    sizes = {"R": slots, "K": cfg.K, "H": cfg.H, "S": ring}
    keys, values = (jnp.zeros([sizes[axis] for axis in axes], dtype, out_sharding=_split(axes)) for axes in _layout())
    return {"x": jnp.zeros((cfg.D, slots), dtype, out_sharding=spec(None, "rows")),
            "caches": [(keys, values)] * cfg.L}


def columns(state: dict) -> int:
    """How many columns its ring has."""
    return state["caches"][0][0].shape[_layout()[0].index("S")]


def resize(state: dict, column, *, ring: int) -> None:
    """Give the slots a ring of another size, layer by layer; what comes next goes into its column 0."""
    for layer, caches in enumerate(state["caches"]):
        state["caches"][layer] = tuple(_resized(cache, column, axis=axes.index("S"), ring=ring)
                                       for cache, axes in zip(caches, _layout(), strict=True))


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
    caches = [tuple(_put(*all_of, which, column) for all_of in zip(rings, _layout(), new, PLAIN, strict=True))
              for rings, new in zip(state["caches"], prefilled["caches"], strict=True)]
    return {"x": jnp.where(which >= 0, x, state["x"]), "caches": caches}


def _put(ring, axes: str, new, new_axes: str, which, column):
    """Write prompts into the columns before `column`: where they wrap around, some at the end, some at the start."""
    at, new_at = axes.index("S"), new_axes.index("S")
    size, width = ring.shape[at], min(new.shape[new_at], ring.shape[at])
    new = jax.lax.slice_in_dim(new, new.shape[new_at] - width, None, axis=new_at)
    new = jnp.einsum(f"{new_axes}->{axes}", new.at[which].get(out_sharding=_split(new_axes)))
    first = (column - width) % size
    for start in (jnp.minimum(first, size - width), 0):
        source = (start + jnp.arange(width) - first) % size  # below width: which of the new columns comes here
        is_new = (which >= 0)[:, None] & (source < width)
        is_new = jnp.expand_dims(is_new if axes.index("R") < at else is_new.T, [axes.index(axis) for axis in "KH"])
        fresh = jnp.take(new, jnp.minimum(source, width - 1), axis=at)
        old = jax.lax.dynamic_slice_in_dim(ring, start, width, at)
        ring = jax.lax.dynamic_update_slice_in_dim(ring, jnp.where(is_new, fresh, old), start, at)
    return ring


def reads_what_is_seen(cfg: ModelConfig) -> bool:
    """Whether a step reads of a ring what each slot sees, by a kernel, and not all columns."""
    return mesh.platform() == "gpu" and cfg.H in flash.HEADS


def before_a_look(limit: int) -> int:
    """Steps between two looks at who has ended, a sixteenth of the longest answer.

    For a loop with an end in the data lets a GPU wait for the host at each of its turns; others look always.
    """
    return 2 ** min(3, max(limit // 16, 1).bit_length() - 1) if mesh.platform() == "gpu" else 1


@partial(jax.jit, static_argnames=("cfg", "temperature", "top_p", "stop_ids", "chunk", "look"), donate_argnums=3)
def decode(cfg: ModelConfig, params: Params, prefix: list, state: dict, table: dict, column, enough, *,
           temperature: float, top_p: float, stop_ids: tuple[int, ...], chunk: int, look: int = 1):
    """Decode `chunk` steps, or until `enough` slots have nothing to do, which is looked for every `look` steps.

    `table` says of every slot [M] its `key` words (seed, name, k), the tokens it has seen (`age` in its ring,
    `offset` before), those it has written, and its `limit`; one that has reached it does nothing.
    Returns the state, tokens and logps [chunk M], -1 where nothing was written, and the number of steps.
    """
    uniforms = jax.sharding.reshard(_uniforms(table, chunk), spec(None, None, "rows"))
    age, written, limit = (jax.sharding.reshard(table[name], spec("rows")) for name in ("age", "written", "limit"))
    head = model.head(params, state["x"].dtype)
    size = columns(state)

    def step(s):
        i, at = s["i"], (column + s["i"]) % size
        logits = jnp.einsum("VD,DM->VM", head, s["x"], preferred_element_type=jnp.float32,
                            out_sharding=spec("vocab", "rows"))
        token, logp = _choose(jax.sharding.reshard(logits, spec(None, "rows")), uniforms[i],
                              temperature=temperature, top_p=top_p)
        write_and_see = _of_ring(cfg, size, at, jnp.minimum(age + i, size - 1))
        attends = [partial(_attention, before=before, own=partial(write_and_see, caches))
                   for before, caches in zip(prefix, s["caches"], strict=True)]
        x, caches = _run(cfg, params, token[:, None], (table["offset"] + age + i)[:, None], attends)
        done = s["done"] | (written + i + 1 >= limit) | jnp.any(token == jnp.array(stop_ids)[:, None], axis=0)
        return {"i": i + 1, "x": x[:, :, 0], "caches": caches, "done": done,
                "tokens": s["tokens"].at[i].set(jnp.where(s["done"], -1, token)),
                "logps": s["logps"].at[i].set(jnp.where(s["done"], 0.0, logp))}

    blank = partial(jnp.zeros, (chunk, len(age)), out_sharding=spec(None, "rows"))
    start = state | {"i": jnp.int32(0), "done": written >= limit, "tokens": blank(jnp.int32) - 1,
                     "logps": blank(jnp.float32)}
    steps = math.gcd(chunk, look)
    end = jax.lax.while_loop(lambda s: (s["i"] < chunk) & (jnp.sum(s["done"]) < enough),
                             lambda s: jax.lax.fori_loop(0, steps, lambda _, s: step(s), s), start)
    return {"x": end["x"], "caches": end["caches"]}, end["tokens"], end["logps"], end["i"]


def _uniforms(table: dict, chunk: int):
    """Two numbers in [0, 1) for every step and slot, [chunk 2 M], that depend on its seed, name, k and token alone."""
    def draw(name, k, written):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(table["seed"]), name), k)
        return jax.random.uniform(jax.random.fold_in(key, written), (2,))

    at = table["written"] + jnp.arange(chunk)[:, None]
    drawn = jax.vmap(jax.vmap(draw), (None, None, 0))(table["name"], table["k"], at)
    return jnp.moveaxis(drawn, 2, 1)


# --- the model -------------------------------------------------------------------------------------------------------


def _run(cfg: ModelConfig, params: Params, tokens, positions, attends) -> tuple:
    """Run tokens [R T] to hidden states [D R T]; layer l attends, and keeps what it keeps, by `attends[l]`.

    The layers are unrolled and their caches separate arrays, so that a loop updates them in place; through
    `lax.scan` every step would copy every cache whole.
    """
    x = jnp.einsum(f"RTD->{_flow('D')}", model.embed(params, tokens, params["embed"].dtype))
    rotate = model.rotation(cfg.rope, positions, cfg.H, x.dtype)
    kept = []
    for weights, attend in zip(params["layers"], attends, strict=True):
        x, own = _layer(cfg, weights, x, rotate, attend)
        kept.append(own)
    return jnp.einsum(f"{_flow('D')}->DRT", _norm(x, params["final_norm"], cfg.norm_eps)), kept


def _layer(cfg: ModelConfig, w: dict, x, rotate, attend) -> tuple:
    """One layer of model.Layers; `attend` gets all that a head of keys has, rotated, [R T K G+2 H]."""
    D, F, KAH, CF = map(_flow, ("D", "F", "KAH", "CF"))
    heads, narrow, wide = map(_split, (KAH, D, CF))
    qkv = jnp.einsum(f"KAHD,{D}->{KAH}", w["qkv"], _norm(x, w["attn_norm"], cfg.norm_eps), out_sharding=heads)
    qkv = jnp.einsum(f"{KAH}->RTKAH", qkv)
    qkv = qkv + w["qkv_bias"] if "qkv_bias" in w else qkv
    is_value = jnp.arange(qkv.shape[3])[:, None] == qkv.shape[3] - 1
    mixed, kept = attend(jnp.where(is_value, qkv, jax.vmap(rotate, 3, 3)(qkv)))  # in one pass
    y = jnp.einsum(f"DA,RTA->{D}", w["o"], mixed, out_sharding=narrow)
    x = x + (y + _along(w["o_bias"], D) if "o_bias" in w else y)

    y = jnp.einsum(f"CFD,{D}->{CF}", w["gate_up"], _norm(x, w["mlp_norm"], cfg.norm_eps), out_sharding=wide)
    gate, up = jnp.unstack(y, axis=CF.index("C"))
    return x + jnp.einsum(f"DF,{F}->{D}", w["down"], jax.nn.silu(gate) * up, out_sharding=narrow), kept


def _flow(features: str) -> str:
    """The axes of activations: as a product with the weight first gives them, or with the weight last."""
    return "RT" + features if mesh.platform() == "gpu" else features + "RT"


def _along(weight, axes: str):
    """A weight [D] that fits activations."""
    return jnp.expand_dims(weight, [i for i, axis in enumerate(axes) if axis != "D"])


def _norm(x, weight, eps: float):
    """model.rms_norm over the features."""
    axes, y = _flow("D"), x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axes.index("D"), keepdims=True) + eps)
    return y.astype(x.dtype) * _along(weight, axes)


def _layout() -> tuple[str, str]:
    return LAYOUTS.get(mesh.platform(), PLAIN)


def _apart(qkv) -> tuple:
    """Queries [R K G T H], keys and values [R K T H] of [R T K G+2 H]."""
    qkv = jnp.moveaxis(qkv, 1, 3)
    return qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]


def _laid_out(keys_values, layout: tuple[str, str]) -> tuple:
    return tuple(jnp.einsum(f"RKSH->{axes}", x) for x, axes in zip(keys_values, layout, strict=True))


def _split(axes: str):
    return spec(*map(AXES.get, axes))


def _attention(qkv, before: tuple, own) -> tuple:
    """Attend, from [R T K G+2 H], to what all rows have before them, and to what each has of its own.

    A part of what all have is keys and values, PLAIN without R, and a mask; `own` gives the `_softmax` over the rest,
    and what is kept. One softmax over all, divided by its sum at the end. Returns [R T N*H], and what is kept.
    """
    part, kept = own(qkv)
    parts = [_softmax(_apart(qkv)[0], (keys, values), mask, [axes[1:] for axes in PLAIN])
             for keys, values, mask in before]
    mixed, total = _together([*parts, part]) if before else part[::2]
    mixed = jnp.moveaxis((mixed / total[..., None]).astype(qkv.dtype), 3, 1)
    return mixed.reshape(*mixed.shape[:2], -1, out_sharding=spec("rows", None, "heads")), kept


def _together(parts: list) -> tuple:
    """The weighted sum of the values, and the weights' sum, of one softmax over all the keys that parts have."""
    top = jnp.max(jnp.stack([part_top for _, part_top, _ in parts]), axis=0)
    shares = [jnp.exp(part_top - top) for _, part_top, _ in parts]
    return (sum(share[..., None] * mixed for share, (mixed, _, _) in zip(shares, parts, strict=True)),
            sum(share * total for share, (_, _, total) in zip(shares, parts, strict=True)))


def _softmax(q, keys_values, mask, layout) -> tuple:
    """The weighted sum of the values [R K G T H], the largest logit and the weights' sum [R K G T], all fp32.

    The mask fits [R K G T S]; `layout` names the axes of keys and values.
    """
    f32 = {"preferred_element_type": jnp.float32}
    logits = jnp.einsum(f"RKGTH,{layout[0]}->RKGTS", q, keys_values[0], **f32) * q.shape[-1]**-0.5
    logits = jnp.where(mask, logits, flash.LOW)
    top = jnp.max(logits, axis=-1)
    weights = jnp.exp(logits - top[..., None])
    mixed = jnp.einsum(f"RKGTS,{layout[1]}->RKGTH", weights.astype(q.dtype), keys_values[1], **f32)
    return mixed, top, jnp.sum(weights, axis=-1)


def _of_ring(cfg: ModelConfig, size: int, at, age):
    """What writes a token into column `at` of its ring and gives the `_softmax` over it and the `age` before it."""
    if reads_what_is_seen(cfg):
        return partial(_by_flash, at=at, age=age)
    layout, mask = _layout(), ((at - jnp.arange(size)) % size <= age[:, None])[:, None, None, None]

    def write_and_see(caches, qkv):
        q, *new = _apart(qkv)
        caches = tuple(jax.lax.dynamic_update_slice_in_dim(cache, own, at, axes.index("S"))
                       for cache, own, axes in zip(caches, _laid_out(new, layout), layout, strict=True))
        return _softmax(q, caches, mask, layout), caches

    return write_and_see


def _by_flash(caches, qkv, at, age):
    """The same by a kernel, whose output is divided by the weights' sum already: a largest logit that has it, and 1."""
    rows, ring = spec("rows", "heads", None), spec("rows", "heads", None, None)
    attend = jax.shard_map(flash.of_ring, in_specs=(ring, ring, ring, spec(), spec("rows")),
                           out_specs=(ring, rows, ring, ring), check_vma=False)
    mixed, logsumexp, *caches = attend(qkv[:, 0], *caches, at, age)
    return (mixed[:, :, :, None], logsumexp[..., None], jnp.ones_like(logsumexp)[..., None]), tuple(caches)


# --- the choice ------------------------------------------------------------------------------------------------------


def _choose(logits, uniform, *, temperature: float, top_p: float) -> tuple:
    """Pick a token of each column [V M] by inverting its distribution at `uniform` [2 M]; its log-prob at T = 1 too.

    In two steps, a block of tokens and a token of the block, so that no running sum goes over the vocabulary. Masses
    are made again wherever they are summed, which is faster than to read them.
    """
    V, M = logits.shape
    top = jnp.max(logits, axis=0)
    total = jnp.log(jnp.sum(jnp.exp(logits - top), axis=0))
    if temperature == 0:
        token = jnp.argmax(logits, axis=0)
    else:
        def mass(logits):
            return jnp.exp((logits - top) / temperature)

        least = _nucleus(logits, mass(logits), top_p) if top_p < 1 else -jnp.inf

        def kept(logits):
            return jnp.where(logits >= least, mass(logits), 0.0)

        size = max(size for size in range(1, math.isqrt(V) + 1) if V % size == 0)
        blocks = logits.reshape(V // size, size, M)
        block = _invert(jnp.sum(kept(blocks), axis=1), uniform[0])
        within = jnp.take_along_axis(blocks, block[None, None], axis=0)[0]
        token = block * size + _invert(kept(within), uniform[1])
    logp = jnp.take_along_axis(logits, token[None], axis=0)[0] - top - total
    return token.astype(jnp.int32), logp


def _invert(mass, uniform):
    """The first index [M] where the running sum of [S M] exceeds a share of the whole; never one of no mass."""
    sums = jnp.where(mass > 0, jnp.cumsum(mass, axis=0), 0.0)
    return jnp.argmax(sums > uniform * jnp.max(sums, axis=0), axis=0)


def _nucleus(logits, mass, top_p: float):
    """The least logit in the smallest set of most probable tokens that holds top_p of the mass [V M] in (0, 1].

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
    return jnp.min(jnp.where(mass >= as_float(low), logits, jnp.inf), axis=0)
