"""A command and its run folder: config, errors, metrics as JSONL and TensorBoard, the progress bar."""

import contextlib
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import jax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags
from tqdm import tqdm

TERMINATED = 128 + signal.SIGTERM  # exit status of a run that SIGTERM ended, all saved
LOST = ("Gloo", "NCCL", "closed by peer", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "heartbeat")  # in jax's errors
PLAIN = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n"  # a bar in a file


def command(main: Callable) -> None:
    """Run main(config) for --config=FILE and its overrides; a user's fault ends in one line, not in a traceback."""
    config = config_flags.DEFINE_config_file("config", None, "One of configs/*.py; its settings are flags too: "
                                             "--config.section.key=value", lock_config=True)
    flags.mark_flag_as_required("config")

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:  # of a config file that raises, its traceback: the last line says why
            raise SystemExit(f"error: {str(error).strip().splitlines()[-1].strip()}") from None
        except Exception as error:  # ml_collections passes on whatever an override raises
            raise SystemExit(f"error: --config: {error}".replace("\\n", " ")) from None

    def run(argv):
        if len(argv) > 1:
            raise SystemExit(f"error: unexpected arguments {argv[1:]}; settings are --config.section.key=value")
        logging.set_verbosity(logging.WARNING)  # orbax tells much
        try:
            with faults_in_one_line():
                main(config.value.to_dict())
        except KeyboardInterrupt:
            print("interrupted; the same command continues", file=sys.stderr, flush=True)
            os._exit(130)  # all is closed; taking jax down while it computes ends in a segmentation fault
        except jax.errors.JaxRuntimeError as error:
            if not has_lost_a_host(error):
                raise
            print(f"error: host {jax.process_index()} of {jax.process_count()} has lost another one: "
                  f"{str(error).splitlines()[0]}\nstart the same command on every host again: it continues from "
                  "what was saved last", file=sys.stderr, flush=True)
            os._exit(1)  # an orderly end would wait for the host that is gone

    app.run(run, flags_parser=parse)


