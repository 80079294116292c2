"""Sequence and token classification against the base model and a score by hand."""

import pytest
import torch
from checkpoints import assert_same_tensors, golden, read_config, read_tensors
from testing import assert_close
from tiny import left_padded, random_ids, tiny_model
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from hf_moe.models.modeling_step3_text import Step3TextForSequenceClassification, Step3TextForTokenClassification

FAMILIES = ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "kimi_k2", "longcat_flash", "longcat_flash_ngram"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification(family, side):
    model = tiny_model(family, auto_class=AutoModelForSequenceClassification, num_labels=3, num_nextn_predict_layers=0)
    assert type(model).__module__.startswith("hf_moe.")
    rows = [random_ids(1, length, seed=length)[0] for length in (9, 5, 1)]
    ids, mask = left_padded(rows)
    if side == "right":
        ids = torch.stack([F.pad(row, (0, 9 - len(row)), value=2) for row in rows])
        mask = torch.stack([F.pad(torch.ones_like(row), (0, 9 - len(row))) for row in rows])
    labels = torch.tensor([2, 0, 1])
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=labels)
        alone = [model.model(row.unsqueeze(0)).last_hidden_state[0, -1].double() for row in rows]
    expected = torch.stack(alone) @ model.score.weight.double().t()
    assert_close("logits", output.logits, expected, "float32")
    by_hand = -expected.log_softmax(-1)[torch.arange(3), labels].mean()
    assert_close("loss", output.loss, by_hand, "float32")


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_other_problem_types(problem):
    labels = torch.randn(2, 3) if problem == "regression" else torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    model = tiny_model(
        auto_class=AutoModelForSequenceClassification, num_labels=3, problem_type=problem, num_nextn_predict_layers=0
    )
    output = model(random_ids(2, 6), labels=labels)
    logits = output.logits.double()
    if problem == "regression":
        expected = ((logits - labels) ** 2).mean()
    else:
        expected = -(labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits)).mean()
    assert_close("loss", output.loss, expected, "float32")
    output.loss.backward()
    assert model.score.weight.grad.any() and model.model.layers[1].mlp.experts.down_proj.grad.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_token_classification(family):
    model = tiny_model(family, auto_class=AutoModelForTokenClassification, num_labels=5, num_nextn_predict_layers=0)
    assert type(model).__module__.startswith("hf_moe.")
    ids, labels = random_ids(2, 7), torch.randint(0, 5, (2, 7))
    labels[0, :3] = -100
    output = model(ids, labels=labels)
    states = model.model(ids).last_hidden_state.double()
    expected = states @ model.score.weight.double().t() + model.score.bias.double()
    assert_close("logits", output.logits, expected, "float32")
    kept = labels != -100
    by_hand = -expected.log_softmax(-1)[kept].gather(-1, labels[kept].unsqueeze(-1)).mean()
    assert_close("loss", output.loss, by_hand, "float32")
    output.loss.backward()
    assert model.score.weight.grad.any()


def test_token_classification_drops_out_in_training_only():
    model = tiny_model(
        auto_class=AutoModelForTokenClassification, num_labels=5, classifier_dropout=0.5, num_nextn_predict_layers=0
    )
    ids = random_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModel])
def test_a_causal_checkpoint_becomes_any_class(family, auto_class, tmp_path):
    """The decoder of a saved language model is taken over whole; only the score is new."""
    source = tiny_model(family)
    source.save_pretrained(tmp_path)
    kwargs = {} if auto_class is AutoModel else {"num_labels": 3}
    model, report = auto_class.from_pretrained(tmp_path, output_loading_info=True, **kwargs)
    assert type(model).__module__.startswith("hf_moe.")
    assert all(name.startswith("score.") for name in report["missing_keys"])
    base = model if auto_class is AutoModel else model.model
    ids = random_ids(1, 6)
    with torch.no_grad():
        expected = source.model(ids).last_hidden_state
        assert torch.equal(base.eval()(ids).last_hidden_state, expected)


@pytest.mark.parametrize("case", ["longcat_flash", "longcat_fp8", "longcat_lite_ngram", "step3_text", "step3_fp8"])
@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_upstream_files_become_classifiers(case, auto_class, tmp_path):
    """The states are those of the base model, and what is saved comes back, the decoder under its upstream names."""
    model = auto_class.from_pretrained(golden(case), num_labels=3, pad_token_id=0, dtype=torch.float32).eval()
    base = AutoModel.from_pretrained(golden(case), dtype=torch.float32).eval()
    ids = random_ids(2, 8, low=3, high=60)
    with torch.no_grad():
        states, logits = base(ids).last_hidden_state, model(ids).logits
        expected = model.score(states)
    last = auto_class is AutoModelForSequenceClassification
    assert torch.equal(logits, expected[:, -1] if last else expected)
    model.save_pretrained(tmp_path)
    saved = read_tensors(tmp_path)
    assert {name for name in saved if name.startswith("score.")} == (
        {"score.weight"} if last else {"score.weight", "score.bias"}
    )
    stored = read_tensors(golden(case))
    kept = {name: tensor for name, tensor in saved.items() if not name.startswith("score.")}
    assert kept.keys() <= stored.keys()
    assert {name for name in stored.keys() - kept.keys() if not name.endswith("lm_head.weight")} == set()
    again = auto_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)


def test_the_text_of_a_vision_checkpoint_becomes_a_classifier(tmp_path):
    for auto_class, text_class in (
        (AutoModelForSequenceClassification, Step3TextForSequenceClassification),
        (AutoModelForTokenClassification, Step3TextForTokenClassification),
    ):
        model = auto_class.from_pretrained(golden("step3_vl"), num_labels=3, pad_token_id=0)
        assert model.score.out_features == 3
        assert type(model) is text_class and type(auto_class.from_config(model.config)) is text_class
        model.save_pretrained(tmp_path)
        assert read_config(tmp_path)["auto_map"][auto_class.__name__] == f"modeling_step3_text.{text_class.__name__}"
        again = auto_class.from_pretrained(tmp_path)
        assert_same_tensors(again.state_dict(), model.state_dict())
