"""An exported model in ONNX Runtime as the engine of a captioner, with NumPy and Pillow and without torch.

`showtell export --format onnx` writes the folder that `OnnxEngine` reads: three graphs and `model.json`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from showtell.errors import UserError
from showtell.files import write_json
from showtell.released import cache_folder
from showtell.transforms import Transform
from showtell.vocabulary import Vocabulary

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ENGINES = ("auto", "torch", "onnx")
FORMAT = 1  # of the folder; higher numbers are refused
HEADER = "model.json"  # written last: a folder that has it is complete
Arrays = tuple[np.ndarray, ...]


class OnnxEngine:
    """An exported encoder and decoder.

    Attributes:
        as_arrays: whether images are NumPy arrays rather than tensors. device: where the model runs.
        description: for reports.
        decoder: for `showtell.decoding`. vocab, transform, meta: as in `showtell.checkpoint.Checkpoint`.
    """

    as_arrays, device, description = True, "cpu", "ONNX Runtime, cpu"

    def __init__(self, folder: str | os.PathLike) -> None:
        """Open an export.

        Raises:
            UserError: ONNX Runtime is not installed, or the folder is incomplete, damaged or of a newer version.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / HEADER).read_text("utf-8"))
            if header["format"] > FORMAT:
                given = f"{folder} has format {header['format']}, and this version reads formats up to {FORMAT}"
                raise UserError(f"{given}; type pip install --upgrade showtell")
            self.vocab, self.meta = Vocabulary.from_dict(header["vocabulary"]), header["meta"]
            self.transform = Transform.from_dict(header["transform"])
            self.decoder = OnnxDecoder(_open(folder / "start.onnx"), _open(folder / "step.onnx"), header["memory"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise _damaged(folder, error) from error
        self._encoder = _open(folder / "encoder.onnx")

    def encode(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[int, int] | None]:
        """Encode transformed images of one size; return the features, and rows and columns of their grid, if any."""
        (features,) = self._encoder.run(None, {"images": np.stack(images)})
        if features.ndim == 2:
            return features, None
        b, *grid, e = features.shape
        return features.reshape(b, -1, e), tuple(grid)

    def generator(self, seed: int) -> np.random.Generator:
        """Return a random generator for sampling."""
        return np.random.default_rng(seed)


class OnnxDecoder:
    """The interface of `showtell.decoders.Decoder` with NumPy arrays, as far as decoding needs it."""

    def __init__(self, start: InferenceSession, step: InferenceSession, n_memory: int) -> None:
        """Take the two graphs; the first `n_memory` outputs of `start` are the memory, the others the state."""
        self._start, self._step, self._n_memory = start, step, n_memory
        self._inputs = [node.name for node in step.get_inputs()]
        self._attends = step.get_outputs()[1].name == "alphas"

    def start(self, features: np.ndarray) -> tuple[Arrays, Arrays]:
        """Take the encoder's features; return `(memory, state)`."""
        outputs = tuple(self._start.run(None, {"features": features}))
        return outputs[: self._n_memory], outputs[self._n_memory :]

    def step(self, words: np.ndarray, memory: Arrays, state: Arrays) -> tuple[np.ndarray, Arrays, np.ndarray | None]:
        """Read one word per row, `(N,)`; return logits `(N, V)`, the new state, and attention `(N, L)` or `None`."""
        inputs = dict(zip(self._inputs, (words, *memory, *state), strict=True))
        logits, *rest = self._step.run(None, inputs)
        alphas = rest.pop(0) if self._attends else None
        return logits, tuple(rest), alphas


def find_export(model: Path, engine: str = "auto") -> Path | None:
    """Return the folder to open for a model, or `None` if it is to run in torch.

    Args:
        model: a folder written by `showtell export --format onnx`, or a checkpoint, whose export may lie in the user's
            cache under the digest of the file.
        engine: `torch`; `onnx`, for which the folder in the cache may have to be written yet; or `auto`, the export if
            there is one and ONNX Runtime is installed.

    Raises:
        UserError: there is no such engine, or it cannot run the model.
    """
    if engine not in ENGINES:
        raise UserError(f"engine={engine!r} is not known; choose one of {', '.join(ENGINES)}")
    if model.is_dir():
        if engine == "torch":
            raise UserError(f"{model} was exported for ONNX Runtime, which captions only; give the checkpoint")
        return model
    cache = cache_folder().parent / "onnx"
    if engine == "torch" or (engine == "auto" and not (find_spec("onnxruntime") and cache.is_dir())):
        return None
    folder = cache / _digest(model, cache)
    return folder if engine == "onnx" or (folder / HEADER).is_file() else None


def _digest(path: Path, cache: Path) -> str:
    """Return the SHA-256 of a file, noted in the cache with what changes whenever a file does, as git notes it."""
    stat = path.stat()
    stamp = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    note = cache / f"{hashlib.sha256(stamp[0].encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        noted, digest = json.loads(note.read_text("utf-8"))
        if noted == stamp:
            return digest
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            whole.update(block)
    settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2e9  # a later change has another time
    if settled and cache.is_dir():
        with contextlib.suppress(OSError):  # a folder for reading only
            write_json(note, [stamp, whole.hexdigest()])
    return whole.hexdigest()


def _open(path: Path) -> InferenceSession:
    try:
        import onnxruntime
    except ImportError:
        raise UserError('the engine onnx needs ONNX Runtime; type pip install "showtell[onnx]"') from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    if (threads := os.environ.get("OMP_NUM_THREADS", "")).isdecimal():  # as for torch; Ray sets it for its actors
        options.intra_op_num_threads = int(threads)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it slows down busy machines
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has an exception for each way in which a file can be damaged
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path} is missing, damaged or incomplete ({reason}); write it again with showtell export")
