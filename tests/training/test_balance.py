"""Router balance: losses against loops over tokens, biases against the rule, and what must not count."""

import math

import pytest
import torch
import torch.distributed as dist
from testing import assert_close
from tiny import left_padded, random_ids, tiny_model
from tiny_step3 import text_model, vl_model

from hf_moe.training import balance_losses as losses
from hf_moe.training.balance import BalanceOptions, RouterBalance, find_routers
from hf_moe.training.partition import reduction_device

TOKENS, EXPERTS, TOP_K, DEVICES = 21, 8, 3, 4


def _case(scoring: str, experts: int = EXPERTS):
    logits = torch.randn(TOKENS, experts, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0] * 9 + [1] * 1 + [2] * 11)
    real = torch.rand(TOKENS) > 0.2
    chosen = torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(TOKENS)])
    return logits, losses.probabilities(logits, scoring), chosen, losses.Sequences(ids, real, 4)  # the last is empty


def _tokens(sequences, index):
    return [t for t in range(TOKENS) if sequences.real[t] and sequences.ids[t] == index]


def _loop(kind: str, logits, probability, chosen, sequences, experts: int = EXPERTS) -> torch.Tensor:
    """The formulas of the reports, token by token."""
    values = []
    for index in range(sequences.count):
        tokens = _tokens(sequences, index)
        if not tokens:
            values.append(logits.new_zeros(()))
            continue
        mean = [sum(probability[t, i] for t in tokens) / len(tokens) for i in range(experts)]
        picks = {t: set(chosen[t].tolist()) for t in tokens}
        if kind == "sequence":
            picks = {t: set(logits[t].argsort(descending=True)[:TOP_K].tolist()) for t in tokens}
        f = [experts / (TOP_K * len(tokens)) * sum(i in picks[t] for t in tokens) for i in range(experts)]
        size = experts // DEVICES
        devices = [range(d * size, (d + 1) * size) for d in range(DEVICES)]
        if kind in ("expert", "sequence"):
            value = sum(f[i] * mean[i] for i in range(experts))
        elif kind == "device":
            value = sum(sum(f[i] for i in group) / size * sum(mean[i] for i in group) for group in devices)
        else:
            value = 0
            for group in devices:
                sent = sum(any(i in picks[t] for i in group) for t in tokens)
                value = value + DEVICES / (2 * len(tokens)) * sent * sum(mean[i] for i in group)
        values.append(value)
    return torch.stack(values)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["expert", "sequence", "device", "communication"])
def test_losses_against_loops(kind, scoring):
    logits, probability, chosen, sequences = _case(scoring)
    if kind == "communication":
        actual = losses.communication_loss(probability, chosen, sequences, DEVICES, 2)
    elif kind == "device":
        actual = losses.device_loss(probability, chosen, sequences, DEVICES)
    else:
        choices = losses.plain_choices(logits, TOP_K) if kind == "sequence" else chosen
        actual = losses.expert_loss(probability, choices, sequences)
    expected = _loop(kind, logits, probability, chosen, sequences)
    assert_close("loss", actual, expected, "float64")
    weights = torch.randn(4, dtype=torch.float64)
    grads = [torch.autograd.grad((value * weights).sum(), logits, retain_graph=True)[0] for value in (actual, expected)]
    assert_close("gradient", *grads, "float64")


def test_zero_expert_loss_against_loop():
    real, zero, per_token = 8, 4, 2.0
    logits, probability, chosen, sequences = _case("softmax", real + zero)
    actual = losses.zero_expert_device_loss(probability, chosen, sequences, DEVICES, real, per_token)
    values = []
    for index in range(sequences.count):
        tokens, value = _tokens(sequences, index), logits.new_zeros(())
        for group in [range(d * 2, d * 2 + 2) for d in range(DEVICES)] if tokens else []:
            picks = sum((chosen[t] == i).sum().item() for t in tokens for i in group)
            mean = sum(probability[t, i] for t in tokens for i in group) / len(tokens)
            value = value + DEVICES / (per_token * len(tokens)) * picks * mean
        if tokens:
            picks = sum((chosen[t] >= real).sum().item() for t in tokens)
            mean = sum(probability[t, real:].sum() for t in tokens) / len(tokens)
            value = value + picks * mean / ((TOP_K - per_token) * len(tokens))
        values.append(value)
    assert_close("loss", actual, torch.stack(values), "float64")


