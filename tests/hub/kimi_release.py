"""A small release in the shape of Kimi-K2's: a tiktoken vocabulary that was trained on text, and its configuration."""

import base64
import functools
import inspect
import json
import random
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

# As the release has it, written out here once more: the test compares our pattern with it.
PUBLISHED_PATTERN = "|".join(
    [
        r"""[\p{Han}]+""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"""
        r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"""
        r"""[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
# Offsets from the first special id, as in Kimi-K2 (163584 + offset). Tool markers are not special there.
NAMED = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 6: "<|start_header_id|>"}
NAMED |= {7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>", 17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"}
TOOLS = {11: "<|tool_calls_section_begin|>", 12: "<|tool_calls_section_end|>", 13: "<|tool_call_begin|>"}
TOOLS |= {14: "<|tool_call_argument_begin|>", 15: "<|tool_call_end|>"}
TEMPLATE = (
    "{% for message in messages %}<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>"
    "{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
TEXT = (
    "月之暗面的模型会使用工具。人工智能正在改变世界,大语言模型可以写代码、回答问题。今天天气很好,我们去公园散步吧。"
    "これは日本語の文章です。ひらがなとカタカナと漢字。 한국어 문장도 있습니다. Привет, мир! Как дела? "
    "Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم. हिन्दी में पाठ। Tiếng Việt có dấu. naïve café Ærøskøbing. "
    "I'm sure they'll say it's what we've done, isn't it? DON'T SHOUT, I'D RATHER YOU'RE QUIET. 3.14159 2026 "
    "👩‍👩‍👧‍👦 🇩🇪 🎉🎉 \u200d \ufeff \t\t\n\n    indented\r\n\r\n"
)


@functools.lru_cache(maxsize=1)
def trained_ranks() -> dict[bytes, int]:
    """About 1,500 tokens; ranks in the order in which training found them, the bytes in a shuffled order first."""
    corpus = [TEXT] * 8 + [inspect.getsource(sys.modules[name]) for name in ("json", "random", "inspect")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PUBLISHED_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    to_byte = {char: tokenizer_byte for tokenizer_byte, char in enumerate(_byte_characters())}
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    spelled = [bytes(to_byte[char] for char in token) for token, _ in tokens]
    single = [token for token in spelled if len(token) == 1]
    random.Random(0).shuffle(single)
    return {token: rank for rank, token in enumerate(single + [token for token in spelled if len(token) > 1])}


def _byte_characters() -> list[str]:
    """GPT-2's characters of the bytes, found by asking the library instead of by rule."""
    tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters: dict[int, str] = {}
    for point in (*range(0x80), *range(0x80, 0x800), *range(0x800, 0x110000, 0x400)):
        if 0xD800 <= point < 0xE000:
            continue
        text = chr(point)
        shown = tokenizer.pre_tokenize_str(text)[0][0]
        characters.update(zip(text.encode("utf-8"), shown))
    # Bytes that no UTF-8 text holds: the rest of the alphabet, in order.
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(characters.values()))
    return [characters[byte] if byte in characters else rest.pop(0) for byte in range(256)]


def special_ids(first: int) -> dict[str, int]:
    """All 256 special texts, as the release's code names them."""
    named = {**NAMED, **TOOLS}
    return {named.get(offset, f"<|reserved_token_{first + offset}|>"): first + offset for offset in range(256)}


def encoding(ranks: dict[bytes, int] | None = None):
    """The reference; skips the test where tiktoken is not installed."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = trained_ranks() if ranks is None else ranks
    return tiktoken.Encoding(
        "kimi", pat_str=PUBLISHED_PATTERN, mergeable_ranks=ranks, special_tokens=special_ids(len(ranks))
    )


def write_release(folder: Path, ranks: dict[bytes, int] | None = None, template_file: bool = True) -> Path:
    """Writes `tiktoken.model`, `tokenizer_config.json`, remote code that fails when it is run, and the template."""
    ranks = trained_ranks() if ranks is None else ranks
    folder.mkdir(parents=True, exist_ok=True)
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    first = len(ranks)
    added = {str(first + offset): {"content": text, **entry, "special": True} for offset, text in NAMED.items()}
    added |= {str(first + offset): {"content": text, **entry, "special": False} for offset, text in TOOLS.items()}
    config = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [NAMED[2], NAMED[3], NAMED[4], NAMED[6], NAMED[7], "[EOT]", NAMED[10], NAMED[17]],
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "extra_special_tokens": {},
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    }
    if template_file:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    else:
        config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "tokenization_kimi.py").write_text("raise SystemExit('the remote code was run')\n")
    return folder
