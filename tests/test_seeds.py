"""Seeds: every filter drops what it names and nothing like it; kills, workers and chunks change nothing."""

import ast
import contextlib
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
import rensa

from align_jax import records
from align_jax.records import Seed
from align_jax.synth import filters, near, seeds, stream, typecheck

FILTERING = {"max_lines": 20, "banned_words": ("todo", "fixme", "bug"),
             "banned_imports": ("argparse", "os", "subprocess", "sys")}
STEPS = filters.steps(**FILTERING)
SETTINGS = {"filtering": FILTERING, "benchmarks": (), "near_duplicate": 0.5}


def function(body: str = "    return x + 1", *, head: str = "def f(x):", doc: str = "Say what it is.") -> str:
    return f'{head}\n    """{doc}"""\n{body}\n'


def only(text: str | bytes) -> Seed:
    found = filters.extract("a.py", text)
    assert len(found) == 1
    return found[0]


def fate(text: str) -> str:
    """The reason to drop the one function of a file, or "kept"."""
    result = filters.sift(only(text), STEPS)
    return result if isinstance(result, str) else "kept"


# --- the steps


@pytest.mark.parametrize("code, reason", [
    (function(), "kept"),
    ("def f(x):\n    return x\n", "no docstring"),
    ("def f(x):\n    # A comment.\n    return x\n", "no docstring"),
    ("def f(x):\n    x = 1\n    '''Too late.'''\n    return x\n", "no docstring"),
    (function(doc=" ... "), "no docstring"),
    (function("    print(x)"), "no value returned"),
    (function("    return"), "no value returned"),
    (function("    return None"), "no value returned"),
    (function("    def g():\n        return x\n    g()"), "no value returned"),
    (function("    class A:\n        def g(self):\n            return x\n    A()"), "no value returned"),
    (function("    if x:\n        for i in x:\n            return i"), "kept"),
    (function("    return ()"), "kept"),
    (function("    return 1", head="def f():"), "no arguments"),
    (function("    return 1", head="def f(\n    # none\n):"), "no arguments"),
    (function("    return a", head="def f(*a):"), "kept"),
    (function("    return a", head="def f(**a):"), "kept"),
    (function("    return a", head="def f(*, a):"), "kept"),
    (function("    return a", head="def f(a, /):"), "kept"),
    (function("    return a", head="async def f(a):"), "kept"),
    (function("    x += 1\n" * 17 + "    return x"), "kept"),  # 20 lines
    (function("    x += 1\n" * 18 + "    return x"), "too long"),
])
def test_what_a_seed_is(code, reason):
    assert fate(code) == reason


@pytest.mark.parametrize("code", [
    function("    return x  # TODO: more"), function("    return x  # todo"), function("    return x  #FIXME(me)"),
    function(doc="Works around a bug."), function(doc="BUG-12."), function("    fix_bug = x\n    return fix_bug"),
    function("    fixBug = x\n    return fixBug"), function("    return x.todo"), function(head="def todo_list(x):"),
    function("    return x(bug=1)"), function("    return x", head="def f(x, *, bug=1):")])
def test_banned_words_wherever_people_write_them(code):
    assert fate(code) == "banned word"


@pytest.mark.parametrize("code", [
    function("    debug = x\n    return debug  # debugged, ladybug"), function(doc="Debugger of mastodons."),
    function("    return 'todo: fixme, a bug'"), function("    return x['bug']"), function(head="def buggy(x):")])
def test_words_that_only_contain_a_banned_one(code):
    assert fate(code) == "kept"


@pytest.mark.parametrize("line", [
    "import os", "import os.path", "import os.path as p", "from os import path", "from os.path import join",
    "import json, os", "import sys as system", "from argparse import *", "os = __import__('os')",
    "import importlib\n    m = importlib.import_module('os.path')",
    "try:\n        import subprocess\n    except E: pass"])
