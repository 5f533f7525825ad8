"""The rows of the table: each is a function that measures, and returns one line or several.

A line compares rates (work per second) or costs (seconds, megabytes) of the same work, measured in turn: rival, ours,
rival, ours, …. The ratio is the median of the ratios of neighbours.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import rivals
import scoring
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models
from workload import ROOT, Workload, captions, open_model

from showtell import java_metrics, metrics
from showtell.backbones import Backbone
from showtell.decoding import beam_search
from showtell.features import FeatureCache
from showtell.image_stream import stream_images
from showtell.train import Trainer
from showtell.transforms import Transform, read_image
from showtell.vocabulary import Vocabulary


@dataclass
class Line:
    """One line of the table; `rival`, `ours` and `limit` are in `unit`."""

    row: int
    work: str
    unit: str
    rival: float | None
    ours: float
    ratio: float | None  # how many times better ours is
    limit: float | None
    reached: str  # in the terms of the target
    must: str
    goal: str
    runs: int
    rival_is: str = ""
    limit_is: str = ""
    measured: str = ""  # the share that was measured, and how the rest was extrapolated


Way = Callable[[int], float]  # run number -> rate or cost


def in_turn(runs: int, *ways: Way) -> list[list[float]]:
    """Measure each way `runs` times in turn; return the values of each way."""
    return [list(values) for values in zip(*[[way(run) for way in ways] for run in range(runs)], strict=True)]


def times(better: list[float], worse: list[float]) -> float:
    return statistics.median(b / w for b, w in zip(better, worse, strict=True))


def median(values: list[float]) -> float:
    return statistics.median(values)


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rate(n: int, work: Callable[[], object]) -> float:
    return n / seconds(work)


def matrix_rate(side: int, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a matrix product."""
    one = torch.randn(side, side).to(dtype)
    one @ one
    return 2 * side**3 * 3 / seconds(lambda: [one @ one for _ in range(3)])


def resnet(w: Workload) -> nn.Module:
    """Return torchvision's network, up to the pooling."""
    return nn.Sequential(*list(models.get_model(w.encoder, weights=None).children())[:-1]).eval()


def backbone_rate(w: Workload, net: nn.Module, batch: int = 32) -> float:
    images = torch.rand(min(batch, w.size.images), 3, w.size.side, w.size.side)
    with torch.inference_mode():
        net(images[:2])
        return rate(len(images), lambda: net(images))


class Training:
    """A trainer whose steps are timed."""

    def __init__(self, w: Workload, recipe: str, precision: str) -> None:
        self.trainer: Trainer = w.trainer(recipe, precision=precision)
        self.batches, self.n_steps = iter(self.trainer.loader), w.size.steps
        self.dtype = torch.bfloat16 if self.trainer.bfloat16 else torch.float32
        self.rate(0)

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.trainer.loader)
            return next(self.batches)

    def rate(self, _: int) -> float:
        """Return captions per second, the loader's work included."""
        n, started = 0, time.perf_counter()
        for _ in range(self.n_steps):
            images, texts = self.next()
            self.trainer._train_step([(images, texts)])
            n += int((texts[..., 0] >= 0).sum())
        return n / (time.perf_counter() - started)

    @property
    def flops(self) -> float:
        """The floating-point operations of the matrix products of a caption, forward and backward."""
        with FlopCounterMode(display=False) as counter, torch.backends.mkldnn.flags(enabled=False):
            images, texts = self.next()
            self.trainer._train_step([(images, texts)])
        return counter.get_total_flops() / int((texts[..., 0] >= 0).sum())


@lru_cache
def training(w: Workload, recipe: str, precision: str) -> Training:
    return Training(w, recipe, precision)


