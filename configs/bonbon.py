"""BoNBoN from a checkpoint after SFT, which is also the reference and has to be what wrote the answers.

    python -m align_jax.train --config=configs/bonbon.py --config.run=runs/bonbon --config.start=runs/sft/hf \\
        --config.data.path=best_worst.jsonl

`n` is how many answers a prompt had when best and worst were picked; it alone sets beta. n = 8 and alpha = 0.005
are the paper's (arXiv:2406.00832; its released beta of 0.0275482094 is that of n = 8). Expect loss/ipo of
((n - 1) H_{n-1})^2 = 329.4 at step 1, and a gradient far above the clip: Adam takes the scale out.
`objective.name=bonbon_released` trains what the released code trains. Memory, and LoRA, as in configs/dpo.py.
`configs/bonbon.py:smoke` takes a minute on a CPU.
"""

from ml_collections import ConfigDict


def get_config(arg: str = ""):
    if arg not in ("", "smoke"):
        raise ValueError(f"config argument: got {arg!r}, expected 'smoke' or nothing")
    c = ConfigDict({
        "run": "",  # folder of metrics, checkpoints and, at the end, hf/
        "start": "",  # Hugging Face checkpoint
        "seed": 0,
        "steps": 0,  # 0: as many as data.epochs make
        "data": {
            "path": "", "kind": "pairs",
            "row_length": 2048, "rows_per_batch": 32,  # a row holds both sides of a pair; about 64 pairs a batch
            "epochs": 1,
            "too_long": "drop",  # or "cut" the completion
            "bad_lines": "stop",  # or "skip" and count
        },
        "objective": {"name": "bonbon", "n": 8, "alpha": 0.005},
        "optim": {"lr": 1e-6, "warmup": 0.1, "decay": "cosine", "weight_decay": 0.0, "clip": 1.0,
                  "offload": False},  # True: Adam's 8 bytes a parameter wait in the host's memory
        "lora": {"rank": 0, "alpha": 16.0, "base_dtype": "bfloat16"},  # rank 0: all weights are trained
        "compute": {"dtype": "bfloat16", "remat": "full", "unroll": False, "attention": "auto", "chunk": 1024,
                    "accumulate": 1, "keep_logits": False},  # False: they are made again in the backward pass
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1},  # -1: all the devices that are left
        "ckpt": {"every": 200, "keep": 2, "export": "bfloat16"},
    })
    if arg == "smoke":
        c.update({
            "run": "runs/smoke/bonbon", "start": "tests/golden/tiny", "steps": 8,
            "data": {"path": "tests/golden/pairs.jsonl", "row_length": 256, "rows_per_batch": 4},
            "optim": {"lr": 1e-3},
            "compute": {"dtype": "float32", "chunk": 64},
            "ckpt": {"every": 4, "export": "float32"},
        })
    return c
