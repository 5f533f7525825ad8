"""showtell: caption images with trained models, and train your own.

import showtell
captioner = showtell.load()
print(captioner.caption("photo.jpg")[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Captioner", "Vocabulary", "__version__", "get_loader", "load"]

if TYPE_CHECKING:
    from showtell.captioner import Captioner, load
    from showtell.data_loader import get_loader
    from showtell.vocabulary import Vocabulary

_HOMES = {
    "Captioner": "showtell.captioner",
    "load": "showtell.captioner",
    "get_loader": "showtell.data_loader",
    "Vocabulary": "showtell.vocabulary",
}


def __getattr__(name: str) -> object:
    """Import a name when it is first used, so that `import showtell` and `showtell --help` stay fast."""
    if name not in _HOMES:
        raise AttributeError(f"module 'showtell' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
