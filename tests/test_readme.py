"""The README's commands parse, set all that their configs leave open, and the paths that it names exist."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from align_jax import log

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python -m (align_jax\..*)", README.replace("\\\n", " "), re.MULTILINE)


def test_it_shows_how_to_start_everything_that_runs():
    synth = {f"align_jax.synth.{name}" for name in ("pipeline", "ground_truth", "seeds", "decontaminate")}
    others = {"align_jax.train", "align_jax.sample", "align_jax.study"}
    assert {command.split()[0] for command in COMMANDS} == synth | others


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses_and_leaves_no_setting_open(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    module, *arguments = shlex.split(command, comments=True)
    assert importlib.util.find_spec(module)
    monkeypatch.setattr("sys.argv", [module, *arguments])  # where config_flags looks for the overrides
    parsed = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=parsed, lock_config=True)
    flags.DEFINE_string("fit", None, "of train", flag_values=parsed)
    assert parsed([module, *arguments]) == [module]
    if not parsed.fit:  # which needs neither data nor a run folder
        log.check_set(config.value.to_dict())


def test_the_paths_that_it_names_exist():
    named = set(re.findall(r"`((?:align_jax|configs|launch|tools|tests)/[\w./]*|\w+\.(?:md|py|sh))`", README))
    named |= set(re.findall(r"(?<=bash )\S+\.sh|(?<=--config=)configs/\w+\.py", README))
    assert {"launch/quickstart.sh", "configs/dpo.py", "WORKSPACE_NOTES.md"} <= named
    assert not [path for path in named if not list(ROOT.glob(path)) and not list(ROOT.glob(f"*/{path}"))]
