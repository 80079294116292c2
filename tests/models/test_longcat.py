"""LongCat-Flash against its goldens, its native class, and what the upstream files leave open."""

import pytest
import torch
from checkpoints import assert_same_tensors, decode_checkpoint, read_tensors
from longcat_goldens import CASES, MODES, MTP_CASES, fresh, load, real_only, run
from testing import GOLDENS, assert_close, assert_golden, load_golden
from tiny import left_padded, random_ids, tiny_config, tiny_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, FineGrainedFP8Config, GenerationConfig, StaticCache
from transformers.models.longcat_flash import LongcatFlashForCausalLM as NativeLongcat

from hf_moe.models.generation_drafts import Drafting


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

    def foresee(drafting, layer, state, index, last):
        rows, drafts = drafting.rows, []
        for row, length in zip(rows.originals, rows.lengths):
            place = length + index
            wrong = place % (row + 2) == 0
            drafts.append([3 if wrong else expected[row, min(place, expected.shape[1] - 1)].item()])
        drafting.drafts.append(torch.tensor(drafts))
        places = torch.tensor(rows.lengths).unsqueeze(1) + index
        rows.tokens.scatter_(1, places, drafting.drafts[-1])

    monkeypatch.setattr(Drafting, "_draft_token", foresee)
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
