"""Tokenisers: split a caption into words, in pure Python, without a download.

`unicode` is the default for vocabularies: lower-case words of any script, no punctuation. `ptb` is for scores
(coco-caption's tokeniser), `treebank` equals NLTK's `word_tokenize` (punctuation kept), and `words` (a-z, 0-9 and '
only) remains for the models and vocabulary files that name it.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Iterator

DEFAULT_TOKENIZER = "unicode"


def _character_class(*categories: str, last: int = 0xFFFF) -> str:
    """The body of a regular expression's [...] for the Unicode categories, from U+0080 to `last`."""
    ranges: list[list[int]] = []
    for code in range(0x80, last + 1):
        if unicodedata.category(chr(code)).startswith(categories):
            if ranges and ranges[-1][1] == code - 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{end:08x}" for first, end in ranges)


# ---- unicode: words of any script ----

_APOSTROPHE = {ord("’"): "'"}
_INVISIBLE = dict.fromkeys(map(ord, "\xad\ufe0e\ufe0f"))  # soft hyphen; text and emoji style
_ASCII_WORD = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")


@functools.cache
def _unicode_word() -> re.Pattern:
    marks = _character_class("Mn", "Mc", last=0x1FFFF)  # not Me, which makes keycap emoji of digits
    word = rf"[^\W_](?:[^\W_]|[{marks}])*"
    return re.compile(rf"{word}(?:['\u200c\u200d]{word})*")  # zero-width (non-)joiners: Persian, Sinhala


def unicode(text: str) -> list[str]:
    """Split a caption into lower-case words of letters, digits and combining marks of any script.

    An apostrophe (' or ’) inside a word belongs to it and becomes '; everything else separates words. The text is
    normalised to NFC, so that equal-looking words are equal. NFKC would also rewrite what readers see (½ as 1⁄2,
    Lego™ as legotm, Thai ำ as two signs), and a generated caption is made of these words.

    Chinese, Japanese and Thai are written without spaces: put spaces between the words first.
    """
    text = text.lower()
    if text.isascii():
        return _ASCII_WORD.findall(text)
    text = unicodedata.normalize("NFC", text.translate(_INVISIBLE)).translate(_APOSTROPHE)
    return _unicode_word().findall(text)


# ---- treebank: sentences, as NLTK's Punkt splits lower-cased English ----

_CLOSES_A_WORD = r"[)\";}\]*:@'({\[‘’“”«»?!]"
_MANY = r"-{2,}|\.{2,}"
_WORD_END = rf"(?=\s|$|{_CLOSES_A_WORD}|{_MANY}|,(?=\s|$|{_CLOSES_A_WORD}|{_MANY}))"
_PIECE = re.compile(rf"{_MANY}|[^\s(\"`{{\[:;&#*@)}}\]\-,]\S*?{_WORD_END}|\S")
_ENDING = re.compile(rf"[.?!](?=(?P<tight>{_CLOSES_A_WORD})|\s+(?P<next>\S+))")
_CLOSERS = re.compile(r"[\"')\]}‘’“”«»]+?(?:\s+|(?=--)|$)", re.MULTILINE)
_NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*\.?$")

# Words after which a period does not end the sentence.
_ABBREVIATIONS = frozenset(
    # titles and names of companies
    "dr mr mrs ms prof rep reps sen gen col lt maj adm st jr sr messrs inc ltd co cos corp bros cie "
    # months and days, states, streets
    "jan feb aug sept sep oct nov dec tues wed fri ala ariz calif colo conn fla ga ill kan ky mich minn nev okla ore "
    "pa tenn va vt w.va wash wis ave ft "
    # measures and Latin
    "vs mg yr chg ct ok sw a.m p.m p.a.m a.d ph.d m.b.a "
    # places and first names given by letters
    "u.s u.s.a u.s.s.r u.k u.n d.c l.a n.c n.d n.h n.j n.m n.y n.v s.c r.i a.a a.c a.g a.h a.s a.t a.m.e b.f b.v c.v "
    "c.i.t c.o.m.b d.h d.w e.f e.h e.l e.m f.g f.j g.d g.f g.k h.c h.f h.m i.m.s j.b j.c j.j j.k j.p j.r l.f l.p m.j "
    "m.d.c r.a r.h r.j r.k r.t s.a s.a.y s.g s.p.a s.s t.j w.c w.r w.w "
    # single letters
    "c d e f g h k l m n p r s t v w".split()
)


