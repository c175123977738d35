"""A model answers and its programs are judged: answers resume to the same file, verdicts are right."""

import dataclasses
import functools
import itertools
from pathlib import Path

import pytest
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from align_jax import decode, model, records, sample, sandbox
from align_jax.decode import Sampler
from align_jax.model import ModelConfig
from align_jax.records import Judged, Problem, Sample
from align_jax.synth import verify

DATA = Path(__file__).parents[2] / "shared" / "data" / "humaneval_plus" / "HumanEvalPlus.jsonl.gz"


def problem(test: str, *, entry_point: str = "f", prompt: str = "def f(x):\n", task_id: str = "t") -> Problem:
    return Problem(task_id=task_id, prompt=prompt, entry_point=entry_point, canonical_solution="", base_input=[],
                   plus_input=[], test=test)


def sample_of(completion: str, *, prompt="def f(x):\n", task_id: str = "t", k: int = 0, finish: str = "stop") -> Sample:
    return Sample(id=f"{task_id}/{k}", task_id=task_id, prompt=prompt, completion=completion, finish=finish)


# --- asserts

CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 3, 'no'\n"


def test_asserts_are_one_test_each():
    assert verify.asserts(problem(CHECK)) == ("assert candidate(1) == 2", "assert candidate(2) == 3, 'no'")


def test_what_asserts_nothing_goes_with_the_next_assertion():
    test = ("import math\nMETADATA = {}\n\ndef check(candidate):\n    x = candidate(1)\n    assert x == 2\n"
            "    for i in range(3):\n        assert candidate(i) == i + 1\n    print(x)\n")
    first, second = verify.asserts(problem(test))
    assert first.splitlines() == ["import math", "METADATA = {}", "x = candidate(1)", "assert x == 2"]
    assert second == "for i in range(3):\n    assert candidate(i) == i + 1"


@pytest.mark.parametrize("test", [
    "", "assert f(1) == 2", "def check(candidate):\n    pass", "def check(candidate):\n    candidate(1)",
    "def test(candidate):\n    assert candidate(1)", CHECK + CHECK])
def test_a_check_that_any_program_passes_is_an_error(test):
    with pytest.raises(ValueError, match="HE/7: test is no `def check"):
        verify.asserts(problem(test, task_id="HE/7"))


@pytest.mark.skipif(not DATA.is_file(), reason="needs ../shared/data")
def test_humanevals_own_solutions_pass_all_their_asserts(tmp_path):
    problems = {p.task_id: p for p in records.read(DATA, Problem)}
    samples = [sample_of(p.canonical_solution, prompt=p.prompt, task_id=p.task_id) for p in problems.values()]
    judged = verify.verify(tmp_path / "judged.jsonl", samples, problems, wall_s=60.0, cpu_s=60.0, memory_mb=2048)
    assert [j.task_id for j in judged if j.status != "passed" or j.reward != 1.0] == []
    nothing = [dataclasses.replace(s, completion="    return None\n") for s in samples]
    judged = verify.verify(tmp_path / "wrong.jsonl", nothing, problems, wall_s=60.0, cpu_s=60.0, memory_mb=2048)
    assert [j.task_id for j in judged if j.status == "passed"] == []


# --- program


def test_the_program_of_a_base_and_of_a_chat_answer():
    code = "def f(x):\n    return x\n"
    user = {"role": "user", "content": "Write f."}
    start = {"role": "assistant", "content": "Here it is:\n```python\n"}
    assert verify.program(sample_of("    return x\n")) == code
    assert verify.program(sample_of(f"Sure.\n```python\n{code}```\nDone.", prompt=[user])) == code
    assert verify.program(sample_of(code, prompt=[user, start])) == code  # its end was a stop string
    assert verify.program(sample_of(f"{code}```\nIt returns x.", prompt=[user, start])) == code
    assert verify.program(sample_of(code, prompt=[user])) == code


# --- verify

