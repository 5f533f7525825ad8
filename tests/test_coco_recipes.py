"""The recipes for COCO, on generated images in the layout of Karpathy's split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_train import no_curve, no_files, one_thread, trainer_in

from showtell import datasets
from showtell.__main__ import main
from showtell.checkpoint import save_checkpoint
from showtell.recipes import recipe_named
from showtell.synthetic import export_coco
from showtell.train import Trainer

__all__ = ["no_curve", "no_files", "one_thread"]  # fixtures
SPLITS = ("train", "train", "restval", "train", "val", "val", "test")
SMALL = {"resize": 64, "batch_size": 2, "epochs": 1, "threshold": 1}
RECIPES = ("coco-attend", "coco-attend-self-critical", "coco-show-tell-152")


@pytest.fixture(scope="module")
def karpathy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    export_coco(folder, len(SPLITS), 1, size=64)
    (folder / "train2017").rename(folder / "val2014")  # as the images of restval and val
    coco = json.loads((folder / "annotations" / "captions_train2017.json").read_text())
    images = []
    for image, split in zip(coco["images"], SPLITS, strict=True):
        texts = [row["caption"] for row in coco["annotations"] if row["image_id"] == image["id"]]
        sentences = [{"raw": text, "imgid": image["id"], "sentid": i} for i, text in enumerate(texts)]
        entry = {"filepath": "val2014", "filename": image["file_name"], "cocoid": image["id"], "split": split}
        images.append(entry | {"sentences": sentences})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    return folder


def small(name: str, karpathy: Path, out: Path, **run) -> Trainer:
    sets = [datasets.load("karpathy", karpathy, split) for split in ("train", "val")]
    return trainer_in(out, recipe_named(name).with_settings(SMALL), *sets, **run)


@pytest.fixture(scope="module")
def first(karpathy, tmp_path_factory) -> str:
    """A model of coco-attend, not trained."""
    out = tmp_path_factory.mktemp("first")
    trainer = small("coco-attend", karpathy, out / "run")
    save_checkpoint(out / "m.safetensors", trainer.model, trainer.vocab, trainer.transform, int8=True)
    return str(out / "m.safetensors")


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_of_the_documentation_is_accepted(name, karpathy, first, tmp_path, capsys):
    written = (Path(__file__).resolve().parent.parent / "docs" / "coco.md").read_text("utf-8")
    line = next(line for line in written.splitlines() if f"--recipe {name} " in line)
    paths = {"data/coco": str(karpathy), "runs/attend": first if "--init" in line else str(tmp_path / "out")}
    paths |= dict.fromkeys(("runs/152", "runs/rl"), str(tmp_path / "out"))
    words = [paths.get(word, word) for word in line.split()[1:]]
    assert main([*words, "--dry-run"]) == 0
    assert "4 images with 20 captions to train on, 2 images to validate" in (told := capsys.readouterr().err)
    assert "no effect" not in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_train_what_the_recipe_says(name, karpathy, first, tmp_path, no_files):
    init = {"init": first} if "self-critical" in name else {}
    trainer = small(name, karpathy, tmp_path, **init)
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    (record,) = trainer.fit(progress=False)
    assert trainer.step == 0 < record["train_loss"]
    assert len(trainer.loader) == 2
    changed = {key for key, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[key])}
    stages = {key.split(".")[3] for key in changed if "backbone" in key}
    assert stages == (set() if init else {"layer3", "layer4"})
    assert {"decoder.embed.weight", "decoder.linear.weight"} < changed
