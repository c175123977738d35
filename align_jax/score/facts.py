"""What static analysis says of an answer: its prose, its code, and the findings of ruff, bandit and detect-secrets.

`score.static` makes dimension scores of these. Many answers are measured in one call, because starting a tool costs
more than its work on a file. The tools parse and nothing that an answer holds is run. The comments with which a
program silences a tool (`noqa`, `nosec`, `pragma: allowlist secret`) are ignored: a model would learn to write them.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tempfile
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from align_jax import text

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef)
# Families of rules; `static` says which counts where. Rules on tests, types and whole projects are not asked.
RULES = ("E", "W", "F", "I", "N", "UP", "B", "A", "C4", "C90", "D101", "D102", "D103", "ERA", "PERF", "PIE", "PLR0911",
         "PLR0912", "PLR0915", "PLR2004", "PLR5501", "RET", "SIM")
# An answer has no last line, and a name that it does not define is for its tests to find.
NOT_ASKED = ("W292", "W391", "E902", "F821")
LINE_LENGTH = 100
SEVERITY = {"LOW": 1.0, "MEDIUM": 3.0, "HIGH": 9.0}
CONFIDENCE = {"LOW": 1 / 3, "MEDIUM": 2 / 3, "HIGH": 1.0}
SECRETS = ("ArtifactoryDetector", "AWSKeyDetector", "AzureStorageKeyDetector", "BasicAuthDetector",
           "DiscordBotTokenDetector", "GitHubTokenDetector", "GitLabTokenDetector", "JwtTokenDetector",
           "KeywordDetector", "MailchimpDetector", "NpmDetector", "OpenAIDetector", "PrivateKeyDetector",
           "SendGridDetector", "SlackDetector", "SquareOAuthDetector", "StripeDetector", "TelegramBotTokenDetector",
           "TwilioKeyDetector")

_FENCED = re.compile(r"^[ \t]*(`{3,}).*?(?:^[ \t]*\1`*[ \t\r]*$|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One answer as static analysis sees it."""

    instruction: str
    prose: str  # what stands around the code
    comments: str
    tree: ast.Module
    size: int  # statements, docstrings left out: the measure of length, which layout and comments do not change
    findings: dict[str, Counter] = field(default_factory=dict)  # tool -> what it found -> how many, or how bad

    @property
    def scopes(self) -> list:
        """The functions and classes of the program."""
        return [node for node in ast.walk(self.tree) if isinstance(node, SCOPES)]

    @property
    def docstrings(self) -> list[str]:
        return [doc for node in (self.tree, *self.scopes) if (doc := ast.get_docstring(node))]


def measure(items: Sequence[tuple[str, str]], *, tools: Sequence[str]) -> list[Facts | None]:
    """Measure (instruction, answer) pairs with some of TOOLS; None for an answer without a program that parses."""
    found = [_facts(instruction, answer) for instruction, answer in items]
    with tempfile.TemporaryDirectory(prefix="align_jax-") as folder:
        for index, (facts, (_, answer)) in enumerate(zip(found, items, strict=True)):
            if facts:
                Path(folder, f"m{index}.py").write_bytes(text.extract_code(answer).encode() + b"\n")
        for tool in tools if any(found) else ():
            said = TOOLS[tool](Path(folder))
            for index, facts in enumerate(found):
                if facts and (counts := said.get(f"m{index}.py", Counter())) is not None:
                    facts.findings[tool] = counts
    return found


def size(node: ast.AST) -> int:
    """Count the statements under a node, docstrings left out."""
    return sum(isinstance(n, ast.stmt) and not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
               for n in ast.walk(node))


def ruff(folder: Path) -> dict[str, Counter]:
    """Count ruff's findings by file and rule."""
    found = _run("ruff", "check", "--isolated", "--no-cache", "--ignore-noqa", "--exit-zero", "--output-format=json",
                 f"--line-length={LINE_LENGTH}", f"--select={','.join(RULES)}", f"--ignore={','.join(NOT_ASKED)}",
                 ".", folder=folder)
    counts = {}
    for finding in found:
        counts.setdefault(Path(finding["filename"]).name, Counter())[finding["code"]] += 1
    return counts


def bandit(folder: Path) -> dict[str, Counter | None]:
    """Weigh bandit's findings by file and test, the worst of each; None for a file that it could not read.

    B101 (an `assert`) is not asked for: it speaks of deployed programs, and answers to coding tasks assert.
    """
    found = _run("bandit", "-r", ".", "-f", "json", "-q", "--ignore-nosec", "--exit-zero", "-s", "B101", folder=folder)
    worst = {Path(error["filename"]).name: None for error in found["errors"]}
    for finding in found["results"]:
        weights = worst.setdefault(Path(finding["filename"]).name, Counter())
        weight = SEVERITY[finding["issue_severity"]] * CONFIDENCE[finding["issue_confidence"]]
        if weights is not None:
            weights[finding["test_id"]] = max(weights[finding["test_id"]], weight)
    return worst


def detect_secrets(folder: Path) -> dict[str, Counter]:
    """Count what looks like a password, a key or a token, by file and kind.

    Without the detectors of high entropy, which take any long constant for a secret.
    """
    from detect_secrets.core import scan
    from detect_secrets.settings import transient_settings

    filters = ("is_sequential_string", "is_potential_uuid", "is_templated_secret", "is_not_alphanumeric_string",
               "is_prefixed_with_dollar_sign", "is_indirect_reference")
    settings = {"plugins_used": [{"name": name} for name in SECRETS],
                "filters_used": [{"path": f"detect_secrets.filters.heuristic.{name}"} for name in filters]}
    with transient_settings(settings) as used:
        used.disable_filters("detect_secrets.filters.allowlist.is_line_allowlisted")
        return {path.name: Counter(secret.type for secret in scan.scan_file(str(path))) for path in folder.iterdir()}


TOOLS: dict[str, Callable[[Path], dict]] = {"ruff": ruff, "bandit": bandit, "detect_secrets": detect_secrets}


def _facts(instruction: str, answer: str) -> Facts | None:
    code = text.extract_code(answer)
    try:
        with warnings.catch_warnings(action="ignore"):  # of the program's own backslashes
            tree = ast.parse(code)
            lines = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError):
        return None
    prose = _FENCED.sub("", answer) if "```" in answer else ""
    comments = "\n".join(token.string.lstrip("#! ") for token in lines if token.type == tokenize.COMMENT)
    facts = Facts(instruction=instruction, prose=prose, comments=comments, tree=tree, size=size(tree))
    return facts if facts.size else None


def _run(tool: str, *arguments: str, folder: Path):
    done = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=folder, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        raise RuntimeError(f"{tool} (exit code {done.returncode}) gave no JSON: {done.stderr[-500:].strip()}") from None