def test_even_load_costs_one():
    probability = torch.full((EXPERTS, EXPERTS), 1 / EXPERTS)
    chosen = torch.arange(EXPERTS).unsqueeze(1)
    sequences = losses.Sequences(torch.zeros(EXPERTS, dtype=torch.long), torch.ones(EXPERTS, dtype=torch.bool), 1)
    assert losses.expert_loss(probability, chosen, sequences).item() == pytest.approx(1)
    assert losses.device_loss(probability, chosen, sequences, 2).item() == pytest.approx(1)


# --- in a model -------------------------------------------------------------------------------------------------------

OFF = BalanceOptions()


def _families():
    return {
        "deepseek_v3": lambda: tiny_model("deepseek_v3"),
        "deepseek_v2": lambda: tiny_model("deepseek_v2"),
        "kimi_k2": lambda: tiny_model("kimi_k2"),
        "longcat_flash": lambda: tiny_model("longcat_flash"),
        "step3": text_model,
    }


def _recorded(model) -> dict[str, torch.Tensor]:
    """Choices of each router in its last forward pass, read beside the code under test."""
    return {name: router._last_topk_indices for name, router in find_routers(model).items()}


@pytest.mark.parametrize("family", _families())
def test_counts_of_every_family(family):
    model = _families()[family]().train()
    balance = RouterBalance(model, OFF)
    ids = random_ids(2, 13)
    expected = {name: torch.zeros(r.num_experts, dtype=torch.long) for name, r in balance.routers.items()}
    for _ in range(2):  # two micro-batches
        model(input_ids=ids, labels=ids).loss.backward()
        for name, chosen in _recorded(model).items():
            expected[name] += torch.bincount(chosen.flatten(), minlength=len(expected[name]))
    balance.step()
    load = balance.load()
    assert load.num_tokens == 2 * ids.numel()
    for layer, (name, counts) in zip(load.layers, expected.items()):
        assert torch.equal(layer.counts, counts), name
        assert counts.sum() > 0, name  # MTP routers too


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant):
    ids, counts = random_ids(2, 13), []
    for checkpointing in (False, True):
        model = tiny_model("deepseek_v3").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        balance = RouterBalance(model, OFF)
        if reentrant:
            model.enable_input_require_grads()
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        balance.step()
        counts.append(torch.stack([layer.counts for layer in balance.load().layers]))
    assert torch.equal(*counts)


def test_padding_evaluation_and_passes_without_gradient_do_not_count():
    rows = [random_ids(1, length)[0] for length in (11, 5)]
    ids, mask = left_padded(rows)
    model = tiny_model("deepseek_v3").train()
    balance = RouterBalance(model, OFF)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids.masked_fill(mask == 0, -100))
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    model.eval()
    model(input_ids=ids, labels=ids)
    balance.step()
    totals = [int(layer.counts.sum()) for layer in balance.load().layers]
    assert totals == [16 * 3, 16 * 3, (10 + 4) * 3]  # of the MTP layer, positions whose next token is there


def test_packed_sequences_count_in_the_mtp_layer_where_they_go_on():
    model = tiny_model("deepseek_v3").train()
    balance = RouterBalance(model, OFF)
    ids, positions = random_ids(1, 12), torch.cat((torch.arange(7), torch.arange(5))).unsqueeze(0)
    model(input_ids=ids, position_ids=positions, labels=ids)
    balance.step()
    assert [int(layer.counts.sum()) for layer in balance.load().layers] == [36, 36, (6 + 4) * 3]


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2"])
def test_sign_rule(family):
    model = tiny_model(family).train()
    balance = RouterBalance(model, BalanceOptions(bias_update_rate=0.01))
    before = {name: router.e_score_correction_bias.clone() for name, router in balance.routers.items()}
    ids = random_ids(2, 13)
    model(input_ids=ids, labels=ids)
    counts = {name: torch.bincount(chosen.flatten(), minlength=8).double() for name, chosen in _recorded(model).items()}
    balance.step()
    for name, router in balance.routers.items():
        expected = before[name].double() + 0.01 * torch.sign(counts[name].mean() - counts[name])
        assert_close(name, router.e_score_correction_bias.double(), expected, "float32")
        assert not torch.equal(router.e_score_correction_bias, before[name])
    frozen = {name: router.e_score_correction_bias.clone() for name, router in balance.routers.items()}
    balance.bias_update_rate = 0
    model(input_ids=ids, labels=ids)
    balance.step()
    balance.step()  # a step without a batch
    assert all(torch.equal(r.e_score_correction_bias, frozen[name]) for name, r in balance.routers.items())


