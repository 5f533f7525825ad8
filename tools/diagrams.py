"""Draw the diagrams of the notebooks: encoder-decoder, encoder and decoder, as SVG in images/.

python tools/diagrams.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from showtell.figures import LIGHT
from showtell.synthetic import Scene, Thing, draw

IMAGES = Path(__file__).resolve().parent.parent / "images"
INK, QUIET, EDGE = LIGHT["ink"], LIGHT["muted"], "#9aa5b1"
BLUE, GREEN, YELLOW, PLAIN = "#eaf2fb", "#e3f4ef", "#fdf3e1", "#f5f7fa"
SCENE = Scene((Thing("star", "yellow", "large", 0.32, 0.38, 0.17), Thing("circle", "blue", "small", 0.72, 0.7, 0.1)))
WORDS = ("a", "yellow", "star", "above", "a", "blue", "circle")


def canvas(width: int, height: int) -> Axes:
    """Return empty axes with the origin in the upper left corner, in pixels."""
    figure = Figure(figsize=(width / 100, height / 100), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return axes


def write(axes: Axes, x: float, y: float, text: str, size: float = 14, color: str = INK, **style: object) -> None:
    """Write text around (x, y); `size` in pixels."""
    style = {"ha": "center", "va": "center"} | style
    axes.text(x, y, text, fontsize=0.72 * size, color=color, linespacing=1.45, **style)


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, fill: str = PLAIN, **style: object):
    """Draw a rounded box whose upper left corner is (x, y), with its text in the middle."""
    shape = f"round,pad=0,rounding_size={style.pop('radius', 7)}"
    line = {"edgecolor": EDGE, "linewidth": 0.9, "linestyle": style.pop("linestyle", "-")}
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=fill, mutation_aspect=1, **line))
    write(axes, x + width / 2, y + height / 2, text, **style)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    """Draw an arrow from `start` to `end`."""
    style = {"arrowstyle": "-|>,head_width=0.22,head_length=0.45", "color": INK, "linewidth": 1.1} | style
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def image(axes: Axes, x: float, y: float, side: float, cells: int = 0) -> None:
    """Draw the scene, under a grid of `cells` by `cells` if given."""
    axes.imshow(draw(SCENE, 400), extent=(x, x + side, y + side, y), aspect="auto", interpolation="bilinear")
    axes.add_patch(Rectangle((x, y), side, side, fill=False, edgecolor=EDGE, linewidth=0.9))
    for i in range(1, cells):
        at = side * i / cells
        axes.plot([x + at, x + at], [y, y + side], color=EDGE, linewidth=0.6)
        axes.plot([x, x + side], [y + at, y + at], color=EDGE, linewidth=0.6)


def vector(axes: Axes, x: float, y: float, n: int, cell: float = 14, seed: int = 0) -> None:
    """Draw a column of `n` cells in random shades of the blue of features."""
    for i, shade in enumerate(np.random.default_rng(seed).uniform(0.12, 0.8, n)):
        place = (x, y + i * cell)
        axes.add_patch(Rectangle(place, cell, cell, facecolor=(0.15, 0.4, 0.75, shade), edgecolor="white", lw=0.8))


def draw_encoder() -> Axes:
    """Draw how an image becomes a grid of features, and either one vector or one vector per cell."""
    axes = canvas(1000, 330)
    image(axes, 24, 74, 150, cells=8)
    write(axes, 99, 250, "image\n(B, 3, S, S)", 13, QUIET)
    arrow(axes, (182, 149), (212, 149))
    box(axes, 216, 94, 168, 110, "backbone\nResNet-50 without\nits classifier", BLUE)
    write(axes, 300, 226, "pretrained, frozen", 13, QUIET)
    arrow(axes, (390, 149), (420, 149))
    for column in range(8):
        vector(axes, 426 + 14 * column, 93, 8, seed=column)
    write(axes, 482, 240, "grid: L cells of\nD numbers\n(B, L, D)", 13, QUIET)
    arrow(axes, (544, 122), (590, 82))
    arrow(axes, (544, 176), (590, 226))
    box(axes, 596, 54, 116, 56, "mean over\nthe cells", PLAIN)
    arrow(axes, (716, 82), (746, 82))
    box(axes, 750, 54, 116, 56, "embed\nlinear, trained", GREEN)
    box(axes, 750, 198, 116, 56, "embed\nlinear, trained", GREEN)
    arrow(axes, (596, 226), (746, 226))
    write(axes, 671, 210, "each cell separately", 13, QUIET)
    arrow(axes, (870, 82), (894, 82))
    arrow(axes, (870, 226), (894, 226))
    vector(axes, 902, 40, 6, seed=11)
    for column in range(8):
        vector(axes, 902 + 10 * column, 186, 8, cell=10, seed=20 + column)
    write(axes, 984, 150, "(B, E)  for decoders without attention", 13, QUIET, ha="right")
    write(axes, 984, 292, "(B, L, E)  for decoders with attention", 13, QUIET, ha="right")
    return axes


def draw_decoder() -> Axes:
    """Draw Show and Tell unrolled: the image first, then each word, and above each the word that should follow."""
    inputs, targets = ("<start>", *WORDS), (*WORDS, "<end>")
    left, gap, width = 142, 92, 78
    axes = canvas(left + gap * (len(inputs) + 1) + 12, 400)
    rows = (("target", 44), ("linear", 108), ("LSTM", 186), ("embed", 264), ("input", 330))
    for name, y in rows:
        write(axes, 22, y, name, 14, QUIET, ha="left")
    for i in range(len(inputs) + 1):
        x = left + gap * i
        middle = x + width / 2
        box(axes, x, 160, width, 52, "LSTM", YELLOW)
        arrow(axes, (middle, 244), (middle, 215))
        if i:
            box(axes, x, 246, width, 36, "embed", GREEN, size=13)
            arrow(axes, (middle, 312), (middle, 285))
            write(axes, middle, 335, inputs[i - 1], 15, va="baseline")
            box(axes, x, 92, width, 34, "linear", BLUE, size=13)
            arrow(axes, (middle, 158), (middle, 128))
            arrow(axes, (middle, 90), (middle, 62))
            write(axes, middle, 49, targets[i - 1], 15, va="baseline", weight="bold")
        if i < len(inputs):
            arrow(axes, (x + width, 186), (x + gap, 186))
    middle = left + width / 2
    box(axes, left, 246, width, 36, "encoder", GREEN, size=13)
    arrow(axes, (middle, 300), (middle, 285))
    image(axes, middle - 28, 302, 56)
    write(axes, middle, 108, "not in\nthe loss", 13, QUIET)
    write(
        axes, left + width + 14, 380,
        "In training, the inputs are the true words (teacher forcing); at inference, the words generated so far.",
        13, QUIET, ha="left",
    )  # fmt: skip
    return axes


def draw_encoder_decoder() -> Axes:
    """Draw the whole model in one line."""
    axes = canvas(1000, 250)
    image(axes, 24, 48, 140)
    write(axes, 94, 208, "image", 13, QUIET)
    arrow(axes, (174, 118), (214, 118))
    box(axes, 220, 62, 170, 112, "encoder", BLUE, size=16)
    write(axes, 305, 200, "a convolutional network\nand a linear layer", 13, QUIET)
    arrow(axes, (396, 118), (428, 118))
    vector(axes, 436, 62, 8)
    write(axes, 443, 200, "features", 13, QUIET)
    arrow(axes, (458, 118), (490, 118))
    box(axes, 496, 62, 170, 112, "decoder", YELLOW, size=16)
    write(axes, 581, 200, "an LSTM or a Transformer,\none word at a time", 13, QUIET)
    arrow(axes, (672, 118), (704, 118))
    write(axes, 712, 118, "A yellow star above\na blue circle.", 17, ha="left", weight="bold")
    arrow(axes, (790, 88), (600, 56), connectionstyle="arc3,rad=0.3", linestyle="--", color=QUIET)
    write(axes, 705, 24, "each word is the next input", 13, QUIET)
    return axes


DIAGRAMS = {"encoder-decoder": draw_encoder_decoder, "encoder": draw_encoder, "decoder": draw_decoder}


def main(folder: Path = IMAGES) -> list[Path]:
    """Write the diagrams and return their paths."""
    paths = [folder / f"{name}.svg" for name in DIAGRAMS]
    # Letters as outlines look the same everywhere; a fixed salt and no date give the same bytes every time.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "showtell", "font.family": "DejaVu Sans"}):
        for path, make in zip(paths, DIAGRAMS.values(), strict=True):
            make().figure.savefig(path, metadata={"Date": None})
    return paths


if __name__ == "__main__":
    print(*main(), sep="\n")
