"""Engines: one `generate` over the local sampler and over any OpenAI-compatible endpoint.

    who = engine.make("local", "CHECKPOINT", dtype="bfloat16")
    who = engine.make("endpoint", "MODEL", base_url="http://localhost:8000/v1", cache="runs/replies.sqlite")
    for name, completions in who.generate(prompts, n=4, temperature=0.8, top_p=1.0, max_tokens=512, stops=(), seed=0):

An endpoint is asked for many prompts at once. Every reply is on disk before anybody sees it, so that a killed run pays
for nothing twice; what fails for good is named at the end, when all else has been yielded.
"""

import asyncio
import contextlib
import dataclasses
import email.utils
import itertools
import json
import math
import os
import queue
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import anyio.from_thread
import jax
import openai
import tenacity
from aiolimiter import AsyncLimiter

from align_jax import hf, log, records
from align_jax.decode import Completion, Sampler
from align_jax.records import Text

# What becomes of a chat prompt that ends in an assistant message, the start of the answer. To OpenAI itself it is
# an answer that is over, and the model would begin another one: silently not what was asked.
PREFILL = {
    "refuse": {},
    "continue_final_message": {"continue_final_message": True, "add_generation_prompt": False},  # vLLM, SGLang
    "native": {},  # continued without being told: Anthropic, llama.cpp
}
FINISHES = ("stop", "length", "content_filter")
MAX_WAIT = 60.0  # seconds between two attempts; a server may ask for up to ten times as much
FIRST_ATTEMPTS = 4  # to connect to an endpoint that has not answered yet: a wrong address is known within seconds
SAY_EVERY = 15.0  # seconds between two words about what goes wrong
CHARS_PER_TOKEN = 3  # of code, on the low side; where the endpoint does not count


class Engine(Protocol):
    """What writes completions: a `Sampler`, or an `engine.Endpoint`."""

    def generate(self, prompts: Sequence[tuple[str, Text]], *, n: int, temperature: float, top_p: float,
                 max_tokens: int, limits: Mapping[str, int] | None, stops: Sequence[str],
                 seed: int) -> Iterator[tuple[str, list[Completion]]]:
        """Yield (id, n completions) for every (id, prompt), in any order; `limits` where not max_tokens counts."""

    def too_long(self, prompts: Sequence[tuple[str, Text]], *, max_tokens: int) -> set[str]:
        """The ids of prompts that leave no room for an answer; empty where only the endpoint knows."""


class Unanswered(ConnectionError):
    """Some prompts have no answer, by id in `failures`; all others were yielded, and asking again asks for these."""

    def __init__(self, failures: Mapping[str, str], *, by: str = "an endpoint", is_halted: bool = False):
        names = defaultdict(list)
        for name, why in failures.items():
            names[why].append(name)
        lines = [f"  {', '.join(of[:3])}{f' and {len(of) - 3} more' * (len(of) > 3)}: {why}"
                 for why, of in itertools.islice(names.items(), 20)]
        more = [f"  ... and {len(names) - 20} other reasons, in `failures`"] if len(names) > 20 else []
        super().__init__("\n".join([f"{len(failures)} prompt(s) without an answer by {by}:", *lines, *more]))
        self.failures = dict(failures)
        self.is_halted = is_halted  # some were not even asked: the budget is spent, or nothing was answered any more


def answered(who: Engine, prompts: Sequence[tuple[str, Text]], *, stop: bool = False,
             **settings) -> dict[str, list[Completion]]:
    """The completions of every prompt that is answered, by id.

    Raises:
      Unanswered: some were not even asked; or, with `stop`, were not answered.
    """
    found = {}
    try:
        found.update(who.generate(prompts, **settings))
    except Unanswered as error:
        if stop or error.is_halted:
            raise
    return found


class BadReply(RuntimeError):
    """A reply that is late or not what the interface promises; the next one may be."""


