"""Read any image as RGB, and specify how an image becomes a network's input.

`read_image` turns any image file into (3, H, W) uint8; a `Transform` turns that into (3, S, S) float32. A `Transform`
is data: it is saved in checkpoints, it fingerprints the feature cache, and its augmentation is a function of (seed,
epoch, sample) alone, so workers and resuming change nothing. Importing this module does not import torch, and
`Transform.to_array` does without it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from platform import machine
from random import Random
from types import ModuleType
from typing import TYPE_CHECKING, Union

import numpy as np

from showtell.errors import MissingFileError, UserError
from showtell.files import require_regular_file

if TYPE_CHECKING:
    import torch
    from PIL import Image

Source = Union[str, os.PathLike, bytes, "Image.Image", np.ndarray, "torch.Tensor"]

# The formats that are opened, by Pillow's names, and their suffixes in folders. JPEG includes MPO, the JPEGs of phones.
FORMATS = {
    "JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "GIF": (".gif",), "WEBP": (".webp",), "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"), "PPM": (".ppm", ".pgm"), "JPEG2000": (".jp2",), "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}  # fmt: skip
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
_ADVICE = "give a JPEG, PNG, GIF, WebP, BMP, TIFF, PPM, JPEG 2000, AVIF or HEIC file"
_HEIF = rb"(?s)....ftyp(hei[cmsx]|hev[cmsx]|mif1|msf1)"
# What other files begin with: the first pattern that matches says what a file is.
_OTHERS = {
    rb"%PDF": "it is a PDF", rb"%!PS|\xc5\xd0\xd3\xc6": "it is PostScript", rb"PK\x03\x04": "it is a zip archive",
    rb"\x1f\x8b": "it is compressed with gzip", rb"(?s)....ftyp|\x1aE\xdf\xa3|RIFF....AVI ": "it is a video",
    rb"(?si)\s*(<\?xml.*?>)?\s*(<!--.*?-->)?\s*(<!doctype svg.*?>)?\s*<svg": "it is an SVG drawing",
    rb"(?si)\s*(<!--.*?-->)?\s*<(!doctype html|html|head|body)": "it is a web page",
}  # fmt: skip
MAX_PIXELS = 178_956_970  # Pillow's own limit, compared with the header before anything is decoded
MAX_BYTES = 2**32  # of a file: no image of MAX_PIXELS is larger
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class BrokenImageError(UserError):
    """An image that exists but cannot be read: its file, None for bytes or an array, and the reason.

    Both survive pickling, so that loader workers can report them.
    """

    path: str | None = None
    reason: str = ""


def read_image(source: Source) -> torch.Tensor:
    """Read an image as RGB, (3, H, W) uint8, upright, whatever its file holds.

    Grey, palette, CMYK and 16-bit images become 8-bit RGB (16 bits by range: 65535 is white); transparency is laid on
    white; EXIF rotation is applied; the first frame of an animation is taken (`frames` counts them). Colour profiles
    are not applied. JPEGs are decoded by torchvision, whose pixels equal Pillow's.

    Args:
        source: A path, a file's bytes, a PIL image, an array (H, W) or (H, W, 1|3|4) of uint8, uint16, bool or floats
            from 0 to 1, or a uint8 tensor (3, H, W) or (1, H, W).

    Raises:
        MissingFileError: there is no such file.
        BrokenImageError: the file is a folder, a pipe or a device, is empty, is no image of the `FORMATS`, is damaged,
            or has over `MAX_PIXELS` pixels.
    """
    import torch

    if isinstance(source, torch.Tensor):
        if source.dtype != torch.uint8 or source.ndim != 3 or source.shape[0] not in (1, 3) or not source.numel():
            given = f"a tensor of {source.dtype} and shape {tuple(source.shape)}"
            raise UserError(f"{given} is not an image; give uint8 of shape (3, H, W) or (1, H, W)")
        return source.expand(3, -1, -1)
    if not isinstance(source, np.ndarray) and not hasattr(source, "convert"):
        path, data = read_bytes(source)
        return decode_image(data, path)
    return _to_tensor(open_image(source))


def open_image(source: Source, path: str | None = None) -> Image.Image:
    """Read any image as `read_image` does, but as Pillow's RGB image, and without torch unless it is a tensor.

    `path` is that of a file whose bytes are given, for error messages.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return _to_rgb(Image.fromarray(_as_uint8(source)))
    if isinstance(source, Image.Image):
        with _guarded(getattr(source, "filename", None) or None):
            return _to_rgb(source)
    if is_tensor(source):
        return Image.fromarray(read_image(source).permute(1, 2, 0).numpy())
    own_path, data = read_bytes(source)
    with _open(data, path or own_path) as image, _guarded(path or own_path):
        return _to_rgb(image)