def test_banned_imports_under_any_spelling(line):
    assert fate(function(f"    {line}\n    return x").replace("except E", "except ImportError")) == "banned import"


@pytest.mark.parametrize("line", [
    "import oslo", "import oslo.os", "from osgeo import gdal", "from . import os", "from .os import path",
    "from system import os", "from json import dumps as os", "s = 'import os'", "import sysconfig"])
def test_imports_that_only_look_banned(line):
    assert fate(function(f"    {line}\n    return x")) == "kept"


def test_an_import_of_the_file_counts_for_who_uses_it():
    file = "import os\n" + function("    return os.getcwd() + x") + function(head="def g(x):")
    dropped, kept = (filters.sift(seed, STEPS) for seed in filters.extract("a.py", file))
    assert dropped == "banned import" and kept.code.startswith("def g")


def test_imports_come_from_the_file():
    file = '''"""A file."""
from __future__ import annotations
import xml.dom
import xml.sax as sax, xml.etree
from math import *
from . import helper
try:
    import numpy as xp
except ImportError:
    import math as xp

def f(x: "deque", y=xml.dom) -> Any:
    """Use some of them."""
    json = xp.array(x)
    return json + sqrt(2)

import json
from collections import deque

def g(x):
    """Use one that came later."""
    return json.dumps(x)

def h(x):
    """Use what is nothing elsewhere."""
    return helper(x)
'''
    f, g, h = filters.extract("a.py", file)
    assert f.code.split("\n\n\n")[0].splitlines() == [
        "from collections import deque", "import xml.dom", "import xml.etree", "import numpy as xp"]
    assert [s.source for s in (f, g, h)] == ["a.py:12", "a.py:20", "a.py:24"]
    whole = filters.sift(f, STEPS)  # Any and sqrt are everybody's
    assert whole.code.splitlines()[:2] == ["from typing import Any", "from math import sqrt"]
    assert g.code == 'import json\n\n\ndef g(x):\n    """Use one that came later."""\n    return json.dumps(x)\n'
    assert filters.sift(h, STEPS) == "undefined name"


@pytest.mark.parametrize("use, line", [
    ("math.floor(x)", "import math"), ("np.zeros(x)", "import numpy as np"),
    ("defaultdict(x)", "from collections import defaultdict"), ("string.ascii_letters", "import string"),
    ("string.ascii_letters + string.strip()", None), ("string + x", None), ("code.strip()", None),
    ("token", None), ("helper(x)", None), ("len(x)", "")])
def test_only_what_everybody_would_guess_is_guessed(use, line):
    code = function(f"    return {use}")
    found = filters.sift(only(code), STEPS)
    if line is None:
        assert found == "undefined name"
    else:
        assert found.code == (f"{line}\n\n\n{code}" if line else code)


def test_the_conventions_are_true():
    for name, line in filters.CONVENTIONS.items():
        if line.split()[1].split(".")[0] in sys.stdlib_module_names:
            exec(line, space := {})
            assert name in space
    assert set(filters.MODULES) <= sys.stdlib_module_names


# --- extraction


def test_where_a_function_begins_and_ends():
    file = ("x = 1\f\ndef not_it(): pass\r\n\f@cache\r@wraps(x)\r\ndef f(a):\r\n    'D\u2028oc\f.'\n    return (\n"
            "  a)  # end\n# after\nif x:\n    def inner(a): pass\nclass A:\n    def m(self): pass\n")
    _, seed = filters.extract("a.py", file)
    assert seed.source == "a.py:3"
    assert seed.code == "\f@cache\n@wraps(x)\ndef f(a):\n    'D\u2028oc\f.'\n    return (\n  a)  # end\n"


@pytest.mark.parametrize("text", [
    "def f(:", "a\0b", "(" * 5000, b"# coding: nonsense\n", b"\xff\xfe", "print 'x'", "\ud800"])
def test_what_is_not_python_is_counted(text):
    assert filters.extract("a.py", text) == "not Python"


