"""A synthetic data set without a download: images of coloured shapes with true sentences.

A `Scene` is a pure function of (index, seed, split); `draw` renders its image, `describe` generates its sentences, and
`check` decides whether a sentence is true and complete (both are in `showtell/sentences.py`).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from random import Random

import numpy as np

from showtell.errors import UserError
from showtell.files import atomic_path, write_json
from showtell.sentences import COLORS, RELATIONS, SHAPES, SIZES, Scene, Thing, Verdict, check, describe, pick, related

__all__ = [
    "COLORS", "HELD_OUT", "MIN_SIZE", "SHAPES", "SIZES", "SPLITS", "Scene", "Thing", "Verdict",
    "check", "describe", "draw", "export_coco", "scene",
]  # fmt: skip

SPLITS = ("train", "val", "test", "unseen")
MIN_SIZE = 16
BACKGROUNDS = ((246, 246, 244), (226, 230, 234), (232, 240, 250), (248, 240, 226), (230, 242, 228), (246, 230, 236))
# One colour is held out for each shape, each time another one, so every word is seen in many other pairs.
HELD_OUT = frozenset({("green", "circle"), ("yellow", "square"), ("blue", "triangle"), ("red", "star")})

_RADII = {"small": (0.09, 0.1), "large": (0.155, 0.175)}
_EXTENT = 1.14  # the farthest point of any shape from its centre, in radii
_GAP = 0.02  # the least distance between things and to the border, as a fraction of the image's side
_SQUARE = 0.8  # half a square's side, in radii
# Tips and inner radius: a triangle is a star with straight sides.
_TIPS = {"triangle": (3, _EXTENT / 2), "star": (5, 0.48)}
_SEEN = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)
_UNSEEN = tuple(sorted(HELD_OUT))


def scene(index: int, seed: int = 0, split: str = "train") -> Scene:
    """Make scene number `index` of a split: the same arguments always give the same scene.

    A scene has one or two groups, at most one of them of two equal things. Nothing overlaps or touches the border, and
    at least one relation between two groups is clear. `train`, `val` and `test` never contain a (color, shape) pair of
    `HELD_OUT`; every scene of `unseen` contains one.
    """
    if split not in SPLITS:
        raise UserError(f"the synthetic data has no split {split!r}; choose one of {', '.join(SPLITS)}")
    rng = Random(f"{seed}/{split}/{index}")
    pairs = [pick(rng, _UNSEEN if split == "unseen" else _SEEN)]
    if rng.random() < 0.4:
        counts: tuple[int, ...] = pick(rng, ((1,), (1,), (1,), (2,)))
    else:
        counts = pick(rng, ((1, 1), (1, 1), (1, 1), (1, 1), (1, 2), (2, 1)))
        pairs.append(pick(rng, tuple(pair for pair in _SEEN if pair != pairs[0])))
    kinds = []
    for count, (color, shape) in zip(counts, pairs, strict=True):
        size = pick(rng, SIZES)
        low, high = _RADII[size]
        kinds += [(shape, color, size, round(low + (high - low) * rng.random(), 4))] * count
    background = pick(rng, BACKGROUNDS)
    while True:
        centers = _scatter(rng, [radius for *_, radius in kinds])
        things = tuple(Thing(*kind, x, y, radius) for (*kind, radius), (x, y) in zip(kinds, centers, strict=True))
        first, second = things[: counts[0]], things[counts[0] :]
        if not second or any(related(first, relation, second, clearly=True) for relation in RELATIONS):
            return Scene(things, background)


def draw(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw a scene at any resolution from `MIN_SIZE` on, antialiased: (size, size, 3) uint8 RGB."""
    if size < MIN_SIZE:
        raise UserError(f"a synthetic image of {size} pixels is too small to show shapes; use {MIN_SIZE} or more")
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = scene.background
    for thing in scene.things:
        reach = _EXTENT * thing.radius * size + 1
        left, top = max(0, int(thing.x * size - reach)), max(0, int(thing.y * size - reach))
        right, bottom = int(thing.x * size + reach) + 1, int(thing.y * size + reach) + 1
        patch = canvas[top:bottom, left:right]
        x = np.arange(left, left + patch.shape[1], dtype=np.float32) + (0.5 - thing.x * size)
        y = np.arange(top, top + patch.shape[0], dtype=np.float32)[:, None] + (0.5 - thing.y * size)
        # A pixel's coverage, from the distance of its centre to the outline, which is nearly straight within a pixel.
        coverage = np.clip(0.5 - _distance(thing.shape, x, y, thing.radius * size), 0, 1)[..., None]
        patch += coverage * (np.array(COLORS[thing.color], np.float32) - patch)
    return (canvas + 0.5).astype(np.uint8)


