"""Tables of captions that people write themselves: csv, tsv, json or jsonl rows of (image, caption[, split])."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from showtell.errors import MissingFileError, UserError

PICTURE_COLUMNS = ("image", "file", "filename", "path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "sentence")


def find_table(data_dir: Path) -> Path:
    """The table of a folder: its only one, or the one named captions."""
    tables = sorted(path for path in data_dir.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"))
    chosen = tables if len(tables) == 1 else [path for path in tables if path.stem.lower() == "captions"]
    if len(chosen) != 1:
        names = ", ".join(path.name for path in tables) or "no csv, tsv, json or jsonl file"
        raise MissingFileError(f"{data_dir} holds {names}; put one captions.csv there or name it with annotations")
    return chosen[0]


def table_rows(path: Path) -> Iterator[tuple[str, list[str], str | None]]:
    """The (picture, captions, split or None) rows of a csv, tsv, json or jsonl file."""
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        yield from _delimited_rows(path, "\t" if kind == ".tsv" else ",")
        return
    if kind == ".jsonl":
        rows: object = []
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"line {number} of {path} is not json ({error}); write one object a line") from None
    elif kind == ".json":
        rows = read_json(path)
    else:
        raise UserError(f"{path} is not a table this reads; give a csv, tsv, json or jsonl file")
    if isinstance(rows, dict):
        if isinstance(rows.get("images"), list):
            raise UserError(f"{path} holds an object with images; read it as the data set coco or karpathy")
        rows = [{"image": image, "caption": captions} for image, captions in rows.items()]
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a json {type(rows).__name__}; give a list of objects with image and caption")
    for number, row in enumerate(rows, 1):
        row = {str(key).lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        file = next((row[key] for key in PICTURE_COLUMNS if key in row), None)
        texts = next((row[key] for key in (*CAPTION_COLUMNS, "captions") if key in row), None)
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(file, str) or not isinstance(texts, list):
            raise UserError(f"row {number} of {path} has no image and caption; write {{'image': …, 'caption': …}}")
        yield file, texts, str(row.get("split") or "").strip().lower() or None


def _delimited_rows(path: Path, delimiter: str) -> Iterator[tuple[str, list[str], str | None]]:
    # In a tsv a quotation mark is an ordinary character, and a stray one must not swallow the lines after it.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    columns: list[str] | None = None
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                names = [cell.strip().lower() for cell in row]
                picture = next((names.index(name) for name in PICTURE_COLUMNS if name in names), None)
                caption = next((names.index(name) for name in CAPTION_COLUMNS if name in names), None)
                if picture is not None and caption is not None:
                    columns = names
                    split = names.index("split") if "split" in names else None
                    continue
                if picture is not None or caption is not None:
                    raise UserError(f"the header of {path} is {', '.join(row)}; name the columns image and caption")
                columns, picture, caption = ["image", "caption", "split"][: max(2, len(row))], 0, 1
                split = 2 if len(row) > 2 else None
            if not max(picture, caption) < len(row) <= len(columns) or (split is not None and split >= len(row)):
                raise UserError(
                    f"line {reader.line_num} of {path} has {len(row)} columns; write image and caption in each, "
                    "and put quotation marks around a caption with commas"
                )
            named_split = row[split].strip().lower() if split is not None else ""
            yield row[picture].strip(), [row[caption]], named_split or None
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {path} is not a row ({error}); check its quotation marks") from None


def read_text(path: Path) -> str:
    """A UTF-8 file's text, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path}; check the folder or name the file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; give a readable file") from None


def read_json(path: Path):
    """A json file's value; what is wrong with a bad one is said with its path."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not json: {error}; give a whole json file") from None
