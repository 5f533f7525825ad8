"""Caption images with a trained model: encode once, decode many times.

import showtell
captioner = showtell.load("runs/flickr8k/best.safetensors")
for caption in captioner.caption("photo.jpg", n_best=3):
    print(caption.text, caption.score)
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from showtell import decoding, hub, released
from showtell.arrays import Array, library
from showtell.confidence import Calibration
from showtell.decoding import DecodingOptions, Hypothesis
from showtell.errors import MissingFileError, UserError
from showtell.files import require_regular_file
from showtell.image_stream import LoadedImage, stream_images
from showtell.onnx_engine import HEADER, OnnxEngine, find_export
from showtell.sources import ImageSource, is_link
from showtell.transforms import BrokenImageError, Source
from showtell.vocabulary import Vocabulary, spell_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from showtell.checkpoint import Checkpoint


@dataclass(frozen=True)
class Caption:
    """A caption of an image.

    `alphas`, only from models with attention and on request, sum to 1 over the grid at each word.
    """

    text: str  # a sentence: first letter capitalised, punctuation attached
    score: float  # length-normalised log-probability, at most 0; comparable between images
    words: list[str]  # as the model generated them
    word_probs: list[float]  # of each word, from 0 to 1, given the image and the words before it
    alphas: Array | None = None  # attention weights, (words, rows, columns)
    confidence: float | None = None  # the estimated probability that the caption is right, of a calibrated model

    @property
    def pieces(self) -> list[str]:
        """`text` split into one piece per word, each with the space before it."""
        return spell_words(self.words)

    @classmethod
    def of(
        cls,
        hypothesis: Hypothesis,
        vocab: Vocabulary,
        grid: tuple[int, int] | None = None,
        calibration: Calibration | None = None,
    ) -> Caption:
        """Convert ids and log-probabilities; attention maps, if any, need their `grid`: rows and columns."""
        words = [vocab.idx2word[i] for i in hypothesis.ids]
        probs = [math.exp(p) for p in hypothesis.log_probs[: len(words)]]
        alphas = hypothesis.alphas
        if alphas is not None:  # (words, L) -> (words, rows, columns)
            if grid is None or math.prod(grid) != alphas.shape[1]:
                cells = alphas.shape[1]
                raise UserError(f"maps of {cells} cells cannot have the shape {grid}; pass their grid=(rows, columns)")
            alphas = alphas.reshape(len(alphas), *grid)
        confidence = calibration.confidence(words, probs) if calibration else None
        return cls(vocab.decode(hypothesis.ids), hypothesis.score, words, probs, alphas, confidence)

    def to_dict(self) -> dict:
        """Return plain values, as `showtell caption --json` prints them."""
        probs = [round(p, 4) for p in self.word_probs]
        plain = {"text": self.text, "score": round(self.score, 4), "words": self.words, "word_probs": probs}
        return plain if self.confidence is None else plain | {"confidence": round(self.confidence, 4)}


class Captioner:
    """A model that captions images; its attributes are those of `showtell.checkpoint.Checkpoint`, and `device`.

    `calibration` is that of the captions' confidence; None if the checkpoint has none. `engine` encodes the images: a
    `TorchEngine`, or an `OnnxEngine`, which is the `model`, too.
    """

    def __init__(
        self, checkpoint: Checkpoint | OnnxEngine, device: str | torch.device = "cpu", precision: str = "auto"
    ) -> None:
        """Take a checkpoint, or an export for ONNX Runtime, opened; `precision` is that of `load`."""
        if isinstance(checkpoint, OnnxEngine):
            self.engine = self.model = checkpoint
        else:
            from showtell.torch_engine import TorchEngine

            self.engine = TorchEngine(checkpoint.model, device, precision)
            self.model = self.engine.model
        self.device = self.engine.device
        self.vocab, self.transform, self.meta = checkpoint.vocab, checkpoint.transform, checkpoint.meta
        self.calibration = Calibration.of(self.meta)

    def encode(self, images: Source | Sequence[Source]) -> Array:
        """Encode images as the decoder's input, `(B, E)` or `(B, L, E)`, to be decoded any number of times.

        An image is a path, a web link (see `showtell.sources.fetch`), a file's bytes, a PIL image, an array, or a uint8
        tensor. Raises as `showtell.transforms.read_image` does, and a `UserError` if the images give grids of different
        sizes.
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        parts = []
        for batch in self._stream(images):
            if error := next((image.error for image in batch if image.error), None):
                raise error
            parts += [features for _, features, _ in self._encode(batch)]
        if len({features.shape[1:] for features in parts}) != 1:
            proportions = "of equal proportions where this model keeps them"
            raise UserError(f"{len(images)} images do not fit in one batch; give one or more, {proportions}")
        return library(parts[0]).concatenate(parts)

    def _stream(self, sources: Iterable, batch_size: int = 32, workers: int = 2) -> Iterator[list[LoadedImage]]:
        opened = (ImageSource(source) if is_link(source) else source for source in sources)
        return stream_images(opened, self.transform, batch_size, workers, self.engine.as_arrays)

    def _encode(self, images: list[LoadedImage]) -> list[tuple[list[LoadedImage], Array, tuple[int, int] | None]]:
        """Encode images in batches of one size each: `(images, features, (rows, columns) of the grid)` per batch."""
        batches = [list(group) for _, group in groupby(images, key=lambda image: image.pixels.shape)]
        return [(batch, *self.engine.encode([image.pixels for image in batch])) for batch in batches]

    def decode(
        self,
        features: Array,
        strategy: str = "beam",
        *,
        n_best: int = 1,
        beam_size: int = 5,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: object = 0,
        alphas: bool = False,
        grid: tuple[int, int] | None = None,
        **options: float,
    ) -> list[list[Caption]]:
        """Return the captions of each encoded image; the strategy is `"beam"`, `"greedy"` or `"sample"`.

        Args:
            n_best: captions per image: the best of a beam, best first, or independent samples in the order drawn.
            beam_size: hypotheses kept at each step of a beam search; 1 is greedy.
            temperature, top_k, top_p: of sampling, see `showtell.decoding.sample`.
            seed: of sampling; a random generator of torch, or of NumPy with ONNX Runtime, is used as it is, and
                continues from call to call.
            alphas: whether to return the attention maps.
            grid: rows and columns of the attention maps; needed with `alphas` if the transform keeps an image's
                proportions, since features do not tell them.
            options: `style`, one of `vocab.styles` (the first by default), if the model was trained with them;
                `min_len`, `max_len`, `no_repeat_ngram`, `length_penalty`, `allow_unk`, see `DecodingOptions`.

        Arguments out of range, a missing grid and a model whose outputs are not finite raise a `UserError`.
        """
        if grid is None and features.ndim == 3 and self.transform.size is not None:  # square images, square grids
            grid = (math.isqrt(features.shape[1]),) * 2
        generator = self.engine.generator(seed) if isinstance(seed, int) else seed
        found = decoding.decode(
            self.model.decoder, features, strategy, self.decoding_options(**options), n=n_best, beam_size=beam_size,
            temperature=temperature, top_k=top_k, top_p=top_p, generator=generator, alphas=alphas,
        )  # fmt: skip
        return [[Caption.of(hypothesis, self.vocab, grid, self.calibration) for hypothesis in own] for own in found]

    def sample(self, features: Array, n: int = 1, **options: float) -> list[list[Caption]]:
        """Draw `n` captions per image: `decode(features, "sample", n_best=n, …)`."""
        return self.decode(features, "sample", n_best=n, **options)

    def decoding_options(self, style: str | None = None, **options: float) -> DecodingOptions:
        """Return `options` for this vocabulary; length penalty and maximum length default to those of validation."""
        if style is not None:
            options["start_id"] = self.vocab.start_of(style)
        recipe = self.meta.get("recipe") or {}
        validated = {name: recipe[name] for name in ("length_penalty", "max_len") if name in recipe}
        return DecodingOptions.of(self.vocab, **(validated | options))

    def caption(self, image: Source, strategy: str = "beam", **options: float) -> list[Caption]:
        """Caption one image, best caption first; for the other arguments see `encode` and `decode`."""
        ((_, captions),) = self.caption_stream([image], strategy=strategy, **options)
        if isinstance(captions, UserError):
            raise captions
        return captions

    def caption_stream(
        self,
        sources: Iterable[Source | Callable[[], Tensor | bytes]],
        batch_size: int = 32,
        workers: int = 2,
        **options: float,
    ) -> Iterator[tuple[int, list[Caption] | BrokenImageError | MissingFileError]]:
        """Caption any number of images, reading the next ones, in threads, while the model runs.

        A source is anything `encode` reads, or a function that returns a uint8 `(3, H, W)` tensor or a file's bytes;
        `options` are those of `decode`. Yield the index of each source, in order, with its captions or the error that
        prevented them.
        """
        if isinstance(options.get("seed", 0), int):  # one generator for all batches, or each would draw the same
            options["seed"] = self.engine.generator(options.get("seed", 0))
        for batch in self._stream(sources, batch_size, workers):
            results = {image.index: image.error for image in batch}
            for images, features, grid in self._encode([image for image in batch if image.error is None]):
                captions = self.decode(features, **({"grid": grid} | options))
                results.update(zip((image.index for image in images), captions, strict=True))
            yield from results.items()

    def caption_files(
        self, paths: Iterable[str | os.PathLike], batch_size: int = 32, **options: float
    ) -> Iterator[tuple[Path | str, list[Caption] | BrokenImageError | MissingFileError]]:
        """Caption any number of files and links; as `caption_stream`, but yields each path instead of its index."""
        paths = [path if is_link(path) else Path(path) for path in paths]
        for index, result in self.caption_stream(paths, batch_size, **options):
            yield paths[index], result


