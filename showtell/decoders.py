"""Five caption decoders behind one interface, from Show and Tell to a Transformer.

Shapes, here and in the whole package: B images or captions in the batch, K captions (or beams) per image, N = B*K rows,
L grid cells, D feature size, E embedding size, H hidden size, A attention size, T caption length with <start> and
<end>, V vocabulary size.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from showtell.arrays import repeat_rows
from showtell.attention import Attention
from showtell.errors import UserError

IGNORE = -100  # marks padding in a batch of captions; no word has this id, and the loss skips it
Tensors = tuple[Tensor, ...]
State = Tensors  # each with the batch first, so that beam search can reorder any decoder's state in the same way
Memory = Tensor | Tensors | None


class Decoder(nn.Module):
    """The interface of every decoder: a subclass defines `start` and `step`, and may define a faster `teacher_force`.

    `memory` (such as the projected grid) is computed once per image and never reordered; it has B rows. `state` changes
    at every step; it has N = B*K rows when K captions or beams share an image, adjacent for each image. Once listed in
    `DECODERS`, a subclass is known everywhere by its name; of a recipe's settings its constructor gets those it names.

    Attributes:
        grid: whether the decoder takes `(B, L, E)` features rather than `(B, E)`.
        word_parameters: the parameters with one row per word, which `start_from` remaps to another vocabulary.
    """

    grid: ClassVar[bool] = False
    word_parameters: ClassVar[tuple[str, ...]] = ("embed.weight", "linear.weight", "linear.bias")

    def start(self, features: Tensor) -> tuple[Memory, State]:
        """Take the encoder's features, `(B, E)` or `(B, L, E)`; return `(memory, state)`."""
        raise NotImplementedError

    def step(self, words: Tensor, memory: Memory, state: State) -> tuple[Tensor, State, Tensor | None]:
        """Read one word per row, `(N,)`; return logits `(N, V)`, the new state, and attention `(N, L)` or `None`."""
        raise NotImplementedError

    def forward(self, features: Tensor, captions: Tensor) -> Tensor:
        """Compute the logits of every next word of `captions` `(N, T)` by teacher forcing.

        They are `(N, T-1, V)`, or `(N, T, V)` from decoders for which the image is a step of its own. In both cases
        the last T-1 steps belong to `captions[:, 1:]`, as `caption_loss` assumes.
        """
        return self.teacher_force(features, captions)[0]

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute what `forward` returns, and the attention `(N, T-1, L)` of decoders that have it."""
        memory, state = self.start(features)
        state = repeat_rows(state, captions.shape[0] // features.shape[0])
        steps = []
        for words in captions[:, :-1].clamp(min=0).unbind(1):  # T-1 times (N,)
            logits, state, alphas = self.step(words, memory, state)
            steps.append((logits, alphas))
        logits, alphas = zip(*steps, strict=True)
        return torch.stack(logits, 1), None if alphas[0] is None else torch.stack(alphas, 1)  # (N, T-1, V), (N, T-1, L)

    def _check(self, features: Tensor) -> Tensor:
        """Return features in the shape that the decoder takes, or refuse a grid where a vector is needed."""
        if self.grid:
            return features.unsqueeze(1) if features.dim() == 2 else features  # (B, L, E)
        if features.dim() == 3 and features.shape[1] != 1:
            given = f"{type(self).__name__} takes one vector per image and was given {tuple(features.shape)}"
            raise UserError(f"{given}; build the encoder with grid=False")
        return features.flatten(1)  # (B, E)

    @torch.no_grad()
    def sample(
        self, inputs: Tensor, states: State | None = None, max_len: int = 20, start_id: int = 0, end_id: int = 1
    ) -> list[int]:
        """Generate the caption of one image greedily: `[<start>, words…, <end>]`, with `<end>` only if it was reached.

        `inputs` is `encoder(image)`, `(1, E)` or `(1, 1, E)`, or `(1, L, E)` for a decoder that attends; `states` is an
        initial state as `start` returns it, computed from `inputs` by default.
        """
        memory, state = self.start(inputs)
        state = state if states is None else states
        ids = [start_id]
        for _ in range(max_len + 1):
            logits, state, _ = self.step(torch.tensor(ids[-1:], device=inputs.device), memory, state)
            ids.append(int(logits.argmax()))
            if ids[-1] == end_id:
                return ids
        return ids[:-1]  # the last step could only have added <end>


def _tie(classifier: nn.Linear, embed: nn.Embedding) -> None:
    sizes = embed.embedding_dim, classifier.in_features
    if sizes[0] != sizes[1]:
        raise UserError(f"tie_embeddings needs embed_size == hidden_size, not {sizes[0]} and {sizes[1]}")
    nn.init.normal_(embed.weight, std=embed.weight.shape[1] ** -0.5)  # small enough to classify with
    classifier.weight = embed.weight


class _LSTMDecoder(Decoder):
    """The common part of the two decoders around `nn.LSTM`."""

    inputs_per_step: ClassVar[int] = 1  # how many vectors of size E the LSTM reads at once

    def __init__(
        self,
        embed_size: int,
        hidden_size: int,
        vocab_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        input_size, between_layers = self.inputs_per_step * embed_size, dropout * (num_layers > 1)
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True, dropout=between_layers)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        if tie_embeddings:
            _tie(self.linear, self.embed)

    def step(self, words: Tensor, memory: Tensor | None, state: State) -> tuple[Tensor, State, None]:
        outputs, state = self._run(self._inputs(words.unsqueeze(1), memory), state)  # (N, 1, E or 2E) -> (N, 1, H)
        return self.linear(self.dropout(outputs.squeeze(1))), state, None  # (N, V)

    def _inputs(self, words: Tensor, memory: Tensor | None) -> Tensor:
        return self.embed(words)  # (N, T) -> (N, T, E)

    def _run(self, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Inputs `(N, T, E or 2E)` -> outputs `(N, T, H)` and the state, twice `(N, layers, H)`."""
        hidden = None if state is None else tuple(s.transpose(0, 1).contiguous() for s in state)  # (layers, N, H)
        outputs, hidden = self.lstm(self.dropout(inputs), hidden)  # (N, T, H)
        return outputs, tuple(s.transpose(0, 1) for s in hidden)  # (N, layers, H)


