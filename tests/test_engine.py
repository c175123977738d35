"""Engines: transformers' own server against our sampler; servers that fail in every way: nothing lost or doubled."""

import contextlib
import email.utils
import inspect
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from align_jax import decode, engine, records, sample
from align_jax.decode import Completion
from align_jax.score import evalplus

ROOT = Path(__file__).parents[1]
INSTRUCT = ROOT / "align_jax" / "pocket" / "pocket-instruct"
ASK = {"n": 1, "temperature": 0.8, "top_p": 1.0, "max_tokens": 16, "stops": (), "seed": 0}

# --- a server to be asked -------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """An endpoint in which every choice is another text; `behave(body, how often this prompt came)` names a fault."""

    daemon_threads, request_queue_size = True, 256

    def __init__(self, behave=lambda body, times: "answer", delay: float = 0.0):
        super().__init__(("127.0.0.1", 0), Answering)
        self.behave, self.delay = behave, delay
        self.bodies, self.paths, self.headers, self.arrivals = [], [], [], []
        self.times, self.serial = Counter(), itertools.count()
        self.lock, self.over = threading.Lock(), threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """Clients that hang up are a part of these tests."""


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.paths.append(self.path)
            server.headers.append(self.headers)
            server.arrivals.append(time.monotonic())
            server.times[prompt_of(body)] += 1
            times = server.times[prompt_of(body)]
        server.over.wait(server.delay)
        FAULTS[server.behave(body, times)](self, body)

    def send(self, status: int, content: bytes, *, length: int = 0, **headers):
        self.send_response(status)
        length = length or len(content)
        for key, value in ({"content_type": "application/json", "content_length": length} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def answer(self, body, *, count=None, finish="stop", text=None) -> bytes:
        count = body.get("n", 1) if count is None else count
        texts = [text or f"{prompt_of(body)}#{next(self.server.serial)}" for _ in range(count)]
        choices = [{"index": i, "finish_reason": finish, "text": t, "message": {"role": "assistant", "content": t}}
                   for i, t in enumerate(texts)]
        return json.dumps({"id": "x", "object": "x", "created": 0, "model": "m", "choices": choices, "usage": {
            "prompt_tokens": 10, "completion_tokens": 5 * count, "total_tokens": 0}}).encode()


def prompt_of(body: dict) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][0]["content"]


def changed(reply: bytes, **fields) -> bytes:
    """A reply whose choices have other fields."""
    reply = json.loads(reply)
    return json.dumps(reply | {"choices": [choice | fields for choice in reply["choices"]]}).encode()


def hang_up(handler, content: bytes = b"", length: int = 0):
    if content:
        handler.send(200, content, length=length)
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # RST, not FIN
    handler.connection.close()


def error(status: int, code: str = "", **headers):
    content = json.dumps({"error": {"message": f"status {status}", "code": code}}).encode()
    return lambda handler, body: handler.send(status, content, **headers)


def in_two_seconds() -> str:
    return email.utils.formatdate(time.time() + 2)


FAULTS = {
    "answer": lambda handler, body: handler.send(200, handler.answer(body)),
    "fewer": lambda handler, body: handler.send(200, handler.answer(body, count=min(2, body.get("n", 1)))),
    "more": lambda handler, body: handler.send(200, handler.answer(body, count=body.get("n", 1) + 3)),
    "none": lambda handler, body: handler.send(200, handler.answer(body, count=0)),
    "length": lambda handler, body: handler.send(200, handler.answer(body, finish="length")),
    "filter": lambda handler, body: handler.send(200, handler.answer(body, finish="content_filter")),
    "tool": lambda handler, body: handler.send(200, handler.answer(body, finish="tool_calls")),
    "code": lambda handler, body: handler.send(200, handler.answer(body, text="def f():\n    pass\n\nassert f()\n")),
    "429": error(429), "429 in 1 s": error(429, retry_after=1), "quota": error(429, "insufficient_quota"),
    "429 at a date": lambda handler, body: error(429, retry_after=in_two_seconds())(handler, body),
    "500": error(500), "503": error(503), "400": error(400), "401": error(401),
    "html": lambda handler, body: handler.send(200, b"<html>busy</html>", content_type="text/html"),
    "half": lambda handler, body: handler.send(200, handler.answer(body)[:60]),
    "no utf-8": lambda handler, body: handler.send(200, b'{"choices": "\xff\xfe"}'),
    "list": lambda handler, body: handler.send(200, b'[1, 2]'),
    "empty": lambda handler, body: handler.send(200, b"{}"),
    "odd choices": lambda handler, body: handler.send(200, b'{"choices": ["a", "b"]}'),
    "odd text": lambda handler, body: handler.send(200, changed(handler.answer(body), text=["a"], message={
        "content": {"a": 1}})),
    "odd end": lambda handler, body: handler.send(200, changed(handler.answer(body), finish_reason=["stop"])),
    "half a character": lambda handler, body: handler.send(200, handler.answer(body, text="smile \ud83d")),
    "odd usage": lambda handler, body: handler.send(200, json.dumps(
        json.loads(handler.answer(body)) | {"usage": {"prompt_tokens": None}}).encode()),
    "reset": lambda handler, body: hang_up(handler),
    "cut": lambda handler, body: hang_up(handler, handler.answer(body)[:60], 600),
    "hang": lambda handler, body: handler.server.over.wait(20),
}
PASSING = ["429", "500", "503", "none", "html", "half", "no utf-8", "list", "empty", "odd choices", "odd text", "reset",
           "cut"]


