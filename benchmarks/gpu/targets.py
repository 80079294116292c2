"""What the figures of a run of the queue are held against: each target with what was measured, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator

BANDWIDTH, DENSE, FP8_GAIN = 0.85, 0.75, 1.5  # of a copy, of cuBLAS in bfloat16, of our bfloat16
MLA_BANDWIDTH, MLA_RATIO, MLA_CONTEXT = 0.8, 50.0, 32768
LORA_RATIO, LORA_MEMORY = 2.0, 0.5
FEW, MANY = 64, 4096  # tokens of a decode step at most, and of a prompt at least


def judge(benchmarks: dict[str, list[dict]]) -> list[dict]:
    """Every target that `benchmarks` (the records of a results file, by part) have a figure for.

    Returns one entry a target and row: `target` and `case` in words, `measured`, `wanted`, `met`, and `share`, which is
    how much of what is wanted was reached (above 1 if it was met).
    """
    records = [record for part in benchmarks.values() for record in part]
    rows = {}
    for record in records:
        rows.setdefault(record.get("benchmark"), []).extend(row for row in record["rows"] if "failed" not in row)
    judged = [*_experts(rows.get("expert_kernels", [])), *_lora(rows.get("expert_kernels", []))]
    for row in rows.get("mla_kernel", []):
        case = f"batch {row['batch']}, context {row['context']}"
        judged.append(
            _entry("MLA decode reads the cache at copy bandwidth", case, row["of copy bandwidth"], MLA_BANDWIDTH)
        )
    for row in rows.get("mla_layer", []):
        if row["context"] >= MLA_CONTEXT:
            case = f"context {row['context']}"
            judged.append(_entry("MLA layer against native", case, row["ratio"], MLA_RATIO))
    return judged


def _experts(rows: list[dict]) -> Iterator[dict]:
    plain = {(row["model"], row["tokens"]): row for row in rows if row["kind"] == "bf16"}
    for row in rows:
        case, tokens = f"{row['model']} {row['kind']}, {row['tokens']} tokens", row["tokens"]
        if row["model"] == "lora":
            continue
        if tokens <= FEW:
            share = row["share of copy bandwidth"]
            yield _entry("touched experts are read at copy bandwidth", case, share, BANDWIDTH)
        elif tokens >= MANY and row["kind"] == "bf16":
            yield _entry("prompts at cuBLAS's dense bfloat16 rate", case, row["share of dense bf16"], DENSE)
        elif tokens >= MANY and row["kind"] == "w8a8" and (row["model"], tokens) in plain:
            gain = row["TFLOP/s"] / plain[row["model"], tokens]["TFLOP/s"]
            yield _entry("prompts in FP8 against bfloat16", case, gain, FP8_GAIN)


def _lora(rows: list[dict]) -> Iterator[dict]:
    forms = {row["kind"]: row for row in rows if row["model"] == "lora"}
    fold, grouped = forms.get("fold", {}), forms.get("grouped", {})
    if "ratio" in grouped:
        yield _entry("LoRA experts against a fold, time", "forward and backward", grouped["ratio"], LORA_RATIO)
    if fold.get("GB") and grouped.get("GB"):
        saving = fold["GB"] / grouped["GB"]
        yield _entry("LoRA experts against a fold, memory", "forward and backward", saving, 1 / LORA_MEMORY)


def _entry(target: str, case: str, measured: float, wanted: float) -> dict:
    share = measured / wanted
    return {
        "target": target,
        "case": case,
        "measured": measured,
        "wanted": wanted,
        "met": measured >= wanted,
        "share": share,
    }
