"""What the released model says of the photographs inside scikit-image. `python docs/photographs.py` draws it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from showtell.demo import caption_photographs
from showtell.report import write_figure

OUT = Path(__file__).resolve().parent.parent / "images" / "photographs.jpg"

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        figure = write_figure(Path(folder) / "photographs.png", caption_photographs())
        Image.open(figure).convert("RGB").save(OUT, quality=85, optimize=True)
    print(OUT)
