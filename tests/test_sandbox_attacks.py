"""Attacks on the sandbox, each on every backend that isolates: what is the verdict, and is the host as it was?

An attack asserts for itself, in its tests, that it came to nothing; where it cannot, the verdict says how it ended.
"""

import os
import pathlib
import re
import socket
import textwrap
import threading

import pytest
from test_sandbox import ISOLATING, REPOSITORY, children, eventually, running

from align_jax import sandbox
from align_jax.jail import kernel

SECONDS = f"87654.{os.getpid()}"  # of sleep, to know a process by
SECRET = "hunter2"


@pytest.fixture(params=ISOLATING)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def host(tmp_path, monkeypatch):
    """A secret in a file, in the environment and in a home with keys; afterwards all must be as it was."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id_ed25519").write_text(SECRET)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("API_KEY", SECRET)
    before = state(tmp_path)
    yield home
    assert eventually(lambda: children() == before["processes"])
    assert not running(SECONDS)
    assert state(tmp_path) == before


def state(folder):
    return {
        "processes": children(),
        "threads": threading.active_count(),
        "descriptors": os.listdir("/proc/self/fd"),
        "mounts": pathlib.Path("/proc/self/mounts").read_text(),
        "core pattern": pathlib.Path("/proc/sys/kernel/core_pattern").read_text(),
        "files": {path: path.read_text() for path in folder.rglob("*") if path.is_file()},
    }


def attack(backend, program, *tests, **limits):
    values = {"wall_s": 30.0, "cpu_s": 30.0, **limits}
    return sandbox.run(textwrap.dedent(program), tests, limits=sandbox.Limits(**values), backend=backend)


REFUSED = """
def refused(action, *arguments):
    try:
        action(*arguments)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return False
