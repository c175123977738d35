"""Sample a checkpoint or an endpoint: a file of prompts in, n answers to each out.

    python -m align_jax.sample --config=configs/sample.py --config.run=runs/answers --config.start=CHECKPOINT \\
        --config.prompts=prompts.jsonl
    python -m align_jax.sample --config=configs/sample.py --config.run=runs/answers --config.start=MODEL-NAME \\
        --config.prompts=prompts.jsonl --config.engine.kind=endpoint \\
        --config.engine.endpoint.base_url=https://HOST/v1 --config.engine.endpoint.api_key_env=OPENAI_API_KEY

Writes samples.jsonl into the run folder; a run that was killed continues. A line of the prompts has `prompt`, plain
text or chat messages, and may have `id` and a `max_tokens` of its own. `--config.sample.temperature=0` is greedy.
`batch_size` counts the slots, sequences decoded at once: raise it until the memory is full. Each of them has columns
for the longest prompt and answer under way: of deepseek-coder-1.3b 0.2 MB a token, of CodeLlama-7b 0.5. The bar and the
last lines say how many tokens a second were written and how busy the slots were. `configs/sample.py:smoke` takes half a
minute on a CPU; there `JAX_NUM_CPU_DEVICES=2` before the command and `--config.mesh.tensor=2` behind it, a device a
core, make sampling faster, and so for any number that divides the model's key-value heads.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = ""):
    if arg not in ("", "smoke"):
        raise ValueError(f"config argument: got {arg!r}, expected 'smoke' or nothing")
    c = ConfigDict({
        "run": "", "start": "", "prompts": "",
        "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # with fsdp every device would gather all weights at each call
        "sample": {"n": 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": 512, "stops": (), "seed": 0},
        "engine": {
            "kind": "local",
            "local": {"dtype": "bfloat16", "batch_size": 128},
            "endpoint": {  # every setting is explained in align_jax/engine.py; None is no limit
                "base_url": "http://localhost:8000/v1", "api_key_env": placeholder(str),
                "cache": "runs/replies.sqlite", "concurrency": 32, "choices": 16, "timeout": 600.0, "attempts": 10,
                "give_up": 50,
                "requests_per_minute": placeholder(float), "tokens_per_minute": placeholder(float),
                "price_in": 0.0, "price_out": 0.0, "budget": placeholder(float),
                "prefill": "refuse", "max_stops": 4, "rename": {}, "extra": {}},
        },
    })
    if arg == "smoke":
        c.update({"start": "tests/golden/tiny", "prompts": "tests/golden/pairs.jsonl", "run": "runs/smoke/sample",
                  "engine": {"local": {"dtype": "float32", "batch_size": 8}}, "sample": {"n": 2, "max_tokens": 32}})
    return c
