"""Where a program runs: in its own process it does what the warden sends, and says what became of it.

It binds what it needs from the modules that the program can change, and its builtins are a copy; but it shares an
interpreter with the program, so nothing here is trusted: referee.py tells what is made of what it says.
"""

import ast
import marshal
import operator
import os
import random
import socket
import struct
import sys
from collections.abc import Callable, Iterator

from align_jax.jail import referee

PROGRAM = "<program>"
draw = random.SystemRandom().sample
PLAIN = (int, float, str, bytes, bool, type(None), list, tuple, set, dict)
FAILURES = (
    (AssertionError, "assertion"),
    (ModuleNotFoundError, "missing_package"),
    (MemoryError, "memory"),
    (SystemExit, "exited"),
)


class Stage:
    """Where a program runs. It binds what it needs from the modules that the program can change."""

    def __init__(self, channel: socket.socket):
        self.channel, self.number, self.pid = channel, "", os.getpid()
        self.module = sys.modules["candidate"] = type(sys)("candidate")
        self.write, self.leave, self.whoami = os.write, os._exit, os.getpid
        self.load, self.unpack, self.trace = marshal.loads, struct.unpack, sys.settrace

    def play(self) -> None:
        """Run what is sent, and say what became of it, until nothing more is sent."""
        self.write(3, b"started")
        while True:
            kind, body = self.hear()
            if kind == "program":
                self.say(*self.attempt(body))
            else:
                vars(self.module).update({referee.TELL: self.tell, referee.REAL: real})
                self.say(*self.execute(body))

    def hear(self) -> tuple[str, object]:
        """Wait for a message of the warden; leave when there is none."""
        _, ancillary, *_ = self.channel.recvmsg(1, 64)
        if not ancillary:
            self.leave(0)
        with open(self.unpack("i", ancillary[0][2])[0], "rb") as file:
            self.number, kind, body = self.load(file.read())
        return kind, body

    def say(self, status: str, text: str = "") -> None:
        """Answer the last message; a child that the program forked and left running here has nothing to say."""
        if self.whoami() != self.pid:
            self.leave(0)
        self.write(3, f"{self.number} {status} {text}".encode("ascii", "backslashreplace"))

    def attempt(self, source: str) -> referee.Outcome:
        """Compile and run the program's text."""
        try:
            tree = compile(source, PROGRAM, "exec", ast.PyCF_ONLY_AST, True)
            code = compile(tree, PROGRAM, "exec", 0, True)
        except Exception as error:
            return "syntax", described(error)
        return self.execute(code) if tree.body else ("exception", "empty program")

    def execute(self, code) -> referee.Outcome:
        """Run code in the program's module and name what became of it."""
        self.trace(None)  # a trace function can step over an assert
        try:
            exec(code, vars(self.module))
        except BaseException as error:
            status = next((status for kind, status in FAILURES if isinstance(error, kind)), "exception")
            return status, "MemoryError" if status == "memory" else described(error)
        return "passed", ""

    def tell(self, value: object) -> object:
        """Have the warden judge an assert by a value; judge it here where that is no plain data."""
        text = written(value)
        self.say("asks" if text is None else "tells", text or "")
        kind, body = self.hear()
        return body if kind == "answer" else eval(body, {"__builtins__": {"set": set}, referee.VALUE: value})


def described(error: BaseException) -> str:
    """An exception in one line, also where the program's own has no good `__str__`."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())[:500]
    except BaseException:
        return "unprintable"


def inside(value: object, most: int) -> list[object]:
    """The value and all in it, through the built-in containers, up to some number."""
    found = [value]
    for item in found:
        if len(found) > most:
            break
        if type(item) in (list, tuple, set, frozenset):
            found += item
        elif type(item) is dict:
            found += item
            found += item.values()
    return found


def written(value: object) -> str | None:
    """Plain data as text that `ast.literal_eval` turns into an equal value; None for anything else."""
    parts = inside(value, 20_000)
    if len(parts) > 20_000 or not all(type(part) in PLAIN for part in parts):
        return None
    if any(type(part) is float and part - part != 0 for part in parts):  # inf and nan
        return None
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a list within itself
        return None
    return text if len(text) < 50_000 else None


def real(value: object) -> object:
    """Return the value; raise AssertionError where anything in it passes for two things that differ."""
    odd = [part for part in inside(value, 1000) if type(part) not in (*PLAIN, frozenset)]
    probes = [*doubles()] if odd else []
    for part in odd[:20]:  # for every comparison that a test makes: no more
        if any(all(_is_true(passes, part, one) for one in two) for passes, two in probes):
            raise AssertionError("equal to anything")
    return value


def doubles() -> Iterator[tuple[Callable, tuple]]:
    """Comparisons, each with two objects that differ and that nobody could know: not both can hold."""
    few, many = draw(range(-9, 99), 2), draw(range(10**9), 2)
    words = [f"{number:x}" for number in many]
    kinds = [(object(), object()), (True, False), few, many, [n / 7 for n in many], words,
             *(list(map(make, words)) for make in (str.encode, list, tuple, set, dict.fromkeys))]
    yield operator.contains, kinds[0]
    for two in kinds:
        yield operator.eq, two
        yield (lambda a, b: not a != b), two


def _is_true(passes: Callable, part: object, other: object) -> bool:
    try:
        return passes(part, other) is True
    except Exception:  # it refuses
        return False
