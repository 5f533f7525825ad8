"""Batches of (images, captions): `get_loader`, its data set, and two ways of grouping captions into batches.

`length`: captions of one length together, so that nothing is padded; every caption exactly once per epoch.
`image`: every image once with all its captions, encoded once; captions padded with `showtell.decoders.IGNORE`.
"""

from __future__ import annotations

import itertools
import random
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from showtell import datasets
from showtell.datasets import CaptionSet
from showtell.decoders import IGNORE
from showtell.errors import MissingFileError, UserError
from showtell.features import FeatureCache
from showtell.transforms import BrokenImageError, Transform, mirror_caption
from showtell.vocabulary import END, START, UNK, Vocabulary, build_file, load_file

GROUPS = ("length", "image")
MODES = ("train", "val", "test")
# Where COCO is looked for if no folder is given: that of the course, then those of `showtell download`.
COCO_FOLDERS = ("/opt/cocoapi", "data/coco", "data/coco2017", "data/coco2014")
MAX_WORDS = 100  # per caption: one caption of 1,500 words would pad its whole batch to gigabytes

Batch = tuple[Tensor, Tensor]  # images, captions


class Broken:
    """Stands in for a sample whose image cannot be read, until the loader has counted it."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason


def cut_caption(ids: list[int]) -> list[int]:
    """Cut an encoded caption to `MAX_WORDS` words between `<start>` and `<end>`."""
    return ids if len(ids) <= MAX_WORDS + 2 else [*ids[: MAX_WORDS + 1], ids[-1]]


class CaptionDataset(Dataset):
    """A `CaptionSet` as tensors: images transformed (or their cached features), captions as ids.

    Attributes:
        caption_set, vocab: the images with their captions, and the vocabulary.
        caption_lengths: the number of words of every caption, without `<start>` and `<end>`.
        n_cut: the number of captions that were cut to `MAX_WORDS` words. image_of: the image of every caption.
        batch_size: how many indices `get_train_indices` returns.
    """

    def __init__(
        self,
        caption_set: CaptionSet,
        vocab: Vocabulary,
        transform: Transform | Callable | None = None,
        mode: str = "train",
        group: str = "length",
        batch_size: int = 1,
        seed: int = 0,
        captions_per_image: int = 0,
    ) -> None:
        """Encode every caption once.

        Args:
            caption_set, vocab: images with captions, and what turns words into ids.
            transform: a `Transform`, or any callable from a PIL image to a tensor.
            mode: `"train"`, `"val"` (nothing random) or `"test"` (original and transformed image, no captions).
            group: what one index means: a caption (`"length"`) or an image with all its captions (`"image"`).
            batch_size, seed: of `get_train_indices`; the seed is that of the augmentation, too.
            captions_per_image: in training by image, the number of captions drawn per image and epoch; 0 for all.
        """
        if mode not in MODES or group not in GROUPS:
            raise UserError(f"mode={mode!r}, group={group!r} is not known; modes are {MODES} and groups are {GROUPS}")
        self.caption_set, self.vocab, self.mode, self.group = caption_set, vocab, mode, group
        self.by_caption = group == "length" and mode != "test"
        self.transform = transform.evaluation() if isinstance(transform, Transform) and mode != "train" else transform
        self.batch_size, self.seed = batch_size, seed
        self.captions_per_image = captions_per_image if mode == "train" else 0
        self.use_features(None)
        self._mirror_word = {i: vocab(m) for word, i in vocab.word2idx.items() if (m := mirror_caption(word)) != word}
        groups = zip(vocab.starts_of(caption_set.styles), caption_set.captions, strict=True)
        encoded = [[start, *vocab.encode(text)[1:]] for start, texts in groups for text in texts]
        self.n_cut = sum(len(ids) > MAX_WORDS + 2 for ids in encoded)
        encoded = [cut_caption(ids) for ids in encoded]
        self._ids = np.fromiter((i for ids in encoded for i in ids), np.int32)
        self._ends = np.cumsum([len(ids) for ids in encoded], dtype=np.int64)
        self.image_of = np.repeat(np.arange(len(caption_set)), [len(texts) for texts in caption_set.captions])
        self._first_caption = np.searchsorted(self.image_of, np.arange(len(caption_set) + 1))
        self.caption_lengths: list[int] = [len(ids) - 2 for ids in encoded]
        # Shared memory: persistent loader workers see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        self._lengths_left: Iterator[list[int]] | None = None

    def use_features(self, cache: FeatureCache | None, mirror_cache: FeatureCache | None = None) -> None:
        """Return features of a built cache, or two if the transform flips, in place of images; None undoes this."""
        self.cache, self.mirror_cache = cache, mirror_cache
        self.rows = None if cache is None else cache.rows(self.caption_set)
        self.mirror_rows = None if mirror_cache is None else mirror_cache.rows(self.caption_set)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_lengths_left": None}  # a generator, which cannot be pickled for a spawned worker

    def __len__(self) -> int:
        """Return the number of samples: captions, or images when grouped by image or in test mode."""
        return len(self.caption_lengths if self.by_caption else self.caption_set)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose augmentation is drawn, in running workers too."""
        self._epoch.fill_(epoch)

    def caption_ids(self, n: int) -> Tensor:
        """Return caption number `n` as `[<start>, …, <end>]`, or with the start word of its style."""
        start = self._ends[n - 1] if n else 0
        return torch.from_numpy(self._ids[start : self._ends[n]].astype(np.int64))

    def captions_of(self, image_index: int) -> list[Tensor]:
        """Return all captions of an image, as `caption_ids` does."""
        return [self.caption_ids(n) for n in range(*self._first_caption[image_index : image_index + 2])]

    def __getitem__(self, index: int) -> tuple | Broken:
        """Return (image, caption), (image, captions) when grouped by image, or (original, image) in test mode."""
        image_index = int(self.image_of[index] if self.by_caption else index)
        try:
            if self.mode == "test":
                original = self.caption_set.image(image_index)
                return original.permute(1, 2, 0).numpy(), self._transformed(original)
            key = (self.seed, int(self._epoch), int(index))
            may_flip = isinstance(self.transform, Transform) and (self.cache is None or self.mirror_cache is not None)
            flipped = may_flip and self.transform.flips(key)
            image = self._image(image_index, key, flipped)
        except (BrokenImageError, MissingFileError) as error:
            path, reason = self.caption_set.label(image_index), str(error)
            return Broken(path, reason if path in reason else f"{path}: {reason}")
        if self.group == "length":
            return image, self._caption(int(index), flipped)
        numbers = range(*self._first_caption[image_index : image_index + 2])
        if 0 < self.captions_per_image < len(numbers):
            draw = random.Random(f"{self.seed}/{int(self._epoch)}/{image_index}")
            numbers = draw.sample(numbers, self.captions_per_image)
        return image, [self._caption(n, flipped) for n in numbers]

    def _caption(self, n: int, flipped: bool) -> Tensor:
        ids = self.caption_ids(n)
        if flipped:  # objects on the left are now on the right
            first, *words = ids.tolist()
            ids = torch.tensor([first, *(self._mirror_word.get(word, word) for word in words)])
        return ids

    def _image(self, image_index: int, key: tuple, flipped: bool) -> Tensor:
        if self.cache is None:
            return self._transformed(self.caption_set.image(image_index), key)
        cache, rows = (self.mirror_cache, self.mirror_rows) if flipped else (self.cache, self.rows)
        if rows[image_index] < 0:
            raise BrokenImageError(f"{self.caption_set.label(image_index)} has no cached features")
        return cache[rows[image_index]]

    def _transformed(self, image: Tensor, key: tuple | None = None) -> Tensor:
        if isinstance(self.transform, Transform):
            return self.transform(image, key)
        if self.transform is None:
            return image
        from torchvision.transforms.v2.functional import to_pil_image

        return self.transform(to_pil_image(image))

    def get_train_indices(self) -> list[int]:
        """Return the indices of `batch_size` captions of one length, each caption once before any is repeated.

        The last few captions of a length are topped up to `batch_size` with others of that length.
        """
        self._lengths_left = self._lengths_left or self._endless_batches()
        return next(self._lengths_left)

    def _endless_batches(self) -> Iterator[list[int]]:
        lengths = np.asarray(self.caption_lengths)
        sampler = LengthBatchSampler(self.caption_lengths, self.batch_size, self.seed)
        generator = np.random.default_rng(self.seed)
        while True:
            for batch in sampler:
                if missing := self.batch_size - len(batch):
                    same = np.flatnonzero(lengths == lengths[batch[0]])
                    others = np.setdiff1d(same, batch)
                    pool = others if len(others) >= missing else same
                    batch = batch + generator.choice(pool, missing, replace=len(pool) < missing).tolist()
                yield batch
            sampler.epoch += 1


