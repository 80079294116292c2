"""One of two processes: runs every case with the other one over gloo, and writes what came out to a file.

Started by `test_two_processes.py` as `python two_ranks.py FOLDER`, with the rank in the environment.
"""

import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tiny import random_ids, tiny_model  # noqa: E402
from tiny_step3 import text_model  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import Replicate, Shard, distribute_tensor  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config  # noqa: E402
from transformers.distributed import DistributedConfig  # noqa: E402

from hf_moe.training.balance import BalanceOptions, RouterBalance  # noqa: E402
from hf_moe.training.muon import Muon, muon_groups  # noqa: E402
from hf_moe.training.qk_clip import QKClip  # noqa: E402

STEPS, ROWS, LENGTH = 2, 4, 5  # rows of all ranks and micro-batches; so few tokens that experts get none
DDP_FAMILIES = ("deepseek_v3", "deepseek_v2", "longcat_flash", "step3")
ADAPTER_FAMILIES = ("deepseek_v3", "longcat_flash", "step3")
ADAPTERS = [(kind, family) for kind in ("ddp", "ep", "tp") for family in ADAPTER_FAMILIES] + [
    ("ep", "fp8"),
    ("tp", "even"),
]
EXPERT_PARALLEL = ("deepseek_v3", "longcat_flash", "step3", "fp8")
# FP8 checkpoints: goldens, whose widths leave ranks with padding, and one with several blocks to a rank.
TENSOR_PARALLEL = ("v3_fp8", "longcat_fp8", "step3_fp8", "blocks")
BLOCKS = {"hidden_size": 136, "intermediate_size": 512, "moe_intermediate_size": 600, "vocab_size": 128}
EVEN = {**BLOCKS, "moe_intermediate_size": 512}  # two blocks of FP8 experts to a rank
OPTIONS = {
    "deepseek_v3": BalanceOptions(bias_update_rate=0.01, sequence_loss=0.1),
    "deepseek_v2": BalanceOptions(expert_loss=0.1, device_loss=0.1, communication_loss=0.1),
    "longcat_flash": BalanceOptions(bias_update_rate=0.5, device_loss=0.1, num_devices=2),
    "step3": BalanceOptions(expert_loss=0.1),
}


def make_model(family: str):
    """A tiny model in training mode, the same in every process."""
    return (text_model() if family == "step3" else tiny_model(family)).train()


def make_optimizer(model, name: str) -> torch.optim.Optimizer:
    if name == "muon":
        return Muon(muon_groups(model), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, optimizer, family: str, rank: int = 0, world: int = 1, micro_batches: int = 1, backward=None):
    """Some steps on this rank's share of each global batch; returns the loads, and each rank's own counts."""
    balance = RouterBalance(model, OPTIONS[family])
    clip = None if family == "step3" else QKClip(model, threshold=2.0)
    own = []
    for step in range(STEPS):
        ids = random_ids(ROWS, LENGTH, seed=step)
        labels = ids.clone()
        labels[0, :3] = -100  # ranks have different numbers of targets
        num_items = (labels[:, 1:] != -100).sum()
        rows = torch.arange(ROWS).view(micro_batches, world, -1)[:, rank]
        for index, part in enumerate(rows):
            model.require_backward_grad_sync = index == micro_batches - 1
            loss = model(input_ids=ids[part], labels=labels[part], num_items_in_batch=num_items, use_cache=False).loss
            (backward or torch.Tensor.backward)(loss * world)  # the ranks' gradients are averaged
        own.append(torch.stack(list(balance._counts.values())))
        optimizer.step()
        optimizer.zero_grad()
        balance.step()
        if clip is not None:
            clip.step()
    loads = torch.stack([layer.counts for layer in balance.load().layers])
    result = {"loads": loads, "own": own, "logits": None if clip is None else clip.last}
    balance.detach()
    if clip is not None:
        clip.detach()
    return result


def plain_state(model) -> dict[str, torch.Tensor]:
    """Parameters and buffers, gathered from all ranks."""
    whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # noqa: E731
    return {name: whole(tensor.detach()).clone() for name, tensor in model.state_dict().items()}


# --- cases ------------------------------------------------------------------------------------------------------------


def data_parallel(family: str, optimizer: str, micro_batches: int, rank: int) -> dict:
    model = make_model(family)
    wrapped = DistributedDataParallel(model)
    result = train(wrapped, make_optimizer(model, optimizer), family, rank, 2, micro_batches)
    return {**result, "state": plain_state(model)}


