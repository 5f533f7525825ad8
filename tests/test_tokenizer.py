"""The tokenisers: words of any script, and equality with NLTK's word_tokenize and coco-caption's PTB tokeniser."""

from __future__ import annotations

import functools
import gzip
import json
import random
import re
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from showtell.tokenizer import _ABBREVIATIONS, DEFAULT_TOKENIZER, TOKENIZERS, ptb, treebank, unicode, words

GOLDEN = json.loads((Path(__file__).parent / "golden" / "captions.json").read_text(encoding="utf-8"))
GOLDEN_TOKENS = {
    text: tokens
    for image, expected in GOLDEN["tokens"].items()
    for text, tokens in zip(
        [*GOLDEN["references"][image], GOLDEN["candidates"][image]],
        [*expected["references"], expected["candidate"]],
        strict=True,
    )
}

# Parts of the sentences that the tests generate; difficult ones are over-represented.
PIECES = (
    "a dog A The man's dogs' don't can't it's U.S. Mr. St. mr. no. p.m. 5 12. 1,000 3.5 1/2 10:30 t-shirt and/or w/ $5 "
    "£3 50% #1 @me R&B ... .. -- - – — , . ? ! ; : ' \" `` '' ( ) [ ] { } & * / + = < > ~ _ \\ « » “ ” ‘ ’ café 中文 … "
    "dog. cannot gonna wanna gimme 'tis 'twas d'ye more'n n't I'm we've she'll 'n' o'clock e.g. etc. 3D a.m J.K. x. b. "
    "2. \t é"
).split(" ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's 2 dogs, café-style.", "a man's 2 dogs café style"),
        ("It doesn’t say “no”, 'yes', rock 'n' roll; dogs' ball_2", "it doesn't say no yes rock n roll dogs ball 2"),
        ("Ein süßer, GROßER Bär", "ein süßer großer bär"),
        ("Собака бежит по снегу; ёлка, м’ята", "собака бежит по снегу ёлка м'ята"),
        ("Ένας ΣΚΥΛΟΣ τρέχει", "ένας σκυλος τρέχει"),
        ("एक कुत्ता दौड़ रहा है।", "एक कुत्ता दौड़ रहा है"),  # vowel signs and viramas
        ("كَلْبٌ يركض، ٣ كلاب", "كَلْبٌ يركض ٣ كلاب"),
        ("سگ می\u200cدود", "سگ می\u200cدود"),  # zero-width non-joiner
        ("สุนัขวิ่ง เร็ว", "สุนัขวิ่ง เร็ว"),
        ("一只狗 在跑。", "一只狗 在跑"),
        ("a ❤️ dog 5️⃣ 👩‍💻 Wör\xadter", "a dog 5 wörter"),  # emoji; a soft hyphen
        ("½ pizza, Lego™", "½ pizza lego"),
        ("\u0301 ' ’ _ ' ", ""),
    ],
)  # fmt: skip
def test_unicode_keeps_words_of_any_script_whole(text, expected):
    assert unicode(text) == expected.split(" ") * bool(expected)
    assert TOKENIZERS[DEFAULT_TOKENIZER] is unicode


@given(st.text(st.sampled_from("aİßΣσÅÅéе́क्ड़ำ각ﬁ'’-_ \u0301\u0323\u200c\xad") | st.characters(), max_size=12))
def test_unicode_is_the_same_for_equal_looking_and_for_its_own_text(text):
    tokens = unicode(text)
    assert unicode(unicodedata.normalize("NFD", text)) == tokens
    assert unicode(" ".join(tokens)) == tokens
    if text.isascii():  # the fast path, which differs from `words` in outer apostrophes only
        parts = [part.strip("'") for word in words(text) for part in re.split("''+", word)]
        assert tokens == [part for part in parts if part]


def test_words_keeps_its_old_meaning_for_old_checkpoints():
    assert words("A man's 2 dogs', süßer doesn’t Собака") == ["a", "man's", "2", "dogs'", "s", "er", "doesn", "t"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog, on 2 skis.", "a man 's dog , on 2 skis ."),
        ("A slice of pie. his hat", "a slice of pie . his hat"),
        ('He said "go." Then (he) went!', "he said `` go . '' then ( he ) went !"),
        ("A U.S. flag on St. James St. at 5 p.m. today", "a u.s. flag on st. james st. at 5 p.m. today"),
        ("I cannot, gonna don't; 1,000 -- 3.5...", "i can not , gon na do n't ; 1,000 -- 3.5 ..."),
        ("", ""),
        ("  .  ", "."),
    ],
)
def test_treebank_cuts_like_nltk(text, expected):
    assert treebank(text) == expected.split()


