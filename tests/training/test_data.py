"""Data: what is read, which tokens are learnt, packing, order; and what each kind of bad data is answered with."""

import gzip
import json
import random

import pytest
import torch
from testing import assert_close
from tiny import tiny_model
from tiny_step3 import text_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_moe.demo import DEMO_MODEL
from hf_moe.training import FinetuneArguments
from hf_moe.training import data as data_module
from hf_moe.training.chat import encode_chat
from hf_moe.training.data import IGNORE_INDEX, Collator, Encoder, RowOrder, TokenRows, load_rows, pack
from hf_moe.training.run import describe
from hf_moe.training.sources import DataError, read_samples

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add 2 and 3."},
    {"role": "assistant", "content": "It is 5."},
    {"role": "user", "content": "And 4?"},
    {"role": "assistant", "content": "  Then 9.\nDone"},
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Turns end with the end-of-text token, roles are written in one word, as in DeepSeek-V3's template.
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}<User>{{ message.content }}"
    "{% else %}<Assistant>{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant>{% endif %}"
)
# The prompt for a turn opens a thought that the history does not have, as in R1's template.
THINKING = DEEPSEEK.replace("<Assistant>{% endif %}", "<Assistant><think>\n{% endif %}")
TAGGED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A: {% generation %}{{ message.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ message.role }}: {{ message.content }}{% endif %}\n{% endfor %}"
)
# Earlier turns lose their end: what a prefix renders is no prefix.
UNSTABLE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}"
    "{% if loop.last %}<last>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def options(dataset="none", **more) -> FinetuneArguments:
    return FinetuneArguments(model_name_or_path=str(DEMO_MODEL), dataset_name=str(dataset), output_dir="none", **more)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def learnt(tokenizer, row) -> str:
    """The text of what is learnt of an (ids, labels) pair; gaps show as a zero."""
    parts, at = [], False
    for label in row[1]:
        if label != IGNORE_INDEX:
            if not at:
                parts.append([])
            parts[-1].append(int(label))
        at = label != IGNORE_INDEX
    return "\0".join(tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts)


def only_row(data: TokenRows, index: int = 0):
    return data[index][0]


# --- formats ----------------------------------------------------------------------------------------------------------


def test_text(tokenizer, tmp_path):
    data, held_out = load_rows(tokenizer, options(write(tmp_path / "a.jsonl", [{"text": "def f(x): return x"}])))
    ids, labels = only_row(data)
    assert held_out is None and labels[0] == IGNORE_INDEX and torch.equal(labels[1:], ids[1:])
    assert tokenizer.decode(ids) == "def f(x): return x" + tokenizer.eos_token
    with_bos, _ = load_rows(tokenizer, options(tmp_path / "a.jsonl", add_bos_token=True, add_eos_token=False))
    ids, labels = only_row(with_bos)
    assert ids[0] == tokenizer.bos_token_id and ids[-1] != tokenizer.eos_token_id and (labels[1:] == ids[1:]).all()


@pytest.mark.parametrize("completion_only", [True, False])
def test_prompt_and_completion(tokenizer, tmp_path, completion_only):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1 + 1 =", "completion": " 2", "id": 4}])
    data, _ = load_rows(tokenizer, options(path, completion_only_loss=completion_only))
    text = learnt(tokenizer, only_row(data))
    assert text == " 2" + tokenizer.eos_token if completion_only else text.endswith(" + 1 = 2" + tokenizer.eos_token)


