"""Confidence: the fit, how it is judged, the checkpoint that holds it, and that every way of captioning has it."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from test_captioner import lively_checkpoint, save_images

from showtell import datasets, released, synthetic
from showtell.__main__ import main
from showtell.captioner import load
from showtell.checkpoint import add_meta, load_checkpoint, read_header
from showtell.confidence import FOLDS, SIGNALS, Calibration, Reliability, is_right, signals, things
from showtell.datasets import CaptionSet
from showtell.decoders import DECODERS
from showtell.ensemble import ensemble
from showtell.errors import UserError
from showtell.evaluate import calibrate, evaluate

TRUE = ["A boy in a red shirt throws a ball .", "The child is playing with two dogs near a building"]


@pytest.mark.parametrize(
    ("caption", "right"),
    [
        ("A boy is throwing a ball", True),
        ("A person and a dog", True),  # singular and plural
        ("Two children are running", True),
        ("A girl is throwing a ball", False),
        ("A boy is throwing a frisbee", False),
        ("Something small and green", True),  # names nothing
        ("", True),
    ],
)
def test_a_caption_is_right_if_all_things_are_in_a_true_caption(caption, right):
    assert is_right(caption, TRUE) is right


def test_people_need_people():
    assert not is_right("A man on a hill", ["a hill"])
    assert is_right("A hill", ["a man on a hill"])


def test_things_are_neither_people_nor_verbs_nor_signs():
    words = "a young man is surrounded by two sleds and running past the building 's door . <unk>".split()
    assert things(words) == ["sleds", "past", "building", "door"]


def test_signals_are_those_of_the_words():
    words, probs = ["a", "dog", "and", "dogs", "with", "balls"], [0.5, 0.25, 0.5, 0.125, 0.5, 1.0]
    total, lowest, number = signals(words, probs)
    assert total == pytest.approx(math.log(math.prod(probs)))
    assert lowest == pytest.approx(math.log(0.125))
    assert number == 2  # a dog and dogs are one thing
    assert signals(["a", "man"], [0.5, 0.1])[1:] == (0.0, 0.0)
    assert signals([], []) == (0.0, 0.0, 0.0)


def drawn(n: int, weights=(0.4, 1.5, -0.7), bias: float = 7.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw signals, and labels with the probabilities of a logistic model."""
    rng = np.random.default_rng(seed)
    rows = np.stack([-rng.gamma(5, 2, n), -rng.gamma(2, 0.7, n), rng.integers(0, 5, n)], 1)
    return rows, rng.random(n) < 1 / (1 + np.exp(-rows @ weights - bias))


def test_the_fit_finds_a_known_model_and_is_calibrated():
    rows, right = drawn(40_000)
    calibration, reliability = Calibration.fit(rows, right)
    assert list(calibration.weights) == list(SIGNALS)
    assert list(calibration.weights.values()) == pytest.approx([0.4, 1.5, -0.7], abs=0.05)
    assert calibration.bias == pytest.approx(7.5, abs=0.2)
    assert reliability.error < 0.01
    assert calibration.fitted["auroc"] == reliability.auroc > 0.8
    new_rows, new_right = drawn(40_000, seed=1)
    z = new_rows @ list(calibration.weights.values()) + calibration.bias
    found = Reliability.of(1 / (1 + np.exp(-z)), new_right)
    assert (found.auroc, found.error) == pytest.approx((reliability.auroc, 0), abs=0.01)


def test_the_fit_is_deterministic_and_judged_on_captions_held_out():
    rows, right = drawn(300)
    assert Calibration.fit(rows, right, split="val") == Calibration.fit(rows.tolist(), right.tolist(), split="val")
    rng = np.random.default_rng(0)
    aurocs = [Calibration.fit(rng.random((60, 3)), np.arange(60) % 2 == 0)[1].auroc for _ in range(40)]
    assert np.mean(aurocs) < 0.52  # labels that nothing predicts; judged on the captions of the fit, 0.6


def test_signals_that_are_constant_or_separate_the_captions_do_no_harm():
    right = np.arange(40) % 2 == 0
    calibration, reliability = Calibration.fit(np.stack([right * 8.0 - 9, np.zeros(40), np.ones(40)], 1), right)
    assert reliability.auroc == 1
    assert calibration.weights["lowest_thing"] == calibration.weights["things"] == 0
    assert all(map(math.isfinite, [*calibration.weights.values(), calibration.bias]))


