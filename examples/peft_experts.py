"""LoRA on attention and experts with plain PEFT: a few steps on a text file, the adapter saved, loaded and merged.

    python examples/peft_experts.py --text README.md --output_dir adapter        # the shipped demo model, a minute
    python examples/peft_experts.py --model path/to/checkpoint --text notes.txt --output_dir adapter

FP8 checkpoints stay FP8 while their adapter is trained.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_moe  # noqa: F401  registers the models, and makes PEFT know their experts
from hf_moe.demo import DEMO_MODEL
from hf_moe.training.lora import check_targets, trained_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", default="float32", help="of everything but FP8 weights")
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=["kv_a_proj_with_mqa", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    check_targets(model, config)
    model = get_peft_model(model, config).train()
    print(trained_table(model))

    ids = tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    length = min(256, len(ids))
    starts = torch.randint(0, len(ids) - length + 1, (args.steps, 4))
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=5e-4)
    for step, row in enumerate(starts):
        batch = torch.stack([ids[start : start + length] for start in row])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    model.save_pretrained(args.output_dir)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    merged = PeftModel.from_pretrained(base, args.output_dir).merge_and_unload().eval()
    with torch.no_grad():
        difference = merged(batch).logits - model.eval()(batch).logits
    print(f"adapter in {args.output_dir}; merged weights answer within {difference.abs().max():.1e} of it")


if __name__ == "__main__":
    main()
