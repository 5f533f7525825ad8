"""Stream images to an encoder: each read once, decoded once and transformed once, in threads, ahead of the network.

    for batch in stream_images(paths, transform, batch_size=32, workers=2):
        images = torch.stack([image.pixels for image in batch if image.error is None])

Captioning, the feature cache and evaluation all read their images here.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from showtell.arrays import Array
from showtell.errors import MissingFileError
from showtell.transforms import BrokenImageError, Source, Transform, decode_image, is_tensor, read_bytes

if TYPE_CHECKING:
    from torch import Tensor

Item, Result = TypeVar("Item"), TypeVar("Result")
Stamp = tuple[str, int, int]  # absolute path, size in bytes, time of last change in nanoseconds


class LoadedImage(NamedTuple):
    """An image ready for the network, or the error that explains why it is not."""

    index: int  # among the sources
    pixels: Array | None = None  # (3, S, S) float32, transformed; None where there is an error
    error: BrokenImageError | MissingFileError | None = None  # why it could not be read
    digest: str = ""  # of the file's bytes, or of the pixels of an image that is not a file
    stamp: Stamp | None = None  # of the file, taken before it was read


def stream_images(
    sources: Iterable[Source | Callable[[], Tensor | bytes]],
    transform: Transform,
    batch_size: int = 32,
    workers: int = 2,
    as_arrays: bool = False,
) -> Iterator[list[LoadedImage]]:
    """Read images in order and yield them in batches, at most a batch ahead of the caller.

    Args:
        sources: anything `read_image` reads, or functions that return a uint8 `(3, H, W)` tensor or a file's bytes; the
            `name` of a function, if it has one, is in the message about an image that cannot be read.
        transform: turns an image into the network's input.
        batch_size: images per batch; the last may have fewer. workers: the number of threads that read.
        as_arrays: whether pixels are NumPy arrays, made without torch and without digests, rather than tensors.
    """

    def load(numbered: tuple[int, Source | Callable[[], Tensor | bytes]]) -> LoadedImage:
        index, source = numbered
        stamp = path = None
        try:
            if isinstance(source, (str, os.PathLike)):
                stamp = file_stamp(source)  # before reading: a file that changes meanwhile then counts as unknown
                path, image = read_bytes(source)
            else:
                path = getattr(source, "name", None) if callable(source) else None
                image = source() if callable(source) else source
            if as_arrays:
                return LoadedImage(index, transform.to_array(image, path), stamp=stamp)
            if isinstance(image, bytes):
                return LoadedImage(index, transform(decode_image(image, path)), None, digest_of(image), stamp)
            digest = digest_of_pixels(image) if is_tensor(image) else ""
            return LoadedImage(index, transform(image), None, digest)
        except (BrokenImageError, MissingFileError) as error:
            if path and path not in str(error):
                error = BrokenImageError(f"{path}: {error}")
            return LoadedImage(index, error=error)

    batch: list[LoadedImage] = []
    for image in map_ahead(load, enumerate(sources), max(1, workers), batch_size + workers):
        batch.append(image)
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def file_stamp(path: str | os.PathLike) -> Stamp | None:
    """Return what identifies a file without reading it; None where there is none (reading it will say why)."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def digest_of(data: bytes) -> str:
    """Return 32 characters that identify a file's contents."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_of_pixels(image: Tensor) -> str:
    """Return 32 characters that identify an image that is not a file."""
    digest = hashlib.blake2b(repr(tuple(image.shape)).encode(), digest_size=16)
    digest.update(image.reshape(-1).numpy())
    return digest.hexdigest()


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """`map` in threads, in order, at most `ahead` results early.

    Threads, because decoding and resizing release Python's lock, and because a thread ends with its process: a killed
    run leaves no worker behind.
    """
    torch = sys.modules.get("torch")  # where it is not loaded, nothing splits an image between threads
    n_threads = torch and torch.get_num_threads()
    # One image is too small to split: on a busy machine, several threads on one image mostly wait for each other.
    with ThreadPoolExecutor(workers, initializer=torch and torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            if torch:
                torch.set_num_threads(n_threads)  # for threads that start later
