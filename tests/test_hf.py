"""Checkpoints against transformers and torch: same logits, same bits, and one clear error."""

import copy
import functools
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from align_jax import attention, hf, hf_config, mesh, model

SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=96, vocab_size=256, max_position_embeddings=1024)
LLAMA3_1 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=128)
LLAMA, QWEN2 = transformers.LlamaConfig, transformers.Qwen2Config
FAMILIES = {
    "llama3": (LLAMA, dict(rope_theta=5e5)),
    "codellama": (LLAMA, dict(rope_theta=1e6, num_key_value_heads=4, rms_norm_eps=1e-5)),
    "deepseek": (LLAMA, dict(rope_theta=1e5, rope_type="linear", factor=4.0)),
    "qwen2": (QWEN2, dict(rope_theta=1e6)),
    "tied": (LLAMA, dict(rope_theta=5e5, tie_word_embeddings=True)),
    "llama3.1": (LLAMA, dict(rope_theta=5e5, **LLAMA3_1)),
    "head_dim": (LLAMA, dict(rope_theta=5e5, head_dim=24)),
    "attention_bias": (LLAMA, dict(rope_theta=5e5, attention_bias=True)),
}
MESHES = [(1, 1, 1), (2, 2, 2)]
BAR = 2e-5  # of logits that have a standard deviation of about 0.5
T = 512


@functools.cache
def torch_model(family: str):
    """Make a random model in which no tensor is trivial: norms and biases are random too."""
    kind, said = FAMILIES[family]
    rope = {name: said[name] for name in said if name in hf_config.ROPE_FIELDS}
    rest = {name: said[name] for name in said if name not in rope}
    lm = transformers.AutoModelForCausalLM.from_config(kind(
        **SIZES | rest, rope_parameters={"rope_type": "default"} | rope))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if "norm" in name else 0.08 * noise)
    return lm.eval()


@functools.cache
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (4, T))


@functools.cache
def torch_logits(family: str) -> np.ndarray:
    return logits_of(torch_model(family))


def logits_of(lm) -> np.ndarray:
    torch.set_num_threads(1)
    with torch.no_grad():
        return lm(torch.tensor(tokens())).logits.numpy()


def our_logits(cfg, params) -> np.ndarray:
    positions = np.tile(np.arange(T), (len(tokens()), 1))
    rows = [jax.device_put(x.astype(np.int32), mesh.sharding("rows", None))
            for x in (tokens(), positions, np.ones_like(positions))]

    @jax.jit
    def forward(params, tokens, positions, segments):
        attend = attention.make(segments, jnp.zeros_like(segments))
        return model.unembed(model.head(params, jnp.float32), model.hidden(cfg, params, tokens, positions, attend))

    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(params, *rows))


def on(shape):
    return jax.set_mesh(mesh.make(*shape, devices=jax.devices()[:np.prod(shape)]))


def save(family: str, folder: Path, *, dtype=torch.float32, spelling="new", **more) -> Path:
    """Save as transformers 5 does, or with config.json rewritten as transformers 4 did."""
    copy.deepcopy(torch_model(family)).to(dtype).save_pretrained(folder, **more)
    if spelling == "old":
        rewrite(folder, old_spelling)
    return folder


def rewrite(folder: Path, change) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def old_spelling(raw: dict) -> dict:
    rope = raw.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    name = "type" if kind == "linear" else "rope_type"  # deepseek's is older than Llama 3.1's
    return raw | {"rope_theta": theta,
                  "rope_scaling": None if kind == "default" else {name: kind, **rope}}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors")
            for name, tensor in safetensors.torch.load_file(path).items()}


