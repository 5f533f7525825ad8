"""The captioner: how it is loaded, and that one image, a batch and a stream of files give the same captions."""

from __future__ import annotations

import gc
import json
import math
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import showtell
from showtell import released, synthetic
from showtell.captioner import Caption, find_model, load
from showtell.checkpoint import load_checkpoint, save_checkpoint
from showtell.decoders import DECODERS
from showtell.decoding import Hypothesis, beam_search, greedy
from showtell.errors import MissingFileError, UserError
from showtell.model import CaptionModel
from showtell.sources import find_images
from showtell.torch_engine import TorchEngine
from showtell.transforms import BrokenImageError, Transform, read_image
from showtell.vocabulary import Vocabulary

WORDS = "a the large small red green blue yellow black circle square star and is left right of above below".split()
VOCAB = Vocabulary(["<start>", "<end>", "<unk>", *WORDS], 1, "words")
SMALL = Transform(resize=(32, 32))
MAX_LEN = 9


def lively_checkpoint(path: Path, decoder: str = "transformer", seed: int = 4) -> Path:
    """Save an untrained captioner whose captions, though nonsense, differ from image to image and are confident."""
    torch.manual_seed(seed)
    arguments = {"name": decoder, "embed_size": 16, "hidden_size": 16, "vocab_size": len(VOCAB)}
    if decoder == "transformer":
        arguments |= {"num_heads": 2, "num_layers": 2}
    model = CaptionModel({"encoder": {"embed_size": 16, "backbone": "tiny"}, "decoder": arguments}).eval()
    with torch.no_grad():
        images = torch.stack([SMALL(synthetic.draw(synthetic.scene(i), 32)) for i in range(8)])
        head = next(part for part in model.encoder.embed.modules() if isinstance(part, torch.nn.Linear))
        head.weight *= 1.5 / model.encoder(images).std(0).mean()
        head.bias -= model.encoder(images).flatten(0, -2).mean(0)
        for parameter in model.decoder.parameters():  # whatever the initialisation of the decoder
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
        model.decoder.linear.bias.zero_()[VOCAB.end_id] -= 0.4
    meta = {"recipe": {"max_len": MAX_LEN, "length_penalty": 0.5}, "epoch": 1}
    save_checkpoint(path, model, VOCAB, SMALL, meta)
    return path