"""
RESOURCES = {  # program, limits, statuses that are right
    "infinite loop": ("while True: pass", {"cpu_s": 1.0}, "timeout"),
    "infinite loop that ignores signals": (
        "import signal\nfor s in set(signal.valid_signals()) - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass", {"cpu_s": 1.0}, "timeout"),
    "sleep with all signals blocked": (
        "import signal, time\nsignal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\ntime.sleep(99)",
        {"wall_s": 1.5}, "timeout"),
    "stops itself": ("import os\nos.kill(os.getpid(), 19)", {"wall_s": 1.5}, "timeout"),
    "recursion": ("def f(): f()\nf()", {}, "exception"),
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", {"wall_s": 1.5}, "timeout"),
    "fork bomb that ends its parents": (
        "import os\nwhile True:\n    try:\n        if os.fork(): os._exit(0)\n    except OSError: pass", {}, "exited"),
    "thread bomb": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[99]).start()",
                    {}, "exception"),
    "memory at once": ("x = bytearray(10**10)", {"memory_mb": 200}, "memory"),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytes(10**6))", {"memory_mb": 200}, "memory"),
    "memory of many children": (
        "import os, time\nfor _ in range(8):\n    if not os.fork(): break\nx = bytearray(90 << 20)\ntime.sleep(30)",
        {"memory_mb": 200}, "memory"),
    "shared memory of many children": (
        "import mmap, os, time\nfor _ in range(8):\n    if not os.fork(): break\n"
        "x = mmap.mmap(-1, 90 << 20)\nx.write(bytes(len(x)))\ntime.sleep(30)", {"memory_mb": 200}, "memory"),
    "memory that has no process": ("import os\nos.ftruncate(os.memfd_create('x'), 1 << 34)", {}, "exception"),
    "one file that fills the disk": (
        "with open('x', 'wb') as file:\n    while True: file.write(bytes(1 << 20))", {"scratch_mb": 4}, "exception"),
    "many files that fill the disk": (
        "for i in range(99):\n    with open(f'{i}', 'wb') as file: file.write(bytes(1 << 20))", {"scratch_mb": 4},
        "exception"),
    "names that fill the disk": ("for i in range(10**6): open(f'{i}', 'w').close()", {"scratch_mb": 4}, "exception"),
    "10 GB of output": ("import os\nfor _ in range(10 * 2**14): os.write(1, bytes(65536))", {}, "output"),
    "10 GB of errors from a child": (
        "import os\nif not os.fork():\n    while True: os.write(2, bytes(65536))\nos.wait()", {}, "output"),
    "words without end": ("import os\nwhile True: os.write(3, b'passed')", {}, "output tampered"),
    "open files without end": ("import os\nwhile True: os.dup(1)", {}, "exception"),
    "pipes full of data": (
        "import os\nwhile True:\n    r, w = os.pipe()\n    os.write(w, bytes(65536))", {}, "exception"),
    "a file descriptor in flight": (
        "import socket\na, b = socket.socketpair()\nwhile True:\n    c, d = socket.socketpair()\n"
        "    socket.send_fds(a, [b'x'], [b.fileno()])\n    a, b = c, d", {}, "exception timeout"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", {}, "killed"),
    "kills its group": ("import os\nos.killpg(0, 9)", {}, "killed"),
    "alarm": ("import signal, time\nsignal.alarm(1)\ntime.sleep(9)", {}, "killed"),
}  # fmt: skip


@pytest.mark.parametrize("name", RESOURCES)
def test_what_takes_all_is_bounded(backend, name):
    program, limits, statuses = RESOURCES[name]
    verdict = attack(backend, program, "assert True", **limits)
    assert verdict.status in statuses.split() and verdict.reward == 0.0, verdict


REACHES = {  # tests that hold where the attack is contained
    "home and keys": "import os\nassert not os.path.exists({home!r}) and not os.path.exists({home!r} + '/.ssh')",
    "checkout": "import os\nassert not os.path.exists({checkout!r})",
    "passwords": "import os\nassert not os.path.exists('/etc/shadow') and not os.path.exists('/etc/passwd')",
    "environment": "import os\nassert {secret!r} not in repr(os.environ)",
    "environment of others": "import glob\nfor p in glob.glob('/proc/[0-9]*/environ'):\n"
                             "    assert refused(open, p) or {secret!r} not in open(p).read()",
    "files through the root of others": "import glob\n"
                                        "for p in glob.glob('/proc/[0-9]*/root') + glob.glob('/proc/[0-9]*/cwd'):\n"
                                        "    assert refused(open, p + {home!r} + '/.ssh/id_ed25519')",
    "descriptors of others": "for n in range(32): assert refused(open, '/proc/1/fd/%d' % n)",
    "memory of others": "assert refused(open, '/proc/1/mem', 'rb+')",
    "parent directories": "assert refused(open, '/tmp/' + '../' * 40 + {home!r} + '/.ssh/id_ed25519')",
    "links": "import os\nos.symlink({home!r} + '/.ssh/id_ed25519', 'link')\nassert refused(open, 'link')\n"
             "os.symlink('/proc/1/root', 'root')\nassert refused(open, 'root' + {home!r} + '/.ssh/id_ed25519')\n"
             "assert refused(os.link, '/bin/sh', 'shell') or os.stat('shell').st_dev == os.stat('/tmp').st_dev",
    "writing outside": "import os, sys\nfor p in ('/', '/usr', '/usr/lib', '/dev', '/etc', '/proc', '/packages',"
                       " sys.base_prefix):\n    assert refused(open, p + '/intruder', 'w')\n"
                       "assert refused(open, os.__file__, 'r+') and refused(os.remove, os.__file__)",
    "core pattern": "assert refused(open, '/proc/sys/kernel/core_pattern', 'w')",
    "magic keys": "assert refused(open, '/proc/sysrq-trigger', 'w')",
    "memory killer's score": "assert refused(open, '/proc/self/oom_score_adj', 'w')",
    "tracing others": "import ctypes\nc = ctypes.CDLL(None)\n"  # traceme, attach, seize
                      "assert all(c.ptrace(request, 1, 0, 0) == -1 for request in (0, 16, 0x4206))",
    "devices": "import os\nassert refused(os.mknod, 'disk', 0o60600, os.makedev(8, 0))\n"
               "assert refused(open, '/dev/tty')",
    "loopback": "import socket\nassert 'refused' in refused(socket.create_connection, ('127.0.0.1', {port}), 5)",
    "outside": "import socket\nassert 'nreachable' in refused(socket.create_connection, ('192.0.2.1', 80), 5)",
    "outside by datagram": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
                           "assert refused(s.sendto, b'x', ('192.0.2.1', 53))",
    "the host's machine": "import socket\nassert refused(socket.socket, socket.AF_VSOCK, socket.SOCK_STREAM)",
    "raw packets": "import socket\nassert refused(socket.socket, socket.AF_PACKET, socket.SOCK_RAW)\n"
                   "assert refused(socket.socket, socket.AF_INET, socket.SOCK_RAW)",
    "the kernel's ciphers": "import socket\nassert refused(socket.socket, socket.AF_ALG, socket.SOCK_SEQPACKET)",
    "killing the parent": "import os\nfor p in (os.getppid(), 1): refused(os.kill, p, 9)\nrefused(os.kill, -1, 9)\n"
                          "assert os.getppid() == 1 and os.path.exists('/proc/1')",
    "stopping the parent": "import os\nfor s in (19, 15, 2, 6): refused(os.kill, 1, s)",
    "higher priority": "import os\nassert refused(os.nice, -5)",
    "higher limits": "import resource as r\nassert refused(r.setrlimit, r.RLIMIT_AS, (-1, -1))\n"
                     "assert refused(r.setrlimit, r.RLIMIT_NPROC, (9999, 9999))",
    "another user": "import os\nu = os.getuid()\nassert refused(os.setuid, u + 1) and refused(os.setgroups, [0])",
    "new user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == -1",
    "new namespaces by clone": "import ctypes, errno\nc = ctypes.CDLL(None, use_errno=True)\n"
                               "for f in (0x10000000, 0x20000000, 0x20000, 0x40000000):\n"
                               "    assert c.syscall({clone}, f | 17, 0, 0, 0, 0) == -1\n"
                               "    assert ctypes.get_errno() == errno.EPERM\n"
                               "assert c.syscall(435, 0, 0) == -1 and ctypes.get_errno() == errno.ENOSYS",
    "programs that change user": "import subprocess\nfor c in (['su'], ['mount', '/tmp'], ['unshare', '-r', 'id']):\n"
                                 "    try: assert subprocess.run(c, capture_output=True).returncode\n"
                                 "    except FileNotFoundError: pass",
}  # fmt: skip


@pytest.mark.parametrize("name", REACHES)
def test_what_is_not_the_programs_is_out_of_reach(backend, name, host):
    clone = kernel.CLONE[kernel.MACHINE != "x86_64"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        facts = dict(home=str(host), checkout=str(REPOSITORY), secret=SECRET, port=port, clone=clone)
        test = re.sub(r"\{(\w+)(!r)?\}", lambda m: repr(facts[m[1]]), REACHES[name])
        verdict = attack(backend, REFUSED, test)
        assert verdict.status == "passed", verdict


def test_denied_calls_are_denied(backend):
    numbers = [numbers[kernel.MACHINE != "x86_64"] for numbers in kernel.DENIED.values()]
    program = f"""
    import ctypes, errno
    library, allowed = ctypes.CDLL(None, use_errno=True), []
    for number in {[number for number in numbers if number >= 0]}:
        if library.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != errno.EPERM:
            allowed.append(number)
    """
    assert attack(backend, program, "assert allowed == []").status == "passed"


HEADERS = [(0, "x86_64-linux-gnu/asm/unistd_64.h"), (1, "asm-generic/unistd.h")]


@pytest.mark.parametrize("column, header", HEADERS)
def test_numbers_of_denied_calls_are_the_kernels(column, header):
    path = pathlib.Path("/usr/include") / header
    if not path.is_file():
        pytest.skip(f"no {path}")
    known = dict(re.findall(r"#define __NR3?2?6?4?_?(\w+) (\d+)", path.read_text()))
    table = kernel.DENIED | {"clone": kernel.CLONE, "clone3": kernel.CLONE3, "socket": kernel.SOCKET}
    ours = {name: str(numbers[column]) for name, numbers in table.items() if numbers[column] >= 0}
    assert {name: number for name, number in ours.items() if known.get(name, number) != number} == {}
    assert len(known.keys() & ours.keys()) > 0.9 * len(ours)


FIND = """
import gc, os, sys
def frames():
    frame = sys._getframe()
    while frame:
        yield frame
        frame = frame.f_back
