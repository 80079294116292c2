"""Step3 with vision: goldens and traps, files, text-only use, batches, generation, pipeline, training, bad input."""

import copy
import functools

import pytest
import torch
from checkpoints import (
    REPOSITORY,
    assert_same_bits,
    assert_same_tensors,
    decode_fp8,
    edited_golden,
    golden,
    max_difference,
    quantise_fp8,
    read_config,
    read_tensors,
    run_python,
    write_checkpoint,
)
from PIL import Image
from testing import assert_close, assert_golden, load_golden
from tiny import random_ids
from tiny_step3 import PIXELS, processor, tokenizer, vl_config, vl_model
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    FineGrainedFP8Config,
    GenerationConfig,
    pipeline,
)

from hf_moe.models import modeling_step3_vl
from hf_moe.models.configuration_step3_vl import Step3VLConfig
from hf_moe.models.modeling_step3_text import Step3TextForCausalLM
from hf_moe.models.modeling_step3_vl import Step3VLForConditionalGeneration, Step3VLModel
from hf_moe.models.weights_safetensors import CheckpointError


@functools.cache
def load(implementation: str = "sdpa"):
    model = AutoModelForImageTextToText.from_pretrained(
        golden("step3_vl"), dtype=torch.float32, attn_implementation=implementation
    ).eval()
    assert type(model) is Step3VLForConditionalGeneration
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model


def inputs_of(expected) -> dict[str, torch.Tensor]:
    return {name: expected[name] for name in ("input_ids", "attention_mask", *PIXELS)}


def logits_of(model, expected) -> torch.Tensor:
    with torch.no_grad():
        logits = model(**inputs_of(expected)).logits
    return logits.masked_fill(expected["attention_mask"].bool().logical_not().unsqueeze(-1), 0.0)


def logits_error(model) -> float:
    expected = load_golden("step3_vl")[0]
    return max_difference(logits_of(model, expected), expected["logits"])


# --- golden -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_golden(implementation):
    model, expected = load(implementation), load_golden("step3_vl")[0]
    routes = []
    handles = [
        layer.moe.gate.register_forward_hook(lambda _, __, output: routes.append(output[1:]))
        for layer in model.model.language_model.layers
        if layer.is_moe
    ]
    with torch.no_grad():
        output = model(**inputs_of(expected), labels=expected["labels"], output_hidden_states=True)
        tower = model.model.vision_model
        whole = tower(expected["pixel_values"]).last_hidden_state
        crops = tower(expected["patch_pixel_values"]).last_hidden_state
        features = model.get_image_features(*[expected[name] for name in PIXELS[:3]]).pooler_output
    for handle in handles:
        handle.remove()
    real = expected["attention_mask"].bool()
    padding = real.logical_not().unsqueeze(-1)
    assert_golden("features", output.image_hidden_states, expected["image_features"], "logits")
    assert [len(feature) for feature in features] == [9, 21]
    assert torch.equal(torch.cat(features), output.image_hidden_states)
    assert_golden("tower, whole", whole, expected["vision_hidden_full"], "logits")
    assert_golden("tower, crops", crops, expected["vision_hidden_crops"], "logits")
    assert_golden("logits", output.logits.masked_fill(padding, 0.0), expected["logits"], "logits")
    last = output.hidden_states[-1].masked_fill(padding, 0.0)
    assert_golden("last_hidden_state", last, expected["last_hidden_state"], "last_hidden_state")
    assert_golden("loss", output.loss.view(1), expected["loss"], "loss")
    assert len(routes) == 2
    for layer, (weights, indices) in enumerate(routes):
        weights, order = weights.view(*real.shape, -1)[real].sort(-1, descending=True)
        ids = indices.view(*real.shape, -1)[real].gather(-1, order)
        assert torch.equal(ids.sort(-1).values, expected["topk_indices"][layer][real].sort(-1).values)
        assert_golden("router", weights, expected["topk_weights"][layer][real], "router_weights")


