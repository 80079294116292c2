"""Pictures to views: the published tiling, pixels, every kind of picture, prompts, and what is refused."""

import base64
import io
import json

import pytest
import torch
from PIL import Image
from testing import GOLDENS
from tiny_step3 import processor, vl_config
from transformers import AutoImageProcessor, AutoProcessor

from hf_moe.models import image_processing_step3_vl
from hf_moe.models.image_processing_step3_vl import Step3VLImageProcessor, plan_crops
from hf_moe.models.processing_step3_vl import SPECIAL_TOKENS, Step3VLProcessor

CASES = json.loads((GOLDENS / "step3_tiling" / "cases.json").read_text())


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """A picture of gradients, the same for the same arguments."""
    x, y = torch.arange(width)[None], torch.arange(height)[:, None]
    channels = [(x * (3 + c) + y * (5 + 2 * c)) % 256 for c in range(len(Image.new(mode, (1, 1)).getbands()))]
    return Image.frombytes(mode, (width, height), torch.stack(channels, -1).to(torch.uint8).numpy().tobytes())


# --- tiling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['width']}x{case['height']}")
def test_tiling_golden(case):
    plan = plan_crops(case["width"], case["height"])
    assert list(plan.resized) == case["resized"] and plan.window == case["window"]
    assert (list(plan.canvas) if plan.canvas else None) == case["crop_canvas"]
    assert list(plan.grid) == case["grid"]
    assert [list(box) for box in plan.boxes] == case["boxes"]
    assert list(plan.newline) == case["newline"]
    assert 83 * len(plan.boxes) + sum(plan.newline) + 171 == case["prompt_tokens"]


def test_trap_a_longest_side_of_the_view_is_small():
    assert plan_crops(728, 728).boxes == () and len(plan_crops(729, 728).boxes) == 4


