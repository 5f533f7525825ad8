"""Caption an archive on Ray Data: blocks of images on the actors of a machine or a cluster, a Parquet file per block.

`showtell bulk SOURCE --out DIR` continues where an earlier run was stopped. A file is complete or absent and is named
after its images: a block that is captioned twice, because its actor or everything was killed, is the same file twice.
Only names and counts pass through Ray. An actor reads the images of its block itself, a batch ahead of its model, so
the memory that images take does not grow with the archive.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from showtell.captioner import find_models, load, model_name
from showtell.errors import UserError, printable
from showtell.files import atomic_path, lock, require_regular_file
from showtell.sources import ImageSource, find_sources

BLOCK = 512  # images per block: what is captioned again after a kill, per actor
TABLES = (".parquet", ".csv")


class BlockCaptioner:
    """An actor: holds the model, and captions blocks of images into Parquet files."""

    def __init__(self, model: str, name: str, out: Path, batch_size: int, readers: int, folder: str) -> None:
        """Load a model of this name; the paths of images are relative to `folder`, `readers` threads read them."""
        os.chdir(folder)
        self.captioner, self.name = load(model, engine="auto"), name
        self.out, self.batch_size, self.readers = out, batch_size, readers

    def __call__(self, block: dict) -> dict:
        """Caption one block of `plan`; return the number of its images and of those with an error."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        sources, rows = pickle.loads(block["sources"]), []
        for i, result in self.captioner.caption_stream(sources, self.batch_size, self.readers):
            row = {"id": printable(sources[i].name), "model": self.name}
            if isinstance(result, UserError):
                row["error"] = printable(result)
            else:
                row |= {"caption": result[0].text, "confidence": result[0].confidence}
            rows.append(row)
        text = pa.string()
        columns = {"id": text, "caption": text, "confidence": pa.float64(), "model": text, "error": text}
        with atomic_path(self.out / block["file"]) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, pa.schema(columns)), temporary)
        return {"images": len(rows), "errors": sum("error" in row for row in rows)}


def caption_archive(
    arguments: Iterable[str],
    out: str | os.PathLike,
    model: str | None = None,
    *,
    address: str | None = None,
    workers: int | None = None,
    batch_size: int = 32,
    column: str = "image",
    allow_private: bool = False,
    block_size: int = BLOCK,
) -> tuple[int, int, int]:
    """Caption the images that lack in the folder `out`; return how many were there, are new, and have an error.

    Args:
        arguments: as of `sources.find_sources`; and Parquet or csv tables with a `column` of paths or links.
        out: folder of the Parquet files: id, caption, confidence, model, error.
        model: of `showtell.load`, whose fastest installed engine is used.
        address: of a Ray cluster, whose machines see `out`, the model and the images under the same paths; by default,
            Ray is started on this machine and stopped at the end.
        workers: actors; by default one per GPU of the cluster or, without any, per processor.
        batch_size: images that an actor captions at once.
        allow_private: whether links may lead into the local network.
        block_size: images per file; the same in all runs into a folder.

    Raises:
        UserError: Ray is not installed or fails, or `out` holds other files or the captions of another model.
    """
    ray = _import_ray(address)
    paths, name = ",".join(str(path.absolute()) for path in find_models(model)), model_name(model)
    sources, out = find_archive(arguments, column, allow_private), Path(out).absolute()
    with lock(out, "is captioning into"):
        blocks, n_before = plan(sources, out, name, block_size)
        if not blocks:
            return n_before, 0, 0
        with _cluster(ray, address, workers):
            n_cpus, n_gpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
            workers = workers or n_gpus or n_cpus
            threads = max(1, n_cpus // workers) if n_gpus else 1  # to read images for a GPU; else, they share a core
            # With one task at a time, the last blocks go to the actors that are free.
            pool = ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1)
            done = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map(
                BlockCaptioner, compute=pool, num_cpus=threads, num_gpus=int(n_gpus > 0),
                fn_constructor_args=(paths, name, out, batch_size, threads, os.getcwd()),
            )  # fmt: skip
            return n_before, *_total(ray, done, sum(block["images"] for block in blocks))


