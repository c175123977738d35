"""Run untrusted Python programs, many at a time, each in a process that can reach nothing.

The only place where model-written code runs. A program sees no network, no files but the
interpreter, its packages and an empty scratch folder, nothing of the caller's environment, and is
bounded in time, memory, processes, output and scratch space.

    sandbox.run("def f(x): return x + 1", ["assert f(1) == 2", "assert f(2) == 4"])
    # Verdict(status="assertion", detail="test 2: AssertionError:", ..., reward=0.5)

The program is executed as the body of a module named `candidate` (a main guard does not run), then
each test in its namespace, all of them, also after a failure. A driver in the same interpreter
reports every outcome on a pipe of its own with a random token, which it took from its input and
erased before the program started: printed success, `sys.exit(0)` and `os._exit(0)` are no pass.

Backends, Linux only: `bwrap` (bubblewrap >= 0.7), `userns` (`unshare` and `setpriv` of util-linux,
Linux >= 5.14, x86-64 or arm64) and `none`, which is never chosen by itself and is NO sandbox: the
program has the rights, files, network and process numbers of the caller; only time, memory, file
size and output are bounded, and a process that leaves the group, or the caller's death, survives.

Not covered yet: a program written against this driver can walk its frames, find the token and
forge reports. Memory and CPU time are bounded for each process and not for their sum (the wall
clock ends all), memfd not at all, and no system call is filtered. Before Linux 5.14 the bound on
processes counts all that the caller's user runs, so that starting one may fail.
"""

import contextlib
import dataclasses
import functools
import marshal
import math
import os
import pathlib
import resource
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

STATUSES = (
    "passed",  # the program and all tests ran to their end
    "assertion",
    "exception",  # also an empty program or test
    "syntax",
    "timeout",  # wall clock or CPU time
    "memory",
    "output",
    "missing_package",
    "killed",  # by a signal that is no limit's
    "exited",  # ended itself: sys.exit, os._exit
    "sandbox",  # never started: says nothing about the program
)
BACKENDS = ("bwrap", "userns", "none")

