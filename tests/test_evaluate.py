"""Evaluation: a data set in batches as image by image; loss weighted by words; broken images by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from test_train import on_disk

from showtell import datasets, metrics
from showtell.backbones import Backbone
from showtell.captioner import load
from showtell.checkpoint import save_checkpoint
from showtell.data_loader import CaptionDataset, CaptionLoader, get_loader
from showtell.datasets import CaptionSet, SyntheticSet
from showtell.decoders import DECODERS
from showtell.decoding import DecodingOptions, beam_search
from showtell.evaluate import evaluate, mean_loss, write_captions
from showtell.features import FeatureCache
from showtell.model import CaptionModel
from showtell.transforms import Transform
from showtell.vocabulary import Vocabulary

TRANSFORM = Transform(resize=(32, 32))
pytestmark = pytest.mark.filterwarnings("ignore:left out")


@pytest.fixture(scope="module")
def scenes() -> SyntheticSet:
    """Eleven scenes; some have one caption, some five."""
    full = datasets.load("synthetic", split="val", n=11, size=32)
    return SyntheticSet("val", range(11), 32, 0, [texts[: 1 + i % 5] for i, texts in enumerate(full.captions)])


@pytest.fixture(scope="module")
def vocab(scenes) -> Vocabulary:
    return Vocabulary.build(scenes.all_captions(), 1, "words")


def model_of(decoder: str, vocab: Vocabulary, backbone: str = "tiny") -> CaptionModel:
    """An untrained model, its features spread out so that its captions differ from image to image."""
    torch.manual_seed(3)
    config = {
        "encoder": {"embed_size": 16, "backbone": backbone},
        "decoder": {"name": decoder, "embed_size": 16, "hidden_size": 16, "vocab_size": len(vocab)},
    }
    model = CaptionModel(config).eval()
    images = datasets.load("synthetic", split="val", n=11, size=32)
    with torch.no_grad():
        features = model.encoder.backbone(torch.stack([TRANSFORM(images.image(i)) for i in range(11)]))
        embed = model.encoder.embed
        embed.bias -= embed(features).flatten(0, -2).mean(0)
        scale = 3 / embed(features).std()
        embed.weight *= scale
        embed.bias *= scale
        for parameter in model.decoder.parameters():
            parameter *= 2
    return model


def loader_of(captions: CaptionSet, vocab: Vocabulary, batch_size: int = 4, **options):
    samples = CaptionDataset(captions, vocab, TRANSFORM, "val", "image")
    return CaptionLoader(samples, batch_size, shuffle=False, **options)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_data_set_is_captioned_as_its_images_are_one_by_one(decoder, beam_size, scenes, vocab):
    model, rules = model_of(decoder, vocab), DecodingOptions.of(vocab, min_len=2, max_len=8)
    model.train()  # it must not matter
    found = write_captions(model, loader_of(scenes, vocab), rules, beam_size)
    assert list(found) == [f"val-0-{i}" for i in range(11)]
    for i, hypothesis in enumerate(found.values()):
        with torch.no_grad():
            features = model.encoder(TRANSFORM(scenes.image(i)).unsqueeze(0))
        ((alone,),) = beam_search(model.decoder, features, rules, beam_size)
        assert hypothesis.ids == alone.ids
        assert hypothesis.score == pytest.approx(alone.score, rel=1e-3)
    assert len({tuple(hypothesis.ids) for hypothesis in found.values()}) > 1, "every image got the same caption"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_left_out_and_no_image_gets_the_caption_of_another(num_workers, scenes, vocab, tmp_path):
    broken = {0: b"no image", 4: b"", 5: b"\x89PNG\r\n\x1a\n cut", 6: b"x", 7: b"y", 10: b"z"}  # 4 to 7: a batch
    data = on_disk(tmp_path, scenes)
    for i, content in broken.items():
        Path(data.path(i)).write_bytes(content)
    model, rules = model_of("show-tell", vocab), DecodingOptions.of(vocab, max_len=8)
    whole = write_captions(model, loader_of(scenes, vocab), rules, 2)
    loader = loader_of(data, vocab, num_workers=num_workers)
    found = write_captions(model, loader, rules, 2)
    assert list(found) == [str(100 + i) for i in range(11) if i not in broken]
    for name, hypothesis in found.items():
        assert hypothesis.ids == whole[f"val-0-{int(name) - 100}"].ids
    assert sorted(Path(path).name for path in loader.broken) == [f"{i:03d}.png" for i in sorted(broken)]


def test_an_image_that_comes_back_is_captioned_again(scenes, vocab, tmp_path):
    data = on_disk(tmp_path, scenes, 3)
    model, loader = model_of("show-tell", vocab), loader_of(data, vocab)
    rules = DecodingOptions.of(vocab, max_len=8)
    assert "103" not in write_captions(model, loader, rules, 1)
    on_disk(tmp_path, scenes, 8)
    assert list(write_captions(model, loader, rules, 1)) == [str(100 + i) for i in range(11) if i != 8]


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_loss_is_that_of_a_plain_loop_however_batched(decoder, scenes, vocab):
    model = model_of(decoder, vocab)
    nll, words = 0.0, 0
    with torch.no_grad():
        for i, texts in enumerate(scenes.captions):
            features = model.encoder(TRANSFORM(scenes.image(i)).unsqueeze(0))
            for text in texts:
                ids = vocab.encode(text)
                log_probs = model.decoder(features, torch.tensor([ids]))[0, 1 - len(ids) :].log_softmax(-1)
                nll -= sum(log_probs[t, word].item() for t, word in enumerate(ids[1:]))
                words += len(ids) - 1
    for group, batch_size in (("image", 1), ("image", 4), ("image", 11), ("length", 3), ("length", 50)):
        loader = get_loader(TRANSFORM, "val", batch_size, dataset=scenes, vocab=vocab, group=group)
        assert mean_loss(model.train(), loader) == pytest.approx(nll / words, rel=1e-5)
    assert not model.training


def test_encode_takes_images_and_cached_features(scenes, vocab, tmp_path):
    model = model_of("attend", vocab, "resnet18")
    cache = FeatureCache.open(tmp_path, model.encoder.backbone, TRANSFORM)
    cache.build(scenes, progress=False)
    images = torch.stack([TRANSFORM(scenes.image(i)) for i in range(11)])
    with torch.no_grad():
        fresh = model.encoder(images)
        assert torch.equal(model.encoder.embed(model.encoder.backbone(images)), fresh)
        from_cache = model.encoder(cache.get(cache.rows(scenes)))
        torch.testing.assert_close(from_cache, fresh, rtol=0, atol=0.03)  # of a deviation of 3
    cached = loader_of(scenes, vocab)
    cached.dataset.use_features(cache)
    rules = DecodingOptions.of(vocab, max_len=8)
    found = write_captions(model, cached, rules, 2)
    fresh = write_captions(model, loader_of(scenes, vocab), rules, 2)
    assert {i: h.ids for i, h in found.items()} == {i: h.ids for i, h in fresh.items()}


def test_what_on_batch_raises_ends_the_work(scenes, vocab):
    batches = []

    def stop():
        batches.append(1)
        if len(batches) == 2:
            raise InterruptedError

    model = model_of("show-tell", vocab)
    for work, options in ((write_captions, [DecodingOptions.of(vocab), 1]), (mean_loss, [])):
        batches.clear()
        with pytest.raises(InterruptedError):
            work(model, loader_of(scenes, vocab), *options, on_batch=stop)
        assert len(batches) == 2


@pytest.fixture
def saved(vocab, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PATH", "")  # METEOR takes Java half a minute
    path = tmp_path / "run" / "best.safetensors"
    meta = {"recipe": {"length_penalty": 0.7, "max_len": 9}}
    save_checkpoint(path, model_of("attend", vocab), vocab, TRANSFORM, meta)
    return path


def test_evaluate_scores_what_the_captioner_writes(saved, scenes, tmp_path):
    data = on_disk(tmp_path / "images", scenes, 2)
    found = evaluate(saved.parent, data, beam_size=2, device="cpu", progress=False)
    captioner = load(saved, "cpu")
    alone = {str(data.image_ids[i]): captioner.caption(data.path(i), beam_size=2)[0] for i in range(11) if i != 2}
    assert {i: caption.text for i, caption in found.captions.items()} == {i: c.text for i, c in alone.items()}
    assert max(len(caption.words) for caption in alone.values()) <= 9

    rows = json.loads((saved.parent / "best-folder-val" / "captions.json").read_text())
    assert rows == [{"image_id": int(i), "caption": caption.text} for i, caption in alone.items()]  # ids as they were
    references = data.references()
    scores = metrics.score({i: references[i] for i in alone}, {i: caption.text for i, caption in alone.items()})
    document = json.loads(json.dumps(found.to_json()))
    assert (document["images"], document["split"], document["beam_size"]) == (10, "val", 2)
    for name in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert document["scores"][name] == pytest.approx(scores[name])
    assert document["scores"]["METEOR"] is None
    loss = mean_loss(captioner.model, loader_of(data, captioner.vocab))
    assert document["scores"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert "perplexity" in found.table()


def test_evaluate_reads_and_encodes_each_image_once(saved, scenes, tmp_path, monkeypatch):
    data = on_disk(tmp_path, scenes)
    data.captions = [["a red circle " * 500], *scenes.captions[1:]]
    encode, n_encoded, read, read_bytes = Backbone.forward, [], [], Path.read_bytes
    monkeypatch.setattr(Backbone, "forward", lambda self, x: n_encoded.append(len(x)) or encode(self, x))
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(str(path)) or read_bytes(path))
    with pytest.warns(UserWarning, match="1 true captions have over 100 words and are cut for the perplexity"):
        evaluate(saved, data, beam_size=1, device="cpu", progress=False)
    assert sum(n_encoded) == 11
    assert sorted(path for path in read if path.endswith(".png")) == [data.path(i) for i in range(11)]


@pytest.mark.parametrize("model", ["best", "run/best.safetensors"])
def test_captions_of_a_released_model_do_not_go_among_the_models(model, saved, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr("showtell.released.MODELS", saved.parent)
    monkeypatch.chdir(tmp_path)
    found = evaluate(model, scenes, beam_size=1, limit=2, progress=False)
    assert found.path == Path("runs/best-synthetic-val/captions.json")
    assert found.path.is_file()
    assert [path.name for path in saved.parent.iterdir()] == ["best.safetensors"]


def test_evaluate_some_images_and_write_a_page(saved, scenes, tmp_path):
    page = tmp_path / "report.html"
    found = evaluate(saved, scenes, beam_size=1, device="cpu", limit=4, out=tmp_path / "out", html=page, progress=False)
    assert list(found.captions) == [str(i) for i in scenes.subset(4, 0).image_ids]
    assert found.path == tmp_path / "out" / "captions.json"
    assert len(json.loads(found.path.read_text())) == 4
    text = page.read_text()
    assert all(caption.text in text for caption in found.captions.values())
