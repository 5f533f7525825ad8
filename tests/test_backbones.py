"""Backbones: torchvision's networks without their last layers, frozen or fine-tuned, and their weights."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings

import pytest
import torch
from torch import nn
from torchvision import models

from showtell import backbones
from showtell.backbones import Backbone, TinyNet, load_backbone_weights
from showtell.checkpoint import save_checkpoint
from showtell.errors import MissingFileError, UserError
from showtell.model import CaptionModel
from showtell.recipes import Recipe
from showtell.transforms import IMAGENET
from showtell.vocabulary import Vocabulary

CLASSIFIERS = [name for name in models.list_models(module=models) if not name.startswith("vit_")]


def some_images(n=2, size=64):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def torchvisions(name: str) -> nn.Module:
    """The whole network with random weights, as torchvision evaluates its pretrained one."""
    inception = {"init_weights": False, "transform_input": True} if name in ("inception_v3", "googlenet") else {}
    return models.get_model(name, weights=None, **inception).eval()


@torch.no_grad()
def settle(net: nn.Module, images: torch.Tensor) -> None:
    """Gives batch norm the statistics of these images; a deep network of random weights is nearly silent without."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.momentum = 1.0
    net(images)
    net.eval()


@pytest.fixture
def frozen():
    return Backbone("resnet18", weights=None)