def test_too_few_captions_are_refused():
    rows, _ = drawn(100)
    for n in (0, 9, 91, 100):
        with pytest.raises(
            UserError, match=rf"^{n} of 100 captions are right, too few or too many .*; give images with 10 right"
        ):
            Calibration.fit(rows, np.arange(100) < n)
    assert Calibration.fit(rows, np.arange(100) < 10)[1].bins


def test_reliability_is_that_of_plain_definitions():
    rng = np.random.default_rng(0)
    p = np.append(rng.integers(0, 30, 200) / 30, [0.0, 1.0])  # with ties
    y = rng.random(202) < p
    found = Reliability.of(p, y)
    pairs = [(a > b) + (a == b) / 2 for a in p[y] for b in p[~y]]
    assert found.auroc == pytest.approx(np.mean(pairs))
    bins = [[i for i in range(202) if min(int(p[i] * 10), 9) == k] for k in range(10)]
    assert found.error == pytest.approx(sum(abs(sum(p[i] - y[i] for i in own)) for own in bins) / 202)
    assert [n for *_, n in found.bins] == [len(own) for own in bins]
    assert found.bins[9][:2] == pytest.approx((p[bins[9]].mean(), y[bins[9]].mean()))
    assert Reliability.of([0.2, 0.7], [True, True]).auroc is None
    assert "AUROC -, calibration error" in Reliability.of([0.2], [True]).table()
    assert json.loads(json.dumps(found.to_json()))["bins"][0]["captions"] == len(bins[0])


CALIBRATION = Calibration({"log_prob": 0.3, "lowest_thing": 0.8, "things": -0.6}, 4.0, {"split": "val"})
number = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(st.sampled_from("a dog ball man .".split()), st.floats(0, 1))), number, number)
def test_a_confidence_is_a_probability(pairs, weight, bias):
    words, probs = [word for word, _ in pairs], [p for _, p in pairs]
    calibration = Calibration({"log_prob": weight, "lowest_thing": -weight, "things": weight}, bias, {})
    assert 0 <= calibration.confidence(words, probs) <= 1
    assert 0 <= CALIBRATION.confidence(words, probs) <= 1


def test_an_unlikely_thing_costs_more_than_another_unlikely_word():
    words = ["a", "dog", "is", "running"]
    likely, word, thing = ([0.9, p, q, 0.9] for p, q in ((0.9, 0.9), (0.9, 0.1), (0.1, 0.9)))
    sure, less, least = (CALIBRATION.confidence(words, probs) for probs in (likely, word, thing))
    assert sure > less > least


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return {name: lively_checkpoint(folder / f"{name}.safetensors", name) for name in DECODERS}