@pytest.mark.parametrize(
    "ways",
    [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["dynamic", "no_cache", "static"],
)
def test_greedy(ways):
    model, expected = load(), load_golden("step3_vl")[0]
    generated = model.generate(**inputs_of(expected), max_new_tokens=32, do_sample=False, **ways)
    assert torch.equal(generated[:, expected["input_ids"].shape[1] :], expected["generated_ids"])


@pytest.mark.parametrize("finished", [True, False], ids=["features", "pixels"])
def test_greedy_from_embeddings(finished):
    model, expected = load(), load_golden("step3_vl")[0]
    embeds = model.get_input_embeddings()(expected["input_ids"]).detach()
    images = {"image_embeds": expected["image_features"]} if finished else {name: expected[name] for name in PIXELS}
    inputs = {"inputs_embeds": embeds, "attention_mask": expected["attention_mask"], **images}
    generated = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert torch.equal(generated, expected["generated_ids"])
    beams = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    from_ids = model.generate(expected["input_ids"], attention_mask=expected["attention_mask"], **images, **beams)
    assert torch.equal(model.generate(**inputs, **beams), from_ids[:, expected["input_ids"].shape[1] :])


def test_finished_features_instead_of_pixels():
    model, expected = load(), load_golden("step3_vl")[0]
    text = {name: expected[name] for name in ("input_ids", "attention_mask")}
    embeds = model.get_input_embeddings()(expected["input_ids"]).detach()
    pixels = {name: expected[name] for name in PIXELS}
    with torch.no_grad():
        wanted = model(**inputs_of(expected)).logits
        by_features = model(**text, image_embeds=expected["image_features"]).logits
        by_embeds = model(inputs_embeds=embeds, attention_mask=text["attention_mask"], **pixels).logits
    assert_close("image_embeds", by_features, wanted, "float32")
    assert_close("inputs_embeds", by_embeds, wanted, "float32")


def test_trap_one_class_token_instead_of_four(monkeypatch):
    monkeypatch.setattr(modeling_step3_vl, "CLASS_TOKENS", 1)
    assert logits_error(load()) > 0.5


def test_trap_positions_resized_without_antialias(monkeypatch):
    plain = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda *args, **kwargs: plain(*args, **{**kwargs, "antialias": False}))
    assert logits_error(load()) > 0.5


def test_trap_plain_gelu():
    model = copy.deepcopy(load())
    for layer in model.model.vision_model.transformer.layers:
        layer.mlp.act_fn = torch.nn.GELU()
    assert logits_error(model) > 0.05


def test_trap_the_towers_epsilon_is_read():
    model = copy.deepcopy(load())
    for layer in model.model.vision_model.transformer.layers:
        assert layer.layer_norm1.eps == layer.layer_norm2.eps == 1e-3
        layer.layer_norm1.eps = layer.layer_norm2.eps = 1e-6
    assert logits_error(model) > 1e-3


def test_trap_the_whole_view_stands_behind_its_crops():
    model, expected = load(), load_golden("step3_vl")[0]
    features = expected["image_features"]
    swapped = torch.cat((features[:9], features[21:], features[9:21]))  # the second image: whole view first
    with torch.no_grad():
        ids, mask = expected["input_ids"], expected["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask, image_embeds=swapped).logits
    assert (logits - logits_of(model, expected)).abs().max() > 0.5


def test_trap_downsampler_prefixes_overlap(tmp_path):
    """`vit_downsampler` begins the name of `vit_downsampler2`: both come and go under their own."""
    load().save_pretrained(tmp_path)
    names = {name for name in read_tensors(tmp_path) if name.startswith("vit_down")}
    assert names == {f"vit_downsampler{number}.{kind}" for number in ("", "2") for kind in ("weight", "bias")}


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_is_bitwise_under_upstream_names(shards, tmp_path):
    folder = edited_golden(tmp_path / "upstream", "step3_vl", shards=shards)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path / "again", max_shard_size="200KB" if shards > 1 else "5GB")
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(golden("step3_vl")))


def test_config_is_written_back_key_for_key(tmp_path):
    upstream = read_config(golden("step3_vl"))
    AutoConfig.from_pretrained(golden("step3_vl")).save_pretrained(tmp_path)
    output = read_config(tmp_path)

    def check(wanted, got, where):
        for key, value in wanted.items():
            if isinstance(value, dict):
                check(value, got[key], f"{where}.{key}")
            else:
                assert got.get(key, "absent") == value and type(got[key]) is type(value), f"{where}.{key}"

    check(upstream, output, "config")
    noise = {"id2label", "_attn_implementation", "return_dict", "auto_map", "transformers_version"}
    assert not noise & (set(output["text_config"]) | set(output["vision_config"]))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "second")
    assert read_config(tmp_path / "second") == output


