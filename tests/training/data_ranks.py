"""One of the processes of `test_token_rows.py`: who reads the data, what all get of it, and of bad data."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoTokenizer

from hf_moe.demo import DEMO_MODEL
from hf_moe.training import FinetuneArguments, data


def main(folder: Path) -> None:
    accelerator, read, found = Accelerator(cpu=True), [], {}
    read_samples = data.read_samples
    data.read_samples = lambda name, *more: read.append(name) or read_samples(name, *more)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    for name, lines in {"good": [{"text": f"value {n} is {n * n}"} for n in range(40)], "bad": [{"word": 1}]}.items():
        path = folder / f"{name}.jsonl"
        if accelerator.is_main_process:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        accelerator.wait_for_everyone()
        args = FinetuneArguments(
            model_name_or_path="m", dataset_name=str(path), output_dir="o", packing=True, max_length=32,
            validation_split=0.2, disable_tqdm=True, too_long="truncate",
        )  # fmt: skip
        try:
            train, held_out = data.load_rows(tokenizer, args, accelerator)
        except data.DataError as error:
            found["error"] = str(error)
        else:
            found |= {part: [rows[index] for index in range(len(rows))] for part, rows in
                      (("train", train), ("held_out", held_out))}  # fmt: skip
            found |= {"fingerprint": train.fingerprint, "files": train.samples.cache_files}
            accelerator.wait_for_everyone()
    torch.save({**found, "read": read}, folder / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
