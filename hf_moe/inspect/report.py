"""`hf-moe inspect`: one record per model, as objects for JSON and as tables."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..units import bytes_text, count_text
from . import cost
from .accelerators import Accelerator, disaggregate, roofline
from .architecture import Architecture, read_architecture
from .count import count_parameters
from .sources import bytes_on_disk, read_source, stored_precision

# Columns of a console that a label and a value take.
_LABEL_WIDTH, _VALUE_WIDTH = 34, 14


def inspect_model(
    model: str,
    contexts: list[int],
    batches: list[int],
    kv_dtype: str,
    precision: str | None,
    accelerators: list[Accelerator],
    attention_on: Accelerator | None = None,
    experts_on: Accelerator | None = None,
    tpot: float = 0.05,
) -> dict[str, Any]:
    """Everything that `hf-moe inspect` knows about one model. The top level is for the first context and batch.

    Raises:
        FileNotFoundError, ValueError: for what is no configuration, or one without formulas.
    """
    source = read_source(model)
    a = read_architecture(source.config, source.name)
    parts, counted = count_parameters(source, a)
    precision = precision or stored_precision(source.config)
    points = [_point(a, context, batch, kv_dtype) for context in contexts for batch in batches]
    for point in points:
        arguments = (point["context"], point["batch"], kv_dtype, precision)
        point["accelerators"] = [roofline(a, device, *arguments) for device in accelerators]
        if attention_on and experts_on:
            point["disaggregation"] = disaggregate(a, attention_on, experts_on, *arguments, tpot=tpot)
    other = cost.other_flops(a)
    return {
        "name": source.name,
        "model_type": a.model_type,
        "source": source.origin,
        "counted_from": counted,
        "total_params": cost.total_params(parts),
        "active_params": cost.active_params(parts),
        "active_params_without_embedding": cost.active_params(parts, embedding=False),
        "mtp_params": parts["mtp"].total,
        "mtp_active_params": a.mtp_active,
        "vision_params": parts["vision"].total,
        "all_params": sum(part.total for part in parts.values()),
        "parts": {name: {"total": part.total, "active": round(part.active)} for name, part in parts.items()},
        "experts": {
            "routed": a.num_experts,
            "zero": a.num_zero_experts,
            "chosen": a.experts_per_token,
            "real_per_token": a.real_experts_per_token,
        },
        "checkpoint_bytes": {name: cost.checkpoint_bytes(a, name) for name in cost.PRECISIONS},
        "checkpoint_bytes_on_disk": bytes_on_disk(source.folder),
        "weight_precision": precision,
        "attention_kind": a.attention.kind,
        "kv_dtype": kv_dtype,
        "kv_cache_bytes_per_token": cost.kv_cache_bytes(a, 1, 1, kv_dtype),
        "arithmetic_intensity": cost.arithmetic_intensity(a, kv_dtype),
        "linear_flops": cost.linear_flops(a),
        "ffn_flops": round(cost.ffn_flops(a)),
        "router_flops": other["router"],
        "head_flops": other["head"],
        **points[0],
        "points": points,
    }


def _point(a: Architecture, context: int, batch: int, kv_dtype: str) -> dict[str, Any]:
    return {
        "context": context,
        "batch": batch,
        "kv_cache_bytes": cost.kv_cache_bytes(a, context, batch, kv_dtype),
        "attention_flops": cost.attention_flops(a, context),
        "attention_flops_exact": cost.attention_flops_exact(a, context),
        "decode_flops": round(cost.decode_flops(a, context)),
        "prefill_flops_per_token": round(cost.prefill_flops_per_token(a, context)),
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms"


def print_report(records: list[dict[str, Any]], console: Console) -> None:
    """Records beside one another, as many as the console is wide for; then each point of context and batch."""
    widest = max(len(record["name"]) for record in records)
    beside = max(1, (console.width - _LABEL_WIDTH) // (max(widest, _VALUE_WIDTH) + 3))
    for start in range(0, len(records), beside):
        _print_beside(records[start : start + beside], console)


def _print_beside(records: list[dict[str, Any]], console: Console) -> None:
    _print_parameters(records, console)
    _print_checkpoints(records, console)
    for index, point in enumerate(records[0]["points"]):
        _print_point(records, index, console)
        if point["accelerators"]:
            for record in records:
                _print_accelerators(record, index, console)
        if "disaggregation" in point:
            _print_disaggregation(records, index, console)


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(columns[0], no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_parameters(records, console: Console) -> None:
    table = _table("Parameters: total (active per token)", ["part", *(record["name"] for record in records)])
    for part in cost.PARTS:
        if any(record["parts"][part]["total"] for record in records):
            table.add_row(part, *(_part_text(record["parts"][part]) for record in records))
    table.add_section()
    table.add_row("main model", *(count_text(record["total_params"]) for record in records), style="bold")
    table.add_row("active", *(count_text(record["active_params"]) for record in records), style="bold")
    table.add_row(
        "active, no input table", *(count_text(record["active_params_without_embedding"]) for record in records)
    )
    table.add_row("with MTP and vision", *(count_text(record["all_params"]) for record in records))
    table.add_row("counted from", *(record["counted_from"] for record in records), style="dim")
    console.print(table)


def _part_text(part: dict[str, int]) -> str:
    if not part["total"]:
        return "-"
    total, active = count_text(part["total"]), count_text(part["active"])
    return total if active == total or not part["active"] else f"{total} ({active})"


def _print_checkpoints(records, console: Console) -> None:
    table = _table("Checkpoint", ["precision", *(record["name"] for record in records)])
    for precision in cost.PRECISIONS:
        table.add_row(precision, *(bytes_text(record["checkpoint_bytes"][precision]) for record in records))
    if any(record["checkpoint_bytes_on_disk"] for record in records):
        sizes = [record["checkpoint_bytes_on_disk"] for record in records]
        table.add_row("on disk", *(bytes_text(size) if size else "-" for size in sizes))
    console.print(table)


def _print_point(records, index: int, console: Console) -> None:
    points = [record["points"][index] for record in records]
    title = f"Context {points[0]['context']:,}, batch {points[0]['batch']}, cache in {records[0]['kv_dtype']}"
    table = _table(title, ["", *(record["name"] for record in records)])
    rows = {
        "attention": [record["attention_kind"] for record in records],
        "KV cache": [bytes_text(point["kv_cache_bytes"]) for point in points],
        "KV cache per token": [bytes_text(record["kv_cache_bytes_per_token"]) for record in records],
        "attention FLOPs per token": [count_text(point["attention_flops"]) for point in points],
        "projection FLOPs": [count_text(record["linear_flops"]) for record in records],
        "FFN FLOPs": [count_text(record["ffn_flops"]) for record in records],
        "decode FLOPs per token": [count_text(point["decode_flops"]) for point in points],
        "prefill FLOPs per token": [count_text(point["prefill_flops_per_token"]) for point in points],
        "intensity, FLOPs/byte": [f"{record['arithmetic_intensity']:.4g}" for record in records],
    }
    for label, values in rows.items():
        table.add_row(label, *values)
    console.print(table)


def _print_accelerators(record: dict[str, Any], index: int, console: Console) -> None:
    point = record["points"][index]
    title = f"{record['name']} in {record['weight_precision']}: a decode step, batch {point['batch']}, fewest devices"
    table = _table(title, ["", "devices", "max batch", "step", "tokens/s", "attention/FFN by", "USD/1M"])
    short = {"memory": "mem", "compute": "comp"}
    for row in point["accelerators"]:
        table.add_row(
            row["accelerator"],
            str(row["min_devices"]),
            str(row["max_batch"]),
            _seconds(row["step_seconds"]),
            count_text(row["tokens_per_second"]),
            f"{short[row['attention_bound']]}/{short[row['ffn_bound']]}",
            "-" if row["usd_per_million_tokens"] is None else f"{row['usd_per_million_tokens']:.3f}",
        )
    console.print(table)


def _print_disaggregation(records, index: int, console: Console) -> None:
    rows = [record["points"][index]["disaggregation"] for record in records]
    title = f"Attention on {rows[0]['attention_accelerator']}, experts on {rows[0]['ffn_accelerator']}"
    table = _table(title, ["", *(record["name"] for record in records)])
    lines = {
        "devices: attention + experts": [f"{row['attention_devices']} + {row['ffn_devices']}" for row in rows],
        "network bytes / token and layer": [f"{row['network_bytes_per_token_and_layer']:,}" for row in rows],
        "network bytes / token": [bytes_text(row["network_bytes_per_token"]) for row in rows],
        "stage: attention": [_seconds(row["stage_seconds"]["attention"]) for row in rows],
        "stage: network": [_seconds(row["stage_seconds"]["network"]) for row in rows],
        "stage: experts": [_seconds(row["stage_seconds"]["ffn"]) for row in rows],
        "time per token": [_seconds(row["token_seconds"]) for row in rows],
        "tokens/s per device": [count_text(row["tokens_per_second_per_device"]) for row in rows],
        "active share S (least S)": [f"{row['active_share']:.3f} ({row['min_active_share']:.3f})" for row in rows],
    }
    for label, values in lines.items():
        table.add_row(label, *values)
    console.print(table)


def write_json(records: Any, path: Path) -> None:
    """Through a temporary name, so that no half file is left behind."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
