"""The other ways of doing the work that `benchmarks/performance.py` times, written afresh from descriptions of them.

"The course" is the Udacity course's captioning project, whose loop many repositories have copied; "the tutorials" are
those with attention and beam search that caption one image at a time. Each rival runs the same network on the same
data as showtell, with PyTorch's defaults: float32, eager, NCHW. What is slow in them is kept, and nothing is added.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SubsetRandomSampler
from torchvision import transforms

from showtell.datasets import CaptionSet
from showtell.decoders import Decoder
from showtell.tokenizer import TOKENIZERS
from showtell.transforms import IMAGENET_MEAN, IMAGENET_STD
from showtell.vocabulary import Vocabulary


def word_by_word(text: str) -> list[str]:
    """Split a caption as the course does; `word_tokenize` without its sentence splitter, which needs a download."""
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError:  # the same words
        return TOKENIZERS["treebank"](text)
    return NLTKWordTokenizer().tokenize(text.lower())


def vocabulary(captions: Sequence[str], threshold: int = 5) -> dict[str, int]:
    """Count words caption by caption, and number those seen often enough."""
    counts: dict[str, int] = {}
    for text in captions:
        for word in word_by_word(str(text).lower()):
            counts[word] = counts.get(word, 0) + 1
    words = [word for word, count in counts.items() if count >= threshold]
    return {word: i for i, word in enumerate(["<start>", "<end>", "<unk>", *words])}


def pil_transform(side: int, train: bool = False) -> transforms.Compose:
    """Return the course's transform of a PIL image for training, or one that squashes the image, for captioning."""
    crop = [transforms.Resize(side * 8 // 7), transforms.RandomCrop(side), transforms.RandomHorizontalFlip()]
    last = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return transforms.Compose([*(crop if train else [transforms.Resize((side, side))]), *last])


def read(path: str, transform: transforms.Compose) -> Tensor:
    with Image.open(path) as image:
        return transform(image.convert("RGB"))


class CourseData(Dataset):
    """A sample per caption: the image is read, resized and cropped for each of its captions, the words looked up."""

    def __init__(self, caption_set: CaptionSet, vocab: Vocabulary, side: int, batch_size: int) -> None:
        self.pairs = [(caption_set.path(i), text) for i, own in enumerate(caption_set.captions) for text in own]
        self.vocab, self.batch_size, self.transform = vocab, batch_size, pil_transform(side, train=True)
        self.lengths = [len(vocab.encode(text)) - 2 for _, text in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, text = self.pairs[index]
        ids = [self.vocab(word) for word in word_by_word(text.lower())]
        return read(path, self.transform), torch.tensor([0, *ids, 1])[: self.lengths[index] + 2]

    def draw(self) -> list[int]:
        """Draw a length, then captions of that length with replacement, by going through the whole list."""
        length = random.choice(self.lengths)
        return random.choices([i for i, own in enumerate(self.lengths) if own == length], k=self.batch_size)


class CourseModel(nn.Module):
    """A frozen ResNet with a linear head, and an LSTM whose first input is the image."""

    def __init__(self, net: nn.Module, feature_size: int, size: int, vocab_size: int) -> None:
        super().__init__()
        self.net, self.head = net.requires_grad_(False), nn.Linear(feature_size, size)
        self.embed, self.lstm = nn.Embedding(vocab_size, size), nn.LSTM(size, size, batch_first=True)
        self.linear = nn.Linear(size, vocab_size)

    def forward(self, images: Tensor, captions: Tensor) -> Tensor:
        features = self.head(self.net(images).flatten(1))
        inputs = torch.cat([features.unsqueeze(1), self.embed(captions[:, :-1])], 1)
        return self.linear(self.lstm(inputs)[0])


class CourseLoop:
    """The course's training loop: for each step, new indices, a new iterator over the loader, one batch."""

    def __init__(self, data: CourseData, model: CourseModel) -> None:
        self.data, self.model = data, model.train()
        model.net.eval()  # the course forgets this, which costs it a sixth more time
        self.loss = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        sampler = BatchSampler(SubsetRandomSampler(data.draw()), data.batch_size, drop_last=False)
        self.loader = DataLoader(data, batch_sampler=sampler)

    def step(self) -> float:
        """Take one step; return its seconds."""
        started = time.perf_counter()
        self.loader.batch_sampler.sampler = SubsetRandomSampler(self.data.draw())
        images, captions = next(iter(self.loader))
        self.model.zero_grad()
        logits = self.model(images, captions)
        loss = self.loss(logits.flatten(0, 1), captions.flatten())
        loss.backward()
        self.optimizer.step()
        math.exp(loss.item())
        return time.perf_counter() - started


class TutorialAttend(nn.Module):
    """Show, Attend and Tell as the tutorials train it: every caption with its own grid, the words one after another.

    Captions are sorted by length and the batch shrinks as they end; the classifier runs at every step.
    """

    def __init__(self, feature_size: int, size: int, vocab_size: int) -> None:
        super().__init__()
        self.key, self.query, self.energy = nn.Linear(feature_size, size), nn.Linear(size, size), nn.Linear(size, 1)
        self.embed = nn.Embedding(vocab_size, size)
        self.lstm = nn.LSTMCell(size + feature_size, size)
        self.start_hidden, self.start_cell = nn.Linear(feature_size, size), nn.Linear(feature_size, size)
        self.gate, self.linear = nn.Linear(size, feature_size), nn.Linear(size, vocab_size)
        self.dropout = nn.Dropout(0.5)

    def forward(self, grids: Tensor, captions: Tensor, lengths: Tensor) -> Tensor:
        """Grids `(N, L, D)` and captions `(N, T)`, longest first -> logits `(N, T-1, V)`."""
        hidden, cell = self.start_hidden(grids.mean(1)), self.start_cell(grids.mean(1))
        words = self.embed(captions)
        logits = grids.new_zeros(len(captions), captions.shape[1] - 1, self.linear.out_features)
        for t in range(int(lengths.max())):
            n = int((lengths > t).sum())
            seen = torch.relu(self.key(grids[:n]) + self.query(hidden[:n]).unsqueeze(1))  # (n, L, A)
            alphas = self.energy(seen).softmax(1)  # (n, L, 1)
            context = (grids[:n] * alphas).sum(1)
            context = torch.sigmoid(self.gate(hidden[:n])) * context
            hidden, cell = self.lstm(torch.cat([words[:n, t], context], 1), (hidden[:n], cell[:n]))
            logits[:n, t] = self.linear(self.dropout(hidden))
        return logits


class TutorialLoop:
    """Train `TutorialAttend` on batches of grids `(B, L, D)` and captions `(B, K, T)` padded with negative ids."""

    def __init__(self, model: TutorialAttend) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=4e-4)

    def step(self, grids: Tensor, captions: Tensor) -> int:
        """Take one step; return its number of captions."""
        grids = grids.float().repeat_interleave(captions.shape[1], 0)  # as if each caption came with its image
        captions = captions.flatten(0, 1)
        lengths, order = (captions[:, 1:] >= 0).sum(1).sort(descending=True)
        grids, captions = grids[order], captions[order]
        logits = self.model(grids, captions.clamp(min=0), lengths)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), captions[:, 1:].flatten(), ignore_index=-100)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()
        return len(captions)


