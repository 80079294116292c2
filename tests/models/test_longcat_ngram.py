"""LongCat-Flash-Lite: n-gram embeddings through caches, masks, beams and speculation; the relatives of its trunk."""

import copy

import pytest
import torch
from checkpoints import assert_same_tensors, read_config, read_tensors, write_checkpoint
from testing import GOLDENS, assert_close, assert_golden, load_golden
from tiny import left_padded, random_ids, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    GenerationConfig,
    StaticCache,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_moe.models.configuration_longcat import LongcatConfig
from hf_moe.models.configuration_longcat_next import LongcatNextConfig
from hf_moe.models.layer_ngram import HostTable
from hf_moe.models.modeling_longcat import LongcatCausalLM, LongcatForSequenceClassification, LongcatModel
from hf_moe.models.modeling_longcat_next import LongcatNextModel
from hf_moe.models.weights_safetensors import CheckpointError, ShapeError

CASE = "longcat_lite_ngram"
FOLDER = GOLDENS / CASE
EOS = 1  # of the tiny model


@pytest.fixture
def model():
    model = tiny_model("longcat_flash_ngram")
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=2, max_new_tokens=12, do_sample=False)
    return model


def ids_with_eos(batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    ids = random_ids(batch, seq, seed)
    ids[torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = EOS
    return ids


def load(**kwargs):
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, **kwargs).eval()


def golden_logits(model, expected, **kwargs):
    with torch.no_grad():
        logits = model(expected["input_ids"], attention_mask=expected["attention_mask"], **kwargs).logits
    return logits.masked_fill(~expected["attention_mask"].bool().unsqueeze(-1), 0.0)


# --- goldens ----------------------------------------------------------------------------------------------------------


def test_ids_and_embeddings_of_the_golden():
    model, expected = load(), load_golden(CASE)[0]
    real = expected["attention_mask"].bool()
    ids = model.model.ngram_ids(expected["input_ids"], expected["attention_mask"])
    assert torch.equal(ids[real], expected["ngram_ids"][real])
    inputs = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    golden_logits(model, expected)
    handle.remove()
    assert_golden("inputs_embeds", inputs[0][real], expected["inputs_embeds"][real], "last_hidden_state")


def test_golden_from_given_embeddings():
    model, expected = load(), load_golden(CASE)[0]
    with torch.no_grad():
        logits = model(inputs_embeds=expected["inputs_embeds"], attention_mask=expected["attention_mask"]).logits
    logits = logits.masked_fill(~expected["attention_mask"].bool().unsqueeze(-1), 0.0)
    assert_golden("logits", logits, expected["logits"], "logits")


def test_trap_padding_is_not_hashed():
    """Without the mask's help pads are hashed like tokens: the other result that the golden holds."""
    model, (expected, meta) = load(), load_golden(CASE)
    model.model._preceding, original = lambda tokens, *_: original(tokens, None, None, None), model.model._preceding
    logits = golden_logits(model, expected)
    assert_golden("alt", logits, expected["alt.logits_pads_hashed"], "logits")
    off = (logits - expected["logits"]).abs().max().item()
    assert off == pytest.approx(meta["agreement_max_abs"]["effect_of_hashing_pads"], rel=0.02)


def test_trap_end_of_sequence_ends_the_context_of_later_tokens_only():
    """The golden has EOS tokens: they look back themselves, and hide what is before them from those behind."""
    model, expected = load(), load_golden(CASE)[0]
    ids, real = expected["input_ids"], expected["attention_mask"].bool()
    assert (ids[real] == 2).any()
    for boundaries in ([], [2, *range(3, 320)]):  # none at all; every token
        model.model.ngram_hash.boundaries = boundaries
        other = model.model.ngram_ids(ids, expected["attention_mask"])
        assert not torch.equal(other[real], expected["ngram_ids"][real])


def test_trap_the_mtp_layer_of_an_ngram_model_reads_its_plain_table():
    """Implementations disagree here; ours takes the head's own table, as the tensors suggest."""
    model, expected = load(), load_golden(CASE)[0]
    assert model.model.mtp.embed_tokens is not None
    ids = expected["input_ids"]
    (_, layer) = model.model.mtp_layers()[0]
    assert torch.equal(model.mtp_embed(layer, ids), model.model.mtp.embed_tokens.weight[ids])
    with torch.no_grad():
        logits = model(ids, attention_mask=expected["attention_mask"], output_mtp_logits=True).mtp_logits[0]
    assert logits.shape == (2, 23, 320) and logits.isfinite().all()


# --- context across calls ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [2, 1, 9, 8], [17, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("cache_class", ["dynamic", "plain", "static"])
@torch.no_grad()
def test_context_survives_caching_in_pieces(model, cache_class, pieces):
    ids = ids_with_eos(2, 20)
    cache = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "plain": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }[cache_class]()
    expected = model(ids).logits
    logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)], dim=1)
    assert_close("logits", logits, expected, "float32")


