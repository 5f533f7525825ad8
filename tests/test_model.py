"""The captioning model: shapes, dependencies between steps, the loss and the encoder."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from showtell.attention import Attention
from showtell.checkpoint import load_checkpoint, read_header, save_checkpoint, start_from
from showtell.decoders import DECODERS, IGNORE, Decoder, DecoderRNN
from showtell.decoding import STRATEGIES, DecodingOptions, decode
from showtell.errors import UserError
from showtell.model import CaptionModel, EncoderCNN, Loss, caption_loss
from showtell.recipes import Recipe
from showtell.transforms import TINY
from showtell.vocabulary import Vocabulary

V, E, H, L = 30, 8, 16, 4

every_decoder = pytest.mark.parametrize("name", DECODERS)


def build(name: str, vocab_size: int = V, **options) -> nn.Module:
    """A decoder whose outputs are not flat, so that what depends on what can be seen."""
    decoder = DECODERS[name](E, H, vocab_size, **options).eval()
    for parameter in decoder.parameters():
        parameter.data.mul_(2)
    return decoder


def features_for(decoder: nn.Module, n: int) -> torch.Tensor:
    shape = (n, L, E) if decoder.grid else (n, E)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def words(*shape: int) -> torch.Tensor:
    """Captions of ordinary words between `<start>` and `<end>`."""
    captions = torch.randint(3, V, shape, generator=torch.Generator().manual_seed(1))
    captions[..., 0], captions[..., -1] = 0, 1
    return captions


def config_of(name: str) -> dict:
    decoder = {"name": name, "embed_size": E, "hidden_size": H, "vocab_size": V}
    return {"encoder": {"embed_size": E, "backbone": "tiny"}, "decoder": decoder}


def train(parameters, batches, rate: float) -> list[float]:
    """Take an Adam step for each batch's function, which returns its loss; return the losses per word."""
    optimizer, losses = torch.optim.Adam(parameters, rate), []
    for loss_of in batches:
        loss = loss_of()
        optimizer.zero_grad()
        (loss.objective / loss.words).backward()
        optimizer.step()
        losses.append(float(loss.nll / loss.words))
    return losses


@every_decoder
def test_shapes_of_teacher_forcing_and_of_steps(name):
    decoder = build(name)
    captions = words(6, 7)
    logits, alphas = decoder.teacher_force(features_for(decoder, 2), captions)
    assert logits.shape == (6, 7 if name == "show-tell" else 6, V)
    assert torch.equal(decoder(features_for(decoder, 2), captions), logits)
    memory, state = decoder.start(features_for(decoder, 2))
    assert all(tensor.shape[0] == 2 for tensor in state)
    logits, state, step_alphas = decoder.step(torch.tensor([0, 0]), memory, state)
    assert logits.shape == (2, V)
    assert all(tensor.shape[0] == 2 for tensor in state)
    if not decoder.grid:
        assert alphas is step_alphas is None
        return
    assert alphas.shape == (6, 6, L)
    assert step_alphas.shape == (2, L)
    assert (alphas >= 0).all()
    torch.testing.assert_close(alphas.sum(-1), torch.ones(6, 6))


@every_decoder
def test_the_shortest_caption(name):
    decoder = build(name)
    logits = decoder(features_for(decoder, 1), torch.tensor([[0, 1]]))
    assert logits[:, -1:].shape == (1, 1, V)
    assert caption_loss(logits, torch.tensor([[0, 1]])).words == 1


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", ["show-tell", "every-step", "transformer"])
def test_several_layers(name, layers):
    decoder = DECODERS[name](E, H, V, num_layers=layers)
    assert decoder(features_for(decoder, 2), words(2, 5)).shape[-1] == V
    assert len(decoder.start(features_for(decoder, 2))[1]) == (2 * layers if name == "transformer" else 2)


def test_the_course_signature():
    decoder = DecoderRNN(8, 16, 30, 2)
    assert decoder.lstm.num_layers == 2
    assert decoder(torch.randn(64, 8), words(64, 12)).shape == (64, 12, 30)
    assert {name.split(".")[0] for name in decoder.state_dict()} == {"embed", "lstm", "linear"}


