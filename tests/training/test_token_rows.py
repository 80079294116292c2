"""Rows of tokens on the disk: what is read of them, who reads the data, packing, and that nothing is left behind."""

import gc
import hashlib
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_ranks
from transformers import AutoTokenizer

from hf_moe.demo import DEMO_MODEL
from hf_moe.training import FinetuneArguments
from hf_moe.training.data import IGNORE_INDEX, TokenRows, load_rows, pack
from hf_moe.training.token_rows import write_samples

datasets = pytest.importorskip("datasets")


def some_samples(count: int, seed: int, high: int = 30) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        ids = [rng.randrange(3, 60) for _ in range(rng.randrange(1, high))]
        samples.append((ids, [token if rng.random() < 0.5 else IGNORE_INDEX for token in ids]))
    return samples


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_rows_are_the_samples(tmp_path, monkeypatch, packed, where):
    """Of all samples and of some, over several batches of the file; the fingerprint is a hash of all numbers."""
    monkeypatch.setattr("hf_moe.training.token_rows._BATCH_TOKENS", 100)
    samples, chosen = some_samples(50, 1), np.array([3, 4, 8, 21, 48])
    if where == "memory":
        data = TokenRows.from_samples(samples, 32, packed)
    else:
        assert write_samples(tmp_path / "train", iter(samples)) == 50
        assert [path.name for path in tmp_path.iterdir()] == ["train"]
        stored = datasets.Dataset.from_file(str(tmp_path / "train"))
        assert len(stored.data.to_batches()) > 3
        data = TokenRows.from_dataset(stored, 32, packed)
    some = TokenRows.from_dataset(data.samples, 32, packed, chosen)
    for rows, expected in ((data, samples), (some, [samples[index] for index in chosen])):
        lengths = [len(ids) for ids, _ in expected]
        layout = pack(lengths, 32) if packed else [[index] for index in range(len(expected))]
        assert len(rows) == len(layout) and rows.num_samples == len(expected)
        for index, places in enumerate(layout):
            found = [(ids.tolist(), labels.tolist()) for ids, labels in rows[index]]
            assert found == [expected[place] for place in places]
        assert rows.num_tokens == sum(lengths)
        assert rows.num_targets == sum(label != IGNORE_INDEX for _, labels in expected for label in labels)
        digest = hashlib.sha256()
        for part in (0, 1):
            digest.update(np.array([token for sample in expected for token in sample[part]], dtype=np.int32))
        digest.update(np.cumsum([0, *lengths]))
        digest.update(np.array([len(row) for row in layout]))
        assert rows.fingerprint == digest.hexdigest()[:16]


def test_packing_is_best_fit_the_longest_first():
    """Against looking at every row: the least room that is enough, of several rows the first one."""
    rng = random.Random(2)
    for size, count in ((16, 200), (40, 90), (7, 30)):
        lengths = [rng.randrange(1, size + 1) for _ in range(count)]
        rows: list[list[int]] = []
        for sample in sorted(range(count), key=lambda index: (-lengths[index], index)):
            room = {index: size - sum(lengths[other] for other in row) for index, row in enumerate(rows)}
            fitting = [index for index in room if room[index] >= lengths[sample]]
            if not fitting:
                rows.append([sample])
            else:
                rows[min(fitting, key=lambda index: (room[index], index))].append(sample)
        assert pack(lengths, size) == rows


def test_tokens_are_mapped_from_a_file_that_goes_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"value {n} is {n * n}"}) + "\n" for n in range(20)))
    args = FinetuneArguments(
        model_name_or_path="m", dataset_name=str(path), output_dir=str(tmp_path / "out"), validation_split=5
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    train, held_out = load_rows(tokenizer, args)
    (file,) = {entry["filename"] for rows in (train, held_out) for entry in rows.samples.cache_files}
    assert Path(file).is_relative_to(tmp_path / "cache") and not (tmp_path / "out").exists()
    before = [train[index] for index in range(len(train))]
    copy = pickle.loads(pickle.dumps(train))  # as workers that are not forked get it
    assert len(pickle.dumps(train)) < 5000
    assert all(torch.equal(copy[row][0][0], before[row][0][0]) for row in range(len(train)))
    del copy, train
    gc.collect()
    assert Path(file).exists() and len(held_out[0]) == 1
    del held_out
    gc.collect()
    assert not list((tmp_path / "cache" / "hf_moe").iterdir())


def test_one_process_reads_the_data_for_all(tmp_path, monkeypatch):
    """Both get the same rows, and the same error; whoever reads nothing shows no progress either."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    first, second = run_ranks("data_ranks.py", tmp_path)
    assert first["read"] == [str(tmp_path / "good.jsonl"), str(tmp_path / "bad.jsonl")] and second["read"] == []
    assert "bad.jsonl, line 1: found word" in first["error"] and second["error"] == first["error"]
    assert first["fingerprint"] == second["fingerprint"] and first["files"] == second["files"]
    for part in ("train", "held_out"):
        assert len(first[part]) == len(second[part]) > 1
        for row, other in zip(first[part], second[part]):
            assert all(torch.equal(a, b) for one, two in zip(row, other) for a, b in zip(one, two))
    assert not list((tmp_path / "cache" / "hf_moe").iterdir())


def test_machines_that_share_a_disk_read_and_keep_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    first, second = run_ranks("data_ranks.py", tmp_path, machines=2)
    assert first["read"] == second["read"] == [str(tmp_path / "good.jsonl"), str(tmp_path / "bad.jsonl")]
    assert first["error"] == second["error"] and first["fingerprint"] == second["fingerprint"]
    assert first["files"] != second["files"]
    assert not list((tmp_path / "cache" / "hf_moe").iterdir())
