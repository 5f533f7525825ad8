"""The command line: `showtell demo | train | evaluate | score | caption | export | import-legacy`, each with `--help`.

A user's mistake prints one sentence on standard error, never a traceback. Exit codes: 0 success, 1 an image could not
be captioned or is damaged, 2 a mistake, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from showtell import __version__
from showtell.errors import UserError, explain, json_text, print_text, printable
from showtell.files import atomic_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    # Before torch is loaded: its threads spin briefly before they sleep. With the default, a busy machine loses nine
    # tenths of its time to spinning (60 small steps: 50 s of CPU time instead of 5).
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"note: {message}")
            argv = sys.argv[1:] if argv is None else argv
            if "" in argv:  # as a path, it would be the current folder
                raise UserError("an argument is empty; give it a value, or leave it out")
            args = _parser().parse_args(argv)
            return args.command(args)
    except KeyboardInterrupt:
        _say("showtell: stopped")
        return 130
    except BrokenPipeError:  # `showtell … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it shuts down
        return 141
    except (UserError, OSError, UnicodeEncodeError, OverflowError, MemoryError, RuntimeError) as error:
        if not (sentence := explain(error)):
            raise
        _say(f"showtell: {sentence}")
        return 2


class _Parser(argparse.ArgumentParser):
    """Report a mistake in one sentence, as everything else does, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    from showtell.recipes import RECIPES

    parser = _Parser(prog="showtell", description="Train image captioners, and caption images.")
    parser.add_argument("--version", action="version", version=f"showtell {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.set_defaults(command=run)
        return command

    demo = add("demo", _demo, "train a small captioner on drawn shapes in three minutes, and write a page of results")
    demo.add_argument("--out", default="runs/demo", help="output folder (default runs/demo)")
    _add_common(demo)

    train = add("train", _train, "train a captioner; Ctrl-C saves the run, --resume continues it")
    _add_data(train, None)
    train.add_argument("--out", required=True, help="run folder")
    train.add_argument("--recipe", help="named settings: " + ", ".join(sorted(RECIPES)))
    train.add_argument("--decoder", help="decoder name, such as show-tell or attend; an unknown name lists all")
    train.add_argument("--encoder", help="backbone name: resnet50, tiny, any other of torchvision, timm/NAME")
    train.add_argument("--encoder-weights", metavar="FILE", help="backbone weights (default: ImageNet weights)")
    train.add_argument("--init", metavar="MODEL", help="trained model to start from, by path or name; keeps its words")
    train.add_argument(
        "--new-vocabulary", action="store_const", const=True, help="with --init, the words of the new captions only"
    )
    train.add_argument("--epochs", type=_int, help="passes over the data; with --resume, more than before")
    train.add_argument("--batch-size", type=_int)
    train.add_argument("--lr", type=_number, help="highest learning rate")
    train.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", dest="settings",
        help="any other setting of the recipe",
    )  # fmt: skip
    # None where a flag is not given: `Run` has the defaults, and --resume those of the run.
    train.add_argument("--subset", type=_int, metavar="N", help="train on N images only, to tune settings")
    train.add_argument("--val-images", type=_int, metavar="N", help="images to score per epoch (default 1000; 0: all)")
    train.add_argument("--best-by", metavar="METRIC", help="metric or loss that selects the best epoch (default CIDEr)")
    train.add_argument("--patience", type=_int, metavar="N", help="stop after N epochs without improvement")
    features = train.add_mutually_exclusive_group()
    features.add_argument("--features", metavar="DIR", help="feature cache (default runs/features)")
    features.add_argument("--no-features", action="store_const", const="", dest="features", help="train from images")
    train.add_argument("--workers", type=_int, metavar="N", dest="num_workers", help="data loading processes")
    train.add_argument("--tensorboard", action="store_const", const=True, help="also write TensorBoard event files")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument("--dry-run", action="store_true", help="print what would be trained on which data, and exit")
    _add_common(train, None)

    evaluate = add("evaluate", _evaluate, "caption a split of a data set and score the captions")
    _add_model(evaluate, "float32")
    _add_data(evaluate)
    evaluate.add_argument("--split", default="val", help="split to caption (default val); keep test for a release")
    evaluate.add_argument("--out", metavar="DIR", help="folder for captions.json (default: beside the model)")
    evaluate.add_argument("--html", metavar="FILE", help="write an HTML report")
    evaluate.add_argument("--limit", type=_int, default=0, metavar="N", help="evaluate N images only")
    evaluate.add_argument("--spice", action="store_true", help="also compute SPICE (Java; downloads a large file once)")
    evaluate.add_argument("--beam-size", type=_int, default=5, metavar="N", help="beam size; 1 is greedy (default 5)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON document, scores from 0 to 1")
    _add_common(evaluate)

    _add_score(add("score", _score, "score any captions against references, without a model"))

    caption = add("caption", _caption, "caption images and folders of images")
    caption.add_argument("sources", nargs="+", metavar="IMAGE|FOLDER")
    _add_model(caption, "auto")
    caption.add_argument("--sample", action="store_true", help="sample captions instead of searching for the best")
    for flag, kind, summary in (  # None where a flag is not given: `Captioner.decode` has the defaults
        ("--n-best", _int, "captions per image (default 1)"),
        ("--beam-size", _int, "beam size; 1 is greedy (default 5)"),
        ("--temperature", _number, "with --sample: above 1, more varied (default 1)"),
        ("--top-k", _int, "with --sample: use the N most likely words only"),
        ("--top-p", _number, "with --sample: use the most likely words that together reach probability N"),
        ("--min-len", _int, "fewest words (default 0)"),
        ("--max-len", _int, "most words (default 25, or the model's own)"),
        ("--length-penalty", _number, "divide scores by length ** N (default 0.7, or the model's own)"),
        ("--no-repeat-ngram", _int, "never repeat N words in a row"),
    ):
        caption.add_argument(flag, type=kind, metavar="N", help=summary)
    output = caption.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON document")
    output.add_argument("--csv", metavar="FILE", help="write a table of image, caption, score")
    output.add_argument("--html", metavar="FILE", help="write a page with the images")
    _add_common(caption)

    export = add("export", _export, "write a model for sharing: in half the size, or as other repositories' files")
    _add_model(export)
    export.add_argument(
        "--format", choices=["half", "legacy"], required=True,
        help="half: one checkpoint in half precision; legacy: encoder-N.pkl and decoder-N.pkl of a Show and Tell model",
    )  # fmt: skip
    export.add_argument("--out", required=True, metavar="FILE|DIR")

    legacy = add("import-legacy", _import_legacy, "convert the .pkl files of other repositories to a checkpoint")
    legacy.add_argument("encoder", metavar="ENCODER.pkl")
    legacy.add_argument("decoder", metavar="DECODER.pkl")
    legacy.add_argument("vocab", metavar="vocab.pkl")
    legacy.add_argument("--out", required=True, metavar="M", help="checkpoint to write, NAME.safetensors")
    legacy.add_argument("--squash", action="store_true", help="the model was trained on images squashed to 224 x 224")

    from showtell import download

    fetch = add("download", _download, "download a public data set, or a released model")
    fetch.add_argument("name", choices=download.names(), metavar="NAME", help=", ".join(download.names()))
    fetch.add_argument("--data-dir", metavar="DIR", help="where a data set goes (default data/NAME)")
    fetch.add_argument("--yes", action="store_true", help="agree to the terms without being asked")

    completion = add("completion", _completion, "print a script that completes commands in a shell")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def _add_common(parser: argparse.ArgumentParser, seed: int | None = 0) -> None:
    parser.add_argument("--seed", type=_seed, default=seed, help="random seed (default 0)")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"{text!r} is not a seed; give a whole number from 0 to {2**32 - 1}")
    return int(text)


