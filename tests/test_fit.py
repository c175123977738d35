"""--fit: names of accelerators, meshes over slices, and steps compiled for TPUs that are not here."""

import importlib.util
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_hf import PAPER, parse

from align_jax import fit, lora, mesh

ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"),
                                  reason="libtpu, the compiler, is not installed (the extra tpu)")


def settings(start: str, **sections) -> dict:
    """configs/dpo.py with changes."""
    c = runpy.run_path(ROOT / "configs" / "dpo.py")["get_config"]().to_dict() | {"start": start}
    return c | {name: c[name] | changes for name, changes in sections.items()}


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, chip, layout", [
    ("v5e-64", "v5e", "8x8"), ("v5litepod-64", "v5e", "8x8"), ("v5e-8", "v5e", "2x4"), ("v5p-8", "v5p", "2x2x1"),
    ("v5p-128", "v5p", "4x4x4"), ("v6e-16", "v6e", "4x4"), ("v6e-1", "v6e", "1x1")])
def test_names_are_those_of_cloud(name, chip, layout):
    assert fit.TPUS[name] == (chip, layout)


@needs_libtpu
def test_every_name_has_its_number_of_chips():
    kinds = {"v5e": "TPU v5 lite", "v5litepod": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    for name in fit.TPUS:
        kind, number = name.split("-")
        _, devices = fit.accelerator(name)
        assert len(devices) == int(number) // (2 if kind == "v5p" else 1)
        assert {device.device_kind for device in devices} == {kinds[kind]}
    assert len(fit.accelerator("3xv5e-16")[1]) == 48
    assert [len(fit.accelerator(name)[1]) for name in ("l4-24gb", "2xl4-24gb", "8xh100-80gb")] == [1, 2, 8]


@pytest.mark.parametrize("name", ["v5e-9", "v4-8", "0xv5e-8", "v5e", "", "3xl4-24gb"])
def test_an_unknown_accelerator_is_answered_with_the_list(name):
    with pytest.raises(ValueError, match=f"fit: got '{name}', available are v5e-1, .*v5p-8, .*as estimates l4-24gb, "):
        fit.accelerator(name)


@pytest.mark.parametrize("name", PAPER)
def test_the_shapes_are_those_of_the_checkpoints(name, tmp_path):
    [shape] = [shape for short, shape in fit.SHAPES.items() if name.startswith(short)]
    assert shape == parse(tmp_path, PAPER[name][0]) == fit.shape(str(tmp_path))


def test_a_start_that_is_neither_folder_nor_name():
    with pytest.raises(ValueError, match="start: got 'Llama-9', expected a checkpoint's folder or one of deepseek"):
        fit.shape("Llama-9")


# --- meshes -------------------------------------------------------------------------------------------


@needs_libtpu
@pytest.mark.parametrize("shape", [(2, 8, 2), (-1, 16, 1), (8, -1, 1)])
def test_only_the_data_axis_goes_over_slices(shape):
    _, devices = fit.accelerator("2xv5e-16")
    made = mesh.make(*shape, devices=devices)
    slices = np.vectorize(lambda device: device.slice_index)(made.devices)
    assert made.shape["data"] * made.shape["fsdp"] * made.shape["tensor"] == 32
    assert set(made.devices.flat) == set(devices)
    assert {len(set(part.flat)) for part in slices} == {1}  # the part of one place on the data axis
    assert (np.diff(slices[:, 0, 0]) >= 0).all() and set(slices.flat) == {0, 1}


@needs_libtpu
def test_slices_that_the_data_axis_does_not_divide_over():
    _, devices = fit.accelerator("2xv5e-16")
    with pytest.raises(ValueError, match="got data = 1 on 2 slices, expected a multiple of 2"):
        mesh.make(1, 32, 1, devices=devices)


@needs_libtpu
def test_neighbours_on_the_tensor_axis_are_neighbours_on_the_chips():
    """On a v5p-64, links join chips that differ by one in one coordinate."""
    _, devices = fit.accelerator("v5p-64")
    for pair in mesh.make(1, 16, 2, devices=devices).devices.reshape(-1, 2):
        a, b = (np.array(device.coords) for device in pair)
        assert np.abs(a - b).sum() == 1


def test_hosts_of_gpus_are_not_slices():
    hosts = [SimpleNamespace(platform="gpu", slice_index=i // 8) for i in range(16)]
    assert mesh._num_slices(hosts) == 1 and mesh._num_slices(jax.devices()) == 1


# --- what is computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", fit.SHAPES)
def test_flops_are_six_a_weight_and_token(name, one_device):
    cfg = fit.SHAPES[name]
    [num_params] = {count for full, (_, count) in PAPER.items() if full.startswith(name)}
    biases = cfg.L * (cfg.N + 2 * cfg.K) * cfg.H if cfg.qkv_bias else 0
    in_matrices = num_params - cfg.V * cfg.D - (2 * cfg.L + 1) * cfg.D - biases
    step = {"tokens": 300, "scored": 300, "seen": 300 * 50}
    matrices, attention = fit.num_flops(cfg, **step)
    assert matrices == 6 * in_matrices * 300
    assert attention == 3 * 3 * cfg.L * cfg.N * 4 * cfg.H * 100 * 100 / 2
    adapted = lora.config(cfg, rank=16, alpha=16.0)
    adapters = adapted.num_params - cfg.num_params
    assert fit.num_flops(adapted, **step) == ((4 * in_matrices + 6 * adapters) * 300, attention)


@pytest.mark.parametrize("kind, name", [
    ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v5e", "v5e"),
    ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
    ("NVIDIA A100 80GB PCIe", "a100-80gb"), ("NVIDIA H100 80GB HBM3", "h100-80gb"), ("NVIDIA H200", "h200-141gb")])
def test_a_chip_is_found_by_what_jax_calls_it(kind, name):
    assert fit.of_kind(kind) == (fit.CHIPS | fit.GPUS)[name]
    assert all(math.isnan(fit.of_kind(kind).flops) for kind in ("cpu", "NVIDIA H100 PCIe"))


HLO = """HloModule jit_step
%fused (a: f32[8]) -> f32[8] {
  ROOT %add = f32[8]{0} add(%a, %a), backend_config={"estimated_cycles":"1000000"}
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"10"}
}

%inner_ends (p: (s32[], s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%outer.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"200"}
  %while.1 = (s32[], f32[8]{0}) while(%tuple), condition=%inner_ends, body=%inner, metadata={op_name="a"}
}

%outer_ends (p: (s32[], f32[8])) -> pred[] {
  %end = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %x = f32[8]{0} fusion(%a), calls=%fused, backend_config={"estimated_cycles":"4000"}
  %while.2 = (s32[], f32[8]{0}) while(%tuple), condition=%outer_ends, body=%outer.1, metadata={op_name="b"}
}
"""


def test_cycles_of_loops_are_multiplied():
    assert fit.num_cycles(HLO, trips=7) == 4000 + 3 * (200 + 7 * 10)


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e-4", "v5p-8", "v6e-4"])
def test_the_clock_is_the_chips(name):
    """A large product runs near the peak; so many of them in a loop take so many times as long."""
    chip, devices = fit.accelerator(name)
    one = NamedSharding(jax.sharding.Mesh(devices[:1], "x"), PartitionSpec())
    a = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=one)

    def seconds(f):
        return fit.num_cycles(jax.jit(f).lower(a).compile().as_text(), 1) / chip.clock

    def loop(length):
        return lambda a: jax.lax.scan(lambda x, _: (a @ x, None), a, length=length)[0]

    assert 0.8 < 2 * 4096**3 / chip.flops / seconds(lambda a: a @ a) < 1.0
    assert seconds(loop(80)) / seconds(loop(8)) == pytest.approx(10, rel=0.02)


# --- what may help ------------------------------------------------------------------------------------


def hints(mesh: tuple[int, int], parts: tuple[float, float, float], **sections) -> list[str]:
    """For a config with 32 rows a batch, and GiB of weights, optimizer state and the rest."""
    kinds = dict(zip(("weights", "optimizer state", fit.REST), parts, strict=True))
    found = fit.Fit({"data": mesh[0], "fsdp": mesh[1], "tensor": 1}, kinds, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    return fit.hints(settings("", **sections), found)


def test_hints_are_for_the_largest_part_first_and_of_what_is_not_in_use():
    split = "less of mesh.data (one a slice, at least) and more of mesh.fsdp"
    shorter, slice_ = "a shorter data.row_length", "more chips"
    assert hints((1, 8), (5, 10, 1)) == ["optim.offload=True", "lora.rank=16", slice_]
    assert hints((2, 4), (5, 10, 1)) == [split, "optim.offload=True", "lora.rank=16", slice_]
    assert hints((1, 8), (1, 2, 9)) == [
        "more of compute.accumulate", "compute.remat=offload", "lora.rank=16", shorter, "optim.offload=True", slice_]
    used = {"lora": {"rank": 8, "base_dtype": "float32"}, "optim": {"offload": True}}
    assert hints((1, 8), (5, 1, 9), compute={"remat": "dots", "accumulate": 4, "dtype": "float32"}, **used) == [
        "compute.dtype=bfloat16", "compute.remat=mixed", shorter, "lora.base_dtype=bfloat16", slice_]
    assert hints((1, 8), (1, 1, 9), compute={"remat": "offload", "accumulate": 4}, **used) == [shorter, slice_]
    assert hints((1, 8), (1, 1, 9), compute={"unroll": True, "keep_logits": True, "remat": "offload", "accumulate": 4},
                 **used) == ["compute.keep_logits=False", "compute.unroll=False", shorter, slice_]


def test_hints_name_settings_that_there_are():
    everything = {"compute": {"dtype": "float32", "remat": "none"}}
    named = re.findall(r"(\w+)\.(\w+)", " ".join(hints((2, 4), (5, 9, 9), **everything)))
    assert len(named) >= 7 and all(key in settings("")[section] for section, key in named)


# --- compiled -----------------------------------------------------------------------------------------


@needs_libtpu
def test_a_small_step_is_compiled():
    c = settings(str(ROOT / "tests/golden/tiny"), data={"row_length": 128, "rows_per_batch": 1}, compute={"chunk": 64})
    with jax.default_matmul_precision("default"):  # not the tests' "highest", which no TPU kernel has for bf16
        found = fit.measure(c, "v5e-1")
    weights = 4 * 37024
    assert found.parts["weights"] == weights
    assert found.parts["optimizer state"] == 2 * weights + 8  # two moments, and two counts of the steps
    assert found.parts["batch"] == 4 * 128 * 6 + 4 * 64 * 2 * 2
    assert found.parts["gradients, activations, the program"] > 128 * 64 * 2 * 2
    assert found.fits and found.host == 0 and 0 < found.at_peak < found.seconds < 0.01
    assert fit.report(found).splitlines()[0] == "GiB a device, mesh data 1 x fsdp 1 x tensor 1"


@needs_libtpu
@pytest.mark.parametrize("changes, name, problem", [
    ({}, "v5e-9", "fit: got 'v5e-9'"), ({"data": {"rows_per_batch": 3}}, "v5e-8", "data.rows_per_batch: got 3"),
    ({"mesh": {"fsdp": 3}}, "v5e-8", "mesh: .* needs 3 devices")])
def test_what_is_wrong_is_refused_before_anything_is_said(changes, name, problem, capsys):
    with pytest.raises(ValueError, match=problem):
        fit.main(settings("deepseek-coder-1.3b", **changes), name)
    assert capsys.readouterr().out == ""


@needs_libtpu
@pytest.mark.timeout(300)
def test_the_command_refuses_what_does_not_fit():
    """The compiler's own refusal: nothing is compiled to the end, on a model of 30 GiB of weights and a chip of 16."""
    done = subprocess.run(
        [sys.executable, "-m", "align_jax.train", "--config=configs/dpo.py", "--config.start=Meta-Llama-3-8B",
         "--config.data.rows_per_batch=1", "--fit=v5e-1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(r"^ +29\.92  weights\n +59\.83  optimizer state$", done.stdout, re.M)
    total = re.search(r"^ +([\d.]+)  in all, \d+% of 15.75$", done.stdout, re.M)
    assert float(total[1]) > 4 * 29.92
    assert done.stdout.endswith("does not fit v5e-1; what may help: optim.offload=True; lora.rank=16; compute."
                                "remat=offload; a shorter data.row_length; more chips\n")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("v5e-64", 128), ("v5p-8", 32)])
@pytest.mark.parametrize("start", fit.SHAPES)
def test_dpo_of_the_studys_models_fits(start, name, rows):
    """Full fp32 weights and AdamW, rows of 2,048 tokens, on 64 chips of 16 GB and on four of 95."""
    c = settings(start, data={"rows_per_batch": rows})
    with jax.default_matmul_precision("default"):
        found = fit.measure(c, name)
    [num_params] = {count for full, (_, count) in PAPER.items() if full.startswith(start)}
    chips = found.mesh["fsdp"]
    assert (c["data"]["row_length"], chips) == (2048, 64 if name == "v5e-64" else 4)
    assert num_params / chips <= found.parts["weights"] / 4 < 1.01 * num_params / chips
    assert found.fits and all(part > 0 for part in found.parts.values())
    assert found.at_peak < found.seconds < 10 * found.at_peak


@pytest.mark.slow
@pytest.mark.parametrize("name, sections", [
    ("v5e-8", {}), ("l4-24gb", {"lora": {"rank": 16}, "compute": {"accumulate": 8}}), ("v6e-16", {})])
def test_the_smallest_model_fits_small_hardware(name, sections):
    with jax.default_matmul_precision("default"):
        found = fit.measure(settings("deepseek-coder-1.3b", data={"rows_per_batch": 32}, **sections), name)
    assert found.fits
