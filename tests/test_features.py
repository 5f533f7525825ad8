"""The feature cache: it holds what the backbone computes, whatever happens to a build."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from showtell import transforms
from showtell.backbones import Backbone
from showtell.datasets import CaptionSet, load
from showtell.errors import UserError
from showtell.features import FeatureCache, fingerprint
from showtell.transforms import TINY, Transform

ROOT = Path(__file__).parent.parent


def frozen(name: str = "tiny", seed: int = 0, **arguments) -> Backbone:
    torch.manual_seed(seed)
    backbone = Backbone(name, weights=None, **arguments)
    backbone.fine_tune(None)
    return backbone


def write_images(folder: Path, n: int, first: int = 0) -> CaptionSet:
    """`n` synthetic scenes as files, in a set of all that `folder` holds."""
    scenes = load("synthetic", n=first + n, size=48)
    folder.mkdir(exist_ok=True)
    for i in range(first, first + n):
        Image.fromarray(scenes.image(i).permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return images_in(folder)


def images_in(folder: Path) -> CaptionSet:
    files = sorted(path.name for path in folder.iterdir())
    return CaptionSet("folder", "train", files, [["an image"]] * len(files), files, folder)


def fresh_features(backbone: Backbone, transform: Transform, images: CaptionSet) -> torch.Tensor:
    with torch.inference_mode():
        return backbone(torch.stack([transform(images.image(i)) for i in range(len(images))]))


def assert_holds(cache: FeatureCache, backbone: Backbone, images: CaptionSet) -> None:
    """Check that every image has a row, and that it is the backbone's output in half precision."""
    cached, fresh = cache.get(cache.rows(images)), fresh_features(backbone, TINY, images)
    assert cached.dtype == torch.float16
    torch.testing.assert_close(cached.float(), fresh, rtol=2**-10, atol=1e-6)
    assert fresh.std(0).max() > 1e-3, "this backbone cannot tell the images apart: the comparison proves nothing"


def test_mirror_images_have_a_cache_of_their_own(images, backbone, tmp_path):
    plain = FeatureCache.open(tmp_path / "cache", backbone, TINY)
    mirrored = FeatureCache.open(tmp_path / "cache", backbone, replace(TINY, mirror=True))
    assert plain.folder != mirrored.folder
    mirrored.build(images)
    assert len(plain) == 0
    with torch.inference_mode():
        fresh = backbone(torch.stack([TINY(images.image(i)).flip(-1) for i in range(len(images))]))
    torch.testing.assert_close(mirrored.get(mirrored.rows(images)).float(), fresh, rtol=2**-10, atol=1e-6)
    assert (fresh - fresh_features(backbone, TINY, images)).abs().max() > 1e-3


@pytest.fixture
def images(tmp_path: Path) -> CaptionSet:
    return write_images(tmp_path / "images", 10)


@pytest.fixture
def backbone() -> Backbone:
    return frozen()


@pytest.fixture
def cache(tmp_path: Path, backbone: Backbone) -> FeatureCache:
    return FeatureCache.open(tmp_path / "cache", backbone, TINY)


