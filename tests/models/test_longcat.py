"""LongCat-Flash against its goldens: values, every trap of `meta.json`, and what the upstream files leave open."""

import functools
import json

import pytest
import torch
from checkpoints import (
    assert_same_tensors,
    decode_checkpoint,
    edited_golden,
    read_config,
    read_tensors,
    run_python,
    write_checkpoint,
)
from testing import GOLDENS, assert_close, assert_golden, load_golden
from tiny import left_padded, random_ids, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    FineGrainedFP8Config,
    GenerationConfig,
    StaticCache,
)
from transformers.models.longcat_flash import LongcatFlashForCausalLM as NativeLongcat

from hf_moe.models import layer_rope
from hf_moe.models.configuration_longcat_flash import LongcatFlashConfig
from hf_moe.models.generation_mtp import MTPDecoding
from hf_moe.models.layer_dense import RMSNorm
from hf_moe.models.weights_safetensors import CheckpointError

CASES = ["longcat_flash", "longcat_fp8", "longcat_lite_ngram"]
MTP_CASES = ["longcat_flash", "longcat_fp8"]
MODES = ["auto", "expanded", "absorbed"]


@functools.cache
def load(case: str):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32).eval()
    assert type(model).__module__.startswith("hf_moe.")
    model.generation_config = GenerationConfig(pad_token_id=3)  # the goldens were generated without stopping
    return model


def fresh(case: str):
    """A model of one's own, to break, without FP8 weights."""
    return AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32, dequantize=True).eval()


@torch.no_grad()
def run(model, expected, **kwargs):
    inputs = {name: expected[name] for name in ("input_ids", "attention_mask", "position_ids", "labels")}
    return model(**inputs | kwargs)


def real_only(values: torch.Tensor, expected) -> torch.Tensor:
    """Zero where the batch is padded, as in the goldens."""
    mask = expected["attention_mask"][:, : values.shape[1]].bool()
    return values.masked_fill(~mask.unsqueeze(-1), 0.0)


def error(values: torch.Tensor, wanted: torch.Tensor, expected) -> float:
    return (real_only(values, expected) - wanted).abs().max().item()


@pytest.fixture(params=[pytest.param((case, mode), id=f"{case}-{mode}") for case in CASES for mode in MODES])
def golden(request):
    case, mode = request.param
    model = load(case)
    model.config.mla_mode = mode
    yield model, load_golden(case)[0]
    model.config.mla_mode = "auto"


# --- values -----------------------------------------------------------------------------------------------------------


def test_logits_states_and_loss(golden):
    model, expected = golden
    output = run(model, expected, output_hidden_states=True)
    assert_golden("logits", real_only(output.logits, expected), expected["logits"], "logits")
    assert_golden("loss", output.loss.view(1), expected["loss"], "loss")
    last = real_only(output.hidden_states[-1], expected)
    assert_golden("last_hidden_state", last, expected["last_hidden_state"], "last_hidden_state")


def test_routes(golden):
    model, expected = golden
    routes = []
    handles = [
        layer.mlp.router.register_forward_hook(lambda module, args, output: routes.append(output[1:]))
        for layer in model.model.layers
    ]
    run(model, expected)
    for handle in handles:
        handle.remove()
    real = expected["attention_mask"].bool()
    assert len(routes) == len(expected["topk_indices"]) == model.config.num_layers
    for layer, (weights, indices) in enumerate(routes):
        ids, order = indices.view(*real.shape, -1).sort(-1)
        weights = weights.view_as(ids).gather(-1, order)
        assert torch.equal(ids[real], expected["topk_indices"][layer][real].long()), f"layer {layer}"
        assert_golden(f"weights {layer}", weights[real], expected["topk_weights"][layer][real], "router_weights")


def test_greedy(golden):
    model, expected = golden
    ids, mask = expected["input_ids"], expected["attention_mask"]
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=32, do_sample=False)
    assert torch.equal(generated[:, ids.shape[1] :], expected["generated_ids"])


@pytest.mark.parametrize("case", CASES)
def test_greedy_with_a_static_cache(case):
    model, expected = load(case), load_golden(case)[0]
    generated = model.generate(
        expected["input_ids"],
        attention_mask=expected["attention_mask"],
        max_new_tokens=32,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
    )
    assert torch.equal(generated[:, expected["input_ids"].shape[1] :], expected["generated_ids"])


