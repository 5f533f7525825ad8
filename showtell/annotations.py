"""Caption files: csv, tsv, `|`-separated, json or jsonl rows of (image, caption[, split]), and COCO's json.

All commands read caption files here, so a file that one command reads is read by the others in the same way.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from showtell.errors import MissingFileError, UserError
from showtell.files import require_regular_file

# Accepted column names and json keys; if a file has several, the first in this order is used.
IMAGE_COLUMNS = ("image", "image_name", "file_name", "filename", "file", "path", "image_id", "id")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentence", "comment")
SPLIT_NAMES = {"": None, "train": "train", "restval": "train", "test": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "dev", "valid", "validation"), "val")
ID = int, str  # the types of an image's id
_FORMS = "give csv or tsv with the columns image and caption, json or jsonl with such keys, or COCO's json"


class Row(NamedTuple):
    """One row of a caption file; `file` is the path of the image, which COCO annotations list beside its id."""

    image: int | str
    captions: list[str]
    split: str | None
    file: str


def normal_path(path: str) -> str:
    """Return one spelling for all spellings of a path: `3.png` for `./3.png` and `a/../3.png`; `/` on every system."""
    return posixpath.normpath(path.replace(os.sep, "/"))  # a backslash separates on Windows only


def find_table(data_dir: Path) -> Path:
    """Return the caption file of a folder: the only one, or the one named captions."""
    tables = sorted(path for path in data_dir.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"))
    chosen = tables if len(tables) == 1 else [path for path in tables if path.stem.lower() == "captions"]
    if len(chosen) != 1:
        names = ", ".join(path.name for path in tables) or "no csv, tsv, json or jsonl file"
        raise MissingFileError(f"{data_dir} holds {names}; put one captions.csv there or name it with annotations")
    return chosen[0]


def read_rows(path: str | Path) -> Iterator[Row]:
    """Read a caption file of any accepted form, row by row.

    Raises:
        MissingFileError: there is no such file.
        UserError: the file has another form or no captions, or a row lacks its image or caption.
    """
    path = Path(path)
    files: dict[int | str, str] = {}
    entries = _json_entries(path, files) if path.suffix.lower() in (".json", ".jsonl") else _table_entries(path)
    empty = True
    for place, entry in entries:
        entry = {key.lower(): value for key, value in entry.items()} if isinstance(entry, dict) else {}
        image = next((entry[key] for key in IMAGE_COLUMNS if key in entry), "")
        if isinstance(image, str):
            image = image.strip() and normal_path(image.strip())
        captions = next((entry[key] for key in CAPTION_COLUMNS if key in entry), ())
        captions = captions if isinstance(captions, list | tuple) else [captions]
        split = entry.get("split") or ""
        reason = None
        if image == "" or captions == ():
            reason = f"no image and caption; {_FORMS}"
        elif not isinstance(image, int | str) or isinstance(image, bool):
            reason = f"the image {reprlib.repr(image)}; write ids as numbers or text"
        elif bad := [caption for caption in captions if not isinstance(caption, str)]:
            reason = f"the caption {reprlib.repr(bad[0])}; write captions as text"
        elif not isinstance(split, str) or split.strip().lower() not in SPLIT_NAMES:
            reason = f"the split {reprlib.repr(split)}; write train, val or test, and quote a caption with commas"
        if reason:
            raise UserError(f"{place} of {path} has {reason}")
        yield Row(image, captions, SPLIT_NAMES[split.strip().lower()], files.get(image, str(image)))
        empty = False
    if empty:
        raise UserError(f"{path} holds no captions; {_FORMS}")


def _json_entries(path: Path, files: dict[int | str, str]) -> Iterator[tuple[str, object]]:
    """Yield (place, entry) pairs of a json or jsonl file, and fill `files` with the paths of COCO's image ids."""
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                yield f"line {number}", _parse(line, f"line {number} of {path}")
        return
    content = read_json(path)
    if isinstance(content, dict):
        images = content["images"] if isinstance(content.get("images"), list) else ()
        images = [image for image in images if isinstance(image, dict)]
        if isinstance(content.get("annotations"), list):
            for image in images:
                if isinstance(image.get("file_name"), str) and isinstance(image.get("id"), int | str):
                    files[image["id"]] = normal_path(image["file_name"])
            # The `id` of an annotation is its own, not the image's.
            content = [{**entry, "id": ""} if isinstance(entry, dict) else entry for entry in content["annotations"]]
        elif images:
            raise UserError(f"{path} holds images but no annotations; read it as the data set karpathy")
    if isinstance(content, dict):
        for image, captions in content.items():
            yield f"entry {reprlib.repr(image)}", {"image": image, "captions": captions}
    elif isinstance(content, list):
        yield from ((f"entry {number}", entry) for number, entry in enumerate(content, 1))
    else:
        raise UserError(f"{path} holds a json {type(content).__name__}; {_FORMS}")


