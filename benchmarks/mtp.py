"""Speculative decoding with MTP layers against plain decoding and native Transformers' own, greedy.

Two models: the demo checkpoint, whose MTP layer was trained, and a larger one of random weights, whose drafts are all
wrong: what MTP costs where it does not help. Native Transformers speculates at batch 1 only, and finds the MTP weights
of layer 61 only; the benchmark tells it where they are.

    python benchmarks/mtp.py

In pieces, each of which writes its rows beside those of the others:

    python benchmarks/mtp.py --models demo --batches 1 --tokens 64 --append
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import report, time_turns
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
CONSTANT = {"use_mtp": True, "num_assistant_tokens_schedule": "constant"}
OURS = {
    "adaptive": {"use_mtp": True},
    "two drafts": {**CONSTANT, "num_assistant_tokens": 2},
    "up to four": {**CONSTANT, "num_assistant_tokens": 4, "assistant_confidence_threshold": DEFAULT_CONFIDENCE},
}
DECODINGS = (*OURS, "native plain", "native MTP")
# Steps whose passes are timed together.
PASSES = 60
WARM_UP_TOKENS = 8
# What tells rows apart.
KEYS = ("model", "tokens", "batch", "decoding")


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
def pass_cases(model, context: int, tokens_per_step: float, prompts: list[torch.Tensor]) -> dict[str, Callable]:
    """The passes of a step with two drafts at batch 1, one after the other as in a step, `PASSES` times: the MTP layer
    over the tokens of the last step, and over one more, and the check of three tokens. And those over the prompts."""
    ids = torch.randint(3, model.config.vocab_size, (1, context), device=prompts[0].device)
    cache, mtp_cache = DynamicCache(config=model.config), SingleLayerCache()
    states = model.model(ids, past_key_values=cache, use_cache=True).last_hidden_state
    _, layer = model.model.mtp_layers()[0]
    model.model.mtp_forward(layer, states, model.mtp_embed(layer, ids), past_key_values=mtp_cache)

    def draft(count: int) -> None:
        positions = torch.arange(context, context + count, device=ids.device).unsqueeze(0)
        embeds = model.mtp_embed(layer, ids[:, :count])
        out = model.model.mtp_forward(
            layer, states[:, :count], embeds, position_ids=positions, past_key_values=mtp_cache
        )
        model.mtp_head(layer)(out[:, -1:])
        mtp_cache.crop(-count)

    @torch.no_grad()
    def step() -> None:
        for _ in range(PASSES):
            draft(round(tokens_per_step))
            draft(1)
            model.lm_head(model.model(ids[:, :3], past_key_values=cache, use_cache=True).last_hidden_state)
            cache.crop(-3)

    @torch.no_grad()
    def prompt() -> None:
        for prompt in prompts:
            states = model.model(prompt, past_key_values=DynamicCache(config=model.config), use_cache=True)[0]
            model.lm_head(states[:, -1:])
            embeds = model.mtp_embed(layer, prompt)
            model.model.mtp_forward(layer, states, embeds, past_key_values=SingleLayerCache())

    return {"step": step, "prompt": prompt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 192])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--models", nargs="+", choices=("demo", "random"), default=["demo", "random"])
    parser.add_argument("--decodings", nargs="+", choices=DECODINGS, default=DECODINGS, help="beside plain")
    parser.add_argument("--append", action="store_true", help="keep the rows of earlier runs that this one lacks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            ours, native, all_ids, all_mask = load(name, Path(folder), args.device)
            for batch in args.batches if name == "demo" else args.batches[:1]:
                for tokens in args.tokens if name == "demo" else args.tokens[:1]:
                    rows += measure(name, ours, native, all_ids, all_mask, batch, tokens, args)
    report("mtp", rows, args.device, args.out, KEYS if args.append else ())


def measure(name, ours, native, all_ids, all_mask, batch: int, tokens: int, args) -> list[dict]:
    if batch == 1:  # one prompt after the other, without padding
        prompts = [ids[mask.bool()].unsqueeze(0) for ids, mask in zip(all_ids, all_mask)]
        groups = [(ids, torch.ones_like(ids)) for ids in prompts]
    else:
        groups = [tuple(part.repeat(batch // len(all_ids), 1) for part in (all_ids, all_mask))]
    reports = {}

    def run(model, key: str, options: dict, tokens: int = tokens):
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

    models = {key: (ours, key, options) for key, options in {"plain": {}, **OURS}.items()}
    if batch == 1:
        models["native plain"] = native, "native plain", {}
        models["native MTP"] = native, "native MTP", {"use_mtp": True}
    models = {key: given for key, given in models.items() if key == "plain" or key in args.decodings}
    decodings = {key: run(*given) for key, given in models.items()}
    passes = {}
    if batch == 1 and "two drafts" in decodings:
        decodings["two drafts"]()  # says how many tokens a step yields
        passes = pass_cases(ours, all_ids.shape[1] + tokens // 2, tokens_per_step(reports["two drafts"]), prompts)
    # The adaptive schedule, which learns, is warmed up in full.
    short = {key: run(*given, tokens=WARM_UP_TOKENS) for key, given in models.items() if key != "adaptive"}
    seconds = time_turns({**decodings, **passes}, args.repeats, args.device, warm_ups=short)
    generated = len(groups) * batch * (tokens - 1)
    rows = []
    for key in decodings:
        times, done = seconds[key], [entry for entry in reports[key] if entry is not None]
        row = {"model": name, "tokens": tokens, "batch": batch, "decoding": key}
        row["tokens/s"] = generated / statistics.median(times)
        # Turn by turn, so that a machine whose speed changes from one to the next does not count.
        row["against plain"] = statistics.median(plain / time for plain, time in zip(seconds["plain"], times))
        row["tokens per step"] = tokens_per_step(done)
        row["acceptance by position"] = by_position(done)
        row["of what costs allow"] = ""
        if key == "two drafts" and passes:
            steps = sum(entry.steps for entry in done)
            allowed = [steps * step / PASSES + prompt for step, prompt in zip(seconds["step"], seconds["prompt"])]
            shares = (least / time for least, time in zip(allowed, times))
            row["of what costs allow"] = round(statistics.median(shares), 3)
        rows.append(row)
    return rows


def tokens_per_step(done: list) -> float:
    return sum(entry.tokens for entry in done) / sum(entry.steps for entry in done) if done else 1.0


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
