"""Shards hold what they were given, survive an interruption, and train and caption as files of their own do."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from test_captioner import lively_checkpoint, save_images
from test_features import frozen

from showtell import datasets, shards
from showtell.__main__ import main
from showtell.data_loader import get_loader
from showtell.errors import MissingFileError, UserError
from showtell.features import FeatureCache
from showtell.shards import read_shard, write_shards
from showtell.sources import find_sources
from showtell.transforms import TINY
from showtell.vocabulary import Vocabulary

SMALL = 10_240  # bytes of a shard of about three images: a tar is at least this long


@pytest.fixture
def own_data(tmp_path) -> Path:
    """Twelve images of training and four of validation, with two captions each."""
    save_images(tmp_path / "my" / "images", 16)
    with (tmp_path / "my" / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "split"])
        for i in range(16):
            for caption in (f"une image numéro {i}", f"a drawn image {'left ' * (i % 3)}"):
                writer.writerow([f"{i:05d}.png", caption, "train" if i < 12 else "val"])
    return tmp_path / "my"


def samples_of(folder: Path, split: str = "train") -> list[tuple]:
    images = datasets.load("folder", folder, split)
    return list(zip(images.image_ids, images.captions, images.sources(), strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_of_a_data_set_are_that_data_set(own_data, tmp_path, capsys):
    for split in ("train", "val"):
        data = ["--dataset", "folder", "--data-dir", str(own_data), "--split", split]
        assert main(["shard", *data, "--out", str(tmp_path / "shards")]) == 0
    assert "12 images in 1 shards" in capsys.readouterr().err
    assert sorted(contents(tmp_path / "shards")) == [
        "train-000000.jsonl", "train-000000.tar", "val-000000.jsonl", "val-000000.tar",
    ]  # fmt: skip
    for split, n in (("train", 12), ("val", 4)):
        files, sharded = datasets.load("folder", own_data, split), datasets.load("shards", tmp_path / "shards", split)
        assert (len(sharded), sharded.image_ids, sharded.captions) == (n, files.image_ids, files.captions)
        assert all(torch.equal(sharded.image(i), files.image(i)) for i in range(n))
    assert sharded.subset(2).image_ids == files.subset(2).image_ids


def test_a_drawn_data_set_becomes_png_files(tmp_path):
    drawn = datasets.load("synthetic", n=5, size=48)
    write_shards(list(zip(drawn.image_ids, drawn.captions, drawn.sources(), strict=True)), tmp_path, "train")
    sharded = datasets.load("shards", tmp_path)
    assert sharded.references() == drawn.references()
    assert all(torch.equal(sharded.image(i), drawn.image(i)) for i in range(5))


def test_the_webdataset_library_reads_the_shards(own_data, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    paths = write_shards(samples_of(own_data), tmp_path / "shards", "train", SMALL)
    assert len(paths) > 2
    found = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    ours = [sample for path in paths for sample in read_shard(path)]
    assert [json.loads(sample["json"]) for sample in found] == [
        {"id": sample.id, "captions": sample.captions} for sample in ours
    ]
    assert [sample["png"] for sample in found] == [sample() for sample in ours]


def test_shards_of_another_program_are_read(own_data, tmp_path):
    image = (own_data / "images" / "00000.png").read_bytes()
    members = {
        "0000/a.png": image, "0000/a.txt": b"A cat.\n", "0000/b.json": b'{"caption": "two  dogs"}', "0000/b.png": image,
        "0000/c.png": image, "0000/d.txt": b"no image",
    }  # fmt: skip
    with tarfile.open(tmp_path / "cc3m-train-0000.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    sharded = datasets.load("shards", tmp_path)
    assert sharded.references() == {"0000/a": ["A cat."], "0000/b": ["two dogs"]}  # c has no caption, d no image
    assert sharded.sources()[1]() == image


def test_an_interrupted_run_continues_and_ends_with_the_same_shards(own_data, tmp_path):
    samples = samples_of(own_data)
    paths = write_shards(samples, tmp_path / "whole", "train", SMALL)

    def interrupted(left):
        for number, sample in enumerate(left):
            if number == 7:
                raise KeyboardInterrupt
            yield sample

    with pytest.raises(KeyboardInterrupt):
        write_shards(samples, tmp_path / "twice", "train", SMALL, interrupted)
    kept = contents(tmp_path / "twice")
    assert 0 < len(kept) < 2 * len(paths)
    seen = []
    write_shards(samples, tmp_path / "twice", "train", SMALL, lambda left: seen.extend(left) or seen)
    assert len(seen) == 12 - sum(kept[name].count(b"\n") for name in kept if name.endswith(".jsonl"))
    assert contents(tmp_path / "twice") == contents(tmp_path / "whole")


def test_the_shards_of_an_interrupted_run_with_another_size_do_not_remain(own_data, tmp_path):
    samples = samples_of(own_data)
    first, *_ = write_shards(samples, tmp_path, "train", SMALL)
    first.with_suffix(".jsonl").unlink()
    paths = write_shards(samples, tmp_path, "train")
    assert sorted(tmp_path.glob("train*")) == sorted([*paths, paths[0].with_suffix(".jsonl")])


def test_shards_of_other_images_are_not_continued(own_data, tmp_path):
    samples = samples_of(own_data)
    write_shards(samples[1:], tmp_path / "shards", "train")
    with pytest.raises(UserError, match="holds other images than those given; choose another folder"):
        write_shards(samples, tmp_path / "shards", "train")


def test_a_disk_that_changes_the_bytes_is_noticed(own_data, tmp_path, monkeypatch):
    write = shards._write

    def write_badly(path, *arguments):
        digests = write(path, *arguments)
        data = path.read_bytes()
        path.write_bytes(data.replace(b"IDAT", b"IDAS", 1))
        return digests

    monkeypatch.setattr(shards, "_write", write_badly)
    with pytest.raises(UserError, match="does not read back as it was written; check the disk"):
        write_shards(samples_of(own_data), tmp_path / "shards", "train")
    assert contents(tmp_path / "shards") == {}


def test_what_is_wrong_with_shards_is_said_in_a_sentence(own_data, tmp_path, capsys):
    with pytest.raises(MissingFileError, match=r"there is no \*val\*\.tar in .*; write it with showtell shard --split"):
        datasets.load("shards", own_data, "val")
    (path,) = write_shards(samples_of(own_data), tmp_path / "shards", "train")
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(UserError, match=r"train-000000.tar ends before 0000000\d\d.png; delete"):
        datasets.load("shards", tmp_path / "shards")
    path.with_suffix(".jsonl").unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar is no tar of images, or damaged"):
        datasets.load("shards", tmp_path / "shards")
    assert main(["shard", "--out", str(tmp_path / "x")]) == 2
    assert "shard takes images, or a data set with --dataset NAME" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["length", "image"])
def test_batches_of_shards_are_those_of_files(own_data, tmp_path, group: str):
    """The same samplers, so the same order: every caption or image exactly once per epoch."""
    write_shards(samples_of(own_data), tmp_path / "shards", "train", SMALL)
    vocab = Vocabulary.build(datasets.load("folder", own_data).all_captions(), threshold=1)
    epochs = []
    for dataset, folder in (("folder", own_data), ("shards", tmp_path / "shards")):
        options = {"dataset": dataset, "data_dir": folder, "vocab": vocab, "group": group, "seed": 3}
        epochs.append(list(get_loader(TINY, batch_size=4, num_workers=1, **options)))
    assert len(epochs[0]) == len(epochs[1])
    for (images, captions), (other_images, other_captions) in zip(*epochs, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(captions, other_captions)


def test_a_feature_cache_of_shards_is_built_once_and_shared_with_files(own_data, tmp_path, monkeypatch):
    write_shards(samples_of(own_data), tmp_path / "shards", "train", SMALL)
    files, sharded = datasets.load("folder", own_data), datasets.load("shards", tmp_path / "shards")
    cache = FeatureCache.open(tmp_path / "cache", frozen(), TINY)
    cache.build(sharded, progress=False)
    rows = cache.rows(sharded)
    assert sorted(rows) == list(range(12))
    cache.build(files, progress=False)
    assert (cache.rows(files).tolist(), len(cache)) == (rows.tolist(), 12)  # the same contents, the same rows
    monkeypatch.setattr(shards.Sample, "__call__", lambda sample: pytest.fail("read an image"))
    again = FeatureCache.open(tmp_path / "cache", frozen(), TINY)
    assert again.rows(datasets.load("shards", tmp_path / "shards")).tolist() == rows.tolist()
    assert again.build(sharded, progress=False) == []


def test_a_damaged_image_in_a_shard_is_left_out_by_its_own_name(own_data, tmp_path):
    for name in ("00001.png", "00002.png"):
        (own_data / "images" / name).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    write_shards(samples_of(own_data), tmp_path / "shards", "train")
    vocab = Vocabulary.build(["a drawn image"], threshold=1)
    loader = get_loader(TINY, batch_size=4, dataset="shards", data_dir=tmp_path / "shards", vocab=vocab, group="image")
    with pytest.warns(UserWarning, match=r"left out: .*train-000000\.tar/00000000[12]\.png"):
        assert sum(len(images) for images, _ in loader) == 10
    assert len(loader.broken) == 2


def test_captions_of_shards_are_those_of_files(own_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(lively_checkpoint(tmp_path / "model.safetensors")), "--beam-size", "2"]
    assert main(["shard", "my/images", "--out", "shards"]) == 0
    assert main(["caption", "my/images", "--csv", "files.csv", *model]) == 0
    assert main(["caption", "shards/*.tar", "--csv", "shards.csv", "--html", "shards.html", *model]) == 0
    files, sharded = (list(csv.DictReader(Path(name).read_text().splitlines())) for name in ("files.csv", "shards.csv"))
    assert sharded[3]["image"] == "shards/images-000000.tar/000000003.png"
    for column in ("caption", "sha256"):
        assert [row[column] for row in sharded] == [row[column] for row in files]
    assert (tmp_path / "shards.html").read_text().count("data:image") >= 16
    capsys.readouterr()
    assert main(["caption", "shards/images-000000.tar", "--csv", "shards.csv", "--resume", *model]) == 0
    assert "16 of 16 images have been captioned before" in capsys.readouterr().err
    assert [source.digest() for source in find_sources(["shards/*.tar"])] == [row["sha256"] for row in files]


def test_a_run_trains_on_shards(own_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_shards(samples_of(own_data, split), tmp_path / "shards", split, SMALL)
    tiny = ["--encoder", "tiny", "--set", "resize=32", "squash=true", "hidden_size=16", "embed_size=16", "threshold=1"]
    losses = []
    for dataset, folder in (("folder", "my"), ("shards", "shards")):
        run = ["--dataset", dataset, "--data-dir", folder, "--out", f"runs/{dataset}", "--epochs", "2", *tiny]
        assert main(["train", *run, "--batch-size", "4", "--device", "cpu", "--no-features"]) == 0
        lines = Path("runs", dataset, "training_log.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("val_loss") for line in lines])
    assert losses[0] == losses[1]
    assert any(losses[0])
