"""Recipes: complete settings by name, changed by what a user types, refused where they cannot be."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace

import pytest
import torch

from showtell import __main__ as command_line
from showtell.errors import UserError
from showtell.model import CaptionModel
from showtell.recipes import RECIPES, Recipe, recipe_named
from showtell.transforms import Transform


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_model_and_comes_back_from_json(name):
    recipe = recipe_named(name)
    assert Recipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe
    transform = recipe.transform()
    assert transform.size == (64 if name == "demo" else 224)
    assert transform == transform.evaluation(), "recipes augment nothing: frozen backbones are cached"
    model = CaptionModel(replace(recipe, encoder="tiny").model_config(30))
    logits, _ = model(torch.zeros(2, 3, 32, 32), torch.tensor([[0, 5, 1], [0, 7, 1]]))
    assert logits.shape[0] == 2
    assert logits.shape[2] == 30


def test_the_command_line_lists_every_recipe():
    assert command_line._recipe_names() == sorted(RECIPES)


def test_the_plain_flickr8k_recipe():
    recipe = recipe_named("flickr8k-show-tell")
    expected = {
        "decoder": "show-tell", "embed_size": 512, "hidden_size": 512, "dropout": 0.5, "optimizer": "adam",
        "lr": 1.5e-3,
        "warmup": 200, "batch_size": 80, "label_smoothing": 0.1, "clip": 5, "threshold": 5, "tokenizer": "words",
        "epochs": 12, "length_penalty": 0.7, "max_len": 25, "fine_tune": "", "batch_norm": True,
    }  # fmt: skip
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert recipe.transform() == Transform(resize=(224, 224))


def test_an_unknown_recipe_or_setting_lists_those_there_are():
    with pytest.raises(UserError, match=r"there is no recipe 'best'; choose one of flickr8k-show-tell, .*, demo"):
        recipe_named("best")
    with pytest.raises(UserError, match=r"a recipe has no setting 'learning_rate'; it has attention_cost, .* lr, "):
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
        ("epochs", "three", "epochs='three' is not understood; epochs is a whole number"),
        ("epochs", "2.5", "epochs='2.5' is not understood; epochs is a whole number"),
        ("epochs", 2.5, "epochs=2.5 is not understood; epochs is a whole number"),
        ("epochs", math.inf, "epochs=inf is not understood; epochs is a whole number"),
        ("epochs", "", "epochs='' is not understood; epochs is a whole number"),
        ("lr", "fast", "lr='fast' is not understood; lr is a number"),
        ("squash", "yes", "squash=yes is not understood; write squash=true or squash=false"),
        (
            "decoder",
            "lstm",
            "decoder='lstm' is not known; choose one of show-tell, every-step, attend, top-down, transformer",
        ),
        ("tokenizer", "nltk", "tokenizer='nltk' is not known; choose one of treebank, words, ptb"),
        ("group", "batch", "group='batch' is not known; choose one of length, image"),
        ("optimizer", "sgd", "optimizer='sgd' is not known; choose one of adam, adamw"),
        ("precision", "half", "precision='half' is not known; choose one of auto, float32, bfloat16"),
        ("dropout", 1, "dropout=1.0 must be from 0 to below 1; 0 turns it off"),
        ("dropout", "nan", "dropout=nan must be from 0 to below 1"),
        ("label_smoothing", -0.1, "label_smoothing=-0.1 must be from 0 to below 1"),
        ("warmup", -1, "warmup=-1 must be 0 or more; 0 turns it off"),
        ("length_penalty", -0.5, "length_penalty=-0.5 must be 0 or more"),
        ("weight_decay", "nan", "weight_decay=nan must be 0 or more"),
    ],
)
def test_values_that_cannot_be(name, value, message):
    with pytest.raises(UserError, match="^" + re.escape(message)):
        Recipe().with_settings({name: value})


@pytest.mark.parametrize(
    "name",
    "embed_size hidden_size num_layers attention_size num_heads resize crop threshold batch_size epochs lr clip "
    "backbone_lr beam_size max_len".split(),
)
def test_what_must_be_above_zero(name):
    for value in (0, -1):
        with pytest.raises(UserError, match=rf"{name}={value}(\.0)? must be above 0; give a larger number"):
            Recipe().with_settings({name: value})
    if {f.name: f.type for f in fields(Recipe)}[name] == "float":
        with pytest.raises(UserError, match=f"{name}=nan must be above 0"):
            Recipe().with_settings({name: "nan"})


def test_settings_that_contradict_each_other():
    with pytest.raises(UserError, match="the layers of the decoder attend are given; leave num_layers at 1"):
        Recipe(decoder="attend", num_layers=2)
    with pytest.raises(UserError, match="squash keeps the whole image and random_crop cuts it; turn one of them off"):
        Recipe(squash=True, random_crop=True)


def test_transforms():
    assert Recipe(resize=100, squash=True, crop=50, flip=True).transform() == Transform(resize=(100, 100), flip=True)
    cropped = Recipe(resize=256, crop=224, random_crop=True, flip=True).transform()
    assert cropped == Transform(resize=256, crop=224, random_crop=True, flip=True)
    assert Recipe().transform() == Transform(resize=256, crop=224)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, None),
        ({"fine_tune": "layer4"}, ["layer4"]),
        ({"fine_tune": "layer3, layer4,"}, ["layer3", "layer4"]),
        ({"fine_tune": " , "}, None),
        ({"fine_tune": "all"}, [""]),
        ({"encoder": "tiny"}, [""]),
    ],
)
def test_layers_to_train(settings, layers):
    assert Recipe(**settings).layers_to_train() == layers


def test_each_decoder_is_built_as_the_recipe_says():
    recipe = Recipe(encoder="tiny", embed_size=32, hidden_size=48, attention_size=24, num_heads=4, dropout=0.25)
    attend = CaptionModel(replace(recipe, decoder="attend").model_config(9)).decoder
    assert attend.attention.query.weight.shape == (24, 48)
    assert attend.dropout.p == 0.25
    transformer = CaptionModel(replace(recipe, decoder="transformer", num_layers=2).model_config(9)).decoder
    assert [layer.look.num_heads for layer in transformer.layers] == [4, 4]
    lstm = CaptionModel(replace(recipe, decoder="every-step", num_layers=3).model_config(9)).decoder.lstm
    assert (lstm.input_size, lstm.hidden_size, lstm.num_layers) == (64, 48, 3)
    tied = CaptionModel(replace(recipe, hidden_size=32, tie_embeddings=True, batch_norm=True).model_config(9))
    assert tied.decoder.linear.weight is tied.decoder.embed.weight
    assert isinstance(tied.encoder.embed[1], torch.nn.BatchNorm1d)
