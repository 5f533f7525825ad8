"""Draw images/photographs.jpg: scikit-image's photographs with the released model's captions.

python tools/photographs.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from showtell.demo import caption_photographs
from showtell.report import write_figure

IMAGES = Path(__file__).resolve().parent.parent / "images"


def main(folder: Path = IMAGES) -> Path:
    """Write the figure as a JPEG and return its path."""
    path = folder / "photographs.jpg"
    with tempfile.TemporaryDirectory() as temporary:
        figure = write_figure(Path(temporary) / "photographs.png", caption_photographs())
        with Image.open(figure) as image:
            image.convert("RGB").save(path, quality=85, optimize=True)
    return path


if __name__ == "__main__":
    print(main())