def save_images(folder: Path, n: int, seed: int = 0, size: int = 32) -> list[Path]:
    """Draw `n` scenes as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.fromarray(synthetic.draw(synthetic.scene(i, seed, "test"), size)).save(path)
    return paths


def assert_same(first: list[Caption], second: list[Caption]) -> None:
    for one, other in zip(first, second, strict=True):
        assert (one.text, one.words) == (other.text, other.words)
        assert one.score == pytest.approx(other.score, abs=1e-3)
        assert one.word_probs == pytest.approx(other.word_probs, abs=1e-3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: lively_checkpoint(folder / f"{name}.safetensors", name) for name in DECODERS}


@pytest.fixture(scope="module", params=list(DECODERS))
def captioner(request, checkpoints):
    return load(checkpoints[request.param], "cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return save_images(tmp_path_factory.mktemp("images"), 5)


def test_a_model_is_opened_by_path_run_folder_or_released_name(checkpoints, tmp_path, monkeypatch):
    file = checkpoints["attend"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.safetensors").write_bytes(file.read_bytes())
    monkeypatch.setattr(released, "MODELS", file.parent)
    assert find_model(file) == file
    assert find_model(str(run)) == run / "best.safetensors"
    assert find_model("show-tell") == checkpoints["show-tell"]
    assert load("show-tell", "cpu").model.config["decoder"]["name"] == "show-tell"
    assert showtell.load(str(run), "cpu").model.config["decoder"]["name"] == "attend"
    monkeypatch.chdir(tmp_path)
    Path("attend").write_bytes(checkpoints["show-tell"].read_bytes())  # a file goes before a released name
    assert load("attend", "cpu").model.config["decoder"]["name"] == "show-tell"


def test_left_out_it_is_the_released_model(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(released, "MODELS", tmp_path)
    for name in ("another", f"{released.DEFAULT}-10", f"{released.DEFAULT}-2", "zebra"):
        (tmp_path / f"{name}.safetensors").touch()
    assert find_model() == tmp_path / f"{released.DEFAULT}-10.safetensors"


def test_a_model_that_does_not_exist_lists_the_released_ones(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(released, "MODELS", checkpoints["attend"].parent)
    known = sorted([*DECODERS, *(Path(file).stem for file in released.RELEASES)])
    with pytest.raises(MissingFileError, match=rf"no model nonesuch; .*: {', '.join(known)}$"):
        find_model("nonesuch")
    with pytest.raises(MissingFileError, match=r"holds no best\.safetensors; name a checkpoint or a finished run"):
        find_model(tmp_path)


def test_a_pipe_or_device_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "photo.jpg")
    os.mkfifo(tmp_path / "best.safetensors")
    for path in (tmp_path / "best.safetensors", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match=r"is no regular file .*; give a checkpoint, run folder"):
            find_model(path)
    for path in (tmp_path / "photo.jpg", "/dev/zero"):
        with pytest.raises(UserError, match=r"is no regular file .*; give images, or folders of images"):
            find_images([path])


def test_everything_comes_from_one_file(checkpoints):
    captioner = load(checkpoints["show-tell"], "cpu")
    assert (captioner.vocab, captioner.transform, captioner.meta["epoch"]) == (VOCAB, SMALL, 1)
    assert not captioner.model.training
    assert captioner.device.type == "cpu"
    options = captioner.decoding_options()
    assert (options.max_len, options.length_penalty) == (MAX_LEN, 0.5)  # those it was validated with
    assert captioner.decoding_options(max_len=3, allow_unk=True).max_len == 3


@pytest.mark.parametrize("meta", [{}, {"recipe": None}])
def test_a_checkpoint_without_a_recipe_captions_too(meta, checkpoints, images, tmp_path):
    known = load_checkpoint(checkpoints["attend"])
    save_checkpoint(tmp_path / "m.safetensors", known.model, known.vocab, known.transform, meta)
    captioner = load(tmp_path / "m.safetensors", "cpu")
    assert captioner.decoding_options().max_len == 25
    assert len(captioner.caption(images[0])) == 1


def test_the_untrained_model_captions_different_images_differently(captioner, images):
    """Otherwise the equivalences below would hold even if images were mixed up."""
    captions = [captioner.caption(path)[0] for path in images]
    assert len({caption.text for caption in captions}) >= 3
    assert all(len(caption.words) <= MAX_LEN for caption in captions)


def test_a_batch_equals_one_by_one(captioner, images):
    together = captioner.decode(captioner.encode(images), n_best=2)
    for path, captions in zip(images, together, strict=True):
        assert_same(captioner.caption(path, n_best=2), captions)


def test_encode_once_and_decode_many_equals_caption(captioner, images):
    features = captioner.encode(images[0])
    before = features.clone()
    for size in (1, 4, 2):
        assert_same(captioner.decode(features, beam_size=size)[0], captioner.caption(images[0], beam_size=size))
    captioner.sample(features, n=3)
    assert torch.equal(features, before)


def test_any_kind_of_image_gives_the_same_captions(captioner, images):
    path = images[3]
    image = Image.open(path).convert("RGB")
    sources = [path, str(path), path.read_bytes(), image, np.asarray(image), read_image(path)]
    expected = captioner.caption(path)
    for source in sources:
        assert_same(captioner.caption(source), expected)
    assert captioner.encode(sources).shape[0] == len(sources)
    assert captioner.encode(tuple(sources[:2])).shape[0] == 2


def test_n_best_are_different_and_best_first(captioner, images):
    captions = captioner.caption(images[1], beam_size=6, n_best=5)
    assert len(captions) == 5
    assert len({tuple(caption.words) for caption in captions}) == 5
    scores = [caption.score for caption in captions]
    assert scores == sorted(scores, reverse=True)
    assert_same(captioner.caption(images[1], beam_size=6), captions[:1])
    assert len(captioner.caption(images[1], beam_size=1, n_best=3)) == 3  # the beam widens to hold them


def test_beam_one_is_greedy(captioner, images):
    features = captioner.encode(images)
    expected = greedy(captioner.model.decoder, features, captioner.decoding_options())
    words = [[VOCAB.idx2word[i] for i in h.ids] for h in expected]
    assert [c.words for (c,) in captioner.decode(features, beam_size=1)] == words
    assert [c.words for (c,) in captioner.decode(features, "greedy")] == words
    with pytest.raises(UserError, match=r"no decoding strategy 'luck'; .*beam, greedy, sample"):
        captioner.decode(features, "luck")


def test_the_score_is_that_of_the_words(captioner, images):
    """Without a penalty it is the logarithm of the product of the probabilities, the end's included."""
    features = captioner.encode(images[2])
    caption = captioner.decode(features, length_penalty=0, min_len=3)[0][0]
    options = captioner.decoding_options(length_penalty=0, min_len=3)
    ((hypothesis,),) = beam_search(captioner.model.decoder, features, options)
    end = math.exp(hypothesis.log_probs[-1])
    assert len(caption.word_probs) == len(caption.words) >= 3
    assert math.exp(caption.score) == pytest.approx(math.prod(caption.word_probs) * end, rel=1e-4)
    assert all(0 < p <= 1 for p in caption.word_probs)