@contextlib.contextmanager
def faults_in_one_line():
    """What we refuse, and what the system does, ends the program in one line; what is our fault keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if jax.process_count() > 1:  # an orderly end would wait for hosts that do not know of it
            print(f"error: host {jax.process_index()}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, OSError) or Path(__file__).parent in Path(frames[-1].filename).parents:
            raise SystemExit(f"error: {error}") from None
        raise


def has_lost_a_host(error: BaseException | None) -> bool:
    """Whether an error is what jax says where another host is gone."""
    return (jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError)
            and any(sign in str(error) for sign in LOST))


def say(message: str) -> None:
    """Print one line, from the first host only."""
    if jax.process_index() == 0:
        tqdm.write(message)


def progress(items=None, *, total: int | None = None, what: str, unit: str = "it", done: int = 0):
    """A progress bar with rate and time left, a line now and then in a file; silent on the other hosts."""
    look = {"mininterval": 1.0} if sys.stderr.isatty() else {"mininterval": 20.0, "bar_format": PLAIN}
    return tqdm(items, total=total, desc=what, unit=unit, initial=done, dynamic_ncols=True, leave=False,
                disable=jax.process_index() != 0, **look)


def check_set(config: dict) -> None:
    """Raise for the settings that a config file leaves open (""), all of them at once."""
    left_open = [f"--config.{key}=" for key, value in _flat(config).items() if value == ""]
    if left_open:
        raise ValueError(f"settings without a value: {' '.join(left_open)}")


def claim(folder: str | Path, config: dict, *, free: Sequence[str] = (), scratch: Sequence[str] = ()) -> Path:
    """Make the run folder, or take it up again if it was made with the same config.

    `free` names the settings and sections that change results by rounding at most, and so may differ; `scratch` what
    may lie in the folder of a run that has not begun.

    Raises:
      ValueError: the folder holds a run of another config; names every key that differs.
    """
    folder, config = Path(folder), json.loads(json.dumps(config, default=str))
    path = folder / "config.json"
    if path.is_file() and {*os.listdir(folder)} - {path.name, *scratch}:  # what failed at once may be corrected
        was, now = _flat(json.loads(path.read_text())), _flat(config)
        differing = {key: f"{key}: this run {now.get(key)!r}, in the folder {was.get(key)!r}"
                     for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)}
        binding = [line for key, line in differing.items()
                   if not any(f"{key}.".startswith(f"{name}.") for name in free)]
        if binding:
            raise ValueError(f"{folder} holds a run with another config; give another folder or delete it:\n  "
                             + "\n  ".join(binding))
        if differing:
            say(f"{path} keeps the first start's settings; results differ by rounding at most: "
                f"{'; '.join(differing.values())}")
    elif jax.process_index() == 0:
        write_json(path, config)
    return folder


def write_json(path: Path, value) -> None:
    """Write JSON whole or not at all."""
    replace(path, json.dumps(value, indent=2, default=str) + "\n")


def replace(path: Path, content: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(content)
    os.replace(part, path)


def once(book: Path, name: str, work: Callable[[], dict]) -> None:
    """Do a stage unless the book says that it was done; write down what came in, went out and was dropped."""
    done = json.loads(book.read_text()) if book.is_file() else {}
    if name in done:
        say(f"{name}: was done before")
        return
    began = time.perf_counter()
    did = work() | {"seconds": round(time.perf_counter() - began, 1)}
    if jax.process_index() == 0:
        write_json(book, done | {name: did})
    say(f"{name}: " + ", ".join(f"{key} {value}" for key, value in did.items()))


class Termination:
    """`with Termination() as ended`: SIGTERM ends a loop behind a step that all hosts agree on, not at once.

    On several hosts the notice reaches jax's coordinator, whichever host got it. Before this, where there is nothing
    to save, SIGTERM ends a process as it usually does: jax itself would take it from the start on (`mesh.start_hosts`).
    """

    def __enter__(self):
        self.came, self.is_alone = False, jax.process_count() == 1
        if not self.is_alone:
            from jax._src import distributed  # there is no public name; a command that trains nothing needs none

            jax.config.update("jax_enable_preemption_service", True)
            if distributed.global_state.preemption_sync_manager is None:
                distributed.global_state.initialize_preemption_sync_manager()
        elif threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, getattr(self, "before", signal.SIG_DFL))

    def _note(self, *_) -> None:
        self.came = True

    def at(self, step: int) -> bool:
        """Whether this step is the last; to be asked once at every step, on every host."""
        return self.came if self.is_alone else multihost_utils.reached_preemption_sync_point(step)


class Metrics:
    """metrics.jsonl and TensorBoard events of one training run, written by the first host.

    A resumed run drops the lines of the steps that it is going to do again.
    """

    def __init__(self, folder: Path, *, first_step: int, steps: int):
        self.is_writer = jax.process_index() == 0
        self.tokens, self.start = 0.0, time.perf_counter()
        self.bar = progress(total=steps, what=folder.name, unit="step", done=first_step)
        self.path = folder / "metrics.jsonl"
        if self.is_writer:
            from tensorboardX import SummaryWriter

            lines = self.path.read_text().splitlines() if self.path.is_file() else []
            kept = [line for line in lines if _step_of(line) <= first_step]
            replace(self.path, "".join(line + "\n" for line in kept))
            self.file = self.path.open("a", buffering=1)
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
            if kept:
                self.tokens = json.loads(kept[-1])["num_tokens"]
        self.first_tokens, self.is_first = self.tokens, True

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log one step's metrics; `tokens` in values counts the real tokens of that step."""
        self.tokens += values.pop("tokens")
        rate = (self.tokens - self.first_tokens) / (time.perf_counter() - self.start)
        if self.is_first:  # the rate is that of the steps behind the first, which is compiled
            self.first_tokens, self.start, self.is_first = self.tokens, time.perf_counter(), False
        values |= {"num_tokens": self.tokens, "tokens_per_second": rate}
        shown = {"loss": values["loss"], "acc": values.get("rewards/accuracies")}
        self.bar.set_postfix_str(" ".join(f"{k} {v:.4f}" for k, v in shown.items() if v is not None)
                                 + f" {rate:,.0f} tok/s", refresh=False)
        self.bar.update(1)
        if self.is_writer:
            self.file.write(json.dumps({"step": step} | values) + "\n")
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close everything."""
        self.bar.refresh()  # the last step, however quick it was
        self.bar.close()
        if self.is_writer:
            self.file.close()
            self.board.close()


def minutes(seconds: float) -> str:
    """Say a duration, as 7 min 05 s."""
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def versions() -> dict[str, str]:
    """The versions of what the numbers of a run depend on."""
    names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "evalplus", "numpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names},
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "machine": platform.machine()}


def read_metrics(folder: str | Path) -> list[dict]:
    """Read the metrics of a run, a dict a step."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def check_finite(step: int, values: dict[str, float]) -> None:
    """Stop a run that has diverged, naming the metric and the step."""
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        raise FloatingPointError(f"step {step}: {bad}; the newest checkpoint is from before it. "
                                 "Try a lower optim.lr, more warmup, or compute.dtype=float32")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:  # the line that a kill cut short
        return math.inf


def _flat(tree, prefix: str = "") -> dict:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}
