"""The factory as a whole, with a model whose every answer is known: a worked example, or a mistake made on purpose."""

import itertools
import json
import random
import re
import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from align_jax import decode, log, records
from align_jax import engine as engines
from align_jax.records import Judged, Pair, Response, Seed, Task
from align_jax.synth import dimensions, pipeline, prompts, stream, verify

ROOT = Path(__file__).parents[1]
SHOTS = prompts.shots()


class Author:
    """An engine that answers every stage from the worked examples, right and wrong ones by the sample's number."""

    def __init__(self, dies_after: int = 10**9):
        self.asked, self.stages, self.dies_after = [], [], dies_after

    def generate(self, asked, *, n, stops, **settings):
        for name, prompt in asked:
            if len(self.asked) == self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(name)
            self.stages.append(stops)
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            yield name, [decode.Completion(*self.answer(name, text, k), [1, 2], [-0.5, -0.5]) for k in range(n)]

    def too_long(self, asked, *, max_tokens):
        return set()

    def answer(self, name: str, text: str, k: int) -> tuple[str, str]:
        question = text.split("## Example")[-1]
        shot = random.Random(name.split("/")[0]).choice(SHOTS)
        if "<draft>" in question:
            documented = self.shot_in(question).response
            return ("```python\nx = 1\n```\n</response>" if k % 2 else f"{documented}\n</response>", "stop")
        if "<instruction>" in question and "<seed>" not in question and "<properties>" not in question:
            shot = self.shot_in(question)
            right = f"{shot.response}\n</response>\n\n<tests>\n{shot.tests}\n"
            wrong = right.replace(shot.response, re.sub(r"\breturn (?!None)", "return not ", shot.response))
            bare = f"{shot.draft}\n</response>\n\n<tests>\n{shot.tests}\n"
            return [(right, "stop"), (wrong, "stop"), (bare, "stop"), (right[:80], "length"), ("", "stop"),
                    (f"{shot.response}\n</response>", "stop")][k % 6]
        if "<properties>" in question:
            return (f"{shot.instruction} This is variant {name}.", "stop")
        return (shot.concepts, "stop")

    def shot_in(self, question: str):
        return next(shot for shot in SHOTS if shot.instruction in question)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with the worked examples' seeds, a file each."""
    folder = tmp_path_factory.mktemp("source")
    for shot in SHOTS:
        (folder / f"{shot.name}.py").write_text(shot.seed + "\n")
    return folder


