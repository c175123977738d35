"""Adversarial programs against every sandbox backend that works on this machine."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest

from align_jax import sandbox

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
LIMITS = sandbox.Limits(wall_s=30.0, cpu_s=30.0)


def works(name):
    try:
        return sandbox.backend(name) == name
    except RuntimeError:
        return False


ISOLATING = [name for name in ("bwrap", "userns") if works(name)]


@pytest.fixture(params=[*ISOLATING, "none"])
def backend(request):
    return request.param


@pytest.fixture(params=ISOLATING)
def isolating(request):
    return request.param


def run(backend, program, *tests, **limits):
    values = {"wall_s": 30.0, "cpu_s": 30.0, **limits}
    return sandbox.run(
        textwrap.dedent(program), tests, limits=sandbox.Limits(**values), backend=backend
    )


def children(pid=None):
    """Process ids of all that descends from a process, by default this one; zombies too."""
    parents = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, seen = {pid or os.getpid()}, set()
    while found:
        seen |= found
        found = {child for child, parent in parents.items() if parent in found} - seen
    return seen - {pid or os.getpid()}


def eventually(condition, seconds=5.0):
    """Wait for a condition: the kernel ends a process namespace just after its first process."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def running(marker):
    """Process ids anywhere on this machine whose command line holds `marker`."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if marker.encode() in path.read_bytes() else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def test_a_backend_that_isolates_works_here_wherever_bubblewrap_is_installed():
    assert ISOLATING or not shutil.which("bwrap"), "bwrap is installed and does not work"
    if ISOLATING:
        assert sandbox.backend() == ISOLATING[0]


def test_passes(backend):
    verdict = run(backend, "def f(x):\n    return x + 1", "assert f(1) == 2", "assert f(2) == 3")
    assert (verdict.status, verdict.detail, verdict.reward) == ("passed", "", 1.0)
    assert 0 < verdict.seconds < 30


def test_without_tests_a_program_that_ends_passes(backend):
    verdict = run(backend, "import sys; print('out'); print('err', file=sys.stderr)")
    assert (verdict.status, verdict.reward) == ("passed", 1.0)
    assert (verdict.stdout, verdict.stderr) == ("out\n", "err\n")


def test_all_tests_run_and_the_reward_is_their_share(backend):
    tests = ["assert f(1) == 1", "assert f(1) == 2", "f(1) + ''", "assert f(2) == 2"]
    verdict = run(backend, "def f(x): return x", *tests)
    assert (verdict.status, verdict.reward) == ("assertion", 0.5)
    assert verdict.detail.startswith("test 2: AssertionError")


@pytest.mark.parametrize(
    "program, status",
    [
        ("assert 1 == 2, 'no'", "assertion"),
        ("1 / 0", "exception"),
        ("raise KeyboardInterrupt", "exception"),
        ("input()", "exception"),
        ("def f(:", "syntax"),
        ("x = '\0'", "syntax"),
        ("x = '\ud800'", "syntax"),
        ("eval('1 +')", "exception"),
        ("import no_such_package_anywhere", "missing_package"),
        ("import sys; sys.exit(0)", "exited"),
        ("raise SystemExit", "exited"),
        ("import os; os._exit(0)", "exited"),
        ("import os; os.abort()", "killed"),
        ("", "exception"),
        ("  \n# only a comment\n", "exception"),
    ],
)
def test_class_of_a_failing_program(backend, program, status):
    verdict = run(backend, program, "assert True")
    assert (verdict.status, verdict.reward) == (status, 0.0), verdict
    assert verdict.detail


def test_syntax_error_raised_while_running_is_no_syntax_failure(backend):
    assert run(backend, "eval('1 +')").detail.startswith("SyntaxError")


def test_empty_program_and_empty_test_say_so(backend):
    assert run(backend, " ").detail == "empty program"
    assert run(backend, "x = 1", "# nothing").detail == "test 1: empty test"


def test_busy_loop_meets_the_cpu_limit(backend):
    verdict = run(backend, "while True: pass", cpu_s=1.0)
    assert (verdict.status, verdict.detail) == ("timeout", "CPU time")


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(100)"])
def test_wall_clock(backend, program):
    verdict = run(backend, program, wall_s=1.5)
    assert (verdict.status, verdict.detail) == ("timeout", "wall clock")
    assert verdict.seconds < 5


def test_what_passed_before_a_timeout_counts(backend):
    tests = ["assert f(0)", "f(100)", "assert f(0)"]
    program = "import time\ndef f(x):\n    time.sleep(x)\n    return True"
    verdict = run(backend, program, *tests, wall_s=2.0)
    assert (verdict.status, verdict.reward) == ("timeout", 1 / 3)
    assert verdict.detail == "test 2: wall clock"


@pytest.mark.parametrize(
    "program",
    [
        "x = bytearray(10**10)",
        "x = []\nwhile True: x.append(bytes(10**6))",
        "x = []\nwhile True: x.append(object())",
        "x = 'a'\nwhile True: x += x",
    ],
)
def test_memory_bomb(backend, program):
    verdict = run(backend, program, memory_mb=200)
    assert (verdict.status, verdict.reward) == ("memory", 0.0)


@pytest.mark.parametrize("number", [1, 2])
def test_output_flood(backend, number):
    program = f"import os\nwhile True: os.write({number}, b'x' * 65536)"
    verdict = run(backend, program, output_kb=64)
    assert (verdict.status, verdict.reward) == ("output", 0.0)
    assert len(verdict.stdout) + len(verdict.stderr) == 64 * 1024


def test_output_just_within_and_just_beyond_its_bound(backend):
    program = "import os; os.write(1, b'x' * {}); os.write(2, b'x' * 1024)"
    assert run(backend, program.format(3 * 1024), output_kb=4).status == "passed"
    assert run(backend, program.format(3 * 1024 + 1), output_kb=4).status == "output"


@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit(0)", "quit()"])
def test_leaving_from_inside_a_test_is_no_pass(backend, leave):
    program = f"import os, sys\ndef quit(): raise SystemExit\ndef f(): {leave}"
    verdict = run(backend, program, "assert f() == 1")
    assert (verdict.status, verdict.reward) == ("exited", 0.0)


def test_printed_and_piped_success_is_no_pass(backend):
    program = """
    import os
    text = "\\nstart \\npassed \\npassed \\nend \\n"
    print(text)
    for fd in range(1, 64):
        for token in ("", "0" * 32 + " ", "token "):
            lines = "".join(f"\\n{token}{word} \\n" for word in text.split())
            try:
                os.write(fd, lines.encode())
            except OSError:
                pass
    os._exit(0)
    """
    verdict = run(backend, program, "assert False")
    assert (verdict.status, verdict.reward) == ("exited", 0.0)


def test_garbage_on_the_report_pipe_changes_no_outcome(backend):
    program = """
    import os
    for fd in range(3, 64):
        try:
            os.write(fd, b"garbage without an end")
        except OSError:
            pass
    """
    verdict = run(backend, program, "assert True", "assert False")
    assert (verdict.status, verdict.reward) == ("assertion", 0.5)


def test_closing_every_descriptor_is_no_pass(backend):
    verdict = run(backend, "import os; os.closerange(0, 256)", "assert False")
    assert (verdict.status, verdict.reward) == ("exited", 0.0)


@pytest.mark.parametrize(
    "name", ["exec", "compile", "isinstance", "type", "str", "AssertionError", "BaseException"]
)
def test_replacing_builtins_is_no_pass(backend, name):
    program = f"import builtins\nbuiltins.{name} = lambda *a, **k: None"
    verdict = run(backend, program, "assert 1 == 2")
    assert verdict.status != "passed" and verdict.reward == 0.0


def test_replacing_os_functions_and_atexit_is_no_pass(backend):
    program = """
    import atexit, os
    atexit.register(print, "passed")
    os._exit = os.write = lambda *a: None
    """
    assert run(backend, program, "assert 1 == 2").status == "assertion"


def test_a_forked_child_that_runs_on_says_nothing(backend):
    program = "import os\nif os.fork():\n    os.wait()\nx = os.getpid()"
    verdict = run(backend, program, "assert x == __import__('os').getpid()", "if os.fork():\n    os.wait()\nassert x")
    assert (verdict.status, verdict.reward) == ("passed", 1.0), verdict


def test_an_exception_that_cannot_be_printed(backend):
    program = """
    class Evil(Exception):
        def __str__(self):
            raise SystemExit
    raise Evil
    """
    assert run(backend, program).detail == "unprintable"


def test_input_is_empty_and_the_jails_modules_are_gone(backend):
    program = """
    import os, sys, __main__
    left = sys.stdin.buffer.read()
    names = [name for name in sys.modules if name.startswith("align_jax")]
    assert (left, names, sys.argv) == (b"", [], ["candidate"])
    """
    assert run(backend, program).status == "passed"


def test_future_import_may_come_first_and_the_main_guard_does_not_run(backend):
    program = """
    from __future__ import annotations
    import dataclasses
    @dataclasses.dataclass
    class Point:
        x: NotDefinedAnywhere
    if __name__ == "__main__":
        raise ValueError
    """
    verdict = run(backend, program, "assert Point(1).x == 1", "assert __name__ == 'candidate'")
    assert verdict.status == "passed"


def test_installed_packages_can_be_imported(backend):
    program = "import numpy as np\nx = np.ones((99, 99)) @ np.ones((99, 99))"
    verdict = run(backend, program, "assert x.sum() == 99**3", memory_mb=1024)
    assert verdict.status == "passed"


def test_environment_holds_nothing_of_the_caller(backend, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = "import os, pathlib\nnames = set(os.environ)"
    allowed = {"HOME", "TMPDIR", "PWD", "LC_CTYPE", "PYTHONHASHSEED", "OMP_NUM_THREADS"}
    assert run(backend, program, f"assert names <= {allowed}, names").status == "passed"


def test_environment_of_no_visible_process_shows_the_caller(isolating, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = """
    import pathlib
    seen = b""
    for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
        try:
            seen += path.read_bytes()
        except OSError:
            pass
    """
    assert run(isolating, program, "assert b'hunter2' not in seen").status == "passed"


def test_network_is_refused(isolating):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)"
        verdict = run(isolating, program)
        assert verdict.status == "exception" and "refused" in verdict.detail
    outside = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)"
    assert "unreachable" in run(isolating, outside).detail


def test_abstract_unix_socket_of_the_host_is_refused(isolating):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0align_jax_test_sandbox")
        server.listen()
        program = (
            "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0align_jax_test_sandbox')"
        )
        assert "refused" in run(isolating, program).detail


def test_home_checkout_and_temporary_files_are_out_of_sight(isolating, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    own = [pathlib.Path.home(), REPOSITORY, pathlib.Path(__file__), secret, pathlib.Path("/root")]
    program = f"""
    import os
    seen = []
    for path in {[str(path) for path in own]}:
        try:
            seen += [path] if os.path.isfile(path) else os.listdir(path)
        except OSError:
            pass
    """
    prefix = os.path.realpath(sys.base_prefix)  # of which the way there may be seen
    way = {part for path in own for part in pathlib.Path(prefix).relative_to("/").parts}
    assert run(isolating, program, f"assert set(seen) <= {way}, seen").status == "passed"


def test_root_holds_only_what_is_listed(isolating):
    allowed = {"bin", "dev", "etc", "lib", "lib32", "lib64", "packages", "proc", "tmp", "usr"}
    allowed |= {pathlib.Path(os.path.realpath(sys.base_prefix)).parts[1]}
    program = f"import os\nassert set(os.listdir('/')) <= {allowed}, os.listdir('/')"
    assert run(isolating, program).status == "passed"


def test_writes_outside_scratch_fail(isolating):
    program = """
    import os, sys
    wrote = []
    places = ["/", "/usr", "/usr/lib", "/dev", "/etc", "/proc", "/packages", sys.base_prefix]
    files = [os.path.join(place, "intruder") for place in places]
    for path in [*files, "/proc/sys/kernel/core_pattern", "/proc/1/oom_score_adj", os.__file__]:
        try:
            open(path, "a").close()
            wrote.append(path)
        except OSError:
            pass
    """
    assert run(isolating, program, "assert wrote == [], wrote").status == "passed"


def test_scratch_is_empty_writable_and_gone_afterwards(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
    import os, tempfile
    before = os.listdir(".")
    open("file", "w").write("x" * 1000)
    with tempfile.NamedTemporaryFile() as file:
        assert os.path.dirname(file.name) == os.getcwd() == os.environ["HOME"]
    """
    for _ in range(2):
        assert run(backend, program, "assert before == []").status == "passed"
    assert not list(tmp_path.glob("align_jax_sandbox_*"))


