"""WebDataset shards: tar files of images and captions, written whole and verified, and read in place.

`train-000000.tar` holds `KEY.jpg` and `KEY.json` (id and captions) of each sample, as the `webdataset` library reads
them. `train-000000.jsonl` beside it says where in the tar each image is, so that any sample can be read on its own. A
tar of another program, without that file, is read through when it is opened; its captions are in `KEY.json`, as
`captions` or `caption`, or in `KEY.txt`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from showtell.errors import UserError, json_text
from showtell.files import atomic_path, require_regular_file, write_text
from showtell.image_stream import digest_of
from showtell.transforms import IMAGE_SUFFIXES, open_image, read_bytes

if TYPE_CHECKING:
    from torch import Tensor


class Sample(NamedTuple):
    """An image in a tar, with its captions; called, it returns the image's bytes."""

    shard: str  # path of the tar
    member: str  # of the image in the tar
    offset: int  # of the image's bytes
    size: int
    digest: str  # of these bytes, as `image_stream.digest_of` computes it
    id: int | str
    captions: list[str]

    @property
    def name(self) -> str:
        """Return what messages and tables call the image: `train-000000.tar/000000012.jpg`."""
        return f"{self.shard}/{self.member}"

    def __call__(self) -> bytes:
        """Read the image."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_shard(path: str | os.PathLike) -> Iterator[Sample]:
    """Yield the samples of a tar, in order; a damaged or incomplete one raises a `UserError`."""
    path = Path(path)
    require_regular_file(path, "shard", "write shards with showtell shard")
    index = path.with_suffix(".jsonl")
    try:
        if not index.exists():
            yield from _scan(path)
            return
        n_bytes = path.stat().st_size
        with index.open(encoding="utf-8") as lines:
            for line in lines:
                sample = Sample(str(path), *json.loads(line))
                if sample.offset + sample.size > n_bytes:
                    raise UserError(f"{path} ends before {sample.member}; delete {index} and write the shard again")
                yield sample
    except (tarfile.TarError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no tar of images, or damaged ({error}); write it again") from error


def _scan(path: Path, shard: Path | None = None) -> Iterator[Sample]:
    """Read a tar through; the samples are those of `shard`, where that is its final name."""
    key, found, about = "", None, {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            folder, name = os.path.split(member.name)
            stem, _, suffix = name.partition(".")  # WebDataset's rule: a key ends at the first dot
            if os.path.join(folder, stem) != key:
                if found:
                    yield _sample(shard or path, key, found, about)
                key, found, about = os.path.join(folder, stem), None, {}
            if not member.isfile():
                continue
            data = tar.extractfile(member).read()
            if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                found = (member.name, member.offset_data, member.size, digest_of(data))
            elif suffix == "json":
                about |= json.loads(data)
            elif suffix == "txt":
                about.setdefault("caption", data.decode("utf-8"))
        if found:
            yield _sample(shard or path, key, found, about)


def _sample(shard: Path, key: str, found: tuple, about: dict) -> Sample:
    captions = about["captions"] if "captions" in about else [about.get("caption") or ""]
    captions = [text for caption in captions if (text := " ".join(caption.split()))]
    return Sample(str(shard), *found, about.get("id", key), captions)


def write_shards(
    samples: Sequence[tuple[int | str, list[str], str | Callable[[], Tensor | bytes]]],
    folder: str | os.PathLike,
    name: str,
    max_bytes: int = 2**28,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[Path]:
    """Write samples, in order, as `name-000000.tar` and so on, and return the paths of all shards.

    Each shard is read back and compared before it gets its name. Shards that an earlier run has finished are kept.

    Args:
        samples: id, captions and source of each; as in `image_stream.stream_images`, a path or a function.
        folder, name: where to write, and the first part of the names: by convention the split.
        max_bytes: a shard ends with the sample that reaches this size.
        progress: wraps the samples that are left to write, as `tqdm` does.

    Raises:
        UserError: the folder holds shards of other samples under that name, or the disk changes what it is given.
    """
    folder, finished, n_done = Path(folder), [], 0
    while (path := folder / f"{name}-{len(finished):06d}.tar").with_suffix(".jsonl").exists():
        ids = [sample.id for sample in read_shard(path)]
        if ids != [identity for identity, *_ in samples[n_done : n_done + len(ids)]]:
            raise UserError(f"{path} holds other images than those given; choose another folder or delete its shards")
        finished.append(path)
        n_done += len(ids)
    left = enumerate(progress(samples[n_done:]), n_done)
    while n_done < len(samples):
        path = folder / f"{name}-{len(finished):06d}.tar"
        with atomic_path(path) as temporary:
            digests = _write(temporary, left, max_bytes)
            found = list(_scan(temporary, path))
            if [sample.digest for sample in found] != digests:
                raise UserError(f"{path} does not read back as it was written; check the disk")
        lines = (json_text(sample[1:], indent=None) + "\n" for sample in found)
        write_text(path.with_suffix(".jsonl"), "".join(lines))
        finished.append(path)
        n_done += len(found)
    for stale in set(folder.glob(f"{name}-[0-9]*.tar")) - set(finished):  # of an interrupted run with smaller shards
        stale.with_suffix(".jsonl").unlink(missing_ok=True)
        stale.unlink()
    return finished


def _write(path: Path, left: Iterator, max_bytes: int) -> list[str]:
    """Write one shard and return the digests of its images."""
    digests = []
    with tarfile.open(path, "w") as tar:
        for number, (identity, captions, source) in left:
            suffix, image = _file_of(source)
            about = json_text({"id": identity, "captions": captions}, indent=None).encode()
            for name, data in ((f"{number:09d}{suffix}", image), (f"{number:09d}.json", about)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            digests.append(digest_of(image))
            if tar.offset >= max_bytes:
                break
    return digests


def _file_of(source: str | Callable[[], Tensor | bytes]) -> tuple[str, bytes]:
    """Return suffix and bytes of an image file; a drawing becomes a PNG."""
    path, image = (getattr(source, "name", ""), source()) if callable(source) else read_bytes(source)
    if isinstance(image, bytes):
        suffix = Path(path).suffix.lower()
        return suffix if suffix in IMAGE_SUFFIXES else ".jpg", image
    file = io.BytesIO()
    open_image(image).save(file, "PNG")
    return ".png", file.getvalue()
