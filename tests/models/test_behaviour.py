"""What users expect of a Transformers model: training, outputs, switches, adapters, pipelines, errors."""

import copy
import os
import shutil

import pytest
import torch
from testing import assert_close
from tiny import left_padded, random_ids, tiny_config, tiny_model
from tiny_step3 import text_model
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, pipeline
from transformers.models.deepseek_v2 import DeepseekV2ForCausalLM as NativeV2
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as NativeV3

FAMILIES = ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "kimi_k2", "longcat_flash", "longcat_flash_ngram"]
LONGCAT = ["longcat_flash", "longcat_flash_ngram"]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2"])
def test_gradient_checkpointing(family, reentrant):
    model = tiny_model(family).train()
    ids = random_ids(2, 12)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            assert model.is_gradient_checkpointing
        model.zero_grad()
        runs = []
        watched = [model.model.layers[1].mlp.experts, *(layer.eh_proj for _, layer in model.model.mtp_layers())]
        hook = lambda *_, runs=runs: runs.append(1)  # noqa: E731
        handles = [module.register_forward_hook(hook) for module in watched]
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        for handle in handles:
            handle.remove()
        assert len(runs) == len(watched) * (2 if checkpointing else 1), "a layer was not recomputed"
        counts = [layer.mlp.gate.tokens_per_expert for layer in model.model.layers[1:3]]
        results.append((loss.detach(), gradients(model), counts))
    (loss, expected, counts), (other_loss, other, other_counts) = results
    assert_close("loss", other_loss, loss, "float32")
    assert expected.keys() == other.keys()
    for name, gradient in expected.items():
        assert_close(name, other[name], gradient, "float32")
    for before, after in zip(counts, other_counts):  # a recomputed pass is not counted twice
        assert torch.equal(before, after) and before.sum() == 2 * 12 * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns(family):
    model = tiny_model(family).train()
    ids = random_ids(4, 16)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("family, native_class", [("deepseek_v3", NativeV3), ("deepseek_v2", NativeV2)])
def test_loss_and_gradients_are_native(family, native_class):
    """The same weights in Transformers' own class: the loss, and the gradient of every parameter."""
    model = tiny_model(family, num_nextn_predict_layers=0).train()
    fields = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    native = native_class(native_class.config_class(**fields)).train()
    native.load_state_dict(model.state_dict())
    ids, mask = left_padded([random_ids(1, 14)[0], random_ids(1, 9)[0]])
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for each in (model, native):
        loss = each(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert_close("loss", losses[0], losses[1], "float32")
    expected, result = gradients(native), gradients(model)
    assert result.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(name, result[name], gradient, "float32")


def test_gradient_of_the_loss_by_finite_differences():
    """The whole backward pass against the slope of the loss along a random direction, in float64 where it is."""
    model = tiny_model("deepseek_v2_lite", num_hidden_layers=2).double()
    ids = random_ids(1, 9)
    names = [
        "model.layers.1.self_attn.kv_b_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "lm_head.weight",
    ]
    parameters = dict(model.named_parameters())
    model(ids, labels=ids).loss.backward()
    for name in names:
        direction = torch.randn_like(parameters[name])
        slope = (parameters[name].grad * direction).sum().item()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[name].add_(sign * 1e-3 * direction)
                losses.append(model(ids, labels=ids).loss.item())
                parameters[name].sub_(sign * 1e-3 * direction)
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=1e-3, abs=1e-5), name


