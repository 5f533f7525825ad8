"""Released models by name: from the checkout, a folder or mirror, the user's cache, or downloaded and verified.

`locate("showtell-attend")` returns a path. `fetch` downloads any file: it resumes a broken transfer and verifies the
checksum.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from showtell import __version__
from showtell.errors import MissingFileError, UserError, print_text
from showtell.files import lock, readable_size, require_free_space

if TYPE_CHECKING:
    import requests

ATTEMPTS = 5  # in a row that bring nothing
PAUSE_S = 1.0  # before the next attempt, doubled each time
TIMEOUT_S = (10, 60)  # to connect; without a byte
MAX_REDIRECTS = 10
DEFAULT = "showtell-attend"  # the model to open when none is named
MODELS = Path(__file__).resolve().parent.parent / "models"  # of a checkout; an installed package has none

# Where the files of RELEASES are attached to a release. The project has no public address yet: the release process
# sets this one constant, and attaches every file of the table to every release.
BASE_URL = "https://github.com/showtell/showtell/releases/download/v{version}/"


class Release(NamedTuple):
    """A released file: its size in bytes and its SHA-256."""

    size: int
    sha256: str


RELEASES = {
    "showtell-attend-1.safetensors": Release(
        71_243_528, "0a1169a04e12cac25531bad391c4f3325ec3be3cfa0f4cd9c52b82a347d4da82"
    ),
    "showtell-classic-1.safetensors": Release(
        59_705_784, "eae7df9abaa2de6a60e413336034184acc7d166dcfcc369efb401ae110be83e5"
    ),
}


def locate(name: str | None = None, download: bool = True) -> Path:
    """Return the path of a released model, downloading it if it is nowhere on this machine.

    The places, in this order: the checkout's `models/`; the folder in the environment variable `SHOWTELL_MODELS`; the
    user's cache; a download into that cache, from `SHOWTELL_MODELS` if that is an http(s) address, else from the
    release's page, if `download` allows it.

    The name is `showtell-classic-1`, or `showtell-classic` for the newest version; by default it is the model with
    attention. A `MissingFileError` says what to do by hand where there is no such model or it cannot be downloaded.
    """
    name = name or DEFAULT
    folders, base_url = _places()
    for folder in folders:
        if file := _newest(name, [path.name for path in folder.glob("*.safetensors")]):
            return folder / file
    if missing := next((folder for folder in folders[1:] if not folder.is_dir()), None):
        raise MissingFileError(f"SHOWTELL_MODELS is {missing}, not a folder; name a folder of models or a web address")
    file = _newest(name, RELEASES)
    if file is None:
        there = {path.stem for folder in folders for path in folder.glob("*.safetensors")}
        known = ", ".join(sorted(there | {Path(file).stem for file in RELEASES}))
        raise MissingFileError(f"there is no model {name}; give a checkpoint, run folder or released model: {known}")
    size, sha256 = RELEASES[file]
    path = cache_folder() / file
    if not path.is_file() or path.stat().st_size != size:
        if not download:
            raise MissingFileError(f"the model {path.stem} is not on this machine; type showtell download {path.stem}")
        require_free_space(path.parent, size, f"the model {path.stem}")
        fetch(base_url + file, path, sha256)
    return path


def cache_folder() -> Path:
    """Return the folder that downloaded models are kept in, such as `~/.cache/showtell/models`."""
    from platformdirs import user_cache_dir  # as pooch.os_cache does; importing pooch takes 0.1 s

    return Path(user_cache_dir("showtell")).expanduser() / "models"


def is_released(path: str | os.PathLike) -> bool:
    """Return whether `path` lies in a folder of released or downloaded models, where nothing else should be written."""
    folders = {folder.resolve() for folder in (*_places()[0], cache_folder())}
    parents = Path(path).resolve().parents
    return parents[0] in folders or any(parent.name.startswith("models--") for parent in parents)  # huggingface_hub's


def _places() -> tuple[list[Path], str]:
    """Return the folders to look in before the cache, and the address to download from."""
    place = os.environ.get("SHOWTELL_MODELS", "")
    if place.startswith(("http://", "https://")):
        return [MODELS], place.rstrip("/") + "/"
    return [MODELS, *([Path(place).expanduser()] if place else [])], BASE_URL.format(version=__version__)


def _newest(name: str, files: Iterable[str]) -> str | None:
    """Return the file of exactly this name, else the one with the highest number after it."""
    stems = {Path(file).stem: file for file in files}
    numbered = [stem for stem in stems if re.fullmatch(rf"{re.escape(name)}-\d+", stem)]
    newest = max(numbered, key=lambda stem: int(stem.rpartition("-")[2]), default=name)
    return stems.get(name) or stems.get(newest)


def fetch(url: str, path: Path, checksum: str) -> Path:
    """Download `url` to `path`, unless a file with this checksum is there already.

    A broken transfer continues where it stopped, in this call or in a later one. The file gets its name only after its
    checksum has been verified. If several processes want the same file, one downloads it and the others wait.

    Args:
        url: an http(s) address; at most 10 redirects are followed.
        path: the file to write.
        checksum: its SHA-256, or `md5:` and its MD5.

    Raises:
        MissingFileError: the server cannot be reached, or does not have the file.
        UserError: the server sent a file with another checksum, twice.
    """
    import pooch
    from requests import RequestException

    algorithm, _, digest = checksum.rpartition(":")
    title = "MD5" if algorithm == "md5" else "SHA-256"
    by_hand = f"or get the file another way, compare its {title} with {digest}, and save it as {path}"
    work = path.with_name(f".{path.name}.download")  # holds the lock and, until it is complete, the file
    part = work / "part"

    def is_verified(file: Path) -> bool:
        return file.is_file() and pooch.file_hash(str(file), algorithm or "sha256") == digest

    with lock(work, "is downloading into", wait=True):
        for attempt in (1, 2):
            if is_verified(path):
                break
            try:
                _download(url, part)
            except RequestException as error:
                problem = f"cannot download {url} ({_reason(error, url)})"
                raise MissingFileError(f"{problem}; check the network and try again, {by_hand}") from None
            if is_verified(part):
                os.replace(part, path)
                break
            part.unlink()
            problem = f"{url} gave a file with another {title}, which was deleted"
            if attempt == 2:
                raise UserError(f"{problem}, twice; try again later, {by_hand}")
            print_text(f"showtell: {problem}; downloading it again", sys.stderr)
    shutil.rmtree(work, ignore_errors=True)
    return path


def _download(url: str, part: Path) -> None:
    """Append to a partial file what it lacks, with Range requests; raise the last error of `requests`."""
    import requests

    failures, connected = 0, False
    while True:
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # the middle of a compressed answer is no use
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with requests.Session() as session:
                session.max_redirects = MAX_REDIRECTS
                with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
                    connected = True
                    if _receive(response, url, part, have):
                        return
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", 500)
            failures = 0 if part.exists() and part.stat().st_size > have else failures + 1
            if not connected or status < 500 or failures >= ATTEMPTS:
                raise
            time.sleep(PAUSE_S * 2**failures)


def _receive(response: requests.Response, url: str, part: Path, have: int) -> bool:
    """Append an answer to the partial file of `have` bytes; return whether it is complete."""
    from tqdm import tqdm

    if have and response.status_code == 416:  # there is nothing after what we have
        if response.headers.get("Content-Range", "").endswith(f"/{have}"):
            return True
        part.unlink()
        return False
    response.raise_for_status()
    if response.status_code != 206:  # the server ignores Range and sends the whole file
        have = 0
    total = have + int(response.headers.get("Content-Length", 0)) or None
    continuing = f", continuing at {readable_size(have)}" if have else ""
    print_text(f"showtell: downloading {url}{continuing}", sys.stderr)
    name = Path(urlsplit(url).path).name
    with (
        open(part, "ab" if have else "wb") as file,
        tqdm(desc=name, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for chunk in response.iter_content(2**16):
            file.write(chunk)
            bar.update(len(chunk))
    return True


def _reason(error: Exception, url: str) -> str:
    """A few words for what `requests` says in many."""
    import requests

    if isinstance(error, requests.HTTPError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, requests.TooManyRedirects):
        return f"more than {MAX_REDIRECTS} redirects"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        return f"no connection to {urlsplit(url).netloc}"
    return f"the connection broke: {type(error).__name__}"
