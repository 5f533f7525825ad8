"""Tables of captions that people write themselves: csv, tsv, json or jsonl rows of (image, caption[, split])."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from showtell.errors import MissingFileError, UserError

IMAGE_COLUMNS = ("image", "file", "filename", "path", "file_name")
CAPTION_COLUMNS = ("caption", "text", "sentence")
_ID_COLUMNS = ("image_id", "image", "id", "file_name", "filename", "file", "path")
_TEXT_COLUMNS = ("caption", "text", "sentence")
_FORMS = (
    'give COCO annotation json, COCO results json, json of the form {"id": ["caption"]}, or csv/tsv with the columns '
    "image and caption"
)


def find_table(data_dir: Path) -> Path:
    """The table of a folder: its only one, or the one named captions."""
    tables = sorted(path for path in data_dir.iterdir() if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"))
    chosen = tables if len(tables) == 1 else [path for path in tables if path.stem.lower() == "captions"]
    if len(chosen) != 1:
        names = ", ".join(path.name for path in tables) or "no csv, tsv, json or jsonl file"
        raise MissingFileError(f"{data_dir} holds {names}; put one captions.csv there or name it with annotations")
    return chosen[0]


def table_rows(path: Path) -> Iterator[tuple[str, list[str], str | None]]:
    """The (image, captions, split or None) rows of a csv, tsv, json or jsonl file."""
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
        file = next((row[key] for key in IMAGE_COLUMNS if key in row), None)
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
                image = next((names.index(name) for name in IMAGE_COLUMNS if name in names), None)
                caption = next((names.index(name) for name in CAPTION_COLUMNS if name in names), None)
                if image is not None and caption is not None:
                    columns = names
                    split = names.index("split") if "split" in names else None
                    continue
                if image is not None or caption is not None:
                    raise UserError(f"the header of {path} is {', '.join(row)}; name the columns image and caption")
                columns, image, caption = ["image", "caption", "split"][: max(2, len(row))], 0, 1
                split = 2 if len(row) > 2 else None
            if not max(image, caption) < len(row) <= len(columns) or (split is not None and split >= len(row)):
                raise UserError(
                    f"line {reader.line_num} of {path} has {len(row)} columns; write image and caption in each, "
                    "and put quotation marks around a caption with commas"
                )
            named_split = row[split].strip().lower() if split is not None else ""
            yield row[image].strip(), [row[caption]], named_split or None
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


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Reads the captions of every image in a file: image ids as text, in the order of the file.

    Accepts COCO annotation json, COCO results json (`[{"image_id": …, "caption": …}]`), plain `{"id": ["…"]}` or
    `{"id": "…"}` json, and csv/tsv, with a header or as two columns image and caption.

    Raises:
        MissingFileError: there is no such file.
        UserError: the file is none of these, or a caption in it is not text.
    """
    path = Path(path)
    captions: dict[str, list[str]] = {}
    for image, group in _json_rows(path) if path.suffix.lower() == ".json" else _table_rows(path):
        if not isinstance(image, str | int) or isinstance(image, bool):
            raise UserError(f"{path} names an image {image!r}; write image ids as numbers or text")
        for caption in group:
            if not isinstance(caption, str):
                raise UserError(
                    f"image {image} of {path} has the caption {json.dumps(caption)}; write captions as text"
                )
        captions.setdefault(str(image), []).extend(group)
    if not captions:
        raise UserError(f"{path} holds no captions; {_FORMS}")
    return captions


def _json_rows(path: Path) -> Iterator[tuple[object, list]]:
    content = read_json(path)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]
    if isinstance(content, dict):
        for image, group in content.items():
            if isinstance(group, dict):
                raise UserError(f"{path} holds an object under {image!r}; {_FORMS}")
            yield image, group if isinstance(group, list) else [group]
    elif isinstance(content, list):
        for number, row in enumerate(content, 1):
            if not isinstance(row, dict) or "image_id" not in row or "caption" not in row:
                raise UserError(f"entry {number} of {path} has no image_id and caption; {_FORMS}")
            yield row["image_id"], [row["caption"]]
    else:
        raise UserError(f"{path} holds a json {type(content).__name__}; {_FORMS}")


def _table_rows(path: Path) -> Iterator[tuple[object, list]]:
    text = read_text(path)
    # In a tsv a quotation mark is an ordinary character, and a stray one must not swallow the lines after it.
    tabs = path.suffix.lower() != ".csv" and "\t" in text
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    image_at, caption_at, width = 0, 1, 2
    csv.field_size_limit(2**31 - 1)  # a caption may have 10,000 words
    try:
        for number, row in enumerate(row for row in reader if any(cell.strip() for cell in row)):
            if number == 0:
                names = [cell.strip().lower() for cell in row]
                image = next((names.index(name) for name in _ID_COLUMNS if name in names), None)
                caption = next((names.index(name) for name in _TEXT_COLUMNS if name in names), None)
                if image is not None and caption is not None:
                    image_at, caption_at, width = image, caption, len(names)
                    continue
            if len(row) != width:
                raise UserError(
                    f"line {reader.line_num} of {path} has {len(row)} columns, not {width}; write image and caption in "
                    "each, and in a csv quotation marks around a caption with commas"
                )
            yield row[image_at].strip(), [row[caption_at]]
    except csv.Error as error:
        raise UserError(
            f"line {reader.line_num} of {path} is no csv row ({error}); check its quotation marks"
        ) from None


def read_candidates(path: str | Path) -> dict[str, str]:
    """Reads one caption for each image; a row given twice counts once.

    Raises:
        UserError: an image has no caption or several differing ones, and whatever `read_captions` raises.
    """
    candidates = {}
    for image, group in read_captions(path).items():
        if len(set(group)) != 1:
            raise UserError(f"{path} has {len(set(group))} captions for image {image}; give each image exactly one")
        candidates[image] = group[0]
    return candidates