@every_decoder
def test_a_vector_where_a_grid_is_needed_and_the_other_way_round(name):
    decoder = build(name)
    if decoder.grid:
        assert decoder(torch.randn(2, E), words(2, 5)).shape == (2, 4, V)
        return
    vector = features_for(decoder, 2)
    assert torch.equal(decoder(vector.unsqueeze(1), words(2, 5)), decoder(vector, words(2, 5)))
    with pytest.raises(UserError, match=r"takes one vector per image and was given \(2, 4, 8\); build the encoder"):
        decoder(torch.randn(2, L, E), words(2, 5))


@every_decoder
def test_tied_embeddings_are_one_matrix(name):
    decoder = DECODERS[name](16, 16, V, tie_embeddings=True)
    assert decoder.linear.weight is decoder.embed.weight
    if name in ("show-tell", "every-step"):
        with pytest.raises(UserError, match="tie_embeddings needs embed_size == hidden_size, not 8 and 16"):
            DECODERS[name](8, 16, V, tie_embeddings=True)


@every_decoder
def test_a_word_changes_what_comes_after_it_and_nothing_before(name):
    """The alignment that the loss relies on: the last T-1 steps predict words 1 to T-1 from those before each."""
    decoder = build(name)
    features, captions = features_for(decoder, 3), words(3, 8)
    logits = decoder(features, captions)[:, -7:]
    for t in range(8):
        changed = captions.clone()
        changed[:, t] = (captions[:, t] + 5) % V
        other = decoder(features, changed)[:, -7:]
        torch.testing.assert_close(other[:, :t], logits[:, :t], atol=1e-6, rtol=1e-5)
        if t < 7:
            assert (other[:, t] - logits[:, t]).abs().amax(-1).min() > 1e-3  # the word after it, in every caption


@every_decoder
def test_the_image_changes_every_word(name):
    decoder = build(name)
    captions = words(2, 6)
    logits = decoder(features_for(decoder, 2), captions)[:, -5:]
    other = decoder(features_for(decoder, 2) + 1, captions)[:, -5:]
    assert (other - logits).abs().amax(-1).min() > 1e-4


def test_the_image_step_of_decoder_one_knows_no_word():
    decoder = build("show-tell")
    first = decoder(features_for(decoder, 2), words(2, 6))[:, 0]
    assert torch.equal(first, decoder(features_for(decoder, 2), (words(2, 6) + 7) % V)[:, 0])


@every_decoder
def test_no_caption_touches_another(name):
    decoder = build(name)
    features, captions = features_for(decoder, 3), words(3, 6)
    together = decoder(features, captions)
    for i in range(3):
        alone = decoder(features[i : i + 1], captions[i : i + 1])[0]
        torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-4)


@every_decoder
def test_an_untrained_model_guesses_among_all_words(name):
    torch.manual_seed(0)
    decoder = DECODERS[name](64, 64, 1000).eval()
    captions = torch.randint(3, 1000, (32, 12))
    features = torch.randn(32, 9, 64) if decoder.grid else torch.randn(32, 64)
    loss = caption_loss(decoder(features, captions), captions)
    assert loss.nll / loss.words == pytest.approx(math.log(1000), abs=0.4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("extra", [0, 1])
def test_the_loss_is_cross_entropy_over_real_words(smoothing, extra):
    captions = words(4, 7)
    captions[1, 4:], captions[2, 2:] = IGNORE, IGNORE
    logits = torch.randn(4, 6 + extra, V, requires_grad=True)
    loss = caption_loss(logits, captions, smoothing)
    used, targets = logits[:, extra:].flatten(0, 1), captions[:, 1:].flatten()
    assert int(loss.words) == 6 + 3 + 1 + 6
    expected = F.cross_entropy(used, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss.objective, expected)
    torch.testing.assert_close(loss.nll, F.cross_entropy(used, targets, ignore_index=IGNORE, reduction="sum"))
    assert not loss.nll.requires_grad
    loss.objective.backward()
    grad = logits.grad[:, extra:]
    assert (grad[captions[:, 1:] == IGNORE] == 0).all()
    assert (grad[captions[:, 1:] != IGNORE].abs().amax(-1) > 0).all()
    assert (logits.grad[:, :extra] == 0).all()  # nothing is learnt from the image step


def test_the_loss_is_computed_in_single_precision():
    logits = torch.randn(2, 5, V).bfloat16()
    assert caption_loss(logits, words(2, 6)).nll.dtype == torch.float32


@every_decoder
def test_padding_changes_neither_loss_nor_gradients(name):
    decoder = build(name)
    features = features_for(decoder, 2)
    long, short = words(1, 9), words(1, 5)
    padded = torch.full((2, 9), IGNORE)
    padded[0], padded[1, :5] = long[0], short[0]

    def gradients(losses):
        decoder.zero_grad()
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}

    together = caption_loss(decoder(features, padded), padded)
    one, two = (caption_loss(decoder(features[i : i + 1], c), c) for i, c in enumerate((long, short)))
    torch.testing.assert_close(together.nll, one.nll + two.nll)
    assert together.words == one.words + two.words == 8 + 4
    expected, got = gradients([one.objective, two.objective]), gradients([together.objective])
    assert expected.keys() == got.keys() == dict(decoder.named_parameters()).keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-4)