def _total(ray, done: Iterable, n_images: int) -> tuple[int, int]:
    from tqdm import tqdm

    n_new = n_errors = 0
    try:
        with tqdm(total=n_images, desc="captions", unit=" images") as bar:
            for counts in done.iter_rows():
                n_new, n_errors = n_new + counts["images"], n_errors + counts["errors"]
                bar.update(counts["images"])
    except ray.exceptions.RayError as error:
        cause = error
        while not isinstance(cause, UserError) and (inner := getattr(cause, "cause", None) or cause.__cause__):
            cause = inner
        reason = " ".join(str(cause).split())[-300:]
        raise UserError(f"{reason} (in an actor of Ray; the same command continues)") from error
    return n_new, n_errors


def plan(sources: Sequence[ImageSource], out: Path, model: str, block_size: int = BLOCK) -> tuple[list[dict], int]:
    """Return the blocks of images that the files in `out` lack, and the number of images that they have.

    Blocks do not depend on what is finished: an actor of a killed run that still writes a file writes the same one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    finished = set()
    for path in out.glob("part-*.parquet"):
        try:
            table = pq.read_table(path, columns=["id", "model"])
            finished.update(table["id"].to_pylist())
            others = set(table["model"].to_pylist()) - {model}
        except (pa.ArrowException, KeyError) as error:
            raise UserError(f"{path} is no file of showtell bulk; choose another folder") from error
        if others:
            raise UserError(f"{path} has captions of {', '.join(others)}, not {model}; choose another folder")
    blocks = []
    for start in range(0, len(sources), block_size):
        block = sources[start : start + block_size]
        left = [source for source in block if printable(source.name) not in finished]
        if left:
            digest = hashlib.sha256("\n".join(printable(source.name) for source in left).encode()).hexdigest()
            file = f"part-{start // block_size:06d}-{digest[:16]}.parquet"
            blocks.append({"file": file, "images": len(left), "sources": pickle.dumps(left)})
    return blocks, len(sources) - sum(block["images"] for block in blocks)


def find_archive(arguments: Iterable[str], column: str = "image", allow_private: bool = False) -> list[ImageSource]:
    """List the images of `sources.find_sources` and of a column of tables, each once; empty cells are left out."""
    found: dict[str, ImageSource] = {}
    for argument in arguments:
        if argument.lower().endswith(TABLES):
            listed = [ImageSource(name, allow_private) for name in _column(Path(argument), column)]
        else:
            listed = find_sources([argument], allow_private)
        for source in listed:
            found.setdefault(source.name, source)
    return list(found.values())


def _column(path: Path, column: str) -> list[str]:
    import pyarrow as pa
    from pyarrow import csv, parquet

    require_regular_file(path, "table", "give a Parquet or csv file")
    try:
        if path.suffix.lower() == ".csv":
            options = csv.ConvertOptions(include_columns=[column], column_types={column: pa.string()})
            table = csv.read_csv(path, convert_options=options)
        else:
            table = parquet.read_table(path, columns=[column])
        return [name for name in table[column].cast(pa.string()).to_pylist() if name]
    except (pa.ArrowException, KeyError) as error:
        raise UserError(f"{path} has no readable column {column} of paths or links; name it with --column") from error


def _import_ray(address: str | None):
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
    if not address:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # on any system: listen on loopback only
        os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's 15, actors starve on a machine that is in use
    try:
        import pyarrow  # noqa: F401
        import ray.data
    except ImportError:
        raise UserError('showtell bulk needs Ray; type pip install "showtell[ray]"') from None
    return ray


@contextlib.contextmanager
def _cluster(ray, address: str | None, workers: int | None) -> Iterator[None]:
    """Connect to a Ray cluster, or run one on this machine; disconnect or stop it at the end."""
    own = {"include_dashboard": False, "object_store_memory": 2**27, "num_cpus": workers}
    try:
        ray.init(address or "local", **({} if address else own), log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"Ray cannot be started or reached ({reason}); check --address") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    try:
        yield
    finally:
        ray.shutdown()
