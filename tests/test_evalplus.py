"""score/evalplus.py: EvalPlus' own prompts and verdicts, and its calibration on real benchmarks."""

import json
import time
import urllib.error
import warnings
from pathlib import Path

import pytest

from align_jax import records
from align_jax.score import evalplus

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmarks' files are not here")

BODIES = {"add": "    return a + b\n", "sub": "    return a - b\n", "div": "    return a / b\n",
          "cat": "    return str(a) + str(b)\n", "both": "    return [a, b]\n"}


def problem(name: str, number: int = 0) -> records.Problem:
    return records.Problem(
        task_id=f"Five/{number}", entry_point=name, canonical_solution=BODIES[name],
        prompt=f'\ndef {name}(a, b):\n    """Do {name}."""\n',
        base_input=[[1, 2], [3, 4]], plus_input=[[5, 6], [-7, 8]])


FIVE = [problem(name, number) for number, name in enumerate(BODIES)]
CANONICAL = {p.task_id: [p.prompt + p.canonical_solution] for p in FIVE}


def program(name: str, body: str) -> str:
    return f"def {name}(a, b):\n    {body}\n"


@pytest.fixture
def five(tmp_path) -> Path:
    records.write(tmp_path / "five.jsonl", FIVE)
    return tmp_path / "five.jsonl"


def statuses(scores: list[records.Score], run: str) -> dict[str, list[tuple[str, str]]]:
    found = {}
    for score in scores:
        if score.run == run:
            assert score.index == len(found.setdefault(score.task_id, []))
            found[score.task_id].append((score.base, score.plus))
    return found


# Prompts, stop strings and programs are those of evalplus.codegen.


class Recorder:
    """Stands where EvalPlus puts a model: keeps what it was made with and asked; has one answer."""

    def __init__(self, *, answer: str, direct: bool):
        self.answer, self.direct, self.asked = answer, direct, []

    def make_model(self, **settings):
        self.settings = settings
        return self

    def is_direct_completion(self):
        return self.direct

    def codegen(self, prompt, **_):
        self.asked.append(prompt)
        return [self.answer]


class PlainTemplate:
    """A tokenizer's chat template, reduced to what a prompt is built from."""

    chat_template = "<role>content</role>"

    def apply_chat_template(self, messages, *, tokenize):
        return "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in messages)


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_and_programs_are_those_of_evalplus_codegen(tmp_path, monkeypatch, chat):
    from evalplus import codegen
    from evalplus.provider import utility

    answer = "\treturn a + b\n"
    answer = f"def add(a, b):\n{answer}print(add(1, 2))\n" if chat else answer
    task = {"prompt": FIVE[0].prompt, "entry_point": "add"}
    recorder = Recorder(answer=answer.replace("\t", "    "), direct=not chat)
    monkeypatch.setattr(codegen, "make_model", recorder.make_model)
    monkeypatch.setattr(codegen, "get_human_eval_plus", lambda **_: {"Five/0": task})
    written = codegen.run_codegen("m", "humaneval", root=str(tmp_path), greedy=True)

    ours = evalplus.prompt(FIVE[0], chat=chat)
    if chat:
        theirs = utility.make_raw_chat_prompt(
            recorder.asked[0], recorder.settings["instruction_prefix"],
            recorder.settings["response_prefix"], PlainTemplate())
        assert PlainTemplate().apply_chat_template(ours, tokenize=False) == theirs + "</assistant>"
    else:
        assert [ours] == recorder.asked
    theirs = json.loads(Path(written).read_text())["solution"]
    assert evalplus.solution(FIVE[0], answer, chat=chat) == theirs


@pytest.mark.parametrize("benchmark, chat, last", [
    ("humaneval", False, "\nassert "), ("pocket", False, "\nassert "), ("mbpp", False, "\nassert"),
    ("humaneval", True, "\n```\n"), ("mbpp", True, "\n```\n")])
def test_stops(benchmark, chat, last):
    stops = evalplus.stops(benchmark, chat=chat)
    assert stops[-1] == last and "\nif __name__" in stops and len(set(stops)) == len(stops)
    assert evalplus.stops(benchmark, chat=chat) == stops  # EvalPlus' own list has not grown


def sample(completion: str) -> records.Sample:
    return records.Sample(id=completion[:9], task_id="Five/0", prompt="", completion=completion,
                          finish="stop")


@pytest.mark.parametrize("completion, reason", [
    ("def add(a, b):\n    return a + b\n", None),
    ("Sure! Here it is.\n\ndef add(a, b):\n    return a + b\n\nThis adds.", None),
    ("def add(a, b):\n    return a + b + len('\\d') - 2\n", None),
    ("import os\n@print\ndef add(a, b):\n    return a + b\n", "entry point removed"),
    ("import re\ndef add(a, b):\n    pass\n", "entry point removed"),
    ("I do not know.", None),
    ("def add(a, b):\n    return a + b\n" + "It is so.\n" * 300, "cut to 200 lines"),
    ("x = '\ud800'\n" * 3, "not sanitized: UnicodeEncodeError"),
    ("x = 1" + " + 1" * 2000 + "\ny = 2\n", "not sanitized: RecursionError")])
