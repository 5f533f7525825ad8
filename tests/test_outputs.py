"""What `showtell caption` writes: tables that survive a kill and are resumed, pages with attention maps, PNGs."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_captioner import lively_checkpoint, save_images

from showtell.__main__ import main
from showtell.captioner import load
from showtell.checkpoint import load_checkpoint, save_checkpoint
from showtell.figures import spread_map
from showtell.outputs import CaptionWriter
from showtell.transforms import Transform

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return lively_checkpoint(tmp_path_factory.mktemp("model") / "lively.safetensors")


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    """A folder of six images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    save_images(Path("images"), 6)
    return Path("images")


@pytest.fixture
def done(model, capsys):
    """A function that captions with the model, must return `code`, and returns what was printed."""

    def run(*arguments: object, code: int = 0):
        capsys.readouterr()
        assert main(["caption", *map(str, arguments), "--model", str(model), "--beam-size", "3"]) == code
        return capsys.readouterr()

    return run


def csv_rows(path: str | Path = "c.csv") -> list[list[str]]:
    with open(path, newline="", errors="surrogateescape") as file:
        return list(csv.reader(file))


def json_lines(path: str | Path = "c.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


TABLES = ["--csv", "c.csv", "--jsonl", "c.jsonl"]


def test_all_outputs_of_one_run_agree(images, done):
    (images / "bad.jpg").write_text("a letter")
    printed = done(images, *TABLES, "--html", "page.html", "--json", "--n-best", 2, code=1)
    lines, rows = json_lines(), csv_rows()
    assert json.loads(printed.out) == lines
    assert [line["image"] for line in lines] == [*(f"images/0000{i}.png" for i in range(6)), "images/bad.jpg"]
    assert rows[0] == ["image", "caption", "score", "sha256"]
    flat = [[r["image"], c["text"], str(c["score"]), r["sha256"]] for r in lines for c in r["captions"]]
    assert rows[1:] == flat
    assert len(flat) == 12
    assert "it holds text" in lines[-1]["error"]
    assert (lines[-1]["captions"], len(lines[-1]["sha256"])) == ([], 64)
    assert Path("page.html").read_text().count('<li class="card') == 6
    assert "6 images captioned in c.csv and c.jsonl and page.html\n" in printed.err
    assert "showtell: 1 of 7 images could not be read" in printed.err


def test_quiet_prints_errors_alone(images, done):
    save_images(images, 40)
    (images / "bad.jpg").write_text("a letter")
    printed = done(images, "--quiet", "--csv", "new/c.csv", code=1)
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["showtell", "showtell"]
    assert "captions: 100%" in done(images, "--csv", "new/c.csv", code=1).err


@pytest.mark.parametrize("cut", [0, 1, 90, 160])
def test_a_cut_table_is_repaired_and_completed(cut, images, done):
    """Cut off at the end of, and within, the last line, the last field, the last image of several rows."""
    done(images, *TABLES, "--n-best", 2)
    whole = {name: Path(name).read_bytes() for name in ("c.csv", "c.jsonl")}
    for name, data in whole.items():
        Path(name).write_bytes(data[: len(data) - cut])
    printed = done(images, *TABLES, "--n-best", 2, "--resume", "--json")
    assert {name: Path(name).read_bytes() for name in whole} == whole
    assert json.loads(printed.out) == json_lines()
    kept = 5 if cut else 6
    assert f"note: {kept} of 6 images have been captioned before" in printed.err
    assert f"{6 - kept} images captioned in c.csv and c.jsonl, after {kept} before" in printed.err


def test_resume_knows_images_by_path_and_contents(images, done):
    done(images, *TABLES)
    before = {row["image"]: row for row in json_lines()}
    shutil.copy("images/00001.png", "images/copy.png")  # the same contents at another path
    shutil.copy("images/00002.png", "images/00003.png")  # other contents at the same path
    (images / "00004.png").unlink()  # its row stays
    (images / "bad.jpg").write_text("a letter")
    for _ in range(2):  # an error is tried again, and listed once
        printed = done(images, *TABLES, "--resume", "--html", "page.html", code=1)
    assert "6 of 7 images have been captioned before" in printed.err
    after = {row["image"]: row for row in json_lines()}
    assert len(json_lines()) == len(after) == 8
    assert after.keys() == {*before, "images/copy.png", "images/bad.jpg"}
    assert after["images/copy.png"]["captions"] == before["images/00001.png"]["captions"]
    assert after["images/00003.png"]["captions"] == before["images/00002.png"]["captions"]
    assert [after[f"images/0000{i}.png"] for i in (0, 1, 2, 4, 5)] == [
        before[f"images/0000{i}.png"] for i in (0, 1, 2, 4, 5)
    ]
    assert sorted(row[0] for row in csv_rows()[1:]) == sorted(after.keys() - {"images/bad.jpg"})
    assert Path("page.html").read_text().count('<li class="card') == 6
    done(images, "--csv", "c.csv", code=1)  # without --resume, a table is replaced
    assert len(csv_rows()) == 7


def test_one_table_completes_the_other(images, done):
    done("images/00000.png", "images/00001.png", "--csv", "c.csv")
    done(images, *TABLES, "--resume")
    assert sorted(row[0] for row in csv_rows()[1:]) == sorted(row["image"] for row in json_lines())
    assert len(json_lines()) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are not UTF-8")
def test_names_with_line_breaks_and_bytes_that_are_not_text_are_known_again(images, done):
    for name in (b"a\nb.png", b'c,"d\r\n.png', b"caf\xe9.png"):
        shutil.copy("images/00001.png", os.fsdecode(b"images/" + name))
    done(images, *TABLES)
    whole = Path("c.csv").read_bytes(), Path("c.jsonl").read_bytes()
    assert "9 of 9 images have been captioned before" in done(images, *TABLES, "--resume").err
    assert (Path("c.csv").read_bytes(), Path("c.jsonl").read_bytes()) == whole


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("c.csv", "image,price\nx.png,3\n", ["its columns are image, price, not image, caption, score, sha256"]),
        ("c.csv", "image,caption,score,sha256\nx.png,A cat,high,0\ny,z,0,1\n", ["row 2 is not one of captions"]),
        ("c.jsonl", '{"image": "x.png"}\n', ["line 1 is not an object with image, captions and sha256"]),
        ("c.jsonl", "[3]\n", ["line 1 is not"]),
    ],
)
def test_a_table_of_something_else_is_not_touched(name, text, words, images, done):
    Path(name).write_text(text)
    printed = done(images, f"--{name.partition('.')[2]}", name, "--resume", code=2)
    assert printed.err.startswith(f"showtell: {name} cannot be resumed: ")
    assert all(word in printed.err for word in [*words, "name another file, or leave --resume out"])
    assert Path(name).read_text() == text
    assert "add --csv FILE or --jsonl FILE" in done(images, "--resume", code=2).err


