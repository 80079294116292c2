"""What the tests of LoRA on experts share: tiny models of every family, adapters, and PEFT as it is without hf_moe."""

import contextlib

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.model import LoraModel
from tiny import random_ids, tiny_model
from tiny_step3 import text_model, vl_model

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FAMILIES = (
    *("deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "kimi_k2", "longcat_flash", "longcat_flash_ngram"),
    *("step3_text", "step3_vl"),
)
PEFT_RELEASE = tuple(int(part) for part in peft.__version__.split(".")[:2])


def model_of(family: str, **kwargs):
    """A tiny model with random weights, in evaluation mode."""
    if family.startswith("step3"):
        return (text_model if family == "step3_text" else vl_model)(**kwargs)
    return tiny_model(family, **kwargs)


def ids_of(model, batch: int = 2, length: int = 9) -> torch.Tensor:
    return random_ids(batch, length, high=min(97, model.config.get_text_config().vocab_size))


def attention_of(model) -> list[str]:
    """Attention projections of a family, by the ends of their names."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules() if ".self_attn" in name}
    return sorted(names & {"q_proj", "wq", "k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "q_b_proj", "o_proj"})


def adapted(model, seed: int = 0, modules=None, parameters=EXPERTS, adapter: str = "default", **kwargs):
    """The model with an adapter whose factors are all random, on attention and experts unless told otherwise."""
    modules = attention_of(model) if modules is None else modules
    options = {"r": 3, "lora_alpha": 6, "target_modules": modules, "target_parameters": parameters, **kwargs}
    wrapped = get_peft_model(model, LoraConfig(**options), adapter_name=adapter)
    randomize_adapter(wrapped, seed, adapter)
    return wrapped.eval()


@torch.no_grad()
def randomize_adapter(model, seed: int = 0, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if f".{adapter}." in name and ".lora_" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)


@contextlib.contextmanager
def stock_peft():
    """Within, adapters get PEFT's own layers also in our models."""
    ours = LoraModel._create_new_module
    LoraModel._create_new_module = staticmethod(ours.hf_moe_original)
    try:
        yield
    finally:
        LoraModel._create_new_module = staticmethod(ours)


def wrappers(model) -> list[torch.nn.Module]:
    """The layers around expert weights."""
    return [module for module in model.modules() if type(module).__name__ == "ParamWrapper"]


def factors_of(model) -> dict[str, torch.nn.Parameter]:
    """Trained factors by name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
