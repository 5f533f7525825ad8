"""The released models: size, checksum, and the captions and scores that they had when they were released."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

import showtell
from showtell import datasets, demo, metrics, synthetic
from showtell.captioner import Captioner
from showtell.checkpoint import read_header
from showtell.report import Card
from showtell.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted((ROOT / "models").glob("*.safetensors"))
GOLDEN = Path(__file__).resolve().parent / "golden" / "released.json"
CARD = (ROOT / "models" / "README.md").read_text("utf-8")

every_model = pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def captioners() -> dict[str, Captioner]:
    return {path.stem: showtell.load(path, "cpu", "float32") for path in MODELS}


@pytest.fixture(scope="module")
def photographs() -> list[Card]:
    """The photographs of scikit-image, captioned by the default model."""
    pytest.importorskip("skimage")
    return demo.caption_photographs("cpu")


def captions_of(captioner: Captioner, photographs: list[Card]) -> dict[str, str]:
    """Caption five synthetic images and the photographs."""
    drawn = datasets.load("synthetic", split="test", n=5, size=224)
    images = {f"drawn {i}": drawn.image(i) for i in range(5)}
    images |= {card.title: card.image for card in photographs}
    return {name: captioner.caption(image)[0].text for name, image in images.items()}


def test_one_attends_and_one_is_the_classic(captioners):
    decoders = {name: captioner.model.config["decoder"]["name"] for name, captioner in captioners.items()}
    assert decoders == {"showtell-attend-1": "top-down", "showtell-classic-1": "show-tell"}


@every_model
def test_it_is_small_half_precision_and_the_one_on_the_card(path, captioners):
    assert path.stat().st_size <= 90e6
    assert path.stat().st_size < 2.1 * sum(p.numel() for p in captioners[path.stem].model.parameters())
    assert hashlib.sha256(path.read_bytes()).hexdigest() in CARD


def test_without_a_name_it_is_the_one_with_attention(captioners, photographs):
    coffee = next(card for card in photographs if card.title == "coffee.png")
    assert showtell.load(device="cpu").caption(coffee.image)[0].text == coffee.predicted
    assert captioners["showtell-attend-1"].caption(coffee.image)[0].text == coffee.predicted


@every_model
def test_the_roots_vocabulary_is_theirs(path):
    assert Vocabulary.from_dict(read_header(path)["vocabulary"]) == Vocabulary.load(ROOT / "vocab.pkl")


@every_model
def test_its_captions_are_golden(path, captioners, photographs):
    """`SHOWTELL_GOLDEN=write` updates the file, for a new release."""
    golden = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    now = captions_of(captioners[path.stem], photographs)
    if os.environ.get("SHOWTELL_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps({**golden, path.stem: now}, indent=1, ensure_ascii=False) + "\n", "utf-8")
    else:
        assert now == golden[path.stem]


def test_attention_sums_to_one_at_every_word(captioners):
    captioner = captioners["showtell-attend-1"]
    drawings = [torch.from_numpy(synthetic.draw(synthetic.scene(i), 224)).permute(2, 0, 1) for i in (0, 1)]
    features = captioner.encode(drawings)
    for (caption,) in captioner.decode(features, alphas=True):
        assert caption.alphas.shape == (len(caption.words), 7, 7)
        torch.testing.assert_close(torch.as_tensor(caption.alphas).sum((1, 2)), torch.ones(len(caption.words)))


@every_model
def test_the_scores_of_its_captions_reproduce(path, flickr8k):
    """The captions of Flickr8k's test split are stored with their scores."""
    kept = json.loads((GOLDEN.parent / f"{path.stem}-flickr8k-test.json").read_text("utf-8"))
    captions = datasets.load("flickr8k", flickr8k, "test")
    references = {str(i): texts for i, texts in zip(captions.image_ids, captions.captions, strict=True)}
    scores = metrics.score(references, kept["captions"]).corpus
    assert {name: round(scores[name], 4) for name in kept["scores"]} == kept["scores"]


@every_model
def test_bfloat16_changes_few_captions(path, captioners, photographs):
    exact = captions_of(captioners[path.stem], photographs)
    fast = captions_of(showtell.load(path, "cpu", "bfloat16"), photographs)
    assert fast.keys() == exact.keys()
    assert sum(fast[name] == exact[name] for name in exact) >= len(exact) - 3
