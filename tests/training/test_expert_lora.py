"""LoRA on experts by PEFT's target_parameters: values and gradients against PEFT's own layers, which add B A to W."""

import contextlib
import copy

import pytest
import torch
from lora_cases import EXPERTS, FAMILIES, PEFT_RELEASE, adapted, factors_of, ids_of, model_of, stock_peft, wrappers
from testing import assert_close, can_run_kernels

from hf_moe.models.op_expert_lora import ExpertLora

OURS = "hf_moe.training.lora_layers"


def step(model, ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits in evaluation, and the gradients of one training step, MTP loss included."""
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
    model.train()
    model(ids, labels=ids).loss.backward()
    gradients = {name: parameter.grad for name, parameter in factors_of(model).items()}
    model.zero_grad()
    return logits, gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_grouped_path_is_that_of_peft_and_of_merged_weights(family):
    model = model_of(family)
    ids = ids_of(model)
    with stock_peft():
        reference = adapted(copy.deepcopy(model))
    assert {type(layer).__module__ for layer in wrappers(reference)} == {"peft.tuners.lora.layer"}
    ours = adapted(model)
    assert {type(layer).__module__ for layer in wrappers(ours)} == {OURS}
    assert list(ours.state_dict()) == list(reference.state_dict())
    logits, gradients = step(ours, ids)
    expected, expected_gradients = step(reference, ids)
    assert_close("logits", logits, expected, "float32")
    assert gradients.keys() == expected_gradients.keys() and len(gradients) >= 8
    for name, gradient in gradients.items():
        # Where MTP layers are not part of the loss their factors have no gradient in either.
        assert (gradient is None) == (expected_gradients[name] is None), name
        if gradient is not None:
            assert gradient.abs().max() > 0 and gradient.shape == factors_of(ours)[name].shape, name
            assert_close(name, gradient, expected_gradients[name], "float32_grad")
    merged = ours.eval().merge_and_unload()
    assert not wrappers(merged)
    with torch.no_grad():
        assert_close("merged", merged(ids).logits, logits, "float32")


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash", "step3_text"])
def test_every_factor_changes_in_two_steps(family):
    """From PEFT's initialisation: B is zero, so A moves in the second step."""
    model = model_of(family)
    ids = ids_of(model, length=24)
    model = adapted(model, init_lora_weights=True).train()
    for name, parameter in factors_of(model).items():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    before = {name: parameter.detach().clone() for name, parameter in factors_of(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in factors_of(model).items():
        assert parameter.grad is not None and not torch.equal(parameter, before[name]), name
    changed = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    assert not changed


@pytest.mark.parametrize("parameters", [EXPERTS[:1], EXPERTS[1:]], ids=["gate_up", "down"])
def test_one_of_the_two_weights(parameters):
    model = model_of("deepseek_v3")
    ids = ids_of(model)
    with stock_peft():
        reference = adapted(copy.deepcopy(model), modules=[], parameters=parameters)
    ours = adapted(model, modules=[], parameters=parameters)
    for (name, actual), expected in zip(step(ours, ids)[1].items(), step(reference, ids)[1].values()):
        assert_close(name, actual, expected, "float32_grad")


@pytest.mark.parametrize("backend", ["hf_moe", "eager", "grouped_mm", "batched_mm"])
def test_every_backend_computes_adapters(backend):
    """`eager` is the definition; calls of foreign backends with adapters are computed by ours, without B A."""
    model = model_of("longcat_flash")
    ids = ids_of(model)
    with stock_peft():
        reference = step(adapted(copy.deepcopy(model)), ids)
    model.set_experts_implementation(backend)
    ours = adapted(model)
    with torch.no_grad(), ours.disable_adapter():
        plain = ours(ids).logits
    logits, gradients = step(ours, ids)
    assert_close("logits", logits, reference[0], "float32")
    for name, gradient in gradients.items():
        assert_close(name, gradient, reference[1][name], "float32_grad")
    assert (plain - logits).abs().max() > 1e-2


@pytest.mark.skipif(not can_run_kernels(), reason="needs a GPU, or an interpreter of Triton that knows this NumPy")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_triton_backend(dtype):
    """With float32 factors beside either dtype: gradients come in float32, from products in the model's dtype."""
    model = model_of("kimi_k2", dtype=dtype)
    model = adapted(model, modules=[], lora_dropout=0.25).train()
    layer = model.base_model.model.model.layers[1].mlp.experts
    x, ids = torch.randn(9, 48).to(dtype), torch.rand(9, 8).argsort(-1)[:, :3]
    weights, seed, results = torch.rand(9, 3), torch.randn(9, 48).to(dtype), []
    for backend in ("eager", "hf_moe_triton"):
        layer.get_base_layer().config._experts_implementation = backend
        torch.manual_seed(1)
        output = layer(x, ids, weights)
        output.backward(seed)
        gradients = {name: p.grad for name, p in factors_of(model).items() if p.grad is not None}
        assert len(gradients) == 4 and all(gradient.dtype == torch.float32 for gradient in gradients.values())
        results.append({"output": output} | gradients)
        model.zero_grad()
    for name, expected in results[0].items():
        assert_close(name, results[1][name], expected, "float32" if dtype == torch.float32 else "bfloat16_grad")


def test_the_triton_backend_says_why_it_cannot(monkeypatch):
    monkeypatch.setattr("hf_moe.models.op_experts.runs_kernels", lambda device: False)
    model = model_of("deepseek_v3")
    model.set_experts_implementation("hf_moe_triton")
    model = adapted(model)
    with pytest.raises(ValueError, match="hf_moe_triton.*cannot be used"):
        model(ids_of(model))


def test_no_weight_of_all_experts_is_added_up(monkeypatch):
    model = adapted(model_of("deepseek_v3")).train()
    ids = ids_of(model)
    layers = wrappers(model)
    for layer in layers:
        monkeypatch.setattr(layer, "get_delta_weight", None)
        monkeypatch.setattr(layer, "_activate_lora", None)
    stacks = {layer.get_base_layer().gate_up_proj.numel() for layer in layers}
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dim() == 3 and output.shape[0] == 8:
                sizes.append(output.numel())
            return output

    with Watch():
        model(ids, labels=ids).loss.backward()
    assert sizes and max(sizes) < min(stacks) // 2


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_is_that_of_the_masks():
    """The masks that a call drew, given to the definition in float64, give its values and gradients."""
    model = model_of("deepseek_v3").model.layers[1].mlp
    holder = torch.nn.Module()
    holder.mlp, holder.config = model, model.experts.config
    wrapped = adapted(holder, modules=[], lora_dropout=0.3).train()
    experts, seen = model.experts.get_base_layer(), {}
    experts.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    x, ids = torch.randn(7, 48), torch.rand(7, 8).argsort(-1)[:, :3]
    weights, seed = torch.rand(7, 3), torch.randn(7, 48)
    output = model.experts(x, ids, weights)
    output.backward(seed)
    lora = seen["lora"]
    assert lora.dropout == 0.3 and lora.kept_hidden.shape == (7, 48) and lora.kept_inner.shape == (21, 16)
    kept = torch.cat([lora.kept_hidden.flatten(), lora.kept_inner.flatten()]).float().mean()
    assert 0.6 < kept < 0.8
    wide = copy.deepcopy(wrapped).double()
    wide.zero_grad()
    wide_experts = wide.base_model.model.mlp.experts.get_base_layer()
    layers = wrappers(wide)  # of down_proj, then of gate_up_proj
    factors = [factor for layer in layers[::-1] for factor in layer._factors("default")]
    same = ExpertLora(*factors, 2.0, 2.0, lora.kept_hidden, lora.kept_inner, 0.3)
    expected = wide_experts.define(x.double(), ids, weights.double(), same)
    expected.backward(seed.double())
    assert_close("output", output, expected, "float32")
    reference = factors_of(wide)
    for name, parameter in factors_of(wrapped).items():
        assert_close(name, parameter.grad, reference[name].grad, "float32_grad")


def test_dropout_is_off_in_evaluation_and_drawn_anew_in_training():
    model = model_of("deepseek_v3")
    ids = ids_of(model)
    without = adapted(copy.deepcopy(model))
    model = adapted(model, lora_dropout=0.5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, without(ids).logits)
        model.train()
        first, second = model(ids).logits, model(ids).logits
        assert not torch.equal(first, second)
        results = []
        for _ in range(2):
            torch.manual_seed(3)
            results.append(model(ids).logits)
        assert torch.equal(*results)


@pytest.mark.skipif(PEFT_RELEASE < (0, 19), reason="PEFT 0.18 allows one adapter with target_parameters")
def test_different_dropout_at_once_is_an_error():
    model = adapted(model_of("deepseek_v3"), lora_dropout=0.1, modules=[])
    config = copy.deepcopy(model.peft_config["default"])
    config.lora_dropout = 0.0
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    model.eval()(ids_of(model))
    with pytest.raises(ValueError, match="different lora_dropout.*0.1"):
        model.train()(ids_of(model))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash", "step3_text"])
def test_gradient_checkpointing_draws_the_same_masks(family, use_reentrant):
    model = model_of(family)
    ids, results = ids_of(model), []
    model = adapted(model, lora_dropout=0.2).train()
    model.enable_input_require_grads()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(5)
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append({name: parameter.grad for name, parameter in factors_of(model).items()} | {"loss": loss})
        model.zero_grad()
    for name, expected in results[0].items():
        assert_close(name, results[1][name], expected, "float32")


# --- dtypes, edges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["float32-factors", "bfloat16-factors"])
def test_bfloat16_model(autocast_adapter_dtype):
    """Beside a bfloat16 model PEFT keeps adapters in float32, unless told not to."""
    from peft import LoraConfig, get_peft_model

    results = []
    for dtype in (torch.bfloat16, torch.float64):
        model = model_of("kimi_k2", dtype=dtype)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
        for name, parameter in factors_of(model).items():
            generator = torch.Generator().manual_seed(len(name))
            with torch.no_grad():
                parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.15).bfloat16())
        if dtype == torch.bfloat16:
            wanted = torch.float32 if autocast_adapter_dtype else torch.bfloat16
            assert {parameter.dtype for parameter in factors_of(model).values()} == {wanted}
        results.append(model)
    low, wide = results
    layer, reference = (model.base_model.model.model.layers[1].mlp.experts for model in results)
    x, ids = torch.randn(17, 48).bfloat16(), torch.rand(17, 8).argsort(-1)[:, :3]
    weights, seed = torch.rand(17, 3), torch.randn(17, 48).bfloat16()
    experts, wide_experts = layer.get_base_layer(), reference.get_base_layer()
    with torch.no_grad():
        wide_experts.gate_up_proj.copy_(experts.gate_up_proj)
        wide_experts.down_proj.copy_(experts.down_proj)
    output, expected = layer(x, ids, weights), reference(x.double(), ids, weights.double())
    assert output.dtype == torch.bfloat16
    assert_close("output", output, expected, "bfloat16")
    output.backward(seed)
    expected.backward(seed.double())
    names = [name for name, parameter in factors_of(low).items() if parameter.grad is not None]
    assert len(names) == 4
    for name in names:
        actual = factors_of(low)[name]
        assert actual.grad.dtype == actual.dtype
        assert_close(name, actual.grad, factors_of(wide)[name].grad, "bfloat16_grad")


@pytest.mark.parametrize("backend", ["hf_moe", "eager"])
def test_autocast(backend):
    """A float32 model under bfloat16 autocast."""
    model = model_of("deepseek_v3")
    model.set_experts_implementation(backend)
    ids = ids_of(model)
    model = adapted(model).train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    expected = {name: parameter.grad for name, parameter in factors_of(model).items()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        other = model(ids, labels=ids).loss
    other.backward()
    assert abs(other.item() - loss.item()) < 0.05 * abs(loss.item())
    for name, parameter in factors_of(model).items():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
        if "experts" in name:  # routing may differ: of the same direction, not the same
            assert torch.cosine_similarity(parameter.grad.flatten(), expected[name].flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("backend", ["hf_moe", "eager"])
@pytest.mark.parametrize("case", ["no_tokens", "none_here", "one_expert"])
def test_experts_without_tokens_take_part_in_the_backward_pass(case, backend):
    """Every factor gets a gradient, zeros where no token came, so that no rank waits for another."""
    model = model_of("deepseek_v3")
    model.set_experts_implementation(backend)
    model = adapted(model).train()
    layer = model.base_model.model.model.layers[1].mlp.experts
    tokens = 0 if case == "no_tokens" else 5
    ids = torch.full((tokens, 3), 8 if case == "none_here" else 2)
    layer(torch.randn(tokens, 48), ids, torch.rand(tokens, 3)).sum().backward()
    for wrapper in (layer, layer.base_layer):
        for side in (wrapper.lora_A, wrapper.lora_B):
            assert side["default"].weight.grad is not None
            used = side["default"].weight.grad.abs().max() > 0
            assert used == (case == "one_expert")
        a, b = wrapper._factors("default")
        assert a.shape[0] == b.shape[0] == 8


def test_under_compile():
    model = adapted(model_of("deepseek_v3"))
    ids = ids_of(model)
    with torch.no_grad():
        expected = model(ids).logits
        layer = model.base_model.model.model.layers[1].mlp
        layer.compile(backend="eager")
        with contextlib.suppress(AttributeError):
            torch._dynamo.reset()
        assert_close("logits", model(ids).logits, expected, "float32")