@torch.no_grad()
def test_left_padding_and_chunks_do_not_leak(model):
    rows = [ids_with_eos(1, length, seed=length)[0] for length in (15, 6, 1)]
    ids, mask = left_padded(rows)
    for chunk in (15, 4, 1):
        cache, logits, done = DynamicCache(config=model.config), [], 0
        for piece in ids.split(chunk, dim=1):
            done += piece.shape[1]
            logits.append(model(piece, attention_mask=mask[:, :done], past_key_values=cache).logits)
        logits = torch.cat(logits, dim=1)
        for index, row in enumerate(rows):
            assert_close("row", logits[index, -len(row) :], model(row.unsqueeze(0)).logits[0], "float32")


@torch.no_grad()
def test_pad_ids_do_not_matter(model):
    ids, mask = left_padded([ids_with_eos(1, 9)[0], ids_with_eos(1, 4)[0]])
    other = ids.masked_fill(mask == 0, 77)
    logits, others = (model(each, attention_mask=mask).logits[mask.bool()] for each in (ids, other))
    assert_close("logits", logits, others, "float32")


@torch.no_grad()
def test_rejected_slots_become_holes(model):
    """Speculation that leaves rejected tokens in the cache and masks them later, row by row."""
    ids = ids_with_eos(2, 12)
    expected = model(ids).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], past_key_values=cache)
    draft = random_ids(2, 4, seed=9)
    draft[0, :3], draft[1, :1] = ids[0, 6:9], ids[1, 6:7]  # so many of each row are accepted
    model(draft, attention_mask=torch.ones(2, 10), past_key_values=cache)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, 9:], mask[1, 7:] = 0, 0
    rest = [ids[0, 9:], ids[1, 7:]]
    for step in range(3):
        tokens = torch.stack([row[step] for row in rest]).unsqueeze(1)
        mask = torch.cat((mask, mask.new_ones(2, 1)), dim=1)
        positions = torch.tensor([[9 + step], [7 + step]])
        logits = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        assert_close("row 0", logits[0, 0], expected[0, 9 + step], "float32")
        assert_close("row 1", logits[1, 0], expected[1, 7 + step], "float32")


@torch.no_grad()
def test_crop_reorder_select_and_repeat(model):
    ids = ids_with_eos(3, 14)
    expected = model(ids).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :12], past_key_values=cache)
    cropped = copy.deepcopy(cache)
    cropped.crop(-3)
    assert_close("crop", model(ids[:, 9:], past_key_values=cropped).logits, expected[:, 9:], "float32")
    order = torch.tensor([2, 0, 0])
    moved = copy.deepcopy(cache)
    moved.reorder_cache(order)
    assert_close("reorder", model(ids[order, 12:], past_key_values=moved).logits, expected[order, 12:], "float32")
    picked = copy.deepcopy(cache)
    picked.batch_select_indices(torch.tensor([1]))
    assert_close("select", model(ids[1:2, 12:], past_key_values=picked).logits, expected[1:2, 12:], "float32")
    cache.batch_repeat_interleave(2)
    twice = ids.repeat_interleave(2, 0)[:, 12:]
    logits = model(twice, past_key_values=cache).logits
    assert_close("repeat", logits, expected.repeat_interleave(2, 0)[:, 12:], "float32")


