"""`showtell bulk`: every image is a row exactly once, whatever is killed, with the captions of `showtell caption`."""

from __future__ import annotations

import csv
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from test_captioner import lively_checkpoint, save_images

from showtell.__main__ import main
from showtell.bulk import caption_archive, find_archive, plan
from showtell.captioner import load
from showtell.errors import UserError
from showtell.sources import ImageSource

# Not imported here: Ray listens on loopback only if `showtell.bulk` imports it.
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["id", "caption", "confidence", "model", "error"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return lively_checkpoint(tmp_path_factory.mktemp("model") / "lively.safetensors")


def rows_of(folder: str | Path) -> list[dict]:
    return [row for path in sorted(Path(folder).glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def write_part(folder: Path, block: dict, model: str = "m") -> None:
    ids = [source.name for source in pickle.loads(block["sources"])]
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"id": ids, "model": [model] * len(ids)}), folder / block["file"])


@needs_ray
@pytest.mark.slow
def test_an_archive_is_captioned_as_one_by_one_and_then_continued(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_images(Path("images"), 60)
    Path("images/00007.png").write_bytes(b"no image")
    options = {"model": str(model), "workers": 2, "batch_size": 8, "block_size": 10}
    assert caption_archive(["images"], "out", **options) == (0, 60, 1)
    rows = rows_of("out")
    assert len(rows) == 60
    assert list(rows[0]) == COLUMNS
    assert {row["model"] for row in rows} == {"lively"}
    captioner = load(model)
    for path, result in captioner.caption_files([row["id"] for row in rows]):
        row = next(row for row in rows if row["id"] == str(path))
        if path.name == "00007.png":
            assert row["caption"] is None
            assert row["error"] == str(result)
        else:
            assert (row["caption"], row["error"]) == (result[0].text, None)

    # A table with a new image and a link into this machine, which is refused; what is finished is not captioned again.
    save_images(Path("more"), 1)
    with open("table.csv", "w", newline="") as file:
        links = ["images/00001.png", "more/00000.png", "http://127.0.0.1:9/x.jpg", ""]
        csv.writer(file).writerows([["n", "image"], *enumerate(links)])
    before = {path: path.stat().st_mtime_ns for path in Path("out").iterdir() if path.suffix == ".parquet"}
    assert main(["bulk", "table.csv", "images", "--out", "out", "--model", str(model), "--workers", "1"]) == 1
    assert "2 images captioned in out, after 60 before; 1 of them could not be read" in capsys.readouterr().err
    new = rows_of("out")
    assert Counter(row["id"] for row in new) == Counter([*(row["id"] for row in rows), *links[1:3]])
    assert "which is not public" in next(row["error"] for row in new if row["id"] == links[2])
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in before.items())
    assert caption_archive(["images", "table.csv"], "out", model=str(model)) == (62, 0, 0)


def test_blocks_stay_the_same_whatever_is_finished(tmp_path):
    sources = [ImageSource(f"{i:02}.png") for i in range(25)]
    blocks, n_before = plan(sources, tmp_path, "m", 10)
    assert [block["images"] for block in blocks] == [10, 10, 5]
    assert n_before == 0
    write_part(tmp_path, blocks[1])
    assert plan(sources, tmp_path, "m", 10) == ([blocks[0], blocks[2]], 10)
    for block in (blocks[0], blocks[2]):
        write_part(tmp_path, block)
    assert plan(sources, tmp_path, "m", 10) == ([], 25)
    grown = [ImageSource("0.png"), *sources]  # all blocks move by one
    (block,), n_before = plan(grown, tmp_path, "m", 10)
    assert ([source.name for source in pickle.loads(block["sources"])], n_before) == (["0.png"], 25)
    assert block["file"] not in {path.name for path in tmp_path.iterdir()}


def test_a_folder_of_something_else_is_refused(tmp_path):
    sources = [ImageSource("a.png")]
    write_part(tmp_path, plan(sources, tmp_path, "m")[0][0], "other")
    with pytest.raises(UserError, match="has captions of other, not m; choose another folder"):
        plan(sources, tmp_path, "m")
    (tmp_path / "part-x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"part-x\.parquet is no file of showtell bulk"):
        plan(sources, tmp_path, "other")


def test_a_table_of_paths_is_read_by_its_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = "https://a.org/1.jpg", "https://a.org/2.jpg"
    pq.write_table(pa.table({"url": [one, None, two, one]}), "t.parquet")
    assert [source.name for source in find_archive(["t.parquet"], "url")] == [one, two]
    Path("t.csv").write_text(f"n,url\n1,{two}\n2,007.png\n")
    assert [source.name for source in find_archive(["t.parquet", "t.csv"], "url")] == [one, two, "007.png"]
    for name in ("t.parquet", "t.csv"):
        with pytest.raises(UserError, match=f"{name} has no readable column image .*; name it with --column"):
            find_archive([name])


def test_without_ray_one_sentence_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    save_images(tmp_path / "images", 1)
    assert main(["bulk", str(tmp_path / "images"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == 'showtell: showtell bulk needs Ray; type pip install "showtell[ray]"\n'


def processes() -> dict[int, tuple[int, str]]:
    """Return parent and command line of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            found[int(folder.name)] = int(parent), (folder / "cmdline").read_text(errors="replace")
        except OSError:
            continue
    return found


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of what a process has started, directly or not."""
    table, found = processes(), {}
    level = {pid}
    while level := {child for child, (parent, _) in table.items() if parent in level} - found.keys():
        found |= {child: table[child][1] for child in level}
    return found


def actors(pid: int) -> list[int]:
    return [child for child, command in descendants(pid).items() if "MapWorker" in command]


@needs_ray
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_every_row_is_there_once_after_a_worker_and_the_driver_were_killed(model, tmp_path):
    n = 3000
    save_images(tmp_path / "images", n)
    options = f"['images'], 'out', {str(model)!r}, workers=2, block_size=50"
    command = [sys.executable, "-c", f"from showtell import bulk; print(*bulk.caption_archive({options}))"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    def wait_for(n_files: int, process: subprocess.Popen) -> None:
        limit = time.monotonic() + 120
        while len(list((tmp_path / "out").glob("*.parquet"))) < n_files and time.monotonic() < limit:
            assert process.poll() is None
            time.sleep(0.05)

    driver = start()
    wait_for(5, driver)
    (victim, *_) = actors(driver.pid)
    os.kill(victim, signal.SIGKILL)
    wait_for(20, driver)
    assert victim not in actors(driver.pid)
    children = descendants(driver.pid)
    driver.kill()
    driver.wait()
    n_before = len(rows_of(tmp_path / "out"))
    assert 20 * 50 <= n_before < n
    done = start()
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0
    before, new, errors = map(int, output.split())
    assert (before + new, errors) == (n, 0)
    assert before >= n_before
    assert Counter(row["id"] for row in rows_of(tmp_path / "out")) == Counter(f"images/{i:05d}.png" for i in range(n))
    limit = time.monotonic() + 60  # Ray's agents notice after some seconds that their node is gone
    while left := [pid for pid, command in children.items() if processes().get(pid, (0, ""))[1] == command]:
        assert time.monotonic() < limit, left
        time.sleep(0.5)
