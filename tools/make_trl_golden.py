"""Make tests/golden: a tiny checkpoint, twelve preference pairs, and what TRL makes of them.

Another trainer's numbers to hold this library's trainer against: the loss, gradient norm, learning
rate and log-probs of every step of TRL's own DPOTrainer and SFTTrainer, in float32 on a CPU; and,
in peft.json, of its DPOTrainer on peft's LoRA. No module or test imports this file; it needs an
environment of its own and its output is committed:

    pip install torch==2.13.0 trl==1.16.0 peft==0.21.2
    python tools/make_trl_golden.py tests/golden

Seeded and single-threaded: a second run on the same machine writes the same bytes.
"""

import importlib.metadata
import json
import platform
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BATCH, STEPS = 4, 3

# Shared by all runs: the pairs in file order, AdamW as written here, dropout nowhere.
SETTINGS = {
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
    "train_sampling_strategy": "sequential",
    "max_length": 1024,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 0,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
}
QUIET = {"logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
SCHEDULE = {"lr_scheduler_type": "linear", "warmup_steps": 1, "weight_decay": 0.1}

# Named after the loss of align_jax that has to agree: TRL's trainer, and what it adds to SETTINGS.
RUNS = {
    "sft": ("SFT", {"completion_only_loss": True}),
    "dpo": ("DPO", {"loss_type": ["sigmoid"], "beta": 0.1}),
    "dpo_schedule": ("DPO", {"loss_type": ["sigmoid"], "beta": 0.1, **SCHEDULE}),
    "dpo_norm": ("DPO", {"loss_type": ["sigmoid_norm"], "beta": 5.0}),
    "ipo_mean": ("DPO", {"loss_type": ["ipo"], "beta": 0.1}),
}

# Adapters beside every matrix; they start as written in `fill`, with B of this size.
LORA = {"r": 4, "lora_alpha": 6.0, "target_modules": "all-linear", "lora_dropout": 0.0}
LORA_RUNS = {"fresh": 0.0, "underway": 0.05}

# Signature and docstring, a right body, a wrong one. Prompts end in a newline, which the tokenizer
# always keeps a token of its own: prompt and completion meet where no merge can happen.
PAIRS = [
    ('def add(a, b):\n    """Sum of two numbers."""\n', "return a + b", "return a - b"),
    ('def last(xs):\n    """Last item."""\n', "return xs[-1]", "return xs[len(xs)]"),
    (
        'def mean(xs):\n    """Average of a list; 0.0 if it is empty."""\n',
        "if not xs:\n        return 0.0\n    return sum(xs) / len(xs)",
        "return sum(xs) / len(xs)",
    ),
    ('def is_even(n):\n    """True if n is even."""\n', "return n % 2 == 0", "return n % 2"),
    (
        'def count(text, word):\n    """How often word occurs in text, case ignored."""\n',
        "return text.lower().split().count(word.lower())",
        "total = 0\n    for w in text:\n        if w == word:\n            total += 1\n"
        "    return total",
    ),
    (
        'def fib(n):\n    """n-th Fibonacci number."""\n',
        "a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
        "return fib(n - 1) + fib(n - 2)",
    ),
    (
        'def flip(d):\n    """Swap keys and values."""\n',
        "return {v: k for k, v in d.items()}",
        "pass",
    ),
    (
        'def unique(xs):\n    """Items in order of first appearance."""\n',
        "return list(dict.fromkeys(xs))",
        "return list(set(xs))",
    ),
    (
        'def clamp(x, low, high):\n    """x, kept between low and high."""\n',
        "return max(low, min(x, high))",
        "return min(low, max(x, high))  # héhé",
    ),
    ("def one():\n", "return 1", "return one()"),
    (
        'def is_palindrome(text):\n    """Reads the same both ways; only letters count."""\n',
        "letters = [c.lower() for c in text if c.isalpha()]\n    return letters == letters[::-1]",
        "return text == text[::-1]",
    ),
    (
        'def gcd(a, b):\n    """Greatest common divisor."""\n',
        "while b:\n        a, b = b, a % b\n    return abs(a)",
        "for d in range(a, 0, -1):\n        if a % d == 0:\n            return d",
    ),
]


def main():
    out = Path(sys.argv[1])
    checkpoint = out / "tiny"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    rows = write_pairs(out / "pairs.jsonl")
    write_checkpoint(checkpoint, rows)
    made = {name: train(checkpoint, rows, *spec) for name, spec in RUNS.items()}
    trainer, _ = made["dpo"]
    pairs = scored(checkpoint, trainer.train_dataset)
    for name, (_, steps) in made.items():
        check_order(name, steps, pairs)
    golden = {
        "made_by": "tools/make_trl_golden.py",
        "versions": versions(),
        "settings": SETTINGS,
        "decayed": trainer.get_decay_parameter_names(trainer.model),
        "pairs": pairs,
        "runs": {name: record(name, steps, pairs) for name, (_, steps) in made.items()},
    }
    (out / "trl.json").write_text(json.dumps(golden, indent=1) + "\n")
    golden = {
        "made_by": "tools/make_trl_golden.py",
        "versions": versions("peft"),
        "lora": LORA,
        "runs": {name: train_adapters(checkpoint, rows, pairs, b) for name, b in LORA_RUNS.items()},
    }
    (out / "peft.json").write_text(json.dumps(golden, indent=1) + "\n")


def versions(*more):
    packages = ("torch", "transformers", "trl", "accelerate", "tokenizers", *more)
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in packages
    }


