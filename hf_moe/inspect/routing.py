"""Which experts real text meets: a model is run over it, and every router's choices are kept and counted.

In a notebook:

    from hf_moe.inspect.routing import load_model, record_routing, statistics
    from hf_moe.inspect.route_charts import plot_load
    model, tokenizer = load_model("path/to/model")
    routing = record_routing(model, tokenizer(text).input_ids)
    statistics(routing, groups=8)["layers"][0]["entropy"], plot_load(routing)
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from ..demo import DEMO_MODEL

AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM")


@dataclass(frozen=True)
class LayerRouting:
    """Choices of one layer: `experts` and `weights`, (tokens, choices). Ids from `num_experts` on are zero experts."""

    layer: int
    num_experts: int
    num_zero_experts: int
    experts: torch.Tensor
    weights: torch.Tensor

    def tokens_per_expert(self) -> torch.Tensor:
        """(num_experts + num_zero_experts,) int64."""
        return torch.bincount(self.experts.flatten(), minlength=self.num_experts + self.num_zero_experts)

    def real_experts_per_token(self) -> torch.Tensor:
        """(tokens,) how many of a token's choices are experts with weights."""
        return (self.experts < self.num_experts).sum(1)

    def coactivation(self) -> torch.Tensor:
        """(num_experts, num_experts) float64: tokens that chose both; on the diagonal, tokens that chose the expert."""
        chosen = torch.zeros(self.experts.shape[0], self.num_experts + self.num_zero_experts, dtype=torch.float64)
        chosen.scatter_(1, self.experts, 1.0)
        chosen = chosen[:, : self.num_experts]
        return chosen.T @ chosen


@dataclass(frozen=True)
class Routing:
    """Choices of all layers with experts over the same tokens."""

    model: str
    num_tokens: int
    layers: list[LayerRouting]


