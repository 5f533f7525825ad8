"""`showtell download NAME`: public data sets, fetched, verified and unpacked as `showtell.datasets` reads them.

Nothing starts before sizes and licences have been shown and agreed to. A stopped download continues with the same
command, and what is there already is left alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from showtell import released
from showtell.errors import UserError
from showtell.files import lock, readable_size, require_free_space


class Archive(NamedTuple):
    """A zip file of a data set."""

    url: str
    checksum: str  # SHA-256, or `md5:` and the MD5
    size: int  # in bytes; of Flickr8k's two about
    unpacked: int  # bytes of what is taken out of it, about
    contents: dict[str, int]  # the files and folders that are taken out of it, with the number of files
    license: str  # whose it is, and what it may be used for

    @property
    def file(self) -> str:
        """The name of the zip file."""
        return self.url.rpartition("/")[2]


class DataSet(NamedTuple):
    """What `showtell download` fetches under one name."""

    archives: tuple[Archive, ...]
    reader: str  # its name in `showtell.datasets.READERS`
    recipe: str  # of its first training run


_COCO = "http://images.cocodataset.org/"  # https has the wrong certificate there; the checksums stand for it
_FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"  # the authors' own link is gone
_FLICKR8K_LICENSE = "non-commercial research and education only (Hodosh, Young and Hockenmaier 2013)"


def _coco_images(folder: str, sha256: str, size: int, unpacked: int, n_files: int) -> Archive:
    terms = "photographs of Flickr users, each under its own licence: Flickr's terms of use (cocodataset.org)"
    return Archive(f"{_COCO}zips/{folder}.zip", sha256, size, unpacked, {folder: n_files}, terms)


def _coco_captions(year: int, sha256: str, size: int) -> Archive:
    kinds = ("captions", "instances")  # instances for the COCO API; the third kind, keypoints, is left out
    files = {f"annotations/{kind}_{split}{year}.json": 1 for kind in kinds for split in ("train", "val")}
    url = f"{_COCO}annotations/annotations_trainval{year}.zip"
    return Archive(url, sha256, size, 600_000_000, files, "annotations CC BY 4.0, COCO Consortium (cocodataset.org)")


# Sizes and SHA-256 of COCO's files: tensorflow/datasets, url_checksums/coco.txt. The MD5s: mlverse/torchvision (R),
# whose values for Flickr8k a second project confirms.
_IMAGES_2014 = (
    _coco_images("train2014", "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775",
                 13_510_573_713, 13_600_000_000, 82_783),
    _coco_images("val2014", "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0",
                 6_645_013_297, 6_700_000_000, 40_504),
)  # fmt: skip

DATASETS = {
    "coco2014": DataSet((
        _coco_captions(2014, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009", 252_872_794),
        *_IMAGES_2014,
    ), "coco", "coco-show-tell"),
    "coco2017": DataSet((
        _coco_captions(2017, "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268", 252_907_541),
        _coco_images("train2017", "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
                     19_336_861_798, 19_400_000_000, 118_287),
        _coco_images("val2017", "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
                     815_585_330, 820_000_000, 5_000),
    ), "coco", "coco-show-tell"),
    "karpathy": DataSet((
        Archive(
            "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
            "md5:4fa8c08369d22fe16e41dc124bd1adc2", 36_745_453, 144_186_139, {"dataset_coco.json": 1},
            "COCO's captions, CC BY 4.0, with the splits of Karpathy and Li (2015), which name no licence",
        ),
        *_IMAGES_2014,
    ), "karpathy", "coco-show-tell"),
    "flickr8k": DataSet((
        Archive(
            f"{_FLICKR8K}Flickr8k_text.zip", "md5:bf6c1abcb8e4a833b7f922104de18627", 2_300_000, 10_000_000,
            {f"Flickr_8k.{split}Images.txt": 1 for split in ("train", "dev", "test")} | {"Flickr8k.token.txt": 1},
            _FLICKR8K_LICENSE,
        ),
        Archive(
            f"{_FLICKR8K}Flickr8k_Dataset.zip", "md5:f18a1e2920de5bd84dae7cf08ec78978", 1_120_000_000, 1_120_000_000,
            {"Flicker8k_Dataset": 8_091}, f"photographs of Flickr users; {_FLICKR8K_LICENSE}",
        ),
    ), "flickr8k", "flickr8k-attend"),
}  # fmt: skip


def names() -> list[str]:
    """Return what `showtell download` accepts: data sets and released models."""
    return [*DATASETS, *(Path(file).stem for file in released.RELEASES)]


def run(name: str, data_dir: str | os.PathLike | None = None, yes: bool = False) -> int:
    """Download a data set into `data_dir` (default `data/NAME`), or a released model into the user's cache.

    With `yes` it starts without asking. The name is one of `names()`. Return the exit code: 1 if the answer was no.

    Raises:
        UserError: an unknown name, no terminal to ask on, too little room, or an archive that is not what it should be.
        MissingFileError: a server cannot be reached.
    """
    if name not in DATASETS:
        if name not in names():
            raise UserError(f"there is nothing to download under the name {name}; choose one of {', '.join(names())}")
        print(released.locate(name))
        return 0
    dataset = DATASETS[name]
    folder = Path(data_dir) if data_dir else Path("data") / name
    absent = []
    print(f"{name}, into {folder}:")
    for archive in dataset.archives:
        there = all((folder / path).exists() for path in archive.contents)
        absent += [] if there else [archive]
        state = _count(folder, archive.contents) if there else f"{readable_size(archive.size)} from {archive.url}"
        print(f"  {archive.file}: {state}\n    {archive.license}")
    if absent:
        size = readable_size(sum(archive.size for archive in absent))
        # Every archive is deleted when it is unpacked: at most all that is unpacked and the largest archive at once.
        needed = sum(archive.unpacked for archive in absent) + max(archive.size for archive in absent)
        require_free_space(folder, needed, name)
        if not yes and not _agreed(f"Download {size} under these terms? [y/N] ", name, folder):
            print("nothing was downloaded")
            return 1
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".download", "is downloading into"):
            for archive in absent:
                path = folder / archive.file
                users_own = path.exists()
                released.fetch(archive.url, path, archive.checksum)
                unpack(path, folder, archive.contents)
                if not users_own:
                    path.unlink()
        shutil.rmtree(folder / ".download", ignore_errors=True)
    data = f"--dataset {dataset.reader} --data-dir {shlex.quote(str(folder))}"
    print(f"train on it with: showtell train {data} --recipe {dataset.recipe} --out runs/{name}")
    return 0


def _count(folder: Path, contents: dict[str, int]) -> str:
    """Say what is there already, and where a folder holds fewer files than were published."""
    for path, expected in contents.items():
        if (folder / path).is_dir() and (found := len(os.listdir(folder / path))) < expected:
            return f"there already, with {found:,} of {expected:,} files; delete {folder / path} to download it again"
    return "there already"


def _agreed(question: str, name: str, folder: Path) -> bool:
    if not sys.stdin or not sys.stdin.isatty():
        command = f"showtell download {name} --data-dir {shlex.quote(str(folder))} --yes"
        raise UserError(f"there is no terminal to ask on; to agree to these terms, type: {command}")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False


def unpack(path: Path, folder: Path, contents: Iterable[str]) -> None:
    """Take files and folders out of a zip file; each appears in `folder` complete or not at all.

    Those that are there already are left alone, and so is what the zip file holds besides. One that is damaged, lacks
    some of the contents or would write outside `folder` raises a `UserError`, and nothing is unpacked.
    """
    from tqdm import tqdm

    contents = list(contents)
    remedy = f"delete {path} and download it again"
    temporary = folder / ".download" / "unpacked"
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    try:
        with zipfile.ZipFile(path) as archive:
            if unsafe := next((info.filename for info in archive.infolist() if _is_unsafe(info)), None):
                raise UserError(f"{path} would write outside its folder ({unsafe!r}), and is not unpacked; {remedy}")
            wanted = [
                info
                for info in archive.infolist()
                if not info.is_dir() and any(PurePosixPath(info.filename).is_relative_to(name) for name in contents)
            ]
            require_free_space(folder, sum(info.file_size for info in wanted), f"unpacking {path.name}")
            for info in tqdm(wanted, desc=f"unpacking {path.name}", unit=" files", disable=None):
                archive.extract(info, temporary)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None
    if lacking := [name for name in contents if not (temporary / name).exists()]:
        raise UserError(f"{path} holds no {', '.join(lacking)}; {remedy}")
    for name in contents:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary / name, folder / name)
    shutil.rmtree(temporary)


def _is_unsafe(info: zipfile.ZipInfo) -> bool:
    """An absolute name, a step upwards, a drive, or a link."""
    name = info.filename.replace("\\", "/")
    upwards = name.startswith("/") or ".." in name.split("/") or ":" in name.split("/")[0]
    return upwards or stat.S_ISLNK(info.external_attr >> 16)
