"""The files for `accelerate launch`, read by Accelerate's own launcher, against models of every family."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import free_port
from safetensors.torch import load_file
from testing import assert_close
from tiny import tiny_model
from tiny_step3 import text_model
from transformers import AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from hf_moe.demo import DEMO_MODEL
from hf_moe.models.layer_experts import Experts
from hf_moe.training import FinetuneArguments, finetune
from hf_moe.training.trainer import fill_deepspeed_config

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
# Accelerate has FSDP on accelerators alone. For a process that imports this first, CPUs are some.
FSDP_ON_CPUS = """
from accelerate import state
from accelerate.utils import DistributedType
init = state.AcceleratorState.__init__
def __init__(self, *args, fsdp_plugin=None, **kwargs):
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        state.PartialState._shared_state["distributed_type"] = self.distributed_type
state.AcceleratorState.__init__ = __init__
"""
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


def test_launched_fsdp2_trains_an_fp8_model(tmp_path):
    """The whole way, in mixed precision and with weights that one process reads: as one process does it."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=FineGrainedFP8Config())
    model.save_pretrained(tmp_path / "fp8")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "fp8")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"Item {n}: the square of {n} is {n * n}."}) + "\n" for n in range(16)))
    options = {
        "model_name_or_path": str(tmp_path / "fp8"), "dataset_name": str(data), "lora_r": 4, "max_steps": 2,
        "max_length": 64, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no",
    }  # fmt: skip
    settings = (FOLDER / "fsdp2.yaml").read_text(encoding="utf-8")
    assert settings.count("fsdp_cpu_ram_efficient_loading: false") == 1
    (tmp_path / "fsdp2.yaml").write_text(settings.replace("efficient_loading: false", "efficient_loading: true"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FSDP_ON_CPUS)
    root = FOLDER.parents[1]
    paths = [str(tmp_path / "site"), str(root), os.environ.get("PYTHONPATH", "")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "fsdp2.yaml")]
    launch += ["--num_processes", "2", "--main_process_port", free_port(), str(FOLDER.parent / "finetune_lora.py")]
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2", "--use_cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launch, *words, "--disable_tqdm"], env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-3000:]
    args = {**options, "output_dir": str(tmp_path / "one"), "per_device_train_batch_size": 4, "bf16": True}
    finetune(FinetuneArguments(**args, use_peft=True, use_cpu=True, disable_tqdm=True))
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "training_log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(two) == 2 and [line["epoch"] for line in two] == [line["epoch"] for line in one]
    for actual, line in zip(two, one):
        for name in ("loss", "main_loss", "mtp_loss_1", "grad_norm"):
            assert actual[name] == pytest.approx(line[name], rel=2e-3), name
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys() and any("experts" in name for name in first)
    for name, factor in first.items():
        if "lora_A" in name:  # near what they were; what AdamW makes of B from nothing is the sign of its gradient
            assert_close(name, second[name], factor, "bfloat16")
        assert second[name].norm() > 0, name