def finish(net: nn.Module, name: str, vector: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Class scores from the backbone's features, by the network's own last layers."""
    if hasattr(net, "fc"):
        return net.fc(vector)
    if name.startswith("squeezenet"):
        side = int(grid.shape[1] ** 0.5)
        return net.classifier(grid.transpose(1, 2).unflatten(2, (side, side))).flatten(1)
    if name.startswith("convnext"):
        return net.classifier(vector[:, :, None, None])
    if name.startswith("swin"):
        return net.head(vector)
    return net.classifier(vector)


QUICK = "resnet18 mobilenet_v2 mobilenet_v3_small densenet121 shufflenet_v2_x0_5 squeezenet1_1".split()
LARGE = """resnet50 resnet152 resnext50_32x4d inception_v3 googlenet densenet201 regnet_y_400mf mnasnet0_5
    efficientnet_b0 efficientnet_v2_s convnext_tiny swin_t swin_v2_t""".split()


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_features_through_the_last_layers_are_torchvisions_scores(name, tmp_path):
    net, images = torchvisions(name), some_images(3, 96 if name in ("inception_v3", "googlenet") else 64)
    settle(net, images)
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    net.to(memory_format=torch.channels_last)  # as the backbone: a deep network of random weights magnifies rounding
    vector, grid = (Backbone(name, grid, weights=tmp_path / "weights.pth") for grid in (False, True))
    with torch.no_grad():
        cells = grid(images)
        scores = finish(net, name, vector(images), cells)
        expected = net(images)
    torch.testing.assert_close(cells.mean(1), vector(images), atol=1e-5, rtol=1e-4)
    error = (scores - expected).abs().max()
    assert error < 1e-3 * expected.std(0).max()  # far less than images differ by


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classification_network_of_torchvision_is_a_backbone(name, monkeypatch):
    sizes = models.regnet.BlockParams.from_init_params  # computes with tensors, and needs their numbers

    def sizes_of_regnets(*args, **kwargs):
        with torch.device("cpu"):
            return sizes(*args, **kwargs)

    monkeypatch.setattr(models.regnet.BlockParams, "from_init_params", sizes_of_regnets)
    monkeypatch.setattr(backbones, "_BUILT_ON_CPU", ())
    with torch.device("meta"):  # shapes without numbers, so that the largest ones cost nothing
        vector, grid = Backbone(name, weights=None), Backbone(name, grid=True, weights=None)
        images = torch.zeros(2, 3, 224, 224)
        rows, n_cells, channels = grid(images).shape
        assert rows == 2
        assert n_cells >= 25
        assert vector(images).shape == (2, vector.feature_size) == (2, channels)
        whole = torchvisions(name)
    own, all_of_them = grid.net.state_dict(), whole.state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in all_of_them.items() if k in own}
    left = {key.split(".")[0] for key in all_of_them.keys() - own.keys()}
    assert left <= {"fc", "classifier", "head", "AuxLogits", "aux1", "aux2"}


@pytest.mark.parametrize(
    ("name", "size", "grid", "feature_size"),
    [("resnet18", 224, 49, 512), ("resnet50", 96, 9, 2048), ("tiny", 64, 64, 96)],
)
def test_shapes(name, size, grid, feature_size):
    backbone = Backbone(name, grid=True, weights=None)
    assert backbone.feature_size == feature_size
    assert backbone(some_images(2, size)).shape == (2, grid, feature_size)
    backbone.grid = False
    assert backbone(some_images(2, size)).shape == (2, feature_size)


def test_the_grid_goes_row_by_row():
    backbone = Backbone("tiny", grid=True, weights=None)
    maps = backbone.net(some_images())
    cells = backbone(some_images())
    assert torch.equal(cells[:, 10], maps[:, :, 1, 2])  # eight cells a row


def test_tiny_is_the_same_function_in_training_and_evaluation_and_knows_places():
    net = TinyNet()
    assert torch.equal(net.train()(some_images()), net.eval()(some_images()))
    flat = torch.zeros(1, 3, 64, 64)
    assert net(flat)[0].flatten(1).std(1).max() > 1e-3  # one colour everywhere, and yet the cells differ


def state_of(module: nn.Module) -> dict:
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_a_frozen_backbone_neither_learns_nor_drifts(frozen):
    model = nn.Sequential(frozen, nn.Linear(512, 3)).train()
    before = state_of(frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(some_images(4) * 3 + 1).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert not frozen(some_images()).requires_grad
    assert not any(module.training for module in frozen.net.modules())


def test_fine_tuning_trains_what_is_named_and_batch_norm_stays_put(frozen):
    frozen.fine_tune("layer4")
    frozen.train()
    assert not any(module.training for module in frozen.modules())
    before = state_of(frozen)
    optimizer = torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], lr=0.1)
    frozen(some_images(4)).square().sum().backward()
    optimizer.step()
    changed = {key for key, value in frozen.state_dict().items() if not torch.equal(before[key], value)}
    assert changed
    assert all(key.startswith("net.layer4.") for key in changed)
    assert not any(part in key for key in changed for part in ("running_", "num_batches"))
    names = {name for name, p in frozen.net.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in frozen.net.named_parameters() if name.startswith("layer4")}
    with torch.no_grad():
        assert not frozen(some_images()).requires_grad


def test_fine_tune_chooses_several_all_and_none(frozen):
    def trained():
        return {name.split(".")[0] for name, p in frozen.net.named_parameters() if p.requires_grad}

    assert trained() == set()
    frozen.fine_tune(["layer3", "layer4"])
    assert trained() == {"layer3", "layer4"}
    frozen.fine_tune("")
    assert trained() == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    frozen.fine_tune(None)
    assert trained() == set()
    assert not frozen(some_images()).requires_grad
    with pytest.raises(UserError, match=r"resnet18 has no layer 'layer5' to fine-tune; choose from conv1, bn1,"):
        frozen.fine_tune("layer5")


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("layers", ["layer4", "layer3,layer4", "layer2,layer4"])
def test_the_frozen_part_and_the_rest_equal_the_whole(layers, grid):
    backbone = Backbone("resnet18", grid, weights=None)
    settle(backbone.net, images := some_images())
    backbone.fine_tune(layers.split(","))
    stem = backbone.frozen_part()
    maps = stem(images)
    assert not maps.requires_grad
    features = backbone.forward_from_frozen(maps)
    torch.testing.assert_close(features, backbone(images))
    features.sum().backward()
    trained = [name for name, parameter in backbone.net.named_parameters() if parameter.grad is not None]
    assert {name.split(".")[0] for name in trained} == set(layers.split(","))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("inception_v3", ""), ("inception_v3", "Conv2d_1a_3x3"), ("googlenet", ""), ("swin_t", "norm"), ("swin_t", "")],
)
def test_without_frozen_weights_before_the_trained_ones_there_is_no_frozen_part(name, layers):
    """`_Renormalize` comes first in Inception and has no weights; the layers of Swin give channels last."""
    with torch.device("meta"):
        backbone, images = Backbone(name, grid=True, weights=None), torch.zeros(2, 3, 224, 224)
    backbone.fine_tune(layers)
    assert backbone.frozen_part() is None
    assert backbone(images).shape == backbone.forward_from_frozen(backbone(images)).shape


def test_layers_after_a_normalisation_without_weights_can_be_cached():
    backbone, images = Backbone("googlenet", grid=True, weights=None), some_images(2, 64)
    backbone.fine_tune("inception5b")
    torch.testing.assert_close(backbone.forward_from_frozen(backbone.frozen_part()(images)), backbone(images))


def test_the_frozen_part_of_a_frozen_backbone_is_all_of_it_and_of_a_trained_one_nothing(frozen):
    assert frozen.frozen_part() is frozen
    features = torch.randn(2, 512)
    assert frozen.forward_from_frozen(features) is features
    frozen.fine_tune("")
    assert frozen.frozen_part() is None
    tiny = Backbone("tiny", weights=None)  # starts trainable
    assert tiny.frozen_part() is None
    assert tiny.forward_from_frozen(features) is features
    assert all(parameter.requires_grad for parameter in tiny.parameters())
    assert tiny(some_images()).requires_grad


def test_a_captioners_backbone_serves_as_weights(tmp_path):
    model = CaptionModel(Recipe(encoder="resnet18").model_config(9))
    vocab = Vocabulary([*Vocabulary().word2idx, *"abcdef"], threshold=1)
    save_checkpoint(tmp_path / "captioner.safetensors", model, vocab, IMAGENET)
    again = Backbone("resnet18", weights=tmp_path / "captioner.safetensors")
    torch.testing.assert_close(again.net.state_dict(), model.encoder.backbone.net.state_dict(), rtol=0, atol=0)


def test_an_unknown_name_lists_the_known_ones():
    known = "choose tiny, timm/NAME or one of alexnet, .*resnet50"
    with pytest.raises(UserError, match=f"no backbone 'resnet51'; {known}"):
        Backbone("resnet51", weights=None)
    with pytest.raises(UserError, match="no backbone 'vit_b_16'"):
        Backbone("vit_b_16", weights=None)


def test_strides_in_the_1x1_are_the_published_layout(tmp_path):
    torch.save(torchvisions("resnet50").state_dict(), tmp_path / "r.pth")
    ours = Backbone("resnet50", weights=tmp_path / "r.pth")
    published = Backbone("resnet50", weights=tmp_path / "r.pth", stride_in_1x1=True)
    assert ours(some_images()).shape == published(some_images()).shape
    assert not torch.allclose(ours(some_images()), published(some_images()), atol=1e-3)
    for i in (2, 3, 4):
        block = getattr(published.net, f"layer{i}")[0]
        assert (block.conv1.stride, block.conv2.stride, block.downsample[0].stride) == ((2, 2), (1, 1), (2, 2))
    first = published.net.layer1[0]
    assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (1, 1))
    for name in ("resnet18", "tiny", "mobilenet_v2"):
        with pytest.raises(UserError, match=f"needs a bottleneck ResNet such as resnet50, not {name}"):
            Backbone(name, weights=None, stride_in_1x1=True)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("half", [False, True])
def test_weights_from_a_file(tmp_path, suffix, half):
    from safetensors.torch import save_file

    state = torchvisions("resnet18").state_dict()
    state = {key: value.half() if half and value.is_floating_point() else value for key, value in state.items()}
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    for given in (path, str(path)):
        net = Backbone("resnet18", weights=given).net
        assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in net.state_dict().items())
        assert net.conv1.weight.dtype == torch.float32


def test_weights_without_the_last_layer_or_the_batch_counters_fit(tmp_path):
    state = torchvisions("resnet18").state_dict()
    short = {k: v for k, v in state.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    torch.save(short, tmp_path / "w.pth")
    assert torch.equal(Backbone("resnet18", weights=tmp_path / "w.pth").net.conv1.weight, state["conv1.weight"])


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("trace",)


def test_unusable_weights_get_one_error_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = torchvisions("resnet18").state_dict()
    torch.save(good, "good.pth")
    data = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights at all")
    torch.save({"conv1.weight": good["conv1.weight"]}, "part.pth")
    torch.save(good | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, "shape.pth")
    torch.save({"x": Hostile()}, "hostile.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(), 2))
    for name, sentence in {
        "gone.pth": "there is no file of backbone weights at gone.pth",
        "cut.pth": "cannot read cut.pth as weights",
        "text.pth": "cannot read text.pth as weights",
        "text.safetensors": "cannot read text.safetensors as weights",
        "hostile.pth": "cannot read hostile.pth as weights",
        "plain.pth": "cannot read plain.pth as weights",
        "part.pth": "belong to another network: 99 tensors are missing and 0 have another shape",
        "shape.pth": "0 tensors are missing and 1 have another shape, conv1.weight first",
    }.items():
        with pytest.raises(UserError) as caught:
            Backbone("resnet18", weights=name)
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()
    with pytest.raises(MissingFileError):
        load_backbone_weights(nn.Linear(1, 1), "gone.pth")
    os.mkfifo("pipe.pth")
    with pytest.raises(UserError, match=r"pipe\.pth is no regular file"):
        load_backbone_weights(nn.Linear(1, 1), "pipe.pth")
    with pytest.raises(UserError, match="choose the backbone they were trained with"):
        Backbone("resnet34", weights="good.pth")


@pytest.mark.parametrize("value", [[1, 2], {"state_dict": {}}, {"conv1.weight": 3}, torch.zeros(3), None])
def test_a_file_of_something_else_is_no_weights(tmp_path, value):
    torch.save(value, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds a \w+, not a state dict|belong to another network"):
        Backbone("resnet18", weights=tmp_path / "w.pth")


def test_a_failed_download_gives_random_weights_and_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    expected = "could not download the ImageNet weights of resnet18 .* or pass a file as weights"
    with pytest.warns(UserWarning, match=expected):
        backbone = Backbone("resnet18")
    assert backbone(some_images()).std() > 0
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Backbone("resnet18", weights=None)
        Backbone("tiny")


def test_imagenet_weights_are_torchvisions(monkeypatch):
    """What the library would download is loaded as it is (here its download is replaced by a network of ours)."""
    state = torchvisions("resnet18").state_dict()
    monkeypatch.setattr(type(models.ResNet18_Weights.DEFAULT), "get_state_dict", lambda *_, **__: state)
    net = Backbone("resnet18").net
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_an_imagenet_resnet_knows_a_cat_in_the_published_layout(weights):
    data = pytest.importorskip("skimage.data")
    from safetensors.torch import load_file

    path = weights / "resnet50_imagenet_pruned.safetensors"
    labels = json.loads((weights / "imagenet_labels.json").read_text())
    last = load_file(path)
    images = torch.stack([IMAGENET(data.chelsea()), IMAGENET(data.rocket()), IMAGENET(data.coffee())])
    confidence = {}
    for layout in (True, False):
        features = Backbone("resnet50", weights=path, stride_in_1x1=layout)(images)
        scores = (features @ last["fc.weight"].float().T + last["fc.bias"].float()).softmax(1)
        found = [[labels[i].lower() for i in row] for row in scores.topk(5).indices.tolist()]
        wanted = ("cat", "missile", "espresso")
        if layout:
            for names, word in zip(found, wanted, strict=True):
                assert any(word in name for name in names), names
        confidence[layout] = sum(
            float(scores[i, [n for n, label in enumerate(labels) if word in label.lower().split()]].sum())
            for i, word in enumerate(wanted)
        )
    assert confidence[True] > confidence[False]


@pytest.mark.parametrize(
    "name", ["resnet18", "vgg11_bn", "densenet121", "mobilenet_v3_small", "efficientnet_b0", "googlenet"]
)
def test_folded_batch_norm_computes_the_same(name):
    torch.manual_seed(0)
    backbone = Backbone(name, weights=None)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1.0, 0.2)
            torch.nn.init.normal_(module.bias, 0.0, 0.2)
            module.running_mean.normal_(0.0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = backbone.net(images)
        folded = backbones.fold_batch_norm(copy.deepcopy(backbone.net))
        torch.testing.assert_close(folded(images), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules()) or name == "densenet121"


def test_in_bfloat16_agrees_to_two_digits_and_leaves_the_backbone_alone():
    torch.manual_seed(0)
    backbone = Backbone("resnet18", grid=True, weights=None)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    images = torch.randn(2, 3, 64, 64)
    exact, fast = backbone(images), backbone.in_bfloat16()(images)
    assert fast.dtype == torch.float32
    assert not torch.equal(fast, exact)
    assert (fast - exact).norm() < 0.02 * exact.norm()
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_a_copy_in_bfloat16_leaves_the_backbone_as_it_is():
    backbone = Backbone("resnet18", weights=None)
    backbone.fine_tune("layer4")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    trained = [name for name, parameter in backbone.named_parameters() if parameter.requires_grad]
    fast = backbone.in_bfloat16()
    assert {tensor.dtype for tensor in (*fast.parameters(), *fast.buffers())} <= {torch.bfloat16, torch.long}
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert not fast.trainable
    assert backbone.trainable
    assert [name for name, parameter in backbone.named_parameters() if parameter.requires_grad] == trained
    after = backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