class DecoderRNN(_LSTMDecoder):
    """Decoder 1, Show and Tell: the image is the LSTM's first input (Vinyals et al. 2015, arXiv 1411.4555, eq. 10-12).

    Unlike in the paper, the LSTM may have several layers and dropout.
    """

    def start(self, features: Tensor) -> tuple[None, State]:
        """Feed the image to the LSTM; there is no memory but its state."""
        return None, self._run(self._check(features).unsqueeze(1), None)[1]  # inputs (B, 1, E)

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, None]:
        """Compute logits `(N, T, V)`; those of the first step, the image's, are not used by the loss."""
        (image,) = repeat_rows((self._check(features),), captions.shape[0] // features.shape[0])  # (N, E)
        words = self.embed(captions[:, :-1].clamp(min=0))  # (N, T-1, E)
        outputs, _ = self._run(torch.cat([image.unsqueeze(1), words], 1), None)  # (N, T, E) -> (N, T, H)
        return self.linear(self.dropout(outputs)), None  # (N, T, V)


class DecoderEveryStep(_LSTMDecoder):
    """Decoder 2: the image is an input at every step, beside the word (in the spirit of Mao et al. 2015, 1412.6632).

    Vinyals et al. 2015, section 3.1, found that it overfits more easily than decoder 1.
    """

    inputs_per_step = 2

    def start(self, features: Tensor) -> tuple[Tensor, State]:
        """Keep the image as memory; the state starts at zero."""
        features = self._check(features)
        zeros = features.new_zeros(features.shape[0], self.lstm.num_layers, self.lstm.hidden_size)  # (B, layers, H)
        return features, (zeros, zeros)

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, None]:
        """Compute logits `(N, T-1, V)`."""
        outputs, _ = self._run(self._inputs(captions[:, :-1].clamp(min=0), self._check(features)), None)  # (N, T-1, H)
        return self.linear(self.dropout(outputs)), None  # (N, T-1, V)

    def _inputs(self, words: Tensor, memory: Tensor) -> Tensor:
        (image,) = repeat_rows((memory,), words.shape[0] // memory.shape[0])  # (N, E)
        return torch.cat([self.embed(words), image.unsqueeze(1).expand(-1, words.shape[1], -1)], -1)  # (N, T, 2E)


class _AttendingDecoder(Decoder):
    """The common part of the two LSTM decoders with attention.

    A subclass defines `_add_layers` (-> size of the classifier's input), `_embed` (words -> inputs, whatever does not
    depend on the previous step), `_attend` (one step -> state, further arguments of `_classify`, attention weights) and
    `_classify` (-> logits).
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
        self.linear = nn.Linear(self._add_layers(embed_size, hidden_size), vocab_size)
        self.dropout = nn.Dropout(dropout)
        if tie_embeddings:
            _tie(self.linear, self.embed)

    def step(self, words: Tensor, memory: Tensors, state: State) -> tuple[Tensor, State, Tensor]:
        inputs = self._embed(words)  # (N, E or 4H)
        state, outputs, alphas = self._attend(inputs, memory, state)
        return self._classify(inputs, *outputs), state, alphas  # (N, V), (N, L)

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits `(N, T-1, V)` and attention `(N, T-1, L)`, both zero at padding, where nothing is computed.

        An image's captions are sorted by length, longest first, so that the captions still running at a step are the
        first ones. Whatever does not depend on the previous step is computed for all steps at once.
        """
        memory, state = self.start(features)
        b, k, n_steps = features.shape[0], captions.shape[0] // features.shape[0], captions.shape[1] - 1
        captions = captions.unflatten(0, (b, k))  # (B, K, T)
        lengths = (captions[..., 1:] != IGNORE).sum(-1)  # (B, K)
        order = lengths.argsort(dim=1, descending=True, stable=True)  # (B, K)
        steps = torch.arange(n_steps, device=captions.device)  # (T-1,)
        running = (lengths.unsqueeze(2) > steps).sum(1).amax(0).clamp(min=1)  # (T-1,): captions per image

        # From here on, M is the number of (step, image, caption) that are computed, in this order.
        kept = torch.arange(k, device=captions.device) < running[:, None, None].expand(-1, b, k)  # (T-1, B, K)
        first = k * torch.arange(b, device=captions.device)[:, None]  # (B, 1)
        rows = (order + first).expand(n_steps, b, k)[kept]  # (M,): places in the batch of N
        steps = steps[:, None, None].expand(n_steps, b, k)[kept]  # (M,)
        running = running.tolist()
        inputs = self._embed(captions.flatten(0, 1)[rows, steps].clamp(min=0))  # (M, E or 4H)
        state, outputs, alphas = repeat_rows(state, k), [], []  # (N, …)
        for step_inputs, k_now in zip(inputs.split([b * k_now for k_now in running]), running, strict=True):
            state = tuple(s.unflatten(0, (b, -1))[:, :k_now].flatten(0, 1) for s in state)  # (B*k_now, …)
            state, step_outputs, step_alphas = self._attend(step_inputs, memory, state)
            outputs.append(step_outputs)
            alphas.append(step_alphas)
        logits = self._classify(inputs, *map(torch.cat, zip(*outputs, strict=True)))  # (M, V)

        def scatter(values: Tensor) -> Tensor:
            return values.new_zeros(b * k, n_steps, values.shape[1]).index_put((rows, steps), values)  # (N, T-1, …)

        return scatter(logits), scatter(torch.cat(alphas))  # (N, T-1, V), (N, T-1, L)


class DecoderAttention(_AttendingDecoder):
    """Decoder 3, Show, Attend and Tell: an LSTM that attends to the grid at every word (Xu et al. 2015).

    Soft attention (section 4.2), the gate beta on the context (4.2.1) and the deep output layer (eq. 7) are the
    paper's. Unlike in the paper, the encoder's head first projects the grid from D to E.
    """

    def _add_layers(self, embed_size: int, hidden_size: int) -> int:
        self.start_hidden = nn.Linear(embed_size, hidden_size)
        self.start_cell = nn.Linear(embed_size, hidden_size)
        self.gate = nn.Linear(hidden_size, 1)
        self.lstm = nn.LSTMCell(2 * embed_size, hidden_size)
        self.from_hidden = nn.Linear(hidden_size, embed_size)
        self.from_context = nn.Linear(embed_size, embed_size, bias=False)
        return embed_size

    def start(self, features: Tensor) -> tuple[Tensors, State]:
        """Project the grid to keys once; compute the initial state from its mean (section 3.1.2)."""
        features = self._check(features)
        mean = features.mean(1)  # (B, E)
        state = torch.tanh(self.start_hidden(mean)), torch.tanh(self.start_cell(mean))  # (B, H) each
        return (self.attention.keys(features), features), state  # keys (B, L, A), values (B, L, E)

    def _embed(self, words: Tensor) -> Tensor:
        return self.dropout(self.embed(words))  # (…, E)

    def _attend(self, inputs: Tensor, memory: Tensors, state: State) -> tuple[State, Tensors, Tensor]:
        context, alphas = self.attention(state[0], *memory)  # (N, E), (N, L)
        context = torch.sigmoid(self.gate(state[0])) * context
        state = self.lstm(torch.cat([inputs, context], -1), state)  # (N, 2E) -> (N, H) twice
        return state, (state[0], context), alphas

    def _classify(self, inputs: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        deep = inputs + self.from_hidden(self.dropout(hidden)) + self.from_context(context)  # eq. 7: (…, E)
        return self.linear(self.dropout(deep))  # (…, V)


class DecoderTopDown(_AttendingDecoder):
    """Decoder 4, Top-Down: an attention LSTM and a language LSTM (Anderson et al. 2018, arXiv 1707.07998, section 3.2).

    The attention LSTM reads the word, the mean of the image features and the last hidden state of the language LSTM;
    its hidden state is the attention's query. The language LSTM reads the context. Unlike in the paper, the regions
    are grid cells, and the grid first passes a ReLU and dropout.
    """

    def _add_layers(self, embed_size: int, hidden_size: int) -> int:
        # Gates of two LSTMs. The parts for the word and the image do not depend on the previous step.
        self.attention_lstm_word = nn.Linear(embed_size, 4 * hidden_size)
        self.attention_lstm_image = nn.Linear(embed_size, 4 * hidden_size, bias=False)
        self.attention_lstm_hidden = nn.Linear(2 * hidden_size, 4 * hidden_size, bias=False)
        self.language_lstm = nn.Linear(embed_size + 2 * hidden_size, 4 * hidden_size)
        return hidden_size

    def start(self, features: Tensor) -> tuple[Tensors, State]:
        """Project the grid and its mean once; both LSTMs start at zero."""
        features = self.dropout(torch.relu(self._check(features)))
        image = self.attention_lstm_image(features.mean(1))  # (B, 4H)
        zeros = features.new_zeros(features.shape[0], self.linear.in_features, dtype=torch.float32)  # (B, H)
        return (self.attention.keys(features), features, image), (zeros,) * 4  # keys (B, L, A), values (B, L, E)

    def _embed(self, words: Tensor) -> Tensor:
        return self.attention_lstm_word(self.dropout(self.embed(words)))  # (…, 4H)

    def _attend(self, inputs: Tensor, memory: Tensors, state: State) -> tuple[State, Tensors, Tensor]:
        keys, values, image = memory
        hidden_1, cell_1, hidden_2, cell_2 = state  # 1: attention LSTM, 2: language LSTM; (N, H) each
        gates = inputs + self.attention_lstm_hidden(torch.cat([hidden_1, hidden_2], -1))  # (N, 4H)
        gates = (gates.unflatten(0, (image.shape[0], -1)) + image.unsqueeze(1)).flatten(0, 1)  # (B, K, 4H) -> (N, 4H)
        hidden_1, cell_1 = _lstm(gates, cell_1)
        context, alphas = self.attention(hidden_1, keys, values)  # (N, E), (N, L)
        gates = self.language_lstm(torch.cat([context, hidden_1, hidden_2], -1))  # (N, E + 2H) -> (N, 4H)
        hidden_2, cell_2 = _lstm(gates, cell_2)
        return (hidden_1, cell_1, hidden_2, cell_2), (hidden_2,), alphas

    def _classify(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        return self.linear(self.dropout(hidden))  # (…, V)


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of an LSTM, given its gates `(N, 4H)` in the order of `nn.LSTM`; return hidden state and cell."""
    i, f, g, o = gates.chunk(4, -1)  # (N, H) each
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


class DecoderTransformer(Decoder):
    """Decoder 5: a small Transformer over the words and the grid (Vaswani et al. 2017, arXiv 1706.03762).

    Layer norm comes before each block (pre-norm), and positions are the paper's sinusoids, so that there is no longest
    caption. The state holds the keys and values of the words so far.
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
        if num_heads < 1 or hidden_size % num_heads:
            raise UserError(f"hidden_size={hidden_size} is not divisible by num_heads={num_heads}; choose a multiple")
        self.embed = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.embed.weight, std=hidden_size**-0.5)
        self.from_features = nn.Linear(embed_size, hidden_size)
        self.layers = nn.ModuleList(_TransformerLayer(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        if tie_embeddings:
            _tie(self.linear, self.embed)

    def start(self, features: Tensor) -> tuple[Tensors, State]:
        """Project the grid to the keys and values of every layer, `(B, heads, L, H/heads)`; the state is empty."""
        features = self.from_features(self._check(features))  # (B, L, H)
        memory = tuple(tensor for layer in self.layers for tensor in layer.cross_attn.keys_and_values(features))
        return memory, tuple(keys[:, :, :0] for keys in memory)  # (B, heads, 0, H/heads): no words yet

    def step(self, words: Tensor, memory: Tensors, state: State) -> tuple[Tensor, State, Tensor]:
        logits, state, alphas = self._run(words.unsqueeze(1), memory, state)  # (N, 1, V), (N, 1, L)
        return logits.squeeze(1), state, alphas.squeeze(1)  # (N, V), (N, L)

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits `(N, T-1, V)` and the last layer's attention to the grid, mean over heads, `(N, T-1, L)`."""
        memory, state = self.start(features)
        state = repeat_rows(state, captions.shape[0] // features.shape[0])  # (N, heads, 0, H/heads)
        logits, _, alphas = self._run(captions[:, :-1].clamp(min=0), memory, state)
        return logits, alphas

    def _run(self, words: Tensor, memory: Tensors, state: State) -> tuple[Tensor, State, Tensor]:
        """Read words `(N, T)` that follow those of `state`."""
        past, total = state[0].shape[2], state[0].shape[2] + words.shape[1]
        hidden = self.embed(words) * math.sqrt(self.embed.embedding_dim)  # (N, T, H)
        hidden = self.dropout(hidden + _sinusoids(total, hidden)[past:])
        visible = None  # a single word reads all before it
        if words.shape[1] > 1:
            visible = torch.ones(words.shape[1], total, dtype=torch.bool, device=words.device).tril(past)  # (T, past+T)
        new_state = []
        for i, layer in enumerate(self.layers):
            pair = slice(2 * i, 2 * i + 2)
            hidden, words_kv, alphas = layer(hidden, memory[pair], state[pair], visible)
            new_state.extend(words_kv)
        return self.linear(self.dropout(self.norm(hidden))), tuple(new_state), alphas  # (N, T, V), (N, T, L)


class _TransformerLayer(nn.Module):
    """Self-attention, cross-attention to the grid and an MLP, each with layer norm before and a residual around it."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = _MultiHead(hidden_size, num_heads)
        self.cross_attn = _MultiHead(hidden_size, num_heads)
        wide, narrow = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)
        self.mlp = nn.Sequential(wide, nn.GELU(), nn.Dropout(dropout), narrow)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, memory: Tensors, past: State, visible: Tensor | None
    ) -> tuple[Tensor, State, Tensor]:
        words = self.norms[0](hidden)
        new = self.self_attn.keys_and_values(words)
        words_kv = tuple(torch.cat(pair, 2) for pair in zip(past, new, strict=True))  # (N, heads, past + T, H/heads)
        hidden = hidden + self.dropout(self.self_attn(words, *words_kv, visible)[0])
        context, alphas = self.cross_attn(self.norms[1](hidden), *memory)  # (N, T, H), (N, T, L)
        hidden = hidden + self.dropout(context)
        return hidden + self.dropout(self.mlp(self.norms[2](hidden))), words_kv, alphas


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
        pairs = self.key_value(inputs).unflatten(-1, (2, self.num_heads, -1))  # (B, L, 2, heads, H/heads)
        return pairs.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, inputs: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None = None) -> Tensors:
        """Queries `(N, T, H)` over B rows of keys -> outputs `(N, T, H)`, mean weights over the heads `(N, T, L)`."""
        n, t, _ = inputs.shape
        queries = self.query(inputs).view(keys.shape[0], -1, t, self.num_heads, self.head_size)  # (B, K, T, heads, d)
        queries = queries.permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, heads, K*T, d)
        weights = queries @ keys.transpose(-1, -2) / math.sqrt(self.head_size)  # (B, heads, K*T, L)
        if visible is not None:  # self-attention: K is 1
            weights = weights.masked_fill(~visible, float("-inf"))
        weights = weights.softmax(-1)
        outputs = (weights @ values).unflatten(2, (-1, t))  # (B, heads, K, T, d)
        outputs = outputs.permute(0, 2, 3, 1, 4).reshape(n, t, -1)  # (N, T, H)
        return self.output(outputs), weights.mean(1).reshape(n, t, -1)  # (N, T, H), (N, T, L)


def _sinusoids(length: int, like: Tensor) -> Tensor:
    """Return position encodings `(length, H)` (Vaswani et al. 2017, section 3.5)."""
    half = like.shape[-1] // 2
    rates = torch.exp(torch.arange(half, device=like.device) * (-math.log(10000.0) / half))  # (H/2,)
    angles = torch.arange(length, device=like.device)[:, None] * rates  # (length, H/2)
    return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, like.shape[-1] - 2 * half)).to(like.dtype)


DECODERS: dict[str, type[Decoder]] = {
    "show-tell": DecoderRNN,
    "every-step": DecoderEveryStep,
    "attend": DecoderAttention,
    "top-down": DecoderTopDown,
    "transformer": DecoderTransformer,
}


def find_decoder(name: str) -> type[Decoder]:
    """Return the decoder class of this name, or raise a `UserError` that lists the names."""
    if name not in DECODERS:
        raise UserError(f"there is no decoder {name!r}; choose one of {', '.join(DECODERS)}")
    return DECODERS[name]
