"""The feature cache: the output of frozen layers for each image, computed once and read at every epoch.

    cache = FeatureCache.open("runs/features", encoder.backbone, transform)
    cache.build(train_set)                       # continues a killed build; new images extend the cache
    features = cache.get(cache.rows(train_set))  # (N, D) or (N, L, D), half precision

One folder holds the caches of all backbones and transforms, each in a subfolder named by `fingerprint`. There,
`features.f16` is rows of half-precision numbers without anything between them, and `index.jsonl` says which image each
row belongs to. Both only grow, the index after the rows, so that a kill at any moment costs a second of work.

An image is identified by its contents, so that a folder may be moved, copied or renamed. Path, size and modification
time spare reading the file again, as in git.

Shapes: N images, L grid cells, D feature size.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from showtell import distributed
from showtell.backbones import Backbone
from showtell.errors import UserError
from showtell.files import lock, readable_size, require_free_space, write_json
from showtell.image_stream import LoadedImage, Stamp, digest_of, file_stamp, stream_images
from showtell.transforms import Transform, read_bytes

if TYPE_CHECKING:
    from showtell.datasets import CaptionSet

PRECISIONS = ("float32", "bfloat16")
BATCH_SIZE = 32  # images per forward pass while building
INDEX_LINE_BYTES = 200  # a generous estimate, for the disk check alone
COMMIT_EVERY_S = 1.0


def fingerprint(backbone: Backbone, transform: Transform, precision: str = "float32") -> str:
    """Return 64 characters that differ when the features would: weights, network, strides, grid, transform, precision.

    Strides are included because two ResNets with the same weights may differ in nothing else (see `Backbone`).
    """
    strides = [(name, repr(getattr(module, "stride", None))) for name, module in backbone.net.named_modules()]
    network = [backbone.name, backbone.grid, strides, transform.fingerprint(), precision]
    digest = hashlib.sha256(json.dumps(network).encode())
    for name, tensor in backbone.net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Entry(NamedTuple):
    """A line of the index: the row of an image, the digest of its contents, and its stamp where it is a file."""

    row: int
    digest: str
    stamp: Stamp | None


class FeatureCache:
    """The features of one frozen backbone under one transform, for any number of image sets.

    Reading needs only the folder: a cache pickles into a few hundred bytes, and each loader worker, forked or spawned,
    maps the file for itself. One process at a time may build; others may read meanwhile. `folder` is that of this
    backbone and transform, `shape` that of one image's features, `(D,)` or `(L, D)`.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, ...],
        backbone: Backbone | None = None,
        transform: Transform | None = None,
        precision: str = "float32",
    ) -> None:
        """Use `open`."""
        self.folder, self.shape = folder, shape
        self._features_file, self._index_file = folder / "features.f16", folder / "index.jsonl"
        self._row_bytes = 2 * math.prod(shape)
        self._backbone, self._transform, self._precision = backbone, transform, precision
        self._forget()

    def _forget(self) -> None:
        self._map: np.ndarray | None = None
        self._row_of_digest: dict[str, int] = {}
        self._row_of_stamp: dict[Stamp, int] = {}
        self._sizes: set[int] = set()  # of the files in the index: a file of any other size is new
        self._moved: list[Entry] = []  # found by contents at a new path, not yet in the index
        self._rows_known = self._index_read = 0

    @classmethod
    def open(
        cls, folder: str | os.PathLike, backbone: Backbone, transform: Transform, precision: str = "float32"
    ) -> FeatureCache:
        """Open or create the cache of a backbone and a transform inside `folder`, which holds many.

        The `precision` of the computation is `"float32"` or `"bfloat16"` (about twice as fast on hardware that has it,
        exact to two or three digits); features are stored in half precision either way. The backbone stays as it is.

        Raises:
            UserError: the backbone trains, or the transform is random or keeps an image's proportions.
        """
        if backbone.trainable:
            raise UserError(f"{backbone.name} cannot be cached while training; freeze it with backbone.fine_tune(None)")
        if not isinstance(transform, Transform):
            kind = type(transform).__name__
            raise UserError(f"a {kind} is not a transform that a cache can identify; give a showtell Transform")
        if transform != transform.evaluation():
            raise UserError("random transforms (random_crop, flip) cannot be cached; give transform.evaluation()")
        if transform.size is None:
            raise UserError(f"{transform} returns images of many shapes, a cache needs one; add a crop, as in crop=224")
        if precision not in PRECISIONS:
            raise UserError(f"precision={precision!r} is not known; choose one of {', '.join(PRECISIONS)}")

        key = fingerprint(backbone, transform, precision)
        folder = Path(folder).absolute() / key[:16]
        with torch.inference_mode():
            black = torch.zeros(1, 3, transform.size, transform.size, device=next(backbone.parameters()).device)
            shape = tuple(backbone(black).shape[1:])
        if not distributed.rank() and not (folder / "cache.json").exists():  # for people; no code reads it
            about = {"fingerprint": key, "backbone": backbone.name, "shape": shape, "precision": precision}
            write_json(folder / "cache.json", about | {"transform": transform.to_dict()})
        return cls(folder, shape, backbone, transform, precision)

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.folder)!r}, shape={self.shape}, rows={len(self)})"

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "shape": self.shape}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        """Return the number of rows, which is that of different images."""
        self._read_index()
        return self._rows_known

    def __getitem__(self, row: int) -> Tensor:
        """Return the features of one row: `(D,)` or `(L, D)`, float16."""
        return self.get(np.array([row]))[0]

    def get(self, rows: np.ndarray | list[int]) -> Tensor:
        """Return the features of some rows, in their order: `(N, D)` or `(N, L, D)`, float16.

        A row that is -1, which stands for a broken image, or does not exist raises an `IndexError`.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if self._map is None or (rows.size and rows.max() >= len(self._map)):
            # An empty file cannot be mapped.
            shape = (self._rows_on_disk(), *self.shape)
            self._map = np.memmap(self._features_file, "<f2", "r", shape=shape) if shape[0] else np.empty(shape, "<f2")
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self._map):
            raise IndexError(f"rows {rows.min()} to {rows.max()} are out of range; {self.folder} has {len(self._map)}")
        return torch.from_numpy(self._map[rows])  # fancy indexing copies: no view of the file escapes

    def rows(self, caption_set: CaptionSet) -> np.ndarray:
        """Return the row of each image of a set, int64 `(N,)`; -1 for images that are broken or not built yet."""
        self._read_index()
        return np.array([self._find(caption_set, i) for i in range(len(caption_set))], dtype=np.int64)

    def missing(self, caption_set: CaptionSet) -> list[int]:
        """Return the indices of a set's images without a row; broken ones are among them and are tried again."""
        return np.flatnonzero(self.rows(caption_set) < 0).tolist()

    def _rows_on_disk(self) -> int:
        try:
            return self._features_file.stat().st_size // self._row_bytes
        except FileNotFoundError:
            return 0

    def _find(self, caption_set: CaptionSet, i: int) -> int:
        """Return the row of image i, or -1."""
        path = caption_set.path(i)
        if path is None:
            return self._row_of_digest.get(caption_set.digest(i), -1)
        stamp = file_stamp(path)
        if stamp is None or stamp in self._row_of_stamp:
            return self._row_of_stamp.get(stamp, -1)
        if stamp[1] not in self._sizes:
            return -1
        try:
            digest = digest_of(read_bytes(path)[1])
        except UserError:  # `build` will say what is wrong with it
            return -1
        if (row := self._row_of_digest.get(digest, -1)) >= 0:
            self._moved.append(Entry(row, digest, stamp))
            self._learn(self._moved[-1])
        return row

    def _learn(self, entry: Entry) -> None:
        self._row_of_digest[entry.digest] = entry.row
        self._rows_known = max(self._rows_known, entry.row + 1)
        if entry.stamp is not None:
            self._row_of_stamp[entry.stamp] = entry.row
            self._sizes.add(entry.stamp[1])

    def _read_index(self) -> None:
        """Read the new lines of the index, up to the first that is torn or whose row is missing."""
        n_rows = self._rows_on_disk()
        if not n_rows:
            return
        with contextlib.suppress(FileNotFoundError), open(self._index_file, "rb") as file:
            file.seek(self._index_read)
            for line in file:
                entry = _parse(line)
                if entry is None or not 0 <= entry.row < n_rows:
                    break
                self._learn(entry)
                self._index_read += len(line)

    def build(
        self,
        caption_set: CaptionSet,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        progress: bool = True,
        max_broken: int = 100,
    ) -> list[str]:
        """Compute the features that a set still lacks; a complete cache is neither locked nor written to.

        Interrupted at any moment, even by a kill or a power cut, the next build continues where this one stopped. If
        another process is building this cache, wait for it. Return one sentence for each image that could not be read;
        it has no row.

        The processes of a run read and compute a share each, and process 0 writes; on the others, the list is empty.

        Args:
            num_workers: threads that read images while the network runs, at least one.
            device: where a copy of the backbone computes.
            progress: whether to write the size and a bar to standard error.
            max_broken: the number of images that may be unreadable.

        Raises:
            UserError: too little disk space, too many images or all of them are unreadable, or half precision cannot
                hold the features.
        """
        if self._backbone is None:
            raise UserError(f"a copy of {self!r} made for reading cannot build; open it with FeatureCache.open")
        if self.folder.name != fingerprint(self._backbone, self._transform, self._precision)[:16]:
            raise UserError(f"the weights of {self._backbone.name} changed after {self!r} was opened; open it again")
        if distributed.rank():
            return self._help(caption_set, num_workers, device)
        broken = self._build(caption_set, num_workers, device, progress, max_broken)
        distributed.of_first(len(broken))  # where the others wait for a share
        return broken

    def _help(self, caption_set: CaptionSet, num_workers: int, device: str | torch.device) -> list[str]:
        compute = self._on_device(device)
        while isinstance(missing := distributed.of_first(None), list):
            for _ in self._shares(caption_set, missing, num_workers, compute):
                pass
        if len(self._missing_on_disk(caption_set)) > missing:
            raise UserError(f"{self.folder} is not the same folder for all processes; give --features on a shared disk")
        return []

    def _shares(
        self, caption_set: CaptionSet, missing: list[int], num_workers: int, compute: Callable[[Tensor], np.ndarray]
    ) -> Iterator[list[LoadedImage]]:
        """Yield the missing images in batches, to process 0, with features as pixels; each process computes a share."""
        rank, n = distributed.rank(), distributed.world_size()
        with contextlib.closing(self._stream(caption_set, missing[rank::n], num_workers)) as batches:
            for _ in range(0, len(missing), BATCH_SIZE * n):
                own = [image._replace(index=image.index * n + rank) for image in next(batches, [])]
                if good := [image for image in own if not image.error]:
                    rows = compute(torch.stack([image.pixels for image in good]))
                    good = [image._replace(pixels=row) for image, row in zip(good, rows, strict=True)]
                shares = distributed.of_all_at_first([image for image in own if image.error] + good)
                yield [image for share in shares for image in share]

    def _build(
        self, caption_set: CaptionSet, num_workers: int, device: str | torch.device, progress: bool, max_broken: int
    ) -> list[str]:
        missing = self._missing_on_disk(caption_set)
        if not missing and not self._moved:
            return []
        try:
            with lock(self.folder, "is building the features in", wait=True):
                missing = self._missing_on_disk(caption_set)  # another process may have added them
                try:
                    if not missing and not self._moved:
                        return []
                    return self._append(caption_set, missing, num_workers, device, progress, max_broken)
                except OSError as error:
                    remedy = "free space or choose another folder; the same command continues where it stopped"
                    raise UserError(f"cannot write to {self.folder}: {error.strerror or error}; {remedy}") from error
                finally:
                    self._forget()
        except OSError as error:  # a read-only folder has no lock, and needs none if it is complete
            images = [i for batch in self._stream(caption_set, missing, num_workers) for i in batch]
            if any(image.error is None for image in images):
                what = f"{self.folder} lacks the features of {len(missing):,} images and cannot be written to"
                reason = error.strerror or error
                raise UserError(f"{what} ({reason}); make it writable, or choose another folder") from error
            return [str(image.error) for image in images]

    def _missing_on_disk(self, caption_set: CaptionSet) -> list[int]:
        self._forget()
        return self.missing(caption_set)

    def _stream(self, caption_set: CaptionSet, indices: list[int], num_workers: int) -> Iterator[list[LoadedImage]]:
        sources = caption_set.sources()
        return stream_images([sources[i] for i in indices], self._transform, BATCH_SIZE, num_workers)

    def _append(
        self,
        caption_set: CaptionSet,
        missing: list[int],
        num_workers: int,
        device: str | torch.device,
        progress: bool,
        max_broken: int,
    ) -> list[str]:
        size = len(missing) * self._row_bytes
        what = f"the features of {len(missing):,} images"
        require_free_space(self.folder, size + len(missing) * INDEX_LINE_BYTES, what)
        if progress and missing:
            tqdm.write(f"{what}: {readable_size(size)} in {self.folder}, computed once", file=sys.stderr)
        compute = self._on_device(device)
        broken: dict[int, str] = {}
        stream = self._stream(caption_set, missing, num_workers)
        if distributed.world_size() > 1:
            distributed.of_first(missing)
            stream = self._shares(caption_set, missing, num_workers, compute)
            compute = Tensor.numpy
        with (
            _Writer(self) as writer,
            tqdm(total=len(missing), unit="image", desc="features", disable=not (progress and missing)) as bar,
            contextlib.closing(stream) as batches,
        ):
            for batch in batches:
                broken |= {missing[image.index]: str(image.error) for image in batch if image.error}
                writer.add([image for image in batch if not image.error], compute)
                bar.update(len(batch))
                if len(broken) > max_broken or len(broken) == len(caption_set):
                    names = [caption_set.label(i) for i in broken]
                    raise _too_many_broken(names, len(caption_set), max_broken)
        return list(broken.values())

    def _on_device(self, device: str | torch.device) -> Callable[[Tensor], np.ndarray]:
        """Return the backbone as a function from images `(N, 3, S, S)` to half-precision rows."""
        device = torch.device(device)
        backbone = self._backbone.in_bfloat16() if self._precision == "bfloat16" else copy.deepcopy(self._backbone)
        backbone.to(device)

        @torch.inference_mode()
        def compute(images: Tensor) -> np.ndarray:
            images = images.to(device, memory_format=torch.channels_last)
            features = backbone(images)
            if not (half := features.half()).isfinite().all():
                reached = f"the features of {backbone.name} reach {features.abs().max():.3g}"
                raise UserError(f"{reached}, half precision ends at 65504; use no cache, or another backbone")
            return half.cpu().numpy().astype("<f2", copy=False)

        return compute