def test_scratch_is_bounded(isolating):
    program = """
    import errno
    try:
        for number in range(100):
            open(f"file{number}", "wb").write(bytes(2**20))
    except OSError as error:
        assert error.errno == errno.ENOSPC
    """
    assert run(isolating, program, "assert 1 <= number <= 4", scratch_mb=4).status == "passed"


def test_one_file_is_bounded(backend):
    verdict = run(backend, "open('file', 'wb').write(bytes(9 * 2**20))", scratch_mb=8)
    assert verdict.status == "exception" and "OSError" in verdict.detail


def test_no_capability_is_left_nor_to_be_gained(isolating):
    program = """
    import subprocess
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout
    fields = dict(line.split(":\\t") for line in status.splitlines() if ":\\t" in line)
    """
    tests = ["assert int(fields['CapEff'], 16) == int(fields['CapPrm'], 16) == 0, status"]
    assert run(isolating, program, *tests, "assert fields['NoNewPrivs'] == '1'").reward == 1.0


def test_mounts_cannot_be_changed(isolating):
    program = """
    import subprocess
    def fails(*command):
        return subprocess.run(command, capture_output=True).returncode != 0
    """
    tests = [
        "assert fails('mount', '-o', 'remount,rw', '/')",
        "assert fails('umount', '/proc')",
        "assert fails('mount', '-t', 'tmpfs', 'tmpfs', '/usr')",
    ]
    assert run(isolating, program, *tests).reward == 1.0