def test_files_are_read_as_their_first_line_says():
    seed = only("# coding: latin-1\ndef f(x):\n    'Caf\xe9.'\n    return x\n".encode("latin-1"))
    assert "Caf\xe9" in seed.code


@pytest.mark.parametrize("depth", [100, 250, 500, 900, 3000, 100_000])
@pytest.mark.parametrize("deep", ["+".join, lambda xs: "".join(f"-{x[:0]}" for x in xs) + "x",
                                  lambda xs: "x" + "".join("[0]" for _ in xs)], ids=["sum", "sign", "index"])
def test_deep_code_does_not_end_the_run(deep, depth):
    code = function(f"    return {deep(['x'] * depth)}")
    found = filters.extract("a.py", code)
    fates = {found} if isinstance(found, str) else {fate(code)}
    assert fates <= {"not Python", "kept", "nested too deep"} and (depth > 100 or fates == {"kept"})


def test_the_id_is_the_contents_and_not_the_layouts():
    a, b = only(function()), only("\n\nx = 1\n" + function().replace("x + 1", "x  +  1"))
    assert a.id == b.id and a.source != b.source and a.id != only(function("    return x - 1")).id


@pytest.mark.slow
def test_every_seed_of_the_standard_library_stands_alone():
    """What is kept compiles, and each name in it is bound: the interpreter's own symbol tables say so."""
    import builtins
    import symtable

    def free(table):
        own = {s.get_name() for s in table.get_symbols() if s.is_global() or not s.is_local() and not s.is_free()}
        return own.union(*map(free, table.get_children()))

    found = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for seed in filters.extract(file.name, file.read_bytes()):
            seed = filters.sift(seed, STEPS)
            if isinstance(seed, Seed):
                found += 1
                table = symtable.symtable(seed.code, "seed", "exec")
                bound = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
                assert free(table) <= bound | set(dir(builtins)) | {"__file__"}, seed.source
    assert found > 50


# --- near-duplicates


def test_minhash_agrees_with_the_jaccard_index():
    rng, errors = random.Random(0), []
    for _ in range(300):
        words = [f"w{rng.randrange(10**6)}" for _ in range(120)]
        cut = rng.randrange(5, 115)
        changed = words[:cut] + [f"v{rng.randrange(10**6)}" for _ in range(120 - cut)]
        one, other = " ".join(words), " ".join(changed)
        truth = near.jaccard(near.shingles(one), near.shingles(other))
        errors.append(near.digest(one).jaccard(near.digest(other)) - truth)
    assert abs(sum(errors) / 300) < 0.01 and max(map(abs, errors)) < 0.2


def test_what_was_seen_is_what_rensa_says():
    rng = random.Random(0)
    texts = []
    for n in range(800):
        text = [f"w{rng.randrange(10**6)}" for _ in range(rng.randrange(1, 120))]
        if n % 3:  # a text of before, with some words changed
            text = rng.choice(texts).split()
            start = rng.randrange(len(text))
            text[start:start + rng.randrange(40)] = [f"v{rng.randrange(10**6)}" for _ in range(rng.randrange(30))]
        texts.append(" ".join(text))
    ours = near.seen(0.5)
    theirs = rensa.RMinHashDeduplicator(0.5, near.NUM_PERM, True, near.NUM_BANDS, 0)
    kept = 0
    for n, digest in enumerate(map(near.digest, texts)):
        assert sorted(ours.get_duplicates(digest)) == sorted(theirs.get_duplicates(digest))
        new = ours.add(str(n), digest)
        assert new == theirs.add(str(n), digest)
        kept += new
    assert 300 < kept < 700


def choose(codes: list[str], chunk: int, judge=None) -> tuple[list[str], Counter]:
    kept, found, dropped = near.seen(0.5), [], Counter()
    made = [(filters.named(code, "x"), near.digest(code)) for code in codes]
    for part in stream.chunks(made, chunk):
        fresh, lost = seeds.choose(part, kept, judge)
        found, dropped = found + [seed.code for seed in fresh], dropped + lost
    return found, dropped