@pytest.mark.parametrize("case", CASES)
def test_prefill_then_steps(case):
    model, expected = load(case), load_golden(case)[0]
    cache, logits, done = DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        for piece in expected["input_ids"].split([9, 11, 1, 1, 1, 1], dim=1):
            done += piece.shape[1]
            mask = expected["attention_mask"][:, :done]
            logits.append(model(piece, attention_mask=mask, past_key_values=cache).logits)
    assert_golden("logits", real_only(torch.cat(logits, dim=1), expected), expected["logits"], "logits")


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_greedy_with_mtp_drafts(case, drafts, cache):
    """Speculation gives the golden's text: rows that advance unevenly, behind left padding."""
    model, expected = load(case), load_golden(case)[0]
    ids, mask = expected["input_ids"], expected["attention_mask"]
    options = {"num_assistant_tokens": drafts, "num_assistant_tokens_schedule": "constant"}
    if cache:
        options |= {"cache_implementation": cache, "disable_compile": True}
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=32,
        do_sample=False,
        use_mtp=True,
        return_dict_in_generate=True,
        **options,
    )
    assert torch.equal(output.sequences[:, ids.shape[1] :], expected["generated_ids"])
    assert output.speculation.drafted > 0


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("depths", [1, 3])
@pytest.mark.parametrize("family", ["longcat_flash", "longcat_flash_ngram"])
def test_mtp_drafts_that_are_taken(family, depths, static, monkeypatch):
    """Drafts that are right or wrong by a different pattern in each row: rows advance by 1 to 4 tokens a step."""
    model = tiny_model(family, num_nextn_predict_layers=depths)
    ids, mask = left_padded([random_ids(1, length, seed=length)[0] for length in (9, 4, 6)])
    model.generation_config = GenerationConfig(pad_token_id=2, max_new_tokens=25, do_sample=False)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=50)

    def foresee(decoding, layer, state, index, last):
        drafts = []
        for row, length in zip(decoding.rows, decoding.lengths):
            place = length + index
            wrong = place % (row + 2) == 0
            drafts.append([3 if wrong else expected[row, min(place, expected.shape[1] - 1)].item()])
        decoding.drafts.append(torch.tensor(drafts))
        places = torch.tensor(decoding.lengths).unsqueeze(1) + index
        decoding.tokens.scatter_(1, places, decoding.drafts[-1])

    monkeypatch.setattr(MTPDecoding, "_draft_token", foresee)
    options = {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant", "use_mtp": True}
    if static:
        options["past_key_values"] = StaticCache(config=model.config, max_cache_len=64)
    output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, expected[:, :34])
    assert output.speculation.accepted > 20
    # The cache that is returned goes on, drafts or not.
    longer = torch.cat((mask, mask.new_ones(3, 25)), dim=1)
    rest = model.generate(output.sequences, attention_mask=longer, past_key_values=output.past_key_values)
    assert torch.equal(rest, expected)


@pytest.mark.parametrize("case", MTP_CASES)
def test_mtp_logits(case):
    model, expected = load(case), load_golden(case)[0]
    logits = run(model, expected, output_mtp_logits=True).mtp_logits
    assert len(logits) == 1
    assert_golden("mtp", real_only(logits[0], expected), expected["mtp_logits"], "mtp_logits")


def test_fp8_edge_blocks_are_decoded():
    model, expected = fresh("longcat_fp8"), load_golden("longcat_fp8")[0]
    decoded = decode_checkpoint(read_tensors(GOLDENS / "longcat_fp8"))
    state = {**decoded, **model.state_dict()}  # experts are stacked: theirs from the file
    names = [name for name in expected if name.startswith("dequant.")]
    assert names
    for name in names:
        assert torch.equal(state[name.removeprefix("dequant.")], expected[name]), name
    stacks = model.model.layers[0].mlp.experts
    for expert in range(8):
        stem = f"model.layers.0.mlp.experts.{expert}."
        up = torch.cat([decoded[f"{stem}{part}_proj.weight"] for part in ("gate", "up")])
        assert torch.equal(stacks.gate_up_proj[expert], up)
        assert torch.equal(stacks.down_proj[expert], decoded[f"{stem}down_proj.weight"])


def test_fp8_weights_stay_fp8():
    """All that the release quantises, and nothing else: attention, dense MLPs, experts, matrices of the MTP layer."""
    model, stored = load("longcat_fp8"), read_tensors(GOLDENS / "longcat_fp8")
    in_file = {
        name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn and ".experts." not in name
    }
    in_model = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float8_e4m3fn}
    stacks = {f"model.layers.{i}.mlp.experts.{part}" for i in range(2) for part in ("gate_up_proj", "down_proj")}
    assert in_model == in_file | stacks
    name = "model.mtp.layers.0.eh_proj.weight"
    assert name in in_model and torch.equal(model.state_dict()[name].float(), stored[name].float())


