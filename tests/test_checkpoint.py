"""Checkpoints: a saved model comes back from one file, and every damaged or foreign file gets one error message."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
import zlib
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from showtell import checkpoint as module
from showtell.backbones import load_backbone_weights
from showtell.checkpoint import (
    add_meta,
    load_checkpoint,
    load_resume,
    read_header,
    save_checkpoint,
    save_resume,
    start_from,
)
from showtell.decoders import DECODERS
from showtell.errors import MissingFileError, UserError
from showtell.legacy import import_legacy
from showtell.model import CaptionModel
from showtell.recipes import Recipe
from showtell.transforms import TINY, Transform
from showtell.vocabulary import Vocabulary

VOCAB = Vocabulary(["<start>", "<end>", "<unk>", *"a red green blue circle square star . naïve 東".split()], 3, "words")
V = len(VOCAB)
TRAINING = Transform(resize=72, crop=64, random_crop=True, flip=True, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def model_of(decoder: str = "show-tell", encoder: dict | None = None, **arguments) -> CaptionModel:
    encoder = {"embed_size": 16, "backbone": "tiny", **(encoder or {})}
    decoder = {"name": decoder, "embed_size": 16, "hidden_size": 16, "vocab_size": V, **arguments}
    return CaptionModel({"encoder": encoder, "decoder": decoder})


def logits(model: CaptionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64, generator=generator)
        return model(images, torch.randint(0, V, (2, 6), generator=generator))[0]


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model_of(), VOCAB, TINY, {"epoch": 3})
    return path


def test_a_new_model_starts_from_a_trained_one_word_by_word(saved):
    trained = load_checkpoint(saved)
    old = trained.vocab
    vocab = Vocabulary(["<start>", "<end>", "<unk>", "unheard", *reversed(list(old.word2idx)[3:6])], threshold=1)
    config = {**trained.model.config, "decoder": {**trained.model.config["decoder"], "vocab_size": len(vocab)}}
    torch.manual_seed(3)
    model = CaptionModel(config)
    row = model.decoder.embed.weight[3].clone()
    assert start_from(model, vocab, saved) == 6
    assert torch.equal(model.decoder.embed.weight[3], row)  # a word it never heard keeps its random start
    for word in list(vocab.word2idx)[4:]:
        for name in ("embed", "linear"):
            new, before = (getattr(m.decoder, name).weight for m in (model, trained.model))
            assert torch.equal(new[vocab.word2idx[word]], before[old.word2idx[word]])
    torch.testing.assert_close(model.encoder.state_dict(), trained.model.encoder.state_dict(), rtol=0, atol=0)


def test_a_model_of_another_architecture_is_refused(saved):
    for name, sentence in {
        "show-tell": r"decoder hidden_size=\d+ and the new model with hidden_size=48; .* recipe",
        "transformer": "decoder name=show-tell and the new model with name=transformer",
    }.items():
        with pytest.raises(UserError, match=sentence):
            start_from(model_of(name, hidden_size=48), VOCAB, saved)


def test_an_argument_that_was_left_out_equals_its_default(tmp_path):
    """`import-legacy` writes no stride_in_1x1, batch_norm and tie_embeddings, and recipes write them all."""
    recipe = Recipe(encoder="tiny", embed_size=16, hidden_size=16)
    config = recipe.model_config(V)
    legacy = {name: config["decoder"][name] for name in ("name", "embed_size", "hidden_size", "vocab_size")}
    other = CaptionModel({"encoder": {"embed_size": 16, "backbone": "tiny"}, "decoder": {**legacy, "num_layers": 1}})
    for path, theirs, ours in (("a", other, CaptionModel(config)), ("b", CaptionModel(config), other)):
        save_checkpoint(tmp_path / path, theirs, VOCAB, TINY)
        assert start_from(ours, VOCAB, tmp_path / path) == V
        assert torch.equal(logits(ours.eval()), logits(theirs.eval()))
    with pytest.raises(UserError, match="decoder tie_embeddings=False and the new model with tie_embeddings=True"):
        start_from(model_of(tie_embeddings=True), VOCAB, tmp_path / "a")


IN_FORMAT_1 = {
    "attention_lstm_word": "look_word", "attention_lstm_image": "look_picture", "attention_lstm_hidden": "look",
    "language_lstm": "speak", "self_attn": "read", "cross_attn": "look", "mlp": "think",
}  # fmt: skip


def old_names(tensors: dict) -> dict:
    return {".".join(IN_FORMAT_1.get(part, part) for part in name.split(".")): t for name, t in tensors.items()}


@pytest.mark.parametrize("decoder", DECODERS)
def test_files_of_format_1_are_read(decoder, tmp_path):
    path, model = tmp_path / "m.safetensors", model_of(decoder).eval()
    save_checkpoint(path, model, VOCAB, TINY)
    header, tensors = read_header(path), load_file(path)
    assert header["format"] == module.FORMAT
    renamed = old_names(tensors)
    assert (renamed.keys() != tensors.keys()) == (decoder in ("top-down", "transformer"))
    save_file(renamed, path, metadata={"showtell": json.dumps({**header, "format": 1})})
    assert torch.equal(logits(load_checkpoint(path).model), logits(model))
    if renamed.keys() != tensors.keys():  # the names belong to the format
        save_file(renamed, path, metadata={"showtell": json.dumps(header)})
        with pytest.raises(UserError, match="does not hold the tensors of its model"):
            load_checkpoint(path)


@pytest.mark.parametrize("decoder", ["top-down", "transformer"])
def test_training_states_of_format_1_are_read(decoder, tmp_path, monkeypatch):
    model = model_of(decoder)
    state = {"recipe": {"decoder": decoder}, "model": old_names(model.state_dict()), "step": 3}
    monkeypatch.setattr(module, "FORMAT", 1)
    save_resume(tmp_path / "resume.pt", state)
    monkeypatch.undo()
    loaded = load_resume(tmp_path / "resume.pt")
    assert list(loaded["model"]) == list(model.state_dict())
    model_of(decoder).load_state_dict(loaded["model"])
    assert loaded["step"] == 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_comes_back_bit_for_bit(decoder, tied, tmp_path):
    model = model_of(decoder, tie_embeddings=tied)
    meta = {"recipe": "demo", "scores": {"CIDEr": 0.5}, "words": ["naïve", "東"], "seed": None}
    save_checkpoint(tmp_path / "m.safetensors", model, VOCAB, TRAINING, meta)
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(logits(loaded.model), logits(model.eval()))
    assert loaded.model.config == model.config
    assert loaded.vocab == VOCAB
    assert loaded.transform == TRAINING.evaluation()
    assert loaded.transform != TRAINING
    assert loaded.meta == meta
    assert not any(part.training for part in loaded.model.modules())


@pytest.mark.parametrize(
    "encoder", [{"backbone": "resnet50", "stride_in_1x1": True}, {"backbone": "resnet18", "batch_norm": True}]
)
def test_the_encoders_options_come_back(encoder, tmp_path):
    model = model_of(encoder=encoder).eval()
    save_checkpoint(tmp_path / "m.safetensors", model, VOCAB, TINY)
    loaded = load_checkpoint(tmp_path / "m.safetensors").model
    assert torch.equal(logits(loaded), logits(model))
    # Frozen as a fresh model is: the head trains, the backbone does not.
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_shared_weight_is_stored_once_and_stays_shared(tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", model_of(tie_embeddings=True), VOCAB, TINY)
    names = load_file(tmp_path / "m.safetensors").keys()
    assert "decoder.embed.weight" in names
    assert "decoder.linear.weight" not in names
    decoder = load_checkpoint(tmp_path / "m.safetensors").model.decoder
    assert decoder.linear.weight is decoder.embed.weight


def test_half_precision_is_stored_and_single_is_loaded(tmp_path):
    model = model_of().eval()
    with torch.no_grad():
        model.decoder.embed.weight[5, 5] = 1e6  # beyond half precision
    save_checkpoint(tmp_path / "full.safetensors", model, VOCAB, TINY)
    save_checkpoint(tmp_path / "half.safetensors", model, VOCAB, TINY, half=True)
    stored = load_file(tmp_path / "half.safetensors")
    assert stored["decoder.linear.weight"].dtype == torch.float16
    assert stored["decoder.linear.bias"].dtype == torch.float32
    assert stored["decoder.embed.weight"].dtype == torch.float32
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "full.safetensors").stat().st_size
    loaded = load_checkpoint(tmp_path / "half.safetensors").model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(loaded), logits(model), rtol=5e-3, atol=5e-3)
    assert next(model.parameters()).dtype == torch.float32  # the model that was saved is as it was


def test_weights_in_8_bits_are_close_in_every_channel(tmp_path):
    model = model_of().eval()
    with torch.no_grad():
        model.decoder.embed.weight[5, 5] = 1e8  # its scale is beyond half precision
        model.decoder.linear.weight[3] = 0
        model.decoder.linear.weight[4] *= 1e-7
        model.decoder.linear.weight[5] *= 1e3
    save_checkpoint(tmp_path / "full.safetensors", model, VOCAB, TINY)
    save_checkpoint(tmp_path / "small.safetensors", model, VOCAB, TINY, int8=True)
    stored = load_file(tmp_path / "small.safetensors")
    assert stored["decoder.linear.weight"].dtype == torch.int8
    assert stored["decoder.linear.bias"].dtype == stored["decoder.embed.weight"].dtype == torch.float32
    loaded = load_checkpoint(tmp_path / "small.safetensors").model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    own = dict(model.named_parameters())
    for name, weight in loaded.named_parameters():
        if stored[name].dtype == torch.int8:
            largest = own[name].flatten(1).abs().amax(1)
            error = (weight - own[name]).flatten(1).abs().amax(1)
            assert (error <= 0.5005 * largest / 127 + 4e-6).all(), name  # half a scale, which is rounded itself
            assert stored[name].flatten(1).abs().amax(1)[largest > 1e-3].min() >= 126
        else:
            assert torch.equal(weight, own[name])
    assert torch.equal(loaded.decoder.linear.weight[3], torch.zeros_like(loaded.decoder.linear.weight[3]))
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("small", "full")]
    assert sizes[0] < 0.35 * sizes[1]  # of this small model; 0.26 of a ResNet-50
    again = load_checkpoint(tmp_path / "small.safetensors")
    save_checkpoint(tmp_path / "again.safetensors", again.model, VOCAB, TINY, int8=True)
    twice = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(twice[name], tensor) for name, tensor in stored.items() if tensor.dtype == torch.int8)


def test_8_bits_keep_the_logits_of_a_model_and_serve_as_an_encoder(tmp_path):
    model = model_of().eval()
    path = tmp_path / "small.safetensors"
    save_checkpoint(path, model, VOCAB, TINY, {"epoch": 3}, int8=True)
    loaded = load_checkpoint(path)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0.05, atol=0.05)
    add_meta(path, tmp_path / "copy.safetensors", seen=1)
    copied = load_checkpoint(tmp_path / "copy.safetensors")
    assert copied.meta == {"epoch": 3, "seen": 1}
    assert torch.equal(logits(copied.model), logits(loaded.model))
    net = model_of().encoder.backbone.net
    load_backbone_weights(net, path)
    torch.testing.assert_close(net.state_dict(), loaded.model.encoder.backbone.net.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1,), (7,), ()])
def test_scales_that_do_not_fit_are_damage(shape, tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model_of(), VOCAB, TINY, int8=True)
    tensors, header = load_file(path), read_header(path)
    tensors["decoder.linear.weight.int8_scale"] = torch.ones(shape)
    save_file(tensors, path, metadata={"showtell": json.dumps(header)})
    with pytest.raises(UserError, match="is damaged or truncated"):
        load_checkpoint(path)


def test_a_model_in_training_and_in_bfloat16_can_be_saved(tmp_path):
    model = model_of().train().bfloat16()
    save_checkpoint(tmp_path / "m.safetensors", model, VOCAB, TINY)
    assert model.training
    assert next(model.parameters()).dtype == torch.bfloat16
    loaded = load_checkpoint(tmp_path / "m.safetensors").model
    assert torch.equal(loaded.decoder.linear.weight, model.decoder.linear.weight.float())


def test_loading_draws_no_random_numbers_and_the_model_outlives_its_file(saved):
    generator = torch.get_rng_state()
    model = load_checkpoint(saved).model
    assert torch.equal(torch.get_rng_state(), generator)
    expected = logits(model)
    saved.write_bytes(bytes(saved.stat().st_size))
    assert torch.equal(logits(model), expected)


def test_another_process_needs_nothing_but_the_file(saved, tmp_path):
    code = (
        "import sys; from showtell.checkpoint import load_checkpoint; c = load_checkpoint(sys.argv[1])\n"
        "print(c.vocab.decode([0, 3, 4, 7, 9, 1]), c.transform.size, c.meta['epoch'])"
    )
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    root = os.path.dirname(os.path.dirname(module.__file__))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", code, saved]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "A red circle star 64 3", result.stderr


def test_header_names_everything_and_no_class(saved):
    header = read_header(saved)
    assert header.keys() == {"format", "model", "vocabulary", "transform", "meta", "versions"}
    assert header["model"] == model_of().config
    assert header["vocabulary"]["words"] == list(VOCAB.word2idx)
    assert header["meta"] == {"epoch": 3}
    assert header["versions"]["torch"] == torch.__version__
    with safe_open(saved, "pt") as file:
        text = file.metadata()["showtell"]
    for name in ("CaptionModel", "DecoderRNN", "EncoderCNN", "showtell."):
        assert name not in text


def test_header_is_read_without_the_tensors(tmp_path):
    path = tmp_path / "big.safetensors"
    header = {"format": 1, "model": {}, "vocabulary": {}, "transform": {}, "meta": {}}
    save_file({"x": torch.zeros(50_000_000)}, path, metadata={"showtell": json.dumps(header)})
    read_header(path)
    start = time.perf_counter()
    assert read_header(path) == header
    assert time.perf_counter() - start < 0.1


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(saved, model_of(), VOCAB, TINY, {"when": object()})

    def dies(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", dies)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(saved, model_of(), VOCAB, TINY)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_folders_are_made_and_not_overwritten(tmp_path):
    save_checkpoint(str(tmp_path / "runs" / "a" / "best.safetensors"), model_of(), VOCAB, TINY)
    assert (tmp_path / "runs" / "a" / "best.safetensors").is_file()
    with pytest.raises(UserError, match=r"is a folder; give the name of a file in it, such as .*model\.safetensors"):
        save_checkpoint(tmp_path / "runs", model_of(), VOCAB, TINY)


def test_a_foreign_vocabulary_is_not_saved(tmp_path):
    with pytest.raises(UserError, match=rf"the vocabulary has 3 words and the model was built for {V}"):
        save_checkpoint(tmp_path / "m.safetensors", model_of(), Vocabulary(), TINY)
    assert not list(tmp_path.iterdir())


def refuses(path, sentence: str) -> None:
    for read in (load_checkpoint, read_header):
        with pytest.raises(UserError, match=sentence) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def png() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")


def test_folder_and_missing_file(tmp_path):
    refuses(tmp_path, "is a folder, not a checkpoint; give a file saved")
    refuses(tmp_path / "m.safetensors", "there is no checkpoint at .*; give a file saved by showtell train")
    with pytest.raises(MissingFileError):
        load_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (png(), "is not a checkpoint: it is no safetensors file"),
        (b"\xff\xd8\xff\xe0" + bytes(500), "is not a checkpoint"),
        (b"a man rides a horse\n" * 9, "is not a checkpoint"),
        (b"abc", "is not a checkpoint"),
        (b"\x80\x04}.", "is a pickle.*showtell import-legacy ENCODER DECODER VOCAB --out M"),
        (struct.pack("<Q", 2) + b"{}", "is a safetensors file without showtell's header"),
        (struct.pack("<Q", 1 << 30) + b"{}", "is damaged or truncated"),
        (struct.pack("<Q", 20) + b"{not json at all}   ", "is damaged or truncated"),
    ],
)
def test_foreign_content(content, sentence, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refuses(path, sentence)


def test_pickles_and_backbones_are_no_captioner(tmp_path):
    for path in (tmp_path / "encoder-3.pkl", tmp_path / "encoder-3.ckpt"):
        torch.save({"embed.weight": torch.zeros(2, 2)}, path)
        refuses(path, "is a pickle.*showtell import-legacy ENCODER DECODER VOCAB --out M.*--resume")
    save_file({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet50.safetensors", metadata={"format": "pt"})
    refuses(tmp_path / "resnet50.safetensors", "without showtell's header, perhaps the weights of a backbone")


def test_a_pipe_or_device_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    VOCAB.save(tmp_path / "vocab.pkl")
    for path in (tmp_path / "pipe", "/dev/zero"):
        refuses(path, "is no regular file")
        with pytest.raises(UserError, match="is no regular file"):
            load_resume(path)
        with pytest.raises(UserError, match="is no regular file"):
            import_legacy(path, path, tmp_path / "vocab.pkl")


def test_cut_at_any_place(saved):
    content = saved.read_bytes()
    for kept in (1, 7, 8, 9, 100, 1000, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:kept])
        refuses(saved, "is damaged or truncated|is not a checkpoint")


def test_random_damage_of_the_header_never_ends_in_a_traceback(saved):
    content = saved.read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    rng = random.Random(0)
    sentences = []
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[rng.randrange(length)] = rng.randrange(32, 127)  # printable, to get past the decoding
        saved.write_bytes(damaged)
        try:
            load_checkpoint(saved)  # damage inside a word can go unseen
        except UserError as error:  # and any other exception fails the test
            sentences.append(str(error))
    assert len(sentences) > 20
    assert not any("\n" in sentence for sentence in sentences)


def altered(path, change=lambda header: None, tensors=lambda tensors: None) -> None:
    header, stored = read_header(path), load_file(path)
    change(header)
    tensors(stored)
    save_file(stored, path, metadata={"showtell": json.dumps(header)})


NEWER = r"has format 9, and showtell .* reads formats up to 3; type pip install --upgrade"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: h.update(format=9), NEWER),
        (lambda h: h.update(format="1"), "is damaged .*no format number"),
        (lambda h: h.pop("vocabulary"), "is damaged .*its header has no vocabulary"),
    ],
)
def test_altered_header(change, sentence, saved):
    altered(saved, change)
    refuses(saved, sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: h["vocabulary"]["words"].append("more"), f"holds a vocabulary of {V + 1} words and a model for {V}"),
        (lambda h: h["vocabulary"]["words"].remove("<end>"), "cannot use .*: the vocabulary has no <end>"),
        (lambda h: h["vocabulary"].update(tokenizer="spm"), "cannot use .*: no tokeniser is called 'spm'"),
        (lambda h: h["vocabulary"].update(words=[[1]]), "is damaged"),
        (lambda h: h["transform"].update(blur=3), "cannot use .*: a transform has no blur"),
        (lambda h: h["transform"].update(resize="big"), "cannot use|is damaged"),
        (lambda h: h["model"].pop("decoder"), "is damaged"),
        (lambda h: h["model"]["decoder"].update(name="gpt"), "cannot use .*: there is no decoder 'gpt'"),
        (lambda h: h["model"]["decoder"].update(hidden_size="x"), "is damaged"),
        (lambda h: h["model"]["decoder"].update(beams=3), "is damaged .*beams"),
        (lambda h: h["model"]["encoder"].update(backbone="vgg99"), "cannot use .*: there is no backbone 'vgg99'"),
        (lambda h: h["model"]["encoder"].update(weights="/etc/passwd"), "is damaged"),
        (lambda h: h["model"]["decoder"].update(hidden_size=24), r"another shape, decoder\.lstm\.weight_ih_l0 first"),
        (lambda h: h["model"]["decoder"].update(num_layers=2), r"4 missing, decoder\.lstm\.weight_ih_l1 first"),
    ],
)
def test_altered_description(change, sentence, saved):
    altered(saved, change)
    with pytest.raises(UserError, match=sentence) as caught:
        load_checkpoint(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("encoder.embed.bias"), r"1 missing, encoder\.embed\.bias first.*save or fetch it again"),
        (lambda t: t.update({"encoder.embed.bias": torch.zeros(2)}), r"1 of another shape, encoder\.embed\.bias first"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 unknown, extra first"),
        (lambda t: t["decoder.linear.weight"][1].fill_(np.nan), r"weights are damaged: decoder\.linear\.weight holds"),
        (lambda t: t["encoder.embed.bias"][1:2].fill_(np.inf), r"embed\.bias holds values that are not finite"),
    ],
)
def test_altered_tensors(change, sentence, saved):
    altered(saved, tensors=change)
    with pytest.raises(UserError, match=sentence):
        load_checkpoint(saved)


def test_large_finite_weights_are_not_damaged(saved):
    altered(saved, tensors=lambda tensors: tensors["decoder.linear.weight"].fill_(3e38))  # their sum is infinite
    assert load_checkpoint(saved).model.decoder.linear.weight[0, 0].item() == pytest.approx(3e38)


HOSTILE = """
import json, resource, sys
from safetensors.torch import load_file, save_file
from showtell.checkpoint import load_checkpoint, read_header
from showtell.errors import UserError