ROWS = [{"text": f"value number {n} is {n * n}"} for n in range(6)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "gz", "parquet", "csv", "folder", "dataset", "bom"])
def test_files_of_every_kind_hold_the_same_samples(tokenizer, tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    if kind in ("parquet", "csv", "dataset"):
        Dataset = pytest.importorskip("datasets").Dataset
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "bom":
        path = tmp_path / "data.jsonl"
        path.write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    elif kind == "gz":
        path = tmp_path / "data.jsonl.gz"
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "csv":
        Dataset.from_list(ROWS).to_csv(path)
    elif kind == "dataset":
        Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        write(path / "a.jsonl", ROWS[:4]), write(path / "b.jsonl", ROWS[4:])
    else:
        write(path, ROWS)
    data, _ = load_rows(tokenizer, options(path))
    texts = [tokenizer.decode(only_row(data, index)[0], skip_special_tokens=True) for index in range(len(data))]
    assert texts == [row["text"] for row in ROWS]


@pytest.mark.parametrize(("sample_by", "count"), [("document", 1), ("paragraph", 2), ("line", 3)])
def test_text_files(tokenizer, tmp_path, sample_by, count):
    path = tmp_path / "a.txt"
    path.write_text("First line\nsecond line\n\n\nlast — line\n", encoding="utf-8")
    samples = list(read_samples(str(path), sample_by=sample_by))
    assert len(samples) == count and samples[-1].where.endswith("line 1" if count == 1 else "line 5")
    data, _ = load_rows(tokenizer, options(path, sample_by=sample_by))
    assert "last — line" in tokenizer.decode(only_row(data, count - 1)[0])


SPLIT_FILES = ["data/train-00000.jsonl", "data/train-00001.jsonl", "test.jsonl.gz", "en_valid.json", "more.jsonl"]


def test_files_of_a_folder_that_are_named_after_splits(tokenizer, tmp_path):
    """What is put aside is not trained on, and is what is evaluated on; files are not evaluated on twice over."""
    for name in SPLIT_FILES:
        path = tmp_path / "all" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") if name.endswith("gz") else path.open("w") as file:
            file.write(json.dumps({"text": name}) + "\n")

    def texts(data):
        return [tokenizer.decode(only_row(data, index)[0], skip_special_tokens=True) for index in range(len(data))]

    for split, expected in {"test": [SPLIT_FILES[2]], "validation": [SPLIT_FILES[3]]}.items():
        train, held_out = load_rows(tokenizer, options(tmp_path / "all", dataset_test_split=split))
        assert texts(train) == SPLIT_FILES[:2] and texts(held_out) == expected
    assert texts(load_rows(tokenizer, options(tmp_path / "all" / "data"))[0]) == SPLIT_FILES[:2]
    for folder, split in (("all", "other"), ("all/data", "test")):
        with pytest.raises(DataError, match=f"has no split '{split}', but .*train"):
            load_rows(tokenizer, options(tmp_path / folder, dataset_test_split=split))
    with pytest.raises(DataError, match="is a file, which has no split 'test': name other data by --eval_dataset_name"):
        load_rows(tokenizer, options(tmp_path / "all" / "more.jsonl", dataset_test_split="test"))
    prose = tmp_path / "prose"
    prose.mkdir()
    for name in ("how-to-train.md", "test-first.md"):
        (prose / name).write_text(name)
    assert len(list(read_samples(str(prose)))) == 2


def test_a_hub_dataset_is_read_by_datasets(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": f"{split} {n} of the set"} for n in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    args = options("someone/something", dataset_config="en", dataset_test_split="test", max_train_samples=2)
    train, held_out = load_rows(tokenizer, args)
    assert asked == [("someone/something", "en", "train"), ("someone/something", "en", "test")]
    assert len(train) == 2 and len(held_out) == 3


def test_long_samples(tokenizer, tmp_path):
    text = " ".join(f"word{n}" for n in range(60))
    path = write(tmp_path / "a.jsonl", [{"text": "short one"}, {"text": text}])
    whole, _ = load_rows(tokenizer, options(path))
    long = only_row(whole, 1)[0]

    def cut(policy):
        return load_rows(tokenizer, options(path, max_length=16, too_long=policy))[0]

    assert len(cut("drop")) == 1 and cut("drop").dropped["dropped"] == 1
    assert torch.equal(only_row(cut("truncate"), 1)[0], long[:16])
    parts = [only_row(cut("split"), index) for index in range(1, len(cut("split")))]
    # Every token but the first is a target exactly once.
    assert torch.cat([labels[labels != IGNORE_INDEX] for _, labels in parts]).tolist() == long[1:].tolist()
    assert all(len(ids) <= 16 for ids, _ in parts)
    (tmp_path / "a.txt").write_text(text)
    assert len(load_rows(tokenizer, options(tmp_path / "a.txt", max_length=16))[0]) == len(parts)


def test_held_out_samples(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"sample {n:03d} here"} for n in range(50)])
    train, held_out = load_rows(tokenizer, options(path, validation_split=0.2))
    assert (len(train), len(held_out)) == (40, 10)

    def texts(data):
        return {tokenizer.decode(only_row(data, index)[0]) for index in range(len(data))}

    assert len(texts(train) | texts(held_out)) == 50
    again = load_rows(tokenizer, options(path, validation_split=10))
    assert texts(again[1]) == texts(held_out)
    assert texts(load_rows(tokenizer, options(path, validation_split=10, seed=1))[1]) != texts(held_out)


