"""A question about a picture to Step3: an upstream folder, one of ours, or a Hub id.

python examples/step3_image.py                                        # a tiny random model, and a picture drawn here
python examples/step3_image.py --image photo.jpg                      # the same model, your picture
python examples/step3_image.py path/to/step3 --image photo.jpg --question "What is in this picture?"

Without a checkpoint, a random one of the Step3 architecture is written to a folder and loaded from there; what it says
is noise, but everything between the file of the picture and the text is as with the real one.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedTokenizerFast

import hf_moe  # noqa: F401  registers the models with the Auto classes
from hf_moe.models.configuration_step3_vl import Step3VLConfig
from hf_moe.models.processing_step3_vl import SPECIAL_TOKENS


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and Step3's special tokens behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = (*SPECIAL_TOKENS, "<|BOT|>", "<|EOT|>", "<think>", "</think>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def write_tiny_checkpoint(folder: Path) -> None:
    """A random checkpoint of the Step3 architecture: 2 text layers, 2 vision layers, views of the published sizes."""
    tokenizer = tiny_tokenizer()
    config = Step3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "head_dim": 32,
            "share_q_dim": 64,
            "moe_layers_enum": "1",
            "moe_num_experts": 8,
            "moe_intermediate_size": 64,
            "share_expert_dim": 64,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "output_hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<im_patch>"),
        understand_projector_stride=2,
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def draw_picture(path: Path) -> None:
    """A house under a sun, 900 x 600, as a JPEG file."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (900, 600), (135, 190, 235))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 420, 900, 600), fill=(90, 160, 70))
    draw.ellipse((700, 50, 820, 170), fill=(250, 220, 80))
    draw.rectangle((250, 270, 550, 480), fill=(190, 110, 80))
    draw.polygon([(220, 270), (580, 270), (400, 130)], fill=(120, 50, 40))
    picture.save(path, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a tiny random one by default")
    parser.add_argument("--image", help="a picture file; one is drawn by default")
    parser.add_argument("--question", default="What is in this picture?")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32; FP8 weights stay FP8")
    parser.add_argument("--device-map", default="auto", help="where the layers go; auto fills GPUs, then memory")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:
        if args.checkpoint is None:
            args.checkpoint = str(Path(work) / "tiny-step3")
            write_tiny_checkpoint(Path(args.checkpoint))
        if args.image is None:
            args.image = str(Path(work) / "picture.jpg")
            draw_picture(Path(args.image))
        dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
        processor = AutoProcessor.from_pretrained(args.checkpoint)
        model = AutoModelForImageTextToText.from_pretrained(
            args.checkpoint, dtype=dtype, device_map=args.device_map
        ).eval()
        content = [{"type": "image", "url": args.image}, {"type": "text", "text": args.question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        length = inputs["input_ids"].shape[1]
        print(f"{args.image}: {inputs['num_patches'].item()} crops, a prompt of {length} tokens")
        output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        print(processor.decode(output[0, length:], skip_special_tokens=True))


if __name__ == "__main__":
    main()
