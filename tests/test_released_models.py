"""Finding a released model: which place comes first, and downloads that break, redirect or run twice at once."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from file_server import FileServer

from showtell import released
from showtell.__main__ import main
from showtell.errors import MissingFileError, UserError
from showtell.released import Release, fetch, locate

ROOT = Path(__file__).resolve().parent.parent
FILE = "showtell-attend-1.safetensors"
DATA = random.Random(0).randbytes(600_000)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A server of one small model, which the table of releases and `SHOWTELL_MODELS` name."""
    monkeypatch.setattr(released, "PAUSE_S", 0.0)
    monkeypatch.setattr(released, "RELEASES", {FILE: Release(len(DATA), SHA256)})
    with FileServer(**{FILE: DATA}) as server:
        monkeypatch.setenv("SHOWTELL_MODELS", server.url)
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no checkout."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SHOWTELL_MODELS", raising=False)
    monkeypatch.setattr(released, "MODELS", tmp_path / "no checkout")
    return released.cache_folder()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_the_table_is_that_of_the_models_in_the_checkout():
    there = {path.name: path for path in (ROOT / "models").glob("*.safetensors")}
    assert there.keys() == released.RELEASES.keys()
    for name, path in there.items():
        assert released.RELEASES[name].size == path.stat().st_size
        assert released.RELEASES[name].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_checkout_comes_first_then_the_named_folder_then_the_cache(tmp_path, cache, monkeypatch, server):
    folder, checkout = tmp_path / "folder", tmp_path / "checkout"
    for place in (cache, folder, checkout):
        place.mkdir(parents=True)
        (place / FILE).write_bytes(DATA)
    monkeypatch.setenv("SHOWTELL_MODELS", str(folder))
    monkeypatch.setattr(released, "MODELS", checkout)
    for place in (checkout, folder, cache):
        assert locate("showtell-attend-1") == locate("showtell-attend") == locate() == place / FILE
        (place / FILE).unlink()
    assert server.requests == []


def test_a_name_without_its_number_is_the_newest(tmp_path, monkeypatch):
    for name in ("classic-9", "classic-10", "classic-old"):
        (tmp_path / f"{name}.safetensors").touch()
    monkeypatch.setenv("SHOWTELL_MODELS", str(tmp_path))
    assert locate("classic-9") == tmp_path / "classic-9.safetensors"
    assert locate("classic") == tmp_path / "classic-10.safetensors"


def test_a_name_that_is_no_model_is_refused_without_a_download(server):
    for name in ("nonesuch", "showtell", "../showtell-attend-1", "runs/best.safetensors"):
        with pytest.raises(MissingFileError, match=r"there is no model .*; give .* released model: showtell-attend-1$"):
            locate(name)
    assert server.requests == []


def test_a_named_folder_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOWTELL_MODELS", str(tmp_path / "gone"))
    with pytest.raises(MissingFileError, match=r"SHOWTELL_MODELS is .*gone, not a folder; name a folder"):
        locate()


def test_without_a_mirror_the_address_is_the_release_of_this_version(server, cache, monkeypatch):
    monkeypatch.delenv("SHOWTELL_MODELS")
    monkeypatch.setattr(released, "BASE_URL", server.url + "v{version}/")
    path = f"v{released.__version__}/{FILE}"
    server.files[path] = server.files.pop(FILE)
    assert locate() == cache / FILE
    assert server.requests == [(path, None)]


