"""Type-check seeds with Pyright, many at a time (the extra `types`; SelfCodeAlign's step, with batches that fail told).

A batch on which Pyright fails or runs out of time is halved until the file that it fails on stands alone: the original
drops all 250 files of such a batch. Pyright reads the programs and runs none of them.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from align_jax.records import Seed

BATCH, SECONDS = 250, 120.0


def check(wanted: bool) -> None:
    """Raise if Pyright is wanted and not installed."""
    if wanted and importlib.util.find_spec("pyright") is None:
        raise ValueError("pyright: got True, but it is not installed; pip install 'align_jax[types]', or "
                         "--config.pyright=False")


def well_typed(seeds: Sequence[Seed], *, seconds: float = SECONDS) -> list[Seed | str]:
    """Return, seed by seed, itself or why it was dropped: "type error" or, if Pyright failed on it, "type check"."""
    return [kept for i in range(0, len(seeds), BATCH) for kept in _batch(seeds[i:i + BATCH], seconds)]


def _batch(seeds: Sequence[Seed], seconds: float) -> list[Seed | str]:
    wrong = _errors(seeds, seconds)
    if wrong is not None:
        return ["type error" if i in wrong else seed for i, seed in enumerate(seeds)]
    if len(seeds) == 1:
        return ["type check"]
    half = len(seeds) // 2
    return _batch(seeds[:half], seconds) + _batch(seeds[half:], seconds)


def _errors(seeds: Sequence[Seed], seconds: float) -> set[int] | None:
    """Return which seeds have an error, or None if Pyright did not get through."""
    with tempfile.TemporaryDirectory() as folder:
        for i, seed in enumerate(seeds):
            (Path(folder) / f"seed_{i}.py").write_text(seed.code, encoding="utf-8")
        (Path(folder) / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
        command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", folder]
        try:
            done = subprocess.run(command, capture_output=True, timeout=seconds,
                                  env=os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})
            said = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, json.JSONDecodeError):
            return None
    if done.returncode not in (0, 1) or said["summary"]["filesAnalyzed"] != len(seeds):
        return None
    return {int(Path(d["file"]).stem.removeprefix("seed_")) for d in said["generalDiagnostics"]
            if d["severity"] == "error"}
