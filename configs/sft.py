"""Supervised fine-tuning on the chosen answers: the stage before DPO and BoNBoN.

    python -m align_jax.train --config=configs/sft.py --config.run=runs/sft --config.start=CHECKPOINT \\
        --config.data.path=pairs.jsonl

Two epochs, after which the study saw the evaluation loss level off; learning rate, batch and warm-up are
SelfCodeAlign's for data that the model wrote itself (arXiv:2410.24198, C.3). A file of prompt and completion takes
`--config.data.kind=examples`. A 7B model needs 16 bytes a parameter, 112 GB, over the devices of mesh.fsdp; with LoRA
(configs/dpo.py) 2.2. `configs/sft.py:smoke` takes a minute on a CPU.
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
            "path": "", "kind": "chosen",
            "row_length": 2048, "rows_per_batch": 16,  # about 64 answers of 500 tokens a batch
            "epochs": 2,
            "too_long": "drop",  # or "cut" the completion
            "bad_lines": "stop",  # or "skip" and count
        },
        "objective": {"name": "sft"},
        "optim": {"lr": 1e-5, "warmup": 0.05, "decay": "linear", "weight_decay": 0.0, "clip": 1.0,
                  "offload": False},  # True: Adam's 8 bytes a parameter wait in the host's memory
        "lora": {"rank": 0, "alpha": 16.0, "base_dtype": "bfloat16"},  # rank 0: all weights are trained
        "compute": {"dtype": "bfloat16", "remat": "full", "unroll": False, "attention": "auto", "chunk": 1024,
                    "accumulate": 1, "keep_logits": False},  # False: they are made again in the backward pass
        "mesh": {"data": 1, "fsdp": -1, "tensor": 1},  # -1: all the devices that are left
        "ckpt": {"every": 200, "keep": 2, "export": "bfloat16"},
    })
    if arg == "smoke":
        c.update({
            "run": "runs/smoke/sft", "start": "tests/golden/tiny", "steps": 8,
            "data": {"path": "tests/golden/pairs.jsonl", "row_length": 256, "rows_per_batch": 4},
            "optim": {"lr": 1e-3},
            "compute": {"dtype": "float32", "chunk": 64},
            "ckpt": {"every": 4, "export": "float32"},
        })
    return c