def test_a_path_among_the_released_models_is_known(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("SHOWTELL_MODELS", str(tmp_path / "folder"))
    for folder in (cache, tmp_path / "folder", tmp_path / "no checkout"):
        assert released.is_released(folder / FILE)
    assert not released.is_released(tmp_path / "runs" / FILE)


def test_a_model_is_downloaded_once(server, cache):
    assert locate("showtell-attend") == cache / FILE
    assert (cache / FILE).read_bytes() == DATA
    assert locate() == cache / FILE
    assert server.requests == [(FILE, None)]
    assert files_in(cache) == [FILE]


def test_a_broken_transfer_continues_where_it_stopped(server, cache):
    server.breaks[FILE] = 400_000
    assert locate().read_bytes() == DATA
    first, second = server.asked_for(FILE)
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 400_000
    assert files_in(cache) == [FILE]


def test_a_transfer_that_failed_continues_in_a_later_call(server, cache, monkeypatch):
    server.breaks[FILE] = 400_000
    monkeypatch.setattr(released, "ATTEMPTS", 0)
    with pytest.raises(MissingFileError, match="the connection broke"):
        locate()
    assert files_in(cache) == [f".{FILE}.download"]
    assert locate().read_bytes() == DATA
    assert server.asked_for(FILE)[1].startswith("bytes=")
    assert files_in(cache) == [FILE]


def test_a_server_without_ranges_sends_it_all_again(server, cache):
    server.ranges = False
    server.breaks[FILE] = 400_000
    assert locate().read_bytes() == DATA
    assert server.asked_for(FILE)[1].startswith("bytes=")


@pytest.mark.parametrize("part", [DATA, DATA + b"too much"], ids=["complete", "too long"])
def test_a_part_that_reaches_the_end_is_checked_and_if_too_long_fetched_again(server, cache, part):
    work = cache / f".{FILE}.download"
    work.mkdir(parents=True)
    (work / "part").write_bytes(part)
    assert locate().read_bytes() == DATA
    assert files_in(cache) == [FILE]


def test_a_wrong_file_is_deleted_with_one_sentence_and_downloaded_again(server, cache, capsys):
    server.wrong[FILE] = [b"<html>Please log in</html>"]
    assert locate().read_bytes() == DATA
    assert server.asked_for(FILE) == [None, None]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "another" in line] == [
        f"showtell: {server.url}{FILE} gave a file with another SHA-256, which was deleted; downloading it again"
    ]


def test_a_file_that_is_wrong_twice_is_an_error_and_leaves_nothing(server, cache):
    server.wrong[FILE] = [b"wrong", b"wrong again", b"never asked for"]
    with pytest.raises(UserError, match=rf"a file with another SHA-256, which was deleted, twice; .*{SHA256}.*{FILE}"):
        locate()
    assert len(server.requests) == 2
    assert FILE not in files_in(cache)
    assert files_in(cache / f".{FILE}.download") == ["lock"]


def test_redirects_are_followed_with_the_range(server, cache):
    server.redirects["moved"] = f"/{FILE}"
    server.breaks[FILE] = 400_000
    path = fetch(server.url + "moved", cache / "other.safetensors", SHA256)
    assert path.read_bytes() == DATA
    assert server.asked_for("moved") == server.asked_for(FILE)
    assert server.asked_for(FILE)[1].startswith("bytes=")


def test_redirects_that_never_end_are_an_error(server, cache):
    server.redirects[FILE] = f"/{FILE}"
    with pytest.raises(MissingFileError, match="more than 10 redirects"):
        locate()
    assert len(server.requests) <= 12


def test_a_damaged_file_in_the_cache_is_replaced(server, cache):
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(DATA[:1000])
    assert locate().read_bytes() == DATA


def test_a_server_in_trouble_is_asked_again_and_a_missing_file_is_not(server, cache):
    server.statuses[FILE] = [503, 500]
    assert locate().read_bytes() == DATA
    (cache / FILE).unlink()
    server.requests.clear()
    server.statuses[FILE] = [404]
    with pytest.raises(MissingFileError, match=r"\(HTTP status 404\)"):
        locate()
    assert len(server.requests) == 1


def test_a_server_that_does_not_answer_is_given_up(server, monkeypatch):
    monkeypatch.setattr(released, "TIMEOUT_S", (5, 0.2))
    server.pause_s = 1
    with pytest.raises(MissingFileError, match=r"\(no answer in time\)"):
        locate()