@every_decoder
def test_captions_grouped_by_image_are_the_same_loss(name):
    """(B, K, T) with padding, one image with fewer captions than another, against one caption at a time."""
    model = CaptionModel(config_of(name)).eval()
    images = torch.randn(2, 3, 16, 16)
    captions = torch.full((2, 3, 8), IGNORE)
    lengths = {(0, 0): 8, (0, 1): 5, (0, 2): 6, (1, 0): 4}
    for (i, k), length in lengths.items():
        captions[i, k, :length] = words(10, length)[i + 2 * k]
    loss = caption_loss(model(images, captions)[0], captions)
    alone = [
        caption_loss(model(images[i : i + 1], captions[i, k : k + 1, :length])[0], captions[i, k : k + 1, :length])
        for (i, k), length in lengths.items()
    ]
    assert loss.words == sum(part.words for part in alone) == 7 + 4 + 5 + 3
    torch.testing.assert_close(loss.nll, sum(part.nll for part in alone), atol=1e-4, rtol=1e-4)


@every_decoder
def test_it_overfits_a_few_pairs(name):
    torch.manual_seed(0)
    decoder = DECODERS[name](E, 32, V)
    features, captions = features_for(decoder, 4), words(4, 6)
    batches = [lambda: caption_loss(decoder(features, captions), captions)] * 80
    assert train(decoder.parameters(), batches, 0.02)[-1] < 0.2
    for i in range(4):
        assert decoder.eval().sample(features[i : i + 1]) == captions[i].tolist()


@every_decoder
def test_sample_begins_with_start_and_ends_where_end_was_reached(name):
    decoder = build(name)
    features = features_for(decoder, 1)
    ids = decoder.sample(features)
    assert ids[0] == 0
    assert all(type(i) is int and 0 <= i < V for i in ids)
    assert 1 not in ids[:-1]
    assert len(ids) <= 22
    decoder.linear.bias.data[1] = -1e4
    endless = decoder.sample(features, max_len=5)
    assert len(endless) == 1 + 5
    assert 1 not in endless
    decoder.linear.bias.data[1] = 1e4
    assert decoder.sample(features) == [0, 1]
    assert decoder.sample(features, max_len=0) == [0, 1]
    assert decoder.sample(features, start_id=2, end_id=1) == [2, 1]


def test_end_after_exactly_as_many_words_as_allowed_is_kept():
    class Counting(DecoderRNN):
        """Generates three words and ends."""

        def step(self, words, memory, state):
            following = {0: 3, 3: 4, 4: 5, 5: 1}[int(words)]
            return F.one_hot(torch.tensor([following]), V).float(), state, None

    decoder, features = Counting(E, H, V), torch.randn(1, E)
    assert decoder.sample(features) == [0, 3, 4, 5, 1]
    assert decoder.sample(features, max_len=3) == [0, 3, 4, 5, 1]
    assert decoder.sample(features, max_len=2) == [0, 3, 4]


@every_decoder
def test_sample_is_the_same_every_time_and_for_either_form_of_its_input(name):
    decoder = build(name)
    features = features_for(decoder, 1)
    assert decoder.sample(features) == decoder.sample(features)
    if not decoder.grid:
        assert decoder.sample(features.unsqueeze(1)) == decoder.sample(features)
    _, state = decoder.start(features)
    assert decoder.sample(features, states=state) == decoder.sample(features)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("backbone", ["tiny", "resnet18"])
def test_the_encoder_is_its_head_after_its_backbone(backbone, grid):
    encoder = EncoderCNN(5, backbone, grid=grid, weights=None)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(encoder(images), encoder.embed(encoder.backbone(images)))
    cells = 64 if backbone == "tiny" else 4
    assert encoder(images).shape == ((2, cells, 5) if grid else (2, 5))
    if grid:  # the head is linear: the mean over the grid and the head change places
        vector = EncoderCNN(5, backbone, weights=None)
        vector.load_state_dict(encoder.state_dict())
        torch.testing.assert_close(encoder(images).mean(1), vector(images), atol=1e-5, rtol=1e-4)


