"""The vocabulary: ids, sentences, warnings before training, files that execute nothing, files of other projects."""

from __future__ import annotations

import copyreg
import gzip
import os
import pickle
import pickletools
import re
import struct
import sys
import time
import types
from itertools import accumulate, chain, islice, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from showtell.errors import MissingFileError, UserError
from showtell.tokenizer import DEFAULT_TOKENIZER, TOKENIZERS
from showtell.vocabulary import Vocabulary, join_words, spell_words

CAPTIONS = ["A dog runs.", "a Dog and a cat", "the cat runs away"]


@pytest.fixture
def vocab():
    return Vocabulary.build(CAPTIONS, 1, "treebank")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vocab.pkl"


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A folder that every hostile pickle below tries to create, by its name in the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "trace"


# ---- Words and ids -----------------------------------------------------------------------------------------------


def test_the_special_words_come_first_and_then_the_words_as_first_seen(vocab):
    assert list(vocab.word2idx) == ["<start>", "<end>", "<unk>", "a", "dog", "runs", ".", "and", "cat", "the", "away"]
    assert list(vocab.word2idx.values()) == list(range(len(vocab))) == list(vocab.idx2word)
    assert [vocab.idx2word[i] for i in range(len(vocab))] == list(vocab.word2idx)
    assert (vocab.start_id, vocab.end_id, vocab.unk_id) == (0, 1, 2)
    assert [vocab(word) for word in (vocab.start_word, vocab.end_word, vocab.unk_word)] == [0, 1, 2]
    assert ("cat" in vocab, "Cat" in vocab) == (True, False)


# a: 3; dog, runs, cat: 2; and, the, away: 1
@pytest.mark.parametrize(("threshold", "words"), [(1, 7), (2, 4), (3, 1), (4, 0)])
def test_words_below_the_threshold_are_left_out(threshold, words):
    vocab = Vocabulary.build(CAPTIONS, threshold)
    assert len(vocab) == 3 + words
    assert vocab.threshold == threshold
    assert vocab.tokenizer == Vocabulary().tokenizer == DEFAULT_TOKENIZER == "unicode"


def test_an_unknown_word_is_unk_and_a_new_one_takes_the_next_id(vocab):
    assert vocab("jfkafejw") == vocab.unk_id == 2
    assert [vocab.add_word(word) for word in ("bird", "bird", "a")] == [11, 11, 3]
    assert vocab("bird") == 11
    assert vocab.idx2word[11] == "bird"
    assert len(vocab) == 12


def test_progress_goes_to_standard_error(capsys, vocab):
    assert Vocabulary.build(CAPTIONS, 1, "treebank", progress=True) == vocab
    out, err = capsys.readouterr()
    assert out == ""
    assert "3.00/3.00" in err


