"""Files of other captioning repositories: six naming schemes are read, folded, refused and written."""

from __future__ import annotations

import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn, ones
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from showtell.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from showtell.errors import MissingFileError, UserError
from showtell.legacy import export_legacy, import_legacy
from showtell.model import CaptionModel
from showtell.transforms import IMAGENET, IMAGENET_TRAIN, SQUASHED, TINY
from showtell.vocabulary import Vocabulary

CVND = ("<start>", "<end>", "<unk>")
# repository -> backbone, encoder's linear and batch norm, decoder's embedding, LSTM and classifier, first words
SCHEMES = {
    "kalyancv": ("resnet50", "embed", None, "embed", "lstm", "linear", CVND),
    "iamirmasoud": ("resnet50", "embed", None, "embed", "lstm", "linear", CVND),
    "tatwan": ("resnet50", "embed", None, "word_embedding", "lstm", "fc", CVND),
    "AyushRaghuwanshi": ("resnet50", "embed", None, "word_embeddings", "lstm", "linear", CVND),
    "psmenon": ("resnet152", "embed", "batch_norm", "word_embeddings", "lstm", "linear_layer", CVND),
    "yunjey": ("resnet152", "linear", "bn", "embed", "lstm", "linear", ("<pad>", *CVND)),
}
E, H, V = 256, 512, 9955  # the sizes that most of them used


class TheirEncoder(nn.Module):
    """Their encoder, with their attribute names."""

    def __init__(self, resnet: nn.Module, head: str, norm: str | None, embed_size: int = E):
        super().__init__()
        self.resnet = nn.Sequential(*list(resnet.children())[:-1])
        self.head, self.norm = head, norm
        setattr(self, head, nn.Linear(resnet.fc.in_features, embed_size))
        if norm:
            setattr(self, norm, shake(nn.BatchNorm1d(embed_size, momentum=0.01)))

    def forward(self, images):
        features = getattr(self, self.head)(self.resnet(images).flatten(1))
        return getattr(self, self.norm)(features) if self.norm else features


class TheirDecoder(nn.Module):
    """Their decoder, with their attribute names."""

    def __init__(self, embed: str, lstm: str, linear: str, sizes: tuple[int, int, int] = (E, H, V), layers: int = 1):
        super().__init__()
        self.names = embed, lstm, linear
        embed_size, hidden_size, vocab_size = sizes
        setattr(self, embed, nn.Embedding(vocab_size, embed_size))
        setattr(self, lstm, nn.LSTM(embed_size, hidden_size, layers, batch_first=True))
        setattr(self, linear, nn.Linear(hidden_size, vocab_size))

    def forward(self, features, captions):
        embed, lstm, linear = (getattr(self, name) for name in self.names)
        inputs = torch.cat([features.unsqueeze(1), embed(captions[:, :-1])], 1)
        return linear(lstm(inputs)[0])

    def greedy(self, features, start: int, end: int, max_len: int = 12) -> list[int]:
        embed, lstm, linear = (getattr(self, name) for name in self.names)
        _, states = lstm(features.unsqueeze(1))
        ids = [start]
        while len(ids) <= max_len and ids[-1] != end:
            outputs, states = lstm(embed(torch.tensor([ids[-1:]])), states)
            ids.append(int(linear(outputs[0, -1]).argmax()))
        return ids


def shake(module: nn.Module) -> nn.Module:
    """Gives batch norms the statistics and gains of a trained network, so that a lost or swapped one is noticed."""
    for layer in module.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, Bottleneck | BasicBlock):  # else 50 random blocks add up to huge features
                (layer.bn3 if isinstance(layer, Bottleneck) else layer.bn2).weight.mul_(0.2)
    return module.eval()


RESNETS: dict[str, nn.Module] = {}


def resnet(name: str) -> nn.Module:
    """A random network, made once for all tests; nothing changes it."""
    if name not in RESNETS:
        RESNETS[name] = shake(models.get_model(name, weights=None))
    return RESNETS[name]


def write_vocab(path: Path, first: tuple[str, ...] = CVND, size: int = V, module: str = "vocabulary") -> Path:
    """A pickled object of a class `Vocabulary` of a module that is gone when the file is read."""
    kind = type("Vocabulary", (), {"__module__": module})
    vocab = kind()
    words = [*first, *(f"word{i}" for i in range(size - len(first)))]
    vocab.word2idx = {word: i for i, word in enumerate(words)}
    vocab.idx2word = dict(enumerate(words))
    vocab.idx = size
    before = sys.modules.get(module)
    sys.modules[module] = types.ModuleType(module)
    sys.modules[module].Vocabulary = kind
    try:
        path.write_bytes(pickle.dumps(vocab, protocol=3))
    finally:
        sys.modules.pop(module)
        if before is not None:
            sys.modules[module] = before
    return path


