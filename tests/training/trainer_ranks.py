"""One of the processes of `test_trainer_processes.py`; also what a process alone runs, with the doubled batch.

Runs full fine-tuning with balance, for 4 steps; then 2 of them, and the rest from the checkpoint. Rank 0 writes the
losses of both and the weights.
"""

import json
import random
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from safetensors.torch import save_file
from tiny import tiny_model
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_moe.demo import DEMO_MODEL
from hf_moe.training import FinetuneArguments, FinetuneTrainer, run
from hf_moe.training.data import IGNORE_INDEX, TokenRows
from hf_moe.training.output import write_result
from hf_moe.training.router_callbacks import balance_callbacks


def rows(count: int, seed: int, packed: bool = False) -> TokenRows:
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        ids = [rng.randrange(3, 60) for _ in range(rng.randrange(4, 20))]
        labels = [token if at and rng.random() < 0.7 else IGNORE_INDEX for at, token in enumerate(ids)]
        samples.append((ids, [*labels[:-1], ids[-1]]))
    return TokenRows.from_samples(samples, max_length=32, packed=packed)


def sharded_accelerator() -> Accelerator:
    """Accelerate offers FSDP on accelerators alone; its code runs on the CPU, too."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["DeepseekV3DecoderLayer", "DeepseekV3MTPLayer"],
        state_dict_type="SHARDED_STATE_DICT",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, gradient_accumulation_steps=2)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def zero3_accelerator() -> Accelerator:
    """DeepSpeed over gloo; needs `DS_ACCELERATOR=cpu` in the environment."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not worth a compiler's minutes
    AcceleratorState._reset_state(reset_partial_state=True)  # one takes no second plugin
    plugin = DeepSpeedPlugin(
        zero_stage=3,
        zero3_init_flag=False,
        zero3_save_16bit_model=True,
        gradient_clipping=1.0,
        transformer_moe_cls_names="Experts",
        gradient_accumulation_steps=2,
    )
    plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return Accelerator(
        deepspeed_plugin=plugin,
        gradient_accumulation_steps=2,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )


ACCELERATORS = {"one": lambda: None, "ddp": lambda: None, "fsdp2": sharded_accelerator, "zero3": zero3_accelerator}


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **targets))


def train(folder: Path, batch_size: int, way: str, resume: str | None = None, **more) -> FinetuneTrainer:
    args = FinetuneArguments(
        model_name_or_path="none", dataset_name="none", output_dir=str(folder), max_steps=4, disable_tqdm=True,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=2, logging_steps=1, save_steps=2,
        learning_rate=1e-3, use_cpu=True, eval_strategy="steps", eval_steps=2, validation_split=0.5,
        lr_scheduler_type="constant", per_device_eval_batch_size=2,
        **{"router_bias_update_rate": 0.01, **more},
    )  # fmt: skip
    unset_hf_deepspeed_config()  # of an earlier run, which would partition the model before it has its weights
    model = tiny_model()
    if args.use_peft:
        model = with_lora(model.to(torch.bfloat16))
    callbacks = balance_callbacks(model, args)
    accelerator = ACCELERATORS[way]()
    trainer = FinetuneTrainer(model, args, rows(14, 0), rows(5, 9), callbacks=callbacks, accelerator=accelerator)
    trainer.result = trainer.train(resume)
    return trainer


def finetune_folders(folder: Path, batch_size: int, way: str) -> dict[str, list]:
    """The whole way from a checkpoint to a result; with ZeRO-3 the weights are read into partitioned parameters."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"Item {n}: the square of {n} is {n * n}."}) + "\n" for n in range(24)))
    if way == "zero3":
        run.make_accelerator = lambda args: zero3_accelerator()
    logs = {}
    for name, options in {"full": {}, "factors": {"use_peft": True, "gradient_checkpointing": True}}.items():
        args = FinetuneArguments(
            model_name_or_path=str(DEMO_MODEL), dataset_name=str(data), output_dir=str(folder / name), max_steps=2,
            max_length=64, per_device_train_batch_size=batch_size, gradient_accumulation_steps=2, learning_rate=1e-3,
            weight_decay=0.1, disable_tqdm=True, save_strategy="no", logging_steps=1, use_cpu=way != "zero3",
            lr_scheduler_type="constant", dtype="float32", **options,
        )  # fmt: skip
        result = run.finetune(args)
        logs[name] = [result.trained_parameters, *losses(result.trainer)]
    return logs


def losses(trainer: FinetuneTrainer) -> list[dict[str, float]]:
    names = ("step", "loss", "main_loss", "mtp_loss_1", "grad_norm", "eval_loss", "router_max_over_mean")
    return [{name: line[name] for name in names if name in line} for line in trainer.log_lines]


def main(folder: Path, batch_size: int, way: str) -> None:
    straight = train(folder / "straight", batch_size, way)
    checkpoint = str(folder / "straight" / "checkpoint-2")
    resumed = train(folder / "resumed", batch_size, way, checkpoint)
    weights = straight.accelerator.get_state_dict(straight.model)
    again = resumed.accelerator.get_state_dict(resumed.model)
    write_result(straight, straight.result)
    # Float32 factors on bfloat16 weights, recomputed layers.
    factors = {"use_peft": True, "gradient_checkpointing": True, "router_bias_update_rate": 0.0}
    lora = train(folder / "lora", batch_size, way, **factors)
    write_result(lora, lora.result)
    lora_resumed = train(folder / "lora2", batch_size, way, str(folder / "lora" / "checkpoint-2"), **factors)
    write_result(lora_resumed, lora_resumed.result)
    finetuned = finetune_folders(folder, batch_size, way) if way in ("one", "zero3") else {}
    if straight.accelerator.is_main_process:
        equal = all(torch.equal(weights[name], again[name]) for name in weights)
        summary = {
            "losses": losses(straight),
            "resumed": losses(resumed),
            "equal": equal,
            "lora": losses(lora),
            "finetuned": finetuned,
            "kind": str(straight.accelerator.distributed_type),
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        save_file(
            {name: value.detach().cpu().clone() for name, value in weights.items()}, folder / "weights.safetensors"
        )
    straight.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
