"""Atomic writes, and one writer per folder."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from showtell import files
from showtell.errors import MissingFileError, UserError
from showtell.files import atomic_path, lock, readable_size, require_free_space, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent


def test_a_file_appears_whole_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "a file.txt"
    with atomic_path(str(path)) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent  # the same disk, or renaming would be copying
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["a file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    happened = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (happened.append("flush"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (happened.append("rename"), replace(*names)))
    write_text(tmp_path / "a.txt", "a")
    assert happened == ["flush", "rename"]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    run_python(
        f"""
        import os, signal
        from showtell.files import atomic_path
        with atomic_path({str(path)!r}) as temporary:
            temporary.write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        returncode=-signal.SIGKILL,
    )
    assert path.read_text() == "old"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "a")
        assert os.umask(0o027) == 0o027  # asking for the mask has not changed it
    finally:
        os.umask(old)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_text_and_json_are_utf_8(tmp_path):
    write_text(tmp_path / "a.txt", "Bär\n")
    assert (tmp_path / "a.txt").read_bytes() == b"B\xc3\xa4r\n"
    value = {"captions": ["ein Bär 🐻"], "score": 0.5, "none": None}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text("utf-8")
    assert "ein Bär 🐻" in text
    assert text.endswith("}\n")
    assert json.loads(text) == value
    write_json(tmp_path / "a.json", value, indent=None)
    assert (tmp_path / "a.json").read_text("utf-8").count("\n") == 1


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == 1


def run_python(code: str, returncode: int = 0) -> str:
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == returncode, result.stderr
    return result.stdout


TRY = """
from showtell.errors import UserError
from showtell.files import lock
try:
    with lock({folder!r}, "is training in"):
        print("mine")
except UserError as error:
    print(error)
"""


def test_a_folder_is_created_and_held_by_one_and_released(tmp_path):
    folder = tmp_path / "run"
    with lock(folder, "is training in"):
        assert folder.is_dir()
        with pytest.raises(UserError) as caught, lock(str(folder), "is training in"):
            pass
        mine = f"process {os.getpid()} on "
        assert str(caught.value).startswith(mine)
        assert f"is training in {folder}; wait until it ends, stop it, or choose another folder" in str(caught.value)
        # The refused one has not released the first one's lock:
        elsewhere = run_python(TRY.format(folder=str(folder)))
        assert elsewhere.startswith(mine)
        with lock(tmp_path / "other", "is training in"):
            pass
    assert run_python(TRY.format(folder=str(folder))) == "mine\n"
    with pytest.raises(ZeroDivisionError), lock(folder, "is training in"):
        raise ZeroDivisionError
    with lock(folder, "is training in"):
        pass


HOLD = """
from showtell.files import lock
with lock({folder!r}, "is building"):
    print("held", flush=True)
    input()
"""


@pytest.mark.skipif(files.fcntl is None, reason="no file locks here")
def test_the_folder_of_a_killed_holder_is_free_and_one_may_wait_for_that(tmp_path, capsys):
    command = [sys.executable, "-c", HOLD.format(folder=str(tmp_path))]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is building"), lock(tmp_path, "is building"):
            pass
        threading.Timer(0.5, holder.kill).start()
        with lock(tmp_path, "is building", wait=True):
            assert holder.wait(10) == -signal.SIGKILL
    finally:
        holder.kill()
        holder.communicate()
    note = f"note: process {holder.pid} on {socket.gethostname()} is building {tmp_path}; waiting until it ends\n"
    assert capsys.readouterr().err == note, "waiting is noted once"


def test_a_write_that_the_disk_cannot_hold_is_refused(tmp_path, monkeypatch):
    asked = []
    usage = SimpleNamespace(free=3 * 2**20)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: asked.append(folder) or usage)
    require_free_space(tmp_path / "not" / "yet" / "there", 3 * 2**20, "a checkpoint")
    with pytest.raises(UserError) as caught:
        require_free_space(tmp_path / "not" / "yet", 2**40, "a cache")
    free = f"a cache needs 1.0 TB and {tmp_path} has 3.0 MB free; free space there or choose another folder"
    assert str(caught.value) == free
    assert asked == [tmp_path, tmp_path]  # the first folder that is there
    assert not (tmp_path / "not").exists()


def test_sizes_for_people():
    sizes = [0, 1023, 1024, 1536, 3 * 2**20, 2.5 * 2**30, 2**40, 2**51]
    written = ["0 bytes", "1023 bytes", "1.0 KB", "1.5 KB", "3.0 MB", "2.5 GB", "1.0 TB", "2048.0 TB"]
    assert [readable_size(size) for size in sizes] == written


def test_a_missing_file_is_also_what_python_calls_it():
    error = MissingFileError("there is no a.txt; check its name")
    assert all(isinstance(error, kind) for kind in (UserError, FileNotFoundError, ValueError))
    assert str(error) == "there is no a.txt; check its name"
