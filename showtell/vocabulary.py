"""Words to ids and back: built from the training captions, saved as plain lists, read without executing anything.

`<start>` = 0, `<end>` = 1, `<unk>` = 2, then the words in the order in which the captions first use them.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from showtell.errors import MissingFileError, UserError
from showtell.files import atomic_path
from showtell.tokenizer import TOKENIZERS

START, END, UNK = "<start>", "<end>", "<unk>"
_SPECIALS = frozenset({START, END, UNK, "<pad>"})  # "<pad>" only in vocabularies from elsewhere
_FORMAT = "showtell-vocabulary"


class Vocabulary:
    """The words a captioner can say.

    Attributes:
        word2idx: word -> id.
        idx2word: id -> word.
        threshold: how often a word had to occur to be kept; `None` where that is not known.
        tokenizer: name of the function of `showtell.tokenizer` that splits captions into these words.
        start_word: `<start>`, whose id is `start_id`; likewise `end_word` and `unk_word`.
    """

    start_word, end_word, unk_word = START, END, UNK

    def __init__(
        self, words: Sequence[str] = (START, END, UNK), threshold: int | None = None, tokenizer: str = "treebank"
    ) -> None:
        """Makes a vocabulary of exactly `words`, whose ids are their positions.

        Raises:
            UserError: a word stands twice, one of `<start>`, `<end>`, `<unk>` is missing, or no such tokeniser exists.
        """
        if tokenizer not in TOKENIZERS:
            raise UserError(f"no tokeniser is called {tokenizer!r}; choose one of {', '.join(sorted(TOKENIZERS))}")
        self.word2idx: dict[str, int] = {}
        for word in words:
            if word in self.word2idx:
                raise UserError(f"the word {word!r} stands twice in the vocabulary; each word needs one id")
            self.word2idx[word] = len(self.word2idx)
        self.idx2word: dict[int, str] = {i: word for word, i in self.word2idx.items()}
        missing = [word for word in (START, END, UNK) if word not in self.word2idx]
        if missing:
            raise UserError(f"the vocabulary has no {', '.join(missing)}; it needs {START}, {END} and {UNK}")
        self.start_id, self.end_id, self.unk_id = (self.word2idx[word] for word in (START, END, UNK))
        self.threshold = threshold
        self.tokenizer = tokenizer

    @classmethod
    def build(
        cls, captions: Iterable[str], threshold: int = 5, tokenizer: str = "treebank", progress: bool = False
    ) -> Vocabulary:
        """Keeps every word that the captions use at least `threshold` times.

        Args:
            captions: the training captions, and no others: validation words would leak.
            threshold: the least number of occurrences.
            tokenizer: `"treebank"` (the ancestors' `word_tokenize`, punctuation kept), `"words"` (lower-case words and
                numbers only) or `"ptb"` (the metrics' tokeniser).
            progress: whether to show a progress bar.
        """
        if threshold < 1:
            raise UserError(f"the vocabulary threshold is {threshold}; give a whole number from 1 up")
        vocab = cls(threshold=threshold, tokenizer=tokenizer)
        if progress:
            from tqdm import tqdm

            captions = tqdm(captions, desc="vocabulary", unit=" captions", unit_scale=True)
        tokenize = TOKENIZERS[tokenizer]
        counts: Counter[str] = Counter()
        for caption in captions:
            counts.update(tokenize(caption))
        for word, count in counts.items():
            if count >= threshold:
                vocab.add_word(word)
        return vocab

    def add_word(self, word: str) -> int:
        """Gives `word` the next id, unless it has one; returns its id."""
        if word not in self.word2idx:
            self.word2idx[word] = len(self.word2idx)
            self.idx2word[self.word2idx[word]] = word
        return self.word2idx[word]

    def __call__(self, word: str) -> int:
        """Returns the id of `word`, or that of `<unk>`."""
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
        """Splits a caption into words, known or not."""
        return TOKENIZERS[self.tokenizer](caption)

    def encode(self, caption: str) -> list[int]:
        """Returns `[<start>, word ids…, <end>]`; a caption that itself says `<end>` says an unknown word."""
        words = ("" if word in _SPECIALS else word for word in self.tokenize(caption))
        return [self.start_id, *map(self, words), self.end_id]

    def words(self, ids: Iterable[int]) -> list[str]:
        """Returns the words up to the first `<end>`, without the special ones."""
        words = []
        for i in map(int, ids):
            if i == self.end_id:
                break
            if i not in self.idx2word:
                raise UserError(f"the id {i} is not in this vocabulary of {len(self)} words; ids run from 0")
            if self.idx2word[i] not in _SPECIALS:
                words.append(self.idx2word[i])
        return words

    def decode(self, ids: Iterable[int]) -> str:
        """Returns a caption for people: up to `<end>`, no special words, punctuation attached, a capital first."""
        return join_words(self.words(ids))

    def to_dict(self) -> dict:
        """Returns the vocabulary as plain lists and strings, for a checkpoint's header or `vocab.pkl`."""
        return {"words": list(self.word2idx), "threshold": self.threshold, "tokenizer": self.tokenizer}

    @classmethod
    def from_dict(cls, plain: dict) -> Vocabulary:
        """The inverse of `to_dict`."""
        return cls(plain["words"], plain["threshold"], plain["tokenizer"])

    def save(self, path: str | PathLike) -> None:
        """Writes a pickle of plain lists and strings that names no class; whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_bytes(pickle.dumps({"format": _FORMAT, "version": 1, **self.to_dict()}, protocol=4))

    @classmethod
    def load(cls, path: str | PathLike, threshold: int | None = None) -> Vocabulary:
        """Reads a vocabulary of this project, or a pickled `Vocabulary` object of one of its ancestors, safely.

        Args:
            path: the file.
            threshold: the threshold the caller believes the file was made with; a disagreement is warned about.

        Raises:
            MissingFileError: there is no such file.
            UserError: the file is damaged, is no vocabulary, or names something other than a `Vocabulary` class, in
                which case nothing of it is executed.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(
                f"there is no vocabulary at {path}; build one with Vocabulary.build(captions).save(…)"
            )
        try:
            content = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="utf-8").load()
        except _Refused as refused:
            raise UserError(
                f"{path} is not a plain vocabulary: it names {refused}, and nothing of it was run; build one with "
                "Vocabulary.build(captions).save(…)"
            ) from None
        except Exception as error:  # a damaged pickle can fail in any way; nothing was executed
            raise UserError(
                f"{path} is damaged or no pickle ({type(error).__name__}); a vocabulary file is expected"
            ) from error
        vocab = cls._from_pickle(content, path)
        if threshold is not None and vocab.threshold is not None and threshold != vocab.threshold:
            warnings.warn(
                f"{path} was built with threshold {vocab.threshold}, not {threshold}; the file's words are used "
                "(build a new vocabulary to change the threshold)",
                stacklevel=2,
            )
        return vocab

    @classmethod
    def _from_pickle(cls, content: object, path: Path) -> Vocabulary:
        if isinstance(content, dict) and content.get("format") == _FORMAT:
            if content.get("version") != 1:
                raise UserError(f"{path} has another format version than 1; read it with a newer showtell")
            words, threshold, tokenizer = (content.get(key) for key in ("words", "threshold", "tokenizer"))
        else:
            attributes = vars(content) if isinstance(content, _Attributes) else content
            word2idx = attributes.get("word2idx") if isinstance(attributes, dict) else None
            if not isinstance(word2idx, dict) or not all(isinstance(i, int) for i in word2idx.values()):
                raise UserError(f"{path} holds no vocabulary; an object or dict with word2idx is expected")
            words = sorted(word2idx, key=word2idx.__getitem__)
            if [word2idx[word] for word in words] != list(range(len(words))):
                raise UserError(f"the ids in {path} do not run from 0 to {len(words) - 1}; the file is damaged")
            threshold, tokenizer = attributes.get("vocab_threshold"), "treebank"
        if not isinstance(words, list) or not all(isinstance(word, str) for word in [*words, tokenizer]):
            raise UserError(f"{path} holds something other than words; it is damaged or no vocabulary")
        try:
            return cls(words, threshold if isinstance(threshold, int) else None, tokenizer)
        except UserError as error:
            raise UserError(f"{path} cannot be used: {error}") from None