def is_tensor(value: object) -> bool:
    """Return whether a value is a tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def read_bytes(source: str | os.PathLike | bytes) -> tuple[str | None, bytes]:
    """Return an image file's path as text and its bytes, which `decode_image` decodes; bytes have no path.

    Raises as `read_image` does if there is no such file, or it is no regular file, too large or not readable.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return None, bytes(source)
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"a {type(source).__name__} is not an image; give a path, bytes, a PIL image or an array")
    path = os.fspath(source)
    if os.path.isdir(path):
        raise broken_image(path, "it is a folder", "name an image in it")
    try:
        require_regular_file(path, "image", "check its name and folder")
        if os.path.getsize(path) <= MAX_BYTES:
            return path, Path(path).read_bytes()
    except MissingFileError:
        raise
    except UserError:
        raise broken_image(path, "it is no regular file (a pipe, a socket or a device)") from None
    except OSError as error:
        raise broken_image(path, error.strerror or str(error), "make it readable first") from None
    raise broken_image(path, f"it has more than {MAX_BYTES:,} bytes", "make a smaller copy first")


def decode_image(data: bytes, path: str | None = None) -> torch.Tensor:
    """Decode a file's bytes as `read_image` does; `path` is for the error message alone."""
    with _open(data, path) as image, _guarded(path):
        # Pillow makes the conversions that other modes need.
        if image.format == "JPEG" and image.mode in ("RGB", "L") and (decode := _jpeg_decoder()):
            import torch

            try:
                return decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), 3, True)
            except RuntimeError:
                pass  # Pillow reads some files that this decoder refuses, and explains better what is wrong with others
        return _to_tensor(_to_rgb(image))


def frames(source: str | os.PathLike | bytes) -> int:
    """Return the number of frames or pages of an image; the first is captioned. Raises as `read_image` does."""
    path, data = read_bytes(source)
    with _open(data, path) as image, _guarded(path):
        return getattr(image, "n_frames", 1)


