"""A trained model in PyTorch as the engine of a captioner: encodes images on any device, in either precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from showtell.backbones import has_bfloat16
from showtell.errors import UserError
from showtell.model import CaptionModel

PRECISIONS = ("auto", "float32", "bfloat16")


def find_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device of this name, or by default a GPU if there is one.

    Raises:
        UserError: the device cannot be used.
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(f"--device {device} is not available ({reason}); give cpu, or leave it out") from None


class TorchEngine:
    """Encoder and decoder of a `CaptionModel`.

    Attributes:
        as_arrays: whether images are NumPy arrays rather than tensors. device: where the model runs.
        description: library and precision, for reports.
    """

    as_arrays = False

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu", precision: str = "auto") -> None:
        """Move the model to the device; `precision` is that of `showtell.load`."""
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision!r} is not known; choose one of {', '.join(PRECISIONS)}")
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self._backbone = self.model.encoder.backbone
        pays = has_bfloat16(self.device) and self._backbone.name != "tiny"
        precision = "bfloat16" if precision == "bfloat16" or (precision == "auto" and pays) else "float32"
        if precision == "bfloat16":
            self._backbone = self._backbone.in_bfloat16()
            if isinstance(model, CaptionModel):  # the weights in single precision are freed with the checkpoint
                self.model = model.with_backbone(self._backbone)
        self.description = f"PyTorch, {precision}, {self.device}"

    @torch.inference_mode()
    def encode(self, images: Sequence[Tensor]) -> tuple[Tensor, tuple[int, int] | None]:
        """Encode transformed images of one size; return the features, and rows and columns of their grid, if any."""
        sizes = []
        # Only the network knows its grid: 256 cells may be 16 x 16 or 8 x 32.
        hook = self._backbone.net.register_forward_hook(lambda *call: sizes.append(call[2].shape[2:]))
        try:
            features = self.model.encoder.embed(self._backbone(torch.stack(list(images)).to(self.device)))
        finally:
            hook.remove()
        return features, tuple(sizes[-1]) if features.dim() == 3 else None

    def generator(self, seed: int) -> torch.Generator:
        """Return a random generator for sampling."""
        return torch.Generator(self.device).manual_seed(seed)
