"""Text to ids and back, on tokenizers of every kind there is: training must see what inference sees."""

import functools
import itertools
import json
from unittest.mock import Mock

import numpy as np
import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from align_jax import text

CORPUS = 20 * [
    'def add(a, b):\n    """Add two numbers."""\n    return a + b\n\n\nprint(add(1, 22))\n',
    "for i in range(10):\n        if i % 2 == 0:\n            total += i\n    return total\n",
    "class A:\n\n    x = [1, 2, 3]\n\n\n\n",
    "Please write a function. [INST] user assistant\n```python\nimport math\n```\n",
]
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # the published pattern; Qwen's differs in \p{N}
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|head|>", "<|end_head|>"]
HAS_EOS = {"gpt2": "<|endoftext|>", "llama3": "<|im_end|>", "qwen": "<|im_end|>"}  # else </s>
KINDS = ["gpt2", "llama3", "qwen", "metaspace_first", "metaspace_always", "legacy_llama"]
ADD_BOS = KINDS[1:2] + KINDS[3:]

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEMPLATES = {
    "chatml": CHATML,
    "no generation prompt": CHATML.split("{% if add_gen")[0],
    "llama3": "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|end_head|>\n\n{{ m.content | trim }}"
              "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}",
    "codellama": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }} [/INST]"
                 "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% else %}"
                 "{{ raise_exception('no system role') }}{% endif %}{% endfor %}",
}


@functools.cache
def raw_tokenizer(kind: str) -> Tokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    trainer = functools.partial(trainers.BpeTrainer, vocab_size=600, special_tokens=SPECIALS, show_progress=False)
    if kind in HAS_EOS:
        raw = Tokenizer(models.BPE())
        pattern = LLAMA3 if kind == "llama3" else LLAMA3.replace("{1,3}", "")
        split = [] if kind == "gpt2" else [pre_tokenizers.Split(Regex(pattern), "isolated")]
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Sequence([*split, byte_level]), decoders.ByteLevel()
        if kind == "qwen":
            raw.normalizer = normalizers.NFC()
        raw.train_from_iterator(CORPUS, trainer(initial_alphabet=byte_level.alphabet()))
        return raw
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator([line for page in CORPUS for line in page.split("\n")], trainer())
    bpe = json.loads(learner.to_str())["model"]
    # Runs of spaces, and bytes for what is not in the vocabulary, as SentencePiece has them; "\n" is a byte.
    merges = [tuple(pair) for pair in bpe["merges"]] + [("▁", "▁"), ("▁▁", "▁▁")]
    tokens = [*bpe["vocab"], "▁▁", "▁▁▁▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.add_special_tokens(SPECIALS)
    if kind == "legacy_llama":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = kind.removeprefix("metaspace_")
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    return raw


def make(kind: str, template: str | None = None, *, adds_bos: bool | None = None, **changes):
    """A fast tokenizer as checkpoints ship them; padding is EOS, as people make it."""
    raw = Tokenizer.from_str(raw_tokenizer(kind).to_str())
    adds_bos = kind in ADD_BOS if adds_bos is None else adds_bos
    if adds_bos:
        bos = [("<s>", raw.token_to_id("<s>"))]
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    eos = HAS_EOS.get(kind, "</s>")
    special = {"bos_token": "<s>" if kind in ADD_BOS else None, "eos_token": eos, "pad_token": eos}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special | changes)
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


def ids_of(tokenizer, string: str) -> list[int]:
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def check(tokenizer, prompt, completion, *, num_bos: int) -> text.Tokens:
    """What must hold of every encoding; `num_bos` is how many BOS the prompt starts with."""
    made = text.encode(tokenizer, prompt, completion, max_length=10**6)
    assert made.prompt.dtype == made.completion.dtype == np.int32 and not made.was_cut
    whole = [*made.prompt.tolist(), *made.completion.tolist()]
    assert made.prompt.tolist() == text.encode_prompt(tokenizer, prompt)
    if tokenizer.bos_token_id is not None:
        assert whole[:num_bos + 1].count(tokenizer.bos_token_id) == num_bos
        assert made.completion.tolist().count(tokenizer.bos_token_id) == 0
    assert made.completion.tolist().index(tokenizer.eos_token_id) == len(made.completion) - 1
    return made


# --- plain text

PROMPTS = ["def add(a, b):\n", "x = ", "x =", "def f():\n    ", "if a:\n\n", "a.", "", "foo", "[1, 2", "\tif", "1",
           "é", 'def f():\n    """doc"""\n', "return", "a ", "\n", "# 你好"]