@contextlib.contextmanager
def serving(behave=lambda body, times: "answer", **settings):
    server = Server(behave if callable(behave) else lambda body, times: behave, **settings)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def endpoint(tmp_path):
    """Make an endpoint of a server, impatient as a test."""
    def of(server: Server, **settings) -> engine.Endpoint:
        return engine.make("endpoint", "m", **{"base_url": server.url, "cache": tmp_path / "replies.sqlite",
                                               "backoff": 0.01} | settings)
    return of


def named(count: int, prefix: str = "p") -> list[tuple[str, str]]:
    return [(f"{prefix}{i}", f"prompt {prefix}{i}") for i in range(count)]


def check_whole(found: list, prompts: list, n: int) -> None:
    """Every prompt once, n completions each, of its own, and no completion twice."""
    assert sorted(name for name, _ in found) == sorted(name for name, _ in prompts)
    texts = [c.text for _, completions in found for c in completions]
    assert len(texts) == len(set(texts)) == n * len(prompts)
    assert all(c.text.startswith(dict(prompts)[name] + "#") for name, completions in found for c in completions)


# --- a server that nobody here wrote --------------------------------------------------------------


@pytest.fixture(scope="module")
def eager(tmp_path_factory) -> Path:
    """pocket-instruct with a template that begins every answer, which else may be over after a word."""
    folder = shutil.copytree(INSTRUCT, tmp_path_factory.mktemp("eager") / "model")
    with (folder / "chat_template.jinja").open("a") as template:
        template.write("{% if add_generation_prompt %}```python\ndef {% endif %}")
    return folder