_SCRATCH = "/tmp"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SYSTEM = (
    *("/bin", "/lib", "/lib32", "/lib64", "/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64"),
    *("/usr/local/bin", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/alternatives"),
    "/etc/ld.so.cache",
)
# The import folders only, without .pth files: what is installed editable, a checkout, is not seen.
_PACKAGES = {
    f"/packages/{name}": sysconfig.get_path(name)
    for name in ("purelib", "platlib")
    if os.path.isdir(sysconfig.get_path(name))
}
# Runs the code objects that it is sent, each of which reads its arguments from the same stream.
_BOOT = """import marshal
def boot(job):
    for code in marshal.load(job):
        type(boot)(code, globals())(job)
boot(open(0, "rb", closefd=False))"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one run: the program and all its tests together."""

    wall_s: float = 5.0
    cpu_s: float = 5.0  # of each process, rounded up to whole seconds
    memory_mb: int = 512  # address space of each process
    processes: int = 16  # and threads
    output_kb: int = 64  # stdout and stderr together
    scratch_mb: int = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one run."""

    status: str  # one of STATUSES: the class of the first failure
    detail: str
    stdout: str
    stderr: str
    seconds: float
    reward: float  # share of the tests passed; without tests 1 if the program ran to its end


_DEFAULT = Limits()


def backend(name: str = "auto") -> str:
    """Return the backend that works here, tried out once; raise RuntimeError where none does."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"sandbox backend: got {name!r}, expected one of {('auto', *BACKENDS)}")
    problems = []
    for candidate in ("bwrap", "userns") if name == "auto" else (name,):
        try:
            _probe(candidate)
            return candidate
        except RuntimeError as error:
            problems.append(f"  {candidate}: {error}")
    raise RuntimeError(
        "untrusted code will not be run, because no sandbox works here:\n"
        + "\n".join(problems)
        + "\nInstall bubblewrap (apt install bubblewrap) or allow user namespaces (sysctl"
        " user.max_user_namespaces=15000 kernel.apparmor_restrict_unprivileged_userns=0; a"
        " container needs --cap-add SYS_ADMIN and a seccomp and apparmor profile that allow it)."
        "\nTo run the programs with your own rights, on a machine that can be thrown away, say"
        ' backend="none".'
    )


_resolve = backend  # for `run` and `run_many`, whose argument has the same name


def prefix(name: str, *, reads: Sequence[str | os.PathLike], writes: str | os.PathLike) -> list[str]:
    """Make a command prefix for a harness that runs untrusted code itself, as EvalPlus does.

    Behind it there is no network, no process of the host, and no file but the interpreter, `reads`, and the
    folder `writes`. Empty for "none"; with "userns" all files are seen, and only those in `writes` can be changed.
    """
    chosen = backend(name)
    if chosen == "none":
        return []
    if chosen == "userns":
        apart = "--user --map-root-user --mount --net --pid --fork --kill-child".split()
        without_rights = [_tool("setpriv"), "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        return [_tool("unshare"), *apart, sys.executable, "-c", _READ_ONLY, os.fspath(writes), *without_rights]
    shown = [sys.prefix, *(path for inside, path in _visible().items() if inside == path), *reads]
    binds = [part for path in dict.fromkeys(map(os.fspath, shown)) for part in ("--ro-bind", path, path)]
    command = [_tool("bwrap"), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    return [*command, "--tmpfs", "/tmp", *binds, "--bind", os.fspath(writes), os.fspath(writes), "--proc", "/proc",
            "--dev", "/dev", "--chdir", os.fspath(writes)]


# In a mount namespace of its own: makes all but one folder read-only, and becomes the command behind it.
_READ_ONLY = """
import ctypes, os, sys
libc, writes = ctypes.CDLL(None, use_errno=True), os.fsencode(sys.argv[1])
def call(name, *arguments):
    if getattr(libc, name)(*arguments):
        raise OSError(ctypes.get_errno(), f"{name}{arguments}")
def set_attributes(path, flags, on=0, off=0):
    call("syscall", 442, -100, path, flags, (ctypes.c_uint64 * 4)(on, off), 32)  # mount_setattr
call("mount", writes, writes, None, 4096, None)  # a mount of its own
set_attributes(b"/", 0x8000, on=1)
set_attributes(writes, 0, off=1)
call("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 2 | 4 | 8, b"size=64m")  # for semaphores; nosuid, nodev, noexec
os.chdir(writes)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def run(
    program: str, tests: Sequence[str] = (), *, limits: Limits = _DEFAULT, backend: str = "auto"
) -> Verdict:
    """Run one program and its tests; nothing that these do raises here."""
    return _execute(program, tests, limits=limits, name=_resolve(backend))


def run_many(
    jobs: Sequence[tuple[str, Sequence[str]]],
    *,
    limits: Limits = _DEFAULT,
    backend: str = "auto",
    workers: int | None = None,
    on_done: Callable[[Verdict], object] | None = None,
) -> list[Verdict]:
    """Run (program, tests) jobs, `workers` at a time (default: one a core); verdicts in order.

    Calls `on_done` in this thread after each one. Interrupted, it first ends what is running.
    """
    name, stop = _resolve(backend), threading.Event()
    execute = functools.partial(_execute, limits=limits, name=name, stop=stop)
    with futures.ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            todo = [pool.submit(execute, program, tests) for program, tests in jobs]
            for done in futures.as_completed(todo):
                verdict = done.result()
                if on_done:
                    on_done(verdict)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [done.result() for done in todo]


@functools.cache
def _probe(name: str) -> None:
    """Run a program that must pass; raise RuntimeError with the reason where it does not."""
    verdict = _execute("import json", (), limits=Limits(wall_s=60, cpu_s=60), name=name)
    if verdict.status != "passed":
        raise RuntimeError(f"{verdict.status}: {verdict.detail}")


def _execute(
    program: str,
    tests: Sequence[str],
    *,
    limits: Limits,
    name: str,
    stop: threading.Event | None = None,
) -> Verdict:
    """Start the driver under backend `name`, watch it, and judge by what it reported."""
    token, begin = secrets.token_hex(16), time.monotonic()
    cap = limits.output_kb * 1024
    with _started(program, tests, token, limits=limits, name=name) as (process, report):
        out, err = process.stdout.fileno(), process.stderr.fileno()
        caps = {out: cap, err: cap, report: 4096 * (len(tests) + 3)}
        last, deadline = f"\n{token} end \n".encode(), begin + limits.wall_s
        read, how = _watch(process.pid, caps, deadline=deadline, last=last, stop=stop)
    lines = [line.split(" ", 2) for line in read[report].decode(errors="replace").split("\n")]
    outcomes = [(line[1], line[2]) for line in lines if line[0] == token]
    stdout, stderr = (read[pipe][:cap].decode(errors="replace") for pipe in (out, err))
    if len(read[out]) + len(read[err]) > cap or len(read[report]) > caps[report]:
        how = "output", f"more than {limits.output_kb} KiB"
    elif not outcomes:
        how = "sandbox", f"{name} did not start ({how[1]}): {stderr[-500:].strip()}"
    status, detail, reward = _judge(outcomes, num_tests=len(tests), how=how)
    seconds = time.monotonic() - begin
    return Verdict(
        status=status, detail=detail, stdout=stdout, stderr=stderr, seconds=seconds, reward=reward
    )


def _judge(
    outcomes: list[tuple[str, str]], *, num_tests: int, how: tuple[str, str]
) -> tuple[str, str, float]:
    """Return status, detail and reward from the driver's reports and `how` its process ended.

    The reports are `start`, one for the program, one for each test, `end`; where they break off,
    `how` is the next outcome. How much passed before an output flood was noticed is chance: 0.
    """
    if how[0] in ("output", "sandbox"):
        return *how, 0.0
    ran = [outcome for outcome in outcomes if outcome[0] not in ("start", "end")]
    if not ran or (ran[0][0] == "passed" and len(ran) <= num_tests) or outcomes[-1][0] != "end":
        ran.append(how)
    if ran[0][0] != "passed":
        return *ran[0], 0.0
    passed = [status for status, _ in ran[1:]].count("passed")
    reward = passed / num_tests if num_tests else 1.0
    for index, (status, detail) in enumerate(ran):
        if status != "passed":
            return status, f"test {index}: {detail}", reward
    return "passed", "", reward


@contextlib.contextmanager
def _started(
    program: str, tests: Sequence[str], token: str, *, limits: Limits, name: str
) -> Iterator[tuple[subprocess.Popen, int]]:
    """Start the driver, yield its process and the pipe of its reports, and leave nothing of it."""
    uid = 0 if name == "none" else _spare_uid()
    with contextlib.ExitStack() as stack:
        scratch = _SCRATCH
        if name == "none":
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="align_jax_sandbox_"))
        command, setup = _command(name, limits, is_root=uid > 0)
        codes = [_isolate.__code__] * len(setup) + [_drive.__code__]
        packages = [*(_PACKAGES.values() if name == "none" else _PACKAGES)]
        read, write = os.pipe()
        stack.callback(os.close, read)
        with open(write, "wb"), open(os.memfd_create("job"), "w+b") as job:
            driver = (token, write, uid, _rlimits(limits, name), packages, program, [*tests])
            for part in (codes, *setup, driver):
                marshal.dump(part, job)
            job.seek(0)
            # Hash order and the number of BLAS threads are fixed, so that a verdict is repeatable.
            fixed = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                command,
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[write],
                env={"HOME": scratch, "TMPDIR": scratch, **fixed},
                cwd=scratch if name == "none" else "/",
                start_new_session=True,
            )
        stack.callback(_end, process)
        yield process, read


def _end(process: subprocess.Popen) -> None:
    """Kill the process group; its leader, not reaped before, keeps the number from reuse."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()


def _watch(
    pid: int,
    caps: dict[int, int],
    *,
    deadline: float,
    last: bytes,
    stop: threading.Event | None,
) -> tuple[dict[int, bytearray], tuple[str, str]]:
    """Read each pipe, to just past its cap, until the driver's last word, its end or a limit.

    Returns what was read from each and how it ended, as a status and its detail.
    """
    read = {pipe: bytearray() for pipe in caps}
    with selectors.DefaultSelector() as selector, open(os.pidfd_open(pid), "rb", 0) as process:
        for pipe in caps:
            os.set_blocking(pipe, False)
            selector.register(pipe, selectors.EVENT_READ)
        selector.register(process, selectors.EVENT_READ)
        how = None
        while not how:
            left = max(0.0, deadline - time.monotonic())
            for key, _ in selector.select(min(left, 0.1)):
                if key.fileobj is process:
                    how = _how_ended(pid)
                elif not _drain(key.fd, read[key.fd], caps[key.fd]):
                    selector.unregister(key.fd)
            if any(len(read[pipe]) > cap for pipe, cap in caps.items()):
                how = "output", ""
            elif any(part.endswith(last) for part in read.values()):
                how = "exited", "a report is missing"
            elif not how and stop and stop.is_set():
                how = "killed", "cancelled"
            elif not how and not left:
                how = "timeout", "wall clock"
    for pipe, cap in caps.items():
        _drain(pipe, read[pipe], cap)
    return read, how


def _drain(pipe: int, into: bytearray, cap: int) -> bool:
    """Append what the pipe holds, up to about `cap`; return False at its end."""
    while len(into) <= cap:
        try:
            part = os.read(pipe, 1 << 16)
        except BlockingIOError:
            break
        if not part:
            return False
        into += part
    return True


def _how_ended(pid: int) -> tuple[str, str]:
    """Return how a process ended, without reaping it, as a status and its detail."""
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    code = info.si_status + (0 if info.si_code == os.CLD_EXITED else 128)
    if code == 128 + signal.SIGXCPU:
        return "timeout", "CPU time"
    if code > 128:
        return "killed", f"signal {code - 128} ({signal.strsignal(code - 128)})"
    return "exited", f"exit code {code}"


def _command(name: str, limits: Limits, *, is_root: bool) -> tuple[list[str], list[tuple]]:
    """Return the command line of a backend and, if it needs `_isolate`, the arguments of that.

    Root changes user in the driver: in a user namespace it would still be root outside, who owns
    /proc/sys and whose processes the kernel does not bound. Others get a user namespace.
    """
    python = [os.path.realpath(sys._base_executable), *"-P -s -S -B -u -X utf8 -c".split(), _BOOT]
    size = limits.scratch_mb * 2**20
    if name == "none":
        return python, []
    if name == "userns":
        # With setpriv it dies with the caller, with --kill-child what it started dies with it.
        flags = "--fork --kill-child --mount --net --pid --ipc --uts --cgroup".split()
        flags += [] if is_root else ["--user", "--map-root-user"]
        command = [_tool("setpriv"), "--pdeathsig", "KILL", _tool("unshare"), *flags, *python]
        binds = [*_visible().items(), *((device, device) for device in _DEVICES)]
        return command, [(binds, _SCRATCH, size, is_root)]
    flags = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try"
    flags += " --die-with-parent --new-session --cap-drop ALL"
    flags += " --cap-add CAP_SETUID --cap-add CAP_SETGID" if is_root else " --unshare-user"
    command = [_tool("bwrap"), *flags.split(), "--size", str(size)]
    command += ["--perms", "1777", "--tmpfs", _SCRATCH, "--symlink", _SCRATCH, "/dev/shm"]
    for inside, outside in _visible().items():
        for parent in reversed(pathlib.Path(inside).parents[:-1]):
            command += ["--dir", str(parent)]  # made by --ro-bind, only root could enter it
        command += ["--ro-bind", outside, inside]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--proc", "/proc", "--remount-ro", "/proc", "--remount-ro", "/"]
    return [*command, "--chdir", _SCRATCH, *python], []


def _tool(name: str) -> str:
    """Return the full path of a program that a backend needs."""
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"{name} is not installed")
    return path


@functools.cache
def _visible() -> dict[str, str]:
    """Map what is seen inside to where it is outside: system, interpreter and packages."""
    base = os.path.realpath(sys.base_prefix)
    if pathlib.Path.home().is_relative_to(base):
        raise RuntimeError(
            f"the interpreter's prefix {base} holds the home folder, so would show it"
        )
    paths = [path for path in (*_SYSTEM, base) if os.path.exists(path)]
    outer = [path for path in paths if not any(path.startswith(f"{up}/") for up in paths)]
    return {path: path for path in outer} | _PACKAGES


def _rlimits(limits: Limits, name: str) -> list[tuple[int, int, int]]:
    """Return (resource, soft, hard) for the driver to set, none above what the caller has."""
    cpu, memory, scratch = math.ceil(limits.cpu_s), limits.memory_mb << 20, limits.scratch_mb << 20
    wanted = [
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, cpu, cpu + 1),  # the signal of the soft one tells that it was this
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, scratch, scratch),
    ]
    if name != "none":  # where it would count all that the caller runs
        wanted.append((resource.RLIMIT_NPROC, limits.processes, limits.processes))
    mine = {which: resource.getrlimit(which)[1] % 2**64 for which, _, _ in wanted}  # -1: no limit
    return [(which, min(soft, mine[which]), min(hard, mine[which])) for which, soft, hard in wanted]


