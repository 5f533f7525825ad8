"""`showtell download NAME`: the table, the question, and archives that end up as `showtell.datasets` reads them."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
from file_server import FileServer

from showtell import datasets, download, released
from showtell.__main__ import main
from showtell.download import DATASETS, unpack
from showtell.errors import MissingFileError, UserError
from showtell.recipes import recipe_named

TEXT = "annotations_trainval2017.zip"  # the archive of captions of `coco2017`
NOISE = {"__MACOSX/._train2017": b"x", "readme.txt": b"not wanted"}


def zip_of(members: dict[str, bytes]) -> bytes:
    """A zip file, with the folders listed as members of their own, as the published ones have them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for folder in sorted({name.rpartition("/")[0] + "/" for name in members if "/" in name}):
            archive.writestr(folder, b"")
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def coco_json(split: str, year: int) -> bytes:
    prefix = f"COCO_{split}2014_" if year == 2014 else ""
    images = [{"id": i, "file_name": f"{prefix}{i:012}.jpg"} for i in (1, 2)]
    captions = [{"id": n, "image_id": 1 + n % 2, "caption": f"a {split} cat {n}"} for n in range(10)]
    return json.dumps({"images": images, "annotations": captions}).encode()


def annotations(year: int) -> bytes:
    kinds = ("captions", "instances", "person_keypoints")
    return zip_of({
        f"annotations/{kind}_{split}{year}.json": coco_json(split, year) for kind in kinds for split in ("train", "val")
    })  # fmt: skip


def images(split: str, year: int) -> bytes:
    prefix = f"{split}2014/COCO_{split}2014_" if year == 2014 else f"{split}2017/"
    return zip_of({f"{prefix}{i:012}.jpg": b"an image" * 25_000 for i in (1, 2)} | NOISE)


def karpathy() -> bytes:
    """With all three json files, of which the reader wants one."""
    rows = [
        {"cocoid": n, "split": split, "filepath": f"{folder}2014", "filename": f"COCO_{folder}2014_{i:012}.jpg",
         "sentences": [{"raw": f"a {split} dog"}] * 5}
        for n, (split, folder, i) in enumerate(
            [("train", "train", 1), ("train", "train", 2), ("val", "val", 1), ("test", "val", 2)]
        )
    ]  # fmt: skip
    names = ("dataset_coco.json", "dataset_flickr8k.json", "dataset_flickr30k.json")
    return zip_of({name: json.dumps({"images": rows}).encode() for name in names})


def flickr8k_text() -> bytes:
    splits = {"train": "1.jpg", "dev": "2.jpg", "test": "3.jpg"}
    lists = {f"Flickr_8k.{split}Images.txt": f"{name}\n".encode() for split, name in splits.items()}
    lines = "".join(f"{name}#{n}\tA dog runs .\n" for name in splits.values() for n in range(5))
    return zip_of({**lists, "Flickr8k.token.txt": lines.encode(), "CrowdFlowerAnnotations.txt": b"", **NOISE})