def test_decoding_options_are_obeyed(captioner, images):
    features = captioner.encode(images)
    for (caption,) in captioner.decode(features, beam_size=3, min_len=4, max_len=5, no_repeat_ngram=1):
        assert 4 <= len(caption.words) <= 5
        assert len(set(caption.words)) == len(caption.words)
        assert "<unk>" not in caption.words
    with pytest.raises(UserError, match="min_len <= max_len"):
        captioner.decode(features, min_len=4, max_len=2)


def test_attention_maps_are_where_the_model_attends(captioner, images):
    attends = captioner.model.decoder.grid
    assert captioner.caption(images[4])[0].alphas is None
    for caption in captioner.caption(images[4], n_best=2, alphas=True):
        assert (caption.alphas is not None) == attends
        if attends:
            assert caption.alphas.shape == (len(caption.words), 4, 4)
            torch.testing.assert_close(caption.alphas.sum((1, 2)), torch.ones(len(caption.words)))
            assert caption.alphas.min() >= 0


def test_rows_and_columns_of_attention_maps_are_not_swapped(checkpoints):
    """Features of one cell alone give an attention map in which that cell differs."""
    captioner = load(checkpoints["attend"], "cpu")
    features = torch.zeros(1, 16, 16)
    features[0, 1 * 4 + 3] = 5.0  # row 1, column 3
    alphas = captioner.decode(features, alphas=True, min_len=2)[0][0].alphas[0]
    apart = (alphas - alphas[0, 0]).abs() > 1e-6
    assert apart.nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("decoder", [name for name, kind in DECODERS.items() if kind.grid])
