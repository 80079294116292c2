"""`AutoTokenizer` on the folders of every family gives the tokens of the file itself, whatever class is named."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

import hf_moe  # noqa: F401  registers the classes
from hf_moe.register import FAMILIES

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXTS = ["Hello  world 1234567 你好!!\n\n  x", " leading", "<｜User｜>hi<think>\n", "a\tb\r\nc '  it's", ""]


@pytest.fixture(scope="module")
def stored() -> Tokenizer:
    """Byte-level BPE with DeepSeek's kind of splits and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    splits = [r"\p{N}{1,3}", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[BOS, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["hello world, it's over: return a + b # 12345"] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<｜User｜>", normalized=False), AddedToken("<think>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_file(family, named, stored, tmp_path):
    config = (
        {"model_type": family, "text_config": {"model_type": "step3_text"}}
        if family == "step3_vl"
        else {"model_type": family}
    )
    tokens = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True, "legacy": True, "tokenizer_class": named}
    if named is None:
        del tokens["tokenizer_class"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
    stored.save(str(tmp_path / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        wanted = stored.encode(text)
        assert tokenizer(text)["input_ids"] == wanted.ids, text
        plain = stored.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(plain) == stored.decode(plain, skip_special_tokens=False)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
