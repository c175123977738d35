"""Make the pocket pair: `pocket` (pretrained), `pocket-instruct`, and the two problem sets beside them.

    python tools/make_pocket.py --out=align_jax/pocket --work=runs/pocket        (about 20 minutes on 2 cores)

The pair is trained by align_jax's own trainer: `pocket` on procedurally made programs, right and wrong ones, and on
functions of the standard library; `pocket-instruct` goes on from it with chat-formatted answers. PocketEval is
the held-out benchmark and PocketPref the problems that preference pairs are sampled on; no program of PocketEval,
by normalised code, is in anything that is trained on.
"""

import ast
import itertools
import json
import random
import shutil
import sysconfig
from pathlib import Path

import jax
import pocket_problems
from absl import app, flags, logging
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align_jax import hf, mesh, model, records
from align_jax.records import Example, Problem
from align_jax.score import evalplus
from align_jax.train import train

FLAGS = flags.FLAGS
flags.DEFINE_string("out", "align_jax/pocket", "Folder to write the pair and the problems to")
flags.DEFINE_string("work", "runs/pocket", "Folder for the training runs; a killed run continues")
flags.DEFINE_integer("seed", 0, "Everything is drawn from this")
flags.DEFINE_integer("pretrain", 60_000, "Programs that pocket reads")
flags.DEFINE_integer("instruct", 24_000, "Answers that pocket-instruct reads on top")

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
STDLIB_SHARE = 0.05


def main(_) -> None:
    logging.set_verbosity(logging.WARNING)  # orbax tells much
    out, work = Path(FLAGS.out), Path(FLAGS.work)
    sets = pocket_problems.split(FLAGS.seed, train=0, preference=1200, evaluation=400)
    records.write(out / "PocketEval.jsonl.gz", sets["evaluation"])
    records.write(out / "PocketPref.jsonl.gz", sets["preference"])
    held_out = pocket_problems.held_out(sets["evaluation"])

    files = {stage: work / f"{stage}.jsonl" for stage in SLIPS}
    records.write(files["pretrain"], pretraining(FLAGS.seed + 1, FLAGS.pretrain, held_out))
    records.write(files["instruct"], instruction(FLAGS.seed + 2, FLAGS.instruct, held_out))
    blank = work / "blank"
    make_tokenizer(files.values()).save_pretrained(blank)
    cfg = model.ModelConfig(L=5, D=160, N=2, K=2, H=64, F=448, V=VOCAB, tied=True, max_length=1024)
    (blank / "config.json").write_text(json.dumps(hf.config_json(cfg) | {"eos_token_id": 1, "pad_token_id": 0}))

    with jax.set_mesh(mesh.make()):
        params = model.init(cfg, FLAGS.seed)
    # Short rows: attention over few positions is what a CPU is quick at, and nearly every program fits.
    pocket = train(recipe(work / "pocket", blank, files["pretrain"], lr=4e-3, row_length=128), params=params)
    instruct = train(recipe(work / "pocket-instruct", pocket, files["instruct"], lr=2e-3, row_length=256))
    for name, folder in {"pocket": pocket, "pocket-instruct": instruct}.items():
        shutil.copytree(folder, out / name, dirs_exist_ok=True)
        print(f"wrote {out / name}: {sum(f.stat().st_size for f in (out / name).iterdir()) / 1e6:.1f} MB")


def recipe(run: Path, start: Path, path: Path, *, lr: float, row_length: int) -> dict:
    """The config of one training run, in the form of configs/sft.py."""
    return {"run": str(run), "start": str(start), "seed": FLAGS.seed, "steps": 0,
            "data": {"path": str(path), "kind": "examples", "row_length": row_length,
                     "rows_per_batch": 4096 // row_length, "epochs": 1},
            "objective": {"name": "sft"},
            "optim": {"lr": lr, "warmup": 0.03, "decay": "linear", "b2": 0.98, "weight_decay": 0.01},
            "compute": {"dtype": "float32", "remat": "none", "chunk": 256},
            "mesh": {}, "ckpt": {"every": 200, "keep": 1, "export": "bfloat16"}}


def pretraining(seed: int, count: int, held_out: set[str]):
    """Programs whole, as text, right and wrong, and functions of the standard library."""
    rng = random.Random(seed)
    library = stdlib_functions()
    programs = pocket_problems.corpus(seed, held_out, **SLIPS["pretrain"])
    for index in range(count):
        if rng.random() < STDLIB_SHARE:
            yield Example(id=f"stdlib-{index}", prompt="", completion=rng.choice(library))
        else:
            program = next(programs)
            yield Example(id=f"program-{index}", prompt="", completion=program["prompt"] + program["solution"])


def instruction(seed: int, count: int, held_out: set[str]):
    """Programs as answers in EvalPlus' chat format."""
    programs = pocket_problems.corpus(seed, held_out, **SLIPS["instruct"])
    for index, program in enumerate(itertools.islice(programs, count)):
        problem = Problem(task_id="", base_input=[], plus_input=[], canonical_solution="",
                          prompt=program["prompt"], entry_point=program["entry_point"])
        head = [line for line in program["prompt"].splitlines() if not line.startswith('    """')]
        answer = "\n".join([*head, program["solution"].rstrip(), "```\n"])  # the docstring is not said again
        yield Example(id=f"answer-{index}", prompt=evalplus.prompt(problem, chat=True), completion=answer)


def stdlib_functions() -> list[str]:
    """Short documented functions of the running interpreter's standard library, in a fixed order."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8")
        found += [ast.get_source_segment(source, node) + "\n" for node in ast.parse(source).body
                  if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)]
    return [code for code in found if len(code) < 500]


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
