"""The training loss: main head and MTP depths against sums over single tokens, and everything that shares a step."""

import copy

import pytest
import torch
from testing import GOLDENS, assert_close, assert_golden, load_golden
from tiny import FAMILIES, left_padded, random_ids, tiny_config, tiny_model
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Trainer, TrainingArguments

from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.layer_head import LMHead
from hf_moe.models.modeling_causal_lm import find_joints, next_tokens

DEPTHS = 2


def model_with(depths: int = DEPTHS, **overrides):
    return tiny_model(num_nextn_predict_layers=depths, **overrides)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def token_losses(model, row: torch.Tensor, labels: torch.Tensor, depths: int = DEPTHS) -> list[list[torch.Tensor]]:
    """Losses of one sequence without padding, token by token: main head, then each depth. Keeps the graph.

    Goes through the logits, which other tests compare with goldens.
    """
    output = model(row[None], output_mtp_logits=bool(depths), use_cache=False)
    losses = []
    for shift, logits in enumerate([output.logits, *(output.mtp_logits or ())], start=1):
        losses.append([])
        for position in range(logits.shape[1]):
            if position + shift < row.numel() and labels[position + shift] != -100:
                losses[-1].append(-logits[0, position].log_softmax(-1)[labels[position + shift]])
    return losses


def expected_losses(model, rows, labels=None, divisor=None, depths: int = DEPTHS):
    """Main loss and MTP losses of several sequences."""
    labels = rows if labels is None else labels
    by_row = [token_losses(model, row, row_labels, depths) for row, row_labels in zip(rows, labels)]
    groups = [[loss for losses in by_row for loss in losses[index]] for index in range(depths + 1)]
    main, *mtp = (torch.stack(group).sum() / (divisor or len(group)) for group in groups)
    return main, mtp


def check(output, expected, weight: float = 0.3) -> None:
    main, mtp = expected
    assert_close("main loss", output.main_loss, main, "float32")
    assert len(output.mtp_loss) == len(mtp)
    for ours, theirs in zip(output.mtp_loss, mtp):
        assert ours.shape == () and ours.dtype == torch.float32
        assert_close("MTP loss", ours, theirs, "float32")
    assert_close("loss", output.loss, main + weight * sum(mtp) / len(mtp), "float32")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, depths", [("v3_basic", 1), ("v3_mtp2", 2)])
def test_goldens(case, depths):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32)
    expected, _ = load_golden(case)
    mtp = [expected[f"mtp{depth + 1}_loss"] for depth in range(depths)]
    ids = expected["input_ids"]
    for training in (True, False):
        output = model.train(training)(ids, labels=ids)
        assert_golden("main", output.main_loss.view(1), expected["loss"], "loss")
        for ours, theirs in zip(output.mtp_loss, mtp, strict=True):
            assert_golden("MTP", ours.view(1), theirs, "loss")
        total = expected["loss"] + (0.3 * sum(mtp) / depths if training else 0)
        assert_golden("sum", output.loss.view(1), total, "loss")