def load_model(model: str, dtype: str = "auto", device_map: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a folder or a Hub id; `"demo"` is the model that comes with the package.

    Raises:
        FileNotFoundError: where there is no such folder or repository.
    """
    path = DEMO_MODEL if model == "demo" else model
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise FileNotFoundError(f"{model}: no configuration can be read: {error}") from error
    known = getattr(type(config), "remote_code_map", {})
    auto_class = next((name for name in AUTO_CLASSES if name in known), "AutoModelForCausalLM")
    arguments = {} if device_map is None else {"device_map": device_map}
    loaded = getattr(transformers, auto_class).from_pretrained(path, dtype=dtype, **arguments)
    return loaded.eval(), AutoTokenizer.from_pretrained(path)


def find_routers(model: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, int]]:
    """Routers by module name, each with its number of experts that have weights."""
    routers = {}
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        count = getattr(experts, "num_experts", None)
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        if isinstance(count, int) and isinstance(router, torch.nn.Module):
            routers[name] = (router, count)
    return routers


@torch.no_grad()
def record_routing(model: PreTrainedModel, input_ids, window: int = 1024, name: str = "") -> Routing:
    """Runs `input_ids`, a list or (tokens,) tensor, in windows that know nothing of each other; keeps every choice.

    Raises:
        ValueError: for a model without routers of this package, and for no tokens.
    """
    ids = torch.as_tensor(input_ids, dtype=torch.long).flatten()
    routers = find_routers(model)
    if not routers:
        raise ValueError(f"{type(model).__name__} has no routers that can be read: only models of hf_moe can.")
    if not ids.numel():
        raise ValueError("There is no text: no tokens to route.")
    kept: dict[str, list[tuple[torch.Tensor, torch.Tensor, int]]] = {name: [] for name in routers}

    def keep(module_name: str):
        def hook(module, args, output):
            logits, weights, experts = output
            kept[module_name].append((experts.cpu(), weights.float().cpu(), logits.shape[-1]))

        return hook

    handles = [router.register_forward_hook(keep(name)) for name, (router, _) in routers.items()]
    was_training = model.training
    try:
        model.eval()
        for start in range(0, ids.numel(), window):
            piece = ids[start : start + window].unsqueeze(0).to(model.device)
            model(input_ids=piece, use_cache=False, logits_to_keep=1)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    layers = []
    for module_name, (_, count) in routers.items():
        if not kept[module_name]:
            continue  # an MTP layer, which plain text does not pass
        experts, weights, widths = zip(*kept[module_name])
        layers.append(
            LayerRouting(_layer(module_name), count, widths[0] - count, torch.cat(experts), torch.cat(weights))
        )
    return Routing(name or type(model).__name__, ids.numel(), layers)


def _layer(module_name: str) -> int:
    found = re.search(r"layers\.(\d+)", module_name)
    return int(found[1]) if found else 0


# --- statistics -------------------------------------------------------------------------------------------------------


def statistics(routing: Routing, groups: int = 8, pairs: int = 10) -> dict[str, Any]:
    """Numbers of every layer, ready for JSON; `hf-moe route --explain` says what they are.

    Args:
        groups: devices that hold a layer's experts, in equal runs of neighbouring ids.
        pairs: how many pairs of experts with the highest lift to list.

    Raises:
        ValueError: if the groups do not divide the experts.
    """
    layers = [layer_statistics(layer, groups, pairs) for layer in routing.layers]
    keys = ("normalised_entropy", "max_over_mean", "unused_experts", "group_max_over_mean", "real_experts_per_token")
    means = {key: sum(layer[key] for layer in layers) / len(layers) for key in keys}
    return {"model": routing.model, "tokens": routing.num_tokens, "groups": groups, "mean": means, "layers": layers}


def layer_statistics(layer: LayerRouting, groups: int = 8, pairs: int = 10) -> dict[str, Any]:
    counts = layer.tokens_per_expert()
    real = counts[: layer.num_experts].double()
    share = real / real.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log2()).sum().item()
    load = group_load(layer, groups)
    real_counts = layer.real_experts_per_token()
    return {
        "layer": layer.layer,
        "experts": layer.num_experts,
        "zero_experts": layer.num_zero_experts,
        "tokens_per_expert": counts.tolist(),
        "entropy": entropy,
        "normalised_entropy": entropy / max(torch.tensor(float(layer.num_experts)).log2().item(), 1e-12),
        "max_over_mean": _max_over_mean(real),
        "unused_experts": int((real == 0).sum()),
        "group_load": load.long().tolist(),
        "group_max_over_mean": _max_over_mean(load),
        "groups_per_token": groups_per_token(layer, groups),
        "real_experts_per_token": real_counts.double().mean().item(),
        "tokens_by_real_experts": torch.bincount(real_counts, minlength=layer.experts.shape[1] + 1).tolist(),
        "zero_share": (counts[layer.num_experts :].sum() / counts.sum().clamp(min=1)).item(),
        "top_weight": (layer.weights.amax(1) / layer.weights.sum(1).clamp(min=1e-20)).mean().item(),
        "pairs": top_pairs(layer, pairs),
    }


def _max_over_mean(load: torch.Tensor) -> float:
    return (load.max() / load.mean().clamp(min=1e-12)).item()


def _group_size(layer: LayerRouting, groups: int) -> int:
    _check_groups(groups, layer.num_experts, layer.layer)
    return layer.num_experts // groups


def _check_groups(groups: int, num_experts: int, layer: int) -> None:
    if groups < 1 or num_experts % groups:
        raise ValueError(f"`groups={groups}` does not divide the {num_experts} experts of layer {layer}.")


def group_load(layer: LayerRouting, groups: int) -> torch.Tensor:
    """(groups,) choices that fall on each device."""
    size = _group_size(layer, groups)
    return layer.tokens_per_expert()[: layer.num_experts].view(groups, size).sum(1).double()


def groups_per_token(layer: LayerRouting, groups: int) -> float:
    """How many devices a token is sent to, on average."""
    size = _group_size(layer, groups)
    reached = torch.zeros(layer.experts.shape[0], groups + 1, dtype=torch.bool)
    reached.scatter_(1, (layer.experts // size).clamp(max=groups), True)  # zero experts: the last column, no device
    return reached[:, :groups].sum(1).double().mean().item()


def top_pairs(layer: LayerRouting, count: int) -> list[dict[str, Any]]:
    """Pairs of experts that are chosen together most often against chance; rare ones (under 5 tokens) left out."""
    together = layer.coactivation()
    tokens, alone = layer.experts.shape[0], together.diagonal()
    lift = together * tokens / (alone[:, None] * alone[None]).clamp(min=1)
    lift = lift.masked_fill(together < 5, 0).triu(1)
    values, places = lift.flatten().topk(min(count, lift.numel()))
    return [
        {
            "experts": [place // layer.num_experts, place % layer.num_experts],
            "tokens": int(together.flatten()[place]),
            "lift": value,
        }
        for value, place in zip(values.tolist(), places.tolist())
        if value > 0
    ]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: for a file that is not UTF-8, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} holds no text.")
    return text


def check_request(model: PreTrainedModel, groups: int, layer: int | None) -> None:
    """Raises `ValueError` for groups that do not divide the experts, and for a layer without any, before a long run."""
    routers = {_layer(name): count for name, (_, count) in find_routers(model).items()}
    for number, count in routers.items():
        _check_groups(groups, count, number)
    if layer is not None and layer not in routers:
        raise ValueError(f"Layer {layer} has no experts; layers with experts are {', '.join(map(str, routers))}.")


def route_text(
    model: str, text: Path, max_tokens: int, window: int, groups: int = 1, layer: int | None = None
) -> Routing:
    """What `hf-moe route` runs; `groups` and `layer` are what shall be drawn of it."""
    content = read_text(text)
    loaded, tokenizer = load_model(model)
    check_request(loaded, groups, layer)
    ids = tokenizer(content, verbose=False).input_ids[:max_tokens]  # run in windows, however many there are
    return record_routing(loaded, ids, window, name=model)