def _ends_sentence(piece: str, following: str) -> bool:
    """Whether a sentence ends between `piece` and `following` (NLTK's Punkt, on lower-cased English)."""
    if piece in (".", "?", "!"):
        return True
    if not piece.endswith(".") or piece.endswith(".."):
        return False
    word = piece[:-1]
    if word in _ABBREVIATIONS or word.split("-")[-1] in _ABBREVIATIONS:
        return False
    if (len(word) == 1 and word.isalpha()) or _NUMBER.match(piece):  # "plan b. is", "2. a dog": the sentence goes on
        return not (following[0].islower() or following in (";", ":", ",", ".", "?", "!"))
    return True


def _sentences(text: str) -> list[str]:
    """Split lower-cased text into sentences."""
    endings: list[tuple[int, re.Match]] = []  # where the word starts, where the sentence may end
    word_start = scanned = 0
    for match in _ENDING.finditer(text):
        space = max(text.rfind(space, scanned, match.start()) for space in " \t\n\r\v\f")
        word_start, scanned = max(word_start, space + 1), match.start()
        if endings and endings[-1][0] == word_start < endings[-1][1].start():
            endings.pop()  # in "what?!" only the last mark can end the sentence
        endings.append((word_start, match))
    sentences, start = [], 0
    for word_start, match in endings:
        pieces = _PIECE.findall(text[word_start : match.end()] + (match["tight"] or " " + match["next"]))
        if any(map(_ends_sentence, pieces, pieces[1:])):
            stop = match.end()
            begin = match.start("next") if match["next"] else stop
            if closers := _CLOSERS.match(text, begin):  # 'he said "go." and went': the quote belongs to the first
                stop, begin = begin + len(closers[0].rstrip()), closers.end()
            sentences.append(text[start:stop])
            start = begin
    return [*sentences, text[start:]]


# ---- treebank: words, as NLTK's Treebank tokeniser splits a sentence ----