path = sys.argv[1]
header, tensors = read_header(path), load_file(path)
resource.setrlimit(resource.RLIMIT_AS, (int(open("/proc/self/statm").read().split()[0]) * 4096 + 700 * 2**20,) * 2)
for part, name, value in (
    ("decoder", "hidden_size", 100_000), ("decoder", "hidden_size", 10**12), ("decoder", "num_layers", 3000),
    ("decoder", "num_layers", 10**9), ("decoder", "num_layers", -1), ("decoder", "hidden_size", -16),
    ("decoder", "embed_size", 2**62), ("decoder", "dropout", 7), ("encoder", "embed_size", 10**9),
    ("transform", "resize", 10**6), ("transform", "crop", -3), ("decoder", "vocab_size", 10**10),
):
    changed = json.loads(json.dumps(header))
    (changed if part == "transform" else changed["model"])[part][name] = value
    save_file(tensors, path, metadata={"showtell": json.dumps(changed)})
    try:
        load_checkpoint(path)
    except UserError as error:
        print(part, name, value, str(error).replace(path, "FILE")[:90])
"""


def test_sizes_in_a_header_are_compared_before_memory_is_allocated(saved):
    """In a process that may allocate no more than 700 MB."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", HOSTILE, saved], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 12, done.stdout + done.stderr
    assert time.perf_counter() - start < 60
    assert "does not hold the tensors of its model" in lines[0]
    assert "many more layers than the file has tensors" in done.stdout
    assert "its transform makes images of more than 4096 pixels" in done.stdout