# A person's spelling of a list of words: what attaches to the left, and what to the right.
_ATTACH_LEFT = re.compile(r" (?=(?:[.,!?;:%)\]}]+(?: |$)|'(?:s|m|d|ll|re|ve)?(?: |$)|n't\b|''))")
_ATTACH_RIGHT = re.compile(r"(?<=[(\[{$#]) |(?<=``) ")


def join_words(words: Sequence[str]) -> str:
    """Joins words into a caption: no space before punctuation, quotes as typed, a capital first."""
    return "".join(spell_words(words))


def spell_words(words: Sequence[str]) -> list[str]:
    """Spells each word as it stands in `join_words`, the space before it included: one piece a word."""
    text = " ".join(words)
    cut = {match.start() for pattern in (_ATTACH_LEFT, _ATTACH_RIGHT) for match in pattern.finditer(text)}
    pieces, at = [], 0
    for i, word in enumerate(words):
        spelling = '"' if word in ("``", "''") else word.replace("``", '"').replace("''", '"')
        pieces.append(spelling if i == 0 or at - 1 in cut else f" {spelling}")
        at += len(word) + 1
    if pieces:
        pieces[0] = pieces[0][:1].upper() + pieces[0][1:]
    return pieces


class _Attributes:
    """Stands in for an ancestor's `Vocabulary` object: holds its attributes, runs none of its code."""

    def __init__(self, *_: object) -> None:
        pass


class _Refused(Exception):
    """A name that a vocabulary has no business with."""


class _PlainUnpickler(pickle._Unpickler):
    """Reads plain values and attribute holders; refuses every other name, before anything is called.

    Python's own unpickler rather than the one in C, which allocates gigabytes for one damaged byte in a memo's index.
    """

    # A byte array's memory is filled before its bytes are read, however many are announced; no vocabulary has one.
    dispatch = {code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> object:
        kind = self._kind
        if name.split(".")[-1] == "Vocabulary":
            return kind
        if (module, name) in {("copyreg", "_reconstructor"), ("copy_reg", "_reconstructor")}:  # protocols 0 and 1
            return lambda *_: kind()
        if (module, name) in {("builtins", "object"), ("__builtin__", "object")}:
            return kind
        raise _Refused(f"{module}.{name}"[:100].encode("unicode_escape").decode())

    @functools.cached_property
    def _kind(self) -> type[_Attributes]:
        """A class for this file alone: a pickle can set attributes of a class, and the next file must not see them."""
        return type("Vocabulary", (_Attributes,), {})
