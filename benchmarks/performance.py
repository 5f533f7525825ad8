"""Time every stage beside another way of doing it and beside what limits it; print a table, write JSON.

    python benchmarks/performance.py [--rows 1,5] [--size full|tiny] [--data-dir data/flickr8k]

`docs/performance.md` explains the rows; `--doc` writes the table into it. Nothing is downloaded: Flickr8k and the
captions of `captions_text` are used if they are in the folder `SHOWTELL_DATA`, and made ones if not.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import tempfile
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rows import ROWS, Line
from workload import ROOT, SIZES, Workload

BEGIN, END = "<!-- table: python benchmarks/performance.py --doc -->\n", "<!-- end of table -->"
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "onnxruntime", "nltk", "pycocoevalcap")
HEAD = ("#", "work", "rival", "showtell", "ratio", "limit", "reached", "must", "goal")


def hardware() -> dict[str, object]:
    """Return what the figures depend on, without the name of the machine."""
    model = platform.processor() or platform.machine()
    flags: list[str] = []
    if Path("/proc/cpuinfo").exists():
        fields = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        rows = {name.strip(): value.strip() for name, _, value in fields}
        model, flags = rows.get("model name", model), rows.get("flags", "").split()
    wanted = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    return {"processor": model, "cores": os.cpu_count(), "instructions": wanted, "threads": torch.get_num_threads(),
            "system": platform.system()}  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cells(line: Line) -> list[str]:
    values = [f"{number(value)} {line.unit}" if value is not None else "–" for value in (line.rival, line.ours)]
    ratio = "–" if line.ratio is None else f"{number(line.ratio)}×"
    return [str(line.row), line.work, *values, ratio, number(line.limit), line.reached, line.must, line.goal]


def table(lines: list[Line]) -> str:
    """Return the lines as a Markdown table, its columns aligned for a terminal, too."""
    rows = [list(HEAD), *map(cells, lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    rows.insert(1, ["-" * width for width in widths])
    return "".join(
        "| " + " | ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)) + " |\n" for row in rows
    )


def notes(lines: list[Line]) -> str:
    """Return a list of what was compared with what, and how."""
    text = []
    for line in lines:
        parts = [
            line.rival_is and f"rival: {line.rival_is}",
            line.limit_is and f"limit: {line.limit_is}",
            line.measured,
        ]
        parts.append(f"median of {line.runs}" if line.runs > 1 else "measured once")
        text.append(f"- {line.row}, {line.work}: {'; '.join(part for part in parts if part)}")
    return "\n".join(text) + "\n"


def read(path: Path, size: str) -> list[Line]:
    """Return the lines of a file of results, if it is of this size."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError:
        return []
    return [Line(**line) for line in found["lines"]] if found["size"] == size else []


def write_doc(path: Path, results: dict) -> None:
    """Replace the table of the document."""
    lines = [Line(**line) for line in results["lines"]]
    machine, text = results["hardware"], path.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    about = f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), "
    about += f"torch {results['versions']['torch']}, {results['date']}.\n\n"
    path.write_text(before + BEGIN + about + table(lines) + "\n" + notes(lines) + END + rest.partition(END)[2], "utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="all", help="the rows to measure, such as 1,5 (default all)")
    parser.add_argument("--size", choices=SIZES, default="full", help="tiny is for tests; its figures mean nothing")
    parser.add_argument("--data-dir", help="the folder of Flickr8k")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/performance.json", help="the JSON file")
    parser.add_argument("--doc", action="store_true", help="only write the table of the JSON into docs/performance.md")
    options = parser.parse_args(arguments)
    if options.doc:
        return write_doc(ROOT / "docs/performance.md", json.loads(options.out.read_text("utf-8")))
    chosen = list(ROWS) if options.rows == "all" else [int(row) for row in options.rows.split(",")]
    if unknown := [row for row in chosen if row not in ROWS]:
        parser.error(f"there is no row {unknown[0]}; rows are 1 to {max(ROWS)}")
    lines = [line for line in read(options.out, options.size) if line.row not in chosen]  # measured before
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)  # the weights of the tiny size are random
        workload = Workload(options.size, Path(folder), options.data_dir)
        for row in chosen:
            print(f"row {row}: {(ROWS[row].__doc__ or '').strip()}", flush=True)
            lines += ROWS[row](workload)
    lines.sort(key=lambda line: line.row)
    results = {"date": datetime.date.today().isoformat(), "size": options.size, "hardware": hardware()}
    results |= {"versions": versions(), "data": "Flickr8k" if workload.data_dir else "generated"}
    results |= {"lines": [dataclasses.asdict(line) for line in lines]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"\n{table(lines)}\n{notes(lines)}\nin {options.out}")
    return None


if __name__ == "__main__":
    main()
