"""The whole way in miniature: the pocket pair, both pathways, SFT then DPO and BoNBoN, scored by EvalPlus.

    python -m align_jax.study --config=configs/quickstart.py

Hardware: 2 CPU cores, 4 GB of memory, 7 to 9 minutes. Expect the table of README.md:
numbers differ between machines, since sampling follows the last bit of the arithmetic.
"""

from importlib import resources

from ml_collections import ConfigDict

from align_jax.score import evalplus
from configs import synth


def get_config(arg: str = "") -> ConfigDict:
    """`:smoke` shrinks everything, for a look at the machinery in about two minutes."""
    if arg not in ("", "smoke"):
        raise ValueError(f"quickstart: got :{arg}, expected nothing or :smoke")
    small = arg == "smoke"
    pocket = resources.files("align_jax") / "pocket"
    common = {
        "steps": 0,
        "data": {"kind": "pairs", "row_length": 384, "rows_per_batch": 4, "epochs": 1},
        "lora": {"rank": 0, "alpha": 16.0, "base_dtype": "bfloat16"},
        "compute": {"dtype": "float32", "remat": "none", "chunk": 128, "accumulate": 1},
        "ckpt": {"every": 1000, "keep": 1, "export": "bfloat16"},
    }
    c = ConfigDict({
        "run": "runs/quickstart" + "-smoke" * small,
        "seed": 0,
        "model": "pocket",
        "starts": {
            # `prompt` is how a pair shows an instruction: as the factory asks a base model, as EvalPlus asks a chat.
            "pretrained": {"model": str(pocket / "pocket"), "chat": False,
                           "prompt": "<instruction>\n{instruction}\n</instruction>\n\n<response>\n"},
            "instruct": {"model": str(pocket / "pocket-instruct"), "chat": True,
                         "prompt": f"{evalplus.INSTRUCTION}\n```\n{{instruction}}\n```\n"},
        },
        "techniques": ("dpo", "bonbon"),
        "pairs": {
            "source": "synth",  # or "problems", such as PocketPref's, which come with tests
            "synth": factory(small),
            "problems": {"path": str(pocket / "PocketPref.jsonl.gz"), "count": 32 if small else 640,
                         "sampling": {"n": 8, "temperature": 0.8, "top_p": 1.0, "max_tokens": 128, "batch_size": 512}},
        },
        "sandbox": {"backend": "auto", "wall_s": 2.0, "cpu_s": 2.0, "memory_mb": 256},
        "train": {
            "sft": common | {
                "rule": "pass_fail",
                "data": common["data"] | {"kind": "chosen"},
                "objective": {"name": "sft"},
                "optim": {"lr": 3e-5, "warmup": 0.1, "decay": "linear", "b2": 0.98}},
            "dpo": common | {
                "rule": "pass_fail",
                "objective": {"name": "dpo", "beta": 0.1},
                "optim": {"lr": 2e-4, "warmup": 0.1, "decay": "linear", "b2": 0.98}},
            "bonbon": common | {
                "rule": "best_worst",
                "objective": {"name": "bonbon", "n": 8, "alpha": 0.005},
                "optim": {"lr": 2e-4, "warmup": 0.1, "decay": "linear", "b2": 0.98}},
        },
        "benchmark": {
            "name": "PocketEval", "path": str(pocket / "PocketEval.jsonl.gz"),
            "sampling": {"max_tokens": 128, "batch_size": 128},
        },
        "evalplus": {"parallel": 2, "min_time_limit": 0.5},
        "sampling_dtype": "float32",
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        "sampling_mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # as in configs/sample.py
    })
    return c


def factory(small: bool) -> ConfigDict:
    """The factory for models that were trained on its stages, so that they need no examples."""
    c = synth.of_study("smoke")
    c.seeds.filtering.max_lines = 20  # the pocket pair was trained on short ones
    c.concepts.count = 24 if small else 10_000
    c.engine.local.batch_size = 512
    c.instruction.update({"n": 2, "temperature": 0.5})
    c.response.update({"n": 8, "temperature": 0.7, "max_tokens": 128})
    c.pairs.min_usable = 0.75
    return c
