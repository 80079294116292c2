"""One of two processes that train LoRA on FP8 weights; runs every case over gloo and writes what came out to a file.

Started by `test_fp8_processes.py` as `python fp8_ranks.py FOLDER`, with the rank in the environment.
"""

import gc
import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from accelerate import Accelerator, FullyShardedDataParallelPlugin  # noqa: E402
from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from tiny import random_ids, tiny_model  # noqa: E402
from trainer_ranks import rows  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hf_moe.training import FinetuneArguments, FinetuneTrainer  # noqa: E402
from hf_moe.training.distributed import forward_context, prepare  # noqa: E402
from hf_moe.training.output import write_result  # noqa: E402

FAMILIES = ("v3_fp8", "longcat_fp8", "step3_fp8", "powers")  # checkpoints; the last one has scales in float8_e8m0fnu
STEPS, ROWS, LENGTH = 3, 4, 7
FP8 = torch.float8_e4m3fn


def load(folder: Path, family: str, dtype: torch.dtype = torch.float32, **options):
    """The checkpoint in training mode, with factors that are no zeros on attention and experts."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder / family, dtype=dtype).train()
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=3, target_modules=["o_proj"], target_parameters=parameters, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def fp8_modules(model) -> dict:
    return {name: module for name, module in model.named_modules() if getattr(module, "fp8", None) is not None}


def fp8_parameters(model) -> dict[str, torch.Tensor]:
    """FP8 weights and their scales, this process's share of them, as bytes."""
    found = {}
    for prefix, module in fp8_modules(model).items():
        for name in module.fp8_parts:
            for part in (name, f"{name}_scale_inv"):
                parameter = module.get_parameter(part).detach()
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                found[f"{prefix}.{part}"] = local.unsqueeze(-1).view(torch.uint8).clone()
    return found


def live_fp8_bytes() -> int:
    """Bytes of all memory that FP8 tensors of this process lie in."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    plain = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors if tensor.dtype == FP8]
    return sum({memory.data_ptr(): memory.nbytes() for memory in map(torch.Tensor.untyped_storage, plain)}.values())


def train(model, accelerator=None, rank: int = 0, world: int = 1) -> dict:
    """Losses of some steps on this rank's share of each batch, factors and FP8 weights after them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    wrapped, backward = model, torch.Tensor.backward
    if accelerator is not None:
        wrapped, optimizer = prepare(accelerator, model, optimizer)
        backward = accelerator.backward
    seen = set()

    def watch(module, *_):
        seen.update((name, str(p.dtype), hasattr(p, "to_local")) for name, p in module.named_parameters(recurse=False))

    hooks = [module.register_forward_pre_hook(watch) for module in fp8_modules(model).values()]
    losses = []
    for step in range(STEPS):
        ids = random_ids(ROWS, LENGTH, seed=step, high=60).view(world, -1, LENGTH)[rank]
        num_items = torch.tensor(ROWS * (LENGTH - 1))
        with nullcontext() if accelerator is None else forward_context(accelerator, model):
            loss = wrapped(input_ids=ids, labels=ids, num_items_in_batch=num_items, use_cache=False).loss
        assert loss.dtype == torch.float32
        backward(loss * world)
        losses.append(loss.item())
        del loss
        optimizer.step()
        optimizer.zero_grad()
    for hook in hooks:
        hook.remove()
    whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()  # noqa: E731
    factors = {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    return {"losses": losses, "factors": factors, "fp8": fp8_parameters(model), "seen": seen}


@contextmanager
def fsdp2(precision: str = "no", once: bool = False):
    """An accelerator with FSDP2, which Accelerate offers on accelerators alone; its code runs on the CPU, too."""
    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="SHARDED_STATE_DICT",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=once,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin, mixed_precision=precision)
    before = accelerator.distributed_type
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    if precision != "no":
        plugin.set_mixed_precision(precision)
    try:
        yield accelerator
    finally:
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = before
        AcceleratorState._reset_state()


def sharded(folder: Path, family: str, rank: int) -> dict:
    """FSDP2; the memory is counted while nothing of the model runs, the first time before anything did."""
    before = live_fp8_bytes()
    model = load(folder, family)
    with fsdp2() as accelerator:
        result = train(model, accelerator, rank, 2)
    return {**result, "live bytes": live_fp8_bytes() - before}


def dealt_out(folder: Path, rank: int) -> dict:
    """The same where only the main process has the weights and buffers; the other one has noughts."""
    model = load(folder, "v3_fp8")
    if rank:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
    with fsdp2(once=True) as accelerator:
        return train(model, accelerator, rank, 2)


def dealt_out_widened() -> dict[str, torch.Tensor]:
    """Parameters of a bfloat16 model in mixed precision, of which the main process alone has the weights."""
    model = tiny_model().to(torch.bfloat16)
    if dist.get_rank():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
    with fsdp2("bf16", once=True) as accelerator:
        model, _ = prepare(accelerator, model, torch.optim.SGD(model.parameters()))
        return {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}


def mixed(folder: Path, rank: int) -> dict:
    """Mixed precision, of FSDP2 and of DDP; and what a model says that was prepared without `keep_fp8`."""
    results = {}
    with fsdp2("bf16") as accelerator:
        results["fsdp2"] = train(load(folder, "v3_fp8", torch.bfloat16), accelerator, rank, 2)
        policy = accelerator.state.fsdp_plugin.mixed_precision_policy
        assert policy.param_dtype == torch.bfloat16  # put back for models without FP8 weights
        model = load(folder, "v3_fp8", torch.bfloat16)
        wrapped, _ = accelerator.prepare(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
        try:
            wrapped(input_ids=random_ids(1, LENGTH, high=60))
        except TypeError as error:
            results["message"] = str(error)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    results["ddp"] = train(load(folder, "v3_fp8", torch.bfloat16), accelerator, rank, 2)
    AcceleratorState._reset_state()
    return results


def checkpoints(folder: Path, rank: int) -> dict:
    """Losses of four steps of the trainer, and of the last two of them from a checkpoint."""
    results = {}
    for name, resume in (("straight", None), ("resumed", str(folder / "straight" / "checkpoint-2"))):
        args = FinetuneArguments(
            model_name_or_path=str(folder / "v3_fp8"), dataset_name="none", output_dir=str(folder / name),
            max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
            disable_tqdm=True, use_cpu=True, use_peft=True, gradient_checkpointing=True, lora_dropout=0.1,
        )  # fmt: skip
        with fsdp2() as accelerator:
            model = load(folder, "v3_fp8", lora_dropout=0.1)
            trainer = FinetuneTrainer(model, args, rows(14, 0), accelerator=accelerator)
            write_result(trainer, trainer.train(resume))
        results[name] = [line["loss"] for line in trainer.log_lines]
    return results


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    Accelerator(cpu=True)  # joins the processes
    results = {f"fsdp2 {family}": sharded(folder, family, rank) for family in FAMILIES}
    results["ddp"] = train(load(folder, "v3_fp8"), Accelerator(cpu=True), rank, 2)
    AcceleratorState._reset_state()
    results["once"] = dealt_out(folder, rank)
    results["once widened"] = dealt_out_widened()
    results["mixed"] = mixed(folder, rank)
    results["checkpoints"] = checkpoints(folder, rank)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
