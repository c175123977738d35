"""The promises of the layout, kept by machine: levels import downwards, few files, no drawers."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEVELS = {
    0: {"mesh", "records", "text", "losses", "optim", "checkpoint", "log", "jail", "sandbox"},
    1: {"model", "data"},
    2: {"hf_config", "hf", "step", "sample", "engine"},
    3: {"train", "synth", "score"},
    4: {"report"},
    5: {"study"},
}
# Imports inside a level. The command of sample takes any engine, and the local engine is sample's.
WITHIN = {("text", "records"), ("hf", "hf_config"), ("sample", "hf"), ("engine", "hf"), ("engine", "sample"),
          ("sample", "engine")}
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "align_jax":
            inner = node.module.split(".")[1:]
            found |= {inner[0]} if inner else {alias.name for alias in node.names}
    return found


def test_every_module_has_a_level():
    modules = {path.stem if path.suffix else path.name for path in (ROOT / "align_jax").iterdir()
               if not path.name.startswith("__") and path.name != "pocket"}
    assert modules == set(LEVEL_OF)


def test_imports_go_downwards():
    wrong = []
    for path in (ROOT / "align_jax").rglob("*.py"):
        here = path.relative_to(ROOT / "align_jax").parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        wrong += [f"{path.name} imports {there}" for there in imports(path) - {here}
                  if LEVEL_OF[there] >= LEVEL_OF[here] and (here, there) not in WITHIN]
    assert not wrong


def test_nothing_imports_the_tools():
    assert not [path for path in (ROOT / "align_jax").rglob("*.py") if "tools" in imports(path)]


def test_only_the_model_and_its_config_know_nnx():
    users = [path.name for path in (ROOT / "align_jax").rglob("*.py") if "nnx" in path.read_text()]
    assert users == ["model.py"]


def test_no_drawers():
    drawers = ("utils", "common", "misc", "helpers")
    assert not [path for path in (ROOT / "align_jax").rglob("*.py") if path.stem in drawers]
    classes = [node.name for path in (ROOT / "align_jax").rglob("*.py")
               for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    machinery = ("Manager", "Handler", "Factory", "Helper", "Wrapper", "Base")
    assert not [name for name in classes if name.endswith(machinery)]
