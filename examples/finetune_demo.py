"""LoRA on the experts of the demo model, which knows Python source, towards the prose of package descriptions.

The data is on every machine that runs this: the descriptions (README texts) in the metadata of the installed packages,
at most 20,000 characters of each. One package in five, by a hash of its name, is held out.

    python examples/finetune_demo.py --output_dir prose            # a few minutes on one CPU core
    python examples/finetune_demo.py --output_dir prose --max_steps 10

Written are the adapter, the merged model, the same in block FP8, the curve, and `result.json` with held-out losses and
samples from before and after. Further options are those of `hf-moe finetune`.
"""

import argparse
import hashlib
import json
import math
import time
from importlib import metadata
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_moe  # noqa: F401  registers the models
from hf_moe.conversion.command import run_convert
from hf_moe.demo import DEMO_MODEL
from hf_moe.training import finetune
from hf_moe.training.arguments import parse_arguments

CHARACTERS = 20_000
HELD_OUT_ONE_IN = 5
PROMPTS = ("# Installation\n\nTo install", "This package is", "## License\n\n")
RECIPE = {
    "max_steps": 600,
    "per_device_train_batch_size": 4,
    "max_length": 256,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "logging_steps": 10,
    "eval_steps": 100,
    "save_steps": 200,
    "save_total_limit": 2,
    "seed": 7,
}


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """Two JSONL files of descriptions, to train on and held out."""
    texts = {}
    for package in metadata.distributions():
        fields = package.metadata
        text = fields.get("Description") or fields.get_payload() or ""
        name = (fields.get("Name") or "").lower()
        if name and len(text) > 200 and name not in texts:
            texts[name] = text[:CHARACTERS]
    parts: tuple[list, list] = ([], [])
    for name, text in sorted(texts.items()):
        number = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        parts[number % HELD_OUT_ONE_IN == 0].append({"text": text, "package": name})
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, rows in zip(paths, parts):
        if not rows:
            raise SystemExit("too few installed packages have a description to train on")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


@torch.no_grad()
def bits_per_byte(model, tokenizer, path: Path, window: int) -> float:
    """Mean cost of held-out text, in windows that do not see one another; every byte but a window's first token."""
    nats = count = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"]])
        count += len(text.encode())
        for start in range(0, len(ids) - 1, window - 1):
            part = ids[start : start + window][None]
            nats += model(part, labels=part, use_cache=False).loss.item() * (part.shape[1] - 1)
    return nats / math.log(2) / count


def complete(model, tokenizer, use_mtp: bool = False) -> list[str]:
    """What the model makes of `PROMPTS`, sampled."""
    texts = []
    for prompt in PROMPTS:
        set_seed(1)
        inputs = tokenizer(tokenizer.bos_token + prompt, return_tensors="pt")
        options = {"do_sample": True, "temperature": 0.5, "top_p": 0.95, "max_new_tokens": 60}
        output = model.generate(**inputs, **options, **({"use_mtp": True} if use_mtp else {}))
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def greedy(model, tokenizer, use_mtp: bool) -> tuple[list[int], str]:
    """Greedy tokens after the first prompt, and what speculation reports."""
    inputs = tokenizer(tokenizer.bos_token + PROMPTS[0], return_tensors="pt")
    options = {"do_sample": False, "max_new_tokens": 100, "return_dict_in_generate": True}
    if use_mtp:
        options |= {"use_mtp": True, "num_assistant_tokens_schedule": "constant"}
    output = model.generate(**inputs, **options)
    return output.sequences[0].tolist(), str(output.speculation) if use_mtp else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("prose"))
    known, rest = parser.parse_known_args()
    work: Path = known.output_dir
    train, held_out = write_corpus(work / "data")
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    window = RECIPE["max_length"]
    result: dict = {"torch": torch.__version__, "transformers": transformers.__version__}
    result |= {"before": {"bits_per_byte": bits_per_byte(base, tokenizer, held_out, window)}}
    result["before"]["samples"] = complete(base, tokenizer)

    argv = ["--use_peft", "--packing", "--add_bos_token", "--eval_on_start", "--merge_adapter"]
    for name, value in RECIPE.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    argv += ["--model_name_or_path", str(DEMO_MODEL), "--dtype", "float32", "--too_long", "split"]
    argv += ["--dataset_name", str(train), "--eval_dataset_name", str(held_out), "--output_dir", str(work / "adapter")]
    began = time.perf_counter()
    run = finetune(parse_arguments([*argv, *rest]))
    evaluations = [line["eval_loss"] for line in run.training.log if "eval_loss" in line]
    result["training"] = {
        "steps": run.training.step,
        "minutes": (time.perf_counter() - began) / 60,
        "train_tokens": run.trainer.train_dataset.num_targets,
        "held_out_loss": [evaluations[0], evaluations[-1]],
        "trained_parameters": run.trained_parameters,
    }

    merged = work / "adapter" / "merged"
    run_convert(str(merged), work / "fp8", "fp8", progress=False)
    for name, folder in (("after", merged), ("after_fp8", work / "fp8")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        cost = bits_per_byte(model, tokenizer, held_out, window)
        plain, (drafted, report) = greedy(model, tokenizer, False)[0], greedy(model, tokenizer, True)
        result[name] = {
            "bits_per_byte": cost,
            "samples": complete(model, tokenizer, use_mtp=True),
            "greedy_with_mtp_is_greedy": plain == drafted,
            "speculation": report,
        }
    (work / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    print(json.dumps(result, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
