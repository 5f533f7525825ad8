"""The cells of the Udacity course's notebooks, in their order, on COCO in the course's layout; and their surprises.

The cells are those that a reader of the notebooks types, written for this test. `/opt` is a folder of the test.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import textwrap
import warnings
from pathlib import Path

import pytest

from showtell import data_loader, synthetic, vocabulary
from showtell.data_loader import get_loader
from showtell.errors import MissingFileError, UserError
from showtell.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
PLACES = data_loader.COCO_FOLDERS  # the fixture below moves the first into a folder of the test


@pytest.fixture(autouse=True)
def a_new_process(monkeypatch, tmp_path):
    """An empty current folder, no vocabulary built, no weights to be found, and no `/opt/cocoapi` of this machine."""
    monkeypatch.setattr(vocabulary, "_built", None)
    monkeypatch.setattr(data_loader, "COCO_FOLDERS", (str(tmp_path / "opt/cocoapi"), *PLACES[1:]))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture(scope="module")
def drawn_coco(tmp_path_factory) -> Path:
    """Generated COCO: 60 images to train on and 5 to validate, five captions each."""
    folder = tmp_path_factory.mktemp("coco")
    synthetic.export_coco(folder, 60, 5, 48)
    return folder


def install(coco: Path, folder: Path) -> Path:
    """Lay COCO 2017 out as the course has COCO 2014: `annotations/captions_train2014.json`, `images/train2014/`."""
    for split in ("train", "val"):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / f"{split}2014").symlink_to(coco / f"{split}2017")
        (folder / "annotations").mkdir(exist_ok=True)
        shutil.copy(coco / f"annotations/captions_{split}2017.json", folder / f"annotations/captions_{split}2014.json")
    return folder


def run(*cells: str, **names: object) -> dict:
    """Run cells one after the other in one namespace; `names` are there from the start."""
    for number, cell in enumerate(cells, 1):
        exec(compile(textwrap.dedent(cell), f"<cell {number}>", "exec"), names)
    return names


PRELIMINARIES = (
    """
    from torchvision import transforms
    from data_loader import get_loader

    transform_train = transforms.Compose([
        transforms.Resize(image_size + 32), transforms.RandomCrop(image_size), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    vocab_threshold = 5
    batch_size = 10
    data_loader = get_loader(transform=transform_train, mode='train', batch_size=batch_size,
                             vocab_threshold=vocab_threshold, vocab_from_file=False)
    five = len(data_loader.dataset.vocab)
    """,
    """
    import torch
    sample_caption = 'A person doing a trick on a rail while riding a skateboard.'
    sample_tokens = data_loader.dataset.vocab.tokenize(sample_caption)
    ids = []
    ids.append(data_loader.dataset.vocab(data_loader.dataset.vocab.start_word))
    ids.extend([data_loader.dataset.vocab(token) for token in sample_tokens])
    ids.append(data_loader.dataset.vocab(data_loader.dataset.vocab.end_word))
    ids = torch.Tensor(ids).long()
    assert ids[0] == 0 and ids[-1] == 1 and len(ids) == 15
    assert dict(list(data_loader.dataset.vocab.word2idx.items())[:3]) == {'<start>': 0, '<end>': 1, '<unk>': 2}
    """,
    """
    vocab_threshold = 4
    data_loader = get_loader(transform=transform_train, mode='train', batch_size=batch_size,
                             vocab_threshold=vocab_threshold, vocab_from_file=False)
    four = len(data_loader.dataset.vocab)
    assert four >= five
    unk_word = data_loader.dataset.vocab.unk_word
    assert data_loader.dataset.vocab(unk_word) == data_loader.dataset.vocab('jfkafejw') == 2
    """,
    """
    data_loader = get_loader(transform=transform_train, mode='train', batch_size=batch_size, vocab_from_file=True)
    assert len(data_loader.dataset.vocab) == four
    """,
    """
    from collections import Counter
    counter = Counter(data_loader.dataset.caption_lengths)
    lengths = sorted(counter.items(), key=lambda pair: pair[1], reverse=True)
    assert sum(count for value, count in lengths) == len(data_loader.dataset)
    """,
    """
    import numpy as np
    import torch.utils.data as data
    indices = data_loader.dataset.get_train_indices()
    assert len(indices) == batch_size
    new_sampler = data.sampler.SubsetRandomSampler(indices=indices)
    data_loader.batch_sampler.sampler = new_sampler
    images, captions = next(iter(data_loader))
    assert images.shape == (10, 3, image_size, image_size)
    assert captions.shape == (10, data_loader.dataset.caption_lengths[indices[0]] + 2)
    """,
    """
    from model import EncoderCNN, DecoderRNN
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    embed_size = 256
    encoder = EncoderCNN(embed_size)
    encoder.to(device)
    images = images.to(device)
    features = encoder(images)
    assert type(features) == torch.Tensor
    assert features.shape[0] == batch_size and features.shape[1] == embed_size
    hidden_size = 512
    vocab_size = len(data_loader.dataset.vocab)
    decoder = DecoderRNN(embed_size, hidden_size, vocab_size)
    decoder.to(device)
    captions = captions.to(device)
    outputs = decoder(features, captions)
    assert type(outputs) == torch.Tensor
    assert outputs.shape == (batch_size, captions.shape[1], vocab_size)
    """,
)

TRAINING = (
    """
    import math
    import os
    import torch.nn as nn
    batch_size, num_epochs, save_every, print_every, log_file = 16, 1, 1, 100, 'training_log.txt'
    data_loader = get_loader(transform=transform_train, mode='train', batch_size=batch_size,
                             vocab_threshold=vocab_threshold, vocab_from_file=True)
    vocab_size = len(data_loader.dataset.vocab)
    encoder = EncoderCNN(embed_size)
    decoder = DecoderRNN(embed_size, hidden_size, vocab_size)
    encoder.to(device)
    decoder.to(device)
    criterion = nn.CrossEntropyLoss().cuda() if torch.cuda.is_available() else nn.CrossEntropyLoss()
    params = list(decoder.parameters()) + list(encoder.embed.parameters())
    optimizer = torch.optim.Adam(params, lr=0.001)
    total_step = math.ceil(len(data_loader.dataset.caption_lengths) / data_loader.batch_sampler.batch_size)
    assert total_step == math.ceil(len(data_loader.dataset) / 16)
    """,
    """
    f = open(log_file, 'w')
    losses = []
    for epoch in range(1, num_epochs + 1):
        for i_step in range(1, 6):  # of total_step
            indices = data_loader.dataset.get_train_indices()
            new_sampler = data.sampler.SubsetRandomSampler(indices=indices)
            data_loader.batch_sampler.sampler = new_sampler
            images, captions = next(iter(data_loader))
            images = images.to(device)
            captions = captions.to(device)
            decoder.zero_grad()
            encoder.zero_grad()
            features = encoder(images)
            outputs = decoder(features, captions)
            loss = criterion(outputs.view(-1, vocab_size), captions.view(-1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            stats = 'Epoch [%d/%d], Step [%d/%d], Loss: %.4f, Perplexity: %5.4f' % (
                epoch, num_epochs, i_step, total_step, loss.item(), np.exp(loss.item()))
            f.write(stats + '\\n')
            f.flush()
        if epoch % save_every == 0:
            torch.save(decoder.state_dict(), os.path.join('./models', 'decoder-%d.pkl' % epoch))
            torch.save(encoder.state_dict(), os.path.join('./models', 'encoder-%d.pkl' % epoch))
    f.close()
    assert abs(losses[0] - math.log(vocab_size)) < 0.5 and losses[-1] < losses[0], losses
    assert all(p.grad is None for p in encoder.backbone.parameters())
    """,
)

INFERENCE = (
    """
    transform_test = transforms.Compose([
        transforms.Resize((image_size, image_size)), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    data_loader = get_loader(transform=transform_test, mode='test')
    orig_image, image = next(iter(data_loader))
    assert np.squeeze(orig_image).ndim == 3 and np.squeeze(orig_image).shape[2] == 3
    """,
    """
    trained = decoder
    encoder_file, decoder_file = 'encoder-1.pkl', 'decoder-1.pkl'
    vocab_size = len(data_loader.dataset.vocab)
    encoder = EncoderCNN(embed_size)
    encoder.eval()
    decoder = DecoderRNN(embed_size, hidden_size, vocab_size)
    decoder.eval()
    encoder.load_state_dict(torch.load(os.path.join('./models', encoder_file)))
    decoder.load_state_dict(torch.load(os.path.join('./models', decoder_file)))
    encoder.to(device)
    decoder.to(device)
    assert all(torch.equal(a, b) for a, b in zip(decoder.parameters(), trained.parameters()))
    image = image.to(device)
    features = encoder(image).unsqueeze(1)
    output = decoder.sample(features)
    assert type(output) == list and all(type(x) == int for x in output)
    assert all(x in data_loader.dataset.vocab.idx2word for x in output)
    assert output[0] == 0 and len(output) <= 22 and (1 not in output or output.index(1) == len(output) - 1)
    assert output == decoder.sample(features)
    sentence = data_loader.dataset.vocab.decode(output)
    assert '<' not in sentence
    """,
)


def run_the_course(coco: Path, opt: Path, image_size: int) -> dict:
    """Run the notebooks 1 to 3; return their names, after what all of them promise has been checked."""
    install(coco, opt / "cocoapi")
    Path("models").mkdir()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = run(*PRELIMINARIES, *TRAINING, *INFERENCE, image_size=image_size)
    assert not [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "vocab" in str(w.message)]
    made = {str(path) for path in Path().rglob("*") if path.is_file()}
    assert made == {"models/decoder-1.pkl", "models/encoder-1.pkl", "runs/vocab.pkl", "training_log.txt"}
    line = r"Epoch \[1/1\], Step \[\d/\d+\], Loss: \d\.\d{4}, Perplexity: +\d+\.\d{4}"
    assert [bool(re.fullmatch(line, text)) for text in Path("training_log.txt").read_text().splitlines()] == [True] * 5
    assert done["data_loader"].dataset.caption_set.name == "coco"
    return done


def test_the_courses_cells_on_generated_coco(drawn_coco, tmp_path):
    done = run_the_course(drawn_coco, tmp_path / "opt", 64)
    assert len(done["data_loader"].dataset) == 5


def test_the_courses_cells_on_coco_small(shared_data, tmp_path):
    done = run_the_course(shared_data / "coco_small", tmp_path / "opt", 128)
    assert (done["five"], done["four"], len(done["data_loader"].dataset)) == (949, 1137, 150)


@pytest.mark.parametrize("mode", ["train", "val", "test"])
def test_no_folder_never_means_drawn_shapes(mode, drawn_coco):
    places = ["/opt/cocoapi", "data/coco", "data/coco2017", "data/coco2014"]
    ways = ["showtell download coco2017", "cocoapi_loc=", 'dataset="synthetic"']
    with pytest.raises(MissingFileError) as caught:
        get_loader(mode=mode, vocab_from_file=mode != "train")
    assert [word for word in [*places, *ways] if word not in str(caught.value)] == []
    assert list(PLACES) == places
    assert "\n" not in str(caught.value)
    assert list(Path().iterdir()) == []
    vocab = Vocabulary.build(["a circle"], 1)
    for place in ("data/coco2014", "data/coco2017", "data/coco"):  # each before those of the lines above
        install(drawn_coco, Path(place))
        captions = get_loader(mode=mode, vocab=vocab).dataset.caption_set
        assert (captions.name, captions.folder.split("/images")[0]) == ("coco", place)


@pytest.fixture
def coco(drawn_coco, tmp_path) -> dict:
    """Arguments of `get_loader` for generated COCO elsewhere."""
    install(drawn_coco, tmp_path / "my/cocoapi")
    return {"cocoapi_loc": tmp_path / "my"}


def test_a_built_vocabulary_is_saved_and_is_the_one_that_is_loaded_next(coco, capsys, monkeypatch):
    """Also where a `vocab.pkl` lies in the folder, and in a process that begins later."""
    Vocabulary.build(["somebody else's words"], 1).save("vocab.pkl")
    before = Path("vocab.pkl").read_bytes()
    built = get_loader(vocab_threshold=5, vocab_from_file=False, **coco).dataset.vocab
    said = f"vocabulary of {len(built)} words (threshold 5)"
    assert capsys.readouterr().out == f"{said} saved in {Path('runs/vocab.pkl')}\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_loader(vocab_from_file=True, **coco).dataset.vocab == built
        assert said in capsys.readouterr().out
        monkeypatch.setattr(vocabulary, "_built", None)
        assert get_loader(mode="test", **coco).dataset.vocab == built
        mine = get_loader(vocab_threshold=30, vocab_file="my.pkl", vocab_from_file=False, **coco).dataset.vocab
        assert len(mine) < len(built)
        assert get_loader(vocab_from_file=True, **coco).dataset.vocab == mine == Vocabulary.load("my.pkl")
    assert Path("vocab.pkl").read_bytes() == before


@pytest.fixture
def five_and_thirty(coco) -> list[Vocabulary]:
    """The vocabularies of two thresholds, built one after the other and saved in 5.pkl and 30.pkl."""
    options = {"vocab_from_file": False, **coco}
    return [get_loader(vocab_threshold=n, vocab_file=f"{n}.pkl", **options).dataset.vocab for n in (5, 30)]


def test_another_vocabulary_than_the_one_just_built_is_a_warning_with_both_counts(coco, five_and_thirty):
    five, thirty = five_and_thirty
    assert len(five) > len(thirty)
    counts = rf"5\.pkl has {len(five)} words \(threshold 5\), not the {len(thirty)} \(threshold 30\) .*30\.pkl'"
    with pytest.warns(UserWarning, match=counts) as caught:
        assert get_loader(vocab_file="5.pkl", **coco).dataset.vocab == five
    assert len(caught) == 1


def test_another_threshold_than_the_files_is_a_warning_with_both_counts(coco, five_and_thirty, monkeypatch):
    five, thirty = five_and_thirty
    monkeypatch.setattr(vocabulary, "_built", None)
    counts = (
        rf"30\.pkl was built with threshold 30, not 5: it has {len(thirty)} words, and these captions give {len(five)} "
    )
    with pytest.warns(UserWarning, match=counts) as caught:
        assert get_loader(vocab_threshold=5, vocab_file="30.pkl", **coco).dataset.vocab == thirty
    assert len(caught) == 1


@pytest.mark.parametrize("name", ["vocab.pkl", "./vocab.pkl", "../here/vocab.pkl", "link.pkl"])
def test_the_projects_own_vocabulary_is_never_replaced(name, coco, monkeypatch):
    Path("vocab.pkl").write_bytes(b"ours")
    Path("link.pkl").symlink_to("vocab.pkl")
    monkeypatch.setattr(vocabulary, "_OWN_FILES", (Path("vocab.pkl").resolve(),))
    with pytest.raises(UserError, match=r"is showtell's own vocabulary and is not replaced; give another vocab_file"):
        get_loader(vocab_file=name, vocab_from_file=False, **coco)
    get_loader(vocab_from_file=False, **coco)
    assert Path("vocab.pkl").read_bytes() == b"ours"


def test_the_files_that_are_never_replaced_are_those_of_the_checkout_and_of_the_package():
    assert vocabulary._OWN_FILES == (ROOT / "showtell" / "vocab.pkl", ROOT / "vocab.pkl")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            "Vocabulary(5, './vocab.pkl', '<start>', '<end>', '<unk>', 'captions_train2014.json', False)",
            "Vocabulary.load",
        ),
        ("Vocabulary(vocab_threshold=5, vocab_file='./vocab.pkl', vocab_from_file=True)", "Vocabulary.load"),
        ("Vocabulary(5)", r"Vocabulary\.build\(captions, threshold=5, tokenizer='treebank'\)"),
        (
            "CoCoDataset(None, 'train', 10, 5, './vocab.pkl', '<start>', '<end>', '<unk>', 'a.json', False, 'i')",
            "get_loader",
        ),
        ("CoCoDataset(transform=None, mode='train')", r"get_loader\(transform, mode, .*\)\.dataset"),
    ],
)
def test_the_courses_constructors_say_what_to_write(call, sentence):
    with pytest.raises(UserError, match=f"write .*{sentence}"):
        run(f"from data_loader import CoCoDataset\nfrom vocabulary import Vocabulary\n{call}")


PAGE = (ROOT / "docs" / "from_other_repositories.md").read_text("utf-8")


def test_what_the_page_says_of_the_magic_with_a_blank():
    """That it does not load the extension under this IPython, and that what the page says to type does."""
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    broken, typed = re.search(r"\| `(% load_ext autoreload)` \|.* type `(.*?)`", PAGE).groups()
    assert type(shell.run_cell(broken).error_in_exec).__name__ in PAGE
    assert shell.run_cell(typed).success


def test_what_the_page_says_of_nltk():
    """That this NLTK asks for `punkt_tab`; and that `vocab.tokenize` does without."""
    tokenize = pytest.importorskip("nltk.tokenize")
    assert "`nltk.download('punkt_tab')`" in PAGE
    with pytest.raises(LookupError, match="punkt_tab"):
        tokenize.PunktTokenizer("nosuchlanguage")
    assert Vocabulary(tokenizer="treebank").tokenize("A dog, running.") == ["a", "dog", ",", "running", "."]


def ignored(*names: str) -> list[bool]:
    command = ["git", "check-ignore", "--no-index", "--quiet"]
    codes = [subprocess.run([*command, name], cwd=ROOT, capture_output=True).returncode for name in names]
    if 128 in codes:
        pytest.skip("not a git checkout")
    return [code == 0 for code in codes]


def test_git_ignores_what_training_saves_and_not_the_released_models():
    saved = ("encoder-1.pkl", "decoder-3.pkl", "model.pt", "checkpoint.pth")
    assert all(ignored(*(f"models/{name}" for name in saved), "runs/vocab.pkl", "training_log.txt"))
    assert not any(ignored("models/showtell-classic-1.safetensors", "models/README.md", "vocab.pkl"))


def test_workers_and_a_replaced_sampler(coco):
    lines = """
    import torch.utils.data as data
    from data_loader import get_loader
    get_loader(None, 'train', 4, 5, 'my.pkl', vocab_from_file=False, cocoapi_loc=cocoapi_loc)
    data_loader = get_loader(None, 'train', 64, 5, 'my.pkl', '<start>', '<end>', '<unk>', True, 2, cocoapi_loc)
    for _ in range(3):
        indices = data_loader.dataset.get_train_indices()
        data_loader.batch_sampler.sampler = data.sampler.SubsetRandomSampler(indices=indices)
        images, captions = next(iter(data_loader))
        assert images.shape == (64, 3, 48, 48)
        wanted = sorted(data_loader.dataset.caption_ids(i).tolist() for i in indices)
        assert sorted(captions.tolist()) == wanted
    """
    run(lines, **coco)