def test_longcat_rule():
    model = tiny_model("longcat_flash").train()
    balance = RouterBalance(model, BalanceOptions(bias_update_rate=0.5, real_experts_per_token=3))
    before = {name: router.e_score_correction_bias.clone() for name, router in balance.routers.items()}
    ids = random_ids(2, 13)
    model(input_ids=ids, labels=ids)
    counts = {name: torch.bincount(chosen.flatten(), minlength=12) for name, chosen in _recorded(model).items()}
    balance.step()
    for name, router in balance.routers.items():
        expected = before[name].clone()
        for expert in range(8):
            expected[expert] += 0.5 * (3 / (5 * 8) - counts[name][expert].item() / (5 * ids.numel()))
        assert_close(name, router.e_score_correction_bias, expected, "float32")
        assert torch.equal(router.e_score_correction_bias[8:], before[name][8:])
    assert "router_real_experts_per_token" in balance.metrics()


LOSSES = {
    "deepseek_v3": BalanceOptions(sequence_loss=0.1),
    "deepseek_v2": BalanceOptions(expert_loss=0.1, device_loss=0.2, communication_loss=0.3),
    "longcat_flash": BalanceOptions(device_loss=0.1, num_devices=2),
    "step3": BalanceOptions(expert_loss=0.1),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", LOSSES)
def test_loss_joins_the_training_loss_and_reaches_the_router(family, checkpointing):
    model = _families()[family]().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = random_ids(2, 13)
    plain = model(input_ids=ids, labels=ids).loss
    plain.backward()
    without = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    balance = RouterBalance(model, LOSSES[family])
    output = model(input_ids=ids, labels=ids)
    assert output.aux_loss > 0
    assert output.loss.item() == pytest.approx((plain + output.aux_loss).item(), rel=1e-6)
    output.loss.backward()
    for name in balance.routers:
        suffix = ".classifier.weight" if family == "longcat_flash" else ".weight"
        assert (model.get_parameter(name + suffix).grad - without[name + suffix]).abs().max() > 1e-6, name
    balance.detach()
    model.zero_grad()
    assert model(input_ids=ids, labels=ids).aux_loss is None
    assert not any(module._forward_hooks for module in find_routers(model).values())
    assert not model.model._forward_pre_hooks
    assert model.eval()(input_ids=ids, labels=ids).aux_loss is None


def test_vision_model():
    model = vl_model().train()
    balance = RouterBalance(model, LOSSES["step3"])
    ids = random_ids(2, 13, high=60)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    balance.step()
    assert output.aux_loss > 0 and balance.load().num_tokens == ids.numel()


def test_under_an_adapter():
    peft = pytest.importorskip("peft")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_parameters=targets)).train()
    balance = RouterBalance(model, LOSSES["deepseek_v3"])
    ids = random_ids(2, 13)
    output = model(input_ids=ids, labels=ids)
    expected = tiny_model().train()
    RouterBalance(expected, LOSSES["deepseek_v3"])
    assert_close("aux_loss", output.aux_loss, expected(input_ids=ids, labels=ids).aux_loss, "float32")
    output.aux_loss.backward()  # the first experts move what the second router sees
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    balance.step()
    assert balance.load().num_tokens == ids.numel()


