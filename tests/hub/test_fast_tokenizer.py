"""The fast tokenizer of a tiktoken vocabulary: tiktoken's ids, for every text."""

import json
import random
import unicodedata

import pytest
from kimi_release import NAMED, PUBLISHED_PATTERN, TEMPLATE, TOOLS, encoding, special_ids, trained_ranks, write_release
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_moe.cli import app
from hf_moe.hub import tokenizer as fast
from hf_moe.hub.tokenizer import TokenizerError, build_tokenizer, convert_tokenizer, make_fast_tokenizer, read_ranks

POINTS = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted release, from which everything that only the remote code reads is gone."""
    folder = write_release(tmp_path_factory.mktemp("kimi"))
    convert_tokenizer(folder, folder)
    (folder / "tiktoken.model").unlink()
    (folder / "tokenization_kimi.py").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k2", "vocab_size": 163840}))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoTokenizer.from_pretrained(folder)


# --- texts ------------------------------------------------------------------------------------------------------------


def _alphabets() -> dict[str, list[str]]:
    categories: dict[str, list[str]] = {}
    for point in range(0, 0x30000):
        if not 0xD800 <= point < 0xE000:
            categories.setdefault(unicodedata.category(chr(point)), []).append(chr(point))
    han = [chr(point) for point in (*range(0x4E00, 0x4E80), 0x3007, 0x3005, 0x2E80, 0x2F00, 0xF900, 0x20000, 0x3021)]
    return {
        "ascii": [chr(point) for point in range(128)],
        "words": ["the", "I", "'m", "'S", "'ll", "'LL", "'re", "'t", "'ſ", "don't", "K", " ", "DON'T", "x1", "’s", "_"],
        "han": [*han, " ", "a", "A", "1", "。", ",", "\n", "々", "ー", "の"],
        "kana": [chr(point) for point in range(0x3040, 0x3100)] + ["漢", "字", "A", " "],
        "spaces": [
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\r",
            "\u00a0",
            "\u3000",
            "\u2028",
            "\u0085",
            "\x0b",
            "\x1c",
            "a",
            "!",
        ],
        "marks": [*random.Random(1).sample(categories["Mn"], 60), "e", "漢", " ", "1", "\n"],
        "unassigned": [*random.Random(2).sample(categories["Cn"], 200), "a", " "],
        "control": [*categories["Cc"], "\u200b", "\u200d", "\ufeff", "\ue000", "a"],
        "emoji": [*"👩👧🏽🎉🇩🇪❤☎0🄰", "\u200d", "\ufe0f", "\u20e3", " "],
        "titles": [*categories["Lt"], *random.Random(3).sample(categories["Lm"], 40), "a", "A", "'s"],
        "numbers": [*categories["Nl"], *random.Random(4).sample(categories["No"], 60), "1", "23", "456", " ", "½"],
        "special": [*special_ids(len(trained_ranks())), "<|im_end|", "|>", "[EOS", "<|", " ", "hello", "漢"],
        "any": [chr(point) for point in random.Random(5).sample(POINTS, 5000)],
    }


def fuzzed(count: int, seed: int) -> list[str]:
    """Texts of up to 60 pieces from one to three alphabets, some with long runs of one character."""
    rng, alphabets = random.Random(seed), list(_alphabets().values())
    texts = []
    for index in range(count):
        chosen = [alphabets[index % len(alphabets)], *rng.sample(alphabets, rng.randint(0, 2))]
        pieces = [rng.choice(rng.choice(chosen)) for _ in range(rng.randint(1, 60))]
        if rng.random() < 0.1:
            pieces.insert(rng.randrange(len(pieces)), rng.choice(rng.choice(chosen)) * rng.randint(2, 150))
        texts.append("".join(pieces))
    return texts


# --- equality ---------------------------------------------------------------------------------------------------------


def test_12000_texts_with_special_tokens_allowed(loaded):
    reference, texts = encoding(), fuzzed(12_000, seed=0)
    assert len(set(texts)) > 11_500
    seen = loaded(texts, add_special_tokens=False)["input_ids"]
    wrong = [(text, ids) for text, ids in zip(texts, seen) if ids != reference.encode(text, allowed_special="all")]
    assert not wrong, f"{len(wrong)} differ, the first: {wrong[0]!r}"
    assert sum(max(ids) >= len(trained_ranks()) for ids in seen) > 500, "special tokens occur"
    undone = loaded.batch_decode(seen)
    assert undone == texts == reference.decode_batch(seen)


def test_10000_texts_with_special_tokens_as_text(loaded):
    """`split_special_tokens` reads the text of special tokens as text. Markers that are not special stay markers."""
    reference, texts = encoding(), fuzzed(10_000, seed=1)
    seen = loaded(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    allowed = set(TOOLS.values())
    wrong = [
        text
        for text, ids in zip(texts, seen)
        if ids != reference.encode(text, allowed_special=allowed, disallowed_special=())
    ]
    assert not wrong, f"{len(wrong)} differ, the first: {wrong[0]!r}"
    ordinary = [(text, ids) for text, ids in zip(texts, seen) if not any(marker in text for marker in allowed)]
    assert len(ordinary) > 9_000
    assert all(ids == reference.encode_ordinary(text) for text, ids in ordinary)


def test_ids_that_are_no_text_decode_alike(loaded):
    """Cut and shuffled ids: bytes that are not UTF-8."""
    rng, reference = random.Random(2), encoding()
    for _ in range(2_000):
        ids = [rng.randrange(len(trained_ranks()) + 256) for _ in range(rng.randint(1, 12))]
        assert loaded.decode(ids) == reference.decode(ids), ids


def test_every_token_decodes_to_its_bytes_and_encodes_to_itself(loaded):
    reference = encoding()
    for token, rank in trained_ranks().items():
        assert loaded.decode([rank]) == token.decode("utf-8", "replace")
        if len(reference.encode_ordinary(token.decode("utf-8", "replace"))) == 1 and b"\xef\xbf\xbd" not in token:
            assert loaded.encode(token.decode("utf-8"), add_special_tokens=False) == [rank]


@pytest.mark.parametrize("seed", range(40))
def test_merges_of_vocabularies_that_no_training_makes(seed):
    """Random tokens with random ranks: several splits, tokens that no merge reaches, long ones before their parts."""
    rng = random.Random(seed)
    letters = rng.choice((b"ab", b"abc", b"a"))
    tokens = {bytes([byte]) for byte in range(256)}
    while len(tokens) < 256 + (20 if len(letters) == 1 else rng.randint(5, 60)):
        tokens.add(bytes(rng.choice(letters) for _ in range(rng.randint(2, 40 if len(letters) == 1 else 7))))
    order = sorted(tokens)
    rng.shuffle(order)
    ranks = {token: rank for rank, token in enumerate(order)}
    ours, reference = build_tokenizer(ranks, []), encoding(ranks)
    for _ in range(200):
        text = "".join(chr(rng.choice(letters)) for _ in range(rng.randint(1, rng.choice((12, 40, 300)))))
        assert ours.encode(text).ids == reference.encode_ordinary(text), text


@pytest.mark.parametrize(
    "characters",
    [
        r"\p{Han}",
        r"\p{L}",
        r"\p{N}",
        r"\s",
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]",
        r"(?i:[stremvld])",
    ],
)
def test_every_code_point_falls_into_the_same_class(characters):
    """A release of either library with newer Unicode tables fails here, and would give other ids for new characters."""
    tiktoken = pytest.importorskip("tiktoken")
    bytes_alone = {bytes([byte]): byte for byte in range(256)}
    reference = tiktoken.Encoding("class", pat_str=characters, mergeable_ranks=bytes_alone, special_tokens={})
    ours = pre_tokenizers.Split(Regex(characters), behavior="removed")
    theirs_in = {point for point in POINTS if reference.encode_ordinary(chr(point))}
    ours_in = {point for point in POINTS if not ours.pre_tokenize_str(chr(point))}
    assert ours_in == theirs_in, sorted(ours_in ^ theirs_in)[:20]
    assert 0 < len(ours_in) < len(POINTS)


def test_the_pattern_is_the_published_one():
    assert fast.PATTERN == PUBLISHED_PATTERN


# --- what goes with the tokens ----------------------------------------------------------------------------------------


def test_special_tokens_are_kept(loaded, folder):
    first = len(trained_ranks())
    assert len(loaded) == first + 256
    assert {text: loaded.convert_tokens_to_ids(text) for text in special_ids(first)} == special_ids(first)
    tokens = (loaded.bos_token, loaded.eos_token, loaded.unk_token, loaded.pad_token)
    assert tokens == ("[BOS]", "[EOS]", "[UNK]", "[PAD]")
    assert set(NAMED.values()) <= set(loaded.all_special_tokens)
    ids = loaded.encode(f"a<|im_end|><|tool_call_begin|>b<|reserved_token_{first + 5}|>")
    assert loaded.decode(ids, skip_special_tokens=True) == "a<|tool_call_begin|>b", "tool markers are no special tokens"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "auto_map" not in config and config["model_max_length"] > 1e29


@pytest.mark.parametrize("template_file", [True, False], ids=["file", "configuration"])
def test_chat_template_is_kept(tmp_path, template_file):
    source = write_release(tmp_path / "source", template_file=template_file)
    convert_tokenizer(source, tmp_path / "target")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "target")
    assert loaded.chat_template == TEMPLATE
    chat = [{"role": "user", "content": "写一首诗"}]
    text = loaded.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_user|>user<|im_middle|>写一首诗<|im_end|><|im_assistant|>assistant<|im_middle|>"
    ids = loaded.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == encoding().encode(text, allowed_special="all")


def test_it_survives_saving(loaded, tmp_path):
    loaded.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = fuzzed(500, seed=7)
    assert again(texts)["input_ids"] == loaded(texts)["input_ids"]
    assert again.chat_template == loaded.chat_template


def test_what_a_conversion_has_to_know(tmp_path):
    """`make_fast_tokenizer` works on bytes, so that a conversion of any source can use it."""
    folder = write_release(tmp_path)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = make_fast_tokenizer(files, "somewhere")
    assert set(made.files) == {"tokenizer.json", "tokenizer_config.json"}
    assert set(made.replaced) == {"tiktoken.model", "tokenization_kimi.py"}
    assert fast.needs_fast_tokenizer(files) and not fast.needs_fast_tokenizer({**files, **made.files})
    assert make_fast_tokenizer(files).files == made.files, "the same bytes every time"


# --- errors -----------------------------------------------------------------------------------------------------------


def _line(text: bytes, rank: int) -> bytes:
    import base64

    return base64.b64encode(text) + b" %d\n" % rank


WHOLE = b"".join(_line(bytes([byte]), byte) for byte in range(256))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WHOLE + b"%%% 256\n", "line 257"),
        (WHOLE + b"YWI=\n", "line 257"),
        (WHOLE + b"YWI= x\n", "line 257"),
        (WHOLE + _line(b"a", 256), "there twice"),
        (WHOLE + _line(b"ab", 255), "ranks"),
        (WHOLE + _line(b"ab", 300), "ranks"),
        (WHOLE + b" 256\n", "line 257"),
        (b"".join(_line(bytes([byte]), byte) for byte in range(255)), "single bytes"),
        (b"", "single bytes"),
    ],
    ids=["base64", "no rank", "rank", "token twice", "rank twice", "gap", "empty token", "byte", "nothing"],
)
def test_bad_vocabularies_are_refused(data, message):
    with pytest.raises(TokenizerError, match=message):
        read_ranks(data, "here/tiktoken.model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"added_tokens_decoder": {"5": {"content": "x"}}}, "id 5"),
        ({"added_tokens_decoder": {"999999": {"content": "x"}}}, "id 999999"),
        ({"added_tokens_decoder": {"a": {"content": "x"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"1500": {}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"1500": {"content": "x"}, "1501": {"content": "x"}}}, "more than one id"),
        ({"added_tokens_decoder": {"1500": {"content": "self"}}}, "spelled like"),
    ],
    ids=["below", "beyond", "no number", "no content", "twice", "a token already"],
)
def test_bad_special_tokens_are_refused(tmp_path, change, message):
    assert len(trained_ranks()) == 1500 and b"self" in trained_ranks()
    folder = write_release(tmp_path)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TokenizerError, match=message):
        convert_tokenizer(folder, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_command(tmp_path):
    source, target = write_release(tmp_path / "source"), tmp_path / "target"
    result = CliRunner().invoke(app, ["tokenizer", str(source), str(target)])
    assert result.exit_code == 0, result.output
    assert {path.name for path in target.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    again = CliRunner().invoke(app, ["tokenizer", str(source), str(target)])
    assert again.exit_code == 2 and "--overwrite" in " ".join(again.output.split())
    assert CliRunner().invoke(app, ["tokenizer", str(source), str(target), "--overwrite"]).exit_code == 0
    missing = CliRunner().invoke(app, ["tokenizer", str(target)])
    assert missing.exit_code == 2
    in_place = CliRunner().invoke(app, ["tokenizer", str(source)])
    assert in_place.exit_code == 0 and (source / "tokenizer.json").is_file()
    (source / "tiktoken.model").unlink()
    (source / "tokenizer.json").unlink()
    nothing = CliRunner().invoke(app, ["tokenizer", str(source)])
    assert nothing.exit_code == 2 and "tiktoken.model" in nothing.output
