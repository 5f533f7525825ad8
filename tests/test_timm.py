"""Backbones of timm by name, with random or local weights: features, transforms, caches, fine-tuning, mistakes."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import showtell
from showtell.backbones import Backbone, timm_images
from showtell.checkpoint import load_checkpoint
from showtell.data_loader import CaptionSet
from showtell.datasets import load
from showtell.errors import UserError
from showtell.features import FeatureCache
from showtell.recipes import Recipe
from showtell.train import Run, Trainer

timm = pytest.importorskip("timm")

SMALL = Recipe(
    decoder="attend", embed_size=8, hidden_size=8, attention_size=8, threshold=1, group="image", batch_size=4, epochs=1,
    dropout=0.0,
)  # fmt: skip


def scenes(split: str = "train", n: int = 6) -> CaptionSet:
    return load("synthetic", split=split, n=n)


@pytest.mark.parametrize(
    ("name", "side", "size", "cells"),
    [
        ("resnet18", 64, 512, 4),
        ("mobilenetv3_small_050", 64, 288, 4),
        ("test_vit", 160, 64, 100),  # 10 x 10 patches of 16 pixels, and a class token
        ("swin_tiny_patch4_window7_224", 224, 768, 49),  # channels last
    ],
)
def test_a_vector_is_the_mean_of_the_grid(name, side, size, cells):
    grid = Backbone(f"timm/{name}", grid=True, weights=None)
    images = torch.randn(2, 3, side, side)
    features = grid(images)
    assert (tuple(features.shape), grid.feature_size) == ((2, cells, size), size)
    grid.grid = False
    assert torch.allclose(grid(images), features.mean(1), atol=1e-5)


def test_the_grid_of_a_vision_transformer_is_its_tokens_without_the_class_token():
    backbone = Backbone("timm/test_vit", grid=True, weights=None)
    images = torch.randn(1, 3, 160, 160)
    tokens = backbone.net.net.forward_features(images)
    assert tokens.shape[1] == 101
    assert torch.equal(backbone(images), tokens[:, 1:])


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_local_weights_are_timms_own(name, tmp_path):
    net = timm.create_model(name)
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    own = Backbone(f"timm/{name}", weights=tmp_path / "weights.safetensors").net.net
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in own.state_dict().items())
    with pytest.raises(UserError, match="belong to another network"):
        Backbone("timm/test_resnet", weights=tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("resnet18.a1_in1k", {}, {"resize": 235, "crop": 224, "mean": (0.485, 0.456, 0.406)}),
        ("test_vit", {}, {"resize": 168, "crop": 160, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}),
        ("test_vit", {"squash": True}, {"resize": (160, 160), "crop": None, "mean": (0.5, 0.5, 0.5)}),
        ("resnet18", {"resize": 128, "crop": 96}, {"resize": 128, "crop": 96}),
    ],
)
def test_the_transform_is_that_of_timms_data_configuration(name, settings, expected):
    transform = Recipe(encoder=f"timm/{name}", **settings).transform()
    assert {key: getattr(transform, key) for key in expected} == expected


def test_another_size_than_the_only_one_is_one_sentence():
    assert timm_images("timm/test_vit").fixed
    with pytest.raises(UserError, match=r"timm/test_vit takes images of 160 x 160 pixels only, and resize is 224; set"):
        Recipe(encoder="timm/test_vit", squash=True, resize=224).transform()
    with pytest.raises(UserError, match="crop is 128; set crop=160"):
        Recipe(encoder="timm/test_vit", resize=128, crop=128).transform()


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet51", "resnet50"), ("resnet18.a1_in2k", "resnet18.a1_in1k"), ("hf_hub:a/b", "")]
)
def test_an_unknown_name_is_answered_with_similar_ones(name, nearest):
    for call in (lambda: Backbone(f"timm/{name}", weights=None), lambda: timm_images(f"timm/{name}")):
        with pytest.raises(UserError, match=f"timm has no network '{name}'; similar are .*{nearest}"):
            call()


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for call in (lambda: Backbone("timm/resnet18", weights=None), Recipe(encoder="timm/resnet18").transform):
        with pytest.raises(UserError, match=r'needs timm; type pip install "showtell\[timm\]"'):
            call()


def test_weights_that_cannot_be_downloaded_are_random_with_a_warning():
    with pytest.warns(UserWarning, match=r"could not download the ImageNet weights of timm/test_resnet \(.*random"):
        Backbone("timm/test_resnet")


def test_a_network_without_a_grid_is_one_sentence(monkeypatch):
    backbone = Backbone("timm/test_resnet", weights=None)
    for features in (torch.zeros(2, 96), torch.zeros(2, 10, 96), [torch.zeros(2, 96, 5, 5)], torch.zeros(2, 7, 5, 5)):
        monkeypatch.setattr(backbone.net.net, "forward_features", lambda _, features=features: features)
        with pytest.raises(UserError, match="timm/test_resnet gives no square grid of features"):
            backbone(torch.zeros(2, 3, 64, 64))


def test_cached_features_are_those_of_the_images(tmp_path):
    backbone = Backbone("timm/test_vit", grid=True, weights=None)
    transform = Recipe(encoder="timm/test_vit").transform()
    cache = FeatureCache.open(tmp_path, backbone, transform)
    images = scenes(n=2)
    cache.build(images, progress=False)
    fresh = backbone(torch.stack([transform(images.image(i)) for i in range(2)]))
    assert torch.allclose(cache.get(cache.rows(images)).float(), fresh, atol=2e-3)


@pytest.mark.parametrize(
    ("encoder", "fine_tune"), [("test_resnet", ""), ("test_resnet", "layer4"), ("test_vit", "blocks.5,norm")]
)
def test_training_moves_the_chosen_layers_alone_and_the_model_captions(encoder, fine_tune, tmp_path, monkeypatch):
    monkeypatch.setattr("showtell.train.draw_curve", lambda *_: None)
    recipe = replace(SMALL, encoder=f"timm/{encoder}", fine_tune=fine_tune, backbone_lr=1e-2)
    run = Run(out=str(tmp_path / "run"), weights=None, features=str(tmp_path / "features"))
    trainer = Trainer(recipe, run, scenes(), scenes("val", 2))
    before = {name: value.clone() for name, value in trainer.model.encoder.backbone.state_dict().items()}
    trainer.fit(progress=False)
    assert (trainer.loader.dataset.cache is not None) == (not fine_tune)
    after = trainer.model.encoder.backbone.state_dict()
    moved = {name.removeprefix("net.net.") for name in before if not torch.equal(before[name], after[name])}
    prefixes = tuple(filter(None, fine_tune.split(",")))
    assert bool(moved) == bool(prefixes)
    assert all(name.startswith(prefixes) for name in moved)

    path = tmp_path / "run" / "best.safetensors"
    captioner = showtell.load(path, "cpu")
    assert captioner.transform == recipe.transform().evaluation()
    (caption,) = captioner.caption(scenes().image(0), alphas=True)
    side = round(captioner.encode(scenes().image(0)).shape[1] ** 0.5)
    assert caption.alphas.shape[1:] == (side, side)
    assert load_checkpoint(path).model.config["encoder"]["backbone"] == f"timm/{encoder}"


def test_a_layer_that_a_network_does_not_have_is_one_sentence():
    with pytest.raises(UserError, match=r"timm/test_resnet has no layer 'stage4' to fine-tune; .* conv1, bn1, layer1"):
        Backbone("timm/test_resnet", weights=None).fine_tune("stage4")


def test_the_backbone_of_a_checkpoint_is_weights_for_another(tmp_path):
    net = Backbone("timm/test_resnet", weights=None)
    state = {f"encoder.backbone.{name}": value.contiguous() for name, value in net.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    again = Backbone("timm/test_resnet", weights=tmp_path / "model.safetensors")
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in again.state_dict().items())