def expert_parallel(family: str, folder: Path, rank: int) -> dict:
    """Logits, loss and gradients of the checkpoint with its experts on two ranks."""
    model = load_by_expert(folder / f"{family}_checkpoint")
    model.save_pretrained(folder / f"{family}_checkpoint_again")
    ids = random_ids(2, 13, high=60)
    with torch.no_grad():
        result = {"logits": model.eval()(input_ids=ids).logits}
    shapes = {name: tuple(p.to_local().shape) for name, p in model.named_parameters() if hasattr(p, "to_local")}
    result["local"] = {name: shape for name, shape in shapes.items() if ".experts." in name}
    model.train()(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # noqa: E731
    return {**result, "gradients": {name: whole(gradient) for name, gradient in gradients.items()}}


def tensor_parallel(family: str, folder: Path, rank: int) -> dict:
    """What an FP8 checkpoint does with its matrices cut among both ranks; writes it anew, as it was and decoded."""
    path, ids = folder / f"tp_{family}", random_ids(2, 13, high=100)
    load = partial(AutoModelForCausalLM.from_pretrained, path, distributed_config=DistributedConfig(tp_size=2))
    model = load(dtype=torch.float32)
    result = {"logits": evaluate(model, ids), "ids": generate(model, ids)}
    shapes = {name: tuple(p.to_local().shape) for name, p in model.named_parameters() if hasattr(p, "to_local")}
    storages = {name: p.to_local().untyped_storage().nbytes() for name, p in model.named_parameters() if name in shapes}
    result |= {"local": shapes, "bytes": storages}
    model.train()(input_ids=ids, labels=ids).loss.backward()
    whole = lambda tensor: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # noqa: E731
    result["gradients"] = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.save_pretrained(folder / f"tp_{family}_again")
    result["dequantized"] = evaluate(model.dequantize(), ids)
    model.save_pretrained(folder / f"tp_{family}_decoded")
    result["decoded on load"] = evaluate(load(dtype=torch.float32, dequantize=True), ids)
    return result


def evaluate(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def generate(model, ids: torch.Tensor) -> torch.Tensor:
    """Greedy tokens; with the MTP layers, if there are any."""
    use_mtp = {"use_mtp": True} if getattr(model.config, "num_nextn_predict_layers", 0) else {}
    return model.generate(ids, max_new_tokens=6, do_sample=False, **use_mtp)


def quantized_on_load(folder: Path, rank: int) -> torch.Tensor:
    """Logits of a plain checkpoint of which each rank quantises its part."""
    config = DistributedConfig(tp_size=2)
    request = FineGrainedFP8Config()
    model = AutoModelForCausalLM.from_pretrained(
        folder / "tp_plain", distributed_config=config, quantization_config=request, dtype=torch.float32
    )
    assert model.model.layers[1].mlp.experts.down_proj.dtype == torch.float8_e4m3fn
    return evaluate(model, random_ids(2, 13, high=100))


def refused(folder: Path) -> dict[str, str]:
    """Messages of what tensor parallelism cannot do with FP8 weights."""
    path, messages = folder / "tp_v3_fp8", {}
    plans = {
        "cut": {"model.layers.*.self_attn.o_proj": "rowwise"},
        "mixed": {"model.layers.*.mlp.experts.gate_up_proj": "colwise"},
    }
    calls = {}
    for name, plan in plans.items():
        config = DistributedConfig(tp_size=2, tp_plan=plan)
        calls[name] = partial(AutoModelForCausalLM.from_pretrained, path, distributed_config=config)
    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto")
    model.save_pretrained(folder / "tp_v3_fp8_as_stored_again")
    calls["adapter"] = partial(with_adapter, model)
    calls["distributed checkpoint"] = partial(model.save_pretrained, folder / "dcp", distributed_checkpoint=True)
    for name, call in calls.items():
        try:
            call()
        except ValueError as error:
            messages[name] = str(error)
    return messages


def with_adapter(model):
    """LoRA on attention and experts, with factors that are no zeros, the same in every process."""
    from peft import LoraConfig, get_peft_model

    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], target_parameters=parameters))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def adapter(kind: str, family: str, folder: Path, rank: int) -> dict:
    """Two steps of LoRA, and what is merged: under DDP, or on a model whose experts are shared out, or cut."""
    if kind == "ddp":
        model = make_model(family)
    else:
        load = load_by_expert if kind == "ep" else load_cut
        model = load(folder / f"{family}_checkpoint").train()
    model = with_adapter(model)
    wrapped = DistributedDataParallel(model) if kind == "ddp" else model
    world, rank = (2, rank) if kind == "ddp" else (1, 0)
    result = {"losses": train_adapter(wrapped, rank, world), "state": adapter_state(model)}
    return {**result, "merged": evaluate(model.merge_and_unload(safe_merge=True), random_ids(2, 13, high=60))}


