"""METEOR 1.5 and SPICE, computed by the jars of pycocoevalcap; optional, as they need Java.

`pip install "showtell[java]"` installs the jars, `apt install default-jre-headless` (or any Java from 8 on) runs them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from showtell.errors import UserError

_STATISTICS = 23  # METEOR's numbers for one image
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class JavaMetricError(UserError):
    """A Java metric cannot run on this machine; the message says what is missing and how to install it."""


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = (home and shutil.which("java", path=os.path.join(home, "bin"))) or shutil.which("java")
    if java is None:
        raise JavaMetricError("no Java on the path; install one (on Debian: apt install default-jre-headless)")
    return java


def _package() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        raise JavaMetricError('pycocoevalcap is not installed; pip install "showtell[java]"')
    return Path(next(iter(found.submodule_search_locations)))


def _failed(jar: str, answer: subprocess.CompletedProcess, remedy: str) -> JavaMetricError:
    detail = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
    return JavaMetricError(f"{jar}'s jar failed ({detail}); {remedy}")


def missing() -> str | None:
    """Return what METEOR lacks on this machine and how to install it, or None if it can run."""
    try:
        _java()
        if (_package() / "meteor" / "meteor-1.5.jar").is_file():
            return None
        return 'pycocoevalcap has no METEOR jar; pip install --force-reinstall "showtell[java]"'
    except JavaMetricError as error:
        return str(error)


def meteor_statistics(references: Sequence[Sequence[Sequence[str]]], candidates: Sequence[Sequence[str]]) -> np.ndarray:
    """Compute METEOR 1.5's counts for each image, `(N, 23)`, against the reference with the highest score.

    The jar aligns the tokens (exact, stem, synonym, paraphrase); `meteor_from_statistics` turns the counts into scores.
    If Java or the jar is missing or fails, this raises a `JavaMetricError`.
    """
    if reason := missing():
        raise JavaMetricError(reason)
    lines = []
    for group, candidate in zip(references, candidates, strict=True):
        captions = [" ".join(tokens).replace("|||", "").replace("  ", " ") for tokens in (*group, candidate)]
        lines.append(" ||| ".join(["SCORE", *captions]))
    # English and UTF-8 in every locale; in others the jar prints 0,5 and misreads accents.
    command = [_java(), "-Xmx2G", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-jar", "meteor-1.5.jar"]
    answer = subprocess.run(
        # Name the paraphrase file: the jar does not find it by itself in a folder with a space in its name.
        [*command, "-", "-", "-stdio", "-l", "en", "-norm", "-a", "data/paraphrase-en.gz"],
        cwd=_package() / "meteor",
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        encoding="utf-8",
    )
    rows = answer.stdout.split("\n")[: len(lines)]
    try:
        statistics = np.array([[float(number) for number in row.split()] for row in rows])
        statistics = statistics.reshape(len(lines), _STATISTICS)
    except ValueError:
        raise _failed("METEOR", answer, "check that `java -version` works") from None
    # METEOR does not penalise the single chunk of a candidate that equals its reference, in sums over images either.
    whole = (statistics[:, 21:23] == statistics[:, 0:2]).all(axis=1) & (statistics[:, 20] == 1)
    statistics[whole, 20] = 0
    return statistics


def meteor_from_statistics(statistics: np.ndarray) -> np.ndarray:
    """Compute METEOR from counts, `(..., 23) -> (...)`; from the sum of counts, that of a corpus.

    Denkowski and Lavie 2014 with the English parameters: match weights 1 (exact), 0.6 (stem), 0.8 (synonym) and 0.6
    (paraphrase), content words 0.75 and function words 0.25, alpha 0.85, beta 0.2, gamma 0.6.
    """
    statistics = np.asarray(statistics, dtype=float)
    lengths, function_words = statistics[..., 0:2], statistics[..., 2:4]  # of candidate and reference
    matches = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 4)  # stage, (content c, r, function c, r)
    chunks, matched_words = statistics[..., 20], statistics[..., 21:23]
    weighted = np.einsum("...sk,s->...k", matches, np.array([1, 0.6, 0.8, 0.6]))
    weighted = 0.75 * weighted[..., 0:2] + 0.25 * weighted[..., 2:4]
    weights = 0.75 * (lengths - function_words) + 0.25 * function_words
    precision, recall = np.moveaxis(_divide(weighted, weights), -1, 0)
    mean = _divide(precision * recall, 0.85 * precision + 0.15 * recall)
    fragmentation = _divide(chunks, matched_words.mean(axis=-1))
    return mean * (1 - 0.6 * fragmentation**0.2)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b > 0)


def spice_values(
    references: Sequence[Sequence[str]], candidates: Sequence[str], announce: Callable[[str], None]
) -> np.ndarray:
    """Compute SPICE's F-score for each image, `(N,)`, from captions as text (Anderson et al. 2016).

    The first use downloads its parser, about 0.4 GB; `announce` is called with a message before. What is missing or
    fails raises a `JavaMetricError`.
    """
    java, folder = _java(), _package() / "spice"
    if not all((folder / "lib" / name).is_file() for name in _SPICE_MODELS):
        announce("SPICE needs Stanford CoreNLP once: fetching about 0.4 GB from nlp.stanford.edu")
        try:
            from pycocoevalcap.spice.get_stanford_models import get_stanford_models

            get_stanford_models()
        except Exception as error:  # a download can fail in many ways
            message = f"Stanford CoreNLP could not be fetched ({error}); check the network, or omit --spice"
            raise JavaMetricError(message) from error
    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary, "captions.json"), Path(temporary, "scores.json")
        items = [
            {"image_id": i, "test": candidate, "refs": list(group)}
            for i, (group, candidate) in enumerate(zip(references, candidates, strict=True))
        ]
        source.write_text(json.dumps(items), encoding="utf-8")
        command = [java, "-Xmx8G", "-jar", "spice-1.0.jar", str(source), "-out", str(target), "-silent"]
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        if answer.returncode or not target.is_file():
            raise _failed("SPICE", answer, "use Java 8 or 11 and 8 GB of memory")
        results = json.loads(target.read_text(encoding="utf-8"))
    values = np.zeros(len(items))
    for item in results:
        values[int(item["image_id"])] = float(item["scores"]["All"]["f"])
    return values
