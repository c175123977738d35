"""The preference-data factory: a model writes, runs and ranks its own code.

    python -m align_jax.synth.pipeline --config=configs/synth.py --config.run=runs/data --config.start=CHECKPOINT
    python -m align_jax.synth.pipeline --config=configs/synth.py --config.run=runs/data --config.start=MODEL-NAME \\
        --config.engine.kind=endpoint --config.engine.endpoint.base_url=https://HOST/v1 --config.asking.chat=True

Seeds come from the interpreter's own standard library unless `--config.seeds.source.path` names a folder, a file or a
data set (configs/seeds.py). Every stage has a folder in the run folder, and goes on where it was killed; stages.json
counts what came in, went out and was dropped. A stage alone: `--config.stages=seeds,concepts`.

    configs/synth.py             pairs of right and wrong answers, the study's functional data
    configs/synth.py:codal       the five dimensions of CODAL: both answers pass, the better one by a scorer is chosen
    configs/synth.py:codal_pass_fail   the study's own labels under the same prompts: pass and fail
    configs/synth.py:two_passes  answers that pass, rewritten for a dimension
    configs/synth.py:smoke       the pocket model on 24 seeds, two minutes on a CPU

Hardware: an accelerator that holds the model; running the programs takes CPU cores (`sandbox.workers`). 250k seeds and
ten answers each are 2.4M programs: 11 hours of one core at 60 a second.
"""

from importlib import resources

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import sample, seeds

POCKET = resources.files("align_jax") / "pocket"
CODAL = ("instruction_following", "explanation", "complexity", "readability", "style")
SCORED = {"dimensions": CODAL, "pairs": {"rules": ("dimension",), "by": "dimension"}}
VARIANTS = {
    "": {},
    "codal": SCORED,
    "codal_pass_fail": {"dimensions": CODAL},
    "two_passes": {"rewrite": {"dimensions": CODAL}, "pairs": SCORED["pairs"]},
    "smoke": {
        "run": "runs/smoke/synth", "start": str(POCKET / "pocket"),
        "engine": {"local": {"dtype": "float32", "batch_size": 256}},
        "asking": {"brief": True},
        "concepts": {"max_tokens": 48, "count": 24},
        "instruction": {"max_tokens": 96, "categories": ("function",)},
        "response": {"max_tokens": 192, "temperature": 0.8},
        "sandbox": {"wall_s": 2.0, "cpu_s": 2.0, "memory_mb": 256},
        "truth": {"benchmark": "PocketEval", "path": str(POCKET / "PocketEval.jsonl.gz")},
    },
}


def of_study(arg: str = "") -> ConfigDict:
    """The section of a study: without the settings that it makes itself."""
    c = get_config(arg)
    with c.unlocked():
        for name in ("run", "start", "seed", "stages", "mesh", "truth"):
            del c[name]
        del c.asking["chat"], c.pairs["rules"], c.response["prompt"]
    return c


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise ValueError(f"config argument: got {arg!r}, expected one of {sorted(VARIANTS)}")
    source, sampling = seeds.get_config(), sample.get_config()
    source.run = placeholder(str)  # None: the folder "seeds" in the run folder; several runs may share one
    written = {"temperature": 0.7, "top_p": 1.0, "max_tokens": 512, "n": 1}
    c = ConfigDict({
        "run": "", "start": "", "seed": 0, "stages": "all",
        "mesh": sampling.mesh, "engine": sampling.engine,
        "seeds": source,
        "asking": {"chat": False, "brief": False, "shard": 2000, "unanswered": "stop"},
        "docstrings": written | {"ask": False, "shots": 7, "max_tokens": 16, "temperature": 0.0},
        "concepts": written | {"shots": 8, "count": placeholder(int)},  # of the seeds; None is all
        "instruction": written | {"shots": 8, "categories": ("function", "function", "class", "program"),
                                  "words": (10, 200), "near_duplicate": 0.7},
        "response": written | {"shots": 1, "n": 10, "max_tokens": 1536, "prompt": "{instruction}\n\n"},
        "dimensions": (),
        "rewrite": written | {"dimensions": (), "shots": 1, "n": 4, "max_tokens": 1536},
        "sandbox": {"backend": "auto", "wall_s": 10.0, "cpu_s": 10.0, "memory_mb": 4096, "workers": 2,
                    "runner": "local", "chunk": 256},
        "judge": {"kind": "static", "start": placeholder(str), "engine": sample.get_config().engine,
                  # Another model that rates `count` of the responses too: scores/judges.json has their kappa.
                  "second": {"start": placeholder(str), "count": 200, "engine": sample.get_config().engine}},
        "pairs": {"rules": ("pass_fail",), "by": "reward", "margin": placeholder(float),  # None: the scorer's own
                  "min_usable": 1.0, "even": "passed", "per_task": 1, "min_distance": 0.0, "max_length_ratio": 1e9,
                  "balance": True},  # as many pairs of each dimension as the rarest has
        "embed": placeholder(str),  # "package.module:function", [N] texts to [N D], for semantic decontamination
        "truth": {"benchmark": "humaneval", "path": placeholder(str), "count": placeholder(int),
                  "evalplus": {"parallel": 2, "min_time_limit": 4.0}},  # for align_jax.synth.ground_truth
    })
    c.update(VARIANTS[arg])
    return c
