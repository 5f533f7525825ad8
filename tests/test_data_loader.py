"""The loader: every caption once per epoch, the same batches with any workers, and broken images counted."""

from __future__ import annotations

import shutil
import warnings
from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import SequentialSampler, SubsetRandomSampler
from torchvision import transforms

from showtell import data_loader, datasets, synthetic, vocabulary
from showtell.backbones import Backbone
from showtell.data_loader import (
    Broken,
    CaptionDataset,
    ImageBatchSampler,
    LengthBatchSampler,
    collate,
    get_loader,
)
from showtell.datasets import CaptionSet
from showtell.decoders import IGNORE
from showtell.errors import MissingFileError, UserError
from showtell.features import FeatureCache
from showtell.transforms import TINY, Transform
from showtell.vocabulary import Vocabulary, default_vocab_file

AUGMENTED = Transform(resize=40, crop=32, random_crop=True, flip=True)


@pytest.fixture(scope="module")
def scenes() -> CaptionSet:
    return datasets.load("synthetic", n=30)


@pytest.fixture(scope="module")
def vocab(scenes) -> Vocabulary:
    return Vocabulary.build(scenes.all_captions(), 1)


@pytest.fixture
def images(tmp_path, scenes) -> CaptionSet:
    """Ten scenes as PNG files with their captions."""

    files = [f"{i}.png" for i in range(10)]
    for i, file in enumerate(files):
        Image.fromarray(scenes.image(i).permute(1, 2, 0).numpy()).save(tmp_path / file)
    return CaptionSet("folder", "train", files, scenes.captions[:10], files, tmp_path)


def as_bytes(batches) -> list[tuple]:
    """Return batches in a form that compares by value."""
    return [(images.numpy().tobytes(), captions.tolist()) for images, captions in batches]


@pytest.mark.parametrize("tokenizer", ["treebank", "ptb"])
def test_a_mirrored_image_swaps_left_and_right_in_its_captions(tokenizer):
    """In compounds too, which are one token of these tokenisers."""
    one = datasets.load("synthetic", n=1)
    texts = ["a dog left of a cat", "the right hand of a left-handed or right-handed man"]
    captions = CaptionSet("folder", "train", ["0"] * 40, [texts] * 40, ["0"] * 40, ".")
    captions.image = lambda i: one.image(0)
    vocab = Vocabulary.build(texts, 1, tokenizer)
    samples = CaptionDataset(captions, vocab, Transform(resize=(32, 32), flip=True), group="image")
    plain = samples.transform.evaluation()(one.image(0))
    seen = set()
    for image, (first, second) in (samples[i] for i in range(40)):
        mirrored = not torch.equal(image, plain)
        assert torch.equal(image, plain.flip(-1) if mirrored else plain)
        assert vocab.decode(first) == ("A dog right of a cat" if mirrored else "A dog left of a cat")
        sides = ("left", "right", "left") if mirrored else ("right", "left", "right")
        assert vocab.decode(second) == "The {} hand of a {}-handed or {}-handed man".format(*sides)
        seen.add(mirrored)
    assert seen == {True, False}


LENGTHS = st.lists(st.integers(4, 12), max_size=60)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_every_caption_comes_exactly_once_in_batches_of_one_length(lengths, batch_size, epoch, shuffle):
    sampler = LengthBatchSampler(lengths, batch_size, shuffle=shuffle)
    sampler.epoch = epoch
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len({lengths[i] for i in batch}) == 1 for batch in batches)
    sizes = [len(batch) for batch in batches]
    full = sum(count // batch_size for count in Counter(lengths).values())
    assert sizes[:full] == [batch_size] * full
    assert all(0 < size < batch_size for size in sizes[full:])
    assert len(sizes) - full <= len(set(lengths))
    assert len(sampler) == len(batches)


@given(st.integers(0, 40), st.integers(1, 9), st.integers(0, 3))
def test_every_image_comes_exactly_once(n, batch_size, epoch):
    sampler = ImageBatchSampler(n, batch_size)
    sampler.epoch = epoch
    batches = list(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(sampler) == len(batches)


def both_samplers(lengths, batch_size, **options):
    return LengthBatchSampler(lengths, batch_size, **options), ImageBatchSampler(len(lengths), batch_size, **options)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 12))
