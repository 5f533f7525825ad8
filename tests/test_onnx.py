"""Export for ONNX Runtime: parity with torch, the same captions without torch, and which engine is chosen."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_captioner import SMALL, VOCAB, assert_same, lively_checkpoint, save_images

from showtell import onnx_engine, onnx_export, synthetic
from showtell.__main__ import main
from showtell.captioner import Captioner, load
from showtell.checkpoint import load_checkpoint, save_checkpoint
from showtell.decoders import DECODERS
from showtell.errors import UserError
from showtell.evaluate import evaluate
from showtell.onnx_engine import FORMAT, HEADER, OnnxEngine, find_export
from showtell.onnx_export import GRAPHS, export_onnx
from showtell.transforms import Transform

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return save_images(tmp_path_factory.mktemp("images"), 6)


@pytest.fixture(scope="module", params=list(DECODERS))
def models(request, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint and its export."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = lively_checkpoint(folder / "m.safetensors", request.param)
    assert "relative difference from torch" in export_onnx(load_checkpoint(checkpoint), folder / "onnx")[1]
    return checkpoint, folder / "onnx"


@pytest.fixture(scope="module")
def pair(models) -> tuple[Captioner, Captioner]:
    """The same model in torch and in ONNX Runtime."""
    return load(models[0], "cpu"), load(models[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return lively_checkpoint(tmp_path_factory.mktemp("one") / "m.safetensors", "transformer")


@pytest.fixture(scope="module")
def exported(checkpoint) -> Path:
    export_onnx(load_checkpoint(checkpoint), checkpoint.parent / "onnx")
    return checkpoint.parent / "onnx"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "showtell" / "onnx"


@pytest.mark.parametrize(
    "options",
    [{}, {"n_best": 3, "no_repeat_ngram": 1, "min_len": 4}, {"strategy": "greedy"}, {"beam_size": 1, "max_len": 3}],
)
def test_captions_are_those_of_torch(pair, images, options):
    torch_captioner, captioner = pair
    assert (captioner.vocab, captioner.transform, captioner.meta) == (VOCAB, SMALL, torch_captioner.meta)
    expected = torch_captioner.decode(torch_captioner.encode(images), **options)
    for found, ours in zip(captioner.decode(captioner.encode(images), **options), expected, strict=True):
        assert_same(found, ours)
    for path, ours in zip(images, expected, strict=True):  # batches of one
        assert_same(captioner.caption(path, **options), ours)


def test_attention_maps_and_samples(pair, images):
    torch_captioner, captioner = pair
    (expected,) = torch_captioner.caption(images[0], alphas=True)
    (found,) = captioner.caption(images[0], alphas=True)
    assert (found.alphas is None) == (expected.alphas is None)
    if found.alphas is not None:
        np.testing.assert_allclose(found.alphas, expected.alphas.numpy(), atol=1e-5)
    options = {"strategy": "sample", "n_best": 4, "temperature": 2.0}
    texts = [[caption.text for caption in captioner.caption(images[0], seed=seed, **options)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    (cold,) = captioner.caption(images[0], strategy="sample", temperature=1e-4)
    assert cold.words == torch_captioner.caption(images[0], strategy="greedy")[0].words


@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_every_decoding_flag_reaches_the_engine(engine, checkpoint, exported, images, tmp_path, capsys):
    path = exported if engine == "onnx" else checkpoint
    captioner, model = load(path, "cpu"), ["--model", str(path), "--device", "cpu"]
    searching = {"n_best": 2, "beam_size": 4, "min_len": 3, "max_len": 6, "length_penalty": 0.2, "no_repeat_ngram": 1}
    sampling = {"n_best": 3, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_len": 2, "max_len": 5, "seed": 3}
    for options, more in ((searching, {}), (sampling, {"strategy": "sample"})):
        flags = [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]
        maps = tmp_path / f"maps{len(more)}"
        command = ["caption", str(images[0]), *model, *flags, *(["--sample"] if more else []), "--json"]
        assert main([*command, "--attention", str(maps)]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        expected = captioner.caption(images[0], **options, **more)
        assert [caption["words"] for caption in row["captions"]] == [caption.words for caption in expected]
        assert len(list(maps.glob("*/*.png"))) == len(expected[0].words)


def test_any_source_of_images(exported, images, tmp_path):
    captioner = load(exported)
    image = Image.open(images[0]).convert("RGB")
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for source in (str(images[0]), images[0].read_bytes(), image, np.asarray(image), tensor):
        assert_same(captioner.caption(source), captioner.caption(images[0]))
    (tmp_path / "broken.png").write_text("not an image")
    results = dict(captioner.caption_stream([images[0], tmp_path / "broken.png", lambda: tensor]))
    assert_same(results[0], results[2])
    assert f"{tmp_path / 'broken.png'} cannot be read: it holds text" in str(results[1])


def test_images_that_are_not_square_keep_their_grids(tmp_path):
    saved = load_checkpoint(lively_checkpoint(tmp_path / "square.safetensors", "attend"))
    save_checkpoint(tmp_path / "wide.safetensors", saved.model, VOCAB, Transform(resize=64), saved.meta)
    export_onnx(load_checkpoint(tmp_path / "wide.safetensors"), tmp_path / "onnx")
    pixels = [Image.fromarray(synthetic.draw(synthetic.scene(2), 64)).resize(size) for size in ((256, 64), (64, 128))]
    captioner = load(tmp_path / "onnx")
    expected = dict(load(tmp_path / "wide.safetensors", "cpu").caption_stream(pixels, alphas=True, min_len=2))
    for i, captions in captioner.caption_stream(pixels, alphas=True, min_len=2):
        assert_same(captions, expected[i])
        assert captions[0].alphas.shape == tuple(expected[i][0].alphas.shape)


def test_a_parity_that_fails_refuses_the_export(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "MAX_DIFFERENCE", 1e-12)
    with pytest.raises(UserError, match=r"differ from those of torch by \S+ of the largest, and at most 1e-12 is "):
        export_onnx(load_checkpoint(checkpoint), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_in_int8_a_model_is_smaller_and_says_what_it_was_calibrated_on(models, images, tmp_path, capsys):
    checkpoint, exported = models
    command = ["export", "--model", str(checkpoint), "--format", "onnx", "--out", str(tmp_path / "int8"), "--int8"]
    assert main([*command, "--calibrate", str(images[0].parent)]) == 0
    assert "int8, calibrated on 6 images: " in capsys.readouterr().out
    assert json.loads((tmp_path / "int8" / HEADER).read_text())["int8"]["images"] == 6
    sizes = [(folder / "encoder.onnx.data").stat().st_size for folder in (tmp_path / "int8", exported)]
    assert sizes[0] < 0.5 * sizes[1]
    quantised, exact = OnnxEngine(tmp_path / "int8"), OnnxEngine(exported)
    array = SMALL.to_array(images[0])
    found, expected = (engine.encode([array])[0] for engine in (quantised, exact))
    assert 0 < np.abs(found - expected).mean() < 0.2 * np.abs(expected).mean()
    steps = []
    for engine in (quantised, exact):
        memory, state = engine.decoder.start(expected)
        steps.append(engine.decoder.step(np.array([3]), memory, state)[0])
    assert 0 < np.abs(steps[0] - steps[1]).mean() < 0.1 * np.abs(steps[1]).mean()
    assert main(command) == 2
    assert "--int8 and --calibrate go together, with --format onnx" in capsys.readouterr().err


@pytest.mark.parametrize("file", [*GRAPHS, "encoder.onnx.data", "step.onnx.data", HEADER])
def test_a_damaged_or_incomplete_folder_is_one_sentence(exported, file, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    (folder / file).write_bytes((folder / file).read_bytes()[:40])
    sentence = r"is missing, damaged or incomplete \(.*\); write it again with showtell export"
    with pytest.raises(UserError, match=sentence):
        load(folder)
    (folder / file).unlink()
    with pytest.raises(UserError, match=r"holds no best\.safetensors" if file == HEADER else sentence):
        load(folder)


def test_a_newer_format_is_refused(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    (folder / HEADER).write_text(json.dumps(json.loads((folder / HEADER).read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"has format {FORMAT + 1}, and this version reads formats up to {FORMAT}"):
        load(folder)


def test_auto_takes_the_export_of_this_very_checkpoint(checkpoint, exported, cache, tmp_path, monkeypatch):
    def engine(model, **options):
        return type(load(model, **options).engine).__name__

    assert engine(exported) == engine(exported, engine="auto") == "OnnxEngine"
    assert engine(checkpoint) == engine(checkpoint, engine="auto") == "TorchEngine"
    assert not cache.exists()
    assert engine(checkpoint, engine="onnx") == "OnnxEngine"  # which exports it
    (folder,) = cache.iterdir()
    assert find_export(checkpoint) == folder
    monkeypatch.setattr("showtell.onnx_export.export_onnx", None)  # not again
    assert engine(checkpoint, engine="auto") == engine(checkpoint, engine="onnx") == "OnnxEngine"
    assert engine(checkpoint) == engine(checkpoint, engine="torch") == "TorchEngine"
    assert engine(checkpoint, engine="auto", precision="bfloat16") == "TorchEngine"
    other = lively_checkpoint(tmp_path / "other.safetensors", "transformer", seed=5)
    assert engine(other, engine="auto") == "TorchEngine"
    monkeypatch.setattr(onnx_engine, "find_spec", lambda name: None)
    assert engine(checkpoint, engine="auto") == "TorchEngine"


def test_what_cannot_be_is_refused(checkpoint, exported, cache, monkeypatch):
    for arguments, message in (
        ({"model": exported, "engine": "torch"}, "was exported for ONNX Runtime, which captions only; give the check"),
        ({"model": exported, "device": "cuda"}, "was exported for ONNX Runtime, which captions only; give the check"),
        (
            {"model": checkpoint, "engine": "onnx", "precision": "bfloat16"},
            "the engine onnx runs one model, on the CPU",
        ),
        ({"model": f"{checkpoint},{checkpoint}", "engine": "onnx"}, "the engine onnx runs one model"),
        ({"model": checkpoint, "engine": "tensorrt"}, "engine='tensorrt' is not known; choose one of auto, torch, onn"),
    ):
        with pytest.raises(UserError, match=message):
            load(**arguments)
    with pytest.raises(UserError, match="which captions only; give the checkpoint"):
        evaluate(exported, "synthetic")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'the engine onnx needs ONNX Runtime; type pip install "showtell\[onnx\]"'):
        load(exported)
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'the export needs onnx and onnxruntime; type pip install "showtell\[onnx\]"'):
        load(checkpoint, engine="onnx")


WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision"]))  # None makes an import fail
from showtell.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, "caption", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_command_line_runs_without_torch(models, images):
    captioner = load(models[0], "cpu")
    expected = [captioner.caption(path, n_best=2) for path in images[:2]]
    result = without_torch(*images[:2], "--model", models[1], "--json", "--n-best", 2)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [[c["words"] for c in row["captions"]] for row in rows] == [[c.words for c in row] for row in expected]


def test_pages_tables_and_samples_need_no_torch(checkpoint, exported, images, tmp_path):
    expected = load(checkpoint, "cpu").caption(images[0])[0].text
    result = without_torch(*images[:2], "--model", exported, "--html", tmp_path / "page.html")
    assert result.returncode == 0, result.stderr
    assert expected in re.sub("<[^>]*>", "", (tmp_path / "page.html").read_text("utf-8"))
    result = without_torch(images[0], "--model", exported, "--csv", tmp_path / "table.csv", "--sample")
    assert (result.returncode, (tmp_path / "table.csv").read_text("utf-8").count("\n")) == (0, 2), result.stderr


@pytest.mark.parametrize("name", ["showtell-attend", "showtell-classic"])
def test_released_models_caption_photographs_with_the_words_of_torch(name, tmp_path):
    data = Path(pytest.importorskip("skimage").__file__).parent / "data"
    names = "coffee.png chelsea.png motorcycle_left.png camera.png astronaut.png rocket.jpg coins.png grass.png"
    photographs = [data / file for file in names.split() if (data / file).exists()]
    assert photographs
    exact = load(name, "cpu", "float32")
    export_onnx(load_checkpoint(ROOT / "models" / f"{name}-1.safetensors"), tmp_path / "onnx")
    result = without_torch(*photographs, "--model", tmp_path / "onnx", "--json")
    assert result.returncode == 0, result.stderr
    for row, path in zip(json.loads(result.stdout), photographs, strict=True):
        assert row["captions"][0]["words"] == exact.caption(path)[0].words


def test_the_digest_of_a_model_is_noted_until_its_file_changes(tmp_path, monkeypatch):
    model, cache = tmp_path / "model", tmp_path / "cache"
    cache.mkdir()
    model.write_bytes(b"one")
    one = hashlib.sha256(b"one").hexdigest()
    assert onnx_engine._digest(model, cache) == one
    assert not list(cache.iterdir()), "a file that has just changed may change again at the same time"
    monkeypatch.setattr(onnx_engine.time, "time_ns", lambda: model.stat().st_ctime_ns + 3 * 10**9)
    assert onnx_engine._digest(model, cache) == one
    (note,) = cache.iterdir()
    note.write_text(note.read_text().replace(one, "noted"))
    assert onnx_engine._digest(model, cache) == "noted"
    model.write_bytes(b"two")
    assert onnx_engine._digest(model, cache) == hashlib.sha256(b"two").hexdigest()
    note.write_text("[")
    assert onnx_engine._digest(model, cache) == hashlib.sha256(b"two").hexdigest()