def test_host_processes_are_not_visible_and_process_one_survives(isolating):
    program = """
    import os, signal
    processes = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    try:
        os.kill(1, signal.SIGKILL)
    except PermissionError:
        pass
    """
    assert run(isolating, program, "assert max(processes) < 10, processes").status == "passed"


def test_fork_bomb_is_contained(isolating):
    program = """
    import os
    count = 0
    def bomb():
        global count
        while True:
            try:
                if os.fork() == 0:
                    import time
                    time.sleep(100)
                count += 1
            except OSError:
                return
    bomb()
    """
    before = children()
    verdict = run(isolating, program, "assert 1 <= count <= 16, count", processes=16)
    assert verdict.status == "passed", verdict
    assert eventually(lambda: children() == before)


def test_full_fork_bomb_ends_with_the_clock(isolating):
    before = children()  # such as multiprocessing's resource tracker, which other tests have started
    verdict = run(
        isolating,
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        wall_s=1.5,
    )
    assert verdict.status == "timeout" and verdict.seconds < 10
    assert eventually(lambda: children() <= before)


def test_thread_bomb_is_contained(isolating):
    program = (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[99]).start()"
    )
    verdict = run(isolating, program, processes=8)
    assert verdict.status == "exception" and "start new thread" in verdict.detail