# --- chats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["It is 5.<|im_end|", "Then 9.\nDone<|im_end|"]),
        (DEEPSEEK, ["It is 5.<|eos|", "Then 9.\nDone<|eos|"]),
        (THINKING, ["It is 5.<|eos|", "Then 9.\nDone<|eos|"]),
        (TAGGED, ["It is 5.<|eos|", "Then 9.\nDone<|eos|"]),
    ],
    ids=["chatml", "deepseek", "thinking", "tagged"],
)
def test_the_assistants_turns_are_learnt(tokenizer, tmp_path, template, expected):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = template
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    data, _ = load_rows(tokenizer, options(path))
    row = only_row(data)
    assert tokenizer.decode(row[0]) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    # This tokenizer joins symbols with the word behind them: a span may begin with the end of the role's tag.
    assert [part.strip("> \n") for part in learnt(tokenizer, row).split("\0")] == expected
    everything, _ = load_rows(tokenizer, options(path, assistant_only_loss=False))
    assert (only_row(everything)[1][1:] == row[0][1:]).all()


def test_token_spans_are_exact_with_a_character_tokenizer(tmp_path):
    """Every character a token: the learnt text is the assistant's, to the character, in a chat of many turns."""
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHATML
    chat = CHAT[:1] + [
        {"role": role, "content": f"{role} says {turn}: <|im_start|> é {'x' * turn}"}
        for turn in range(8)
        for role in ("user", "assistant")
    ]
    ids, mask = encode_chat(tokenizer, chat, "here")
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert len(ids) == len(text)
    got = "".join(letter for letter, flag in zip(text, mask) if flag)
    assert got == "".join(f"{m['content']}<|im_end|>\n" for m in chat if m["role"] == "assistant")
    _, mask = encode_chat(tokenizer, chat, "here", learn_from=len(chat) - 2)
    assert "".join(letter for letter, flag in zip(text, mask) if flag) == chat[-1]["content"] + "<|im_end|>\n"


