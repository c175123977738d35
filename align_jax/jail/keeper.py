"""The processes between the warden and a program: the zygote forks keepers, a keeper closes in one program."""

import contextlib
import ctypes
import fcntl
import os
import random
import resource
import shutil
import signal
import socket
import sys

from align_jax.jail import kernel, stage


def breed(link: socket.socket, setup: dict) -> None:
    """Fork a keeper for each message, pass on a handle of it, and say when nothing is left of it; never returns."""
    kernel.call("prctl", 1, signal.SIGKILL)  # when the warden dies
    home = setup["isolated"] and os.open("/proc/self/ns/pid", os.O_RDONLY)
    while True:
        given = socket.recv_fds(link, 16, 3)[1]
        if not given:
            os._exit(0)
        if setup["isolated"]:
            kernel.call("setns", home, 0)
            kernel.call("unshare", kernel.NEW_PID)  # for the next child, who is process 1 there
        keeper = os.fork()
        if not keeper:
            keep(link, *given, setup=setup)
        for end in given:
            os.close(end)
        handle = os.pidfd_open(keeper)
        socket.send_fds(link, [b"%d" % keeper], [handle])
        os.close(handle)
        os.waitid(os.P_PID, keeper, os.WEXITED | os.WNOWAIT)
        if not setup["isolated"]:  # what else a namespace does; the number is not free before the next line
            with contextlib.suppress(ProcessLookupError):  # it had not yet made its group
                os.killpg(keeper, signal.SIGKILL)
            shutil.rmtree(f"{setup['scratch']}/{keeper}", ignore_errors=True)
        os.waitpid(keeper, 0)
        link.send(b"reaped")


def keep(link: socket.socket, talk: int, out: int, err: int, *, setup: dict) -> None:
    """Close this process in, fork the program's, and say how that ended; never returns."""
    try:
        kernel.call("prctl", 1, signal.SIGKILL)  # when the zygote dies
        os.setsid()
        if setup["isolated"]:
            kernel.call("prctl", 4, 0)  # none of the same user may look into it
            kernel.call("unshare", kernel.NEW_MOUNT)
            kernel.call("mount", None, "/", None, kernel.MOUNT["private"], None)
            size = setup["limits"]["scratch_mb"]  # a name costs memory too
            bounds = f"mode=1777,size={size}m,nr_inodes={size * 256}"
            kernel.mount("tmpfs", kernel.SCRATCH, "nosuid", "nodev", data=bounds)
            kernel.mount("proc", "/proc", "nosuid", "nodev", "noexec", "read_only")
        else:
            os.mkdir(f"{setup['scratch']}/{os.getpid()}")
        os.chdir(kernel.SCRATCH if setup["isolated"] else f"{setup['scratch']}/{os.getpid()}")
        program = os.fork()
        if not program:
            perform(talk, out, err, setup=setup)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a program of the same user may send some
        for end in (talk, out, err):
            os.close(end)
        while (ended := os.wait3(0))[0] != program:
            pass
        _, code, used = ended
        link.send(b"ended %d %f" % (code, used.ru_utime + used.ru_stime))
    except BaseException as error:
        link.send(f"failed {type(error).__name__}: {error}".encode("ascii", "replace")[:1000])
    finally:
        os._exit(0)


def perform(talk: int, out: int, err: int, *, setup: dict) -> None:
    """Bound this process, give up its rights, and do what the warden says; never returns."""
    try:
        given = os.open("/dev/null", os.O_RDONLY), out, err, talk
        for wanted, high in enumerate([fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in given]):
            os.dup2(high, wanted, inheritable=wanted != 3)
        os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
        sys.path += setup["packages"]
        sys.argv = ["candidate"]
        for name in [name for name in sys.modules if name.startswith("align_jax")]:
            del sys.modules[name]
        confine(setup)
        stage.Stage(socket.socket(fileno=3)).play()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def confine(setup: dict) -> None:
    """Bound this process and give up, for good, what it does not need."""
    if setup["uids"]:
        uid = random.SystemRandom().randrange(*setup["uids"])
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    for which, soft, hard in setup["rlimits"]:
        resource.setrlimit(which, (soft, hard))
    if setup["isolated"]:
        kernel.call("prctl", 38, 1, 0, 0, 0)  # no new privileges
        kernel.call("capset", (ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
        kernel.call("prctl", 4, 1)  # its own /proc/self is its own
        kernel.filter_calls()