def test_published_sizes():
    config = Step3VLConfig(understand_projector_stride=2, projector_bias=False)
    assert config.image_tokens(728) == 169 and config.image_tokens(504) == 81
    with torch.device("meta"):
        model = Step3VLForConditionalGeneration(config)
    text = sum(p.numel() for p in model.model.language_model.parameters()) + model.lm_head.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    assert (text, total) == (316294538240, 320969912832)


def test_absent_keys_and_parts():
    config = Step3VLConfig()
    assert config.image_token_id == 128001 and config.understand_projector_stride == 1 and config.projector_bias is True
    assert config.vision_config.intermediate_size == 15360 and config.text_config.num_hidden_layers == 61
    assert vl_model(projector_bias=True).model.vit_large_projector.bias is not None
    assert vl_model(projector_bias=False).model.vit_large_projector.bias is None


def test_the_class_of_multimodal_models_is_the_same():
    """What Transformers' pipeline of any modality and its server ask for."""
    model = AutoModelForMultimodalLM.from_pretrained(golden("step3_vl"))
    assert type(model) is Step3VLForConditionalGeneration and type(model)._auto_class == "AutoModelForImageTextToText"


def test_key_mapping_of_the_model_card():
    """The published card moves the prefixes itself: that must not move them twice."""
    expected = load_golden("step3_vl")[0]
    mapping = {
        r"^vision_model\.": "model.vision_model.",
        r"^vit_downsampler\.": "model.vit_downsampler.",
        r"^vit_downsampler2\.": "model.vit_downsampler2.",
        r"^vit_large_projector\.": "model.vit_large_projector.",
        r"^model\.(?!language_model|vision_model|vit_)": "model.language_model.",
    }
    model = AutoModelForImageTextToText.from_pretrained(golden("step3_vl"), key_mapping=mapping, dtype=torch.float32)
    assert max_difference(logits_of(model.eval(), expected), expected["logits"]) < 1e-4


def test_base_model_and_other_layouts_of_names(tmp_path):
    model = load()
    base = AutoModel.from_pretrained(golden("step3_vl"), dtype=torch.float32)
    assert type(base) is Step3VLModel
    assert_same_tensors(base.state_dict(), model.model.state_dict())
    base.save_pretrained(tmp_path / "base")
    upstream = read_tensors(golden("step3_vl"))
    wanted = {name: tensor.float() for name, tensor in upstream.items() if name != "lm_head.weight"}
    assert_same_tensors(read_tensors(tmp_path / "base"), wanted)
    model.model.save_pretrained(tmp_path / "part")  # was never loaded by itself
    assert_same_tensors(read_tensors(tmp_path / "part"), wanted)
    again, info = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float32, output_loading_info=True)
    assert type(again) is Step3VLModel and not any(info.values()), info
    assert_same_tensors(again.state_dict(), base.state_dict())
    from_base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert_same_tensors(from_base.model.state_dict(), base.state_dict())
    model.save_pretrained(tmp_path / "native", save_original_format=False)
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "native", dtype=torch.float32)
    assert_same_tensors(native.state_dict(), model.state_dict())


@pytest.mark.parametrize("door", [AutoModelForCausalLM, Step3TextForCausalLM], ids=lambda door: door.__name__)
def test_text_only_leaves_the_tower_in_the_file(door, tmp_path, monkeypatch):
    """Nothing of the tower is built, read or reported, and the copy is a text checkpoint."""
    from hf_moe.models.weights_safetensors import TensorEntry

    read = []
    plain = TensorEntry.read_into
    monkeypatch.setattr(TensorEntry, "read_into", lambda self, target: (read.append(self.name), plain(self, target)))
    model, info = door.from_pretrained(golden("step3_vl"), dtype=torch.float32, output_loading_info=True)
    assert type(model) is Step3TextForCausalLM and not any(info.values())
    assert read and not [name for name in read if name.startswith(("vision_model", "vit_"))]
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert_close("logits", model(ids).logits, load()(ids).logits, "float32")
    model.save_pretrained(tmp_path)
    assert read_config(tmp_path)["model_type"] == "step3_text"
    upstream = read_tensors(golden("step3_vl"))
    wanted = {name: tensor.float() for name, tensor in upstream.items() if name.startswith(("model.", "lm_head"))}
    assert_same_tensors(read_tensors(tmp_path), wanted)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is Step3TextForCausalLM


