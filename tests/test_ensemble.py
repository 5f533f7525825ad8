"""Ensembles: one member is the model, word probabilities are means, and the commands take `A,B`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_captioner import SMALL, lively_checkpoint, save_images

from showtell import datasets
from showtell.__main__ import main
from showtell.captioner import Captioner, find_models, load
from showtell.checkpoint import load_checkpoint
from showtell.decoders import DECODERS
from showtell.ensemble import ensemble
from showtell.errors import UserError
from showtell.evaluate import evaluate
from showtell.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """A model with each decoder, one of them in a folder with a comma in its name."""
    folder = tmp_path_factory.mktemp("members, of an ensemble")
    return [lively_checkpoint(folder / f"{name}.safetensors", name, seed) for seed, name in enumerate(DECODERS)]


@pytest.fixture(scope="module")
def names(models) -> str:
    """All models as a user names them, without the comma of their folder."""
    plain = models[0].parent.with_name("plain")
    plain.symlink_to(models[0].parent)
    return ",".join(str(plain / path.name) for path in models)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    return save_images(tmp_path_factory.mktemp("photos"), 5)


WAYS = [
    {"strategy": "beam", "beam_size": 3, "n_best": 2},
    {"strategy": "greedy"},
    {"strategy": "sample", "n_best": 3, "seed": 1},
]


@pytest.mark.parametrize("options", WAYS, ids=lambda options: options["strategy"])
def test_an_ensemble_of_one_is_the_model(options, models, photos):
    for path in models:
        checkpoint = load_checkpoint(path)
        alone, single = Captioner(checkpoint), Captioner(ensemble([(path, checkpoint)]))
        expected, found = (each.decode(each.encode(photos), **options) for each in (alone, single))
        assert [[c.text for c in own] for own in found] == [[c.text for c in own] for own in expected]
        for own, theirs in zip(found, expected, strict=True):
            assert [c.score for c in own] == pytest.approx([c.score for c in theirs], rel=1e-4)
            assert own[0].word_probs == pytest.approx(theirs[0].word_probs, rel=1e-4)


def test_word_probabilities_are_the_means_of_the_members_and_sum_to_one(names, photos):
    together, members = load(names), [load(name) for name in names.split(",")]
    images = torch.stack([SMALL(path) for path in photos])
    captions = torch.randint(3, len(together.vocab), (5, 2, 7))
    captions[..., 0] = 0
    with torch.no_grad():
        probs = together.model.decoder(together.model.encoder(images), captions.flatten(0, 1)).exp()  # (N, T-1, V)
        each = [m.model.decoder(m.model.encoder(images), captions.flatten(0, 1)) for m in members]
    torch.testing.assert_close(probs.sum(-1), torch.ones(10, 6))
    torch.testing.assert_close(probs, torch.stack([logits[:, -6:].softmax(-1) for logits in each]).mean(0))


@pytest.mark.parametrize("options", WAYS[:2], ids=lambda options: options["strategy"])
def test_files_in_batches_are_the_images_one_by_one(options, names, photos):
    together = load(names)
    found = dict(together.caption_files(photos, batch_size=2, **options))
    whole = together.decode(together.encode(photos), **options)
    assert [[c.text for c in found[path]] for path in photos] == [[c.text for c in own] for own in whole]
    assert len({own[0].text for own in whole}) > 1


def test_the_backbones_compute_in_bfloat16(names, photos):
    exact, fast = (load(names, precision=precision).encode(photos) for precision in ("float32", "bfloat16"))
    for own, other in zip(exact, fast, strict=True):
        assert 0 < (own - other).norm() < 0.05 * own.norm()


def test_members_must_have_one_vocabulary_and_one_transform(models):
    first, second = ((path, load_checkpoint(path)) for path in models[:2])
    second[1].transform = replace(SMALL, resize=(48, 48))
    with pytest.raises(UserError, match=r"cannot form an ensemble, because their image transforms differ; give models"):
        ensemble([first, second])
    second[1].vocab = Vocabulary(["<start>", "<end>", "<unk>", "a"], 1, "words")
    with pytest.raises(UserError, match=r"show-tell\.safetensors and .*because their vocabularies differ; give models"):
        ensemble([first, second])


def test_a_file_with_a_comma_is_one_model(models):
    assert find_models(models[0]) == [models[0]]
    assert load(models[0]).model.config["decoder"]["name"] == "show-tell"


def test_the_commands_take_several_models(names, photos, tmp_path, monkeypatch, capsys):
    assert main(["caption", str(photos[0]), "--model", names, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["captions"][0]["text"] == load(names).caption(photos[0])[0].text
    monkeypatch.chdir(tmp_path)
    scenes = datasets.load("synthetic", split="val", n=4, size=32)
    found = evaluate(names, scenes, beam_size=2, progress=False)
    assert found.path == Path("runs", "ensemble-synthetic-val", "captions.json")
    assert found.about["model"] == names
    assert found.perplexity > 1
    assert main(["caption", str(photos[0]), "--model", f"{names},none"]) == 2
    assert "none" in capsys.readouterr().err
