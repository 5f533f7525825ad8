"""Recipes: complete settings by name, changed from the command line, with ranges and notes on unused settings."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from showtell.decoders import DECODERS
from showtell.errors import UserError
from showtell.model import CaptionModel
from showtell.recipes import RECIPES, Recipe, recipe_named
from showtell.transforms import Transform


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model_and_comes_back_from_json(name):
    recipe = recipe_named(name)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    transform = recipe.transform()
    assert transform.size == {"demo": 64, "coco-attend": 320, "coco-attend-self-critical": 320}.get(name, 224)
    assert recipe.fine_tune or transform == transform.evaluation(), "frozen backbones are cached, and augment nothing"
    model = CaptionModel(replace(recipe, encoder="tiny").model_config(30))
    logits, _ = model(torch.zeros(2, 3, 32, 32), torch.tensor([[0, 5, 1], [0, 7, 1]]))
    assert logits.shape[::2] == (2, 30)
    assert recipe.unused_settings() == []


def test_recipes_load_without_torch():
    code = "import sys; from showtell.recipes import RECIPES; print(len(RECIPES), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(len(RECIPES)), "False"], done.stderr


def test_the_plain_flickr8k_recipe():
    recipe = recipe_named("flickr8k-show-tell")
    expected = {
        "decoder": "show-tell", "embed_size": 512, "hidden_size": 512, "dropout": 0.5, "optimizer": "adam",
        "warmup": 200, "batch_size": 80, "label_smoothing": 0.1, "clip": 5, "threshold": 5, "tokenizer": "unicode",
        "lr": 1.5e-3, "epochs": 12, "length_penalty": 0.7, "max_len": 25, "fine_tune": "", "batch_norm": True,
    }  # fmt: skip
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert recipe.transform() == Transform(resize=(224, 224))


def test_an_unknown_recipe_or_setting_lists_those_there_are():
    with pytest.raises(UserError, match=r"there is no recipe 'best'; choose one of flickr8k-show-tell, .*, demo"):
        recipe_named("best")
    with pytest.raises(UserError, match=r"a recipe has no setting 'learning_rate'; it has accumulate, .* lr, "):
        Recipe().with_settings({"learning_rate": 1})


def test_settings_as_a_user_types_them():
    typed = {"lr": "1e-3", "epochs": "3", "squash": "True", "tie_embeddings": "false", "decoder": "attend"}
    recipe = Recipe().with_settings(typed)
    assert recipe == replace(Recipe(), lr=1e-3, epochs=3, squash=True, tie_embeddings=False, decoder="attend")
    assert isinstance(recipe.epochs, int)
    assert Recipe().with_settings({"dropout": 0, "epochs": 2.0, "squash": True}).dropout == 0
    assert Recipe().with_settings({}) == Recipe()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", "three", "epochs='three' is not a whole number; give a whole number"),
        ("epochs", "2.5", "epochs='2.5' is not a whole number"),
        ("epochs", 2.5, "epochs=2.5 is not a whole number"),
        ("epochs", math.inf, "epochs=inf is not a whole number"),
        ("epochs", "", "epochs='' is not a whole number"),
        ("lr", "fast", "lr='fast' is not a number; give a number"),
        ("squash", "yes", "squash=yes is not a truth value; write squash=true or squash=false"),
        ("tokenizer", "nltk", "tokenizer='nltk' is not known; choose one of "),
        ("group", "batch", "group='batch' is not known; choose one of length, image"),
        ("optimizer", "sgd", "optimizer='sgd' is not known; choose one of adam, adamw"),
        ("objective", "rl", "objective='rl' is not known; choose one of cross-entropy, self-critical"),
        ("baseline", "mean", "baseline='mean' is not known; choose one of others, greedy"),
        ("ema", 1, "ema=1.0 must be from 0 to below 1; 0 disables"),
        ("xe_weight", -1, "xe_weight=-1.0 must be 0 or more; 0 disables"),
        ("precision", "half", "precision='half' is not known; choose one of auto, float32, bfloat16"),
        ("dropout", 1, "dropout=1.0 must be from 0 to below 1; 0 disables"),
        ("dropout", "nan", "dropout=nan must be from 0 to below 1"),
        ("label_smoothing", -0.1, "label_smoothing=-0.1 must be from 0 to below 1"),
        ("warmup", -1, "warmup=-1 must be 0 or more; 0 disables"),
        ("length_penalty", -0.5, "length_penalty=-0.5 must be 0 or more"),
        ("weight_decay", "nan", "weight_decay=nan must be 0 or more"),
        ("captions_per_image", -1, "captions_per_image=-1 must be 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(name, value, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        Recipe().with_settings({name: value})


@pytest.mark.parametrize(
    "name",
    "embed_size hidden_size num_layers attention_size num_heads resize crop threshold batch_size epochs lr clip "
    "backbone_lr beam_size max_len".split(),
)
def test_settings_that_must_be_above_zero(name):
    for value in ("0", "-1", *(["nan"] if isinstance(getattr(Recipe(), name), float) else [])):
        with pytest.raises(UserError, match=rf"{name}={value}(\.0)? must be above 0; give a larger number"):
            Recipe().with_settings({name: value})


def test_settings_that_contradict_each_other():
    with pytest.raises(UserError, match="squash keeps the whole image and random_crop cuts it; turn one of them off"):
        Recipe(squash=True, random_crop=True)
    with pytest.raises(UserError, match=r"objective=self-critical needs all captions of an image .*; set group=image"):
        Recipe(objective="self-critical")
    alone = Recipe(objective="self-critical", group="image", samples_per_image=1, baseline="greedy")
    with pytest.raises(UserError, match="samples_per_image is 1; set samples_per_image=2 or more, or baseline=greedy"):
        replace(alone, baseline="others")


def test_transforms():
    assert Recipe(resize=100, squash=True, crop=50, flip=True).transform() == Transform(resize=(100, 100), flip=True)
    cropped = Recipe(resize=256, crop=224, random_crop=True, flip=True).transform()
    assert cropped == Transform(resize=256, crop=224, random_crop=True, flip=True)
    assert Recipe().transform() == Transform(resize=256, crop=224)


def test_layers_to_train():
    assert Recipe().layers_to_train() is Recipe(fine_tune=" , ").layers_to_train() is None
    assert Recipe(fine_tune="layer4").layers_to_train() == ["layer4"]
    assert Recipe(fine_tune="layer3, layer4,").layers_to_train() == ["layer3", "layer4"]
    assert Recipe(fine_tune="all").layers_to_train() == Recipe(encoder="tiny").layers_to_train() == [""]


def test_each_decoder_is_built_as_the_recipe_says():
    recipe = Recipe(encoder="tiny", embed_size=32, hidden_size=48, attention_size=24, num_heads=4, dropout=0.25)
    attend = CaptionModel(replace(recipe, decoder="attend").model_config(9)).decoder
    assert attend.attention.query.weight.shape == (24, 48)
    assert attend.dropout.p == 0.25
    transformer = CaptionModel(replace(recipe, decoder="transformer", num_layers=2).model_config(9)).decoder
    assert [layer.cross_attn.num_heads for layer in transformer.layers] == [4, 4]
    lstm = CaptionModel(replace(recipe, decoder="every-step", num_layers=3).model_config(9)).decoder.lstm
    assert (lstm.input_size, lstm.hidden_size, lstm.num_layers) == (64, 48, 3)
    tied = CaptionModel(replace(recipe, hidden_size=32, tie_embeddings=True, batch_norm=True).model_config(9))
    assert tied.decoder.linear.weight is tied.decoder.embed.weight
    assert isinstance(tied.encoder.embed[1], torch.nn.BatchNorm1d)


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_gets_the_settings_that_its_constructor_has(name):
    decoder = Recipe(decoder=name).model_config(9)["decoder"]
    extra = {"attention_size"} if name in ("attend", "top-down") else {"num_layers"}
    extra |= {"num_heads"} if name == "transformer" else set()
    assert decoder.keys() == {"name", "embed_size", "hidden_size", "vocab_size", "dropout", "tie_embeddings"} | extra


def test_an_unknown_decoder_is_refused_before_anything_is_built():
    recipe = Recipe(decoder="lstm")
    for use in (recipe.unused_settings, lambda: recipe.model_config(9)):
        with pytest.raises(UserError, match="no decoder 'lstm'; choose one of show-tell, every-step, attend, top-down"):
            use()


@pytest.mark.parametrize(
    ("settings", "notes"),
    [
        ({}, []),
        ({"captions_per_image": 2}, ["captions_per_image=2 has no effect: group is length"]),
        ({"captions_per_image": 2, "group": "image"}, []),
        ({"crop": 200, "squash": True}, ["crop=200 has no effect: squash keeps the whole image"]),
        ({"crop": 200}, []),
        (
            {"encoder": "tiny", "fine_tune": "layer4"},
            ["fine_tune=layer4 has no effect: the encoder tiny always trains completely"],
        ),
        ({"encoder": "tiny", "backbone_lr": 1.0}, ["backbone_lr=1.0 has no effect: the encoder tiny trains at lr"]),
        ({"backbone_lr": 1.0}, ["backbone_lr=1.0 has no effect: fine_tune names no layers"]),
        ({"backbone_lr": 1.0, "fine_tune": "layer4"}, []),
        ({"weight_decay": 0.1}, ["weight_decay=0.1 has no effect: optimizer is adam"]),
        ({"weight_decay": 0.1, "optimizer": "adamw"}, []),
        ({"attention_cost": 1.0}, ["attention_cost=1.0 has no effect: the decoder show-tell does not attend"]),
        (
            {"decoder": "attend", "num_layers": 2, "num_heads": 4},
            [
                "num_layers=2 has no effect: the decoder attend does not have it",
                "num_heads=4 has no effect: the decoder attend does not have it",
            ],
        ),
        ({"samples_per_image": 3}, ["samples_per_image=3 has no effect: objective is cross-entropy"]),
        (
            {"objective": "self-critical", "group": "image", "word_dropout": 0.1, "samples_per_image": 3},
            ["word_dropout=0.1 has no effect: xe_weight is 0"],
        ),
        ({"objective": "self-critical", "group": "image", "word_dropout": 0.1, "xe_weight": 0.5}, []),
        ({"attention_size": 9}, ["attention_size=9 has no effect: the decoder show-tell does not have it"]),
    ],
)
def test_settings_without_effect_are_named(settings, notes):
    assert Recipe(**settings).unused_settings() == notes


def header_of(recipe: Recipe, /, **meta) -> dict:
    config, transform = recipe.model_config(9), recipe.transform().evaluation().to_dict()
    return {"model": config, "transform": transform, "vocabulary": {"tokenizer": recipe.tokenizer}, "meta": meta}


def test_the_model_is_inherited_and_the_schedule_is_not():
    other = replace(recipe_named("flickr8k-transformer"), tokenizer="treebank", max_len=30, warmup=4000, fine_tune="x")
    header = header_of(other, recipe={**other.to_dict(), "unknown": 1})
    header["model"]["decoder"]["unknown"] = 2
    recipe = Recipe(epochs=2, warmup=7, batch_size=3).inherit_model(header)
    model = ("encoder", "decoder", "batch_norm", "num_layers", "dropout", "tie_embeddings", "squash", "resize")
    inherited = {name: getattr(other, name) for name in (*model, "tokenizer", "max_len")}
    assert recipe == replace(Recipe(epochs=2, warmup=7, batch_size=3), **inherited)
    assert recipe.model_config(9) == other.model_config(9)
    cropped = replace(other, squash=False, resize=300, crop=200)
    assert Recipe().inherit_model(header_of(cropped)).transform() == cropped.transform()


def test_arguments_that_a_model_leaves_out_have_the_defaults_of_its_constructor():
    """As in models of `import-legacy`, which have no recipe either."""
    header = header_of(Recipe())
    header["model"] = {
        "encoder": {"embed_size": 256, "backbone": "resnet152"},
        "decoder": {"name": "show-tell", "embed_size": 256, "hidden_size": 512, "vocab_size": 9, "num_layers": 1},
    }
    recipe = Recipe(batch_norm=True, tie_embeddings=True).inherit_model(header)
    assert recipe == Recipe(encoder="resnet152", embed_size=256, dropout=0.0)