@pytest.mark.parametrize("width, height", [(32, 20000), (20000, 33), (7, 28), (7, 29), (3025, 3024), (1, 5)])
def test_plan_covers_its_canvas(width, height):
    plan = plan_crops(width, height)
    assert min(plan.resized) >= 1 and max(plan.resized) <= 3024
    for index, (x, y, side, _) in enumerate(plan.boxes):
        columns = plan.grid[0]
        assert side == plan.window and (x, y) == (index % columns * side, index // columns * side)
    assert sum(plan.newline) == max(plan.grid[1] - 1, 0)


# --- pixels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["20x90", "300x700", "900x600"])
def test_pixel_golden(size):
    from safetensors.torch import load_file

    expected = load_file(GOLDENS / "step3_pixels" / "expected.safetensors")
    width, height = map(int, size.split("x"))
    x, y, c = torch.arange(width)[None, :, None], torch.arange(height)[:, None, None], torch.arange(3)
    image = ((x * (3 + c) + y * (5 + 2 * c) + (x * y).div(7 + c, rounding_mode="floor")) % 256).to(torch.uint8)
    output = Step3VLImageProcessor()(image)
    crops = expected[f"{size}.patch_pixel_values"]
    assert output["num_patches"].tolist() == [len(crops)]
    whole = output["pixel_values"][:, :, ::13, ::13] - expected[f"{size}.pixel_values"]
    assert whole.abs().max() <= 0.002
    if len(crops):
        assert (output["patch_pixel_values"][:, :, ::9, ::9] - crops).abs().max() <= 0.002


def test_trap_normalised_before_the_last_resize_with_antialiasing():
    """A fine chequerboard shrinks to grey, not to noise."""
    board = ((torch.arange(700)[None] + torch.arange(700)[:, None]) % 2 * 255).to(torch.uint8)
    view = Step3VLImageProcessor(size=56, crop_size=28, max_image_size=4000, do_crop=False)(board)["pixel_values"]
    assert view.std(dim=(2, 3)).max() < 0.1


def test_trap_overhang_is_black():
    output = Step3VLImageProcessor()(Image.new("RGB", (1600, 405), (255, 255, 255)))
    crop = output["patch_pixel_values"][0]
    black = (0 - torch.tensor(image_processing_step3_vl._MEAN)) / torch.tensor(image_processing_step3_vl._STD)
    assert crop.shape == (3, 504, 504)
    assert (crop[:, -1, :] - black[:, None]).abs().max() < 1e-5 and (crop[:, 0, :] > 1).all()


def test_trap_thin_images_stand_top_left_in_black():
    view = Step3VLImageProcessor()(Image.new("RGB", (200, 31), (255, 255, 255)))["pixel_values"][0]
    assert (view[:, 50, :] > 1).all() and (view[:, 400:, :] < -1).all()


# --- kinds of pictures ------------------------------------------------------------------------------------------------

SMALL = Step3VLImageProcessor(size=48, crop_size=32, max_image_size=192)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (3, 90), (101, 37), (48, 48), (640, 480)], ids=str)
def test_files_of_every_mode(size, mode, form, tmp_path):
    supported = {"PNG": ("RGB", "L", "RGBA", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK")}
    if mode not in supported[form]:
        return
    image = Image.new("I;16", size, 30000) if mode == "I;16" else picture(*size).convert(mode)
    path = tmp_path / f"picture.{form.lower()}"
    image.save(path)
    output = SMALL(str(path))
    plan = SMALL.plan(*size)
    assert output["pixel_values"].shape == (1, 3, 48, 48) and output["pixel_values"].isfinite().all()
    assert output["patch_pixel_values"].shape == (len(plan.boxes), 3, 32, 32)
    for other in (path, Image.open(path), [[Image.open(path)]]):
        assert torch.equal(SMALL(other)["pixel_values"], output["pixel_values"])
    if mode == "I;16" and size == (48, 48):  # 30000 of 65535 is grey, not white
        grey = output["pixel_values"][0, 0, 0, 0].item() * 0.26862954 + 0.48145466
        assert grey == pytest.approx(30000 / 65535, abs=0.01)


@pytest.mark.filterwarnings("error")
def test_same_picture_in_other_clothes():
    image = picture(70, 50)
    tensor = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(50, 70, 3)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    read_only = tensor.numpy().copy()
    read_only.flags.writeable = False
    expected = SMALL(image)
    forms = {
        "channels last": tensor,
        "channels first": tensor.permute(2, 0, 1),
        "numpy": tensor.numpy(),
        "backwards": tensor.flip(-1).numpy()[..., ::-1],  # as OpenCV's images are turned to RGB
        "read-only": read_only,
        "16 bits": tensor.numpy().astype("uint16"),
        "floats": tensor / 255,
        "base64": base64.b64encode(stream.getvalue()).decode(),
        "batch": tensor[None],
    }
    for name, form in forms.items():
        output = SMALL(form)
        for key in expected:
            assert torch.equal(output[key], expected[key]), (name, key)


def test_true_is_white():
    mask = torch.rand(50, 70) < 0.5
    expected = SMALL(mask.to(torch.uint8) * 255)
    for form in (mask, mask.numpy()):
        assert torch.equal(SMALL(form)["pixel_values"], expected["pixel_values"])


def test_pictures_are_turned_upright(tmp_path):
    image = picture(60, 40)
    exif = image.getexif()
    exif[0x0112] = 6  # a camera held sideways
    image.save(tmp_path / "a.png", exif=exif)
    turned = SMALL(str(tmp_path / "a.png"))
    assert torch.equal(turned["pixel_values"], SMALL(image.rotate(-90, expand=True))["pixel_values"])


def test_a_huge_picture():
    output = Step3VLImageProcessor()(Image.new("L", (6000, 4500), 100))
    assert output["num_patches"].tolist() == [30] and output["patch_pixel_values"].shape == (30, 3, 504, 504)


def test_images_keep_their_order_and_crops():
    images = [picture(100, 40), picture(20, 20), picture(60, 130, "RGBA")]
    together = SMALL(images)
    alone = [SMALL(image) for image in images]
    for key in together:
        assert torch.equal(together[key], torch.cat([output[key] for output in alone])), key
    assert together["num_patches"][1] == 0 and together["num_patches"][0] > 0
    assert SMALL(images, do_crop=False)["num_patches"].tolist() == [0, 0, 0]


def test_alpha_is_dropped_like_the_loaders_of_transformers_do():
    assert torch.equal(
        SMALL(picture(40, 40, "RGBA"))["pixel_values"], SMALL(picture(40, 40, "RGBA").convert("RGB"))["pixel_values"]
    )


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (b"no picture", "bytes"),
        ("no/such/picture.png", "no/such/picture.png"),
        (torch.zeros(0, 3, 3), r"\(0, 3, 3\)"),
        (torch.zeros(5, 7, 6), r"\(5, 7, 6\)"),
        (torch.full((4, 4), 2.0), "0 to 1"),
        (torch.full((4, 4), 300), "0 to 255"),
        (None, "no images"),
        (17, "int"),
    ],
    ids=str,
)
def test_unreadable_images(image, named):
    with pytest.raises(ValueError, match=named):
        SMALL(image)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_damaged_files(form, tmp_path):
    whole, path = io.BytesIO(), tmp_path / "damaged"
    picture(200, 200).save(whole, form)
    for content in (whole.getvalue()[: len(whole.getvalue()) // 2], b"", b"\x89PNG and nothing else"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"Image 1 .*damaged.* cannot be read"):
            SMALL([picture(4, 4), str(path)])


def test_missing_pillow_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(image_processing_step3_vl, "is_vision_available", lambda: False)
    for use in (Step3VLImageProcessor, lambda: SMALL(torch.zeros(4, 4))):
        with pytest.raises(ImportError, match="pip install pillow"):
            use()


@pytest.mark.parametrize("size", [{"height": 4, "width": 5}, {"height": 0, "width": 0}, {"longest_edge": 9}, -3])
def test_views_are_square(size):
    with pytest.raises(ValueError, match="crop_size"):
        Step3VLImageProcessor(crop_size=size)


def test_what_we_rely_on_in_transformers():
    """Private names, looked up in one place: `image_utils.PIL` and the resampling filters beside it."""
    from transformers import image_utils

    assert image_utils.PIL.Image.Image is Image.Image
    assert int(image_utils.PILImageResampling.BILINEAR) == int(Image.Resampling.BILINEAR)


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Step3VLProcessor:
    return processor()


def test_prompt_of_one_image(tiny):
    image = picture(70, 100)
    plan = tiny.image_processor.plan(70, 100)
    assert plan.grid == (2, 3)
    ids = tiny(images=image, text="a<im_patch>b")["input_ids"][0]
    token = {name: tiny.tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    crop = [token["<patch_start>"]] + [token["<im_patch>"]] * 4 + [token["<patch_end>"]]
    row = crop + crop
    expected = row + [token["<patch_newline>"]] + row + [token["<patch_newline>"]] + row
    expected += [token["<im_start>"]] + [token["<im_patch>"]] * 9 + [token["<im_end>"]]
    letters = [tiny.tokenizer.convert_tokens_to_ids(letter) for letter in "ab"]
    assert ids == letters[:1] + expected + letters[1:]


@pytest.mark.parametrize("case", [case for case in CASES if len(case["boxes"]) < 9], ids=lambda c: str(c["grid"]))
def test_prompt_length_of_the_published_sizes(case):
    published = Step3VLProcessor.from_config(vl_config(vision={"image_size": 728, "patch_size": 14}), tiny_tokenizer())
    assert (published.image_token_len, published.patch_token_len) == (169, 81)
    assert published.image_processor.crop_size == {"height": 504, "width": 504}
    text = published._expand(
        ["<im_patch>"],
        {
            "num_patches": torch.tensor([len(case["boxes"])]),
            "patch_newline_mask": torch.tensor(case["newline"], dtype=torch.bool),
        },
    )
    assert len(published.tokenizer(text[0])["input_ids"]) == case["prompt_tokens"]


def tiny_tokenizer():
    from tiny_step3 import tokenizer

    return tokenizer()


def test_batch_with_different_numbers_of_images(tiny):
    a, b, c = picture(100, 40), picture(20, 20), picture(60, 130)
    texts = ["<im_patch> and <im_patch>?", "nothing", "what is <im_patch>"]
    nested = tiny(images=[[a, b], [], [c]], text=texts, padding=True, return_tensors="pt")
    flat = tiny(images=[a, b, c], text=texts, padding=True, return_tensors="pt")
    for key in nested:
        assert torch.equal(nested[key], flat[key]), key
    assert nested["attention_mask"][1].sum() == len("nothing") and nested["attention_mask"][1, 0] == 0
    counts = (nested["input_ids"] == tiny.image_token_id).sum(1).tolist()
    crops = nested["num_patches"].tolist()
    assert counts == [2 * 9 + 4 * (crops[0] + crops[1]), 0, 9 + 4 * crops[2]]


def test_text_without_images(tiny):
    output = tiny(text=["hello", "hi"], padding=True, return_tensors="pt")
    assert set(output) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("images", "text", "named"),
    [
        (1, "no place", "0 <im_patch>, but 1 images"),
        (0, "<im_patch>", "1 <im_patch>, but 0 images"),
        (2, ["<im_patch>", "<im_patch> <im_patch>"], "3 <im_patch>, but 2 images"),
        ([[2], [0]], ["<im_patch>", "<im_patch>"], "Prompt 0 has 1 <im_patch>, but 2 images"),
        (1, None, "prompt"),
    ],
    ids=str,
)
def test_placeholders_that_do_not_match_the_images(images, text, named, tiny):
    if isinstance(images, int):
        given = [picture(9, 9)] * images
    else:
        given = [[picture(9, 9)] * count for (count,) in images]
    with pytest.raises(ValueError, match=named):
        tiny(images=given, text=text)


def test_tokenizer_without_the_special_tokens():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="lacks <im_patch>"):
        Step3VLProcessor.from_config(vl_config(), other)


def test_chat_template(tiny):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThe first."},
        {"role": "user", "content": "Why?"},
    ]
    assert tiny.apply_chat_template(messages, add_generation_prompt=True) == (
        "<s> You are a helpful assistant. <|BOT|>user\n <im_patch><im_patch>Which? <|EOT|>"
        "<|BOT|>assistant\nThe first.<|EOT|><|BOT|>user\n Why? <|EOT|><|BOT|>assistant\n<think>\n"
    )
    system = [{"role": "system", "content": "Be brief."}, *messages[2:]]
    assert tiny.apply_chat_template(system) == "<s> Be brief. <|BOT|>user\n Why? <|EOT|>"
    for bad in ([{"role": "tool", "content": "x"}], [{"role": "user", "content": [{"type": "video"}]}]):
        with pytest.raises(Exception, match="tool|video"):
            tiny.apply_chat_template(bad)


