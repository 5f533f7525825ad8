"""Image backbones by name, with their weights: frozen or fine-tuned, giving a vector or a grid per image.

Shapes: B images of S x S pixels, L grid cells, D feature size.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from showtell.errors import UserError
from showtell.files import require_regular_file
from showtell.quantise import dequantise
from showtell.transforms import import_torchvision


class Backbone(nn.Module):
    """An image network that gives one feature vector per image, or a grid for attention.

    Frozen unless `fine_tune` is called (`"tiny"`, which has no pretrained weights, starts trainable). It is always
    in eval mode, so that batch norm keeps the statistics of the pretrained network. `feature_size` is D.
    """

    def __init__(
        self,
        name: str = "resnet50",
        grid: bool = False,
        weights: str | PathLike | None = "imagenet",
        stride_in_1x1: bool = False,
    ) -> None:
        """Build a backbone by name.

        Args:
            name: a classification network of torchvision, `tiny` for the synthetic images, or `timm/NAME` with the
                extra `showtell[timm]`.
            grid: whether `forward` returns the grid `(B, L, D)` instead of its mean `(B, D)`.
            weights: `"imagenet"` for the library's weights (downloaded once; if that fails, random weights and a
                warning), a file for `load_backbone_weights`, or `None` for random weights.
            stride_in_1x1: put the strides of a ResNet into the 1x1 convolutions (He et al. 2015, "v1") instead of the
                3x3 convolutions, as in torchvision ("v1.5"). Some published weights need it.

        Raises:
            UserError: the name is unknown, or the weights do not fit the network.
        """
        super().__init__()
        self.name, self.grid = name, grid
        self.net = _build_net(name, weights).eval()
        if stride_in_1x1:
            _move_strides(self.net, name)
        self.to(memory_format=torch.channels_last)  # on a CPU, convolutions are up to twice as fast
        if name not in _FEATURE_SIZES:
            _FEATURE_SIZES[name] = _count_channels(self.net)
        self.feature_size = _FEATURE_SIZES[name]
        self.fine_tune("" if name == "tiny" else None)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, S, S)` normalised images -> `(B, D)`, or `(B, L, D)` row by row with `grid`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            return self._pool(self.net(images))

    def _pool(self, maps: Tensor) -> Tensor:
        """Feature maps `(B, D, h, w)` -> `(B, L, D)` or `(B, D)`."""
        return maps.flatten(2).transpose(1, 2) if self.grid else maps.mean((2, 3))

    def frozen_part(self) -> Backbone | None:
        """Return the layers before the first that trains, as a frozen backbone whose output can be cached.

        `backbone.forward_from_frozen(backbone.frozen_part()(images)) == backbone(images)`. If nothing trains, it is the
        whole backbone; if there is no frozen layer before the first that trains, `None`.
        """
        if not self.trainable:
            return self
        if not (n_frozen := self._frozen_layers()):
            return None
        children = list(self.net.named_children())
        stem = Backbone.__new__(Backbone)
        nn.Module.__init__(stem)
        stem.name, stem.grid, stem.trainable = f"{self.name} before {children[n_frozen][0]}", True, False
        stem.net = nn.Sequential(OrderedDict(children[:n_frozen])).eval()
        stem.feature_size = _count_channels(stem.net)
        return stem

    def forward_from_frozen(self, features: Tensor) -> Tensor:
        """Compute the output of `forward` from that of `frozen_part()`, `(B, D)` or `(B, L, C)`."""
        if not (n_frozen := self._frozen_layers()):
            return features
        side = math.isqrt(features.shape[1])
        maps = features.transpose(1, 2).unflatten(2, (side, side))  # (B, C, h, w), channels last in memory
        return self._pool(self.net[n_frozen:](maps))

    def _frozen_layers(self) -> int:
        """Count the layers before the first that trains; 0 if there are no weights in them, or none trains."""
        if not isinstance(self.net, nn.Sequential) or hasattr(self.net, "permute"):  # Swin's layers give (B, h, w, C)
            return 0
        parameters = [list(layer.parameters()) for layer in self.net]
        first = next((i for i, own in enumerate(parameters) if any(p.requires_grad for p in own)), 0)
        return first if any(parameters[:first]) else 0

    def fine_tune(self, layers: str | Iterable[str] | None) -> None:
        """Choose the layers to train by the beginning of their names: `["layer3", "layer4"]`, `""` all, `None` none.

        A name that no layer has raises a `UserError`. Layers of timm have timm's names, such as `blocks.11`.
        """
        net = self.net.net if isinstance(self.net, _TimmMaps) else self.net
        prefixes = [] if layers is None else [layers] if isinstance(layers, str) else list(layers)
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name, _ in net.named_parameters()):
                known = ", ".join(name for name, child in net.named_children() if list(child.parameters()))
                raise UserError(f"{self.name} has no layer {prefix!r} to fine-tune; choose from {known}")
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(any(name.startswith(prefix) for prefix in prefixes))
        self.trainable = bool(prefixes)

    def in_bfloat16(self) -> Backbone:
        """Return a frozen copy for inference: batch norm folded into the convolutions, computed in bfloat16.

        On hardware that has bfloat16, a ResNet-50 takes a third of the time; its features, given in single precision,
        agree to two or three digits.
        """
        tensors = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        fast = copy.deepcopy(self, tensors)  # which shares them, until they are replaced one by one
        fast.trainable = False
        fast.net = _InBfloat16(fast.net)
        return fast

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode whatever `mode` is."""
        return super().train(False)


