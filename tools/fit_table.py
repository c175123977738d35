"""What fits where: DPO of the study's models, compiled for TPU slices; makes the table of launch/README.md.

    python tools/fit_table.py [--models=...] [--slices=v5e-64,v5p-8,v6e-16] [--out=fit.json]

Needs libtpu (`pip install -e .[tpu]`), no TPU and no weights; one to two minutes a step on two cores. All weights are
trained (fp32, AdamW) on rows of 2,048 tokens, two rows a chip, as configs/dpo.py has it; then the small hardware. To be
run again for another libtpu: the numbers are its compiler's.
"""

import dataclasses
import runpy
from pathlib import Path

from absl import app, flags

from align_jax import fit, log

_MODELS = flags.DEFINE_list("models", [*fit.SHAPES], "which of fit.SHAPES")
_SLICES = flags.DEFINE_list("slices", ["v5e-64", "v5p-8", "v6e-16"], "which of fit.TPUS")
_OUT = flags.DEFINE_string("out", None, "a JSON file for all that was measured")

LORA = {"lora": {"rank": 16}, "compute": {"accumulate": 8}, "data": {"rows_per_batch": 32}}
SMALL = [("deepseek-coder-1.3b", "v5e-8", {"data": {"rows_per_batch": 32}}), ("deepseek-coder-1.3b", "l4-24gb", LORA)]


def main(argv) -> None:
    get_config = runpy.run_path(Path(__file__).parent.parent / "configs" / "dpo.py")["get_config"]
    wanted = [(start, name, {"data": {"rows_per_batch": 2 * len(fit.accelerator(name)[1])}})
              for start in _MODELS.value for name in _SLICES.value]
    found = []
    print("| model | on | rows a step | GiB a device: weights | optimiser | the rest | in all, of | s a step at peak "
          "| as compiled |\n|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for start, name, changes in wanted + SMALL:
        c = get_config()
        c.update({"start": start} | changes)
        one = fit.measure(c.to_dict(), name)
        found.append({"start": start, "name": name, "changes": changes, **dataclasses.asdict(one)})
        weights, state, *rest = (value / fit.GIB for kind, value in one.parts.items())
        total = f"{one.total / fit.GIB:.2f} of {one.capacity / fit.GIB:.2f}{'' if one.fits else ': too much'}"
        lora = ", LoRA 16" if "lora" in changes else ""
        print(f"| {start}{lora} | {name} | {c.data.rows_per_batch} | {weights:.2f} | {state:.2f} | {sum(rest):.2f} "
              f"| {total} | {one.at_peak:.2f} | {f'{one.seconds:.2f}' if one.seconds else '–'} |", flush=True)
    if _OUT.value:
        log.write_json(Path(_OUT.value), {"versions": log.versions(), "found": found})
        print(f"wrote {_OUT.value}")


if __name__ == "__main__":
    app.run(main)
