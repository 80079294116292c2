"""Speculative decoding with MTP layers against plain decoding and native Transformers' own, greedy.

Two models: the demo checkpoint, whose MTP layer was trained, and a larger one of random weights, whose drafts are all
wrong: what MTP costs where it does not help. Native Transformers speculates at batch 1 only, and finds the MTP weights
of layer 61 only; the benchmark tells it where they are.

    python benchmarks/mtp.py
"""

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from common import report, time_interleaved
from decode import SIZES
from transformers import AutoTokenizer, DynamicCache
from transformers.models.deepseek_v3 import DeepseekV3ForCausalLM as NativeModel

from hf_moe.demo import DEMO_MODEL
from hf_moe.models.configuration_deepseek_v3 import DeepseekV3Config
from hf_moe.models.generation_rows import SingleLayerCache
from hf_moe.models.generation_schedule import DEFAULT_CONFIDENCE
from hf_moe.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM

PROMPTS = [
    "import torch\n\ndef forward(self, hidden",
    "class Stack:\n    def __init__(self",
    "for key, value in sorted(d.items()):\n",
    "def parse_args(argv):\n    parser = argparse",
]
ADAPTIVE = {"use_mtp": True}
TWO = {"use_mtp": True, "num_assistant_tokens": 2, "num_assistant_tokens_schedule": "constant"}
UP_TO_FOUR = {**TWO, "num_assistant_tokens": 4, "assistant_confidence_threshold": DEFAULT_CONFIDENCE}


def load(name: str, folder: Path, device: str):
    """Our class and the native one with the same weights, and prompts (4, seq) with their mask."""
    if name == "demo":
        source = DEMO_MODEL
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
        inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        ids, mask = inputs.input_ids, inputs.attention_mask
    else:
        torch.manual_seed(0)
        source = folder
        config = DeepseekV3Config(**SIZES, num_nextn_predict_layers=1, pad_token_id=2)
        DeepseekV3ForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
        ids = torch.randint(3, SIZES["vocab_size"], (4, 16))
        mask = torch.ones_like(ids)
    ours = DeepseekV3ForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device).eval()
    NativeModel._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{ours.config.num_hidden_layers}.*"]
    native = NativeModel.from_pretrained(source, dtype=torch.bfloat16).to(device).eval()
    return ours, native, ids.to(device), mask.to(device)


@torch.no_grad()
def step_cost(model, context: int, tokens_per_step: float, device: str) -> float:
    """Seconds of the passes that a step with two drafts needs at batch 1: the check of three tokens, the MTP layer over
    the tokens of the last step, and over one more."""
    ids = torch.randint(3, model.config.vocab_size, (1, context), device=device)
    cache, mtp_cache = DynamicCache(config=model.config), SingleLayerCache()
    states = model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state
    _, layer = model.model.mtp_layers()[0]
    model.model.mtp_forward(layer, states, model.mtp_embed(layer, ids), past_key_values=mtp_cache)
    width = round(tokens_per_step)

    def run(count: int, main: bool) -> None:
        positions = torch.arange(context, context + count, device=device).unsqueeze(0)
        if main:
            model.lm_head(model.model(ids[:, :count], past_key_values=cache, use_cache=True).last_hidden_state)
            cache.crop(-count)
        else:
            embeds = model.mtp_embed(layer, ids[:, :count])
            out = model.model.mtp_forward(
                layer, states[:, :count], embeds, position_ids=positions, past_key_values=mtp_cache
            )
            model.mtp_head(layer)(out[:, -1:])
            mtp_cache.crop(-count)

    cases = {"check": lambda: run(3, True), "window": lambda: run(width, False), "chain": lambda: run(1, False)}
    return sum(time_interleaved(cases, 20, device).values())


@torch.no_grad()
def prompt_cost(model, ids: torch.Tensor, device: str) -> float:
    """Seconds of the passes over a prompt: the model's, and that of the MTP layer."""
    _, layer = model.model.mtp_layers()[0]

    def run() -> None:
        states = model.model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).last_hidden_state
        model.lm_head(states[:, -1:])
        model.model.mtp_forward(layer, states, model.mtp_embed(layer, ids), past_key_values=SingleLayerCache())

    return time_interleaved({"prompt": run}, 10, device)["prompt"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = []
    for name in ("demo", "random"):
        with tempfile.TemporaryDirectory() as folder:
            ours, native, all_ids, all_mask = load(name, Path(folder), args.device)
            for batch in args.batches if name == "demo" else args.batches[:1]:
                for tokens in args.tokens if name == "demo" else args.tokens[:1]:
                    rows += measure(name, ours, native, all_ids, all_mask, batch, tokens, args)
    report("mtp", rows, args.device, args.out)


def measure(name, ours, native, all_ids, all_mask, batch: int, tokens: int, args) -> list[dict]:
    groups = [(all_ids[i : i + 1], all_mask[i : i + 1]) for i in range(4)] if batch == 1 else [(all_ids, all_mask)]
    groups = [tuple(part.repeat(max(1, batch // 4), 1) for part in group) for group in groups]
    reports = {}

    def run(model, key: str, options: dict):
        def call():
            outputs = [
                model.generate(
                    ids, attention_mask=mask, do_sample=False, eos_token_id=None, pad_token_id=2,
                    max_new_tokens=tokens, return_dict_in_generate=True, **options,
                )
                for ids, mask in groups
            ]  # fmt: skip
            reports[key] = [getattr(output, "speculation", None) for output in outputs]

        return call

    cases = {
        "plain": run(ours, "plain", {}),
        "adaptive": run(ours, "adaptive", ADAPTIVE),
        "two drafts": run(ours, "two drafts", TWO),
        "up to four": run(ours, "up to four", UP_TO_FOUR),
    }
    if batch == 1:
        cases["native plain"] = run(native, "native plain", {})
        cases["native MTP"] = run(native, "native MTP", {"use_mtp": True})
    seconds = time_interleaved(cases, args.repeats, args.device)
    generated = len(groups) * batch * (tokens - 1)
    rows = []
    for key, time_taken in seconds.items():
        row = {"model": name, "tokens": tokens, "batch": batch, "decoding": key, "tokens/s": generated / time_taken}
        row["against plain"] = seconds["plain"] / time_taken
        done = [entry for entry in reports[key] if entry is not None]
        steps = sum(entry.steps for entry in done)
        row["tokens per step"] = sum(entry.tokens for entry in done) / steps if done else 1.0
        row["acceptance by position"] = by_position(done)
        row["of what costs allow"] = ""
        if key == "two drafts" and batch == 1:
            allowed = step_cost(ours, tokens // 2, row["tokens per step"], args.device) * steps
            allowed += sum(prompt_cost(ours, ids, args.device) for ids, _ in groups)
            row["of what costs allow"] = round(allowed / time_taken, 3)
        rows.append(row)
    return rows


def by_position(done: list) -> str:
    depth = max((len(entry.drafted_by_position) for entry in done), default=0)
    shares = []
    for position in range(depth):
        tries = sum(entry.drafted_by_position[position] for entry in done if len(entry.drafted_by_position) > position)
        hits = sum(entry.accepted_by_position[position] for entry in done if len(entry.accepted_by_position) > position)
        shares.append(f"{hits / tries:.2f}" if tries else "-")
    return " ".join(shares)


if __name__ == "__main__":
    main()