def test_fp8_decoded_gives_the_same(tmp_path):
    model, expected = fresh("longcat_fp8"), load_golden("longcat_fp8")[0]
    output = run(model, expected, output_mtp_logits=True)
    assert_golden("logits", real_only(output.logits, expected), expected["logits"], "logits")
    assert_golden("mtp", real_only(output.mtp_logits[0], expected), expected["mtp_logits"], "mtp_logits")
    model.save_pretrained(tmp_path)
    decoded = decode_checkpoint(read_tensors(GOLDENS / "longcat_fp8"))
    assert_same_tensors(read_tensors(tmp_path), {name: tensor.float() for name, tensor in decoded.items()})


@pytest.mark.parametrize("case", ["longcat_flash", "longcat_lite_ngram"])
def test_fp8_on_load_follows_the_releases(case):
    """Quantised on load: what the FP8 releases quantise. Router, embeddings, head and n-gram parts stay."""
    quantization = FineGrainedFP8Config(weight_block_size=(16, 16))
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, quantization_config=quantization, dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        plain = any(part in name for part in ("embed", "norm", "router", "lm_head", "ngram", "scale_inv"))
        assert (tensor.dtype == torch.float8_e4m3fn) != plain, name
        assert tensor.dtype == torch.float32 or "router" not in name
    expected = load_golden(case)[0]
    logits = real_only(run(model, expected).logits.float(), expected)
    assert torch.nn.functional.cosine_similarity(logits.flatten(), expected["logits"].flatten(), dim=0) > 0.9


def test_base_model():
    model, expected = load("longcat_flash").model, load_golden("longcat_flash")[0]
    with torch.no_grad():
        states = model(expected["input_ids"], attention_mask=expected["attention_mask"]).last_hidden_state
    wanted = expected["last_hidden_state"]
    assert_golden("last_hidden_state", real_only(states, expected), wanted, "last_hidden_state")


# --- the traps of meta.json: each mistake is made, and must be as visible as the golden says -------------------------


def effect(case: str, name: str) -> float:
    meta = load_golden(case)[1]
    return {**meta["agreement_max_abs"], **(meta["mtp_agreement_max_abs"] or {})}[name]


def assert_is_the_mistake(actual: float, case: str, name: str) -> None:
    """The model with the mistake is as far off as the golden's author saw: the model without it has it right."""
    assert actual == pytest.approx(effect(case, name), rel=0.02), name


@pytest.mark.parametrize("case", CASES)
def test_trap_zero_expert_weights_are_scaled(case, monkeypatch):
    model, expected = fresh(case), load_golden(case)[0]
    for layer in model.model.layers:
        original, num_real = layer.mlp.forward, model.config.n_routed_experts

        def unscaled(states, weights, indices, original=original, num_real=num_real):
            return original(states, torch.where(indices < num_real, weights, weights / 6.0), indices)

        monkeypatch.setattr(layer.mlp, "forward", unscaled)
    off = error(run(model, expected).logits, expected["logits"], expected)
    assert_is_the_mistake(off, case, "effect_of_not_scaling_zero_expert_weights")


@pytest.mark.parametrize("case", CASES)
def test_trap_latent_norms_have_their_own_epsilon(case):
    model, expected = fresh(case), load_golden(case)[0]
    changed = 0
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            latent = name.endswith(("q_a_layernorm", "kv_a_layernorm"))
            assert module.variance_epsilon == (1e-6 if latent else 1e-5), name
            if latent:
                module.variance_epsilon = 1e-5
                changed += 1
    assert changed >= 4 * model.config.num_layers
    off = error(run(model, expected).logits, expected["logits"], expected)
    assert_is_the_mistake(off, case, "effect_of_latent_norm_eps_1e-5")


@pytest.mark.parametrize("case", CASES)
def test_trap_rotary_pairs_are_interleaved(case):
    model, expected = fresh(case), load_golden(case)[0]
    for module in model.modules():
        if hasattr(module, "rotate"):
            module.rotate = layer_rope.rotate_halves
    off = error(run(model, expected).logits, expected["logits"], expected)
    assert_is_the_mistake(off, case, "effect_of_half_split_rope")


