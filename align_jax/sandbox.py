"""Run untrusted Python programs, many at a time, each in a process that can reach nothing.

The only place where model-written code runs. A program sees no network, no files but the interpreter, its packages
and an empty scratch folder, nothing of the caller's environment, and is bounded in time, memory, processes, output
and scratch space, also in the sum over all that it starts.

    sandbox.run("def f(x): return x + 1", ["assert f(1) == 2", "assert f(2) == 4"])
    # Verdict(status="assertion", detail="test 2: AssertionError: got 3", ..., reward=0.5)

The program is executed as the body of a module named `candidate` (a main guard does not run), then each test in its
namespace, all of them, also after a failure. What `passed` rests on is in jail/referee.py: printed success,
`sys.exit(0)`, `os._exit(0)`, values that equal everything and a driver that was tampered with are no pass.

`run_many` starts a jail for each worker, with a warden in it (jail/warden.py), who forks a new process in new
namespaces for every program: nothing is shared between two runs but what none can write. This file is the side
of the caller: it chooses the backend, starts the jails, hands out jobs and ends whom it cannot wait for.

Backends, Linux only: `bwrap` (bubblewrap >= 0.7), `userns` (`unshare` and `setpriv` of util-linux, Linux >= 5.14),
both on x86-64 or arm64, and `none`, which is never chosen by itself and is NO sandbox: the program has the rights,
files, network and process numbers of the caller; only time, memory, file size and output are bounded, and a process
that leaves the group, or the caller's death, survives.

Not covered: CPU time is bounded for each process (the wall clock ends all); memory of all processes together is
looked at 20 times a second, so that between two looks it can reach `processes` times `memory_mb`; buffers of pipes
and sockets are bounded by their number only. Before Linux 5.14 the bound on processes counts all that the caller's
user runs, so that starting one may fail.
"""

import contextlib
import dataclasses
import functools
import json
import marshal
import math
import os
import pathlib
import resource
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

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
    "tampered",  # with the tests or with what reports their outcome
    "sandbox",  # never started: says nothing about the program
)
BACKENDS = ("bwrap", "userns", "none")

_SCRATCH = "/tmp"
_PREFIX_SCRATCH = 2**30
_GRACE = 15.0  # seconds after which a warden that does not answer is ended
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
# The jail's modules, in the order of their imports; each gets builtins of its own, which no program can change.
_INSIDE = ("referee", "stage", "kernel", "keeper", "warden")
_BOOT = """import builtins, marshal, socket, sys, types
def boot(sources, upstream):
    for name, source in sources:
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(__builtins__=dict(vars(builtins)), __path__=[])
        parent, _, last = name.rpartition(".")
        setattr(sys.modules.get(parent, module), last, module)
        exec(compile(source, name, "exec"), vars(module))
    module.serve(socket.socket(fileno=upstream))
boot(*marshal.load(open(0, "rb", closefd=False)))"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds of one run: the program and all its tests together."""

    wall_s: float = 5.0
    cpu_s: float = 5.0  # of each process, rounded up to whole seconds
    memory_mb: int = 512  # address space of each process, and what all together hold resident
    processes: int = 16  # and threads
    output_kb: int = 64  # stdout and stderr together
    scratch_mb: int = 32  # beside the memory, which holds it


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
    command += ["--size", str(_PREFIX_SCRATCH), "--tmpfs", "/tmp", *binds]
    command += ["--bind", os.fspath(writes), os.fspath(writes), "--proc", "/proc", "--dev", "/dev"]
    return [*command, "--chdir", os.fspath(writes)]


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


def run(program: str, tests: Sequence[str] = (), *, limits: Limits = _DEFAULT, backend: str = "auto") -> Verdict:
    """Run one program and its tests; nothing that these do raises here."""
    return run_many([(program, tests)], limits=limits, backend=backend)[0]


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
    verdicts: dict[int, Verdict] = {}
    with contextlib.closing(_work(jobs, limits=limits, name=_resolve(backend), workers=workers)) as done:
        for index, verdict in done:
            verdicts[index] = verdict
            if on_done:
                on_done(verdict)
    return [verdicts[index] for index in range(len(jobs))]


