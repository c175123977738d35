"""The promises of the layout, kept by machine: levels import downwards, few files, no drawers."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEVELS = {
    0: {"mesh", "records", "tensorfile", "text", "losses", "optim", "checkpoint", "log", "jail", "sandbox",
        "flash", "attention", "logprob"},
    1: {"model", "lora", "data"},
    2: {"hf_config", "hf", "step", "fit", "slots", "decode", "engine", "sample"},
    3: {"train", "synth", "score"},
    4: {"report"},
    5: {"study"},
}
WITHIN = {("text", "records"), ("flash", "mesh"), ("attention", "flash"), ("attention", "mesh"),
          ("logprob", "mesh"), ("lora", "model"),
          ("hf", "hf_config"), ("decode", "hf"), ("decode", "slots"), ("engine", "hf"), ("engine", "decode"),
          ("sample", "decode"), ("sample", "engine"), ("fit", "hf"), ("fit", "step"),
          ("synth", "score")}  # imports inside a level
LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names}


def imports(path: Path) -> set[str]:
    """The packages that a file imports; of ours, the modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *inner = name.split(".")
            found.add(inner[0] if package == "align_jax" and inner else package)
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
        wrong += [f"{path.name} imports {there}" for there in (imports(path) & LEVEL_OF.keys()) - {here}
                  if LEVEL_OF[there] >= LEVEL_OF[here] and (here, there) not in WITHIN]
    assert not wrong


def test_every_import_is_installed_with_us():
    given = {keyword.arg: keyword.value for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
             if isinstance(node, ast.Call) for keyword in node.keywords}
    required = {re.match(r"[\w-]+", line)[0] for line in ast.literal_eval(given["install_requires"])}
    imported = set().union(*(imports(path) for path in (ROOT / "align_jax").rglob("*.py")))
    imported -= {"align_jax", "__future__", *LEVEL_OF, *sys.stdlib_module_names}
    packages, canonical = metadata.packages_distributions(), {line.lower().replace("_", "-") for line in required}
    missing = {name for name in imported
               if not canonical & {found.lower().replace("_", "-") for found in packages.get(name, ())}}
    assert missing == {"ray"}  # an extra, of one file
    assert [path.name for path in (ROOT / "align_jax").rglob("*.py") if "ray" in imports(path)] == ["cluster.py"]


def test_nothing_imports_the_tools():
    tools = {"tools", *(path.stem for path in (ROOT / "tools").glob("*.py"))}
    assert not [path for path in (ROOT / "align_jax").rglob("*.py") if imports(path) & tools]
    assert "pocket_problems" in imports(ROOT / "tools" / "make_pocket.py")


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