def test_losses_of_the_sanitizer_are_counted(completion, reason):
    with warnings.catch_warnings(action="error"):  # a sample's odd escape is not our warning
        programs, lost = evalplus.solutions(FIVE, [sample(completion)] * 2, chat=True)
    assert lost == ({reason: 2} if reason else {})
    assert len(programs["Five/0"]) == 2
    assert programs["Five/0"][0] == evalplus.solution(FIVE[0], completion, chat=True)
    if reason in (None, "cut to 200 lines") and "add" in completion:
        scope = {}
        with warnings.catch_warnings(action="ignore"):
            exec(programs["Five/0"][0], scope)
        assert scope["add"](1, 2) == 3


# Verdicts.


def test_verdicts_of_several_runs_are_told_apart(five, tmp_path, monkeypatch):
    """Right, right on base only, wrong, another type, too slow, never returning, dying, reading."""
    monkeypatch.setenv("A_SECRET", "x")
    mixed = {
        "Five/0": [program("add", "return a + b if a < 5 else 0"), CANONICAL["Five/0"][0]],
        "Five/1": [program("sub", "return b - a")],
        "Five/2": [program("div", "return str(a / b)"), program("div", "while True: a += b")],
        "Five/3": [program("cat", "import os; os._exit(0)"), "while True: pass\n", "1 +",
                   "x = '\ud800'\n"],
        "Five/4": [program("both", "import os; return [a, b, os.environ['A_SECRET']][:2]"),
                   program("both", "raise SystemExit"), program("both", "return [input(), b]")]}
    scores = evalplus.score({"mixed": mixed, "canonical": CANONICAL}, "five", tmp_path / "out",
                            path=five, min_time_limit=0.5)
    assert statuses(scores, "canonical") == {p.task_id: [("pass", "pass")] for p in FIVE}
    assert statuses(scores, "mixed") == {
        "Five/0": [("pass", "fail"), ("pass", "pass")],
        "Five/1": [("fail", "fail")],
        "Five/2": [("fail", "fail"), ("fail", "fail")],  # a test that is too slow is a fail
        "Five/3": [("timeout", "timeout")] * 2 + [("fail", "fail")] * 2,
        "Five/4": [("fail", "fail")] * 3}
    note = json.loads((tmp_path / "out" / "evalplus.json").read_text())
    assert note["evalplus"] == "0.3.1" and note["programs"] == 17 and note["distinct"] == 16
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "evalplus.json", "evalplus.log", "samples.jsonl", "samples_eval_results.json"}


def test_memory_is_bounded_as_asked(five, tmp_path):
    hog = {"Five/4": [program("both", "import mmap; mmap.mmap(-1, 2 << 30); return [a, b]")]}
    for memory_bytes, status in ((2 << 30, "fail"), (-1, "pass")):
        scores = evalplus.score({"hog": CANONICAL | hog}, "five", tmp_path / "out", path=five,
                                memory_bytes=memory_bytes)
        assert {s.base for s in scores if s.task_id != "Five/4"} == {"pass"}
        assert [(s.base, s.plus) for s in scores if s.task_id == "Five/4"] == [(status, status)]


def test_a_stale_result_is_not_reported_again(five, tmp_path):
    wrong = {p.task_id: [program(p.entry_point, "return None")] for p in FIVE}
    for programs, status in ((wrong, "fail"), (CANONICAL, "pass")):
        scores = evalplus.score({"run": programs}, "five", tmp_path / "out", path=five)
        assert {(s.base, s.plus) for s in scores} == {(status, status)}


def test_nothing_is_fetched_and_nothing_is_cached_with_the_user(five, tmp_path, monkeypatch):
    """EvalPlus runs under a Python whose sockets raise, below a home that stays empty."""
    (tmp_path / "deaf").mkdir()
    (tmp_path / "deaf" / "sitecustomize.py").write_text(
        "import socket\n"
        "def connect(*_): raise SystemExit('no network')\n"
        "socket.socket.connect = connect\n"
        "print('deaf')\n")
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "deaf"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    scores = evalplus.score({"run": CANONICAL}, "five", tmp_path / "out", path=five,
                            wrap=["bash", "-c", 'echo wrapped; exec "$@"', "--"])
    assert {(s.base, s.plus) for s in scores} == {("pass", "pass")}
    assert (tmp_path / "out" / "evalplus.log").read_text().startswith("wrapped\ndeaf\n")
    assert not list(home.iterdir())


