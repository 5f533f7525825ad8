"""The released models for `torch.hub.load(FOLDER, "showtell_attend", source="local")`, FOLDER being this checkout."""

from __future__ import annotations

import showtell as _showtell

dependencies = ["torch", "torchvision", "numpy", "PIL", "safetensors", "tqdm", "platformdirs", "pooch"]


def showtell_attend(**options: object) -> _showtell.Captioner:
    """Return the released captioner with attention; `options` are those of `showtell.load`, such as `device`."""
    return _showtell.load("showtell-attend", **options)


def showtell_classic(**options: object) -> _showtell.Captioner:
    """Return the released Show and Tell captioner; `options` are those of `showtell.load`, such as `device`."""
    return _showtell.load("showtell-classic", **options)
