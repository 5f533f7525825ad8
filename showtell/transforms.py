"""Reading any image as RGB, and the plain specification of how an image becomes a network's input.

`read_image` turns a file of whatever kind into (3, H, W) uint8; a `Transform` turns that into (3, S, S) float32. A
`Transform` is data: it is saved in checkpoints, it fingerprints the feature cache, and its augmentation is a function
of (seed, epoch, sample) alone, so that workers and resuming change nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Union

import numpy as np
import torch

from showtell.errors import MissingFileError, UserError

if TYPE_CHECKING:
    from PIL import Image

Source = Union[str, os.PathLike, bytes, "Image.Image", np.ndarray, torch.Tensor]

MAX_PIXELS = 178_956_970  # Pillow's own limit: above it, the header alone decides and nothing is decoded
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BrokenImageError(UserError):
    """An image that is there and cannot be read.

    `path` is the file (None for bytes or an array) and `reason` the part of the message that says why. Both survive
    pickling, so that loader workers can report them.
    """

    path: str | None = None
    reason: str = ""


def read_image(source: Source) -> torch.Tensor:
    """Reads an image as RGB, (3, H, W) uint8, upright, whatever its file holds.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB (16 bits by range: 65535 is white); transparency is laid on
    white; EXIF rotation is applied; of an animation the first frame is taken (`frames` tells how many there are).
    Colour profiles are not applied. JPEGs take torchvision's decoder, whose pixels equal Pillow's.

    Args:
        source: A path, a file's bytes, a PIL image, an array (H, W) or (H, W, 1|3|4) of uint8, uint16, bool or floats
            from 0 to 1, or a uint8 tensor (3, H, W) or (1, H, W).

    Raises:
        MissingFileError: there is no such file.
        BrokenImageError: the file is a folder, is empty, is no image, is damaged, or has over `MAX_PIXELS` pixels.
    """
    from PIL import Image

    if isinstance(source, torch.Tensor):
        if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] not in (1, 3) or not source.numel():
            raise UserError(
                f"a tensor of {source.dtype} and shape {tuple(source.shape)} is not an image; "
                "give uint8 of shape (3, H, W) or (1, H, W)"
            )
        return source.expand(3, -1, -1)
    if isinstance(source, np.ndarray):
        return _to_rgb(Image.fromarray(_as_uint8(source)))
    if isinstance(source, Image.Image):
        path = getattr(source, "filename", None) or None
        return _guarded(path, lambda: _to_rgb(source))
    path, data = (None, bytes(source)) if isinstance(source, (bytes, bytearray, memoryview)) else read_bytes(source)
    return decode_image(data, path)


def decode_image(data: bytes, path: str | None = None) -> torch.Tensor:
    """Decodes a file's bytes as `read_image` does; `path` is for the error message alone."""
    if not data:
        raise _broken(path, "it is empty (0 bytes)")
    with _open(path, data) as image:
        # Modes other than these two mean conversions that are Pillow's to make.
        if image.format == "JPEG" and image.mode in ("RGB", "L") and (decode := _jpeg_decoder()):
            try:
                return decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), 3, True)
            except RuntimeError:
                pass  # Pillow reads some files that this decoder refuses, and says better what is wrong with the rest
        return _guarded(path, lambda: _to_rgb(image))


def frames(source: str | os.PathLike | bytes) -> int:
    """How many frames (or pages) an image has; captions are written for the first. Raises as `read_image` does."""
    path, data = (None, source) if isinstance(source, bytes) else read_bytes(source)
    with _open(path, data) as image:
        return _guarded(path, lambda: getattr(image, "n_frames", 1))


