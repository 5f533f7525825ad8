"""Reading every kind of image, errors for broken ones, and transforms as functions of their key."""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from showtell import transforms
from showtell.errors import MissingFileError, UserError
from showtell.tokenizer import ptb, treebank
from showtell.transforms import IMAGENET, IMAGENET_TRAIN, TINY, BrokenImageError, Transform, frames, read_image


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """An image whose corners all differ: red grows to the right, green downwards, blue is constant."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [columns * 255 // (width - 1), rows * 255 // (height - 1), np.full_like(rows, 90)]
    return np.stack(channels, -1).astype(np.uint8)


def read(source) -> np.ndarray:
    """Read an image as (H, W, 3)."""
    image = read_image(source)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


def distance(image: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference of two pixels."""
    return np.abs(image.astype(float) - expected).max()


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


GREY = gradient()[..., 0]
GREY_RGB = np.stack([GREY] * 3, -1)


@pytest.mark.parametrize("kind", transforms.FORMATS)
def test_every_documented_format_is_opened_by_its_contents(kind, tmp_path):
    Image.init()
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if kind not in Image.OPEN:
        pytest.skip(f"this Pillow has no {kind}")
    options = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF", "HEIF") else {}
    for suffix in (*transforms.FORMATS[kind], ".jpg"):
        path = tmp_path / f"image{suffix}"
        path.write_bytes(encoded(gradient(64, 64), kind, **options))
        assert distance(read(path), gradient(64, 64)) <= (60 if kind == "GIF" else 12)