def test_resumed_counts():
    model = tiny_model().train()
    balance = RouterBalance(model, LOSSES["deepseek_v3"])
    ids = random_ids(2, 13)
    model(input_ids=ids, labels=ids)
    balance.step()
    state, metrics = balance.state_dict(), balance.metrics(reset=False)
    balance.detach()
    again = RouterBalance(model, LOSSES["deepseek_v3"])
    again.load_state_dict(state)
    for before, after in zip(balance.load().layers, again.load().layers):
        assert torch.equal(before.counts, after.counts)
    assert again.metrics() == metrics


def test_a_resumed_run_may_name_another_rate():
    """One that was changed while training stays changed; one that the options name anew counts."""
    balance = RouterBalance(tiny_model(), BalanceOptions(bias_update_rate=0.1))
    balance.bias_update_rate = 0.025  # as a schedule would
    state = balance.state_dict()
    for named, expected in ((0.1, 0.025), (0.5, 0.5), (0.0, 0.0)):
        again = RouterBalance(tiny_model(), BalanceOptions(bias_update_rate=named))
        again.load_state_dict(state)
        assert again.bias_update_rate == expected
    del state["first_bias_update_rate"]  # of a checkpoint from before
    again.load_state_dict(state)
    assert again.bias_update_rate == 0.025


