"""What runs inside the jail that sandbox.py makes: it forks a closed-in process for each program and watches it.

No module of the library imports this one; sandbox.py sends its text to a fresh interpreter in the jail. There are
four kinds of process, each forked by the one before:

    warden   gets jobs, speaks for referee.py, holds what a program must not know, ends it at its limits
    zygote   forked before the first job, so that nothing of any job is in its memory; forks a keeper for each
    keeper   process 1 of new process and mount namespaces, with an empty scratch folder; says how its child ended
    program  no rights, no way to new ones, bounded; runs the program, then test by test what the warden sends

When the keeper is killed the kernel ends all of its namespace, and the zygote reaps it only then: a run is over
when nothing of it is left. What the runs of one warden share is a read-only root, and a network of a loopback device.
"""

import contextlib
import json
import marshal
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time

from align_jax.jail import keeper, kernel, referee

PULSE = 0.05  # seconds between two looks at the memory of the whole tree
MOST_GARBAGE = 1000  # messages of a program that answer nothing


def serve(upstream: socket.socket) -> None:
    """Build the jail where that is still to do, start the zygote, and answer each job with a verdict, until the end."""
    setup = receive(upstream)
    os.umask(0o022)
    if setup["binds"]:
        kernel.build_root(setup["binds"])
    link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    setup["zygote"] = os.fork()
    if not setup["zygote"]:
        upstream.close()
        link.close()
        keeper.breed(theirs, setup)
    theirs.close()
    while (job := receive(upstream)) is not None:
        answer = json.dumps(run(link, upstream, *job, setup=setup)).encode()
        upstream.sendall(struct.pack("Q", len(answer)) + answer)


def receive(stream: socket.socket):
    """Receive one message, a length and so many bytes of marshal; None at the end."""
    head = stream.recv(8, socket.MSG_WAITALL)
    if len(head) < 8:
        return None
    return marshal.loads(stream.recv(struct.unpack("Q", head)[0], socket.MSG_WAITALL))


def run(link, upstream, program: str, tests: list[str], *, setup: dict) -> dict:
    """Have one program forked, watch it to its end or a limit, and return the verdict's fields."""
    begin, outcomes, num_tests = time.monotonic(), [], len(tests)
    talk, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    given = [theirs.detach(), out_end, err_end]
    socket.send_fds(link, [b"fork"], given)
    for end in given:
        os.close(end)
    number, (handle,), *_ = socket.recv_fds(link, 64, 1)
    watch = Watch(int(number), talk, out, err, trial=referee.trial(program, tests, outcomes), setup=setup)
    watch.until_over(link, upstream, begin + setup["limits"]["wall_s"])
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    while not watch.reaped:
        watch.reaped = link.recv(1024) == b"reaped"
    os.close(handle)
    stdout, stderr = watch.close()
    how = watch.how if watch.started else ("sandbox", f"did not start: {watch.how[1]} {stderr[-500:]}".strip())
    status, detail, reward = referee.verdict(outcomes, num_tests=num_tests, how=how)
    seconds = time.monotonic() - begin
    return dict(status=status, detail=detail, stdout=stdout, stderr=stderr, seconds=seconds, reward=reward)