def adapter_state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def train_adapter(model, rank: int = 0, world: int = 1) -> list[float]:
    """Losses of two steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        ids = random_ids(ROWS, LENGTH, seed=step, high=60).view(world, -1, LENGTH)[rank]
        num_items = torch.tensor(ROWS * (LENGTH - 1))
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=num_items, use_cache=False).loss
        (loss * world).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def load_cut(path: Path):
    """The checkpoint with the inner width of its experts cut among both ranks, as the model's plan has it. Heads stay
    whole: some releases of Transformers cut only those of an even vocabulary."""
    plan = AutoConfig.from_pretrained(path).base_model_tp_plan
    experts = {f"model.{name}": style for name, style in plan.items() if ".experts" in name}
    config = DistributedConfig(tp_size=2, tp_plan=experts)
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config, dtype=torch.float32)


def load_by_expert(path: Path):
    """The checkpoint with its experts shared out among both ranks."""
    by_expert = {"ep_size": 2} if hasattr(DistributedConfig, "ep_size") else {"enable_expert_parallel": True}
    config = DistributedConfig(tp_size=2, **by_expert)
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=config, dtype=torch.float32)


def fully_sharded(optimizer_name: str, folder: Path, rank: int) -> dict:
    """FSDP2 through Accelerate: training, a checkpoint of shards, and the same from there."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["DeepseekV3DecoderLayer", "DeepseekV3MTPLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    before = accelerator.distributed_type
    for state in (PartialState, AcceleratorState):  # Accelerate offers FSDP on accelerators alone; its code runs here
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    try:
        prepared = []
        for _ in range(2):
            model = make_model("deepseek_v3")
            prepared.append(accelerator.prepare(model, make_optimizer(model, optimizer_name)))
        (model, optimizer), (fresh, fresh_optimizer) = prepared
        backward = accelerator.backward
        result = train(model, optimizer, "deepseek_v3", rank, 2, backward=backward)
        result["state"] = plain_state(model)
        result["sharded"] = [name for name, p in model.named_parameters() if hasattr(p, "to_local")]
        whole = accelerator.get_state_dict(model)
        if rank == 0:
            accelerator.unwrap_model(model).save_pretrained(folder / "fsdp2_whole", state_dict=whole)
        _save_and_load(accelerator, folder / f"fsdp2_{optimizer_name}", (model, optimizer), (fresh, fresh_optimizer))
        result["reloaded"] = plain_state(fresh)
        for pair, name in (((model, optimizer), "straight"), ((fresh, fresh_optimizer), "resumed")):
            train(*pair, "deepseek_v3", rank, 2, backward=backward)
            result[name] = plain_state(pair[0])
        return result
    finally:
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = before


def _save_and_load(accelerator, folder: Path, source, target) -> None:
    accelerator._models, accelerator._optimizers = [source[0]], [source[1]]
    accelerator.save_state(str(folder))
    accelerator._models, accelerator._optimizers = [target[0]], [target[1]]
    accelerator.load_state(str(folder))


SHAPES = ((6, 4), (3, 6, 4), (1, 4, 8))  # three experts on two ranks, and one
PLACEMENTS = {"replicated": Replicate(), "by row": Shard(0), "by column": Shard(1)}


def update_matrices(layout=None, mesh=None) -> list[torch.Tensor]:
    """Parameters after two steps of Muon, laid out among the ranks or plain."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    place = lambda tensor: tensor if layout is None else distribute_tensor(tensor, mesh, [layout])  # noqa: E731
    parameters = [torch.nn.Parameter(place(draw(shape))) for shape in SHAPES]
    optimizer = Muon([{"params": parameters, "parts": 2}], lr=0.1)
    for _ in range(2):
        for parameter, shape in zip(parameters, SHAPES):
            parameter.grad = place(draw(shape))
        optimizer.step()
    return [p.detach() if layout is None else p.detach().full_tensor() for p in parameters]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for family in DDP_FAMILIES:
        results[f"ddp {family}"] = data_parallel(family, "sgd", 1, rank)
    results["ddp micro"] = data_parallel("deepseek_v3", "sgd", 2, rank)
    results["ddp muon"] = data_parallel("deepseek_v3", "muon", 1, rank)
    mesh = init_device_mesh("cpu", (2,))
    results["matrices"] = {name: update_matrices(layout, mesh) for name, layout in PLACEMENTS.items()}
    for family in EXPERT_PARALLEL:
        if (folder / f"{family}_checkpoint").exists():
            results[f"ep {family}"] = expert_parallel(family, folder, rank)
    for family in TENSOR_PARALLEL:
        results[f"tp {family}"] = tensor_parallel(family, folder, rank)
    results["tp on load"] = quantized_on_load(folder, rank)
    results["refused"] = refused(folder)
    for kind, family in ADAPTERS:
        if kind == "ddp" or (folder / f"{family}_checkpoint").exists():
            results[f"{kind} lora {family}"] = adapter(kind, family, folder, rank)
    for optimizer in ("sgd", "muon"):
        results[f"fsdp2 {optimizer}"] = fully_sharded(optimizer, folder, rank)
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