def check_scheme(scheme: str, backbone: str, folder: Path) -> None:
    _, head, norm, embed, lstm, linear, first = SCHEMES[scheme]
    encoder = TheirEncoder(resnet(backbone), head, norm).eval()
    decoder = TheirDecoder(embed, lstm, linear).eval()
    nn.init.normal_(getattr(decoder, linear).bias)  # else every caption would be much the same word
    torch.save(encoder.state_dict(), folder / "encoder-3.pkl")
    torch.save(decoder.state_dict(), folder / "decoder-3.pkl")
    write_vocab(folder / "vocab.pkl", first, module="build_vocab" if scheme == "yunjey" else "vocabulary")

    checkpoint = import_legacy(folder / "encoder-3.pkl", folder / "decoder-3.pkl", folder / "vocab.pkl")

    model, vocab = checkpoint.model, checkpoint.vocab
    assert model.config == {
        "encoder": {"embed_size": E, "backbone": backbone},
        "decoder": {"name": "show-tell", "embed_size": E, "hidden_size": H, "vocab_size": V, "num_layers": 1},
    }
    assert not model.training
    assert (vocab.start_id, vocab.end_id, vocab.unk_id) == tuple(first.index(word) for word in CVND)
    assert checkpoint.transform == IMAGENET
    assert checkpoint.meta["imported_from"]["encoder"] == "encoder-3.pkl"
    images, captions = torch.randn(2, 3, 64, 64), torch.randint(0, V, (2, 7))
    with torch.no_grad():
        features = encoder(images)
        assert features.abs().max() < 30  # as a trained network's, so that the LSTM is not saturated
        torch.testing.assert_close(model.encoder(images), features, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(images, captions)[0], decoder(features, captions), rtol=1e-4, atol=1e-4)
        ours = model.decoder.sample(model.encoder(images[:1]), max_len=12, start_id=vocab.start_id, end_id=vocab.end_id)
        assert ours == decoder.greedy(features[:1], vocab.start_id, vocab.end_id)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme_is_read(scheme, tmp_path):
    backbone = SCHEMES[scheme][0]
    check_scheme(scheme, "resnet18" if backbone == "resnet152" else backbone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["psmenon", "yunjey"])
def test_scheme_is_read_at_full_depth(scheme, tmp_path):
    check_scheme(scheme, "resnet152", tmp_path)


SMALL = (8, 12, 20)


@pytest.fixture
def files(tmp_path):
    """Paths of `encoder.pkl`, `decoder.pkl` and `vocab.pkl`, and the two state dicts, which a test may alter."""
    return Files(tmp_path, head_of(SMALL[0]), TheirDecoder("embed", "lstm", "linear", SMALL).state_dict())


class Files:
    def __init__(self, folder: Path, encoder: dict, decoder: dict):
        self.encoder, self.decoder = dict(encoder), dict(decoder)
        self.paths = [folder / "encoder.pkl", folder / "decoder.pkl", folder / "vocab.pkl"]
        write_vocab(self.paths[2], size=SMALL[2])

    def read(self, **options):
        for path, state in zip(self.paths, (self.encoder, self.decoder), strict=False):
            if not path.exists():
                torch.save(state, path)
        return import_legacy(*self.paths, **options)