def test_ctrl_c_keeps_what_is_done_and_names_the_flag(images, done, monkeypatch):
    add, added = CaptionWriter.add, []

    def interrupted(self, source, result):
        if len(added) == 4:
            raise KeyboardInterrupt
        added.append(source.name)
        add(self, source, result)

    monkeypatch.setattr(CaptionWriter, "add", interrupted)
    said = done(images, *TABLES, "--batch-size", 2, code=130).err
    assert said.endswith("showtell: stopped after 4 images; to caption the others, add --resume to the same command\n")
    assert [row["image"] for row in json_lines()] == [row[0] for row in csv_rows()[1:]] == added


def kill_and_resume(folder: Path, model: Path, n: int, kills: int, batch_size: int) -> tuple[list[int], float]:
    """Caption `n` images, killed at random; return the number of rows after each kill, and the seconds it took."""
    save_images(folder / "images", n)
    command = [sys.executable, "-m", "showtell", "caption", "images", "--model", str(model), "--engine", "torch"]
    command += ["--beam-size", "1", "--batch-size", str(batch_size)]
    options = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"}}
    whole = [*command, "--csv", "whole.csv", "--jsonl", "whole.jsonl"]
    subprocess.run(whole, **options, check=True, capture_output=True, timeout=1500)
    rng, rows, began = random.Random(n), [], time.monotonic()
    table = folder / "c.jsonl"
    for _ in range(kills):
        goal = (rows[-1] if rows else 0) + rng.randint(1, n // (kills + 1))
        process = subprocess.Popen([*command, *TABLES, "--resume"], **options, stderr=subprocess.PIPE)
        while process.poll() is None and (table.read_bytes().count(b"\n") if table.exists() else 0) < goal:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it was not done before
        rows.append(table.read_bytes().count(b"\n"))
        with (folder / "c.csv").open("ab") as file:
            file.write(b"images/half a li")  # as after a power failure
    subprocess.run([*command, *TABLES, "--resume"], **options, check=True, capture_output=True, timeout=1500)
    for name, read in (("csv", csv_rows), ("jsonl", json_lines)):
        found, expected = read(folder / f"c.{name}"), read(folder / f"whole.{name}")
        assert len(found) == len(expected) == n + (name == "csv")
        for row, known in zip(found, expected, strict=True):
            if name == "csv":
                assert (row[:2], row[3:]) == (known[:2], known[3:])
                scores = row[2], known[2]
            else:
                (caption,), (same,) = row.pop("captions"), known.pop("captions")
                assert (row, caption["words"]) == (known, same["words"])
                scores = caption["score"], same["score"]
            if scores[0] != "score":  # a batch of other images rounds differently
                assert float(scores[0]) == pytest.approx(float(scores[1]), abs=2e-4)
    return rows, time.monotonic() - began


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_is_completed_with_every_row_once(model, tmp_path):
    rows, _ = kill_and_resume(tmp_path, model, n=60, kills=2, batch_size=2)
    assert 0 < rows[0] < rows[1] < 60


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_five_thousand_images_survive_five_kills(model, tmp_path, capsys):
    rows, seconds = kill_and_resume(tmp_path, model, n=5000, kills=5, batch_size=32)
    with capsys.disabled():
        print(f"\n5,000 images, killed after {rows} rows, done in {seconds:.0f} s: every row once")


def with_transform(model: Path, path: Path, transform: Transform) -> Path:
    saved = load_checkpoint(model)
    save_checkpoint(path, saved.model, saved.vocab, transform, saved.meta)
    return path


def test_attention_maps_are_a_png_per_word(images, model, done, tmp_path):
    Image.open("images/00001.png").resize((60, 40)).save("images/a cat.png")
    out = done("images/a cat.png", "images/00002.png", "--attention", "maps", "--json").out
    for row in json.loads(out):
        stem = Path(row["image"]).stem.replace(" ", "_")
        folder = Path("maps") / f"{stem}-{row['sha256'][:8]}"
        words = row["captions"][0]["words"]
        assert sorted(os.listdir(folder)) == [f"{i:02d}-{word}.png" for i, word in enumerate(words, 1)]
        shapes = {Image.open(file).size for file in folder.iterdir()}
        assert len(shapes) == 1
    pages = [np.asarray(Image.open(file).convert("RGB"), int) for file in sorted(folder.iterdir())]
    assert np.abs(pages[0] - pages[-1]).mean() > 1  # another word, another map


def test_a_model_without_attention_is_refused_before_anything_is_written(images, done, tmp_path, capsys):
    blind = lively_checkpoint(tmp_path / "blind.safetensors", "show-tell")
    arguments = ["caption", "images", "--attention", "maps", *TABLES, "--html", "p.html", "--model", str(blind)]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "--attention needs one model with attention; type --model showtell-attend, or leave it out" in said
    assert sorted(os.listdir()) == ["blind.safetensors", "images"]
    assert main(["caption", "images", "--html", "p.html", "--model", str(blind)]) == 0
    assert "data-map=" not in Path("p.html").read_text()


def test_a_map_covers_what_the_network_saw():
    assert Transform(resize=(32, 32)).region(60, 40) == (0, 0, 1, 1)
    assert Transform(resize=32).region(60, 40) == (0, 0, 1, 1)
    left, top, right, bottom = Transform(resize=40, crop=30).region(80, 40)
    assert (left, top, right, bottom) == (25 / 80, 5 / 40, 55 / 80, 35 / 40)
    weights = spread_map(np.array([[0.1, 0.0], [0.0, 0.4]]), (80, 40), (left, top, right, bottom))
    assert weights.shape == (40, 80)
    assert weights.max() == pytest.approx(1, abs=0.1)
    assert not weights[:5].any()
    assert not weights[:, :25].any()
    rows, columns = np.nonzero(weights > 0.5)
    assert rows.min() > 18
    assert columns.min() > 38


def test_a_page_has_a_map_for_every_word(images, model, done, tmp_path):
    cropping = with_transform(model, tmp_path / "crop.safetensors", Transform(resize=40, crop=32))
    for path in (model, cropping):
        main(["caption", "images", "--html", "page.html", "--beam-size", "3", "--model", str(path)])
        page = Path("page.html").read_text()
        maps = re.findall(r'data-map="(\d+) ([0-9a-f]+)"', page)
        captions = [load(path, "cpu").caption(image, beam_size=3)[0] for image in sorted(images.iterdir())]
        assert len(maps) == sum(len(caption.words) for caption in captions)
        assert all("f" in cells and len(cells) % int(columns) == 0 for columns, cells in maps)
        cards = page.split('<li class="card')[1:]
        assert max(len("".join(re.findall(r"data-map=.*?>", card))) for card in cards) < 10_000


def test_a_page_shows_the_map_of_the_word_under_the_pointer_or_in_focus(images, done, chromium, tmp_path):
    from playwright.sync_api import sync_playwright

    Image.open("images/00001.png").resize((96, 48)).save("images/00001.png")
    done(images, "--html", "page.html")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto((tmp_path / "page.html").as_uri())
        card = page.locator(".card").nth(1)
        word = card.locator("[data-map]").first
        assert page.locator(".map").count() == 0
        word.hover()
        canvas, image = card.locator("canvas.map").bounding_box(), card.locator("img").bounding_box()
        assert canvas["width"] == pytest.approx(2 * canvas["height"], rel=0.03)  # over the image alone
        assert canvas["x"] >= image["x"] - 1
        assert canvas["y"] >= image["y"] - 1
        assert canvas["x"] + canvas["width"] <= image["x"] + image["width"] + 1
        page.locator("h1").hover()
        assert page.locator(".map").count() == 0
        word.focus()
        assert page.locator(".map").count() == 1
        _, cells = word.get_attribute("data-map").split()
        script = "(map) => [...map.getContext('2d').getImageData(0, 0, map.width, map.height).data]"
        drawn = page.locator(".map").evaluate(script)
        found = [round(red / 17) for red in drawn[::4]]
        assert found == pytest.approx([int(digit, 16) for digit in cells], abs=1)
        word.blur()
        assert page.locator(".map").count() == 0
        assert errors == []
        browser.close()