@pytest.mark.parametrize("case", CASES)
def test_trap_folded_scales_are_equal_but_never_saved(case, tmp_path):
    """Folding the factors into the norms gives the same logits; what is saved are the norms as they were."""
    model, expected = fresh(case), load_golden(case)[0]
    model.save_pretrained(tmp_path)
    saved, stored = read_tensors(tmp_path), decode_checkpoint(read_tensors(GOLDENS / case))
    norms = [name for name in stored if "_a_layernorm" in name]
    assert norms and all(torch.equal(saved[name], stored[name].float()) for name in norms)
    base = model.config.hidden_size
    for module in model.modules():
        if hasattr(module, "latent_scale"):
            query_scale, latent_scale = (base / model.config.q_lora_rank) ** 0.5, (base / module.kv_lora_rank) ** 0.5
            assert module.latent_scale == pytest.approx(latent_scale)
            module.scaling /= query_scale
            module.q_a_layernorm.weight.data *= query_scale
            module.latent_scale = None
            module.kv_a_layernorm.weight.data *= latent_scale
    assert_golden("folded", real_only(run(model, expected).logits, expected), expected["logits"], "logits")


@pytest.mark.parametrize("case", MTP_CASES)
def test_trap_mtp_reads_the_state_behind_the_final_norm(case):
    model, expected = load(case), load_golden(case)[0]
    before = {}
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: before.update(states=args[0]))
    run(model, expected)
    handle.remove()
    mask, positions = expected["attention_mask"][:, :-1], expected["position_ids"][:, :-1]
    (_, layer) = model.model.mtp_layers()[0]
    with torch.no_grad():
        embeds = model.mtp_embed(layer, expected["input_ids"][:, 1:])
        states = model.model.mtp_forward(layer, before["states"][:, :-1], embeds, mask, positions)
        logits = model.lm_head(states)
    assert_golden("alt", real_only(logits, expected), expected["alt.mtp_logits_prenorm_feed"], "mtp_logits")
    off = error(logits, expected["mtp_logits"], expected)
    assert_is_the_mistake(off, case, "effect_prenorm_feed")


@pytest.mark.parametrize("case", MTP_CASES)
def test_trap_mtp_has_an_embedding_of_its_own(case):
    model, expected = fresh(case), load_golden(case)[0]
    assert model.model.mtp.embed_tokens is not None
    model.model.mtp.embed_tokens = None
    logits = run(model, expected, output_mtp_logits=True).mtp_logits[0]
    assert_golden("alt", real_only(logits, expected), expected["alt.mtp_logits_main_embedding"], "mtp_logits")
    off = error(logits, expected["mtp_logits"], expected)
    assert_is_the_mistake(off, case, "effect_main_embedding")


@pytest.mark.parametrize("case", MTP_CASES)
def test_trap_mtp_puts_the_embedding_first(case):
    model, expected = fresh(case), load_golden(case)[0]
    weight = model.model.mtp.layers[0].eh_proj.weight
    weight.data = weight.data.roll(weight.shape[1] // 2, dims=1)  # state half and embedding half change places
    logits = run(model, expected, output_mtp_logits=True).mtp_logits[0]
    off = error(logits, expected["mtp_logits"], expected)
    assert_is_the_mistake(off, case, "effect_swapped_concat_order")


@pytest.mark.parametrize("case", CASES)
def test_trap_the_bias_picks_and_never_weighs(case):
    """Many choices change with the bias, and the weights of those chosen are the plain softmax over all columns."""
    model, expected = load(case), load_golden(case)[0]
    meta = load_golden(case)[1]["router"]
    rerouted, zero_slots, seen = 0, 0, []
    handles = [
        layer.mlp.router.register_forward_hook(lambda module, args, output: seen.append((module, output)))
        for layer in model.model.layers
    ]
    run(model, expected)
    for handle in handles:
        handle.remove()
    real = expected["attention_mask"].bool().flatten()
    for router, (logits, weights, indices) in seen:
        scores = logits.softmax(-1)
        assert scores.shape[1] == model.config.n_routed_experts + model.config.zero_expert_num
        assert_close("weights", weights, scores.gather(-1, indices) * 6.0, "float32")
        plain = scores.topk(router.top_k).indices.sort(-1).values
        rerouted += (plain != indices.sort(-1).values).any(-1)[real].sum().item()
        zero_slots += (indices[real] >= model.config.n_routed_experts).sum().item()
    assert rerouted == meta["tokens_whose_choice_is_changed_by_the_bias"]
    assert zero_slots == meta["slots_on_zero_experts"]


@pytest.mark.parametrize("case", CASES)
def test_trap_position_offsets_do_not_matter(case):
    model, expected = load(case), load_golden(case)[0]
    for positions in (None, expected["position_ids"] + 17):
        logits = run(model, expected, position_ids=positions).logits
        assert_golden("logits", real_only(logits, expected), expected["logits"], "logits")


def test_trap_missing_model_type():
    """`longcat_fp8` has no `model_type`, as several published repositories."""
    assert "model_type" not in read_config(GOLDENS / "longcat_fp8")
    assert type(AutoConfig.from_pretrained(GOLDENS / "longcat_fp8")) is LongcatFlashConfig
    assert type(AutoModel.from_pretrained(GOLDENS / "longcat_fp8")).__name__ == "LongcatFlashModel"


def test_trap_native_allocates_rows_for_zero_experts():
    """Here the stacks have a row for each real expert, and the native class cannot read the golden at all."""
    experts = load("longcat_flash").model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape[0] == experts.down_proj.shape[0] == 8
    with pytest.raises((RuntimeError, ValueError)):
        NativeLongcat.from_pretrained(GOLDENS / "longcat_flash")


# --- against the native class, given weights that it can hold ---------------------------------------------------------


def native_twin(model) -> NativeLongcat:
    """The native class with our weights: its experts get rows for the zero experts, which it never reads."""
    fields = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "mla_mode")}
    native = NativeLongcat(NativeLongcat.config_class(**fields, head_dim=model.config.qk_rope_head_dim))
    state = {name: tensor for name, tensor in model.state_dict().items() if ".mtp." not in name}
    zero = model.config.zero_expert_num
    for name in [name for name in state if name.endswith("experts.gate_up_proj")]:
        state[name] = torch.cat((state[name], state[name].new_zeros(zero, *state[name].shape[1:])))
    native.load_state_dict(state)
    return native