def test_training_learns():
    """A few steps of a plain optimizer memorise a batch."""
    model = tiny_model().train()
    ids = random_ids(2, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_autocast_training_step():
    """Mixed precision: float32 weights, bfloat16 products, float32 routing and gradients."""
    model = tiny_model().train()
    ids = random_ids(2, 12)
    expected = model(ids, labels=ids).loss.item()
    router_dtypes = []
    handle = model.model.layers[1].mlp.gate.register_forward_hook(
        lambda module, args, output: router_dtypes.append((output[0].dtype, output[1].dtype))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    handle.remove()
    assert router_dtypes == [(torch.float32, torch.float32)]
    assert loss.item() == pytest.approx(expected, rel=0.05)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients(model).values())


def test_compiled_training_step():
    torch._dynamo.reset()
    model = tiny_model("deepseek_v2_lite", num_hidden_layers=2).train()
    ids = random_ids(2, 12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    for name, gradient in expected.items():
        assert_close(name, dict(model.named_parameters())[name].grad, gradient, "float32")
    torch._dynamo.reset()


def test_attention_dropout_in_training_only():
    for mode in ("expanded", "absorbed"):
        model = tiny_model(attention_dropout=0.5, mla_mode=mode, attn_implementation="eager")
        ids = random_ids(2, 9)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(ids).logits)
            model.train()
            assert not torch.equal(model(ids).logits, model(ids).logits), mode


# --- loss -------------------------------------------------------------------------------------------------------------


def loss_by_hand(logits: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """Negative log likelihood of every next token that has a label, one by one, in float64."""
    losses = []
    for row in range(labels.shape[0]):
        for position in range(labels.shape[1] - 1):
            target = labels[row, position + 1].item()
            if target != -100:
                losses.append(-logits[row, position].double().log_softmax(-1)[target].item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_loss(family):
    model = tiny_model(family)
    ids = random_ids(2, 10)
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, 7:] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        losses = loss_by_hand(output.logits, labels)
        assert len(losses) == 6 + 6
        assert output.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        shared = model(ids, labels=labels, num_items_in_batch=40).loss
        assert shared.item() == pytest.approx(sum(losses) / 40, rel=1e-5)
        as_tensor = model(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
        assert as_tensor.item() == pytest.approx(shared.item(), rel=1e-6)


def test_accumulated_gradients_equal_one_batch():
    """Two micro-batches of unequal length with `num_items_in_batch` give the gradient of the whole batch."""
    model = tiny_model().train()
    ids, mask = left_padded([random_ids(1, 12)[0], random_ids(1, 6)[0]])
    labels = ids.masked_fill(mask == 0, -100)
    items = int((labels[:, 1:] != -100).sum())
    model(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    for row in range(2):
        inputs = {"attention_mask": mask[row : row + 1], "labels": labels[row : row + 1]}
        model(ids[row : row + 1], num_items_in_batch=items, **inputs).loss.backward()
    for name, gradient in expected.items():
        assert_close(name, gradients(model)[name], gradient, "float32")


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["expanded", "absorbed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_outputs(family, mode):
    model = tiny_model(family, attn_implementation="eager", mla_mode=mode)
    # LongCat: two attentions a layer, experts in each, four zero experts.
    layers, attentions, moe_layers, columns = (2, 4, (0, 1), 12) if family in LONGCAT else (3, 3, (1, 2), 8)
    heads = 3
    ids = random_ids(2, 7)
    seen = []
    for index in moe_layers:
        mlp = model.model.layers[index].mlp
        gate = mlp.router if family in LONGCAT else mlp.gate
        gate.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    flags = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    if model.model.mtp_layers():
        flags["output_mtp_logits"] = True  # its layer is no part of the recorded ones
    with torch.no_grad():
        output = model(ids, **flags)
        plain = model(ids)
        last = model.model(ids).last_hidden_state
    assert plain.hidden_states is None and plain.attentions is None and plain.router_logits is None
    assert torch.equal(plain.logits, output.logits)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 7, 48)] * (layers + 1)
    if family != "longcat_flash_ngram":
        assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(output.hidden_states[-1], last), "the last one is behind the final norm"
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, heads, 7, 7)] * attentions
    for weights in output.attentions:
        assert_close("row sums", weights.sum(-1), torch.ones(2, heads, 7), "float32")
        assert not weights.triu(1).any(), "attention to a later token"
    assert [tuple(logits.shape) for logits in output.router_logits] == [(14, columns)] * 2
    assert torch.equal(output.router_logits[0], seen[0]) and torch.equal(output.router_logits[1], seen[1])


def test_recorded_outputs_of_a_decode_step():
    model = tiny_model(attn_implementation="eager")
    flags = {"output_hidden_states": True, "output_attentions": True, "output_router_logits": True}
    with torch.no_grad():
        full = model(random_ids(2, 7), **flags)
        cache = model(random_ids(2, 7)[:, :6], use_cache=True).past_key_values
        step = model(random_ids(2, 7)[:, 6:], past_key_values=cache, **flags)
    for index in range(3):
        assert_close("attention", step.attentions[index], full.attentions[index][:, :, -1:], "float32")
        assert_close("state", step.hidden_states[index], full.hidden_states[index][:, -1:], "float32")
    assert_close("router", step.router_logits[0], full.router_logits[0].view(2, 7, 8)[:, -1], "float32")


def test_generate_returns_what_was_asked_for():
    model = tiny_model(attn_implementation="eager")
    output = model.generate(
        random_ids(1, 5),
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert len(output.logits) == len(output.hidden_states) == len(output.attentions) == 3
    assert tuple(output.attentions[-1][0].shape) == (1, 3, 1, 7)


def test_tuple_output():
    model = tiny_model()
    with torch.no_grad():
        as_tuple = model(random_ids(1, 5), labels=random_ids(1, 5), return_dict=False, use_cache=False)
        as_dict = model(random_ids(1, 5), labels=random_ids(1, 5), use_cache=False)
    assert torch.equal(as_tuple[0], as_dict.loss) and torch.equal(as_tuple[1], as_dict.logits)


@pytest.mark.parametrize("kept", [1, 3, torch.tensor([0, 4])], ids=["last", "last_three", "chosen"])
def test_logits_to_keep(kept):
    model = tiny_model()
    with torch.no_grad():
        full = model(random_ids(2, 7)).logits
        some = model(random_ids(2, 7), logits_to_keep=kept).logits
    assert_close("logits", some, full[:, -kept:] if isinstance(kept, int) else full[:, kept], "float32")


def test_balance_statistics_need_no_second_pass():
    model = tiny_model()
    with torch.no_grad():
        model(random_ids(2, 11))
    for layer in model.model.layers[1:3]:
        counts = layer.mlp.gate.tokens_per_expert
        assert counts.shape == (8,) and counts.dtype == torch.int64 and counts.sum() == 2 * 11 * 3


# --- switches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_implementations_agree(family):
    model = tiny_model(family)
    ids = random_ids(2, 9)
    results = {}
    for name in ("hf_moe", "eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        with torch.no_grad():
            results[name] = model(ids).logits
    for name, logits in results.items():
        assert_close(name, logits, results["eager"], "float32")


def test_unknown_experts_implementation():
    with pytest.raises(ValueError, match="no_such_backend"):
        tiny_model().set_experts_implementation("no_such_backend")


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_attention_implementations_agree(implementation, padded):
    """A whole pass and a cached step. Flex runs uncompiled here: the masks are ours, the kernel is not."""
    model = tiny_model(attn_implementation="eager")
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 9 - 4 * padded, seed=1)[0]])
    mask_of = (lambda length: mask[:, :length]) if padded else (lambda length: None)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = model(ids, attention_mask=mask_of(9)).logits
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        whole = model(ids, attention_mask=mask_of(9)).logits
        assert_close("logits", whole[mask.bool()], expected[mask.bool()], "float32")
        for mode in ("auto", "expanded", "absorbed"):
            model.config.mla_mode = mode
            cache = model(ids[:, :8], attention_mask=mask_of(8), use_cache=True).past_key_values
            step = model(ids[:, 8:], attention_mask=mask_of(9), past_key_values=cache).logits
            assert_close(f"{mode} step", step, expected[:, 8:], "float32")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, "step3_text"])