def assert_same_bits(got: Path, expected: Path) -> None:
    got, expected = tensors_in(got), tensors_in(expected)
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, spelling", [(MESHES[0], "new"), (MESHES[1], "old")])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_both_ways(family, shape, spelling, tmp_path):
    source = save(family, tmp_path / "source", spelling=spelling)
    expected = torch_logits(family)
    assert 0.3 < expected.std() < 2  # else the bar says little
    with on(shape):
        cfg, params = hf.load(source, dtype=jnp.float32)
        assert np.abs(our_logits(cfg, params) - expected).max() <= BAR
        hf.export(cfg, params, tmp_path / "exported")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert type(back) is type(torch_model(family)) and back.dtype == torch.float32
    assert np.abs(logits_of(back) - expected).max() <= BAR
    assert hf.config(tmp_path / "exported") == cfg


def test_both_spellings_are_one_config(tmp_path):
    for family in FAMILIES:
        new = hf.config(save(family, tmp_path / family))
        rewrite(tmp_path / family, old_spelling)
        assert hf.config(tmp_path / family) == new
        assert new.rope.theta == FAMILIES[family][1]["rope_theta"]


@pytest.mark.parametrize("stored, held", [
    ("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("family", ["qwen2", "tied", "head_dim", "attention_bias"])
def test_every_bit_survives_import_and_export(family, shape, stored, held, tmp_path):
    source = save(family, tmp_path / "source", dtype=getattr(torch, stored))
    with on(shape):
        cfg, params = hf.load(source, dtype=held)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(held)}
        hf.export(cfg, params, tmp_path / "out", like=source, dtype=stored)
    assert_same_bits(tmp_path / "out", source)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == stored


def test_sharded_files_in_and_out(tmp_path):
    source = save("qwen2", tmp_path / "source", max_shard_size="100KB")
    assert len(list(source.glob("model-*.safetensors"))) > 3
    with on((2, 2, 2)):
        hf.export(*hf.load(source, dtype=jnp.float32), tmp_path / "out", max_shard_gb=100e-6)
    files = sorted(path for path in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3 and max(path.stat().st_size for path in files) < 105_000
    assert_same_bits(tmp_path / "out", source)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert np.array_equal(logits_of(back), torch_logits("qwen2"))


def test_tied_head_that_is_written_out_must_be_the_embedding(tmp_path):
    source = save("tied", tmp_path)
    held = tensors_in(source)
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    write(source, held)
    with on((1, 1, 1)):
        hf.load(source, dtype=jnp.float32)
        held["lm_head.weight"][3, 5] += 1e-6
        write(source, held)
        with pytest.raises(ValueError, match="lm_head.weight: differs from model.embed_tokens"):
            hf.load(source, dtype=jnp.float32)


def test_the_host_holds_two_tensors_at_most(tmp_path):
    """By Python's count of its own memory: without the arrays on the devices, with what is traced to compile."""
    cfg = model.ModelConfig(L=8, D=256, N=4, K=4, H=64, F=1024, V=512)
    with on((2, 2, 2)):
        params = model.init(cfg, 0)
        largest, total = 256 * 1024 * 4, cfg.num_params * 4
        assert total > 30 * largest
        assert peak(lambda: hf.export(cfg, params, tmp_path / "out")) < 3 * largest
        assert peak(lambda: hf.load(tmp_path / "out", dtype=jnp.float32)) < 1.5 * largest
        hf.convert(tmp_path / "out", tmp_path / "stacked", dtype=jnp.float32)
        assert peak(lambda: hf.load(tmp_path / "stacked", dtype=jnp.float32)) < 1.5 * largest
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > total  # one file, and never in memory


def peak(do) -> int:
    tracemalloc.start()
    do()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


@pytest.mark.slow
def test_memory_and_bits_at_a_larger_size_as_the_benchmark_has_them(tmp_path):
    """All memory of its process beyond the arrays, where the largest tensor is 67 MB and the files have 411."""
    root = Path(__file__).parents[1]
    out = subprocess.run(
        [sys.executable, root / "tools" / "bench_convert.py", "--shape=L=8,D=1024,N=8,K=8,H=128,F=4096,V=32768",
         "--rounds=1", f"--folder={tmp_path}"], text=True, check=True, stdout=subprocess.PIPE, cwd=root,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(root)}).stdout
    figures = {name: found for name, found in json.loads(out).items() if isinstance(found, dict)}
    assert json.loads(out)["bytes"] > 400e6
    assert [found["same"] for found in figures.values() if "same" in found] == [True] * 3
    for name, found in figures.items():
        assert found.get("largest_tensors", 0) < 3, name  # 1 is 67 MB, and what is compiled takes about as much


# --- the command line and the files beside the weights --------------------------------------------


def test_import_then_export_by_command_line(tmp_path):
    source = save("qwen2", tmp_path / "source", dtype=torch.bfloat16)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    rewrite(source, lambda raw: raw | {"eos_token_id": 7})
    run("import", source, tmp_path / "stacked")
    last = run("export", tmp_path / "stacked", tmp_path / "out")
    assert "wrote 39 tensors, " in last and last.endswith("GB of bfloat16")
    assert_same_bits(tmp_path / "out", source)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 7
    with on((2, 2, 2)):
        _, params = hf.load(tmp_path / "stacked", dtype=jnp.float32)
        _, direct = hf.load(source, dtype=jnp.float32)
        assert jax.tree.map(jax.typeof, params) == jax.tree.map(jax.typeof, direct)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, direct))
    path = tmp_path / "stacked" / "params.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    [problem] = load_error(tmp_path / "stacked")
    assert problem.startswith("params.safetensors: truncated or damaged (")