def cache_rate(w: Workload, precision: str) -> Way:
    """Return what builds a feature cache of other images in each run, and returns its images per second."""
    backbone, transform = pooled(w), Transform(resize=(w.size.side, w.size.side))

    def build(run: int) -> float:
        folder = w.folder / f"built-{precision}-{run}-{time.time_ns()}"
        files = w.files(w.size.images, run)
        images = w.caption_set.subset(1)
        images.image_ids, images.files, images.folder = files, files, ""
        images.captions = [[""]] * len(files)
        cache = FeatureCache.open(folder, backbone, transform, precision)
        return rate(len(files), lambda: cache.build(images, 2, progress=False))

    return build


@lru_cache
def pooled(w: Workload) -> Backbone:
    return Backbone(w.encoder, weights=w.size.weights)


def in_bfloat16(w: Workload) -> nn.Module:
    return pooled(w).in_bfloat16()


def row_1(w: Workload) -> list[Line]:
    """Train Show and Tell on Flickr8k for five epochs, the feature cache included."""
    net, batch = resnet(w), min(64, len(w.caption_set))
    data = rivals.CourseData(
        w.caption_set, training(w, "flickr8k-show-tell", "float32").trainer.vocab, w.size.side, batch
    )
    size = w.size.recipe("flickr8k-show-tell").embed_size
    loop = rivals.CourseLoop(data, rivals.CourseModel(net, pooled(w).feature_size, size, len(data.vocab)))
    n, n_images = 5 * len(data), len(w.caption_set)

    def ours(precision: str) -> Way:
        own, build = training(w, "flickr8k-show-tell", precision), cache_rate(w, precision)
        return lambda run: n / own.rate(run) + n_images / build(run)

    def theirs(_: int) -> float:
        return n / batch * loop.step()

    course, exact, half = in_turn(w.size.few, theirs, ours("float32"), ours("bfloat16"))
    alone = backbone_rate(w, net, batch)
    share = f"rival: a step of {batch} captions; ours: {w.size.images} images and {w.size.steps} steps"
    share += f", extrapolated to {n:,} captions; the rival encodes {n / median(course):.1f} images/s, "
    share += f"its network alone {alone:.1f}"
    limit = n_images / backbone_rate(w, in_bfloat16(w), w.size.images)
    how = {"rival_is": "the course's loop", "limit_is": "the backbone alone, once per image", "measured": share}
    return [
        Line(
            1,
            f"Show and Tell, Flickr8k, 5 epochs, {name}",
            "s",
            median(course),
            median(own),
            times(course, own),
            limit,
            f"{times(course, own):.0f}×",
            "60×",
            "80×",
            w.size.few,
            **how,
        )
        for name, own in (("float32", exact), ("bfloat16", half))
    ]


def row_2(w: Workload) -> list[Line]:
    """Compare training steps with the matrix products that they consist of."""
    lines = []
    for recipe, must, goal in (("flickr8k-show-tell", "75 %", "85 %"), ("flickr8k-attend", "60 %", "75 %")):
        for precision in ("float32", "bfloat16"):
            own = training(w, recipe, precision)
            flops = own.flops
            ours, peak = in_turn(w.size.runs, own.rate, lambda _, own=own: matrix_rate(w.size.matrix, own.dtype))
            share = median([flops * o / p for o, p in zip(ours, peak, strict=True)])
            lines.append(
                Line(
                    2,
                    f"training step, {own.trainer.recipe.decoder}, {precision}",
                    "GFLOP/s",
                    None,
                    flops * median(ours) / 1e9,
                    None,
                    median(peak) / 1e9,
                    f"{100 * share:.0f} %",
                    must,
                    goal,
                    w.size.runs,
                    limit_is=f"a product of two {w.size.matrix} × {w.size.matrix} matrices",
                    measured=f"{flops / 1e6:.0f} MFLOP per caption, in matrix products, forward and backward",
                )
            )
    return lines