def _number(text: str, kind: type = float) -> float:
    with contextlib.suppress(ValueError):
        value = kind(text)
        if value == 0 or 1e-9 <= abs(value) <= 2e9:  # nan is not
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from -2e9 to 2e9")


_int = partial(_number, kind=int)


def _add_data(parser: argparse.ArgumentParser, dataset: str | None = "synthetic") -> None:
    from showtell.datasets import READERS

    names = f"{', '.join(READERS)} (default synthetic); several: a,b"
    parser.add_argument("--dataset", default=dataset, metavar="NAME", help=names)
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data set, such as data/flickr8k")


def _add_model(parser: argparse.ArgumentParser, precision: str = "") -> None:
    several = "; A,B,C is an ensemble" if precision else ""
    parser.add_argument("--model", metavar="M", help=f"checkpoint, run folder or released model (the default){several}")
    if precision:
        summary = f"float32 (exact), bfloat16 (faster), or auto: bfloat16 where it is faster (default {precision})"
        parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default=precision, help=summary)


def _add_score(parser: argparse.ArgumentParser) -> None:
    from showtell.tokenizer import TOKENIZERS

    parser.add_argument("references", help="true captions: csv, tsv, jsonl, {id: [captions]} json or COCO annotations")
    parser.add_argument("candidates", nargs="+", help="captions to score, a file for each system; COCO results, too")
    parser.add_argument("--json", action="store_true", help="print one JSON document, values from 0 to 1, CIDEr to 10")
    parser.add_argument("--html", metavar="FILE", help="write a report on one system")
    parser.add_argument("--images", metavar="DIR", help="the images, for the report")
    parser.add_argument("--allow-missing", action="store_true", help="score the images that are on both sides")
    parser.add_argument("--tokenizer", choices=sorted(TOKENIZERS), default="ptb", help="default ptb, as in papers")
    parser.add_argument(
        "--document-frequencies", metavar="CAPTIONS",
        help="captions for CIDEr-D's document frequencies (default: the references)",
    )  # fmt: skip
    parser.add_argument("--training-captions", metavar="CAPTIONS", help="report the share of novel captions")
    parser.add_argument("--no-java", dest="java", action="store_false", help="leave METEOR out even where it could run")
    parser.add_argument("--spice", action="store_true", help="compute SPICE (Java, 8 GB; downloads 0.4 GB once)")
    parser.add_argument("--no-intervals", dest="intervals", action="store_false", help="compute no intervals")
    parser.add_argument("--seed", type=_seed, default=0, help="random seed of intervals and p-values (default 0)")


