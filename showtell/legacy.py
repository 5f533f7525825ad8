"""Import and export of other captioning repositories' files: `encoder-N.pkl`, `decoder-N.pkl` and `vocab.pkl`.

Layers are recognised by their shape and role, because every repository has its own names for them.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from showtell.checkpoint import Checkpoint, build_model, read_plain_pickle
from showtell.errors import UserError
from showtell.files import atomic_path
from showtell.transforms import IMAGENET, Transform
from showtell.vocabulary import Vocabulary

# nn.Sequential(*list(resnet.children())[:-1]) numbers the layers; 2, 3 and 8 (ReLU and poolings) have no weights.
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_ORDER = "give the encoder first, the decoder second and the vocabulary third"
_NAMED = {name: number for number, name in _NUMBERED.items()}
# (whether the blocks are bottlenecks, how many each layer has) -> torchvision's name
_RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_NORM = ("weight", "bias", "running_mean", "running_var")
_BATCH_NORM_EPS = 1e-5  # PyTorch's default, which all of them use
_Linear = tuple[Tensor, Tensor]  # weight (out, in) and bias (out,)


def import_legacy(
    encoder_path: str | PathLike,
    decoder_path: str | PathLike,
    vocab_path: str | PathLike,
    transform: Transform = IMAGENET,
) -> Checkpoint:
    """Read a Show and Tell model: a torchvision ResNet, a linear layer, an LSTM whose first input is the image.

    A `BatchNorm1d` after the encoder's linear layer is folded into it, which changes nothing in eval mode. Files saved
    from `nn.DataParallel` are read too. No pickle is executed.

    Args:
        encoder_path, decoder_path: state dicts.
        vocab_path: a pickled `Vocabulary` object.
        transform: the image transform, which the files do not hold. Most repositories train on crops of 224 pixels.

    Raises:
        MissingFileError: a file does not exist.
        UserError: a file is damaged, a whole pickled module or another kind of model, or does not fit the others.
    """
    vocab = Vocabulary.load(vocab_path)
    backbone, net, (weight, bias) = _read_encoder(_state_dict(encoder_path, "encoder"), encoder_path)
    decoder, sizes = _read_decoder(_state_dict(decoder_path, "decoder"), decoder_path)
    if sizes["vocab_size"] != len(vocab):
        given = f"{vocab_path} has {len(vocab)} words and {decoder_path} was trained with {sizes['vocab_size']}"
        raise UserError(f"{given}; give the vocabulary of the same training run")
    if sizes["embed_size"] != len(bias):
        given = f"{encoder_path} gives {len(bias)} features per image and {decoder_path} takes {sizes['embed_size']}"
        raise UserError(f"{given}; give the encoder and decoder of the same training run")
    tensors = {f"encoder.backbone.net.{name}": tensor for name, tensor in net.items()}
    tensors |= {"encoder.embed.weight": weight, "encoder.embed.bias": bias}
    tensors |= {f"decoder.{name}": tensor for name, tensor in decoder.items()}
    config = {
        "encoder": {"embed_size": sizes["embed_size"], "backbone": backbone},
        "decoder": {"name": "show-tell", **sizes},
    }
    names = {"encoder": Path(encoder_path).name, "decoder": Path(decoder_path).name, "vocab": Path(vocab_path).name}
    model = build_model(config, tensors, f"{encoder_path} with {decoder_path}")
    return Checkpoint(model, vocab, transform.evaluation(), {"imported_from": names})


def export_legacy(checkpoint: Checkpoint, folder: str | PathLike, number: int = 1) -> tuple[Path, Path, Path]:
    """Write `encoder-N.pkl`, `decoder-N.pkl` and `vocab.pkl` for other captioning repositories.

    The first two are state dicts with the keys `resnet.*` and `embed.*`, and `embed.*`, `lstm.*` and `linear.*`. A
    batch norm after the encoder's linear layer is folded into it. The vocabulary is plain lists, as `Vocabulary.save`
    writes it. The files do not hold the image transform. N is the epoch in other repositories.

    Returns:
        The paths of encoder, decoder and vocabulary.

    Raises:
        UserError: the model is not Show and Tell on a torchvision ResNet, for which alone the files have a place. The
            released `showtell-classic-1` is not: the strides of its ResNet are in the 1x1 convolutions.
    """
    config, model = checkpoint.model.config, checkpoint.model
    decoder, backbone = config["decoder"]["name"], model.encoder.backbone.name
    problem = None
    if decoder != "show-tell":
        problem = f"the decoder show-tell, not {decoder!r}"
    elif backbone not in _RESNETS.values():
        problem = f"the backbones {', '.join(_RESNETS.values())}, not {backbone!r}"
    elif config["encoder"].get("stride_in_1x1"):  # a state dict has no strides, and no 3x3 kernel makes up for them
        problem = "torchvision's ResNets, with their strides in the 3x3 convolutions, not in the 1x1 (stride_in_1x1)"
    if problem:
        remedy = "no released model fits it, and showtell train --recipe classic trains one that does"
        raise UserError(f"the legacy format supports {problem}; {remedy}")
    state = {name: tensor.detach().float().cpu() for name, tensor in model.encoder.embed.state_dict().items()}
    batch_norm = config["encoder"].get("batch_norm")
    weight, bias = _fold(state, "0.", "1.") if batch_norm else (state["weight"], state["bias"])
    encoder_state = {"embed.weight": weight, "embed.bias": bias}
    for name, tensor in model.encoder.backbone.net.state_dict().items():
        layer, _, rest = name.partition(".")
        encoder_state[f"resnet.{_NAMED[layer]}.{rest}"] = tensor.cpu()
    # Clones, because a weight that two layers share must be stored twice.
    decoder_state = {name: tensor.float().cpu().clone() for name, tensor in model.decoder.state_dict().items()}
    folder = Path(folder)
    paths = (folder / f"encoder-{number}.pkl", folder / f"decoder-{number}.pkl", folder / "vocab.pkl")
    for path, content in zip(paths, (encoder_state, decoder_state), strict=False):
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    checkpoint.vocab.save(paths[2])
    return paths


def _state_dict(path: str | PathLike, role: str) -> dict[str, Tensor]:
    """Read a state dict in single precision, without the prefix `module.` of `nn.DataParallel`."""
    content = read_plain_pickle(path, f"state dict of the {role}", f"give a file with {role}.state_dict()")
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict; save {role}.state_dict() alone")
    if others := [str(key) for key, value in content.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path} holds {_some(others)} besides tensors; save {role}.state_dict() alone")
    state = {str(key): value.float() if value.is_floating_point() else value for key, value in content.items()}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _read_encoder(state: dict[str, Tensor], path: str | PathLike) -> tuple[str, dict[str, Tensor], _Linear]:
    """Return the ResNet's name, its tensors under torchvision's names, and the linear layer, batch norm folded in."""
    first = next((key for key, tensor in state.items() if tensor.shape == (64, 3, 7, 7)), None)
    if first is None:
        raise UserError(f"{path} has no ResNet (no 7x7 convolution of an image, but {_some(state)}); {_ORDER}")
    prefix = first.removesuffix("weight").removesuffix("conv1.").removesuffix("0.")  # "resnet." in all of them
    net: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, _, name = key.removeprefix(prefix).partition(".")
        layer = _NUMBERED.get(layer, layer)
        if key.startswith(prefix) and layer in _NAMED:
            net[f"{layer}.{name}"] = tensor
        else:
            rest[key] = tensor
    for key in [key for key in net if key.endswith("running_var")]:  # PyTorch before 0.4.1 did not count batches
        net.setdefault(key.replace("running_var", "num_batches_tracked"), torch.tensor(0))

    blocks = tuple(len({key.split(".")[1] for key in net if key.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in net
    if (bottleneck, blocks) not in _RESNETS:
        given = f"{path} has a ResNet of {blocks} blocks, which torchvision does not have"
        raise UserError(f"{given}; give one of {', '.join(_RESNETS.values())}")
    feature_size = 2048 if bottleneck else 512
    layers = _matrices(rest).items()
    linear = next((stem for stem, w in layers if w.shape[1] == feature_size and f"{stem}bias" in rest), None)
    if linear is None:
        given = f"{path} lacks the linear layer from the ResNet's {feature_size} features to the embedding"
        raise UserError(f"{given}; save the state_dict() of the whole encoder")
    used = {f"{linear}weight", f"{linear}bias"}
    head = (rest[f"{linear}weight"], rest[f"{linear}bias"])
    for norm in [key.removesuffix("running_mean") for key in rest if key.endswith("running_mean")][:1]:
        parts = [f"{norm}{name}" for name in _NORM]
        if all(part in rest and rest[part].shape == head[1].shape for part in parts):
            head = _fold(rest, linear, norm)
            used |= {*parts, f"{norm}num_batches_tracked"}
    _refuse_others(rest, used, path, "a ResNet, a linear layer and a batch norm")
    return _RESNETS[bottleneck, blocks], net, head


def _read_decoder(state: dict[str, Tensor], path: str | PathLike) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return the decoder's tensors under the names of `DecoderRNN`, and its sizes."""
    matrices = _matrices(state)
    embeds = [stem for stem in matrices if f"{stem}bias" not in state]
    classifiers = [stem for stem in matrices if f"{stem}bias" in state]
    lstms = [
        key.removesuffix("weight_ih_l0") for key in state if key.endswith("weight_ih_l0") and state[key].dim() == 2
    ]
    wanted = {
        "a word embedding (a matrix without bias)": embeds,
        "an LSTM (weight_ih_l0 and so on)": lstms,
        "a classifier (a linear layer with one row per word)": classifiers,
    }
    if lacks := [what for what, found in wanted.items() if not found]:
        raise UserError(f"{path} lacks {' and '.join(lacks)}, and has {_some(state)}; {_ORDER}")
    lstm, embed = lstms[0], matrices[embeds[0]]
    vocab_size, embed_size = embed.shape
    # The classifier is the layer with a row per word; if there is none, the message below is about the first.
    classifier = next((stem for stem in classifiers if matrices[stem].shape[0] == vocab_size), classifiers[0])
    rows, hidden_size = matrices[classifier].shape
    if rows != vocab_size:
        given = f"{path} has an embedding of {vocab_size} words and a classifier of {rows}"
        raise UserError(f"{given}; they must agree to be imported")
    layers = sum(key.startswith(f"{lstm}weight_ih_l") and not key.endswith("_reverse") for key in state)
    gates, inputs = state[f"{lstm}weight_ih_l0"].shape
    if (gates, inputs) != (4 * hidden_size, embed_size):
        expected = f"where the LSTM of Show and Tell has {4 * hidden_size} x {embed_size}"
        given = f"{path} has a recurrent layer of shape {gates} x {inputs}, {expected}"
        raise UserError(f"{given}; only Show and Tell decoders can be imported")
    names = [f"{kind}_{way}_l{i}" for i in range(layers) for kind in ("weight", "bias") for way in ("ih", "hh")]
    renamed = {f"{embeds[0]}weight": "embed.weight"}
    renamed |= {f"{classifier}{name}": f"linear.{name}" for name in ("weight", "bias")}
    renamed |= {f"{lstm}{name}": f"lstm.{name}" for name in names}
    _refuse_others(state, set(renamed), path, "an embedding, an LSTM and a classifier")
    sizes = dict(embed_size=embed_size, hidden_size=hidden_size, vocab_size=vocab_size, num_layers=layers)
    return {new: state[old] for old, new in renamed.items() if old in state}, sizes


def _matrices(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the 2-D weights of layers by their prefixes, such as `fc.`; those of an LSTM end otherwise."""
    return {
        key.removesuffix("weight"): tensor
        for key, tensor in state.items()
        if tensor.dim() == 2 and (key == "weight" or key.endswith(".weight"))
    }


def _fold(state: dict[str, Tensor], linear: str, norm: str) -> _Linear:
    """Fold a batch norm into the linear layer before it."""
    weight, bias = (state[f"{linear}{name}"].double() for name in ("weight", "bias"))
    gain, offset, mean, variance = (state[f"{norm}{name}"].double() for name in _NORM)
    scale = gain / (variance + _BATCH_NORM_EPS).sqrt()
    return (weight * scale[:, None]).float(), ((bias - mean) * scale + offset).float()


def _refuse_others(state: dict[str, Tensor], used: set[str], path: str | PathLike, parts: str) -> None:
    if others := [key for key in state if key not in used]:
        raise UserError(f"{path} holds {_some(others)} besides {parts}; only Show and Tell models can be imported")


def _some(keys: dict[str, Tensor] | list[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
