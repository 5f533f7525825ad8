"""The captioner: an encoder that sees, and four decoders that write under one protocol.

Shapes, here and everywhere: B images or captions in the batch, K captions (or beams) an image, L grid cells,
D feature size, E embedding size, H hidden size, T caption length with <start> and <end>, V vocabulary size.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from showtell.backbones import Backbone
from showtell.errors import UserError

IGNORE = -100  # marks padding in a batch of captions; no word has this id, and the loss skips it
State = tuple[Tensor, ...]  # every tensor has the batch first, so that beam search can reorder any state the same way


class EncoderCNN(nn.Module):
    """A backbone and the head that turns its features into what a decoder reads.

    `encoder(images) == encoder.embed(encoder.backbone(images))`; `encoder.embed` is the part that always trains.
    """

    def __init__(
        self,
        embed_size: int,
        backbone: str = "resnet50",
        *,
        grid: bool = False,
        weights: str | PathLike | None = "imagenet",
        stride_in_1x1: bool = False,
        batch_norm: bool = False,
    ) -> None:
        """Builds the encoder; `backbone`, `grid`, `weights` and `stride_in_1x1` are those of `Backbone`.

        Args:
            embed_size: E, the size of what the decoder reads.
            batch_norm: adds `BatchNorm1d` behind the linear layer, as some published captioners do (vectors only).
        """
        super().__init__()
        if batch_norm and grid:
            raise UserError("batch_norm goes with one vector an image; leave it out when grid=True")
        self.backbone = Backbone(backbone, grid, weights, stride_in_1x1)
        self.embed: nn.Module = nn.Linear(self.backbone.feature_size, embed_size)
        if batch_norm:
            self.embed = nn.Sequential(self.embed, _BatchNorm(embed_size, momentum=0.01))

    def forward(self, images: Tensor) -> Tensor:
        """`(B, 3, S, S)` -> `(B, E)`, or `(B, L, E)` with a grid."""
        return self.embed(self.backbone(images))


class _BatchNorm(nn.BatchNorm1d):
    """Lets an epoch's last batch be a single picture: it takes the running statistics, having none of its own."""

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training and inputs.shape[0] == 1:
            return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(inputs)


class Decoder(nn.Module):
    """The protocol of every decoder. Training calls `forward`; decoding calls `start` once and `step` word by word.

    `memory` is what a decoder reads at every step and nobody reorders (the grid, projected once), with B rows;
    `state` is what changes, with B x K rows when K captions or beams share an image, those of one image together.

    Attributes:
        grid: whether the decoder reads `(B, L, E)` features rather than `(B, E)`.
    """

    grid = False

    def start(self, features: Tensor) -> tuple[Tensor | tuple[Tensor, ...] | None, State]:
        """Reads the encoder's features `(B, E)` or `(B, L, E)`; returns `(memory, state)`."""
        raise NotImplementedError

    def step(
        self, words: Tensor, memory: Tensor | tuple[Tensor, ...] | None, state: State
    ) -> tuple[Tensor, State, Tensor | None]:
        """Reads one word a row, `(B*K,)`; returns logits `(B*K, V)`, the new state, attention `(B*K, L)` or `None`."""
        raise NotImplementedError

    def forward(self, features: Tensor, captions: Tensor) -> Tensor:
        """Teacher forcing: logits for every next word of `captions` `(B*K, T)`, given the true words before it.

        Returns:
            `(B*K, T-1, V)`, or `(B*K, T, V)` from decoders for which the image is a step of its own: the last T-1
            steps belong to `captions[:, 1:]` in either case, and `caption_loss` takes them so.
        """
        return self.teacher_force(features, captions)[0]

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, Tensor | None]:
        """`forward`, and the attention `(B*K, T-1, L)` of decoders that have it."""
        raise NotImplementedError

    def _check(self, features: Tensor) -> Tensor:
        """Refuses a grid where a vector is needed, with the remedy; lets `(B, 1, E)` pass as a vector."""
        if not self.grid and features.dim() == 3:
            if features.shape[1] != 1:
                raise UserError(
                    f"{type(self).__name__} reads one vector an image and was given {tuple(features.shape)}; "
                    "build the encoder with grid=False"
                )
            features = features.squeeze(1)
        return features.unsqueeze(1) if self.grid and features.dim() == 2 else features

    @torch.no_grad()
    def sample(
        self, inputs: Tensor, states: State | None = None, max_len: int = 20, start_id: int = 0, end_id: int = 1
    ) -> list[int]:
        """Writes the most likely word at every step, for one image: `[<start>, words…, <end>]`.

        Args:
            inputs: `encoder(image)`, `(1, E)` or `(1, 1, E)`; `(1, L, E)` for a decoder that attends.
            states: the state to begin with, as `start` returns it; read from `inputs` where left out.
            max_len: the most words; `<end>` is in the list only if it was reached.
        """
        memory, state = self.start(inputs)
        state = state if states is None else states
        ids = [start_id]
        for _ in range(max_len + 1):
            logits, state, _ = self.step(torch.tensor(ids[-1:], device=inputs.device), memory, state)
            word = int(logits.argmax())
            if len(ids) > max_len and word != end_id:
                break
            ids.append(word)
            if word == end_id:
                break
        return ids