def row_3(w: Workload) -> list[Line]:
    """Train the decoders with attention from cached grids."""
    lines = []
    for recipe, must, goal in (("flickr8k-attend", "400", "600"), ("flickr8k-top-down", "", "")):
        own = training(w, recipe, "bfloat16")
        model, trainer = w.size.recipe(recipe), own.trainer
        grids, _ = own.next()
        loop = rivals.TutorialLoop(rivals.TutorialAttend(grids.shape[2], model.hidden_size, len(trainer.vocab)))

        def theirs(_: int, own: Training = own, loop: rivals.TutorialLoop = loop) -> float:
            started = time.perf_counter()
            n = loop.step(*own.next())
            return n / (time.perf_counter() - started)

        rival, ours = in_turn(w.size.few, theirs, own.rate)
        limit = matrix_rate(w.size.matrix, own.dtype) / own.flops
        lines.append(
            Line(
                3,
                f"training, {model.decoder}, bfloat16, cached grids",
                "captions/s",
                median(rival),
                median(ours),
                times(ours, rival),
                limit,
                f"{median(ours):.0f}",
                must,
                goal,
                w.size.few,
                "attention as in the tutorials: each caption with its own grid",
                "its matrix products at the full rate",
                f"rival: a step; ours: {w.size.steps} steps",
            )
        )
    return lines


def row_4(w: Workload) -> list[Line]:
    """Build the feature cache."""
    net, transform = resnet(w), rivals.pil_transform(w.size.side)

    @torch.no_grad()
    def theirs(run: int) -> float:
        files = w.files(min(32, w.size.images), run)
        return rate(len(files), lambda: net(torch.stack([rivals.read(path, transform) for path in files])))

    rival, exact, half, alone = in_turn(
        w.size.few,
        theirs,
        cache_rate(w, "float32"),
        cache_rate(w, "bfloat16"),
        lambda _: backbone_rate(w, in_bfloat16(w), w.size.images),
    )
    how = ("Pillow, torchvision's transforms and network, batches of 32", "the folded backbone alone, bfloat16")
    return [
        Line(
            4,
            f"feature cache, {name}",
            "images/s",
            median(rival),
            median(own),
            times(own, rival),
            median(alone),
            f"{median(own):.0f}",
            "45",
            "80",
            w.size.few,
            *how,
            f"{w.size.images} images a run",
        )
        for name, own in (("float32", exact), ("bfloat16", half))
    ]


@lru_cache
def tutorial_captioner(w: Workload) -> rivals.TutorialCaptioner:
    """Return the rival with the weights of our model, so that both search among the same captions."""
    model = w.exact.model
    net = copy.deepcopy(model.encoder.backbone.net).to(memory_format=torch.contiguous_format)
    return rivals.TutorialCaptioner(net, model.encoder.embed, model.decoder, w.size.side)


def row_5(w: Workload) -> list[Line]:
    """Caption JPEG files by beam search."""
    tutorial = tutorial_captioner(w)

    def theirs(run: int) -> float:
        files = w.files(w.size.one_by_one, run)
        return rate(len(files), lambda: [tutorial(path) for path in files])

    def caption(captioner: object) -> Way:
        list(captioner.caption_files(w.files(2)))
        return lambda run: rate(w.size.images, lambda: list(captioner.caption_files(w.files(w.size.images, run))))

    net = in_bfloat16(w)
    rival, ours, onnx, alone, graph = in_turn(
        w.size.few,
        theirs,
        caption(w.captioner),
        caption(w.onnx),
        lambda _: backbone_rate(w, net, w.size.images),
        lambda run: onnx_encoder_rate(w),
    )
    share = f"rival: {w.size.one_by_one} images; ours: {w.size.images}, 32 at once"
    return [
        Line(
            5,
            f"JPEG files to captions, beam 5, {name}",
            "images/s",
            median(rival),
            median(own),
            times(own, rival),
            median(limit),
            f"{median(own):.0f}",
            must,
            goal,
            w.size.few,
            "one image at a time",
            "the encoder alone",
            share,
        )
        for name, own, limit, must, goal in (
            ("torch bfloat16", ours, alone, "30", "40"),
            ("ONNX int8", onnx, graph, "60", "80"),
        )
    ]


