"""Sample a checkpoint: a file of prompts in, n answers to each out.

    python -m align_jax.sample --config=configs/sample.py --config.run=runs/answers --config.start=CHECKPOINT \\
        --config.prompts=prompts.jsonl

Writes samples.jsonl into the run folder; a run that was killed continues. A line of the prompts has `prompt`, plain
text or chat messages, and may have `id`. `--config.sample.temperature=0` is greedy; `batch_size` counts the sequences
decoded at once: raise it until the memory is full. `configs/sample.py:smoke` takes half a minute on a CPU.
"""

from ml_collections import ConfigDict


def get_config(arg: str = ""):
    if arg not in ("", "smoke"):
        raise ValueError(f"config argument: got {arg!r}, expected 'smoke' or nothing")
    c = ConfigDict({
        "run": "", "start": "", "prompts": "", "dtype": "bfloat16",
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # fsdp would gather every weight for every token
        "sample": {"n": 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": 512, "stops": (), "seed": 0,
                   "batch_size": 128},
    })
    if arg == "smoke":
        c.update({"start": "tests/golden/tiny", "prompts": "tests/golden/pairs.jsonl", "run": "runs/smoke/sample",
                  "dtype": "float32", "sample": {"n": 2, "max_tokens": 32, "batch_size": 8}})
    return c
