"""Text to tokens and back: tokenizer, chat template, the prompt-completion boundary, code in answers.

The rule everything here serves: in training the model sees exactly the ids that it sees and emits at inference.
So the prompt is tokenised alone, as the sampler does it, and the completion is tokenised to continue it.
"""

import dataclasses
import json
import os
import re
from pathlib import Path

import jinja2
import numpy as np

from align_jax import records
from align_jax.records import Text

_CUT = "\u2402align-jax-cut-here\u2403"  # marks where a chat prompt ends; no template and no program contains it


class Unusable(ValueError):
    """A record that cannot become training tokens; `reason` is what it is counted under."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A prompt and a completion as int32 ids. The completion ends in the one EOS unless it was cut."""

    prompt: np.ndarray
    completion: np.ndarray
    was_cut: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def load(folder: str | Path):
    """Load a checkpoint's own tokenizer (transformers, local files only)."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch
    import transformers

    if not Path(folder).is_dir():
        raise ValueError(f"tokenizer: no such folder {folder!r}; expected a Hugging Face checkpoint folder")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # each tokenizer class fails in its own way on a file that is absent or broken
        why = str(error).partition("\n")[0]
        raise ValueError(f"{folder}: no tokenizer that transformers can load ({why})") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer in {folder} has no EOS token: completions could not be ended")
    return tokenizer


def fingerprint(tokenizer) -> str:
    """Name the tokenizer and its chat template by their content."""
    return records.fingerprint(tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token_id)


def stop_ids(tokenizer, folder: str | Path) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS and those of generation_config.json."""
    path = Path(folder) / "generation_config.json"
    named = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    extra = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *(i for i in extra if i is not None)})


def render(tokenizer, prompt: Text) -> str:
    """Return the text a model is given: plain text as it is, chat through the template.

    A chat prompt that ends in an assistant message is to be continued: that message is the start of the answer.
    """
    if isinstance(prompt, str):
        return prompt
    if tokenizer.chat_template is None:
        raise ValueError("chat prompt, but the tokenizer has no chat template; expected a plain-text prompt")
    if prompt[-1]["role"] != "assistant":
        return _apply(tokenizer, prompt, add_generation_prompt=True)
    before, found, _ = _template(tokenizer, prompt, _CUT).partition(_CUT)
    if not found:
        raise Unusable("template", "it leaves out what the assistant says last, so no answer can be started")
    return before


def encode_prompt(tokenizer, prompt: Text) -> list[int]:
    """Encode a prompt for sampling: plain text gets the tokenizer's own BOS, chat what its template has."""
    ids = tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    return _one_bos(tokenizer, ids, wanted=isinstance(prompt, str) and adds_bos(tokenizer))


def decode(tokenizer, ids) -> str:
    """Decode ids that continue a prompt, special tokens left out.

    Decoded alone they would lose their first space where the tokenizer puts one before every text (CodeLlama).
    """
    start = tokenizer("\n", add_special_tokens=False)["input_ids"]
    whole, before = (_spell(tokenizer, part, skip_special_tokens=True) for part in ([*start, *ids], start))
    return whole[len(before):]


def encode(tokenizer, prompt: Text, completion: Text, *, max_length: int, too_long: str = "drop") -> Tokens:
    """Encode a prompt and its completion so that training equals inference.

    `too_long` says what happens above `max_length` tokens: "drop" refuses the record, "cut" shortens the
    completion, which then has no EOS and says so in `was_cut`.

    Raises:
      Unusable: too long, EOS within the completion, a boundary that no tokenisation of the completion can
        continue, or a chat template that refuses the messages or does not extend its own prompt. The caller
        counts it by `reason`.
    """
    before = render(tokenizer, prompt)
    after = _after(tokenizer, prompt, completion, before)
    ids = encode_prompt(tokenizer, prompt)
    answer = _end_once(tokenizer, _continue(tokenizer, before, after))
    if len(ids) + len(answer) <= max_length:
        return Tokens(np.array(ids, np.int32), np.array(answer, np.int32))
    if too_long == "drop" or len(ids) >= max_length:
        raise Unusable("too long", f"{len(ids)} + {len(answer)} tokens, max_length is {max_length}")
    return Tokens(np.array(ids, np.int32), np.array(answer[:max_length - len(ids)], np.int32), was_cut=True)


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer starts plain text with BOS by itself (Llama does, Qwen does not)."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _one_bos(tokenizer, ids: list[int], *, wanted: bool) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        return ids
    has = ids[:1] == [bos]
    while ids[:1] == [bos]:
        ids = ids[1:]
    return [bos, *ids] if wanted or has else ids