def test_attention_maps_of_images_that_are_not_square_have_their_shape(decoder, tmp_path):
    """Resized by its shorter side and not cropped, an image four times as wide as high has a grid of 8 x 32 cells."""
    wide = Transform(resize=64)
    saved = load_checkpoint(lively_checkpoint(tmp_path / "square.safetensors", decoder))
    save_checkpoint(tmp_path / "wide.safetensors", saved.model, VOCAB, wide, saved.meta)
    captioner = load(tmp_path / "wide.safetensors", "cpu")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, (width, height) in zip(paths, [(256, 64), (64, 256), (256, 64)], strict=True):
        Image.fromarray(synthetic.draw(synthetic.scene(2), 64)).resize((width, height)).save(path)
    alone = captioner.caption(paths[0], alphas=True, min_len=2)[0]
    assert alone.alphas.shape == (len(alone.words), 8, 32)
    results = [result for _, result in captioner.caption_stream(paths, alphas=True, min_len=2)]
    assert [tuple(caption.alphas.shape[1:]) for (caption,) in results] == [(8, 32), (32, 8), (8, 32)]
    assert_same(results[0], [alone])
    torch.testing.assert_close(results[2][0].alphas, alone.alphas)

    features = captioner.encode(paths[0])
    given = captioner.decode(features, alphas=True, min_len=2, grid=(8, 32))[0][0]
    torch.testing.assert_close(given.alphas, alone.alphas)
    for grid in (None, (16, 8)):
        with pytest.raises(UserError, match=r"256 cells cannot have the shape .* pass their grid=\(rows, columns\)"):
            captioner.decode(features, alphas=True, grid=grid)
    assert captioner.decode(features)[0][0].alphas is None
    Image.new("RGB", (128, 64)).save(tmp_path / "half.png")
    with pytest.raises(UserError, match="2 images do not fit in one batch"):
        captioner.encode([paths[0], tmp_path / "half.png"])


def test_samples_depend_on_the_seed_alone(captioner, images):
    features = captioner.encode(images[:3])
    options = {"strategy": "sample", "n_best": 4, "temperature": 2.0}
    first = captioner.decode(features, **options, seed=1)
    torch.rand(7)
    again = captioner.sample(features, n=4, temperature=2.0, seed=1)
    other = captioner.decode(features, **options, seed=2)
    assert [len(row) for row in first] == [4, 4, 4]
    for row, same in zip(first, again, strict=True):
        assert_same(row, same)
    assert [c.words for row in first for c in row] != [c.words for row in other for c in row]
    streamed = dict(captioner.caption_stream([images[0]] * 4, batch_size=1, **options, seed=1))
    assert_same(streamed[0], captioner.caption(images[0], **options, seed=1))
    assert len({str(row) for row in streamed.values()}) > 1  # the batches do not all repeat the same draw


