"""Pictures to Step3's views: the whole image, and crops in rows where it is large or elongated.

The rule is the published one. Geometry is decided on whole pixels (`plan_crops`), scaled with Pillow's bilinear filter;
every view is then normalised and, as floating point numbers, resized to its square with an antialiased bilinear filter.
Needs Pillow, but neither torchvision nor a GPU.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import image_utils
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import is_vision_available

# Of CLIP, as the checkpoint was trained.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# The published thresholds: sides and aspect ratios.
_THIN_SIDE, _THIN_ASPECT = 32, 4
_ELONGATED_ASPECT, _VERY_ELONGATED_ASPECT = 1.5, 4
_EXTRA_WINDOW = 0.2


@dataclass(frozen=True)
class CropPlan:
    """How an image is cut; sizes are (width, height), boxes (x, y, width, height) on the canvas.

    Fields:
        padded: size of the black square around a very thin image, or `None`.
        resized: size before the whole view is made.
        window: side of a crop, 0 without crops.
        canvas: size to which the image is resized for cropping, or `None`.
        grid: crops in a row, rows.
        boxes: the crops row by row; a box may hang over a side of the canvas that is shorter than the window.
        newline: per crop, whether a line break follows it in the prompt: behind every row but the last.
    """

    padded: tuple[int, int] | None
    resized: tuple[int, int]
    window: int
    canvas: tuple[int, int] | None
    grid: tuple[int, int]
    boxes: tuple[tuple[int, int, int, int], ...]
    newline: tuple[bool, ...]


def plan_crops(width: int, height: int, full: int = 728, window: int = 504, largest: int = 3024) -> CropPlan:
    """The crops of an image of `width` x `height` pixels.

    Args:
        full: side of the whole view. An image whose longer side is no longer than this counts as small.
        window: side of a crop.
        largest: a longer side is scaled down to this.

    Raises:
        ValueError: for a side of less than a pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"An image of {width} x {height} pixels is empty.")
    padded = None
    if min(width, height) < _THIN_SIDE and max(width, height) / min(width, height) > _THIN_ASPECT:
        width = height = max(width, height)
        padded = (width, height)
    if max(width, height) > largest:
        scale = largest / max(width, height)
        width, height = max(int(width * scale), 1), max(int(height * scale), 1)
    resized = (width, height)

    short, long = min(resized), max(resized)
    if long <= full:
        side = short if long / short > _ELONGATED_ASPECT else 0
    else:
        side = min(short, window) if long / short > _VERY_ELONGATED_ASPECT else window
    if side == 0:
        return CropPlan(padded, resized, 0, None, (0, 0), (), ())

    canvas = (_snap(width, side), _snap(height, side))
    columns, rows = (max(1, size // side) for size in canvas)
    boxes = tuple((x * side, y * side, side, side) for y in range(rows) for x in range(columns))
    newline = tuple(x == columns - 1 and y < rows - 1 for y in range(rows) for x in range(columns))
    return CropPlan(padded, resized, side, canvas, (columns, rows), boxes, newline)


def _snap(size: int, window: int) -> int:
    """The side of the canvas: whole windows, one more when a good part of one is left over."""
    if size < window:
        return size
    count = size // window
    return window * (count + (size / window - count > _EXTRA_WINDOW))


class Step3VLImageProcessor(BaseImageProcessor):
    """Images to `pixel_values`, `patch_pixel_values`, `num_patches` and `patch_newline_mask`.

    Args:
        size: `{"height", "width"}` of the whole view, a square.
        crop_size: `{"height", "width"}` of a crop, a square.
        max_image_size: longer sides are scaled down to this first.
        do_crop: whether there are crops at all.
        image_mean, image_std: normalisation of pixel values in 0..1, per channel.

    Raises:
        ImportError: without Pillow.
        ValueError: for a size that is no square.
    """

    model_input_names = ["pixel_values", "patch_pixel_values", "num_patches", "patch_newline_mask"]

    def __init__(
        self,
        size: dict[str, int] | int | None = None,
        crop_size: dict[str, int] | int | None = None,
        max_image_size: int = 3024,
        do_crop: bool = True,
        image_mean: list[float] | tuple[float, ...] = _MEAN,
        image_std: list[float] | tuple[float, ...] = _STD,
        **kwargs,
    ):
        _require_pillow()
        super().__init__(**kwargs)
        self.size = _square("size", 728 if size is None else size)
        self.crop_size = _square("crop_size", 504 if crop_size is None else crop_size)
        self.max_image_size = max_image_size
        self.do_crop = do_crop
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    def plan(self, width: int, height: int) -> CropPlan:
        """The crops of an image of this size; see `plan_crops`."""
        plan = plan_crops(width, height, self.size["height"], self.crop_size["height"], self.max_image_size)
        return plan if self.do_crop else CropPlan(plan.padded, plan.resized, 0, None, (0, 0), (), ())

    def __call__(self, images: Any, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs) -> BatchFeature:
        """Cuts, normalises and resizes images.

        Args:
            images: pictures as Pillow images, paths, URLs, base64 strings, or arrays and tensors (height, width),
                (height, width, channels) or (channels, height, width), of bytes or of numbers in 0..1; one of them, or
                any nesting of lists. Every mode becomes RGB, transparency is dropped.
            return_tensors: "pt", the default.
            kwargs: options of the constructor, for this call.

        Returns a `BatchFeature` with
            pixel_values: (images, 3, size, size) float32;
            patch_pixel_values: (all crops, 3, crop size, crop size) float32, image by image, row by row;
            num_patches: (images,) int64;
            patch_newline_mask: (all crops,) bool.

        Raises:
            ValueError: for no images, an unreadable one and an empty one.
        """
        options = {name: kwargs[name] for name in _OPTIONS if kwargs.get(name) is not None}
        if options:
            return Step3VLImageProcessor(**{**{name: getattr(self, name) for name in _OPTIONS}, **options}).preprocess(
                images, return_tensors
            )
        pictures = [_open(image, index) for index, image in enumerate(flatten_images(images))]
        if not pictures:
            raise ValueError("There are no images to process.")
        views, crops, counts, newline = [], [], [], []
        for picture in pictures:
            plan = self.plan(*picture.size)
            whole, parts = self._cut(picture, plan)
            views.append(self._view(whole, self.size["height"]))
            crops += [self._view(part, self.crop_size["height"]) for part in parts]
            counts.append(len(parts))
            newline += plan.newline
        side = self.crop_size["height"]
        data = {
            "pixel_values": torch.stack(views),
            "patch_pixel_values": torch.stack(crops) if crops else torch.zeros(0, 3, side, side),
            "num_patches": torch.tensor(counts),
            "patch_newline_mask": torch.tensor(newline, dtype=torch.bool),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    @staticmethod
    def _cut(picture, plan: CropPlan) -> tuple[Any, list]:
        """The whole image and its crops, as Pillow images."""
        bilinear = image_utils.PILImageResampling.BILINEAR
        if plan.padded is not None:
            square = image_utils.PIL.Image.new("RGB", plan.padded)
            square.paste(picture)
            picture = square
        if picture.size != plan.resized:
            picture = picture.resize(plan.resized, bilinear)
        if not plan.boxes:
            return picture, []
        canvas = picture if plan.canvas == picture.size else picture.resize(plan.canvas, bilinear)
        return picture, [canvas.crop((x, y, x + width, y + height)) for x, y, width, height in plan.boxes]

    def _view(self, picture, side: int) -> torch.Tensor:
        """A Pillow image to normalised numbers (3, side, side)."""
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
        pixels = (pixels - mean) / std
        if pixels.shape[1:] == (side, side):
            return pixels.contiguous()
        resized = F.interpolate(pixels[None], (side, side), mode="bilinear", align_corners=False, antialias=True)
        return resized[0]


_OPTIONS = ("size", "crop_size", "max_image_size", "do_crop", "image_mean", "image_std")


def flatten_images(images: Any) -> list:
    """Images of any nesting of lists as one list; an array of four dimensions is a list of its images."""
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for part in images for image in flatten_images(part)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _square(name: str, size: dict[str, int] | int) -> dict[str, int]:
    sides = {size} if isinstance(size, int) else {size.get("height"), size.get("width")}
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"`{name}={size!r}` is not the size of a square: give one number, or equal height and width.")
    side = sides.pop()
    return {"height": side, "width": side}


def _require_pillow() -> None:
    if not is_vision_available():
        raise ImportError(
            "Step3 needs Pillow to read images: `pip install pillow`, or install hf-moe with its `vision` extra."
        )


def _open(image: Any, index: int):
    """An image of any accepted kind as a Pillow image in RGB."""
    _require_pillow()
    pil = image_utils.PIL
    name = repr(image) if isinstance(image, str) and len(image) < 300 else type(image).__name__
    try:
        if hasattr(image, "__array__") and not isinstance(image, pil.Image.Image):
            image = _from_array(image)
        elif isinstance(image, (str, os.PathLike)):
            image = os.fspath(image)
            image = pil.Image.open(image) if os.path.isfile(image) else image
        if isinstance(image, pil.Image.Image) and image.mode.startswith("I"):
            # 16 bits of grey. Pillow would clip them to 8, where the upper byte is meant.
            image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        picture = image_utils.load_image(image)  # reads the pixels, turns them upright, converts to RGB
    except (OSError, ValueError, TypeError, SyntaxError, pil.Image.DecompressionBombError) as error:
        raise ValueError(f"Image {index} ({name}) cannot be read: {str(error)[:300]}") from error
    return picture


def _from_array(array: Any):
    """An array or tensor as a Pillow image."""
    # Of other arrays a copy: PyTorch takes no views that run backwards, as of BGR images, and warns of read-only ones.
    tensor = torch.as_tensor(array if isinstance(array, torch.Tensor) else array.__array__().copy()).detach().cpu()
    if tensor.ndim == 2:
        tensor = tensor.unsqueeze(-1)
    elif tensor.ndim == 3 and tensor.shape[-1] not in (1, 3, 4) and tensor.shape[0] in (1, 3, 4):
        tensor = tensor.permute(1, 2, 0)
    if tensor.ndim != 3 or tensor.shape[-1] not in (1, 3, 4) or tensor.numel() == 0:
        raise ValueError(f"an array of shape {tuple(tensor.shape)} is no image of 1, 3 or 4 channels")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        if not (tensor.isfinite().all() and tensor.min() >= 0 and tensor.max() <= 1):
            raise ValueError("an array of floating point numbers must hold values from 0 to 1")
        tensor = (tensor * 255).round()
    elif tensor.dtype != torch.uint8:
        tensor = tensor.long()
        if tensor.min() < 0 or tensor.max() > 255:
            raise ValueError("an array of integers must hold values from 0 to 255")
    height, width, channels = tensor.shape
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return image_utils.PIL.Image.frombytes(mode, (width, height), tensor.to(torch.uint8).numpy().tobytes())


__all__ = ["CropPlan", "Step3VLImageProcessor", "plan_crops"]