def load(
    model: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    precision: str = "auto",
    engine: str | None = None,
) -> Captioner:
    """Load a model by path or name; the released model by default, downloaded if it is not installed.

    Args:
        model: a checkpoint, a run folder (its best checkpoint), a released model's name (see `released.locate`),
            `hub:org/name` on the Hugging Face Hub (see `hub.fetch`) or a folder exported for ONNX Runtime; several,
            `A,B,C`, are used as an ensemble.
        device: where to run the model; a GPU if there is one.
        precision: of the backbone: `float32`, exact and the same on every machine; `bfloat16`, three times as fast on
            hardware that has it; or `auto`, bfloat16 on such hardware.
        engine: `torch`; `onnx`, ONNX Runtime, for which a checkpoint is exported to the user's cache if need be; or
            `auto`, ONNX Runtime if it is installed and the model is an exported folder or has an export in the cache.
            By default, torch for checkpoints.

    Raises:
        MissingFileError: there is no such model; the message lists the released ones.
        UserError: the file is not a checkpoint that this version reads, or the models do not form an ensemble.
    """
    paths = find_models(model)
    needs_torch = precision == "bfloat16" or str(device or "cpu") != "cpu" or len(paths) > 1
    engine = engine or ("auto" if paths[0].is_dir() else "torch")
    folder = find_export(paths[0], "torch" if engine == "auto" and needs_torch else engine)
    if folder is None:
        from showtell.checkpoint import load_checkpoint
        from showtell.ensemble import ensemble
        from showtell.torch_engine import find_device

        device = find_device(device)
        members = [(path, load_checkpoint(path, device)) for path in paths]
        return Captioner(members[0][1] if len(members) == 1 else ensemble(members), device, precision)
    if needs_torch:
        raise UserError("the engine onnx runs one model, on the CPU, in its own precision; use --engine torch")
    if not (folder / HEADER).exists():
        from showtell.checkpoint import load_checkpoint
        from showtell.onnx_export import export_onnx

        export_onnx(load_checkpoint(paths[0]), folder)
    return Captioner(OnnxEngine(folder))