def onnx_encoder_rate(w: Workload) -> float:
    images = list(np.random.default_rng(0).random((min(32, w.size.images), 3, w.size.side, w.size.side), np.float32))
    w.onnx.engine.encode(images[:2])
    return rate(len(images), lambda: w.onnx.engine.encode(images))


_LAUNCH = """
import json, os, sys, time
started = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, 1, 0)])
_, status, usage = os.wait4(child, 0)
print(json.dumps([time.perf_counter() - started, usage.ru_maxrss / 1024, status]))
"""


@lru_cache
def launched(*command: str, run: int = 0) -> tuple[float, float]:
    """Run a command; return its seconds and peak megabytes.

    A small process starts it, because on Linux a child's peak memory begins with that of its parent.
    """
    launch = [sys.executable, "-c", _LAUNCH, sys.executable, *command]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True)
    took, peak, status = json.loads(done.stdout)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    return took, peak


def cold(w: Workload, way: str, run: int) -> tuple[float, float]:
    """Caption one photograph in a process of its own; rows 6 and 9 share the measurement."""
    photo, model = w.files(1)[0], str(w.exported if way == "onnx" else w.model())
    if way == "rival":
        return launched(str(ROOT / "benchmarks/one_by_one.py"), model, photo, run=run)
    return launched("-m", "showtell", "caption", photo, "--model", model, "--engine", way, run=run)


def one_photograph(w: Workload, row: int, part: int, unit: str, targets: tuple, limit_is: str) -> list[Line]:
    ways = ("rival", "torch", "onnx")
    if w.size.few > 1:
        cold(w, "onnx", -1), cold(w, "torch", -1)  # to read the files from memory
    rival, ours, onnx = in_turn(w.size.few, *[lambda run, way=way: cold(w, way, run)[part] for way in ways])
    limits = [launched("-c", f"import {names}")[part] for names in ("torch", "onnxruntime")]
    what = ("seconds", "peak memory")[part]
    return [
        Line(
            row,
            f"one photograph, cold, {what}, {name}",
            unit,
            median(rival),
            median(own),
            times(rival, own),
            limit,
            f"{median(own):.{2 * (1 - part)}f} {unit}",
            must,
            goal,
            w.size.few,
            "a script in the tutorials' way",
            limit_is,
        )
        for name, own, limit, must, goal in zip(
            ("torch bfloat16", "ONNX int8"), (ours, onnx), limits, *targets, strict=True
        )
    ]


def row_6(w: Workload) -> list[Line]:
    """Caption one photograph, from the start of the process to its end."""
    return one_photograph(w, 6, 0, "s", (("3.0 s", "0.7 s"), ("2.5 s", "0.4 s")), "importing torch, or ONNX Runtime")


def row_7(w: Workload) -> list[Line]:
    """Caption one photograph with an open model."""
    tutorial = tutorial_captioner(w)
    photo = w.files(1)[0]

    def milliseconds(work: Callable[[str], object]) -> Way:
        return lambda _: 1000 * seconds(lambda: work(photo))

    def encode(captioner: object) -> Way:
        (batch,) = stream_images([photo], captioner.transform, as_arrays=captioner.engine.as_arrays)
        images = [image.pixels for image in batch]
        return lambda _: 1000 * seconds(lambda: captioner.engine.encode(images))

    ways = [milliseconds(work) for work in (tutorial, w.captioner.caption, w.onnx.caption)]
    ways += [encode(w.captioner), encode(w.onnx)]
    for way in ways:
        way(0)
    rival, ours, onnx, alone, graph = in_turn(4 * w.size.runs, *ways)
    return [
        Line(
            7,
            f"one photograph, warm, beam 5, {name}",
            "ms",
            median(rival),
            median(own),
            times(rival, own),
            median(limit),
            f"{median(own):.0f} ms",
            must,
            goal,
            4 * w.size.runs,
            "one image at a time",
            "the encoder alone",
        )
        for name, own, limit, must, goal in (
            ("torch bfloat16", ours, alone, "70 ms", "50 ms"),
            ("ONNX int8", onnx, graph, "35 ms", "20 ms"),
        )
    ]


