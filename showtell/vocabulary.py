"""The vocabulary: words to ids and back, stored as plain lists that are read without executing anything.

`<start>` = 0, `<end>` = 1, `<unk>` = 2, then the words in the order in which the training captions first use them, then
the start words of styles, if any.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path

from showtell.errors import UserError, print_text
from showtell.files import atomic_path, require_regular_file
from showtell.tokenizer import DEFAULT_TOKENIZER, TOKENIZERS

START, END, UNK = "<start>", "<end>", "<unk>"
_SPECIALS = frozenset({START, END, UNK, "<pad>"})  # "<pad>" occurs only in vocabularies of other projects
_STYLE = "<start:"  # the start word of a style is `<start:NAME>`
_FORMAT = "showtell-vocabulary"
_BUILD = "build one with Vocabulary.build(captions).save(…)"
BUILT_FILE = Path("runs", "vocab.pkl")  # of the user: git ignores runs/
_PACKAGE = Path(__file__).resolve().parent
_OWN_FILES = (_PACKAGE / "vocab.pkl", _PACKAGE.parent / "vocab.pkl")  # of the installed package and of the checkout
_built: tuple[Path, Vocabulary] | None = None  # what `build_file` saved last in this process, and where


class Vocabulary:
    """The words that a model can generate.

    Attributes:
        word2idx, idx2word: word -> id, and id -> word.
        threshold: the number of occurrences a word needed to be kept; None if unknown.
        tokenizer: the name in `TOKENIZERS` of the tokeniser that splits captions into these words.
        start_word, end_word, unk_word: the special words, whose ids are `start_id`, `end_id` and `unk_id`.
    """

    start_word, end_word, unk_word = START, END, UNK

    def __init__(
        self,
        words: Sequence[str] = (START, END, UNK),
        threshold: int | None = None,
        tokenizer: str = DEFAULT_TOKENIZER,
        *course: object,
        **course_names: object,
    ) -> None:
        """Create a vocabulary of exactly `words`, the special ones included; their ids are their positions.

        The arguments of the Udacity course's class raise a `UserError` that says what to write instead.
        """
        if course or course_names or isinstance(words, int):
            raise UserError(
                "Vocabulary(…) takes words, not the course's arguments; write Vocabulary.load('vocab.pkl') to read a "
                "file, or Vocabulary.build(captions, threshold=5, tokenizer='treebank') to make one, and its save(path)"
            )
        if tokenizer not in TOKENIZERS:
            raise UserError(f"no tokeniser is called {tokenizer!r}; choose one of {', '.join(sorted(TOKENIZERS))}")
        self.word2idx: dict[str, int] = {}
        self.idx2word: dict[int, str] = {}
        self.threshold, self.tokenizer = threshold, tokenizer
        for word in words:
            if word in self.word2idx:
                raise UserError(f"the word {word!r} occurs twice in the vocabulary; give each word once")
            self.add_word(word)
        if missing := [word for word in (START, END, UNK) if word not in self.word2idx]:
            raise UserError(f"the vocabulary has no {', '.join(missing)}; include {START}, {END} and {UNK}")
        self.start_id, self.end_id, self.unk_id = (self.word2idx[word] for word in (START, END, UNK))

    @classmethod
    def build(
        cls, captions: Iterable[str], threshold: int = 5, tokenizer: str = DEFAULT_TOKENIZER, progress: bool = False
    ) -> Vocabulary:
        """Create a vocabulary of the words that occur at least `threshold` times in `captions`.

        Args:
            captions: the training captions only; words of the validation captions would leak.
            tokenizer: a name in `TOKENIZERS`: `"unicode"` (words of any script, no punctuation), `"treebank"` (NLTK's
                `word_tokenize`, as in the Udacity course; punctuation kept), `"ptb"` (the tokeniser of the metrics)
                or `"words"` (a-z, 0-9 and ' only; for older models).
            progress: show a progress bar.
        """
        if threshold < 1:
            raise UserError(f"the vocabulary threshold is {threshold}; give a whole number of at least 1")
        vocab = cls(threshold=threshold, tokenizer=tokenizer)
        if progress:
            from tqdm import tqdm

            captions = tqdm(captions, desc="vocabulary", unit=" captions", unit_scale=True)
        counts: Counter[str] = Counter()
        for caption in captions:
            counts.update(vocab.tokenize(caption))
        for word, count in counts.items():
            if count >= threshold and not word.startswith(_STYLE):
                vocab.add_word(word)
        return vocab

    def extended(self, other: Vocabulary) -> Vocabulary:
        """Return these words with their ids, followed by those that only `other` has; the threshold is that of `other`.

        Raises:
            UserError: their tokenisers differ.
        """
        if self.tokenizer != other.tokenizer:
            given = f"the model's vocabulary has the tokeniser {self.tokenizer!r} and the new one {other.tokenizer!r}"
            raise UserError(f"{given}; add --set tokenizer={self.tokenizer}, or --new-vocabulary to drop the model's")
        return Vocabulary(list(self.word2idx | other.word2idx), other.threshold, self.tokenizer)

    def concerns(self, captions: Iterable[str]) -> list[str]:
        """Describe what is wrong with this vocabulary for training on `captions`, in sentences to print first.

        One sentence for captions without words; one if the vocabulary has fewer than ten words, if more than 10 % of
        the captions' words are `<unk>` (Flickr8k: 2.5 %), or if a caption is about one word, as Chinese without spaces.
        """
        captions, wordless, counts = list(captions), [], Counter[int]()
        for caption in captions:
            ids = self.encode(caption)[1:-1]
            counts.update(ids)
            if not ids:
                wordless.append(caption)
        n_captions, n_words, n_unknown, found = len(captions), counts.total(), counts[self.unk_id], []
        if wordless:
            found.append(
                f"{len(wordless):,} of {n_captions:,} captions have no words for the tokeniser {self.tokenizer!r} (the "
                f"first is {wordless[0][:60]!r}); remove or correct them, or choose another tokeniser"
            )
        size = sum(not _is_special(word) for word in self.word2idx)
        mean = n_words / max(1, n_captions - len(wordless))
        if n_words and (size < 10 or n_unknown > 0.1 * n_words or mean < 2):
            found.append(
                f"the vocabulary (threshold {self.threshold}) has {size:,} words for {n_captions:,} captions with "
                f"{mean:.1f} words on average, and {n_unknown / n_words:.0%} of these are <unk>; add captions or lower "
                "the threshold; in a language without spaces between words (Chinese, Japanese, Thai), insert spaces"
            )
        return found

    def add_word(self, word: str) -> int:
        """Return the id of `word`, adding the word if it is new."""
        i = self.word2idx.setdefault(word, len(self.word2idx))
        self.idx2word[i] = word
        return i

    @property
    def styles(self) -> dict[str, int]:
        """The styles in which captions can begin, by name: the ids of their start words, in the order of training."""
        return {word[len(_STYLE) : -1]: i for word, i in self.word2idx.items() if word.startswith(_STYLE)}

    def add_styles(self, names: Iterable[str]) -> None:
        """Add a start word `<start:NAME>` for each style, by convention the name of a data set."""
        for name in dict.fromkeys(names):
            self.add_word(f"{_STYLE}{name}>")

    def start_of(self, style: str | None = None) -> int:
        """Return the id of a style's start word, by default the first style's; without styles, that of `<start>`.

        Raises:
            UserError: there is no such style.
        """
        styles = self.styles
        if style is None:
            return next(iter(styles.values()), self.start_id)
        if style not in styles:
            known = f"choose one of {', '.join(styles)}" if styles else "leave it out, because the model has none"
            raise UserError(f"the model has no style {style!r}; {known}")
        return styles[style]

    def starts_of(self, styles: Sequence[str]) -> list[int]:
        """Return the id of the start word of each style; that of the default for one that the model has not."""
        known, default = self.styles, self.start_of()
        return [known.get(style, default) for style in styles]

    def __call__(self, word: str) -> int:
        """Return the id of `word`, or that of `<unk>`."""
        return self.word2idx.get(word, self.unk_id)

    def __len__(self) -> int:
        return len(self.word2idx)

    def __contains__(self, word: str) -> bool:
        return word in self.word2idx

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_dict() == other.to_dict()

    __hash__ = None  # mutable through add_word

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} words, threshold={self.threshold}, tokenizer={self.tokenizer!r})"

    def tokenize(self, caption: str) -> list[str]:
        """Split a caption into words, known or not."""
        return TOKENIZERS[self.tokenizer](caption)

    def encode(self, caption: str) -> list[int]:
        """Return `[<start>, word ids…, <end>]`; special words inside the caption's text become `<unk>`."""
        words = ("" if _is_special(word) else word for word in self.tokenize(caption))
        return [self.start_id, *map(self, words), self.end_id]

    def words(self, ids: Iterable[int]) -> list[str]:
        """Return the words up to the first `<end>`, without the special ones."""
        words = []
        for i in map(int, ids):
            if i == self.end_id:
                break
            if i not in self.idx2word:
                raise UserError(f"the id {i} is not in this vocabulary of {len(self)} words; ids run from 0")
            if not _is_special(self.idx2word[i]):
                words.append(self.idx2word[i])
        return words

    def decode(self, ids: Iterable[int]) -> str:
        """Return the ids up to `<end>` as a sentence: special words removed, punctuation attached, capitalised."""
        return join_words(self.words(ids))

    def to_dict(self) -> dict:
        """Return the vocabulary as plain lists and strings, for a checkpoint's header or `vocab.pkl`."""
        return {"words": list(self.word2idx), "threshold": self.threshold, "tokenizer": self.tokenizer}

    @classmethod
    def from_dict(cls, plain: dict) -> Vocabulary:
        """Create a vocabulary from what `to_dict` returned."""
        return cls(plain["words"], plain["threshold"], plain["tokenizer"])

    def save(self, path: str | PathLike) -> None:
        """Write a pickle of plain lists and strings that names no class, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(pickle.dumps({"format": _FORMAT, "version": 1, **self.to_dict()}, protocol=4))

    @classmethod
    def load(cls, path: str | PathLike) -> Vocabulary:
        """Read a file of `save`, or another captioning repository's pickled `Vocabulary` object, without running code.

        Raises:
            MissingFileError: there is no such file.
            UserError: the file is damaged, is not a vocabulary, or names anything but a `Vocabulary` class.
        """
        path = Path(path)
        require_regular_file(path, "vocabulary", _BUILD)
        try:
            content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="utf-8").load()
        except _Refused as refused:
            reason = f"it names {refused}, and none of it was executed"
            raise UserError(f"{path} is not a plain vocabulary: {reason}; {_BUILD}") from None
        except Exception as error:  # a damaged pickle can fail in any way; nothing was executed
            raise UserError(f"{path} is damaged or not a pickle ({type(error).__name__}); {_BUILD}") from error
        return cls._from_pickle(content, path)

    @classmethod
    def _from_pickle(cls, content: object, path: Path) -> Vocabulary:
        if isinstance(content, dict) and content.get("format") == _FORMAT:
            if content.get("version") != 1:
                raise UserError(f"{path} has a format version other than 1; read it with a newer showtell")
            words, threshold, tokenizer = (content.get(key) for key in ("words", "threshold", "tokenizer"))
        else:
            attributes = vars(content) if isinstance(content, _Attributes) else content
            word2idx = attributes.get("word2idx") if isinstance(attributes, dict) else None
            if not isinstance(word2idx, dict) or not all(isinstance(i, int) for i in word2idx.values()):
                raise UserError(f"{path} is not a vocabulary; it needs an object or a dict with word2idx")
            words = sorted(word2idx, key=word2idx.__getitem__)
            if [word2idx[word] for word in words] != list(range(len(words))):
                raise UserError(f"the ids in {path} do not run from 0 to {len(words) - 1}; the file is damaged")
            threshold, tokenizer = attributes.get("vocab_threshold"), "treebank"
        if not isinstance(words, list) or not all(isinstance(word, str) for word in [*words, tokenizer]):
            raise UserError(f"{path} holds words that are not text; it is damaged or not a vocabulary")
        try:
            return cls(words, threshold if isinstance(threshold, int) else None, tokenizer)
        except UserError as error:
            raise UserError(f"{path} cannot be used: {error}") from None


def _is_special(word: str) -> bool:
    return word in _SPECIALS or word.startswith(_STYLE)


def build_file(
    captions: Callable[[], Iterable[str]], threshold: int | None, path: str | PathLike | None = None
) -> Vocabulary:
    """Build a vocabulary as the Udacity course does, save it to `path` (default `runs/vocab.pkl`), and print where.

    Raises:
        UserError: `path` is showtell's own `vocab.pkl`; to replace that one, use `Vocabulary.save`.
    """
    global _built
    path = BUILT_FILE if path is None else Path(path)
    if path.resolve() in _OWN_FILES:
        given = f"{path} is showtell's own vocabulary and is not replaced"
        raise UserError(f"{given}; give another vocab_file, or leave it out to save in {BUILT_FILE}")
    vocab = Vocabulary.build(captions(), 5 if threshold is None else threshold, "treebank")
    vocab.save(path)
    _built = path.absolute(), vocab
    print_text(f"vocabulary of {len(vocab):,} words (threshold {vocab.threshold}) saved in {path}")
    return vocab


def load_file(
    captions: Callable[[], Iterable[str]], threshold: int | None, path: str | PathLike | None = None
) -> Vocabulary:
    """Load a vocabulary for `captions`; where no `path` is given, print which one it is.

    Warn, with the numbers of words of both, if it is not the one that `build_file` made in this process, or if its
    threshold is not `threshold`; and if it has less than 80 % of the words of the captions.
    """
    file = default_vocab_file() if path is None else Path(path)
    vocab = Vocabulary.load(file)
    size = f"{len(vocab):,} words (threshold {vocab.threshold})"
    if path is None:
        print_text(f"vocabulary of {size} loaded from {file}")
    if _built and vocab != _built[1]:
        built = f"{len(_built[1]):,} (threshold {_built[1].threshold}) that were built in this process"
        remedy = f"to load those, pass vocab_file={str(_built[0])!r}"
        warnings.warn(f"{file} has {size}, not the {built}; {remedy}", stacklevel=3)
    if threshold is not None and vocab.threshold not in (None, threshold):
        other = len(Vocabulary.build(captions(), threshold, vocab.tokenizer))
        counts = f"it has {len(vocab):,} words, and these captions give {other:,} with threshold {threshold}"
        given = f"{file} was built with threshold {vocab.threshold}, not {threshold}: {counts}"
        warnings.warn(f"{given}; to build it again, pass vocab_from_file=False", stacklevel=3)
    words = [word for text in islice(captions(), 1000) for word in vocab.tokenize(text)]
    known = sum(word in vocab for word in words) / max(1, len(words))
    if known < 0.8:
        reason = f"the vocabulary {file} knows {known:.0%} of these captions' words; it was made for other data"
        warnings.warn(f"{reason}: build one with vocab_from_file=False", stacklevel=3)
    return vocab


def default_vocab_file() -> Path:
    """Return the vocabulary to load where none is named.

    It is the one that was built last in this process; or else `runs/vocab.pkl`, or `vocab.pkl`, in the current folder;
    or else that of the installed package or this checkout.
    """
    places = [*([_built[0]] if _built else []), BUILT_FILE, Path("vocab.pkl"), *_OWN_FILES]
    return next((path for path in places if path.is_file()), _OWN_FILES[-1])


# The spaces to remove from words joined by spaces: before what attaches to the left, after what attaches to the right.
_ATTACH_LEFT = re.compile(r" (?=(?:[.,!?;:%)\]}]+(?: |$)|'(?:s|m|d|ll|re|ve)?(?: |$)|n't\b|''))")
_ATTACH_RIGHT = re.compile(r"(?<=[(\[{$#]) |(?<=``) ")


def join_words(words: Sequence[str]) -> str:
    """Join words into a sentence: no space before punctuation, quotation marks as typed, capitalised."""
    return "".join(spell_words(words))


def spell_words(words: Sequence[str]) -> list[str]:
    """Spell each word as in `join_words`, including the space before it: one piece per word."""
    text = " ".join(words)
    attached = {match.start() for pattern in (_ATTACH_LEFT, _ATTACH_RIGHT) for match in pattern.finditer(text)}
    pieces, end = [], -1  # of the previous word in `text`
    for word in words:
        piece = word.replace("``", '"').replace("''", '"')
        if not pieces:
            pieces.append(piece[:1].upper() + piece[1:])
        else:
            pieces.append(piece if end in attached else f" {piece}")
        end += 1 + len(word)
    return pieces


class _Attributes:
    """Stand in for another repository's `Vocabulary` object: hold its attributes, run none of its code."""

    def __init__(self, *_: object) -> None:
        pass


class _Refused(Exception):
    """A name in a pickle that a vocabulary does not need."""


class _PlainUnpickler(pickle._Unpickler):
    """Read plain values and attribute holders; refuse every other name before anything is called.

    Python's own unpickler, because the one in C allocates gigabytes for one damaged byte in a memo's index.
    """

    # BYTEARRAY8 allocates the announced size before it reads; a vocabulary contains no byte array.
    dispatch = {code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in {("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor")}:  # protocols 0 and 1
            return lambda *_: self._kind()
        if name.split(".")[-1] == "Vocabulary" or (module, name) in {("builtins", "object"), ("__builtin__", "object")}:
            return self._kind
        raise _Refused(f"{module}.{name}"[:100].encode("unicode_escape").decode())

    @functools.cached_property
    def _kind(self) -> type[_Attributes]:
        """A class for this file only: a pickle can set a class's attributes, which the next file must not see."""
        return type("Vocabulary", (_Attributes,), {})