@functools.cache
def _word_tokenize():
    """NLTK's `word_tokenize(text.lower())`, with our abbreviations for its sentence model, which is a download."""
    pytest.importorskip("nltk")
    from nltk.tokenize import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    parameters = PunktParameters()
    parameters.abbrev_types = set(_ABBREVIATIONS)
    sentences, tokens = PunktSentenceTokenizer(parameters), NLTKWordTokenizer()
    return lambda text: [token for s in sentences.tokenize(text.lower()) for token in tokens.tokenize(s)]


def test_treebank_equals_nltk_on_the_golden_sentences():
    nltk = _word_tokenize()
    assert {text: treebank(text) for text in GOLDEN_TOKENS} == {text: nltk(text) for text in GOLDEN_TOKENS}


@settings(max_examples=600)
@given(st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(["", " ", " "])).map("".join), max_size=8))
def test_treebank_equals_nltk_on_anything(pieces):
    assert treebank("".join(pieces)) == _word_tokenize()("".join(pieces))


def _real_captions(shared_data: Path) -> list[str]:
    folder = shared_data / "captions_text"
    if not folder.is_dir():
        pytest.skip(f"no captions_text in {shared_data}")
    texts = [gzip.decompress(path.read_bytes()).decode("utf-8") for path in sorted(folder.glob("*.gz"))]
    return [line.split("\t")[-1] for text in texts for line in text.rstrip("\n").split("\n")]


def test_treebank_equals_nltk_on_real_captions_and_is_fast(shared_data):
    captions = _real_captions(shared_data)
    assert len(captions) > 300_000
    start = time.process_time()
    ours = [treebank(caption) for caption in captions]
    assert time.process_time() - start < 15  # about 2.5 s on a free core; NLTK takes half a minute
    nltk = _word_tokenize()
    odd = [i for i, caption in enumerate(captions) if i % 40 == 0 or not caption.replace(" ", "").rstrip(".").isalnum()]
    assert [ours[i] for i in odd] == [nltk(captions[i]) for i in odd]


@pytest.mark.parametrize("text", GOLDEN_TOKENS)
def test_ptb_equals_the_reference_on_the_golden_sentences(text):
    assert " ".join(ptb(text)) == GOLDEN_TOKENS[text]


def test_ptb_equals_the_reference_on_every_caption_of_the_coco_file(golden_coco):
    assert len(golden_coco["tokens"]) == 2500
    for image, expected in golden_coco["tokens"].items():
        assert [" ".join(ptb(text)) for text in golden_coco["references"][image]] == expected["references"]
        assert " ".join(ptb(golden_coco["candidates"][image])) == expected["candidate"]


@pytest.mark.java
def test_ptb_agrees_with_java_on_nearly_all_random_text():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    rng = random.Random(0)
    # "zzz" at the end: Java looks into the next line of its file after a single letter and a period.
    texts = ["".join(rng.choice(PIECES) + rng.choice(["", " ", " "]) for _ in range(5)) + " zzz" for _ in range(3000)]
    java = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    same = sum(" ".join(ptb(text)) == java[i][0] for i, text in enumerate(texts))
    assert same >= 0.98 * len(texts)


@pytest.mark.parametrize("unit", ["a,", "a.1", "don't", "‘a", "<!a", "  "])
def test_ptb_takes_linear_time(unit):
    """An eightfold text takes eight times as long, give or take; with a rule that rescans it, 20 to 60 times."""

    def seconds(length: int) -> float:
        text, times = f"a{unit * (length // len(unit))}é", []
        for _ in range(3):
            start = time.process_time()
            ptb(text)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(24_000) < 14 * seconds(3_000)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    "text",
    ["", " \n\t", "😀", "一只狗", "كلب يركض", "a\x00b\ud800", "." * 5000, "a, " * 10_000, "x" * 20_000, "(" * 3000],
)
def test_any_text_can_be_tokenised(name, text):
    tokens = TOKENIZERS[name](text)
    assert all(isinstance(token, str) and token for token in tokens)
    assert TOKENIZERS[name](text) == tokens


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ten_thousand_words_are_fast(name):
    start = time.process_time()
    assert len(TOKENIZERS[name]("The dog's ball, no. 7, wasn't 1,000 years old. " * 1200)) > 10_000
    assert time.process_time() - start < 5
