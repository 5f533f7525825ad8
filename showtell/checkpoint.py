"""A captioner in one file, and the other file that a stopped run goes on from.

A checkpoint is one safetensors file whose header holds, as JSON, all that is needed to run the model: architecture,
vocabulary, image transform, and where it came from. `docs/checkpoints.md` describes both formats.
"""

from __future__ import annotations

import json
import platform
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from showtell import __version__
from showtell.errors import MissingFileError, UserError
from showtell.files import atomic_path, require_free_space
from showtell.model import CaptionModel
from showtell.transforms import Transform
from showtell.vocabulary import Vocabulary

FORMAT = 1  # of the header; a reader refuses higher numbers
IMPORT_COMMAND = "showtell import-legacy ENCODER DECODER VOCAB --out M"
_KEY = "showtell"  # the one entry of the safetensors metadata
_RESUME_FORMAT = "showtell-resume"
_HALF_MAX = torch.finfo(torch.float16).max
_PLAIN = (type(None), bool, int, float, str, bytes)


@dataclass
class Checkpoint:
    """What a checkpoint's file holds, ready to caption.

    Attributes:
        model: encoder and decoder, in eval mode and single precision.
        vocab: the words the decoder writes.
        transform: how an image becomes the encoder's input, without randomness.
        meta: what is known of its making (recipe, command, epoch, scores, …): plain JSON values.
    """

    model: CaptionModel
    vocab: Vocabulary
    transform: Transform
    meta: dict = field(default_factory=dict)


