"""Five decoders that write under one protocol, from Show and Tell to a Transformer.

Shapes, here and everywhere: B images or captions in the batch, K captions (or beams) an image, L grid cells,
D feature size, E embedding size, H hidden size, T caption length with <start> and <end>, V vocabulary size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from showtell.errors import UserError

IGNORE = -100  # marks padding in a batch of captions; no word has this id, and the loss skips it
State = tuple[Tensor, ...]  # every tensor has the batch first, so that beam search can reorder any state the same way


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


class _AttendingDecoder(Decoder):
    """What the two LSTM decoders that look at the grid share: the loop over the words of teacher forcing."""

    grid = True

    def step(self, words: Tensor, memory: State, state: State) -> tuple[Tensor, State, Tensor]:
        """Reads one word, having looked; see `Decoder.step`."""
        words = self._read(words)
        state, told, alphas = self._look(words, memory, state)
        return self._classify(words, *told), state, alphas

    def teacher_force(self, features: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B*K, T-1, V)` and attention `(B*K, T-1, L)`; nothing is computed where all that is left is padding.

        An image's captions are put in order of their lengths, the longest first, so that at each step those still
        running are its first few; what does not wait for the step before is done for all steps at once.
        """
        memory, state = self.start(features)
        b, n_steps = features.shape[0], captions.shape[1] - 1
        captions = captions.unflatten(0, (b, -1))  # (B, K, T)
        k = captions.shape[1]
        lengths = (captions[..., 1:] != IGNORE).sum(-1)
        order = lengths.argsort(dim=1, descending=True, stable=True)
        steps = torch.arange(n_steps, device=captions.device)
        running = (lengths.unsqueeze(2) > steps).sum(1).amax(0).clamp(min=1)  # (T-1,): captions an image

        # Everything below lies as (step, image, caption), the captions that have ended left out.
        places = torch.arange(k, device=captions.device) < running[:, None, None].expand(-1, b, k)
        rows = (order + k * torch.arange(b, device=captions.device)[:, None]).expand(n_steps, b, k)[places]
        steps = steps[:, None, None].expand(n_steps, b, k)[places]
        running = running.tolist()
        words = self._read(captions.flatten(0, 1)[rows, steps].clamp(min=0))
        state = repeat_rows(state, k)
        told_steps, alpha_steps = [], []
        for words_read, k_now in zip(words.split([b * k_now for k_now in running]), running, strict=True):
            state = tuple(s.unflatten(0, (b, -1))[:, :k_now].flatten(0, 1) for s in state)
            state, told, alphas = self._look(words_read, memory, state)
            told_steps.append(told)
            alpha_steps.append(alphas)
        logits = self._classify(words, *(torch.cat(told) for told in zip(*told_steps, strict=True)))

        def spread(found: Tensor) -> Tensor:
            """Back into `(B*K, T-1, …)`, zero where nothing was computed."""
            return found.new_zeros(b * k, n_steps, found.shape[1]).index_put((rows, steps), found)

        return spread(logits), spread(torch.cat(alpha_steps))

    def _read(self, words: Tensor) -> Tensor:
        """Words `(…)` -> what `_look` is given of them, `(…, size)`."""
        raise NotImplementedError

    def _look(self, words: Tensor, memory: State, state: State) -> tuple[State, tuple[Tensor, ...], Tensor]:
        """One step from what was read: the new state, what `_classify` is told, and where it looked `(B*K, L)`."""
        raise NotImplementedError

    def _classify(self, words: Tensor, *told: Tensor) -> Tensor:
        """Logits `(…, V)`."""
        raise NotImplementedError


class DecoderAttention(_AttendingDecoder):
    """Decoder 3, Show, Attend and Tell: an LSTM that looks at the grid anew for every word (Xu et al. 2015).

    Soft attention (section 4.2), the gate beta on the context (4.2.1) and the deep output layer (eq. 7) are the
    paper's; the grid is first brought from D to E by the encoder's head, which the paper does not do.
    """

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

    def _read(self, words: Tensor) -> Tensor:
        return self.dropout(self.embed(words))

    def _look(
        self, words: Tensor, memory: tuple[Tensor, Tensor], state: State
    ) -> tuple[State, tuple[Tensor, Tensor], Tensor]:
        context, alphas = self.attention(state[0], *memory)
        context = torch.sigmoid(self.gate(state[0])) * context
        state = self.lstm(torch.cat([words, context], -1), state)
        return state, (state[0], context), alphas

    def _classify(self, words: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        deep = words + self.from_hidden(self.dropout(hidden)) + self.from_context(context)  # eq. 7
        return self.linear(self.dropout(deep))


class DecoderTopDown(_AttendingDecoder):
    """Decoder 4: one LSTM decides where to look, a second one what to say (Anderson et al. 2018, arXiv 1707.07998).

    As in section 3.2, the first reads the word, the image's mean and what the second last knew, and its output asks
    the attention; the second reads what was found there. The paper's regions are cells of the grid here, and the grid
    passes a rectifier and dropout first.
    """

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
        # The gates of the two LSTMs. Of the first's three inputs, word and image do not wait for earlier steps.
        self.look_word = nn.Linear(embed_size, 4 * hidden_size)
        self.look_picture = nn.Linear(embed_size, 4 * hidden_size, bias=False)
        self.look = nn.Linear(2 * hidden_size, 4 * hidden_size, bias=False)
        self.speak = nn.Linear(embed_size + 2 * hidden_size, 4 * hidden_size)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.dropout = nn.Dropout(dropout)
        if tie_embeddings:
            _tie(self.linear, self.embed)

    def start(self, features: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], State]:
        """Projects the grid and its mean once; both LSTMs start at zero."""
        features = self.dropout(torch.relu(self._check(features)))
        zeros = features.new_zeros(features.shape[0], self.linear.in_features, dtype=torch.float32)
        return (self.attention.key(features), features, self.look_picture(features.mean(1))), (zeros,) * 4

    def _read(self, words: Tensor) -> Tensor:
        return self.look_word(self.dropout(self.embed(words)))

    def _look(
        self, words: Tensor, memory: tuple[Tensor, Tensor, Tensor], state: State
    ) -> tuple[State, tuple[Tensor], Tensor]:
        keys, values, image = memory
        looked, look_cell, spoke, speak_cell = state
        gates = words + self.look(torch.cat([looked, spoke], -1))
        gates = (gates.unflatten(0, (len(image), -1)) + image.unsqueeze(1)).flatten(0, 1)
        looked, look_cell = _lstm(gates, look_cell)
        context, alphas = self.attention(looked, keys, values)
        spoke, speak_cell = _lstm(self.speak(torch.cat([context, looked, spoke], -1)), speak_cell)
        return (looked, look_cell, spoke, speak_cell), (spoke,), alphas

    def _classify(self, words: Tensor, spoke: Tensor) -> Tensor:
        return self.linear(self.dropout(spoke))


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM whose gates are known, `(N, 4H)` in the order of `nn.LSTM`: the hidden state and the cell."""
    take, keep, new, show = gates.chunk(4, -1)
    cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
    return show.sigmoid() * cell.tanh(), cell


class DecoderTransformer(Decoder):
    """Decoder 5: a small Transformer that reads its words and the grid (Vaswani et al. 2017, arXiv 1706.03762).

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
    "top-down": DecoderTopDown,
    "transformer": DecoderTransformer,
}
