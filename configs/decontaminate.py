"""Take out of a file of records what shares with the benchmarks, and report it.

    python -m align_jax.synth.decontaminate --config=configs/decontaminate.py --config.run=runs/clean \\
        --config.path=pairs.jsonl --config.fields='("prompt", "chosen", "rejected")'

Writes clean.jsonl, contamination.jsonl (an overlap a line), contamination.json and contamination.txt; a run that was
killed continues. Name files of other benchmarks, CODAL's parquet for one, in `benchmarks`. `embed` names a function,
"package.module:name", from N texts to N vectors; then what it finds semantically near to a task goes as well.
"""

from importlib import resources

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"config argument: got {arg!r}, expected 'smoke' or nothing")
    c = ConfigDict({
        "run": "", "path": "", "fields": ("prompt", "chosen", "rejected"),
        # A pattern may match nothing. These are where EvalPlus and EvoEval put what they download.
        "benchmarks": (str(resources.files("align_jax") / "pocket" / "PocketEval.jsonl.gz"),
                       "~/.cache/evalplus/*.jsonl", "~/.cache/evoeval/*.jsonl"),
        "embed": placeholder(str), "semantic_threshold": 0.9,
        "runner": "local",  # or "ray": align_jax/synth/cluster.py
        "workers": 2,
        "chunk": 256,
    })
    if arg == "smoke":
        c.update({"run": "runs/smoke/clean", "path": "tests/golden/pairs.jsonl",
                  "fields": ("prompt", "chosen", "rejected")})
    return c