def row_8(w: Workload) -> list[Line]:
    """Search for the captions of encoded images."""
    lines = []
    for kind in ("attend", "classic"):
        captioner = open_model(w.model(kind))
        some = captioner.encode(w.files(min(64, w.size.images)))
        features = some[torch.arange(w.size.encoded) % len(some)]
        decoder, options = captioner.model.decoder, captioner.decoding_options()

        def theirs(run: int, features: torch.Tensor = features, decoder: nn.Module = decoder) -> float:
            n = min(w.size.decoded, len(features))
            chosen = [features[(run * n + i) % len(features)][None] for i in range(n)]
            return rate(n, lambda: [rivals.beam_search(decoder, one) for one in chosen])

        def ours(_: int, captioner: object = captioner, features: torch.Tensor = features) -> float:
            return rate(len(features), lambda: captioner.decode(features))

        def steps(_: int, features: torch.Tensor = features, decoder: nn.Module = decoder, options=options) -> float:
            """Return the rate of the decoder's steps alone, as many as the search takes."""
            lengths = [len(own[0].ids) + 1 for own in beam_search(decoder, features[:64], options)]
            return len(lengths) / step_seconds(decoder, features[:64], round(sum(lengths) / len(lengths)))

        rival, own, alone = in_turn(w.size.few, theirs, ours, steps)
        lines.append(
            Line(
                8,
                f"beam 5 over {w.size.encoded:,} encoded images, {kind}",
                "images/s",
                median(rival),
                median(own),
                times(own, rival),
                median(alone),
                f"{times(own, rival):.1f}×",
                "10×",
                "20×",
                w.size.few,
                "one image at a time",
                "the decoder's steps alone, at 64 images",
                f"rival: {w.size.decoded} images",
            )
        )
    return lines


@torch.no_grad()
def step_seconds(decoder: nn.Module, features: torch.Tensor, n_steps: int, k: int = 5) -> float:
    memory, state = decoder.start(features)
    state = tuple(part.repeat_interleave(k, 0) for part in state)
    words = torch.zeros(len(features) * k, dtype=torch.long)

    def steps() -> None:
        now = state
        for _ in range(n_steps):
            _, now, _ = decoder.step(words, memory, now)

    return seconds(steps)


def row_9(w: Workload) -> list[Line]:
    """Take the memory of the processes of row 6."""
    targets = (("800 MB", "250 MB"), ("600 MB", "150 MB"))
    return one_photograph(w, 9, 1, "MB", targets, "importing torch, or ONNX Runtime")


def row_10(w: Workload) -> list[Line]:
    """Read JPEG files as batches, in one process."""
    transform, side = rivals.pil_transform(w.size.side), w.size.side
    ours, n = Transform(resize=(side, side)), 4 * w.size.images

    def theirs(run: int) -> float:
        files = w.files(n, run)
        batches = [files[i : i + 32] for i in range(0, n, 32)]
        return rate(n, lambda: [torch.stack([rivals.read(path, transform) for path in batch]) for batch in batches])

    def threads(workers: int) -> Way:
        def read(run: int) -> float:
            batches = stream_images(w.files(n, run), ours, 32, workers)
            return rate(n, lambda: [torch.stack([image.pixels for image in batch]) for batch in batches])

        return read

    def decode(run: int) -> float:
        files = w.files(n, run)
        return rate(n, lambda: [read_image(path) for path in files])

    rival, one, two, alone = in_turn(w.size.runs, theirs, threads(1), threads(2), decode)
    return [
        Line(
            10,
            f"JPEG files to batches, one process, {name}",
            "images/s",
            median(rival),
            median(own),
            times(own, rival),
            median(alone),
            f"{times(own, rival):.1f}×",
            "3×",
            "5×",
            w.size.runs,
            "Pillow and torchvision's transforms, num_workers=0",
            "decoding alone, one thread",
            f"{n} images a run",
        )
        for name, own in (("1 thread", one), ("2 threads", two))
    ]