def test_shares_of_processes_are_disjoint_and_complete_even_when_some_are_empty(lengths, batch_size, world_size):
    wholes = both_samplers(lengths, batch_size, seed=5)
    ranks = [both_samplers(lengths, batch_size, seed=5, rank=r, world_size=world_size) for r in range(world_size)]
    for whole, parts in zip(wholes, zip(*ranks, strict=True), strict=True):
        batches = [list(part) for part in parts]
        assert sorted(chain.from_iterable(batches)) == sorted(whole)
        assert [len(part) for part in parts] == [len(b) for b in batches]
        assert max(map(len, batches)) - min(map(len, batches)) <= 1


@given(LENGTHS, st.integers(1, 9), st.integers(0, 70), st.integers(1, 3))
def test_an_epoch_resumed_in_the_middle_gives_its_rest(lengths, batch_size, skip, world_size):
    for sampler in both_samplers(lengths, batch_size, seed=2, rank=world_size - 1, world_size=world_size):
        sampler.epoch = 4
        share, whole = list(sampler), sampler.left()
        sampler.skip = skip
        assert list(sampler) == whole[skip:][world_size - 1 :: world_size]
        assert len(sampler) == len(share)


def test_epochs_and_seeds_differ_and_repeat():
    for kind in (0, 1):

        def epoch(n, kind=kind, **options):
            sampler = both_samplers([5, 6] * 50, 8, **options)[kind]
            sampler.epoch = n
            return list(sampler)

        assert epoch(0) == epoch(0) == epoch(0, seed=0)
        assert epoch(0) != epoch(1)
        assert epoch(0) != epoch(0, seed=1)
        assert epoch(1) != epoch(0, seed=1)
        assert epoch(0, shuffle=False) == epoch(1, shuffle=False, seed=3)


