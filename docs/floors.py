"""The floors of the package, written once: `tests/test_house.py` holds the imports to them, and this draws them.

`python docs/floors.py` writes images/floors.svg.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "images" / "floors.svg"

# From the ground up: what the floor is for, and its modules. A module imports from its own floor or below, never from
# above. A module may be listed before it is written.
FLOORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("words and files, and drawn scenes", "errors files tokenizer vocabulary sentences synthetic distributed".split()),
    (
        "pictures in, features and scores out",
        "datasets annotations transforms image_stream features backbones decoders model ngrams metrics java_metrics "
        "figures".split(),
    ),
    (
        "batches, decoding, what is kept",
        "data_loader decoding checkpoint legacy report scoring results training_log".split(),
    ),
    ("whole tasks", "train self_critical evaluate captioner export bulk recipes".split()),
    ("what you start", "__main__ app demo".split()),
)

WIDTH, MARGIN, LINE, GAP, BOX = 920, 20, 92, 10, 34
INK, QUIET, EDGE = "#1f2933", "#616e7c", "#9aa5b1"
SHADES = ("#f5f7fa", "#eaf2fb", "#e3f4ef", "#fdf3e1", "#fbe9ec")


def floor_of(module: str) -> int | None:
    """The floor `module` (its bare name) is listed on; None for a module nobody has listed."""
    return next((floor for floor, (_, modules) in enumerate(FLOORS) if module in modules), None)


def draw(written: set[str]) -> str:
    """The floors as SVG, with the modules among `written` as boxes and the ground floor at the bottom."""
    height = 2 * MARGIN + LINE * len(FLOORS) + GAP * (len(FLOORS) - 1) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'role="img" aria-label="The floors of the package: an import goes down or stays on its floor">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    arrows = []  # above all the floors
    top = MARGIN
    for floor in reversed(range(len(FLOORS))):
        purpose, modules = FLOORS[floor]
        parts += [
            f'<rect x="{MARGIN}" y="{top}" width="{WIDTH - 2 * MARGIN}" height="{LINE}" rx="8" '
            f'fill="{SHADES[floor]}" stroke="{EDGE}" stroke-width="0.8"/>',
            f'<text x="{MARGIN + 16}" y="{top + 27}" font-size="15" fill="{INK}">floor {floor}'
            f'<tspan dx="12" font-size="13" fill="{QUIET}">{escape(purpose)}</tspan></text>',
        ]
        x = MARGIN + 16
        for module in (name for name in modules if name in written):
            width = 8.1 * len(module) + 18  # a monospaced letter at 13.5 px, and room around the word
            parts += [
                f'<rect x="{x:.1f}" y="{top + 42}" width="{width:.1f}" height="{BOX}" rx="5" fill="#ffffff" '
                f'stroke="{EDGE}"/>',
                f'<text x="{x + width / 2:.1f}" y="{top + 64}" font-size="13.5" font-family="monospace" '
                f'text-anchor="middle" fill="{INK}">{module}</text>',
            ]
            x += width + GAP
        if floor:
            middle = top + LINE + GAP / 2
            arrows.append(
                f'<path d="M {WIDTH - 70} {middle - 16} v 26 m -6 -7 l 6 7 l 6 -7" fill="none" stroke="{INK}" '
                'stroke-width="1.6"/>'
            )
        top += LINE + GAP
    parts.append(
        f'<text x="{MARGIN + 16}" y="{height - 14}" font-size="13" fill="{QUIET}">'
        "An import goes down or stays on its floor, never up, and there is no circle.</text>"
    )
    return "\n".join([*parts, *arrows, "</svg>"]) + "\n"


def written_modules() -> set[str]:
    """The bare names of the package's modules on disk."""
    return {path.stem for path in (ROOT / "showtell").glob("*.py")} - {"__init__"}


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(written_modules()), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
