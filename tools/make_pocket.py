"""Make the pocket pair: `pocket` (pretrained), `pocket-instruct`, and the two problem sets beside them.

    python tools/make_pocket.py --out=align_jax/pocket --work=runs/pocket        (about 50 minutes on 2 cores)

The pair is trained by align_jax's own trainer: `pocket` on procedurally made programs, right and wrong ones, and on the
stages of `align_jax.synth` told of such programs; `pocket-instruct` goes on from it with chats, which are answers to
EvalPlus' prompt and the stages again. So both can make preference pairs of their own.
PocketEval is the held-out benchmark, and PocketPref has problems with tests that self-made labels are held against; no
program of PocketEval, by normalised code, and no text of it is in anything that is trained on.
"""

import itertools
import json
import random
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pocket_problems
import pocket_stages
from absl import app, flags, logging
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align_jax import hf, mesh, model, records
from align_jax.records import Example, Problem, Seed
from align_jax.score import evalplus
from align_jax.synth import seeds
from align_jax.train import train

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "align_jax/pocket", "Folder to write the pair and the problems to")
flags.DEFINE_string("work", "runs/pocket", "Folder for the training runs; a killed run continues")
flags.DEFINE_integer("seed", 0, "Everything is drawn from this")
flags.DEFINE_integer("pretrain", 100_000, "Documents that pocket reads")
flags.DEFINE_integer("instruct", 50_000, "Documents that pocket-instruct reads on top")