def _rules(*rules: tuple[str, str]) -> list[tuple[re.Pattern, str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


_OPENING_QUOTES = _rules(
    (r"([«“‘„]|`+)", r" \1 "),
    (r'^"', "``"),
    (r"``", " `` "),
    (r"([ (\[{<])(?:\"|'')", r"\1 `` "),
    (r"(?<!\w)'(?!(?:re|ve|ll|m|t|[sſ]|d|n)\b)(?=\w)", "' "),
)
_WORD_RULES = _rules(
    # punctuation
    (r"([:,])(\D)", r" \1 \2"),
    (r"([:,])$", r" \1 "),
    (r"(\.{2,}|[;@#$%&?!\u2012-\u2015])", r" \1 "),
    (r"([^'])' ", r"\1 ' "),
    (r"([*\]\[(){}<>]|--)", r" \1 "),
    (r"^|$", " "),
    # closing quotes and clitics
    (r"([»”’])", r" \1 "),
    (r"''|\"", " '' "),
    (r"\s+", " "),
    (r"([^' ])('[smd]|') ", r"\1 \2 "),
    (r"([^' ])('ll|'re|'ve|n't) ", r"\1 \2 "),
    # words written together
    *((rf"\b{parts}\b", r" \1 \2 ") for parts in "(can)(not) (d)('ye) (gim)(me) (gon)(na) (got)(ta) (lem)(me)".split()),
    (r"\b(more)('n)\b", r" \1 \2 "),
    (r"\b(wan)(na)(?=\s)", r" \1 \2 "),
    (r" ('t)(i[sſ]|wa[sſ])\b", r" \1 \2 "),
)
_PLAIN = re.compile(r"[a-z0-9 ]*(?:, [a-z0-9 ]*)*\.?\s*", re.ASCII)
_JOINED_WORDS = ("cannot", "gimme", "gonna", "gotta", "lemme", "wanna")
_JOINED = re.compile(rf"\b(?:{'|'.join(_JOINED_WORDS)})\b")
_CLOSING = "])}>\"' »”’"


def _treebank_sentence(text: str) -> list[str]:
    for pattern, replacement in _OPENING_QUOTES:
        text = pattern.sub(replacement, text)
    stripped = text.rstrip()
    body = stripped.rstrip(_CLOSING)
    if len(body) > 1 and body.endswith(".") and body[-2] != ".":  # the period that ends the sentence
        text = f"{body[:-1]} . {stripped[len(body) :]} "
    for pattern, replacement in _WORD_RULES:
        text = pattern.sub(replacement, text)
    return text.split()


def treebank(text: str) -> list[str]:
    """Split a caption into lower-case words and punctuation marks, as NLTK's `word_tokenize(text.lower())` does.

    The period of a sentence inside the caption is a word of its own ("a pie. his hat" -> `a pie . his hat`). NLTK
    finds the ends of sentences with a downloaded model; this module lists the abbreviations that matter instead.
    """
    text = text.lower()
    if _PLAIN.fullmatch(text) and not _JOINED.search(text):  # 90 % of captions
        return text.replace(",", " ,").replace(".", " .").split()
    return [word for sentence in _sentences(text) for word in _treebank_sentence(sentence)]


_WORD = re.compile(r"[a-z0-9']+")


def words(text: str) -> list[str]:
    """Split a caption into runs of the letters a-z, digits and ', lower-cased: "süßer" gives `s er`.

    For models and vocabulary files that were made with it; new ones use `unicode`.
    """
    return _WORD.findall(text.lower())


# ---- ptb: coco-caption's tokeniser (Stanford CoreNLP 3.4.1's PTBTokenizer, lower case, punctuation removed) ----
#
# A lexer: at every position, the rule that matches most characters (look-ahead included) gives the next token; of two
# equally long matches the first wins. A rule's group is the token; what it matches beyond the group is look-ahead.
#
# A rule that scans far ahead and then fails, at every position, takes quadratic time. Such a rule has a gate: it can
# match only if its `required` text comes before its `stop`, and the next position of both is remembered.

_PTB_DROPPED = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())
_PTB_ABBREVIATIONS = (
    # case does not matter
    "jan feb mar apr jun jul aug sept sep oct nov dec mon tues tue wed thurs thu fri "
    "ala ariz calif colo conn ct dak fla ga ind kans kan ky md mich minn mo mont neb nev okla penn tenn va vt wisc wis "
    "wyo mr mrs ms drs dr profs prof sens sen reps rep attys atty lt col gen messrs govs gov adm rev maj sgt cpl pvt "
    "capt ste st ave pres lieut hon brig cmdr comdr pfc spc supts supt det mt ft adj adv asst assoc ens insp mlle mme "
    "msgr sfc inc cos co corp ptys pty pte ltd plc bancorp dept bhd assn univ intl sys bros jr sr esq ph.d ph etc al "
    "seq bldg vs tel est ext sq cf rd blvd".split(),
    # only with a capital
    "az ark del ill la mass miss ore pa tex wash mfg".split(),
    # only before a number
    "ca figs fig nos no op pp art".split(),
)
_PTB_PERIOD = frozenset(_PTB_ABBREVIATIONS[0] + _PTB_ABBREVIATIONS[1])
# Words that begin a sentence even after a single letter and a period.
_PTB_STARTERS = (
    "A|AN|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|More|Mr\\.|Ms\\."
    "|Now|Once|One|Other|Our|She|Since|So|Some|Such|THE|THERE|THIS|That|The|Their|Then|There|These|They|This|We|What"
    "|When|While|Yet|You".split("|")
)
_PTB_QUOTES = {
    **dict.fromkeys("‘‛‹\x91", "`"), **dict.fromkeys("’›\x92", "'"),
    **dict.fromkeys("“«\x93", "``"), **dict.fromkeys("”»\x94", "''"),
}  # fmt: skip
_PTB_SYMBOLS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "&amp;": "&", "&lt;": "<",
    "&gt;": ">", "¢": "cents", "£": "#", "€": "$", "¤": "$", "₠": "$", "\x80": "$", "¼": "1/4", "½": "1/2",
    "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
    "\"": "''", **_PTB_QUOTES, **dict.fromkeys("–—―\x96\x97", "-"), "…": "...", "\x85": "...",
}  # fmt: skip