class _Writer:
    """Append to a cache: rows first, flushed to the disk, then the lines of the index that name them.

    The lines are written about once per second rather than with each batch: on a GPU, waiting for the disk at every
    batch would cost more than the network.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self.cache, self.lines, self.last_commit = cache, bytearray(), time.monotonic()

    def __enter__(self) -> _Writer:
        cache = self.cache
        # Cut off what a killed build left after the last whole line of the index; this process has the lock.
        self.rows_file, self.index_file = open(cache._features_file, "ab"), open(cache._index_file, "ab")
        self.rows_file.truncate(cache._rows_known * cache._row_bytes)
        self.index_file.truncate(cache._index_read)
        self.add_lines(cache._moved)
        cache._moved.clear()
        return self

    def __exit__(self, *exception: object) -> None:
        with self.rows_file, self.index_file:  # closed even if the disk is full
            self.commit()
            os.fsync(self.index_file.fileno())

    def add(self, images: list[LoadedImage], compute: Callable[[Tensor], np.ndarray]) -> None:
        """Compute and append the rows of new contents, which equal images share; then add the lines of all images."""
        row_of = self.cache._row_of_digest
        if fresh := {image.digest: image.pixels for image in images if image.digest not in row_of}:
            self.rows_file.write(compute(torch.stack([torch.as_tensor(pixels) for pixels in fresh.values()])).tobytes())
            self.rows_file.flush()
            row_of |= zip(fresh, itertools.count(self.cache._rows_known))
        self.add_lines([Entry(row_of[image.digest], image.digest, image.stamp) for image in images])
        if time.monotonic() - self.last_commit >= COMMIT_EVERY_S:
            self.commit()

    def add_lines(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.cache._learn(entry)
            self.lines += json.dumps(entry).encode() + b"\n"

    def commit(self) -> None:
        """Flush rows, then index: after a power cut, an index ahead of its rows would name rows of zeros."""
        os.fsync(self.rows_file.fileno())
        self.index_file.write(self.lines)
        self.index_file.flush()
        self.cache._index_read += len(self.lines)
        self.lines.clear()
        self.last_commit = time.monotonic()


def _parse(line: bytes) -> Entry | None:
    """Return a line of the index, or None if it is torn."""
    try:
        row, digest, stamp = json.loads(line) if line.endswith(b"\n") else None
        return Entry(int(row), str(digest), None if stamp is None else (str(stamp[0]), int(stamp[1]), int(stamp[2])))
    except (ValueError, TypeError, IndexError):
        return None


def _too_many_broken(names: list[str], n_images: int, max_broken: int) -> UserError:
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20:,} more" if len(names) > 20 else "")
    if len(names) == n_images:
        return UserError(f"none of the {n_images:,} images can be read ({shown}); check the folder they are in")
    count = f"{len(names):,} of {n_images:,} images cannot be read, and at most {max_broken:,} may be skipped"
    return UserError(f"{count} ({shown}); repair or remove them, or raise max_broken")