def test_loss_by_hand():
    """The whole path on one V3 model: the loss of every layer from Transformers' own record of router logits."""
    model = tiny_model("deepseek_v3", num_nextn_predict_layers=0).train()
    RouterBalance(model, BalanceOptions(sequence_loss=0.1))
    ids = random_ids(2, 13)
    output = model(input_ids=ids, labels=ids, output_router_logits=True)
    expected = 0.0
    for logits in output.router_logits:
        for row in logits.unflatten(0, (2, 13)):
            scores = row.double().sigmoid()
            picks = torch.zeros_like(scores).scatter(1, scores.topk(3).indices, 1.0)
            share = picks.sum(0) * 8 / (3 * 13)
            expected = expected + 0.1 * (share * (scores / scores.sum(1, keepdim=True)).mean(0)).sum() / 2
    assert output.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_add_up_to_the_whole_batch(packed):
    ids, labels = random_ids(4, 12), random_ids(4, 12)
    labels[0, :6] = labels[3, 2:] = -100
    kwargs = {}
    if packed:
        kwargs["position_ids"] = torch.cat((torch.arange(7), torch.arange(5))).expand(4, -1)
    model = tiny_model("deepseek_v3").train()
    RouterBalance(model, BalanceOptions(sequence_loss=1.0))
    shifted = labels[:, 1:].clone()
    if packed:
        shifted[:, 6] = -100
    num_items = (shifted != -100).sum()
    whole = model(input_ids=ids, labels=labels, num_items_in_batch=num_items, **kwargs)
    whole.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: value[rows] for name, value in kwargs.items()}
        output = model(input_ids=ids[rows], labels=labels[rows], num_items_in_batch=num_items, **part)
        output.loss.backward()
        total += output.aux_loss.item()
    assert total == pytest.approx(whole.aux_loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(name, parameter.grad, gradients[name], "float32")
    alone = model(input_ids=ids, labels=labels, **kwargs).aux_loss.item()
    assert alone == pytest.approx(whole.aux_loss.item(), rel=1e-5)


def test_wrong_options():
    model = tiny_model("deepseek_v2").train()
    with pytest.raises(ValueError, match="num_devices=3"):
        RouterBalance(model, BalanceOptions(device_loss=0.1, num_devices=3))
    with pytest.raises(ValueError, match="bias_update_rate=-1"):
        BalanceOptions(bias_update_rate=-1)
    with pytest.raises(ValueError, match="real_experts_per_token=9"):
        RouterBalance(tiny_model("longcat_flash"), BalanceOptions(real_experts_per_token=9))
    with pytest.raises(ValueError, match="no routers"):
        RouterBalance(torch.nn.Linear(2, 2))
    RouterBalance(model, BalanceOptions(expert_loss=0.1))
    with pytest.raises(ValueError, match="already"):
        RouterBalance(model, BalanceOptions(expert_loss=0.1))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(input_ids=random_ids(1, 5), labels=random_ids(1, 5), use_cache=False)


def test_published_values():
    v2 = BalanceOptions.for_model(tiny_model("deepseek_v2"))
    assert (v2.bias_update_rate, v2.expert_loss, v2.device_loss, v2.communication_loss) == (0, 3e-3, 0.05, 0.02)
    v3 = BalanceOptions.for_model(tiny_model("deepseek_v3"))
    assert (v3.bias_update_rate, v3.sequence_loss) == (1e-3, 1e-4)
    assert BalanceOptions.for_model(text_model()) == BalanceOptions()


def test_metrics_and_heat_map(tmp_path):
    from PIL import Image

    model = tiny_model("deepseek_v3").train()
    balance = RouterBalance(model, BalanceOptions(sequence_loss=0.1))
    assert balance.metrics() == {}
    with pytest.raises(ValueError, match="train a step"):
        balance.save_heat_map(tmp_path / "load.png")
    ids = random_ids(2, 13)
    output = model(input_ids=ids, labels=ids)
    balance.step()
    layers = balance.load().layers
    metrics = balance.metrics()
    ratios = [(layer.counts.max() * 8 / layer.counts.sum()).item() for layer in layers]
    assert metrics["router_max_over_mean"] == pytest.approx(sum(ratios) / 3)
    assert metrics["router_max_over_mean_worst"] == pytest.approx(max(ratios))
    assert metrics["router_dead_experts"] == sum(int((layer.counts == 0).sum()) for layer in layers) / 24
    entropies = []
    for layer in layers:
        share = [count / layer.counts.sum().item() for count in layer.counts.tolist() if count]
        entropies.append(-sum(p * math.log(p) for p in share) / math.log(8))
    assert metrics["router_entropy"] == pytest.approx(sum(entropies) / 3)
    assert metrics["router_balance_loss"] == pytest.approx(output.aux_loss.item())
    assert balance.metrics() == {}  # nothing since
    with Image.open(balance.save_heat_map(tmp_path / "plots" / "load.png")) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200


def _collapsed(update: bool, steps: int = 200) -> list[float]:
    """Largest maximum over mean load of any layer, by step, of a model whose routers all prefer the same experts."""
    options = {"num_hidden_layers": 2, "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
    model = tiny_model("deepseek_v3", **options).train()
    with torch.no_grad():
        for router in find_routers(model).values():
            router.e_score_correction_bias.copy_(torch.linspace(0.5, 0, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    balance = RouterBalance(model, BalanceOptions(bias_update_rate=0.005 if update else 0))
    history = []
    for step in range(steps):
        ids = random_ids(4, 64, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        history.append(balance.metrics()["router_max_over_mean_worst"])
    return history


def test_update_ends_a_collapse():
    updated, frozen = _collapsed(True), _collapsed(False, 40)
    assert updated[0] > 2 and max(updated[-10:]) < 1.5 and sum(updated[-10:]) / 10 < 1.4
    assert min(frozen) > 1.5 and sum(frozen[-10:]) / 10 > 1.8


def test_a_resumed_run_counts_where_the_routers_are():
    """Parameters may be elsewhere: offloaded by FSDP2, or on another device of a map."""
    model = tiny_model()
    routers = find_routers(model).values()
    for router in routers:
        router.e_score_correction_bias = router.e_score_correction_bias.to("meta")
    balance = RouterBalance(model, BalanceOptions())
    counts = torch.ones(len(routers), next(iter(routers)).num_experts, dtype=torch.int64)
    state = {"window": counts, "total": counts, "loss_sum": torch.zeros(()), "loss_steps": 1, "bias_update_rate": 0.0}
    balance.load_state_dict(state)
    balance.step()
    assert balance._window.is_meta and balance._total.is_meta


def test_what_lies_on_the_cpu_is_summed_where_the_backend_can(monkeypatch):
    cpu, backends = torch.device("cpu"), ["cpu:gloo,cuda:nccl"]
    assert reduction_device(cpu) == cpu  # one process
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends[-1])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert reduction_device(cpu) == cpu
    backends.append("cuda:nccl")
    assert reduction_device(cpu) == torch.device("cuda", 3)
    assert reduction_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