def test_a_hang_is_ended_with_all_its_processes(five, tmp_path):
    child = "echo I hang; while true; do echo >> beats; sleep 0.05; done & wait"
    with pytest.raises(TimeoutError, match=r"more than 3 s; the end of .*evalplus\.log:\nI hang"):
        evalplus.score({"run": CANONICAL}, "five", tmp_path, path=five, timeout=3,
                       wrap=["bash", "-c", child, "--"])
    sizes = []
    for _ in range(2):
        time.sleep(0.3)
        sizes.append((tmp_path / "beats").stat().st_size)
    assert 0 < sizes[0] == sizes[1]


def test_a_worker_killed_by_a_sample_is_an_error_and_no_hang(five, tmp_path):
    """EvalPlus by itself would wait for that worker's result for ever."""
    killer = {"Five/0": [program("add", "import posix; posix.kill(posix.getppid(), 9)")]}
    with pytest.raises(RuntimeError, match="BrokenProcessPool"):
        evalplus.score({"run": CANONICAL | killer}, "five", tmp_path / "out", path=five)


def test_a_failure_shows_the_end_of_the_log(five, tmp_path):
    records.write(five, [{k: v for k, v in vars(p).items() if k != "contract"} for p in FIVE])
    with pytest.raises(RuntimeError, match="status 1(.|\n)*contract not found in .* #Five/0"):
        evalplus.score({"run": CANONICAL}, "five", tmp_path / "out", path=five)


def test_what_does_not_fit_the_benchmark_is_named(five, tmp_path):
    short = {"Five/0": ["x"], "Five/2": ["x"], "Five/4": [], "Six/1": ["x"]}
    with pytest.raises(ValueError) as error:
        evalplus.score({"good": CANONICAL, "short": short}, "five", tmp_path / "out", path=five)
    assert "run 'short' lacks 3: Five/1, Five/3, Five/4" in str(error.value)
    assert "run 'short' has unknown 1: Six/1" in str(error.value) and "good" not in str(error.value)
    with pytest.raises(ValueError, match="no run at all"):
        evalplus.score({}, "five", tmp_path / "out", path=five)
    with pytest.raises(ValueError, match="'five' without a path.*'humaneval', 'mbpp'"):
        evalplus.problems("five")


def test_offline_without_a_file_the_two_ways_are_named(monkeypatch, tmp_path, five):
    from evalplus.data import utils

    def refuse(url, cached):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(utils, "make_cache", refuse)
    monkeypatch.delenv("MBPP_OVERRIDE_PATH", raising=False)
    with pytest.raises(ValueError, match="MBPP_OVERRIDE_PATH.*MbppPlus-v0.2.0.jsonl"):
        evalplus.problems("mbpp")
    monkeypatch.setenv("MBPP_OVERRIDE_PATH", str(five))
    assert evalplus.problems("mbpp") == FIVE


# Calibration: the canonical solutions through the real scorer (reference/benchmarks.md, section 1).


def canonical(benchmark: str, file: Path, out: Path, **limits) -> dict[str, tuple[str, str]]:
    tasks = evalplus.problems(benchmark, file)
    programs = {p.task_id: [p.prompt + p.canonical_solution] for p in tasks}
    scores = evalplus.score({"canonical": programs}, benchmark, out, path=file, **limits)
    return {score.task_id: (score.base, score.plus) for score in scores}


@pytest.mark.slow
@needs_data
def test_humaneval_calibration(tmp_path):
    """163 of 164: EvalPlus 0.3.1 cannot pass HumanEval/32 (find_zero), whose special oracle goes on
    to the next test without recording this one, while a pass needs every test recorded."""
    verdicts = canonical("humaneval", DATA / "humaneval_plus" / "HumanEvalPlus.jsonl.gz", tmp_path)
    assert len(verdicts) == 164
    failed = {task: verdict for task, verdict in verdicts.items() if verdict != ("pass", "pass")}
    assert failed == {"HumanEval/32": ("fail", "fail")}


@needs_data
@pytest.mark.slow
def test_mbpp_calibration(tmp_path):
    """378 of 378 with no bound on memory: Mbpp/255's expected outputs alone are 0.8 GB.

    392, 599 and 630 may fail on a slow or busy machine, for their time: 599 takes half of the 60 s
    that EvalPlus grants a program, on a quiet one.
    """
    verdicts = canonical("mbpp", DATA / "mbpp_plus" / "MbppPlus.jsonl.gz", tmp_path,
                         memory_bytes=-1)
    assert len(verdicts) == 378
    failed = {task for task, verdict in verdicts.items() if verdict != ("pass", "pass")}
    assert failed <= {"Mbpp/392", "Mbpp/599", "Mbpp/630"}
    assert {base for base, _ in verdicts.values()} == {"pass"}