@pytest.mark.parametrize("source, folder, problem", [
    ("gone", "new", "gone/config.json: not there; expected a Hugging Face checkpoint"),
    ("gone", "here", "here: already there; name a folder that is not")])
def test_what_the_command_cannot_do_is_one_line(source, folder, problem, tmp_path):
    (tmp_path / "here").mkdir()
    done = command("import", tmp_path / source, tmp_path / folder)
    assert (done.returncode, done.stderr) == (1, f"error: {tmp_path}/{problem}\n")


def command(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "align_jax.hf", *map(str, args)], text=True,
                          capture_output=True, cwd=Path(__file__).parents[1])


def run(*args) -> str:
    done = command(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_export_is_whole_or_not_there(tmp_path, monkeypatch):
    cfg = model.ModelConfig(L=1, D=8, N=2, K=2, H=4, F=8, V=1024)  # the embedding does not fit the file's buffer
    with on((1, 1, 1)):
        params = model.init(cfg, 0)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(hf.tensorfile, "open", lambda *_: open("/dev/full", "wb"), raising=False)
            hf.export(cfg, params, tmp_path / "out")
        assert not list(tmp_path.iterdir())
        hf.export(cfg, params, tmp_path / "out")
        with pytest.raises(ValueError, match="already there"):
            hf.export(cfg, params, tmp_path / "out")
        other = hf.dataclasses.replace(cfg, norm_eps=1e-6)
        with pytest.raises(ValueError, match=r"another model:\n  norm_eps: got 1e-06, there 1e-05"):
            hf.export(other, params, tmp_path / "other", like=tmp_path / "out")
        del params["head"]
        with pytest.raises(ValueError, match=r"head: got none, expected \(1024, 8\)"):
            hf.export(cfg, params, tmp_path / "other")


# --- what is refused ------------------------------------------------------------------------------


def write(folder: Path, tensors: dict) -> None:
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load_error(folder: Path, shape=(1, 1, 1)) -> list[str]:
    with on(shape), pytest.raises(ValueError) as error:
        hf.load(folder, dtype=jnp.float32)
    head, *problems = str(error.value).splitlines()
    assert str(folder) in head
    return [problem.strip() for problem in problems]


def test_all_wrong_tensors_are_in_one_error(tmp_path):
    held = tensors_in(save("qwen2", tmp_path))
    del held["model.norm.weight"], held["model.layers.1.self_attn.k_proj.bias"]
    held["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 96)
    held["model.layers.2.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int8)
    held["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(16)
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # is ignored
    write(tmp_path, held)
    assert set(load_error(tmp_path)) == {
        "model.norm.weight: missing, expected shape (64,)",
        "model.layers.1.self_attn.k_proj.bias: missing, expected shape (32,)",
        "model.layers.0.mlp.up_proj.weight: got shape (64, 96), expected (96, 64)",
        "model.layers.2.mlp.up_proj.weight: got I8, implemented: F32, BF16, F16",
        "model.layers.0.self_attn.q_norm.weight: extra, the model of config.json has no such "
        "tensor",
    }


@pytest.mark.parametrize("keep", [-4, 100, 8, 0])
def test_a_truncated_file_is_named(keep, tmp_path):
    path = save("llama3", tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    [problem] = load_error(tmp_path)
    assert problem.startswith("model.safetensors: truncated or damaged (")


def test_absent_and_truncated_shards_are_named_once(tmp_path):
    folder = save("llama3", tmp_path, max_shard_size="100KB")
    first, second, *_, last = sorted(folder.glob("model-*"))
    first.unlink()
    last.write_bytes(last.read_bytes()[:-1])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = next(name for name, file in index["weight_map"].items() if file == second.name)
    held = safetensors.torch.load_file(second)
    del held[name]
    safetensors.torch.save_file(held, second)
    problems = sorted(load_error(folder), key=lambda text: text.split(":")[0])
    assert len(problems) == 3
    assert problems[0].startswith(f"{first.name}: not there; the folder has config.json, ")
    assert problems[1].startswith(f"{last.name}: truncated or damaged")
    assert problems[2].startswith(f"{name}: missing")


def move(path: Path, to: int) -> None:
    """Lengthen the header, so that the first tensor is that far beyond a multiple of 64 bytes."""
    held = path.read_bytes()
    begin = 8 + int.from_bytes(held[:8], "little")
    header = held[8:begin] + b" " * ((to - begin) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + held[begin:])


def test_a_file_whose_tensors_are_at_odd_addresses(tmp_path):
    path = save("llama3", tmp_path, dtype=torch.bfloat16) / "model.safetensors"
    with on((1, 1, 1)):
        _, expected = hf.load(tmp_path, dtype=jnp.float32)
        move(path, 1)
        _, params = hf.load(tmp_path, dtype=jnp.float32)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))


def test_weights_are_no_part_of_their_file(tmp_path):
    """On a CPU an array could be the mapped file itself, which somebody writes to; where it is aligned as jax likes."""
    path = save("llama3", tmp_path) / "model.safetensors"
    move(path, 0)
    with on((1, 1, 1)):
        _, params = hf.load(tmp_path, dtype=jnp.float32)
        before = jax.tree.map(np.array, params)
        with open(path, "r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert jax.tree.all(jax.tree.map(np.array_equal, params, before))


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = save("llama3", tmp_path, max_shard_size="100KB")
    first, second, *_ = sorted(folder.glob("model-*"))
    held = safetensors.torch.load_file(first)
    safetensors.torch.save_file(safetensors.torch.load_file(second) | held, second)
    assert load_error(folder) == [f"{name}: also in {second.name}" for name in sorted(held)]


def test_no_weights_or_no_config_says_what_is_there(tmp_path):
    folder = save("llama3", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    [problem] = load_error(folder)
    assert problem.startswith("model.safetensors: not there; ") and "pytorch_model.bin" in problem
    with pytest.raises(ValueError, match="nowhere/config.json: not there"):
        hf.config(tmp_path / "nowhere")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        hf.config(folder)


def test_what_does_not_divide_over_the_mesh_is_named_with_the_rest(tmp_path):
    held = tensors_in(save("llama3", tmp_path))
    del held["model.norm.weight"]
    write(tmp_path, held)
    assert load_error(tmp_path, (1, 2, 4)) == [
        "num_key_value_heads: 2 is not divisible by the mesh's tensor axis of 4",
        "model.norm.weight: missing, expected shape (64,)"]


def test_a_mesh_must_be_set(tmp_path):
    with pytest.raises(ValueError, match="no mesh is set"):
        hf.load(save("llama3", tmp_path), dtype=jnp.float32)


# --- config.json ----------------------------------------------------------------------------------

COMMON = dict(hidden_act="silu", initializer_range=0.02, tie_word_embeddings=False,
              torch_dtype="bfloat16", use_cache=True, bos_token_id=1, eos_token_id=2)
LLAMA3_8B = COMMON | dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=128000, eos_token_id=128001, hidden_size=4096, intermediate_size=14336,
    max_position_embeddings=8192, model_type="llama", num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling=None, rope_theta=500000.0, transformers_version="4.40.0.dev0", vocab_size=128256)
CODELLAMA_7B = COMMON | dict(
    architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=11008,
    max_position_embeddings=16384, model_type="llama", num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling=None, rope_theta=1000000, transformers_version="4.33.0.dev0", vocab_size=32016)
DEEPSEEK_1_3B = COMMON | dict(
    architectures=["LlamaForCausalLM"], bos_token_id=32013, eos_token_id=32014, hidden_size=2048,
    intermediate_size=5504, max_position_embeddings=16384, model_type="llama",
    num_attention_heads=16, num_hidden_layers=24, num_key_value_heads=16, pretraining_tp=1,
    rms_norm_eps=1e-06, rope_scaling={"factor": 4.0, "type": "linear"}, rope_theta=100000,
    transformers_version="4.33.1", vocab_size=32256)
DEEPSEEK_7B = COMMON | dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=100000, eos_token_id=100001, hidden_size=4096, intermediate_size=11008,
    max_position_embeddings=4096, model_type="llama", num_attention_heads=32,
    num_hidden_layers=30, num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-06,
    rope_scaling=None, rope_theta=10000.0, transformers_version="4.35.2", vocab_size=102400)
QWEN_7B = COMMON | dict(
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643,
    eos_token_id=151643, hidden_size=3584, intermediate_size=18944,
    max_position_embeddings=32768, max_window_layers=28, model_type="qwen2",
    num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-06,
    rope_theta=1000000.0, sliding_window=131072, transformers_version="4.44.0",
    use_sliding_window=False, vocab_size=152064)
PAPER = {  # the ten checkpoints and the parameter counts on their pages
    "Meta-Llama-3-8B": (LLAMA3_8B, 8_030_261_248),
    "Meta-Llama-3-8B-Instruct": (LLAMA3_8B | {"eos_token_id": 128009}, 8_030_261_248),
    "CodeLlama-7b-hf": (CODELLAMA_7B, 6_738_546_688),
    "CodeLlama-7b-Instruct-hf": (CODELLAMA_7B, 6_738_546_688),
    "deepseek-coder-1.3b-base": (DEEPSEEK_1_3B, 1_346_471_936),
    "deepseek-coder-1.3b-instruct": (DEEPSEEK_1_3B | {"eos_token_id": 32021}, 1_346_471_936),
    "deepseek-coder-7b-base-v1.5": (DEEPSEEK_7B, 6_910_365_696),
    "deepseek-coder-7b-instruct-v1.5": (DEEPSEEK_7B | {"eos_token_id": 100015}, 6_910_365_696),
    "Qwen2.5-Coder-7B": (QWEN_7B | {"use_mrope": False}, 7_615_616_512),
    "Qwen2.5-Coder-7B-Instruct": (QWEN_7B | {"eos_token_id": 151645}, 7_615_616_512),
}


def parse(folder: Path, raw: dict) -> model.ModelConfig:
    (folder / "config.json").write_text(json.dumps(raw))
    return hf.config(folder)


@pytest.mark.parametrize("name", PAPER)
def test_the_checkpoints_of_the_paper_are_accepted(name, tmp_path):
    raw, num_params = PAPER[name]
    cfg = parse(tmp_path, raw)
    with on((1, 1, 1)):
        assert cfg.num_params == num_params
    sizes = [np.prod(hf.hf_shape(cfg, tensor.pattern)) for tensor in hf.tensors(cfg)]
    assert sum(sizes) == num_params
    assert cfg.rope.theta == raw["rope_theta"]
    assert cfg.qkv_bias == (raw["model_type"] == "qwen2") and not cfg.o_bias
    assert (cfg.rope.scaling, cfg.rope.factor) == (
        ("linear", 4.0) if "1.3b" in name else ("default", 1.0))


def config_error(folder: Path, raw: dict) -> list[str]:
    with pytest.raises(ValueError) as error:
        parse(folder, raw)
    return [problem.strip() for problem in str(error.value).splitlines()[1:]]


REFUSED = [
    ({"model_type": "mistral"}, "model_type: got 'mistral', implemented: llama, qwen2"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', implemented: 'silu'"),
    ({"mlp_bias": True}, "mlp_bias: got True, implemented: False"),
    ({"pretraining_tp": 2}, "pretraining_tp: got 2, implemented: 1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, implemented: 1"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "implemented: 'LlamaForCausalLM'"),
    ({"sliding_window": 4096}, "sliding_window: got 4096, a field that is not implemented"),
    ({"quantization_config": {"bits": 4}}, "quantization_config: got {'bits': 4}, a field that"),
    ({"logit_scale": 0.5}, "logit_scale: got 0.5, a field that is not implemented"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "implemented: 'full_attention'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type: got 'dynamic' of "),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "implemented: default, linear, ll"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1]}}, "rope_type: got 'longrope' of"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope factor: missing for 'linear'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "rope factor: got '4', expected a"),
    ({"rope_scaling": "linear"}, "rope_scaling: got 'linear', expected an object"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0, "attention_factor": 2.0}},
     "rope attention_factor: got 2.0, not implemented for 'linear'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
     "rope original_max_position_embeddings: missing for 'llama3'"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
     "rope rope_theta: got both 10000.0 and 500000.0"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
     "rope full_attention: got {'rope_theta': 10000.0}, not implemented for 'default'"),
    ({"hidden_size": None}, "hidden_size: missing"),
    ({"hidden_size": "4096"}, "hidden_size: got '4096', expected a positive whole number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings: got 1, expected true or false"),
    ({"num_key_value_heads": 5}, "expected a multiple of num_key_value_heads = 5"),
    ({"head_dim": 127}, "head_dim: got 127, expected an even number"),
]


