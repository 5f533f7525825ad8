"""Model checkpoints, and the training state to resume from.

A checkpoint is one safetensors file whose header holds, as JSON, everything that is needed to run the model:
architecture, vocabulary, image transform and metadata. `docs/checkpoints.md` describes both formats.
"""

from __future__ import annotations

import inspect
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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from showtell import __version__
from showtell.errors import UserError
from showtell.files import atomic_path, require_free_space, require_regular_file
from showtell.model import CaptionModel, EncoderCNN
from showtell.quantise import dequantise, quantise
from showtell.transforms import Transform
from showtell.vocabulary import Vocabulary

FORMAT = 3  # of both files; higher numbers are refused, lower ones are read
# Parts of the tensor names in format 1, by decoder, and their names since.
_RENAMED = {
    "top-down": {
        "look_word": "attention_lstm_word", "look_picture": "attention_lstm_image", "look": "attention_lstm_hidden",
        "speak": "language_lstm",
    },
    "transformer": {"read": "self_attn", "look": "cross_attn", "think": "mlp"},
}  # fmt: skip
IMPORT_COMMAND = "showtell import-legacy ENCODER DECODER VOCAB --out M"
_KEY = "showtell"  # the one entry of the safetensors metadata
_RESUME_FORMAT = "showtell-resume"
_HALF_MAX = torch.finfo(torch.float16).max
_PLAIN = (type(None), bool, int, float, str, bytes)
_MAX_SIDE = 4096  # pixels; a transform to larger images is an error or an attack
_RANDOM = {nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_}


