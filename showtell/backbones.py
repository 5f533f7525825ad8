"""The backbones: networks that turn images into features, by name, with their weights, frozen or fine-tuned.

Shapes: B images of S x S pixels, L grid cells, D feature size.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from showtell.errors import MissingFileError, UserError


class Backbone(nn.Module):
    """Turns images into features: one vector each, or a grid of cells for attention.

    Frozen unless `fine_tune` is called (`"tiny"`, which has no pretrained weights, starts trainable). It is always in
    eval mode, frozen or not, so that no batch-norm statistic drifts.

    Attributes:
        feature_size: D.
    """

    def __init__(
        self,
        name: str = "resnet50",
        grid: bool = False,
        weights: str | PathLike | None = "imagenet",
        stride_in_1x1: bool = False,
    ) -> None:
        """Builds a backbone by name.

        Args:
            name: a classification network of torchvision (`resnet18` … `resnet152`, `inception_v3`, …), `tiny` for
                the synthetic images, or `timm/NAME` with the extra `showtell[timm]`.
            grid: whether `forward` returns the grid `(B, L, D)` instead of its mean `(B, D)`.
            weights: `"imagenet"` for the library's own (downloaded once; random with a warning where that fails), a
                local file with a torchvision state dict, or `None` for random ones.
            stride_in_1x1: puts a ResNet's strides into the 1x1 convolutions (He et al. 2015, "v1") instead of
                torchvision's 3x3 ("v1.5"). Some published weights need it.

        Raises:
            UserError: the name is unknown, or the weights do not fit it.
            MissingFileError: the weights' file is not there.
        """
        super().__init__()
        self.name, self.grid = name, grid
        self.net = _build_net(name, weights)
        if stride_in_1x1:
            _move_strides(self.net, name)
        self.to(memory_format=torch.channels_last)  # on a CPU, convolutions are up to twice as fast
        with torch.no_grad():
            self.feature_size = self.net.eval()(torch.zeros(1, 3, 224, 224)).shape[1]
        self.fine_tune("" if name == "tiny" else None)

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, S, S)` normalised images -> `(B, D)`, or `(B, L, D)` row by row with `grid`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trainable):
            return self._pool(self.net(images))

    def _pool(self, maps: Tensor) -> Tensor:
        """The network's `(B, D, h, w)` as features."""
        return maps.flatten(2).transpose(1, 2) if self.grid else maps.mean((2, 3))

    def frozen_part(self) -> Backbone | None:
        """What training leaves as it is, as a frozen backbone whose output can be cached.

        `backbone.forward_from_frozen(backbone.frozen_part()(images)) == backbone(images)`. Where nothing trains it is
        the whole backbone; else the layers before the first that trains, and `None` if there are none.
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
        with torch.no_grad():
            stem.feature_size = stem.net(next(stem.parameters()).new_zeros(1, 3, 224, 224)).shape[1]
        return stem

    def forward_from_frozen(self, features: Tensor) -> Tensor:
        """Continues from the output of `frozen_part()`, `(B, D)` or `(B, L, C)`, to that of `forward`."""
        if not (n_frozen := self._frozen_layers()):
            return features
        side = math.isqrt(features.shape[1])
        maps = features.transpose(1, 2).unflatten(2, (side, side))  # in memory channels last, which convolutions like
        return self._pool(self.net[n_frozen:](maps))

    def _frozen_layers(self) -> int:
        """How many layers come before the first that trains; 0 where none does, or they cannot be told apart."""
        if not isinstance(self.net, nn.Sequential):
            return 0
        trains = (any(p.requires_grad for p in layer.parameters()) for layer in self.net)
        return next((i for i, layer_trains in enumerate(trains) if layer_trains), 0)

    def fine_tune(self, layers: str | Iterable[str] | None) -> None:
        """Chooses what trains: layers whose names start so (`"layer4"`, `["layer3", "layer4"]`), `""` all, `None` none.

        Raises:
            UserError: no layer has that name.
        """
        prefixes = [] if layers is None else [layers] if isinstance(layers, str) else list(layers)
        for prefix in prefixes:
            if not any(name.startswith(prefix) for name, _ in self.net.named_parameters()):
                known = ", ".join(name for name, _ in self.net.named_children())
                raise UserError(f"{self.name} has no layer {prefix!r} to train; its layers are {known}")
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(any(name.startswith(prefix) for prefix in prefixes))
        self.trainable = bool(prefixes)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode whatever is asked: batch norm must use the statistics it was trained with."""
        return super().train(False)