def logits(checkpoint, seed: int = 3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    with torch.no_grad():
        return checkpoint.model(images, torch.randint(0, 20, (2, 6), generator=generator))[0]


def test_data_parallel_old_counters_and_other_precision_change_nothing(files, tmp_path):
    plain = logits(files.read())
    (tmp_path / "other").mkdir()
    other = Files(tmp_path / "other", {}, {})
    # PyTorch 0.4.0 had no num_batches_tracked, and nn.DataParallel puts "module." before every name.
    other.encoder = {f"module.{k}": v for k, v in files.encoder.items() if "num_batches" not in k}
    other.decoder = {f"module.{k}": v.double() for k, v in files.decoder.items()}
    assert torch.equal(logits(other.read()), plain)


def test_pytorch_before_1_6_wrote_another_container(files):
    torch.save(files.encoder, files.paths[0], _use_new_zipfile_serialization=False)
    assert files.read().model.config["encoder"]["backbone"] == "resnet18"


def test_torchvision_names_and_several_layers_are_read(files):
    names = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    renamed = {}
    for key, tensor in files.encoder.items():
        parts = key.split(".")
        renamed[".".join(["cnn", names[parts[1]], *parts[2:]]) if parts[0] == "resnet" else key] = tensor
    decoder = TheirDecoder("words", "rnn", "out", SMALL, layers=3)
    files.encoder, files.decoder = renamed, dict(decoder.state_dict())
    checkpoint = files.read(transform=SQUASHED)
    assert checkpoint.model.config["decoder"]["num_layers"] == 3
    assert checkpoint.transform == SQUASHED
    features, captions = torch.randn(2, SMALL[0]), torch.randint(0, 20, (2, 6))
    torch.testing.assert_close(checkpoint.model.decoder(features, captions), decoder(features, captions))


def test_imported_model_becomes_one_of_our_checkpoints(files, tmp_path):
    checkpoint = files.read(transform=IMAGENET_TRAIN)
    assert checkpoint.transform == IMAGENET
    save_checkpoint(tmp_path / "m.safetensors", checkpoint.model, checkpoint.vocab, checkpoint.transform)
    again = load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(logits(again), logits(checkpoint))
    assert again.vocab == checkpoint.vocab


def drop(state: dict, part: str) -> None:
    for key in [key for key in state if part in key]:
        del state[key]


BOTH_WAYS = nn.LSTM(8, 12, batch_first=True, bidirectional=True).state_dict(prefix="lstm.")


def head_of(embed_size: int) -> dict:
    return TheirEncoder(resnet("resnet18"), "embed", "bn", embed_size).state_dict()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: drop(f.decoder, "embed"), r"decoder\.pkl lacks a word embedding .* encoder first, the decoder"),
        (lambda f: drop(f.decoder, "linear"), r"decoder\.pkl lacks a classifier"),
        (lambda f: drop(f.decoder, "lstm"), r"decoder\.pkl lacks an LSTM"),
        (lambda f: drop(f.decoder, "lstm.bias"), r"2 missing, decoder\.lstm\.bias_ih_l0 first"),
        (lambda f: f.decoder.update({"init_h.weight": ones(3)}), r"decoder\.pkl holds init_h\.weight besides"),
        (lambda f: f.decoder.update(BOTH_WAYS), r"decoder\.pkl holds lstm\.weight_ih_l0_reverse, .* besides an embed"),
        (lambda f: f.decoder.update({"linear.weight": ones(21, 12)}), r"embedding of 20 words .* classifier of 21"),
        (lambda f: f.decoder.update({"lstm.weight_ih_l0": ones(36, 8)}), r"shape 36 x 8, where the LSTM .* 48 x 8"),
        (lambda f: f.decoder.update({"lstm.weight_ih_l0": ones(48, 16)}), r"shape 48 x 16"),
        (lambda f: drop(f.encoder, "embed"), r"encoder\.pkl lacks the linear layer from the ResNet's 512 features"),
        (lambda f: drop(f.encoder, "resnet.7.1."), r"ResNet of \(2, 2, 2, 1\) blocks.*resnet18"),
        (lambda f: drop(f.encoder, "resnet.7.1.conv2"), r"1 missing, encoder\.backbone\.net\.layer4\.1\.conv2\.weight"),
        (lambda f: drop(f.encoder, "bn.running_var"), r"encoder\.pkl holds bn\.weight.* besides a ResNet"),
        (lambda f: f.encoder.update({"gate.bias": ones(3)}), r"encoder\.pkl holds gate\.bias besides a ResNet"),
        (lambda f: f.encoder.update(head_of(9)), r"encoder\.pkl gives 9 features per image and .*decoder\.pkl takes 8"),
        (lambda f: write_vocab(f.paths[2], size=21), r"vocab\.pkl has 21 words and .*decoder\.pkl was trained with 20"),
        (lambda f: f.decoder.update({"epoch": 3}), r"decoder\.pkl holds epoch besides .*decoder\.state_dict\(\) alone"),
        (lambda f: torch.save([1, 2], f.paths[1]), r"decoder\.pkl holds a list, not a state dict"),
        (lambda f: torch.save({}, f.paths[1]), r"decoder\.pkl holds a dict, not a state dict"),
        (lambda f: f.paths[0].mkdir(), r"encoder\.pkl is a folder, not a state dict of the encoder"),
        (lambda f: f.paths[0].write_bytes(b""), r"encoder\.pkl is empty"),
        (lambda f: f.paths[0].write_bytes(b"\x89PNG\r\n" + bytes(99)), r"encoder\.pkl is damaged, truncated or no"),
    ],
)
def test_unusable_files_are_refused_with_one_message(files, change, sentence):
    change(files)
    with pytest.raises(UserError, match=sentence) as caught:
        files.read()
    assert "\n" not in str(caught.value)


def test_files_in_the_wrong_order_are_refused_with_the_right_one(files):
    files.read()
    encoder, decoder, vocab = files.paths
    order = "give the encoder first, the decoder second and the vocabulary third"
    with pytest.raises(UserError, match=rf"decoder\.pkl has no ResNet .*; {order}"):
        import_legacy(decoder, encoder, vocab)
    with pytest.raises(UserError, match=rf"encoder\.pkl lacks .*; {order}"):
        import_legacy(encoder, encoder, vocab)