def test_training_moves_the_head_and_leaves_a_frozen_backbone():
    encoder = EncoderCNN(5, "resnet18", weights=None).train()
    assert encoder.training
    assert not any(module.training for module in encoder.backbone.modules())
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    trained = [name for name, p in encoder.named_parameters() if p.requires_grad]
    assert trained == ["embed.weight", "embed.bias"]
    optimizer = torch.optim.SGD(encoder.embed.parameters(), 0.1)
    encoder(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert {k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])} == set(trained)
    assert all(p.grad is None for p in encoder.backbone.parameters())


def test_batch_norm_behind_the_head():
    encoder = EncoderCNN(5, "tiny", batch_norm=True).train()
    images = torch.randn(16, 3, 16, 16)
    features = encoder(images)
    torch.testing.assert_close(features.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    moved = encoder.embed[1].running_mean.clone()
    assert moved.abs().max() > 0
    one = encoder(images[:1])  # the last batch of an epoch may be a single image
    assert torch.isfinite(one).all()
    assert torch.equal(encoder.embed[1].running_mean, moved)
    assert torch.equal(one, encoder.eval()(images[:1]))
    one.sum().backward()
    assert encoder.embed[0].weight.grad is not None


def test_batch_norm_knows_the_statistics_after_a_short_run():
    """The running statistics start at 0 and 1, and a constant momentum of 0.01 keeps half of that for 68 steps."""
    torch.manual_seed(0)
    encoder, decoder = EncoderCNN(16, "resnet18", weights=None, batch_norm=True), DecoderRNN(16, 32, V)
    features, captions = torch.rand(48, 512) * 0.2, torch.randint(3, V, (48, 7))
    captions[:, 0] = 0

    def loss_of(rows: slice) -> Loss:
        return caption_loss(decoder(encoder(features[rows]), captions[rows]), captions[rows])

    batches = [partial(loss_of, slice(i, i + 16)) for i in (0, 16, 32)] * 21
    train([*encoder.embed.parameters(), *decoder.parameters()], batches, 3e-3)
    with torch.no_grad():
        trained = loss_of(slice(None))
        encoder.eval()
        evaluated = loss_of(slice(None))
    assert evaluated.nll / evaluated.words == pytest.approx(float(trained.nll / trained.words), abs=0.05)


def test_batch_norm_averages_until_its_momentum_is_constant_and_resumes_exactly():
    norm, resumed = EncoderCNN(4, "tiny", batch_norm=True).embed[1], EncoderCNN(4, "tiny", batch_norm=True).embed[1]
    batches = torch.randn(150, 8, 4)
    for i, batch in enumerate(batches):
        if i == 60:
            resumed.load_state_dict(norm.state_dict())
        norm(batch)
        if i >= 60:
            resumed(batch)
        if i < 100:
            torch.testing.assert_close(norm.running_mean, batches[: i + 1].mean((0, 1)))
    expected = batches[:100].mean((0, 1))
    for batch in batches[100:]:
        expected = 0.99 * expected + 0.01 * batch.mean(0)
    torch.testing.assert_close(norm.running_mean, expected)
    assert torch.equal(norm.running_mean, resumed.running_mean)
    assert torch.equal(norm.running_var, resumed.running_var)


def test_batch_norm_of_a_grid_is_over_all_its_cells():
    encoder = EncoderCNN(5, "tiny", grid=True, batch_norm=True).train()
    features = encoder(torch.randn(4, 3, 32, 32))
    assert features.shape == (4, 16, 5)
    torch.testing.assert_close(features.mean((0, 1)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.std((0, 1), correction=0), torch.ones(5), atol=1e-2, rtol=0)


@every_decoder
def test_the_model_is_built_from_plain_values_and_reads_images_or_features(name):
    config = config_of(name)
    model = CaptionModel(config).eval()
    assert model.config == config_of(name)
    assert model.encoder.backbone.grid == model.decoder.grid
    images, captions = torch.randn(2, 3, 16, 16), words(2, 5)
    logits, alphas = model(images, captions)
    cached, _ = model(model.encoder.backbone(images), captions)
    assert torch.equal(logits, cached)
    assert (alphas is not None) == model.decoder.grid
    again = CaptionModel(config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images, captions)[0], logits)


def test_an_unknown_decoder_lists_the_known_ones():
    known = "show-tell, every-step, attend, top-down, transformer"
    with pytest.raises(UserError, match=f"no decoder 'gru'; choose one of {known}"):
        CaptionModel(config_of("gru"))


@every_decoder
def test_every_parameter_of_a_trainable_model_learns(name):
    """But for the attention's query bias under a softmax, nothing is there that no gradient reaches."""
    model, captions = CaptionModel(config_of(name)), words(4, 6)
    caption_loss(model(torch.randn(4, 3, 16, 16), captions)[0], captions).objective.backward()
    still = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


class DecoderGRU(Decoder):
    """All that a new decoder needs."""

    word_parameters = ("words.weight", "classifier.weight", "classifier.bias")

    def __init__(self, embed_size: int, hidden_size: int, vocab_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, embed_size)
        for low in (0.5, 1.5):  # rejection sampling, which a loader that skips random initialisation must not hang in
            nn.init.trunc_normal_(self.words.weight, a=low, b=9.0)
        self.first = nn.Linear(embed_size, hidden_size)
        self.gru = nn.GRUCell(embed_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, vocab_size)

    def start(self, features):
        return None, (torch.tanh(self.first(self._check(features))),)

    def step(self, words, memory, state):
        hidden = self.gru(self.words(words), state[0])
        return self.classifier(hidden), (hidden,), None


def test_a_decoder_is_one_class_and_one_registry_line(monkeypatch, tmp_path):
    monkeypatch.setitem(DECODERS, "gru", DecoderGRU)
    recipe = Recipe(encoder="tiny", decoder="gru", embed_size=8, hidden_size=16, num_layers=2)
    assert recipe.unused_settings() == ["num_layers=2 has no effect: the decoder gru does not have it"]
    vocab = Vocabulary([*Vocabulary().word2idx, *"abcdef"], threshold=1)
    torch.manual_seed(0)
    model = CaptionModel(recipe.model_config(len(vocab)))
    images = torch.randn(2, 3, 16, 16)
    captions = torch.tensor([[0, 3, 4, 1], [0, 5, 1, IGNORE]])
    losses = train(model.parameters(), [lambda: caption_loss(model(images, captions)[0], captions)] * 40, 0.02)
    assert losses[-1] < 0.2 * losses[0]

    path = tmp_path / "gru.safetensors"
    save_checkpoint(path, model, vocab, TINY, {"recipe": recipe.to_dict()})
    loaded = load_checkpoint(path).model
    for strategy in STRATEGIES:
        found = decode(loaded.decoder, loaded.encoder(images), strategy, DecodingOptions.of(vocab), temperature=0.1)
        assert [captions[0].ids for captions in found] == [[3, 4], [5]]
    larger = Vocabulary([*Vocabulary().word2idx, *"gfedcba"], threshold=1)
    other = CaptionModel(Recipe().inherit_model(read_header(path)).model_config(len(larger)))
    assert start_from(other, larger, path) == 9
    assert torch.equal(other.decoder.words.weight[larger("a")], loaded.decoder.words.weight[vocab("a")])

    monkeypatch.setattr(DecoderGRU, "word_parameters", ())
    with pytest.raises(UserError, match=r"decoder\.words\.weight has the shape .* list it in DecoderGRU\.word_param"):
        start_from(other, larger, path)


def test_attention_is_that_of_the_paper_and_so_are_its_gradients():
    """Compare with the formula as Bahdanau et al. write it, with tanh and PyTorch's own gradients."""
    torch.manual_seed(0)
    attention = Attention(6, 5, 7).double()
    query, features = torch.randn(6, 6).double().requires_grad_(), torch.randn(2, 4, 5).double().requires_grad_()

    def written_out() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(attention.query(query).view(2, 3, 1, 7) + attention.key(features).unsqueeze(1))
        alphas = attention.energy(hidden).squeeze(-1).softmax(-1)
        return (alphas @ features).flatten(0, 1), alphas.flatten(0, 1)

    def gradients(context: torch.Tensor, alphas: torch.Tensor) -> list[torch.Tensor]:
        loss = context.square().sum() + alphas.pow(3).sum()
        return torch.autograd.grad(loss, [query, features, *attention.parameters()])

    found, expected = attention(query, attention.keys(features), features), written_out()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(*found), gradients(*expected))
    with torch.no_grad():
        torch.testing.assert_close(attention(query, attention.keys(features), features), expected)