def _table_entries(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) pairs of a table, with the column names of its header or by position."""
    text = read_text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")

    def names_in(delimiter: str) -> tuple[int, bool]:
        names = {cell.strip(' "').lower() for cell in first.split(delimiter)}
        return len(names & {*IMAGE_COLUMNS, *CAPTION_COLUMNS}), delimiter in first

    delimiter = max(",\t|" if path.suffix.lower() == ".csv" else "\t|,", key=names_in)
    # Quotation marks quote in a comma-separated file only: elsewhere a stray one must not swallow the lines after it.
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    csv.field_size_limit(2**31 - 1)  # a caption may have 10,000 words
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=delimiter == "|")
    columns: list[str] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not columns:
                columns = [cell.strip().lower() for cell in row]
                found = [not set(names).isdisjoint(columns) for names in (IMAGE_COLUMNS, CAPTION_COLUMNS)]
                if all(found):
                    continue
                if any(found):
                    raise UserError(f"the header of {path} is {', '.join(row)}; name the columns image and caption")
                columns = ["image", "caption", "split"][: max(2, len(row))]
            if len(row) != len(columns):
                given = f"line {reader.line_num} of {path} has {len(row)} columns, not {len(columns)}"
                raise UserError(f"{given}; write both, in a csv with quotation marks around a caption with commas")
            yield f"line {reader.line_num}", dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {path} is not a row ({error}); check its quotation marks") from None


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text, with or without a byte order mark."""
    require_regular_file(path, "file", "check the folder or name the file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a readable file") from None


def read_json(path: Path):
    """Return a json file's value; the error for a bad file names its path."""
    return _parse(read_text(path), str(path))


def json_lists(path: Path, keys: Sequence[str], form: str) -> list[list]:
    """Return the lists of these names in a json file's object."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a json {type(values).__name__}; give {form}")
    for key in keys:
        if not isinstance(values.get(key), list):
            raise UserError(f"{path} has no list named {key!r}; give {form}")
    return [values[key] for key in keys]


def json_values(entry: object, kinds: dict[str, type | tuple[type, ...]], place: str) -> list:
    """Return the values of these keys of a json object, each checked for its type."""
    if not isinstance(entry, dict):
        raise UserError(f"{place} is {reprlib.repr(entry)}; write an object with {', '.join(kinds)}")
    for key, kind in kinds.items():
        value = entry.get(key)
        if key not in entry or not isinstance(value, kind) or isinstance(value, bool):
            given = f"the {key} {reprlib.repr(value)}" if key in entry else f"no {key}"
            accepted = {ID: "a number or text", list: "a list"}.get(kind, "text")
            raise UserError(f"{place} has {given}; write {accepted} for {key}")
    return [entry[key] for key in kinds]


def _parse(text: str, place: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError:  # Python's limit on the digits of an integer
        reason = "it has a number of more than 4,300 digits"
    raise UserError(f"{place} is not json: {reason}; give complete json")


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Read the captions of each image, by id as text, in the order of the file. Raises as `read_rows` does."""
    captions: dict[str, list[str]] = {}
    for row in read_rows(path):
        captions.setdefault(str(row.image), []).extend(row.captions)
    return captions


def read_candidates(path: str | Path) -> dict[str, str]:
    """Read one caption for each image; a row given twice counts once. Raises a `UserError` for none or several."""
    captions = read_captions(path)
    for image, group in captions.items():
        if len(set(group)) != 1:
            raise UserError(f"{path} has {len(set(group))} captions for image {image}; give each image exactly one")
    return {image: group[0] for image, group in captions.items()}
