"""What the released model says of the photographs inside scikit-image. `python docs/photographs.py` draws it."""

from __future__ import annotations

from pathlib import Path

from showtell.demo import caption_photographs
from showtell.report import write_figure

if __name__ == "__main__":
    print(write_figure(Path(__file__).resolve().parent.parent / "images" / "photographs.png", caption_photographs()))
