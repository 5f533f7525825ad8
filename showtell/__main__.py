"""The command line: `showtell demo | train | evaluate | calibrate | score | caption | app | …`, each with `--help`.

A user's mistake prints one sentence on standard error, never a traceback. Exit codes: 0 success, 1 an image could not
be captioned or is damaged, 2 a mistake, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from showtell.arguments import build_parser
from showtell.errors import UserError, explain, json_text, print_text


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
            args = build_parser(COMMANDS).parse_args(argv)
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


def _device(args: argparse.Namespace) -> str:
    from showtell.torch_engine import find_device

    return str(find_device(args.device))


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
    from showtell import distributed

    with distributed.one_error():
        return _train_process(args)


def _train_process(args: argparse.Namespace) -> int:
    from showtell import distributed
    from showtell.captioner import find_model
    from showtell.checkpoint import read_header
    from showtell.config import Config, read_config
    from showtell.recipes import Recipe, recipe_named
    from showtell.train import Run, Stopped, Trainer

    config = read_config(args.config) if args.config else Config(None, {}, {})
    in_file = {name: config.run.pop(name, None) for name in ("out", "device")}
    args.out, args.device = (getattr(args, name) or value for name, value in in_file.items())
    if not args.out:
        raise UserError("the run folder is missing; add --out runs/NAME")
    _check_outputs([], args.out)
    settings, recipe_name = config.settings | _settings(args), args.recipe or config.recipe
    flags = (
        "dataset init new_vocabulary seed subset val_images best_by data_dir patience tensorboard wandb features "
        "num_workers"
    )
    given = config.run | {name: value for name in flags.split() if (value := getattr(args, name)) is not None}
    if args.encoder_weights:
        given["weights"] = args.encoder_weights
    if given.get("init"):
        given["init"] = str(find_model(given["init"]))  # as the run keeps it, for --resume
    device = distributed.join(_device(args), given.get("timeout_minutes", Run.timeout_minutes))
    say = _say
    if distributed.rank():  # process 0 says it
        warnings.simplefilter("ignore")
        say = str
    if args.resume:
        trainer = Trainer.resume(args.out, recipe=recipe_name, settings=settings, device=device, **given)
    else:
        recipe = recipe_named(recipe_name) if recipe_name else Recipe()
        if given.get("init") and not recipe_name:
            recipe = recipe.inherit_model(read_header(given["init"]))
        if args.dry_run:
            given.setdefault("weights", None)  # what may have to be downloaded is not needed to describe a run
        run = Run(out=args.out, device=device, **given)
        trainer = Trainer(recipe.with_settings(settings), run)
    for caption_set in (trainer.train_set, trainer.val_set):
        if missing := caption_set.missing:
            listed = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
            say(f"note: {len(missing)} images of {caption_set.split} are not there and are left out: {listed}")
    say(trainer.describe())
    if args.dry_run:
        return 0
    try:
        trainer.fit(progress=not distributed.rank())
    except Stopped as stopped:
        if distributed.is_first():
            _say(f"showtell: {stopped}")
        return 130
    best = trainer.history[trainer.best_epoch - 1]
    perplexity = f"validation perplexity {best['val_perplexity']:.2f} over {len(trainer.vocab):,} words"
    scores = f"{perplexity}, CIDEr-D {100 * best['scores']['CIDEr']:.1f}"
    model = shlex.quote(str(Path(args.out) / "best.safetensors"))
    say(f"the best epoch was {trainer.best_epoch}, {scores}; caption with: showtell caption photo.jpg --model {model}")
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
        out=args.out, html=args.html, spice=args.spice, seed=args.seed, precision=args.precision, style=args.style,
    )  # fmt: skip
    print_text(json_text(result.to_json()) if args.json else result.table())
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from showtell.evaluate import calibrate

    _check_outputs([args.out])
    path, quality = calibrate(args.model, args.dataset, args.data_dir, args.split, args.out, device=_device(args))
    print_text(f"{path}: confidence of held-out captions: {quality.table()}")
    return 0


def _score(args: argparse.Namespace) -> int:
    from showtell import metrics, scoring
    from showtell.annotations import read_captions
    from showtell.results import image_finder, write_comparison, write_results

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
        about = f"{', '.join(document)} against {args.references}"
        write = write_results if len(results) == 1 else write_comparison
        write(args.html, results[0] if len(results) == 1 else results, read_captions(args.references), image, about)
        _say(f"the report: {args.html}")
    return 0


def _caption(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from showtell.captioner import load, model_name
    from showtell.outputs import CaptionWriter
    from showtell.sources import find_sources

    options = _decoding(args)
    _check_outputs([args.csv, args.jsonl, args.html], args.attention)
    sources = find_sources(args.sources, args.allow_private, keep=bool(args.html or args.attention))
    captioner = load(args.model, args.device, args.precision, args.engine)
    if args.min_confidence is not None and captioner.calibration is None:
        raise UserError("--min-confidence needs a model with a confidence; showtell calibrate --model M adds it")
    outputs = {name: getattr(args, name) for name in "csv jsonl html json attention min_confidence quiet".split()}
    outputs["made_by"] = f"{model_name(args.model)} ({captioner.engine.description})"
    writer = CaptionWriter(sources, captioner.transform, calibrated=captioner.calibration is not None, **outputs)
    for folder in {Path(file).parent for file in (args.csv, args.jsonl, args.html) if file}:
        if not folder.exists():
            writer.note(f"the folder {folder} is new")
    left = writer.resume(args.n_best or 1, args.workers) if args.resume else sources
    alphas = bool(args.html or args.attention)
    results = captioner.caption_stream(left, args.batch_size, args.workers, alphas=alphas, **options)
    disable = args.quiet or len(left) <= 32
    try:
        for i, result in tqdm(results, total=len(left), desc="captions", unit=" images", disable=disable):
            writer.add(left[i], result)
    except KeyboardInterrupt:
        if not writer.tables:
            raise
        _say(f"showtell: stopped after {writer.n_done} images; to caption the others, add --resume to the same command")
        return 130
    return writer.finish()


def _decoding(args: argparse.Namespace) -> dict[str, object]:
    """The decoding options given as flags, refusing those that cannot act together."""
    names = "n_best beam_size temperature top_k top_p min_len max_len length_penalty no_repeat_ngram style".split()
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.sample and "beam_size" in given:
        raise UserError("--sample does not search and has no --beam-size; leave one of them out")
    for name in ("temperature", "top_k", "top_p"):
        if name in given and not args.sample:
            raise UserError(f"--{name.replace('_', '-')} changes sampling only; add --sample, or leave it out")
    return given | ({"strategy": "sample", "seed": args.seed} if args.sample else {})


def _check_outputs(files: Sequence[str | None], folder: str | None = None) -> None:
    """Refuse, before the work, outputs that could not be written after it."""
    files = [Path(file) for file in files if file]
    for i, file in enumerate(files):
        if file in files[:i]:
            raise UserError(f"{file} is named for two outputs; give each a file of its own")
        if file.exists() and not file.is_file():
            kind = "a folder" if file.is_dir() else "no regular file (a pipe or a device)"
            raise UserError(f"{file} is {kind}; name the file to write")
    for path in [file.parent for file in files] + ([Path(folder)] if folder else []):
        existing = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{existing} is not a folder that can be written to; choose another path")


def _bulk(args: argparse.Namespace) -> int:
    from showtell.bulk import caption_archive

    _check_outputs([], args.out)
    names = "out model address workers batch_size column allow_private".split()
    n_before, n_new, n_errors = caption_archive(args.sources, **{name: getattr(args, name) for name in names})
    _say(f"{n_new} images captioned in {args.out}, after {n_before} before; {n_errors} of them could not be read")
    return 1 if n_errors else 0


def _shard(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from showtell import datasets
    from showtell.shards import write_shards
    from showtell.sources import find_sources

    if bool(args.sources) == bool(args.dataset):
        raise UserError("shard takes images, or a data set with --dataset NAME; give one of them")
    _check_outputs([], args.out)
    if args.sources:
        samples, name = [(source.name, [], source) for source in find_sources(args.sources)], "images"
    else:
        images, name = datasets.load(args.dataset, args.data_dir, args.split), args.split
        samples = list(zip(images.image_ids, images.captions, images.sources(), strict=True))
    progress = partial(tqdm, desc="shards", unit=" images")
    paths = write_shards(samples, args.out, name, args.size * 2**20, progress)
    _say(f"{len(samples)} images in {len(paths)} shards, {paths[0]} …")
    return 0


def _app(args: argparse.Namespace) -> int:
    from showtell.app import serve

    return serve(args.model, args.compare, args.host, args.port)


def _export(args: argparse.Namespace) -> int:
    from showtell.captioner import find_model, model_name
    from showtell.checkpoint import load_checkpoint, save_checkpoint
    from showtell.legacy import export_legacy
    from showtell.sources import find_images

    if args.int8 != bool(args.calibrate) or (args.int8 and args.format != "onnx"):
        raise UserError("--int8 and --calibrate go together, with --format onnx; give both, or neither")
    images = find_images([args.calibrate]) if args.int8 else []
    path = find_model(args.model)
    smaller = {args.format: True} if args.format in ("half", "int8") else {}
    out = args.out or f"{model_name(path).replace('/', '-')}-{args.format}" + (".safetensors" if smaller else "")
    checkpoint = load_checkpoint(path)
    if smaller:
        save_checkpoint(out, checkpoint.model, checkpoint.vocab, checkpoint.transform, checkpoint.meta, **smaller)
    if args.format == "onnx":
        from showtell.onnx_export import export_onnx

        lines = export_onnx(checkpoint, out, images)
    else:
        lines = [out] if smaller else export_legacy(checkpoint, out)
    for line in lines:
        print_text(str(line))
    return 0


def _push(args: argparse.Namespace) -> int:
    from showtell import hub
    from showtell.captioner import find_model

    address = hub.push(find_model(args.model), args.repo, args.private, args.revision, args.license)
    print_text(f"caption with: showtell caption photo.jpg --model {address}")
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

    print(shtab.complete(build_parser(COMMANDS), args.shell))
    return 0


COMMANDS = {
    "demo": _demo,
    "train": _train,
    "evaluate": _evaluate,
    "calibrate": _calibrate,
    "score": _score,
    "caption": _caption,
    "bulk": _bulk,
    "shard": _shard,
    "app": _app,
    "export": _export,
    "push": _push,
    "import-legacy": _import_legacy,
    "download": _download,
    "completion": _completion,
}

if __name__ == "__main__":
    sys.exit(main())