COMPLETIONS = ["    return a + b\n", " 1", "1", "\n\n    x", "    ", "\n", "\treturn", "foo", "3]", "é", "add",
               "  return 1\n\n", ", 22", "\r\n    pass", "你 \U0001f600", "."]


@pytest.mark.parametrize("kind", KINDS)
def test_every_boundary_of_plain_text(kind):
    tokenizer, num_merged = make(kind), 0
    for prompt, completion in itertools.product(PROMPTS, COMPLETIONS):
        made = check(tokenizer, prompt, completion, num_bos=kind in ADD_BOS)
        head, joint = ids_of(tokenizer, prompt), ids_of(tokenizer, prompt + completion)
        num_merged += joint[:len(head)] != head
        ids = [*made.prompt.tolist()[kind in ADD_BOS:], *made.completion.tolist()[:-1]]
        if prompt or not completion.startswith(" "):  # Metaspace takes a text's first space for the one it adds
            assert tokenizer.decode(ids) == prompt + completion
        assert tokenizer.decode(ids) == tokenizer.decode(joint)
        if prompt:
            assert text.decode(tokenizer, made.completion) == completion
    assert num_merged > 10  # so that the hard case was really there


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_one_bos_in_plain_text(kind, adds_bos):
    tokenizer = make(kind, adds_bos=adds_bos, bos_token="<s>")
    assert text.adds_bos(tokenizer) == adds_bos
    for prompt in ("def f():\n", ""):
        assert text.encode_prompt(tokenizer, prompt) == tokenizer(prompt)["input_ids"]
        check(tokenizer, prompt, "    pass", num_bos=int(adds_bos))
        assert text.encode_prompt(tokenizer, "<s>" + prompt).count(tokenizer.bos_token_id) == 1
        assert text.encode_prompt(tokenizer, "<s><s>" + prompt).count(tokenizer.bos_token_id) == 1


def test_bos_may_be_eos():
    tokenizer = make("gpt2", bos_token="<|endoftext|>")  # GPT-2's own setting
    made = text.encode(tokenizer, "x =", " 1", max_length=100)
    assert [*made.prompt, *made.completion] == [*ids_of(tokenizer, "x = 1"), tokenizer.eos_token_id]


def test_training_ids_are_those_of_the_joint_text_where_nothing_merges():
    tokenizer = make("llama3")
    made = text.encode(tokenizer, "def add(a, b):\n", "    return a + b", max_length=100)
    assert [*made.prompt, *made.completion] == [*tokenizer("def add(a, b):\n    return a + b")["input_ids"],
                                                tokenizer.eos_token_id]


def test_a_boundary_that_cannot_be_kept_is_refused_not_corrupted():
    with pytest.raises(text.Unusable, match="boundary") as caught:  # NFC makes one letter of e and its accent
        text.encode(make("qwen"), "# caf" + "e", "\u0301", max_length=100)
    assert caught.value.reason == "boundary"


# --- EOS


@pytest.mark.parametrize("kind", KINDS)
def test_eos_in_the_completion(kind):
    tokenizer = make(kind)
    eos, want = tokenizer.eos_token, text.encode(tokenizer, "x =", " 1", max_length=100)
    for completion in (f" 1{eos}", f" 1{eos}{eos}", f" 1{eos}\n"):
        made = check(tokenizer, "x =", completion, num_bos=kind in ADD_BOS)
        assert made.completion.tolist() == want.completion.tolist()
    with pytest.raises(text.Unusable, match="goes on behind") as caught:
        text.encode(tokenizer, "x =", f" '{eos}' + y", max_length=100)
    assert caught.value.reason == "EOS inside"


@pytest.mark.parametrize("template", TEMPLATES)
def test_eos_in_a_chat_answer(template):
    tokenizer = make("llama3", template)
    prompt, eos = [{"role": "user", "content": "q"}], tokenizer.eos_token
    want = check(tokenizer, prompt, "a", num_bos=template in ("llama3", "codellama"))
    made = check(tokenizer, prompt, f"a{eos}", num_bos=template in ("llama3", "codellama"))
    assert text.decode(tokenizer, made.completion).strip() == text.decode(tokenizer, want.completion).strip()
    with pytest.raises(text.Unusable, match="EOS inside"):
        text.encode(tokenizer, prompt, f"print('{eos}')", max_length=100)


