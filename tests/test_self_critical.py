"""Self-critical training: rewards are the scorers', the gradient follows the advantage, runs learn and are resumed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import RESNET, SMALL, assert_same_run, drawn, log_of, no_curve, one_thread, stop_at, trainer_in

from showtell import datasets
from showtell.checkpoint import load_checkpoint
from showtell.data_loader import CaptionDataset, pad_captions
from showtell.datasets import SyntheticSet
from showtell.decoders import IGNORE
from showtell.errors import UserError
from showtell.metrics import DocumentFrequencies, bleu, cider_d
from showtell.model import caption_loss
from showtell.self_critical import Reward, SelfCritical, reinforce
from showtell.train import Trainer
from showtell.vocabulary import Vocabulary

__all__ = ["no_curve", "one_thread"]  # fixtures
STAGE = SMALL.with_settings({"objective": "self-critical", "samples_per_image": 3, "lr": 1e-2})


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> str:
    """A model trained by cross-entropy, of the shape of `STAGE`, on other captions than `drawn()`."""
    out = tmp_path_factory.mktemp("first")
    trainer = trainer_in(out, SMALL.with_settings({"epochs": 1}), drawn(12))
    trainer.fit(progress=False)
    return str(out / "best.safetensors")


def tokens(ids: torch.Tensor) -> list[str]:
    """The words of a caption `[<start>, …, <end>]` as the scorers take them, `<end>` included."""
    return [f"w{i}" for i in ids.tolist()[1:] if i != IGNORE]


def random_captions(n: int, words: int) -> list[torch.Tensor]:
    """Captions of 0 to 9 words in which n-grams repeat."""
    return [torch.tensor([0, *torch.randint(3, words, (length,)).tolist(), 1]) for length in torch.randint(10, (n,))]


@pytest.mark.parametrize("bleu_weight", [0.0, 2.0])
def test_the_rewards_of_a_batch_are_those_of_the_scorers(bleu_weight):
    samples = CaptionDataset(datasets.load("synthetic", n=40), Vocabulary.build(["a b c d"], 1), None, group="image")
    captions = [random_captions(1 + i % 4, 8) for i in range(40)]  # 1 to 4 references, 7 different words
    samples.captions_of = lambda i: captions[i]
    reward = Reward(samples, bleu_weight)
    texts = [[" ".join(tokens(ids)) for ids in own] for own in captions]
    frequencies = DocumentFrequencies.build(texts, "unicode")
    assert max(frequencies.counts.values()) > 10

    sampled = [random_captions(3, 9) for _ in captions]  # a word that no reference has
    references = [[tokens(ids) for ids in own] for own in captions for _ in range(3)]
    candidates = [tokens(ids) for own in sampled for ids in own]
    expected = cider_d(references, candidates, frequencies)[1] + bleu_weight * bleu(references, candidates)[1][:, 3]
    found = reward(pad_captions(sampled), pad_captions(captions))
    assert found.flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert found.min() < 0.1 < 2 < found.max()
    for i in range(40):
        alone = reward(pad_captions([sampled[i]]), pad_captions([captions[i]]))
        torch.testing.assert_close(alone[0], found[i], rtol=0, atol=1e-12)


def test_end_is_rewarded_where_references_end():
    samples = CaptionDataset(drawn(), vocab := Vocabulary.build(drawn().all_captions(), 1), None, group="image")
    reference = samples.caption_ids(0)
    end = torch.tensor([vocab.end_id])
    cut, whole = torch.cat([reference[:-2], end]), reference
    rewards = Reward(samples)(pad_captions([[whole, cut]]), pad_captions([[reference]]))
    assert rewards[0, 0] == pytest.approx(10)
    assert rewards[0, 1] < 9


def objective_of(trainer: Trainer) -> SelfCritical:
    assert isinstance(trainer.objective, SelfCritical)
    return trainer.objective


def with_gradient(trainer: Trainer) -> set[str]:
    """Take a step; return the names of the parameters that had a gradient."""
    trainer._train_step([next(iter(trainer.loader))])
    return {name for name, p in trainer.model.named_parameters() if p.grad is not None and (p.grad != 0).any()}


@pytest.mark.parametrize("baseline", ["others", "greedy"])
def test_the_gradient_is_zero_where_every_sample_has_the_reward_of_the_baseline(baseline, first, tmp_path):
    trainer = trainer_in(tmp_path, STAGE.with_settings({"baseline": baseline}), init=first)
    objective_of(trainer).reward = lambda captions, _: torch.full(captions.shape[:2], 0.75)
    assert not with_gradient(trainer)
    objective_of(trainer).reward = lambda captions, _: torch.rand(captions.shape[:2])
    assert with_gradient(trainer) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("baseline", ["others", "greedy"])
def test_the_baseline_leaves_the_sample_itself_out(baseline, first, tmp_path, monkeypatch):
    trainer = trainer_in(tmp_path, STAGE.with_settings({"baseline": baseline}), init=first)
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    scored = torch.cat([rewards, torch.tensor([[2.0], [1.0]])], 1) if baseline == "greedy" else rewards
    objective_of(trainer).reward = lambda *_: scored
    seen = []
    monkeypatch.setattr("showtell.self_critical.reinforce", lambda *args: seen.extend(args[2:]) or reinforce(*args))
    images, captions = next(iter(trainer.loader))
    trainer._train_step([(images[:2], captions[:2])])
    expected = [[-1, 0, 4], [-1, -1, 2]] if baseline == "greedy" else [[-3, -1.5, 4.5], [-1.5, -1.5, 3]]
    assert seen[0].tolist() == expected
    assert seen[1] == objective_of(trainer).options.banned != ()
    assert (trainer.totals.reward, trainer.totals.samples) == (12, 6)


def test_the_better_caption_becomes_more_probable():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 6, requires_grad=True)
    captions = torch.tensor([[[0, 3, 4, 1, IGNORE], [0, 5, 3, 4, 1]]])

    def log_probs() -> torch.Tensor:
        return -torch.stack([caption_loss(logits[i : i + 1], captions[:, i : i + 1]).nll for i in range(2)])

    before = log_probs()
    loss = reinforce(logits, captions, torch.tensor([[1.0, -0.5]]))
    assert (loss.nll.item(), loss.words.item()) == (pytest.approx(-before.sum().item()), 7)
    assert loss.objective.item() == pytest.approx((-before[0] + 0.5 * before[1]).item() / 7)
    loss.objective.backward()
    assert (logits.grad[0, 3] == 0).all(), "padding has no gradient"
    logits.data -= 0.1 * logits.grad
    assert log_probs()[0] > before[0]
    assert log_probs()[1] < before[1]


def test_banned_words_have_no_share_in_the_likelihood():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 6, requires_grad=True)
    captions, advantages = torch.tensor([[[0, 3, 4, 1]]]), torch.tensor([[-1.0]])
    with_words = reinforce(logits[..., [1, 3, 4, 5]], torch.tensor([[[0, 1, 2, 0]]]), advantages)
    found = reinforce(logits, captions, advantages, (0, 2))
    assert found.nll.item() == pytest.approx(with_words.nll.item())
    found.objective.backward()
    assert (logits.grad[..., [0, 2]] == 0).all()
    assert (logits.grad[..., [1, 3, 4, 5]] != 0).all()


def test_samples_have_dropout_unless_it_is_turned_off(first, tmp_path, monkeypatch):
    modes = []

    def watch(decoder, name: str, on: bool) -> None:
        method = getattr(decoder, name)
        monkeypatch.setattr(decoder, name, lambda *args: modes.append((on, name, decoder.training)) or method(*args))

    for on in (False, True):
        recipe = STAGE.with_settings({"sample_with_dropout": on, "baseline": "greedy"})
        trainer = trainer_in(tmp_path / str(on), recipe, init=first)
        watch(trainer.model.decoder, "step", on)
        watch(trainer.model.decoder, "teacher_force", on)
        trainer._train_step([next(iter(trainer.loader))])
    assert set(modes) == {
        (False, "step", False), (False, "teacher_force", True),
        (True, "step", True), (True, "step", False), (True, "teacher_force", True),  # the greedy caption has none
    }  # fmt: skip


def test_rewards_see_all_captions_and_the_cross_entropy_some(first, tmp_path):
    full = datasets.load("synthetic", n=8, size=16)
    recipe = STAGE.with_settings({"captions_per_image": 2, "xe_weight": 0.5, "flip": True})
    trainer = trainer_in(tmp_path, recipe, full, init=first)
    objective, rewarded, kept = objective_of(trainer), [], []
    reward, cross_entropy = Reward(objective.samples), objective.cross_entropy
    objective.reward = lambda captions, references: rewarded.append(references) or reward(captions, references)
    objective.cross_entropy = lambda features, true, counts: kept.append(true) or cross_entropy(features, true)
    images, captions = next(iter(trainer.loader))
    captions = torch.cat([captions, torch.full_like(captions, IGNORE)], 1)  # as of an image with more captions
    trainer._train_step([(images, captions)])
    assert torch.equal(rewarded[0], captions)
    assert captions.shape[:2] == (4, 10)
    assert kept[0].shape[:2] == (4, 2)
    for own, some in zip(captions, kept[0], strict=True):
        assert len({tuple(ids) for ids in some.tolist()}) == 2
        assert all((own == ids).all(1).any() for ids in some)
    assert (kept[0][..., 0] == 0).all(), "padding was drawn"


WAYS = [
    {"ema": 0.9},
    {"ema": 0.9, "baseline": "greedy", "xe_weight": 0.3, "captions_per_image": 1, "bleu_weight": 1.0},
]


@pytest.mark.parametrize("settings", WAYS, ids=["others", "greedy"])
def test_a_stopped_run_continues_bit_for_bit(settings, first, tmp_path, no_curve):
    recipe = STAGE.with_settings(settings)
    straight = trainer_in(tmp_path / "straight", recipe, init=first)
    straight.fit(progress=False)
    moved = Path(first).with_name("moved.safetensors")
    moved.write_bytes(Path(first).read_bytes())
    stopped = trainer_in(tmp_path / "stopped", recipe, init=str(moved))
    stop_at(stopped, 3)
    moved.unlink()  # the vocabulary is that of the run
    Trainer.resume(tmp_path / "stopped", drawn(), drawn(5, "val")).fit(progress=False)
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")
    record = log_of(tmp_path / "straight")[-1]
    assert record["reward"] > 0
    assert 0 < record["sampled_length"] <= recipe.max_len
    assert record["captions"].keys() == {"captions", "distinct", "bad_endings", "mean_length"}
    text = (tmp_path / "straight" / "training_log.txt").read_text()
    assert re.search(
        r"reward \d\.\d{3}, sampled length \d+\.\d, .* distinct captions [\d.]+%, incomplete captions [\d.]+%, ", text
    )


def test_the_vocabulary_is_that_of_the_model(first, tmp_path):
    trainer = trainer_in(tmp_path, STAGE, init=first)
    model = load_checkpoint(first)
    assert trainer.vocab == model.vocab != Vocabulary.build(trainer.train_set.all_captions(), 1)
    torch.testing.assert_close(trainer.model.state_dict(), model.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(UserError, match="improves a trained model and keeps its words; add --init MODEL"):
        trainer_in(tmp_path, STAGE)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_from_cached_features_with_flips_while_layers_are_fine_tuned(precision, tmp_path, no_curve):
    recipe = RESNET.with_settings({"decoder": "attend", "fine_tune": "layer4", "flip": True, "batch_norm": True})
    recipe = recipe.with_settings({"resize": 64, "crop": 64})  # a grid of four cells
    recipe = recipe.with_settings({"dropout": 0.3, "precision": precision})
    data, features = (drawn(12), drawn(3, "val")), str(tmp_path / "features")
    trainer_in(tmp_path / "first", recipe, *data, features=features).fit(progress=False)
    recipe = replace(recipe, objective="self-critical", ema=0.9, max_len=5)
    init = str(tmp_path / "first" / "last.safetensors")
    trainer = trainer_in(tmp_path / "run", recipe, *data, init=init, features=features)
    trainer.prepare(progress=False)
    assert trainer.loader.dataset.mirror_cache is not None
    objective_of(trainer).reward = lambda captions, _: torch.rand(captions.shape[:2])
    # Autocast must not reuse weights that it has converted without gradient.
    assert with_gradient(trainer) == {name for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_it_raises_cider_d(tmp_path, no_curve):
    recipe = RESNET.with_settings(
        {"embed_size": 64, "hidden_size": 64, "batch_norm": True, "resize": 64, "crop": 64, "batch_size": 8}
        | {"lr": 1e-2, "warmup": 10, "clip": 5, "max_len": 20}
    )
    scenes, features = datasets.load("synthetic", n=16, size=64), str(tmp_path / "features")

    def repeated(n: int) -> SyntheticSet:
        """The scenes n times in one epoch, which is validated once."""
        return SyntheticSet("train", n * list(range(16)), 64, 0, n * scenes.captions)

    first = trainer_in(tmp_path / "first", recipe, repeated(80), scenes, features=features)
    (before,) = first.fit(progress=False)
    recipe = replace(recipe, objective="self-critical", lr=1e-3, epochs=2)
    init = str(tmp_path / "first" / "last.safetensors")
    second = trainer_in(tmp_path / "second", recipe, repeated(30), scenes, init=init, features=features)
    start, after = second.fit(progress=False)
    assert after["reward"] > 1.05 * start["reward"]
    assert after["scores"]["CIDEr"] > 1.1 * before["scores"]["CIDEr"]