@torch.no_grad()
def beam_search(decoder: Decoder, features: Tensor, k: int = 5, max_len: int = 25) -> list[int]:
    """Search for the caption of one image, `(1, …)`, as the tutorials do: the beams are the batch, which shrinks."""
    memory, state = decoder.start(features)
    state = tuple(part.repeat_interleave(k, 0) for part in state)
    sequences, scores = torch.zeros(k, 1, dtype=torch.long), torch.zeros(k, 1)
    done: list[tuple[float, list[int]]] = []
    for t in range(max_len + 1):
        logits, state, _ = decoder.step(sequences[:, -1], memory, state)
        totals = scores + torch.log_softmax(logits, 1)
        best, places = (totals[0] if t == 0 else totals.flatten()).topk(len(sequences))
        rows, words = places // totals.shape[1], places % totals.shape[1]
        sequences = torch.cat([sequences[rows], words[:, None]], 1)
        going = [i for i, word in enumerate(words.tolist()) if word != 1]
        done += [(best[i].item(), sequences[i].tolist()) for i in range(len(words)) if i not in going]
        if not going:
            break
        sequences, scores = sequences[going], best[going, None]
        state = tuple(part[rows[going]] for part in state)
    return max(done or [(0.0, sequences[0].tolist())])[1]


class TutorialCaptioner:
    """Caption files one at a time: Pillow, torchvision's transforms, an eager network, beam search."""

    def __init__(self, net: nn.Module, embed: nn.Module, decoder: Decoder, side: int) -> None:
        """Take the network that gives feature maps `(1, D, h, w)`, the head, and the decoder."""
        self.net, self.embed, self.decoder = net.eval(), embed.eval(), decoder.eval()
        self.transform = pil_transform(side)

    @torch.no_grad()
    def __call__(self, path: str) -> list[int]:
        maps = self.net(read(path, self.transform).unsqueeze(0))
        features = maps.flatten(2).transpose(1, 2) if self.decoder.grid else maps.mean((2, 3))
        return beam_search(self.decoder, self.embed(features))