def test_stop_ids_are_the_tokenizers_and_the_generation_configs(tmp_path):
    tokenizer = make("qwen")
    eos = tokenizer.eos_token_id
    assert text.stop_ids(tokenizer, tmp_path) == [eos]
    for named, extra in ((5, {5}), ([5, eos], {5}), (None, set())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert text.stop_ids(tokenizer, tmp_path) == sorted({eos} | extra)


# --- chat

USER = [{"role": "user", "content": "write add "}]
CHATS = {
    "one turn": USER,
    "three turns": [*USER, {"role": "assistant", "content": "def add"}, {"role": "user", "content": "go on"}],
    "to continue": [*USER, {"role": "assistant", "content": "Below:\n```python\n"}],
    "to continue a line": [*USER, {"role": "assistant", "content": "x = "}],
    "to continue nothing": [*USER, {"role": "assistant", "content": ""}],
}
ANSWERS = ["    return a + b", "1", "\n\n    x", "```python\nx\n```", "é"]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_chat_is_what_the_template_says(kind, template):
    tokenizer = make(kind, template, bos_token="<s>")
    has_bos = template in ("llama3", "codellama")
    for (_, prompt), answer in itertools.product(CHATS.items(), ANSWERS):
        made = check(tokenizer, prompt, answer, num_bos=int(has_bos))
        start = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
        turns = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
        turns = [*turns, {"role": "assistant", "content": start + answer}]
        ids = ids_of(tokenizer, tokenizer.apply_chat_template(turns, tokenize=False))
        if tokenizer.eos_token_id in ids:  # what is behind the last EOS is never generated
            ids = ids[:len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
        else:
            ids += [tokenizer.eos_token_id]
        assert tokenizer.decode([*made.prompt, *made.completion]) == tokenizer.decode(ids)


def test_a_prefilled_answer_is_continued_not_closed():
    for template in TEMPLATES:
        prompt = text.render(make("llama3", template), CHATS["to continue"])
        assert prompt.endswith("Below:\n```python\n") and prompt.count("```") == 1


def test_a_conversational_answer_is_the_same_as_its_text():
    tokenizer = make("qwen", "chatml")
    plain, chat = (text.encode(tokenizer, USER, answer, max_length=100)
                   for answer in ("a", [{"role": "assistant", "content": "a"}]))
    assert plain.completion.tolist() == chat.completion.tolist()
    with pytest.raises(ValueError, match="plain-text prompt with a chat completion"):
        text.encode(tokenizer, "q", [{"role": "assistant", "content": "a"}], max_length=100)


@pytest.mark.parametrize("template, prompt, why", [
    (TEMPLATES["codellama"], [{"role": "system", "content": "s"}, *USER], "no system role"),
    (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", USER, "does not start with its prompt"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", CHATS["to continue"], "leaves out"),
])
def test_a_template_that_does_not_serve_is_a_counted_reason(template, prompt, why):
    with pytest.raises(text.Unusable, match=why) as caught:
        text.encode(make("qwen", template), prompt, "a", max_length=100)
    assert caught.value.reason == "template"


def test_chat_needs_a_template():
    with pytest.raises(ValueError, match="has no chat template"):
        text.encode_prompt(make("gpt2"), USER)


# --- too long


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_long_is_cut_and_flagged_or_refused(kind):
    tokenizer = make(kind)
    prompt, completion = "def f():\n", "    return a + b\n"
    whole = text.encode(tokenizer, prompt, completion, max_length=10**6)
    p, total = len(whole.prompt), len(whole)
    assert len(text.encode(tokenizer, prompt, completion, max_length=total)) == total
    for length in range(total):
        with pytest.raises(text.Unusable, match="too long"):
            text.encode(tokenizer, prompt, completion, max_length=length)
        if length <= p:  # nothing of the completion would be left
            with pytest.raises(text.Unusable, match="too long"):
                text.encode(tokenizer, prompt, completion, max_length=length, too_long="cut")
            continue
        cut = text.encode(tokenizer, prompt, completion, max_length=length, too_long="cut")
        assert cut.was_cut and len(cut) == length and tokenizer.eos_token_id not in cut.completion
        assert cut.prompt.tolist() == whole.prompt.tolist()
        assert cut.completion.tolist() == whole.completion.tolist()[:length - p]


# --- back to text


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_keeps_its_first_space(kind):
    tokenizer = make(kind)
    for answer in ("    return 1", " 1", "  x\n  y", "\n    x", "é ", "", " "):
        ids = text.encode(tokenizer, "def f():\n", answer, max_length=100).completion
        assert text.decode(tokenizer, ids) == answer
        assert text.decode(tokenizer, ids[:-1]) == answer


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_grows_with_the_ids_but_for_a_character_in_pieces(kind):
    tokenizer = make(kind)
    ids = ids_of(tokenizer, "add(你, \U0001f600)\n    x")
    texts = [text.decode(tokenizer, ids[:length]).rstrip("\ufffd") for length in range(len(ids) + 1)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


# --- loading and naming


def test_a_saved_tokenizer_loads_with_its_template(tmp_path):
    tokenizer = make("metaspace_first", "codellama")
    tokenizer.save_pretrained(tmp_path)
    loaded = text.load(tmp_path)
    assert text.encode_prompt(loaded, USER) == text.encode_prompt(tokenizer, USER)
    assert text.fingerprint(loaded) == text.fingerprint(text.load(tmp_path))


def test_fingerprint_covers_vocabulary_template_and_eos():
    prints = [text.fingerprint(tokenizer) for tokenizer in (
        make("gpt2"), make("llama3"), make("gpt2", "chatml"), make("gpt2", eos_token="</s>"))]
    assert len(set(prints)) == 4


def test_loading_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such folder .*expected a Hugging Face checkpoint folder"):
        text.load(tmp_path / "none")
    for said, shown in [("first\nsecond", "first"), ("", "")]:
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=rf"no tokenizer .*load \({shown}\)$"):
            patch.setattr(transformers.AutoTokenizer, "from_pretrained", Mock(side_effect=OSError(said)))
            text.load(tmp_path)
    make("gpt2", eos_token=None, pad_token=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no EOS token"):
        text.load(tmp_path)


# --- code in answers

CODE = "def f():\n    return 1\n"


@pytest.mark.parametrize("answer, code", [
    (CODE, CODE),
    (f"```python\n{CODE}```", CODE),
    (f"Here:\n\n```python\n{CODE}```\nDone.", CODE),
    (f"```\n{CODE}```", CODE),
    (f"```py\n{CODE}```", CODE),
    (f"```Python3\n{CODE}```", CODE),
    (f"``` python title=x.py\n{CODE}```", CODE),
    (f"```python\n{CODE}", CODE),  # the closing fence was a stop string
    (f"```python\n{CODE.rstrip()}", CODE.rstrip()),
    (f"```bash\npip install x\n```\n\n```python\n{CODE}```\n```text\n1\n```", CODE),
    (f"```text\nx\n```\n```python\n{CODE}", CODE),
    (f"```python\n{CODE}```\n```python\nassert f() == 1\n```", CODE),  # the first is the answer
    (f"```\n{CODE}```\nprints\n```\n1\n```", CODE),
    (f"Use ```f()``` like this:\n```python\n{CODE}```", CODE),
    (f"Call ```f```.\n{CODE}", f"Call ```f```.\n{CODE}"),
    ("```python\ns = '```'\nt = 1\n```\n", "s = '```'\nt = 1\n"),
    ("```python\ns = '```'\n```\nIt is ```s```.", "s = '```'\n"),
    ("```python\nx = 1  # ```\ny = 2\n", "x = 1  # ```\ny = 2\n"),  # unclosed, with a fence inside
    ('```python\n"""Doc.\n\n    ```python x\n"""\n```\n', '"""Doc.\n\n    ```python x\n"""\n'),
    ('````python\n"""\n```\nf()\n```\n"""\n````\n', '"""\n```\nf()\n```\n"""\n'),
    (f"```python\r\n{CODE}```\r\nbye".replace("\n", "\r\n").replace("\r\r", "\r"), CODE.replace("\n", "\r\n")),
    ("1. So:\n   ```python\n   def f():\n       return 1\n   ```\n", CODE),
    ("  ```\n  def f():\n      return 1\n", CODE),
    ("\t```python\n\tx = 1\n\n\ty = 2\n\t```", "x = 1\n\ny = 2\n"),
    ("```python\n```\n", ""),
    ("", ""),
])
def test_extract_code(answer, code):
    assert text.extract_code(answer) == code


def test_extract_code_is_fast():
    assert text.extract_code("```python\n" + "x = 1\n" * 20_000 + "`" * 10_000)
    assert text.extract_code("\n".join(["   " * 50 + "``" * 40] * 300)) is not None