class Watch:
    """One program, as the warden sees it: its output, its words, its memory and its end."""

    def __init__(self, keeper: int, talk: socket.socket, out: int, err: int, *, trial: referee.Talk, setup: dict):
        self.keeper, self.talk, self.trial, self.setup = keeper, talk, trial, setup
        self.read = {out: bytearray(), err: bytearray()}
        self.cap = setup["limits"]["output_kb"] * 1024
        self.started, self.reaped, self.garbage, self.how = False, False, 0, None
        self.number = self.answered = b""  # of the message that is to be answered, and of the one before
        for pipe in (talk.fileno(), *self.read):
            os.set_blocking(pipe, False)
        self.send(*next(trial))

    def until_over(self, link: socket.socket, upstream: socket.socket, deadline: float) -> None:
        """Read and answer until the trial or the process is over, or a limit is met; `how` says which."""
        look = time.monotonic() + PULSE
        with selectors.DefaultSelector() as selector:
            for source in (self.talk, link, upstream, *self.read):
                selector.register(source, selectors.EVENT_READ)
            while not self.how:
                now = time.monotonic()
                for key, _ in selector.select(max(0.0, min(deadline, look) - now)):
                    if key.fileobj is link:
                        self.end(link.recv(1024))
                    elif key.fileobj is upstream:  # nothing is sent during a run, so this is the caller's end
                        sys.exit()
                    elif not (self.hear() if key.fileobj is self.talk else self.drain(key.fd)):
                        selector.unregister(key.fileobj)
                if now >= look:
                    self.weigh()
                    look = now + PULSE
                if now >= deadline:
                    self.how = self.how or ("timeout", "wall clock")

    def send(self, kind: str, body: object) -> None:
        """Send one message, of any size, as a file; an answer to it has to give its number."""
        self.number = os.urandom(8).hex().encode()
        file = os.memfd_create("message")
        try:
            with open(file, "wb", closefd=False) as writer:
                marshal.dump((self.number.decode(), kind, body), writer)
            os.lseek(file, 0, os.SEEK_SET)
            socket.send_fds(self.talk, [b"."], [file])
        except OSError:  # it has ended, or hears nothing: the keeper, or the clock, will tell
            self.number = b""
        finally:
            os.close(file)

    def hear(self) -> bool:
        """Take one word of the program to the referee, and his back; return False at the end."""
        try:
            packet = self.talk.recv(1 << 17)
        except OSError:
            return False
        if packet == b"started":
            self.started = True
            return True
        number, _, words = packet.partition(b" ")
        status, _, text = words.decode(errors="replace").partition(" ")
        if number and number == self.number and status in (*referee.REPORTS, "tells", "asks"):
            self.answered = number
            try:
                self.send(*self.trial.send((status, text)))
            except StopIteration:
                self.how = self.how or ("exited", "")
        elif number and number == self.answered:  # the stage answers once: somebody answered in its stead
            self.how = self.how or ("tampered", "two answers to one message")
        else:
            self.garbage += 1
            if self.garbage > MOST_GARBAGE:
                self.how = "output", "words that answer nothing"
        return bool(packet)

    def drain(self, pipe: int) -> bool:
        """Read what a pipe holds, to just past the cap; return False at its end."""
        while sum(map(len, self.read.values())) <= self.cap:
            try:
                part = os.read(pipe, 1 << 16)
            except BlockingIOError:
                return True
            if not part:
                return False
            self.read[pipe] += part
        self.how = "output", f"more than {self.cap >> 10} KiB"
        return True

    def end(self, message: bytes) -> None:
        """Note how the process ended; what it said before counts."""
        while not self.how and self.hear():
            pass
        word, _, rest = message.partition(b" ")
        self.reaped = word == b"reaped"
        how = "sandbox", "its keeper was killed" if self.reaped else rest.decode(errors="replace")
        if word == b"ended":
            code, cpu_s = int(rest.split()[0]), float(rest.split()[1])
            how = "exited", f"exit code {os.waitstatus_to_exitcode(code)}"
            if os.WIFSIGNALED(code):
                number = os.WTERMSIG(code)
                how = "killed", f"signal {number} ({signal.strsignal(number)})"
                if number == signal.SIGXCPU or number == signal.SIGKILL and cpu_s > self.setup["limits"]["cpu_s"]:
                    how = "timeout", "CPU time"
        self.how = self.how or how

    def weigh(self) -> None:
        """End what holds more memory than it may, all its processes together; shared pages count once."""
        bound = self.setup["limits"]["memory_mb"] << 20
        pids = tree(self.keeper, self.setup)
        if sum(map(resident, pids)) > bound and sum(map(proportional, pids)) > bound:
            self.how = self.how or ("memory", "all processes together")

    def close(self) -> tuple[str, str]:
        """Return what is read from stdout and stderr, with what was still in the pipes."""
        for pipe in self.read:
            self.drain(pipe)
            os.close(pipe)
        self.talk.close()
        stdout, stderr = (bytes(part[: self.cap]).decode(errors="replace") for part in self.read.values())
        return stdout, stderr


def tree(keeper: int, setup: dict) -> list[int]:
    """Numbers of a run's processes: in a jail all but our own, elsewhere those that did not leave its session."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    if setup["isolated"]:
        return [pid for pid in pids if pid not in (1, os.getpid(), setup["zygote"])]
    return [pid for pid in pids if session(pid) == keeper]


def session(pid: int) -> int:
    """Session of a process; 0 when it is gone."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def resident(pid: int) -> int:
    """Bytes of memory that a process has resident, those that it shares included; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def proportional(pid: int) -> int:
    """Bytes of memory that a process has resident, of those that it shares only its part; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(b"Pss:")) * 1024
    except OSError:
        return 0