def export_coco(
    folder: str | os.PathLike, n_train: int = 1000, n_val: int = 200, size: int = 128, seed: int = 0
) -> None:
    """Write scenes as a COCO folder: `train2017/`, `val2017/` and `annotations/{captions,instances}_*2017.json`.

    pycocotools reads it like COCO: five captions for each image; a category, box, area and outline for each thing.
    """
    from PIL import Image

    folder = Path(folder)
    categories = [{"id": i, "name": shape, "supercategory": "shape"} for i, shape in enumerate(SHAPES, 1)]
    for split, n, first_id in (("train", n_train, 1), ("val", n_val, 1 + n_train)):
        images, captions, instances = [], [], []
        for i, index in enumerate(range(n), first_id):
            drawn = scene(index, seed, split)
            images.append({"id": i, "file_name": f"{i:012d}.png", "width": size, "height": size})
            with atomic_path(folder / f"{split}2017" / images[-1]["file_name"]) as path:
                Image.fromarray(draw(drawn, size)).save(path, format="PNG")
            for number, sentence in enumerate(describe(drawn, seed=seed)):
                captions.append({"id": 10 * i + number, "image_id": i, "caption": sentence})
            for number, thing in enumerate(drawn.things):
                instances.append({"id": 10 * i + number, "image_id": i, **_instance(thing, size)})
        about = {"info": {"description": "showtell's synthetic scenes"}, "licenses": [], "images": images}
        objects = {"annotations": instances, "categories": categories}
        write_json(folder / "annotations" / f"captions_{split}2017.json", about | {"annotations": captions}, None)
        write_json(folder / "annotations" / f"instances_{split}2017.json", about | objects, None)


def _scatter(rng: Random, radii: list[float]) -> list[tuple[float, float]]:
    """Draw centres for things of these radii, with a gap between them and to the border."""
    while True:
        centers: list[tuple[float, float]] = []
        for radius in radii:
            margin = _EXTENT * radius + _GAP
            for _ in range(12):
                x, y = (round(margin + (1 - 2 * margin) * rng.random(), 4) for _ in range(2))
                others = zip(centers, radii, strict=False)
                if all(math.hypot(x - u, y - v) > _EXTENT * (radius + other) + _GAP for (u, v), other in others):
                    centers.append((x, y))
                    break
            else:
                break  # no room left: start again
        else:
            return centers


def _outline(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape of radius 1 around (0, 0), y down; a circle is a polygon of 24 corners."""
    if shape == "square":
        return [(-_SQUARE, -_SQUARE), (_SQUARE, -_SQUARE), (_SQUARE, _SQUARE), (-_SQUARE, _SQUARE)]
    tips, inner = _TIPS.get(shape, (12, 1.0))
    radii = (1.0, 1.0) if shape == "circle" else (_EXTENT, inner)
    angles = [math.pi * i / tips for i in range(2 * tips)]
    return [(radii[i % 2] * math.sin(angle), -radii[i % 2] * math.cos(angle)) for i, angle in enumerate(angles)]


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return each point's signed distance to the outline in pixels, negative inside; exact except near corners."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - _SQUARE * radius
    # A star of n tips is 2n mirror images of one edge, from a tip to the next inner corner: fold the plane onto it.
    tips, inner = _TIPS[shape]
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - 2 * math.pi / tips * np.round(angle * (tips / (2 * math.pi))))
    reach = np.sqrt(x * x + y * y)
    across, along = inner * math.sin(math.pi / tips), _EXTENT - inner * math.cos(math.pi / tips)
    outside = along * reach * np.sin(angle) + across * (reach * np.cos(angle) - _EXTENT * radius)
    return outside / math.hypot(across, along)


def _instance(thing: Thing, size: int) -> dict:
    """Return a COCO object annotation, in pixels."""
    x, y, radius = thing.x, thing.y, thing.radius
    outline = [((x + radius * u) * size, (y + radius * v) * size) for u, v in _outline(thing.shape)]
    xs, ys = zip(*outline, strict=True)
    area = abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(outline, outline[1:] + outline[:1], strict=True)))
    return {
        "category_id": SHAPES.index(thing.shape) + 1,
        "bbox": [round(v, 2) for v in (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))],
        "area": round(area / 2, 2),
        "segmentation": [[round(v, 2) for point in outline for v in point]],
        "iscrowd": 0,
    }
