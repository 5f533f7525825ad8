"""The command line: what each command prints, writes and returns, and the one sentence for every mistake."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_captioner import MAX_LEN, VOCAB, lively_checkpoint, save_images

from showtell import __version__, datasets, java_metrics, synthetic
from showtell.__main__ import main
from showtell.captioner import load
from showtell.checkpoint import load_checkpoint, save_checkpoint
from showtell.decoders import DECODERS
from showtell.errors import print_text
from showtell.model import CaptionModel
from showtell.recipes import RECIPES, Recipe
from showtell.scoring import read_captions
from showtell.transforms import IMAGENET, BrokenImageError, frames, read_image

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
COMMANDS = ("demo", "train", "evaluate", "calibrate", "score", "caption", "bulk", "shard", "app", "export", "push")
COMMANDS += ("import-legacy",)
TINY = ["--encoder", "tiny", "--set", "resize=32", "squash=true", "hidden_size=16", "embed_size=16", "warmup=2"]
TINY += ["threshold=1", "dropout=0"]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch, tmp_path):
    """Run on the CPU, in a folder of its own, where a command writes its default outputs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def without_java(monkeypatch):
    """METEOR's jar takes seconds to start, and has tests of its own."""

    def absent() -> str:
        raise java_metrics.JavaMetricError("no java in this test")

    monkeypatch.setattr(java_metrics, "_java", absent)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return lively_checkpoint(tmp_path_factory.mktemp("model") / "lively.safetensors", "transformer")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of four images, one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("images")
    paths = save_images(folder, 4)
    (folder / "deep").mkdir()
    paths[3].rename(folder / "deep" / "last.png")
    return folder


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> Path:
    """Twenty drawn images and captions.csv, with two captions per image and a column of splits."""
    folder = tmp_path_factory.mktemp("my")
    save_images(folder / "images", 20)
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for i in range(20):
            split = "train" if i < 14 else "val" if i < 18 else "test"
            for sentence in synthetic.describe(synthetic.scene(i, 0, "test"), n=2):
                writer.writerow([f"{i:05d}.png", sentence, split])
    return folder


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, own_data) -> Path:
    """One epoch on the user's own images."""
    out = tmp_path_factory.mktemp("runs") / "my"
    assert main([*train(own_data, out), "--epochs", "1"]) == 0
    return out


def train(data: Path, out: Path) -> list[str]:
    return ["train", "--dataset", "folder", "--data-dir", str(data), "--out", str(out), "--batch-size", "4", *TINY]


