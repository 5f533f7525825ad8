"""The file tree of the README: each file, its lines, what it is for. `python docs/tree.py` writes it there."""

from __future__ import annotations

import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tree: python docs/tree.py -->\n", "<!-- end of tree -->"
FOLDERS = {
    "models/": "released checkpoints",
    "images/": "figures, drawn by this project",
    "docs/": "formats, evaluation, your own pictures, architecture",
    "tests/": "what holds all this",
    "benchmarks/": "what measures it",
}


def purpose(path: Path) -> str:
    """The first sentence of a module's docstring, or a notebook's title, on one line."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return "".join(cells[0]["source"]).splitlines()[0].lstrip("# ")
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".").split(": `showtell")[0]


def tree() -> str:
    """The tree as a Markdown block."""
    rows = [(path.name, "", purpose(path)) for path in sorted(ROOT.glob("[0-9]_*.ipynb"))]
    doors = [ROOT / name for name in ("model.py", "data_loader.py", "vocabulary.py")]
    for path in [*doors, *sorted((ROOT / "showtell").glob("*.py"))]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        rows.append((str(path.relative_to(ROOT)), str(lines), purpose(path)))
    rows += [(name, "", what) for name, what in FOLDERS.items()]
    width = max(len(name) for name, *_ in rows)
    return "```\n" + "".join(f"{name:<{width}} {lines:>5}  {what}\n" for name, lines, what in rows) + "```\n"


def main() -> None:
    """Writes the tree between its marks in the README."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + tree() + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