@pytest.fixture
def run(source, tmp_path, monkeypatch):
    """Run the factory with an author, in the test's folder; return the counts of every stage."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(engines, "identity", lambda *a, **k: {"kind": "author"})

    def run(variant: str = "", author: Author | None = None, **sections) -> dict:
        monkeypatch.setattr(engines, "make", lambda *a, **k: author or Author())
        pipeline.make(config(tmp_path / "run", source, variant, **sections))
        return json.loads((tmp_path / "run" / "stages.json").read_text())

    return run


def config(folder: Path, source: Path, variant: str = "", **sections) -> dict:
    from configs import synth

    c = synth.get_config(variant).to_dict() | {"run": str(folder), "start": "someone"}
    c["asking"] = c["asking"] | {"chat": True}
    c["engine"] = c["engine"] | {"kind": "endpoint"}
    small = {"seeds": {"source": c["seeds"]["source"] | {"path": str(source)}, "workers": 1},
             "response": {"n": 6}, "rewrite": {"n": 2}, "sandbox": {"wall_s": 20.0, "cpu_s": 20.0, "memory_mb": 512},
             "instruction": {"near_duplicate": 0.99}}
    for name, settings in (*small.items(), *sections.items()):
        c[name] = c[name] | settings if isinstance(settings, dict) else settings
    return c


def file(tmp_path: Path, stage: str) -> Path:
    return next((tmp_path / "run").glob(f"{stage}*/{stage}.jsonl"))


def read(tmp_path: Path, stage: str, kind: type) -> list:
    return records.read(file(tmp_path, stage), kind)


def adds_up(counts: dict, n: int = 1) -> bool:
    return counts["in"] * n == counts["out"] + sum(counts["dropped"].values())


def test_seeds_become_pairs_and_every_count_adds_up(run, tmp_path):
    did = run()
    assert [*did] == ["seeds", "concepts", "tasks", "responses", "verdicts", "pairs-pass_fail"]
    assert all(adds_up(did[name], 6 if name == "responses" else 1) for name in did)
    tasks = {task.id: task for task in read(tmp_path, "tasks", Task)}
    assert did["responses"]["dropped"] == dict.fromkeys(("truncated", "empty", "no tests"), len(tasks))
    assert {task.category for task in tasks.values()} == {*prompts.CATEGORIES}
    assert {task.difficulty for task in tasks.values()} == {*prompts.DIFFICULTIES}
    judged = {j.id: j for j in read(tmp_path, "verdicts", Judged)}
    for pair in read(tmp_path, "pairs", Pair):
        chosen, rejected = (judged[pair.made[side]["id"]] for side in ("chosen", "rejected"))
        assert chosen.status == "passed" and rejected.status != "passed"
        assert chosen.completion.startswith(pair.chosen) and rejected.completion.startswith(pair.rejected)
        assert "<tests>" not in pair.chosen + pair.rejected and "assert " not in pair.chosen + pair.rejected
        assert pair.prompt == [{"role": "user", "content": tasks[pair.id].instruction}]


def test_a_dimension_is_dealt_to_every_task_and_decides_among_answers_that_pass(run, tmp_path):
    did = run("codal")
    responses, judged = read(tmp_path, "responses", Response), read(tmp_path, "scores", Judged)
    dealt = Counter({r.task_id: r.dimension for r in responses}.values())
    assert max(dealt.values()) - min(dealt.values()) <= 1 and len(dealt) == 5
    assert all([*j.scores] == [j.dimension] for j in judged)
    by_id, pairs = {j.id: j for j in judged}, read(tmp_path, "pairs", Pair)
    for pair in pairs:
        chosen, rejected = (by_id[pair.made[side]["id"]] for side in ("chosen", "rejected"))
        name = pair.made["dimension"]
        assert chosen.status == rejected.status == "passed" and chosen.scores[name] > rejected.scores[name]
    counts = Counter(pair.made["dimension"] for pair in pairs)
    assert pairs and len(set(counts.values())) == 1  # as many of each, and who has none is named
    assert {*counts} | {*did["pairs-dimension"].get("NO PAIR OF", ())} == {*dimensions.CODAL} and len(counts) > 1
    assert adds_up(did["pairs-dimension"])


def test_the_studys_labels_under_a_dimensions_prompt_are_pass_and_fail(run, tmp_path):
    assert "scores" not in run("codal_pass_fail")
    pairs = read(tmp_path, "pairs", Pair)
    assert {pair.made["dimension"] for pair in pairs} == {*dimensions.CODAL}
    assert all((p.made["chosen"]["status"] == "passed") > (p.made["rejected"]["status"] == "passed") for p in pairs)


def test_a_second_pass_rewrites_what_passed_and_keeps_what_still_does(run, tmp_path):
    did = run("two_passes")
    assert [*did][4:] == ["verdicts", "drafts", "rewrites", "rewritten", "scores", "pairs-dimension"]
    drafts = {draft.id: draft for draft in read(tmp_path, "drafts", Response)}
    for _, group in itertools.groupby(read(tmp_path, "rewritten", Judged), key=lambda j: j.task_id):
        first, *rest = group
        assert first.id in drafts and first.status == "passed"
        assert [(j.id, j.status == "passed") for j in rest] == [(f"{first.id}/0", True), (f"{first.id}/1", False)]
    pairs = read(tmp_path, "pairs", Pair)
    assert pairs and all(p.made["chosen"]["status"] == p.made["rejected"]["status"] == "passed" for p in pairs)
    assert all({p.made[side]["id"] for side in ("chosen", "rejected")} & drafts.keys() for p in pairs)
    # A response is run against the tests of the draft, not against tests of its own.
    tests = {r.task_id: r.tests for r in drafts.values()}
    assert all(r.tests == tests[r.task_id] for r in read(tmp_path, "rewrites", Response))


def test_killed_anywhere_it_asks_for_nothing_twice_and_ends_in_the_same_pairs(run, tmp_path):
    run()
    wanted = {name: file(tmp_path, name).read_bytes() for name in ("responses", "pairs")}
    shutil.rmtree(tmp_path / "run")
    authors = []
    for _ in range(100):
        authors.append(Author(dies_after=7))
        try:
            run(author=authors[-1], asking={"chat": True, "brief": False, "shard": 5, "unanswered": "stop"})
            break
        except KeyboardInterrupt:
            pass
    asked = Counter((name, author.stages[i]) for author in authors for i, name in enumerate(author.asked))
    assert len(authors) > 5 and set(asked.values()) == {1}
    assert wanted == {name: file(tmp_path, name).read_bytes() for name in wanted}
    assert not [*(tmp_path / "run").rglob("answers-*")]


def test_killed_and_continued_with_other_shards_it_loses_nothing(run, tmp_path):
    wanted = run()
    files = {name: file(tmp_path, name).read_bytes() for name in ("responses", "pairs")}
    shutil.rmtree(tmp_path / "run")
    for shard in itertools.cycle((5, 3, 8, 1)):
        try:
            did = run(author=Author(dies_after=11), asking={"shard": shard})
            break
        except KeyboardInterrupt:
            pass
    assert files == {name: file(tmp_path, name).read_bytes() for name in files}
    assert [did[name]["dropped"] for name in did] == [wanted[name]["dropped"] for name in wanted]


def test_killed_behind_every_stage_before_it_is_in_the_book_it_ends_in_the_same_files(run, tmp_path, monkeypatch):
    run("two_passes")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*/*.jsonl")}
    shutil.rmtree(tmp_path / "run")
    killed, once = [], log.once

    def once_and_die(book, name, work):
        if name not in killed:
            killed.append(name)
            work()
            raise KeyboardInterrupt
        once(book, name, work)

    monkeypatch.setattr(log, "once", once_and_die)
    for _ in range(10):
        with pytest.raises(KeyboardInterrupt):
            run("two_passes")
    run("two_passes")
    assert len(killed) == 10
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*/*.jsonl")} == wanted


@pytest.mark.parametrize("chunk", [5, 17, 64])
def test_hosts_each_execute_their_share_and_join_it_in_order(run, tmp_path, monkeypatch, chunk):
    """Three hosts as threads; two real processes are in test_hosts."""
    run(stages="seeds,concepts,tasks,responses")
    rows, ran = [*stream.rows(file(tmp_path, "responses"))], []
    monkeypatch.setattr(verify, "judge", lambda part, **how: ran.extend(part) or [Judged(
        **{name: row[name] for name in verify.KEPT}, status="passed", detail="", reward=1.0) for row in part])
    here, barrier = threading.local(), threading.Barrier(3, timeout=60)
    monkeypatch.setattr(verify.mesh, "wait_for_hosts", lambda what: barrier.wait())
    monkeypatch.setattr(verify.jax, "process_count", lambda: 3)
    monkeypatch.setattr(verify.jax, "process_index", lambda: here.host)
    out = tmp_path / "verdicts" / "verdicts.jsonl"

    def of_host(host: int) -> dict:
        here.host = host
        return verify.execute(out, iter(rows), chunk=chunk)

    with ThreadPoolExecutor(3) as hosts:
        assert [*hosts.map(of_host, range(3))] == [
            {"in": len(rows), "out": len(rows), "dropped": {}, "verdicts": {"passed": len(rows)}}] * 3
    assert [row["id"] for row in stream.rows(out)] == [row["id"] for row in rows]
    assert sorted(row["id"] for row in ran) == sorted(row["id"] for row in rows)


def test_a_prompt_that_is_never_answered_stops_the_run_or_is_counted(run, tmp_path):
    class Deaf(Author):
        def generate(self, asked, **settings):
            deaf = {name: "refused" for name, _ in asked if name.count("/") == 2 and int(name[0], 16) % 2}
            yield from super().generate([item for item in asked if item[0] not in deaf], **settings)
            if deaf:
                raise engines.Unanswered(deaf)

    with pytest.raises(engines.Unanswered):
        run(author=Deaf())
    assert [*(tmp_path / "run" / "responses").glob("answers-0-*.jsonl.partial")]  # what was answered is kept
    did = run(author=Deaf(), asking={"chat": True, "brief": False, "shard": 2000, "unanswered": "drop"})
    assert did["responses"]["dropped"]["unanswered"] % 6 == 0 and adds_up(did["responses"], 6)


def test_a_prompt_that_does_not_fit_the_model_is_counted(run, capsys):
    class Short(Author):
        def too_long(self, asked, *, max_tokens):
            assert max_tokens in (512, 1536)
            return {name for name, prompt in asked if name.count("/") == 2 and int(name[0], 16) % 2}

    did = run(author=Short())
    assert did["responses"]["dropped"]["prompt too long"] % 6 == 0 and adds_up(did["responses"], 6)
    assert "prompts and max_tokens=1536 do not fit into the model's positions; fewer `shots`" in capsys.readouterr().out


def test_other_settings_are_refused_in_a_stages_folder(run):
    run()
    with pytest.raises(ValueError, match="responses holds a run with another config.*\n.*response.temperature"):
        run(response={"n": 6, "temperature": 0.1})
    assert run(sandbox={"wall_s": 20.0, "cpu_s": 20.0, "memory_mb": 512, "workers": 1})  # changes no record


def test_everything_that_cannot_work_is_said_at_once(run, tmp_path):
    with pytest.raises(ValueError) as error:
        run(stages="seeds,dreams", dimensions=("beauty",), judge={"kind": "oracle"}, pairs={"rules": ("guess",)},
            response={"prompt": "Solve it.", "n": 0})
    for part in ("dreams", "beauty", "oracle", "guess", "Solve it.", "n: got 0"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="runner: got 'dask', expected one of local, ray"):
        run(sandbox={"runner": "dask"})
    with pytest.raises(ValueError, match="judge.second.start: expected another model"):
        run(judge={"kind": "engine", "start": "who", "second": {"start": "who", "count": 3}})
    with pytest.raises(ValueError, match="nowhere.config.json: not there"):
        run(start=str(tmp_path / "nowhere"), engine={"kind": "local"})
    assert not (tmp_path / "run").exists()


def test_stages_run_alone(run):
    with pytest.raises(ValueError, match="'responses' reads .*tasks.jsonl, which is not there"):
        run(stages="responses")
    assert [*run(stages="seeds,concepts")] == ["seeds", "concepts"]
    assert [*run(stages="tasks")] == ["seeds", "concepts", "tasks"]
    assert [*run()][-1] == "pairs-pass_fail"


def test_a_model_judges_where_one_is_configured(run, tmp_path):
    class Judge(Author):
        def answer(self, name, text, k):
            if "Reply with one JSON" not in text:
                return super().answer(name, text, k)
            answer = text.split("<answer>")[-1]
            return (json.dumps({"rationale": "", "rating": 9 if '"""' in answer else 3}), "stop")

    engine = config(tmp_path, tmp_path)["engine"]
    second = {"start": "another", "count": 30, "engine": engine}
    did = run("codal", author=Judge(), judge={"kind": "engine", "start": "judge", "engine": engine, "second": second})
    assert {score for j in read(tmp_path, "scores", Judged) for score in j.scores.values()} == {3.0, 9.0}
    assert set(did["scores"]["kappa of two judges"].values()) == {1.0}  # they are one
    found = json.loads((tmp_path / "run" / "scores" / "judges.json").read_text())
    assert {*found} <= {*dimensions.CODAL} and sum(rating["n"] for rating in found.values()) == 30


