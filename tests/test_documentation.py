"""The documentation as a site: it builds without a warning, no link is broken, and nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path.stem for path in ROOT.glob("*.ipynb"))


class Links(HTMLParser):
    """The ids of a page, the addresses it links to, and those it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.linked, self.loaded = {"", "__skip"}, [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values.get("id"), values.get("name") if tag == "a" else None}
        for name in ("href", "src", "data", "poster"):
            if values.get(name) is not None:
                (self.linked if tag == "a" else self.loaded).append(values[name])


def site_faults(folder: Path) -> list[str]:
    """Return the links inside a site that lead nowhere, and what its pages and style sheets load from elsewhere."""
    pages = {path.resolve(): Links(path.read_text("utf-8")) for path in folder.rglob("*.html")}
    faults = []
    for path, page in pages.items():
        for address in page.linked + page.loaded:
            url = urlsplit(address)
            if url.scheme in ("data", "mailto"):
                continue
            if url.scheme or url.netloc:
                faults += [f"{path.name} loads {address}"] * (address in page.loaded)
                continue
            base = folder if url.path.startswith("/") else path.parent  # the error page's links begin at the root
            target = (base / unquote(url.path.lstrip("/"))).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or (target in pages and unquote(url.fragment) not in pages[target].ids):
                faults.append(f"{path.name} links to {address}")
    for path in [*folder.rglob("*.css"), *pages]:
        imported = re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)", path.read_text("utf-8"))
        faults += [f"{path.name} loads {address}" for address in imported]
    return faults


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    return folder


def test_the_site_has_every_page_and_is_whole(site):
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    documents = {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in ROOT.glob("docs/*.md")}
    assert {"index.html", "models/index.html", *documents, *(f"{name}.html" for name in NOTEBOOKS)} <= pages
    assert len(NOTEBOOKS) == 5
    assert site_faults(site) == []
    home, reference = ((site / name).read_text("utf-8") for name in ("index.html", "docs/api.html"))
    assert "images/photographs.jpg" in home
    for name in ("captioner.load", "metrics.score", "decoders.Decoder", "errors.UserError"):
        assert f'id="showtell.{name}"' in reference
    assert "jp-OutputArea-output" in (site / f"{NOTEBOOKS[3]}.html").read_text("utf-8")
    assert "mermaid" not in (site / "docs" / "architecture.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("markup", "fault"),
    [
        ('<a href="gone.html">x</a>', "index.html links to gone.html"),
        ('<a href="other.html#gone">x</a>', "index.html links to other.html#gone"),
        ('<img src="gone.png">', "index.html links to gone.png"),
        ('<script src="//x.org/a.js"></script>', "index.html loads //x.org/a.js"),
        ('<link href="https://x.org/font.css">', "index.html loads https://x.org/font.css"),
        ("<style>@import url(https://x.org/a.css)</style>", "index.html loads https://x.org/a.css"),
        ('<a href="https://x.org">x</a> <a href="other.html#b">y</a>', None),
    ],
)
def test_the_checker_finds_a_fault(markup, fault, tmp_path):
    (tmp_path / "index.html").write_text(markup)
    (tmp_path / "other.html").write_text('<h1 id="b">B</h1>')
    assert site_faults(tmp_path) == [fault] * (fault is not None)


def test_the_settings_name_no_address():
    assert "://" not in (ROOT / "mkdocs.yml").read_text("utf-8")