def test_md5_is_verified_too(server, tmp_path):
    checksum = "md5:" + hashlib.md5(DATA).hexdigest()
    assert fetch(server.url + FILE, tmp_path / "x.zip", checksum).read_bytes() == DATA
    with pytest.raises(UserError, match="another MD5"):
        fetch(server.url + FILE, tmp_path / "y.zip", "md5:" + "0" * 32)


def test_too_little_room_is_said_before(server, cache, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"the model showtell-attend-1 needs 585\.9 KB and .* has 1000 bytes free"):
        locate()
    assert server.requests == []


def test_offline_one_sentence_names_address_file_checksum_and_folder(cache):
    url = released.BASE_URL.format(version=released.__version__) + FILE
    began = time.monotonic()
    with pytest.raises(MissingFileError) as caught:
        locate()
    assert time.monotonic() - began < 5
    assert str(caught.value) == (
        f"cannot download {url} (no connection to github.com); check the network and try again, or get the file "
        f"another way, compare its SHA-256 with {released.RELEASES[FILE].sha256}, and save it as {cache / FILE}"
    )


def test_offline_the_command_line_prints_that_sentence_and_no_traceback(cache, tmp_path, capsys):
    (tmp_path / "photo.png").touch()
    assert main(["caption", str(tmp_path / "photo.png"), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("showtell: cannot download https://")
    assert said.endswith(f"and save it as {cache / FILE}\n")
    assert said.count("\n") == 1


def test_threads_that_want_the_same_file_download_it_once(server, cache):
    server.pause_s = 0.3
    found = []
    threads = [threading.Thread(target=lambda: found.append(locate())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / FILE] * 3
    assert server.requests == [(FILE, None)]


def test_processes_that_want_the_same_file_download_it_once(server, cache):
    server.pause_s = 1.5
    code = (
        "from showtell import released\n"
        f"released.MODELS = released.MODELS / 'nowhere'\n"
        f"released.RELEASES = {{{FILE!r}: released.Release({len(DATA)}, {SHA256!r})}}\n"
        "print(released.locate())\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [out.decode().strip() for out, _ in outputs] == [str(cache / FILE)] * 2, outputs
    assert server.requests == [(FILE, None)]
    assert (cache / FILE).read_bytes() == DATA
    assert files_in(cache) == [FILE]


def test_a_process_that_is_killed_leaves_a_part_that_the_next_continues(server, cache):
    """A kill cannot be caught, so nothing but the files on disk carries the state over."""
    slow = random.Random(1).randbytes(30_000_000)
    name = "showtell-slow-1.safetensors"
    code = (
        "import showtell.released as r, time\n"
        "iterate = __import__('requests').Response.iter_content\n"
        "def slowly(self, size):\n"
        "    for chunk in iterate(self, size):\n"
        "        yield chunk\n"
        "        time.sleep(0.01)\n"
        "__import__('requests').Response.iter_content = slowly\n"
        f"r.fetch({server.url + name!r}, r.cache_folder() / {name!r}, {hashlib.sha256(slow).hexdigest()!r})\n"
    )
    server.files[name] = slow
    part = cache / f".{name}.download" / "part"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while (not part.exists() or part.stat().st_size < 1_000_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    have = part.stat().st_size
    assert 0 < have < len(slow)
    path = fetch(server.url + name, cache / name, hashlib.sha256(slow).hexdigest())
    assert path.read_bytes() == slow
    assert server.asked_for(name) == [None, f"bytes={have}-"]
    assert os.listdir(cache) == [name]


def test_a_model_that_is_nowhere_is_not_downloaded_unless_wanted(server, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(released, "MODELS", tmp_path)
    name = Path(FILE).stem
    with pytest.raises(MissingFileError, match=f"{name} is not on this machine; type showtell download {name}"):
        released.locate(name, download=False)
    assert released.locate(name) == released.locate(name, download=False)
