"""Gather seeds: documented Python functions that return a value, to draw tasks from.

    python -m align_jax.synth.seeds --config=configs/seeds.py --config.run=runs/seeds

Writes seeds.jsonl and what was found of benchmarks into the run folder; a run that was killed continues. The source is
a folder of Python files (the default: the standard library of the interpreter that runs this), a .jsonl(.gz) or
.parquet file with Python in `column`, or a `datasets` name, which is streamed:

    --config.source.path=bigcode/the-stack-dedup --config.source.data_dir=data/python
    --config.source.path=bigcode/python-stack-v1-functions-filtered

`pyright` needs `pip install align_jax[types]`; `judge` names a function, "package.module:name", that is given programs
and says which of them their docstring describes. Expect 311 seeds of Python 3.11's 3,144 functions, for 14 s of CPU.
"""

import sysconfig
from importlib import resources

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"config argument: got {arg!r}, expected 'smoke' or nothing")
    c = ConfigDict({
        "run": "runs/seeds",
        "source": {
            "path": sysconfig.get_path("stdlib"), "column": "content", "split": "train", "data_dir": placeholder(str),
            "exclude": ("site-packages", "test", "tests", "idlelib", "node_modules", ".git"),
        },
        "filtering": {
            "max_lines": 150,
            "banned_words": ("todo", "todos", "fixme", "fixmes", "bug", "bugs"),
            "banned_imports": ("argparse", "os", "subprocess", "sys", "setuptools", "distutils", "matplotlib",
                               "seaborn"),
        },
        # A pattern may match nothing. These are where EvalPlus and EvoEval put what they download.
        "benchmarks": (str(resources.files("align_jax") / "pocket" / "PocketEval.jsonl.gz"),
                       "~/.cache/evalplus/*.jsonl", "~/.cache/evoeval/*.jsonl"),
        "near_duplicate": 0.5,  # Jaccard index of word 5-grams
        "pyright": False,
        "judge": placeholder(str),
        "runner": "local",  # or "ray": align_jax/synth/cluster.py
        "workers": 2,
        "chunk": 64,  # documents; for rows of one function each, some hundred
    })
    if arg == "smoke":
        c.update({"run": "runs/smoke/seeds", "source": {"path": sysconfig.get_path("stdlib") + "/email"}})
    return c