@pytest.mark.parametrize("place", ["outer", "text"])
@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForCausalLM], ids=["vision", "text"])
def test_fp8_with_vision(auto_class, place, tmp_path):
    """The published FP8 file quantises the text's linears; where its configuration says so is not known for certain."""
    tensors = read_tensors(golden("step3_vl"))
    linears = ("q_proj", "wq", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name in [name for name in tensors if name.startswith("model.") and name.split(".")[-2] in linears]:
        matrices = tensors[name].float()
        stack = matrices if matrices.dim() == 3 else matrices[None]
        pairs = [quantise_fp8(matrix) for matrix in stack]
        weight, scale = (
            torch.stack([pair[i].view(torch.uint8) if i == 0 else pair[i] for pair in pairs]) for i in (0, 1)
        )
        weight = weight.view(torch.float8_e4m3fn)
        tensors[name] = weight if matrices.dim() == 3 else weight[0]
        tensors[f"{name}_scale_inv"] = scale if matrices.dim() == 3 else scale[0]
    config = read_config(golden("step3_vl"))
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (config if place == "outer" else config["text_config"])["quantization_config"] = quantisation
    folder = write_checkpoint(tmp_path / "fp8", config, tensors)
    vision = auto_class is AutoModelForImageTextToText
    kept = auto_class.from_pretrained(folder, dtype=torch.float32)
    experts = kept.base_model.language_model.layers[1].moe.experts if vision else kept.model.layers[1].moe.experts
    assert experts.gate_up_proj.dtype == experts.down_proj.dtype == torch.float8_e4m3fn
    plain = {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name}_scale_inv")
        if scales is None:
            plain |= {} if name.endswith("scale_inv") else {name: tensor}
        elif tensor.dim() == 3:
            plain[name] = torch.stack([decode_fp8(*pair) for pair in zip(tensor, scales)]).float()
        else:
            plain[name] = decode_fp8(tensor, scales).float()
    without = copy.deepcopy(config)
    for part in (without, without["text_config"]):
        part.pop("quantization_config", None)
    other = auto_class.from_pretrained(write_checkpoint(tmp_path / "plain", without, plain), dtype=torch.float32)
    decoded = auto_class.from_pretrained(folder, dtype=torch.float32, dequantize=True)
    assert_same_tensors(decoded.state_dict(), other.state_dict())
    request = FineGrainedFP8Config(dequantize=True)  # about the format, which may stand in the text's configuration
    asked = auto_class.from_pretrained(folder, dtype=torch.float32, quantization_config=request)
    assert_same_tensors(asked.state_dict(), other.state_dict())
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert_close("logits", kept.eval()(ids).logits, other.eval()(ids).logits, "float32")
    kept.save_pretrained(tmp_path / "kept")
    written = read_config(tmp_path / "kept")
    if vision:
        part = written if place == "outer" else written["text_config"]
        assert part["quantization_config"] == quantisation
        part.pop("quantization_config")
        assert "quantization_config" not in written and "quantization_config" not in written["text_config"]
    else:
        assert written["quantization_config"] == quantisation
    fp8 = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers") and "norm" not in name}
    saved = read_tensors(tmp_path / "kept")
    for name in (name for name in fp8 if f"{name}_scale_inv" in fp8 or name.endswith("scale_inv")):
        assert_same_bits(name, saved[name], fp8[name])
    if vision:  # without a head: the same tensors but for it
        AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path / "base")
        assert_same_tensors(read_tensors(tmp_path / "base"), {key: saved[key] for key in saved if "lm_head" not in key})
    decoded.save_pretrained(tmp_path / "decoded")
    written = read_config(tmp_path / "decoded")
    assert "quantization_config" not in written and "quantization_config" not in written.get("text_config", {})


@pytest.mark.parametrize("name", ["model.layers.1.moe.up_proj.weight", "model.layers.2.moe.down_proj.weight"])
def test_missing_experts_are_an_error(name, tmp_path):
    folder = edited_golden(tmp_path, "step3_vl", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match="moe_num_experts=6"):
        AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize("name", ["vit_downsampler.weight", "vision_model.embeddings.position_embedding.weight"])
def test_wrong_shape_in_the_vision_part(name, tmp_path):
    def cut(tensors):
        tensors[name] = tensors[name][:-1]

    with pytest.raises(CheckpointError, match=name):
        AutoModelForImageTextToText.from_pretrained(edited_golden(tmp_path, "step3_vl", cut))


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map(device_map):
    expected = load_golden("step3_vl")[0]
    model = AutoModelForImageTextToText.from_pretrained(
        golden("step3_vl"), dtype=torch.float32, device_map=device_map
    ).eval()
    assert max_difference(logits_of(model, expected), expected["logits"]) < 1e-4