def _spare_uid() -> int:
    """Draw a user id that nobody else has; 0 where the caller may not become another user."""
    last = pathlib.Path("/proc/self/uid_map").read_text().splitlines()[-1]
    first, _, count = map(int, last.split())
    top = min(first + count, 2**31)
    return top // 2 + secrets.randbelow(top // 2 - 2) if os.geteuid() == 0 and top >= 2**16 else 0


# The two below run inside, sent as code objects, so they import what they use themselves.


def _isolate(job) -> None:
    """In the namespaces of `unshare`, build a read-only root, enter it and drop all rights.

    Returns in a child, process 2; process 1 passes on how that ended, as bwrap does.
    """
    import _socket
    import ctypes
    import fcntl
    import os

    binds, scratch, size, is_root = marshal.load(job)
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name, *arguments):
        values = [value.encode() if isinstance(value, str) else value for value in arguments]
        values = [ctypes.c_long(value) if isinstance(value, int) else value for value in values]
        if getattr(libc, name)(*values) < 0:
            raise OSError(ctypes.get_errno(), f"{name}{arguments}")

    def set_attributes(path, flags, *, on=0, off=0):
        call("syscall", 442, -100, path, flags, (ctypes.c_uint64 * 4)(on, off), 32)  # mount_setattr

    root = "/sys"  # exists everywhere and holds nothing that is needed
    read_only, nosuid, nodev, noexec, bind = 1, 2, 4, 8, 4096 | 16384
    call("mount", "tmpfs", root, "tmpfs", nosuid | nodev, "mode=755,size=1m")
    for folder in ("/proc", "/dev", scratch):
        os.makedirs(root + folder)
    os.symlink(scratch, f"{root}/dev/shm")
    call("mount", "proc", f"{root}/proc", "proc", nosuid | nodev | noexec, None)
    call("mount", "tmpfs", root + scratch, "tmpfs", nosuid | nodev, f"mode=1777,size={size}")
    for inside, outside in binds:
        os.makedirs(os.path.dirname(root + inside), exist_ok=True)
        if os.path.isdir(outside):
            os.makedirs(root + inside, exist_ok=True)
        else:
            os.close(os.open(root + inside, os.O_CREAT))
        call("mount", outside, root + inside, None, bind, None)
    set_attributes(root, 0x8000, on=read_only | nosuid)  # and all that is mounted below
    set_attributes(root + scratch, 0, off=read_only)
    os.chdir(root)
    call("syscall", {"x86_64": 155, "aarch64": 41}[os.uname().machine], ".", ".")  # pivot_root
    call("umount2", ".", 2)  # detach the old root
    os.chdir(scratch)
    link = _socket.socket()  # to bring up the loopback device, as bwrap does
    fcntl.ioctl(link.fileno(), 0x8914, b"lo".ljust(16, b"\0") + b"\x41".ljust(24, b"\0"))
    link.close()
    child = os.fork()
    if child:
        while (ended := os.wait())[0] != child:
            pass
        code = os.waitstatus_to_exitcode(ended[1])
        os._exit(code if code >= 0 else 128 - code)
    call("prctl", 38, 1, 0, 0, 0)  # no new privileges
    if not is_root:  # who loses all by changing user
        call("capset", (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())


def _drive(job) -> None:
    """Bound this process, run the program and its tests, and report each outcome.

    Empties `job`, which holds the token, and binds the builtins that matter before the program can
    replace them; only an execution that came to its end leads to "passed".
    """
    import os
    import resource
    import sys

    token, report, uid, rlimits, packages, program, tests = marshal.load(job)
    job.close()
    os.ftruncate(0, 0)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.set_inheritable(report, False)
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for which, soft, hard in rlimits:
        resource.setrlimit(which, (soft, hard))
    sys.path += packages
    sys.argv = ["candidate"]
    module = sys.modules["candidate"] = type(sys)("candidate")
    build, execute, write, leave = compile, exec, os.write, os._exit

    def say(status, error=""):
        try:
            text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
            text = " ".join(text.split())[:500]
        except BaseException:  # the program's own __str__
            text = "unprintable"
        write(report, f"\n{token} {status} {text}\n".encode("utf-8", "backslashreplace"))

    def attempt(source, what):
        try:
            tree = build(source, f"<{what}>", "exec", 0x400, True)  # ast.PyCF_ONLY_AST
            code = build(tree, f"<{what}>", "exec", 0, True)
        except Exception as error:
            return say("syntax", error)
        if not tree.body:
            return say("exception", f"empty {what}")
        try:
            execute(code, module.__dict__)
        except AssertionError as error:
            say("assertion", error)
        except ModuleNotFoundError as error:
            say("missing_package", error)
        except MemoryError:
            say("memory", "MemoryError")
        except SystemExit as error:
            say("exited", error)
        except BaseException as error:
            say("exception", error)
        else:
            say("passed")
            return True

    say("start")
    if attempt(program, "program"):
        for test in tests:
            attempt(test, "test")
    say("end")
    leave(0)
