"""TRL with its best settings on one GPU, beside which bench.py puts ours; runs in an environment of TRL's.

    ENV/bin/python tools/bench_trl.py CASE CONFIG_JSON [--goal dpo] [--batch 16] [--steps 10] [--rank 0] \\
        [--checkpointing] [--cpu]

Random weights in the shape of CONFIG_JSON, the tokenizer of CASE and its pairs, or for SFT their chosen sides. bfloat16
over fp32 weights, FlashAttention 2 where flash-attn is installed (else PyTorch's own attention), Liger's kernels where
liger-kernel is, precomputed reference log-probs, fused AdamW. Padded: TRL 1.16 has switched padding_free off for DPO,
and for SFT it needs FlashAttention. Prints JSON: real tokens and examples a second.
"""

import argparse
import json
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

GOALS = {  # the trainer, its config, what it has settings for, and the sides of a pair that it takes
    "dpo": (DPOTrainer, DPOConfig, {"precompute_ref_log_probs": True}, ("chosen", "rejected")),
    "sft": (SFTTrainer, SFTConfig, {"padding_free": find_spec("flash_attn") is not None}, ("chosen",)),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("case", type=Path)
parser.add_argument("config")
parser.add_argument("--goal", choices=GOALS, default="dpo")
parser.add_argument("--batch", type=int, default=16)
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--max_length", type=int, default=2048)
parser.add_argument("--rank", type=int, default=0, help="of LoRA; needs peft")
parser.add_argument("--checkpointing", action="store_true", help="of gradients, for what does not fit without")
parser.add_argument("--cpu", action="store_true", help="in float32, to see that it runs")
args = parser.parse_args()


class Clock(TrainerCallback):
    """Seconds of every step, the device's work included."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        if not args.cpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


rows = [json.loads(line) for line in (args.case / "pairs.jsonl").read_text().splitlines()][:48]  # bench.py's
trainer_of, config_of, settings, sides = GOALS[args.goal]
rows = [rows[i % len(rows)] for i in range(args.batch * args.steps)]
tokenizer = AutoTokenizer.from_pretrained(args.case)
has_flash = not args.cpu and find_spec("flash_attn") is not None
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "config.json").write_text(Path(args.config).read_text())
    with torch.device("cpu" if args.cpu else "cuda"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.float32 if args.cpu or not args.rank else torch.bfloat16,
            attn_implementation="flash_attention_2" if has_flash else "sdpa")
    peft = {}
    if args.rank:
        from peft import LoraConfig

        peft = {"peft_config": LoraConfig(r=args.rank, lora_alpha=16, target_modules="all-linear")}
    clock = Clock()
    data = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows] if args.goal == "sft" else rows
    trainer = trainer_of(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(data), callbacks=[clock], **peft,
        args=config_of(output_dir=folder, per_device_train_batch_size=args.batch, max_steps=args.steps,
                       max_length=args.max_length, learning_rate=1e-6, logging_steps=1, report_to=[],
                       save_strategy="no", bf16=not args.cpu, use_cpu=args.cpu,
                       gradient_checkpointing=args.checkpointing,
                       use_liger_kernel=find_spec("liger_kernel") is not None,
                       disable_tqdm=True, **settings,
                       optim="adamw_torch" if args.cpu else "adamw_torch_fused"))
    trainer.train()
texts = [row["prompt"] + row[side] for row in rows for side in sides]
tokens = sum(min(args.max_length, len(tokenizer(text)["input_ids"]) + 1) for text in texts) / args.steps
median = statistics.median(clock.seconds[2:])
print(json.dumps({"real_tokens_per_s": tokens / median, "examples_per_s": args.batch / median, "step_s": clock.seconds,
                  "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h][:4], "flash_attention":
                  has_flash, "peak_gib": 0 if args.cpu else torch.cuda.max_memory_allocated() / 2**30}))
