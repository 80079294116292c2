"""Our models under the trainers of others: Transformers' `Trainer` and TRL's `SFTTrainer`, with LoRA on the experts."""

import pytest
import torch
from tiny import tiny_model
from tiny_step3 import text_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_moe.demo import DEMO_MODEL
from hf_moe.models import modeling_causal_lm
from hf_moe.training.data import IGNORE_INDEX

peft = pytest.importorskip("peft")


def lora_config(**more):
    return peft.LoraConfig(
        r=4,
        target_modules=["o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
        **more,
    )


def rows(count: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    result = []
    for length in range(4, 4 + count):
        ids = torch.randint(3, 60, (length,), generator=generator)
        result.append({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)})
    return result


def pad(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    fill = {"input_ids": 0, "labels": IGNORE_INDEX, "attention_mask": 0}
    return {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)
        for name, value in fill.items()
    }


def changed(before: dict[str, torch.Tensor], model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)]


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash"])
def test_trainer_with_lora_on_experts(tmp_path, family):
    model = peft.get_peft_model(tiny_model(family), lora_config(lora_dropout=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    args = TrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        learning_rate=1e-2, logging_steps=1, use_cpu=True, save_strategy="steps", save_steps=3, disable_tqdm=True,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows(), data_collator=pad)
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    moved = changed(before, model)
    assert moved and all("lora_" in name for name in moved)
    for part in ("experts.base_layer.lora_B", "experts.lora_B", "experts.lora_A", "o_proj.lora_B"):
        assert any(part in name for name in moved), part
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").is_file()


def test_trainer_normalises_by_the_targets_of_a_whole_step(tmp_path):
    """Accumulated or at once: the same losses and gradients, for rows of unequal length."""

    def losses(batch_size: int, accumulation: int):
        args = TrainingArguments(
            output_dir=tmp_path, max_steps=2, per_device_train_batch_size=batch_size, report_to=[], use_cpu=True,
            gradient_accumulation_steps=accumulation, logging_steps=1, save_strategy="no", disable_tqdm=True,
            learning_rate=1e-4,
        )  # fmt: skip
        trainer = Trainer(tiny_model(), args, train_dataset=rows(), data_collator=pad)
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    for one, other in zip(losses(4, 1), losses(1, 4)):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_with_lora_on_experts(tmp_path, packing):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    data = Dataset.from_list([{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(30)])
    args = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", disable_tqdm=True, max_length=32, packing=packing,
        gradient_checkpointing=packing, bf16=False, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args=args, train_dataset=data, peft_config=lora_config(),
        processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
    )  # fmt: skip
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    moved = changed(before, trainer.model)
    assert moved and all("lora_" in name for name in moved)
    assert any("experts.lora_B" in name for name in moved) and any("o_proj.lora_B" in name for name in moved)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.parametrize("family", ["deepseek_v3", "longcat_flash", "step3_text"])
def test_trainer_predicts_logits_alone(tmp_path, family):
    """What `compute_metrics` gets is one array, as of every other model, and not our other losses beside it."""
    model = text_model() if family == "step3_text" else tiny_model(family)
    args = TrainingArguments(output_dir=tmp_path, per_device_eval_batch_size=4, use_cpu=True, disable_tqdm=True)
    seen = []
    trainer = Trainer(model, args, data_collator=pad, compute_metrics=lambda given: seen.append(given) or {"n": 1})
    result = trainer.predict(rows(6))
    assert result.predictions.shape == (6, 9, 101) == seen[0].predictions.shape
    assert result.metrics["test_loss"] > 0


@pytest.mark.parametrize(
    ("family", "said", "unsaid"),
    [("deepseek_v3", "the MTP layers learn nothing", "not shifted"), ("step3", "targets are not shifted", "MTP")],
)
def test_what_label_smoothing_leaves_out_is_said(tmp_path, family, said, unsaid, monkeypatch):
    """`Trainer` keeps the labels to itself then, and shifts them for class names of Transformers alone."""
    messages = []
    monkeypatch.setattr(modeling_causal_lm.logger, "warning_once", messages.append)
    model = text_model() if family == "step3" else tiny_model(family)
    for factor in (0.0, 0.1):
        messages.clear()
        args = TrainingArguments(
            output_dir=tmp_path, max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, label_smoothing_factor=factor,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows(4), data_collator=pad).train()
        assert [said in message and unsaid not in message for message in messages] == [True] * bool(factor)
