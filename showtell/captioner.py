"""A trained model that captions images: encode once, decode many.

import showtell
captioner = showtell.load("runs/flickr8k/best.safetensors")
for caption in captioner.caption("photo.jpg", n_best=3):
    print(caption.text, caption.score)
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from showtell.checkpoint import Checkpoint, load_checkpoint
from showtell.decoding import DecodingOptions, Hypothesis, beam_search, sample
from showtell.errors import MissingFileError, UserError
from showtell.transforms import IMAGE_SUFFIXES, BrokenImageError, Source, read_image
from showtell.vocabulary import Vocabulary, spell_words

RELEASED = "showtell-attend"  # what `load()` opens when nothing is named
MODELS = Path(__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Caption:
    """One caption of one image.

    Attributes:
        text: for people: a capital first, punctuation attached.
        score: length-normalised log-probability; nearer 0 is surer, and captions of different images compare.
        words: the words as the model wrote them.
        word_probs: the model's probability of each word, from 0 to 1, given the image and the words before it.
        alphas: where the model looked at each word, `(words, rows, columns)`, summing to 1 over the grid, from models
            that attend and when asked for.
    """

    text: str
    score: float
    words: list[str]
    word_probs: list[float]
    alphas: Tensor | None = None

    @property
    def pieces(self) -> list[str]:
        """`text` cut into its words, each with the space before it; one piece for each of `words`."""
        return spell_words(self.words)

    @classmethod
    def of(cls, hypothesis: Hypothesis, vocab: Vocabulary) -> Caption:
        """Turns ids and log-probabilities into words and probabilities."""
        words = [vocab.idx2word[i] for i in hypothesis.ids]
        probs = [math.exp(p) for p in hypothesis.log_probs[: len(words)]]
        alphas = hypothesis.alphas
        if alphas is not None:
            side = math.isqrt(alphas.shape[1])
            alphas = alphas.unflatten(1, (side, -1))
        return cls(vocab.decode(hypothesis.ids), hypothesis.score, words, probs, alphas)

    def to_dict(self) -> dict:
        """Plain values, as `showtell caption --json` prints them."""
        return {
            "text": self.text,
            "score": round(self.score, 4),
            "words": self.words,
            "word_probs": [round(p, 4) for p in self.word_probs],
        }


class Captioner:
    """A model ready to caption.

    Attributes:
        model, vocab, transform, meta: as in `showtell.checkpoint.Checkpoint`. device: where it computes.
    """

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.model = checkpoint.model.to(self.device).eval()
        self.vocab, self.transform, self.meta = checkpoint.vocab, checkpoint.transform, checkpoint.meta

    def encode(self, images: Source | Sequence[Source]) -> Tensor:
        """Turns images into what the decoder reads, `(B, E)` or `(B, L, E)`; decode that as often as you like.

        Args:
            images: one or several of: a path, a file's bytes, a PIL image, an array, a uint8 tensor.

        Raises:
            MissingFileError: a file is not there.
            BrokenImageError: an image cannot be read.
        """
        batch = [self.transform(image) for image in _as_list(images)]
        return self._encode(torch.stack(batch))

    @torch.inference_mode()
    def _encode(self, batch: Tensor) -> Tensor:
        return self.model.encoder(batch.to(self.device))

    def decode(
        self, features: Tensor, beam_size: int = 5, n_best: int = 1, alphas: bool = False, **rules: float
    ) -> list[list[Caption]]:
        """Captions encoded images by beam search.

        Args:
            features: from `encode`.
            beam_size: how many beginnings are kept; 1 is greedy.
            n_best: captions an image, best first.
            alphas: whether to keep the attention maps.
            rules: `min_len`, `max_len`, `no_repeat_ngram`, `length_penalty`, `allow_unk`; see `DecodingOptions`.
        """
        found = beam_search(self.model.decoder, features, self.rules(**rules), max(beam_size, n_best), n_best, alphas)
        return [[Caption.of(h, self.vocab) for h in hypotheses] for hypotheses in found]

    def sample(
        self,
        features: Tensor,
        n: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        alphas: bool = False,
        **options: float,
    ) -> list[list[Caption]]:
        """Draws `n` captions of encoded images; `options` as in `showtell.decoding.sample`."""
        draw = {name: options.pop(name) for name in ("top_k", "top_p") if name in options}
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = sample(
            self.model.decoder,
            features,
            self.rules(**options),
            n,
            temperature,
            generator=generator,
            alphas=alphas,
            **draw,
        )
        return [[Caption.of(h, self.vocab) for h in hypotheses] for hypotheses in drawn]

    def rules(self, **options: float) -> DecodingOptions:
        """The decoding rules for this vocabulary, with the length penalty and greatest length it was validated with."""
        recipe = self.meta.get("recipe") or {}
        learnt = {name: recipe[name] for name in ("length_penalty", "max_len") if name in recipe}
        return DecodingOptions.of(self.vocab, **(learnt | options))

    def caption(self, image: Source, beam_size: int = 5, n_best: int = 1, **options: float) -> list[Caption]:
        """Captions one image, best caption first; see `encode` and `decode` for the arguments."""
        return self.decode(self.encode(image), beam_size, n_best, **options)[0]

    def caption_files(
        self, paths: Iterable[str | os.PathLike], batch_size: int = 32, **options: float
    ) -> Iterator[tuple[Path, list[Caption] | BrokenImageError | MissingFileError]]:
        """Captions any number of files, reading the next while the last are decoded.

        Yields:
            each path, in order, with its captions, or with what is wrong with it.
        """

        def read(path: Path) -> Tensor | BrokenImageError | MissingFileError:
            try:
                return self.transform(read_image(path))
            except (BrokenImageError, MissingFileError) as error:
                return error

        paths = [Path(path) for path in paths]
        with ThreadPoolExecutor(2) as pool:
            chunks = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
            ahead = [pool.submit(read, path) for path in chunks[0]] if chunks else []
            for i, chunk in enumerate(chunks):
                results = [future.result() for future in ahead]
                ahead = [pool.submit(read, path) for path in chunks[i + 1]] if i + 1 < len(chunks) else []
                good = [result for result in results if isinstance(result, Tensor)]
                captions = iter(self.decode(self._encode(torch.stack(good)), **options) if good else ())
                for path, result in zip(chunk, results, strict=True):
                    yield path, next(captions) if isinstance(result, Tensor) else result


def _as_list(images: Source | Sequence[Source]) -> Sequence[Source]:
    return images if isinstance(images, (list, tuple)) else [images]


def load(model: str | os.PathLike | None = None, device: str | torch.device | None = None) -> Captioner:
    """Opens a model by path or name; with neither, the released one.

    Args:
        model: a checkpoint, a run folder (its best checkpoint), or the name of a released model, whose newest version
            is meant where its number is left out: `showtell-classic`.
        device: where to compute; a GPU if there is one.

    Raises:
        MissingFileError: there is no such model; the message lists those there are.
        UserError: the file is no checkpoint that this version reads.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Captioner(load_checkpoint(find_model(model), device), device)