@torch.no_grad()
def test_prepared_masks_are_boolean_or_additive(family, implementation):
    model = text_model() if family == "step3_text" else tiny_model(family)
    model.set_attn_implementation(implementation)
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 5, seed=1)[0]])
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    prepared = torch.ones(9, 9, dtype=torch.bool).tril() & mask[:, None, None].bool()  # (2, 1, 9, 9)
    additive = torch.zeros(prepared.shape).masked_fill(~prepared, torch.finfo(torch.float32).min)
    for name, form in (("boolean", prepared), ("additive", additive)):
        assert_close(name, model(ids, attention_mask=form).logits[mask.bool()], expected, "float32")
    with pytest.raises(ValueError, match="int64: a 4D mask is boolean"):
        model(ids, attention_mask=prepared.long())


@pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")),
    reason="inductor needs a C++ compiler",
)
def test_compiled_flex_attention():
    """The compiled kernel of the CPU takes head widths of 16 and more."""
    torch._dynamo.reset()
    sizes = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "num_hidden_layers": 1}
    model = tiny_model(attn_implementation="eager", num_nextn_predict_layers=0, **sizes)
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 5)[0]])
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("flex_attention")
        result = model(ids, attention_mask=mask).logits
    assert_close("logits", result[mask.bool()], expected[mask.bool()], "float32")