def test_batches_of_different_lengths_are_mixed():
    lengths = np.repeat([5, 6, 7, 8], 100).tolist()
    of_batches = [lengths[batch[0]] for batch in LengthBatchSampler(lengths, 10)]
    assert of_batches != sorted(of_batches)
    assert sum(a != b for a, b in pairwise(of_batches)) > 10


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"rank": 2, "world_size": 2}, {"rank": -1}])
def test_impossible_samplers_are_refused(options):
    with pytest.raises(UserError, match="out of range; give batch_size >= 1 and 0 <= rank < world_size"):
        ImageBatchSampler(10, **({"batch_size": 2} | options))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_train_indices_are_of_one_length_and_cover_all_before_any_repeats(scenes, vocab, batch_size):
    samples = CaptionDataset(scenes, vocab, TINY, batch_size=batch_size)
    lengths = samples.caption_lengths
    n_full = sum(count // batch_size for count in Counter(lengths).values())
    n_batches = sum(-(-count // batch_size) for count in Counter(lengths).values())
    for _ in range(2):  # two epochs
        drawn = [samples.get_train_indices() for _ in range(n_batches)]
        assert all(len(indices) == batch_size for indices in drawn)
        assert all(len({lengths[i] for i in indices}) == 1 for indices in drawn)
        assert {i for indices in drawn for i in indices} == set(range(len(lengths)))
        first = [i for indices in drawn[:n_full] for i in indices]
        assert len(first) == len(set(first))
        for indices in drawn:
            same = lengths.count(lengths[indices[0]])
            assert len(set(indices)) == min(batch_size, same)  # twice only where there are too few


def test_train_indices_differ_by_epoch_and_repeat_by_seed(scenes, vocab):
    def drawn(seed):
        samples = CaptionDataset(scenes, vocab, TINY, batch_size=9, seed=seed)
        return [samples.get_train_indices() for _ in range(60)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len({tuple(indices) for indices in drawn(0)}) > 40


@pytest.mark.parametrize("workers", [0, 1])
def test_a_replaced_sampler_makes_the_batch(scenes, vocab, workers):
    loader = get_loader(TINY, batch_size=6, dataset=scenes, vocab=vocab, num_workers=workers, shuffle=False)
    for _ in range(3):
        indices = loader.dataset.get_train_indices()
        loader.batch_sampler.sampler = SubsetRandomSampler(indices)
        images, captions = next(iter(loader))
        assert images.shape == (6, 3, 64, 64)
        assert captions.shape == (6, loader.dataset.caption_lengths[indices[0]] + 2)
        expected = sorted(loader.dataset.caption_ids(i).tolist() for i in indices)
        assert sorted(captions.tolist()) == expected
    loader.batch_sampler.sampler = SequentialSampler(range(1))
    assert [captions.tolist() for _, captions in loader] == [[loader.dataset.caption_ids(0).tolist()]]
    loader.batch_sampler.sampler = None
    assert sum(len(captions) for _, captions in loader) == len(loader.dataset)


def test_a_batch_holds_each_caption_beside_its_image(scenes, vocab):
    loader = get_loader(TINY, batch_size=16, dataset=scenes, vocab=vocab)
    texts = {tuple(vocab.encode(t)): i for i, captions in enumerate(scenes.captions) for t in captions}
    pixels = [TINY(scenes.image(i)) for i in range(len(scenes))]
    seen = 0
    for images, captions in loader:
        assert images.dtype == torch.float32
        assert captions.dtype == torch.int64
        for image, ids in zip(images, captions.tolist(), strict=True):
            candidates = [i for i, own in enumerate(scenes.captions) if ids in map(vocab.encode, own)]
            assert any(torch.equal(image, pixels[i]) for i in candidates)
            assert tuple(ids) in texts
            seen += 1
    assert seen == len(loader.dataset) == sum(map(len, scenes.captions))


def test_the_data_set_knows_its_lengths(scenes, vocab):
    samples = CaptionDataset(scenes, vocab, TINY)
    texts = list(scenes.all_captions())
    assert samples.caption_lengths == [len(vocab.tokenize(text)) for text in texts]
    assert [samples.caption_ids(n).tolist() for n in range(len(texts))] == [vocab.encode(text) for text in texts]
    assert samples.image_of.tolist() == [i for i, own in enumerate(scenes.captions) for _ in own]


def test_by_image_each_image_comes_once_with_all_its_captions(vocab, scenes):
    uneven = scenes.subset(8)
    uneven.captions[2] = uneven.captions[2][:1]
    loader = get_loader(TINY, batch_size=3, dataset=uneven, vocab=vocab, group="image", shuffle=False)
    assert len(loader.dataset) == 8
    batches = list(loader)
    assert [len(images) for images, _ in batches] == [3, 3, 2]
    i = 0
    for images, captions in batches:
        expected = [[vocab.encode(text) for text in uneven.captions[i + j]] for j in range(len(images))]
        longest = max(len(ids) for own in expected for ids in own)
        assert captions.shape == (len(images), 5, longest)
        for image, own, rows in zip(images, expected, captions.tolist(), strict=True):
            assert torch.equal(image, TINY(uneven.image(i)))
            for k, row in enumerate(rows):
                ids = own[k] if k < len(own) else []
                assert row == ids + [IGNORE] * (longest - len(ids))
            i += 1


def test_captions_of_unequal_length_are_padded_where_a_sampler_mixes_them():
    image = torch.zeros(3, 4, 4)
    images, captions, broken = collate(
        [(image, torch.tensor([0, 5, 1])), Broken("x.jpg", "why"), (image + 1, torch.tensor([0, 1]))]
    )
    assert captions.tolist() == [[0, 5, 1], [0, 1, IGNORE]]
    assert images[:, 0, 0, 0].tolist() == [0, 1]
    assert [sample.path for sample in broken] == ["x.jpg"]
    assert collate([Broken("x.jpg", "why")])[:2] == (None, None)


@pytest.mark.parametrize("group", ["length", "image"])
def test_a_caption_of_1500_words_does_not_pad_its_batch(scenes, vocab, group):
    long = CaptionSet("folder", "train", [0, 1], [["a red circle " * 500], ["a red circle"]], ["", ""])
    long.image = scenes.image
    with pytest.warns(UserWarning, match="^1 captions have over 100 words and are cut to that$"):
        loader = get_loader(TINY, batch_size=2, dataset=long, vocab=vocab, group=group, shuffle=False)
    assert loader.dataset.n_cut == 1
    assert sorted(loader.dataset.caption_lengths) == [3, 100]
    assert max(captions.shape[-1] for _, captions in loader) == 102
    ids = vocab.encode(long.captions[0][0])
    assert loader.dataset.caption_ids(0).tolist() == [*ids[:101], vocab.end_id]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_loader(TINY, dataset=scenes, vocab=vocab)


def test_test_mode_gives_the_original_and_the_image(images, vocab):
    loader = get_loader(AUGMENTED, mode="test", dataset=images, vocab=vocab)
    assert len(loader) == len(loader.dataset) == 10
    originals = {images.image(i).permute(1, 2, 0).numpy().tobytes(): i for i in range(10)}
    seen = []
    for original, image in loader:
        assert original.shape == (1, 64, 64, 3)
        assert original.dtype == torch.uint8
        i = originals[original.numpy().tobytes()]
        assert torch.equal(image[0], AUGMENTED.evaluation()(images.image(i)))
        seen.append(i)
    assert sorted(seen) == list(range(10))
    assert seen != sorted(seen)
    in_order = get_loader(AUGMENTED, mode="test", dataset=images, vocab=vocab, shuffle=False)
    assert [originals[o.numpy().tobytes()] for o, _ in in_order] == list(range(10))


def test_validation_is_the_same_every_time(images, vocab):
    loader = get_loader(AUGMENTED, mode="val", batch_size=4, dataset=images, vocab=vocab)
    first = as_bytes(loader)
    loader.batch_sampler.epoch = 1
    loader.dataset.set_epoch(1)
    assert as_bytes(loader) == first
    assert as_bytes(get_loader(AUGMENTED.evaluation(), "val", 4, dataset=images, vocab=vocab, seed=9)) == first
    samples = loader.dataset
    middle = AUGMENTED.evaluation()
    assert all(torch.equal(samples[n][0], middle(images.image(int(samples.image_of[n])))) for n in (0, 7, 49))


def test_training_is_augmented_anew_every_epoch_and_caption(images, vocab):
    samples = CaptionDataset(images, vocab, AUGMENTED)
    again = CaptionDataset(images, vocab, AUGMENTED, seed=1)
    assert torch.equal(samples[3][0], samples[3][0])
    assert any(not torch.equal(samples[n][0], again[n][0]) for n in range(5))
    of_one_image = [samples[n][0] for n in range(5)]
    assert any(not torch.equal(image, of_one_image[0]) for image in of_one_image)
    before = [samples[n][0] for n in range(10)]
    samples.set_epoch(1)
    assert any(not torch.equal(image, samples[n][0]) for n, image in enumerate(before))
    samples.set_epoch(0)
    assert all(torch.equal(image, samples[n][0]) for n, image in enumerate(before))


def test_another_callable_gets_a_pil_image(images, vocab):
    steps = [transforms.Resize(40), transforms.RandomCrop(32), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    compose = transforms.Compose(steps)
    batch, _ = next(iter(get_loader(compose, batch_size=4, dataset=images, vocab=vocab)))
    assert batch.shape == (4, 3, 32, 32)
    assert batch.dtype == torch.float32
    given = []

    def look(image):
        given.append((type(image), image.mode, image.size))
        return transforms.functional.pil_to_tensor(image)

    batch, _ = next(iter(get_loader(look, batch_size=1, dataset=images, vocab=vocab, shuffle=False)))
    assert given == [(Image.Image, "RGB", (64, 64))]
    index = get_loader(look, batch_size=1, dataset=images, vocab=vocab, shuffle=False).batch_sampler
    first = next(iter(index))[0]
    assert torch.equal(batch[0], images.image(first // 5))


def test_without_a_transform_images_come_as_they_are(images, vocab):
    samples = CaptionDataset(images, vocab)
    assert torch.equal(samples[0][0], images.image(0))
    assert samples[0][0].dtype == torch.uint8


def two_epochs(images, vocab, group, start_method=None, **options):
    loader = get_loader(AUGMENTED, batch_size=4, dataset=images, vocab=vocab, group=group, **options)
    loader.multiprocessing_context = start_method
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.epoch = epoch
        loader.dataset.set_epoch(epoch)
        epochs.append(as_bytes(loader))
    return epochs


@pytest.mark.parametrize("group", ["length", "image"])
def test_workers_load_the_same_batches(images, vocab, group):
    expected = two_epochs(images, vocab, group)
    assert expected[0] != expected[1]
    assert two_epochs(images, vocab, group, "fork", num_workers=2) == expected
    assert two_epochs(images, vocab, group, num_workers=1) == expected
    if group == "length":
        assert two_epochs(images, vocab, group, "spawn", num_workers=1) == expected


def test_the_data_set_can_be_sent_to_a_worker_after_train_indices(images, vocab):
    import pickle

    samples = CaptionDataset(images, vocab, TINY, batch_size=3)
    samples.get_train_indices()
    state = samples.__getstate__()  # the epoch is shared memory, which only a process being started may take over
    state.pop("_epoch")
    assert pickle.loads(pickle.dumps(state))["caption_lengths"] == samples.caption_lengths


def test_an_epoch_that_is_abandoned_does_not_affect_the_next(images, vocab):
    loader = get_loader(AUGMENTED, batch_size=4, dataset=images, vocab=vocab, num_workers=2)
    for _ in islice(loader, 2):
        pass
    loader.batch_sampler.epoch = 1
    loader.dataset.set_epoch(1)
    assert as_bytes(loader) == two_epochs(images, vocab, "length")[1]


def test_resuming_in_the_middle_gives_the_rest_of_the_epoch(images, vocab):
    whole = two_epochs(images, vocab, "length")[1]
    loader = get_loader(AUGMENTED, batch_size=4, dataset=images, vocab=vocab)
    loader.batch_sampler.epoch, loader.batch_sampler.skip = 1, 5
    loader.dataset.set_epoch(1)
    assert as_bytes(loader) == whole[5:]


def test_processes_share_the_batches_of_one(images, vocab):
    whole = as_bytes(get_loader(AUGMENTED, batch_size=4, dataset=images, vocab=vocab))
    options = {"batch_size": 4, "dataset": images, "vocab": vocab, "world_size": 3}
    shares = [as_bytes(get_loader(AUGMENTED, **options, rank=rank)) for rank in range(3)]
    assert [batch for share in shares for batch in share] == [b for r in range(3) for b in whole[r::3]]


def test_loading_leaves_the_global_generators_alone(images, vocab):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for _ in get_loader(AUGMENTED, batch_size=4, dataset=images, vocab=vocab):
        pass
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize("group", ["length", "image"])
def test_cached_features_are_those_of_the_images(tmp_path, images, vocab, group):
    backbone = Backbone("tiny", grid=True, weights=None)
    backbone.fine_tune(None)
    cache = FeatureCache.open(tmp_path / "cache", backbone, TINY, "float32")
    cache.build(images, progress=False)
    from_pixels = get_loader(TINY, batch_size=4, dataset=images, vocab=vocab, group=group)
    from_cache = get_loader(TINY, batch_size=4, dataset=images, vocab=vocab, group=group)
    from_cache.dataset.use_features(cache)
    for (images, captions), (features, same) in zip(from_pixels, from_cache, strict=True):
        assert torch.equal(captions, same)
        assert features.shape == (len(images), 64, 96)
        torch.testing.assert_close(features.float(), backbone(images), atol=1e-3, rtol=1e-3)  # stored in half


@pytest.fixture
def partly_broken(images) -> CaptionSet:
    """Image 1 is cut short, 4 holds text, 7 is gone: 15 of the 50 captions."""
    folder = Path(images.folder)
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    (folder / "4.png").write_text("not an image")
    (folder / "7.png").unlink()
    return images


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_named_counted_and_left_out(partly_broken, vocab, workers):
    loader = get_loader(TINY, batch_size=4, dataset=partly_broken, vocab=vocab, max_broken=3, num_workers=workers)
    with pytest.warns(UserWarning, match="left out: ") as caught:
        n = sum(len(captions) for _, captions in loader)
    assert n == 35
    assert {Path(path).name for path in loader.broken} == {"1.png", "4.png", "7.png"}
    assert all(path in reason for path, reason in loader.broken.items())
    assert sorted(str(w.message) for w in caught) == sorted(f"left out: {r}" for r in loader.broken.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each is reported once
        assert sum(len(captions) for _, captions in loader) == 35


def test_too_many_broken_images_stop_with_their_list(partly_broken, vocab):
    loader = get_loader(TINY, batch_size=4, dataset=partly_broken, vocab=vocab, max_broken=2)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(UserError, match="3 images cannot be") as caught:
        list(loader)
    message = str(caught.value)
    assert "more than the 2 allowed" in message
    assert all(f"{i}.png" in message for i in (1, 4, 7))
    assert message.count("\n") == 3


def test_broken_images_in_the_other_modes(partly_broken, vocab):
    test = get_loader(TINY, mode="test", dataset=partly_broken, vocab=vocab)
    by_image = get_loader(TINY, batch_size=4, mode="val", dataset=partly_broken, vocab=vocab, group="image")
    for loader in (test, by_image):
        with pytest.warns(UserWarning, match="left out"):
            assert sum(len(images) for images, _ in loader) == 7
        assert len(loader.broken) == 3


def test_an_image_too_thin_for_the_transform_is_named(images, vocab):

    path = Path(images.folder) / "2.png"
    Image.new("RGB", (1, 300)).save(path)
    loader = get_loader(Transform(resize=64, crop=64), batch_size=4, dataset=images, vocab=vocab)
    with pytest.warns(UserWarning, match="too long and thin"):
        assert sum(len(images) for images, _ in loader) == 45
    assert str(path) in loader.broken[str(path)]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty current folder, and no vocabulary built in this process."""
    monkeypatch.setattr(vocabulary, "_built", None)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def checkouts_vocabulary() -> bytes | None:
    path = Path(data_loader.__file__).resolve().parent.parent / "vocab.pkl"
    return path.read_bytes() if path.exists() else None


def test_a_new_vocabulary_is_written_to_runs_or_to_the_path_that_was_asked_for(scenes, elsewhere):
    before = checkouts_vocabulary()
    loader = get_loader(TINY, dataset=scenes, vocab_threshold=2, vocab_from_file=False)
    assert loader.dataset.vocab == Vocabulary.build(scenes.all_captions(), 2, "treebank")
    assert [path for path in elsewhere.rglob("*") if path.is_file()] == [elsewhere / "runs" / "vocab.pkl"]
    assert Vocabulary.load("runs/vocab.pkl") == loader.dataset.vocab
    assert checkouts_vocabulary() == before
    assert get_loader(TINY, dataset=scenes, vocab_from_file=False).dataset.vocab.threshold == 5  # the default
    loader = get_loader(TINY, dataset=scenes, vocab_threshold=3, vocab_file="./vocab.pkl", vocab_from_file=False)
    assert Vocabulary.load(elsewhere / "vocab.pkl") == loader.dataset.vocab
    assert loader.dataset.vocab.threshold == 3
    assert checkouts_vocabulary() == before


def test_a_vocabulary_is_read_and_its_threshold_compared(scenes, elsewhere):
    built = Vocabulary.build(scenes.all_captions(), 2, "treebank")
    built.save("vocab.pkl")
    written = (elsewhere / "vocab.pkl").read_bytes()
    assert default_vocab_file() == Path("vocab.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_loader(TINY, dataset=scenes).dataset.vocab == built
        assert get_loader(TINY, dataset=scenes, vocab_threshold=2, vocab_from_file=True).dataset.vocab == built
        assert get_loader(TINY, dataset=scenes, vocab_file=elsewhere / "vocab.pkl").dataset.vocab == built
    with pytest.warns(UserWarning, match=r"threshold 2, not 5: it has \d+ words, and these captions give \d+ with"):
        assert get_loader(TINY, dataset=scenes, vocab_threshold=5).dataset.vocab == built
    assert (elsewhere / "vocab.pkl").read_bytes() == written


def test_a_missing_vocabulary_is_not_built_silently(scenes, elsewhere):
    vocab = Vocabulary.build(["a"], 1)
    assert get_loader(TINY, dataset=scenes, vocab=vocab, vocab_file="gone.pkl").dataset.vocab is vocab
    with pytest.raises(MissingFileError, match=r"no vocabulary at gone\.pkl; build one"):
        get_loader(TINY, dataset=scenes, vocab_file="gone.pkl", vocab_from_file=True)
    assert list(elsewhere.iterdir()) == []


def test_a_vocabulary_of_other_captions_is_noticed(scenes, elsewhere):
    Vocabulary.build(["ein Hund läuft"], 1).save("vocab.pkl")
    with pytest.warns(UserWarning, match=r"knows \d+% of these captions' words; it was made for other data: build one"):
        get_loader(TINY, dataset=scenes)


@pytest.fixture(scope="module")
def coco_2014(tmp_path_factory) -> Path:
    """`cocoapi/` as in the course, with synthetic images: 12 to train on, 5 to validate."""
    exported, root = tmp_path_factory.mktemp("export"), tmp_path_factory.mktemp("opt")
    synthetic.export_coco(exported, 12, 5, 48, 0)
    for split in ("train", "val"):
        shutil.copytree(exported / f"{split}2017", root / "cocoapi" / "images" / f"{split}2014")
        for kind in ("captions", "instances"):
            target = root / "cocoapi" / "annotations" / f"{kind}_{split}2014.json"
            target.parent.mkdir(exist_ok=True)
            shutil.copy(exported / "annotations" / f"{kind}_{split}2017.json", target)
    return root


def test_cocoapi_loc_is_coco_in_that_folder(coco_2014, elsewhere):
    options = {"vocab_threshold": 1, "vocab_from_file": False, "cocoapi_loc": str(coco_2014)}
    loader = get_loader(transform=TINY, mode="train", batch_size=4, **options)
    captions = loader.dataset.caption_set
    assert (captions.name, captions.split, len(captions)) == ("coco", "train", 12)
    assert captions.path(0).startswith(str(coco_2014 / "cocoapi" / "images" / "train2014"))
    assert sum(len(ids) for _, ids in loader) == 60
    loader.dataset.vocab.save("vocab.pkl")
    for mode in ("val", "test"):  # COCO's own test images have no captions
        other = get_loader(TINY, mode, vocab_threshold=1, cocoapi_loc=coco_2014)
        assert (other.dataset.caption_set.split, len(other.dataset.caption_set)) == ("val", 5)
    by_name = get_loader(TINY, "val", dataset="coco", data_dir=coco_2014 / "cocoapi")
    assert by_name.dataset.caption_set.captions == other.dataset.caption_set.captions


def test_the_split_follows_the_mode(vocab):
    drawn = {"dataset": "synthetic", "vocab": vocab}
    for mode in ("val", "test"):
        captions = get_loader(TINY, mode, **drawn).dataset.caption_set
        assert (captions.name, captions.split, len(captions)) == ("synthetic", mode, 1_000)
    assert get_loader(TINY, "val", split="unseen", **drawn).dataset.caption_set.split == "unseen"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mode": "valid"}, "mode='valid' is not known; choose one of train, val, test"),
        ({"start_word": "<s>"}, "the special words are always <start>, <end> and <unk>"),
        ({"mode": "test", "batch_size": 2}, "use batch_size=1"),
        ({"mode": "val", "vocab_from_file": False}, "built from training captions only"),
        ({"group": "word"}, r"groups are \('length', 'image'\)"),
        ({"batch_size": 0}, "give batch_size >= 1"),
        ({"dataset": "imagenet"}, "no data set 'imagenet'; choose one of coco"),
        ({"dataset": "flickr8k"}, "needs the folder it is in; give data_dir"),
        ({"cocoapi_loc": "nowhere"}, "no folder nowhere"),
    ],
)
def test_wrong_arguments_get_one_sentence(scenes, vocab, elsewhere, arguments, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        get_loader(TINY, **({"dataset": scenes, "vocab": vocab} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_share_a_batch_get_one_sentence(images, vocab, workers):

    Image.new("RGB", (50, 40)).save(Path(images.folder) / "0.png")
    options = {"batch_size": 50, "dataset": images, "vocab": vocab, "group": "image", "num_workers": workers}
    with pytest.raises(UserError, match=r"^images of shapes \(3, 40, 50\) and \(3, 64, 64\) cannot") as caught:
        list(get_loader(None, **options))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^the transform returns a Image, not a tensor; end it with ToTensor\(\)$"):
        list(get_loader(as_is, **options))


def as_is(image):
    return image