def words(start: int, count: int = 60) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_one_of_a_group_is_kept_and_it_is_the_first_that_the_judge_likes(chunk):
    close, far = words(5), words(40)  # Jaccard 51 / 61 and 16 / 96 with the first
    codes = [words(0), close, words(0).replace(" ", "\n"), far, words(1000)]
    found, dropped = choose(codes, chunk)
    assert found == [words(0), far, words(1000)]
    assert dropped == {"near-duplicate": 1, "exact duplicate": 1}
    found, dropped = choose(codes, chunk, lambda programs: [program not in (words(0), far) for program in programs])
    assert found == [close, words(1000)] and sum(dropped.values()) == 3


def test_a_judge_that_loses_an_answer():
    with pytest.raises(ValueError, match="judge: got 1 answers, expected one for each of 2 programs"):
        choose([words(0), words(1000)], 2, lambda programs: [True])


# --- the stage


@pytest.fixture
def folder(tmp_path) -> Path:
    """Python files: some functions that are kept, some of each that is not, copies, a folder to leave out."""
    rng = random.Random(0)
    names = [f"{a}{b}" for a in ("lo", "ma", "ti", "ru") for b in ("ka", "ne", "so", "vi", "du")]
    for n in range(40):
        made = ["import os, math\n"]
        for k in range(4):
            doc = " ".join(rng.choices(names, k=30))
            some, others = (rng.choices(names, k=12) for _ in range(2))
            body = f"    {' + '.join(some)}\n    return math.sqrt({' * '.join(others)})"
            made.append(function(body, head=f"def f{n}_{k}({', '.join(names)}):", doc=doc))
        made.append(made[1 + n % 4].replace(f"f{n}_", "copy_"))
        made += ["def g(x):\n    return x\n", function("    return os.getcwd()"), function(doc="A bug.")]
        path = tmp_path / "source" / f"p{n % 7}" / f"m{n:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(made))
    (tmp_path / "source" / "tests").mkdir()
    (tmp_path / "source" / "tests" / "x.py").write_text(function())
    (tmp_path / "source" / "broken.py").write_text("def f(:")
    (tmp_path / "source" / "gone.py").symlink_to("nowhere.py")
    return tmp_path / "source"


def source(path: Path, **more) -> dict:
    return {"path": str(path), "column": "content", "split": "train", "data_dir": None, "exclude": ("tests",)} | more


def balanced(counts: dict[str, Counter]) -> bool:
    return counts["in"]["functions"] == counts["out"]["seeds"] + counts["dropped"].total()


def test_the_stage_counts_everything(folder, tmp_path):
    run = tmp_path / "run"
    counts = seeds.gather(run, source(folder), **SETTINGS)
    assert counts["in"] == {"documents": 42, "functions": 320, "checked": 200}
    assert counts["unread"] == {"not Python": 1, "no text": 1}
    assert counts["dropped"] == {
        "no docstring": 40, "banned import": 40, "banned word": 40, "near-duplicate": 40}
    found = records.read(run / "seeds.jsonl", Seed)
    assert balanced(counts) and len(found) == counts["out"]["seeds"] == 160
    assert [*stream.rows(run / "unread.jsonl")] == [{"document": "broken.py", "why": "not Python"},
                                                    {"document": "gone.py", "why": "no text"}]
    assert len({seed.id for seed in found}) == 160 and all(ast.parse(seed.code) for seed in found)
    for seed in found[::17]:
        file, line = seed.source.split(":")
        assert (folder / file).read_text().split("\n")[int(line) - 1] in seed.code.splitlines()
    before = (run / "seeds.jsonl").stat()
    assert seeds.gather(run, source(folder), **SETTINGS) == counts and (run / "seeds.jsonl").stat() == before