def character_tokenizer():
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(code): code for code in range(256)}
    core = Tokenizer(models.WordLevel(letters, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="\x01")


class SlowTokenizer:
    """A tokenizer without offsets: bytes in pairs of the same kind, so that cuts matter."""

    is_fast, eos_token_id, bos_token_id, chat_template = False, 1, None, CHATML

    def __init__(self, inner, group):
        self.inner, self.group = inner, group

    def get_chat_template(self, tools=None):
        return self.chat_template

    def apply_chat_template(self, *args, **kwargs):
        return self.inner.apply_chat_template(*args, chat_template=self.chat_template, **kwargs)

    def __call__(self, text, **kwargs):
        return {"input_ids": [text[at : at + self.group] for at in range(0, len(text), self.group)]}


def test_tokenizers_without_offsets():
    ids, mask = encode_chat(SlowTokenizer(character_tokenizer(), 1), CHAT, "here")
    assert "".join(token for token, flag in zip(ids, mask) if flag) == "It is 5.<|im_end|>\n  Then 9.\nDone<|im_end|>\n"
    with pytest.raises(DataError, match="here: this tokenizer joins"):
        encode_chat(SlowTokenizer(character_tokenizer(), 3), CHAT, "here")


def test_tags_are_read_without_offsets_too():
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer()  # bytes, in Python
    slow.chat_template = TAGGED
    ids, mask = encode_chat(slow, CHAT, "here")
    learnt_ids = [token for token, flag in zip(ids, mask) if flag]
    assert not slow.is_fast and slow.decode(learnt_ids) == "It is 5.</s>  Then 9.\nDone</s>"
    assert slow.decode(ids) == slow.apply_chat_template(CHAT, tokenize=False)


def test_conversations_tools_and_chat_completions(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHATML + "{% if tools %}{{ tools[0].name }}{% endif %}"
    rows = [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"prompt": CHAT[:4], "completion": CHAT[4:]},
    ]
    data, _ = load_rows(tokenizer, options(write(tmp_path / "a.jsonl", rows), too_long="error"))
    assert learnt(tokenizer, only_row(data, 0)).replace(" ", "") == "ho<|im_end|>\n".replace(" ", "")
    assert "5" not in learnt(tokenizer, only_row(data, 1)) and "9" in learnt(tokenizer, only_row(data, 1))
    sample = next(read_samples(write(tmp_path / "b.jsonl", [{"messages": CHAT, "tools": '[{"name": "add"}]'}])))
    assert sample.values["tools"] == [{"name": "add"}]


# --- bad data ---------------------------------------------------------------------------------------------------------


def test_blank_rows_of_a_corpus_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [{"text": text} for text in ("", " = A heading = ", " ", "Some words.", "\n")]
    data, _ = load_rows(tokenizer, options(write(tmp_path / "a.jsonl", rows)))
    assert len(data) == 2 and data.dropped == {"left out as blank": 3}
    assert describe("train", data).endswith("3 left out as blank")
    path = write(tmp_path / "b.jsonl", [{"text": " "}])
    with pytest.raises(DataError, match=r"b.jsonl: no sample is left to learn from \(1 left out as blank\)"):
        load_rows(tokenizer, options(path))


GOOD = json.dumps({"text": "fine"}).encode()
BAD_LINES = {
    "broken JSON": (b'{"text": "a"', "line 2: no JSON: Expecting ',' delimiter"),
    "not UTF-8": (b'{"text": "caf\xe9"}', r"line 2: not UTF-8 \(byte 0xe9\)"),
    "wrong keys": (b'{"txt": "a", "n": 1}', "line 2: found n, txt; expected 'text'"),
    "no object": (b"[1, 2]", "line 2: expected an object with keys, got list"),
    "no text": (b'{"text": 5}', "line 2: 'text' must be text, got 5"),
    "another kind": (b'{"prompt": "a", "completion": "b"}', "line 2: a completion sample, but .* line 1 is a text"),
    "null text": (b'{"text": null, "n": 1}', r"line 2: found n, text \(null\); expected 'text'"),
    "null completion": (b'{"prompt": "a", "completion": null}', r"line 2: found completion \(null\), prompt; expected"),
    "no completion": (b'{"prompt": "a", "completion": ""}', "line 2: 'completion' is empty"),
    "half a pair": (b'{"prompt": "a", "completion": 1}', "line 2: 'prompt' and 'completion' must both"),
    "no messages": (b'{"messages": []}', "line 2: 'messages' must be a list of messages"),
    "no role": (b'{"messages": [{"content": "a"}]}', "line 2: message 1 of 'messages' has no 'role'"),
    "no content": (b'{"messages": [{"role": "user"}]}', "line 2: message 1 of 'messages' has no 'content'"),
    "odd role": (b'{"conversations": [{"from": ["gpt"], "value": "a"}]}', "line 2: message 1 .* has no 'role'"),
    "half a character": (rb'{"text": "a \ud83d b"}', r"line 2: \\ud83d is half of a surrogate pair"),
    "broken tools": (
        b'{"messages": [{"role": "assistant", "content": "a"}], "tools": "[{"}',
        "line 2: 'tools' is no JSON",
    ),
    "no tools": (
        b'{"messages": [{"role": "assistant", "content": "a"}], "tools": 5}',
        "line 2: 'tools' must be a list",
    ),
    "no assistant": (b'{"messages": [{"role": "user", "content": "a"}]}', "line 2: no assistant turn in 'messages'"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines_are_named(tokenizer, tmp_path, case):
    line, message = BAD_LINES[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(DataError, match=f"bad.jsonl, {message}"):
        load_rows(tokenizer, options(path))


def test_bad_files_are_named(tokenizer, tmp_path):
    def fails(name: str, content: bytes, message: str, **more):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_rows(tokenizer, options(tmp_path / name, **more))

    fails("a.jsonl", b"", "a.jsonl is empty")
    fails("a.jsonl", b"\n \n", "a.jsonl is empty")
    fails("a.json", b'[{"text": "a"},\n {"text" "b"}]', "a.json, line 2: no JSON")
    fails("a.json", b'[{"text": "a"}]\n[{"text": "b"}]', "a.json, line 2: more stands behind the end of the list")
    fails("a.json", rb'[{"text": "a"}, {"text": "\udc00"}]', r"a.json, line 1: \\udc00 is half of a surrogate pair")
    fails("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "a.jsonl.gz: the gzip file is damaged")
    fails("a.jsonl.gz", GOOD, "a.jsonl.gz: the gzip file is damaged")
    fails("a.csv.gz", gzip.compress(b"text\na\n"), "do not know how to read")
    fails("a.txt", b"", "a.txt is empty")
    fails("a.txt", b"one\ntwo \xff\n", "a.txt, line 2: not UTF-8")
    fails("a.docx", b"x", "do not know how to read")
    fails("a.jsonl", b'{"text": "' + b"word " * 50 + b'"}', "line 1: .* more than --max_length 16", max_length=16)
    fails("a.jsonl", GOOD, "leaves one side empty", validation_split=0.5)
    fails("a.jsonl", GOOD, "a chat, but|leaves|no chat template", validation_split=5)
    fails("a.jsonl", b'{"text": "' + b"word " * 50 + b'"}', "no sample is left", max_length=16, too_long="drop")
    for name in ("missing.jsonl", "./missing", str(tmp_path / "nothing")):
        with pytest.raises(DataError, match="no such file"):
            load_rows(tokenizer, options(name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        load_rows(tokenizer, options(tmp_path / "empty"))


def test_a_folder_is_its_data(tmp_path):
    """Compressed files belong to it; hidden ones and descriptions do not."""
    for name in ("a.jsonl", "b/c.jsonl.gz", "README.md", ".cache/huggingface/x.json", ".ipynb_checkpoints/a.jsonl"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(GOOD) if name.endswith(".gz") else GOOD)
    assert [sample.where.partition("/data/")[2] for sample in read_samples(str(tmp_path / "data"))] == [
        "a.jsonl, line 1",
        "b/c.jsonl.gz, line 1",
    ]
    write(tmp_path / "emoji.jsonl", [{"text": "\U0001f600"}])  # a whole pair
    assert next(read_samples(str(tmp_path / "emoji.jsonl"))).values["text"] == "\U0001f600"


def test_text_without_any_token_is_named(tokenizer, tmp_path):
    class Mute:
        bos_token_id, eos_token_id = None, 1

        def __call__(self, text, **kwargs):
            return {"input_ids": []}

    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match="a.jsonl, line 1: nothing to learn in 0 tokens"):
        load_rows(Mute(), options(tmp_path / "a.jsonl", add_eos_token=False))


def test_parquet_rows_are_named(tokenizer, tmp_path):
    datasets, path = pytest.importorskip("datasets"), tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"text": "a b c"}, {"text": None}]).to_parquet(path)
    with pytest.raises(DataError, match=r"a.parquet, row 2: found text \(null\); expected"):
        load_rows(tokenizer, options(path))
    for content, message in ((b"", "a.parquet is empty"), (b"no parquet", "a.parquet cannot be read as parquet")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_rows(tokenizer, options(path))


def test_templates_that_do_not_show_the_turns_are_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    path = write(tmp_path / "a.jsonl", [{"messages": CHAT}])
    with pytest.raises(DataError, match="line 1: a chat, but the tokenizer has no chat template"):
        load_rows(tokenizer, options(path))
    tokenizer.chat_template = UNSTABLE
    with pytest.raises(DataError, match="line 1: this chat template renders turn 3 differently once more turns follow"):
        load_rows(tokenizer, options(path))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(DataError, match="line 1: cannot tell|line 1: the chat template"):
        load_rows(tokenizer, options(write(tmp_path / "b.jsonl", [{"messages": CHAT[2:]}])))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="line 1: the chat template refuses this chat: roles must alternate"):
        load_rows(tokenizer, options(path))


# --- packing ----------------------------------------------------------------------------------------------------------


def test_packing_keeps_every_sample_and_fills_rows():
    rng = random.Random(1)
    lengths = [rng.randrange(1, 40) for _ in range(300)]
    rows = pack(lengths, 40)
    assert sorted(sample for row in rows for sample in row) == list(range(300))
    filled = [sum(lengths[sample] for sample in row) for row in rows]
    assert max(filled) <= 40 and sum(filled) / (40 * len(rows)) > 0.97
    assert pack([], 8) == [] and pack([8, 8], 8) == [[0], [1]]


def samples(count: int, seed: int, high: int = 14):
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        ids = [rng.randrange(3, 60) for _ in range(rng.randrange(2, high))]
        result.append((ids, [IGNORE_INDEX] + [token if rng.random() < 0.7 else IGNORE_INDEX for token in ids[1:]]))
        result[-1][1][-1] = ids[-1]
    return result


def make_model(family: str):
    return text_model() if family == "step3_text" else tiny_model(family)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "deepseek_v2", "kimi_k2", "longcat_flash", "longcat_flash_ngram", "step3_text"]
)
@pytest.mark.parametrize("flatten", [False, True], ids=["rows", "flat"])
def test_packed_samples_do_not_see_one_another(family, flatten):
    """Losses of every head and all gradients, packed, against one sample at a time."""
    model = make_model(family).train()
    data = TokenRows.from_samples(samples(9, seed=4), 24, packed=True)
    assert len(data) < 7  # rows hold several
    batch = Collator(0, packed=True, flatten=flatten)([data[index] for index in range(len(data))])
    assert (batch["input_ids"].shape[0] == 1) == flatten
    count = int((batch["labels"] != IGNORE_INDEX).sum())
    output = model(**batch, use_cache=False, num_items_in_batch=count)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    main, mtp = 0.0, 0.0
    for row in range(len(data)):
        for ids, labels in data[row]:
            alone = model(ids[None], labels=labels[None], use_cache=False, num_items_in_batch=count)
            alone.loss.backward()
            main, mtp = main + alone.main_loss.detach(), mtp + sum(alone.mtp_loss or (torch.tensor(0.0),)).detach()
    assert_close("main loss", output.main_loss, main, "float32")
    assert_close("mtp loss", sum(output.mtp_loss or (torch.tensor(0.0),)), mtp, "float32")
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.norm() > 1e-6:
            assert_close(name, gradients[name], parameter.grad, "float32_grad")


def test_padded_samples_have_the_losses_of_single_ones():
    model = tiny_model().train()
    data = TokenRows.from_samples(samples(5, seed=6), 24, packed=False)
    batch = Collator(0)([data[index] for index in range(5)])
    count = int((batch["labels"] != IGNORE_INDEX).sum())
    together = model(**batch, use_cache=False, num_items_in_batch=count)
    alone = [
        model(ids[None], labels=labels[None], use_cache=False, num_items_in_batch=count)
        for ids, labels in (data[index][0] for index in range(5))
    ]
    assert_close("main loss", together.main_loss, sum(output.main_loss for output in alone), "float32")
    assert_close("mtp loss", together.mtp_loss[0], sum(output.mtp_loss[0] for output in alone), "float32")


def test_the_count_of_targets_is_that_of_the_labels(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"number {n} " * (1 + n % 4)} for n in range(20)])
    for packing in (False, True):
        data, _ = load_rows(tokenizer, options(path, packing=packing, max_length=32))
        batch = Collator(2, packed=packing)([data[index] for index in range(len(data))])
        assert data.num_targets == int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_rows_of_a_step_do_not_depend_on_how_they_are_divided(world, accumulation):
    order, size = RowOrder(13, seed=3), 8
    expected = list(RowOrder(13, seed=3).micro_batches(0, 5, 1, size))
    by_rank = [
        list(order.micro_batches(0, 5, accumulation, size // world // accumulation, world, rank))
        for rank in range(world)
    ]
    for step in range(5):
        parts = [part for rank in by_rank for part in rank[step * accumulation : (step + 1) * accumulation]]
        assert sorted(row for part in parts for row in part) == sorted(expected[step])
    # Every epoch has every row, in an order of its own; a later start goes on with the same rows.
    seen = [row for part in expected for row in part]
    assert sorted(seen[:13]) == sorted(seen[13:26]) == list(range(13)) and seen[:13] != seen[13:26]
    assert list(order.micro_batches(3, 5, 1, size)) == expected[3:]


def test_encoder_asks_for_special_tokens(tokenizer):
    class Nothing:
        eos_token_id = bos_token_id = None

    with pytest.raises(DataError, match="no EOS token"):
        Encoder(Nothing(), options())


def metaspace_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """As SentencePiece has it: every call begins with a space, and newlines are letters of words."""
    fast = Tokenizer(models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_long_texts_have_the_same_tokens_in_pieces(tokenizer, kind, monkeypatch):
    rng = random.Random(0)
    words = ["def f(x):\n    return x", " \n\n", "It's", " wide", "\n", "\r\n", "12345", "naïve 中文字", "\t\tif", ".."]
    text = "".join(rng.choice(words) + rng.choice(["", " ", "\n"]) for _ in range(4000))
    tokenizer = tokenizer if kind == "bytes" else metaspace_tokenizer(text)
    whole, lengths = Encoder(tokenizer, options())._encode(text), []
    monkeypatch.setattr(data_module, "_PIECE", 2000)
    monkeypatch.setattr(type(tokenizer), "__call__", watched(type(tokenizer).__call__, lengths))
    assert Encoder(tokenizer, options())._encode(text) == whole
    assert max(lengths) < 2500
    lengths.clear()
    text = text.replace(" ", "").replace("\n", "")  # no place to cut at
    Encoder(tokenizer, options())._encode(text)
    assert max(lengths) == len(text)


def watched(call, lengths: list[int]):
    def tokenize(self, text, **kwargs):
        lengths.append(len(text))
        return call(self, text, **kwargs)

    return tokenize
