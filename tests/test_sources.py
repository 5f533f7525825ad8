"""What is captioned: files, patterns, standard input, HEIC; and links, from a server on this machine alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_captioner import lively_checkpoint, save_images

from showtell import sources
from showtell.__main__ import main
from showtell.captioner import load
from showtell.errors import MissingFileError, UserError
from showtell.sources import ImageSource, fetch, find_images, find_sources, is_public
from showtell.transforms import BrokenImageError, Transform, decode_image, read_image

HOST = "photos.example"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return lively_checkpoint(tmp_path_factory.mktemp("model") / "lively.safetensors")


@pytest.fixture
def image(tmp_path) -> Path:
    return save_images(tmp_path / "images", 1)[0]


class Server:
    """Answers a request for a path with what the function in `answers` writes."""

    def __init__(self) -> None:
        self.answers, self.hosts = {}, []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.hosts.append(self.headers["Host"])
                owner.answers[self.path](self)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.http.server_port
        self.url = f"http://{HOST}:{self.port}"

    def send(self, path: str, data: bytes = b"", status: int = 200, length: int | None = None, **headers: str) -> None:
        """Set what a path gives; `length=-1` leaves Content-Length out."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name.replace("_", "-"), value)
            if length != -1:
                handler.send_header("Content-Length", str(length or len(data)))
            handler.end_headers()
            handler.wfile.write(data)

        self.answers[path] = answer


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def names(monkeypatch) -> dict[str, list[str]]:
    """Resolve these names, to their addresses in turn, and count this machine as a part of the public internet."""
    names = {HOST: ["127.0.0.1"], "inside.example": ["10.0.0.1"]}

    def resolve(host: str, port: int, **_: object) -> list:
        if host not in names and not host[0].isdigit() and ":" not in host:
            raise socket.gaierror("unknown")
        addresses = names.get(host, [host])
        address = addresses.pop(0) if len(addresses) > 1 else addresses[0]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [(family, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(sources, "is_public", lambda address: address == "127.0.0.1" or is_public(address))
    return names


def refusal(url: str, **options: bool) -> str:
    """Fetch a link that must fail, with one sentence that names it; return the rest."""
    with pytest.raises(BrokenImageError) as raised:
        fetch(url, **options)
    message = str(raised.value)
    assert message.startswith(f"{url} cannot be read: ")
    assert "\n" not in message
    return message.removeprefix(f"{url} cannot be read: ")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("127.0.0.1", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.1.1", False),
        ("255.255.255.255", False), ("2606:4700::1", True), ("::1", False), ("::", False), ("fe80::1%eth0", False),
        ("fd00::1", False), ("fec0::1", False), ("ff0e::1", False), ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True), ("::ffff:10.0.0.1", False), ("::10.0.0.1", False), ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)  # fmt: skip
def test_only_addresses_of_the_internet_are_public(address, public):
    assert is_public(address) is public


def test_a_link_is_fetched_from_the_address_that_was_checked(server, names, image):
    names[HOST] = ["127.0.0.1", "10.0.0.1", "10.0.0.1"]  # another answer each time it is asked for
    server.send("/a%20b.png?size=1&x=%C3%A9", image.read_bytes())
    assert fetch(f"{server.url}/a b.png?size=1&x=é#part") == image.read_bytes()
    assert server.hosts == [f"{HOST}:{server.port}"]
    assert names[HOST] == ["10.0.0.1", "10.0.0.1"]  # asked for once
    assert "10.0.0.1, which is not public; add --allow-private" in refusal(f"{server.url}/a.png")


def test_redirects_are_followed_five_times_and_checked_each_time(server, names, image):
    for i in range(6):
        server.send(f"/{i}", status=302, Location=f"/{i + 1}" if i % 2 else f"{server.url}/{i + 1}")
    server.send("/6", image.read_bytes())
    server.send("/loop", status=301, Location="/loop")
    assert fetch(f"{server.url}/1") == image.read_bytes()
    assert "redirected more than 5 times" in refusal(f"{server.url}/0")
    assert "redirected more than 5 times" in refusal(f"{server.url}/loop")
    for target, words in {
        "http://inside.example/": "inside.example has the address 10.0.0.1, which is not public; add --allow-private",
        "//169.254.169.254/latest": "169.254.169.254, which is not public",
        "http://[::ffff:10.0.0.1]:80/": "::ffff:10.0.0.1, which is not public",
        "file:///etc/passwd": "it leads to file:///etc/passwd, which is no http link",
        "http://[": "check the link",
    }.items():
        server.send("/away", status=307, Location=target)
        assert words in refusal(f"{server.url}/away")


def test_a_server_that_fails_is_one_sentence(server, names, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINK_BYTES", 3 * 2**20)
    server.send("/gone", status=404)
    server.send("/large", length=10**9)
    server.send("/endless", bytes(4 * 2**20), length=-1)
    server.send("/cut", b"x" * 100, length=200)
    server.send("/zipped", b"x" * 100, Content_Encoding="gzip")
    server.answers["/nonsense"] = lambda handler: handler.wfile.write(b"hello\n")
    for path, words in {
        "/gone": "the server answers 404 Not Found; check the link",
        "/large": "it has more than 3 MB; download it",
        "/endless": "it has more than 3 MB; download it",
        "/cut": "the connection broke off; try again",
        "/zipped": "it was sent compressed (gzip)",
        "/nonsense": "hello",
    }.items():
        assert words in refusal(server.url + path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    assert "refused; check the link and the network" in refusal(f"http://{HOST}:{closed}/")
    assert "there is no host nowhere.example" in refusal("http://nowhere.example/a.jpg")
    assert "check the link" in refusal("http://photos.example:99999/a.jpg")
    assert "SSL" in refusal(server.url.replace("http:", "https:") + "/gone")


def test_a_slow_server_has_so_much_time_in_all(server, names, monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT_S", 0.5)

    def drip(handler: BaseHTTPRequestHandler, start: bytes) -> None:
        for byte in start + b"x" * 60:
            try:
                handler.wfile.write(bytes([byte]))
            except OSError:
                return
            time.sleep(0.05)

    server.answers["/headers"] = lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\nX-Long: ")
    server.answers["/body"] = lambda handler: drip(handler, b"HTTP/1.1 200 OK\r\n\r\n")
    server.answers["/silent"] = lambda handler: time.sleep(1)
    for path in ("/headers", "/body", "/silent"):
        began = time.monotonic()
        assert "no complete answer within 0.5 seconds; try again" in refusal(server.url + path)
        assert time.monotonic() - began < 2
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(1) or [])
    assert "no complete answer" in refusal(f"{server.url}/resolve")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_https_verifies_the_name_of_the_host(server, names, image, tmp_path, monkeypatch):
    names["other.example"] = ["127.0.0.1"]
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", certificate, "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.http.socket = context.wrap_socket(server.http.socket, server_side=True)
    server.send("/a.png", image.read_bytes())
    url = f"https://{HOST}:{server.port}/a.png"
    assert "certificate verify failed" in refusal(url)
    trusted = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusted)
    assert fetch(url) == image.read_bytes()
    assert "not valid for 'other.example'" in refusal(url.replace(HOST, "other.example"))


def test_a_link_is_captioned_from_python_and_from_the_command_line(server, names, model, image, capsys):
    server.send("/a.png", image.read_bytes())
    server.send("/page", b"\n<!-- shop -->\n<!DOCTYPE html><html><img src=a.png></html>")
    captioner = load(model, "cpu")
    (expected,) = captioner.caption(image)
    assert captioner.caption(f"{server.url}/a.png")[0].text == expected.text
    given = [f"{server.url}/a.png", image]
    assert [path for path, _ in captioner.caption_files(given)] == given
    with pytest.raises(BrokenImageError, match="/page cannot be read: it is a web page; give a JPEG"):
        captioner.encode(f"{server.url}/page")
    assert main(["caption", f"{server.url}/a.png", f"{server.url}/page", "--model", str(model)]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{server.url}/a.png: {expected.text}\n"
    assert f"showtell: {server.url}/page cannot be read: it is a web page" in printed.err


def test_links_into_the_local_network_are_followed_only_when_allowed(server, model, image, capsys, tmp_path):
    server.send("/a.png", image.read_bytes())
    url = f"http://127.0.0.1:{server.port}/a.png"
    assert main(["caption", url, "--model", str(model)]) == 1
    assert "127.0.0.1, which is not public; add --allow-private" in capsys.readouterr().err
    assert server.hosts == []
    page = tmp_path / "page.html"
    assert main(["caption", url, "--model", str(model), "--allow-private", "--json", "--html", str(page)]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["image"] == url
    assert "data:image/jpeg" in page.read_text() or "data:image/png" in page.read_text()
    assert len(server.hosts) == 1  # read once, for the captions and the page


def test_patterns_give_images_and_folders_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ["2023/a.jpg", "2024/b.PNG", "2024/deep/c.heic", "2024/notes.txt", "[x]*.jpg", "x.jpg"]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    found = {
        "202?/*.jpg": ["2023/a.jpg"],
        "202*": ["2023/a.jpg", "2024/b.PNG", "2024/deep/c.heic"],
        "**/*.heic": ["2024/deep/c.heic"],
        "2024/*": ["2024/b.PNG", "2024/deep/c.heic"],
        "[x]*.jpg": ["[x]*.jpg"],  # a file of this name
        "[xy]*.jpg": ["x.jpg"],
    }
    for pattern, expected in found.items():
        assert find_images([pattern]) == list(map(Path, expected)), pattern
    assert find_images(["x.jpg", "./x.jpg", "[xy].jpg"]) == [Path("x.jpg")]
    with pytest.raises(MissingFileError, match=r"no image matches 2024/\*\.jpg; give images"):
        find_images(["2024/*.jpg"])


def given(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


def test_standard_input_is_an_image_or_a_list(model, image, tmp_path, monkeypatch, capsys):
    expected = load(model, "cpu").caption(image)[0].text
    given(monkeypatch, image.read_bytes())
    assert main(["caption", "-", "--model", str(model), "--html", str(tmp_path / "page.html")]) == 0
    assert expected.split()[-1] in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    given(monkeypatch, f"\ufeff{image}\r\n\n{image.parent}/*.png\nhttps://photos.example/a.jpg".encode())
    assert [source.name for source in find_sources(["-"])] == [str(image), "https://photos.example/a.jpg"]
    given(monkeypatch, os.fsencode(str(image)))
    assert main(["caption", "-", "--model", str(model)]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    for data, words in {
        b"": "standard input is empty; give an image, or a list",
        b"absent.jpg\n": "there is no absent.jpg",
        b"-\n": "standard input is empty",
    }.items():
        given(monkeypatch, data)
        with pytest.raises(UserError, match=words):
            find_sources(["-"])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"%PDF-1.7 x", "it is a PDF"),
        (b"PK\x03\x04\0\0", "it is a zip archive"),
        (b"\x1f\x8b\x08\0", "it is compressed with gzip"),
        (b"\0\0\0 ftypisom\0\0", "it is a video"),
        (b"<?xml version='1.0'?>\n<!-- x --><svg xmlns=''>", "it is an SVG drawing"),
        (b"<!doctype HTML><title>x", "it is a web page"),
        (b"a letter", "it holds text"),
        (b"\0\x01\x02", "it is not an image of a known format"),
    ],
)
def test_what_is_no_image_is_named(data, kind, tmp_path, monkeypatch):
    (tmp_path / "photo.jpg").write_bytes(data)
    with pytest.raises(BrokenImageError, match=rf"photo\.jpg cannot be read: {kind}; give a JPEG"):
        read_image(tmp_path / "photo.jpg")
    if kind != "it holds text":  # and is not taken for a list of files
        given(monkeypatch, data)
        assert [source.name for source in find_sources(["-"])] == ["-"]


@pytest.mark.parametrize("suffix", [".heic", ".avif"])
def test_a_phones_photograph_is_read_upright_by_both_engines(suffix, tmp_path):
    pytest.importorskip("pillow_heif").register_heif_opener()
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48] = 200, 60, 20
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    path = tmp_path / f"photo{suffix}"
    Image.fromarray(pixels).save(path, quality=95, exif=exif.tobytes())
    expected = np.rot90(pixels, -1)
    read = read_image(path).permute(1, 2, 0).numpy()
    assert read.shape == expected.shape
    assert np.abs(read.astype(int) - expected).mean() < 4
    transform = Transform(resize=(32, 32))
    difference = transform.to_array(path.read_bytes()) - transform(decode_image(path.read_bytes())).numpy()
    assert np.abs(difference).max() < 0.05


def test_without_its_package_a_heic_image_names_it(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.heic")
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BrokenImageError, match=r'it is a HEIC image; type pip install "showtell\[heif\]"'):
        read_image(tmp_path / "photo.heic")


def test_a_source_knows_its_digest_and_frames(image, tmp_path):
    source = ImageSource(str(image))
    assert source() == image.read_bytes()
    assert source.sha256 == source.digest() != ""
    assert ImageSource(str(tmp_path / "absent.png")).digest() == ImageSource("https://photos.example/a").digest() == ""