VOCAB = 1024
SPECIAL = ["<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
            "{% if m['role'] == 'assistant' %}<|endoftext|>{% else %}<|end|>\n{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
# As in Llama 3 and Qwen: digits one by one, and no token spans a line break and the indentation behind it.
SPLIT = r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# So that there is something to align: most authors have one bad habit (pocket_problems._HABIT: off by one, careless of
# signs), which matters in a quarter of the programs and which execution can show to be wrong; some make a random slip.
SLIPS = {"pretrain": {"careless": 0.7, "noise": 0.15}, "instruct": {"careless": 0.6, "noise": 0.1}}
# What a run reads: programs whole, or as the answer to EvalPlus' prompt; and the stages of align_jax.synth, told of
# programs or, "library concepts", of functions of the standard library.
MIX = {"pretrain": {"program": 0.57, "library concepts": 0.02, "concepts": 0.02, "instruction": 0.11, "response": 0.26,
                    "rewrite": 0.02},
       "instruct": {"answer": 0.43, "library concepts": 0.02, "concepts": 0.02, "instruction": 0.15, "response": 0.36,
                    "rewrite": 0.02}}


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells much
    out, work = Path(FLAGS.out), Path(FLAGS.work)
    sets = pocket_problems.split(FLAGS.seed, train=0, preference=1200, evaluation=400)
    records.write(out / "PocketEval.jsonl.gz", sets["evaluation"])
    records.write(out / "PocketPref.jsonl.gz", sets["preference"])
    held_out = pocket_problems.held_out(sets["evaluation"])

    files = {run: work / f"{run}.jsonl" for run in MIX}
    library = [seed.code for seed in library_functions(work / "seeds", out / "PocketEval.jsonl.gz")]
    for seed, run in enumerate(MIX, FLAGS.seed + 1):
        programs = pocket_problems.corpus(seed, held_out, **SLIPS[run])
        found = documents(programs, library, MIX[run], random.Random(seed), chat=run == "instruct")
        records.write(files[run], itertools.islice(found, FLAGS[run].value))
    blank = work / "blank"
    make_tokenizer(files.values()).save_pretrained(blank)
    cfg = model.ModelConfig(L=5, D=160, N=4, K=4, H=32, F=448, V=VOCAB, tied=True, max_length=1024)
    (blank / "config.json").write_text(json.dumps(hf.config_json(cfg) | {"eos_token_id": 1, "pad_token_id": 0}))

    with jax.set_mesh(mesh.make()):
        params = model.init(cfg, FLAGS.seed)
    # Short rows: attention over few positions is what a CPU is quick at, and nearly every document fits.
    pocket = train(recipe(work / "pocket", blank, files["pretrain"], lr=3e-3), params=params)
    instruct = train(recipe(work / "pocket-instruct", pocket, files["instruct"], lr=1.5e-3))
    for name, folder in {"pocket": pocket, "pocket-instruct": instruct}.items():
        shutil.copytree(folder, out / name, dirs_exist_ok=True)
        print(f"wrote {out / name}: {sum(f.stat().st_size for f in (out / name).iterdir()) / 1e6:.1f} MB")


def recipe(run: Path, start: Path, path: Path, *, lr: float) -> dict:
    """The config of one training run, in the form of configs/sft.py."""
    return {"run": str(run), "start": str(start), "seed": FLAGS.seed, "steps": 0,
            "data": {"path": str(path), "kind": "examples", "row_length": 320, "rows_per_batch": 7, "epochs": 1},
            "objective": {"name": "sft"},
            "optim": {"lr": lr, "warmup": 0.03, "decay": "linear", "b2": 0.98, "weight_decay": 0.01},
            "lora": {"rank": 0, "alpha": 16.0, "base_dtype": "bfloat16"},
            "compute": {"dtype": "float32", "remat": "none", "chunk": 256},
            "mesh": {}, "ckpt": {"every": 200, "keep": 1, "export": "bfloat16"}}


def documents(programs: Iterator[dict], library: list[str], mix: dict[str, float], rng: random.Random, *, chat: bool):
    """Draw documents of the kinds of a mix forever."""
    risky = pocket_stages.telling(programs, rng)
    for index in itertools.count():
        kind = rng.choices(tuple(mix), tuple(mix.values()))[0]
        if kind == "library concepts":
            seed = rng.choice(library)
            values = {"seed": seed, "concepts": ", ".join(pocket_stages.some_concepts(seed, rng))}
            yield pocket_stages.document("concepts", f"{kind}-{index}", values, chat=chat)
        elif kind in WHOLE:
            yield WHOLE[kind](f"{kind}-{index}", next(programs))
        elif values := pocket_stages.fields(kind, next(risky), rng):
            yield pocket_stages.document(kind, f"{kind}-{index}", values, chat=chat)


def whole(id: str, program: dict) -> Example:
    """A program as text."""
    return Example(id=id, prompt="", completion=program["prompt"] + program["solution"])


def answer(id: str, program: dict) -> Example:
    """A program as the answer in EvalPlus' chat format."""
    problem = Problem(task_id="", base_input=[], plus_input=[], canonical_solution="",
                      prompt=program["prompt"], entry_point=program["entry_point"])
    head = [line for line in program["prompt"].splitlines() if not line.startswith('    """')]
    text = "\n".join([*head, program["solution"].rstrip(), "```\n"])  # the docstring is not said again
    return Example(id=id, prompt=evalplus.prompt(problem, chat=True), completion=text)


WHOLE = {"program": whole, "answer": answer}


def library_functions(run: Path, benchmark: Path) -> list[Seed]:
    """The seeds that the running interpreter's standard library gives: none of them is held out."""
    settings = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "seeds.py"))["get_config"]().to_dict()
    seeds.gather(run, settings["source"], filtering=settings["filtering"], benchmarks=[str(benchmark)],
                 near_duplicate=settings["near_duplicate"])
    return records.read(run / "seeds.jsonl", Seed)


def make_tokenizer(paths) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training texts, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = ("".join(m["content"] for m in example.prompt or ()) + example.completion
             for path in paths for example in records.read(path, Example)[:20_000])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1], pad_token=SPECIAL[0])
    wrapped.chat_template = TEMPLATE
    return wrapped


if __name__ == "__main__":
    app.run(main)