@pytest.fixture(scope="module")
def calibrated(plain, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("calibrated")
    for name, path in plain.items():
        add_meta(path, folder / f"{name}.safetensors", confidence=asdict(CALIBRATION))
    return {name: folder / f"{name}.safetensors" for name in plain}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    return save_images(tmp_path_factory.mktemp("photos"), 5)


WAYS = [
    {"strategy": "beam", "beam_size": 3},
    {"strategy": "beam", "beam_size": 4, "n_best": 3},
    {"strategy": "greedy"},
    {"strategy": "sample", "n_best": 2, "seed": 1},
]


@pytest.mark.parametrize("options", WAYS, ids=lambda options: options["strategy"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_caption_has_the_confidence_of_its_words(decoder, options, plain, calibrated, photos):
    captioner, without = load(calibrated[decoder], "cpu"), load(plain[decoder], "cpu")
    features = captioner.encode(photos)
    together = captioner.decode(features, **options)
    for own, same in zip(together, without.decode(features, **options), strict=True):
        assert [(c.text, c.score) for c in own] == [(c.text, c.score) for c in same]  # captions do not change
        assert {c.confidence for c in same} == {None}
        assert [c.confidence for c in own] == [CALIBRATION.confidence(c.words, c.word_probs) for c in own]
        assert own[0].to_dict() == same[0].to_dict() | {"confidence": round(own[0].confidence, 4)}
    assert len({c.confidence for own in together for c in own}) > 1
    if options["strategy"] != "sample":  # one generator draws for all images
        for i, path in enumerate(photos):
            alone = captioner.caption(path, **options)
            assert [c.confidence for c in alone] == pytest.approx([c.confidence for c in together[i]], abs=1e-3)
        streamed = dict(captioner.caption_stream(photos, batch_size=2, **options))
        assert streamed[4][0].confidence == pytest.approx(together[4][0].confidence, abs=1e-3)


@pytest.mark.parametrize("meta", [{}, {"confidence": None}, {"confidence": {"weights": {"luck": 1.0}, "bias": 0.0}}])
def test_a_model_without_a_calibration_that_is_known_has_none(meta, plain, photos, tmp_path):
    add_meta(plain["attend"], tmp_path / "m.safetensors", **meta)
    captioner = load(tmp_path / "m.safetensors", "cpu")
    assert captioner.calibration is None
    assert captioner.caption(photos[0])[0].confidence is None


def test_an_ensemble_has_none(calibrated):
    assert load(calibrated["attend"], "cpu").calibration == CALIBRATION
    members = [(path, load_checkpoint(path)) for path in (calibrated["attend"], calibrated["show-tell"])]
    assert "confidence" not in ensemble(members).meta
    assert "confidence" in members[0][1].meta


def tensors_of(path: Path) -> dict:
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118  it is no dict


@pytest.fixture(scope="module")
def scenes() -> CaptionSet:
    return datasets.load("synthetic", split="val", n=60, size=32)


def test_calibrate_writes_a_copy_and_the_same_tensors(plain, scenes, tmp_path):
    before, out = plain["attend"].read_bytes(), tmp_path / "new" / "copy.safetensors"
    path, reliability = calibrate(plain["attend"], scenes, out=out, progress=False)
    assert (path, plain["attend"].read_bytes()) == (out, before)
    assert tensors_of(out) == tensors_of(plain["attend"])
    old, new = read_header(plain["attend"]), read_header(out)
    stored = new["meta"].pop("confidence")
    assert new == old
    captioner = load(out, "cpu")
    assert asdict(captioner.calibration) == stored
    fitted = captioner.calibration.fitted
    assert (fitted["dataset"], fitted["split"], fitted["captions"]) == ("synthetic", "val", 60)
    assert fitted["auroc"] == reliability.auroc

    captions = [captions[0] for _, captions in captioner.caption_stream(scenes.sources())]
    right = [is_right(c.text, true) for c, true in zip(captions, scenes.captions, strict=True)]
    assert fitted["right"] == pytest.approx(np.mean(right))
    assert np.mean([c.confidence for c in captions]) == pytest.approx(np.mean(right), abs=1e-3)  # of any logistic fit
    assert sum(n for *_, n in reliability.bins) == 60 > FOLDS


def test_calibrate_replaces_the_file_of_a_run_but_no_released_model(plain, scenes, tmp_path, monkeypatch):
    path = tmp_path / "run" / "best.safetensors"
    add_meta(plain["attend"], path)
    assert calibrate(tmp_path / "run", scenes, progress=False)[0] == path
    assert load(tmp_path / "run", "cpu").calibration is not None
    assert tensors_of(path) == tensors_of(plain["attend"])
    monkeypatch.setattr(released, "MODELS", tmp_path / "run")
    with pytest.raises(UserError, match=r"is a released model and stays as it is; name the calibrated copy with --out"):
        calibrate("best", scenes, progress=False)
    with pytest.raises(UserError, match=r"calibrated on test would be too high .*; give --split val"):
        calibrate(path, "synthetic", split="test", progress=False)


def test_evaluate_judges_the_confidence(plain, calibrated, scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # METEOR takes Java half a minute
    page = tmp_path / "report.html"
    options = {"beam_size": 2, "out": tmp_path, "progress": False}
    found = evaluate(calibrated["attend"], scenes, html=page, **options)
    right = [is_right(caption.text, scenes.references()[i]) for i, caption in found.captions.items()]
    expected = Reliability.of([caption.confidence for caption in found.captions.values()], right)
    assert found.to_json()["confidence"] == expected.to_json()
    assert f"confidence: AUROC {expected.auroc:.3f}, calibration error {expected.error:.3f}" in found.table()
    text = page.read_text()
    assert 'aria-label="Confidence: captions from' in text
    assert f"confidence {next(iter(found.captions.values())).confidence:.2f}</li>" in text
    without = evaluate(plain["attend"], scenes, html=page, **options)
    assert "confidence" not in without.to_json()
    assert "confidence:" not in without.table()
    assert "Confidence" not in page.read_text()


def test_the_commands_calibrate_and_show_it(plain, photos, tmp_path, monkeypatch, capsys):
    def printed(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr("showtell.datasets.load", lambda *_, **__: datasets.read_synthetic("val", 60, 32))
    model = tmp_path / "copy.safetensors"
    out = printed("calibrate", "--model", plain["attend"], "--out", model)
    assert out.startswith(f"{model}: confidence of held-out captions: AUROC 0.")
    command = ["caption", *photos, "--model", model]
    rows = json.loads(printed(*command, "--json"))
    confidences = [row["captions"][0]["confidence"] for row in rows]
    assert confidences == [round(load(model, "cpu").caption(path)[0].confidence, 4) for path in photos]

    least = sorted(set(confidences))[1]
    texts = [row["captions"][0]["text"] for row in rows]
    shown = ["not sure" if c < least else text for c, text in zip(confidences, texts, strict=True)]
    assert 0 < shown.count("not sure") < 5
    flags = ["--min-confidence", least - 1e-4]
    assert printed(*command) == "".join(f"{path}: {text}\n" for path, text in zip(photos, texts, strict=True))
    assert printed(*command, *flags) == "".join(f"{path}: {text}\n" for path, text in zip(photos, shown, strict=True))
    found = [row["captions"][0] for row in json.loads(printed(*command, *flags, "--json"))]
    assert [(c["text"], c["sure"]) for c in found] == [(t, s == t) for t, s in zip(texts, shown, strict=True)]

    printed(*command, *flags, "--csv", tmp_path / "c.csv")
    with (tmp_path / "c.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["caption"] for row in table] == shown
    assert [float(row["confidence"]) for row in table] == confidences
    printed(*command, *flags, "--html", tmp_path / "c.html")
    page = (tmp_path / "c.html").read_text()
    assert page.count("not sure</p>") == shown.count("not sure")
    assert "Confidence is the estimated probability" in page
    scores = [float(score) for score in re.findall('data-score="(.*?)"', page)]
    assert scores == pytest.approx(confidences, abs=1e-3)


def test_a_minimum_needs_a_calibrated_model_and_a_probability(plain, calibrated, photos, capsys):
    assert main(["caption", str(photos[0]), "--model", str(plain["attend"]), "--min-confidence", "0.5"]) == 2
    assert "--min-confidence needs a model with a confidence; showtell calibrate" in capsys.readouterr().err
    assert main(["caption", str(photos[0]), "--model", str(calibrated["attend"]), "--min-confidence", "50"]) == 2
    assert "'50' is not a probability; give a number from 0 to 1" in capsys.readouterr().err


def unseen_kinds(n: int) -> dict[str, list]:
    """Noise, drawn shapes and printed text."""
    rng = np.random.default_rng(0)
    kinds = {"noise": [], "shapes": [], "text": []}
    words = "total amount due on this invoice is paid in full by the end of next month with our thanks".split()
    for i in range(n):
        side = (224, 28, 7)[i % 3]
        kinds["noise"].append(Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((224, 224)))
        kinds["shapes"].append(Image.fromarray(synthetic.draw(synthetic.scene(i, 0, "test"), 224)))
        page = Image.new("RGB", (224, 224), tuple(rng.integers(180, 256, 3).tolist()))
        font = ImageFont.load_default(size=10 + 5 * (i % 4))
        lines = [" ".join(rng.choice(words, 12)) for _ in range(9)]
        ImageDraw.Draw(page).multiline_text((6, 6), "\n".join(lines), font=font, fill=(20, 20, 40))
        kinds["text"].append(page)
    return kinds


@pytest.mark.slow
def test_images_of_kinds_never_seen_get_a_low_confidence(flickr8k, tmp_path):
    val = datasets.load("flickr8k", flickr8k, "val").subset(500)
    fitted, others = val._of(range(400)), val._of(range(400, 500))
    path, reliability = calibrate("showtell-attend-1", fitted, out=tmp_path / "m.safetensors", progress=False)
    assert reliability.auroc > 0.75
    captioner = load(path, "cpu")

    def mean(images: list) -> float:
        return float(np.mean([own[0].confidence for _, own in captioner.caption_stream(images)]))

    photographs = mean(others.sources())
    right = np.mean(
        [is_right(own[0].text, others.captions[i]) for i, own in captioner.caption_stream(others.sources())]
    )
    assert photographs == pytest.approx(right, abs=0.12)
    found = {kind: mean(images) for kind, images in unseen_kinds(30).items()}
    assert max(found.values()) < 0.5 * photographs, (found, photographs)