def row_11(w: Workload) -> list[Line]:
    """Start and run a training of COCO's size, the second time."""
    steps = max(1, w.size.steps // 2)
    for n_steps in (1, steps)[-w.size.few :]:  # the first run writes the data
        command = [sys.executable, str(ROOT / "benchmarks/coco_size.py"), str(w.folder / "coco")]
        done = subprocess.run([*command, str(n_steps), w.size_name], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    large, small = (median(list(values)) for values in zip(*found["steps"], strict=True))
    slower = 100 * (times(*map(list, zip(*found["steps"], strict=True))) - 1)
    peak = found["peak_mb"] - found["after_imports_mb"]
    size = f"{found['captions']:,} captions, {found['images']:,} images, {found['words']:,} words"
    work = "training of COCO's size, bfloat16"
    runs = {"runs": len(found["steps"]), "measured": f"{size}; {steps} steps in turn with Flickr8k's size"}
    begin = f"from the start of the process, {found['imports_s']:.1f} s of it imports"
    return [
        Line(
            11,
            f"{work}, peak memory above imports",
            "MB",
            None,
            peak,
            None,
            None,
            f"{peak / 1000:.2f} GB",
            "2 GB",
            "1 GB",
            1,
            measured=size,
        ),
        Line(
            11,
            f"{work}, start to first step, second time",
            "s",
            None,
            found["first_step_s"],
            None,
            found["imports_s"],
            f"{found['first_step_s']:.1f} s",
            "20 s",
            "10 s",
            1,
            limit_is="imports",
            measured=begin,
        ),
        Line(
            11,
            f"{work}, time per step",
            "ms per 1,000 words",
            None,
            large,
            None,
            small,
            f"{slower:+.1f} %",
            "+5 %",
            "+2 %",
            limit_is="the same with Flickr8k's number of images and captions",
            **runs,
        ),
    ]


def row_12(w: Workload) -> list[Line]:
    """Build a vocabulary, and score captions."""
    texts = captions(w.size.vocabulary)
    part = texts[: max(1, len(texts) // 5)]
    total = len(texts) / len(part)
    ways = [lambda _: total * seconds(lambda: rivals.vocabulary(part))]
    ways += [lambda _, name=name: seconds(lambda: Vocabulary.build(texts, 5, name)) for name in ("treebank", "unicode")]
    rival, treebank, unicode = in_turn(w.size.few, *ways)
    lines = [
        Line(
            12,
            f"vocabulary from {len(texts):,} captions, tokeniser {name}",
            "s",
            median(rival),
            median(own),
            times(rival, own),
            None,
            f"{times(rival, own):.1f}×",
            "5×",
            "10×",
            w.size.few,
            "NLTK, word by word",
            measured="rival: a fifth of the captions, times five",
        )
        for name, own in (("treebank", treebank), ("unicode", unicode))
    ]
    n = w.size.scored
    groups = [texts[5 * i % len(texts) :][:5] for i in range(n)]
    references = {str(i): group for i, group in enumerate(groups)}
    candidates = {str(i): groups[(i + 1) % n][i % 5] for i in range(n)}
    ours = [seconds(lambda: metrics.score(references, candidates)) for _ in range(w.size.few)]
    known = w.size_name == "full" and not java_metrics.missing()
    theirs = scoring.reference(references, candidates)["all four at once"] if known else None
    lines.append(
        Line(
            12,
            f"BLEU, ROUGE-L and CIDEr-D of {n:,} × 5",
            "s",
            theirs,
            median(ours),
            theirs and theirs / median(ours),
            None,
            f"{median(ours):.2f} s",
            "2 s",
            "1 s",
            w.size.few,
            "pycocoevalcap and its Java tokeniser, once",
        )
    )
    return lines


ROWS = {int(name.removeprefix("row_")): row for name, row in list(globals().items()) if name.startswith("row_")}
