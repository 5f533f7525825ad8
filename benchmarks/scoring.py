"""Time the tokenisers and the scoring of 5,000 images with 5 references each, beside the reference implementation.

    python benchmarks/scoring.py [--captions FILE]      the reference needs pycocoevalcap and Java

Without a file the captions are those of the synthetic set, which are more alike than human captions. The candidate of
an image is a caption of the next image.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import itertools
import os
import sys
import timeit
from collections.abc import Callable

if __name__ == "__main__":
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # one core, before numpy is loaded
        os.environ.setdefault(threads, "1")

from showtell import java_metrics, metrics
from showtell.annotations import read_captions
from showtell.tokenizer import TOKENIZERS, ptb

N_IMAGES = 5000


def captions(path: str | None) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return five references for each of 5,000 images, and as its candidate a caption of another image."""
    if path:
        groups = [group[:5] for group in read_captions(path).values() if len(group) >= 5]
        if len(groups) < N_IMAGES:
            sys.exit(f"{path} has {len(groups)} images with five captions; {N_IMAGES} are needed")
    else:
        from showtell import synthetic

        groups = [synthetic.describe(synthetic.scene(i), n=5) for i in range(N_IMAGES)]
    references = {str(i): group for i, group in enumerate(groups[:N_IMAGES])}
    return references, {str(i): references[str((i + 1) % N_IMAGES)][i % 5] for i in range(N_IMAGES)}


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    return min(timeit.repeat(work, setup=gc.enable, number=1, repeat=repeats))  # timeit alone measures without gc


def ours(references: dict[str, list[str]], candidates: dict[str, str]) -> dict[str, float]:
    texts = [*itertools.chain(*references.values()), *candidates.values()]
    true = [[ptb(text) for text in group] for group in references.values()]
    written = [ptb(text) for text in candidates.values()]
    scores = metrics.score(references, candidates)
    times = {
        "tokenise": seconds(lambda: [ptb(text) for text in texts]),
        "BLEU": seconds(lambda: metrics.bleu(true, written)),
        "ROUGE-L": seconds(lambda: metrics.rouge_l(true, written)),
        "CIDEr-D": seconds(lambda: metrics.cider_d(true, written)),
        "all four at once": seconds(lambda: metrics.score(references, candidates)),
        "1,000 bootstrap resamples": seconds(lambda: metrics.bootstrap(scores, 1000)),
    }
    for name, cut in TOKENIZERS.items():
        times[f"{name} tokeniser"] = seconds(lambda cut=cut: [cut(text) for text in texts])
    return times


def reference(references: dict[str, list[str]], candidates: dict[str, str]) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    raw = {image: [{"caption": text} for text in group] for image, group in references.items()}
    written = {image: [{"caption": text}] for image, text in candidates.items()}
    tokens: dict[str, dict] = {}

    def tokenise() -> None:
        tokens["true"], tokens["written"] = PTBTokenizer().tokenize(raw), PTBTokenizer().tokenize(written)

    with contextlib.redirect_stdout(io.StringIO()):
        times = {"tokenise": seconds(tokenise, 1)}
        for name, scorer in (("BLEU", Bleu(4)), ("ROUGE-L", Rouge()), ("CIDEr-D", Cider())):
            times[name] = seconds(lambda scorer=scorer: scorer.compute_score(tokens["true"], tokens["written"]), 1)
    return times | {"all four at once": sum(times.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", metavar="FILE", help="captions of 5,000 images, as `showtell score` reads")
    data = captions(parser.parse_args().captions)
    reason = java_metrics.missing()
    mine, theirs = ours(*data), {} if reason else reference(*data)
    print(f"{N_IMAGES:,} images, 5 references each; seconds on one core, best of three (the reference: once, with JVM)")
    print(f"{'':28}{'showtell':>10}{'reference':>11}")
    for name, value in mine.items():
        print(f"{name:28}{value:10.2f}{theirs[name]:11.2f}" if name in theirs else f"{name:28}{value:10.2f}{'-':>11}")
    if reason:
        print(f"the reference implementation cannot run: {reason}")


if __name__ == "__main__":
    main()