FILES = {
    "annotations_trainval2014.zip": annotations(2014),
    "train2014.zip": images("train", 2014),
    "val2014.zip": images("val", 2014),
    TEXT: annotations(2017),
    "train2017.zip": images("train", 2017),
    "val2017.zip": images("val", 2017),
    "caption_datasets.zip": karpathy(),
    "Flickr8k_text.zip": flickr8k_text(),
    "Flickr8k_Dataset.zip": zip_of({f"Flicker8k_Dataset/{i}.jpg": b"an image" for i in (1, 2, 3)} | NOISE),
}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of small archives with the inner layout of the published ones; the table names it instead."""
    monkeypatch.setattr(released, "PAUSE_S", 0.0)
    monkeypatch.chdir(tmp_path)
    with FileServer(**FILES) as server:
        small = {}
        for name, dataset in DATASETS.items():
            archives = []
            for archive in dataset.archives:
                data = FILES[archive.file]
                algorithm = "md5:" if archive.checksum.startswith("md5:") else ""
                digest = hashlib.new(algorithm.strip(":") or "sha256", data).hexdigest()
                sizes = {"size": len(data), "unpacked": len(data)}
                archives.append(archive._replace(url=server.url + archive.file, checksum=algorithm + digest, **sizes))
            small[name] = dataset._replace(archives=tuple(archives))
        monkeypatch.setattr(download, "DATASETS", small)
        yield server


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_table_is_complete():
    assert download.names() == [
        "coco2014", "coco2017", "karpathy", "flickr8k", "showtell-attend-1", "showtell-classic-1",
    ]  # fmt: skip
    for dataset in DATASETS.values():
        assert dataset.reader in datasets.READERS
        recipe_named(dataset.recipe)
        for archive in dataset.archives:
            algorithm, _, digest = archive.checksum.rpartition(":")
            assert len(digest) == (32 if algorithm == "md5" else 64)
            assert set(digest) <= set("0123456789abcdef")
            assert archive.file in FILES
            assert archive.size > 1_000_000
            assert archive.unpacked > archive.size * 0.99
            assert archive.license
            assert archive.contents


@pytest.mark.parametrize(
    ("name", "split", "n"),
    [(name, split, 2) for name in ("coco2014", "coco2017") for split in ("train", "val")]
    + [("karpathy", "train", 2), ("karpathy", "val", 1), ("karpathy", "test", 1)]
    + [("flickr8k", split, 1) for split in ("train", "val", "test")],
)
def test_what_is_downloaded_is_read_without_another_word(server, name, split, n):
    assert download.run(name, "here", yes=True) == 0
    loaded = datasets.load(DATASETS[name].reader, "here", split, max_missing=0)
    assert len(loaded) == n
    assert {len(captions) for captions in loaded.captions} == {5}


def test_nothing_but_the_data_set_is_left(server):
    download.run("flickr8k", yes=True)
    assert tree(Path("data/flickr8k")) == {
        "Flickr8k.token.txt", "Flickr_8k.trainImages.txt", "Flickr_8k.devImages.txt", "Flickr_8k.testImages.txt",
        "Flicker8k_Dataset/1.jpg", "Flicker8k_Dataset/2.jpg", "Flicker8k_Dataset/3.jpg",
    }  # fmt: skip
    assert not Path("data/flickr8k/.download").exists()


def test_sizes_and_licences_are_shown_before_the_question(server, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: print(question) or "n")
    assert download.run("coco2017", "here") == 1
    shown = capsys.readouterr().out
    for text in (f"{TEXT}: 4.8 KB", "train2017.zip: 391.", "CC BY 4.0", "Flickr's terms of use"):
        assert text in shown.partition("Download ")[0]
    assert shown.endswith("Download 787.4 KB under these terms? [y/N] \nnothing was downloaded\n")
    assert server.requests == []
    assert not Path("here").exists()


@pytest.mark.parametrize(("answer", "n_files"), [("y", 2), ("Yes", 2), (" yes ", 2), (EOFError, 0)])
def test_a_yes_starts_it_and_no_answer_is_a_no(server, monkeypatch, answer, n_files):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", Mock(side_effect=[answer]))
    assert download.run("flickr8k", "here") == (0 if n_files else 1)
    assert len(server.requests) == n_files


def test_without_a_terminal_it_wants_yes(server, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match=r"no terminal .* type: showtell download coco2017 --data-dir 'my data' --yes"):
        download.run("coco2017", "my data")
    assert server.requests == []


def test_the_command_line_passes_name_folder_and_yes(server, capsys):
    assert main(["download", "flickr8k", "--data-dir", "here", "--yes"]) == 0
    assert len(datasets.load("flickr8k", "here", "train")) == 1
    assert main(["download", "coco"]) == 2
    assert "coco2014" in capsys.readouterr().err


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(UserError, match=r"under the name coco; choose one of coco2014, .*flickr8k, showtell-attend-1"):
        download.run("coco", yes=True)


def test_too_little_room_is_said_before(server, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1_100_000}))
    with pytest.raises(UserError, match=r"coco2017 needs 1\.2 MB and .* has 1\.0 MB free"):
        download.run("coco2017", yes=True)
    assert server.requests == []


def test_what_is_there_already_is_left_alone(server, capsys):
    download.run("coco2014", "here", yes=True)
    assert len(server.requests) == 3
    Path("here/train2014/000000000001.jpg").write_bytes(b"mine")
    before = tree(Path("here"))
    assert download.run("coco2014", "here") == 0  # nothing to agree to, so nothing is asked
    assert download.run("karpathy", "here", yes=True) == 0
    assert [path for path, _ in server.requests[3:]] == ["caption_datasets.zip"]
    assert tree(Path("here")) == before | {"dataset_coco.json"}
    assert Path("here/train2014/000000000001.jpg").read_bytes() == b"mine"
    assert (
        "there already, with 3 of 82,783 files; delete here/train2014 to download it again" in capsys.readouterr().out
    )


def test_the_end_says_what_to_type_next(server, capsys):
    download.run("flickr8k", "here", yes=True)
    assert capsys.readouterr().out.endswith(
        "showtell train --dataset flickr8k --data-dir here --recipe flickr8k-attend --out runs/flickr8k\n"
    )


def test_a_break_and_a_wrong_file_on_the_way_change_nothing(server):
    server.breaks["train2017.zip"] = 300_000
    server.wrong["val2017.zip"] = [b"wrong"]
    assert download.run("coco2017", "here", yes=True) == 0
    assert len(datasets.load("coco", "here", "val")) == 2
    assert server.asked_for("train2017.zip")[1].startswith("bytes=")


def test_offline_the_sentence_names_what_to_get_by_hand_and_a_file_got_by_hand_is_used_and_kept(server, monkeypatch):
    gone, server.files = server.files, {}
    with pytest.raises(MissingFileError, match=rf"HTTP status 404.*SHA-256 with [0-9a-f]{{64}}, .*here.{TEXT}$"):
        download.run("coco2017", "here", yes=True)
    (Path("here") / TEXT).write_bytes(gone.pop(TEXT))
    server.files = gone
    assert download.run("coco2017", "here", yes=True) == 0
    assert [path for path, _ in server.requests] == [TEXT, "train2017.zip", "val2017.zip"]
    assert (Path("here") / TEXT).is_file()
    assert not (Path("here") / "train2017.zip").exists()


def test_a_kill_while_unpacking_leaves_no_half_a_folder(server, monkeypatch):
    extract = zipfile.ZipFile.extract

    def killed(archive, member, path):
        if member.filename == "train2017/000000000002.jpg":
            raise KeyboardInterrupt
        return extract(archive, member, path)

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extract", killed)
        with pytest.raises(KeyboardInterrupt):
            download.run("coco2017", "here", yes=True)
    assert not Path("here/train2017").exists()
    assert download.run("coco2017", "here", yes=True) == 0
    assert [path for path, _ in server.requests].count("train2017.zip") == 1
    assert len(datasets.load("coco", "here", "train", max_missing=0)) == 2
    assert not Path("here/.download").exists()


def test_two_at_once_in_one_folder_is_refused(server):
    with (
        released.lock(Path("here/.download"), "is downloading into"),
        pytest.raises(UserError, match=r"is downloading into .*here.*; wait until it ends"),
    ):
        download.run("coco2017", "here", yes=True)


def test_a_released_model_is_downloaded_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(released, "MODELS", tmp_path)
    data = b"a model"
    monkeypatch.setattr(
        released, "RELEASES", {"tiny-1.safetensors": released.Release(len(data), hashlib.sha256(data).hexdigest())}
    )
    with FileServer(**{"tiny-1.safetensors": data}) as server:
        monkeypatch.setenv("SHOWTELL_MODELS", server.url)
        assert download.run("tiny-1") == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == released.cache_folder() / "tiny-1.safetensors"
    assert path.read_bytes() == data


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "name",
    ["../evil.jpg", "train/../../evil.jpg", "/evil.jpg", "train\\..\\..\\evil.jpg", "C:/evil.jpg", link("train/evil")],
    ids=["up", "up from inside", "absolute", "backslashes", "drive", "link"],
)
def test_an_archive_that_would_write_elsewhere_is_refused_whole(tmp_path, name):
    folder = tmp_path / "data"
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/1.jpg", b"fine")
        info = name if isinstance(name, zipfile.ZipInfo) else zipfile.ZipInfo("placeholder")
        info.filename = name if isinstance(name, str) else name.filename  # as it is, without normalising
        archive.writestr(info, b"../../../etc/passwd")
    with pytest.raises(UserError, match=r"would write outside its folder \(.*evil.*delete .*x\.zip and download it"):
        unpack(path, folder, ["train"])
    assert not folder.exists() or not tree(folder)
    assert tree(tmp_path) == {"x.zip"}


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"<html>Please log in</html>", "is damaged"),
        (FILES["train2017.zip"][:300], "is damaged"),
        (FILES["train2017.zip"].replace(b"an image", b"AN IMAGE", 1), "is damaged"),
        (FILES["val2017.zip"], "holds no train2017"),
    ],
    ids=["no zip", "cut short", "wrong bytes", "another archive"],
)
def test_an_archive_that_is_damaged_is_refused(tmp_path, data, fault):
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.zip {fault}.*; delete .*x\.zip and download it again"):
        unpack(tmp_path / "x.zip", tmp_path / "data", ["train2017"])
    assert not (tmp_path / "data" / "train2017").exists()


def test_an_archive_that_is_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.zip").write_bytes(zip_of({"train2017/1.jpg": bytes(10_000_000)}))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(UserError, match=r"unpacking x\.zip needs 9\.5 MB"):
        unpack(tmp_path / "x.zip", tmp_path / "data", ["train2017"])