def _device(args: argparse.Namespace) -> str:
    import torch

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(f"--device {device} is not available ({reason}); give cpu, or leave it out") from None
    return device


def _say(text: str) -> None:
    print_text(text, sys.stderr)


def _demo(args: argparse.Namespace) -> int:
    from showtell.demo import run
    from showtell.train import Stopped

    try:
        run(args.out, args.seed, _device(args))
    except Stopped:
        _say(f"showtell: stopped; to start the demo again, type: showtell demo --out {shlex.quote(args.out)}")
        return 130
    return 0


def _train(args: argparse.Namespace) -> int:
    from showtell.captioner import find_model
    from showtell.checkpoint import read_header
    from showtell.recipes import Recipe, recipe_named
    from showtell.train import Run, Stopped, Trainer

    _check_outputs([], args.out)
    settings = _settings(args)
    flags = (
        "dataset init new_vocabulary seed subset val_images best_by data_dir patience tensorboard features num_workers"
    )
    given = {name: value for name in flags.split() if (value := getattr(args, name)) is not None}
    if args.encoder_weights:
        given["weights"] = args.encoder_weights
    if args.init:
        given["init"] = str(find_model(args.init))  # as the run keeps it, for --resume
    if args.resume:
        trainer = Trainer.resume(args.out, recipe=args.recipe, settings=settings, device=_device(args), **given)
    else:
        recipe = recipe_named(args.recipe) if args.recipe else Recipe()
        if args.init and not args.recipe:
            recipe = recipe.inherit_model(read_header(given["init"]))
        if args.dry_run:
            given.setdefault("weights", None)  # what may have to be downloaded is not needed to describe a run
        run = Run(out=args.out, device=_device(args), **given)
        trainer = Trainer(recipe.with_settings(settings), run)
    for caption_set in (trainer.train_set, trainer.val_set):
        if missing := caption_set.missing:
            listed = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            _say(f"note: {len(missing)} images of {caption_set.split} are not there and are left out: {listed}")
    _say(trainer.describe())
    if args.dry_run:
        return 0
    try:
        trainer.fit()
    except Stopped as stopped:
        _say(f"showtell: {stopped}")
        return 130
    best = trainer.history[trainer.best_epoch - 1]
    perplexity = f"validation perplexity {best['val_perplexity']:.2f} over {len(trainer.vocab):,} words"
    scores = f"{perplexity}, CIDEr-D {100 * best['scores']['CIDEr']:.1f}"
    model = shlex.quote(str(Path(args.out) / "best.safetensors"))
    _say(f"the best epoch was {trainer.best_epoch}, {scores}; caption with: showtell caption photo.jpg --model {model}")
    return 0


