"""N-gram ids against a loop in Python integers, under every way to say which tokens come before."""

import pytest
import torch

from hf_moe.models.layer_ngram import (
    PADDING,
    UNKNOWN,
    HostTable,
    NgramHash,
    embed_ngrams,
    masked_preceding_tokens,
    preceding_tokens,
)

EOS = 2


def ids_by_hand(row: list[int | None], vocab: int, m: int, order: int, splits: int, eos: int = EOS) -> list[list[int]]:
    """Rows of all tables for each position of one sequence; `None` is padding."""
    result = []
    for position in range(len(row)):
        if row[position] is None:
            result.append(None)
            continue
        before = [token for token in row[:position] if token is not None][::-1]
        ids = []
        for o in range(2, order + 1):
            for split in range(splits):
                modulus = m + 2 * ((o - 2) * splits + split) + 1
                total = row[position]
                for distance, token in enumerate(before[: o - 1], start=1):
                    if token == eos or token < 0:
                        break
                    total += token * vocab**distance
                ids.append(total % modulus)
        result.append(ids)
    return result


def check(ids: torch.Tensor, rows: list[list[int | None]], start: int = 0, **sizes) -> None:
    for batch, row in enumerate(rows):
        for position, wanted in enumerate(ids_by_hand(row, **sizes)[start:]):
            if wanted is not None:
                assert ids[batch, position].tolist() == wanted, (batch, position)


def random_rows(batch: int, seq: int, vocab: int, holes: bool, seed: int = 0):
    """Rows with end-of-sequence tokens and, on demand, padding at the left and in the middle."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (batch, seq), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.15] = EOS
    mask = torch.ones_like(tokens)
    if holes:
        mask = (torch.rand(tokens.shape, generator=generator) < 0.6).long()
        mask[:, -1] = 1
    rows = [[t if m else None for t, m in zip(*pair)] for pair in zip(tokens.tolist(), mask.tolist())]
    return tokens, mask, rows


SIZES = [
    pytest.param({"vocab": 11, "m": 33, "order": 4, "splits": 2}, id="tiny"),
    pytest.param({"vocab": 11, "m": 5, "order": 2, "splits": 1}, id="bigrams"),
    pytest.param({"vocab": 131072, "m": 78 * 131072, "order": 4, "splits": 4}, id="lite"),
    pytest.param({"vocab": 163840, "m": int(100.567 * 163840), "order": 5, "splits": 4}, id="2.0"),
]


def make_hash(sizes) -> NgramHash:
    return NgramHash(sizes["vocab"], sizes["m"], sizes["order"], sizes["splits"], [EOS])


@pytest.mark.parametrize("holes", [False, True], ids=["plain", "holes"])
@pytest.mark.parametrize("sizes", SIZES)
def test_ids_of_whole_sequences(sizes, holes):
    tokens, mask, rows = random_rows(3, 23, sizes["vocab"], holes)
    masked = tokens.masked_fill(mask == 0, PADDING)
    ids = make_hash(sizes)(tokens, preceding_tokens(masked, sizes["order"] - 1))
    assert ids.dtype == torch.int64 and ids.min() >= 0
    check(ids, rows, **sizes)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("split", [1, 2, 5, 22])
def test_ids_continue_from_the_past(sizes, split):
    tokens, mask, rows = random_rows(3, 23, sizes["vocab"], holes=True)
    masked = tokens.masked_fill(mask == 0, PADDING)
    found = preceding_tokens(masked[:, split:], sizes["order"] - 1, past=masked[:, :split])
    check(make_hash(sizes)(tokens[:, split:], found), rows, start=split, **sizes)


def test_mask_of_each_query_gives_the_same_ids():
    sizes = {"vocab": 11, "m": 33, "order": 4, "splits": 2}
    tokens, mask, rows = random_rows(3, 23, 11, holes=True)
    visible = mask.bool()[:, None, :] & torch.ones(23, 23, dtype=torch.bool).tril()
    for first in (0, 7):
        found = masked_preceding_tokens(tokens, visible[:, first:], first, 3)
        check(make_hash(sizes)(tokens[:, first:], found), rows, start=first, **sizes)


def test_mask_of_each_query_keeps_branches_of_a_tree_apart():
    tokens = torch.tensor([[5, 6, 7, 8, 9]])  # 7 and 8 both follow 6; 9 follows 7
    visible = torch.tensor([[[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 1, 0, 1]]]).bool()
    found = masked_preceding_tokens(tokens, visible, 2, 3)
    assert found.tolist() == [[[6, 5, PADDING], [6, 5, PADDING], [7, 6, 5]]]


def test_packed_sequences_do_not_see_each_other():
    tokens = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 8, 9]])
    segments = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    found = preceding_tokens(tokens, 2, segments=segments)
    none = PADDING
    assert found[0].tolist() == [[none, none], [5, none], [6, 5], [none, none], [8, none]]
    assert found[1].tolist() == [[none, none], [none, none], [6, none], [7, 6], [8, 7]]


def test_an_unknown_token_ends_the_context():
    sizes = {"vocab": 11, "m": 33, "order": 4, "splits": 2}
    tokens = torch.tensor([[5, UNKNOWN, 7, 8, 9]])
    ids = make_hash(sizes)(tokens, preceding_tokens(tokens, 3))
    check(ids[:, 2:], [[7, 8, 9]], **sizes)


def test_ids_do_not_overflow():
    """The largest ids of LongCat-2.0, whose intermediate sums pass 2 ** 43."""
    sizes = {"vocab": 163840, "m": int(100.567 * 163840), "order": 5, "splits": 4}
    tokens = torch.full((1, 9), 163839)
    check(make_hash(sizes)(tokens, preceding_tokens(tokens, 4)), [[163839] * 9], **sizes)


@pytest.mark.parametrize("zero_is_empty", [False, True])
def test_average_of_word_and_ngrams(zero_is_empty):
    tables = [torch.nn.Embedding(7, 3) for _ in range(4)]
    projections = [torch.nn.Linear(3, 5, bias=False) for _ in range(4)]
    word, ids = torch.randn(2, 6, 5), torch.randint(0, 3, (2, 6, 4))
    with torch.no_grad():
        output = embed_ngrams(word, ids, tables, projections, zero_is_empty)
        for index in ((0, 0), (1, 3), (1, 5)):
            wanted = word[index].clone()
            for i in range(4):
                if not (zero_is_empty and ids[index][i] == 0):
                    wanted += projections[i].weight @ tables[i].weight[ids[index][i]]
            torch.testing.assert_close(output[index], wanted / 5)


def test_host_tables_are_no_parameters_and_do_not_move():
    table = HostTable(7, 3, on_disk=False)
    with pytest.raises(ValueError, match="from_pretrained"):
        table(torch.tensor([[1]]))
    table.weight = torch.randn(7, 3)
    assert not list(table.parameters()) and not list(table.buffers())
    table.to(torch.bfloat16)
    table.to("meta")
    assert table.weight.dtype == torch.float32 and table.weight.device.type == "cpu"
    assert torch.equal(table(torch.tensor([[1, 6]])), table.weight[[1, 6]].unsqueeze(0))