def test_process_bounds_of_two_runs_do_not_add_up(isolating):
    program = """
    import subprocess, time
    started = [subprocess.Popen(["sleep", "100"]) for _ in range(5)]
    time.sleep(1)
    """
    limits = sandbox.Limits(wall_s=30, processes=8)
    jobs = [(textwrap.dedent(program), [])] * 4
    verdicts = sandbox.run_many(jobs, limits=limits, backend=isolating, workers=4)
    assert [verdict.status for verdict in verdicts] == ["passed"] * 4


def test_daemons_do_not_survive(isolating):
    seconds = f"98765.{os.getpid()}"
    program = f"""
    import os, time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 64)
            os.execv("/bin/sleep", ["sleep", "{seconds}"])
        os._exit(0)
    while not any(b"{seconds}" in open(f"/proc/{{pid}}/cmdline", "rb").read() for pid in range(2, 9)
                  if os.path.exists(f"/proc/{{pid}}/cmdline") and pid != os.getpid()):
        time.sleep(0.01)
    """
    verdict = run(isolating, program)
    assert verdict.status == "passed" and verdict.seconds < 20
    assert eventually(lambda: not running(seconds))


def test_run_many_keeps_order_and_reports_each(backend):
    jobs = [(f"x = {i}\nimport time; time.sleep({(i * 7 % 5) / 50})", []) for i in range(20)]
    jobs = [
        (program, [f"assert x == {i}", f"assert x == {i % 3}"])
        for i, (program, _) in enumerate(jobs)
    ]
    done = []
    verdicts = sandbox.run_many(
        jobs, limits=LIMITS, backend=backend, workers=4, on_done=done.append
    )
    assert [verdict.reward for verdict in verdicts] == [1.0 if i < 3 else 0.5 for i in range(20)]
    assert sorted(map(id, done)) == sorted(map(id, verdicts))


