"""`hf-moe finetune` and `finetune(...)` from options to files, on the demo model."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_moe.cli import app
from hf_moe.demo import DEMO_MODEL
from hf_moe.hub.card import is_ours
from hf_moe.training import FinetuneArguments, finetune
from hf_moe.training import run as run_module
from hf_moe.training.adapters import apply_lora
from hf_moe.training.arguments import parse_arguments
from hf_moe.training.charts import draw_losses
from hf_moe.training.checkpoints import list_checkpoints
from hf_moe.training.output import put_in_place
from hf_moe.training.trainer import read_log

peft = pytest.importorskip("peft")
PNG = b"\x89PNG\r\n\x1a\n"


def write_data(folder: Path, count: int = 24) -> str:
    path = folder / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Item {n}: the square of {n} is {n * n}."}) + "\n" for n in range(count))
    )
    return str(path)


def required(folder: Path, data: str) -> list[str]:
    return ["--model_name_or_path", str(DEMO_MODEL), "--dataset_name", data, "--output_dir", str(folder / "out")]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 40)[None]).logits


def plain(output: str) -> str:
    """What a box of the command says, without its frame and line breaks."""
    return " ".join("".join(letter for letter in output if letter not in "│╭╮╰╯─").split())


# --- options ----------------------------------------------------------------------------------------------------------


def test_no_adapter_is_merged_where_processes_share_the_model_out(tmp_path, monkeypatch):
    """Refused before the model is loaded, not after the training."""
    monkeypatch.setattr(run_module, "is_sharded", lambda accelerator: True)
    monkeypatch.setattr(run_module, "load_model", lambda args: pytest.fail("the model was loaded"))
    args = FinetuneArguments(
        model_name_or_path=str(DEMO_MODEL), dataset_name=write_data(tmp_path), output_dir=str(tmp_path / "out"),
        use_peft=True, merge_adapter=True, use_cpu=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="hf-moe merge"):
        finetune(args)


def test_hyphens_underscores_and_files_of_options(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 0.5\nmax_steps: 7\nlora_target_modules: [q_proj, o_proj]\nuse_peft: true\n")
    args = parse_arguments(
        ["--config", str(config), "--max-steps", "9", "--per-device-train-batch-size=3", "--report_to", "none",
         "--no-assistant-only-loss", "--add_bos_token", *required(tmp_path, "d")]
    )  # fmt: skip
    assert (args.learning_rate, args.max_steps, args.per_device_train_batch_size) == (0.5, 9, 3)
    assert args.lora_target_modules == ["q_proj", "o_proj"] and args.use_peft
    assert args.assistant_only_loss is False and args.report_to == [] and args.add_bos_token is True


def test_defaults_follow_what_is_trained():
    names = dict(model_name_or_path="m", dataset_name="d", output_dir="o")
    whole, factors = FinetuneArguments(**names), FinetuneArguments(use_peft=True, **names)
    assert (whole.learning_rate, whole.dtype) == (2e-5, "float32")
    assert (factors.learning_rate, factors.dtype) == (2e-4, "auto")
    assert [FinetuneArguments(warmup_ratio=0.1, **names).warmup(steps) for steps in (5, 10, 101)] == [1, 1, 11]
    assert FinetuneArguments(warmup_steps=7, **names).warmup(100) == 7


def from_file(folder, text: str) -> FinetuneArguments:
    (folder / "run.yaml").write_text(text)
    required = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    return parse_arguments(["--config", str(folder / "run.yaml"), *required])


def test_a_configuration_file_says_what_the_command_line_would(tmp_path):
    text = "report_to: tensorboard\nlora_target_modules: o_proj\nlearning_rate: 2e-4\nseed: 3\nmax_steps:\nbf16: true\n"
    args = from_file(tmp_path, text + "lr_scheduler_kwargs: {power: 2}\nlora_target_parameters: [a, b]\nrun_name: 7\n")
    assert (args.report_to, args.lora_target_modules, args.lora_target_parameters) == (
        ["tensorboard"],
        ["o_proj"],
        ["a", "b"],
    )
    assert (args.learning_rate, args.seed, args.max_steps, args.bf16, args.run_name) == (2e-4, 3, -1, True, "7")
    assert args.lr_scheduler_kwargs == {"power": 2}


@pytest.mark.parametrize(
    "text, message",
    [
        ("max_steps: 10.5", "--max_steps.*invalid int value: '10.5'"),
        ("max_steps: [1]", "max_steps must be one value"),
        ("learning_rate: yes", "--learning_rate.*invalid float value: 'True'"),
        ("report_to: [[a]]", "report_to must be a list of words"),
        ("use_peft: maybe", "--use_peft"),
    ],
)
def test_wrong_values_of_a_configuration_file_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        from_file(tmp_path, text)


BAD_OPTIONS = {
    "--max_step 4": r"no such option: --max_step; did you mean --max_steps\?",
    "--lora_dropout 1.5": "--lora_dropout must be at least 0 and below 1",
    "--seed -1": "--seed must be at least 0 and below 2",
    "--data_seed 4294967296": "--data_seed must be at least 0 and below 2",
    "--max_length 1": "--max_length must be at least 2",
    "--per_device_train_batch_size 0": "--per_device_train_batch_size must be at least 1",
    "--eval_strategy steps": "--eval_strategy needs data",
    "--early_stopping_patience 2": "--early_stopping_patience needs evaluation",
    "--fp8 yes --use_peft": "--fp8 is for training all parameters",
    "--merge_adapter": "--merge_adapter needs --use_peft",
    "--learning_rate much": "invalid float value",
    "--optim sgd": "invalid choice: 'sgd'|--optim must be one of",
    "--lr_scheduler_kwargs {": "--lr_scheduler_kwargs is no JSON",
    "--lr_scheduler_type steep": "--lr_scheduler_type must be one of linear, .*, got 'steep'",
    "--lr_scheduler_type reduce_lr_on_plateau": "--lr_scheduler_type must be one of linear",
    "--config nowhere.yaml": "no file 'nowhere.yaml'",
    "--max_length 4096": "--max_length 4096 is more than the model's 2048 positions",
    "--resume_from_checkpoint latest": "there is no whole checkpoint",
    "--chat_template_path nowhere": "--chat_template_path: no file",
}


@pytest.mark.parametrize("words", BAD_OPTIONS)
def test_bad_options_are_one_clear_error(tmp_path, monkeypatch, words):
    monkeypatch.setattr(run_module, "load_model", lambda args: pytest.fail("the model was loaded"))
    data = write_data(tmp_path)
    result = CliRunner().invoke(app, ["finetune", *required(tmp_path, data), *words.split()])
    assert result.exit_code == 2
    assert re.search(BAD_OPTIONS[words], plain(result.output)), result.output


def test_bad_data_is_named_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_model", lambda args: pytest.fail("the model was loaded"))
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "good"}\n{"tekst": "bad"}\n')
    result = CliRunner().invoke(app, ["finetune", *required(tmp_path, str(path))])
    shown = plain(result.output).replace(" ", "")  # a long path is broken anywhere
    assert result.exit_code == 2 and "d.jsonl,line2:foundtekst" in shown
    assert not (tmp_path / "out").exists()


def test_help_lists_every_option():
    result = CliRunner().invoke(app, ["finetune", "--help"])
    assert result.exit_code == 0
    for name in ("--model_name_or_path", "--lora_r", "--no_assistant_only_loss", "--gradient_checkpointing"):
        assert name in result.output


def test_targets_that_match_nothing_are_named(tmp_path):
    more = ["--use_peft", "--lora_target_modules", "o_proj", "no_proj", "--dtype", "float32"]
    result = CliRunner().invoke(app, ["finetune", *required(tmp_path, write_data(tmp_path)), *more])
    assert result.exit_code == 2 and "'no_proj' matches no module" in plain(result.output)


# --- results ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_adapter_merged_model_card_and_curve(tmp_path):
    data = write_data(tmp_path)
    words = (
        "--use_peft --lora-r 4 --max_steps 4 --learning_rate 1e-2 --logging_steps 1 --validation_split 0.2 --packing "
        "--max_length 128 --per_device_train_batch_size 2 --merge_adapter --dtype float32 --disable_tqdm "
        "--gradient_checkpointing --lora_dropout 0.05 --eval_steps 2"
    )
    result = CliRunner().invoke(app, ["finetune", *required(tmp_path, data), *words.split()])
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert "mlp.experts.gate_up_proj" in result.output and "parameters are trained" in result.output
    log = read_log(out / "training_log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4]
    assert {"loss", "main_loss", "mtp_loss_1", "grad_norm", "learning_rate", "router_max_over_mean"} <= set(log[0])
    evaluated = [line["eval_loss"] for line in log if "eval_loss" in line]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]
    for picture in ("loss.png", "expert_load.png"):
        assert (out / picture).read_bytes().startswith(PNG)
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "# LoRA adapter of demo_model" in card and "held-out loss" in card
    assert str(tmp_path) not in card
    base = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    original = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, out))
    merged = logits(AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32))
    assert (adapted - original).abs().max() > 0.05
    assert (adapted - merged).abs().max() < 1e-4
    assert (out / "tokenizer.json").is_file() and (out / "merged" / "tokenizer.json").is_file()
    merged_card = (out / "merged" / "README.md").read_text()
    assert "library_name: transformers" in merged_card and "use_mtp=True" in merged_card
    for text, base in ((card, "AutoPeftModelForCausalLM"), (merged_card, "AutoModelForCausalLM")):
        assert base in text and "## Licence" in text and "304,016" in text and "| LoRA | r 4" in text
        assert not is_ours(text)  # what a push leaves as it is
    assert not list(out.rglob("*.tmp"))
    again = CliRunner().invoke(app, ["finetune", *required(tmp_path, data), *words.split()])
    assert again.exit_code == 2 and "holds a run" in plain(again.output)


def test_the_whole_model_is_trained_and_loads_with_its_mtp_layer(tmp_path):
    out = tmp_path / "out"
    result = finetune(
        FinetuneArguments(
            model_name_or_path=str(DEMO_MODEL), dataset_name=write_data(tmp_path), output_dir=str(out), max_steps=2,
            per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1, disable_tqdm=True, save_steps=1,
            optim="muonclip",
        )
    )  # fmt: skip
    line = result.training.log[0]
    assert {"max_attention_logit", "router_balance_loss"} <= set(line)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for (name, saved), trained in zip(loaded.state_dict().items(), result.model.state_dict().values()):
        assert torch.equal(saved, trained), name
    before = load_file(DEMO_MODEL / "model.safetensors")
    after = load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert set(before) == set(after) and any("layers.8." in name for name in moved)  # the MTP layer
    assert any(name.endswith("e_score_correction_bias") for name in moved)
    assert AutoModelForCausalLM.from_pretrained(out / "checkpoint-1").dtype == torch.float32


def test_adapters_leave_the_biases_alone_unless_told(tmp_path):
    data = write_data(tmp_path)

    def biases(folder: str, **more):
        args = FinetuneArguments(
            model_name_or_path=str(DEMO_MODEL), dataset_name=data, output_dir=str(tmp_path / folder), max_steps=2,
            per_device_train_batch_size=2, disable_tqdm=True, use_peft=True, save_strategy="no", **more,
        )  # fmt: skip
        state = finetune(args).model.state_dict()
        return {name: value for name, value in state.items() if name.endswith("e_score_correction_bias")}

    still, moved = biases("a"), biases("b", router_bias_update_rate=0.01)
    assert all(not torch.equal(still[name], moved[name]) for name in still) and len(still) == 8


def test_fp8_training_needs_a_gpu_that_multiplies_it(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(
        app, ["finetune", *required(tmp_path, write_data(tmp_path)), "--fp8", "yes", "--use_cpu"]
    )
    assert result.exit_code == 2 and "FP8" in plain(result.output), result.output


@pytest.mark.parametrize("where", ["along", "none", "only"])
def test_factors_in_mtp_layers(where):
    args = FinetuneArguments(
        model_name_or_path="m", dataset_name="d", output_dir="o", use_peft=True, lora_mtp=where, lora_r=2
    )
    model = apply_lora(AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32), args)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    mtp = [name for name in trained if ".layers.8." in name]  # the demo model has eight main layers
    assert {"along": 0 < len(mtp) < len(trained), "none": not mtp, "only": mtp == trained}[where]
    assert any("experts" in name for name in trained) and any("o_proj" in name for name in trained)
    assert any("eh_proj" in name for name in trained) == (where == "only")
    if where == "none":
        args.lora_target_modules = ["o_proj", "nowhere"]
        with pytest.raises(ValueError, match="'nowhere' matches no module"):
            apply_lora(AutoModelForCausalLM.from_pretrained(DEMO_MODEL), args)


def test_all_linear_modules_are_those_that_peft_would_take_but_heads_and_routers():
    args = FinetuneArguments(
        model_name_or_path="m", dataset_name="d", output_dir="o", use_peft=True, lora_target_modules="all-linear"
    )
    ours, theirs = (AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32) for _ in range(2))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(target_modules="all-linear"))
    adapted = [
        {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
        for model in (apply_lora(ours, args), theirs)
    ]
    expected = {name for name in adapted[1] if "head" not in name and not name.endswith(".gate")}
    assert adapted[0] == expected and len(expected) > 40


def test_fp8_checkpoints(tmp_path):
    """LoRA trains on block FP8 and merges into it; full fine-tuning says why not."""
    from transformers import AutoTokenizer, FineGrainedFP8Config

    folder, data = tmp_path / "fp8", write_data(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, quantization_config=FineGrainedFP8Config())
    quantized.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    common = dict(model_name_or_path=str(folder), dataset_name=data, max_steps=3, disable_tqdm=True, logging_steps=1,
                  per_device_train_batch_size=4, save_strategy="no")  # fmt: skip
    with pytest.raises(ValueError, match="FP8 weights cannot be trained: pass --use_peft"):
        finetune(FinetuneArguments(output_dir=str(tmp_path / "whole"), **common))
    out = tmp_path / "out"
    result = finetune(
        FinetuneArguments(output_dir=str(out), use_peft=True, merge_adapter=True, learning_rate=1e-2,
                          gradient_checkpointing=True, lr_scheduler_type="constant", **common)
    )  # fmt: skip
    values = [line["main_loss"] for line in result.training.log if "main_loss" in line]
    assert values[-1] < values[0]
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    kinds = {parameter.dtype for parameter in merged.parameters()}
    assert torch.float8_e4m3fn in kinds
    adapted = logits(peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), out)).float()
    original = logits(AutoModelForCausalLM.from_pretrained(folder)).float()
    # Rounding to FP8 loses some of the change, not most of it.
    assert (logits(merged).float() - adapted).norm() < 0.6 * (original - adapted).norm()


def test_starting_anew_leaves_no_old_checkpoints(tmp_path):
    more = dict(model_name_or_path=str(DEMO_MODEL), dataset_name=write_data(tmp_path), output_dir=str(tmp_path / "out"),
                use_peft=True, lora_target_modules=["o_proj"], save_steps=1, disable_tqdm=True)  # fmt: skip
    finetune(FinetuneArguments(max_steps=3, **more))
    finetune(FinetuneArguments(max_steps=1, overwrite_output_dir=True, **more))
    assert [folder.name for folder in list_checkpoints(tmp_path / "out")] == ["checkpoint-1"]


@pytest.mark.parametrize("anew", [True, False])
def test_a_result_takes_the_place_of_another_one(tmp_path, anew):
    """Tokenizers may have a folder of templates, which no rename puts over another; weights of before go, if asked."""
    out, staging = tmp_path / "out", tmp_path / "out" / ".result.tmp"
    old = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "merged/config.json"]
    new = ["adapter_config.json", "adapter_model.safetensors", "additional_chat_templates/tool.jinja"]
    for folder, names in ((out, [*old, new[-1], "notes.txt"]), (staging, new)):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(str(folder))
    put_in_place(staging, out, anew)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {*new, "notes.txt", *([] if anew else old)}
    assert all((out / name).read_text() == str(staging) for name in new)


def test_upload(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(token)

        def create_repo(self, name, private=None, exist_ok=False):
            calls.append((name, private, exist_ok))
            return type("Repo", (), {"repo_id": f"me/{name}"})

        def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
            kept = huggingface_hub.utils.filter_repo_objects(
                [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()],
                ignore_patterns=ignore_patterns,
            )
            calls.append((repo_id, sorted(kept)))
            return "https://hub/me/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    load_model = run_module.load_model
    monkeypatch.setattr(
        run_module, "load_model", lambda *given, **more: calls.append("model") or load_model(*given, **more)
    )
    result = finetune(
        FinetuneArguments(
            model_name_or_path=str(DEMO_MODEL), dataset_name=write_data(tmp_path), output_dir=str(tmp_path / "mine"),
            max_steps=2, per_device_train_batch_size=1, use_peft=True, push_to_hub=True, hub_token="t", save_steps=1,
            report_to=["tensorboard"], logging_dir=str(tmp_path / "mine" / "board"), hub_private_repo=True,
            disable_tqdm=True, lora_target_modules=["o_proj"],
        )
    )  # fmt: skip
    assert result.commit == "https://hub/me/commit"
    # A token without the right to make a repository is known before the training.
    assert calls[:-1] == ["t", ("mine", True, True), "model", "t"]
    repository, files = calls[-1]
    assert repository == "me/mine" and "adapter_model.safetensors" in files and "README.md" in files
    assert not any("checkpoint" in name or name.startswith(("runs", "board")) for name in files)
    assert list((tmp_path / "mine" / "board").rglob("*tfevents*"))


def test_example_for_accelerate(tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "examples" / "finetune_lora.py"
    spec = importlib.util.spec_from_file_location("finetune_lora", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    more = ["--max_steps", "1", "--disable_tqdm", "--lora_target_modules", "o_proj", "--save_strategy", "no"]
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", *required(tmp_path, write_data(tmp_path)), *more])
    module.main()
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", "--max_steps", "x"])
    with pytest.raises(SystemExit, match="finetune_lora.py: argument --max_steps"):
        module.main()


def test_a_log_without_losses_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="no loss to draw"):
        draw_losses([{"step": 1}], tmp_path / "a.png")


def test_worked_example(tmp_path, monkeypatch, capsys):
    """The whole of it on a few lines: before, two steps, after, merged, in FP8 and drafted."""
    path = Path(__file__).parents[2] / "examples" / "finetune_demo.py"
    spec = importlib.util.spec_from_file_location("finetune_demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train, held_out = module.write_corpus(tmp_path / "corpus")
    packages = [{json.loads(line)["package"] for line in file.read_text().splitlines()} for file in (train, held_out)]
    assert len(packages[0]) > len(packages[1]) > 0 and not packages[0] & packages[1]
    small = Path(write_data(tmp_path))
    monkeypatch.setattr(module, "write_corpus", lambda folder: (small, small))
    monkeypatch.setattr(module, "PROMPTS", module.PROMPTS[:1])
    out = tmp_path / "prose"
    words = ["--output_dir", str(out), "--max_steps", "2", "--warmup_steps", "0", "--disable_tqdm"]
    monkeypatch.setattr(sys, "argv", ["finetune_demo.py", *words])
    module.main()
    result = json.loads((out / "result.json").read_text())
    assert result["training"]["steps"] == 2 and result["training"]["trained_parameters"] == 442_368
    assert result["after"]["bits_per_byte"] < result["before"]["bits_per_byte"]
    assert result["after_fp8"]["bits_per_byte"] < result["before"]["bits_per_byte"]
    assert result["after"]["greedy_with_mtp_is_greedy"] and result["after_fp8"]["greedy_with_mtp_is_greedy"]
    assert str(tmp_path) not in (out / "result.json").read_text()
