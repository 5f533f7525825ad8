"""The scripts in tools/."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from showtell import datasets, load
from showtell.checkpoint import load_checkpoint, save_checkpoint
from showtell.errors import UserError
from showtell.model import CaptionModel
from showtell.report import Card
from showtell.synthetic import export_coco
from showtell.transforms import TINY
from showtell.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_tool_is_tested():
    tested = set(re.findall(r'tool\("(\w+)"\)', Path(__file__).read_text("utf-8")))
    assert tested == {path.stem for path in (ROOT / "tools").glob("*.py")}


def test_the_site_has_a_list_for_the_diagram_and_links_of_its_own():
    pytest.importorskip("mkdocs")
    hook = tool("documentation")
    diagram = 'A\n```mermaid\nflowchart TB\n    a["<b>base</b><br>__main__ · b<br>c"]\n```\nB'
    assert hook.on_page_markdown(diagram) == "A\n- **base**: `__main__` · `b` · `c`\nB"
    notebook, page = (SimpleNamespace(file=SimpleNamespace(src_uri=name)) for name in ("0_Dataset.ipynb", "README.md"))
    markup = '<a href="docs/training.md#ema">a</a><a href="model.py">b</a><script>\nx</script>'
    expected = '<a href="docs/training.html#ema">a</a><a href="docs/api.html#showtell.model">b</a>'
    assert hook.on_page_content(markup, notebook) == expected
    assert hook.on_page_content(markup, page) == markup


def save_model(path: Path, words: list[str], seed: int) -> dict[str, torch.Tensor]:
    vocab = Vocabulary(["<start>", "<end>", "<unk>", *words], 1, "words")
    decoder = {"name": "show-tell", "embed_size": 4, "hidden_size": 4, "vocab_size": len(vocab)}
    torch.manual_seed(seed)
    model = CaptionModel({"encoder": {"embed_size": 4, "backbone": "tiny"}, "decoder": decoder})
    save_checkpoint(path, model, vocab, TINY, {"epoch": seed, "validation": {"CIDEr": 0.5}})
    return model.state_dict()


def test_the_mean_of_models(tmp_path):
    first = save_model(tmp_path / "a.safetensors", ["cat"], 1)
    second = save_model(tmp_path / "b=.safetensors", ["cat"], 2)
    parts = [f"{tmp_path / 'a.safetensors'}=0.25", f"{tmp_path / 'b=.safetensors'}=0.75"]
    tool("average").average(str(tmp_path / "mean.safetensors"), *parts)
    mean = load_checkpoint(tmp_path / "mean.safetensors")
    for name, tensor in mean.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])
    assert mean.meta["epoch"] == 2
    assert mean.meta["mean_of"] == parts
    assert "validation" not in mean.meta  # those scores are another model's


@pytest.mark.parametrize(("share", "words", "message"), [(0.5, "cat", "sum to 0.75"), (0.75, "dog", "differ in")])
def test_a_mean_without_meaning_is_refused(share, words, message, tmp_path):
    save_model(tmp_path / "a", ["cat"], 1)
    save_model(tmp_path / "b", [words], 2)
    with pytest.raises(UserError, match=message):
        tool("average").average(str(tmp_path / "mean"), f"{tmp_path / 'a'}=0.25", f"{tmp_path / 'b'}={share}")
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("caption", "kinds"),
    [
        ("A brown dog runs.", set()),
        ("A white dog runs on the beach.", {"colour", "place"}),
        ("Two dogs and a cat.", {"number", "animal or thing"}),
        ("A man with a brown dog.", {"gender"}),
        ("A person with her dog.", set()),
    ],
)
def test_kinds_of_mistakes(caption, kinds):
    assert tool("mistakes").mistakes(caption, ["a woman and her brown dog", "a dog on the grass"]) == kinds


def test_a_table_of_mistakes(tmp_path, capsys):
    mistakes = tool("mistakes")
    references = datasets.load("synthetic", split="val").subset(4).references()
    captions = {name: "a dog on a beach" if i == 0 else texts[0] for i, (name, texts) in enumerate(references.items())}
    found = mistakes.shares(captions, references)
    assert found["animal or thing"] == (0.25, 0.0)
    assert found["gender"] == (0.0, 0.0)

    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{i}.png")
    rows = ["image,caption,split", "1.png,a cat,val", "1.png,a small cat,val", "2.png,a red bus,val", "2.png,a bus,val"]
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    predicted = tmp_path / "predicted" / "captions.json"
    predicted.parent.mkdir()
    texts = {"1.png": "two cats", "2.png": "a bus"}
    predicted.write_text(json.dumps([{"image_id": name, "caption": text} for name, text in texts.items()]))
    mistakes.main(str(predicted), "folder", str(tmp_path), "val")
    printed = capsys.readouterr().out
    assert re.search(r"number +50.0% +0.0%", printed)
    assert re.search(r"colour +0.0% +50.0%", printed)


def test_captions_without_images_become_a_data_set(tmp_path, monkeypatch, capsys):
    text_only = tool("text_only")
    monkeypatch.setattr(text_only, "N_VAL", 2)
    (tmp_path / "plain.txt").write_text("".join(f"plain {i}\n" for i in range(10)))
    with gzip.open(tmp_path / "coco.tsv.gz", "wt") as file:
        file.writelines(f"COCO_val2014_{i:012d}.jpg\tcoco {i}\n" for i in range(10))
    (tmp_path / "test.json").write_text(json.dumps({"images": [{"id": 3}, {"id": 4}]}))
    files = [str(tmp_path / "plain.txt"), f"{tmp_path / 'coco.tsv.gz'}:5"]
    text_only.main([str(tmp_path / "text"), *files, "--without", str(tmp_path / "test.json")])
    assert "13 training captions, 4 validation captions" in capsys.readouterr().out
    train, val = (datasets.load("folder", tmp_path / "text", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1, 1)
    texts = [*train.all_captions(), *val.all_captions()]
    assert len(set(texts)) == 17
    assert not {"coco 3", "coco 4"} & set(texts)
    assert (train.image(0) == torch.tensor(text_only.GREY)[:, None, None]).all()


def test_diagrams_are_drawn(tmp_path):
    diagrams = tool("diagrams")
    for path in diagrams.main(tmp_path):
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg")
        assert len(list(root.iter())) > 100
        assert (diagrams.IMAGES / path.name).is_file()


def test_photographs_are_drawn(tmp_path, monkeypatch):
    photographs = tool("photographs")
    cards = [Card(Image.new("RGB", (30, 20), "red"), "red.png", "a red square")] * 2
    monkeypatch.setattr(photographs, "caption_photographs", lambda: cards)
    with Image.open(photographs.main(tmp_path)) as image:
        assert image.format == "JPEG"
        assert image.width > image.height > 100


def test_the_tree_lists_the_core_first():
    tree = tool("tree")
    lines = tree.tree().splitlines()
    modules = [found[1] for line in lines if (found := re.match(r"showtell/(\w+)\.py +\d+  \S", line))]
    assert modules[: len(tree.CORE)] == tree.CORE
    assert sorted(modules) == sorted(path.stem for path in (ROOT / "showtell").glob("*.py"))
    page = f"before\n{tree.BEGIN}old\n{tree.END}\nafter\n"
    assert tree.replaced(page) == f"before\n{tree.BEGIN}{tree.tree()}{tree.END}\nafter\n"


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("sampling", [[], ["--temperature", "5"]])
def test_captions_of_a_model_become_a_data_set(sampling, keep, tmp_path):
    export_coco(tmp_path / "shapes", 6, 2, size=32)
    (tmp_path / "shapes" / "train2017" / sorted(os.listdir(tmp_path / "shapes" / "train2017"))[0]).write_bytes(b"")
    save_model(tmp_path / "a.safetensors", ["cat", "dog", "runs"], 1)
    save_model(tmp_path / "b.safetensors", ["cat", "dog", "runs"], 2)
    models = f"{tmp_path / 'a.safetensors'},{tmp_path / 'b.safetensors'}"
    out = tmp_path / "pseudo" / "captions.csv"
    arguments = [models, "coco", str(tmp_path / "shapes"), "--out", str(out), "--n", "3", *sampling]
    tool("pseudo_captions").main(arguments + ["--keep"] * keep)
    (true, true_val), (train, val) = (
        [datasets.load(reader, tmp_path / folder, split) for split in ("train", "val")]
        for reader, folder in (("coco", "shapes"), ("folder", "pseudo"))
    )
    assert [os.path.realpath(train.path(i)) for i in range(5)] == [os.path.realpath(true.path(i)) for i in range(1, 6)]
    assert val.captions == true_val.captions
    captioner = load(models)
    for i, captions in enumerate(train.captions):
        if not sampling:
            expected = list(dict.fromkeys(c.text for c in captioner.caption(true.path(i + 1), n_best=3) if c.words))
            assert captions[: len(expected)] == expected
        assert keep == (captions[-1] == true.captions[i + 1][-1])
        assert keep or set(" ".join(captions).lower().split()) <= {"cat", "dog", "runs"}