# --- batches and generation -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny():
    model = vl_model()
    model.generation_config = GenerationConfig(bos_token_id=0, pad_token_id=2, max_new_tokens=6, do_sample=False)
    return model


def pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(100, 40), (20, 20), (60, 90)]
    noise = [torch.randint(0, 256, (height, width, 3), generator=generator).to(torch.uint8) for width, height in sizes]
    return [Image.frombytes("RGB", size, data.numpy().tobytes()) for size, data in zip(sizes, noise)]


def test_rows_of_a_batch_are_as_alone(tiny):
    a, b, c = pictures()
    build = processor()
    texts, images = ["<im_patch> or <im_patch>?", "no picture", "<im_patch> !"], [[a, b], [], [c]]
    batch = build(images=images, text=texts, padding=True, return_tensors="pt")
    together = tiny.generate(**batch)[:, -6:]
    assert len({tuple(row) for row in together.tolist()}) == 3
    for row, (text, own) in enumerate(zip(texts, images)):
        alone = build(images=own or None, text=text, return_tensors="pt")
        alone = {name: value if value.dim() > 1 or name in PIXELS else value[None] for name, value in alone.items()}
        assert torch.equal(tiny.generate(**alone)[0, -6:], together[row]), text


@pytest.mark.parametrize("ways", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}])
def test_beams_keep_their_images(tiny, ways):
    """Rows with different numbers of images and crops: every beam needs the images of its own row."""
    a, b, c = pictures()
    build = processor()
    texts, images = ["<im_patch> or <im_patch>?", "<im_patch> !", "none"], [[a, b], [c], []]
    batch = build(images=images, text=texts, padding=True, return_tensors="pt")
    together = tiny.generate(**batch, **ways)[:, -6:]
    count = ways.get("num_return_sequences", 1)
    for row, (text, own) in enumerate(zip(texts, images)):
        alone = tiny.generate(**build(images=own or None, text=[text], return_tensors="pt"), **ways)[:, -6:]
        assert torch.equal(alone, together[row * count : (row + 1) * count]), text
    features = torch.cat(tiny.get_image_features(*[batch[name] for name in PIXELS[:3]]).pooler_output).detach()
    text_only = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(tiny.generate(**text_only, image_embeds=features, **ways)[:, -6:], together)


def test_several_turns_on_one_cache(tiny):
    batch = processor()(images=[pictures()[0]], text=["<im_patch> what"], return_tensors="pt")
    first = tiny.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    mask = torch.ones_like(first.sequences)
    rest = tiny.generate(first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=3)
    assert torch.equal(rest, tiny.generate(**batch))