def test_a_phones_jpeg_of_several_images_gives_the_first_upright():
    """MPO: a JPEG with more images behind it, such as a preview or the other eye of a stereo camera."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.ascontiguousarray(np.rot90(gradient(48, 64), 1))
    others = [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))]
    data = encoded(turned, "MPO", save_all=True, append_images=others, exif=exif, quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert distance(read(data), gradient(48, 64)) <= 12
    assert frames(data) == 3


def test_postscript_never_starts_ghostscript(monkeypatch, tmp_path):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    eps = encoded(gradient(), "EPS")
    assert eps.startswith(b"%!PS-Adobe-3.0")
    binary = b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") + len(eps).to_bytes(4, "little") + bytes(18) + eps
    for data, reason in [
        (eps, "it is PostScript"),
        (binary, "it is PostScript"),
        (encoded(gradient(), "PDF"), "it is a PDF"),
        (encoded(gradient(), "TGA"), "it is not an image of a known format"),
        (encoded(gradient(), "PCX"), "it is not an image of a known format"),
    ]:
        (tmp_path / "photo.jpg").write_bytes(data)
        for open_it in (read_image, frames):
            with pytest.raises(BrokenImageError, match=rf"photo\.jpg cannot be read: {reason}; give a JPEG, .* AVIF"):
                open_it(tmp_path / "photo.jpg")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_a_lossless_file_is_read_exactly(kind, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(gradient(), kind))
    for source in (path, str(path), path.read_bytes()):
        assert np.array_equal(read(source), gradient())


def test_grey_one_bit_and_palette_images():
    assert np.array_equal(read(encoded(GREY)), GREY_RGB)
    bits = Image.fromarray(GREY).point(lambda v: 255 * (v > 127)).convert("1")
    assert np.array_equal(read(encoded(bits)), np.where(GREY_RGB > 127, 255, 0))
    palette = Image.fromarray(gradient()).quantize(32)
    assert palette.mode == "P"
    assert np.array_equal(read(encoded(palette)), np.array(palette.convert("RGB")))


def test_transparency_is_laid_on_white():
    half = np.dstack([gradient(), np.full((24, 32), 128, np.uint8)])
    half[:12, :, 3] = 0
    assert distance(read(encoded(half)), 255 + (gradient() - 255.0) * (half[..., 3:] / 255)) <= 1
    with_alpha = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(half[..., 3])])
    assert distance(read(encoded(with_alpha)), 255 + (GREY_RGB - 255.0) * (half[..., 3:] / 255)) <= 1


def test_transparent_colors_of_a_palette_or_of_rgb_become_white():
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    image = read(encoded(palette, transparency=0))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[1, 1].tolist() == [200, 0, 0]
    keyed = Image.new("RGB", (4, 2), (1, 2, 3))
    keyed.putpixel((3, 1), (9, 9, 9))
    image = read(encoded(keyed, transparency=(1, 2, 3)))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[1, 3].tolist() == [9, 9, 9]


def test_cmyk_and_grey_jpegs_keep_their_colors():
    patches = np.zeros((32, 64, 3), np.uint8)
    patches[:, :32], patches[:, 32:] = (250, 20, 20), (20, 20, 250)
    image = Image.fromarray(patches)
    assert distance(read(encoded(image.convert("CMYK"), "JPEG", quality=95)), patches) <= 12
    grey = image.convert("L")
    assert distance(read(encoded(grey, "JPEG", quality=95)), np.array(grey)[..., None]) <= 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_by_their_range(kind):
    deep = (np.arange(24 * 32, dtype=np.uint32).reshape(24, 32) * 65535 // (24 * 32 - 1)).astype(np.uint16)
    image = read(encoded(deep, kind))
    assert distance(image, np.round(deep / 257)[..., None]) <= 0.51
    assert image[-1, -1].tolist() == [255, 255, 255]
    dark = (deep // 400).astype(np.uint16)  # dark stays dark: the range is the type's, not the image's
    assert read(encoded(dark, kind)).max() <= 1


def test_thirty_two_bit_and_float_images():
    for deep in (np.array([[0, 32768, 65535]], np.int32), np.array([[0.0, 0.5, 1.0]], np.float32)):
        assert read(encoded(deep, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


ORIENTED = {  # EXIF orientation -> how the stored pixels were turned away from the upright image
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "grey JPEG"])
def test_all_eight_exif_orientations_come_out_upright(orientation, kind):
    upright = gradient(48, 64)
    image = Image.fromarray(np.ascontiguousarray(ORIENTED[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind == "grey JPEG":
        image, upright = image.getchannel(0), np.stack([upright[..., 0]] * 3, -1)
    options = {} if kind == "PNG" else {"quality": 97, "subsampling": 0} if kind == "JPEG" else {"quality": 97}
    result = read(encoded(image, kind.split()[-1], exif=exif, **options))
    assert result.shape == upright.shape
    assert distance(result, upright) <= 8


def test_the_fast_jpeg_path_gives_pillows_pixels(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    data = encoded(noise, "JPEG", quality=90)
    fast = read(data)
    monkeypatch.setattr(transforms, "_jpeg_decoder", lambda: None)
    slow = read(data)
    assert np.array_equal(slow, np.array(Image.open(io.BytesIO(data))))
    assert distance(fast, slow) <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_read_and_the_frames_are_counted(kind, tmp_path):
    first, *others = [Image.new("RGB", (16, 16), color) for color in [(250, 0, 0), (0, 250, 0), (0, 0, 250)]]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=others, **options)
    assert read(data)[8, 8].tolist() == [250, 0, 0]
    path = tmp_path / "moving"
    path.write_bytes(data)
    assert frames(path) == frames(data) == 3
    assert frames(encoded(first)) == 1


def test_arrays_tensors_and_pil_images():
    for source in (gradient(), Image.fromarray(gradient()), torch.from_numpy(gradient()).permute(2, 0, 1)):
        assert np.array_equal(read(source), gradient())
    for source in (GREY, GREY[..., None], GREY / 255.0, GREY.astype(np.uint16) * 257, torch.from_numpy(GREY)[None]):
        assert np.array_equal(read(source), GREY_RGB)
    assert read(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]
    transparent = np.dstack([gradient(), np.zeros((24, 32), np.uint8)])
    assert (read(transparent) == 255).all()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (torch.zeros(3, 4, 4), r"a tensor of torch.float32 and shape \(3, 4, 4\) is not an image; give uint8"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"shape \(4, 4\) is not an image"),
        (np.zeros((4, 4, 2), np.uint8), r"an array of shape \(4, 4, 2\) is not an image"),
        (np.zeros((0, 4), np.uint8), r"shape \(0, 4\) is not an image"),
        (np.zeros((4, 4), np.int64), "an array of int64 is not an image; give uint8, uint16, or floats"),
        (np.zeros((4, 4), complex), "an array of complex128 is not an image"),
        (17, "a int is not an image; give a path"),
    ],
)
def test_values_that_are_not_images(source, sentence):
    with pytest.raises(UserError, match=sentence):
        read_image(source)


def test_a_broken_file_is_named_with_its_reason_in_one_sentence(tmp_path):
    jpeg, png = encoded(gradient(200, 200), "JPEG"), encoded(gradient(200, 200))
    (tmp_path / "folder.jpg").mkdir()
    for name, data, reason in [
        ("text.jpg", b"this is not a photograph\n", "it holds text"),
        ("empty.jpg", b"", "it is empty (0 bytes)"),
        ("cut.jpg", jpeg[: len(jpeg) // 2], "it is damaged or cut short ("),
        ("cut.png", png[: len(png) // 2], "it is damaged or cut short ("),
        ("header.jpg", jpeg[:30], "it is damaged or cut short ("),
        ("bytes.jpg", bytes(range(256)) * 4, "it is not an image of a known format"),
        ("folder.jpg", None, "it is a folder"),
    ]:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(BrokenImageError) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name} cannot be read: {reason}")
        assert "\n" not in str(caught.value)
        assert caught.value.path == str(tmp_path / name)
        copy = pickle.loads(pickle.dumps(caught.value))  # as a loader's worker sends it
        assert (str(copy), copy.path, copy.reason) == (str(caught.value), caught.value.path, caught.value.reason)


def test_a_missing_file_is_a_missing_file(tmp_path):
    for open_it in (read_image, frames):
        with pytest.raises(MissingFileError, match=r"there is no image .*gone\.jpg; check its name and folder"):
            open_it(tmp_path / "gone.jpg")


@pytest.mark.timeout(30)
def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", "/dev/zero"):
        for open_it in (read_image, frames):
            with pytest.raises(BrokenImageError, match=r"it is no regular file \(a pipe, a socket or a device\); give"):
                open_it(path)
    with open(tmp_path / "endless.tiff", "wb") as file:
        file.truncate(2**40)  # a sparse file, which takes no disk
    with pytest.raises(BrokenImageError, match="it has more than 4,294,967,296 bytes; make a smaller copy first"):
        read_image(tmp_path / "endless.tiff")


def huge_png() -> bytes:
    """The header of a 30,000 x 30,000 image: reading more of it would fail for want of data."""
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_huge_image_is_refused_from_its_header(pillow_limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    for open_it in (read_image, frames):
        with pytest.raises(BrokenImageError, match="more than 179 million pixels; make a smaller copy first"):
            open_it(huge_png())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow remarks on what it finds
def test_an_image_cut_anywhere_is_read_or_refused():
    """No prefix of a file gets another exception than ours."""
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        data = encoded(gradient(), kind)
        refused = 0
        for length in range(0, len(data), max(1, len(data) // 60)):
            try:
                assert read_image(data[:length]).shape == (3, 24, 32)
            except BrokenImageError:
                refused += 1
        assert refused > 10


PHOTO = torch.from_numpy(np.random.default_rng(1).integers(0, 255, (3, 300, 400), np.uint8))


def test_imagenets_transform_equals_torchvisions_and_reads_files(tmp_path):
    from torchvision.transforms import v2

    normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    reference = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True), normalize])
    (tmp_path / "photo.png").write_bytes(encoded(gradient(300, 400)))
    assert torch.equal(IMAGENET(tmp_path / "photo.png"), IMAGENET(gradient(300, 400)))
    for image in (PHOTO, PHOTO[:, :, :170], PHOTO[:, :101]):
        result = IMAGENET(image)
        assert result.shape == (3, 224, 224)
        assert result.dtype == torch.float32
        assert torch.allclose(result, reference(image), atol=1e-6)


@pytest.mark.parametrize(
    "transform", [IMAGENET, IMAGENET_TRAIN, transforms.SQUASHED, TINY, Transform(resize=None, crop=80)]
)
@pytest.mark.parametrize("shape", [(300, 400), (30, 20), (64, 64), (1, 90)])
def test_the_output_is_a_square_for_every_input(transform, shape):
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    for key in (None, (0, 1, 2)):
        assert transform(image, key).shape == (3, transform.size, transform.size)


def test_squashing_keeps_the_whole_image_and_cropping_the_middle():
    image = torch.zeros(3, 100, 300, dtype=torch.uint8)
    image[:, :, :60] = 255
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    assert Transform(resize=(50, 50), **plain)(image)[0, 25, :8].min() > 0.99
    assert Transform(resize=50, crop=50, **plain)(image).max() == 0
    assert Transform(resize=50, **plain)(image).shape == (3, 50, 150)
    assert Transform(resize=50).size is None


def test_augmentation_is_a_function_of_its_key_and_evaluation_is_deterministic():
    key = (3, 1, 17)
    assert torch.equal(IMAGENET_TRAIN(PHOTO, key), IMAGENET_TRAIN(PHOTO, key))
    others = [(4, 1, 17), (3, 2, 17), (3, 1, 18)]
    assert all(not torch.equal(IMAGENET_TRAIN(PHOTO, key), IMAGENET_TRAIN(PHOTO, other)) for other in others)
    before = torch.random.get_rng_state()
    IMAGENET_TRAIN(PHOTO, key)
    assert torch.equal(before, torch.random.get_rng_state())
    evaluation = IMAGENET_TRAIN.evaluation()
    assert evaluation == IMAGENET
    for transform, other in ((evaluation, (0, 0, 1)), (evaluation, (0, 0, 2)), (IMAGENET_TRAIN, None)):
        assert torch.equal(transform(PHOTO, other), IMAGENET(PHOTO))


def test_the_transform_of_arrays_is_that_of_tensors():
    pixels = np.random.default_rng(1).integers(0, 255, (300, 400, 3), np.uint8)
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    for transform in (
        Transform(256, 224, **plain), Transform((64, 64), mirror=True, **plain), Transform(None, 350, **plain),
        Transform(100, **plain),
    ):  # fmt: skip
        expected = transform(pixels).numpy()
        found = transform.to_array(pixels)
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        assert found.flags.c_contiguous
        assert np.abs(found - expected).max() * 255 < 2.01
        assert np.abs(found - expected).mean() * 255 < 0.05
    np.testing.assert_allclose(Transform().to_array(pixels), Transform()(pixels).numpy(), atol=0.04)


def test_crops_reach_every_place_and_flips_half_the_images():
    image = torch.arange(100, dtype=torch.uint8).view(1, 10, 10)
    plain = {"resize": None, "mean": (0, 0, 0), "std": (1, 1, 1)}
    cropper = Transform(crop=8, random_crop=True, **plain)
    corners = {round(float(cropper(image, (0, 0, i))[0, 0, 0]) * 255) for i in range(400)}
    assert corners == {10 * top + left for top in range(3) for left in range(3)}
    flipper = Transform(flip=True, **plain)
    flipped = [bool(flipper(image, (0, 0, i))[0, 0, 0] > 0) for i in range(400)]
    assert 160 < sum(flipped) < 240
    i = flipped.index(True)
    assert torch.equal(flipper(image, (0, 0, i)), flipper(image).flip(-1))


VARIANTS = [
    {"resize": 255}, {"resize": (256, 256)}, {"crop": 200}, {"random_crop": True}, {"flip": True},
    {"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)},
]  # fmt: skip


def test_the_fingerprint_changes_with_every_field_and_with_nothing_else():
    prints = [replace(IMAGENET, **variant).fingerprint() for variant in VARIANTS]
    assert len({IMAGENET.fingerprint(), *prints}) == len(VARIANTS) + 1
    assert IMAGENET.fingerprint() == Transform(crop=224, resize=256).fingerprint()
    assert transforms.SQUASHED.fingerprint() == Transform(resize=[224, 224]).fingerprint()
    assert IMAGENET.fingerprint() == "a7f94736da78d168"  # caches on disk carry it


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_transform_survives_json_and_pickling(variant):
    transform = replace(IMAGENET, **variant)
    assert Transform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    assert pickle.loads(pickle.dumps(transform)) == transform
    assert hash(Transform.from_dict(transform.to_dict())) == hash(transform)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"resize": (224, 200)}, r"resize=\(224, 200\) is not a square; give \(S, S\)"),
        ({"resize": 0}, "resize=0 is not a size"),
        ({"resize": "224"}, "resize='224' is not a size"),
        ({"crop": -1}, "crop=-1 is not a size"),
        ({"resize": 100, "crop": 224}, "crop=224 is larger than resize=100; give a crop of 100 or less"),
        ({"random_crop": True}, "random_crop=True needs a crop"),
        ({"std": (1, 0, 1)}, "must be three numbers each, std above 0"),
        ({"mean": (0.5,)}, "must be three numbers each"),
        ({"colour": 3}, "a transform has no colour; it has crop, flip, mean"),
    ],
)
def test_contradicting_or_unknown_values(values, sentence):
    with pytest.raises(UserError, match=sentence):
        Transform.from_dict(values)


def test_an_image_of_one_row_is_an_error():
    with pytest.raises(BrokenImageError, match="an image of 9000 x 1 pixels is too long and thin; crop it first"):
        IMAGENET(torch.zeros(3, 1, 9000, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("a cat left of a dog on the Right", "a cat right of a dog on the Left"),
        ("a right-handed batter", "a left-handed batter"),
        ("the upper-left corner, LEFT-HAND side", "the upper-right corner, RIGHT-HAND side"),
        ("the leftmost dog turns rightward", "the rightmost dog turns leftward"),
        ("leftover bright lights, copyright, rights", "leftover bright lights, copyright, rights"),
        ("a right-angled turn, the right-of-way, left-overs", "a right-angled turn, the right-of-way, left-overs"),
    ],
)
def test_mirrored_captions_swap_left_and_right_in_words_and_compounds(text, mirrored):
    assert transforms.mirror_caption(text) == mirrored
    for cut in (treebank, ptb):  # word by word, as the loader swaps them; both keep compounds whole
        assert [transforms.mirror_caption(word) for word in cut(text)] == cut(mirrored)


@given(
    st.lists(st.sampled_from([*"-.,; ", "left", "Right", "LEFT", "hand", "handed", "most", "angle", "bright", "of"]))
)
def test_mirroring_twice_gives_the_text_back(parts):
    assert transforms.mirror_caption(transforms.mirror_caption("".join(parts))) == "".join(parts)


@pytest.mark.realdata
def test_real_photographs_read_as_pillow_reads_them(shared_data):
    paths = sorted((shared_data / "coco_small" / "val2017").iterdir())
    assert len(paths) >= 100
    for path in paths:
        with Image.open(path) as image:
            reference = np.array(image.convert("RGB"))
        assert distance(read(path), reference) <= 1, path


@pytest.mark.parametrize("size", [(224, 224), (64, 80), (400, 30), (60, 90)])
def test_resized_pixels_are_those_of_torchvision(size):
    from torchvision.transforms.v2 import functional as F

    image = torch.randint(0, 256, (3, 60, 90), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for stored in (
        image,
        image.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        image[:, ::2],
        image[:1].expand(3, -1, -1),
    ):
        assert torch.equal(transforms._resize(stored, size), F.resize(stored, list(size)))


def test_pixels_without_fast_integer_arithmetic_are_those_of_torchvision(monkeypatch):
    from torchvision.transforms.v2 import functional as F

    image = torch.randint(0, 256, (3, 60, 90), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr("platform.machine", lambda: "x")
    monkeypatch.setattr(transforms, "machine", lambda: "x")
    assert torch.equal(transforms._resize(image, (224, 224)), F.resize(image, [224, 224]))