def stage():
    return next(frame.f_locals["self"] for frame in frames() if type(frame.f_locals.get("self")).__name__ == "Stage")
"""
FORGERIES = {  # a wrong program that gets at its driver; what it does, and the statuses that are right
    "says passed and leaves": "s = stage()\nfor _ in range(9): s.say('passed')\nos._exit(0)",
    "says passed for whatever is sent": "s = stage()\nwhile True:\n    s.say('passed')\n    s.hear()",
    "tells and passes whatever is sent":
        "s = stage()\ns.say('passed')\nwhile True:\n    kind, body = s.hear()\n"
        "    s.say('tells', '1') if kind == 'test' else None\n    s.say('passed')",
    "makes every test pass": "s = stage()\ns.execute = lambda code: ('passed', '')",
    "makes every answer a yes": "s = stage()\ns.tell = lambda value: True",
    "runs tests without their asserts": "s = stage()\nreal_execute = s.execute\n"
                                        "s.execute = lambda code: (real_execute(code), ('passed', ''))[1]",
    "finds it among all objects": "s = next(o for o in gc.get_objects() if type(o).__name__ == 'Stage')\n"
                                  "s.execute = lambda code: ('passed', '')",
    "swallows assertion errors": "import builtins\nbuiltins.AssertionError = ZeroDivisionError",
    "steps over asserts": "def trace(frame, event, arg):\n"
                          "    if event == 'line' and frame.f_code.co_filename == '<test>' and frame.f_lineno == 2:\n"
                          "        frame.f_lineno = 3\n    return trace\nsys.settrace(trace)",
    "traces the tests": "def trace(frame, event, arg):\n    frame.f_trace_opcodes = True\n    return trace\n"
                        "sys.settrace(trace)\n",
    "says passed from a thread": "import threading, time\ns = stage()\ndef forge():\n    while True:\n"
                                 "        s.say('passed')\nthreading.Thread(target=forge, daemon=True).start()",
    "says passed from a child": "s = stage()\nif not os.fork():\n    for _ in range(9): s.say('passed')\n"
                                "    os._exit(0)\nos.wait()",
    "leaves in a hook at exit": "import atexit\natexit.register(lambda: os._exit(0))\nsys.exit(0)",
    "exit is nothing": "sys.exit = os._exit = os.abort = lambda *a: None",
    "compare is nothing": "import operator, builtins\noperator.eq = builtins.all = lambda *a: True",
    "writes to every descriptor": "for fd in range(1, 64):\n    try: os.write(fd, b'passed \\n' * 9)\n"
                                  "    except OSError: pass",
    "no recursion": "sys.setrecursionlimit(60)",
    "tests read a changed module": "sys.modules['candidate'] = sys",
}  # fmt: skip
IN_A_TEST = {
    "says passed in the test": "stage().say('passed'); os._exit(0)",
    "replaces what tells": "globals()['<tell>'] = lambda value: True",
    "raises what is no failure": "raise SystemExit(0)",
    "ends in a thread": "__import__('threading').Thread(target=os._exit, args=[0]).start()",
    "reads what is expected": "return [v for x in frames() for v in x.f_code.co_consts if v in (4242, 4243)][0]",
}


@pytest.mark.parametrize("name", FORGERIES)
@pytest.mark.parametrize("tests", [["assert f(1) == 4242"] * 3, ["for _ in [0]:\n    assert f(1) == 4242\nx = 0"]])
def test_forged_success_is_no_pass(backend, name, tests):
    verdict = attack(backend, FIND + FORGERIES[name] + "\ndef f(x): return 0", *tests, wall_s=5.0)
    assert verdict.status not in ("passed", "sandbox") and verdict.reward == 0.0, verdict


def test_whoever_answers_in_the_place_of_a_test_is_found_out_every_time(backend):
    """A thread that speaks first is followed by the test itself: a race, so often enough to be lost once."""
    program = FIND + FORGERIES["says passed from a thread"] + "\ndef f(x): return 0"
    job = program, ["for _ in [0]:\n    assert f(1) == 4242"]
    verdicts = sandbox.run_many([job] * 20, limits=sandbox.Limits(wall_s=30), backend=backend)
    assert {(verdict.status, verdict.reward) for verdict in verdicts} == {("tampered", 0.0)}


@pytest.mark.parametrize("name", IN_A_TEST)
def test_success_forged_in_a_test_is_no_pass(backend, name):
    program = FIND + f"def f(x):\n    {IN_A_TEST[name]}\n    return 0"
    verdict = attack(backend, program, "assert f(1) == 4242\nassert f(2) == 4243", "assert f(1) == 4242", wall_s=5.0)
    assert verdict.status not in ("passed", "sandbox") and verdict.reward == 0.0, verdict


ALIKE = ("class Alike({}):\n    def __eq__(self, other): return True\n    __ne__ = __lt__ = __gt__ = __eq__\n"
         "class Sly:\n    def __eq__(self, other): return isinstance(other, (int, str, list))\n"
         "    def __ne__(self, other): return not self == other\n")
COMPARISONS = ["assert f(1) == 2", "assert 2 == f(1)", "for i in [1]:\n    assert f(i) == 2",
               "def check(g):\n    assert g(1) == 2, 'no'\ncheck(f)", "two = 2\nassert f(1) == two",
               "assert f(1) in (2, 3)", "assert not f(1) != 2", "if f(1) != 2: raise AssertionError",
               "right = f(1) == 2\nassert right", "from unittest import TestCase\nTestCase().assertEqual(f(1), 2)",
               "from unittest import TestCase\nTestCase().assertIn(f(1), [2])"]  # fmt: skip


@pytest.mark.parametrize("test", COMPARISONS)
@pytest.mark.parametrize("kind, value", [("", "Alike()"), ("int", "Alike(9)"), ("", "[Alike()]"), ("", "Alike"),
                                         ("", "Sly()")])
def test_objects_that_equal_everything_equal_nothing(backend, test, kind, value):
    program = ALIKE.format(kind) + f"def f(x): return {value}"
    if value == "[Alike()]":
        test = test.replace("2", "[2]")
    verdict = attack(backend, program, test)
    assert verdict.status == "assertion", verdict


def test_tests_that_drive_the_parser_mad_are_not_the_callers_fault(backend):
    mad = ["(" * 100_000, "-" * 10**6 + "1", "[" * 3000 + "]" * 3000, "x" + ".x" * 10**5, "assert f(" + "(" * 99]
    verdicts = [attack(backend, "def f(x): return x", test, "assert f(1) == 1") for test in mad]
    assert all(verdict.reward <= 0.5 for verdict in verdicts), verdicts
    assert attack(backend, "x = 1", "assert x == 1").status == "passed"


SCAN = """
def copies(shifted):
    # How often a text is in this process' memory; told with every byte one higher, not to be there for being sought.
    found, table = 0, bytes(range(1, 256)) + bytes(1)
    for line in open("/proc/self/maps").readlines():
        span, rights, *_ = line.split(" ", 5)
        begin, end = (int(part, 16) for part in span.split("-"))
        if rights.startswith("rw"):
            try:
                with open("/proc/self/mem", "rb") as file:
                    file.seek(begin)
                    found += file.read(end - begin).translate(table).count(shifted)
            except OSError:  # it held what was read before, and is gone
                pass
    return found