@dataclass(frozen=True)
class Transform:
    """How an image becomes a network's input: resize, crop, flip, normalise.

    A `flip` makes every "left" and "right" of a caption a lie: the loader swaps the two words in the captions of a
    image that it mirrors, and `mirror_caption` swaps them in a text.

    Args:
        resize: An int makes the shorter side that long; a pair (S, S) squashes the whole image; None leaves it.
        crop: The side of the square that is cut out; None cuts nothing. A smaller image is enlarged to it first.
        random_crop: While training, the square is anywhere; else, and always at evaluation, in the middle.
        flip: While training, half of the images are mirrored.
        mean: What is subtracted from each channel's values from 0 to 1.
        std: What each channel is then divided by.
        mirror: Every image is mirrored, in evaluation too: a flip from cached features needs both.

    Raises:
        UserError: the sizes contradict each other.
    """

    resize: int | tuple[int, int] | None = 256
    crop: int | None = None
    random_crop: bool = False
    flip: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    mirror: bool = False

    def __post_init__(self):
        for name in ("resize", "mean", "std"):  # JSON has lists, and a hashable specification needs tuples
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        sides = self.resize if isinstance(self.resize, tuple) else (self.resize, self.resize)
        if len(sides) != 2 or sides[0] != sides[1]:
            raise UserError(f"resize={self.resize!r} is not a square; give (S, S) to squash, or S for the shorter side")
        for name, side in (("resize", sides[0]), ("crop", self.crop)):
            if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < 1):
                raise UserError(f"{name}={side!r} is not a size; give a number of pixels")
        if self.crop and sides[0] and self.crop > sides[0]:
            raise UserError(
                f"crop={self.crop} is larger than resize={self.resize!r}; give a crop of {sides[0]} or less"
            )
        if self.random_crop and not self.crop:
            raise UserError("random_crop=True needs a crop to place; give crop=224, or leave random_crop out")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean={self.mean!r} and std={self.std!r} must be three numbers each, std above 0")

    def __call__(self, image: Source, key: tuple | None = None) -> torch.Tensor:
        """Transforms one image to (3, S, S) float32.

        Args:
            image: (3, H, W) uint8, or anything `read_image` reads.
            key: (seed, epoch, sample) decides the crop and the flip; None crops the middle and flips nothing.
        """
        from torchvision.transforms.v2 import functional as F

        image = read_image(image)
        if isinstance(self.resize, int) and max(image.shape[1:]) > 100 * min(image.shape[1:]):
            height, width = image.shape[1:]  # a line of one pixel would become an image of gigabytes
            raise BrokenImageError(f"an image of {width} x {height} pixels is too long and thin; crop it first")
        if self.resize is not None:
            image = F.resize(image, [self.resize] if isinstance(self.resize, int) else list(self.resize))
        rng = None if key is None else Random(repr(tuple(key)))
        if self.crop is not None:
            if min(image.shape[1:]) < self.crop:
                image = F.resize(image, [self.crop])
            spare = [side - self.crop for side in image.shape[1:]]
            if rng and self.random_crop:
                top, left = (int(rng.random() * (room + 1)) for room in spare)
            else:
                top, left = (round(room / 2) for room in spare)  # to even, as torchvision's center crop
            image = image[:, top : top + self.crop, left : left + self.crop]
        if self.mirror or self.flips(key):
            image = image.flip(-1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image / 255).sub_(mean).div_(std)

    def flips(self, key: tuple | None) -> bool:
        """Whether the image of this key is mirrored."""
        return self.flip and key is not None and Random(repr(("flip", *key))).random() < 0.5

    @property
    def size(self) -> int | None:
        """The side S of what comes out; None if it keeps the image's proportions."""
        return self.crop or (self.resize[0] if isinstance(self.resize, tuple) else None)

    def evaluation(self) -> Transform:
        """The same without chance: the middle crop and no flip."""
        return replace(self, random_crop=False, flip=False)

    def to_dict(self) -> dict:
        """Plain values for JSON; `from_dict` reads them."""
        values = json.loads(json.dumps(asdict(self)))
        if not self.mirror:  # older checkpoints and feature caches do not have it
            del values["mirror"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping) -> Transform:
        """Reads `to_dict`'s values.

        Raises:
            UserError: there is a key that no transform of this version has.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"a transform has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**values)

    def fingerprint(self) -> str:
        """16 characters that differ exactly when the specification does: part of a feature cache's key."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


