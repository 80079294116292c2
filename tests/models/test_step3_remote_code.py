"""Step3's remote code, text and vision, where hf_moe is not installed: the environment is that of test_remote_code."""

import shutil

import pytest
import torch
from checkpoints import LOGITS_ATOL, assert_same_tensors, golden, read_config, read_tensors
from test_remote_code import MODELS, closure, interpreter, run_isolated  # noqa: F401  a fixture among them
from tiny_step3 import processor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

ENTRIES = {
    "step3_text": ("configuration_step3_text", "modeling_step3_text"),
    "step3_vl": (
        "configuration_step3_vl",
        "modeling_step3_vl",
        "processing_step3_vl",
        "image_processing_step3_vl",
    ),
}

USE = """
import json
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
)
folder, expected, again = sys.argv[1:4]
want = load_file(expected)
remote = {"trust_remote_code": True, "dtype": torch.float32}
padding = want["attention_mask"].bool().logical_not().unsqueeze(-1)
names = ("input_ids", "attention_mask", "pixel_values", "patch_pixel_values", "num_patches", "patch_newline_mask")
inputs = {name: want[name] for name in names if name in want}
vision = "pixel_values" in want

def difference(actual, wanted):
    return (actual.double() - wanted.double()).abs().max().item()

out = {}
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
auto_class = AutoModelForImageTextToText if vision else AutoModelForCausalLM
model, info = auto_class.from_pretrained(folder, output_loading_info=True, **remote)
model.eval()
out["modules"] = [type(config).__module__, type(model).__module__]
out["info"] = {key: sorted(map(str, value)) for key, value in info.items()}
with torch.no_grad():
    out["logits"] = difference(model(**inputs).logits.masked_fill(padding, 0.0), want["logits"])
generated = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=1)
out["greedy"] = torch.equal(generated[:, want["input_ids"].shape[1] :], want["generated_ids"])
model.save_pretrained(again)
copy = auto_class.from_pretrained(again, **remote).eval()
base = AutoModel.from_pretrained(folder, **remote).eval()
with torch.no_grad():
    out["logits_again"] = difference(copy(**inputs).logits.masked_fill(padding, 0.0), want["logits"])
    out["states"] = difference(
        base(**inputs).last_hidden_state.masked_fill(padding, 0.0), want["last_hidden_state"]
    )
if vision:
    from PIL import Image
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    out["processors"] = [type(processor).__module__, type(image_processor).__module__]
    batch = processor(images=Image.new("RGB", (100, 40), (9, 99, 200)), text="a<im_patch>", return_tensors="pt")
    out["shapes"] = [list(batch["pixel_values"].shape), list(batch["patch_pixel_values"].shape)]
    processor.save_pretrained(again)
    out["template"] = processor.apply_chat_template([{"role": "user", "content": "x"}])
    text, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **remote)
    out["text"] = [type(text).__module__, type(text).__name__, any(info.values())]
    text.save_pretrained(again + "_text")
    loaded = AutoModelForCausalLM.from_pretrained(again + "_text", **remote)
    out["text_again"] = type(loaded).__module__
print(json.dumps(out))
"""


@pytest.fixture(scope="module", params=ENTRIES)
def used(request, interpreter, tmp_path_factory):  # noqa: F811
    """(model type, saved folder, folder saved without hf_moe, what a process without hf_moe saw)."""
    case = request.param
    root = tmp_path_factory.mktemp(case)
    auto_class = AutoModelForCausalLM if case == "step3_text" else AutoModelForImageTextToText
    auto_class.from_pretrained(golden(case), dtype=torch.float32).save_pretrained(
        root / "saved", max_shard_size="300KB"
    )
    if case == "step3_vl":
        processor().save_pretrained(root / "saved")
    shutil.move(root / "saved", root / "model")
    (root / "cache").mkdir()
    expected = golden(case) / "expected.safetensors"
    seen = run_isolated(interpreter, root / "cache", USE, root / "model", expected, root / "again")
    return case, root / "model", root / "again", seen


def test_shipped_code_is_the_import_closure(used):
    case, folder, again, _ = used
    wanted = closure(*ENTRIES[case])
    for place in (folder, again):
        assert {path.name for path in place.glob("*.py")} == wanted
        for name in wanted:
            assert (place / name).read_bytes() == (MODELS / name).read_bytes(), name
    assert not any("deepseek" in name or "mtp" in name or "layer_mla" in name for name in wanted)
    assert not (case == "step3_text" and any("vl" in name for name in wanted))


def test_remote_code_gives_the_expected_values(used):
    case, _, _, seen = used
    assert all(module.startswith("transformers_modules.") for module in seen["modules"])
    assert not any(seen["info"].values()), seen["info"]
    assert seen["logits"] < LOGITS_ATOL and seen["states"] < LOGITS_ATOL and seen["logits_again"] < LOGITS_ATOL
    assert seen["greedy"] is True


def test_processors_and_text_only_use(used):
    case, _, again, seen = used
    if case == "step3_text":
        return
    assert all(module.startswith("transformers_modules.") for module in seen["processors"])
    assert seen["shapes"][0] == [1, 3, 48, 48] and seen["shapes"][1][1:] == [3, 32, 32]
    assert seen["template"] == "<s> You are a helpful assistant. <|BOT|>user\n x <|EOT|>"
    assert seen["text"][0].startswith("transformers_modules.") and seen["text"][1:] == ["Step3TextForCausalLM", False]
    assert seen["text_again"].startswith("transformers_modules.")
    text = again.with_name("again_text")
    assert read_config(text)["model_type"] == "step3_text"
    assert {path.name for path in text.glob("*.py")} == closure(*ENTRIES["step3_text"])


def test_saving_from_remote_code(used):
    _, folder, again, _ = used
    assert_same_tensors(read_tensors(again), read_tensors(folder))
    before, after = read_config(folder), read_config(again)
    maps = [
        {key.split("--")[-1]: value.split("--")[-1] for key, value in config.pop("auto_map").items()}
        for config in (before, after)
    ]
    assert maps[0] == maps[1] and before == after