@pytest.mark.parametrize("change, problem", REFUSED, ids=lambda x: re.sub(r"\W+", "_", str(x))[:40])
def test_a_field_that_is_not_implemented_is_refused(change, problem, tmp_path):
    assert any(problem in line for line in config_error(tmp_path, LLAMA3_8B | change))


def test_qwen2_windows_and_llama_biases_are_not_taken_for_each_other(tmp_path):
    assert config_error(tmp_path, QWEN_7B | {"use_sliding_window": True, "attention_bias": True}
                        ) == ["use_sliding_window: got True, implemented: False",
                              "attention_bias: got True, a field that is not implemented"]


def test_every_problem_of_a_config_is_in_one_error(tmp_path):
    raw = LLAMA3_8B | {"hidden_act": "gelu", "logit_scale": 2, "vocab_size": None,
                       "rope_scaling": {"type": "yarn"}}
    assert [line.split(":")[0] for line in config_error(tmp_path, raw)] == [
        "rope_type", "vocab_size", "hidden_act", "logit_scale"]


def test_what_transformers_saves_by_itself_is_known(tmp_path):
    """Every field that the installed transformers writes for these families is decided on."""
    for kind in (LLAMA, QWEN2):
        kind(**SIZES).save_pretrained(tmp_path)
        hf.config(tmp_path)