def test_two_judges_are_compared_on_a_named_dimension_and_where_one_is_silent(run, tmp_path):
    class Judge(Author):
        def answer(self, name, text, k):
            if "Reply with one JSON" not in text:
                return super().answer(name, text, k)
            return ("no idea" if self.is_silent else json.dumps({"rating": 1 + len(text) % 9}), "stop")

    engine = config(tmp_path, tmp_path)["engine"]
    judge = {"kind": "engine", "start": "judge", "engine": engine,
             "second": {"start": "another", "count": 20, "engine": engine}}
    for Judge.is_silent, kappa in ((False, 1.0), (True, None)):
        did = run(author=Judge(), judge=judge, pairs={"rules": ("best_worst",), "by": "readability", "min_usable": 0.1})
        assert did["scores"]["kappa of two judges"] == {"readability": pytest.approx(kappa)}
        shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match="judge.second: nothing is judged where pairs.by is 'reward'"):
        run(judge=judge)


def test_a_rewrite_is_asked_by_the_instruction_without_the_pairs_template(run, tmp_path):
    seen = []

    class Watcher(Author):
        def answer(self, name, text, k):
            seen.append(text.split("## Example")[-1])
            return super().answer(name, text, k)

    run("two_passes", author=Watcher(), response={"n": 6, "prompt": "Solve this, PLEASE: {instruction}"})
    tasks = {task.id: task.instruction for task in read(tmp_path, "tasks", Task)}
    rewrites = [text for text in seen if "<draft>" in text]
    assert rewrites and not any("PLEASE" in text for text in rewrites)
    assert all(any(instruction in text for instruction in tasks.values()) for text in rewrites)
    assert all("PLEASE: " in pair.prompt[0]["content"] for pair in read(tmp_path, "pairs", Pair))