def test_bfloat16_keeps_the_correction_bias_in_float32(tmp_path):
    model = tiny_model()
    exact = model.model.layers[1].mlp.gate.e_score_correction_bias
    assert not torch.equal(exact, exact.bfloat16().float())  # rounding would show
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gate = loaded.model.layers[1].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32 and torch.equal(gate.e_score_correction_bias, exact)
    for family in ("deepseek_v3", "kimi_k2", "longcat_flash"):
        built = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.bfloat16)
        assert built.lm_head.weight.dtype == torch.bfloat16
        biases = [tensor for name, tensor in built.named_buffers() if name.endswith("e_score_correction_bias")]
        assert biases and {tensor.dtype for tensor in biases} == {torch.float32}
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    assert torch.equal(again.model.layers[1].mlp.gate.e_score_correction_bias, exact)


def test_initialisation_follows_the_configuration():
    model = AutoModelForCausalLM.from_config(tiny_config(initializer_range=0.3))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert 0.2 < parameter.std().item() < 0.4 and abs(parameter.mean().item()) < 0.1, name
    gate = model.model.layers[1].mlp.gate
    assert not gate.e_score_correction_bias.any()


def test_resized_vocabulary():
    """New tokens get rows in the embedding and the head, which the MTP layer shares, and are no longer out of range."""
    model = tiny_model()
    ids = random_ids(1, 6)
    with torch.no_grad():
        before = model(ids, output_mtp_logits=True)
        model.resize_token_embeddings(110)
        after = model(ids, output_mtp_logits=True)
        assert after.logits.shape[-1] == after.mtp_logits[0].shape[-1] == 110
        assert_close("logits", after.logits[..., :101], before.logits, "float32")
        assert_close("mtp logits", after.mtp_logits[0][..., :101], before.mtp_logits[0], "float32")
        assert model(torch.tensor([[109]])).logits.isfinite().all()
    with pytest.raises(IndexError, match="110 entries"):
        model(torch.tensor([[110]]))


def test_tied_embeddings():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        output = model(random_ids(1, 5), output_hidden_states=True)
    expected = output.hidden_states[-1].double() @ model.model.embed_tokens.weight.double().t()
    assert_close("logits", output.logits, expected, "float32")


def test_two_models_of_one_process_do_not_meet():
    """No state in module globals: a second model with other settings changes nothing."""
    first = tiny_model()
    with torch.no_grad():
        expected = first(random_ids(1, 6)).logits
        second = tiny_model("kimi_k2", mla_mode="absorbed", attn_implementation="eager")
        second.set_experts_implementation("eager")
        second(random_ids(1, 6))
        assert torch.equal(first(random_ids(1, 6)).logits, expected)


# --- adapters and offload ---------------------------------------------------------------------------------------------


def lora(model, **kwargs):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **kwargs))


def test_lora_trains_and_merges():
    """Adapters on attention and on the fused experts: only they learn, and merged weights answer the same."""
    base = tiny_model(num_nextn_predict_layers=0)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = lora(
        base,
        target_modules=["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ).train()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert any("experts" in name for name in trainable)
    ids = random_ids(2, 12)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids).logits
        with model.disable_adapter():
            original = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        assert_close("merged logits", merged(ids).logits, adapted, "float32")
    assert (adapted - original).abs().max() > 1e-2
    after = merged.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".self_attn." in name or ".mlp.experts." in name for name in changed)