@pytest.mark.parametrize("arguments", [{}, {"grid": True}, {"name": "resnet18"}], ids=["vector", "grid", "resnet18"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_cached_features_are_fresh_ones(tmp_path, images, arguments, num_workers, monkeypatch):
    backbone = frozen(**arguments)
    cache = FeatureCache.open(tmp_path / "cache", backbone, TINY)
    assert cache.missing(images) == list(range(10))
    monkeypatch.setattr("showtell.features.BATCH_SIZE", 4)
    assert cache.build(images, num_workers=num_workers, progress=False) == []
    assert cache.missing(images) == []
    assert cache.shape == fresh_features(backbone, TINY, images).shape[1:]
    assert_holds(cache, backbone, images)
    assert torch.equal(cache[3], cache.get([3])[0])
    assert len(cache) == 10


def test_drawn_images_are_known_by_their_pixels(cache, backbone):
    cache.build(load("synthetic", n=6), progress=False)
    assert_holds(cache, backbone, load("synthetic", n=6))
    assert cache.rows(load("synthetic", n=8)).tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert cache.rows(load("synthetic", n=2, seed=1)).tolist() == [-1, -1]
    assert cache.rows(load("synthetic", n=2, size=96)).tolist() == [-1, -1]


def test_bfloat16_is_close_and_kept_apart(tmp_path, images, backbone, cache):
    cache.build(images, progress=False)
    reduced = FeatureCache.open(tmp_path / "cache", backbone, TINY, precision="bfloat16")
    assert reduced.missing(images) == list(range(10))
    reduced.build(images, progress=False)
    exact, rough = cache.get(cache.rows(images)).float(), reduced.get(reduced.rows(images)).float()
    assert 0 < (exact - rough).abs().max() < 0.02 * exact.abs().max()


def test_building_leaves_the_backbone_as_it_was(images, backbone, cache):
    before = {name: (t.clone(), t.stride()) for name, t in backbone.state_dict().items()}
    cache.build(images, progress=False)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.stride() == before[name][1]


def test_the_fingerprint_differs_whenever_the_features_would():
    resnet, strided = frozen("resnet50"), frozen("resnet50", stride_in_1x1=True)
    strided.load_state_dict(resnet.state_dict())
    prints = [fingerprint(resnet, TINY), fingerprint(strided, TINY)]
    prints += [fingerprint(resnet, Transform(resize=(72, 72))), fingerprint(resnet, TINY, "bfloat16")]
    grid = copy.deepcopy(resnet)
    assert fingerprint(grid, TINY) == prints[0]
    grid.grid = True
    prints.append(fingerprint(grid, TINY))
    with torch.no_grad():
        resnet.net.bn1.running_mean[0] += 1e-3
    prints.append(fingerprint(resnet, TINY))
    assert len(set(prints)) == 6


def test_a_backbone_that_changed_since_the_cache_was_opened_is_refused(images, backbone, cache):
    with torch.no_grad():
        backbone.net.patches[0].weight.mul_(2)
    with pytest.raises(UserError, match=r"the weights of tiny changed after .* was opened; open it again"):
        cache.build(images, progress=False)


def test_another_backbone_gets_another_folder(tmp_path, images, cache):
    cache.build(images, progress=False)
    other = FeatureCache.open(tmp_path / "cache", frozen(seed=1), TINY)
    assert other.folder.parent == cache.folder.parent
    assert other.missing(images) == list(range(10))
    again = FeatureCache.open(tmp_path / "cache", frozen(), TINY)
    assert again.folder == cache.folder
    assert again.missing(images) == []
    about = json.loads((cache.folder / "cache.json").read_text("utf-8"))
    assert about["fingerprint"].startswith(cache.folder.name)
    assert Transform.from_dict(about["transform"]) == TINY


def count_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the sizes of the batches a backbone computes from now on."""
    sizes: list[int] = []
    forward = Backbone.forward

    def counting(self, images):
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", counting)
    return sizes


def test_new_images_extend_a_cache(images, backbone, cache, monkeypatch):
    cache.build(images, progress=False)
    before = cache.get(cache.rows(images))
    computed = count_computed(monkeypatch)
    more = write_images(Path(images.folder), 5, first=10)
    assert cache.missing(more) == [10, 11, 12, 13, 14]
    cache.build(more, progress=False)
    cache.build(more, progress=False)
    assert sum(computed) == 5
    assert torch.equal(cache.get(cache.rows(images)), before)
    assert_holds(cache, backbone, more)


def test_a_moved_or_copied_folder_is_known_again_without_the_network(tmp_path, images, cache, monkeypatch):
    cache.build(images, progress=False)
    rows = cache.rows(images)
    other = tmp_path / "elsewhere"
    shutil.copytree(images.folder, other, copy_function=shutil.copyfile)  # without the times of change
    computed = count_computed(monkeypatch)
    assert cache.rows(images_in(other)).tolist() == rows.tolist()
    cache.build(images_in(other), progress=False)
    assert computed == []
    assert len(cache) == 10
    assert str(other / "000.png") in (cache.folder / "index.jsonl").read_text("utf-8")


def test_images_of_one_name_size_and_time_are_not_confused(tmp_path, backbone, cache):
    first, second = write_images(tmp_path / "a", 1), write_images(tmp_path / "b", 1)
    pixels = first.image(0).clone()
    for images, value in ((first, 0), (second, 255)):
        pixels[:] = value
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(images.path(0), format="BMP")
        os.utime(images.path(0), ns=(10**18, 10**18))
    assert os.path.getsize(first.path(0)) == os.path.getsize(second.path(0))
    cache.build(first, progress=False)
    assert cache.missing(second) == [0]
    cache.build(second, progress=False)
    assert_holds(cache, backbone, CaptionSet("folder", "", [0, 1], [[], []], ["a/000.png", "b/000.png"], tmp_path))


def test_a_changed_image_is_computed_anew(images, backbone, cache):
    cache.build(images, progress=False)
    shutil.copyfile(images.path(5), images.path(2))
    write_images(Path(images.folder), 1, first=20)
    os.replace(Path(images.folder) / "020.png", images.path(7))
    assert cache.missing(images) == [7]  # image 2 is now a copy of 5, which has a row
    cache.build(images, progress=False)
    assert_holds(cache, backbone, images)


def test_equal_images_share_a_row(images, backbone, cache):
    shutil.copyfile(images.path(0), images.path(1))
    cache.build(images, progress=False)
    rows = cache.rows(images)
    assert rows[0] == rows[1]
    assert len(cache) == 9
    assert_holds(cache, backbone, images)


BUILD_SLOWLY = textwrap.dedent(
    """
    import sys, time
    from showtell import features
    from test_features import TINY, FeatureCache, frozen, images_in
    from pathlib import Path

    cache_folder, folder, pause_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    cache = FeatureCache.open(cache_folder, frozen(), TINY)
    images = images_in(folder)
    stream = features.stream_images
    def slow(*arguments):
        for batch in stream(*arguments):
            time.sleep(len(batch) * pause_s)
            yield batch
    features.stream_images, features.BATCH_SIZE = slow, 2
    cache.build(images, progress=False)
    """
)


@contextlib.contextmanager
def building_elsewhere(cache: FeatureCache, images: CaptionSet, pause_s: float, n_rows: int):
    """Another process that builds the cache slowly and has `n_rows` or more; it is killed at the end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", BUILD_SLOWLY, str(cache.folder.parent), images.folder, str(pause_s)]
    with subprocess.Popen(command, env=environment, cwd=ROOT) as process:
        try:
            limit = time.monotonic() + 60
            while len(cache) < n_rows:
                assert process.poll() is None, "the build ended before it could be disturbed"
                assert time.monotonic() < limit, "the build makes no progress"
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def test_a_killed_build_goes_on_where_it_stopped(tmp_path, images, backbone, cache, monkeypatch):
    images = write_images(Path(images.folder), 30, first=10)
    with building_elsewhere(cache, images, 0.15, n_rows=4):
        pass
    done = len(FeatureCache.open(tmp_path / "cache", backbone, TINY))
    assert 4 <= done < 40
    computed = count_computed(monkeypatch)
    assert cache.build(images, progress=False) == []  # the dead process holds no lock either
    assert sum(computed) == 40 - done
    assert_holds(cache, backbone, images)


def test_a_second_build_waits_for_the_first_and_computes_nothing_again(tmp_path, images, cache, monkeypatch, capfd):
    with building_elsewhere(cache, images, 0.2, n_rows=2) as process:
        reader = FeatureCache.open(tmp_path / "cache", frozen(), TINY)
        rows = reader.rows(images)
        assert reader.get(rows[rows >= 0]).isfinite().all()
        computed = count_computed(monkeypatch)
        assert cache.build(images, progress=False) == []
        assert process.wait(60) == 0
    assert computed == []
    assert cache.missing(images) == []
    note = capfd.readouterr().err
    assert re.fullmatch(rf"note: process {process.pid} on \S+ is building the features in \S+; waiting .*\n", note)


def test_a_complete_cache_is_not_locked(tmp_path, images, cache):
    """Of three runs that start together, none has to wait for another, or ends because of it."""
    cache.build(images, progress=False)
    code = (
        "import sys; from showtell.files import lock\n"
        "with lock(sys.argv[1], 'is building the features in'): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(cache.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(cache.build, images, progress=False).result(timeout=20) == []
    finally:
        holder.communicate("")


def make_read_only(monkeypatch) -> None:
    """No file in the cache can be opened for writing: the tests may run as root, whom modes do not stop."""

    def refuse(path, mode="r", *arguments, **options):
        if set(mode) & set("wax+"):
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, mode, *arguments, **options)

    open_file = open
    for module in ("features", "files"):
        monkeypatch.setattr(f"showtell.{module}.open", refuse, raising=False)


def test_a_complete_cache_may_be_read_only(tmp_path, images, backbone, cache, monkeypatch):
    Path(images.path(3)).write_text("not an image")
    assert len(cache.build(images, progress=False)) == 1
    moved = shutil.copytree(images.folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    make_read_only(monkeypatch)
    for here in (images, images_in(Path(moved))):
        cache = FeatureCache.open(tmp_path / "cache", backbone, TINY)
        (sentence,) = cache.build(here, progress=False)
        assert str(Path(here.folder) / "003.png") in sentence
        assert (cache.rows(here) >= 0).sum() == 9
    more = write_images(Path(images.folder), 2, first=10)
    with pytest.raises(UserError, match=r"lacks the features of 3 images and cannot be written to .*; make it writ"):
        cache.build(more, progress=False)


def test_an_image_saved_while_it_is_read_is_computed_anew(images, backbone, cache, monkeypatch):
    """Between decoding an image and digesting it, the file changes."""
    path, read = Path(images.path(3)), []
    newer = Path(images.path(4)).read_bytes()
    decode = transforms.decode_image

    def decode_and_save(data, source=None):
        image = decode(data, source)
        if source == str(path) and source not in read:
            path.write_bytes(newer + b"x")
        read.append(source)
        return image

    for module in ("transforms", "image_stream"):
        monkeypatch.setattr(f"showtell.{module}.decode_image", decode_and_save)
    cache.build(images, progress=False)
    assert len(read) == 10
    assert cache.missing(images) == [3]
    cache.build(images, progress=False)
    assert_holds(cache, backbone, images)


def test_every_file_is_read_once(images, cache, monkeypatch):
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(str(path)) or read_bytes(path))
    cache.build(images, progress=False)
    assert sorted(path for path in read if path.endswith(".png")) == [images.path(i) for i in range(10)]


def test_one_process_cannot_build_twice_at_once(images, backbone, cache, monkeypatch):
    forward = Backbone.forward

    def build_inside(self, batch):
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is building"):
            FeatureCache(cache.folder, cache.shape, backbone, TINY).build(images, progress=False)
        return forward(self, batch)

    monkeypatch.setattr(Backbone, "forward", build_inside)
    cache.build(images, progress=False)
    assert len(cache) == 10


@pytest.mark.parametrize(("cut", "kept"), [(1, 9), (3, 9), (40, 9), ("lines", 4), ("everything", 0)])
def test_a_torn_index_is_cut_at_its_last_whole_line(tmp_path, images, backbone, cache, cut, kept):
    cache.build(images, progress=False)
    index = cache.folder / "index.jsonl"
    whole = index.read_bytes()
    lines = whole.splitlines(keepends=True)
    torn = {"lines": b"".join(lines[:4]) + b"\0" * 500, "everything": b""}
    index.write_bytes(torn[cut] if cut in torn else whole[:-cut])
    cache = FeatureCache.open(tmp_path / "cache", backbone, TINY)
    assert len(cache) == kept
    cache.build(images, progress=False)
    assert_holds(cache, backbone, images)
    assert (cache.folder / "features.f16").stat().st_size == 10 * 96 * 2
    assert len(index.read_bytes().splitlines()) == 10
    assert_holds(FeatureCache.open(tmp_path / "cache", backbone, TINY), backbone, images)


@pytest.mark.parametrize("change", [-1, -96 * 2 * 4, 77], ids=["torn row", "lost rows", "surplus"])
def test_rows_and_index_that_disagree_are_brought_together(tmp_path, images, backbone, cache, change):
    cache.build(images, progress=False)
    features = cache.folder / "features.f16"
    os.truncate(features, features.stat().st_size + change)
    cache = FeatureCache.open(tmp_path / "cache", backbone, TINY)
    assert len(cache) == {-1: 9, -96 * 2 * 4: 6, 77: 10}[change]
    more = write_images(Path(images.folder), 2, first=10)
    cache.build(more, progress=False)
    assert_holds(cache, backbone, more)
    assert features.stat().st_size == 12 * 96 * 2


def test_a_build_that_fails_in_the_middle_keeps_what_it_had(images, backbone, cache, monkeypatch):
    forward, calls = Backbone.forward, []

    def interrupted(self, batch):
        calls.append(len(batch))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "forward", interrupted)
        patch.setattr("showtell.features.BATCH_SIZE", 3)
        with pytest.raises(KeyboardInterrupt):
            cache.build(images, progress=False)
    assert len(cache) == 6
    computed = count_computed(monkeypatch)
    cache.build(images, progress=False)
    assert sum(computed) == 4
    assert_holds(cache, backbone, images)


def test_a_cache_deleted_while_open_is_built_again(images, backbone, cache):
    cache.build(images, progress=False)
    assert len(cache) == 10
    shutil.rmtree(cache.folder)
    cache.build(images, progress=False)
    assert_holds(cache, backbone, images)


def test_the_index_never_names_a_row_that_a_power_cut_could_take(images, cache, monkeypatch):
    monkeypatch.setattr("showtell.features.COMMIT_EVERY_S", 0)
    monkeypatch.setattr("showtell.features.BATCH_SIZE", 4)
    fsync, safe, named = os.fsync, [0], []

    def watched(descriptor):
        fsync(descriptor)
        lines = (cache.folder / "index.jsonl").read_bytes().splitlines()
        if os.path.samestat(os.fstat(descriptor), os.stat(cache.folder / "features.f16")):
            safe.append(os.fstat(descriptor).st_size // (96 * 2))
        named.append((len(lines), safe[-1]))

    monkeypatch.setattr(os, "fsync", watched)
    cache.build(images, progress=False)
    assert all(n_lines <= n_safe for n_lines, n_safe in named)
    assert safe[-1] == 10
    assert named[-1] == (10, 10)


def test_too_little_disk_space_is_reported_before_the_build(images, cache, monkeypatch):
    usage = shutil.disk_usage(cache.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the features of 10 images needs? .* KB .* has 1000 bytes free"):
        cache.build(images, progress=False)
    assert not (cache.folder / "features.f16").exists()


def test_a_disk_that_fills_up_during_the_build_is_reported(images, backbone, cache, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device; .* continues where"):
        cache.build(images, progress=False)
    monkeypatch.setattr(os, "fsync", fsync)
    assert calls
    cache.build(images, progress=False)
    assert_holds(cache, backbone, images)


def test_the_size_is_printed_beforehand_on_standard_error(images, cache, capsys):
    cache.build(images)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"the features of 10 images: 1.9 KB in {cache.folder}, computed once")
    cache.build(images)
    assert capsys.readouterr() == ("", "")


def test_broken_images_are_named_skipped_and_tried_again(images, backbone, cache, monkeypatch):
    folder = Path(images.folder)
    good = (folder / "004.png").read_bytes()
    (folder / "002.png").write_bytes(b"")
    (folder / "004.png").write_text("not an image")
    (folder / "006.png").unlink()
    (folder / "008.png").write_bytes((folder / "008.png").read_bytes()[:60])
    monkeypatch.setattr("showtell.features.BATCH_SIZE", 3)
    broken = cache.build(images, progress=False)
    assert len(broken) == 4
    for name, sentence in zip(("002", "004", "006", "008"), broken, strict=True):
        assert str(folder / f"{name}.png") in sentence
    assert cache.rows(images).tolist() == [0, 1, -1, 2, -1, 3, -1, 4, -1, 5]
    (folder / "004.png").write_bytes(good)
    assert len(cache.build(images, progress=False)) == 3
    assert cache.missing(images) == [2, 6, 8]
    with pytest.raises(IndexError, match="rows -1 to 6 are out of range"):
        cache.get(cache.rows(images))


def test_too_many_broken_images_stop_the_build_with_their_list(images, cache, monkeypatch):
    monkeypatch.setattr("showtell.features.BATCH_SIZE", 1)
    for i in range(5, 9):
        Path(images.path(i)).write_bytes(b"")
    with pytest.raises(UserError, match=r"3 of 10 images .* at most 2 .*005\.png, .*007\.png\); repair or remove"):
        cache.build(images, max_broken=2, progress=False)
    assert len(cache) == 5
    assert len(cache.build(images, max_broken=4, progress=False)) == 4


def test_a_folder_without_one_readable_image_stops_the_build(images, cache):
    for i in range(10):
        Path(images.path(i)).write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 10 images can be read \(.*000\.png, .*009\.png\)"):
        cache.build(images, progress=False)


@pytest.mark.parametrize(
    ("transform", "sentence"),
    [
        (Transform(72, 64, random_crop=True), r"random_crop, flip\) cannot be cached; give transform.evaluation"),
        (Transform(resize=(64, 64), flip=True), r"random_crop, flip\) cannot be cached; give transform.evaluation"),
        (Transform(resize=64), r"many shapes, a cache needs one; add a crop"),
        (lambda image: image, r"a function is not a transform that a cache can identify"),
    ],
)
def test_random_and_unsized_transforms_are_refused(tmp_path, transform, sentence):
    with pytest.raises(UserError, match=sentence):
        FeatureCache.open(tmp_path, frozen(), transform)
    assert list(tmp_path.iterdir()) == []


def test_a_backbone_that_trains_and_an_unknown_precision_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tiny cannot be cached while training; freeze it with backbone.fine_tune"):
        FeatureCache.open(tmp_path, Backbone("tiny"), TINY)
    with pytest.raises(UserError, match="precision='half' is not known; choose one of float32, bfloat16"):
        FeatureCache.open(tmp_path, frozen(), TINY, precision="half")


def test_features_beyond_half_precision_are_refused(tmp_path, images):
    backbone = frozen()
    with torch.no_grad():
        backbone.net.stages[-2].weight.fill_(1e6)
    with pytest.raises(UserError, match="half precision ends at 65504"):
        FeatureCache.open(tmp_path / "cache", backbone, TINY).build(images, progress=False)


def test_a_cache_pickles_small_and_reads_alike(images, cache):
    cache.build(images, progress=False)
    rows = cache.rows(images)
    cache.get(rows)
    data = pickle.dumps(cache)
    assert len(data) < 1000
    reader = pickle.loads(data)
    assert torch.equal(reader.get(rows), cache.get(rows))
    assert reader.rows(images).tolist() == rows.tolist()
    with pytest.raises(UserError, match=r"made for reading cannot build; open it with FeatureCache\.open"):
        reader.build(images, progress=False)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_read_the_same(images, cache, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    cache.build(images, progress=False)
    loader = torch.utils.data.DataLoader(cache, 4, num_workers=1, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), cache.get(range(10)))


def test_a_reader_sees_what_another_adds(tmp_path, images, backbone, cache):
    reader = FeatureCache.open(tmp_path / "cache", backbone, TINY)
    assert len(reader) == 0
    with pytest.raises(IndexError, match="has 0"):
        reader[0]
    cache.build(images, progress=False)
    assert_holds(reader, backbone, images)
    more = write_images(Path(images.folder), 3, first=10)
    cache.build(more, progress=False)
    assert_holds(reader, backbone, more)


@pytest.mark.slow
def test_photographs_through_a_real_resnet(tmp_path, flickr8k, weights):
    photographs = load("flickr8k", flickr8k, split="val").subset(24)
    transform = Transform(resize=256, crop=224)
    backbone = Backbone("resnet50", weights=weights / "resnet50_imagenet_pruned.safetensors", stride_in_1x1=True)
    cache = FeatureCache.open(tmp_path, backbone, transform)
    assert cache.build(photographs, progress=False) == []
    cached, fresh = cache.get(cache.rows(photographs)).float(), fresh_features(backbone, transform, photographs)
    torch.testing.assert_close(cached, fresh, rtol=2**-10, atol=1e-4)