def test_a_model_judges_docstrings_where_it_is_asked(run, tmp_path):
    class Judge(Author):
        def answer(self, name, text, k):
            if "<function>" not in text:
                return super().answer(name, text, k)
            return ("yes" if "list" in text.split("<function>")[-1] else "No, it does not.", "stop")

    did = run(author=Judge(), docstrings={"ask": True}, stages="seeds")
    assert adds_up(did["seeds"]) and did["seeds"]["dropped"]["poor docstring"] > 0 < did["seeds"]["out"]

    class Deaf(Judge):
        def generate(self, asked, **settings):
            yield from super().generate(asked[1:], **settings)
            raise engines.Unanswered({asked[0][0]: "filtered"})

    shutil.rmtree(tmp_path / "run")
    with pytest.raises(engines.Unanswered, match="filtered"):
        run(author=Deaf(), docstrings={"ask": True}, stages="seeds")
    again = run(author=Deaf(), docstrings={"ask": True}, stages="seeds",
                asking={"chat": True, "brief": False, "shard": 2000, "unanswered": "drop"})
    assert did["seeds"]["out"] - 1 <= again["seeds"]["out"] <= did["seeds"]["out"] and adds_up(again["seeds"])
    assert all("list" in seed.code for seed in read(tmp_path, "seeds", Seed))
    with pytest.raises(ValueError, match="judged_by"):
        run(stages="seeds")