def _settings(args: argparse.Namespace) -> dict[str, object]:
    """The recipe's settings that are typed, each once."""
    settings: dict[str, object] = {}
    for pair in args.settings:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair} gives no value; write --set {pair}=VALUE")
        if settings.setdefault(name, value) != value:
            raise UserError(f"--set {name}={settings[name]} and --set {name}={value} contradict each other; give one")
    for name in ("decoder", "encoder", "epochs", "batch_size", "lr"):
        if (value := getattr(args, name)) is not None:
            if name in settings:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value} and --set {name}={settings[name]} both say {name}; give one")
            settings[name] = value
    return settings


def _evaluate(args: argparse.Namespace) -> int:
    from showtell.evaluate import evaluate

    _check_outputs([args.html], args.out)
    result = evaluate(
        args.model, args.dataset, args.data_dir, args.split, args.beam_size, device=_device(args), limit=args.limit,
        out=args.out, html=args.html, spice=args.spice, seed=args.seed, precision=args.precision,
    )  # fmt: skip
    print_text(json_text(result.to_json()) if args.json else result.table())
    return 0


def _score(args: argparse.Namespace) -> int:
    from showtell import metrics, scoring
    from showtell.annotations import read_captions
    from showtell.results import image_finder, write_results

    if args.html and len(args.candidates) > 1:
        raise UserError(f"--html shows one system and {len(args.candidates)} were given; name one file of candidates")
    if args.images and not args.html:
        raise UserError("--images is for the report; add --html FILE")
    image = image_finder(args.images, args.references) if args.images else lambda _: None
    frequencies = training = None
    if args.document_frequencies:
        captions = read_captions(args.document_frequencies)
        frequencies = metrics.DocumentFrequencies.build(captions.values(), args.tokenizer)
    if args.training_captions:
        training = [caption for group in read_captions(args.training_captions).values() for caption in group]
    results = scoring.score_files(
        args.references, args.candidates, tokenizer=args.tokenizer, frequencies=frequencies,
        allow_missing=args.allow_missing, java=args.java, spice=args.spice, intervals=args.intervals,
        training_captions=training, seed=args.seed,
    )  # fmt: skip
    document = {result.name: result.to_json() for result in results}
    print_text(json_text(document) if args.json else scoring.format_table(results))
    if args.html:
        about = f"{results[0].name} against {args.references}"
        write_results(args.html, results[0], read_captions(args.references), image, about)
        _say(f"the report: {args.html}")
    return 0


def _caption(args: argparse.Namespace) -> int:
    from showtell.captioner import find_images, load

    options = _decoding(args)
    _check_outputs([args.csv, args.html])
    paths = find_images(args.sources)
    captioner = load(args.model, _device(args), args.precision)
    results = captioner.caption_files(paths, **options)
    if len(paths) > 32:
        from tqdm import tqdm

        results = tqdm(results, total=len(paths), desc="captions", unit=" images")
    done, broken, damaged = [], [], False
    for path, result in results:
        if isinstance(result, UserError):
            broken.append((path, result))
            continue
        done.append((path, result))
        damaged |= _note_frames(path)
        if not (args.json or args.csv or args.html):
            for caption in result:
                print_text(f"{path}: {caption.text}" if len(paths) > 1 else caption.text)
    if args.json:
        rows = [{"image": str(path), "captions": [c.to_dict() for c in captions]} for path, captions in done]
        rows += [{"image": str(path), "captions": [], "error": str(error)} for path, error in broken]
        print_text(json_text(rows))
    elif args.csv:
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["image", "caption", "score"])
        writer.writerows([path, c.text, round(c.score, 4)] for path, captions in done for c in captions)
        with atomic_path(args.csv) as temporary:  # names that are not UTF-8 keep their bytes
            temporary.write_bytes(table.getvalue().encode("utf-8", "surrogateescape"))
    elif args.html:
        _write_gallery(args.html, done)
    if target := args.csv or args.html:
        _say(f"{len(done)} images captioned in {target}")
    for _, error in broken:
        _say(f"showtell: {error}")
    if broken and len(paths) > 1:
        _say(f"showtell: {len(broken)} of {len(paths)} images could not be read")
    return 1 if broken or damaged else 0