@pytest.fixture(scope="module")
def transformers_serve(eager, tmp_path_factory):
    """`transformers serve`, in fp32 as our sampler below."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("transformers"), "serve", eager, "--device", "cpu", "--dtype", "float32",
             "--host", "127.0.0.1", "--port", str(port)], stdout=out, stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while not is_up(url):
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(20)


def is_up(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
        return True
    return False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_greedy_answers_of_transformers_serve_are_the_samplers_token_for_token(chat, eager, transformers_serve,
                                                                              one_device, tmp_path):
    problems = evalplus.problems("PocketEval", ROOT / "align_jax" / "pocket" / "PocketEval.jsonl.gz")[:8]
    prompts = [(p.task_id, evalplus.prompt(p, chat=chat)) for p in problems]
    prompts = [(name, prompt[:1] if chat else prompt) for name, prompt in prompts]
    settings = ASK | {"temperature": 0.0, "max_tokens": 32}
    local = engine.make("local", eager, dtype="float32", batch_size=8)
    remote = engine.make("endpoint", str(eager), base_url=transformers_serve, cache=tmp_path / "c", concurrency=4)
    ours, theirs = dict(local.generate(prompts, **settings)), dict(remote.generate(prompts, **settings))
    for name, _ in prompts:
        (mine,), (their,) = ours[name], theirs[name]
        assert mine.text == their.text
        # An EOS as the last token that is allowed is to them a cut.
        assert their.finish == ("length" if len(mine.ids) == 32 else mine.finish)
    with sqlite3.connect(tmp_path / "c") as db:
        tokens = db.execute("SELECT tokens_out FROM spent").fetchone()[0]
    assert tokens == sum(len(c.ids) for cs in ours.values() for c in cs) > 120

    # Its stop strings stay in its text; and it knows no `n`, so that it is asked again for the rest.
    stops = ["return", "\n\n"]
    ours, theirs = (dict(who.generate(prompts[:4], **settings | {"stops": stops, "n": 2})) for who in (local, remote))
    assert all(len(cs) == 2 for cs in theirs.values())
    assert {k: [c.text for c in v] for k, v in ours.items()} == {k: [c.text for c in v] for k, v in theirs.items()}


# --- nothing lost, nothing doubled ----------------------------------------------------------------


@pytest.mark.parametrize("fault", PASSING)
def test_a_failure_that_passes_is_asked_again(fault, endpoint):
    with serving(lambda body, times: fault if times <= 2 else "answer") as server:
        check_whole(list(endpoint(server).generate(named(3), **ASK | {"n": 2})), named(3), 2)
        assert set(server.times.values()) == {3}


@pytest.mark.timeout(600)
def test_200_prompts_with_every_failure_at_random(endpoint, capsys):
    faults = [*PASSING, "fewer", "fewer", "answer", "answer"]

    def behave(body, times):
        if times == 1 and prompt_of(body).endswith("99"):
            return "hang"
        return "answer" if times > 7 else random.Random(f"{prompt_of(body)}/{times}").choice(faults)

    with serving(behave) as server:
        who = endpoint(server, timeout=5.0, attempts=50)  # on a busy machine honest replies are late as well
        found = list(who.generate(named(200), **ASK | {"n": 5}))
        asked = len(server.bodies)
        assert list(endpoint(server).generate(named(200), **ASK | {"n": 5})) == sorted(
            found, key=lambda item: int(item[0][1:]))
        assert len(server.bodies) == asked
    check_whole(found, named(200), 5)
    assert "replies, 0 prompts from the cache" in (said := capsys.readouterr().out)
    assert "0 replies, 200 prompts from the cache, asked again never, 0 prompts failed" in said


@pytest.mark.parametrize("fault", ["429 in 1 s", "429 at a date"])
def test_retry_after_is_waited_for(fault, endpoint):
    with serving(lambda body, times: fault if times == 1 else "answer") as server:
        list(endpoint(server).generate(named(1), **ASK))
        assert server.arrivals[1] - server.arrivals[0] > 0.95


def test_fewer_and_more_choices_than_asked_for(endpoint):
    with serving("fewer") as server:
        check_whole(list(endpoint(server, concurrency=1).generate(named(1), **ASK | {"n": 5})), named(1), 5)
        assert [body.get("n") for body in server.bodies] == [5, 3, None]
        assert len({body["seed"] for body in server.bodies}) == 3
    with serving("more") as server:
        check_whole(list(endpoint(server).generate(named(2, "q"), **ASK | {"n": 5})), named(2, "q"), 5)
    with serving() as server:
        check_whole(list(endpoint(server, choices=2).generate(named(3, "r"), **ASK | {"n": 5})), named(3, "r"), 5)
        assert Counter(body.get("n") for body in server.bodies) == {2: 6, None: 3}


def test_what_fails_for_good_is_named_at_the_end_and_all_else_is_kept(endpoint, tmp_path):
    bad = {"prompt p3": "400", "prompt p11": "tool", "prompt p17": "500", "prompt p19": "odd end"}
    with serving(lambda body, times: bad.get(prompt_of(body), "answer")) as server:
        found, who = [], endpoint(server, attempts=3)
        with pytest.raises(engine.Unanswered, match=r"4 prompt\(s\) without an answer") as caught:
            found.extend(who.generate(named(20), **ASK))
        assert caught.value.failures.keys() == {"p3", "p11", "p17", "p19"}
        for name, why in (("p3", "status 400"), ("p11", "tool_calls"), ("p17", "status 500")):
            assert f"  {name}: " in str(caught.value) and why in caught.value.failures[name]
        check_whole(found, [p for p in named(20) if p[0] not in caught.value.failures], 1)
        assert (server.times["prompt p3"], server.times["prompt p11"], server.times["prompt p17"]) == (1, 1, 3)
        bad.clear()
        check_whole(list(who.generate(named(20), **ASK)), named(20), 1)
        assert sum(server.times.values()) == 16 + 6 + 4


@pytest.mark.parametrize("fault", ["401", "quota"])
def test_an_endpoint_that_only_fails_is_left_alone(fault, endpoint):
    with serving(fault) as server:
        with pytest.raises(engine.Unanswered, match="100 prompt.*without") as caught:
            list(endpoint(server, give_up=5, concurrency=3).generate(named(100), **ASK))
        assert 5 <= len(server.bodies) <= 7
        assert Counter("not asked any more, 5" in why for why in caught.value.failures.values())[True] > 90


def test_where_nobody_listens_is_said_after_a_few_attempts(endpoint, capsys):
    with serving() as server:
        pass  # the port is closed now
    with pytest.raises(engine.Unanswered, match=f"100 prompt.*without an answer by m at {server.url}") as caught:
        list(endpoint(server, backoff=0.01, concurrency=3).generate(named(100), **ASK))
    said = capsys.readouterr().out
    assert "asking again after 'Connection error.'" in said and "failed; 0 tokens in" in said
    assert said.count("asking again") == 1  # and not once a request
    counts = Counter(caught.value.failures.values())
    assert counts["not asked any more, nobody was there"] == 97 and len(str(caught.value).splitlines()) == 3
    assert ": APIConnectionError: Connection error. (All connection attempts failed)" in str(caught.value)


def test_answers_come_as_they_are_finished(endpoint):
    with serving(lambda body, times: "hang" if "p0" in prompt_of(body) else "answer") as server:
        answers = endpoint(server).generate(named(4), **ASK)
        assert {next(answers)[0] for _ in range(3)} == {"p1", "p2", "p3"}
        began = time.monotonic()
        answers.close()  # who leaves early does not wait for what is under way
        assert time.monotonic() - began < 15


# --- the cache ------------------------------------------------------------------------------------


CHILD = """
import sys
from align_jax import engine
url, cache, count = sys.argv[1:]
who = engine.make("endpoint", "m", base_url=url, cache=cache, concurrency=4)
prompts = [(f"p{i}", f"prompt p{i}") for i in range(int(count))]
for name, completions in who.generate(prompts, n=3, temperature=0.8, top_p=1.0, max_tokens=16, stops=(), seed=0):
    print(name, *(c.text.split("#")[1] for c in completions), flush=True)