def _build_net(name: str, weights: str | PathLike | None) -> nn.Module:
    if name == "tiny":
        net = TinyNet()
    elif name.startswith("timm/"):
        net = _TimmMaps(name.removeprefix("timm/"), pretrained=weights == "imagenet")
    else:
        net = _torchvision_maps(name)
        if weights == "imagenet":
            _load_imagenet(net, name)
    if weights not in (None, "imagenet"):
        load_backbone_weights(net, weights)
    return net


def _torchvision_maps(name: str) -> nn.Sequential:
    """Everything of a torchvision classifier that comes before its pooling, under torchvision's own names."""
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
    """ImageNet's mean and deviation -> the 0.5 and 0.5 that the Inception networks were trained with."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.new_tensor([0.485, 0.456, 0.406])[:, None, None]
        deviation = images.new_tensor([0.229, 0.224, 0.225])[:, None, None]
        return (images * deviation + mean - 0.5) / 0.5


class _TimmMaps(nn.Module):
    """A network of the timm library as feature maps `(B, D, h, w)`; a transformer's tokens become a square map."""

    def __init__(self, name: str, pretrained: bool) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError(f'the backbone timm/{name} needs timm; type pip install "showtell[timm]"') from None
        if name not in timm.list_models():
            raise UserError(f"timm has no network {name!r}; timm.list_models() lists them")
        self.net = timm.create_model(name, pretrained=pretrained, num_classes=0)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.net.forward_features(images)
        if maps.dim() == 3:
            maps = maps[:, getattr(self.net, "num_prefix_tokens", 0) :].transpose(1, 2)
            side = math.isqrt(maps.shape[2])
            maps = maps.unflatten(2, (side, maps.shape[2] // side))
        elif maps.shape[1] != self.net.num_features:  # channels last, as Swin gives them
            maps = maps.permute(0, 3, 1, 2)
        return maps


class TinyNet(nn.Module):
    """A small convolutional network for the 64 x 64 synthetic images; learns from scratch in minutes on a CPU.

    The first layer cuts the image into 4 x 4 patches, which costs half of two strided convolutions and learns as
    well. Group norm, so that training and evaluation are the same function; two coordinate channels (Liu et al. 2018,
    "CoordConv"), so that "left of" can be learnt from few images.
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
        b, _, height, width = images.shape
        rows = torch.linspace(-1, 1, height, device=images.device, dtype=images.dtype).view(1, 1, -1, 1)
        columns = torch.linspace(-1, 1, width, device=images.device, dtype=images.dtype).view(1, 1, 1, -1)
        place = torch.cat([rows.expand(b, 1, height, width), columns.expand(b, 1, height, width)], 1)
        inputs = torch.cat([images, place], 1).contiguous(memory_format=torch.channels_last)
        return self.stages(self.patches(inputs))


def _move_strides(net: nn.Module, name: str) -> None:
    """Layout v1.5 -> v1: the stride of a stage's first block moves from its 3x3 to its 1x1 convolution."""
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
        warnings.warn(
            f"the ImageNet weights of {name} could not be had ({type(error).__name__}), so it starts random and will "
            f"learn little while frozen; with a network they are downloaded once, or give a file as weights",
            stacklevel=4,
        )
    else:
        _load_matching(net, state, name)


def load_backbone_weights(net: nn.Module, path: str | PathLike) -> None:
    """Loads a torchvision state dict (`.safetensors`, or `.pth` read with `weights_only`) into a backbone's `net`.

    A captioner saved by showtell serves too: what it holds besides its backbone is left.

    Raises:
        MissingFileError: there is no such file.
        UserError: it cannot be read, or its keys or shapes are another network's.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"there are no backbone weights at {path}; give a file, or leave weights to the default")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = {key.removeprefix("encoder.backbone.net."): value for key, value in load_file(path).items()}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, not a checkpoint, or a pickle that wants to run code
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}); "
            "a state dict in .safetensors or .pth is expected"
        ) from error
    _load_matching(net, state, str(path))


def _load_matching(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Loads what the backbone has (a classifier's last layers are left out), in single precision."""
    if not isinstance(state, dict):
        raise UserError(f"{source} holds a {type(state).__name__}, not a state dict; save net.state_dict()")
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    own = net.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    wrong = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or wrong:
        key = (missing or wrong)[0]
        raise UserError(
            f"the weights of {source} are another network's: {len(missing)} tensors are missing and {len(wrong)} have "
            f"another shape, {key} first; choose the backbone they were made for"
        )
    net.load_state_dict(
        {k: state[k].float() if own[k].is_floating_point() else state[k] for k in own if k in state}, False
    )