def _decoding(args: argparse.Namespace) -> dict[str, object]:
    """The decoding options given as flags, refusing those that cannot act together."""
    names = "n_best beam_size temperature top_k top_p min_len max_len length_penalty no_repeat_ngram".split()
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.sample and "beam_size" in given:
        raise UserError("--sample does not search and has no --beam-size; leave one of them out")
    for name in ("temperature", "top_k", "top_p"):
        if name in given and not args.sample:
            raise UserError(f"--{name.replace('_', '-')} changes sampling only; add --sample, or leave it out")
    return given | ({"strategy": "sample", "seed": args.seed} if args.sample else {})


def _note_frames(path: Path) -> bool:
    """Report an image of several frames; return whether a later one is damaged."""
    from showtell.transforms import frames

    if path.suffix.lower() in (".gif", ".webp", ".tif", ".tiff"):
        try:
            if (n := frames(path)) > 1:
                _say(f"note: {path} has {n} frames; its first is captioned")
        except UserError:
            _say(f"note: {path} is damaged after its first frame, which is captioned")
            return True
    return False


def _check_outputs(files: Sequence[str | None], folder: str | None = None) -> None:
    """Refuse, before the work, outputs that could not be written after it."""
    files = [Path(file) for file in files if file]
    for file in files:
        if file.exists() and not file.is_file():
            kind = "a folder" if file.is_dir() else "no regular file (a pipe or a device)"
            raise UserError(f"{file} is {kind}; name the file to write")
    for path in [file.parent for file in files] + ([Path(folder)] if folder else []):
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{existing} is not a folder that can be written to; choose another path")


def _write_gallery(path: str, done: list) -> None:
    from showtell.report import Card, Gallery, Tile, write_page

    cards = []
    for image, (best, *others) in done:
        texts = [caption.text for caption in others]
        options = {"pieces": best.pieces, "word_probs": best.word_probs, "score": best.score, "alternatives": texts}
        cards.append(Card(image, printable(image.name), best.text, **options))
    tiles = [Tile("images", len(done)), Tile("different captions", len({card.predicted for card in cards}))]
    write_page(path, "Captions", f"{len(done)} images", tiles, [Gallery("Images", cards)])


def _export(args: argparse.Namespace) -> int:
    from showtell.captioner import find_model
    from showtell.checkpoint import load_checkpoint, save_checkpoint
    from showtell.legacy import export_legacy

    checkpoint = load_checkpoint(find_model(args.model))
    if args.format == "half":
        save_checkpoint(args.out, checkpoint.model, checkpoint.vocab, checkpoint.transform, checkpoint.meta, half=True)
    for path in [args.out] if args.format == "half" else export_legacy(checkpoint, args.out):
        print_text(str(path))
    return 0


def _import_legacy(args: argparse.Namespace) -> int:
    from showtell.checkpoint import save_checkpoint
    from showtell.legacy import import_legacy
    from showtell.transforms import IMAGENET, SQUASHED

    found = import_legacy(args.encoder, args.decoder, args.vocab, SQUASHED if args.squash else IMAGENET)
    save_checkpoint(args.out, found.model, found.vocab, found.transform, found.meta)
    backbone, decoder = found.model.config["encoder"]["backbone"], found.model.config["decoder"]
    sizes = f"embed {decoder['embed_size']}, hidden {decoder['hidden_size']}, {decoder['num_layers']} LSTM layer(s)"
    print_text(f"{args.out}: {backbone}, {len(found.vocab)} words, {sizes}")
    return 0


def _download(args: argparse.Namespace) -> int:
    from showtell import download

    return download.run(args.name, args.data_dir, args.yes)


def _completion(args: argparse.Namespace) -> int:
    """Typed once: `showtell completion bash > ~/.local/share/bash-completion/completions/showtell`."""
    import shtab

    print(shtab.complete(_parser(), args.shell))
    return 0


if __name__ == "__main__":
    sys.exit(main())