def test_truncated_and_missing_files_are_refused(files):
    files.read()
    content = files.paths[0].read_bytes()
    for kept in (10, 1000, len(content) // 2, len(content) - 40):
        files.paths[0].write_bytes(content[:kept])
        with pytest.raises(UserError, match=r"encoder\.pkl is damaged, truncated"):
            import_legacy(*files.paths)
    files.paths[0].write_bytes(content)
    files.paths[1].unlink()
    with pytest.raises(MissingFileError, match=r"there is no state dict of the decoder at .*decoder\.pkl"):
        import_legacy(*files.paths)


class Hostile:
    """Makes a file, when unpickled by a reader that trusts it."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("which", [0, 1])
def test_a_hostile_pickle_executes_nothing(files, tmp_path, which, zipped):
    state = (files.encoder, files.decoder)[which]
    hostile = state | {"zz": Hostile(tmp_path / "trace")}
    torch.save(hostile, files.paths[which], _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"it names (posix|nt)\.mkdir, which was not executed") as caught:
        files.read()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_a_hostile_vocabulary_executes_nothing(files, tmp_path):
    files.paths[2].write_bytes(pickle.dumps(Hostile(tmp_path / "trace")))
    with pytest.raises(UserError, match=r"mkdir"):
        files.read()
    assert not (tmp_path / "trace").exists()
    pickle.loads(files.paths[2].read_bytes())
    assert (tmp_path / "trace").is_dir()  # the file was hostile indeed


def test_a_whole_module_is_refused_by_name(files):
    torch.save(nn.Linear(2, 2), files.paths[1])
    with pytest.raises(UserError, match=r"it names torch\.nn\.modules\.linear\.Linear.*state_dict\(\) alone"):
        files.read()


def trained(encoder: dict | None = None, decoder: dict | None = None, transform=IMAGENET):
    encoder = {"embed_size": 8, "backbone": "resnet18", **(encoder or {})}
    decoder = {"name": "show-tell", "embed_size": 8, "hidden_size": 12, "vocab_size": 20, **(decoder or {})}
    vocab = Vocabulary([*CVND, *(f"w{i}" for i in range(17))])
    return Checkpoint(shake(CaptionModel({"encoder": encoder, "decoder": decoder})), vocab, transform)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [
        ({}, {}),
        ({"batch_norm": True}, {"num_layers": 2, "dropout": 0.5}),
        ({}, {"hidden_size": 8, "tie_embeddings": True}),
    ],
)
def test_export_and_import_return_the_model(encoder, decoder, tmp_path):
    checkpoint = trained(encoder, decoder)
    paths = export_legacy(checkpoint, tmp_path / "new", number=7)
    assert [path.name for path in paths] == ["encoder-7.pkl", "decoder-7.pkl", "vocab.pkl"]
    again = import_legacy(*paths)
    torch.testing.assert_close(logits(again), logits(checkpoint), rtol=1e-5, atol=1e-5)
    assert again.vocab == checkpoint.vocab
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)


def test_exported_files_load_into_classes_of_other_repositories(tmp_path):
    checkpoint = trained()
    paths = export_legacy(checkpoint, tmp_path)
    encoder = TheirEncoder(models.resnet18(weights=None), "embed", None, 8)
    decoder = TheirDecoder("embed", "lstm", "linear", SMALL)
    encoder.load_state_dict(torch.load(paths[0], weights_only=True))  # strict: every key, and no other
    decoder.load_state_dict(torch.load(paths[1], weights_only=True))
    images, captions = torch.randn(2, 3, 64, 64), torch.randint(0, 20, (2, 6))
    with torch.no_grad():
        theirs = decoder.eval()(encoder.eval()(images), captions)
        torch.testing.assert_close(theirs, checkpoint.model(images, captions)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder", "decoder", "sentence"),
    [
        ({}, {"name": "every-step"}, "supports the decoder show-tell, not 'every-step'; no released model fits"),
        ({}, {"name": "attend"}, "supports the decoder show-tell, not 'attend'"),
        ({"backbone": "tiny"}, {}, "supports the backbones resnet18, .*resnet152, not 'tiny'"),
        (
            {"backbone": "resnet50", "stride_in_1x1": True},
            {},
            r"not in the 1x1 \(stride_in_1x1\); no released model .* --recipe classic",
        ),
    ],
)
def test_export_refuses_models_that_the_files_cannot_hold(encoder, decoder, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        export_legacy(trained(encoder, decoder, TINY), tmp_path)
    assert not list(tmp_path.iterdir())