"""


def child(server: Server, cache: Path, count: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, server.url, cache, str(count)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.timeout(300)
def test_a_killed_run_asks_for_nothing_twice(endpoint, tmp_path):
    cache = tmp_path / "replies.sqlite"
    with serving(delay=0.05) as server:
        process = child(server, cache, 60)
        seen = dict(process.stdout.readline().split(maxsplit=1) for _ in range(15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        with sqlite3.connect(cache) as db:
            kept = db.execute("SELECT count(*) FROM completions").fetchone()[0] // 3
        first = Counter(server.times)
        assert len(seen) <= kept < 60 and len(first) - kept <= 4
        found = list(endpoint(server).generate(named(60), **ASK | {"n": 3}))
        check_whole(found, named(60), 3)
        assert sum(server.times.values()) == sum(first.values()) + 60 - kept
        again = {name: " ".join(c.text.split("#")[1] for c in completions) for name, completions in found}
        assert {name: again[name] for name in seen} == {name: rest.strip() for name, rest in seen.items()}


@pytest.mark.timeout(300)
def test_processes_share_a_cache_and_agree(tmp_path):
    with serving(delay=0.02) as server:
        both = [child(server, tmp_path / "replies.sqlite", 40) for _ in range(2)]
        said = [process.communicate() for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        lines = [{line for line in out.splitlines() if line.startswith("p")} for out, _ in said]
        assert lines[0] == lines[1] and len(lines[0]) == 40
        assert len(server.bodies) <= 2 * 40


def test_every_setting_makes_another_request_and_n_takes_more_of_the_same(endpoint):
    with serving() as server:
        first = dict(endpoint(server).generate(named(1), **ASK))
        for other in ({"temperature": 0.7}, {"top_p": 0.9}, {"max_tokens": 17}, {"stops": ("x",)}, {"seed": 1}):
            assert dict(endpoint(server).generate(named(1), **ASK | other)) != first
        assert dict(endpoint(server, extra={"min_p": 0.1}).generate(named(1), **ASK)) != first
        assert dict(endpoint(server).generate([("other", "prompt p0")], **ASK))["other"] != first["p0"]
        assert len(server.bodies) == 8
        more = dict(endpoint(server).generate(named(1), **ASK | {"n": 4}))
        assert more["p0"][:1] == first["p0"] and server.bodies[-1]["n"] == 3


def test_a_run_into_a_file_continues_where_the_endpoint_failed(endpoint, tmp_path):
    path, prompts, fail = tmp_path / "samples.jsonl", dict(named(12)), {"prompt p5"}
    settings = ASK | {"n": 2}
    with serving(lambda body, times: "400" if prompt_of(body) in fail else "answer") as server:
        with pytest.raises(engine.Unanswered, match="p5"):
            sample.to_file(path, endpoint(server), prompts, **settings)
        assert not path.exists()
        fail.clear()
        found = sample.to_file(path, endpoint(server, cache=tmp_path / "another"), prompts, **settings)
        assert [s.id for s in found] == [f"{name}/{k}" for name in prompts for k in (0, 1)]
        assert records.read(path, records.Sample) == found and len({s.completion for s in found}) == 24
        assert set(server.times.values()) == {1, 2} and server.times["prompt p5"] == 2


# --- limits and costs -----------------------------------------------------------------------------


def test_the_budget_stops_asking_over_runs_and_a_higher_one_goes_on(endpoint, capsys):
    priced = {"price_in": 50_000.0, "price_out": 100_000.0, "concurrency": 2}  # 10 in and 5 out: 1.0 a reply
    with serving() as server:
        for budget, replies in ((4.0, 4), (4.0, 4), (8.0, 8)):
            with pytest.raises(engine.Unanswered, match=f"not asked any more, the budget of {budget} is") as caught:
                list(endpoint(server, budget=budget, **priced).generate(named(20), **ASK))
            assert replies <= len(server.bodies) <= replies + 1
            assert len(caught.value.failures) == 20 - len(server.bodies)
        before = len(server.bodies)
        capsys.readouterr()
        check_whole(list(endpoint(server, **priced).generate(named(20), **ASK)), named(20), 1)
        rest = 20 - before
        assert f"{10 * rest} tokens in, {5 * rest} out, cost {rest}" in capsys.readouterr().out
        assert len(server.bodies) == 20


def test_an_endpoint_that_does_not_count_tokens_is_estimated(endpoint, tmp_path):
    with serving("odd usage") as server:
        list(endpoint(server, price_in=1e6).generate(named(1), **ASK))
    with sqlite3.connect(tmp_path / "replies.sqlite") as db:  # "prompt p0" and "prompt p0#0" at 3 characters a token
        assert db.execute("SELECT tokens_in, tokens_out, cost FROM spent").fetchone() == (4, 4, 4.0)


@pytest.mark.parametrize("limit", [{"requests_per_minute": 600}, {"tokens_per_minute": 600 * (4 + 16)}], ids=str)
def test_rate_limits_hold_for_every_request(limit, endpoint):
    """Ten requests a second, each of ceil(10 / 3) + 16 tokens; what is asked again waits as well."""
    with serving(lambda body, times: "500" if times == 1 else "answer") as server:
        list(endpoint(server, **limit).generate(named(10), **ASK))
        took = server.arrivals[-1] - server.arrivals[0]
        assert len(server.arrivals) == 20 and took > 1.8


# --- what is asked --------------------------------------------------------------------------------


def test_chat_and_text_go_to_their_own_paths_with_the_settings(endpoint):
    chat = [{"role": "user", "content": "hello"}]
    with serving() as server:
        who = endpoint(server, rename={"max_tokens": "max_completion_tokens", "seed": ""}, extra={"min_p": 0.1},
                       concurrency=1)
        list(who.generate([("c", chat), ("t", "text")], **ASK | {"n": 2, "stops": tuple("abcdef"), "top_p": 0.9}))
        fields = {"model": "m", "n": 2, "temperature": 0.8, "top_p": 0.9, "max_completion_tokens": 16,
                  "stop": ["a", "b", "c", "d"], "min_p": 0.1}
        assert server.paths == ["/v1/chat/completions", "/v1/completions"]
        assert server.bodies == [fields | {"messages": chat}, fields | {"prompt": "text"}]


def test_the_start_of_an_answer_is_refused_or_asked_to_be_continued(endpoint):
    started = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Sure"}]
    with serving() as server:
        with pytest.raises(ValueError, match="1 prompt.*b: ends in an assistant message.*continue_final_message"):
            list(endpoint(server).generate([("a", "text"), ("b", started)], **ASK))
        assert not server.bodies
        for prefill, told in (("continue_final_message", {"continue_final_message": True,
                                                          "add_generation_prompt": False}), ("native", {})):
            list(endpoint(server, prefill=prefill).generate([("b", started)], **ASK))
            asked = server.bodies[-1]
            assert {key: asked[key] for key in asked if key.endswith("message") or key.startswith("add")} == told
            assert asked["messages"] == started
        list(endpoint(server, prefill="continue_final_message").generate([("c", started[:1])], **ASK))
        assert "continue_final_message" not in server.bodies[-1]


def test_how_an_answer_ended(endpoint):
    for fault, finish in (("answer", "stop"), ("length", "length"), ("filter", "content_filter")):
        with serving(fault) as server:
            assert dict(endpoint(server).generate(named(1), **ASK))["p0"][0].finish == finish
    with serving("half a character") as server:
        assert dict(endpoint(server).generate(named(1, "h"), **ASK))["h0"][0].text == "smile ?"
    with serving("code") as server:
        stops = ("none", "more", "than", "four", "\nassert", "pass\n\nassert")
        got = dict(endpoint(server).generate(named(1, "q"), **ASK | {"stops": stops}))["q0"]
    assert got == [Completion("def f():\n    ", "stop", [], [])]


def test_the_key_comes_from_the_variable_that_is_named(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of somebody else")
    monkeypatch.setenv("MY_KEY", "sekrit")
    with serving() as server:
        list(endpoint(server).generate(named(1), **ASK))
        list(endpoint(server, api_key_env="MY_KEY").generate(named(1, "q"), **ASK))
        assert [headers["Authorization"] for headers in server.headers] == ["Bearer none", "Bearer sekrit"]


def test_settings_that_cannot_work_are_named_together(tmp_path):
    make = lambda **settings: engine.make("endpoint", "m", base_url="http://x", cache=tmp_path / "c", **settings)
    with pytest.raises(ValueError, match="prefill: got 'x', available are.*NO_SUCH_VARIABLE is not.*budget.*choices"):
        make(prefill="x", api_key_env="NO_SUCH_VARIABLE", budget=1.0, choices=0)
    with pytest.raises(ValueError, match="base_url: expected the endpoint's address"):
        engine.make("endpoint", "m", base_url="", cache=tmp_path / "c")
    with pytest.raises(ValueError, match="expected the name of an environment variable") as caught:
        make(api_key_env="sk-123456")
    assert "123456" not in str(caught.value)
    with pytest.raises(ValueError, match=r"got 'remote', available are \['local', 'endpoint'\]"):
        engine.make("remote", "m")
    with pytest.raises(ValueError, match="p0: 2 prompts of this id"):
        list(make().generate(named(1) * 2, **ASK))


def test_both_engines_take_the_same_settings():
    wanted = inspect.signature(engine.Engine.generate).parameters.keys()
    assert wanted == inspect.signature(engine.Endpoint.generate).parameters.keys()
    assert wanted - {"self"} <= inspect.signature(decode.sample).parameters.keys()


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_the_command_answers_a_file_through_an_endpoint(tmp_path):
    with serving() as server:
        done = subprocess.run(
            [sys.executable, "-m", "align_jax.sample", "--config=configs/sample.py:smoke",
             f"--config.run={tmp_path}/run", "--config.engine.kind=endpoint", "--config.start=m",
             f"--config.engine.endpoint.base_url={server.url}", f"--config.engine.endpoint.cache={tmp_path}/c",
             "--config.engine.endpoint.prefill=native"],
            cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr
    assert "m: 12 replies, 0 prompts from the cache" in done.stdout + done.stderr
    found = records.read(tmp_path / "run" / "samples.jsonl", records.Sample)
    assert len(found) == 24 and len({s.completion for s in found}) == 24