IMAGENET = Transform(resize=256, crop=224)
IMAGENET_TRAIN = Transform(resize=256, crop=224, random_crop=True, flip=True)
SQUASHED = Transform(resize=(224, 224))
TINY = Transform(resize=(64, 64))


def mirror_caption(text: str) -> str:
    """Swaps the words left and right, so that a caption of an image holds for its mirror image."""
    swapped = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}
    return re.sub(r"\b(left|right)\b", lambda match: swapped.get(match[0], match[0]), text, flags=re.IGNORECASE)


def _broken(path: str | None, reason: str, advice: str = "give a JPEG, PNG, GIF, WebP, BMP or TIFF file") -> UserError:
    error = BrokenImageError(f"{path or 'the image'} cannot be read: {reason}; {advice}")
    error.path, error.reason = path, reason
    return error


def read_bytes(source: str | os.PathLike) -> tuple[str, bytes]:
    """Reads an image file's bytes, which `decode_image` decodes; returns its path as text beside them.

    Raises:
        MissingFileError: there is no such file.
        BrokenImageError: it is a folder, a pipe or a device, or it cannot be read.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"a {type(source).__name__} is not an image; give a path, bytes, a PIL image or an array")
    path = os.fspath(source)
    try:
        return path, Path(path).read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"there is no image {path}; check its name and folder") from None
    except IsADirectoryError:
        raise _broken(path, "it is a folder", "name an image in it") from None
    except OSError as error:
        raise _broken(path, error.strerror or str(error), "make it readable first") from None


def _open(path: str | None, data: bytes) -> Image.Image:
    """Reads the header alone."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        text = all(byte >= 32 or byte in b"\t\n\r\f" for byte in data[:512])
        raise _broken(path, "it holds text" if text else "it is not an image of a known format") from None
    except Image.DecompressionBombError:
        raise _too_large(path) from None
    except Exception as error:
        raise _damaged(path, error) from error
    if image.width * image.height > MAX_PIXELS:  # for programs that switch Pillow's own limit off
        raise _too_large(path)
    return image


def _guarded(path: str | None, decode):
    try:
        return decode()
    except UserError:
        raise
    except Exception as error:  # decoders fed a damaged file raise nearly anything
        raise _damaged(path, error) from error


def _damaged(path: str | None, error: Exception) -> UserError:
    return _broken(path, f"it is damaged or cut short ({str(error).rstrip('.') or type(error).__name__})")


def _too_large(path: str | None) -> UserError:
    return _broken(path, f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels", "make a smaller copy first")


@cache
def _jpeg_decoder():
    """torchvision's compiled JPEG decoder, or None; called without its Python wrapper, which warns at every call."""
    try:
        import torchvision.io  # noqa: F401  it registers the operator

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError, RuntimeError):
        return None


def _to_rgb(image: Image.Image) -> torch.Tensor:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_as_uint8(np.asarray(image)))
    elif image.mode != "RGB" or "transparency" in image.info:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        image = image.convert("RGB")
    array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)  # in memory channels last, as the JPEG decoder's: resizing likes it


def _as_uint8(array: np.ndarray) -> np.ndarray:
    """An array as Pillow takes it, its values brought to 0 to 255 by the range that their type means."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UserError(f"an array of shape {array.shape} is not an image; give (H, W), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array * np.uint8(255)
    top = float(np.nanmax(array)) if array.dtype.kind in "iuf" else -1.0
    if array.dtype.kind == "f":
        white = 1.0 if top <= 1 else 255.0
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        white = 65535.0
    elif array.dtype == np.int32:  # what Pillow makes of some 16-bit files and of 32-bit ones
        white = 255.0 if top <= 255 else 65535.0 if top <= 65535 else float(np.iinfo(np.int32).max)
    else:
        raise UserError(f"an array of {array.dtype} is not an image; give uint8, uint16, or floats from 0 to 1")
    return (np.clip(np.nan_to_num(array.astype(np.float64)) / white, 0, 1) * 255 + 0.5).astype(np.uint8)