def test_loss_and_gradients_are_native():
    model = tiny_model("longcat_flash", num_nextn_predict_layers=0).train()
    native = native_twin(model).train()
    ids, mask = left_padded([random_ids(1, 14)[0], random_ids(1, 9)[0]])
    labels = ids.masked_fill(mask == 0, -100)
    losses = []
    for each in (model, native):
        loss = each(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert_close("loss", losses[0], losses[1], "float32")
    expected = dict(native.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = expected[name].grad[:8] if name.endswith("gate_up_proj") else expected[name].grad
        assert_close(name, parameter.grad, wanted, "float32")


def test_gradient_by_finite_differences():
    """The backward pass through router, zero experts and both scales. Norms round to float32, hence the tolerance."""
    model = tiny_model("longcat_flash", num_layers=1, num_nextn_predict_layers=0).double()
    ids = random_ids(1, 9)
    parameters = dict(model.named_parameters())
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.load().zero.sum() > 0
    for name in (
        "model.layers.0.mlp.router.classifier.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.self_attn.1.kv_a_layernorm.weight",
        "model.layers.0.self_attn.0.q_b_proj.weight",
        "model.layers.0.mlps.0.down_proj.weight",
    ):
        direction = torch.randn_like(parameters[name])
        slope = (parameters[name].grad * direction).sum().item()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[name].add_(sign * 1e-4 * direction)
                losses.append(model(ids, labels=ids).loss.item())
                parameters[name].sub_(sign * 1e-4 * direction)
        assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(slope, rel=1e-2, abs=1e-4), name


@pytest.mark.parametrize("family", ["longcat_flash", "longcat_flash_ngram"])
def test_mtp_loss(family):
    """In training the loss has the MTP layers' share, by hand from the teacher-forced logits."""
    model = tiny_model(family)
    ids, mask = left_padded([random_ids(1, 12)[0], random_ids(1, 7)[0]])
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 5] = -100  # the first token of the row has no real predecessor
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, output_mtp_logits=True).mtp_logits[0]
    rows = [(logits[0, :10], ids[0, 2:]), (logits[1, 5:10], ids[1, 7:])]
    wanted = F.cross_entropy(torch.cat([row for row, _ in rows]), torch.cat([target for _, target in rows]))
    output = model.train()(ids, attention_mask=mask, labels=labels)
    assert_close("mtp", output.mtp_loss[0], wanted, "float32")
    assert_close("loss", output.loss, output.main_loss + 0.3 * output.mtp_loss[0], "float32")