def test_a_model_that_never_answers_in_form_ends_the_run_with_a_reason(run):
    class Silent(Author):
        def answer(self, name, text, k):
            return ("", "stop")

    with pytest.raises(ValueError, match="'tasks' reads .*concepts.jsonl, which has no records; .*stages.json says"):
        run(author=Silent())


def test_best_and_worst_are_also_picked_by_a_named_dimension(run, tmp_path):
    did = run(pairs={"rules": ("best_worst", "dimension"), "by": "explanation", "min_usable": 0.5})
    assert [*did][-3:] == ["scores", "pairs-best_worst", "pairs-dimension"]
    assert {name for j in read(tmp_path, "scores", Judged) for name in j.scores} == {"explanation"}
    for rule in ("best_worst", "dimension"):
        pairs = records.read(tmp_path / "run" / f"pairs-{rule}" / "pairs.jsonl", Pair)
        assert pairs and all(p.made["chosen"]["score"] >= p.made["rejected"]["score"] + 15 for p in pairs)
    with pytest.raises(ValueError, match=r"dimension: got \['beauty'\]"):
        run(pairs={"by": "beauty"})


def test_one_more_rule_is_no_other_run(run):
    run()
    assert [*run(pairs={"rules": ("pass_fail", "best_worst"), "min_usable": 1.0})][-1] == "pairs-best_worst"