def test_lora_on_kv_b_proj_shows_in_both_orders():
    """The absorbed order takes `kv_b_proj` apart; an adapter on it must not get lost between prefill and decode."""
    model = lora(tiny_model(), target_modules=["kv_b_proj"], init_lora_weights=False).eval()
    ids = random_ids(2, 9)
    with torch.no_grad():
        full = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - full).abs().max() > 0.1
        cache = model(ids[:, :8], use_cache=True).past_key_values
        step = model(ids[:, 8:], past_key_values=cache).logits
    assert_close("logits", step, full[:, 8:], "float32")


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash_ngram", "step3_text"])
@pytest.mark.parametrize(
    "table",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["o_proj"], "trainable_token_indices": [3, 4]}],
    ids=["lora", "single_tokens"],
)
def test_adapters_on_the_embedding_table(table, family):
    base = text_model() if family == "step3_text" else tiny_model(family)
    model = lora(base, **table).train()
    ids = random_ids(2, 9)
    ids[:, 2:4] = torch.tensor([3, 4])
    model(input_ids=ids, labels=ids).loss.backward()
    grown = [n for n, p in model.named_parameters() if "embed_tokens" in n and p.grad is not None and p.grad.any()]
    assert grown
    with pytest.raises(IndexError, match="vocabulary has 101 entries"):
        model(input_ids=ids + 90)
    model.eval()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    text = model.generate(input_ids=ids, **options)
    if family != "step3_text":
        assert torch.equal(model.generate(input_ids=ids, use_mtp=True, **options), text)


def test_decode_with_offloaded_layers(tmp_path):
    """Layers on disk come in for their own forward call only; cached decode must not read weights past it."""
    model = tiny_model()
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "cpu" if index == 0 else "disk" for index in range(4)}
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    assert loaded.model.layers[1].self_attn.kv_b_proj.weight.device.type == "meta"
    with torch.no_grad():
        assert_close("full pass", loaded(ids).logits, expected, "float32")
        cache = loaded(ids[:, :8], use_cache=True).past_key_values
        step = loaded(ids[:, 8:], past_key_values=cache).logits
    assert_close("decode step", step, expected[:, 8:], "float32")


# --- pipeline ---------------------------------------------------------------------------------------------------------


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, within the tiny vocabulary."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2} | {chr(32 + index): 3 + index for index in range(95)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def test_text_generation_pipeline():
    model, tokenizer = tiny_model(), letter_tokenizer()
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=2)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["def add(a, b):", "x = 1"]
    kwargs = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    together = [result[0]["generated_text"] for result in generate(prompts, batch_size=2, **kwargs)]
    for prompt, text in zip(prompts, together):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert together[0] != together[1]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids, low, high", [([[5, 101, 7]], 5, 101), ([[5, -1, 7]], -1, 7), ([[4000]], 4000, 4000)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_token_ids_out_of_range(ids, low, high, training):
    model = tiny_model().train(training)
    with pytest.raises(IndexError, match=f"from {low} to {high}.*101 entries"):
        model(torch.tensor(ids))


@pytest.mark.parametrize(
    "ids, named",
    [
        (torch.tensor([5, 6]), r"\(batch, seq\).*\(2,\)"),
        ([[5, 6]], "list"),
        (torch.ones(1, 2), "float32"),
        (torch.ones(1, 0, dtype=torch.long), r"\(1, 0\) holds no token"),
    ],
    ids=["one row", "list", "floats", "empty"],
)
@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_what_is_no_batch_of_ids(family, ids, named):
    with pytest.raises(ValueError, match=named):
        tiny_model(family)(ids)


def test_ids_and_embeddings_exclude_each_other():
    model = tiny_model()
    for inputs in ({}, {"input_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 48)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**inputs)


def test_mtp_logits_need_mtp_layers():
    with pytest.raises(ValueError, match="has none"):
        tiny_model("kimi_k2")(random_ids(1, 5), output_mtp_logits=True)


def test_forward_leaves_its_inputs_alone():
    model = tiny_model()
    ids, mask = left_padded([random_ids(1, 9)[0], random_ids(1, 5)[0]])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": ids}
    before = copy.deepcopy(inputs)
    model(**inputs).loss.backward()
    assert all(torch.equal(before[name], inputs[name]) for name in inputs)