@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_gradient_checkpointing(reentrant):
    model = tiny_model("longcat_flash").train()
    ids, mask = left_padded([random_ids(1, 12)[0], random_ids(1, 7)[0]])
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        load = model.model.expert_load()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        results.append((loss.detach(), grads, load))
    (loss, expected, load), (other_loss, other, other_load) = results
    assert expected.keys() == other.keys()
    assert_close("loss", other_loss, loss, "float32")  # a pass without gradients takes other products on the CPU
    for name, gradient in expected.items():
        assert_close(name, other[name], gradient, "float32")
    for before, after in zip(load, other_load):  # a recomputed pass is not counted twice, padding is not counted
        assert torch.equal(before.real, after.real) and torch.equal(before.zero, after.zero)
        assert before.tokens == 19 and before.real.sum() + before.zero.sum() == 19 * 5


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag, other", [("mla_scale_q_lora", "mla_scale_kv_lora"), ("mla_scale_kv_lora", "mla_scale_q_lora")]
)
def test_scale_flags_are_honoured(flag, other):
    ids = random_ids(1, 7)
    with torch.no_grad():
        both = tiny_model("longcat_flash")(ids).logits
        one = tiny_model("longcat_flash", **{flag: False})
        assert getattr(one.config, other) is True
        assert (one(ids).logits - both).abs().max() > 1e-2
        for attention in one.model.layers[0].self_attn:
            scaled = attention.scaling / attention.qk_head_dim**-0.5
            assert scaled == pytest.approx(1.0 if flag == "mla_scale_q_lora" else (48 / 28) ** 0.5)
            assert (attention.latent_scale is None) == (flag == "mla_scale_kv_lora")


@pytest.mark.parametrize("claimed", [28, 56, 2, None])
def test_num_layers_is_the_only_truth(claimed):
    extra = {} if claimed is None else {"num_hidden_layers": claimed}
    config = LongcatFlashConfig.from_dict({"num_layers": 28, **extra})
    assert config.num_layers == 28 and config.num_hidden_layers == 56
    assert config.to_dict().get("num_hidden_layers") == claimed, "a file's number is written back as it was"


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip_is_verbatim(case, tmp_path):
    stored = read_config(GOLDENS / case)
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case)
    model.save_pretrained(tmp_path)
    saved = read_config(tmp_path)
    assert {key: saved.get(key) for key in stored} == stored
    assert "num_hidden_layers" not in saved and "mla_mode" not in saved and "num_nextn_predict_layers" not in saved
    assert saved["model_type"] == model.config.model_type