def test_a_cold_or_narrow_sample_is_greedy(captioner, images):
    features = captioner.encode(images[:3])
    expected = [c.words for (c,) in captioner.decode(features, beam_size=1)]
    for options in ({"temperature": 1e-4}, {"top_k": 1}, {"top_p": 1e-6}):
        assert [c.words for (c,) in captioner.decode(features, "sample", **options)] == expected
    short = captioner.sample(features, n=2, max_len=2, alphas=True)
    assert all(len(caption.words) <= 2 for row in short for caption in row)
    with pytest.raises(UserError, match="temperature > 0"):
        captioner.decode(features, "sample", temperature=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("strategy", ["beam", "greedy"])
def test_a_model_with_damaged_weights_gives_an_error_and_no_caption(strategy, value, checkpoints, images):
    captioner = load(checkpoints["attend"], "cpu")
    with torch.no_grad():
        captioner.model.decoder.linear.bias.fill_(value)
    with pytest.raises(UserError, match="not finite, so it is damaged"):
        captioner.caption(images[0], strategy)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_files_come_back_in_order_whatever_the_batch(batch_size, captioner, images):
    results = list(captioner.caption_files(images, batch_size, beam_size=3, n_best=2))
    streamed = list(captioner.caption_stream(list(map(read_image, images)), batch_size, beam_size=3, n_best=2))
    assert [path for path, _ in results] == images
    assert [index for index, _ in streamed] == list(range(len(images)))
    for (path, captions), (_, same) in zip(results, streamed, strict=True):
        assert_same(captions, captioner.caption(path, beam_size=3, n_best=2))
        assert_same(captions, same)


def test_a_file_that_cannot_be_read_keeps_its_place_among_the_others(checkpoints, images, tmp_path):
    captioner = load(checkpoints["show-tell"], "cpu")
    text, absent = tmp_path / "note.jpg", tmp_path / "absent.png"
    text.write_text("not an image")
    files = [text, *images[:3], absent, *images[3:5]]
    results = dict(captioner.caption_files(map(str, files), batch_size=2))
    assert list(results) == files
    assert isinstance(results[text], BrokenImageError)
    assert "holds text" in str(results[text])
    assert isinstance(results[absent], MissingFileError)
    for path in images[:5]:
        assert_same(results[path], captioner.caption(path))
    assert list(captioner.caption_files([])) == []
    assert [type(result) for _, result in captioner.caption_files([text, text])] == [BrokenImageError] * 2


@pytest.mark.parametrize("name", ["caption", "encode"])
def test_one_image_that_cannot_be_read_is_an_error(name, checkpoints, tmp_path):
    method = getattr(load(checkpoints["show-tell"], "cpu"), name)
    (tmp_path / "empty.png").touch()
    with pytest.raises(BrokenImageError, match=r"empty\.png .*0 bytes"):
        method(tmp_path / "empty.png")
    with pytest.raises(MissingFileError, match=r"no image .*absent\.png"):
        method(tmp_path / "absent.png")


def test_images_are_found_by_name_through_all_folders(tmp_path):
    inside = ["b.PNG", "a.jpg", "deep/er/c.webp", "deep/d.gif"]
    for name in [*inside, "notes.txt", "deep/captions.csv"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "album.jpg").mkdir()  # a folder, whatever its name
    assert find_images([tmp_path]) == sorted(tmp_path / name for name in inside)
    given = [tmp_path / "notes.txt", tmp_path / "b.PNG"]
    assert find_images(given) == given  # a file named is taken, whatever its suffix
    with pytest.raises(UserError, match=r"album\.jpg holds no images \(.*\.jpg.*\); name another"):
        find_images([tmp_path / "album.jpg"])
    with pytest.raises(MissingFileError, match=r"there is no .*absent; give images"):
        find_images([tmp_path, tmp_path / "absent"])


def test_a_caption_as_plain_values():
    ids = [VOCAB(word) for word in "a red circle".split()]
    looked = torch.full((3, 4), 0.25)
    hypothesis = Hypothesis(ids, [math.log(0.5), math.log(0.25), 0.0, math.log(0.125)], -1.23456, looked)
    caption = Caption.of(hypothesis, VOCAB, (2, 2))
    assert caption.alphas.shape == (3, 2, 2)
    expected = {"text": "A red circle", "score": -1.2346, "words": ["a", "red", "circle"], "word_probs": [0.5, 0.25, 1]}
    assert caption.to_dict() == json.loads(json.dumps(caption.to_dict())) == expected
    empty = Caption.of(Hypothesis([], [-0.5], -0.5, torch.zeros(0, 16)), VOCAB, (4, 4))
    assert empty.to_dict() == {"text": "", "score": -0.5, "words": [], "word_probs": []}
    assert empty.alphas.shape == (0, 4, 4)


def test_single_precision_weights_are_freed_with_the_checkpoint():
    config = {
        "encoder": {"embed_size": 8, "backbone": "resnet18"},
        "decoder": {"name": "show-tell", "embed_size": 8, "hidden_size": 8, "vocab_size": 4},
    }
    model = CaptionModel(config)
    weight = weakref.ref(model.encoder.backbone.net.conv1.weight)
    engine = TorchEngine(model.eval(), precision="bfloat16")
    features, _ = engine.encode([torch.zeros(3, 64, 64)])
    assert torch.equal(engine.model.encoder(torch.zeros(1, 3, 64, 64)), features)
    assert model.encoder.backbone.net.conv1.weight.dtype == torch.float32
    del model
    gc.collect()
    assert weight() is None