def save_checkpoint(
    path: str | PathLike,
    model: CaptionModel,
    vocab: Vocabulary,
    transform: Transform,
    meta: dict | None = None,
    half: bool = False,
) -> None:
    """Writes one self-contained safetensors file, whole or not at all; the model is left as it was.

    Args:
        path: the file, by custom `NAME.safetensors`; its folder is made, and an older file is replaced.
        model: on any device, in any precision and mode.
        vocab: the one the model was trained with.
        transform: the training or the evaluation one; the latter is stored.
        meta: JSON values that tell where the model came from.
        half: stores matrices and kernels in half precision, in half the space; biases, norms and whatever half
            precision cannot hold stay in single.

    Raises:
        UserError: the vocabulary is not the model's, `path` is a folder, or the disk has too little room.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file in it, such as {path / 'model.safetensors'}")
    vocab_size = model.config["decoder"]["vocab_size"]
    if len(vocab) != vocab_size:
        raise UserError(
            f"the vocabulary has {len(vocab)} words and the model was built for {vocab_size}; "
            "save the model with the vocabulary it was trained with"
        )
    header = {
        "format": FORMAT,
        "model": model.config,
        "vocabulary": vocab.to_dict(),
        "transform": transform.evaluation().to_dict(),
        "meta": meta or {},
        "versions": {"showtell": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    tensors = {name: _stored(tensor, half) for name, tensor in _own_tensors(model).items()}
    require_free_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()), f"saving {path}")
    text = json.dumps(header)  # before the file is touched: a value that is no JSON stops here
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: text})


def load_checkpoint(path: str | PathLike, device: str | torch.device = "cpu") -> Checkpoint:
    """Reads a checkpoint; downloads nothing, executes nothing, and needs no other file.

    The random number generators are left as they were.

    Raises:
        MissingFileError: there is no such file.
        UserError: the file is damaged, of a newer format or no checkpoint of this project; the sentence says which.
    """
    path = Path(path)
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        vocab = Vocabulary.from_dict(header["vocabulary"])
        transform = Transform.from_dict(header["transform"])
        vocab_size = header["model"]["decoder"]["vocab_size"]
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error
    if len(vocab) != vocab_size:
        raise UserError(
            f"{path} holds a vocabulary of {len(vocab)} words and a model of {vocab_size}, which do not fit; "
            "save it again with the vocabulary it was trained with"
        )
    model = build_model(header["model"], tensors, str(path))
    return Checkpoint(model.to(device), vocab, transform, header["meta"])


def read_header(path: str | PathLike) -> dict:
    """Returns what a checkpoint says of itself, without reading its tensors: milliseconds for any size.

    Returns:
        `format`, `model` (the configuration of `CaptionModel`), `vocabulary`, `transform`, `meta` and `versions`.

    Raises:
        MissingFileError, UserError: as `load_checkpoint` does.
    """
    path = Path(path)
    first = _first_bytes(path, "checkpoint", "give a file saved by showtell train")
    if not _is_safetensors(first):
        if first.startswith((b"PK\x03\x04", b"\x80")):
            raise UserError(
                f"{path} is a pickle, as PyTorch and the ancestors write them, and no showtell checkpoint; for an "
                f"ancestor's weights type {IMPORT_COMMAND}, and to go on with a stopped run showtell train --resume"
            )
        raise UserError(
            f"{path} is not a checkpoint: neither safetensors nor anything else showtell writes; "
            "give a file saved by showtell train"
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        header = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if header is None:
        raise UserError(
            f"{path} is a safetensors file without showtell's header, perhaps a backbone's weights; "
            "give a model saved by showtell train"
        )
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise _damaged(path, ValueError("its header has no format number"))
    if header["format"] > FORMAT:
        raise UserError(
            f"{path} has format {header['format']}, of a newer showtell, and this one ({__version__}) reads up to "
            f"{FORMAT}; type pip install --upgrade showtell"
        )
    parts = ("model", "vocabulary", "transform", "meta")
    if missing := [part for part in parts if not isinstance(header.get(part), dict)]:
        raise _damaged(path, ValueError(f"its header has no {', '.join(missing)}"))
    return header


def build_model(config: dict, tensors: dict[str, Tensor], source: str) -> CaptionModel:
    """Builds the model of a configuration and gives it exactly these tensors, in eval mode and single precision.

    Args:
        config: as `CaptionModel.config`.
        tensors: by the names of its `state_dict`; of a weight that two layers share, the first name alone.
        source: where they came from, for the error's sentence.

    Raises:
        UserError: the configuration names something unknown, or a tensor is missing, unknown or of another shape.
    """
    try:
        with torch.random.fork_rng(devices=[]):  # the random start is overwritten and must cost the caller no numbers
            model = CaptionModel(config)
    except UserError as error:
        raise UserError(f"{source} cannot be used: {error}") from error
    except Exception as error:  # sizes and names that were altered can fail in any way
        raise _damaged(source, error) from error
    own = _own_tensors(model)
    problems = [
        (f"{len(names)} {what}, {names[0]} first")
        for what, names in (
            ("missing", [name for name in own if name not in tensors]),
            ("unknown", [name for name in tensors if name not in own]),
            ("of another shape", [name for name in own if name in tensors and own[name].shape != tensors[name].shape]),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{source} does not hold the tensors of its model ({'; '.join(problems)}); "
            "it was altered or not saved whole, so save or fetch it again"
        )
    model.load_state_dict(tensors, strict=False)  # copies, in single precision; names of shared weights may be absent
    return model.eval()


@torch.no_grad()
def start_from(model: CaptionModel, vocab: Vocabulary, path: str | PathLike) -> int:
    """Gives a new model the weights of a trained one; what it learnt of a word goes to that word's new place.

    Args:
        model: built as the other was, but for its vocabulary and dropout.
        vocab: the new model's.
        path: the trained model's checkpoint.

    Returns:
        how many of the new vocabulary's words it knew; the others keep their random start.

    Raises:
        MissingFileError, UserError: as `load_checkpoint` does, or the two were built differently.
    """
    other = load_checkpoint(path)
    for half in ("encoder", "decoder"):
        for name, value in model.config[half].items():
            theirs = other.model.config[half].get(name)
            if name not in ("vocab_size", "dropout") and theirs != value:
                raise UserError(
                    f"{path} was built with {half} {name}={theirs} and the new model with {name}={value}; "
                    "a model to start from must be built alike, so train with its recipe and settings"
                )
    pairs = [(i, other.vocab.word2idx[word]) for word, i in vocab.word2idx.items() if word in other.vocab.word2idx]
    here, there = (torch.tensor(side) for side in zip(*pairs, strict=True))
    own = model.state_dict()
    for name, tensor in other.model.state_dict().items():
        if name in ("decoder.embed.weight", "decoder.linear.weight", "decoder.linear.bias"):  # a row a word
            own[name][here] = tensor[there]
        else:
            own[name].copy_(tensor)
    return len(pairs)


def save_resume(path: str | PathLike, state: dict) -> None:
    """Writes all that a stopped run needs to go on (model, optimiser, generators, position), whole or not at all.

    Args:
        path: the file.
        state: dicts, lists and tuples of tensors, numbers, strings and `None`, so that it can be read back safely.

    Raises:
        UserError: `state` holds something else; the sentence says where.
    """
    _require_plain(state, "state")
    with atomic_path(path) as temporary:
        torch.save({"format": _RESUME_FORMAT, "version": FORMAT, "state": state}, temporary)


def load_resume(path: str | PathLike) -> dict:
    """Reads what `save_resume` wrote, with every tensor on the CPU; executes nothing.

    Raises:
        MissingFileError: there is no such file.
        UserError: the file is damaged, of a newer format, something else, or wants to run code.
    """
    path = Path(path)
    content = read_plain_pickle(path, "file to resume from", "start anew without --resume")
    if not isinstance(content, dict) or content.get("format") != _RESUME_FORMAT:
        raise UserError(
            f"{path} is no file to resume from, though PyTorch wrote it; give the one that showtell train keeps in its "
            "output folder"
        )
    if content["version"] > FORMAT:
        raise UserError(
            f"{path} has format {content['version']}, of a newer showtell, and this one reads up to {FORMAT}; "
            "type pip install --upgrade showtell"
        )
    return content["state"]


def read_plain_pickle(path: str | PathLike, what: str, remedy: str) -> object:
    """Reads tensors and plain containers that `torch.save` wrote; a pickle that names anything else is refused unrun.

    Args:
        path: the file.
        what: what the file should be, for the error's sentence ("encoder").
        remedy: what to do about one that is missing or damaged.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is a folder, empty, damaged, no pickle, or names a class or function.
    """
    path = Path(path)
    first = _first_bytes(path, what, remedy)
    if _is_safetensors(first):
        raise UserError(f"{path} is a safetensors file, and no {what}; {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols, which are read or refused all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way; nothing was executed
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} is not plain tensors: it names {named[1].rstrip('.')}, and nothing of it was run; "
                "in the project that made it, save the state_dict() alone"
            ) from None
        raise UserError(
            f"{path} is damaged, cut short or no file of PyTorch ({type(error).__name__}); {remedy}"
        ) from error


def _first_bytes(path: Path, what: str, remedy: str) -> bytes:
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the {what} in it")
    try:
        with path.open("rb") as file:
            first = file.read(16)
    except FileNotFoundError:
        raise MissingFileError(f"there is no {what} at {path}; check the name, or {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}); make it readable, or {remedy}") from error
    if not first:
        raise UserError(f"{path} is empty (zero bytes); {remedy}")
    return first


def _is_safetensors(first: bytes) -> bool:
    """Whether a file begins as safetensors do: the header's length in 8 bytes, the header's JSON."""
    return first[8:9] == b"{" and int.from_bytes(first[:8], "little") < 2**32


def _damaged(path: str | PathLike, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path} is damaged or cut short ({reason}); fetch or save it again")


def _own_tensors(model: CaptionModel) -> dict[str, Tensor]:
    """The state dict with each tensor once: a weight that two layers share stands under its first name."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensors.setdefault(id(tensor), (name, tensor.detach()))
    return dict(tensors.values())


def _stored(tensor: Tensor, half: bool) -> Tensor:
    if tensor.is_floating_point():
        tensor = tensor.float()
        if half and tensor.dim() >= 2 and tensor.abs().max() <= _HALF_MAX:
            tensor = tensor.half()
    return tensor.cpu().contiguous()


def _require_plain(value: object, where: str) -> None:
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return
    if type(value) in (list, tuple):
        pairs = [(f"{where}[{i}]", item) for i, item in enumerate(value)]
    elif type(value) in (dict, OrderedDict):
        pairs = [pair for key, item in value.items() for pair in ((where, key), (f"{where}[{key!r}]", item))]
    else:
        raise UserError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be read back safely; "
            "give tensors, numbers, strings, and lists or dicts of them"
        )
    for name, item in pairs:
        _require_plain(item, name)