def test_chat_with_pictures(tiny, tmp_path):
    picture(70, 30).save(tmp_path / "a.png")
    content = [{"type": "image", "url": str(tmp_path / "a.png")}, {"type": "text", "text": "?"}]
    output = tiny.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = SMALL(str(tmp_path / "a.png"))
    assert torch.equal(output["pixel_values"], expected["pixel_values"])
    assert (output["input_ids"] == 0).sum() == 1, "one begin of text"


def test_round_trip_through_files(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is Step3VLProcessor and again.chat_template == tiny.chat_template
    assert (again.image_token_len, again.patch_token_len) == (9, 4)
    assert again.image_processor.to_dict() == tiny.image_processor.to_dict()
    if type(AutoImageProcessor).__name__ != "DummyObject":  # older Transformers have none without torchvision
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is Step3VLImageProcessor
    names = {path.name for path in tmp_path.glob("*.py")}
    assert {"processing_step3_vl.py", "image_processing_step3_vl.py", "configuration_step3_vl.py"} <= names


def test_folder_without_processor_files(tiny, tmp_path):
    """As the text checkpoints of other projects: a tokenizer and a configuration."""
    tiny.tokenizer.save_pretrained(tmp_path)
    vl_config(vision={"enable_patch": False}).save_pretrained(tmp_path)
    made = AutoProcessor.from_pretrained(tmp_path)
    assert made.image_processor.size == {"height": 48, "width": 48} and made.image_token_len == 9
    assert made.image_processor.do_crop is False
