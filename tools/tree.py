"""Write the file tree of the README: each file, its number of lines, its purpose.

python tools/tree.py
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tree: python tools/tree.py -->\n", "<!-- end of tree -->"
CORE = "decoders backbones model decoding data_loader train vocabulary captioner".split()
FOLDERS = {
    "models/": "released checkpoints",
    "images/": "figures",
    "docs/": "formats, evaluation, your own images, architecture",
    "tests/": "automated tests",
    "tools/": "scripts that produced figures and tables",
    "benchmarks/": "timings of every stage, beside other ways and limits",
}


def purpose(path: Path) -> str:
    """Return the first sentence of a module's docstring, or a notebook's title, on one line."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return "".join(cells[0]["source"]).splitlines()[0].lstrip("# ")
    text = " ".join((ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".").split(": `showtell")[0]


def tree() -> str:
    """Return the tree as a Markdown block, the core of the package before the rest."""
    rows = [(path.name, "", purpose(path)) for path in sorted(ROOT.glob("[0-9]_*.ipynb"))]
    core = [ROOT / "showtell" / f"{name}.py" for name in CORE]
    rest = sorted(set((ROOT / "showtell").glob("*.py")) - set(core))
    for path in [*(ROOT / name for name in ("model.py", "data_loader.py", "vocabulary.py")), *core, *rest]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        rows.append((str(path.relative_to(ROOT)), str(lines), purpose(path)))
    rows += [(name, "", what) for name, what in FOLDERS.items()]
    width = max(len(name) for name, *_ in rows)
    return "```\n" + "".join(f"{name:<{width}} {lines:>5}  {what}\n" for name, lines, what in rows) + "```\n"


def replaced(text: str) -> str:
    """Return a text with the tree between its marks."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + tree() + END + rest.partition(END)[2]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(encoding="utf-8")), encoding="utf-8")