@functools.cache
def _ptb_rules() -> tuple[list[tuple[re.Pattern, str | None]], dict[str, tuple[re.Pattern, re.Pattern]]]:
    """Return the rules, each with the name of its gate, and the gates: name -> (required, stop)."""
    letter = rf"A-Za-z{_character_class('L', 'M')}"
    digit = rf"0-9{_character_class('Nd')}"
    alnum = rf"[{letter}{digit}]"
    apostrophe = r"(?:['’\x92]|&apos;)"
    quote = r"(?:['’\x92`‘‛\x91]|&apos;)"
    word = rf"[{letter}]{alnum}*(?:[.!?][{letter}]{alnum}*)*"
    part = rf"(?:[dDoOlL]{quote}(?={alnum}))?{alnum}+"
    thing = rf"{part}(?:[-_]{part})*"
    dotted_thing = rf"{alnum}[A-Za-z0-9.,]*(?:-(?:[A-Za-z0-9]+|[A-Za-z](?:\.[A-Za-z])+\.))+"
    company = r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
    number = rf"(?:[{digit}]*(?:[.:,][{digit}]+)+|[{digit}]+)"
    clitic = rf"{apostrophe}(?:[msd]|re|ve|ll)"
    sgml_name = r"[A-Za-z][A-Za-z0-9_:.-]*"
    sgml_attribute = rf" +{sgml_name}(?: *= *(?:'[^']*'|\"[^\"]*\"|{sgml_name}))?"
    any_case, capital, before_number = ("|".join(map(re.escape, names)) for names in _PTB_ABBREVIATIONS)
    capital = "|".join(f"{name[0].upper()}(?i:{name[1:]})" for name in capital.split("|"))
    extension = r"\.(?i:bmp|gif|html?|jpe?g|mov|mp3|pdf|png|txt|wav|zip)"
    no_domain, no_address = r"\s\"'`<>|.!?(){},-_$", r" \t\"<>|()\xa0{}"
    gates = {
        "dotted": (r"-[A-Za-z0-9]", r"[^A-Za-z0-9.,]"),
        "domain": (rf"(?<=[^{no_domain}])\.(?:com|edu|net|org)", rf"(?!\.)[{no_domain}]|\.\."),
        "address": (rf"@[^{no_address}.]", rf"[{no_address}]"),
        "file": (rf"(?<={alnum}){extension}", rf"[^{letter}{digit}.]|\.\."),
        "tag": (r">", r"(?!)"),
    }
    rules = [
        # words of two
        r"(?i:(can)not)",
        r"(?i:(gim|lem)me|(gon|wan)na|(got)ta)",
        rf"(?i:(?=({apostrophe}t)){apostrophe}t(?:is|was))",
        rf"(?i:(more){apostrophe}n)",
        # clitics, and words before one
        rf"([A-Za-z]+?)(?i:n{apostrophe}t)",
        rf"((?i:n{apostrophe}t))",
        rf"({word})(?i:{clitic})(?![A-Za-z])",
        rf"((?i:{clitic}))(?![A-Za-z])",
        r"([’\x92](?i:[msd]|re|ve|ll))",
        # words with an apostrophe of their own
        rf"({apostrophe}n(?:{apostrophe}|(?!{alnum}))|[lLdDjJyY]{apostrophe}|(?i:dunkin|somethin|ol){apostrophe}|"
        rf"{apostrophe}(?:em|cause|till?|[2-9]0s|[0-9][0-9](?=\s|$))|(?i:c{apostrophe}mon|o{apostrophe}er|"
        rf"e{apostrophe}er|ma{apostrophe}am|s{apostrophe}mores|o{apostrophe}clock|d{apostrophe}ye)|"
        rf"[A-HJ-XZn]{quote}[{letter}]{{2,}}|qu{apostrophe}[{letter}]+|[{letter}]+[aeiouyAEIOUY]{quote}[aeiouA-Z][{letter}]*)",
        # abbreviations
        rf"([A-Za-z])\.(?:\s(?:{'|'.join(_PTB_STARTERS)})(?=\s|$)|$)",
        r"([A-Za-z]\.)",
        r"([A-Za-z](?:\.[A-Za-z])+\.)",
        rf"((?i:{any_case})\.|(?:{capital})\.)",
        rf"((?i:{before_number})\.)\s?[0-9]",
        ("dotted", rf"((?:{word}|{thing}|{dotted_thing}|{company})\.)[,;:、]"),
        rf"((?:{word}|{thing}|{company})\.)[,;:、]",
        # addresses
        r"(https?://[^ \t\"<>|()]+[^ \t\"<>|.!?(){},-])",
        ("domain", rf"((?:[^{no_domain}]+\.)+(?:com|edu|net|org))"),
        ("address", rf"(<?[A-Za-z0-9][^{no_address}]*@(?:[^{no_address}.]+\.)*[^{no_address}.]+>?)"),
        rf"(@[A-Za-z_][A-Za-z0-9_]*|#[{letter}]+)",
        ("file", rf"({alnum}+(?:\.{alnum}+)*{extension})"),
        # words and numbers
        rf"({word})",
        rf"({thing})",
        ("dotted", rf"({dotted_thing})"),
        rf"({company})",
        r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})",
        r"((?i:c\+\+|[cf]#))",
        rf"([+-]?{number})",
        r"([0-9]{1,2}[-/][0-9]{1,2}[-/][0-9]{2,4})",
        r"((?:[0-9]{1,4}[- \xa0])?[0-9]{1,4}[/⁄][0-9]{1,4})",
        r"((?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])"
        r"[0-9]{3,4}[- \xa0]?[0-9]{3,5})",
        r"([A-Z]+\$)",
        # signs
        ("tag", rf"(<(?:[!?][A-Za-z-][^>]*|{sgml_name}(?:{sgml_attribute})* */?|/{sgml_name} *)>)"),
        r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])(?![A-Za-z0-9])",
        r"([-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\))",
        r"([`‘’‛‹›“”«»\x91-\x94]{2})",
        r"(&(?:amp|lt|gt|#[0-9]+);)",
        r"(?:&(?:quot|nbsp|[mn]dash);)()",
        r"(\.{3,5}|(?:\.[ \xa0]){2,4}\.|-+|''|``|<<|>>|[!?]+|_+|#+|\*+)",
        rf"([!-/:-@\[-`{{-~¡-¿×÷{_character_class('S', 'P', 'No')}])",
    ]
    named = [(None, rule) if isinstance(rule, str) else rule for rule in rules]
    compiled_gates = {name: (re.compile(required), re.compile(stop)) for name, (required, stop) in gates.items()}
    return [(re.compile(rule), gate) for gate, rule in named], compiled_gates


