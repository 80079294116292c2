"""The traps of the LongCat goldens' `meta.json`: each mistake is made, and must be as visible as the golden says."""

import pytest
import torch
from checkpoints import decode_checkpoint, read_config, read_tensors
from longcat_goldens import CASES, MTP_CASES, error, fresh, load, real_only, run
from testing import GOLDENS, assert_close, assert_golden, load_golden
from transformers import AutoConfig, AutoModel
from transformers.models.longcat_flash import LongcatFlashForCausalLM as NativeLongcat

from hf_moe.models import layer_rope
from hf_moe.models.configuration_longcat_flash import LongcatFlashConfig
from hf_moe.models.layer_dense import RMSNorm


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