def python(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([sys.executable, *arguments], **options)


@pytest.fixture
def done(capsys):
    """A function that runs a command, which must return `code`, and returns what was printed."""

    def run(arguments: list, code: int = 0):
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        return capsys.readouterr()

    return run


@pytest.fixture
def refused(done):
    """A function that runs a command that must fail with one sentence that contains these words, and no output."""

    def run(arguments: list, *words: str, code: int = 2) -> str:
        printed = done(arguments, code)
        assert printed.out == ""
        lines = printed.err.strip().splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("showtell: ")
        assert "Traceback" not in lines[0]
        assert [word for word in words if word not in lines[0]] == [], lines[0]
        return lines[0]

    return run


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_help_and_version_answer_without_torch():
    code = """
import sys
from showtell.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(stop.code, sorted({"torch", "torchvision", "PIL", "matplotlib", "safetensors"} & set(sys.modules)))
"""
    for arguments, expected in (["--help"], "COMMAND"), (["train", "--help"], "--recipe"), (["--version"], __version__):
        result = python("-c", code, *arguments)
        assert result.stdout.splitlines()[-1] == "0 []", result.stderr
        assert expected in result.stdout


def test_the_module_runs(tmp_path):
    result = python("-m", "showtell", "--version", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"showtell {__version__}\n", "")
    result = python("-m", "showtell", "caption", "absent.jpg", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "showtell: there is no absent.jpg; give images, or folders of images\n"
    assert leftovers(tmp_path) == ["here"]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_command_has_a_short_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"] if command else ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"usage: showtell {command or ''}" in text
    assert len(text.splitlines()) < 70
    listed = {None: COMMANDS, "train": RECIPES}.get(command, ())
    assert all(name in "".join(text.split()) for name in listed)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND", "showtell --help"]),
        (["paint"], ["'paint'", "caption", "score", "showtell --help"]),
        (["caption"], ["IMAGE", "showtell caption --help"]),
        (["caption", "a.jpg", "--beam", "big"], ["--beam-size", "'big'", "showtell caption --help"]),
        (["caption", "a.jpg", "--loud"], ["--loud", "showtell --help"]),
        (["caption", "a.jpg", "--jsonl", "c.csv", "--csv", "c.csv"], ["c.csv is named for two outputs", "of its own"]),
        (["caption", "a.jpg", "--batch-size", "0"], ["--batch-size", "'0'", "give 1 or more"]),
        (["caption", "a.jpg", "--workers", "-2"], ["--workers", "'-2'", "give 1 or more"]),
        (["caption", "'*.jpg"], ["no image matches '*.jpg", "give images"]),
        (["caption", "a.jpg", "--attention", "/dev/null"], ["/dev/null is not a folder", "choose another path"]),
        (["caption", "a.jpg", "--n-best", "x"], ["--n-best", "'x'", "showtell caption --help"]),
        (["caption", "a.jpg", "--sample", "--beam-size", "3"], ["--sample", "--beam-size", "leave one of them out"]),
        (["caption", "a.jpg", "--temperature", "0.5"], ["--temperature", "add --sample"]),
        (["caption", "a.jpg", "--top-k", "5"], ["--top-k", "add --sample"]),
        (["caption", "a.jpg", "--top-p", "0.5"], ["--top-p", "add --sample"]),
        (["caption", "a.jpg", "--sample", "--temperature", "nan"], ["--temperature", "'nan' is not a number"]),
        (["caption", "a.jpg", "--length-penalty", "much"], ["--length-penalty", "'much' is not a number"]),
        (["caption", ""], ["an argument is empty", "give it a value"]),
        (["caption", "a.jpg", "--n-best", "9" * 20], ["--n-best", "is not a whole number from -2e9 to 2e9"]),
        (["caption", "a.jpg", "--csv", "/dev/null/x.csv"], ["/dev/null is not a folder", "choose another path"]),
        (["caption", "/dev/zero"], ["/dev/zero is no regular file", "give images, or folders of images"]),
        (["caption", "a.jpg", "--csv", "/dev/null"], ["/dev/null is no regular file", "name the file"]),
        (["caption", "a.jpg", "--csv", "."], [". is a folder", "name the file"]),
        (["train"], ["the run folder is missing", "--out runs/NAME"]),
        (["train", "--out", "r", "--features", "f", "--no-features"], ["--no-features", "not allowed with"]),
        (["train", "--out", "r", "--seed", "-1"], ["--seed", "'-1'", "from 0 to 4294967295"]),
        (["train", "--out", "r", "--seed", "x"], ["--seed", "'x'", "a whole number"]),
        (["train", "--out", "r", "--device", "abacus"], ["--device abacus", "give cpu"]),
        (["train", "--out", "r", "--epochs", "3", "--set", "epochs=4"], ["--epochs 3", "epochs=4", "give one"]),
        (["train", "--out", "r", "--set", "lr=1", "--set", "lr=2"], ["lr=1", "lr=2", "give one"]),
        (["train", "--out", "r", "--set", "lr"], ["--set lr gives no value", "--set lr=VALUE"]),
        (["train", "--out", "r", "--set", "lr=fast"], ["lr='fast'", "is not a number"]),
        (["train", "--out", "/dev/null"], ["/dev/null is not a folder", "choose another path"]),
        (["train", "--out", "r", "--lr", "inf"], ["--lr", "'inf' is not a number"]),
        (["train", "--out", "r", "--init", "/dev/zero"], ["/dev/zero is no regular file", "give a checkpoint"]),
        (["train", "--out", "r", "--set", "speed=1"], ["'speed'", "batch_size", "clip", "warmup"]),
        (["train", "--out", "r", "--recipe", "cake"], ["no recipe 'cake'", *RECIPES]),
        (["train", "--out", "r", "--decoder", "rnn"], ["no decoder 'rnn'", *DECODERS]),
        (["train", "--out", "r", "--best-by", "luck"], ["best_by='luck'", "CIDEr", "loss"]),
        (["train", "--out", "r", "--dataset", "cocoa"], ["no data set 'cocoa'", "coco", "folder", "synthetic"]),
        (["train", "--out", "r", "--dataset", "coco"], ["coco needs the folder", "--data-dir data/coco"]),
        (["train", "--out", "r", "--epochs", "0"], ["epochs=0", "above 0"]),
        (["train", "--out", "r", "--subset", "-5"], ["subset=-5", "0 or more"]),
        (["train", "--out", "r", "--patience", "-1"], ["patience=-1", "0 or more"]),
        (["train", "--out", "r", "--resume"], ["r holds no run to resume", "leave --resume out"]),
        (["evaluate", "--html", "."], [". is a folder", "name the file"]),
        (["evaluate", "--out", "/dev/null"], ["/dev/null is not a folder", "choose another path"]),
        (["evaluate", "--model", "absent"], ["no model absent", "give a checkpoint, run folder"]),
        (["evaluate", "--model", "/dev/zero"], ["/dev/zero is no regular file", "give a checkpoint"]),
        (["export", "--model", "/dev/zero", "--format", "half", "--out", "m"], ["/dev/zero is no regular file"]),
        (["score", "r.json", "absent.json"], ["no file at absent.json", "check the folder"]),
        (["export", "--format", "old"], ["invalid choice: 'old'", "showtell export --help"]),
        (["import-legacy", "e.pkl", "d.pkl", "v.pkl", "--out", "m.safetensors"], ["no vocabulary at v.pkl"]),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_a_mistake_in_the_flags_gets_one_sentence_and_writes_nothing(arguments, words, refused):
    refused(arguments, *words)
    assert leftovers(Path()) == []


def test_a_closed_pipe_ends_a_command_silently():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from showtell import __main__ as program

def talk(_):
    while True:
        print("words " * 1000)

program.COMMANDS["caption"] = talk
sys.exit(program.main(["caption", "a.jpg"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141


def test_ctrl_c_outside_training_ends_in_one_word(model, images, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("showtell.captioner.load", interrupted)
    assert main(["caption", str(images), "--model", str(model)]) == 130
    assert capsys.readouterr().err == "showtell: stopped\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "Full", "c.csv"), "cannot write c.csv: Full; free space or choose another path"),
        (
            OSError(errno.EACCES, "Denied", "c.csv"),
            "cannot open c.csv: Denied; change the permissions or choose another path",
        ),
        (OSError(errno.EROFS, "Read-only file system"), "cannot write: Read-only file system; choose another path"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."),
            "out of memory; give a smaller --batch-size or --beam-size, or smaller images",
        ),
        (
            UnicodeEncodeError("utf-8", "run\udce9", 3, 4, "surrogates not allowed"),
            r"'run\udce9' is not valid Unicode; rename the file or folder",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_error_of_the_system_is_one_sentence(error, sentence, model, images, monkeypatch, refused):
    def fails(*_):
        raise error

    monkeypatch.setattr("showtell.outputs.atomic_path", fails)
    arguments = ["caption", str(images / "00000.png"), "--model", str(model), "--csv", "captions.csv"]
    assert refused(arguments) == f"showtell: {sentence}"


def test_a_defect_of_the_program_keeps_its_traceback(images, monkeypatch):
    def fails(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("showtell.captioner.load", fails)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        main(["caption", str(images)])


def caption(model: Path, *arguments: object) -> list[str]:
    return ["caption", *map(str, arguments), "--model", str(model), "--beam-size", "3"]


def test_one_image_prints_its_caption_alone(model, images, done):
    printed = done(caption(model, images / "00001.png"))
    expected = load(model, "cpu").caption(images / "00001.png", beam_size=3)[0]
    assert printed.out == expected.text + "\n"
    assert printed.err == ""


def test_several_images_and_folders_name_each(model, images, done):
    out = done(caption(model, images / "00002.png", images)).out.splitlines()
    names = ["00002.png", "00000.png", "00001.png", "deep/last.png"]  # each once
    captioner = load(model, "cpu")
    paths = [images / name for name in names]
    assert out == [f"{path}: {captioner.caption(path, beam_size=3)[0].text}" for path in paths]


def test_json_is_one_document_and_nothing_else(model, images, done):
    printed = done([*caption(model, images), "--n-best", "2", "--json"])
    assert printed.err == ""
    rows = json.loads(printed.out)
    captioner = load(model, "cpu")
    assert [row["image"] for row in rows] == [str(p) for p in sorted(images.rglob("*.png"))]
    for row in rows:
        assert list(row) == ["image", "sha256", "captions"]
        assert row["sha256"] == hashlib.sha256(Path(row["image"]).read_bytes()).hexdigest()
        expected = captioner.caption(row["image"], beam_size=3, n_best=2)
        assert [c["text"] for c in row["captions"]] == [c.text for c in expected]
        for found, known in zip(row["captions"], expected, strict=True):
            assert list(found) == ["text", "score", "words", "word_probs"]
            assert found["words"] == known.words
            assert found["score"] == pytest.approx(known.score, abs=2e-4)
            assert found["word_probs"] == pytest.approx(known.word_probs, abs=2e-4)


def test_csv_has_a_row_per_caption(model, images, done, tmp_path):
    target = tmp_path / "new" / "captions.csv"
    printed = done([*caption(model, images), "--n-best", "2", "--csv", str(target)])
    assert printed.out == ""
    assert printed.err == f"note: the folder {target.parent} is new\n4 images captioned in {target}\n"
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    captioner = load(model, "cpu")
    expected = [(p, c) for p in sorted(images.rglob("*.png")) for c in captioner.caption(p, beam_size=3, n_best=2)]
    assert [(row["image"], row["caption"]) for row in rows] == [(str(p), c.text) for p, c in expected]
    assert [float(row["score"]) for row in rows] == pytest.approx([c.score for _, c in expected], abs=2e-4)
    assert leftovers(target.parent) == ["captions.csv"]


def test_html_shows_images_captions_and_alternatives(model, images, done, tmp_path):
    target = tmp_path / "page.html"
    assert done([*caption(model, images), "--n-best", "3", "--html", target]).out == ""
    page = target.read_text()
    captions = load(model, "cpu").caption(images / "deep" / "last.png", beam_size=3, n_best=3)
    others = [c.text for c in captions[1:]]
    assert page.count('<li class="card') == 4
    assert page.count("data:image/") == 4
    assert "last.png" in page
    assert f"Captions by {model.stem} (PyTorch, " in page
    assert f"Written by showtell {__version__}." in page
    assert all(re.search(f"<li[^>]*>{text}</li>", page) for text in others)
    assert len(others) == 2
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_model_is_also_a_run_folder(finished_run, images, done):
    expected = load(finished_run / "best.safetensors", "cpu").caption(images / "00000.png", beam_size=3)[0]
    assert done(caption(finished_run, images / "00000.png")).out == expected.text + "\n"


def test_sampled_captions_are_those_of_the_captioner(model, images, done):
    command = ["caption", str(images / "00000.png"), "--model", str(model), "--sample", "--n-best", "3"]
    command += ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "12"]
    printed = {}
    for seed in (4, 5):
        printed[seed] = done([*command, "--seed", str(seed)]).out.splitlines()
    options = {"n_best": 3, "temperature": 0.8, "top_p": 0.9, "top_k": 12, "seed": 4}
    assert printed[4] == [c.text for c in load(model, "cpu").caption(images / "00000.png", "sample", **options)]
    assert printed[4] != printed[5]
    assert len(printed[4]) == 3


def test_decoding_options_reach_the_decoder(model, images, done):
    flags = {"--min-len": 4, "--max-len": 5, "--no-repeat-ngram": 1, "--length-penalty": 0.0, "--beam-size": 2}
    arguments = [part for pair in flags.items() for part in pair]
    printed = done(["caption", images / "00001.png", "--model", model, "--json", *arguments])
    (row,) = json.loads(printed.out)[0]["captions"]
    options = {name.strip("-").replace("-", "_"): value for name, value in flags.items()}
    (expected,) = load(model, "cpu").caption(images / "00001.png", **options)
    assert row == expected.to_dict()
    assert 4 <= len(row["words"]) == len(set(row["words"])) <= 5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--beam-size", "0"], ["beam_size=0", "from 1 up"]),
        (["--n-best", "0"], ["n=0", "from 1 up"]),
        (["--sample", "--temperature", "0"], ["temperature=0", "temperature > 0"]),
        (["--sample", "--top-p", "1.5"], ["top_p=1.5", "top_p <= 1"]),
        (["--min-len", "5", "--max-len", "2"], ["min_len=5", "max_len=2"]),
        (["--length-penalty", "-1"], ["length_penalty=-1.0", "0 disables"]),
        (["--no-repeat-ngram", "-1"], ["no_repeat_ngram=-1", "0 disables"]),
    ],
    ids=" ".join,
)
def test_decoding_options_out_of_range_are_refused(flags, words, model, images, refused):
    refused(["caption", images, "--model", model, *flags, "--csv", "captions.csv"], *words)
    assert leftovers(Path()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are not UTF-8")
def test_a_file_name_that_is_not_utf8_is_escaped_or_kept(model, images, done, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(images / "00000.png", folder / name)
    (folder / os.fsdecode(b"\xff.png")).write_text("not an image")
    text = load(model, "cpu").caption(images / "00000.png", beam_size=3)[0].text
    printed = done(caption(model, folder), 1)
    assert printed.out == f"{folder}/caf\\xe9.png: {text}\n"
    assert f"{folder}/\\xff.png cannot be read" in printed.err

    printed = done([*caption(model, folder), "--json"], 1).out
    assert "caf\\udce9.png" in printed
    good, bad = json.loads(printed.encode("utf-8"))
    assert os.fsencode(good["image"]) == os.fsencode(folder / name)
    assert os.fsencode(bad["image"]).endswith(b"/\xff.png")
    assert bad["captions"] == []
    assert "it holds text" in bad["error"]

    assert main([*caption(model, folder), "--csv", "captions.csv"]) == 1
    rows = Path("captions.csv").read_bytes().splitlines()
    assert rows[1].startswith(os.fsencode(folder / name) + b"," + text.encode())

    assert main([*caption(model, folder), "--html", "page.html"]) == 1
    assert "caf\\xe9.png" in Path("page.html").read_text("utf-8")


def test_a_terminal_without_the_letters_of_a_caption_gets_escapes():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_text("süß \N{SNOWMAN}", stream)
    assert stream.buffer.getvalue() == b"s\\xfc\\xdf \\u2603\n"


BAD_IMAGES = {
    "text.jpg": (lambda path, image: path.write_text("a shopping list"), ["it holds text", "give a JPEG, PNG"]),
    "empty.jpg": (lambda path, image: path.touch(), ["it is empty (0 bytes)", "give a JPEG, PNG"]),
    "cut.png": (lambda path, image: path.write_bytes(image[:150]), ["damaged or cut short", "give a JPEG, PNG"]),
    "pipe.jpg": (lambda path, image: os.mkfifo(path), ["no regular file"]),
}


@pytest.mark.parametrize("n", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_broken_images_of_a_folder_are_listed_and_the_others_captioned(n, model, images, done, tmp_path):
    folder, target = tmp_path / "many", tmp_path / "captions.csv"
    originals = save_images(folder, 20)
    for i in range(20, n):
        os.link(originals[i % 20], folder / f"{i:05d}.png")
    for name, (make, _) in BAD_IMAGES.items():
        make(folder / name, originals[0].read_bytes())
    printed = done([*caption(model, folder), "--csv", str(target)], 1)
    assert printed.out == ""
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).name for row in rows] == [f"{i:05d}.png" for i in range(n)]
    assert all(row["caption"] == rows[i % 20]["caption"] for i, row in enumerate(rows))
    assert len({row["caption"] for row in rows}) > 3
    *said, total = [line for line in printed.err.splitlines() if line.startswith("showtell: ")]
    assert total == f"showtell: {len(BAD_IMAGES)} of {n + len(BAD_IMAGES)} images could not be read"
    for (name, (_, words)), line in zip(sorted(BAD_IMAGES.items()), said, strict=True):
        assert line.startswith(f"showtell: {folder / name} ")
        assert all(word in line for word in words)


def test_one_image_that_cannot_be_read(model, refused, tmp_path):
    (tmp_path / "note.jpg").write_text("a shopping list")
    refused(caption(model, tmp_path / "note.jpg"), "note.jpg cannot be read: it holds text", code=1)


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_of_an_animation_the_first_frame_is_captioned(suffix, model, images, done, tmp_path):
    pages = [Image.open(path).convert("RGB") for path in (images / "00001.png", images / "00000.png")]
    path = tmp_path / f"moving{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    pages[0].save(path, save_all=True, append_images=pages[1:], **options)
    pages[0].save(tmp_path / f"still{suffix}", **options)
    printed = done(caption(model, path))
    assert printed.err == f"note: {path} has 2 frames; its first is captioned\n"
    still = done(caption(model, tmp_path / f"still{suffix}"))
    assert (still.out, still.err) == (printed.out, "")


def readable(function, data: bytes) -> bool:
    try:
        return bool(function(data) is not None)
    except BrokenImageError:
        return False


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", [".gif", ".tif"])
def test_an_image_with_a_damaged_later_frame_does_not_stop_the_others(suffix, model, images, done, tmp_path):
    pages = [Image.open(images / f"0000{i}.png").convert("RGB") for i in range(3)]
    path = tmp_path / f"cut{suffix}"
    pages[0].save(path, save_all=True, append_images=pages[1:])
    data = path.read_bytes()
    starts = (data[:n] for n in range(len(data) // 4, len(data)))
    path.write_bytes(next(start for start in starts if readable(read_image, start) and not readable(frames, start)))
    printed = done(caption(model, path, images / "00001.png"), 1)
    assert printed.err.splitlines()[-1] == f"note: {path} is damaged after its first frame, which is captioned"
    captioner = load(model, "cpu")
    expected = [f"{p}: {captioner.caption(p, beam_size=3)[0].text}" for p in (path, images / "00001.png")]
    assert printed.out.splitlines() == expected


def test_an_image_or_folder_that_does_not_exist(model, refused, tmp_path):
    refused(caption(model, "absent.jpg"), "there is no absent.jpg", "give images, or folders of images")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "notes.txt").touch()
    refused(caption(model, bare), f"the folder {bare} holds no images", ".jpg", ".png", "name another")


def altered(model: Path, target: Path, change=None, weight: float | None = None) -> None:
    """Save the model's file with another header, which `change` alters in place, or another weight."""
    with safe_open(model, "pt") as file:
        header = json.loads(file.metadata()["showtell"])
    tensors = load_file(model)
    if change:
        change(header)
    if weight is not None:
        next(iter(tensors.values())).view(-1)[0] = weight
    save_file(tensors, target, metadata={"showtell": json.dumps(header)})


BAD_MODELS = {
    "truncated": (
        lambda model, target: target.write_bytes(model.read_bytes()[: model.stat().st_size // 2]),
        ["damaged or", "fetch or save it again"],
    ),
    "newer": (
        lambda model, target: altered(model, target, lambda header: header.update(format=99)),
        ["format 99", "pip install --upgrade showtell"],
    ),
    "unfitting": (
        lambda model, target: altered(model, target, lambda header: header["vocabulary"]["words"].append("trombone")),
        [f"a vocabulary of {len(VOCAB) + 1} words and a model ", str(len(VOCAB)), "save it again"],
    ),
    "not a number": (lambda model, target: altered(model, target, weight=math.nan), ["damaged"]),
    "infinite": (lambda model, target: altered(model, target, weight=math.inf), ["damaged"]),
    "text": (
        lambda model, target: target.write_text("not a model"),
        ["not a checkpoint", "give a file saved by showtell train"],
    ),
    "a pipe": (lambda model, target: os.mkfifo(target), ["is no regular file", "give a checkpoint, run folder"]),
    "absent": (lambda model, target: None, ["there is no model", "give a checkpoint, run folder"]),
}


@pytest.mark.parametrize("command", ["caption", "evaluate", "export"])
@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_checkpoint_that_cannot_be_used(kind, command, model, images, refused, tmp_path):
    path = tmp_path / "m.safetensors"
    make, words = BAD_MODELS[kind]
    make(model, path)
    before = leftovers(tmp_path)
    arguments = {
        "caption": ["caption", images, "--csv", "out.csv"],
        "evaluate": ["evaluate", "--html", "out.html"],
        "export": ["export", "--format", "legacy", "--out", "exported"],
    }[command]
    refused([*arguments, "--model", path], str(path), *words)
    assert leftovers(tmp_path) == before


def test_a_run_writes_its_files_and_prints_how_to_caption(own_data, tmp_path, done):
    out = tmp_path / "a run"
    printed = done([*train(own_data, out), "--epochs", "2", "--decoder", "attend"])
    assert "14 images with 28 captions to train on, 4 images to validate" in printed.err
    assert f"showtell caption photo.jpg --model '{out / 'best.safetensors'}'" in printed.err
    assert "Epoch [2/2]" in printed.out + printed.err
    made = "best.safetensors curve.png last.safetensors lock resume.pt run.json training_log.jsonl training_log.txt"
    assert sorted(os.listdir(out)) == made.split()
    assert leftovers(Path()) == []  # the tiny backbone learns, and is not cached
    settings = json.loads((out / "run.json").read_text())
    assert settings["recipe"] == Recipe(
        encoder="tiny", decoder="attend", resize=32, squash=True, hidden_size=16, embed_size=16, warmup=2, threshold=1,
        dropout=0, batch_size=4, epochs=2,
    ).to_dict()  # fmt: skip
    assert (settings["run"]["dataset"], settings["run"]["seed"]) == ("folder", 0)
    saved = load_checkpoint(out / "best.safetensors")
    assert saved.model.config["decoder"]["name"] == "attend"
    assert saved.meta["recipe"] == settings["recipe"]


def test_a_dry_run_describes_the_run_and_writes_nothing(own_data, tmp_path, done):
    before = leftovers(tmp_path)
    arguments = ["train", "--dataset", "folder", "--data-dir", str(own_data), "--out", str(tmp_path / "run")]
    printed = done([*arguments, "--encoder", "resnet18", "--set", "threshold=1", "warmup=0", "--dry-run"])
    assert printed.out == ""
    assert "14 images with 28 captions to train on, 4 images to validate" in printed.err
    assert "resnet18 + show-tell" in printed.err
    assert "note:" not in printed.err  # nor were weights looked for
    assert leftovers(tmp_path) == before


def test_missing_images_are_reported(own_data, tmp_path, done, refused):
    data = tmp_path / "my"
    shutil.copytree(own_data, data)
    (data / "images" / "00002.png").unlink()
    said = done([*train(data, tmp_path / "run"), "--dry-run"]).err
    assert "note: 1 images of train are not there and are left out: 00002.png\n" in said
    assert "folder: 13 images with 26 captions" in said
    for i in range(4):
        (data / "images" / f"{i:05d}.png").unlink(missing_ok=True)
    refused(train(data, tmp_path / "run"), "4 of 14 images", "at most 1 may be missing", "add them")


def test_self_critical_training_of_a_trained_model(own_data, finished_run, tmp_path, done, refused):
    arguments = ["train", "--dataset", "folder", "--data-dir", str(own_data), "--out", str(tmp_path / "run")]
    settings = ["--epochs", "1", "--batch-size", "4", "--set", "objective=self-critical", "group=image"]
    done([*arguments, "--init", str(finished_run), *settings])
    done(["caption", str(own_data / "images" / "00000.png"), "--model", str(tmp_path / "run")])
    arguments[-1] += "-2"
    arguments += ["--recipe", "flickr8k-attend-self-critical", "--dry-run"]
    refused(arguments, "improves a trained model and keeps its words; add --init MODEL")
    refused([*arguments, "--init", str(finished_run)], "train with its recipe and settings")


def test_a_recipe_and_single_settings_add_up(own_data, tmp_path, done):
    arguments = ["train", "--dataset", "folder", "--data-dir", own_data, "--out", tmp_path / "run", "--dry"]
    arguments += ["--recipe", "demo"]
    said = done([*arguments, "--set", "epochs=3", "--set", "batch_size=5"]).err
    assert "tiny + transformer" in said
    assert "3 epochs of 3 steps" in said  # of five images each
    said = done([*arguments, "--decoder", "every-step", "--subset", "6"]).err
    assert "tiny + every-step" in said
    assert "6 images with 12 captions" in said


def test_a_run_that_starts_from_a_model_takes_its_recipe(own_data, finished_run, tmp_path, done, refused):
    out = tmp_path / "run"
    arguments = ["train", "--dataset", "folder", "--data-dir", str(own_data), "--out", str(out), "--init"]
    said = done([*arguments, str(finished_run), "--dry-run"]).err
    assert "tiny + show-tell" in said
    assert re.search(r"note: .* has (\d+) words: \1 are kept with their weights, 0 dropped, and 0 added\n", said)
    said = done([*arguments, str(finished_run), "--dry-run", "--new-vocabulary", "--set", "threshold=4"]).err
    assert re.search(r"[1-9]\d* dropped, and 0 added; its perplexity .* cannot be compared\n", said)
    refused(
        [*arguments, str(finished_run), "--set", "tokenizer=ptb"], "add --set tokenizer=unicode", "--new-vocabulary"
    )
    refused([*arguments, str(finished_run), "--decoder", "attend"], "decoder name=show-tell", "name=attend")
    assert main([*arguments, str(finished_run)]) == 0
    assert main([*arguments, str(finished_run), "--resume"]) == 0  # typed again as it was, and with nothing left to do
    refused([*arguments, "nonesuch"], "there is no model nonesuch")


def test_resume_takes_the_flags_of_the_run_and_no_others(own_data, finished_run, done, refused):
    again = [*train(own_data, finished_run), "--epochs", "1", "--resume"]
    before = (finished_run / "best.safetensors").read_bytes()
    assert "the best epoch was 1" in done(again).err  # with nothing left to do
    assert main(["train", "--out", str(finished_run), "--resume"]) == 0
    assert (finished_run / "best.safetensors").read_bytes() == before
    short = ["train", "--out", finished_run, "--resume"]
    refused([*short, "--epochs", "9", "--set", "lr=0.1"], "lr from 0.0005 to 0.1", "leave them out", "another --out")
    refused([*short, "--recipe", "demo"], "decoder from show-tell to transformer", "optimizer from adam")
    refused([*short, "--seed", "4"], "seed from 0 to 4")
    refused([*short, "--set", "lr=0.1"], "lr from 0.0005 to 0.1")
    refused([*short, "--dataset", "coco"], "dataset from folder to coco")
    refused([*short, "--subset", "5", "--best-by", "loss"], "subset from 0 to 5", "best_by from CIDEr to loss")


def test_resume_with_more_epochs_extends_a_finished_run(own_data, tmp_path, done):
    out = tmp_path / "run"
    done([*train(own_data, out), "--epochs", "1"])
    printed = done(["train", "--out", out, "--resume", "--epochs", "2"])
    assert "Epoch [2/2]" in printed.out + printed.err
    assert re.search(r"validation perplexity [\d.]+ over \d+ words, CIDEr", printed.err)
    assert json.loads((out / "run.json").read_text())["recipe"]["epochs"] == 2


def test_resuming_keeps_the_settings_of_the_run(own_data, tmp_path, refused):
    """Flags that are left out mean the run's own settings, and settings of a later version their defaults."""
    out = tmp_path / "run"
    assert main([*train(own_data, out), "--epochs", "1", "--no-features", "--patience", "3", "--workers", "0"]) == 0
    settings = json.loads((out / "run.json").read_text())
    del settings["recipe"]["attention_cost"]
    (out / "run.json").write_text(json.dumps(settings))
    resume = ["train", "--out", str(out), "--resume"]
    refused([*resume, "--set", "attention_cost=1"], "attention_cost from 0.0 to 1.0")
    assert main(resume) == 0
    settings = json.loads((out / "run.json").read_text())["run"]
    assert (settings["features"], settings["patience"]) == ("", 3)
    assert main([*resume, "--patience", "5"]) == 0
    assert json.loads((out / "run.json").read_text())["run"]["patience"] == 5


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to another process")
def test_ctrl_c_saves_and_resume_finishes(own_data, tmp_path, refused):
    out = tmp_path / "run"
    arguments = [*train(own_data, out), "--epochs", "3", "--batch-size", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "showtell", *arguments]
    run = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "run.json").exists() and time.monotonic() < deadline:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 130, said
    assert "Traceback" not in said
    sentence = said.strip().splitlines()[-1]
    assert sentence.startswith("showtell: stopped in epoch 1 after step ")
    command = f"showtell train --resume --out {out}"
    assert sentence.endswith(f"and saved; to continue, type: {command}")
    assert not list(out.glob(".*"))  # no half-written file
    assert not (out / "last.safetensors").exists()
    refused(arguments, "already holds a run", "add --resume")
    assert main(command.split()[1:]) == 0
    records = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records if "val_loss" in record] == [1, 2, 3]
    assert load_checkpoint(out / "last.safetensors").meta["epoch"] == 3


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("coco", ["captions_train2017.json", "COCO's annotations/"]),
        ("karpathy", ["no dataset_*.json", "annotations"]),
        ("flickr8k", ["Flickr_8k.trainImages.txt", "check the folder"]),
        ("folder", ["no csv, tsv, json or jsonl file", "put one captions.csv there"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_data_folder_without_annotations(command, dataset, words, model, refused, tmp_path):
    (tmp_path / "data").mkdir()
    arguments = [command, "--dataset", dataset, "--data-dir", tmp_path / "data", "--out", tmp_path / "out"]
    if command == "evaluate":
        arguments += ["--model", model, "--split", "train"]
    refused(arguments, str(tmp_path / "data"), *words)
    arguments[4] = tmp_path / "nowhere"
    refused(arguments, f"there is no folder {tmp_path / 'nowhere'}", f"that holds the {dataset} data")
    assert leftovers(tmp_path) == ["data", "here"]


def evaluate(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    arguments = ["evaluate", "--model", model, "--dataset", "folder", "--data-dir", data, "--split", "train"]
    return [*map(str, arguments), "--beam-size", "2", "--out", str(out), *more]


@pytest.mark.usefixtures("without_java")
def test_evaluate_json_agrees_with_score_on_its_captions(model, own_data, done, tmp_path):
    out = tmp_path / "val"
    document = json.loads(done([*evaluate(model, own_data, out), "--json"]).out)
    assert list(document) == ["model", "dataset", "split", "images", "beam_size", "scores", "captions"]
    assert document["model"] == str(model)
    assert (document["dataset"], document["split"], document["images"]) == ("folder", "train", 14)
    assert document["captions"] == str(out / "captions.json")
    assert leftovers(out) == ["captions.json"]

    rows = json.loads((out / "captions.json").read_text())
    data = datasets.load("folder", own_data, "train")
    assert [row["image_id"] for row in rows] == data.image_ids  # each once, in order
    captioner = load(model, "cpu")
    expected = [captioner.caption(data.path(i), beam_size=2)[0].text for i in range(len(data))]
    assert [row["caption"] for row in rows] == expected

    references = tmp_path / "references.json"
    references.write_text(json.dumps(dict(zip(data.image_ids, data.captions, strict=True))))
    scored = json.loads(done(["score", str(references), str(out / "captions.json"), "--json"]).out)["captions.json"]
    found = document["scores"]
    assert found.pop("perplexity") > 1
    assert found["health"].pop("novel") == 1  # of nonsense; it knows the training captions, and `score` does not
    assert scored["health"].pop("novel") is None
    assert found == scored
    assert 0 < found["Bleu_1"] < 1
    assert found["METEOR"] is None
    assert "no java in this test" in found["missing"]["METEOR"]
    assert {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"} <= found.keys()


@pytest.mark.usefixtures("without_java")
def test_evaluate_prints_a_table_and_writes_a_page(model, own_data, done, tmp_path):
    page = tmp_path / "report.html"
    out = done([*evaluate(model, own_data, tmp_path / "val"), "--html", str(page)]).out
    assert "beam size 2" in out
    assert all(word in out for word in ("BLEU-4", "CIDEr-D", "ROUGE-L", "perplexity", "14 images with 28 references"))
    assert str(tmp_path / "val" / "captions.json") in out
    html = page.read_text()
    rows = json.loads((tmp_path / "val" / "captions.json").read_text())
    assert all(row["image_id"] in html for row in rows)
    assert all(sentence in html for sentence in datasets.load("folder", own_data, "train").captions[0])
    assert html.count('<li class="card') == 14  # the seven best and the seven worst
    assert html.count("data:image/") == 14
    for heading in (
        "The 7 highest CIDEr-D",
        "The 7 lowest CIDEr-D",
        "Scores",
        "Caption statistics",
        "Caption lengths",
        "Most frequent words",
    ):
        assert f">{heading}</h2>" in html


@pytest.mark.usefixtures("without_java")
def test_evaluate_draws_synthetic_images_and_puts_captions_beside_the_model(model, done, tmp_path):
    """By default the drawn scenes, which have no files."""
    own = tmp_path / "m" / "mine.safetensors"
    own.parent.mkdir()
    own.write_bytes(model.read_bytes())
    arguments = ["evaluate", "--model", str(own), "--limit", "6", "--beam-size", "1", "--html", "page.html", "--json"]
    document = json.loads(done(arguments).out)
    expected = own.parent / "mine-synthetic-val" / "captions.json"
    assert document["captions"] == str(expected)
    assert document["images"] == len(json.loads(expected.read_text())) == 6
    assert Path("page.html").read_text().count("data:image/") == 6


@pytest.mark.usefixtures("without_java")
def test_the_images_of_a_limit_are_drawn_by_the_seed(model, own_data, done, tmp_path):
    ids = {}
    for seed in ("0", "1", "0"):
        done([*evaluate(model, own_data, tmp_path / "out"), "--limit", "6", "--seed", seed])
        drawn = list(read_captions(tmp_path / "out" / "captions.json"))
        assert len(drawn) == 6
        assert ids.setdefault(seed, drawn) == drawn
    assert ids["0"] != ids["1"]
    assert "1 images" in done([*evaluate(model, own_data, tmp_path / "out"), "--limit", "1", "--html", "page.html"]).out
    assert "The 1 highest CIDEr-D" in Path("page.html").read_text()


@pytest.mark.usefixtures("without_java")
def test_the_split_alone_is_enough(model, done, tmp_path):
    """COCO's validation split without the training captions, which only the share of new captions needs."""
    synthetic.export_coco(tmp_path / "coco", 1, 5, 32)
    (tmp_path / "coco" / "annotations" / "captions_train2017.json").unlink()
    arguments = ["evaluate", "--model", str(model), "--dataset", "coco", "--data-dir", str(tmp_path / "coco")]
    document = json.loads(done([*arguments, "--out", str(tmp_path / "out"), "--json"]).out)
    assert document["images"] == 5
    assert document["scores"]["health"]["novel"] is None


@pytest.mark.usefixtures("without_java")
def test_a_broken_image_is_left_out_and_reported(model, own_data, done, tmp_path):
    data = tmp_path / "my"
    shutil.copytree(own_data, data)
    (data / "images" / "00003.png").write_text("no image")
    printed = done([*evaluate(model, data, tmp_path / "val"), "--html", "page.html", "--json"])
    assert json.loads(printed.out)["images"] == 13
    assert printed.err.count("note: left out: ") == 1
    assert "00003.png cannot be read: it holds text" in printed.err
    assert "00003.png" not in read_captions(tmp_path / "val" / "captions.json")
    for path in (data / "images").glob("*.png"):
        path.write_text("no image")
    last = done(evaluate(model, data, tmp_path / "none"), 2).err.strip().splitlines()[-1]
    assert last == "showtell: none of the 14 images of folder train can be read; check the folder they are in"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--split", "holiday"], ["no split 'holiday'", "train, val, test"]),
        (["--beam-size", "0"], ["beam_size=0; give whole numbers from 1 up"]),
        (["--limit", "-3"], ["-3", "1 or more"]),
    ],
)
def test_what_cannot_be_evaluated(flags, words, model, own_data, refused, tmp_path):
    refused([*evaluate(model, own_data, tmp_path / "out"), *flags], *words)
    assert leftovers(tmp_path) == ["here"]


@pytest.fixture
def coco_small(shared_data) -> Path:
    if not (shared_data / "coco_small").is_dir():
        pytest.skip(f"no coco_small in {shared_data}")
    return shared_data / "coco_small"


@pytest.mark.usefixtures("without_java")
def test_training_on_coco_and_evaluating_through_pycocotools(coco_small, done, tmp_path):
    coco_api = pytest.importorskip("pycocotools.coco")
    out = tmp_path / "run"
    arguments = ["--dataset", "coco", "--data-dir", str(coco_small)]
    flags = [*TINY, "--epochs", "1", "--subset", "30", "--val-images", "10", "--batch-size", "50"]
    assert "coco: 30 images with" in done(["train", *arguments, "--out", str(out), *flags]).err
    evaluated = ["evaluate", "--model", str(out), *arguments, "--split", "val", "--limit", "20", "--beam-size", "1"]
    results = Path(json.loads(done([*evaluated, "--json"]).out)["captions"])
    assert results == out / "best-coco-val" / "captions.json"
    truth = coco_small / "annotations" / "captions_val2017.json"
    loaded = coco_api.COCO(str(truth)).loadRes(str(results))
    assert len(loaded.getImgIds()) == 20
    written = {row["image_id"]: row["caption"] for row in json.loads(results.read_text())}
    assert {a["image_id"]: a["caption"] for a in loaded.dataset["annotations"]} == written
    scored = json.loads(done(["score", truth, results, "--allow-missing", "--json"]).out)
    assert scored["captions.json"]["n_images"] == 20


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("without_java")
def test_flickr8k_with_a_pretrained_backbone_and_its_cache(flickr8k, weights, done, tmp_path):
    """On 20 training and 6 validation photographs: features computed once, then captions, scores and a page."""
    data = tmp_path / "flickr8k"
    data.mkdir()
    for name in ("images", "Flickr8k.token.txt"):
        os.symlink(flickr8k / name, data / name)
    for name, n in (("train", 20), ("dev", 6), ("test", 1)):
        listing = f"Flickr_8k.{name}Images.txt"
        (data / listing).write_text("\n".join((flickr8k / listing).read_text().split()[:n]))
    file = weights / "resnet50_imagenet_pruned.safetensors"
    arguments = ["train", "--dataset", "flickr8k", "--data-dir", data, "--out", tmp_path / "run"]
    arguments += ["--recipe", "flickr8k-show-tell", "--encoder-weights", file, "--features", tmp_path / "f"]
    arguments += ["--epochs", "2", "--set", "stride_in_1x1=true", "threshold=2"]
    said = done(arguments).err
    assert "20 images with 100 captions to train on, 6 images to validate" in said
    assert "the features of 20 images" in said
    (cache,) = (tmp_path / "f").iterdir()
    logs = [json.loads(line) for line in (tmp_path / "run" / "training_log.jsonl").read_text().splitlines()]
    losses = [record["train_loss"] for record in logs if "train_loss" in record]
    assert losses[1] < losses[0]
    before = sorted(path.name for path in cache.iterdir())
    said = done([*arguments, "--resume"]).err  # the same command; the cache is known again by its weights
    assert sorted(path.name for path in cache.iterdir()) == before
    assert "the features of" not in said
    model = ["--model", tmp_path / "run"]
    evaluated = ["evaluate", *model, "--dataset", "flickr8k", "--data-dir", data, "--html", "page.html", "--json"]
    assert json.loads(done(evaluated).out)["images"] == 6
    assert Path("page.html").read_text().count("data:image/") == 6
    photo = flickr8k / "images" / (flickr8k / "Flickr_8k.testImages.txt").read_text().split()[0]
    assert done(["caption", str(photo), *model]).out.strip()


@pytest.mark.parametrize(("precision", "share"), [("half", 0.55), ("int8", 0.3)])
def test_a_model_is_made_smaller_for_sharing(precision, share, tmp_path, done, images):
    arguments = {"name": "top-down", "embed_size": 8, "hidden_size": 8, "attention_size": 8, "vocab_size": len(VOCAB)}
    torch.manual_seed(0)
    model = CaptionModel({"encoder": {"embed_size": 8, "backbone": "resnet18"}, "decoder": arguments})
    whole, small = tmp_path / "whole.safetensors", tmp_path / "models" / "small.safetensors"
    save_checkpoint(whole, model, VOCAB, IMAGENET, {"epoch": 3})
    command = ["export", "--model", str(whole), "--format", precision]
    assert done([*command, "--out", str(small)]).out == f"{small}\n"
    assert done(command if precision == "int8" else command[:3]).out == f"whole-{precision}.safetensors\n"
    assert Path(f"whole-{precision}.safetensors").read_bytes() == small.read_bytes()
    assert small.stat().st_size < share * whole.stat().st_size
    captioners = [load(path, "cpu") for path in (whole, small)]
    assert captioners[1].meta == {"epoch": 3}
    assert captioners[0].vocab == captioners[1].vocab
    first, second = (c.caption(images / "00000.png", max_len=MAX_LEN)[0] for c in captioners)
    assert first.score == pytest.approx(second.score, abs=1e-2)


def test_a_model_exported_to_legacy_files_is_imported_again(tmp_path, done, images):
    arguments = {"name": "show-tell", "embed_size": 8, "hidden_size": 8, "vocab_size": len(VOCAB)}
    torch.manual_seed(0)
    model = CaptionModel({"encoder": {"embed_size": 8, "backbone": "resnet18"}, "decoder": arguments})
    save_checkpoint(tmp_path / "m.safetensors", model, VOCAB, IMAGENET)
    out = tmp_path / "exported"
    printed = done(["export", "--model", tmp_path / "m.safetensors", "--format", "legacy", "--out", out]).out
    files = [Path(line) for line in printed.splitlines()]
    assert sorted(files) == sorted(out.iterdir())
    assert len(files) == 3
    encoder, decoder, vocab = (next(f for f in files if f.name.startswith(n)) for n in ("encoder", "decoder", "vocab"))
    back = tmp_path / "back.safetensors"
    printed = done(["import-legacy", encoder, decoder, vocab, "--out", back]).out
    assert f"resnet18, {len(VOCAB)} words, embed 8, hidden 8, 1 LSTM layer(s)" in printed
    photo = images / "00000.png"
    models = (tmp_path / "m.safetensors", back)
    first, second = (load(path, "cpu").caption(photo, max_len=MAX_LEN)[0] for path in models)
    assert first.words == second.words
    assert first.score == pytest.approx(second.score, abs=1e-4)
