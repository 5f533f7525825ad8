"""Data sets and caption files: every layout, splits by image, and errors that name the file and the place."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from showtell import datasets
from showtell.annotations import read_candidates, read_captions
from showtell.datasets import READERS, CaptionSet, load
from showtell.errors import MissingFileError, UserError
from showtell.synthetic import check, describe, draw, export_coco, scene
from showtell.transforms import BrokenImageError


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (number * 10 % 256, 0, 0)).save(folder / name)


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def split_ids(name: str, folder: Path, splits=("train", "val", "test"), **options) -> list[set]:
    return [set(load(name, folder, split, **options).image_ids) for split in splits]


def test_sets_are_joined_in_their_order(coco, tmp_path):
    write_images(tmp_path / "other", ["a.png", "b.png"])
    (tmp_path / "other" / "captions.csv").write_text("image,caption,split\na.png,one,train\nb.png,two,train\n")
    both = load("coco,folder", f"{coco},{tmp_path / 'other'}")
    assert (both.name, both.split, len(both)) == ("coco,folder", "train", 8)
    assert both.captions[-2:] == [["one"], ["two"]]
    assert torch.equal(both.image(2), load("coco", coco).image(2))
    assert torch.equal(both.image(7), load("folder", tmp_path / "other").image(1))
    with pytest.raises(UserError, match="the image id 1 is in two of the data sets that are joined; give each image"):
        load("coco,coco", f"{coco},{coco}")
    with pytest.raises(UserError, match=r"2 data sets \(coco,folder\) were given with 1 folders .*a folder for each"):
        load("coco,folder", coco)
    with pytest.raises(UserError, match="the data set synthetic has no files to join with others"):
        load("coco,synthetic", f"{coco},")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    export_coco(tmp_path / "coco", n_train=6, n_val=3, size=32)
    return tmp_path / "coco"


@pytest.fixture
def path(coco: Path) -> Path:
    return coco / "annotations" / "captions_train2017.json"


@pytest.fixture
def values(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_coco_folder(coco):
    train, val = load("coco", coco), load("coco", str(coco), "val")
    assert (len(train), len(val)) == (6, 3)
    assert (train.name, train.split, val.split) == ("coco", "train", "val")
    assert train.image_ids == [1, 2, 3, 4, 5, 6]
    assert not set(train.image_ids) & set(val.image_ids)
    assert train.captions[2] == describe(scene(2))
    assert list(train.all_captions()) == [c for i in range(6) for c in describe(scene(i))]
    assert torch.equal(train.image(2), torch.from_numpy(draw(scene(2), 32)).permute(2, 0, 1))
    assert Path(train.path(2)) == coco / "train2017" / "000000000003.png"
    assert (train.missing, train.empty) == ([], 0)
    assert repr(train) == "<CaptionSet coco train: 6 images, 30 captions>"


def test_coco_2014_in_an_images_folder_and_the_year_option(coco):
    for split in ("train", "val"):
        (coco / "images").mkdir(exist_ok=True)
        (coco / f"{split}2017").rename(coco / "images" / f"{split}2014")
        old = coco / "annotations" / f"captions_{split}2017.json"
        old.rename(old.with_name(f"captions_{split}2014.json"))
    assert len(load("coco", coco, "val")) == len(load("coco", coco, "val", year=2014)) == 3
    with pytest.raises(MissingFileError, match=r"there is no .*captions_train2017\.json"):
        load("coco", coco, year=2017)


def test_both_splits_are_of_one_year(coco):
    """2014's validation images are among 2017's training images."""
    val = coco / "annotations" / "captions_val2017.json"
    val.rename(val.with_name("captions_val2014.json"))
    with pytest.raises(MissingFileError, match=r"there is no .*captions_val2017\.json"):
        load("coco", coco, "val")


def test_missing_images_are_named_counted_and_skipped_up_to_a_limit(coco):
    for number in (2, 5):
        (coco / "train2017" / f"{number:012d}.png").unlink()
    skipped = load("coco", coco, max_missing=2)
    assert skipped.image_ids == [1, 3, 4, 6]
    assert skipped.missing == ["000000000002.png", "000000000005.png"]
    assert skipped.captions[1] == describe(scene(2))
    assert repr(skipped) == "<CaptionSet coco train: 4 images, 20 captions, 2 files missing>"
    message = r"2 of 6 images of coco train are not in .*train2017 \(0{11}2.png, 0{11}5.png\); at most %d may be"
    for limit, options in ((0, {}), (1, {"max_missing": 1})):
        with pytest.raises(MissingFileError, match=message % limit):
            load("coco", coco, **options)


def test_the_default_limit_is_a_tenth(tmp_path):
    export_coco(tmp_path, n_train=10, n_val=1, size=16)
    (tmp_path / "train2017" / "000000000004.png").unlink()
    assert load("coco", tmp_path).missing == ["000000000004.png"]
    (tmp_path / "train2017" / "000000000005.png").unlink()
    with pytest.raises(MissingFileError, match="2 of 10 images"):
        load("coco", tmp_path)


def test_empty_captions_are_dropped_and_counted_and_spaces_tidied(coco, path, values):
    values["annotations"][0]["caption"] = " \n"
    values["annotations"][1]["caption"] = " a  star\nhere "
    for annotation in values["annotations"][5:10]:
        annotation["caption"] = ""
    write_json(path, values)
    read = load("coco", coco)
    assert read.empty == 6
    assert read.image_ids == [1, 3, 4, 5, 6]  # image 2 has no caption left
    assert read.captions[0][0] == "a star here"
    assert len(read.captions[0]) == 4
    for annotation in values["annotations"]:
        annotation["caption"] = ""
    write_json(path, values)
    with pytest.raises(UserError, match=r"no image of coco train in .* has a caption; check the annotations"):
        load("coco", coco)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda v: v["images"].append(v["images"][0]), "lists the image id 1 twice; give each image its own id"),
        (lambda v: v["annotations"].append(v["annotations"][0]), "lists the annotation id 10 twice; give each caption"),
        (lambda v: v["annotations"][3].update(image_id=99), "has a caption of the image id 99, which its images do"),
        (lambda v: v["images"], 'holds a json list; give COCO captions: an object with "images" and "annotations"'),
        (lambda v: v.pop("images") and None, "has no list named 'images'"),
        (lambda v: v.update(annotations={"1": "a star"}), "has no list named 'annotations'"),
    ],
)
def test_a_wrong_captions_json_is_named(coco, path, values, change, sentence):
    write_json(path, change(values) or values)
    with pytest.raises(UserError) as caught:
        load("coco", coco)
    assert str(caught.value).startswith(f"{path} {sentence}")


@pytest.mark.parametrize(
    ("part", "entry", "sentence"),
    [
        ("images", {"id": 2}, "has no file_name; write text for file_name"),
        ("images", {"id": 2, "file_name": 5}, "has the file_name 5; write text for file_name"),
        ("images", {"id": [2], "file_name": "2.png"}, r"has the id \[2\]; write a number or text for id"),
        ("annotations", 5, "is 5; write an object with id, image_id, caption"),
        ("annotations", None, "is None; write an object with"),
        ("annotations", {"id": 2, "caption": "a"}, "has no image_id; write a number or text for image_id"),
        ("annotations", {"id": 2, "image_id": True, "caption": "a"}, "has the image_id True; write a number"),
        ("annotations", {"id": 2, "image_id": 1, "caption": 7}, "has the caption 7; write text"),
    ],
)
def test_a_wrong_entry_of_a_captions_json_is_named(coco, path, values, part, entry, sentence):
    for number in (0, 1):
        write_json(path, values | {part: [*values[part][:number], entry, *values[part][number + 1 :]]})
        with pytest.raises(UserError, match=f"^{part[:-1]} {number + 1} of {path} {sentence}"):
            load("coco", coco)


def test_the_instances_file_in_place_of_the_captions(coco, path):
    path.with_name("instances_train2017.json").replace(path)
    with pytest.raises(UserError, match=r"captions_train2017\.json holds no captions \(is it the instances file\?\)"):
        load("coco", coco)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"{'images': []}", "is not json: Expecting property name"),
        (b'{"images": [', "is not json: Expecting value"),
        (b"", "is not json: Expecting value"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not json: it has a number of more than 4,300 digits; give complete json"),
        (b"[" * 100_000, "is not json: it is nested too deeply"),
        (b'{"a": "\xff\xfe"}', "is not UTF-8 text at byte 7; save it as UTF-8"),
    ],
)
def test_a_file_that_is_not_json(coco, path, data, sentence):
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load("coco", coco)
    assert str(caught.value).startswith(f"{path} {sentence}")


def test_unknown_names_splits_options_and_folders(coco, tmp_path):
    for error, sentence, arguments, options in [
        (UserError, "no data set 'coko'; choose one of coco, karpathy, flickr8k, folder, samples", ("coko", coco), {}),
        (UserError, "coco has no option yaer; it has max_missing, year", ("coco", coco), {"yaer": 2017}),
        (UserError, r"needs the folder it is in; give data_dir \(--data-dir data/coco\)", ("coco",), {}),
        (MissingFileError, "no folder .*nowhere; give the folder that holds the coco data", ("coco", "nowhere"), {}),
        (MissingFileError, "no .*captions_train2017.json; give the folder that holds COCO's", ("coco", tmp_path), {}),
    ]:
        with pytest.raises(error, match=sentence):
            load(*arguments, **options)


def test_a_registered_reader_is_a_data_set(monkeypatch, tmp_path, coco):
    """A function and a line: with files or drawn, with options of its own, and joined with others."""

    def read_names(data_dir: Path, split: str, upper: bool = False) -> CaptionSet:
        files = sorted(path.name for path in data_dir.glob("*.png"))
        captions = [[Path(file).stem.upper() if upper else Path(file).stem] for file in files]
        return CaptionSet("names", split, files, captions, files, data_dir)

    class Grey(CaptionSet):
        def image(self, i):
            return torch.full((3, 8, 8), i, dtype=torch.uint8)

    monkeypatch.setitem(READERS, "names", read_names)
    monkeypatch.setitem(READERS, "grey", lambda split: Grey("grey", split, [0, 1], [["black"], ["nearly black"]], []))
    write_images(tmp_path / "n", ["dog.png", "cat.png"])
    assert load("names", tmp_path / "n", "val", upper=True).captions == [["CAT"], ["DOG"]]
    assert load("names,coco", f"{tmp_path / 'n'},{coco}").files[0] == str(tmp_path / "n" / "cat.png")
    grey = load("grey")
    assert [grey.path(1), grey.sources()[1]().unique().item()] == [None, 1]
    with pytest.raises(UserError, match="the data set names has no option lower; it has upper"):
        load("names", tmp_path / "n", lower=True)
    with pytest.raises(UserError, match=r"no data set 'name'; choose one of coco, .*, synthetic, names, grey"):
        load("name")
    with pytest.raises(UserError, match="the data set grey has no files to join"):
        load("coco,grey", f"{coco},")


@pytest.mark.parametrize(
    ("name", "split"), [(name, "trian") for name in READERS] + [("coco", "test"), ("samples", "train")]
)
def test_an_unknown_split_names_the_known_ones(name, split, tmp_path):
    with pytest.raises(
        UserError, match=f"the data set {name} has no split '{split}'; choose one of (train, val|val, test)"
    ):
        load(name, tmp_path, split)


def karpathy_json(filepath: str | None = "val2014") -> dict:
    images = []
    for number, split in enumerate(["train", "restval", "val", "test", "train"]):
        sentences = [{"raw": f"Caption {n} of {number}.", "tokens": []} for n in range(2)]
        image = {"filename": f"p{number}.png", "split": split, "sentences": sentences, "imgid": number}
        images.append(image | ({"filepath": filepath, "cocoid": 100 + number} if filepath else {}))
    return {"images": images, "dataset": "coco"}


NAMES = [f"p{number}.png" for number in range(5)]


@pytest.mark.parametrize("under", ["val2014", "images/val2014"])
def test_karpathys_coco_with_restval_in_training(tmp_path, under):
    write_images(tmp_path / under, NAMES)
    write_json(tmp_path / "dataset_coco.json", karpathy_json())
    assert split_ids("karpathy", tmp_path) == [{100, 101, 104}, {102}, {103}]
    test = load("karpathy", tmp_path, "test")
    assert test.captions == [["Caption 0 of 3.", "Caption 1 of 3."]]
    assert test.image(0)[0, 0, 0] == 30


def test_karpathys_flickr8k_beside_an_images_folder(tmp_path):
    write_images(tmp_path / "images", NAMES)
    path = write_json(tmp_path / "elsewhere" / "splits.json", karpathy_json(None))
    with pytest.raises(MissingFileError, match=r"no dataset_\*\.json; name the json to read with the option annot"):
        load("karpathy", tmp_path)
    assert split_ids("karpathy", tmp_path, annotations=path) == [{0, 1, 4}, {2}, {3}]


def test_wrong_karpathy_files(tmp_path):
    write_images(tmp_path / "images", NAMES)
    path = tmp_path / "dataset_flickr8k.json"
    for change_it, sentence in [
        (lambda v: v["images"][1].pop("split"), "image 2 of PATH has no split; write text for split"),
        (lambda v: v["images"][1].update(split=3), "image 2 of PATH has the split 3; write text"),
        (lambda v: v["images"][3].update(sentences=[5]), "a sentence of image 4 of PATH is 5; write an object with"),
        (lambda v: v["images"][1].update(imgid=0), "PATH lists the image id 0 twice"),
        (lambda v: v["images"][1].update(filename="./p0.png"), "PATH lists the file p0.png twice; list each image"),
        (lambda v: v["images"].__delitem__(3), "PATH has no images of the split test; it has restval, train, val"),
        (lambda v: v.update(images={}), "PATH has no list named 'images'; give Karpathy's splits"),
    ]:
        wrong = karpathy_json(None)
        change_it(wrong)
        write_json(path, wrong)
        with pytest.raises(UserError) as caught:
            load("karpathy", tmp_path, "test")
        assert str(caught.value).startswith(sentence.replace("PATH", str(path)))


@pytest.fixture
def small_flickr8k(tmp_path: Path) -> Path:
    write_images(tmp_path / "Flicker8k_Dataset", [f"{n}.jpg" for n in range(8)])
    lines = [f"{n}.jpg#{k}\tA dog # {k} on image {n} ." for n in range(8) for k in range(5)]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join([*lines, "gone.jpg.1#0\tNo such image .", ""]))
    for name, numbers in (("train", (3, 1, 0, 4)), ("dev", (5,)), ("test", (6, 7))):
        (tmp_path / f"Flickr_8k.{name}Images.txt").write_text("".join(f"{n}.jpg\n" for n in numbers))
    return tmp_path


def test_flickr8k_as_published(small_flickr8k):
    train = load("flickr8k", small_flickr8k)
    assert train.image_ids == ["3.jpg", "1.jpg", "0.jpg", "4.jpg"]
    assert train.captions[1] == [f"A dog # {k} on image 1 ." for k in range(5)]
    assert train.image(0).shape == (3, 8, 8)
    assert split_ids("flickr8k", small_flickr8k, ("val", "dev", "test")) == [{"5.jpg"}, {"5.jpg"}, {"6.jpg", "7.jpg"}]


def test_wrong_flickr8k_folders(small_flickr8k):
    tokens = small_flickr8k / "Flickr8k.token.txt"
    good = tokens.read_text()
    for line, sentence in [
        ("8.jpg a dog\n", r"line 42 of .* is not `image.jpg#0<tab>caption`"),
        ("1.jpg#2\tA dog again .\n", r"line 42 of .* is a second 1.jpg#2"),
    ]:
        tokens.write_text(good + line)
        with pytest.raises(UserError, match=sentence):
            load("flickr8k", small_flickr8k)
    tokens.unlink()
    with pytest.raises(MissingFileError, match=r"there is no file at .*Flickr8k\.token\.txt"):
        load("flickr8k", small_flickr8k)
    tokens.write_text(good)
    (small_flickr8k / "Flicker8k_Dataset").rename(small_flickr8k / "other")
    with pytest.raises(MissingFileError, match=r"there is no folder .*images or .*Flicker8k_Dataset"):
        load("flickr8k", small_flickr8k)


ROWS = [(f"{n}.png", f'image {n}, said "{k}"') for n in range(4) for k in "ab"]
EXPECTED = {f"{n}.png": [f'image {n}, said "{k}"' for k in "ab"] for n in range(4)}


def quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


TABLES = {
    "header.csv": "image,caption\n" + "".join(f"{f},{quoted(c)}\n" for f, c in ROWS),
    "turned.csv": "text,FileName,length\r\n" + "".join(f"{quoted(c)},{f},3\r\n" for f, c in ROWS),
    "bare.csv": "".join(f"{f},{quoted(c)}\n\n" for f, c in ROWS),
    "bom.csv": "\ufefffile,sentence\n" + "".join(f"{f},{quoted(c)}\n" for f, c in ROWS),
    "id and image.csv": "id,image,caption\n" + "".join(f"7,{f},{quoted(c)}\n" for f, c in ROWS),
    "flickr30k.csv": "image_name| comment_number| comment\n" + "".join(f"{f}| 0| {c}\n" for f, c in ROWS),
    "kaggle.txt": '"image","caption"\n' + "".join(f"{f},{quoted(c)}\n" for f, c in ROWS),
    "bare.txt": "".join(f"{f}|{c}\n" for f, c in ROWS),
    "header.tsv": "path\tcaption\n" + "".join(f"{f}\t{c}\n" for f, c in ROWS),
    "bare.tsv": "".join(f"{f}\t{c}\n" for f, c in ROWS),
    "rows.json": json.dumps([{"file_name": f, "caption": c} for f, c in ROWS]),
    "results.json": json.dumps([{"image_id": f, "caption": c} for f, c in ROWS]),
    "lists.json": json.dumps([{"image": f, "captions": c} for f, c in EXPECTED.items()]),
    "mapping.json": "\ufeff" + json.dumps(EXPECTED),
    "spellings.json": json.dumps({a + f: cs[i] for f, cs in EXPECTED.items() for i, a in enumerate(("./", "a/../"))}),
    "rows.jsonl": "\n".join(json.dumps({"image": f, "text": c}) for f, c in ROWS) + "\n",
}  # fmt: skip


@pytest.mark.parametrize("under", [".", "images"])
@pytest.mark.parametrize("table", TABLES)
def test_every_form_is_read_for_training_and_for_scoring(tmp_path, table, under):
    write_images(tmp_path / under, list(EXPECTED))
    path = tmp_path / table
    path.write_bytes(TABLES[table].encode())
    assert read_captions(path) == EXPECTED
    options = {"annotations": path} if path.suffix == ".txt" else {}
    parts = [load("folder", tmp_path, split, val=0.25, test=0.25, **options) for split in ("train", "val", "test")]
    assert {f: c for part in parts for f, c in zip(part.image_ids, part.captions, strict=True)} == EXPECTED
    assert sum(map(len, parts)) == 4
    assert all(part.image(0).shape == (3, 8, 8) for part in parts)


def test_coco_annotations_keep_ids_for_scoring_and_give_files_for_training(tmp_path):
    write_images(tmp_path, list(EXPECTED))
    images = [{"id": 100 + n, "file_name": f"./{n}.png"} for n in range(4)]
    annotations = [{"id": k, "image_id": 100 + k // 2, "caption": caption} for k, (_, caption) in enumerate(ROWS)]
    path = write_json(tmp_path / "captions.json", {"images": images, "annotations": annotations})
    expected = {100 + n: captions for n, captions in enumerate(EXPECTED.values())}
    assert read_captions(path) == {str(i): captions for i, captions in expected.items()}
    read = load("folder", tmp_path, val=0, test=0)
    assert dict(zip(read.image_ids, read.captions, strict=True)) == expected
    assert read.files == list(EXPECTED)


def test_ids_stay_as_they_are_written(tmp_path):
    ids = ["139", "COCO_val2014_000000000139.jpg", "000139"]
    assert list(read_captions(write_json(tmp_path / "a.json", {image: ["x"] for image in ids}))) == ids


def test_a_caption_of_many_words_and_stray_quotation_marks(tmp_path):
    long = "word " * 100_000
    (tmp_path / "a.csv").write_text(f'image,caption\n1,"{long}"\n')
    (tmp_path / "a.tsv").write_text('1\tsays "no\n2\ta\n')
    assert read_captions(tmp_path / "a.csv") == {"1": [long]}
    assert read_captions(tmp_path / "a.tsv") == {"1": ['says "no'], "2": ["a"]}


def test_one_caption_an_image(tmp_path):
    path = tmp_path / "a.json"
    assert read_candidates(write_json(path, [{"image_id": 1, "caption": "a dog"}] * 2)) == {"1": "a dog"}
    with pytest.raises(UserError, match="has 2 captions for image 1; give each image exactly one"):
        read_candidates(write_json(path, {"1": ["a dog", "a cat"]}))
    with pytest.raises(UserError, match="has 0 captions for image 1"):
        read_candidates(write_json(path, {"1": []}))


def own_folder(tmp_path: Path, n: int) -> Path:
    names = [f"{number}.png" for number in range(n)]
    write_images(tmp_path, names)
    (tmp_path / "captions.csv").write_text("".join(f"{name},an image\n{name},one more\n" for name in names))
    return tmp_path


def test_the_drawn_split_is_by_image_by_seed_and_by_part(tmp_path):
    folder = own_folder(tmp_path, 200)
    train, val, test = split_ids("folder", folder, val=0.2, test=0.1)
    assert len(train | val | test) == len(train) + len(val) + len(test) == 200
    assert 25 <= len(val) <= 55
    assert 10 <= len(test) <= 32
    assert split_ids("folder", folder, val=0.2, test=0.1) == [train, val, test]
    assert split_ids("folder", folder, val=0.2, test=0.1, seed=1) != [train, val, test]
    assert all(len(captions) == 2 for captions in load("folder", folder).captions)


def test_added_images_move_no_other_to_another_split(tmp_path):
    before = split_ids("folder", own_folder(tmp_path, 100))
    after = split_ids("folder", own_folder(tmp_path, 160))
    for old, new in zip(before, after, strict=True):
        assert old <= new


def test_three_images_fill_three_splits_and_a_single_one_is_for_training(tmp_path):
    folder = own_folder(tmp_path / "3", 3)
    for seed in range(10):
        assert [len(ids) for ids in split_ids("folder", folder, seed=seed)] == [1, 1, 1]
    assert len(load("folder", own_folder(tmp_path / "1", 1))) == 1


def test_splits_that_the_table_names(tmp_path):
    write_images(tmp_path, list(EXPECTED))
    table = tmp_path / "captions.csv"
    table.write_text("image,caption,split\n0.png,a,train\n0.png,b,train\n1.png,c,dev\n2.png,d,Test\n3.png,e,train\n")
    (tmp_path / "notes.json").write_text("{}")
    assert split_ids("folder", tmp_path) == [{"0.png", "3.png"}, {"1.png"}, {"2.png"}]
    table.write_text("0.png,a,train\n1.png,c,val\n")
    assert split_ids("folder", tmp_path, ("train", "val")) == [{"0.png"}, {"1.png"}]
    with pytest.raises(UserError, match=r"none of the 2 images of .* is in the split test; choose another"):
        load("folder", tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("t.csv", "0.png,a man, with a hat\n", "line 1 of .* has the split ' with a hat'; write train, val or"),
        ("t.csv", "0.png,a\n1.png,a man, in a hat\n", "line 2 of .* has 3 columns, not 2; .* quotation marks around a"),
        ("t.csv", "image,caption\n0.png,a man, smiling\n", "line 2 of .* has 3 columns"),
        ("t.csv", "image,caption\n0.png\n", "line 2 of .* has 1 columns"),
        ("t.csv", "image,caption\n  ,a man\n", "line 2 of .* has no image and caption"),
        ("t.csv", "image,words\n0.png,a man\n", "the header of .* is image, words; name the columns image and caption"),
        ("t.csv", 'image,caption\n0.png,"a man\n', r"line 2 of .* is not a row \(unexpected end of data\); check"),
        ("t.csv", "", "holds no captions; give csv or tsv with the columns image and caption"),
        ("t.json", "{", "is not json: Expecting property name"),
        ("t.json", "[]", "holds no captions; give"),
        ("t.json", '"0.png"', "holds a json str; give"),
        ("t.json", '[{"image": "0.png"}]', "entry 1 of .* has no image and caption; give csv or tsv"),
        ("t.json", '["0.png"]', "entry 1 of .* has no image and caption"),
        ("t.json", '[{"image_id": 1, "caption": null}]', "entry 1 of .* has the caption None; write captions as text"),
        ("t.json", '[{"image_id": 1.5, "caption": "a"}]', "entry 1 of .* has the image 1.5; write ids as numbers"),
        ("t.json", '[{"image_id": true, "caption": "a"}]', "has the image True"),
        ("t.json", '{"1": ["a", 5]}', "entry '1' of .* has the caption 5"),
        ("t.json", '{"1": {"caption": "a"}}', r"entry '1' of .* has the caption \{'caption': 'a'\}"),
        ("t.json", '{"annotations": [{"id": 7, "caption": "a"}]}', "entry 1 of .* has no image and caption"),
        ("t.json", '{"annotations": [5]}', "entry 1 of .* has no image and caption"),
        ("t.json", '{"images": [{"filename": "0.png"}]}', "holds images but no annotations; read it as the data set"),
        ("t.jsonl", '{"image": "0.png", "text": "a"}\n{oops\n', "line 2 of .* is not json: Expecting"),
        ("t.jsonl", '{"image": "0.png", "text": "a", "split": 3}\n', "line 1 of .* has the split 3; write train"),
        ("t.jsonl", "1" * 5000, "line 1 of .* is not json: it has a number of more than 4,300 digits"),
    ],
)  # fmt: skip
def test_a_wrong_caption_file_is_named_with_the_place(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    for read in (lambda: load("folder", tmp_path), lambda: read_captions(tmp_path / name)):
        with pytest.raises(UserError, match=sentence):
            read()


def test_a_folder_without_a_caption_file_and_an_image_in_two_splits(tmp_path):
    (tmp_path / "t.txt").write_text("0.png a man")
    with pytest.raises(MissingFileError, match=r"holds no csv, tsv, json or jsonl file; put one captions.csv there"):
        load("folder", tmp_path)
    (tmp_path / "t.csv").write_text("image,caption,split\n0.png,a,train\n./0.png,b,val\n")
    with pytest.raises(UserError, match=r"puts 0.png into two splits"):
        load("folder", tmp_path)


def test_two_spellings_of_a_path_are_one_image(tmp_path):
    """In train and test both, an image would be scored that was trained on."""
    names = [f"{n}.png" for n in range(60)]
    write_images(tmp_path, names)
    rows = "".join(f"{name},one\n./{name},two\na/../{name},three\n" for name in names)
    (tmp_path / "captions.csv").write_text("image,caption\n" + rows)
    parts = [load("folder", tmp_path, split, val=0.3, test=0.3) for split in ("train", "val", "test")]
    assert sorted(file for part in parts for file in part.files) == sorted(names)
    assert all(captions == ["one", "two", "three"] for part in parts for captions in part.captions)


@pytest.mark.timeout(30)
def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "captions.csv")
    for path in (tmp_path / "captions.csv", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path} is no regular file"):
            read_captions(path)
    with pytest.raises(UserError, match=r"captions.csv is no regular file \(a pipe, a socket or a device\)"):
        load("folder", tmp_path)
    (tmp_path / "captions.csv").unlink()
    (tmp_path / "captions.csv").write_text("0.png,one\n")
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(BrokenImageError, match=r"0\.png cannot be read: it is no regular file"):
        load("folder", tmp_path).image(0)


DOCUMENTS = {
    "coco": {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(2)],
        "annotations": [{"id": n, "image_id": n, "caption": "a dog"} for n in range(2)],
    },
    "karpathy": {
        "images": [{"cocoid": n, "filepath": "images", "filename": f"{n}.png", "split": "train",
                    "sentences": [{"raw": "a dog"}]} for n in range(2)]
    },
    "list": [{"image": "0.png", "caption": "a dog", "split": "train"}, {"image_id": "1.png", "captions": ["a", "b"]}],
    "mapping": {"0.png": "a dog", "1.png": ["a", "b"]},
}  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 2), st.floats(), st.text(max_size=5),
    st.sampled_from(["", ".", "..", "/", "\0", "\ud800", "0.png", "train", "x" * 300, "a/" * 3000, 10**4000]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "image_id", "caption", "raw", "images", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: object) -> list[tuple]:
    """The path of every value in a json value."""
    children = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    return [(), *((key, *rest) for key, child in children for rest in places(child))]


@pytest.fixture(scope="module")
def small_coco(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mutations")
    for name in ("images", "train2017"):
        write_images(folder / name, ["0.png", "1.png"])
    return folder


@pytest.mark.parametrize("form", DOCUMENTS)
@settings(max_examples=80)
@given(data=st.data())
def test_any_json_value_in_any_place_gives_a_caption_set_or_a_user_error(small_coco, form, data):
    document = json.loads(json.dumps(DOCUMENTS[form]))
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = ("top", *data.draw(st.sampled_from(places(document))))
        holder = {"top": document}
        target = functools.reduce(lambda value, key: value[key], parents, holder)
        target[last] = data.draw(VALUES)
        document = holder["top"]
    path = write_json(small_coco / "annotations" / "captions_train2017.json", document)
    for reader, options in (("coco", {}), ("karpathy", {"annotations": path}), ("folder", {"annotations": path})):
        with contextlib.suppress(UserError):
            found = load(reader, small_coco, max_missing=2, **options)
            assert all(isinstance(caption, str) for caption in found.all_captions())
            assert len(found.sources()) == len(found.references()) == len(found) <= 2
    with contextlib.suppress(UserError):
        assert read_captions(path)


def test_options_of_a_folder(tmp_path):
    write_images(tmp_path / "images", list(EXPECTED))
    (tmp_path / "data").mkdir()
    for name in ("one.csv", "two.csv"):
        (tmp_path / "data" / name).write_text("".join(f"{file},{name}\n" for file in EXPECTED))
    with pytest.raises(MissingFileError, match=r"holds one.csv, two.csv; put one captions.csv there or name it"):
        load("folder", tmp_path / "data")
    options = {"annotations": tmp_path / "data" / "two.csv", "images": tmp_path / "images"}
    assert set(load("folder", tmp_path / "data", **options).all_captions()) == {"two.csv"}
    for options, (error, sentence) in [
        ({"annotations": tmp_path / "data" / "three.csv"}, (MissingFileError, "there is no file at .*three.csv")),
        ({"annotations": tmp_path / "images" / "0.png"}, (UserError, "0.png is not UTF-8 text at byte 0")),
        ({"val": 0.5, "test": 0.5}, (UserError, "val=0.5 and test=0.5 leave nothing to train on; give fractions")),
    ]:
        with pytest.raises(error, match=sentence):
            load("folder", tmp_path / "data", **options)


def test_the_synthetic_set_is_drawn_on_the_fly():
    drawn = load("synthetic", split="unseen", n=4, size=40, seed=3)
    assert len(drawn) == 4
    assert drawn.image(2).shape == (3, 40, 40)
    assert torch.equal(drawn.image(2), torch.from_numpy(draw(scene(2, 3, "unseen"), 40)).permute(2, 0, 1))
    assert drawn.captions[2] == describe(scene(2, 3, "unseen"), seed=3)
    assert drawn.path(2) is None
    assert all(torch.equal(source(), drawn.image(i)) for i, source in enumerate(drawn.sources()))
    assert all(check(caption, drawn.scene(2)).true for caption in drawn.captions[2])
    assert len(set(drawn.image_ids)) == 4
    with pytest.raises(UserError, match="size=8 is too small for synthetic images; use 16 or more"):
        load("synthetic", size=8)
    with pytest.raises(UserError, match="n=0 synthetic images are too few"):
        load("synthetic", n=0)


@pytest.fixture(params=["synthetic", "coco"])
def whole(request, coco):
    return load("synthetic", n=40) if request.param == "synthetic" else load("coco", coco)


def test_subsets_are_by_image_by_seed_and_nested(whole):
    few, more = whole.subset(3), whole.subset(5)
    assert few.image_ids == whole.subset(3).image_ids
    assert set(few.image_ids) < set(more.image_ids) < set(whole.image_ids)
    assert len(few) == 3
    assert any(whole.subset(3, seed).image_ids != few.image_ids for seed in range(1, 5))
    for i, j in enumerate(map(whole.image_ids.index, few.image_ids)):
        assert (few.captions[i], few.path(i)) == (whole.captions[j], whole.path(j))
        assert torch.equal(few.image(i), whole.image(j))
    assert whole.subset(1000).image_ids == whole.image_ids
    with pytest.raises(UserError, match="a subset of 0 images is empty"):
        whole.subset(0)


def test_a_set_pickles_as_spawned_workers_need_it(whole):
    data = pickle.dumps(whole)
    assert len(data) < len(whole) * 2000  # words and names, no pixels
    copy = pickle.loads(data)
    assert copy.captions == whole.captions
    assert np.array_equal(copy.image(1), whole.image(1))


def test_the_whole_of_flickr8k(flickr8k):
    sets = [load("flickr8k", flickr8k, split) for split in ("train", "val", "test")]
    assert [len(part) for part in sets] == [6000, 1000, 1000]
    assert [len(list(part.all_captions())) for part in sets] == [30000, 5000, 5000]
    assert len(set().union(*(part.image_ids for part in sets))) == 8000
    assert [part.missing for part in sets] == [[], [], []]
    assert sets[0].captions[0][0] == "A black dog is running after a white dog in the snow ."
    assert sets[2].image(999).shape == (3, 224, 224)


def test_real_coco_equals_what_pycocotools_reads(shared_data):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    folder = shared_data / "coco_small"
    ours = load("coco", folder, "val")
    theirs = COCO(str(folder / "annotations" / "captions_val2017.json"))
    assert len(ours) == 150
    assert ours.image_ids == theirs.getImgIds()
    for i, image_id in enumerate(ours.image_ids):
        raw = [a["caption"] for a in theirs.loadAnns(theirs.getAnnIds(image_id))]
        assert ours.captions[i] == [" ".join(caption.split()) for caption in raw]
        assert ours.image(i).shape[1:] == (theirs.imgs[image_id]["height"], theirs.imgs[image_id]["width"])


def test_samples_are_photographs_with_five_captions_each():
    samples = load("samples", split="test")
    assert len(samples) >= 12
    assert not samples.missing
    assert all(len(captions) == len(set(captions)) == 5 for captions in samples.captions)
    assert all(min(samples.image(i).shape[1:]) >= 150 for i in range(len(samples)))
    folder = Path(datasets.__file__).parent / "samples"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 1.5e6
    credits = (folder / "README.md").read_text("utf-8")
    assert all(f"`{image_id}`" in credits for image_id in samples.image_ids)


def test_samples_of_a_package_that_is_not_installed_are_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    samples = load("samples", split="test")
    assert sorted(samples.image_ids) == ["dahlia", "pagoda", "raccoon", "stairs"]
    assert len(samples.missing) == 12
