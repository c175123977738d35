"""config.json of a Hugging Face checkpoint to ModelConfig and back; what is not known is refused.

The lists decide on every field: read, implemented at one value, or of no weight. `hf` uses this.
"""

import json
from pathlib import Path

from align_jax.model import ModelConfig, Rope

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
FIELDS = {  # config.json -> ModelConfig
    "num_hidden_layers": "L", "hidden_size": "D", "num_attention_heads": "N",
    "num_key_value_heads": "K", "head_dim": "H", "intermediate_size": "F", "vocab_size": "V",
    "rms_norm_eps": "norm_eps", "max_position_embeddings": "max_length",
    "tie_word_embeddings": "tied", "initializer_range": "init_scale",
}
OPTIONAL = {"head_dim", "tie_word_embeddings", "initializer_range"}
ROPE_FIELDS = {  # rope_parameters -> Rope; rope_scaling says the same without rope_theta
    "rope_theta": "theta", "rope_type": "scaling", "factor": "factor",
    "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_length",
}
ROPE_KINDS = {  # what each scaling has to say
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"),
}
ONLY = {  # fields that are implemented at one value; of a list, every element
    "hidden_act": "silu", "mlp_bias": False, "pretraining_tp": 1, "partial_rotary_factor": 1,
    "layer_types": "full_attention", "use_sliding_window": False, "use_mrope": False,
    "is_encoder_decoder": False, "add_cross_attention": False,
}
IRRELEVANT = {  # fields that do not change what the network computes
    "_attn_implementation_autoset", "_name_or_path", "attention_dropout", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "pad_token_id", "return_dict", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "use_cache",
}
OF_FAMILY = {  # fields of one family; windows mean nothing with use_sliding_window off
    "llama": {"attention_bias"},
    "qwen2": {"sliding_window", "max_window_layers"},
}
EXPECTED = {bool: "true or false", int: "a positive whole number", float: "a positive number"}


def config(folder: str | Path) -> ModelConfig:
    """Read config.json, spelled as by transformers 4 or 5; ValueError names every field refused."""
    path = Path(folder) / "config.json"
    cfg, problems = _parse(read_json(path))
    if problems:
        raise ValueError(several(f"{path}: not a model that is implemented here", problems))
    return cfg


def _parse(raw: dict) -> tuple[ModelConfig | None, list[str]]:
    raw = {name: value for name, value in raw.items() if value is not None}  # null is "not set"
    family = raw.get("model_type")
    if family not in FAMILIES:
        return None, [f"model_type: got {family!r}, implemented: {', '.join(FAMILIES)}"]
    rope, problems = _rope(raw)
    problems += _field_problems(raw, family)
    if problems:
        return None, problems
    fields = {ours: raw[name] for name, ours in FIELDS.items() if name in raw}
    fields.setdefault("H", fields["D"] // fields["N"])
    bias = raw.get("attention_bias", False)
    cfg = ModelConfig(rope=rope, qkv_bias=bias or family == "qwen2", o_bias=bias, **fields)
    if cfg.N % cfg.K:
        problems.append(f"num_attention_heads: got {cfg.N}, "
                        f"expected a multiple of num_key_value_heads = {cfg.K}")
    if cfg.H % 2:
        problems.append(f"head_dim: got {cfg.H}, expected an even number")
    return cfg, problems


def _field_problems(raw: dict, family: str) -> list[str]:
    only = ONLY | {"architectures": FAMILIES[family]}
    rope = {"rope_theta", "rope_scaling", "rope_parameters"}
    known = {"model_type"} | rope | OF_FAMILY[family] | IRRELEVANT
    missing = FIELDS.keys() - raw.keys() - OPTIONAL
    problems = [f"{name}: missing" for name in FIELDS if name in missing]
    for name, value in raw.items():
        if name in FIELDS:
            kind = ModelConfig.__annotations__[FIELDS[name]]
            if not _is(value, kind):
                problems.append(f"{name}: got {value!r}, expected {EXPECTED[kind]}")
        elif name in only:
            if any(v != only[name] for v in (value if isinstance(value, list) else [value])):
                problems.append(f"{name}: got {value!r}, implemented: {only[name]!r}")
        elif name not in known:
            problems.append(f"{name}: got {value!r}, a field that is not implemented")
    return problems


def _is(value, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, kind)) and value > 0


def _rope(raw: dict) -> tuple[Rope | None, list[str]]:
    """Merge `rope_parameters` (transformers 5) with `rope_scaling` and `rope_theta` (before)."""
    found, problems = _merge_rope(raw)
    kind = found.setdefault("rope_type", "default")
    found.setdefault("rope_theta", Rope.theta)  # transformers' too: Llama 2 does not say it
    if found.get("partial_rotary_factor") == 1:
        del found["partial_rotary_factor"]
    if kind not in ROPE_KINDS:
        problems.append(f"rope_type: got {kind!r} of {found}, implemented: {', '.join(ROPE_KINDS)}")
        return None, problems
    needed = ("rope_theta", *ROPE_KINDS[kind])
    problems += [f"rope {name}: missing for {kind!r}" for name in needed if name not in found]
    for name, value in found.items():
        if name not in ("rope_type", *needed):
            problems.append(f"rope {name}: got {value!r}, not implemented for {kind!r}")
        elif name in needed and not _is(value, float):
            problems.append(f"rope {name}: got {value!r}, expected {EXPECTED[float]}")
    if problems:
        return None, problems
    return Rope(**{ROPE_FIELDS[name]: value for name, value in found.items()}), []


def _merge_rope(raw: dict) -> tuple[dict, list[str]]:
    found, problems = {}, []
    for spelling in ("rope_parameters", "rope_scaling", "rope_theta"):
        said = raw.get(spelling, {})
        said = {"rope_theta": said} if spelling == "rope_theta" and said else said
        if not isinstance(said, dict):
            problems.append(f"{spelling}: got {said!r}, expected an object")
            continue
        for name, value in said.items():
            name = "rope_type" if name == "type" else name
            if found.setdefault(name, value) != value:
                problems.append(f"rope {name}: got both {found[name]!r} and {value!r}")
    return found, problems


def config_json(cfg: ModelConfig) -> dict:
    """Spell the config in the older way, which every version of transformers reads."""
    if cfg.o_bias and not cfg.qkv_bias:
        raise ValueError("o_bias without qkv_bias: Llama has all four biases, Qwen2 has q, k, v")
    family = "qwen2" if cfg.qkv_bias and not cfg.o_bias else "llama"
    rope = {name: getattr(cfg.rope, ROPE_FIELDS[name])
            for name in ("rope_type", *ROPE_KINDS[cfg.rope.scaling])}
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        **{name: getattr(cfg, ours) for name, ours in FIELDS.items()},
        **({"attention_bias": cfg.o_bias} if family == "llama" else {}),
        "hidden_act": "silu",
        "rope_theta": cfg.rope.theta,
        "rope_scaling": None if cfg.rope.scaling == "default" else rope,
        "bos_token_id": None,  # generation_config.json and the tokenizer say these
        "eos_token_id": None,
    }


def read_json(path: Path) -> dict:
    """Read a file of a checkpoint; ValueError names it if it is absent or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: not there; expected a Hugging Face checkpoint") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def several(what: str, problems: list[str]) -> str:
    """Say all the problems in one message."""
    return f"{what}:\n  " + "\n  ".join(problems)
