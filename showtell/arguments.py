"""The command line's arguments: flags, their types and help texts, for each command of `showtell`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import NoReturn

from showtell import __version__
from showtell.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Report a mistake in one sentence, as everything else does, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type {self.prog} --help")


def build_parser(commands: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """Return the parser; parsed arguments have the function of their command, from `commands`, as `command`."""
    from showtell.recipes import RECIPES

    parser = _Parser(prog="showtell", description="Train image captioners, and caption images.")
    parser.add_argument("--version", action="version", version=f"showtell {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        command.set_defaults(command=commands[name])
        return command

    demo = add("demo", "train a small captioner on drawn shapes in three minutes, and write a page of results")
    demo.add_argument("--out", default="runs/demo", help="output folder (default runs/demo)")
    _add_common(demo)

    train = add("train", "train a captioner; Ctrl-C saves the run, --resume continues it")
    train.epilog = "On N GPUs: torchrun --nproc-per-node N -m showtell train …"
    _add_data(train, None)
    train.add_argument("--config", metavar="FILE", help="settings in TOML, YAML or JSON (run.json); flags go first")
    train.add_argument("--out", help="run folder")
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
    train.add_argument("--wandb", action="store_const", const=True, help="also log to Weights & Biases")
    train.add_argument("--resume", action="store_true", help="continue the run in --out")
    train.add_argument("--dry-run", action="store_true", help="print what would be trained on which data, and exit")
    _add_common(train, None)

    evaluate = add("evaluate", "caption a split of a data set and score the captions")
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

    calibrate = add("calibrate", "fit the confidence of a model's captions to a validation split")
    _add_model(calibrate)
    _add_data(calibrate)
    calibrate.add_argument("--split", default="val", help="split to caption (default val)")
    calibrate.add_argument("--out", metavar="FILE", help="checkpoint to write (default: the model's own file)")
    calibrate.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")

    _add_score(add("score", "score any captions against references, without a model"))

    caption = add("caption", "caption images: files, folders, patterns, web links, standard input")
    _add_caption(caption)

    bulk = add("bulk", "caption an archive with Ray, on one machine or a cluster; continues what was stopped")
    bulk.add_argument(
        "sources", nargs="+", metavar="SOURCE",
        help="images, folders and patterns, as of caption; tar shards; Parquet or csv tables of paths or links",
    )  # fmt: skip
    bulk.add_argument("--out", required=True, metavar="DIR", help="folder of the Parquet files")
    bulk.add_argument("--model", metavar="M", help="as of caption (default: the released model)")
    bulk.add_argument("--address", metavar="HOST:PORT", help="Ray cluster (default: Ray is started on this machine)")
    bulk.add_argument("--workers", type=_count, metavar="N", help="actors (default: one per GPU, or per processor)")
    bulk.add_argument("--batch-size", type=_count, default=32, metavar="N", help="images an actor captions at once")
    bulk.add_argument("--column", default="image", metavar="NAME", help="of paths or links in a table (default image)")
    bulk.add_argument("--allow-private", action="store_true", help="follow links into the local network, too")

    shard = add("shard", "write images, or a data set, as WebDataset shards; continues what was stopped")
    shard.add_argument("sources", nargs="*", metavar="SOURCE", help="images, as of caption; or leave out and give:")
    _add_data(shard, None)
    shard.add_argument("--split", default="train", help="split of the data set (default train)")
    shard.add_argument("--out", required=True, metavar="DIR", help="folder of the shards")
    shard.add_argument("--size", type=_count, default=256, metavar="MB", help="size of a shard (default 256)")

    app = add("app", "serve a page in the browser that captions images, until Ctrl-C")
    _add_model(app)
    app.add_argument("--compare", metavar="M", help="second model, to compare captions of the same image")
    app.add_argument("--host", default="127.0.0.1", metavar="H", help="0.0.0.0: for other machines (default 127.0.0.1)")
    app.add_argument("--port", type=_int, default=7860, metavar="N", help="default 7860; 0: any that is free")

    export = add("export", "write a model for sharing: with smaller weights, or as other repositories' files")
    _add_model(export)
    export.add_argument(
        "--format", choices=["half", "int8", "legacy", "onnx"], default="half",
        help="half (default), int8: one checkpoint with weights of 16 or 8 bits; legacy: encoder-N.pkl and "
        "decoder-N.pkl of Show and Tell; onnx: a folder that ONNX Runtime runs without torch",
    )  # fmt: skip
    summary = "what to write (default: NAME-half.safetensors, NAME-legacy, … in this folder)"
    export.add_argument("--out", metavar="FILE|DIR", help=summary)
    export.add_argument("--int8", action="store_true", help="with onnx: a faster encoder, calibrated on images")
    export.add_argument("--calibrate", metavar="FOLDER", help="images like those to be captioned, for --int8")

    push = add("push", "upload a model with a generated model card to the Hugging Face Hub")
    push.add_argument("model", metavar="MODEL", help="checkpoint, run folder or released model")
    push.add_argument("repo", metavar="ORG/NAME", help="repository; it is created if it does not exist")
    push.add_argument("--private", action="store_true", help="create a private repository")
    push.add_argument("--revision", default="", metavar="BRANCH", help="branch to commit to (default main)")
    push.add_argument("--license", default="", metavar="ID", help="licence for the card, such as mit (default other)")

    legacy = add("import-legacy", "convert the .pkl files of other repositories to a checkpoint")
    legacy.add_argument("encoder", metavar="ENCODER.pkl")
    legacy.add_argument("decoder", metavar="DECODER.pkl")
    legacy.add_argument("vocab", metavar="vocab.pkl")
    legacy.add_argument("--out", required=True, metavar="M", help="checkpoint to write, NAME.safetensors")
    legacy.add_argument("--squash", action="store_true", help="the model was trained on images squashed to 224 x 224")

    from showtell import download

    fetch = add("download", "download a public data set, or a released model")
    fetch.add_argument("name", choices=download.names(), metavar="NAME", help=", ".join(download.names()))
    fetch.add_argument("--data-dir", metavar="DIR", help="where a data set goes (default data/NAME)")
    fetch.add_argument("--yes", action="store_true", help="agree to the terms without being asked")

    completion = add("completion", "print a script that completes commands in a shell")
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


def _count(text: str) -> int:
    if (value := _int(text)) >= 1:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of images or threads; give 1 or more")


def _share(text: str) -> float:
    if 0 <= (value := _number(text)) <= 1:
        return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a probability; give a number from 0 to 1")


def _add_data(parser: argparse.ArgumentParser, dataset: str | None = "synthetic") -> None:
    from showtell.datasets import READERS

    names = f"{', '.join(READERS)} (default synthetic); several: a,b"
    parser.add_argument("--dataset", default=dataset, metavar="NAME", help=names)
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data set, such as data/flickr8k")


def _add_model(parser: argparse.ArgumentParser, precision: str = "") -> None:
    several = "; A,B,C is an ensemble" if precision else ""
    summary = f"checkpoint, run folder, hub:ORG/NAME or released model (the default){several}"
    parser.add_argument("--model", metavar="M", help=summary)
    if precision:
        summary = f"float32 (exact), bfloat16 (faster), or auto: bfloat16 where it is faster (default {precision})"
        parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default=precision, help=summary)
        summary = "style of the captions, of a model trained with several (condition_on_source)"
        parser.add_argument("--style", metavar="NAME", help=summary)


def _add_caption(parser: argparse.ArgumentParser) -> None:
    add, parser.usage = parser.add_argument, "%(prog)s [options] IMAGE [IMAGE ...]"
    summary = "image file; folder, searched recursively; quoted pattern, like 'photos/*.jpg'; tar; web link; or"
    add("sources", nargs="+", metavar="IMAGE", help=f"{summary} -, standard input: an image, or a list, one a line")
    add("--allow-private", action="store_true", help="follow links into the local network, too")
    _add_model(parser, "auto")
    summary = "auto (default) is ONNX Runtime if it is installed and the model is exported, else torch"
    add("--engine", choices=["auto", "torch", "onnx"], default="auto", help=summary)
    add("--batch-size", type=_count, default=32, metavar="N", help="images captioned at once (default 32)")
    add("--workers", type=_count, default=2, metavar="N", help="threads that read images (default 2)")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--sample", action="store_true", help="sample captions instead of searching for the best")
    for flag, kind, summary in (  # None where a flag is not given: `Captioner.decode` has the defaults
        ("--n-best", _int, "captions per image (default 1)"),
        ("--beam-size", _int, "beam size; 1 is greedy (default 5)"),
        ("--temperature", _number, "with --sample: above 1, more varied (default 1)"),
        ("--top-k", _int, "with --sample: draw from the N most likely words only (default 0: from all)"),
        ("--top-p", _number, "with --sample: draw from the fewest words of total probability N (default 1: from all)"),
        ("--min-len", _int, "fewest words (default 0)"),
        ("--max-len", _int, "most words (default 25, or the model's own)"),
        ("--length-penalty", _number, "divide scores by length ** N (default 0.7, or the model's own)"),
        ("--no-repeat-ngram", _int, "never repeat N words in a row (default 0: allowed)"),
    ):
        decoding.add_argument(flag, type=kind, metavar="N", help=summary)
    output = parser.add_argument_group("output", "Without a file or --json, captions are printed, one a line.")
    add = output.add_argument
    add("--json", action="store_true", help="print one JSON document")
    add("--csv", metavar="FILE", help="write a table: image, caption, score, confidence if the model has one, SHA-256")
    add("--jsonl", metavar="FILE", help="write a JSON object per image, one a line, with words and errors")
    add("--html", metavar="FILE", help="write a page with the images and, of a model with attention, its maps")
    add("--attention", metavar="DIR", help="write attention maps: a folder per image, a PNG per word")
    add("--resume", action="store_true", help="keep what --csv and --jsonl hold, and caption the other images")
    summary = 'show "not sure" instead of captions of lower confidence, from 0 to 1 (JSON adds "sure": false)'
    add("--min-confidence", type=_share, metavar="P", help=summary)
    add("--quiet", action="store_true", help="no progress bar and no notes; errors are still printed")
    _add_common(parser)


def _add_score(parser: argparse.ArgumentParser) -> None:
    from showtell.tokenizer import TOKENIZERS

    parser.add_argument("references", help="true captions: csv, tsv, jsonl, {id: [captions]} json or COCO annotations")
    parser.add_argument("candidates", nargs="+", help="captions to score, a file for each system; COCO results, too")
    parser.add_argument("--json", action="store_true", help="print one JSON document, values from 0 to 1, CIDEr to 10")
    parser.add_argument("--html", metavar="FILE", help="write a report; of several systems, they are side by side")
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