@functools.cache
def _probe(name: str) -> None:
    """Run a program that must pass; raise RuntimeError with the reason where it does not."""
    [(_, verdict)] = _work([("import json", ())], limits=Limits(wall_s=60, cpu_s=60), name=name, workers=1)
    if verdict.status != "passed":
        raise RuntimeError(f"{verdict.status}: {verdict.detail}")


def _work(
    jobs: Sequence[tuple[str, Sequence[str]]], *, limits: Limits, name: str, workers: int | None
) -> Iterator[tuple[int, Verdict]]:
    """Hand the jobs out to wardens, and yield each one's place and verdict as it comes.

    A warden that dies or does not answer, as when a test drives its parser mad, costs its job and is replaced.
    """
    todo = iter(enumerate(jobs))
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
        free = [None] * min(workers or len(os.sched_getaffinity(0)), len(jobs))
        while True:
            while free and (job := next(todo, None)):
                warden = free.pop() or stack.enter_context(contextlib.closing(_Warden(limits, name)))
                warden.begin(*job)
                selector.register(warden.stream, selectors.EVENT_READ, warden)
            busy = [key.data for key in selector.get_map().values()]
            if not busy:
                return
            wait = min(warden.deadline for warden in busy) - time.monotonic()
            ready = [key.data for key, _ in selector.select(max(0.0, wait))]
            late = [warden for warden in busy if warden.deadline <= time.monotonic() and warden not in ready]
            for warden in ready + late:
                selector.unregister(warden.stream)
                verdict = warden.verdict() if warden in ready else None
                free.append(warden if verdict else None)
                yield warden.index, verdict or warden.fate(late=warden in late)