def test_vocabularies_are_equal_when_their_words_and_settings_are(vocab):
    words = list(vocab.word2idx)
    assert vocab == Vocabulary(words, 1, "treebank") == Vocabulary.from_dict(vocab.to_dict())
    assert vocab != Vocabulary(words, 2, "treebank")
    assert vocab != Vocabulary(words, 1, "words")
    assert vocab.to_dict() == {"words": words, "threshold": 1, "tokenizer": "treebank"}
    assert vocab != list(vocab.word2idx)
    assert repr(vocab) == "Vocabulary(11 words, threshold=1, tokenizer='treebank')"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Vocabulary(["<start>", "<end>", "<unk>", "dog", "dog"]), "'dog' occurs twice"),
        (lambda: Vocabulary(["<end>", "dog"]), "has no <start>, <unk>; include <start>, <end> and <unk>"),
        (lambda: Vocabulary.build(CAPTIONS, tokenizer="bpe"), "choose one of ptb, treebank, unicode, words"),
        (lambda: Vocabulary.build(CAPTIONS, 0), "threshold is 0; give a whole number of at least 1"),
    ],
)
def test_impossible_vocabularies_are_refused(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


# ---- Warnings before training ------------------------------------------------------------------------------------


def test_ordinary_captions_give_no_concerns():
    from showtell.synthetic import describe, scene

    captions = [text for i in range(400) for text in describe(scene(i), n=5)]  # 38 words for 2,000 captions
    assert Vocabulary.build(captions, 5).concerns(captions) == []
    russian = ["маленькая собака бежит по белому снегу", "две девочки едут на красном велосипеде"] * 50
    assert Vocabulary.build(russian, 5).concerns(russian) == []
    assert Vocabulary().concerns([]) == []


def test_captions_without_words_are_reported():
    captions = ["a small dog runs over the snow near two red houses"] * 8 + ["🐕", "..."]
    (sentence,) = Vocabulary.build(captions, 5).concerns(captions)
    assert sentence.startswith("2 of 10 captions have no words for the tokeniser 'unicode' (the first is '🐕'); remove")
    russian = ["маленькая собака"] * 8
    (sentence,) = Vocabulary.build(russian, 5, "words").concerns(russian)
    assert sentence.startswith("8 of 8 captions have no words for the tokeniser 'words'")


@pytest.mark.parametrize(
    ("captions", "sentence"),
    [
        ([f"一只{a}狗在{b}上跑" for a in "大小黑白黄" for b in "草雪沙路水山桥船床椅"],  # nothing occurs five times
         r"\(threshold 5\) has 0 words for 50 captions with 1\.0 words on average, and 100% .* insert spaces"),
        (["一只狗在跑", "两只猫在睡", "三只鸟在飞"] * 5, r"has 3 words for 15 captions with 1\.0 words .* 0% of these"),
        (["a cat sleeps", "a dog sleeps"] * 50, r"has 4 words for 100 captions with 3\.0 words on average, and 0%"),
        ([f"the word number {i} of twelve is not like any of the others" for i in range(60)] +
         [f"lonely{i} unheard{i}" for i in range(60)], r"and 20% of these are <unk>; add captions or lower the thresh"),
    ],
)  # fmt: skip
def test_a_vocabulary_of_few_words_for_the_captions_is_reported(captions, sentence):
    (found,) = Vocabulary.build(captions, 5).concerns(captions)
    assert re.search(sentence, found)


# ---- Captions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_special_words_in_a_caption_are_not_encoded_as_such(tokenizer):
    vocab = Vocabulary.build(["a <end> b <start> <pad>"], 1, tokenizer)
    first, *ids, last = vocab.encode("a <end> b <start> <pad>")
    assert (first, last) == (0, 1)
    assert not {0, 1} & set(ids)


@pytest.mark.parametrize(
    "written",
    [
        "A person doing a trick on a rail while riding a skateboard.",  # the example of the course
        "A man, a dog; and a cat!",
        "Is it a dog? no: a cat...",
        "The man's dog isn't here and they're late",
        "I'm sure we've seen what he'd say she'll do",
        "Two girls' bikes",
        'A sign that says "stop" on it.',
        '"stop" says the sign',
        "A bus (red) and [two] {three}.",
        "A bill of $5, or 50% off",
        "Number #7 at 10:30",
        "A well-known black-and-white dog",
        "A .5 liter bottle",
        "Élan vital",
    ],
)
def test_a_decoded_caption_is_an_ordinary_sentence(written):
    for caption in (written, written.lower(), written.replace("...", " ...")):
        vocab = Vocabulary.build([caption], 1, "treebank")
        assert vocab.decode(vocab.encode(caption)) == written


def joined_by_substitution(words):
    """The definition of `join_words`: substitutions in the joined text."""
    text = re.sub(r"(?<=[(\[{$#]) |(?<=``) ", "", " ".join(words))
    text = re.sub(r" (?=(?:[.,!?;:%)\]}]+(?: |$)|'(?:s|m|d|ll|re|ve)?(?: |$)|n't\b|''))", "", text)
    text = text.replace("``", '"').replace("''", '"')
    return text[:1].upper() + text[1:]


SPELT = "a dog . , ; : ! ? 's 'd 'll 're n't '' `` ( ) [ ] { } $ # 5 % \" -- ... é ß".split(" ")


@given(st.lists(st.sampled_from(SPELT) | st.text(st.characters(exclude_characters="'` "), min_size=1, max_size=5)))
def test_pieces_are_one_per_word_and_join_to_the_caption(words):
    pieces = spell_words(words)
    assert len(pieces) == len(words)
    assert "".join(pieces) == join_words(words) == joined_by_substitution(words)


def test_encoding_and_decoding(vocab):
    """Decoding stops at `<end>`, shows no special word, and takes tensors."""
    assert vocab.encode("A cat runs.") == [0, 3, 8, 5, 6, 1]
    assert vocab.encode("A zebra runs.") == [0, 3, 2, 5, 6, 1]
    assert vocab.encode("") == [0, 1]
    assert vocab.decode([0, 3, 2, 4, 0, 5, 6, 1, 8, 8, 1]) == "A dog runs."
    assert vocab.words([0, 3, 2, 4, 0, 5, 6, 1, 8]) == ["a", "dog", "runs", "."]
    assert vocab.decode([3, 4, 5]) == "A dog runs"  # never reached its end
    assert vocab.decode([0, 1]) == vocab.decode([]) == ""
    torch = pytest.importorskip("torch")
    assert vocab.decode(torch.tensor([0, 3, 4, 1])) == "A dog"
    with pytest.raises(UserError, match="the id 11 is not in this vocabulary of 11 words"):
        vocab.decode([0, 3, 11])


@given(st.text() | st.text("ab '\"`.,()<>-$n't", max_size=30), st.sampled_from(sorted(TOKENIZERS)))
def test_any_text_is_encoded_and_decoded(text, tokenizer):
    vocab = Vocabulary.build([text], 1, tokenizer)
    ids = vocab.encode(text)
    assert (ids[0], ids[-1]) == (0, 1)
    assert set(ids) <= vocab.idx2word.keys()
    words = [word for word in vocab.tokenize(text) if word not in ("<start>", "<end>", "<unk>", "<pad>")]
    assert vocab.words(ids) == words
    written = vocab.decode(ids)
    without = str.maketrans("", "", " `'\"")  # spaces and quotes are what spelling changes, and the first capital
    assert written.upper().translate(without) == "".join(words).upper().translate(without)
    assert Vocabulary.build(["a"], 1, tokenizer).encode(text)[1:-1] == [
        3 if word == "a" else 2 for word in vocab.tokenize(text)
    ]


# ---- Our own files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_saved_and_loaded(tmp_path, tokenizer):
    vocab = Vocabulary.build([*CAPTIONS, "ein Bär fährt Fahrrad 🚲"], 1, tokenizer)
    vocab.save(tmp_path / "new" / "vocab.pkl")
    loaded = Vocabulary.load(str(tmp_path / "new" / "vocab.pkl"))
    assert loaded == vocab
    assert loaded.idx2word == vocab.idx2word
    assert os.listdir(tmp_path / "new") == ["vocab.pkl"]


def test_the_file_names_no_class_and_no_path(vocab, path):
    vocab.save(path)
    data = path.read_bytes()
    used = {opcode.name for opcode, _, _ in pickletools.genops(data)}
    assert not used & {"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "REDUCE", "BUILD", "EXT1", "PERSID"}
    assert pickle.loads(data)["words"] == list(vocab.word2idx)
    assert str(path.parent).encode() not in data


def test_a_failing_write_leaves_the_old_file(vocab, path, monkeypatch):
    vocab.save(path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        Vocabulary().save(path)
    monkeypatch.undo()
    assert Vocabulary.load(path) == vocab
    assert os.listdir(path.parent) == ["vocab.pkl"]


def test_an_extended_vocabulary_keeps_its_ids_and_adds_words():
    special = ("<start>", "<end>", "<unk>")
    ours, theirs = Vocabulary([*special, "a", "dog"], 5), Vocabulary([*special, "runs", "a"], 2)
    assert ours.extended(theirs).to_dict() == {**theirs.to_dict(), "words": [*special, "a", "dog", "runs"]}
    padded = Vocabulary(["<pad>", *special, "a"])
    assert list(padded.extended(theirs).word2idx) == ["<pad>", *special, "a", "runs"]
    with pytest.raises(UserError, match=r"'unicode' and the new one 'treebank'; add --set tokenizer=unicode, or --new"):
        ours.extended(Vocabulary(tokenizer="treebank"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes and devices")
def test_only_a_regular_file_is_opened(tmp_path):
    with pytest.raises(MissingFileError, match=r"no vocabulary at .*nothing\.pkl; build one with Vocabulary\.build"):
        Vocabulary.load(tmp_path / "nothing.pkl")
    with pytest.raises(UserError, match="is a folder, not a vocabulary; build one"):
        Vocabulary.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.pkl")
    for path in (tmp_path / "pipe.pkl", "/dev/zero"):
        with pytest.raises(UserError, match="is no regular file"):
            Vocabulary.load(path)


OURS = {"format": "showtell-vocabulary", "version": 1, "threshold": 1, "tokenizer": "words"}
OURS["words"] = ["<start>", "<end>", "<unk>", "a"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (OURS | {"version": 2}, "format version other than 1"),
        (OURS | {"words": "<start>"}, "words that are not text"),
        (OURS | {"words": [*OURS["words"], 7]}, "words that are not text"),
        (OURS | {"words": None}, "words that are not text"),
        (OURS | {"tokenizer": []}, "words that are not text"),
        (OURS | {"tokenizer": "bpe"}, "no tokeniser is called 'bpe'"),
        (OURS | {"words": ["a"]}, "has no <start>, <end>, <unk>"),
        (OURS | {"words": OURS["words"] * 2}, "'<start>' occurs twice"),
        ({"words": ["a"]}, "is not a vocabulary"),
        ({"word2idx": ["a"]}, "is not a vocabulary"),
        ({"word2idx": {"a": "b"}}, "is not a vocabulary"),
        ({"word2idx": {"<start>": 0, "<end>": 1, "<unk>": 3}}, "do not run from 0 to 2"),
        ({"word2idx": {"<start>": 0, "<end>": 1, "<unk>": 1}}, "do not run from 0 to 2"),
        ({"word2idx": {"<start>": 0, "<end>": 1, 7: 2}}, "words that are not text"),
        ({"word2idx": {}}, "has no <start>"),
        ([1, 2], "is not a vocabulary"),
        (None, "is not a vocabulary"),
    ],
)
def test_a_file_of_something_else_is_refused_with_its_path(path, content, sentence):
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=sentence) as caught:
        Vocabulary.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plain_dict_of_words_is_a_vocabulary_too(path):
    path.write_bytes(pickle.dumps({"word2idx": {"<end>": 0, "<unk>": 2, "<start>": 1}}))
    vocab = Vocabulary.load(path)
    assert (vocab.start_id, vocab.end_id, vocab.unk_id) == (1, 0, 2)
    assert vocab.threshold is None


# ---- Files of other projects -------------------------------------------------------------------------------------


FOREIGN = {  # words in the order of their ids, and the ids of the special ones
    "course": (["<start>", "<end>", "<unk>", "a", "dog", "café"], (0, 1, 2)),
    "padded": (["<pad>", "<start>", "<end>", "<unk>", "a", "dog", "café"], (1, 2, 3)),
    "scattered": (["a", "<unk>", "dog", "<end>", "café", "<pad>", "<start>"], (6, 3, 1)),
}


def foreign_pickle(module: str, protocol: int, words: list[str], monkeypatch) -> bytes:
    """A pickled object of a class `Vocabulary` in that module, which exists only while pickling."""
    kind = type("Vocabulary", (), {"__module__": module})
    old = kind()
    old.vocab_threshold, old.vocab_file, old.vocab_from_file = 4, "./vocab.pkl", False
    old.start_word, old.end_word, old.unk_word = "<start>", "<end>", "<unk>"
    old.annotations_file = "/opt/cocoapi/annotations/captions_train2014.json"
    old.word2idx = {word: i for i, word in enumerate(words)}
    old.idx2word = dict(enumerate(words))
    old.idx = len(words)
    with monkeypatch.context() as patch:
        for name in accumulate(module.split("."), "{}.{}".format):
            patch.setitem(sys.modules, name, sys.modules.get(name, types.ModuleType(name)))
        patch.setattr(sys.modules[module], "Vocabulary", kind, raising=False)
        return pickle.dumps(old, protocol)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("module", ["vocabulary", "build_vocab", "__main__", "deep.inside.vocab"])
def test_a_foreign_pickle_keeps_its_own_ids(path, monkeypatch, module, protocol, kind):
    words, specials = FOREIGN[kind]
    path.write_bytes(foreign_pickle(module, protocol, words, monkeypatch))
    vocab = Vocabulary.load(path)
    assert list(vocab.word2idx.items()) == [(word, i) for i, word in enumerate(words)]
    assert vocab.idx2word == dict(enumerate(words))
    assert (vocab.start_id, vocab.end_id, vocab.unk_id) == specials
    assert (vocab.threshold, vocab.tokenizer) == (4, "treebank")
    start, end, unk = specials
    assert vocab.encode("a Dog zebra") == [start, vocab("a"), vocab("dog"), unk, end]
    assert vocab.decode([start, vocab("a"), vocab("dog"), end, vocab("a")]) == "A dog"
    if "<pad>" in vocab:
        assert vocab.decode([start, vocab("a"), vocab("<pad>"), vocab("dog")]) == "A dog"


OLD_STYLE_CLASS = (
    b"(i__main__\nVocabulary\n(dS'word2idx'\n(dS'<start>'\nI0\nsS'<end>'\nI1\nsS'<unk>'\nI2\nsS'a'\nI3\nssb."
)
NEW_STYLE_CLASS = (
    b"ccopy_reg\n_reconstructor\n(cbuild_vocab\nVocabulary\nc__builtin__\nobject\nNtR(dS'word2idx'\n"
    b"(dS'<start>'\nI0\nsS'<end>'\nI1\nsS'<unk>'\nI2\nsS'caf\\xc3\\xa9'\nI3\nssb."
)


@pytest.mark.parametrize(("data", "word"), [(OLD_STYLE_CLASS, "a"), (NEW_STYLE_CLASS, "café")])
def test_a_file_of_python_2_is_read(path, data, word):
    path.write_bytes(data)
    assert list(Vocabulary.load(path).word2idx) == ["<start>", "<end>", "<unk>", word]


# ---- Hostile and damaged files -----------------------------------------------------------------------------------


class Calls:
    """Pickle to a call of `function`, as a hostile file would."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def stack_global(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


HOSTILE = {
    "os.system": pickle.dumps(Calls(os.system, "mkdir trace")),
    "os.mkdir": pickle.dumps(Calls(os.mkdir, "trace"), 0),
    "eval": pickle.dumps(Calls(eval, "__import__('os').mkdir('trace')")),
    "exec": pickle.dumps(Calls(exec, "import os; os.mkdir('trace')"), 2),
    "getattr": pickle.dumps(Calls(getattr, "a", "upper")),
    "getattr of a module": b"cbuiltins\ngetattr\n(cos\nmkdir\nS'__call__'\ntR(S'trace'\ntR.",
    "import": pickle.dumps(Calls(__import__, "antigravity")),
    "python 2": b"cposix\nmkdir\n(S'trace'\ntR.",
    "instance": b"(S'trace'\nios\nmkdir\n.",
    "object": b"(cos\nmkdir\nS'trace'\no.",
    "newobj": b"\x80\x02cos\nmkdir\nU\x05trace\x85\x81.",
    "protocol 4": b"\x80\x04" + stack_global("os", "mkdir") + short("trace") + b"\x85R.",
    "dotted": b"\x80\x04" + stack_global("showtell.files", "os.mkdir") + short("trace") + b"\x85R.",
    "dunder": b"\x80\x04" + stack_global("builtins", "object.__subclasses__") + b")R.",
    "our own stand-in's module": b"\x80\x04" + stack_global("showtell.vocabulary", "_PlainUnpickler") + b")R.",
    "inside a vocabulary": pickle.dumps(OURS | {"extra": Calls(os.mkdir, "trace")}),
    "torch": b"ctorch\nload\n(S'trace'\ntR.",
    "codec": pickle.dumps(Calls(copyreg._reconstructor, os.PathLike, object, None)),
    "escape codes": b"\x80\x04" + stack_global("os\x1b[2J", "system\n") + b".",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_not_executed(path, trace, name):
    path.write_bytes(HOSTILE[name])
    before = set(sys.modules)
    with pytest.raises(UserError, match=r"it names \S+\.\S+, and none of it was executed; build one") as caught:
        Vocabulary.load(path)
    assert str(caught.value).isprintable()
    assert not trace.exists()
    assert set(sys.modules) == before


def test_the_hostile_pickles_work_with_an_unsafe_unpickler(trace):
    for name in ("os.mkdir", "exec", "dotted", "instance", "object", "protocol 4", "getattr of a module"):
        pickle.loads(HOSTILE[name])
        assert trace.is_dir(), name
        trace.rmdir()


STAND_IN = b"cos\nsystem.Vocabulary\n"
DISGUISED = {
    "a call of a name that ends in Vocabulary": b"".join(
        [b"\x80\x04", stack_global("os", "system.Vocabulary"), short("mkdir trace"), b"\x85R."]
    ),
    "a module called Vocabulary": b"cVocabulary\nVocabulary\n(S'mkdir trace'\ntR.",
    "the stand-in's attributes are called": STAND_IN + b"(tR(dS'__setstate__'\ncx\nVocabulary\nsbS'mkdir trace'\nb.",
    "the stand-in itself is changed": STAND_IN + b"p0\n(N(dS'__init__'\nNsS'__eq__'\nNsS'word2idx'\n(dsttb0g0\n.",
    "a list that is called": b"]S'mkdir trace'\n\x85R.",
    "a text that is built": b"S'os'\n(dS'system'\nS'trace'\nsb.",
    "a reconstructor of anything": b"ccopyreg\n_reconstructor\n(cx\nVocabulary\nNNtR.",
    "a persistent id": b"Pos.system\n.",
    "an extension": b"\x82\x01.",
    "a memo never filled": b"g7\n.",
}


@pytest.mark.parametrize("name", DISGUISED)
def test_a_pickle_disguised_by_an_allowed_name_executes_nothing(path, trace, name):
    path.write_bytes(DISGUISED[name])
    with pytest.raises(UserError, match=r"is not a vocabulary|is damaged or not a pickle"):
        Vocabulary.load(path)
    assert not trace.exists()
    path.write_bytes(OLD_STYLE_CLASS)  # the next file is read as before
    assert len(Vocabulary.load(path)) == 4


def test_one_damaged_byte_does_not_allocate_gigabytes(path):
    """The unpickler in C allocates the memo for its largest index: here 34 gigabytes."""
    path.write_bytes(b"]r" + struct.pack("<I", 2**32 - 16) + b".")
    with pytest.raises(UserError, match="is not a vocabulary"):
        Vocabulary.load(path)


# bytes, text, a byte array and a frame, longer than the file
LONGER = [b"\x80\x05" + opcode + struct.pack("<Q", 2**37) + b"abc." for opcode in (b"\x8e", b"\x8d", b"\x96", b"\x95")]
NO_PICKLES = [b"", b"\x80", b".", b"not a pickle", b"PK\x03\x04", b"\x80\x63.", b'{"word2idx": {}}', b"\xff" * 50]


@pytest.mark.parametrize("data", LONGER + NO_PICKLES)
def test_a_file_that_is_not_a_pickle_is_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged or not a pickle"):
        Vocabulary.load(path)


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    """Our own file, and a foreign one in the oldest and in a newer protocol, as bytes."""
    path = tmp_path_factory.mktemp("good") / "vocab.pkl"
    Vocabulary.build(CAPTIONS, 1).save(path)
    words = FOREIGN["course"][0]
    with pytest.MonkeyPatch.context() as patch:
        return [path.read_bytes(), *(foreign_pickle("vocabulary", p, words, patch) for p in (0, 3))]


def load_or_user_error(path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        vocab = Vocabulary.load(path)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017 - it may also be read
    else:
        assert list(vocab.idx2word) == list(range(len(vocab)))
        assert vocab.decode(vocab.encode("a dog")) is not None


def test_a_file_cut_anywhere_is_refused(good_files, path):
    for data in good_files:
        for n in range(0, len(data), 3):
            path.write_bytes(data[:n])
            with pytest.raises(UserError):
                Vocabulary.load(path)


@given(st.data())
def test_a_damaged_file_is_read_or_refused(good_files, tmp_path_factory, data):
    damaged = bytearray(data.draw(st.sampled_from(good_files)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    load_or_user_error(tmp_path_factory.getbasetemp() / "damaged.pkl", bytes(damaged))


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
NAMES = st.sampled_from([b"cx\nVocabulary\n", b"ccopyreg\n_reconstructor\n", b"cbuiltins\nobject\n", b"S'word2idx'\n"])


@given(st.lists(st.sampled_from(OPCODES) | NAMES | st.binary(max_size=4), max_size=40))
def test_any_sequence_of_opcodes_is_read_or_refused(tmp_path_factory, parts):
    load_or_user_error(tmp_path_factory.getbasetemp() / "opcodes.pkl", b"".join(parts) + b".")


# ---- At size -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_captions_of_coco_take_seconds(shared_data):
    with gzip.open(shared_data / "captions_text" / "coco_val2014.tsv.gz", "rt", encoding="utf-8") as lines:
        captions = [line.rstrip("\n").split("\t", 1)[1] for line in lines]
    many = list(islice(chain.from_iterable(repeat(captions)), 414_113))
    started = time.process_time()
    vocab = Vocabulary.build(many)
    assert time.process_time() - started < 60
    assert 6_000 < len(vocab) < 12_000  # the words of 199,654 captions; each comes about twice
    assert Vocabulary.from_dict(pickle.loads(pickle.dumps(vocab.to_dict()))) == vocab
