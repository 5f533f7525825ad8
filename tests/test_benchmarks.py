"""The benchmark measures every row and writes them; the figures themselves are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The results of all rows at a tiny size."""
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("benchmark") / "results.json"
    command = [sys.executable, FOLDER / "performance.py", "--size", "tiny", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text("utf-8"))


@pytest.mark.slow  # half a minute
def test_every_row_is_measured_and_written(results: dict):
    assert set(results) == {"date", "size", "hardware", "versions", "data", "lines"}
    assert sorted({line["row"] for line in results["lines"]}) == list(range(1, 13))
    assert results["hardware"]["cores"] > 0
    assert results["versions"]["torch"]
    for line in results["lines"]:
        assert line["ours"] > 0, line
        assert line["reached"], line
        assert (line["rival"] is None) == (line["ratio"] is None), line
        assert line["rival"] is None or line["rival_is"], line
        assert line["limit"] is None or line["limit_is"], line


def test_the_table_of_the_document_is_that_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)
    import performance

    line = performance.Line(1, "work", "s", 10.0, 2.0, 5.0, 1.5, "5×", "4×", "6×", 3, "another way", "a limit")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{performance.BEGIN}old\n{performance.END}after\n")
    hardware = {"processor": "P", "cores": 2, "instructions": ["avx2"]}
    results = {"date": "2026-01-01", "hardware": hardware, "versions": {"torch": "2"}, "lines": [vars(line)]}
    performance.write_doc(page, results)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 1 | work | 10 s  | 2 s      | 5×    | 1.5   | 5×      | 4×   | 6×   |\n" in text
    assert "- 1, work: rival: another way; limit: a limit; median of 3\n" in text
