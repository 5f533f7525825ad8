"""The notebooks of other captioning repositories, run through the front doors on the synthetic images.

Each test runs lines such as a reader of those notebooks would type; training and inference in a Python of its own.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from showtell import datasets
from showtell.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent

TRANSFORM = """
from torchvision import transforms

transform_train = transforms.Compose([
    transforms.Resize(64), transforms.RandomCrop(56), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
"""


@pytest.fixture
def few_scenes(monkeypatch):
    """The same data, less of it."""
    load = datasets.load
    monkeypatch.setattr(datasets, "load", lambda name, data_dir, split: load(name, data_dir, split, n=1000))


def run(*scripts: str, **names: object) -> dict:
    """Runs lines of a notebook, from the current folder; `names` are there from the start."""
    exec(compile("\n".join(map(textwrap.dedent, scripts)), "<notebook>", "exec"), names)
    return names


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.pkl"
    Vocabulary.build(datasets.load("synthetic", n=1000).all_captions(), 5).save(path)
    return path


PRELIMINARIES = """
from data_loader import get_loader
from vocabulary import Vocabulary

vocab_threshold, batch_size = 5, 10
data_loader = get_loader(transform=transform_train, mode='train', batch_size=batch_size,
                         vocab_threshold=vocab_threshold, vocab_from_file=False)

sample_caption = 'A person doing a trick on a rail while riding a skateboard.'
vocab = data_loader.dataset.vocab
assert isinstance(vocab, Vocabulary)
ids = []
start_word = vocab.start_word
ids.append(vocab(start_word))
ids.extend([vocab(token) for token in vocab.tokenize(sample_caption.lower())])
end_word = vocab.end_word
ids.append(vocab(end_word))
import torch
ids = torch.Tensor(ids).long()
assert ids[0] == 0 and ids[-1] == 1 and 2 in ids
assert dict(list(vocab.word2idx.items())[:3]) == {'<start>': 0, '<end>': 1, '<unk>': 2}
unk_word = vocab.unk_word
assert vocab(unk_word) == vocab('jfkafejw') == vocab('ieowoqjf') == 2
total = len(vocab)

data_loader = get_loader(transform=transform_train, mode='train', batch_size=batch_size, vocab_threshold=400,
                         vocab_from_file=False)
assert 3 < len(data_loader.dataset.vocab) <= total

from collections import Counter
counter = Counter(data_loader.dataset.caption_lengths)
lengths = sorted(counter.items(), key=lambda pair: pair[1], reverse=True)
assert sum(count for _, count in lengths) == len(data_loader.dataset.caption_lengths) == len(data_loader.dataset)

import numpy as np
import torch.utils.data as data
indices = data_loader.dataset.get_train_indices()
assert len(indices) == 10
new_sampler = data.sampler.SubsetRandomSampler(indices=indices)
data_loader.batch_sampler.sampler = new_sampler
for batch in data_loader:
    images, captions = batch[0], batch[1]
    break
assert images.shape == (10, 3, 56, 56)
assert captions.shape[0] == 10
assert captions.shape[1] == data_loader.dataset.caption_lengths[indices[0]] + 2
"""


def test_preliminaries_steps_one_and_two(few_scenes, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = ROOT / "vocab.pkl"
    before = file.read_bytes() if file.exists() else None
    done = run(TRANSFORM, PRELIMINARIES)
    assert len(done["images"]) == 10
    assert (file.read_bytes() if file.exists() else None) == before


def test_a_vocabulary_of_ones_own_in_the_current_folder(few_scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = """
    from data_loader import get_loader
    built = get_loader(transform=transform_train, mode='train', batch_size=10, vocab_threshold=4,
                       vocab_file='./vocab.pkl', vocab_from_file=False)
    loaded = get_loader(transform=transform_train, mode='train', batch_size=10, vocab_from_file=True)
    """
    done = run(TRANSFORM, lines)
    assert done["loaded"].dataset.vocab == done["built"].dataset.vocab
    assert [path.name for path in tmp_path.iterdir()] == ["vocab.pkl"]
    again = "get_loader(transform_train, 'train', batch_size=10, vocab_threshold=5, vocab_from_file=True)"
    with pytest.warns(UserWarning, match="threshold 4, not 5"):
        run(again, **done)


TRAINING = """
import math
import os
import numpy as np
import torch
import torch.nn as nn
import torch.utils.data as data
from data_loader import get_loader
from model import EncoderCNN, DecoderRNN

torch.manual_seed(0)
batch_size, vocab_threshold, embed_size, hidden_size = 64, 5, 256, 512
data_loader = get_loader(transform=transform_train, mode='train', batch_size=batch_size,
                         vocab_threshold=vocab_threshold, vocab_file=vocab_file, vocab_from_file=True)
vocab_size = len(data_loader.dataset.vocab)

encoder = EncoderCNN(embed_size)
decoder = DecoderRNN(embed_size, hidden_size, vocab_size)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
encoder.to(device)
decoder.to(device)
criterion = nn.CrossEntropyLoss().cuda() if torch.cuda.is_available() else nn.CrossEntropyLoss()
params = list(decoder.parameters()) + list(encoder.embed.parameters())
optimizer = torch.optim.Adam(params, lr=1e-3)
total_step = math.ceil(len(data_loader.dataset.caption_lengths) / data_loader.batch_sampler.batch_size)
assert total_step == math.ceil(60000 / 64)

losses = []
for i_step in range(1, 3):
    indices = data_loader.dataset.get_train_indices()
    assert len({data_loader.dataset.caption_lengths[i] for i in indices}) == 1
    new_sampler = data.sampler.SubsetRandomSampler(indices=indices)
    data_loader.batch_sampler.sampler = new_sampler
    images, captions = next(iter(data_loader))
    assert images.shape == (64, 3, 56, 56) and images.dtype == torch.float32
    assert captions.shape[0] == 64 and (captions[:, 0] == 0).all() and (captions[:, -1] == 1).all()
    images = images.to(device)
    captions = captions.to(device)
    for again in range(2):
        decoder.zero_grad()
        encoder.zero_grad()
        features = encoder(images)
        assert type(features) == torch.Tensor
        assert features.shape == (64, embed_size)
        outputs = decoder(features, captions)
        assert type(outputs) == torch.Tensor
        assert outputs.shape == (64, captions.shape[1], vocab_size)
        loss = criterion(outputs.view(-1, vocab_size), captions.view(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
assert abs(losses[0] - math.log(vocab_size)) < 0.5, losses
assert losses[1] < losses[0] and losses[3] < losses[2] < losses[0], losses
assert all(p.grad is None for p in encoder.backbone.parameters())

os.makedirs(os.path.join(folder, 'models'))
torch.save(decoder.state_dict(), os.path.join(folder, 'models', 'decoder-%d.pkl' % 1))
torch.save(encoder.state_dict(), os.path.join(folder, 'models', 'encoder-%d.pkl' % 1))
"""

INFERENCE = """
transform_test = transforms.Compose([
    transforms.Resize((56, 56)), transforms.ToTensor(),
    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
data_loader = get_loader(transform=transform_test, mode='test', vocab_file=vocab_file)
orig_image, image = next(iter(data_loader))
assert np.squeeze(orig_image).shape == (64, 64, 3)
assert image.shape == (1, 3, 56, 56)

encoder_file = 'encoder-1.pkl'
decoder_file = 'decoder-1.pkl'
vocab_size = len(data_loader.dataset.vocab)
trained = decoder
encoder = EncoderCNN(embed_size)
encoder.eval()
decoder = DecoderRNN(embed_size, hidden_size, vocab_size)
decoder.eval()
encoder.load_state_dict(torch.load(os.path.join(folder, 'models', encoder_file)))
decoder.load_state_dict(torch.load(os.path.join(folder, 'models', decoder_file)))
assert all(torch.equal(a, b.cpu()) for a, b in zip(decoder.parameters(), trained.parameters()))
encoder.to(device)
decoder.to(device)
image = image.to(device)
features = encoder(image).unsqueeze(1)
assert features.shape == (1, 1, embed_size)
output = decoder.sample(features)
assert type(output) == list and all(type(x) == int for x in output)
assert all(x in data_loader.dataset.vocab.idx2word for x in output)
assert output[0] == 0 and output.count(1) <= 1 and (1 not in output or output[-1] == 1)
assert len(output) <= 22
assert output == decoder.sample(features)
assert len(decoder.sample(features, max_len=3)) <= 5
# The same with the image that a batch held: what a course's loop does to its own batch.
output = decoder.sample(encoder(images[:1]).unsqueeze(1))
assert output[0] == 0
sentence = data_loader.dataset.vocab.decode(output)
assert '<' not in sentence
print('done')
"""


def test_training_and_inference(tmp_path, vocab_file):
    """In a Python of its own at the root, with the whole synthetic set."""
    start = f"""
    import os
    os.environ['TORCH_HOME'] = {str(tmp_path / "none")!r}  # no weights there: the encoder is randomly initialised
    os.environ['NO_PROXY'] = '*'
    folder, vocab_file = {str(tmp_path)!r}, {str(vocab_file)!r}
    """
    code = "\n".join([textwrap.dedent(start), TRANSFORM, TRAINING, INFERENCE])
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "done"
    assert "could not download the ImageNet weights" in result.stderr
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["decoder-1.pkl", "encoder-1.pkl"]


def test_the_checkouts_vocabulary_is_there_for_the_calls_that_name_none(few_scenes, tmp_path, monkeypatch):
    """`vocab_from_file=True` and no file: this project's own `vocab.pkl`, wherever the notebook lies."""
    monkeypatch.chdir(tmp_path)
    lines = """
    from data_loader import get_loader
    data_loader = get_loader(transform=transform_train, mode='train', batch_size=10, vocab_from_file=True)
    orig_image, image = next(iter(get_loader(transform=transform_train, mode='test')))
    """
    done = run(TRANSFORM, lines)
    assert done["data_loader"].dataset.vocab == Vocabulary.load(ROOT / "vocab.pkl")
    assert done["orig_image"].shape == (1, 64, 64, 3)
    assert list(tmp_path.iterdir()) == []


def test_workers_and_a_replaced_sampler(few_scenes, vocab_file):
    lines = """
    import torch.utils.data as data
    from data_loader import get_loader
    data_loader = get_loader(transform_train, 'train', 64, 5, vocab_file, '<start>', '<end>', '<unk>', True, 2)
    for _ in range(3):
        indices = data_loader.dataset.get_train_indices()
        data_loader.batch_sampler.sampler = data.sampler.SubsetRandomSampler(indices=indices)
        images, captions = next(iter(data_loader))
        assert images.shape == (64, 3, 56, 56)
        wanted = sorted(data_loader.dataset.caption_ids(i).tolist() for i in indices)
        assert sorted(captions.tolist()) == wanted
    """
    run(TRANSFORM, lines, vocab_file=str(vocab_file))
