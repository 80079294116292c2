"""Named accelerators, as data that a user can extend, and the roofline of a decode step on them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import cost
from .architecture import Architecture
from .sources import read_json

DATA = Path(__file__).with_name("accelerators.json")
# Share of the memory that weights and cache may fill; the rest is for activations and the runtime.
USABLE = 0.9
DEFAULT = ("h800", "h20", "a800", "910b")
MICRO_BATCHES = (
    3  # in flight at once with attention and experts apart: one in attention, one on the wire, one in experts
)


@dataclass(frozen=True)
class Accelerator:
    """One device. `flops` are dense operations per second by dtype; `network` is bytes per second of this device."""

    name: str
    title: str
    memory: float
    bandwidth: float
    flops: dict[str, float]
    network: float
    usd_per_hour: float | None = None

    def rate(self, dtype: str) -> float:
        """Operations per second; a device without FP8 units, and INT4 weights, compute in bfloat16."""
        if dtype == "fp32" and "fp32" in self.flops:
            return self.flops["fp32"]
        return self.flops.get("fp8", self.flops["bf16"]) if dtype == "fp8" else self.flops["bf16"]

    def ratio(self, dtype: str) -> float:
        """Operations per byte at which computing and reading take the same time."""
        return self.rate(dtype) / self.bandwidth


def load_accelerators(extra: Path | None = None) -> dict[str, Accelerator]:
    """The devices of the package, and those of `extra`, a JSON file of the same form, over them.

    Raises:
        ValueError: for a file that is not JSON, and for an entry that lacks a key or has a wrong one.
    """
    return {**_load(DATA), **(_load(Path(extra)) if extra else {})}


def _load(path: Path) -> dict[str, Accelerator]:
    entries = read_json(path)
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold an object: device names and their properties.")
    return {name: _accelerator(path, name, entry) for name, entry in entries.items() if not name.startswith("_")}


def _accelerator(path: Path, name: str, entry: Any) -> Accelerator:
    where = f"{path}, accelerator {name!r}"
    if not isinstance(entry, dict) or not isinstance(entry.get("flops"), dict):
        raise ValueError(f"{where}: needs memory, bandwidth, network and flops by dtype.")
    numbers = {key: entry.get(key) for key in ("memory", "bandwidth", "network")}
    numbers |= {f"flops.{dtype}": value for dtype, value in entry["flops"].items()}
    numbers.setdefault("flops.bf16", None)
    if entry.get("usd_per_hour") is not None:
        numbers["usd_per_hour"] = entry["usd_per_hour"]
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{where}: `{key}` must be a positive number, got {value!r}.")
    unknown = set(entry) - {"title", "memory", "bandwidth", "network", "flops", "usd_per_hour"}
    if unknown:
        raise ValueError(f"{where}: unknown keys {', '.join(sorted(unknown))}.")
    return Accelerator(name=name, title=entry.get("title", name), **{k: v for k, v in entry.items() if k != "title"})


# --- one kind of device -----------------------------------------------------------------------------------------------


def distinct_experts(a: Architecture, batch: int) -> float:
    """Experts of a layer that a batch reads, expected, if tokens choose independently and evenly."""
    if not a.num_experts:
        return 0
    return a.num_experts * (1 - (1 - a.real_experts_per_token / a.num_experts) ** batch)


def attention_seconds(a: Architecture, device: Accelerator, context, batch, kv_dtype, precision) -> dict[str, float]:
    """Of a decode step on one device: the cache (`core`) and the weights of projections and head (`linear`)."""
    flops = batch * cost.attention_flops_exact(a, context)
    other = cost.other_flops(a)
    linear = batch * (cost.linear_flops(a) + other["head"] + other["router"])
    return {
        "core_compute": flops / device.rate(kv_dtype),
        "core_memory": cost.kv_cache_bytes(a, context, batch, kv_dtype) / device.bandwidth,
        "linear_compute": linear / device.rate(precision),
        "linear_memory": cost.weight_bytes(a, precision)["attention_read"] / device.bandwidth,
    }


def ffn_seconds(a: Architecture, device: Accelerator, batch: int, precision: str) -> dict[str, float]:
    """Of a decode step on one device: dense MLPs, shared experts, and the experts that the batch reaches."""
    weights = cost.weight_bytes(a, precision)
    read = weights["ffn_always_read"] + a.num_moe * distinct_experts(a, batch) * weights["expert"]
    return {"compute": batch * cost.ffn_flops(a) / device.rate(precision), "memory": read / device.bandwidth}


def roofline(a: Architecture, device: Accelerator, context: int, batch: int, kv_dtype: str, precision: str) -> dict:
    """What a decode step of `batch` sequences takes on the fewest devices that hold the model and their caches.

    Weights and caches are split evenly; communication between the devices is not counted.
    """
    weights = cost.weight_bytes(a, precision)
    held = weights["attention"] + weights["ffn"]
    sequence = cost.kv_cache_bytes(a, context, 1, kv_dtype)
    usable = device.memory * USABLE
    devices = max(1, math.ceil((held + batch * sequence) / usable))
    attention = attention_seconds(a, device, context, batch, kv_dtype, precision)
    ffn = ffn_seconds(a, device, batch, precision)
    core = max(attention["core_compute"], attention["core_memory"])
    step = core + max(attention["linear_compute"], attention["linear_memory"]) + max(ffn.values())
    step /= devices
    return {
        "accelerator": device.name,
        "flops_per_byte": device.ratio(kv_dtype),
        "fits_on_one": devices == 1,
        "min_devices": devices,
        "max_batch": math.floor((devices * usable - held) / sequence),
        "step_seconds": step,
        "tokens_per_second": batch / step,
        "tokens_per_second_per_device": batch / step / devices,
        "attention_bound": "compute" if attention["core_compute"] > attention["core_memory"] else "memory",
        "ffn_bound": "compute" if ffn["compute"] > ffn["memory"] else "memory",
        "usd_per_million_tokens": usd_per_million_tokens(a, device, context, kv_dtype, precision),
    }


def usd_per_million_tokens(
    a: Architecture,
    device: Accelerator,
    context: int,
    kv_dtype: str,
    precision: str,
    ffn_device: Accelerator | None = None,
) -> float | None:
    """The report's cost of decoding at large batch: max(attention, cache) + projections, plus FFN, at the rent's price.

    `ffn_device` rents the experts elsewhere.
    """
    ffn_device = ffn_device or device
    if device.usd_per_hour is None or ffn_device.usd_per_hour is None:
        return None
    attention = cost.attention_flops(a, context) / device.rate(kv_dtype)
    cache = cost.kv_cache_bytes(a, context, 1, kv_dtype) / device.bandwidth
    here = max(attention, cache) + cost.linear_flops(a) / device.rate(precision)
    there = cost.ffn_flops(a) / ffn_device.rate(precision)
    return 1e6 * (here * device.usd_per_hour + there * ffn_device.usd_per_hour) / 3600


# --- attention and experts apart --------------------------------------------------------------------------------------


def network_bytes(a: Architecture) -> dict[str, int]:
    """Per token: to the experts in fp8 (H), back in bfloat16 (2 H), for each layer, and over all layers."""
    hidden = a.hidden_size
    return {"to_experts": hidden, "from_experts": 2 * hidden, "layer": 3 * hidden, "token": 3 * hidden * a.num_layers}


def min_active_share(
    a: Architecture, device: Accelerator, precision: str, devices_per_node: int = 8, tpot: float = 0.05
):
    """S_min: the smallest share of active experts that keeps the experts' compute busy at the network's speed.

    A product of B tokens does 2 B operations per byte of weight, so that B_dense = ratio / 2 and B_moe = B_dense / S;
    3 H B bytes a layer have to cross the node's network in a third of the time per token.
    """
    stage = tpot / MICRO_BATCHES
    network = device.network * devices_per_node
    return 3 * a.hidden_size * device.ratio(precision) * a.num_layers / (2 * network * stage)


def active_share(a: Architecture) -> float:
    """S: active experts over all, the shared expert counted as one of them where there is one."""
    shared = 1 if a.shared_width else 0
    return (a.real_experts_per_token + shared) / (a.num_experts + shared) if a.num_experts else 1.0


def batch_for_compute(a: Architecture, device: Accelerator, precision: str) -> dict[str, float]:
    """Tokens at which reading expert weights stops being the limit, for dense weights and for experts."""
    dense = device.ratio(precision) / 2
    return {"dense": dense, "moe": dense / active_share(a)}


def disaggregate(
    a: Architecture,
    attention_device: Accelerator,
    ffn_device: Accelerator,
    context: int,
    batch: int,
    kv_dtype: str,
    precision: str,
    tpot: float = 0.05,
) -> dict:
    """Attention-FFN disaggregation: each side on the fewest devices that hold it and keep up with `tpot`.

    `tpot` is the aim in seconds per token. Three micro-batches are in flight, so that each stage has a third of it. A
    network link is as fast as the devices of its slower side together.
    """
    weights = cost.weight_bytes(a, precision)
    cache = cost.kv_cache_bytes(a, context, batch, kv_dtype)
    micro, stage = math.ceil(batch / MICRO_BATCHES), tpot / MICRO_BATCHES
    attention = attention_seconds(a, attention_device, context, micro, kv_dtype, precision)
    core = max(attention["core_compute"], attention["core_memory"])
    attention_time = core + max(attention["linear_compute"], attention["linear_memory"])
    ffn_time = max(ffn_seconds(a, ffn_device, micro, precision).values())
    # Attention devices each hold all weights of their side (data parallel) and a share of the caches.
    room = attention_device.memory * USABLE - weights["attention"]
    if room <= 0:
        hold_attention = math.ceil((weights["attention"] + cache) / (attention_device.memory * USABLE))
    else:
        hold_attention = math.ceil(cache / room)
    a_devices = max(1, hold_attention, math.ceil(attention_time / stage))
    f_devices = max(1, math.ceil(weights["ffn"] / (ffn_device.memory * USABLE)), math.ceil(ffn_time / stage))
    wire = network_bytes(a)
    link = min(a_devices * attention_device.network, f_devices * ffn_device.network)
    stages = {
        "attention": attention_time / a_devices,
        "network": micro * wire["token"] / link,
        "ffn": ffn_time / f_devices,
    }
    period = max(stages.values())
    return {
        "attention_accelerator": attention_device.name,
        "ffn_accelerator": ffn_device.name,
        "attention_devices": a_devices,
        "ffn_devices": f_devices,
        "network_bytes_per_token_and_layer": wire["layer"],
        "network_bytes_per_token": wire["token"],
        "stage_seconds": stages,
        "slowest_stage": max(stages, key=stages.get),
        "token_seconds": MICRO_BATCHES * period,
        "meets_tpot": MICRO_BATCHES * period <= tpot * (1 + 1e-9),
        "tokens_per_second": micro / period,
        "tokens_per_second_per_device": micro / period / (a_devices + f_devices),
        "active_share": active_share(a),
        "min_active_share": min_active_share(a, ffn_device, precision, tpot=tpot),
        "usd_per_million_tokens": usd_per_million_tokens(a, attention_device, context, kv_dtype, precision, ffn_device),
    }