def test_workers_and_chunks_change_nothing(folder, tmp_path):
    written = set()
    for workers, chunk in ((1, 64), (1, 1), (2, 3)):
        run = tmp_path / f"{workers}-{chunk}"
        counts = seeds.gather(run, source(folder), **SETTINGS, workers=workers, chunk=chunk)
        written.add((run / "seeds.jsonl").read_bytes())
        assert balanced(counts)
    assert len(written) == 1


@pytest.mark.parametrize("torn", [0, 1, 300])
@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_a_killed_run_ends_in_the_same_file(folder, tmp_path, monkeypatch, killed_after, torn):
    def judge(programs):
        return [len(program) % 5 > 0 for program in programs]

    whole, run = tmp_path / "whole", tmp_path / "run"
    want = seeds.gather(whole, source(folder), **SETTINGS, chunk=6, judge=judge)
    commit, done = stream.Journal.commit, []

    def dying(self, *rows, **counts):
        commit(self, *rows, **counts)
        done.append(counts["done"])
        if len(done) > killed_after:
            with open(run / "seeds.partial.jsonl", "ab") as file:
                file.write(b'{"id": "half a line of what was not committed' * (torn // 40))
            raise KeyboardInterrupt

    monkeypatch.setattr(stream.Journal, "commit", dying)
    with pytest.raises(KeyboardInterrupt):
        seeds.gather(run, source(folder), **SETTINGS, chunk=6, judge=judge)
    monkeypatch.setattr(stream.Journal, "commit", commit)
    assert not (run / "seeds.jsonl").exists()
    assert seeds.gather(run, source(folder), **SETTINGS, chunk=6, judge=judge) == want
    assert (run / "seeds.jsonl").read_bytes() == (whole / "seeds.jsonl").read_bytes()
    assert (run / "contamination.jsonl").read_bytes() == (whole / "contamination.jsonl").read_bytes()


# --- the sources

ROWS = [{"content": function(f"    return x * {n}", doc=f"{words(100 * n, 30)}"), "n": n} for n in range(9)]


def test_jsonl_parquet_and_datasets_give_the_same(tmp_path):
    import datasets

    records.write(tmp_path / "a.jsonl", ROWS)
    records.write(tmp_path / "a.jsonl.gz", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "hub").mkdir()
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        path = tmp_path / name
        found = list(seeds.documents(source(path)))
        assert [text for _, text in found] == [row["content"] for row in ROWS]
        assert found[4][0] == f"{path}:5" and list(seeds.documents(source(path), skip=7)) == found[7:]
        counts = seeds.gather(tmp_path / f"run {name}", source(path), **SETTINGS)
        assert counts["out"] == {"seeds": 9}


def test_a_row_without_text_is_counted_and_a_wrong_column_told(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b"".join(records.line(row).encode() for row in ROWS[:3])
    path.write_bytes(good + b'{"content": 3}\n{"conte\n[1]\n{}\n\xff\n')
    counts = seeds.gather(tmp_path / "run", source(path), **SETTINGS)
    assert counts["in"]["documents"] == 8 and counts["unread"] == {"no text": 5} and counts["out"]["seeds"] == 3
    with pytest.raises(ValueError, match=r"source.column: got 'text', the first row of .* has \['content', 'n'\]"):
        list(seeds.documents(source(path, column="text")))


def test_a_source_that_changed_is_another_run(folder, tmp_path):
    from configs import seeds as settings

    c = settings.get_config().to_dict() | {"run": str(tmp_path / "run"), "source": source(folder), "benchmarks": ()}
    seeds.claim(c)
    (tmp_path / "run" / "seeds.partial.jsonl").touch()
    seeds.claim(c)
    (folder / "new.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="holds a run with another config.*\n.*documents"):
        seeds.claim(c)


# --- the command


def test_the_command(folder, tmp_path):
    command = [sys.executable, "-m", "align_jax.synth.seeds", "--config=configs/seeds.py",
               f"--config.run={tmp_path / 'run'}", f"--config.source.path={folder}"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert "160 seeds of 320 functions in 42 documents; dropped " in last
    assert "unread 1 not Python, 1 no text, see unread.jsonl" in last
    told = json.loads((tmp_path / "run" / "contamination.json").read_text())
    assert told["records checked"] == 200 and told["problems by benchmark"]["PocketEval"] == 400


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_no_process_and_is_taken_up(folder, tmp_path):
    root = Path(__file__).parents[1]

    def start(run: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "align_jax.synth.seeds", "--config=configs/seeds.py", f"--config.run={run}",
             f"--config.source.path={folder}", "--config.chunk=1"], cwd=root, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(root)}, start_new_session=True)

    killed = start(tmp_path / "killed")
    while not (tmp_path / "killed" / "progress.json").is_file():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    until = time.monotonic() + 60
    while _alive(killed.pid):
        assert time.monotonic() < until, "workers outlive a parent that was killed"
        time.sleep(0.1)
    assert not (tmp_path / "killed" / "seeds.jsonl").exists()
    assert start(tmp_path / "killed").wait() == start(tmp_path / "whole").wait() == 0
    assert (tmp_path / "killed" / "seeds.jsonl").read_bytes() == (tmp_path / "whole" / "seeds.jsonl").read_bytes()


def _alive(session: int) -> list[str]:
    """The processes of a session, zombies aside."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            stats.append(path.read_text().rpartition(")")[2].split())
    return [stat for stat in stats if int(stat[3]) == session and stat[0] != "Z"]


# --- types


def test_pyright_that_is_not_there_is_told_at_the_start(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'align_jax\[types\]'"):
        seeds.gather(tmp_path, source(tmp_path), **SETTINGS, pyright=True)


def test_a_batch_that_fails_is_halved_and_nothing_is_lost(monkeypatch):
    made = [filters.named(function(f"    return {n}"), str(n)) for n in range(30)]

    def errors(batch, seconds):
        sources = [int(seed.source) for seed in batch]
        return None if 11 in sources else {i for i, n in enumerate(sources) if n % 7 == 0}

    monkeypatch.setattr(typecheck, "_errors", errors)
    assert typecheck.well_typed(made) == [
        "type check" if n == 11 else "type error" if n % 7 == 0 else seed for n, seed in enumerate(made)]


def test_pyright_finds_what_is_wrong():
    pytest.importorskip("pyright")
    good, bad = (function("    return x + 1", head=f"def f(x: int) -> {kind}:") for kind in ("int", "str"))
    found = typecheck.well_typed([filters.named(code, "x") for code in (good, bad, good)])
    assert [getattr(seed, "code", seed) for seed in found] == [good, "type error", good]
    assert typecheck.well_typed([filters.named(good, "x")], seconds=0.01) == ["type check"]


# --- decontamination within


def test_a_seed_of_a_benchmark_is_dropped_and_reported(folder, tmp_path):
    code = filters.extract("x", (folder / "p0" / "m00.py").read_text())[0].code
    signature, body = code.split('"""\n')
    problem = {"task_id": "B/0", "prompt": f'{signature}"""\n', "canonical_solution": body}
    records.write(tmp_path / "bench.jsonl", [problem])
    run = tmp_path / "run"
    counts = seeds.gather(run, source(folder), **SETTINGS | {"benchmarks": (str(tmp_path / "bench.jsonl"),)})
    assert counts["dropped"]["in a benchmark"] == 2 and balanced(counts)  # it has a copy
    found = list(stream.rows(run / "contamination.jsonl"))
    assert [(row["problem"], row["measure"], row["value"]) for row in found] == [("bench/B/0", "exact", 1.0)] * 2
    assert not {row["record"] for row in found} & {seed.id for seed in records.read(run / "seeds.jsonl", Seed)}