@pytest.mark.parametrize(
    "change, message",
    [
        ({"zero_expert_type": "copy"}, "zero_expert_type"),
        ({"moe_topk": 99}, "moe_topk=99"),
        ({"attention_method": "GQA"}, "attention_method"),
        ({"attention_method": "LSA"}, "index_topk"),
        ({"ngram_vocab_size_ratio": 3}, "longcat_flash_ngram"),
        ({"linear_method": "KDA"}, "linear_method"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        LongcatFlashConfig.from_dict({**read_config(GOLDENS / "longcat_flash"), **change})


@pytest.mark.parametrize("kind, zero", [("identity", 4), ("drop", 4), ("identity", 0), ("identity", None)])
def test_kinds_of_zero_experts(kind, zero):
    """Against a loop over tokens and choices."""
    model = tiny_model("longcat_flash", zero_expert_type=kind, zero_expert_num=zero)
    mlp = model.model.layers[0].mlp
    states = torch.randn(2, 5, 48)
    with torch.no_grad():
        output = mlp(states)
        weights, indices = mlp.route(states)
        for token, state in enumerate(states.flatten(0, 1)):
            wanted = torch.zeros(48)
            for weight, index in zip(weights[token], indices[token].tolist()):
                if index < 8:
                    gate, up = (mlp.experts.gate_up_proj[index] @ state).chunk(2)
                    wanted += weight * (mlp.experts.down_proj[index] @ (F.silu(gate) * up))
                elif kind == "identity":
                    wanted += weight * state
            assert_close("token", output.flatten(0, 1)[token], wanted, "float32")


def test_router_bias_and_normalised_weights():
    model = tiny_model("longcat_flash", router_bias=True, norm_topk_prob=True)
    router = model.model.layers[0].mlp.router
    states = torch.randn(7, 48)
    with torch.no_grad():
        logits, weights, _ = router(states)
    assert_close("logits", logits, states @ router.classifier.weight.T + router.classifier.bias, "float32")
    assert_close("sums", weights.sum(-1), torch.full((7,), 3.0), "float32")


# --- router precision, statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["to", "bfloat16", "half", "from_pretrained", "from_config"])
def test_router_stays_float32(change):
    narrow = torch.float16 if change == "half" else torch.bfloat16
    if change == "from_pretrained":
        model = AutoModelForCausalLM.from_pretrained(GOLDENS / "longcat_flash", dtype=narrow)
    elif change == "from_config":
        model = AutoModelForCausalLM.from_config(tiny_config("longcat_flash"), dtype=narrow)
    else:
        model = tiny_model("longcat_flash")
        before = {name: value.clone() for name, value in model.state_dict().items() if ".router." in name}
        model = {"to": lambda: model.to(narrow), "bfloat16": model.bfloat16, "half": model.half}[change]()
        for name, value in before.items():
            assert torch.equal(model.state_dict()[name], value), name
    for name, value in model.state_dict().items():
        assert value.dtype == (torch.float32 if ".router." in name else narrow), name


def test_quantisers_leave_the_router_alone():
    """What rounds every `nn.Linear`, as quantisers do, does not find the classifier."""
    model = tiny_model("longcat_flash")
    ids, seen = random_ids(1, 5), []
    router = model.model.layers[0].mlp.router
    before = {name: value.clone() for name, value in router.state_dict().items()}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.abs().amax() / 7
            module.weight.data = (module.weight / scale).round() * scale
            seen.append(module)
    assert len(seen) > 20
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_expert_load_counts_real_and_zero_experts():
    model = load("longcat_flash")
    expected, meta = load_golden("longcat_flash")
    run(model, expected)
    load_by_layer = model.model.expert_load()
    real = expected["attention_mask"].bool()
    for layer, counted in enumerate(load_by_layer):
        ids = expected["topk_indices"][layer][real].long().flatten()
        counts = torch.bincount(ids, minlength=12)
        assert torch.equal(counted.real, counts[:8]) and torch.equal(counted.zero, counts[8:])
        assert counted.tokens == real.sum()
        per_token = (expected["topk_indices"][layer] < 8).sum(-1) * real
        router = model.model.layers[layer].mlp.router
        assert torch.equal(router.real_experts_per_token.view_as(per_token), per_token)
        assert counted.real_experts_per_token == pytest.approx(per_token.sum().item() / real.sum().item())
    assert sum(counted.zero.sum().item() for counted in load_by_layer) == meta["router"]["slots_on_zero_experts"]


def test_expert_load_needs_a_forward_pass():
    with pytest.raises(ValueError, match="forward pass"):
        tiny_model("longcat_flash").model.expert_load()


def test_zero_experts_gather_no_rows(monkeypatch):
    """Every row that reaches a product belongs to a real expert."""
    from hf_moe.models import op_moe

    rows = []
    original = op_moe.linear
    monkeypatch.setattr(op_moe, "linear", lambda x, *args: rows.append(x.shape[0]) or original(x, *args))
    monkeypatch.setattr(op_moe, "_WHOLE_STACK_ELEMENTS", 0)  # stacks as tiny as this one are multiplied whole
    mlp = tiny_model("longcat_flash").model.layers[0].mlp
    with torch.no_grad():
        mlp(torch.randn(1, 30, 48))
    assert sum(rows) == 2 * mlp.load().real.sum() < 2 * 30 * 5


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_experts_backends_agree(backend):
    model = tiny_model("longcat_flash")
    ids = random_ids(2, 9)
    with torch.no_grad():
        expected = model(ids).logits
        model.set_experts_implementation(backend)
        assert_close(backend, model(ids).logits, expected, "float32")


# --- loading and saving -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_shard_size", ["50GB", "60KB"])
def test_round_trip_is_bitwise(case, max_shard_size, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype="auto")
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert_same_tensors(read_tensors(tmp_path), read_tensors(GOLDENS / case))
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = load_golden(case)[0]
    assert_golden("logits", real_only(run(again, expected).logits, expected), expected["logits"], "logits")


@pytest.mark.parametrize("case", CASES)
def test_device_map_with_layers_on_disk(case, tmp_path):
    """A map by layers, as `device_map="auto"` makes it, which knows nothing of the MTP layers yet."""
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    if case == "longcat_lite_ngram":
        device_map["model.ngram_embeddings"] = "cpu"
    if load(case).config.num_layers == 2:
        del device_map["model.layers.2"]
    model = AutoModelForCausalLM.from_pretrained(
        GOLDENS / case, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path / "offload", dequantize=True
    ).eval()
    expected = load_golden(case)[0]
    output = run(model, expected, output_mtp_logits=True)
    assert_golden("logits", real_only(output.logits, expected), expected["logits"], "logits")
    if case in MTP_CASES:
        assert_golden("mtp", real_only(output.mtp_logits[0], expected), expected["mtp_logits"], "mtp_logits")
    model.save_pretrained(tmp_path / "saved")
    stored = decode_checkpoint(read_tensors(GOLDENS / case))
    assert_same_tensors(read_tensors(tmp_path / "saved"), {name: tensor.float() for name, tensor in stored.items()})


def test_an_equal_mtp_embedding_is_held_once_and_written_back(tmp_path):
    def equal_tables(tensors):
        tensors["model.mtp.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()

    folder = edited_golden(tmp_path / "equal", "longcat_flash", equal_tables)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.model.mtp.embed_tokens is None
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(read_tensors(tmp_path / "saved"), read_tensors(folder))


def test_a_checkpoint_without_mtp(tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if ".mtp." in name]:
            del tensors[name]

    folder = edited_golden(tmp_path, "longcat_flash", drop, num_nextn_predict_layers=1)
    model, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_golden("longcat_flash")[0]
    assert model.model.mtp is None and model.config.num_nextn_predict_layers == 0
    assert_golden("logits", real_only(run(model, expected).logits, expected), expected["logits"], "logits")
    with pytest.raises(ValueError, match="has none"):
        run(model, expected, output_mtp_logits=True)


@pytest.mark.parametrize(
    "name",
    [
        "model.mtp.layers.0.transformer_layer.mlp.up_proj.weight",
        "model.mtp.norm.weight",
        "model.layers.1.mlp.experts.7.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(name, tmp_path):
    folder = edited_golden(tmp_path, "longcat_flash", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(folder)


def test_experts_for_zero_experts_are_refused(tmp_path):
    def add(tensors):
        for part in ("gate", "up", "down"):
            name = "model.layers.0.mlp.experts.{}." + part + "_proj.weight"
            tensors[name.format(8)] = tensors[name.format(0)].clone()

    folder = edited_golden(tmp_path, "longcat_flash", add)
    with pytest.raises(CheckpointError, match="n_routed_experts=8"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_bfloat16_router_in_the_file_is_widened(tmp_path):
    def narrow(tensors):
        for name in [name for name in tensors if ".router." in name]:
            tensors[name] = tensors[name].bfloat16()

    model = AutoModelForCausalLM.from_pretrained(edited_golden(tmp_path, "longcat_flash", narrow), dtype=torch.bfloat16)
    assert {value.dtype for name, value in model.state_dict().items() if ".router." in name} == {torch.float32}


def test_auto_classes_know_files_without_a_model_type(tmp_path):
    for case, architecture in (
        ("longcat_flash", "LongcatFlashForCausalLM"),
        ("longcat_flash", "LongcatFlashOmniForCausalLM"),
        ("longcat_lite_ngram", "LongcatFlashNgramForCausalLM"),
    ):
        config = {**read_config(GOLDENS / case), "architectures": [architecture]}
        model_type = config.pop("model_type")
        folder = write_checkpoint(tmp_path / architecture, config, read_tensors(GOLDENS / case))
        assert AutoConfig.from_pretrained(folder).model_type == model_type
        model, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_golden(case)[0]
        assert_golden("logits", real_only(run(model, expected).logits, expected), expected["logits"], "logits")


def test_an_unknown_architecture_without_a_model_type_stays_unknown(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SomethingElse"]}))
    with pytest.raises(ValueError, match="model_type"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_language_part_of_a_multimodal_checkpoint(prefix, tmp_path):
    """A wrapper's configuration with the text model inside, encoders beside it, and perhaps a prefix on its tensors."""
    text = read_config(GOLDENS / "longcat_flash")
    config = {"architectures": ["LongcatFlashOmniForCausalLM"], "text_config": text, "audio_config": {"width": 3}}
    tensors = {f"{prefix}{name}": tensor for name, tensor in read_tensors(GOLDENS / "longcat_flash").items()}
    tensors["audio_encoder.proj.weight"] = torch.ones(3, 3)
    folder = write_checkpoint(tmp_path, config, tensors)
    model, expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), load_golden("longcat_flash")[0]
    assert_golden("logits", real_only(run(model, expected).logits, expected), expected["logits"], "logits")
    logits = run(model, expected, output_mtp_logits=True).mtp_logits[0]
    assert_golden("mtp", real_only(logits, expected), expected["mtp_logits"], "mtp_logits")


@pytest.mark.parametrize("case", CASES)
def test_remote_code_in_a_process_without_hf_moe(case, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / case, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved")
    expected = load_golden(case)[0]
    code = """
import sys, torch
sys.modules["hf_moe"] = None
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32).eval()
expected = load_file(sys.argv[2])
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
ids, mask = expected["input_ids"], expected["attention_mask"]
with torch.no_grad():
    logits = model(ids, attention_mask=mask).logits
model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 3
generated = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
print((logits - expected["logits"])[mask.bool()].abs().max().item(), generated[:, ids.shape[1]:].tolist())
"""
    expected_file = GOLDENS / case / "expected.safetensors"
    printed = run_python(code, str(tmp_path / "saved"), str(expected_file), HF_HOME=str(tmp_path / "home"))
    off, _, generated = printed.splitlines()[-1].partition(" ")
    assert float(off) < 1e-4
    assert json.loads(generated) == expected["generated_ids"][:, :8].tolist()