class _InBfloat16(nn.Module):
    cpu_batch = 8  # the feature maps of more images do not fit in a CPU's caches, which takes a third longer

    def __init__(self, net: nn.Module) -> None:
        """Take a network whose modules may be changed, and whose tensors may not."""
        super().__init__()
        self.net = fold_batch_norm(net, torch.bfloat16)
        for module in net.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None and tensor.is_floating_point():
                        own[name] = nn.Parameter(tensor.detach().to(torch.bfloat16), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        parts = images.to(torch.bfloat16).split(self.cpu_batch if images.device.type == "cpu" else len(images))
        return torch.cat([self.net(part) for part in parts]).float()


def fold_batch_norm(net: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Replace each convolution that a batch norm follows in the same module by one of both, of type `dtype`."""
    for parent in list(net.modules()):
        for (first, convolution), (second, norm) in pairwise(list(parent.named_children())):
            if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                fused = fuse_conv_bn_eval(convolution, norm)
                setattr(parent, first, fused.to(dtype, memory_format=torch.channels_last))
                setattr(parent, second, nn.Identity())
    return net


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device computes in bfloat16 in hardware; elsewhere it is slower than single precision."""
    if device.type == "cuda":  # `is_bf16_supported` counts emulation, and asks the current device
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether to train in bfloat16: if asked for, or with `auto` on a GPU that has it in hardware."""
    if precision == "auto":
        return device.type == "cuda" and has_bfloat16(device)
    return precision == "bfloat16"


# Of the backbones built so far. Counting imports PyTorch's compiler (1.5 s), so the most frequent ones are known.
_FEATURE_SIZES = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "resnet152": 2048}
_BUILT_ON_CPU = ("timm/", "regnet")  # these compute with tensors while they are built, which the meta device cannot


def _build_net(name: str, weights: str | PathLike | None) -> nn.Module:
    with torch.device("cpu") if name.startswith(_BUILT_ON_CPU) else contextlib.nullcontext():
        if name == "tiny":
            net = TinyNet()
        elif name.startswith("timm/"):
            net = _TimmMaps(name.removeprefix("timm/"), pretrained=weights == "imagenet")
        else:
            net = _torchvision_maps(name)
    if weights == "imagenet" and not name.startswith(("tiny", "timm/")):
        _load_imagenet(net, name)
    elif weights not in (None, "imagenet"):
        load_backbone_weights(net.net if isinstance(net, _TimmMaps) else net, weights)
    return net


@torch.no_grad()
def _count_channels(net: nn.Module) -> int:
    """Return the number of channels of a network's output, without computing numbers."""
    if isinstance(net, _TimmMaps):
        return net.net.num_features
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    return torch.func.functional_call(net, shapes, torch.zeros(1, 3, 224, 224, device="meta")).shape[1]


def _torchvision_maps(name: str) -> nn.Sequential:
    """Return the layers of a torchvision classifier before its pooling, under torchvision's own names."""
    import_torchvision()
    from torchvision import models

    known = [n for n in models.list_models(module=models) if not n.startswith("vit_")]
    if name not in known:
        raise UserError(f"there is no backbone {name!r}; choose tiny, timm/NAME or one of {', '.join(known)}")
    inception = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    net = models.get_model(name, weights=None, **inception)
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    if inception:
        stages["renormalize"] = _Renormalize()
    for child, module in net.named_children():
        if child in ("avgpool", "fc", "classifier", "dropout", "head"):
            break
        if not child.lower().startswith("aux"):
            stages[child] = nn.Sequential(*module) if isinstance(module, nn.ModuleList) else module
    if name.startswith("densenet"):
        stages["relu"] = nn.ReLU()
    return nn.Sequential(stages)


class _Renormalize(nn.Module):
    """Change the normalisation from ImageNet's mean and deviation to 0.5 and 0.5, as in the Inception networks."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.new_tensor([0.485, 0.456, 0.406])[:, None, None]
        deviation = images.new_tensor([0.229, 0.224, 0.225])[:, None, None]
        return (images * deviation + mean - 0.5) / 0.5


class _TimmMaps(nn.Module):
    """A network of the timm library that gives feature maps `(B, D, h, w)`; a transformer's tokens form a square."""

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        timm, self.name = _timm_with(name), name
        if pretrained:
            try:
                self.net = timm.create_model(name, pretrained=True, num_classes=0)
                return
            except Exception as error:  # as in `_load_imagenet`
                _warn_of_random_weights(f"timm/{name}", error)
        self.net = timm.create_model(name, num_classes=0)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.net.forward_features(images)
        if isinstance(maps, Tensor):
            if maps.dim() == 3:
                maps = maps[:, getattr(self.net, "num_prefix_tokens", 0) :].transpose(1, 2)
                side = math.isqrt(maps.shape[2])
                maps = maps.unflatten(2, (side, side)) if side * side == maps.shape[2] else maps
            elif maps.shape[1] != self.net.num_features:  # channels last, as Swin gives them
                maps = maps.movedim(-1, 1)
            if maps.dim() == 4 and maps.shape[1] == self.net.num_features:
                return maps
        raise UserError(f"timm/{self.name} gives no square grid of features; choose another network of timm")


class TimmImages(NamedTuple):
    """The images that a network of timm was trained with, and whether it takes no other size."""

    resize: int  # the shorter side, of which the middle is cut
    crop: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fixed: bool


def timm_images(name: str) -> TimmImages:
    """Return timm's data configuration of a backbone `timm/NAME`; its interpolation is not used."""
    name = name.removeprefix("timm/")
    _timm_with(name)
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    own = get_pretrained_cfg(name)
    found = resolve_data_config(pretrained_cfg=own.to_dict() if own else {"input_size": (3, 224, 224)})
    crop, fixed = found["input_size"][-1], bool(own and own.fixed_input_size)
    return TimmImages(int(crop / found["crop_pct"]), crop, found["mean"], found["std"], fixed)


def _timm_with(name: str) -> ModuleType:
    """Return timm, which must have a network of this name, with or without a tag for its weights."""
    try:
        import timm
    except ImportError:
        raise UserError(f'the backbone timm/{name} needs timm; type pip install "showtell[timm]"') from None
    known = [*timm.list_models(), *timm.list_pretrained()]
    if name not in known:
        nearest = ", ".join(difflib.get_close_matches(name, known, 3, 0))
        raise UserError(f"timm has no network {name!r}; similar are {nearest}, and timm.list_models() lists all")
    return timm


class TinyNet(nn.Module):
    """A small convolutional network for the 64 x 64 synthetic images, trained from scratch in minutes on a CPU.

    The first layer splits the image into 4 x 4 patches, which costs half of two strided convolutions at the same
    accuracy. Group norm makes training and evaluation the same function. Two coordinate channels (Liu et al. 2018,
    "CoordConv") help to learn "left of" from few images.
    """

    def __init__(self) -> None:
        super().__init__()

        def block(d_in: int, d_out: int, kernel: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(d_in, d_out, kernel, stride, kernel % 2, bias=False)
            return [convolution, nn.GroupNorm(8, d_out), nn.ReLU()]

        self.patches = nn.Sequential(*block(5, 48, 4, 4))
        self.stages = nn.Sequential(*block(48, 48, 3, 1), *block(48, 96, 3, 2), *block(96, 96, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, S, S)` -> `(B, 96, S/8, S/8)`."""
        axes = [torch.linspace(-1, 1, size, device=images.device, dtype=images.dtype) for size in images.shape[2:]]
        place = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(images.shape[0], -1, -1, -1)  # (B, 2, S, S)
        inputs = torch.cat([images, place], 1).contiguous(memory_format=torch.channels_last)
        return self.stages(self.patches(inputs))


def _move_strides(net: nn.Module, name: str) -> None:
    """Change layout v1.5 to v1: move the stride of each stage's first block from its 3x3 to its 1x1 convolution."""
    stages = [stage for stage_name, stage in net.named_children() if stage_name in ("layer2", "layer3", "layer4")]
    if not stages or not hasattr(stages[0][0], "conv3"):
        raise UserError(f"stride_in_1x1 needs a bottleneck ResNet such as resnet50, not {name}")
    for stage in stages:
        stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride


def _load_imagenet(net: nn.Module, name: str) -> None:
    from torchvision import models

    try:
        state = models.get_model_weights(name).DEFAULT.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # no network, a proxy, a broken download: the library raises many kinds
        _warn_of_random_weights(name, error)
    else:
        _load_matching(net, state, name)


def _warn_of_random_weights(name: str, error: Exception) -> None:
    problem = f"could not download the ImageNet weights of {name} ({type(error).__name__})"
    effect = "the encoder is randomly initialised and learns little while frozen"
    warnings.warn(f"{problem}; {effect}; connect to the internet once, or pass a file as weights", stacklevel=5)


def load_backbone_weights(net: nn.Module, path: str | PathLike) -> None:
    """Load a state dict of torchvision or timm (`.safetensors`, or `.pth` read with `weights_only`) into their network.

    A checkpoint of showtell is accepted too; only its backbone is used.

    A file that is not there raises a `MissingFileError`; one of another kind or network a `UserError`.
    """
    path = Path(path)
    require_regular_file(path, "file of backbone weights", "give a state dict, or leave out the weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            own = re.compile(r"^encoder\.backbone\.net\.(net\.)?")  # `net.` again for a network of timm
            state = {own.sub("", key): value for key, value in dequantise(load_file(path)).items()}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, not a checkpoint, or a pickle that wants to run code
        kind = type(error).__name__
        raise UserError(f"cannot read {path} as weights ({kind}); give a state dict in .safetensors or .pth") from error
    _load_matching(net, state, str(path))


def _load_matching(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load the tensors that the backbone has, in single precision; those of a classifier's last layers are ignored."""
    if not isinstance(state, dict):
        raise UserError(f"{source} holds a {type(state).__name__}, not a state dict; save net.state_dict()")
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    own = net.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or wrong:
        counts = f"{len(missing)} tensors are missing and {len(wrong)} have another shape, {(missing + wrong)[0]} first"
        given = f"the weights of {source} belong to another network: {counts}"
        raise UserError(f"{given}; choose the backbone they were trained with")
    net.load_state_dict({key: state[key] for key in own if key in state}, strict=False)  # copies to single precision