@dataclass
class Checkpoint:
    """The content of a checkpoint file, ready for inference.

    Attributes:
        model: encoder and decoder, in eval mode and single precision.
        vocab: the decoder's vocabulary.
        transform: the image transform of evaluation, without randomness.
        meta: JSON values about the model's training (recipe, epoch, scores, …).
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
    int8: bool = False,
) -> None:
    """Write one self-contained safetensors file atomically; the model is not changed.

    Args:
        path: the file, by convention `NAME.safetensors`; its folder is created, and an existing file is replaced.
        model: on any device, in any precision and mode.
        vocab: the vocabulary the model was trained with.
        transform: of training or evaluation; the latter is stored.
        meta: JSON values about the model's training.
        half: store matrices and kernels in half precision; biases, norms and tensors with values out of its range stay
            in single precision.
        int8: store them in 8 bits, see `showtell.quantise`; the others stay in single precision.

    Raises:
        UserError: the vocabulary does not fit the model, `path` is a folder, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the name of a file in it, such as {path / 'model.safetensors'}")
    vocab_size = model.config["decoder"]["vocab_size"]
    if len(vocab) != vocab_size:
        given = f"the vocabulary has {len(vocab)} words and the model was built for {vocab_size}"
        raise UserError(f"{given}; save the model with the vocabulary it was trained with")
    header = {
        "format": FORMAT,
        "model": model.config,
        "vocabulary": vocab.to_dict(),
        "transform": transform.evaluation().to_dict(),
        "meta": meta or {},
        "versions": {"showtell": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
    }
    tensors = {name: _stored(tensor, half) for name, tensor in _own_tensors(model).items()}
    if int8:
        parts = [quantise(name, tensor) for name, tensor in tensors.items()]
        tensors = {name: tensor for part in parts for name, tensor in part.items()}
    _write(path, header, tensors)


def add_meta(path: str | PathLike, out: str | PathLike, **meta: object) -> None:
    """Write a copy of a checkpoint, or replace it, with more JSON values in its metadata; its tensors stay the same.

    Raises as `load_checkpoint` does, or a `UserError` if the disk is full.
    """
    header = read_header(path)
    header["meta"] |= meta
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    _write(Path(out), header, tensors)


def _write(path: Path, header: dict, tensors: dict[str, Tensor]) -> None:
    require_free_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()), f"saving {path}")
    metadata = {_KEY: json.dumps(header)}  # before the file is written: fails on a value that is not JSON
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_checkpoint(path: str | PathLike, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint; nothing is downloaded or executed, and the random number generators are not changed.

    Raises:
        MissingFileError: there is no such file.
        UserError: the file is damaged, of a newer format, or no checkpoint of this project; the message says which.
    """
    path = Path(path)
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = dequantise({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118  it is no dict
        vocab = Vocabulary.from_dict(header["vocabulary"])
        transform = Transform.from_dict(header["transform"])
        decoder, vocab_size = (header["model"]["decoder"][key] for key in ("name", "vocab_size"))
        tensors = _rename(tensors, header["format"], decoder)
    except UserError as error:
        raise UserError(f"cannot use {path}: {error}") from error
    except (SafetensorError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error
    if len(vocab) != vocab_size:
        given = f"{path} holds a vocabulary of {len(vocab)} words and a model for {vocab_size}"
        raise UserError(f"{given}; save it again with the vocabulary it was trained with")
    resize = transform.resize[0] if isinstance(transform.resize, tuple) else transform.resize
    if max(transform.crop or 0, resize or 0) > _MAX_SIDE:
        raise UserError(f"cannot use {path}: its transform makes images of more than {_MAX_SIDE} pixels a side")
    model = build_model(header["model"], tensors, str(path))
    return Checkpoint(model.to(device), vocab, transform, header["meta"])


def read_header(path: str | PathLike) -> dict:
    """Read the header of a checkpoint without its tensors, in milliseconds for any size; raise as `load_checkpoint`.

    It has `format`, `model` (the configuration of `CaptionModel`), `vocabulary`, `transform`, `meta` and `versions`.
    """
    path = Path(path)
    first = _first_bytes(path, "checkpoint", "give a file saved by showtell train")
    if not _is_safetensors(first):
        if first.startswith((b"PK\x03\x04", b"\x80")):
            given = f"{path} is a pickle of PyTorch, not a showtell checkpoint"
            remedy = f"{IMPORT_COMMAND} converts other projects' weights, showtell train --resume continues a run"
            raise UserError(f"{given}; {remedy}")
        raise UserError(f"{path} is not a checkpoint: it is no safetensors file; give a file saved by showtell train")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
        header = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if header is None:
        given = f"{path} is a safetensors file without showtell's header, perhaps the weights of a backbone"
        raise UserError(f"{given}; give a file saved by showtell train")
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise _damaged(path, ValueError("its header has no format number"))
    _require_known(header["format"], path)
    parts = ("model", "vocabulary", "transform", "meta")
    if missing := [part for part in parts if not isinstance(header.get(part), dict)]:
        raise _damaged(path, ValueError(f"its header has no {', '.join(missing)}"))
    return header


def build_model(config: dict, tensors: dict[str, Tensor], source: str) -> CaptionModel:
    """Build the model of a configuration with the given tensors, in eval mode and single precision.

    Shapes are compared before memory is allocated, so that wrong sizes in a configuration cost nothing. `tensors` are
    by name as in the `state_dict`, a weight that two layers share only by its first; `source` is for error messages.

    Raises:
        UserError: the configuration names something unknown, a tensor is missing, unknown, of another shape, or holds
            values that are not finite.
    """
    own = _own_tensors(_build(config, "meta", len(tensors), source))
    differing = {
        "missing": [name for name in own if name not in tensors],
        "unknown": [name for name in tensors if name not in own],
        "of another shape": [name for name in own if name in tensors and own[name].shape != tensors[name].shape],
    }
    if problems := [f"{len(names)} {what}, {names[0]} first" for what, names in differing.items() if names]:
        given = f"{source} does not hold the tensors of its model ({'; '.join(problems)})"
        raise UserError(f"{given}; it was altered or not saved completely, so save or fetch it again")
    model = _build(config, "cpu", len(tensors), source)
    model.load_state_dict(tensors, strict=False)  # copies to single precision; a shared weight has one name
    for name, tensor in _own_tensors(model).items():
        if not tensor.sum().isfinite() and not tensor.isfinite().all():  # the sum alone may overflow
            given = f"{source}: the weights are damaged: {name} holds values that are not finite"
            raise UserError(f"{given}; fetch or train the model again")
    return model.eval()


def _build(config: dict, device: str, n_tensors: int, source: str) -> CaptionModel:
    """Build a model whose weights are not initialised, and which has not many more tensors than a checkpoint."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device), _Uninitialised(2 * n_tensors + 1000):
            return CaptionModel(config)
    except UserError as error:
        raise UserError(f"cannot use {source}: {error}") from error
    except Exception as error:  # altered sizes and names can fail in any way
        raise _damaged(source, error) from error


class _Uninitialised(TorchFunctionMode):
    """Skip random initialisation, which loading overwrites, and limit the number of new tensors."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _RANDOM:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, nn.Parameter):  # not the temporary ones of rejection sampling, which would not end
                return tensor
        self.limit -= func is torch.empty
        if self.limit < 0:
            raise ValueError("its model has many more layers than the file has tensors")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def start_from(model: CaptionModel, vocab: Vocabulary, path: str | PathLike, opened: Checkpoint | None = None) -> int:
    """Initialise a new model from a checkpoint; embedding and classifier rows are remapped by word.

    The architectures must be the same, except for vocabulary and dropout. The start word of a new style begins as a
    copy of the checkpoint's default one. `opened` is the checkpoint at `path`, if it has been loaded already.

    Returns:
        The number of words of the new vocabulary that the checkpoint has too; the others stay randomly initialised.

    Raises:
        MissingFileError, UserError: as `load_checkpoint` does, or the architectures differ.
    """
    other = opened or load_checkpoint(path)
    for half, built in (("encoder", EncoderCNN), ("decoder", type(model.decoder))):
        parameters = inspect.signature(built).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}  # of arguments left out
        ours, theirs = (config[half] | defaults | config[half] for config in (model.config, other.model.config))
        for name, value in ours.items():  # in the order of the configuration, and defaults last
            if name not in ("vocab_size", "dropout") and theirs.get(name) != value:
                given = f"{path} was built with {half} {name}={theirs.get(name)} and the new model with {name}={value}"
                raise UserError(f"{given}; both must have the same architecture, so train with its recipe and settings")
    pairs = [(i, other.vocab.word2idx[word]) for word, i in vocab.word2idx.items() if word in other.vocab.word2idx]
    starts = [(i, other.vocab.start_of()) for style, i in vocab.styles.items() if style not in other.vocab.styles]
    here, there = (torch.tensor(side) for side in zip(*pairs, *starts, strict=True))
    word_parameters = {f"decoder.{name}" for name in model.decoder.word_parameters}
    own = model.state_dict()
    for name, tensor in other.model.state_dict().items():
        if name in word_parameters:
            own[name][here] = tensor[there]
        elif own[name].shape == tensor.shape:
            own[name].copy_(tensor)
        else:
            shapes = f"{tuple(tensor.shape)} in {path} and {tuple(own[name].shape)} in the new model"
            remedy = f"if it has a row per word, list it in {type(model.decoder).__name__}.word_parameters"
            raise UserError(f"{name} has the shape {shapes}; {remedy}")
    return len(pairs)


def save_resume(path: str | PathLike, state: dict) -> None:
    """Write the training state (model, optimiser, generators, position) atomically.

    Raises:
        UserError: `state` holds something besides dicts, lists and tuples of tensors, numbers, strings and `None`,
            which can be read back safely; the message says where.
    """
    _require_plain(state, "state")
    with atomic_path(path) as temporary:
        torch.save({"format": _RESUME_FORMAT, "version": FORMAT, "state": state}, temporary)


def load_resume(path: str | PathLike) -> dict:
    """Read the training state that `save_resume` wrote, with all tensors on the CPU; nothing is executed.

    Raises:
        MissingFileError: there is no such file.
        UserError: the file is damaged, of a newer format, something else, or contains code.
    """
    path = Path(path)
    content = read_plain_pickle(path, "training state", "begin a new run without --resume")
    if not isinstance(content, dict) or content.get("format") != _RESUME_FORMAT:
        raise UserError(f"{path} is a file of PyTorch but no training state; give the resume.pt of a run folder")
    _require_known(content["version"], path)
    state = content["state"]
    if content["version"] < FORMAT:
        state["model"] = _rename(state["model"], content["version"], state["recipe"]["decoder"])
    return state


def _require_known(version: int, path: Path) -> None:
    if version > FORMAT:
        given = f"{path} has format {version}, and showtell {__version__} reads formats up to {FORMAT}"
        raise UserError(f"{given}; type pip install --upgrade showtell")


def _rename(tensors: dict[str, Tensor], version: int, decoder: str) -> dict[str, Tensor]:
    """Translate tensor names of an older format; the order, which optimiser states rely on, is kept."""
    parts = _RENAMED.get(decoder, {}) if version < 2 else {}
    return {
        ".".join(parts.get(part, part) for part in name.split(".")) if name.startswith("decoder.") else name: tensor
        for name, tensor in tensors.items()
    }


def read_plain_pickle(path: str | PathLike, what: str, remedy: str) -> object:
    """Read tensors and plain containers that `torch.save` wrote; nothing is executed.

    Error messages contain `what` (what the file should be, such as "encoder") and `remedy` (what to do about it).

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no regular file, empty, damaged, no pickle, or names a class or function.
    """
    path = Path(path)
    first = _first_bytes(path, what, remedy)
    if _is_safetensors(first):
        raise UserError(f"{path} is a safetensors file, not a {what}; {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way; nothing was executed
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            given = f"{path} holds more than plain tensors: it names {named[1].rstrip('.')}, which was not executed"
            raise UserError(f"{given}; in the project that saved it, save the state_dict() alone") from None
        given = f"{path} is damaged, truncated or no file of PyTorch ({type(error).__name__})"
        raise UserError(f"{given}; {remedy}") from error


def _first_bytes(path: Path, what: str, remedy: str) -> bytes:
    require_regular_file(path, what, remedy)
    try:
        with path.open("rb") as file:
            first = file.read(16)
    except OSError as error:
        raise UserError(f"cannot open {path} ({error.strerror}); make it readable, or {remedy}") from error
    if not first:
        raise UserError(f"{path} is empty (zero bytes); {remedy}")
    return first


def _is_safetensors(first: bytes) -> bool:
    """Whether a file begins like safetensors: 8 bytes with the length of the header, then the header's JSON."""
    return first[8:9] == b"{" and int.from_bytes(first[:8], "little") < 2**32


def _damaged(path: str | PathLike, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path} is damaged or truncated ({reason}); fetch or save it again")


def _own_tensors(model: CaptionModel) -> dict[str, Tensor]:
    """Return the state dict with each tensor once: a weight that two layers share only under its first name."""
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
        given = f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be read back safely"
        raise UserError(f"{given}; use tensors, numbers, strings, and lists or dicts of them")
    for name, item in pairs:
        _require_plain(item, name)
