"""MkDocs' hook (see mkdocs.yml): the site's pages are the repository's Markdown files and notebooks where they are.

Pages keep their paths, so a relative link leads to the same page on the site as in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "*.ipynb", "docs/*.md", "models/*.md", "images/*")


@event_priority(100)  # before the notebooks are rendered
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Take the repository's files in place of those of docs/ alone, and keep the theme's."""
    names = [path.relative_to(ROOT).as_posix() for pattern in SHOWN for path in sorted(ROOT.glob(pattern))]
    ours = [File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in names]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *ours])


def on_page_markdown(markdown: str, **_: object) -> str:
    """Write the diagram of the layers as a list: its script would come from elsewhere."""

    def as_list(diagram: re.Match) -> str:
        boxes = re.findall(r'\["<b>(.*?)</b><br>(.*?)"\]', diagram[0])
        rows = [(title, re.sub(r"\w+", r"`\g<0>`", box.replace("<br>", " · "))) for title, box in boxes]
        return "\n".join(f"- **{title}**: {modules}" for title, modules in rows)

    return re.sub(r"```mermaid\n.*?```", as_list, markdown, flags=re.DOTALL)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Lead a notebook's links to the site's pages, and leave out its badge and scripts, which load from elsewhere."""
    if page.file.src_uri.endswith(".ipynb"):
        html = re.sub(r"<script\b.*?</script>|<a [^>]*><img [^>]*colab[^>]*></a>", "", html, flags=re.DOTALL)
        html = re.sub(r'href="(?:showtell/)?(\w+)\.py"', r'href="docs/api.html#showtell.\1"', html)
        html = re.sub(r'href="([\w/]+)\.(?:md|ipynb)(#[^"]*)?"', r'href="\1.html\2"', html)
    return html
