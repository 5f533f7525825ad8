"""Start words of data sets: what they change in training and decoding, and that they change nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train import SMALL, assert_same_run, no_curve, one_thread, stop_at, trainer_in

from showtell import datasets, load
from showtell.__main__ import main
from showtell.checkpoint import load_checkpoint, save_checkpoint
from showtell.data_loader import CaptionDataset, pad_captions
from showtell.datasets import CaptionSet
from showtell.decoders import DECODERS
from showtell.decoding import DecodingOptions, decode
from showtell.errors import UserError
from showtell.evaluate import evaluate
from showtell.model import CaptionModel, caption_loss, source_weights
from showtell.train import Trainer
from showtell.vocabulary import Vocabulary

__all__ = ["no_curve", "one_thread"]  # fixtures
WORDING = {"brief": "{0}", "wordy": "this image is {0} everywhere"}
COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
RECIPE = SMALL.with_settings(
    {"condition_on_source": True, "dropout": 0, "word_dropout": 0, "flip": False, "random_crop": False, "lr": 0.01}
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> str:
    """Two data sets of plain images whose captions name the colour in different words."""
    parent = tmp_path_factory.mktemp("sources")
    for name, wording in WORDING.items():
        (parent / name).mkdir()
        rows = ["image,caption,split"]
        for i in range(16):
            word = list(COLORS)[i % 2]
            color = tuple(min(255, value + 2 * i) for value in COLORS[word])
            Image.new("RGB", (20, 20), color).save(parent / name / f"{name}{i}.png")
            rows.append(f"{name}{i}.png,{wording.format(word)},{'val' if i > 11 else 'train'}")
        (parent / name / "captions.csv").write_text("\n".join(rows))
    return ",".join(str(parent / name) for name in WORDING)


def opened(folders: str, split: str = "train") -> CaptionSet:
    return datasets.load("folder,folder", folders, split)


def trained(out: Path, folders: str, **settings) -> Trainer:
    recipe = RECIPE.with_settings(settings)
    return trainer_in(out, recipe, opened(folders), opened(folders, "val"), data_dir=folders, dataset="folder,folder")


@pytest.fixture(scope="module")
def model(tmp_path_factory, folders) -> Path:
    out = tmp_path_factory.mktemp("styles")
    trained(out, folders, decoder="attend", epochs=30).fit(progress=False)
    return out / "last.safetensors"


def image_of(folders: str, name: str, i: int) -> str:
    return str(Path(folders.split(",")[0]).parent / name / f"{name}{i}.png")


def test_the_style_of_an_image_is_its_data_set(folders):
    joined = opened(folders)
    assert joined.styles == ["brief"] * 12 + ["wordy"] * 12
    assert joined.subset(5).styles == [Path(file).parent.name for file in joined.subset(5).files]
    assert datasets.load("folder", folders.split(",")[0]).styles == ["folder"] * 12
    different = replace(joined, name="other", image_ids=[f"other{i}" for i in range(24)], styles=[])
    assert set(datasets.join([joined, different]).styles) == {"folder,folder", "other"}


def test_start_words_are_no_words():
    vocab = Vocabulary.build(["a dog <start:coco>"] * 2, 1, "ptb")
    plain = Vocabulary.from_dict(vocab.to_dict())
    assert plain.styles == {}
    vocab.add_styles(["coco", "a b", "coco"])
    n = len(plain)
    assert vocab.styles == {"coco": n, "a b": n + 1}
    assert list(vocab.word2idx)[:n] == list(plain.word2idx)
    assert Vocabulary.from_dict(json.loads(json.dumps(vocab.to_dict()))).styles == vocab.styles
    assert vocab.encode("a <start:coco>") == [0, vocab("a"), vocab.unk_id, 1]
    assert vocab.decode([n + 1, vocab("a"), n, vocab("dog"), 1]) == "A dog"
    assert (plain.start_of(), vocab.start_of(), vocab.start_of("a b")) == (0, n, n + 1)
    assert vocab.starts_of(["a b", "unheard of"]) == [n + 1, n]
    assert set(DecodingOptions.of(vocab).banned) == {0, 2, n, n + 1}
    with pytest.raises(UserError, match="no style 'flickr8k'; choose one of coco, a b"):
        vocab.start_of("flickr8k")
    with pytest.raises(UserError, match="no style 'coco'; leave it out, because the model has none"):
        plain.start_of("coco")


def test_captions_begin_with_their_data_set(folders):
    joined = opened(folders)
    vocab = Vocabulary.build(joined.all_captions(), 1)
    without = CaptionDataset(joined, vocab)
    vocab.add_styles(joined.styles)
    samples = CaptionDataset(joined, vocab)
    firsts = [int(samples.caption_ids(n)[0]) for n in range(24)]
    assert firsts == [vocab.styles["brief"]] * 12 + [vocab.styles["wordy"]] * 12
    for n in range(24):
        assert samples.caption_ids(n)[1:].equal(without.caption_ids(n)[1:])
        assert without.caption_ids(n)[0] == 0


@pytest.mark.parametrize("strategy", ["beam", "greedy", "sample"])
@pytest.mark.parametrize("name", DECODERS)
def test_first_words_of_a_batch_are_those_of_each_image(name, strategy):
    config = SMALL.with_settings({"decoder": name}).model_config(12)
    decoder = CaptionModel(config).eval().decoder
    for weight in decoder.parameters():
        weight.data *= 5  # so that captions differ
    features = torch.randn(3, 4, 16) if decoder.grid else torch.randn(3, 16)
    options = DecodingOptions(banned=(0, 2, 10, 11), max_len=6)
    given = {"strategy": strategy, "n": 1 if strategy == "greedy" else 3, "temperature": 1e-4}  # samples are greedy

    def captions(rows: torch.Tensor, start: int | tuple[int, ...]) -> list[list[list[int]]]:
        found = decode(decoder, rows, options=replace(options, start_id=start), **given)
        return [[hypothesis.ids for hypothesis in own] for own in found]

    together = captions(features, (10, 11, 10))
    assert together == [captions(features[i : i + 1], start)[0] for i, start in enumerate((10, 11, 10))]
    assert captions(features, 10) == captions(features, (10, 10, 10)) != captions(features, 11)


def test_the_style_switches_the_wording(model, folders):
    captioner = load(model)
    assert list(captioner.vocab.styles) == ["brief", "wordy"]
    for name in WORDING:  # images of both data sets, in both styles
        for i, word in enumerate(COLORS):
            for style, wording in WORDING.items():
                (caption,) = captioner.caption(image_of(folders, name, 14 + i), style=style)
                assert caption.text == wording.format(word).capitalize()
            assert captioner.caption(image_of(folders, name, 14 + i))[0].text == word.capitalize()


def test_validation_and_evaluation_use_the_style_of_each_data_set(model, folders, tmp_path):
    meta = load_checkpoint(model).meta
    assert meta["validation"]["scores"]["Bleu_1"] == pytest.approx(1)
    assert meta["validation"]["val_perplexity"] < 1.2
    found = evaluate(model, "folder,folder", folders, out=tmp_path, progress=False)
    assert found.result.scores["Bleu_1"] == pytest.approx(1)
    assert found.perplexity == pytest.approx(meta["validation"]["val_perplexity"], rel=1e-3)
    assert "style" not in found.about
    wordy = evaluate(model, "folder,folder", folders, out=tmp_path, progress=False, style="wordy")
    assert {len(caption.words) for caption in wordy.captions.values()} == {5}
    assert wordy.about["style"] == "wordy"
    assert wordy.perplexity > 2
    alone = evaluate(model, "folder", folders.split(",")[1], out=tmp_path, progress=False)
    assert {len(caption.words) for caption in alone.captions.values()} == {1}, "a set without a style has the first"


def test_the_command_line_knows_styles(model, folders, capsys, tmp_path):
    image = image_of(folders, "brief", 14)
    assert main(["caption", image, "--model", str(model), "--style", "wordy"]) == 0
    assert capsys.readouterr().out == "This image is red everywhere\n"
    assert main(["caption", image, "--model", str(model), "--style", "poem"]) == 2
    assert "the model has no style 'poem'; choose one of brief, wordy" in capsys.readouterr().err
    data = ["--dataset", "folder,folder", "--data-dir", folders, "--out", str(tmp_path)]
    assert main(["evaluate", "--model", str(model), *data, "--style", "wordy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["style"] == "wordy"


def test_a_stopped_run_continues_bit_for_bit(folders, tmp_path, no_curve):
    settings = {"epochs": 2, "dropout": 0.3, "scheduled_sampling": 0.5, "captions_per_image": 1}
    trained(tmp_path / "whole", folders, **settings).fit(progress=False)
    stop_at(trained(tmp_path / "stopped", folders, **settings), 3)
    torch.manual_seed(999)
    Trainer.resume(tmp_path / "stopped").fit(progress=False)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_self_critical_samples_begin_with_their_data_set(model, folders, tmp_path, no_curve):
    stage = {"objective": "self-critical", "samples_per_image": 2, "decoder": "attend", "condition_on_source": False}
    recipe = RECIPE.with_settings(stage | {"epochs": 1, "lr": 1e-6})
    trainer = trainer_in(tmp_path, recipe, opened(folders), opened(folders, "val"), init=str(model))
    drawn = []
    reward = trainer.objective.reward
    trainer.objective.reward = lambda captions, true: (
        drawn.extend(zip(captions[:, :, 0].tolist(), true[:, 0, 0].tolist(), strict=True)) or reward(captions, true)
    )
    (record,) = trainer.fit(progress=False)
    assert {start for _, start in drawn} == set(trainer.vocab.styles.values())
    assert all(own == [start] * 2 for own, start in drawn)
    assert record["reward"] > 1, "the wording of another data set would have no reward"


def test_a_model_without_styles_gives_its_start_to_them(folders, tmp_path):
    plain = trained(tmp_path / "plain", folders, condition_on_source=False)
    assert plain.vocab.styles == {}
    path = tmp_path / "plain.safetensors"
    save_checkpoint(path, plain.model, plain.vocab, plain.transform)
    recipe = RECIPE.with_settings({"epochs": 1})
    init = {"init": str(path)}
    trainer = trainer_in(tmp_path / "new", recipe, opened(folders), opened(folders, "val"), **init)
    assert list(trainer.vocab.word2idx) == [*plain.vocab.word2idx, "<start:brief>", "<start:wordy>"]
    for name in trainer.model.decoder.word_parameters:
        own, old = (each.model.decoder.state_dict()[name] for each in (trainer, plain))
        assert own[: len(old)].equal(old)
        assert own[-2:].equal(old[[0, 0]])


def test_a_model_with_styles_runs_in_onnx_runtime(model, folders, tmp_path, capsys):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    assert main(["export", "--model", str(model), "--format", "onnx", "--out", str(tmp_path / "onnx")]) == 0
    exported = load(tmp_path / "onnx")
    paths = [image_of(folders, "brief", 14), image_of(folders, "wordy", 15)]
    features = exported.encode(paths)
    assert [own[0].text for own in exported.decode(features, style="wordy")] == [
        "This image is red everywhere",
        "This image is blue everywhere",
    ]
    starts = tuple(exported.vocab.styles.values())
    assert [own[0].text for own in exported.decode(features, start_id=starts)] == [
        "Red",
        "This image is blue everywhere",
    ]


def test_the_loss_of_a_caption_is_multiplied_by_the_weight_of_its_data_set(folders):
    joined = opened(folders)
    vocab = Vocabulary.build(joined.all_captions(), 1)
    vocab.add_styles(joined.styles)
    weights = source_weights(vocab, joined.styles, "1,0.25")
    captions = pad_captions(
        [[torch.tensor([vocab.styles[name], 3, 4, 1])] * n for name, n in zip(WORDING, (2, 1), strict=True)]
    )
    logits = torch.randn(4, 3, len(vocab))
    for smoothing in (0, 0.1):
        parts = [caption_loss(logits[[i]], captions.flatten(0, 1)[[i]], smoothing).objective for i in range(3)]
        loss = caption_loss(logits, captions, smoothing, weights)
        torch.testing.assert_close(loss.objective, parts[0] + parts[1] + 0.25 * parts[2])
        plain = caption_loss(logits, captions, smoothing)
        assert (loss.nll, loss.words) == (plain.nll, plain.words), "the log is not weighted"
        ones = caption_loss(logits, captions, smoothing, torch.ones(len(vocab)))
        torch.testing.assert_close(ones.objective, plain.objective)


def test_captions_of_weight_zero_teach_nothing(folders, tmp_path):
    steps = []
    for weights in ("1,0", "1,1"):
        trainer = trained(tmp_path / weights, folders, source_weights=weights, decoder="show-tell", ema=0)
        own = [i for i, style in enumerate(trainer.train_set.styles) if style == "wordy"][:4]
        loss = trainer.objective(torch.randn(4, 16), pad_captions([trainer.loader.dataset.captions_of(i) for i in own]))
        steps.append(loss.objective.item())
    assert steps[0] == 0 < steps[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source_weights": "1,2,3"}, "source_weights=1,2,3 are not the .* give 2 numbers .*, for brief, wordy"),
        ({"source_weights": "1,-1"}, "give 2 numbers of 0 or more"),
        ({"source_weights": "1,nan"}, "give 2 numbers of 0 or more"),
        ({"source_weights": "one,two"}, "give 2 numbers of 0 or more"),
        ({"source_weights": "1,2", "condition_on_source": False}, "add condition_on_source=true"),
    ],
)
def test_weights_that_fit_no_data_set_are_refused(settings, message, folders, tmp_path):
    with pytest.raises(UserError, match=message):
        trained(tmp_path, folders, **settings)