@pytest.mark.parametrize("kwargs", [{"num_beams": 4}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
def test_generation_equals_generation_without_a_cache(model, kwargs):
    ids = ids_with_eos(1, 11)
    plain = {key: value for key, value in kwargs.items() if key == "num_beams"}
    assert torch.equal(model.generate(ids, **kwargs), model.generate(ids, use_cache=False, **plain))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_sequences_equal_separate_ones(implementation):
    model = tiny_model("longcat_flash_ngram", attn_implementation=implementation)
    ids = ids_with_eos(1, 14)
    positions = torch.cat((torch.arange(8), torch.arange(6))).unsqueeze(0)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    assert_close("first", packed[:, :8], model(ids[:, :8]).logits, "float32")
    assert_close("second", packed[:, 8:], model(ids[:, 8:]).logits, "float32")


@torch.no_grad()
def test_tokens_known_as_embeddings_end_the_context(model, caplog):
    ids = random_ids(1, 10)
    cache = DynamicCache(config=model.config)
    embeds = model.model._embed(ids[:, :6], None, None, None, None)
    first = model(inputs_embeds=embeds, past_key_values=cache).logits
    assert_close("first", first, model(ids[:, :6]).logits, "float32")
    rest = model(ids[:, 6:], past_key_values=cache).logits
    behind = ids.clone()
    behind[:, 5] = EOS  # hides all before it from n-grams, and only from them
    embeds = torch.cat((embeds, model.model._embed(behind, None, None, None, None)[:, 6:]), dim=1)
    assert_close("rest", rest, model(inputs_embeds=embeds).logits[:, 6:], "float32")


@torch.no_grad()
def test_gradients_reach_tables_and_projections():
    with torch.enable_grad():
        model = tiny_model("longcat_flash_ngram").train()
        ids = ids_with_eos(2, 12)
        model(ids, labels=ids).loss.backward()
    used = model.model.ngram_ids(ids)
    for index, table in enumerate(model.model.ngram_embeddings.embedders):
        touched = table.weight.grad.abs().sum(-1) > 0
        assert set(touched.nonzero().flatten().tolist()) <= set(used[..., index].flatten().tolist())
        assert touched.any()


# --- tables off the device of the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_tables_on_the_host(place, tmp_path):
    model, expected = load(ngram_tables=place), load_golden(CASE)[0]
    tables = model.model.ngram_embeddings.embedders
    assert all(isinstance(table, HostTable) for table in tables)
    assert not any("embedders" in name for name, _ in model.named_parameters())
    stored = read_tensors(FOLDER)
    for index, table in enumerate(tables):
        assert torch.equal(table.weight, stored[f"model.ngram_embeddings.embedders.{index}.weight"])
    assert_golden("logits", golden_logits(model, expected), expected["logits"], "logits")
    model.generation_config = GenerationConfig(pad_token_id=3)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
    assert torch.equal(generated[:, ids.shape[1] :], expected["generated_ids"])
    model.bfloat16().save_pretrained(tmp_path)
    assert_same_tensors(read_tensors(tmp_path), stored)
    assert read_config(tmp_path)["ngram_tables"] == place


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_state_dict_of_tables_on_the_host_goes_back_in(place, tmp_path):
    folder = write_checkpoint(tmp_path, read_config(FOLDER), read_tensors(FOLDER))
    model = AutoModelForCausalLM.from_pretrained(folder, ngram_tables=place)
    state = model.state_dict()
    model.load_state_dict(state)
    name = "model.ngram_embeddings.embedders.2.weight"
    other = {**state, name: state[name] + 1}
    model.load_state_dict(other)
    assert_same_tensors(model.state_dict(), other)
    assert_same_tensors(read_tensors(folder), read_tensors(FOLDER))
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.ngram_embeddings\.embedders\.2\.weight"):
        model.load_state_dict({**state, name: state[name][1:]})


def test_tables_on_the_host_keep_a_device_map(tmp_path):
    model = load(ngram_tables="cpu", device_map={"": "cpu"})
    assert_golden("logits", golden_logits(model, load_golden(CASE)[0]), load_golden(CASE)[0]["logits"], "logits")


def test_tables_on_the_host_are_checked(tmp_path):
    tensors = read_tensors(FOLDER)
    name = "model.ngram_embeddings.embedders.3.weight"
    short = {**tensors, name: tensors[name][:-1].contiguous()}
    folder = write_checkpoint(tmp_path / "short", read_config(FOLDER), short)
    for place in ("model", "cpu"):
        with pytest.raises(ShapeError, match=r"embedders\.3"):
            AutoModelForCausalLM.from_pretrained(folder, ngram_tables=place)
    del tensors[name]
    folder = write_checkpoint(tmp_path / "missing", read_config(FOLDER), tensors)
    with pytest.raises(CheckpointError, match=r"embedders\.3"):
        AutoModelForCausalLM.from_pretrained(folder, ngram_tables="cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"emb_neighbor_num": 1}, "emb_neighbor_num"),
        ({"emb_split_num": 5}, "hidden_size"),
        ({"ngram_tables": "gpu"}, "gpu"),
    ],
)
def test_bad_configurations(change, message):
    from hf_moe.models.configuration_longcat_flash_ngram import LongcatFlashNgramConfig

    with pytest.raises(ValueError, match=message):
        LongcatFlashNgramConfig.from_dict({**read_config(FOLDER), **change})


# --- the relatives: sparse releases and LongCat-Next ------------------------------------------------------------------

INDEXER = {"index_topk": 30, "index_n_heads": 2, "index_head_dim": 16, "attention_method": "LSA"}


def as_sparse_release(folder, spelled_oe: bool = True, **changes):
    """The n-gram golden in the spelling of LongCat-2.0: no model type, `oe_*`, and an indexer a layer."""
    config = read_config(FOLDER)
    tensors = {}
    for name, tensor in read_tensors(FOLDER).items():
        name = name.replace("ngram_embeddings.embedders.", "oe_embed_tokens")
        tensors[name.replace("ngram_embeddings.post_projs.", "oe_embed_proj")] = tensor
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn.0.indexer."
        shapes = {"wq_b": (32, 24), "wk": (16, 96), "k_norm": (16,), "weights_proj": (2, 96)}
        tensors |= {f"{stem}{part}.weight": torch.randn(shape).bfloat16() for part, shape in shapes.items()}
    del config["model_type"]
    config |= {"architectures": ["LongcatCausalLM"], **INDEXER, **changes}
    config["rope_scaling"] = {**config["rope_scaling"], "rope_type": "deepseek_yarn"}  # as these releases spell it
    if spelled_oe:
        config["oe_vocab_size_ratio"] = config.pop("ngram_vocab_size_ratio")
        config["oe_neighbor_num"] = config.pop("emb_neighbor_num")
        config["oe_split_num"] = config.pop("emb_split_num")
    return write_checkpoint(folder, config, tensors)


@pytest.mark.parametrize("spelled_oe", [True, False])
def test_sparse_release_runs_where_dense_is_exact(spelled_oe, tmp_path):
    folder = as_sparse_release(tmp_path / "stored", spelled_oe, mtp_num_layers=1)
    model, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_golden(CASE)[0]
    assert type(model) is LongcatCausalLM and type(model.config) is LongcatConfig
    assert_golden("logits", golden_logits(model, expected), expected["logits"], "logits")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), read_tensors(folder))
    stored, saved = read_config(folder), read_config(tmp_path / "saved")
    assert {key: saved.get(key) for key in stored} == stored and saved["model_type"] == "longcat"
    assert ("emb_neighbor_num" in saved) != spelled_oe and "num_nextn_predict_layers" not in saved
    scored = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.bfloat16)
    assert type(scored) is LongcatForSequenceClassification and type(scored.model) is LongcatModel
    assert_same_tensors(scored.model.state_dict(), model.model.state_dict())


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_sparse_release_with_tables_on_the_host(place, tmp_path):
    folder = as_sparse_release(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, ngram_tables=place).eval()
    expected = load_golden(CASE)[0]
    assert_golden("logits", golden_logits(model, expected), expected["logits"], "logits")


