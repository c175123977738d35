"""DPO from a checkpoint after SFT, which is also the reference.

    python -m align_jax.train --config=configs/dpo.py --config.run=runs/dpo --config.start=runs/sft/hf \\
        --config.data.path=pairs.jsonl

Beta, learning rate and batch are those of the DPO paper (arXiv:2305.18290) as TRL lists them: 0.1, 1e-6, 64 pairs; the
cosine after a tenth of warm-up is what the recipes for code models use. Expect a loss of 0.6931 at step 1, else the
run stops. A 7B model needs 16 bytes a parameter, 112 GB, over the devices of mesh.fsdp; the reference is not loaded.
`optim.offload` leaves 8 of the 16 in the host's memory. LoRA, `--config.lora.rank=16 --config.optim.lr=1e-5`, holds the
weights once, in bfloat16 and as they are, policy and reference in one, and trains 1 % as many numbers beside them:
2.2 bytes a parameter. With `--config.compute.accumulate=8` deepseek-coder-1.3b then takes 5.9 GiB (--fit=l4-24gb).
`objective.name` may also be dpo_norm (Tülu 3: beta 5), ipo or ipo_mean. `configs/dpo.py:smoke` takes a minute on a CPU.
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
        "objective": {"name": "dpo", "beta": 0.1},
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
            "run": "runs/smoke/dpo", "start": "tests/golden/tiny", "steps": 8,
            "data": {"path": "tests/golden/pairs.jsonl", "row_length": 256, "rows_per_batch": 4},
            "optim": {"lr": 1e-3},
            "compute": {"dtype": "float32", "chunk": 64},
            "ckpt": {"every": 4, "export": "float32"},
        })
    return c