@dataclass(frozen=True)
class Transform:
    """How an image becomes a network's input: resize, crop, flip, normalise.

    With `flip`, "left" and "right" change their meaning: the loader applies `mirror_caption` to the captions of the
    images that it mirrors. Sizes that contradict each other raise a `UserError`.
    """

    resize: int | tuple[int, int] | None = 256  # the shorter side to S; with (S, S) squash the image; None: not at all
    crop: int | None = None  # the side of the square crop, to which a smaller image is first enlarged; None: no crop
    random_crop: bool = False  # in training, crop at a random place; otherwise, and always in evaluation, the middle
    flip: bool = False  # in training, mirror half of the images
    mean: tuple[float, float, float] = IMAGENET_MEAN  # each channel, from 0 to 1, becomes (value - mean) / std
    std: tuple[float, float, float] = IMAGENET_STD
    mirror: bool = False  # mirror every image, in evaluation too, for a feature cache of the mirror images

    def __post_init__(self):
        for name in ("resize", "mean", "std"):  # JSON has lists, and a hashable specification needs tuples
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        side = self.resize
        if isinstance(side, tuple):
            if len(side) != 2 or side[0] != side[1]:
                raise UserError(f"resize={side!r} is not a square; give (S, S) to squash, or S for the shorter side")
            side = side[0]
        for name, size in (("resize", side), ("crop", self.crop)):
            if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
                raise UserError(f"{name}={size!r} is not a size; give a number of pixels")
        if self.crop and side and self.crop > side:
            raise UserError(f"crop={self.crop} is larger than resize={self.resize!r}; give a crop of {side} or less")
        if self.random_crop and not self.crop:
            raise UserError("random_crop=True needs a crop to place; give crop=224, or leave random_crop out")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean={self.mean!r} and std={self.std!r} must be three numbers each, std above 0")

    def __call__(self, image: Source, key: tuple | None = None) -> torch.Tensor:
        """Transform one image to (3, S, S) float32.

        Args:
            image: (3, H, W) uint8, or anything `read_image` reads.
            key: (seed, epoch, sample) determines the crop and the flip; None crops the middle and does not flip.
        """
        import torch

        image = read_image(image)
        size, rows, columns = self._place(*image.shape[1:], key)
        image = _resize(image, size)[:, rows, columns]
        if self.mirror or self.flips(key):
            image = image.flip(-1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (image / 255).sub_(mean).div_(std)

    def to_array(self, image: Source, path: str | None = None) -> np.ndarray:
        """Transform one image as a call without a key does, with NumPy and Pillow alone.

        Pillow's resized pixels are at most two levels of 255 from torchvision's, and nearly all are equal. `path` is as
        in `open_image`.
        """
        image = open_image(image, path)
        (height, width), rows, columns = self._place(image.height, image.width)
        image = image.resize((width, height), 2)  # 2: bilinear, and antialiased, as torchvision's
        pixels = np.asarray(image)[rows, columns, :].transpose(2, 0, 1).astype(np.float32, order="C")
        pixels /= 255
        pixels -= np.array(self.mean, np.float32).reshape(3, 1, 1)
        pixels /= np.array(self.std, np.float32).reshape(3, 1, 1)
        return np.ascontiguousarray(pixels[:, :, ::-1]) if self.mirror else pixels

    def _place(self, height: int, width: int, key: tuple | None = None) -> tuple[tuple[int, int], slice, slice]:
        """Return the size `(height, width)` to resize an image to, and the rows and columns to crop from that."""
        side, short = self.resize, min(height, width)
        if isinstance(side, int) and max(height, width) > 100 * short:  # it would have gigabytes
            raise BrokenImageError(f"an image of {width} x {height} pixels is too long and thin; crop it first")
        if side is None and self.crop is not None and short < self.crop:
            side = self.crop
        if isinstance(side, int):
            height, width = int(side * height / short), int(side * width / short)
        elif side is not None:
            height, width = side
        if self.crop is None:
            return (height, width), slice(height), slice(width)
        spare = height - self.crop, width - self.crop
        if key is not None and self.random_crop:
            rng = Random(repr(tuple(key)))
            top, left = (int(rng.random() * (room + 1)) for room in spare)
        else:
            top, left = (round(room / 2) for room in spare)  # to even, as torchvision's center crop
        return (height, width), slice(top, top + self.crop), slice(left, left + self.crop)

    def flips(self, key: tuple | None) -> bool:
        """Return whether the image of this key is mirrored."""
        return self.flip and key is not None and Random(repr(("flip", *key))).random() < 0.5

    def region(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return the part of an image that the network sees: left, top, right, bottom, as shares of its sides."""
        (full_height, full_width), rows, columns = self._place(height, width)
        left, top = columns.start or 0, rows.start or 0
        return left / full_width, top / full_height, columns.stop / full_width, rows.stop / full_height

    @property
    def size(self) -> int | None:
        """The side S of the output; None if it keeps the image's proportions."""
        return self.crop or (self.resize[0] if isinstance(self.resize, tuple) else None)

    def evaluation(self) -> Transform:
        """Return the same transform without augmentation: the middle crop and no flip."""
        return replace(self, random_crop=False, flip=False)

    def to_dict(self) -> dict:
        """Return plain values for JSON; `from_dict` reads them."""
        values = json.loads(json.dumps(asdict(self)))
        if not self.mirror:  # older checkpoints and feature caches do not have it
            del values["mirror"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping) -> Transform:
        """Make a transform from `to_dict`'s values; keys that this version does not know raise a `UserError`."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"a transform has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**values)

    def fingerprint(self) -> str:
        """Return 16 characters that identify the specification, as part of a feature cache's key."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


IMAGENET = Transform(resize=256, crop=224)
IMAGENET_TRAIN = Transform(resize=256, crop=224, random_crop=True, flip=True)
SQUASHED = Transform(resize=(224, 224))
TINY = Transform(resize=(64, 64))


_SIDE = re.compile(r"\b(left|right)(?=(?:most|wards?|hand(?:ed)?)?\b)(?!-(?:angle|of-way|over))", re.IGNORECASE)
_OPPOSITE = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "right": "left", "Right": "Left", "RIGHT": "LEFT"}


def mirror_caption(text: str) -> str:
    """Swap left and right in a text or a word, so that a caption of an image holds for its mirror image.

    Compounds are swapped too ("right-handed", "upper-left", "leftmost"), except those of "right-angled", "right-of-way"
    and "left-over", which name no side.
    """
    return _SIDE.sub(lambda match: _OPPOSITE.get(match[0], match[0]), text)


def broken_image(path: str | None, reason: str, advice: str = "") -> BrokenImageError:
    """Return the error for an image that cannot be read; the advice is by default to give an image."""
    error = BrokenImageError(f"{path or 'the image'} cannot be read: {reason}; {advice or _ADVICE}")
    error.path, error.reason = path, reason
    return error


def _open(data: bytes, path: str | None) -> Image.Image:
    """Read the header alone."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise broken_image(path, "it is empty (0 bytes)")
    with _guarded(path):
        try:
            try:
                Image.preinit()  # the frequent formats; importing all takes 20 ms
                image = Image.open(io.BytesIO(data), formats=_known_formats())
            except UnidentifiedImageError:
                Image.init()
                if re.match(_HEIF, data):
                    _register_heif(path)
                image = Image.open(io.BytesIO(data), formats=_known_formats())
        except UnidentifiedImageError:
            reason = "it holds text" if is_text(data) else "it is not an image of a known format"
            raise broken_image(path, other_kind(data) or reason) from None
        if image.width * image.height > MAX_PIXELS:  # for programs that switch Pillow's own limit off
            raise Image.DecompressionBombError
        return image


def is_text(data: bytes) -> bool:
    """Return whether a file begins as text does."""
    return all(byte >= 32 or byte in b"\t\n\r\f" for byte in data[:512])


def other_kind(data: bytes) -> str:
    """Return what a file is that is no image, such as "it is a PDF"; empty where that is unknown."""
    return next((kind for start, kind in _OTHERS.items() if re.match(start, data[:2048])), "")


def _register_heif(path: str | None) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise broken_image(path, "it is a HEIC image", 'type pip install "showtell[heif]"') from None
    pillow_heif.register_heif_opener()


def _known_formats() -> list[str]:
    """Return those formats that Pillow has imported: of others, it would start Ghostscript for PostScript."""
    from PIL import Image

    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _guarded(path: str | None) -> Iterator[None]:
    """Raise a `BrokenImageError` for whatever a decoder raises."""
    from PIL import Image

    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError:
        reason = f"it has more than {MAX_PIXELS / 1e6:.0f} million pixels"
        raise broken_image(path, reason, "make a smaller copy first") from None
    except Exception as error:  # decoders fed a damaged file raise nearly anything
        reason = str(error).rstrip(".") or type(error).__name__
        raise broken_image(path, f"it is damaged or cut short ({reason})") from error


@cache
def _jpeg_decoder():
    """Return torchvision's compiled JPEG decoder, or None; its Python wrapper warns at every call."""
    try:
        import torch

        import_torchvision()
        import torchvision.io  # noqa: F401  it registers the operator

        return torch.ops.image.decode_jpeg
    except (ImportError, AttributeError, RuntimeError):
        return None


def import_torchvision() -> None:
    """Import torchvision without PyTorch's compiler, whose import takes half of the time until the first caption.

    `torchvision.ops` (0.29) imports one function from it, which answers whether a device can compile.
    """
    if {"torchvision", "torch._dynamo"} & sys.modules.keys():
        return
    stand_in = ModuleType(name := "torch._dynamo.utils")
    stand_in.is_compile_supported = lambda device: import_module(name).is_compile_supported(device)
    sys.modules[name] = stand_in
    try:
        import torchvision  # noqa: F401
    except ImportError:  # this version needs more of it
        for part in [part for part in sys.modules if part.partition(".")[0] == "torchvision"]:
            del sys.modules[part]
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


def _resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize as `torchvision.transforms.v2.functional.resize` does, whose import loads PyTorch's compiler."""
    import torch

    if image.shape[1:] == size:
        return image
    vectors = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or machine() in ("aarch64", "arm64")
    exact = image[None] if vectors and image.device.type == "cpu" else image[None].float()
    resized = torch.nn.functional.interpolate(exact, size, mode="bilinear", align_corners=False, antialias=True)[0]
    return resized if resized.dtype == torch.uint8 else resized.round_().to(torch.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_as_uint8(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # channels last, as the JPEG decoder's: resizing likes it


def _as_uint8(array: np.ndarray) -> np.ndarray:
    """Scale an array to uint8 by the range of its type, and give it a shape that Pillow takes."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UserError(f"an array of shape {array.shape} is not an image; give (H, W), (H, W, 3) or (H, W, 4)")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype.kind == "f":
        white = 1.0 if np.nanmax(array) <= 1 else 255.0
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        white = 65535.0
    elif array.dtype == np.int32:  # what Pillow makes of some 16-bit files and of 32-bit ones
        white = next(float(top) for top in (255, 65535, np.iinfo(np.int32).max) if array.max() <= top)
    else:
        raise UserError(f"an array of {array.dtype} is not an image; give uint8, uint16, or floats from 0 to 1")
    return (np.clip(np.nan_to_num(array.astype(np.float64)) / white, 0, 1) * 255 + 0.5).astype(np.uint8)