@pytest.mark.parametrize("depths", [1, 2, 3])
def test_loss_and_every_gradient(depths):
    model = model_with(depths).train()
    ids = random_ids(2, 11)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 6] = -100
    main, mtp = expected_losses(model, ids, labels, depths=depths)
    (main + 0.3 * sum(mtp) / depths).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    output = model(ids, labels=labels, use_cache=False)
    check(output, (main, mtp))
    output.loss.backward()
    assert gradients(model).keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(name, gradients(model)[name], gradient, "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    for depths in (0, 1):
        model = tiny_model(family, num_nextn_predict_layers=depths).train()
        ids = random_ids(2, 8)
        output = model(ids, labels=ids)
        main, mtp = expected_losses(model, ids, depths=depths)
        if depths:
            check(output, (main, mtp))
        else:
            assert output.mtp_loss is None and output.loss is output.main_loss
            assert_close("loss", output.loss, main, "float32")


def test_own_head_and_table_of_a_depth():
    """A checkpoint may bring copies that differ from the main model's."""
    model = model_with(1).train()
    layer = model.model.layers[-1]
    layer.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    layer.shared_head.head = copy.deepcopy(model.lm_head)
    torch.nn.init.normal_(layer.embed_tokens.weight)
    torch.nn.init.normal_(layer.shared_head.head.weight)
    ids = random_ids(2, 8)
    output = model(ids, labels=ids)
    check(output, expected_losses(model, ids, depths=1))
    output.loss.backward()
    assert layer.embed_tokens.weight.grad.any() and layer.shared_head.head.weight.grad.any()


def test_the_weight_may_change_while_training():
    model = model_with().train()
    ids = random_ids(1, 9)
    expected = expected_losses(model, ids)
    for weight in (0.3, 0.1, 2):
        model.config.mtp_loss_weight = weight
        check(model(ids, labels=ids), expected, weight)


def count_calls(model) -> list[int]:
    calls = []
    for _, layer in model.model.mtp_layers():
        layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("training", [True, False])
def test_weight_zero_saves_the_compute(training):
    model = model_with(mtp_loss_weight=0).train(training)
    calls, ids = count_calls(model), random_ids(1, 9)
    output = model(ids, labels=ids)
    assert not calls and output.mtp_loss is None
    assert_close("loss", output.loss, expected_losses(model, ids)[0], "float32")
    del calls[:]
    assert len(model(ids, labels=ids, output_mtp_logits=True).mtp_logits) == DEPTHS and len(calls) == DEPTHS


def test_no_mtp_layer_runs_without_labels():
    model = model_with().train()
    calls = count_calls(model)
    assert model(random_ids(1, 9)).loss is None and not calls


def test_evaluation_returns_the_main_loss():
    model, ids = model_with(), random_ids(2, 9)
    with torch.no_grad():
        output = model(ids, labels=ids)
        main, mtp = expected_losses(model, ids)
    assert_close("loss", output.loss, main, "float32")
    for ours, theirs in zip(output.mtp_loss, mtp, strict=True):
        assert_close("MTP loss", ours, theirs, "float32")
    with torch.no_grad():
        assert torch.equal(output.logits, model(ids).logits)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_short_sequences(length):
    """A depth without a target counts as 0, and what it had computed does not turn the sum into NaN."""
    model, ids = model_with().train(), random_ids(2, length)
    output = model(ids, labels=ids, num_items_in_batch=7, output_mtp_logits=True)
    assert [logits.shape for logits in output.mtp_logits] == [(2, max(0, length - depth - 1), 101) for depth in (0, 1)]
    output.loss.backward()
    if length > 1:
        plain = model(ids, labels=ids)
        assert [bool(loss) for loss in plain.mtp_loss] == [length > 2, length > 3]
        assert plain.loss.isfinite() and plain.loss >= plain.main_loss


def test_nothing_to_learn():
    model, ids = model_with().train(), random_ids(2, 8)
    labels = torch.full_like(ids, -100)
    output = model(ids, labels=labels, num_items_in_batch=5)
    output.loss.backward()
    assert output.loss == 0 and all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert model(ids, labels=labels).main_loss.isnan(), "as in Transformers: a mean over nothing"


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
def test_num_items_divides_main_and_mtp(as_tensor):
    model, ids = model_with().train(), random_ids(2, 9)
    items = torch.tensor(37) if as_tensor else 37
    check(model(ids, labels=ids, num_items_in_batch=items), expected_losses(model, ids, divisor=37))


def test_accumulation_equals_the_batch():
    model = model_with().train()
    rows = [random_ids(1, length, seed=length)[0] for length in (12, 5, 8)]
    items = sum(row.numel() - 1 for row in rows)
    main, mtp = expected_losses(model, rows, divisor=items)
    (main + 0.3 * sum(mtp) / DEPTHS).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    for row in rows:
        model(row[None], labels=row[None], num_items_in_batch=items).loss.backward()
    for name, gradient in expected.items():
        assert_close(name, gradients(model)[name], gradient, "float32")


@pytest.mark.parametrize("masked_labels", [True, False])
@pytest.mark.parametrize("positions", [False, True], ids=["", "positions"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_mtp_loss(side, positions, masked_labels):
    model = model_with().train()
    rows = [random_ids(1, length, seed=length)[0] for length in (11, 4, 7)]
    ids, mask = left_padded(rows)
    if side == "right":
        shifts = [int(count) for count in (mask == 0).sum(1)]
        ids = torch.stack([row.roll(-shift) for row, shift in zip(ids, shifts)])
        mask = torch.stack([row.roll(-shift) for row, shift in zip(mask, shifts)])
    labels = ids.masked_fill(mask == 0, -100) if masked_labels else ids
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1) if positions else None
    output = model(ids, attention_mask=mask, position_ids=position_ids, labels=labels)
    main, mtp = expected_losses(model, rows)
    for ours, theirs in zip(output.mtp_loss, mtp, strict=True):
        assert_close("MTP loss", ours, theirs, "float32")
    if side == "right" and masked_labels:  # with padding on the left Transformers also scores the first token
        assert_close("main loss", output.main_loss, main, "float32")


def packed(rows):
    ids = torch.cat(rows)[None]
    return ids, torch.cat([torch.arange(row.numel()) for row in rows])[None]


PACKED_LENGTHS = (6, 1, 2, 9, 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences(attention):
    model = model_with(attn_implementation=attention).train()
    rows = [random_ids(1, length, seed=length)[0] for length in PACKED_LENGTHS]
    ids, position_ids = packed(rows)
    output = model(ids, position_ids=position_ids, labels=ids, use_cache=False)
    check(output, expected_losses(model, rows))


def test_packed_gradients_equal_those_of_the_sequences():
    model = model_with().train()
    rows = [random_ids(1, length, seed=length)[0] for length in PACKED_LENGTHS]
    main, mtp = expected_losses(model, rows, divisor=20)
    (main + 0.3 * sum(mtp) / DEPTHS).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    ids, position_ids = packed(rows)
    model(ids, position_ids=position_ids, labels=ids, use_cache=False, num_items_in_batch=20).loss.backward()
    for name, gradient in expected.items():
        assert_close(name, gradients(model)[name], gradient, "float32")


@pytest.mark.parametrize("additive", [False, True])
def test_packed_by_a_block_mask_of_four_dimensions(additive):
    model = model_with().train()
    rows = [random_ids(1, length, seed=length)[0] for length in PACKED_LENGTHS]
    ids, position_ids = packed(rows)
    sequence = (position_ids[0] == 0).cumsum(0)
    mask = (sequence[:, None] == sequence[None]).tril()[None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    output = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    check(output, expected_losses(model, rows))


def test_joints_from_every_source():
    states = torch.zeros(1, 8, 2)
    expected = [[False, False, False, True, False, True, False, False]]
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    assert find_joints(states, position_ids=position_ids).tolist() == expected
    assert find_joints(states, cu_seq_lens_q=torch.tensor([0, 3, 5, 8], dtype=torch.int32)).tolist() == expected
    assert not find_joints(states).any() and not find_joints(states, position_ids=torch.arange(8)[None] + 5).any()
    assert not find_joints(states[:, :1], position_ids=position_ids[:, :1]).any()


def test_labels_that_are_shifted_already():
    model, ids = model_with().train(), random_ids(2, 9)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    check(model(ids, labels=ids, shift_labels=shifted), expected_losses(model, ids))
    check(model(ids, shift_labels=shifted), expected_losses(model, ids))


def test_another_ignore_index():
    model, ids = model_with().train(), random_ids(2, 9)
    labels, other = ids.clone(), ids.clone()
    labels[:, 2:5], other[:, 2:5] = -100, -1
    check(model(ids, labels=other, ignore_index=-1), expected_losses(model, ids, labels))


def test_embeddings_as_input():
    model, ids = model_with().train(), random_ids(2, 9)
    output = model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids)
    check(output, expected_losses(model, ids))


def test_labels_of_the_kept_positions():
    model, ids = model_with().train(), random_ids(2, 9)
    labels = ids.clone()
    labels[:, :5] = -100  # the first of the kept labels, that of position 4, has no kept position before it
    expected = expected_losses(model, ids, labels)
    for given in (labels, ids[:, 4:]):
        output = model(ids, labels=given, logits_to_keep=5)
        check(output, expected)
        assert output.logits.shape == (2, 5, 101)
    model.eval()
    with torch.no_grad():
        output = model(ids, labels=labels, logits_to_keep=torch.tensor([1, 3]))
        assert_close("loss", output.loss, expected[0], "float32")
        assert_close("logits", output.logits, model(ids).logits[:, [1, 3]], "float32")
        backwards = model(ids, labels=labels, logits_to_keep=torch.arange(9).flip(0))
        assert_close("loss of another order", backwards.loss, expected[0], "float32")
        assert_close("logits of another order", backwards.logits, model(ids).logits.flip(1), "float32")
    for wrong, kept in ((F.pad(ids, (1, 0)), 0), (ids[:, 2:], 0), (ids[:, 2:], 5), (ids[:1], 0)):
        with pytest.raises(ValueError, match=r"`labels` has shape .* 2 sequences of 9 tokens"):
            model(ids, labels=wrong, logits_to_keep=kept)
    assert next_tokens(torch.zeros(1, 3, 2), torch.tensor([[4, 5, 6]])).tolist() == [[5, 6, -100]]


def test_nothing_is_predicted_behind_a_cached_past():
    """The states of the past are gone: the main loss is there, and asking for MTP logits is an error."""
    model, ids = model_with().train(), random_ids(1, 9)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache)
    output = model(ids[:, 4:], past_key_values=cache, labels=ids[:, 4:])
    assert output.mtp_loss is None and output.loss is output.main_loss
    with pytest.raises(ValueError, match="past_key_values"):
        model(ids[:, 8:], past_key_values=cache, output_mtp_logits=True)
    fresh = DynamicCache(config=model.config)
    assert len(model(ids, past_key_values=fresh, labels=ids).mtp_loss) == DEPTHS


def test_labels_outside_of_the_vocabulary():
    model, ids = model_with(), random_ids(1, 9)
    labels = ids.clone()
    labels[0, 3] = 101
    for training in (True, False):
        with pytest.raises(IndexError, match="`labels`"):
            model.train(training)(ids, labels=labels)


# --- logits in training -----------------------------------------------------------------------------------------------


def deferred():
    model, ids = model_with().train(), random_ids(2, 9)
    return model, ids, model(ids, labels=ids)


@pytest.mark.parametrize(
    "read",
    [
        lambda output: output.logits,
        lambda output: output["logits"],
        lambda output: output.get("logits"),
        lambda output: output[1],
        lambda output: output.to_tuple()[1],
        lambda output: output[:2][1],
        lambda output: getattr(output, "logits", None),
        lambda output: copy.copy(output).logits,
    ],
    ids=["attribute", "key", "get", "index", "tuple", "slice", "getattr", "copy"],
)
def test_logits_are_there_for_who_reads_them(read, monkeypatch):
    calls, forward = [], LMHead.forward

    def counting(self, states, targets=None):
        calls.append(targets is None)
        return forward(self, states, targets)

    monkeypatch.setattr(LMHead, "forward", counting)
    model, ids, output = deferred()
    assert calls == [False], "one call for main head and depths"
    assert sum(calls) == 0, "nobody has asked"
    assert isinstance(output["loss"], torch.Tensor) and "logits" in output and sum(calls) == 0
    logits = read(output)
    assert sum(calls) == 1 and logits.requires_grad
    assert torch.equal(logits, model(ids).logits)
    assert read(output) is not None and output.logits is output["logits"]
    assert output.get("attentions", 5) == 5


def test_logits_read_without_gradients_first_still_have_them():
    model, ids, output = deferred()
    with torch.no_grad():
        output.logits.argmax(-1)
    output.logits.sum().backward()
    assert model.lm_head.weight.grad.any()


def test_deferred_logits_survive_what_wrappers_do_to_outputs():
    """Mixed precision rebuilds the output from its items, distributed wrappers from its leaves."""
    from accelerate.utils.operations import convert_to_fp32

    model, ids, output = deferred()
    leaves, spec = pytree.tree_flatten(output)
    for rebuilt in (convert_to_fp32(output), pytree.tree_unflatten(leaves, spec)):
        assert torch.equal(rebuilt.logits, model(ids).logits)


def test_deferred_logits_remember_autocast():
    model, ids = model_with().train(), random_ids(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, labels=ids)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    output = model(ids, labels=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert output.logits.dtype == torch.float32, "autocast that was off when the model ran"


def test_tuples():
    model, ids = model_with().train(), random_ids(2, 9)
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert torch.equal(logits, model(ids).logits) and loss.requires_grad


def test_skip_logits():
    model, ids = model_with(), random_ids(2, 9)
    expected = {training: model.train(training)(ids, labels=ids).loss for training in (True, False)}
    for training in (True, False):
        output = model.train(training)(ids, labels=ids, skip_logits=True)
        assert output.logits is None
        assert_close("loss", output.loss, expected[training], "float32")
        output = model(ids, labels=ids, skip_logits=False)
        assert isinstance(dict(output.items())["logits"], torch.Tensor)
        assert_close("loss", output.loss, expected[training], "float32")
    with pytest.raises(ValueError, match="skip_logits"):
        model(ids, skip_logits=True)


def test_gradients_do_not_depend_on_the_logits():
    """Loss from states, loss from logits, in training and in evaluation mode: one gradient of the main loss."""
    model, ids = model_with(0), random_ids(2, 9)
    results = []
    for training, skip in ((True, None), (True, False), (False, None), (False, True)):
        model.zero_grad()
        model.train(training)(ids, labels=ids, skip_logits=skip).loss.backward()
        results.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    for other in results[1:]:
        for name, gradient in results[0].items():
            assert_close(name, other[name], gradient, "float32")


def test_loss_function_of_the_user():
    """It gets logits and labels, and does its own shift, for the main head and for every depth."""
    model, ids = model_with().train(), random_ids(2, 9)
    main, mtp = expected_losses(model, ids)
    seen = []

    def doubled(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        seen.append((tuple(logits.shape), vocab_size, num_items_in_batch))
        shifted = labels[:, 1:].flatten()
        return 2 * F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted)

    model.loss_function = doubled
    check(model(ids, labels=ids, num_items_in_batch=3), (2 * main, [2 * loss for loss in mtp]))
    assert seen == [((2, 9, 101), 101, 3), ((2, 8, 101), 101, 3), ((2, 7, 101), 101, 3)]


@pytest.mark.parametrize("arguments", ["ignore_index", "shift_labels"])
def test_loss_function_of_the_user_takes_what_transformers_own_takes(arguments):
    model, ids = model_with().train(), random_ids(2, 9)
    if arguments == "ignore_index":
        labels = ids.clone()
        labels[:, :4] = -1
        given = {"labels": labels, "ignore_index": -1}
    else:  # the last position has a target, too
        given = {"shift_labels": F.pad(ids[:, 1:], (0, 1), value=7)}
    expected = model(ids, **given)

    def plain(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
        return F.cross_entropy(logits.flatten(0, 1), shift_labels.flatten(), ignore_index=ignore_index)

    model.loss_function = plain
    check(model(ids, **given), (expected.main_loss, expected.mtp_loss))


# --- trainers and adapters --------------------------------------------------------------------------------------------


def dataset(count: int = 8, length: int = 10):
    return [{"input_ids": row, "labels": row} for row in random_ids(count, length)]


def test_trainer_accumulates_and_evaluates(tmp_path):
    """Two micro-batches make the step of one batch; predictions are the logits alone, the loss is the main head's."""
    states, predictions = [], []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        model = model_with(1).train()
        arguments = TrainingArguments(
            output_dir=tmp_path / str(accumulation),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=dataset(),
            eval_dataset=dataset(4),
            compute_metrics=lambda prediction: predictions.append(prediction.predictions.shape) or {},
        )
        trainer.train()
        metrics = trainer.evaluate()
        ids = torch.stack([row["input_ids"] for row in dataset(4)])
        with torch.no_grad():
            assert metrics["eval_loss"] == pytest.approx(model.eval()(ids, labels=ids).main_loss.item(), rel=1e-5)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert predictions == [(4, 10, 101)] * 2
    started = model_with(1).state_dict()
    for name, tensor in states[0].items():
        assert_close(name, states[1][name], tensor, "float32")
    assert not torch.equal(states[0]["model.layers.3.eh_proj.weight"], started["model.layers.3.eh_proj.weight"])


@pytest.mark.parametrize("target", ["lm_head", "o_proj"])
def test_lora(target):
    """An adapter on the head itself, and on layers below a head that is then frozen; MTP layers have theirs too."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    model, ids = get_peft_model(model_with().train(), config), random_ids(2, 9)
    main, mtp = expected_losses(model, ids)
    (main + 0.3 * sum(mtp) / DEPTHS).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    check(output, (main, mtp))
    output.loss.backward()
    assert expected and gradients(model).keys() == expected.keys()
    assert (target == "lm_head") != any(".layers.4." in name for name in expected)
    for name, gradient in expected.items():
        assert_close(name, gradients(model)[name], gradient, "float32")


def test_resized_vocabulary():
    model = model_with().train()
    model.resize_token_embeddings(120, mean_resizing=False)
    ids = random_ids(2, 9)
    check(model(ids, labels=ids), expected_losses(model, ids))


# --- configuration ----------------------------------------------------------------------------------------------------


def test_weight_is_written_only_when_it_was_set(tmp_path):
    def saved(config):
        config.save_pretrained(tmp_path)
        return AutoConfig.from_pretrained(tmp_path), (tmp_path / "config.json").read_text()

    again, text = saved(tiny_config())
    assert "mtp_loss_weight" not in text and again.mtp_loss_weight == 0.3
    again, text = saved(tiny_config(mtp_loss_weight=0.1))
    assert again.mtp_loss_weight == 0.1
    again.mtp_loss_weight = 0.3  # the file that was read had the key
    assert '"mtp_loss_weight": 0.3' in saved(again)[1]


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.3", True, None])
def test_weight_must_be_a_number(value):
    with pytest.raises(ValueError, match="mtp_loss_weight"):
        DeepseekV3Config(mtp_loss_weight=value)
