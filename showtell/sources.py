"""What `showtell caption` is given: files, folders, patterns, web links and standard input.

`find_sources` lists the images; each is an `ImageSource`, which reads its bytes when it is called. Of a web link, they
are what `fetch` gets, in memory; nothing else opens a connection to caption an image.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import http.client
import io
import ipaddress
import os
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urljoin, urlsplit

from showtell import __version__
from showtell.errors import MissingFileError, UserError
from showtell.files import require_regular_file
from showtell.shards import Sample, read_shard
from showtell.transforms import (
    IMAGE_SUFFIXES,
    BrokenImageError,
    broken_image,
    frames,
    is_text,
    open_image,
    other_kind,
    read_bytes,
)  # fmt: skip

MAX_LINK_BYTES = 50 * 2**20
TIMEOUT_S = 30.0  # for a link in all, from the name of its host to the last byte
MAX_REDIRECTS = 5
STDIN = "-"
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_IN_LINKS = "%/:=&?~+!$,;'@()*[]"  # characters that are not quoted, because they have a meaning or are quoted already


@dataclass(eq=False)
class ImageSource:
    """An image by path or link; called, it returns the bytes, and knows their digest and number of frames."""

    name: str  # a path, a link, or "-"
    allow_private: bool = False  # whether a link may lead into the local network
    keep: bool = False  # whether a link's image is kept as `preview`, for a page or attention maps
    data: bytes | None = None  # the image from standard input
    preview: bytes | None = None  # a JPEG of at most 1,024 pixels
    sha256: str = ""  # of the bytes that were read last
    n_frames: int = 1  # 0 where a frame after the first is damaged
    sample: Sample | None = None  # where the image is in a tar

    def __call__(self) -> bytes:
        """Read the image; raises as `fetch` or `showtell.transforms.read_bytes` does."""
        data = fetch(self.name, self.allow_private) if is_link(self.name) else self._read()
        self.sha256 = hashlib.sha256(data).hexdigest()
        if data[:4] in (b"GIF8", b"RIFF", b"II*\0", b"MM\0*"):  # the formats of animations and pages
            try:
                self.n_frames = frames(data)
            except UserError:
                self.n_frames = 0
        if self.keep and is_link(self.name):
            with contextlib.suppress(UserError):  # whoever decodes the bytes reports it
                image, file = open_image(data), io.BytesIO()
                image.thumbnail((1024, 1024))
                image.save(file, "JPEG", quality=90)
                self.preview = file.getvalue()
        return data

    def _read(self) -> bytes:
        if self.sample:
            return self.sample()
        return read_bytes(self.name)[1] if self.data is None else self.data

    @property
    def image(self) -> str | bytes | None:
        """What to open for a page or attention maps; None for a link that was not read or not kept."""
        if is_link(self.name):
            return self.preview
        return self._read() if self.sample else self.data or self.name

    def digest(self) -> str:
        """Return the SHA-256 of a file as it is now; empty for links, and for files that cannot be read."""
        try:
            return "" if is_link(self.name) else hashlib.sha256(self._read()).hexdigest()
        except UserError:
            return ""


def find_images(sources: Iterable[str | os.PathLike]) -> list[Path]:
    """List the images that files, folders and patterns name, each once.

    Files are taken as given, whatever their suffix; folders are searched recursively, and the images in them sorted by
    name. In a pattern, such as `photos/*.jpg`, `*` stands for any part of a name, `**` for any number of folders, `?`
    for a character and `[ab]` for one of several; it gives images and folders of images. A file of that very name goes
    before a pattern.

    A source that does not exist raises a `MissingFileError`; a folder without images, a pipe or a device a `UserError`.
    """
    found: dict[Path, None] = {}
    for source in map(Path, sources):
        if source.is_dir():
            if not (inside := _inside(source)):
                suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
                raise UserError(f"the folder {source} holds no images ({suffixes}); name another")
            found.update(dict.fromkeys(inside))
        elif not source.exists() and glob.has_magic(str(source)):
            matches = map(Path, sorted(glob.glob(str(source), recursive=True)))
            images = [image for match in matches for image in (_inside(match) if match.is_dir() else _images([match]))]
            if not images:
                raise MissingFileError(f"no image matches {source}; give images, or folders of images")
            found.update(dict.fromkeys(images))
        elif not source.exists():
            raise MissingFileError(f"there is no {source}; give images, or folders of images")
        else:
            require_regular_file(source, "image", "give images, or folders of images")
            found[source] = None
    return list(found)


def _inside(folder: Path) -> list[Path]:
    return sorted(_images(folder.rglob("*")))


def _images(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()]


def find_sources(arguments: Iterable[str], allow_private: bool = False, keep: bool = False) -> list[ImageSource]:
    """List the images that the arguments of the command line name, each once; see `find_images`.

    An argument is also a tar of images, see `showtell.shards`; a link, `http://…` or `https://…`; or `-`, standard
    input: an image, or a list of arguments, one a line. Links are not opened yet; `keep` is that of `ImageSource`.
    """
    found: dict[str, ImageSource] = {}
    for argument in arguments:
        if argument == STDIN:
            data = b"" if sys.stdin is None else sys.stdin.buffer.read()
            if is_text(data) and not re.match(rb"P[1-6]\s", data) and not other_kind(data):
                lines = [os.fsdecode(line.rstrip(b"\r")) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
                if not (lines := [line for line in lines if line.strip() and line != STDIN]):
                    raise UserError("standard input is empty; give an image, or a list of images, one a line")
                sources = find_sources(lines, allow_private, keep)
            else:
                sources = [ImageSource(STDIN, data=data)]
        elif is_link(argument):
            sources = [ImageSource(argument, allow_private, keep)]
        elif argument.lower().endswith(".tar"):
            shards = sorted(glob.glob(argument)) or [argument]
            samples = (sample for shard in shards for sample in read_shard(shard))
            sources = [ImageSource(sample.name, sample=sample) for sample in samples]
        else:
            sources = [ImageSource(str(path)) for path in find_images([argument])]
        for source in sources:
            found.setdefault(source.name, source)
    return list(found.values())


def is_link(source: object) -> bool:
    """Return whether a source is the address of a web page or file."""
    return isinstance(source, str) and re.match("(?i)https?://", source) is not None


def fetch(url: str, allow_private: bool = False) -> bytes:
    """Return what a web server sends for a link, at most `MAX_LINK_BYTES`, within `TIMEOUT_S` in all.

    At most `MAX_REDIRECTS` redirects are followed. The name of each host is resolved once, and the connection is made
    to the very address that was checked. Proxies of the environment are not used.

    Raises:
        BrokenImageError: the link is wrong or cannot be reached, what it gives is too large, or it leads to an address
            that is not public, which only `allow_private` permits.
    """
    deadline, link = time.monotonic() + TIMEOUT_S, url
    for _ in range(MAX_REDIRECTS + 1):
        error = None
        try:
            link, data = _get(link, url, allow_private, deadline)
        except (OSError, http.client.HTTPException, ValueError) as raised:
            error = raised
        if time.monotonic() >= deadline or isinstance(error, TimeoutError):
            raise broken_image(url, f"there was no complete answer within {TIMEOUT_S:g} seconds", "try again later")
        if isinstance(error, BrokenImageError):
            raise error
        if error:
            reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]
            raise broken_image(url, reason, "check the link and the network")
        if link is None:
            return data
    raise broken_image(url, f"it is redirected more than {MAX_REDIRECTS} times", "check the link in a browser")


def _get(link: str, url: str, allow_private: bool, deadline: float) -> tuple[str | None, bytes]:
    """Ask for `link`; return where it redirects to, or None and the content. Errors name `url`, which led there."""
    parts = urlsplit(link)
    if not is_link(link) or not parts.hostname:
        raise broken_image(url, f"it leads to {link:.200}, which is no http link", "check the link in a browser")
    host, port = parts.hostname.encode("idna").decode(), parts.port or {"http": 80, "https": 443}[parts.scheme]
    path = quote(parts.path or "/", safe=_IN_LINKS) + ("?" + quote(parts.query, safe=_IN_LINKS) if parts.query else "")
    headers = {"Host": parts.netloc.rpartition("@")[2].encode("idna").decode(), "Accept-Encoding": "identity"}
    headers |= {"User-Agent": f"showtell/{__version__}", "Accept": "image/*"}
    line = _connect(host, port, url, allow_private, deadline)
    if parts.scheme == "https":
        context = ssl.create_default_context()
        line = context.wrap_socket(line, server_hostname=host, do_handshake_on_connect=False)

    def hang_up() -> None:
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)

    # A limit on each read would not stop a server that sends a byte now and then.
    watchdog = threading.Timer(max(0, deadline - time.monotonic()), hang_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        if isinstance(line, ssl.SSLSocket):
            line.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = line
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as response:
            if response.status in (301, 302, 303, 307, 308) and (location := response.headers["Location"]):
                return urljoin(link, location), b""
            if response.status != 200:
                raise broken_image(url, f"the server answers {response.status} {response.reason}", "check the link")
            if (encoding := response.headers.get("Content-Encoding", "identity")) != "identity":
                raise broken_image(url, f"it was sent compressed ({encoding:.20})", "download it with a browser")
            data = b"" if (response.length or 0) > MAX_LINK_BYTES else response.read(MAX_LINK_BYTES + 1)
            if len(data) + (response.length or 0) > MAX_LINK_BYTES:
                limit = f"it has more than {MAX_LINK_BYTES // 2**20} MB"
                raise broken_image(url, limit, "download it, and make a smaller copy")
            if response.length:
                raise broken_image(url, "the connection broke off", "try again")
            return None, data
    finally:
        watchdog.cancel()
        line.close()


def _connect(host: str, port: int, url: str, allow_private: bool, deadline: float) -> socket.socket:
    """Connect to the first address of a host that answers; refuse a host with an address that is not public."""
    found: list = []

    def resolve() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=resolve, daemon=True)  # the system's own limit can be minutes
    thread.start()
    thread.join(max(0, deadline - time.monotonic()))
    error = found[0] if found else TimeoutError()
    if isinstance(error, socket.gaierror):
        raise broken_image(url, f"there is no host {host}", "check the link and the network")
    if isinstance(error, OSError):
        raise error
    for *_, address in found:
        if not (allow_private or is_public(address[0])):
            refused = f"{host} has the address {address[0]}, which is not public"
            raise broken_image(url, refused, "add --allow-private if you trust the link")
    for family, kind, protocol, _, address in found:
        line = socket.socket(family, kind, protocol)
        try:
            line.settimeout(max(0.001, deadline - time.monotonic()))
            line.connect(address)
            return line
        except OSError as failure:
            line.close()
            error = failure
    raise error


def is_public(address: str) -> bool:
    """Return whether an IP address is on the public internet, or the IPv4 address inside an IPv6 one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        if inner := ip.ipv4_mapped or ip.sixtofour or nat64:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False))