def write_pairs(path):
    rows = [
        {
            "id": f"pair-{i:02}",
            "prompt": prompt,
            "chosen": f"    {good}\n",
            "rejected": f"    {bad}\n",
        }
        for i, (prompt, good, bad) in enumerate(PAIRS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def write_checkpoint(path, rows):
    tokenizer = make_tokenizer([text for row in rows for text in list(row.values())[1:]])
    tokenizer.save_pretrained(path)
    torch.manual_seed(SETTINGS["seed"])
    # The wide initial weights make log-probs differ between tokens, as in a trained model.
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=20000.0,
        initializer_range=0.15,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def make_tokenizer(corpus):
    """Byte-level BPE that puts one <s> in front, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def load(checkpoint, dtype):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


def train(checkpoint, rows, kind, changes):
    """Run one of TRL's trainers; return it and what it logged and used in each step."""
    tokenizer, model = load(checkpoint, torch.float32)
    if kind == "SFT":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            args=getattr(trl, f"{kind}Config")(scratch, **SETTINGS | QUIET | changes),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[watch],
        )
        model.register_forward_hook(watch.logps("policy"))
        if kind == "DPO":
            trainer.ref_model.register_forward_hook(watch.logps("ref"))
        trainer.train()
    logged = [pick(log) for log in trainer.state.log_history[:STEPS]]
    return trainer, [log | seen for log, seen in zip(logged, watch.steps, strict=True)]


def train_adapters(checkpoint, rows, pairs, b):
    """Three DPO steps of the adapters alone; return them, and the log-probs before and after.

    The last are of the merged model, in float64, as those of `pairs` are.
    """
    tokenizer, model = load(checkpoint, torch.float32)
    watch = Watch()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(scratch, **SETTINGS | QUIET | RUNS["dpo"][1]),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[watch],
            peft_config=peft.LoraConfig(**LORA),
        )
        fill(trainer.model, b)
        before = [logps(trainer.model.double(), pair) for pair in pairs]
        trainer.model.float()
        hook = model.register_forward_hook(watch.logps())
        trainer.train()
        hook.remove()
    logged = [pick(log) | seen for log, seen in
              zip(trainer.state.log_history[:STEPS], watch.steps, strict=True)]
    merged = trainer.model.double().merge_and_unload()
    ids = [[pair["id"] for pair in batch] for batch in batches(pairs)]
    steps = [{"ids": i} | step for i, step in zip(ids, logged, strict=True)]
    return {"b": b, "before": before, "steps": steps, "after": [logps(merged, pair) for pair in pairs]}


@torch.no_grad()
def fill(model, b):
    """Numbers that another program can make again: the k-th array is a sine of k times 0, 1, 2 ..."""
    arrays = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for k, (name, p) in enumerate(arrays, 1):
        sine = torch.sin(k * torch.arange(p.numel(), dtype=torch.float64)).reshape(p.shape)
        p.copy_((0.2 if "lora_A" in name else b) * sine)


class Watch(transformers.TrainerCallback):
    """What TRL does not log: the learning rate an update uses, and every sequence's log-prob."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, *args, **kwargs):
        self.steps.append({})

    def on_pre_optimizer_step(self, *args, optimizer, **kwargs):
        self.steps[-1]["learning_rate"] = optimizer.param_groups[0]["lr"]

    def logps(self, name=None):
        """Make a forward hook that keeps [completions] log-probs of each example of the batch.

        One model that is both policy and reference needs no name: no gradient is taken of the latter.
        """

        def hook(module, inputs, output):
            sums = output.log_probs.sum(-1)  # TRL stacks all chosen on top of all rejected
            role = name or ("policy" if sums.requires_grad else "ref")
            self.steps[-1][role] = sums.reshape(-1, BATCH).T.tolist()

        return hook


def pick(log):
    """Keep what align_jax logs too, at full precision."""
    return {k: v for k, v in log.items() if k.startswith(("loss", "grad_norm", "rewards", "logps"))}


def scored(checkpoint, dataset):
    """TRL's token ids of each pair, and the untrained log-probs: unpadded, in float64."""
    _, model = load(checkpoint, torch.float64)
    keys = ("id", "prompt_ids", "chosen_ids", "rejected_ids")
    return [{key: row[key] for key in keys} | {"logps": logps(model, row)} for row in dataset]


def logps(model, pair):
    return [logp(model, pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids")]


@torch.no_grad()
def logp(model, prompt, completion):
    logps = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    before = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return sum(logps[t, token].item() for t, token in zip(before, completion, strict=True))


def check_order(name, steps, pairs):
    """Raise unless every step met the pairs that `record` names, by their untrained log-probs."""
    for i, (step, batch) in enumerate(zip(steps, batches(pairs), strict=True)):
        untrained = step.get("ref", step["policy"] if i == 0 else [])
        for got, pair in zip(untrained, batch, strict=False):
            if any(abs(a - b) > 1e-3 for a, b in zip(got, pair["logps"], strict=False)):
                raise ValueError(f"{name}, step {i}: got {got}, expected {pair['logps']}")


def batches(pairs):
    return [pairs[at : at + BATCH] for at in range(0, len(pairs), BATCH)]


def record(name, steps, pairs):
    kind, changes = RUNS[name]
    return {
        "loss": name.removesuffix("_schedule"),
        "trl": {"trainer": f"{kind}Trainer", **changes},
        "steps": [
            {"ids": [pair["id"] for pair in batch]} | step
            for batch, step in zip(batches(pairs), steps, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