ANSWERS = {  # completion -> status, reward
    "    return x + 1\n": ("passed", 1.0),
    "    return 2\n": ("assertion", 0.5),
    "    return x\n": ("assertion", 0.0),
    "    return x +\n": ("syntax", 0.0),
    "    return x.y\n": ("exception", 0.0),
    "    while True: pass\n": ("timeout", 0.0),
    "    import no_such_package\n": ("missing_package", 0.0),
    "    raise SystemExit(0)\n": ("exited", 0.0),
    "    print('passed')\n    import os; os._exit(0)\n": ("exited", 0.0),
    "    return 2\nf = None\ndel f\n": ("exception", 0.0),  # no entry point
    "    return 2\nassert f(1) == 3\n": ("assertion", 0.0),  # its own tests, which fail
    "": ("syntax", 0.0),
    '    """open': ("syntax", 0.0),
    "    return x + 1\nif __name__ == '__main__':\n    raise ValueError\n": ("passed", 1.0),
}


@pytest.fixture
def jobs(monkeypatch):
    """What was really run."""
    ran, run_many = [], sandbox.run_many
    monkeypatch.setattr(sandbox, "run_many", lambda jobs, **how: ran.extend(jobs) or run_many(jobs, **how))
    return ran


def test_verdicts_are_right_and_identical_programs_run_once(tmp_path, jobs):
    answers = [*ANSWERS, *reversed(ANSWERS)]
    samples = [sample_of(answer, k=k, finish="length" if k % 2 else "stop") for k, answer in enumerate(answers)]
    judged = verify.verify(tmp_path / "judged.jsonl", samples, {"t": problem(CHECK)}, wall_s=20.0, cpu_s=1.0)
    assert {j.completion: (j.status, j.reward) for j in judged} == ANSWERS
    assert [(j.id, j.task_id, j.prompt, j.completion, j.finish) for j in judged] == [
        (s.id, s.task_id, s.prompt, s.completion, s.finish) for s in samples]
    assert [j.status for j in judged] == [ANSWERS[answer][0] for answer in answers]
    assert len(jobs) == len(set(jobs)) == len(ANSWERS)
    assert records.read(tmp_path / "judged.jsonl", Judged) == judged


def test_the_same_program_for_another_task_is_judged_by_that_tasks_tests(tmp_path, jobs):
    problems = {"t": problem(CHECK), "u": problem(CHECK.replace("== 2", "== 1").replace("== 3", "== 2"), task_id="u")}
    samples = [sample_of("    return x\n", task_id=task) for task in problems]
    judged = verify.verify(tmp_path / "judged.jsonl", samples, problems)
    assert [j.status for j in judged] == ["assertion", "passed"] and len(jobs) == 2


def test_verdicts_that_are_there_are_not_made_again(tmp_path, jobs):
    samples = [sample_of("    return x + 1\n")]
    first = verify.verify(tmp_path / "judged.jsonl", samples, {"t": problem(CHECK)})
    assert len(jobs) == 1
    assert verify.verify(tmp_path / "judged.jsonl", samples, {"t": problem(CHECK)}) == first and len(jobs) == 1


def test_a_chat_answer_without_code_fails(tmp_path):
    user = [{"role": "user", "content": "Write f."}]
    samples = [sample_of(answer, prompt=user, k=k) for k, answer in enumerate(
        ["I cannot.", "```\n```", "```python\ndef g(x):\n    return x + 1\n```"])]
    judged = verify.verify(tmp_path / "judged.jsonl", samples, {"t": problem(CHECK)})
    assert all(j.status != "passed" and j.reward == 0 for j in judged)


# --- respond

CHARS = ["</s>", *map(chr, range(32, 127)), "\n"]
CFG = ModelConfig(L=2, D=32, N=4, K=2, H=8, F=48, V=len(CHARS), max_length=256, init_scale=0.3)
PROMPTS = {f"task/{i}": "def f(x):\n"[i % 5:] * (1 + i % 3) for i in range(11)}
SETTINGS = dict(n=3, seed=0, max_tokens=12, batch_size=6, chunk=4)