@pytest.mark.parametrize("cache", [None, "static"])
def test_sparse_release_raises_beyond(cache, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(as_sparse_release(tmp_path), dtype=torch.float32).eval()
    ids = random_ids(1, 28)
    kwargs = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    model.generate(ids, max_new_tokens=3, do_sample=False, **kwargs)  # the last token is not fed: 30 in all
    with pytest.raises(ValueError, match="index_topk=30"):
        model.generate(ids, max_new_tokens=5, do_sample=False, **kwargs)
    with pytest.raises(ValueError, match="index_topk=30"):
        model(random_ids(1, 31))


def test_longcat_type_without_ngrams(tmp_path):
    config = read_config(GOLDENS / "longcat_flash")
    del config["model_type"]
    config["architectures"] = ["LongcatCausalLM"]
    folder = write_checkpoint(tmp_path, config, read_tensors(GOLDENS / "longcat_flash"))
    model, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_golden("longcat_flash")[0]
    assert type(model) is LongcatCausalLM and not model.config.has_ngrams
    assert_golden("logits", golden_logits(model, expected), expected["logits"], "logits")


def test_next_text_trunk(tmp_path):
    """Its own n-gram rules, padded tables, a longer word table, a shorter head, and encoders that are passed over."""
    config = read_config(FOLDER)
    config |= {"architectures": ["LongcatNextForCausalLM"], "model_type": "longcat_next", "vocab_size": 400}
    config |= {"text_vocab_size": 320, "text_vocab_plus_multimodal_special_token_size": 325}
    tensors = {name: tensor for name, tensor in read_tensors(FOLDER).items() if ".mtp." not in name}
    word = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat((word, torch.randn(80, 96).bfloat16()))
    tensors["lm_head.weight"] = torch.cat((tensors["lm_head.weight"], torch.zeros(5, 96).bfloat16()))
    for index in range(6):
        name = f"model.ngram_embeddings.embedders.{index}.weight"
        tensors[name] = torch.cat((tensors[name], torch.full((17, 16), 99.0).bfloat16()))
    tensors["model.visual_tokenizer.proj.weight"], tensors["audio_head.weight"] = torch.ones(2, 2), torch.ones(2, 2)
    folder = write_checkpoint(tmp_path, config, tensors)
    for place in ("model", "disk"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, ngram_tables=place).eval()
        assert type(model.config) is LongcatNextConfig
        scored = AutoModelForTokenClassification.from_pretrained(folder, num_labels=3, ngram_tables=place)
        assert type(scored.model) is LongcatNextModel
        assert_same_tensors(scored.model.state_dict(), model.to(scored.dtype).model.state_dict())
        model = model.float()
        golden = load()
        ids = random_ids(1, 12, low=3, high=300)
        same = golden.model.ngram_ids(ids)
        assert torch.equal(model.model.ngram_ids(ids), same)
        with torch.no_grad():
            logits = model(ids).logits
            assert logits.shape == (1, 12, 325)
            if (same != 0).all():
                assert_close("logits", logits[..., :320], golden(ids).logits, "float32")
            # An id beyond the text counts as 0: it ends n-grams, and keeps its word embedding undivided.
            mixed = ids.clone()
            mixed[0, 5] = 350
            embeds = model.model._embed(mixed, None, None, None, None)
            assert torch.equal(embeds[0, 5], model.model.embed_tokens.weight[350])
            rest = model.model._embed(ids[:, 6:], None, None, None, None)
            assert_close("behind it", embeds[:, 6:], rest, "float32")
        # The head scores no other modality's ids: they are no labels.
        with pytest.raises(IndexError, match="325 entries"):
            model(mixed, labels=mixed)
        labels = mixed.where(mixed < 325, -100)
        output = model(mixed, labels=labels)
        expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
        assert_close("loss", output.loss, expected, "float32")
        model.loss_function = lambda *args, **kwargs: ForCausalLMLoss(*args, **kwargs)
        assert_close("loss of a function", model(mixed, labels=labels).loss, expected, "float32")