def find_models(model: str | os.PathLike | None = None) -> list[Path]:
    """Return the path of a model, or the paths of the members of an ensemble, `A,B,C`; see `load`."""
    if model is None or Path(model).exists():  # its name may have a comma
        return [find_model(model)]
    return [find_model(name) for name in str(model).split(",")]


def find_model(model: str | os.PathLike | None = None) -> Path:
    """Return the path of a checkpoint given by path, folder or name, or of an exported folder; see `load`."""
    remedy = "give a checkpoint, run folder or the name of a released model"
    if model is None:
        return released.locate()
    if str(model).startswith(hub.PREFIX):
        return hub.fetch(str(model))
    path = Path(model)
    if path.is_dir():
        if (path / HEADER).exists():
            return path
        if not (path / "best.safetensors").exists():
            raise MissingFileError(f"the folder {path} holds no best.safetensors; name a checkpoint or a finished run")
        path = path / "best.safetensors"
    if path.exists():
        require_regular_file(path, "model", remedy)
        return path
    return released.locate(str(model))


def model_name(model: str | os.PathLike | None = None) -> str:
    """Return a model's name for titles: of its file, and for `best` and `last` of the run folder, too; no path."""
    names = [(path.absolute().parent.name, path.stem) for path in find_models(model)]
    return ", ".join(f"{folder}/{name}" if name in ("best", "last") else name for folder, name in names)
