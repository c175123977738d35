"""Why a response can stand in no pair: its form, or a verdict that is no fault of its own.

`pairs` counts the reasons. The form is asked of both sides, so that no habit of form tells chosen from rejected. A
response that failed is left out under more conditions than one that passed, because a sandbox also fails programs for
reasons of its own. That its tests check something was asked before they ran (`checks`).
"""

import re
from collections.abc import Sequence

from align_jax.records import Judged
from align_jax.synth import answers
from align_jax.text import Unusable

# The statuses that say that a program is wrong. Not "timeout" (the machine may have been busy), "memory" and "killed"
# (our limits) and "missing_package" (our machine): a wrong program may end so, and so may a right one.
REJECTABLE = ("assertion", "exception", "syntax", "output", "exited")

# What a program meets that wants more network, files, processes, threads or input than the sandbox gives, a module
# `__main__` or its own source there, or a runner that takes a skipped test for no failure.
_REFUSED = re.compile(r"\b(?:PermissionError|Connection\w*Error|gaierror|URLError|EOFError|BlockingIOError|SkipTest"
                      r"|RuntimeError: can't start new thread|OSError: could not get source code"
                      r"|AttributeError: .*'?__main__'?"
                      r"|OSError: \[Errno (?:1|11|13|24|27|28|30|97|99|101|111)\])")


def check(response: Judged, rejectable: Sequence[str] = REJECTABLE) -> str:
    """Return the program of a response whose verdict can label it.

    Raises:
      Unusable: "status ...", "refused by the sandbox", "truncated", "empty", or a reason of `answers.rewritten`.
    """
    if response.status not in ("passed", *rejectable):
        raise Unusable(f"status {response.status}", response.detail)
    if response.status == "exception" and _REFUSED.search(response.detail):
        raise Unusable("refused by the sandbox", response.detail)
    if response.finish != "stop":
        raise Unusable("truncated", f"finish is {response.finish!r}")
    if not target(response).strip():
        raise Unusable("empty", "nothing but white space" if response.solution_text is None else "nothing but tests")
    if isinstance(response.prompt, str) and response.solution_text is None:
        return response.prompt + target(response)
    is_begun = isinstance(response.prompt, list) and response.prompt[-1]["role"] == "assistant"
    return answers.rewritten((response.prompt[-1]["content"] if is_begun else "") + target(response)).program


def target(response: Judged) -> str:
    """What a pair shows of a response: its completion, without the tests that it wrote."""
    return response.completion if response.solution_text is None else response.solution_text