_SPACE = re.compile(r"\s*")
_PTB_WORD = re.compile(r"([A-Za-z][A-Za-z0-9]*)(?=,?(?:\s|$))")
_PTB_PLAIN = re.compile(r"(?:[A-Za-z]+(?:-[A-Za-z]+)*,? +)*([A-Za-z]+)(?:-[A-Za-z]+)* *\.?")


def ptb(text: str) -> list[str]:
    """Split a caption into the words that coco-caption scores: its PTB tokeniser, lower-cased, without punctuation.

    `docs/evaluation.md` lists the differences from the Java original.
    """
    text = text.strip()
    plain = _PTB_PLAIN.fullmatch(text)
    if plain and not _JOINED.search(text.lower()) and not (text[-1] == "." and plain[1].lower() in _PTB_PERIOD):
        return text.lower().replace(",", " ").replace(".", " ").split()
    return [token for token in _ptb_tokens(text) if token.strip(".-") and token not in _PTB_DROPPED]


_CLITIC = re.compile(r"(n?)(?:['’\x92]|&apos;)([msdt]|re|ve|ll)", re.IGNORECASE)


def _spell(token: str) -> str:
    """Write a token as the original does: a space inside it is a no-break space, a parenthesis in a face -rrb-."""
    if token[0] in "`‘’‛‹›\x91\x92“”«»\x93\x94" and len(token) == 2:
        return "".join(_PTB_QUOTES.get(sign, sign) for sign in token).lower()
    if clitic := _CLITIC.fullmatch(token):
        return f"{clitic[1]}'{clitic[2]}".lower()
    for sign in "()":
        token = token.replace(sign, _PTB_SYMBOLS[sign])
    return token.replace(" ", "\xa0").replace("&amp;", "&").lower()


def _opener(text: str, required: re.Pattern, stop: re.Pattern) -> Callable[[int], bool]:
    """Return a function of rising positions: whether `required` follows, before `stop`. It scans `text` once."""
    next_required = next_stop = -1

    def is_open(at: int) -> bool:
        nonlocal next_required, next_stop
        if next_required <= at:
            match = required.search(text, at + 1)
            next_required = match.start() if match else len(text) + 1
        if next_stop <= at:
            match = stop.search(text, at + 1)
            next_stop = match.start() if match else len(text)
        return next_required <= next_stop

    return is_open


def _ptb_tokens(text: str) -> Iterator[str]:
    rules, gates = _ptb_rules()
    is_open = {name: _opener(text, *gate) for name, gate in gates.items()}
    token_end = 0
    while (at := _SPACE.match(text, token_end).end()) < len(text):
        if (word := _PTB_WORD.match(text, at)) and word[1].lower() not in _JOINED_WORDS:
            token_end = word.end()
            yield word[1].lower()
            continue
        token, token_end, longest = "", at + 1, at  # a character that no rule matches is dropped
        for rule, gate in rules:
            match = rule.match(text, at) if gate is None or is_open[gate](at) else None
            if match and match.end() > longest:
                longest = match.end()
                token, token_end = match[match.lastindex], match.end(match.lastindex)
        if token:
            yield _PTB_SYMBOLS.get(token) or _spell(token)


TOKENIZERS: dict[str, Callable[[str], list[str]]]
TOKENIZERS = {"unicode": unicode, "treebank": treebank, "ptb": ptb, "words": words}
