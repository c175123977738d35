"""The grid of two real models: pretrained and instruct, each with pairs of its own making, DPO and BoNBoN.

    python -m align_jax.study --config=configs/study.py --config.run=runs/study --config.model=deepseek-coder-1.3b \\
        --config.starts.pretrained.model=/models/deepseek-coder-1.3b-base \\
        --config.starts.instruct.model=/models/deepseek-coder-1.3b-instruct

Hardware: an accelerator that trains the model whole (configs/dpo.py), and CPU cores for the programs. To sample, every
device holds the model (`mesh` is for training); where that is too much, `--config.sampling_mesh.tensor=8`. Pairs are
made as in configs/synth.py; `--config.pairs.synth.seeds.source.path` names where seeds come from, and `.seeds.run` is
shared by both models. Learning rates are those of configs/{sft,dpo,bonbon}.py. `:smoke` is that of
configs/quickstart.py.
"""

from ml_collections import ConfigDict

from configs import bonbon, dpo, quickstart, sft, synth


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"config argument: got {arg!r}, expected 'smoke' or nothing")
    if arg == "smoke":
        return quickstart.get_config("smoke")
    c, factory = quickstart.get_config(), synth.of_study()
    factory.update({"response": {"n": 8}, "pairs": {"min_usable": 0.75}})
    c.pairs.synth = factory
    c.update({"run": "", "model": "", "sampling_dtype": "bfloat16",
              "sandbox": {"wall_s": 10.0, "cpu_s": 10.0, "memory_mb": 4096},
              "starts": {"pretrained": {"model": "", "prompt": "{instruction}\n\n"},
                         "instruct": {"model": "", "prompt": "{instruction}"}},
              "benchmark": {"name": "humaneval", "sampling": {"max_tokens": 768}},
              "evalplus": {"min_time_limit": 4.0}})
    with c.unlocked():
        c.benchmark.path, c.mesh = None, dpo.get_config().mesh  # None: where EvalPlus keeps it
        for stage, module in {"sft": sft, "dpo": dpo, "bonbon": bonbon}.items():
            recipe = module.get_config()
            del recipe.data["path"]
            c.train[stage].update({section: recipe[section] for section in ("data", "objective", "optim", "lora",
                                                                            "compute", "ckpt")})
    return c