class CoCoDataset(CaptionDataset):
    """The Udacity course's name for the data set of a loader; only `get_loader` makes one, as a `CaptionDataset`."""

    def __init__(self, *_: object, **__: object) -> None:
        """Raise a `UserError` that says what to write instead."""
        raise UserError(
            "CoCoDataset(…) is made by get_loader here; write "
            "get_loader(transform, mode, batch_size, vocab_threshold, cocoapi_loc='/opt').dataset"
        )


class EpochSampler(Sampler[list[int]]):
    """Batches of an epoch as a function of (seed, epoch); resumable in the middle, shared among processes.

    Attributes:
        epoch: the epoch to iterate over. skip: the number of its batches to skip, of all processes, when resuming.
        sampler: any sampler of indices, to make the batches of its indices as the notebooks of the Udacity course do;
            `None` for this class's own batches.
    """

    def __init__(
        self, batch_size: int, seed: int = 0, shuffle: bool = True, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            given = f"batch_size={batch_size}, rank={rank}, world_size={world_size}"
            raise UserError(f"{given} is out of range; give batch_size >= 1 and 0 <= rank < world_size")
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.epoch = self.skip = 0
        self.sampler: Sampler[int] | None = None

    def all_batches(self, generator: np.random.Generator) -> list[list[int]]:
        """Return the batches of all processes for one epoch, drawn with `generator`."""
        raise NotImplementedError

    def n_batches(self) -> int:
        """Return the number of batches of all processes in an epoch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[list[int]]:
        if self.sampler is not None:
            return iter(BatchSampler(self.sampler, self.batch_size, drop_last=False))
        return iter(self.left()[self.rank :: self.world_size])

    def left(self) -> list[list[int]]:
        """Return the batches of all processes for this epoch, without the skipped ones."""
        return self.all_batches(np.random.default_rng([self.seed, self.epoch]))[self.skip :]

    def __len__(self) -> int:
        """Return the number of batches of this process in a whole epoch."""
        return len(range(self.rank, self.n_batches(), self.world_size))

    def _order(self, values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return generator.permutation(values) if self.shuffle else values

    def _cut(self, values: np.ndarray, generator: np.random.Generator) -> list[list[int]]:
        order = self._order(values, generator).tolist()
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]


class LengthBatchSampler(EpochSampler):
    """Batches of captions of equal length, every caption once per epoch: full batches first, remainders last."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0, **options: int) -> None:
        """Take the length of every caption; `options` are those of `EpochSampler`."""
        super().__init__(batch_size, seed, **options)
        lengths = np.asarray(lengths)
        order = np.argsort(lengths, kind="stable")
        self.buckets = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if len(order) else []

    def all_batches(self, generator: np.random.Generator) -> list[list[int]]:
        full, rest = [], []
        for bucket in self.buckets:
            for batch in self._cut(bucket, generator):
                (full if len(batch) == self.batch_size else rest).append(batch)
        return [part[i] for part in (full, rest) for i in self._order(np.arange(len(part)), generator)]

    def n_batches(self) -> int:
        return sum(-(-len(bucket) // self.batch_size) for bucket in self.buckets)


class ImageBatchSampler(EpochSampler):
    """Batches of images, each once per epoch."""

    def __init__(self, n_images: int, batch_size: int, seed: int = 0, **options: int) -> None:
        """Take the number of images; `options` are those of `EpochSampler`."""
        super().__init__(batch_size, seed, **options)
        self.n_images = n_images

    def all_batches(self, generator: np.random.Generator) -> list[list[int]]:
        return self._cut(np.arange(self.n_images), generator)

    def n_batches(self) -> int:
        return -(-self.n_images // self.batch_size)


def collate(samples: list[tuple | Broken]) -> tuple[Tensor | None, Tensor | None, list[Broken]]:
    """Stack samples into images `(B, …)` and captions `(B, T)`, or `(B, K, T)` when grouped by image.

    Captions are padded with `IGNORE` where lengths differ; K is the largest number of captions of an image. Broken
    samples are left out and returned separately; if all are broken, images and captions are None.
    """
    good, broken = _separate(samples)
    if not good:
        return None, None, broken
    first, second = zip(*good, strict=True)
    if isinstance(second[0], list):
        return _stack(first), pad_captions(second), broken
    return _stack(first), torch.nn.utils.rnn.pad_sequence(list(second), True, padding_value=IGNORE), broken


def collate_test(samples: list[tuple | Broken]) -> tuple[Tensor | None, Tensor | None, list[Broken]]:
    """Stack (original, image) pairs: `(B, H, W, 3)` uint8 and `(B, 3, S, S)`."""
    good, broken = _separate(samples)
    if not good:
        return None, None, broken
    originals, images = zip(*good, strict=True)
    return torch.stack([torch.from_numpy(np.ascontiguousarray(o)) for o in originals]), _stack(images), broken


def pad_captions(captions: Sequence[Sequence[Tensor]]) -> Tensor:
    """Pad the captions of several images with `IGNORE`, to `(B, K, T)`."""
    k, t = max(map(len, captions)), max((len(ids) for own in captions for ids in own), default=0)
    padded = torch.full((len(captions), k, t), IGNORE)
    for i, own in enumerate(captions):
        for j, ids in enumerate(own):
            padded[i, j, : len(ids)] = ids
    return padded


def _separate(samples: list[tuple | Broken]) -> tuple[list[tuple], list[Broken]]:
    broken = [sample for sample in samples if isinstance(sample, Broken)]
    return [sample for sample in samples if not isinstance(sample, Broken)], broken


def _stack(images: Sequence[Tensor]) -> Tensor:
    if others := [image for image in images if not isinstance(image, Tensor)]:
        raise UserError(f"the transform returns a {type(others[0]).__name__}, not a tensor; end it with ToTensor()")
    sizes = sorted({tuple(image.shape) for image in images})
    if len(sizes) > 1:
        shapes = f"{sizes[0]} and {sizes[-1]}"
        raise UserError(f"images of shapes {shapes} cannot share a batch; crop them: Transform(resize=256, crop=224)")
    return torch.stack(list(images))


class CaptionLoader(DataLoader):
    """A `DataLoader` that leaves out broken images, counts them, and stops when there are too many.

    Attributes:
        broken: path -> error message of every broken image so far.
    """

    def __init__(
        self, samples: CaptionDataset, batch_size: int, num_workers: int = 0, max_broken: int = 100, **options: int
    ) -> None:
        """Take the number of broken images to leave out; `options` are those of `EpochSampler`."""
        self.max_broken = max_broken
        self.broken: dict[str, str] = {}
        if samples.by_caption:
            batches: EpochSampler = LengthBatchSampler(samples.caption_lengths, batch_size, **options)
        else:
            batches = ImageBatchSampler(len(samples), batch_size, **options)
        super().__init__(
            samples,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate_test if samples.mode == "test" else collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0 and samples.mode == "train",
            worker_init_fn=_ignore_interrupts,
            generator=torch.Generator().manual_seed(batches.seed),  # the global generator belongs to training
        )

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch in self._all() if batch is not None)

    def steps(self, n: int) -> Iterator[list[Batch]]:
        """Yield the next `n` batches of this process at a time, without those that have no readable image.

        All processes that share an epoch yield the same number of lists, of which the last may be empty.
        """
        sampler, batches = self.batch_sampler, self._all()
        left = sampler.n_batches() - sampler.skip
        for _ in range(-(-left // (n * sampler.world_size))):
            yield [batch for batch in itertools.islice(batches, n) if batch is not None]

    def _all(self) -> Iterator[Batch | None]:
        for images, captions, broken in self._collated():
            for sample in broken:
                if sample.path not in self.broken:
                    self.broken[sample.path] = sample.reason
                    warnings.warn(f"left out: {sample.reason}", stacklevel=2)
            if len(self.broken) > self.max_broken:
                listed = "\n".join(f"  {reason}" for reason in self.broken.values())
                count = f"{len(self.broken)} images cannot be read, more than the {self.max_broken} allowed"
                raise UserError(f"{count}; repair or remove them, or raise max_broken:\n{listed}")
            yield None if images is None else (images, captions)

    def close(self) -> None:
        """End the worker processes, which otherwise wait for the next epoch."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()
            self._iterator = None

    def _collated(self) -> Iterator[tuple[Tensor | None, Tensor | None, list[Broken]]]:
        try:
            yield from super().__iter__()
        except UserError as error:  # from a worker, it comes with a traceback, which is of no use to the user
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None


def _ignore_interrupts(_: int) -> None:
    """Leave Ctrl-C, which reaches all processes of a terminal, to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def get_loader(
    transform: Transform | Callable | None = None,
    mode: str = "train",
    batch_size: int = 1,
    vocab_threshold: int | None = None,
    vocab_file: str | PathLike | None = None,
    start_word: str = START,
    end_word: str = END,
    unk_word: str = UNK,
    vocab_from_file: bool = True,
    num_workers: int = 0,
    cocoapi_loc: str | PathLike | None = None,
    *,
    dataset: str | CaptionSet = "coco",
    data_dir: str | PathLike | None = None,
    split: str | None = None,
    vocab: Vocabulary | None = None,
    group: str = "length",
    seed: int = 0,
    shuffle: bool | None = None,
    rank: int = 0,
    world_size: int = 1,
    max_broken: int = 100,
) -> CaptionLoader:
    """Open a data set and return its batches. The first eleven arguments are those of the Udacity course, in order.

    Args:
        transform: a `Transform`, or any callable from a PIL image to a tensor (a torchvision `Compose`, for example).
        mode: `"train"`: (images, captions), shuffled and augmented; `"val"`: the same of the validation split, in
            fixed order; `"test"`: (original image, image), one at a time.
        batch_size: captions (or images, by `group`) per batch.
        vocab_threshold: for a new vocabulary (default 5); compared with that of a loaded one.
        vocab_file: where the vocabulary is read from, or written to if it is new. By default, a new one is written to
            `runs/vocab.pkl`, and `showtell.vocabulary.default_vocab_file` says which one is read.
        start_word, end_word, unk_word: accepted for the course's notebooks; the defaults are the only values.
        vocab_from_file: whether to load the vocabulary rather than build it from the training captions and save it.
        cocoapi_loc: the folder that holds the course's `cocoapi/`; the same as `dataset="coco"` and that `data_dir`.
        dataset: a reader of `showtell.datasets`, or an open `CaptionSet`.
        data_dir, split: its folder and split; by default the first of `COCO_FOLDERS`, and the mode's split (`val` for
            COCO's test images, which have no captions).
        vocab: an open vocabulary, instead of `vocab_file`. group: `"length"` or `"image"`, see the module.
        seed: random seed of shuffling and augmentation. shuffle: by default in all modes but `"val"`.
        rank, world_size: this process, and the number of processes that share an epoch.
        max_broken: the number of unreadable images to leave out before stopping with an error.

    Raises:
        UserError: arguments that contradict each other, or data in an unexpected format.
        MissingFileError: the data or the vocabulary is missing.
    """
    if mode not in MODES:
        raise UserError(f"mode={mode!r} is not known; choose one of {', '.join(MODES)}")
    if (start_word, end_word, unk_word) != (START, END, UNK):
        raise UserError(f"the special words are always {START}, {END} and {UNK}; leave these arguments out")
    if mode == "test" and batch_size != 1:
        raise UserError(f"mode='test' returns originals of any size, one at a time; use batch_size=1, not {batch_size}")
    if not vocab_from_file and mode != "train":
        raise UserError(f"a vocabulary is built from training captions only; use vocab_from_file=True in mode={mode!r}")
    if cocoapi_loc is not None:
        dataset, data_dir = "coco", Path(cocoapi_loc) / "cocoapi"
    elif dataset == "coco" and data_dir is None:
        data_dir = _find_coco()
    caption_set = dataset
    if not isinstance(dataset, CaptionSet):
        split = split or ("val" if (dataset, mode) == ("coco", "test") else mode)
        caption_set = datasets.load(dataset, data_dir, split)
    if vocab is None:
        vocab = (load_file if vocab_from_file else build_file)(caption_set.all_captions, vocab_threshold, vocab_file)
    samples = CaptionDataset(caption_set, vocab, transform, mode, group, batch_size, seed)
    if samples.n_cut:
        warnings.warn(f"{samples.n_cut} captions have over {MAX_WORDS} words and are cut to that", stacklevel=2)
    shuffle = mode != "val" if shuffle is None else shuffle
    options = {"shuffle": shuffle, "seed": seed, "rank": rank, "world_size": world_size}
    return CaptionLoader(samples, batch_size, num_workers, max_broken, **options)


def _find_coco() -> str:
    """Return the first of `COCO_FOLDERS` that is there."""
    if found := next((folder for folder in COCO_FOLDERS if Path(folder, "annotations").is_dir()), None):
        return found
    raise MissingFileError(
        f"COCO is in none of {', '.join(COCO_FOLDERS)}; type showtell download coco2017 (or coco2014), pass the folder "
        "of a copy elsewhere as data_dir= (or the one above it, if it is called cocoapi, as cocoapi_loc=), or pass "
        'dataset="synthetic" for drawn shapes'
    )