class Refused(RuntimeError):
    """A reply that no asking again would make usable."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible interface.

    Chat messages go to /chat/completions, plain text to /completions. Completions have text and finish
    ("content_filter" too), but no ids and logps. The seed of a request comes of (seed, id, k), so that nothing is asked
    for twice with one seed; whether it decides the answer is up to the endpoint.

    Raises:
      ValueError: settings that cannot work, all at once.
    """

    model: str
    _: dataclasses.KW_ONLY
    base_url: str
    cache: str | Path  # an SQLite file on a local disk; several processes may use it
    api_key_env: str | None = None  # the environment variable with the key; None: the endpoint wants none
    concurrency: int = 32  # requests under way
    choices: int = 16  # completions a request asks for at most; what is missing in the reply is asked for again
    timeout: float = 600.0  # seconds until a reply has to be complete
    attempts: int = 10
    backoff: float = 0.5  # seconds, doubled with every attempt up to MAX_WAIT; the wait is a random part of it
    give_up: int = 50  # failures for good in a row after which nothing more is asked
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # counted as providers do: prompt and max_tokens, used or not
    price_in: float = 0.0  # of a million tokens
    price_out: float = 0.0
    budget: float | None = None  # over all runs with this cache; what is under way when it is reached is still paid
    prefill: str = "refuse"
    max_stops: int = 4  # stop strings the endpoint takes; the others only cut what it wrote
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)  # {"max_tokens": "max_completion_tokens"}
    extra: Mapping = dataclasses.field(default_factory=dict)  # more fields of the request

    def __post_init__(self):
        wrong = []
        if self.prefill not in PREFILL:
            wrong.append(f"prefill: got {self.prefill!r}, available are {list(PREFILL)}")
        if self.api_key_env is not None and not self.api_key_env.isidentifier():
            wrong.append("api_key_env: expected the name of an environment variable, not a key")
        elif self.api_key_env is not None and not os.environ.get(self.api_key_env):
            wrong.append(f"api_key_env: the environment variable {self.api_key_env} is not set")
        if self.budget is not None and not (self.price_in or self.price_out):
            wrong.append(f"budget: got {self.budget} without price_in or price_out, nothing would ever be spent")
        if not self.base_url:
            wrong.append("base_url: expected the endpoint's address, such as http://localhost:8000/v1")
        wrong += [f"{key}: got {getattr(self, key)}, expected 1 or more"
                  for key in ("concurrency", "choices", "attempts", "give_up") if getattr(self, key) < 1]
        if jax.process_count() > 1:
            wrong.append(f"{jax.process_count()} hosts would each ask and pay for everything; expected one")
        if wrong:
            raise ValueError("endpoint: " + "; ".join(wrong))

    def generate(self, prompts: Sequence[tuple[str, Text]], *, n: int = 1, temperature: float = 1.0,
                 top_p: float = 1.0, max_tokens: int = 256, limits: Mapping[str, int] | None = None,
                 stops: Sequence[str] = (), seed: int = 0) -> Iterator[tuple[str, list[Completion]]]:
        """Yield (id, n completions) for every (id, prompt), in the order in which they are finished.

        Raises:
          ValueError: before anything is asked: an id twice, or prompts that the endpoint could not continue.
          Unanswered: after everything else: prompts that failed for good, or were not asked any more.
        """
        self._check(prompts)
        limits = limits or {}
        settings = {"temperature": temperature, "stop": list(stops[:self.max_stops]),
                    "top_p": top_p if top_p < 1 else None}  # some refuse to be told both
        requests = [self._request(name, prompt, settings | {"max_tokens": limits.get(name, max_tokens)}, seed)
                    for name, prompt in prompts]
        done = queue.SimpleQueue()
        call = _Call(self, requests, n, done.put)
        try:
            with anyio.from_thread.start_blocking_portal() as portal:  # leaving it early cancels what is under way
                asking = portal.start_task_soon(call.run)
                asking.add_done_callback(lambda _: done.put(None))
                for name, written in iter(done.get, None):
                    yield name, [_cut(text, finish, stops) for text, finish in written]
                asking.result()
        finally:
            log.say(f"{self.model}: {call.summary()}")
        if call.failures:
            raise Unanswered(call.failures, by=f"{self.model} at {self.base_url}", is_halted=call.is_halted)

    def too_long(self, prompts: Sequence[tuple[str, Text]], *, max_tokens: int) -> set[str]:
        """None that is known before it is asked."""
        return set()

    def _check(self, prompts) -> None:
        wrong = [f"{name}: {count} prompts of this id" for name, count in Counter(name for name, _ in prompts).items()
                 if count > 1]
        if self.prefill == "refuse":
            wrong += [f"{name}: ends in an assistant message, which not every endpoint continues; see `prefill`, "
                      f"available are {list(PREFILL)}" for name, prompt in prompts if _is_prefilled(prompt)]
        if wrong:
            raise ValueError(f"{len(wrong)} prompt(s) cannot be asked: {'; '.join(wrong[:5])}")

    def _request(self, name: str, prompt: Text, settings: Mapping, seed: int) -> "_Request":
        fields = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
        fields |= {key: value for key, value in settings.items() if value not in (None, [])}
        fields |= (PREFILL[self.prefill] if _is_prefilled(prompt) else {}) | self.extra
        size = len(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False))
        return _Request(name, fields, seed, records.fingerprint(self.base_url, self.model, self.rename, fields, name,
                                                                seed), size // CHARS_PER_TOKEN + 1)


@dataclasses.dataclass(frozen=True)
class _Request:
    """What is asked for one prompt, but for how many choices; `size` estimates the prompt's tokens."""

    name: str
    fields: dict
    seed: int
    key: str
    size: int

    def tokens(self, num_choices: int) -> int:
        """What it may take, as providers count it."""
        return self.size + num_choices * self.fields["max_tokens"]

    def body(self, model: str, ks: Sequence[int], rename: Mapping[str, str]) -> dict:
        """The fields of the request for completions `ks`; a field renamed to "" is left out."""
        seed = int(records.fingerprint(self.seed, self.name, ks[0]), 16) % 2**31
        fields = {"model": model, **self.fields, "seed": seed} | ({"n": len(ks)} if len(ks) > 1 else {})
        return {rename.get(key, key): value for key, value in fields.items() if rename.get(key, key)}


class _Call:
    """One `generate`: its jobs, each some completions of one prompt; what they cost; what failed."""

    def __init__(self, endpoint: Endpoint, requests: Sequence[_Request], n: int, emit: Callable):
        self.endpoint, self.requests, self.n, self.emit = endpoint, requests, n, emit
        self.failures, self.failures_in_a_row, self.is_halted = {}, 0, False
        self.counts, self.again, self.jobs_left, self.spent = Counter(), Counter(), {}, 0.0
        self.is_reached, self.said = False, -math.inf  # by any reply, also one that refuses; when trouble was told of

    async def run(self) -> None:
        """Ask for everything that the cache does not have."""
        e = self.endpoint
        largest = max((r.tokens(min(e.choices, self.n)) for r in self.requests), default=1)
        self.pacers = _pacer(e.requests_per_minute, 1), _pacer(e.tokens_per_minute, largest)
        key = os.environ[e.api_key_env] if e.api_key_env else "none"  # else the client would take OPENAI_API_KEY
        # The client's own retries would not see a bad reply, and not wait for the rate limits.
        client = openai.AsyncOpenAI(base_url=e.base_url, api_key=key, max_retries=0, timeout=None)
        with contextlib.closing(_Cache(Path(e.cache))) as self.cache:
            async with client as self.client, asyncio.TaskGroup() as group:
                jobs = self._jobs()
                for _ in range(e.concurrency):
                    group.create_task(self._work(jobs))

    def _jobs(self) -> Iterator[tuple[_Request, list[int]]]:
        """Emit what the cache has whole; yield (request, ks) for the rest."""
        for request in self.requests:
            found = self.cache.get(request.key)
            missing = [k for k in range(self.n) if k not in found]
            parts = [missing[at:at + self.endpoint.choices] for at in range(0, len(missing), self.endpoint.choices)]
            self.jobs_left[request.name] = len(parts)
            if not parts:
                self.counts["from the cache"] += 1
                self._emit(request)
            yield from ((request, ks) for ks in parts)

    async def _work(self, jobs: Iterator) -> None:
        for request, ks in jobs:
            try:
                while ks and not self._halted(request):
                    ks = ks[await self._ask(request, ks):]
            except (openai.OpenAIError, BadReply, Refused) as error:
                cause = f" ({error.__cause__})" if error.__cause__ else ""
                self.is_reached |= not _is_nobody_there(error)
                self.failures[request.name] = f"{type(error).__name__}: {error}{cause}"[:500]
                self.failures_in_a_row += 1
            if not ks:
                self.jobs_left[request.name] -= 1
                if not self.jobs_left[request.name]:
                    self._emit(request)

    def _emit(self, request: _Request) -> None:
        found = self.cache.get(request.key)  # also where another process was first: on disk is what counts
        self.emit((request.name, [found[k] for k in range(self.n)]))

    def _halted(self, request: _Request) -> bool:
        budget, why = self.endpoint.budget, None
        if budget is not None and self.cache.spent() >= budget:
            why = f"the budget of {budget} is spent"
        elif self.failures and not self.is_reached:
            why = "nobody was there"
        elif self.failures_in_a_row >= self.endpoint.give_up:
            why = f"{self.failures_in_a_row} requests failed in a row"
        if why:
            self.is_halted = True
            self.failures.setdefault(request.name, f"not asked any more, {why}")
        return bool(why)

    async def _ask(self, request: _Request, ks: list[int]) -> int:
        """Ask for completions `ks`, until something comes; return how many came."""
        again = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(_may_pass), stop=self._is_enough, before_sleep=self._tell, reraise=True,
            wait=tenacity.wait_random_exponential(self.endpoint.backoff, MAX_WAIT) + _wanted_wait)
        num_written = await again(self._try, request, ks)
        self.failures_in_a_row, self.is_reached = 0, True
        return min(len(ks), num_written)

    def _is_enough(self, state: tenacity.RetryCallState) -> bool:
        self.is_reached |= not _is_nobody_there(state.outcome.exception())
        attempts = self.endpoint.attempts
        return state.attempt_number >= (attempts if self.is_reached else min(attempts, FIRST_ATTEMPTS))

    def _tell(self, state: tenacity.RetryCallState) -> None:
        """Count an attempt that failed, and say so now and then."""
        error = state.outcome.exception()
        self.again[type(error).__name__] += 1
        if time.monotonic() - self.said > SAY_EVERY:
            self.said = time.monotonic()
            log.say(f"{self.endpoint.model} at {self.endpoint.base_url}: asking again after {str(error)[:200]!r}; "
                    f"so far {dict(self.again.most_common())}")

    async def _try(self, request: _Request, ks: list[int]) -> int:
        """Send one request, keep what was written and what it cost; return how many completions came."""
        for pacer, amount in zip(self.pacers, (1, request.tokens(len(ks))), strict=True):
            if pacer:
                await pacer.acquire(amount)
        body = request.body(self.endpoint.model, ks, self.endpoint.rename)
        kind = "messages" if "messages" in body else "prompt"
        create = self.client.chat.completions.create if kind == "messages" else self.client.completions.create
        known = {key: body.pop(key) for key in ("model", kind)}
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                reply = await create(**known, extra_body=body)
        except TimeoutError as error:
            raise BadReply(f"not whole within {self.endpoint.timeout} s") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BadReply("no JSON") from error
        written = []
        try:
            written = _read(reply, is_chat=kind == "messages")
        finally:  # a reply that is of no use was paid for as well
            used = (getattr(getattr(reply, "usage", None), f"{what}_tokens", None) for what in ("prompt", "completion"))
            guess = request.size, sum(len(text) // CHARS_PER_TOKEN + 1 for text, _ in written)
            self._keep(request, dict(zip(ks, written, strict=False)),
                       *(n if isinstance(n, int) else guessed for n, guessed in zip(used, guess, strict=True)))
        return len(written)

    def _keep(self, request: _Request, written: dict[int, tuple[str, str]], tokens_in: int, tokens_out: int) -> None:
        cost = (tokens_in * self.endpoint.price_in + tokens_out * self.endpoint.price_out) / 1e6
        self.cache.put(request.key, written, tokens_in, tokens_out, cost)
        self.counts.update({"replies": 1, "tokens in": tokens_in, "tokens out": tokens_out})
        self.spent += cost

    def summary(self) -> str:
        """Say what was asked and what it cost."""
        counts = {what: f"{self.counts[what]:,}" for what in ("replies", "from the cache", "tokens in", "tokens out")}
        return (f"{counts['replies']} replies, {counts['from the cache']} prompts from the cache, asked again "
                f"{dict(self.again.most_common()) or 'never'}, {len(self.failures)} prompts failed; "
                f"{counts['tokens in']} tokens in, {counts['tokens out']} out, cost {self.spent:.4g}")


class _Cache:
    """Completions on disk by (request, k), and what they cost; every reply is one transaction."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=60)
        with self._db:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing
            self._db.execute("CREATE TABLE IF NOT EXISTS completions (key TEXT, k INTEGER, text TEXT, finish TEXT, "
                             "PRIMARY KEY (key, k)) WITHOUT ROWID")
            self._db.execute("CREATE TABLE IF NOT EXISTS spent (one INTEGER PRIMARY KEY, tokens_in INTEGER, "
                             "tokens_out INTEGER, cost REAL)")
            self._db.execute("INSERT OR IGNORE INTO spent VALUES (1, 0, 0, 0)")

    def get(self, key: str) -> dict[int, tuple[str, str]]:
        """The completions of a request, by k."""
        rows = self._db.execute("SELECT k, text, finish FROM completions WHERE key = ?", (key,))
        return {k: (text, finish) for k, text, finish in rows}

    def put(self, key: str, found: Mapping[int, tuple[str, str]], *cost: float) -> None:
        """Keep completions, unless another process was first, and add tokens in, tokens out and cost to the sums."""
        with self._db:
            self._db.executemany("INSERT OR IGNORE INTO completions VALUES (?, ?, ?, ?)",
                                 [(key, k, text, finish) for k, (text, finish) in found.items()])
            self._db.execute("UPDATE spent SET tokens_in = tokens_in + ?, tokens_out = tokens_out + ?, "
                             "cost = cost + ?", cost)

    def spent(self) -> float:
        """The cost of everything in the cache."""
        return self._db.execute("SELECT cost FROM spent").fetchone()[0]

    def close(self) -> None:
        self._db.close()


def _read(reply, *, is_chat: bool) -> list[tuple[str, str]]:
    """The (text, finish) of every choice.

    Raises:
      BadReply: nothing that could be read.
      Refused: it ended in a way that is no answer, such as a call of a tool.
    """
    try:
        found = [((choice.message.content if is_chat else choice.text) or "", choice.finish_reason)
                 for choice in reply.choices]
    except (AttributeError, TypeError) as error:
        raise BadReply(f"no choices in {str(reply)[:200]!r}") from error
    if not found or not all(isinstance(text, str) for text, _ in found):
        raise BadReply(f"no text in {str(reply)[:200]!r}")
    other = sorted({str(finish) for _, finish in found if finish not in FINISHES})
    if other:
        raise Refused(f"finish_reason: got {other}, expected one of {FINISHES}")
    # JSON can spell half a surrogate pair, an emoji that max_tokens cut through: no file and no tokenizer takes it.
    return [(text.encode("utf-8", "replace").decode(), finish) for text, finish in found]


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, openai.APIStatusError):  # 425: too early
        passing = error.status_code in (408, 409, 425, 429) or error.status_code >= 500
        return passing and error.code != "insufficient_quota"
    return isinstance(error, openai.APIConnectionError | BadReply)


def _is_nobody_there(error: BaseException) -> bool:
    return type(error.__cause__).__name__ == "ConnectError"  # of httpx or httpx2, as the client's version has it


def _wanted_wait(retry_state: tenacity.RetryCallState) -> float:
    """The seconds of a Retry-After header, which is a number or a date; 0 without one."""
    error = retry_state.outcome.exception()
    value = error.response.headers.get("retry-after", "0") if isinstance(error, openai.APIStatusError) else "0"
    date = email.utils.parsedate_tz(value)
    try:
        seconds = email.utils.mktime_tz(date) - time.time() if date else float(value)
    except ValueError:
        return 0.0
    return min(max(seconds, 0.0), 10 * MAX_WAIT)


def _pacer(per_minute: float | None, largest: float) -> AsyncLimiter | None:
    """A limiter that lets through the largest amount at once, and no more than a minute's in any minute beside it."""
    return AsyncLimiter(largest, 60 * largest / per_minute) if per_minute else None


def _is_prefilled(prompt: Text) -> bool:
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def _cut(text: str, finish: str, stops: Sequence[str]) -> Completion:
    """End a text before its first stop string: endpoints differ in how many they take and whether they leave it."""
    at = min((found for found in map(text.find, stops) if found >= 0), default=None)
    return Completion(text[:at], finish if at is None else "stop", [], [])


ENGINES = {"local": Sampler.load, "endpoint": Endpoint}
DECIDING = {"local": ("dtype",), "endpoint": ("base_url", "prefill", "rename", "extra")}


def make(kind: str, model: str, **settings) -> Sampler | Endpoint:
    """Make an engine: `model` is a checkpoint's folder for "local", a name for "endpoint".

    Raises:
      ValueError: no such kind.
    """
    if kind not in ENGINES:
        raise ValueError(f"engine: got {kind!r}, available are {list(ENGINES)}")
    return ENGINES[kind](model, **settings)


def identity(kind: str, model: str, **settings) -> dict:
    """What of an engine its answers depend on, to bind a run folder to: the model and the deciding settings."""
    who = hf.fingerprint(model) if kind == "local" else model
    return {"kind": kind, "model": who} | {key: settings[key] for key in DECIDING.get(kind, ()) if key in settings}
