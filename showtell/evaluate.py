"""Captions and scores of a whole data set: generated captions, one per image, and token-weighted perplexity.

showtell evaluate --model runs/flickr8k --dataset flickr8k --data-dir data/flickr8k --split val --html report.html
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from showtell import datasets, distributed, metrics, scoring
from showtell.captioner import Caption, Captioner, find_model, find_models, load
from showtell.checkpoint import add_meta
from showtell.confidence import Calibration, Reliability, is_right, signals
from showtell.data_loader import MAX_WORDS, CaptionDataset, CaptionLoader, cut_caption, pad_captions
from showtell.datasets import CaptionSet
from showtell.decoding import DecodingOptions, Hypothesis, decode, require_strategy
from showtell.errors import UserError
from showtell.files import write_json
from showtell.image_stream import stream_images
from showtell.model import CaptionModel, caption_loss
from showtell.released import is_released
from showtell.report import Curve, Tile
from showtell.results import write_results


@torch.no_grad()
def mean_loss(
    model: CaptionModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "cpu",
    on_batch: Callable[[], None] | None = None,
) -> float:
    """Return the mean negative log-likelihood of a word in nats, over all words of all batches, on all processes.

    `on_batch` is called before each batch, and may raise to stop.
    """
    model.eval()
    found = []  # on the device, which nothing waits for
    for images, captions in batches:
        if on_batch:
            on_batch()
        captions = captions.to(device)
        loss = caption_loss(model(images.to(device), captions)[0], captions)
        found.append((loss.nll, loss.words))
    nll, words = distributed.total(sum(nll.item() for nll, _ in found), sum(int(words) for _, words in found))
    return nll / max(1, words)


@torch.no_grad()
def write_captions(
    model: CaptionModel,
    loader: CaptionLoader,
    options: DecodingOptions,
    beam_size: int = 5,
    device: str | torch.device = "cpu",
    on_batch: Callable[[], None] | None = None,
) -> dict[str, Hypothesis]:
    """Generate a caption for every image of a loader's share, by image and in order; `on_batch` as in `mean_loss`.

    Return the best hypothesis by image id (as a string); unreadable images are left out.
    """
    model.eval()
    samples: CaptionDataset = loader.dataset
    found: list[Hypothesis] = []
    loader.broken.clear()  # an image that could not be read last time may be back
    for images, captions in loader:
        if on_batch:
            on_batch()
        features = model.encoder(images.to(device))
        styled = options.beginning_as(captions)
        found += [best for (best,) in decode(model.decoder, features, options=styled, beam_size=beam_size)]
    caption_set = samples.caption_set
    own = [i for batch in loader.batch_sampler for i in batch]
    ids = [str(caption_set.image_ids[i]) for i in own if caption_set.label(i) not in loader.broken]
    return dict(zip(ids, found, strict=True))


@dataclass
class Evaluation:
    """The result of `evaluate`."""

    about: dict  # model, dataset, split, images, beam_size
    perplexity: float  # token-weighted, over all true captions
    result: scoring.Result  # scores, intervals and health, as `showtell score` computes them
    captions: dict[str, Caption]  # by image id
    path: Path  # the COCO results file that holds them
    reliability: Reliability | None  # of the captions' confidence, if the model has one

    def to_json(self) -> dict:
        """Return the document of `showtell evaluate --json`; scores from 0 to 1, CIDEr to 10."""
        scores = {"perplexity": self.perplexity, **self.result.to_json()}
        confidence = {"confidence": self.reliability.to_json()} if self.reliability else {}
        return {**self.about, "scores": scores, **confidence, "captions": str(self.path)}

    def title(self) -> str:
        """Return one line that says what was evaluated."""
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.about.items())

    def table(self) -> str:
        """Return what was evaluated, the scores x 100 and the health, for people."""
        table = scoring.format_table([self.result])
        confidence = f"\nconfidence: {self.reliability.table()}\n" if self.reliability else ""
        return f"{self.title()}, perplexity {self.perplexity:.2f}\n{table}\n{confidence}captions: {self.path}"


def evaluate(
    model: str | os.PathLike | None,
    dataset: str | CaptionSet,
    data_dir: str | os.PathLike | None = None,
    split: str = "val",
    beam_size: int = 5,
    *,
    device: str = "cpu",
    limit: int = 0,
    out: str | os.PathLike | None = None,
    html: str | os.PathLike | None = None,
    spice: bool = False,
    seed: int = 0,
    progress: bool = True,
    precision: str = "float32",
    style: str | None = None,
) -> Evaluation:
    """Caption every image of a split, score the captions, and write `captions.json` in COCO's results format.

    Args:
        model: as in `showtell.load`.
        dataset, data_dir: a reader's name and its folder, or an open `CaptionSet`.
        split: the split; use the test split for a release only. beam_size: 1 for greedy decoding.
        limit: the number of images, drawn by `seed`; 0 for all.
        out: the folder for `captions.json`; by default one named after model, data and split, beside the model, or in
            `runs` for a released model or an ensemble.
        html: where to write a report, if anywhere.
        spice: whether to compute SPICE, which needs Java and downloads a large file once.
        seed: random seed of `limit` and of the intervals. progress: whether to show a bar.
        precision: as in `showtell.load`; in float32, scores are the same on every machine.
        style: of the captions, if the model has styles; by default that of each image's data set, see
            `showtell.datasets.load`, or the model's first.

    Raises:
        UserError: model or data cannot be used, or the data have no captions to score against.
    """
    require_strategy("beam", 1, beam_size)
    paths = find_models(model)
    name = "ensemble" if len(paths) > 1 else paths[0].stem
    captioner = load(model, device, precision, "torch")
    caption_set = dataset if isinstance(dataset, CaptionSet) else datasets.load(dataset, data_dir, split)
    if limit:
        caption_set = caption_set.subset(limit, seed)
    captions, nll, words = _caption_images(captioner, caption_set, beam_size, progress, style)
    if not captions:
        unread = f"none of the {len(caption_set)} images of {caption_set.name} {caption_set.split}"
        raise UserError(f"{unread} can be read; check the folder they are in")
    references = {i: texts for i, texts in caption_set.references().items() if i in captions}
    texts = {i: caption.text for i, caption in captions.items()}
    training = None
    if not isinstance(dataset, CaptionSet):
        with contextlib.suppress(UserError):  # only the evaluated split may be there
            training = list(datasets.load(dataset, data_dir, "train").all_captions())
    options = {"training_captions": training, "spice": spice, "seed": seed}
    (result,) = scoring.score_captions(references, {name: texts}, **options)
    about = {"model": ",".join(map(str, paths)), "dataset": caption_set.name, "split": caption_set.split}
    about |= {"images": len(captions), "beam_size": beam_size} | ({"style": style} if style else {})
    beside = Path("runs") if len(paths) > 1 or is_released(paths[0]) else paths[0].parent
    folder = Path(out) if out else beside / f"{name}-{caption_set.name}-{caption_set.split}"
    ids = {str(i): i for i in caption_set.image_ids}
    rows = [{"image_id": ids[i], "caption": text} for i, text in texts.items()]
    write_json(folder / "captions.json", rows)
    reliability = None
    if captioner.calibration:
        right = [is_right(text, references[i]) for i, text in texts.items()]
        reliability = Reliability.of([caption.confidence for caption in captions.values()], right)
    perplexity = metrics.perplexity(nll, words)
    evaluation = Evaluation(about, perplexity, result, captions, folder / "captions.json", reliability)
    if html:
        sources = dict(zip(map(str, caption_set.image_ids), caption_set.sources(), strict=True))

        def image(i: str) -> object:
            return sources[i]() if callable(sources[i]) else sources[i]

        tiles = [Tile("perplexity", f"{evaluation.perplexity:.2f}")]
        charts = [_calibration_curve(reliability)] if reliability else []
        about = f"{evaluation.title()}; {captioner.engine.description}"
        write_results(html, result, references, image, about, tiles, captions, charts)
    return evaluation


def _calibration_curve(reliability: Reliability) -> Curve:
    auroc = "" if reliability.auroc is None else f"AUROC {reliability.auroc:.3f}, "
    series = {"captions": [(confidence, right) for confidence, right, _ in reliability.bins], "ideal": [(0, 0), (1, 1)]}
    note = f"{auroc}calibration error {reliability.error:.3f}; right: all things named are in a true caption"
    return Curve("Confidence", series, "mean confidence", "share of right captions", note)


def calibrate(
    model: str | os.PathLike | None,
    dataset: str | CaptionSet,
    data_dir: str | os.PathLike | None = None,
    split: str = "val",
    out: str | os.PathLike | None = None,
    *,
    device: str = "cpu",
    progress: bool = True,
) -> tuple[Path, Reliability]:
    """Fit the confidence of a model to its captions of a split, by beam search, and store it in the checkpoint.

    Args:
        model: as in `showtell.load`, but no ensemble.
        dataset, data_dir, split: as in `evaluate`; images that the model was neither trained nor will be tested on.
        out: the checkpoint to write; by default the model's own file, which must not be a released one.

    Return the file, and how well the confidence of held-out captions is calibrated.

    Raises:
        UserError: the split is not for validation, has too few images, or `out` is missing.
    """
    path = find_model(model)
    if split in ("train", "test"):
        raise UserError(f"a confidence calibrated on {split} would be too high where it counts; give --split val")
    if out is None and is_released(path):
        raise UserError(f"{path} is a released model and stays as it is; name the calibrated copy with --out")
    caption_set = dataset if isinstance(dataset, CaptionSet) else datasets.load(dataset, data_dir, split)
    captions, *_ = _caption_images(load(path, device, engine="torch"), caption_set, 5, progress)
    references = caption_set.references()
    rows = [signals(caption.words, caption.word_probs) for caption in captions.values()]
    right = [is_right(caption.text, references[i]) for i, caption in captions.items()]
    calibration, reliability = Calibration.fit(rows, right, dataset=caption_set.name, split=split)
    add_meta(path, out or path, confidence=asdict(calibration))
    return Path(out or path), reliability


@torch.no_grad()
def _caption_images(
    captioner: Captioner, caption_set: CaptionSet, beam_size: int, progress: bool, style: str | None = None
) -> tuple[dict[str, Caption], float, int]:
    """Return captions of the readable images by id, and negative log-likelihood and number of the true words."""
    vocab, styles = captioner.vocab, caption_set.styles
    starts = [vocab.start_of(style)] * len(styles) if style else vocab.starts_of(styles)
    groups = zip(starts, caption_set.captions, strict=True)
    encoded = [[[start, *vocab.encode(text)[1:]] for text in texts] for start, texts in groups]
    if n_cut := sum(len(ids) > MAX_WORDS + 2 for own in encoded for ids in own):
        warnings.warn(f"{n_cut} true captions have over {MAX_WORDS} words and are cut for the perplexity", stacklevel=3)
    captions, nll, words = {}, 0.0, 0
    sources = caption_set.sources()
    with tqdm(total=len(sources), desc="captions", unit=" images", disable=not progress) as bar:
        for batch in stream_images(sources, captioner.transform, batch_size=50):
            for image in batch:
                if image.error:
                    warnings.warn(f"left out: {image.error}", stacklevel=3)
            for images, features, _ in captioner._encode([image for image in batch if image.error is None]):
                true = [[torch.tensor(cut_caption(ids)) for ids in encoded[image.index]] for image in images]
                targets = pad_captions(true).to(captioner.device)
                loss = caption_loss(captioner.model.decoder(features, targets.flatten(0, -2)), targets)
                nll, words = nll + loss.nll.item(), words + int(loss.words)
                first = tuple(starts[image.index] for image in images)
                found = captioner.decode(features, beam_size=beam_size, start_id=first)
                for image, (best,) in zip(images, found, strict=True):
                    captions[str(caption_set.image_ids[image.index])] = best
            bar.update(len(batch))
    return captions, nll, words
