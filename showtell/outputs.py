"""What `showtell caption` writes: tables that grow image by image and can be resumed, JSON, a page, attention maps.

A `CaptionWriter` receives each image with its captions. What it keeps of them until the end is what a page or a JSON
document needs; the tables on disk are complete up to the last image whenever the program is killed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from showtell.errors import UserError, json_text, print_text, printable
from showtell.figures import spread_map, write_attention
from showtell.files import atomic_path
from showtell.image_stream import map_ahead
from showtell.sources import ImageSource, is_link
from showtell.transforms import Transform, open_image
from showtell.vocabulary import spell_words

if TYPE_CHECKING:
    from showtell.captioner import Caption

Record = dict  # {"image", "sha256", "captions": [as `Caption.to_dict`]}, and "error" where the image cannot be read
UNSURE = "not sure"


class Table:
    """A file of records that is written image by image; a killed program leaves at most the last line unfinished."""

    header = b""

    def __init__(self, path: str | os.PathLike) -> None:
        """Take the path; nothing is read or written yet."""
        self.path, self.records, self._file = Path(path), {}, None

    def append(self, record: Record) -> None:
        """Write a record after those that are kept; the first call replaces the file of an earlier run."""
        self.open()
        self._file.write(self.encode(record))
        self._file.flush()

    def open(self) -> None:
        """Write what is kept of an earlier run, unless that has been done."""
        if self._file is None:
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(self.header + b"".join(map(self.encode, self.records.values())))
            self._file = self.path.open("ab")

    def close(self) -> None:
        """Close the file; one without records is written, too."""
        self.open()
        self._file.close()

    def unreadable(self, reason: object) -> UserError:
        """Return the error for a file that this class has not written."""
        return UserError(f"{self.path} cannot be resumed: {reason}; name another file, or leave --resume out")


class CsvTable(Table):
    """A row per caption: image, caption, score, confidence if there is one, SHA-256 of the image."""

    def __init__(self, path: str | os.PathLike, scores: Sequence[str]) -> None:
        """Take the path and the columns between caption and digest."""
        super().__init__(path)
        self.columns = ["image", "caption", *scores, "sha256"]
        self.header = self._lines([self.columns])

    def encode(self, record: Record) -> bytes:
        """Return the rows of an image; none if it has no captions."""
        rows = []
        for caption in record["captions"]:
            values = {**caption, **record, "caption": _shown(caption)}
            rows.append([values[name] for name in self.columns])
        return self._lines(rows)

    def _lines(self, rows: Sequence[Sequence[object]]) -> bytes:
        table = io.StringIO()
        csv.writer(table).writerows(rows)
        return table.getvalue().encode("utf-8", "surrogateescape")  # names that are not UTF-8 keep their bytes

    def read(self, n_best: int) -> None:
        """Keep the complete records of an earlier run; `n_best` rows make one."""
        text = self.path.read_bytes().decode("utf-8", "surrogateescape")
        try:
            rows = list(csv.reader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise self.unreadable(error) from None
        if rows and (not text.endswith("\n") or len(rows[-1]) != len(self.columns)):
            del rows[-1]
        if rows and rows[0] != self.columns:
            raise self.unreadable(f"its columns are {', '.join(rows[0])}, not {', '.join(self.columns)}")
        for number, row in enumerate(rows[1:], 2):
            try:
                image, text, *scores, digest = row
                scores = dict(zip(self.columns[2:-1], map(float, scores), strict=True))
            except ValueError:
                raise self.unreadable(f"row {number} is not one of captions") from None
            record = self.records.setdefault(image, {"image": image, "sha256": digest, "captions": []})
            record["captions"].append({"text": text, **scores})
        if len(rows) > 1 and len(self.records[image]["captions"]) < n_best:  # the rest may not have been written
            del self.records[image]


class JsonLines(Table):
    """A JSON object per image, a line each; see `Record`."""

    def encode(self, record: Record) -> bytes:
        """Return the line of an image."""
        return json_text(record, indent=None).encode() + b"\n"

    def read(self, n_best: int) -> None:
        """Keep the records of an earlier run, without those of errors, so that these images are tried again."""
        *lines, _ = self.path.read_bytes().split(b"\n")  # after the last line break is nothing, or an unfinished line
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if record["sha256"] and record["captions"]:
                    self.records[record["image"]] = record
            except (ValueError, LookupError, TypeError):
                raise self.unreadable(f"line {number} is not an object with image, captions and sha256") from None


class CaptionWriter:
    """Prints captions, or writes them to the files that are given."""

    def __init__(
        self,
        sources: Sequence[ImageSource],
        transform: Transform,
        *,
        csv: str | None = None,
        jsonl: str | None = None,
        html: str | None = None,
        json: bool = False,
        attention: str | None = None,
        calibrated: bool = False,
        min_confidence: float | None = None,
        quiet: bool = False,
        made_by: str = "",
    ) -> None:
        """Take the images, the model's transform and the outputs.

        Args:
            csv, jsonl, html: files to write. json: whether to print one JSON document.
            attention: folder for the maps of each image's first caption, one PNG per word.
            calibrated: whether captions have a confidence. min_confidence: what makes a caption sure.
            quiet: whether to leave notes out. made_by: model and engine, for the page.
        """
        self.sources, self.least, self.quiet = sources, min_confidence, quiet
        self._transform, self._json, self._html, self._attention = transform, json, html, attention
        self._made_by = made_by
        self._score_name = "confidence" if calibrated else "score"
        scores = ["score", "confidence"] if calibrated else ["score"]
        self.tables = ([JsonLines(jsonl)] if jsonl else []) + ([CsvTable(csv, scores)] if csv else [])
        self._files = [str(file) for file in (csv, jsonl, html) if file]
        self._records: dict[str, Record] = {}  # for a page or a JSON document
        self._maps: dict[str, np.ndarray] = {}  # for a page
        self._errors: list[UserError] = []
        self.n_done, self._n_before, self._damaged = 0, 0, False

    def resume(self, n_best: int = 1, workers: int = 2) -> list[ImageSource]:
        """Read the tables of an earlier run and return the images that lack in one of them.

        An image is known by its name and the digest of its contents; a link by its name. What the tables say about
        images whose contents have changed is dropped, what they say about images not among the sources is kept.
        """
        if not self.tables:
            raise UserError("--resume continues a table; add --csv FILE or --jsonl FILE")
        for table in self.tables:
            if table.path.exists():
                table.read(n_best)
        known = [source for source in self.sources if all(source.name in table.records for table in self.tables)]
        done = set()
        for source, digest in zip(known, map_ahead(ImageSource.digest, known, workers, 32), strict=True):
            (found, *others) = {table.records[source.name]["sha256"] for table in self.tables}
            if not others and (is_link(source.name) or digest == found):
                done.add(source.name)
                if self._html or self._json:
                    self._records[source.name] = self.tables[0].records[source.name]
        left = [source for source in self.sources if source.name not in done]
        for table in self.tables:
            for source in left:
                table.records.pop(source.name, None)
        self._n_before = len(done)
        if done:
            self.note(f"{len(done)} of {len(self.sources)} images have been captioned before")
        return left

    def note(self, text: str) -> None:
        """Print a note on standard error."""
        if not self.quiet:
            print_text(f"note: {text}", sys.stderr)

    def add(self, source: ImageSource, result: list[Caption] | UserError) -> None:
        """Write the captions of an image, or the error that prevented them."""
        record = {"image": source.name, "sha256": source.sha256, "captions": []}
        if isinstance(result, UserError):
            record["error"] = str(result)
            self._errors.append(result)
        else:
            record["captions"] = [caption.to_dict() | self._sure(caption) for caption in result]
            self._add_maps(source, result[0])
            self._note_frames(source)
            self.n_done += 1
        for table in self.tables:
            table.append(record)
        if self._html or self._json:
            self._records[source.name] = record
        elif not self.tables:
            for caption in record["captions"]:
                text = _shown(caption)
                print_text(f"{source.name}: {text}" if len(self.sources) > 1 else text)

    def _sure(self, caption: Caption) -> dict[str, bool]:
        return {} if self.least is None else {"sure": caption.confidence >= self.least}

    def _note_frames(self, source: ImageSource) -> None:
        if source.n_frames > 1:
            self.note(f"{source.name} has {source.n_frames} frames; its first is captioned")
        if source.n_frames == 0:
            self._damaged = True
            print_text(f"note: {source.name} is damaged after its first frame, which is captioned", sys.stderr)

    def _add_maps(self, source: ImageSource, caption: Caption) -> None:
        if self._attention and caption.alphas is None:
            raise UserError("--attention needs one model with attention; type --model showtell-attend, or leave it out")
        if caption.alphas is None or not (self._html or self._attention):
            return
        image, region = None, (0, 0, 1, 1)
        if self._attention or self._transform.crop:
            image = open_image(source.image)
            region = self._transform.region(*image.size)
        if self._html:
            size = caption.alphas.shape[:0:-1]
            maps = [spread_map(alpha, size, region) for alpha in caption.alphas]
            self._maps[source.name] = np.array(maps, np.float16)
        if self._attention:
            image.thumbnail((800, 800))
            stem = _file_name(Path(source.name).stem)
            folder = Path(self._attention) / f"{stem}-{source.sha256[:8]}"
            for old in folder.glob("[0-9][0-9]-*.png"):
                old.unlink()
            for i, (word, alpha) in enumerate(zip(caption.words, caption.alphas, strict=True), 1):
                path = folder / f"{i:02d}-{_file_name(word)}.png"
                write_attention(path, image, spread_map(alpha, image.size, region), word)

    def finish(self) -> int:
        """Write what needs all images, report what could not be read, and return the exit code."""
        for table in self.tables:
            table.close()
        records = [self._records[source.name] for source in self.sources if source.name in self._records]
        if self._json:
            print_text(json_text(records))
        if self._html:
            self._write_gallery([record for record in records if record["captions"]])
        if self._files and not self.quiet:
            before = f", after {self._n_before} before" if self._n_before else ""
            print_text(f"{self.n_done} images captioned in {' and '.join(self._files)}{before}", sys.stderr)
        for error in self._errors:
            print_text(f"showtell: {error}", sys.stderr)
        if self._errors and len(self.sources) > 1:
            total = f"{len(self._errors)} of {len(self.sources)} images could not be read"
            print_text(f"showtell: {total}", sys.stderr)
        return 1 if self._errors or self._damaged else 0

    def _write_gallery(self, records: list[Record]) -> None:
        from showtell.report import Card, Gallery, Tile, write_page

        images = {source.name: source.image for source in self.sources}
        cards = []
        for record in records:
            name, (best, *others) = record["image"], record["captions"]
            options = {"score": best[self._score_name], "alternatives": [_shown(caption) for caption in others]}
            if best.get("sure", True) and "words" in best:
                pieces = spell_words(best["words"])
                options |= {"pieces": pieces, "word_probs": best["word_probs"], "alphas": self._maps.get(name, ())}
            cards.append(Card(images[name], printable(Path(name).name), _shown(best), **options))
        tiles = [Tile("images", len(cards)), Tile("distinct captions", len({card.predicted for card in cards}))]
        gallery = Gallery("Images", cards, "", self._score_name)
        write_page(self._html, "Captions", f"Captions by {self._made_by}.", tiles, [gallery])


def _shown(caption: dict) -> str:
    return caption["text"] if caption.get("sure", True) else UNSURE


def _file_name(text: str) -> str:
    """Return a text without what file systems refuse, as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "_", printable(text))[:80] or "_"
