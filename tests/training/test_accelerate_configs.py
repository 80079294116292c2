"""The files for `accelerate launch`, read by Accelerate's own launcher, against models of every family."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from tiny import tiny_model
from tiny_step3 import text_model

from hf_moe.models.layer_experts import Experts
from hf_moe.training.trainer import fill_deepspeed_config

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
MODELS = {
    "deepseek_v3": lambda: tiny_model("deepseek_v3"),
    "kimi_k2": lambda: tiny_model("kimi_k2"),
    "longcat_flash": lambda: tiny_model("longcat_flash"),
    "step3": text_model,
}


def _read(name: str):
    args = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "script.py"])
    return _validate_launch_command(args)[0]


def test_every_file_is_known():
    assert {path.name for path in FOLDER.iterdir()} == {"ddp.yaml", "fsdp2.yaml", "deepspeed_zero3.yaml"}
    plain = _read("ddp.yaml")
    assert plain.multi_gpu and not plain.use_fsdp and not plain.use_deepspeed and plain.mixed_precision == "bf16"


@pytest.mark.parametrize("family", MODELS)
def test_fsdp2_finds_the_layers_of(family, monkeypatch):
    args = _read("fsdp2.yaml")
    assert args.use_fsdp
    for name, value in prepare_multi_gpu_env(args).items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT" and not plugin.activation_checkpointing
    model = MODELS[family]()
    plugin.set_auto_wrap_policy(model)
    layers = {type(layer) for layer in model.model.layers}
    if getattr(model.model, "mtp", None) is not None:
        layers |= {type(layer) for layer in model.model.mtp.layers}
    assert layers == set(plugin.auto_wrap_policy.keywords["transformer_layer_cls"])


@pytest.mark.parametrize("family", MODELS)
def test_deepspeed_names_what_is_there(family):
    args = _read("deepspeed_zero3.yaml")
    assert args.use_deepspeed and int(args.zero_stage) == 3 and args.mixed_precision == "bf16"
    assert args.deepspeed_moe_layer_cls_names == "Experts"
    assert any(type(module) is Experts for module in MODELS[family]().modules())


@pytest.mark.parametrize("optim", ["muon", "muonclip"])
def test_muon_is_refused_under_deepspeed_before_it_trains(optim):
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=f"--optim {optim} needs whole matrices"):
        fill_deepspeed_config(accelerator, SimpleNamespace(optim=optim))
