"""Captions and scores of a whole data set: free-running captions, each image once, and token-weighted perplexity.

showtell evaluate --model runs/flickr8k --dataset flickr8k --data-dir data/flickr8k --split val --html report.html
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from showtell import datasets, metrics, scoring
from showtell.captioner import MODELS, Caption, find_model, load
from showtell.data_loader import CaptionDataset, CaptionLoader, ImageBatchSampler, collate
from showtell.datasets import CaptionSet
from showtell.decoding import DecodingOptions, Hypothesis, beam_search
from showtell.errors import UserError
from showtell.files import write_json
from showtell.model import CaptionModel, Loss, caption_loss
from showtell.report import Tile
from showtell.results import write_results


def image_loader(
    samples: CaptionDataset, batch_size: int, num_workers: int = 0, max_broken: int = 100
) -> CaptionLoader:
    """Batches of a data set grouped by image, in order."""
    batches = ImageBatchSampler(len(samples), batch_size, shuffle=False)
    return CaptionLoader(
        samples,
        max_broken,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator().manual_seed(0),
    )


@torch.no_grad()
def perplexity(
    model: CaptionModel,
    loader: Iterable,
    device: str | torch.device = "cpu",
    on_batch: Callable[[], None] | None = None,
) -> tuple[float, float]:
    """Token-weighted over the whole loader: mean negative log-likelihood of a word in nats, and its exponential.

    `on_batch` is called before each batch, and what it raises ends the work.
    """
    model.eval()
    nll, words = 0.0, 0
    for images, captions in loader:
        if on_batch:
            on_batch()
        captions = captions.to(device)
        images = images.to(device)
        logits, _ = model(images, captions)
        loss = caption_loss(logits, captions)
        nll += loss.nll.item()
        words += int(loss.words)
    mean = nll / max(1, words)
    return mean, math.exp(min(mean, 700.0))


@torch.no_grad()
def write_captions(
    model: CaptionModel,
    loader: CaptionLoader,
    rules: DecodingOptions,
    beam_size: int = 5,
    device: str | torch.device = "cpu",
    progress: bool = False,
    on_batch: Callable[[], None] | None = None,
    losses: list[Loss] | None = None,
) -> dict[str, Hypothesis]:
    """Captions every image of a loader from `image_loader` once, free-running; `on_batch` as in `perplexity`.

    With `losses`, the teacher-forced loss of every batch is appended to it, from the same encoding of the images.

    Returns:
        image id (as a string) -> its best hypothesis; images that could not be read are not in it.
    """
    model.eval()
    samples: CaptionDataset = loader.dataset
    found: list[Hypothesis] = []
    loader.broken.clear()  # an image that could not be read last time may be back
    with tqdm(total=len(samples), desc="captions", unit=" images", disable=not progress) as bar:
        for images, captions in loader:
            if on_batch:
                on_batch()
            features = model.encoder(images.to(device))
            found += [best[0] for best in beam_search(model.decoder, features, rules, beam_size)]
            if losses is not None:
                captions = captions.to(device)
                losses.append(caption_loss(model.decoder(features, captions.flatten(0, -2)), captions))
            bar.update(len(images))
    ids = [
        str(i)
        for i, path in zip(samples.caption_set.image_ids, _paths(samples), strict=True)
        if path not in loader.broken
    ]
    return dict(zip(ids, found, strict=True))


def _paths(samples: CaptionDataset) -> list[str]:
    return [str(samples.caption_set.path(i)) for i in range(len(samples.caption_set))]


@dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        about: model, dataset, split, beam_size: what was measured. perplexity: token-weighted, on all true captions.
        result: scores, intervals and health, as `showtell score` computes them.
        captions: image id -> the caption. path: the COCO results file they are written in.
    """

    about: dict
    perplexity: float
    result: scoring.Result
    captions: dict[str, Caption]
    path: Path

    def to_json(self) -> dict:
        """The document of `showtell evaluate --json`; scores from 0 to 1, CIDEr to 10."""
        scores = {"perplexity": self.perplexity, **self.result.to_json()}
        return {**self.about, "scores": scores, "captions": str(self.path)}

    def table(self) -> str:
        """For people: what was measured, the scores x 100, the health."""
        what = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.about.items())
        return f"{what}, perplexity {self.perplexity:.2f}\n{scoring.format_table([self.result])}\ncaptions: {self.path}"


def _training_captions(dataset: str, data_dir: str | os.PathLike | None) -> list[str] | None:
    """What written captions may repeat; None where only the split to evaluate is at hand."""
    try:
        return list(datasets.load(dataset, data_dir, "train").all_captions())
    except UserError:
        return None


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
) -> Evaluation:
    """Captions a split once an image, scores it, and writes `captions.json` in COCO's results format.

    Args:
        model: as in `showtell.load`.
        dataset: a reader's name, or an open `CaptionSet`.
        data_dir: its folder.
        split: which split; the test split is for a release.
        beam_size: 1 is greedy.
        device: where to compute.
        limit: so many images only, drawn by `seed`; 0 is all.
        out: the folder for `captions.json`; if left out, one named after model, data and split, beside the model, or
            in `runs` for a released one.
        html: where to write a report, if anywhere.
        spice: whether to compute SPICE, which needs Java and fetches a large file once.
        seed: of `limit` and of the intervals.
        progress: whether to show a bar.

    Raises:
        UserError: model or data cannot be used, or the data have no captions to score against.
    """
    path = find_model(model)
    captioner = load(path, device)
    captions = dataset if isinstance(dataset, CaptionSet) else datasets.load(dataset, data_dir, split)
    if limit:
        captions = captions.subset(limit, seed)
    if beam_size < 1:
        raise UserError(f"--beam-size {beam_size} cannot be; give 1 for greedy, or more")
    samples = CaptionDataset(captions, captioner.vocab, captioner.transform, "val", "image")
    loader = image_loader(samples, 50)
    losses: list[Loss] = []
    found = write_captions(
        captioner.model, loader, captioner.decoding_options(), beam_size, captioner.device, progress, losses=losses
    )
    if not found:
        raise UserError(
            f"none of the {len(captions)} images of {captions.name} {captions.split} can be read; mend them first"
        )
    written = {i: Caption.of(h, captioner.vocab) for i, h in found.items()}
    references = {i: texts for i, texts in captions.references().items() if i in written}
    texts = {i: caption.text for i, caption in written.items()}
    ppl = metrics.perplexity(sum(float(loss.nll) for loss in losses), sum(int(loss.words) for loss in losses))
    training = None if isinstance(dataset, CaptionSet) else _training_captions(dataset, data_dir)
    (result,) = scoring.score_captions(
        references, {path.stem: texts}, training_captions=training, spice=spice, seed=seed
    )
    about = {"model": str(path), "dataset": captions.name, "split": captions.split, "images": len(written)}
    about["beam_size"] = beam_size
    beside = Path("runs") if path.resolve().parent == MODELS else path.parent
    folder = Path(out) if out else beside / f"{path.stem}-{captions.name}-{captions.split}"
    ids = {str(i): i for i in captions.image_ids}
    rows = [{"image_id": ids[i], "caption": text} for i, text in texts.items()]
    write_json(folder / "captions.json", rows)
    evaluation = Evaluation(about, ppl, result, written, folder / "captions.json")
    if html:
        images = {str(i): n for n, i in enumerate(captions.image_ids)}
        write_results(
            html,
            result,
            references,
            lambda i: captions.path(images[i]) or captions.image(images[i]),
            ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()),
            [Tile("perplexity", f"{ppl:.2f}")],
            written,
        )
    return evaluation
