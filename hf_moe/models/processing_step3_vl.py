"""Text and pictures to Step3's inputs: the prompt with its placeholders, pixels, and the chat template."""

from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.models.auto import AutoTokenizer
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import cached_file

from .configuration_step3_vl import Step3VLConfig
from .image_processing_step3_vl import Step3VLImageProcessor, flatten_images

# One of them stands for one image in a prompt, and later for one feature of it.
IMAGE_TOKEN = "<im_patch>"
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
CROP_START, CROP_END, CROP_NEWLINE = "<patch_start>", "<patch_end>", "<patch_newline>"
SPECIAL_TOKENS = (IMAGE_TOKEN, IMAGE_START, IMAGE_END, CROP_START, CROP_END, CROP_NEWLINE)
# What a folder may describe its processor in.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_FETCH_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")

# The prompt shape of the deployment examples. The system text has no role tag; the reasoning of earlier turns is left
# out; the opening tag of the new one is part of the prompt.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part.type == "text" -%}
{{- part.text -}}
{%- elif part.type in ("image", "image_url") -%}
{{- "<im_patch>" -}}
{%- else -%}
{{- raise_exception("Step3 reads text and images, not content of type " ~ part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- raise_exception("This chat template has no form for tool descriptions: put them into the system message.") -}}
{%- endif -%}
{%- if messages and messages[0].role == "system" -%}
{%- set system = render(messages[0].content) -%}
{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = "You are a helpful assistant." -%}
{%- set turns = messages -%}
{%- endif -%}
{{- bos_token ~ " " ~ system ~ " " -}}
{%- for message in turns -%}
{%- if message.role == "user" -%}
{{- "<|BOT|>user\\n " ~ render(message.content) ~ " <|EOT|>" -}}
{%- elif message.role == "assistant" -%}
{{- "<|BOT|>assistant\\n" ~ render(message.content).split("</think>")[-1].lstrip("\\n") ~ "<|EOT|>" -}}
{%- else -%}
{{- raise_exception("Roles are user and assistant, and system in front; got " ~ message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|BOT|>assistant\\n<think>\\n" -}}
{%- endif -%}
"""


class Step3VLProcessorKwargs(ProcessingKwargs, total=False):
    # Generation needs the prompts of a batch to end together.
    _defaults = {"text_kwargs": {"padding": False, "padding_side": "left"}}


class Step3VLProcessor(ProcessorMixin):
    """Image processor and tokenizer in one call.

    Args:
        image_processor, tokenizer: the parts.
        chat_template: jinja template; by default that of the tokenizer or, without one, the published prompt shape.
        image_token_len: features of the whole view of an image.
        patch_token_len: features of a crop.

    Raises:
        ValueError: for a tokenizer that lacks one of the special tokens.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_token_len: int = 169,
        patch_token_len: int = 81,
        **kwargs,
    ):
        self.image_token = IMAGE_TOKEN
        self.image_token_len, self.patch_token_len = image_token_len, patch_token_len
        if tokenizer is not None:
            vocabulary = tokenizer.get_vocab()
            missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
            if missing:
                raise ValueError(f"The tokenizer lacks {', '.join(missing)}. Is it that of Step3?")
            self.image_token_id = vocabulary[IMAGE_TOKEN]
            chat_template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @classmethod
    def from_config(cls, config: Step3VLConfig, tokenizer, **kwargs) -> "Step3VLProcessor":
        """The processor that fits a model: its view size, crops in the published proportion, its feature counts."""
        vision = config.vision_config
        size = vision.image_size
        # 504 of 728: 36 of 52 patches.
        crop = round(size * 504 / 728 / vision.patch_size) * vision.patch_size
        image_processor = Step3VLImageProcessor(
            size=size, crop_size=crop, max_image_size=6 * crop, do_crop=getattr(vision, "enable_patch", True)
        )
        counts = {"image_token_len": config.image_tokens(size), "patch_token_len": config.image_tokens(crop)}
        return cls(image_processor, tokenizer, **{**counts, **kwargs})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As in Transformers. A folder without a processor file gets what its configuration asks for.

        The parts are loaded here, not through `AutoImageProcessor`, which in some releases needs torchvision.
        """
        path = pretrained_model_name_or_path
        fetch = {name: kwargs[name] for name in _FETCH_ARGUMENTS if kwargs.get(name) is not None}
        trust = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
        tokenizer = AutoTokenizer.from_pretrained(path, **fetch, **trust)
        quiet = {
            "_raise_exceptions_for_gated_repo": False,
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        if any(cached_file(path, name, **fetch, **quiet) is not None for name in _PROCESSOR_FILES):
            image_processor = Step3VLImageProcessor.from_pretrained(path, **fetch)
            fields, kwargs = cls.get_processor_dict(path, **kwargs)
            return cls.from_args_and_dict([image_processor, tokenizer], fields, **kwargs)
        return cls.from_config(Step3VLConfig.from_pretrained(path, **fetch), tokenizer)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def __call__(self, images: Any = None, text: Any = None, **kwargs) -> BatchFeature:
        """Prompts and pictures to model inputs.

        Args:
            images: pictures in any form that `Step3VLImageProcessor` takes; for a batch of prompts one list a prompt,
                or all in the order of their placeholders.
            text: a prompt, or a list of them, with one `<im_patch>` per image.
            kwargs: for the tokenizer (`padding`, `return_tensors`, ...) and the image processor.

        Returns `input_ids` and `attention_mask`, and where there are images what the image processor returns.

        Raises:
            ValueError: for another number of `<im_patch>` than of images, in any prompt, and without text.
        """
        options = self._merge_kwargs(Step3VLProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        if text is None:
            raise ValueError("Step3 needs a prompt: give `text` with one `<im_patch>` per image.")
        prompts = [text] if isinstance(text, str) else list(text)
        pictures = flatten_images(images)
        self._check_counts(prompts, images, len(pictures))
        vision, expanded = {}, prompts
        return_tensors = options["text_kwargs"].pop("return_tensors", None)
        if pictures:
            image_options = {key: value for key, value in options["images_kwargs"].items() if key != "return_tensors"}
            vision = self.image_processor(pictures, **image_options)
            expanded = self._expand(prompts, vision)
        # Flags of other processors that have no meaning for a tokenizer.
        for name in ("return_mm_token_type_ids", "return_text_replacement_offsets", "sanitize_control_tokens"):
            options["text_kwargs"].pop(name, None)
        encoded = self.tokenizer(expanded, **options["text_kwargs"])
        return BatchFeature({**encoded, **vision}, tensor_type=return_tensors)

    def _check_counts(self, prompts: list[str], images: Any, count: int) -> None:
        placeholders = [prompt.count(IMAGE_TOKEN) for prompt in prompts]
        nested = isinstance(images, (list, tuple)) and any(isinstance(part, (list, tuple)) for part in images)
        if nested and len(images) == len(prompts):
            for row, (wanted, part) in enumerate(zip(placeholders, images)):
                given = len(flatten_images(part))
                if wanted != given:
                    raise ValueError(f"Prompt {row} has {wanted} {IMAGE_TOKEN}, but {given} images are given for it.")
        if sum(placeholders) != count:
            raise ValueError(f"The text has {sum(placeholders)} {IMAGE_TOKEN}, but {count} images are given.")

    def _expand(self, prompts: list[str], vision: BatchFeature) -> list[str]:
        """Prompts whose placeholders are as many as the features of their images, crops first."""
        newline = iter(vision["patch_newline_mask"].tolist())
        crop = CROP_START + IMAGE_TOKEN * self.patch_token_len + CROP_END
        whole = IMAGE_START + IMAGE_TOKEN * self.image_token_len + IMAGE_END
        blocks = iter(
            "".join(crop + CROP_NEWLINE * next(newline) for _ in range(count)) + whole
            for count in vision["num_patches"].tolist()
        )
        expanded = []
        for prompt in prompts:
            first, *rest = prompt.split(IMAGE_TOKEN)
            expanded.append(first + "".join(next(blocks) + part for part in rest))
        return expanded


__all__ = ["Step3VLProcessor"]