def repeat_rows(state: State, k: int) -> State:
    """Gives every image's rows k copies side by side: B rows -> B*k rows."""
    return state if k == 1 else tuple(tensor.repeat_interleave(k, 0) for tensor in state)


def _tie(classifier: nn.Linear, embed: nn.Embedding) -> None:
    if classifier.weight.shape != embed.weight.shape:
        raise UserError(
            f"tie_embeddings needs embed_size == hidden_size, not {embed.weight.shape[1]} and {classifier.in_features}"
        )
    nn.init.normal_(embed.weight, std=embed.weight.shape[1] ** -0.5)  # small enough to classify with
    classifier.weight = embed.weight


class _LSTMDecoder(Decoder):
    """What the two decoders around `nn.LSTM` share: word embedding, dropout on inputs and outputs, classifier."""

    def __init__(
        self,
        input_size: int,
        embed_size: int,
        hidden_size: int,
        vocab_size: int,
        num_layers: int,
        dropout: float,
        tie_embeddings: bool,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.lstm = nn.LSTM(
            input_size, hidden_size, num_layers, batch_first=True, dropout=dropout if num_layers > 1 else 0.0
        )
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        if tie_embeddings:
            _tie(self.linear, self.embed)

    def _run(self, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
        """`(N, T, input)` -> outputs `(N, T, H)` and the state `(N, layers, H)` twice."""
        hidden = None if state is None else tuple(s.transpose(0, 1).contiguous() for s in state)  # (layers, N, H)
        outputs, hidden = self.lstm(self.dropout(inputs), hidden)
        return outputs, tuple(s.transpose(0, 1) for s in hidden)

    def _classify(self, outputs: Tensor) -> Tensor:
        return self.linear(self.dropout(outputs))


class DecoderRNN(_LSTMDecoder):
    """Decoder 1, Show and Tell: the image is the LSTM's first input (Vinyals et al. 2015, arXiv 1411.4555, eq. 10-12).

    Unlike the paper's, this LSTM may have several layers and dropout, as the ancestors' have.
    """

    def __init__(
        self,
        embed_size: int,
        hidden_size: int,
        vocab_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__(embed_size, embed_size, hidden_size, vocab_size, num_layers, dropout, tie_embeddings)

    def start(self, features: Tensor) -> tuple[None, State]:
        """Lets the LSTM read the image; there is nothing to remember but its state."""
        return None, self._run(self._check(features).unsqueeze(1), None)[1]

    def step(self, words: Tensor, memory: None, state: State) -> tuple[Tensor, State, None]:
        """Reads one word; see `Decoder.step`."""
        outputs, state = self._run(self.embed(words).unsqueeze(1), state)
        return self._classify(outputs.squeeze(1)), state, None

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, None]:
        """Logits `(B*K, T, V)`: the image step first, whose logits no loss uses."""
        (image,) = repeat_rows((self._check(features),), captions.shape[0] // features.shape[0])
        words = self.embed(captions[:, :-1].clamp(min=0))  # (B*K, T-1, E)
        outputs, _ = self._run(torch.cat([image.unsqueeze(1), words], 1), None)  # (B*K, T, H)
        return self._classify(outputs), None


class DecoderEveryStep(_LSTMDecoder):
    """Decoder 2: the image beside the word at every step (Mao et al. 2015, arXiv 1412.6632, in spirit).

    Vinyals et al. 2015, section 3.1, found it to overfit more easily than decoder 1.
    """

    def __init__(
        self,
        embed_size: int,
        hidden_size: int,
        vocab_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__(2 * embed_size, embed_size, hidden_size, vocab_size, num_layers, dropout, tie_embeddings)

    def start(self, features: Tensor) -> tuple[Tensor, State]:
        """Keeps the image as memory; the state starts at zero."""
        features = self._check(features)
        zeros = features.new_zeros(features.shape[0], self.lstm.num_layers, self.lstm.hidden_size)
        return features, (zeros, zeros)

    def step(self, words: Tensor, memory: Tensor, state: State) -> tuple[Tensor, State, None]:
        """Reads one word and the image; see `Decoder.step`."""
        outputs, state = self._run(self._inputs(words.unsqueeze(1), memory), state)
        return self._classify(outputs.squeeze(1)), state, None

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, None]:
        """Logits `(B*K, T-1, V)`."""
        outputs, _ = self._run(self._inputs(captions[:, :-1].clamp(min=0), self._check(features)), None)
        return self._classify(outputs), None

    def _inputs(self, words: Tensor, memory: Tensor) -> Tensor:
        (image,) = repeat_rows((memory,), words.shape[0] // memory.shape[0])
        return torch.cat([self.embed(words), image.unsqueeze(1).expand(-1, words.shape[1], -1)], -1)


class Attention(nn.Module):
    """Soft attention with a one-layer perceptron (Bahdanau et al. 2015; Xu et al. 2015, arXiv 1502.03044, eq. 4-5)."""

    def __init__(self, query_size: int, key_size: int, attention_size: int) -> None:
        super().__init__()
        self.query = nn.Linear(query_size, attention_size)
        self.key = nn.Linear(key_size, attention_size, bias=False)
        self.energy = nn.Linear(attention_size, 1, bias=False)  # a bias would cancel in the softmax

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Query `(B*K, H)`, keys `(B, L, A)` and values `(B, L, E)` -> context `(B*K, E)`, weights `(B*K, L)`."""
        query = self.query(query).unflatten(0, (keys.shape[0], -1))  # (B, K, A)
        energies = self.energy(torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1))).squeeze(-1)  # (B, K, L)
        alphas = energies.softmax(-1)
        return (alphas @ values).flatten(0, 1), alphas.flatten(0, 1)


class DecoderAttention(Decoder):
    """Decoder 3, Show, Attend and Tell: an LSTM that looks at the grid anew for every word (Xu et al. 2015).

    Soft attention (section 4.2), the gate beta on the context (4.2.1) and the deep output layer (eq. 7) are the
    paper's; the grid is first brought from D to E by the encoder's head, which the paper does not do.
    """

    grid = True

    def __init__(
        self,
        embed_size: int,
        hidden_size: int,
        vocab_size: int,
        attention_size: int = 512,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.attention = Attention(hidden_size, embed_size, attention_size)
        self.start_hidden = nn.Linear(embed_size, hidden_size)
        self.start_cell = nn.Linear(embed_size, hidden_size)
        self.gate = nn.Linear(hidden_size, 1)
        self.lstm = nn.LSTMCell(2 * embed_size, hidden_size)
        self.from_hidden = nn.Linear(hidden_size, embed_size)
        self.from_context = nn.Linear(embed_size, embed_size, bias=False)
        self.linear = nn.Linear(embed_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        if tie_embeddings:
            _tie(self.linear, self.embed)

    def start(self, features: Tensor) -> tuple[tuple[Tensor, Tensor], State]:
        """Projects the grid once; the state starts from its mean (section 3.1.2)."""
        features = self._check(features)
        mean = features.mean(1)
        memory = (self.attention.key(features), features)
        return memory, (torch.tanh(self.start_hidden(mean)), torch.tanh(self.start_cell(mean)))

    def step(self, words: Tensor, memory: tuple[Tensor, Tensor], state: State) -> tuple[Tensor, State, Tensor]:
        """Reads one word, having looked; see `Decoder.step`."""
        words = self.dropout(self.embed(words))
        state, context, alphas = self._look_and_read(words, memory, state)
        return self._classify(words, state[0], context), state, alphas

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B*K, T-1, V)` and attention `(B*K, T-1, L)`."""
        memory, state = self.start(features)
        state = repeat_rows(state, captions.shape[0] // features.shape[0])
        words = self.dropout(self.embed(captions[:, :-1].clamp(min=0)))  # (B*K, T-1, E)
        hidden, contexts, alphas = [], [], []
        for t in range(words.shape[1]):
            state, context, alpha = self._look_and_read(words[:, t], memory, state)
            hidden.append(state[0])
            contexts.append(context)
            alphas.append(alpha)
        # The vocabulary-sized product is most of the work: once for all steps rather than once a step.
        return self._classify(words, torch.stack(hidden, 1), torch.stack(contexts, 1)), torch.stack(alphas, 1)

    def _look_and_read(
        self, words: Tensor, memory: tuple[Tensor, Tensor], state: State
    ) -> tuple[State, Tensor, Tensor]:
        context, alphas = self.attention(state[0], *memory)
        context = torch.sigmoid(self.gate(state[0])) * context
        return self.lstm(torch.cat([words, context], -1), state), context, alphas

    def _classify(self, words: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        deep = words + self.from_hidden(self.dropout(hidden)) + self.from_context(context)  # eq. 7
        return self.linear(self.dropout(deep))


class DecoderTransformer(Decoder):
    """Decoder 4: a small Transformer that reads its words and the grid (Vaswani et al. 2017, arXiv 1706.03762).

    Layer norm comes first in each block; positions are the paper's sines, so that no caption is too long. In `step`
    the state is the keys and values of the words so far.
    """

    grid = True

    def __init__(
        self,
        embed_size: int,
        hidden_size: int,
        vocab_size: int,
        num_layers: int = 3,
        num_heads: int = 8,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(f"hidden_size {hidden_size} cannot be shared by {num_heads} heads; make it a multiple")
        self.embed = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.embed.weight, std=hidden_size**-0.5)
        self.from_features = nn.Linear(embed_size, hidden_size)
        self.layers = nn.ModuleList(_TransformerLayer(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        if tie_embeddings:
            _tie(self.linear, self.embed)

    def start(self, features: Tensor) -> tuple[tuple[Tensor, ...], State]:
        """Projects the grid to every layer's keys and values, `(B, heads, L, H/heads)`; no words yet."""
        features = self.from_features(self._check(features))
        memory = tuple(tensor for layer in self.layers for tensor in layer.look.keys_and_values(features))
        none_yet = features.new_zeros(
            features.shape[0], self.layers[0].look.num_heads, 0, self.layers[0].look.head_size
        )
        return memory, (none_yet,) * (2 * len(self.layers))

    def step(self, words: Tensor, memory: tuple[Tensor, ...], state: State) -> tuple[Tensor, State, Tensor]:
        """Reads one word; see `Decoder.step`."""
        logits, state, alphas = self._read(words.unsqueeze(1), memory, state)
        return logits.squeeze(1), state, alphas.squeeze(1)

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B*K, T-1, V)` and the last layer's attention to the grid, mean over heads, `(B*K, T-1, L)`."""
        memory, state = self.start(features)
        state = repeat_rows(state, captions.shape[0] // features.shape[0])
        logits, _, alphas = self._read(captions[:, :-1].clamp(min=0), memory, state)
        return logits, alphas

    def _read(self, words: Tensor, memory: tuple[Tensor, ...], state: State) -> tuple[Tensor, State, Tensor]:
        """Reads `(B*K, T)` more words after those in `state`."""
        past, total = state[0].shape[2], state[0].shape[2] + words.shape[1]
        hidden = self.embed(words) * math.sqrt(self.embed.embedding_dim)
        hidden = self.dropout(hidden + _sines(total, hidden)[past:])  # (B*K, T, H)
        visible = torch.ones(words.shape[1], total, dtype=torch.bool, device=words.device).tril(past)
        new_state: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            pair = slice(2 * i, 2 * i + 2)
            hidden, grown, alphas = layer(hidden, memory[pair], state[pair], visible)
            new_state.extend(grown)
        return self.linear(self.dropout(self.norm(hidden))), tuple(new_state), alphas


class _TransformerLayer(nn.Module):
    """Self-attention, attention to the grid and a perceptron, each on a normalised copy and added back."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.read = _MultiHead(hidden_size, num_heads)
        self.look = _MultiHead(hidden_size, num_heads)
        self.think = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, memory: State, past: State, visible: Tensor) -> tuple[Tensor, State, Tensor]:
        words = self.norms[0](hidden)
        new = self.read.keys_and_values(words)
        words_kv = tuple(torch.cat(pair, 2) for pair in zip(past, new, strict=True))
        hidden = hidden + self.dropout(self.read(words, *words_kv, visible)[0])
        looked, alphas = self.look(self.norms[1](hidden), *memory)
        hidden = hidden + self.dropout(looked)
        return hidden + self.dropout(self.think(self.norms[2](hidden))), words_kv, alphas


class _MultiHead(nn.Module):
    """Scaled dot-product attention in several heads (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, hidden_size // num_heads
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def keys_and_values(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, L, H)` -> keys and values, `(B, heads, L, H/heads)` each."""
        return self.key_value(inputs).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(
        self, inputs: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries `(B*K, T, H)` over B rows of keys -> outputs `(B*K, T, H)`, mean weights `(B*K, T, L)`."""
        n, t, _ = inputs.shape
        queries = self.query(inputs).view(keys.shape[0], -1, t, self.num_heads, self.head_size)  # (B, K, T, heads, d)
        queries = queries.permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, heads, K*T, d): an image's captions side by side
        weights = queries @ keys.transpose(-1, -2) / math.sqrt(self.head_size)
        if visible is not None:  # self-attention: K is 1
            weights = weights.masked_fill(~visible, float("-inf"))
        weights = weights.softmax(-1)  # (B, heads, K*T, L)
        outputs = (weights @ values).unflatten(2, (-1, t)).permute(0, 2, 3, 1, 4).reshape(n, t, -1)
        return self.output(outputs), weights.mean(1).unflatten(1, (-1, t)).flatten(0, 1)


def _sines(length: int, like: Tensor) -> Tensor:
    """Position codes `(length, H)` (Vaswani et al. 2017, section 3.5)."""
    half = like.shape[-1] // 2
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10000.0) / half))
    angles = torch.arange(length, device=like.device)[:, None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, like.shape[-1] - 2 * half)).to(like.dtype)


DECODERS: dict[str, type[Decoder]] = {
    "show-tell": DecoderRNN,
    "every-step": DecoderEveryStep,
    "attend": DecoderAttention,
    "transformer": DecoderTransformer,
}


class CaptionModel(nn.Module):
    """An encoder and a decoder that fit, and the plain configuration that builds them again.

    Attributes:
        config: `{"encoder": {…}, "decoder": {"name": …, …}}`, the constructors' arguments, as a checkpoint carries it.
    """

    def __init__(self, config: dict, weights: str | PathLike | None = None) -> None:
        """Builds both halves; `weights` is the backbone's (see `Backbone`), `None` when a checkpoint follows.

        Raises:
            UserError: the configuration names something that does not exist.
        """
        super().__init__()
        self.config = config
        arguments = dict(config["decoder"])
        name = arguments.pop("name")
        if name not in DECODERS:
            raise UserError(f"there is no decoder {name!r}; choose one of {', '.join(DECODERS)}")
        self.decoder = DECODERS[name](**arguments)
        self.encoder = EncoderCNN(**config["encoder"], grid=self.decoder.grid, weights=weights)

    def forward(self, images: Tensor, captions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Teacher forcing from pictures `(B, 3, S, S)`, or from the backbone's features where those are cached.

        Args:
            images: pictures, or `(B, D)` / `(B, L, D)` features of the backbone.
            captions: `(B, T)`, or `(B, K, T)` with K captions an image, padded with `IGNORE`.

        Returns:
            logits as `Decoder.forward` gives them for `captions.flatten(0, -2)`, and attention or `None`.
        """
        features = self.encoder(images) if images.dim() == 4 else self.encoder.embed(images)
        return self.decoder.teacher_force(features, captions.flatten(0, -2))


class Loss(NamedTuple):
    """Sums over the real words of a batch: divide by `words` for means; `exp(nll / words)` is the perplexity.

    Attributes:
        objective: what training descends; `nll` itself unless labels are smoothed.
        nll: the negative log-likelihood in nats, without gradient.
        words: how many words were summed over: all but `<start>` and padding.
    """

    objective: Tensor
    nll: Tensor
    words: Tensor


def caption_loss(logits: Tensor, captions: Tensor, label_smoothing: float = 0.0) -> Loss:
    """Scores a decoder's teacher-forced logits against the captions, over real words only.

    Args:
        logits: `(N, T, V)` or `(N, T-1, V)`: the last T-1 steps are used, so that a decoder whose first step is the
            image and one whose first step is `<start>` are treated alike.
        captions: `(N, T)` or `(B, K, T)`, beginning with `<start>`, padded with `IGNORE`.
        label_smoothing: the part of the target spread over all words (Szegedy et al. 2016, arXiv 1512.00567).
    """
    targets = captions.flatten(0, -2)[:, 1:]
    log_probs = logits[:, -targets.shape[1] :].float().log_softmax(-1)
    real = targets != IGNORE
    nll = -log_probs.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2)[real].sum()
    objective = nll
    if label_smoothing:
        objective = (1 - label_smoothing) * nll - label_smoothing * log_probs.mean(-1)[real].sum()
    return Loss(objective, nll.detach(), real.sum())