"""


def shifted(text):
    return bytes(byte + 1 for byte in text.encode())


def test_a_run_leaves_nothing_to_the_next_in_the_same_jail(backend):
    first = """
    import builtins, os, socket, sys, time
    mark = "left by the first"
    open("file", "w").write(mark)
    os.environ["MARK"] = builtins.mark = sys.mark = mark
    server = socket.create_server(("127.0.0.1", 8765))
    if not os.fork():
        os.setsid()
        time.sleep(99)
    """
    second = SCAN + """
import builtins, os, socket, sys
server = socket.create_server(("127.0.0.1", 8765))
processes = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
"""
    tests = ["assert not hasattr(builtins, 'mark') and not hasattr(sys, 'mark') and 'MARK' not in os.environ",
             "assert os.listdir('/tmp') == []", "assert processes == [1, 2]",
             f"assert copies({shifted('left by the first')}) == 0"]
    jobs = [(textwrap.dedent(first), ["assert server", "assert mark == 'left by the first'"]), (second, tests)] * 2
    verdicts = sandbox.run_many(jobs, backend=backend, workers=1, limits=sandbox.Limits(wall_s=30))
    assert [verdict.status for verdict in verdicts] == ["passed"] * 4, verdicts


def test_what_a_test_expects_is_not_in_the_programs_memory(backend):
    program = SCAN + f"def f(): return copies({shifted('open sesame')})"
    tests = ["assert f() != 'open sesame'", "assert f() == 0", "there = 'open' + chr(32) + 'sesame'\nassert f() > 0"]
    verdict = attack(backend, program, *tests)
    assert verdict.status == "passed", verdict