def _after(tokenizer, prompt: Text, completion: Text, before: str) -> str:
    """The text that follows `before`, with the template's end of turn."""
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise ValueError("plain-text prompt with a chat completion; expected both of one kind")
        return completion
    answer = completion if isinstance(completion, str) else "".join(m["content"] for m in completion)
    whole = _template(tokenizer, prompt, answer)
    if not whole.startswith(before):
        raise Unusable("template", f"the rendered answer does not start with its prompt: {whole[:80]!r}")
    return whole[len(before):]


def _template(tokenizer, prompt: list[dict], answer: str) -> str:
    start = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    turns = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    return _apply(tokenizer, [*turns, {"role": "assistant", "content": start + answer}])


def _apply(tokenizer, messages: list[dict], **how) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except jinja2.TemplateError as error:  # it knows no system role, or wants the roles to alternate
        raise Unusable("template", str(error)) from error


def _spell(tokenizer, ids: list[int], **how) -> str:
    """Decode without the clean-up that Llama-3's config asks for: it takes spaces out of code."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False, **how)


def _continue(tokenizer, before: str, after: str) -> list[int]:
    """Ids of `after` that continue the ids of `before`, though the two might merge when joined.

    Tried in turn, and taken only if the whole decodes to the same text: the tail of the joint encoding;
    `after` alone; `after` behind a newline (for tokenizers that put a space before the first word).
    """
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head, joint, newline = ids(before), ids(before + after), ids("\n")
    if joint[:len(head)] == head:
        return joint[len(head):]
    behind = ids("\n" + after)
    candidates = [ids(after), *([behind[len(newline):]] if behind[:len(newline)] == newline else [])]
    for tail in candidates:
        if _spell(tokenizer, head + tail) == _spell(tokenizer, joint):
            return tail
    raise Unusable("boundary", f"{before[-20:]!r} + {after[:20]!r} cannot be tokenised apart")


def _end_once(tokenizer, ids: list[int]) -> list[int]:
    """Cut what a template puts behind EOS (white space, or EOS again), or add the missing one."""
    eos = tokenizer.eos_token_id
    end = ids.index(eos) if eos in ids else len(ids)
    behind = _spell(tokenizer, [i for i in ids[end:] if i != eos])
    if behind.strip():
        raise Unusable("EOS inside", f"the answer goes on behind {tokenizer.eos_token}: {behind[:40]!r}")
    return [*ids[:end], eos]


# Indent, fence, language, code; as in CommonMark, only a bare fence that is at least as long closes a block.
_BLOCK = re.compile(r"^([ \t]*)(`{3,})[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*\2`*[ \t\r]*$|\Z)", re.DOTALL | re.MULTILINE)


def extract_code(answer: str) -> str:
    """Return the Python of an answer: its first ```python block, else its first block, else all of it.

    A block left open at the end counts, since a stop string may have eaten the closing fence.
    """
    blocks = [(language.lower(), re.sub(rf"^[ \t]{{0,{len(indent)}}}", "", code, flags=re.MULTILINE))
              for indent, _, language, code in _BLOCK.findall(answer)]
    python = [code for language, code in blocks if language in ("python", "py", "python3")]
    return [*python, *(code for _, code in blocks), answer][0]