class _Warden:
    """One jail and the process in it that runs jobs, one after another."""

    def __init__(self, limits: Limits, name: str):
        self.limits, self.index, self.deadline, self.begun = limits, -1, math.inf, 0.0
        with contextlib.ExitStack() as stack:
            scratch = _SCRATCH
            if name == "none":
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="align_jax_sandbox_"))
            self.said = stack.enter_context(tempfile.TemporaryFile())
            self.stream, theirs = map(stack.enter_context, socket.socketpair())
            setup = _setup(limits, name, scratch=scratch)
            with theirs, open(os.memfd_create("boot"), "w+b") as boot:
                marshal.dump((_sources(), theirs.fileno()), boot)
                boot.seek(0)
                # Hash order and the number of BLAS threads are fixed, so that a verdict is repeatable.
                self.process = subprocess.Popen(
                    _command(name, is_root=_spare_uids() is not None), stdin=boot, stdout=self.said, stderr=self.said,
                    pass_fds=[theirs.fileno()], env={"HOME": "/", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
                    cwd="/", start_new_session=True)
            stack.callback(self._end)
            self._send(setup)
            self.close = stack.pop_all().close

    def begin(self, index: int, job: tuple[str, Sequence[str]]) -> None:
        """Hand over a job."""
        self.index, self.begun = index, time.monotonic()
        self.deadline = self.begun + self.limits.wall_s + _GRACE
        self._send((job[0], [*job[1]]))

    def verdict(self) -> Verdict | None:
        """Receive what became of the job; None where the warden has ended."""
        try:
            head = self.stream.recv(8, socket.MSG_WAITALL)
            body = self.stream.recv(struct.unpack("Q", head)[0], socket.MSG_WAITALL) if len(head) == 8 else b""
        except ConnectionError:
            body = b""
        return Verdict(**json.loads(body)) if body else None

    def fate(self, *, late: bool) -> Verdict:
        """End a warden that has ended or is late, and say of its job what there is to say."""
        seconds = time.monotonic() - self.begun
        self.said.seek(0)
        said = self.said.read().decode(errors="replace")[-500:].strip()
        self.close()
        status, detail = ("timeout", "wall clock") if late else ("sandbox", f"the warden has ended: {said}")
        return Verdict(status=status, detail=detail, stdout="", stderr="", seconds=seconds, reward=0.0)

    def _send(self, message: object) -> None:
        body = marshal.dumps(message)
        with contextlib.suppress(ConnectionError):  # it has ended, which `verdict` will find
            self.stream.sendall(struct.pack("Q", len(body)) + body)

    def _end(self) -> None:
        """Kill the process group; its leader, not reaped before, keeps the number from reuse."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@functools.cache
def _sources() -> list[tuple[str, str]]:
    folder = pathlib.Path(__file__).parent / "jail"
    inside = [(f"align_jax.jail.{name}", (folder / f"{name}.py").read_text()) for name in _INSIDE]
    return [("align_jax", ""), ("align_jax.jail", ""), *inside]


def _setup(limits: Limits, name: str, *, scratch: str) -> dict:
    """What a warden has to know."""
    devices = [(device, device) for device in _DEVICES]
    return {
        "limits": dataclasses.asdict(limits),
        "isolated": name != "none",
        "binds": [*_visible().items(), *devices] if name == "userns" else [],
        "uids": _spare_uids() if name != "none" else None,
        "rlimits": _rlimits(limits, name),
        "packages": [*(_PACKAGES.values() if name == "none" else _PACKAGES)],
        "scratch": scratch,
    }


def _command(name: str, *, is_root: bool) -> list[str]:
    """Return the command line that starts a warden.

    Its rights are those in a user namespace, or root's, as far as it needs them to close in a program. For root
    there is none: in it programs would still be root outside, and the kernel would not bound their number.
    """
    python = [os.path.realpath(sys._base_executable), *"-P -s -S -B -u -X utf8 -c".split(), _BOOT]
    if name == "none":
        return python
    if name == "userns":
        # With setpriv it dies with the caller, with --kill-child what it started dies with it.
        flags = "--fork --kill-child --mount --net --pid --ipc --uts --cgroup".split()
        flags += [] if is_root else ["--user", "--map-root-user"]
        return [_tool("setpriv"), "--pdeathsig", "KILL", _tool("unshare"), *flags, *python]
    flags = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try"
    flags += " --die-with-parent --new-session --cap-drop ALL"
    for capability in ("SYS_ADMIN", "SYS_PTRACE", "SETUID", "SETGID"):
        flags += f" --cap-add CAP_{capability}"
    flags += "" if is_root else " --unshare-user --uid 0 --gid 0"
    command = [_tool("bwrap"), *flags.split(), "--perms", "1777", "--size", "1048576", "--tmpfs", _SCRATCH]
    command += ["--symlink", _SCRATCH, "/dev/shm"]
    for inside, outside in _visible().items():
        for parent in reversed(pathlib.Path(inside).parents[:-1]):
            command += ["--dir", str(parent)]  # made by --ro-bind, only root could enter it
        command += ["--ro-bind", outside, inside]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--proc", "/proc", "--remount-ro", "/proc", "--remount-ro", "/"]
    return [*command, "--chdir", "/", *python]


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
        (resource.RLIMIT_NOFILE, 256, 256),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
    ]
    if name != "none":  # where it would count all that the caller runs
        processes = limits.processes + (0 if _spare_uids() else 4)  # the warden's, of the same user
        wanted.append((resource.RLIMIT_NPROC, processes, processes))
    mine = {which: resource.getrlimit(which)[1] % 2**64 for which, _, _ in wanted}  # -1: no limit
    return [(which, min(soft, mine[which]), min(hard, mine[which])) for which, soft, hard in wanted]


def _spare_uids() -> tuple[int, int] | None:
    """Return a range of user ids that nobody has; None where the caller may not become another user."""
    last = pathlib.Path("/proc/self/uid_map").read_text().splitlines()[-1]
    first, _, count = map(int, last.split())
    top = min(first + count, 2**31)
    return (top // 2, top - 2) if os.geteuid() == 0 and top >= 2**16 else None