@functools.cache
def tiny_model() -> Sampler:
    raw = Tokenizer(models.WordLevel({char: i for i, char in enumerate(CHARS)}, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    return Sampler.of(CFG, model.init(CFG, 0), tokenizer, [0])


@pytest.fixture
def sampler(one_device):
    return tiny_model()


@pytest.fixture
def die_after(monkeypatch):
    """Make the sampler die after so many prompts; returns the ids that were asked for, call by call."""
    real, asked = decode.sample, []

    def set_limit(limit: int | None):
        def dying(sampler, prompts, **settings):
            asked.append([name for name, _ in prompts])
            yield from itertools.islice(real(sampler, prompts, **settings), limit)
            if limit is not None:
                raise KeyboardInterrupt

        monkeypatch.setattr(decode, "sample", dying)
        return asked

    return set_limit


def test_answers_are_what_was_asked_for(sampler, tmp_path):
    path = tmp_path / "samples.jsonl"
    found = sample.to_file(path, sampler, PROMPTS, **SETTINGS)
    assert [(s.task_id, s.id) for s in found] == [(task, f"{task}/{k}") for task in PROMPTS for k in range(3)]
    assert all(s.prompt == PROMPTS[s.task_id] and s.logp < 0 and 0 < s.num_tokens <= 12 for s in found)
    assert len({s.completion for s in found}) > 20 and {s.finish for s in found} <= {"stop", "length"}
    assert records.read(path, Sample) == found and [*tmp_path.iterdir()] == [path]
    before = path.stat()
    assert sample.to_file(path, sampler, PROMPTS, **SETTINGS) == found and path.stat() == before


@pytest.mark.parametrize("torn", [0, 1, 100, 10_000])
@pytest.mark.parametrize("killed_after", [0, 1, 4, 7, 11])
def test_a_killed_run_ends_in_the_same_file(sampler, tmp_path, die_after, killed_after, torn):
    whole, path = tmp_path / "whole" / "samples.jsonl", tmp_path / "killed" / "samples.jsonl"
    sample.to_file(whole, sampler, PROMPTS, **SETTINGS)
    asked = die_after(killed_after)
    with pytest.raises(KeyboardInterrupt):
        sample.to_file(path, sampler, PROMPTS, **SETTINGS)
    part = path.with_name("samples.jsonl.partial")
    assert not path.exists() and part.exists()
    part.write_bytes(part.read_bytes()[:max(len(part.read_bytes()) - torn, 0)])

    die_after(None)
    sample.to_file(path, sampler, PROMPTS, **SETTINGS)
    # The number of slots follows what is left, and with it the last bits of a log-prob; nothing else may differ.
    found, expected = (records.read(file, Sample) for file in (path, whole))
    assert [s.logp for s in found] == pytest.approx([s.logp for s in expected], abs=1e-4)
    assert [dataclasses.replace(s, logp=0.0) for s in found] == [dataclasses.replace(s, logp=0.0) for s in expected]
    assert [*path.parent.iterdir()] == [path]
    if not torn:
        assert len(asked[1]) == len(PROMPTS) - killed_after  # what was there is not made again


def test_a_run_of_another_n_does_not_leave_its_answers(sampler, tmp_path, die_after):
    path = tmp_path / "samples.jsonl"
    for n in (2, 5):
        die_after(4)
        with pytest.raises(KeyboardInterrupt):
            sample.to_file(path, sampler, PROMPTS, **SETTINGS | {"n": n})
    die_after(None)
    few = dict(itertools.islice(PROMPTS.items(), 6))  # and of other prompts
    found = sample.to_file(path, sampler, few, **SETTINGS)
    assert found == sample.to_file(tmp_path / "fresh.jsonl", sampler, few, **SETTINGS)


@pytest.mark.parametrize("n", [1, 12])
def test_one_prompt_alone_and_more_than_ten_answers_in_order(sampler, tmp_path, n):
    found = sample.to_file(tmp_path / "x.jsonl", sampler, {"t": "def"}, **SETTINGS | {"n": n, "batch_size": n})
    assert [s.id for s in found] == [f"t/{k}" for k in range(n)]


def test_no_prompts_no_samples(sampler, tmp_path):
    assert sample.to_file(tmp_path / "x.jsonl", sampler, {}, **SETTINGS) == []