@pytest.mark.parametrize("heads", [-4, 0, 5])
def test_heads_that_do_not_divide_are_refused(heads, tmp_path):
    save_checkpoint(tmp_path / "m.safetensors", model_of("transformer"), VOCAB, TINY)
    altered(tmp_path / "m.safetensors", lambda header: header["model"]["decoder"].update(num_heads=heads))
    with pytest.raises(UserError, match=f"hidden_size=16 is not divisible by num_heads={heads}; choose a multiple"):
        load_checkpoint(tmp_path / "m.safetensors")


def test_resume_state_comes_back(tmp_path):
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 3, 64, 64), torch.randint(0, V, (2, 6)))[0].sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10).state_dict(),
        "rng": {"torch": torch.get_rng_state(), "python": random.getstate(), "cuda": None},
        "position": {"epoch": 2, "step": 17, "best": 0.5, "done": False, "seen": [1, 2], "key": (1, "a"), "raw": b"\0"},
    }
    save_resume(tmp_path / "last.pt", state)
    loaded = load_resume(tmp_path / "last.pt")
    assert loaded["position"] == state["position"]
    assert loaded["rng"]["python"] == random.getstate()
    assert torch.equal(loaded["rng"]["torch"], state["rng"]["torch"])
    fresh = model_of()
    fresh.load_state_dict(loaded["model"])
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    moments = loaded["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, optimizer.state_dict()["state"][0]["exp_avg"])
    assert isinstance(loaded["model"], OrderedDict)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"rng": {"numpy": ("MT", np.zeros(3))}}, r"state\['rng'\]\['numpy'\]\[1\] is a numpy\.ndarray"),
        ({"loss": np.float64(3)}, r"state\['loss'\] is a numpy\.float64"),
        ({"vocab": VOCAB}, r"state\['vocab'\] is a showtell\.vocabulary\.Vocabulary, which cannot be read back safely"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(state, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        save_resume(tmp_path / "last.pt", state)
    assert not list(tmp_path.iterdir())


def test_a_save_that_dies_leaves_the_old_file_to_resume_from(tmp_path, monkeypatch):
    save_resume(tmp_path / "last.pt", {"epoch": 1})

    def dies(content, path):
        path.write_bytes(b"PK\x03\x04half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        save_resume(tmp_path / "last.pt", {"epoch": 2})
    assert load_resume(tmp_path / "last.pt") == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


class Hostile:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def test_resume_executes_nothing(tmp_path):
    trace = tmp_path / "trace"
    state = {"a": Hostile(str(trace))}
    torch.save({"format": "showtell-resume", "version": 1, "state": state}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"it names (posix|nt)\.mkdir, which was not executed"):
        load_resume(tmp_path / "last.pt")
    assert not trace.exists()
    torch.load(tmp_path / "last.pt", weights_only=False)
    assert trace.exists()  # the file was hostile indeed


def test_resume_refuses_other_files(saved, tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "weights.pt")
    torch.save({"format": "showtell-resume", "version": 9, "state": {}}, tmp_path / "new.pt")
    save_resume(path, {"weights": torch.zeros(1000)})
    content = path.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "image.pt").write_bytes(png())
    for name, sentence in {
        "none.pt": "there is no training state at",
        "weights.pt": "is a file of PyTorch but no training state",
        "new.pt": "has format 9, and showtell",
        "cut.pt": "is damaged, truncated",
        "empty.pt": "is empty",
        "image.pt": "is damaged, truncated or no file of PyTorch",
        saved.name: "is a safetensors file, not a training state",
        ".": "is a folder",
    }.items():
        with pytest.raises(UserError, match=sentence) as caught:
            load_resume(tmp_path / name)
        assert "\n" not in str(caught.value)