def test_pipeline(tiny, tmp_path):
    build = processor()
    tiny.save_pretrained(tmp_path)
    build.save_pretrained(tmp_path)
    image = pictures()[0]
    image.save(tmp_path / "a.png")
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "url": str(tmp_path / "a.png")}, {"type": "text", "text": "What?"}],
        }
    ]
    generate = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    assert type(generate.model) is Step3VLForConditionalGeneration
    answer = generate(text=messages, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
    prompt = build.apply_chat_template(messages, add_generation_prompt=True)
    inputs = build(images=[image], text=[prompt], return_tensors="pt", add_special_tokens=False)
    expected = tiny.generate(**inputs, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    assert answer == build.decode(expected, skip_special_tokens=True) and answer
    several = generate(
        text=["<im_patch> a", "b <im_patch> <im_patch>"],
        images=[[image], [image, pictures()[1]]],
        batch_size=2,
        max_new_tokens=3,
        return_full_text=False,
    )
    assert len(several) == 2


# --- training and switches --------------------------------------------------------------------------------------------


def test_every_parameter_learns_with_checkpointing_too():
    model = vl_model().train()
    batch = processor()(images=pictures(), text=["<im_patch> <im_patch> a", "b <im_patch>"], padding=True)
    batch = batch.convert_to_tensors("pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        results.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in results[0].items():
        assert gradient.isfinite().all() and gradient.any(), name
        assert_close(name, results[1][name], gradient, "float32")


def test_attention_of_the_parts_can_differ():
    model = AutoModelForImageTextToText.from_pretrained(
        golden("step3_vl"), attn_implementation={"text_config": "eager", "vision_config": "sdpa"}, dtype=torch.float32
    )
    assert model.config.text_config._attn_implementation == "eager"
    assert model.model.vision_model.config._attn_implementation == "sdpa"
    model.set_experts_implementation("eager")
    assert model.config.text_config._experts_implementation == "eager"
    assert logits_error(model.eval()) < 1e-4


def test_bfloat16():
    expected = load_golden("step3_vl")[0]
    model = AutoModelForImageTextToText.from_pretrained(golden("step3_vl")).eval()
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        output = model(**inputs_of(expected))
    assert output.logits.dtype == torch.bfloat16
    assert output.image_hidden_states.dtype == torch.bfloat16
    error = (output.image_hidden_states.float() - expected["image_features"]).norm() / expected["image_features"].norm()
    assert error < 0.05


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda i: i.update(num_patches=torch.tensor([0, 2])), ["num_patches=[0, 2]", "2 images", "3 crops"]),
        (lambda i: i.update(num_patches=torch.tensor([3])), ["num_patches=[3]", "2 images"]),
        (lambda i: i.update(num_patches=torch.tensor([4, -1])), ["num_patches=[4, -1]"]),
        (lambda i: i.pop("num_patches"), ["num_patches", "3 crops"]),
        (lambda i: i.update(patch_pixel_values=i["patch_pixel_values"][:2]), ["num_patches=[0, 3]", "2 crops"]),
        (lambda i: i.pop("pixel_values"), ["patch_pixel_values", "pixel_values"]),
        (lambda i: i.update(input_ids=i["input_ids"].masked_fill(i["input_ids"] == 150, 3)), ["0 image placeholders"]),
        (lambda i: i.update(input_ids=i["input_ids"].clone().index_fill_(1, torch.tensor([37]), 150)), ["32", "30"]),
        (lambda i: i.update(image_embeds=torch.zeros(30, 96)), ["pixel_values", "image_embeds"]),
        (lambda i: i.update(pixel_values=i["pixel_values"][:, :, :40]), ["(2, 3, 40, 48)", "size"]),
        (lambda i: i.update(pixel_values=i["pixel_values"][:, :, :46, :46]), ["(2, 3, 46, 46)", "patch_size=4"]),
        (lambda i: i.update(input_ids=i["input_ids"] + 100), ["160 entries"]),
    ],
)
def test_inputs_that_contradict_each_other(change, named):
    inputs = inputs_of(load_golden("step3_vl")[0])
    change(inputs)
    with torch.no_grad(), pytest.raises((ValueError, IndexError)) as caught:
        load()(**inputs)
    for word in named:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("part", "keys", "named"),
    [
        ("text", {"num_attention_groups": 4}, "num_attention_groups=4"),
        ("text", {"moe_layers_enum": "1;2"}, "1;2"),
        ("vision", {"patch_size": 5}, "patch_size=5"),
        ("vision", {"num_attention_heads": 5}, "num_attention_heads=5"),
    ],
)
def test_bad_configuration_of_a_part(part, keys, named):
    with pytest.raises(ValueError, match=named):
        vl_config(**{part: keys})


def test_processor_loads_beside_the_model(tmp_path):
    vl_model().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    build = AutoProcessor.from_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**build(images=pictures(), text=["<im_patch>" * 3], return_tensors="pt")).logits
    assert logits.isfinite().all()


def test_example_from_a_picture_file_to_text(tmp_path):
    pictures()[0].save(tmp_path / "photo.jpg")
    example = (REPOSITORY / "examples" / "step3_image.py").read_text(encoding="utf-8")
    arguments = ("--image", tmp_path / "photo.jpg", "--max-new-tokens", "4")
    code = f"import sys\n__file__ = 'step3_image.py'\n{example}"
    first, *text = run_python(code, *arguments).strip().splitlines()
    assert "photo.jpg: " in first and "crops" in first and text


def test_options_of_the_text_reach_it_from_a_vision_checkpoint():
    model = AutoModelForCausalLM.from_pretrained(golden("step3_vl"), num_hidden_layers=2, rms_norm_eps=1e-3)
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert model.model.norm.variance_epsilon == 1e-3
    with pytest.raises(ValueError, match="num_attention_groups"):
        AutoModelForCausalLM.from_pretrained(golden("step3_vl"), num_attention_groups=2)
    model, info = AutoModelForImageTextToText.from_pretrained(
        golden("step3_vl"), num_hidden_layers=2, output_loading_info=True
    )
    assert len(model.model.language_model.layers) == model.config.text_config.num_hidden_layers == 2
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