def find_model(model: str | os.PathLike | None = None) -> Path:
    """The checkpoint's path behind a name, a folder or a path; see `load`."""
    if model is None:
        if newest := _released(RELEASED):
            return newest
        raise MissingFileError(
            "no model is released with this version yet; name your own (--model runs/NAME/best.safetensors), "
            "or train one: showtell train --help"
        )
    path = Path(model)
    if path.is_dir():
        if not (path / "best.safetensors").is_file():
            raise MissingFileError(f"the folder {path} holds no best.safetensors; name a checkpoint or a finished run")
        return path / "best.safetensors"
    if path.is_file():
        return path
    if newest := _released(str(model)):
        return newest
    released = sorted(path.stem for path in MODELS.glob("*.safetensors"))
    raise MissingFileError(
        f"there is no model {model}; give a checkpoint's path, a run folder"
        + (f", or one of {', '.join(released)}" if released else "")
    )


def _released(name: str) -> Path | None:
    """The released model of this name or, for a name without its number, the newest; none if there is no such model."""
    found = {path.stem: path for path in MODELS.glob("*.safetensors")}
    numbered = [stem for stem in found if re.fullmatch(rf"{re.escape(name)}-\d+", stem)]
    newest = max(numbered, key=lambda stem: int(stem.rpartition("-")[2]), default=name)
    return found.get(name) or found.get(newest)


def find_images(sources: Iterable[str | os.PathLike]) -> list[Path]:
    """The images that files and folders name: files as given, folders searched through, by name.

    Raises:
        MissingFileError: something named is not there.
        UserError: a folder holds no image.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(
                path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()
            )
            if not inside:
                raise UserError(
                    f"the folder {source} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); name another"
                )
            found += inside
        elif source.exists():
            found.append(source)
        else:
            raise MissingFileError(f"there is no {source}; give images, or folders of images")
    return found