def test_nothing_is_left_behind(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors, mounts = os.listdir("/proc/self/fd"), pathlib.Path("/proc/mounts").read_text()
    threads, before = threading.active_count(), children()
    programs = ["x = 1", "1 / 0", "import os; os._exit(0)", "while True: print('x' * 999)"]
    jobs = [(program, ["assert x"]) for program in programs * 3]
    sandbox.run_many(jobs, limits=LIMITS, backend=backend)
    assert eventually(lambda: children() <= before)
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert pathlib.Path("/proc/mounts").read_text() == mounts
    assert threading.active_count() == threads
    assert not list(tmp_path.glob("align_jax_sandbox_*"))


CALLER = """
import signal, sys
from align_jax import sandbox
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
program = "import time; time.sleep(100)"
limits = sandbox.Limits(wall_s=100)
sandbox.backend(sys.argv[1])
print("ready", flush=True)
sandbox.run_many([(program, [])] * 6, limits=limits, backend=sys.argv[1], workers=2)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_nothing_survives_an_interrupted_or_killed_caller(isolating, sent):
    command = [sys.executable, "-c", CALLER, isolating]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=pipe, stderr=pipe, text=True) as caller:
        assert caller.stdout.readline() == "ready\n"
        assert eventually(lambda: len(children(caller.pid)) >= 6, 30.0)  # 3 for each program
        left = children(caller.pid)
        begin = time.monotonic()
        caller.send_signal(sent)
        caller.wait(timeout=30)
        assert time.monotonic() - begin < 10
        assert sent != signal.SIGINT or "KeyboardInterrupt" in caller.stderr.read()
    assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in left))


def test_on_done_that_raises_ends_the_rest(backend):
    def on_done(verdict):
        raise KeyError("mine")

    jobs = [("x = 1", [])] + [("import time; time.sleep(60)", [])] * 5
    begin, before = time.monotonic(), children()
    with pytest.raises(KeyError, match="mine"):
        sandbox.run_many(
            jobs, limits=sandbox.Limits(wall_s=60), backend=backend, workers=2, on_done=on_done
        )
    assert time.monotonic() - begin < 20
    assert eventually(lambda: children() <= before)


def test_refuses_where_nothing_works_and_says_what_to_do(monkeypatch):
    sandbox._probe.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sandbox.shutil, "which", lambda name: None)
        with pytest.raises(RuntimeError) as refused:
            sandbox.run("x = 1")
        assert sandbox.run("x = 1", backend="none").status == "passed"
    sandbox._probe.cache_clear()
    for word in ("bwrap is not installed", "apt install bubblewrap", 'backend="none"', "userns"):
        assert word in str(refused.value)


def test_a_backend_that_breaks_later_is_the_sandbox_fault(isolating, monkeypatch):
    assert sandbox.backend(isolating) == isolating
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/bin/false")
    verdict = sandbox.run("x = 1", ["assert x == 1"], backend=isolating)
    assert (verdict.status, verdict.reward) == ("sandbox", 0.0)


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(ValueError, match="got 'docker'.*bwrap.*userns.*none"):
        sandbox.backend("docker")


def test_scratch_behind_a_prefix_is_bounded(tmp_path):
    if "bwrap" not in ISOLATING:
        pytest.skip("no bwrap")
    wrap = sandbox.prefix("bwrap", reads=[], writes=tmp_path)
    program = "import shutil; print(shutil.disk_usage('/tmp').total)"
    done = subprocess.run([*wrap, sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == sandbox._PREFIX_SCRATCH


@pytest.mark.slow
def test_hundreds_of_mixed_programs_leave_nothing(isolating):
    command = [sys.executable, "tools/bench_sandbox.py", "--mixed=400", "--workers=4", f"--backend={isolating}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "left behind: nothing" in done.stdout, done.stderr[-2000:]
