"""Self-made labels against a benchmark's tests, with a model whose every answer is known."""

from pathlib import Path

import pytest

from align_jax import decode, records
from align_jax import engine as engines
from align_jax.records import Problem
from align_jax.synth import ground_truth

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
POCKET = ROOT / "align_jax" / "pocket" / "PocketEval.jsonl.gz"


class Author:
    """Right and wrong programs, with right and wrong tests: every cell of the table, by the sample's number."""

    def __init__(self, problems: dict[str, Problem]):
        self.problems = problems

    def generate(self, asked, *, n, **settings):
        for name, _ in asked:
            problem = self.problems[name]
            right = problem.prompt + problem.canonical_solution
            call = f"{problem.entry_point}(*{problem.base_input[0]!r})"
            wrong = f"def {problem.entry_point}(*args):\n    return 'wrong'\n"
            answers = [self.answer(right, f"{call} != 'wrong'"), self.answer(wrong, f"{call} == 'wrong'"),
                       self.answer(right, f"{call} == 'wrong'"), self.answer(wrong, f"{call} != 'wrong'")]
            yield name, [decode.Completion(answers[k % 4], "stop", [1], [0.0]) for k in range(n)]

    def too_long(self, asked, *, max_tokens):
        return set()

    @staticmethod
    def answer(program: str, test: str) -> str:
        return f"```python\n{program}\n```\n</response>\n\n<tests>\n```python\nassert {test}\n```\n"


@pytest.mark.parametrize(("benchmark", "path", "backend"), [
    ("PocketEval", POCKET, "auto"),
    pytest.param("humaneval", DATA / "humaneval_plus" / "HumanEvalPlus.jsonl.gz", "auto", marks=pytest.mark.slow)])
def test_every_cell_of_the_table_is_found(benchmark, path, backend, tmp_path, monkeypatch):
    if not path.is_file():
        pytest.skip("needs ../shared/data")
    monkeypatch.syspath_prepend(ROOT)
    from configs import synth

    problems = {p.task_id: p for p in records.read(path, Problem)}
    monkeypatch.setattr(engines, "identity", lambda *a, **k: {"kind": "author"})
    monkeypatch.setattr(engines, "make", lambda *a, **k: Author(problems))
    c = synth.get_config().to_dict() | {"run": str(tmp_path / "run"), "start": "someone"}
    c["asking"] |= {"chat": True}
    c["engine"] |= {"kind": "endpoint"}
    c["response"] |= {"n": 4}
    c["sandbox"] |= {"workers": 1, "memory_mb": 1024}
    c["truth"] |= {"benchmark": benchmark, "path": str(path), "count": 20}
    found = ground_truth.agreement(c)
    cells = (found.both_pass, found.own_only, found.truth_only, found.both_fail)
    assert cells == (20, 20, 20, 20) and found.tasks == 20 and found.kappa == 0
    assert found.precision == found.recall == found.rejected_precision == found.accuracy == 0.5
    assert ground_truth.agreement(c) == found  # and nothing is done again


@pytest.mark.parametrize(("prompt", "instruction"), [
    ('def f(x: int, y=2):\n    """Add.\n\n    More.\n    """\n',
     "Write a Python function `f(x: int, y=2)`. Add.\n\nMore."),
    ('"""\nWrite a function to add.\nassert f(1) == 2\n"""\n', "Write a function to add.\nassert f(1) == 2"),
    ('import math\n\ndef f(x):\n    """Add."""\n', "Write a Python function `f(x)`. Add."),
    ('def g(x):\n    """Help."""\n\ndef f(x):\n    """Add."""\n',
     'def g(x):\n    """Help."""\n\ndef f(x):\n    """Add."""'), ("Add (a and b).\n", "Add (a and b).")])
def test_a_problem_is_said_as_an_instruction(prompt, instruction):
    problem = Problem(task_id="t", prompt=prompt, entry_point="f", canonical_solution="", base_input=[], plus_input=[])
    assert ground_truth.instruction(problem) == instruction
