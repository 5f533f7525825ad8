"""Set up every test: no network, a fixed seed, few threads; and fixtures for optional data and programs.

A test marked `java`, `browser`, `gpu` or `realdata` is skipped, with the reason, if the machine lacks what it needs.
`pytest --tidy` (used by `make test`) fails if the tests changed the working tree.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = Path(__file__).resolve().parent / "offline"

# Before torch or numpy is imported, and inherited by every process that a test starts.
os.environ["SHOWTELL_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))
os.environ.setdefault(
    "OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else str(min(2, os.cpu_count() or 1))
)
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # threads that spin while waiting slow each other down
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["XDG_CACHE_HOME"] = "/nonexistent"  # models that a user has downloaded change no test
for library in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(library, "1")


def _offline():
    """Load `tests/offline/sitecustomize.py` by path: some systems have a `sitecustomize` of their own."""
    spec = importlib.util.spec_from_file_location("showtell_offline", OFFLINE / "sitecustomize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_offline().block()

try:
    import hypothesis
except ModuleNotFoundError:  # with pytest alone, the tests that need nothing else still run
    pass
else:
    hypothesis.settings.register_profile("showtell", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("showtell")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Seed Python, and numpy and torch if they are loaded."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if hasattr(sys.modules.get("torch"), "manual_seed"):
        sys.modules["torch"].manual_seed(0)


def _folder_named_by(variable: str) -> Path:
    """Return the folder in an environment variable; skip if it is unset, fail if it is no folder."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: no real data here")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{variable} is {value}, which is not a folder")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets."""
    return _folder_named_by("SHOWTELL_DATA")


@pytest.fixture(scope="session")
def flickr8k(shared_data: Path) -> Path:
    """The folder of Flickr8k, in its official layout."""
    folder = shared_data / "flickr8k"
    if not folder.is_dir():
        pytest.skip(f"no flickr8k in {shared_data}")
    return folder


@pytest.fixture(scope="session")
def golden_coco(shared_data: Path) -> dict:
    """Captions of 2,500 images of COCO, with the tokens and scores that coco-caption gives them."""
    path = shared_data.parent / "reference" / "metrics" / "coco_val2017_a.json.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the data")
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.fixture(scope="session")
def weights() -> Path:
    """The folder of pretrained weights."""
    return _folder_named_by("SHOWTELL_WEIGHTS")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium for playwright (`executable_path=`; with `--no-sandbox` for root)."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no chromium on the path")


@pytest.fixture(scope="module")
def browser(chromium):
    """Chromium, open for the tests of a file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


FIXTURE_MARKS = {"shared_data": "realdata", "flickr8k": "realdata", "weights": "realdata", "chromium": "browser"}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by the fixtures it uses, and start the longest test first."""
    items.sort(key=lambda item: "all_five_run_in_order" not in item.name)
    for item in items:
        for fixture in FIXTURE_MARKS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(FIXTURE_MARKS[fixture])


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose mark names something this machine lacks."""
    if item.get_closest_marker("java"):
        if shutil.which("java") is None:
            pytest.skip("no java on the path")
        if importlib.util.find_spec("pycocoevalcap") is None:
            pytest.skip("pycocoevalcap is not installed")
    if item.get_closest_marker("realdata") and not {"SHOWTELL_DATA", "SHOWTELL_WEIGHTS"} & os.environ.keys():
        pytest.skip("neither SHOWTELL_DATA nor SHOWTELL_WEIGHTS is set: no real data here")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tidy", action="store_true", help="fail if the tests changed the working tree (needs git)")


def work_tree(folder: Path = ROOT) -> set[str] | None:
    """Return what is not committed, new files and changed lines; None without git or outside a repository."""
    lines: set[str] = set()
    for command in (["status", "--porcelain", "--untracked-files=all"], ["diff", "--full-index"]):
        try:
            result = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, errors="replace")
        except FileNotFoundError:
            return None
        if result.returncode:
            return None
        lines.update(result.stdout.splitlines())
    return lines


TREE_BEFORE = pytest.StashKey[set]()
TREE_CHANGES = pytest.StashKey[list]()


def _watches(config: pytest.Config) -> bool:
    return config.getoption("--tidy") and not hasattr(config, "workerinput")  # not in each process of pytest-xdist


def pytest_sessionstart(session: pytest.Session) -> None:
    if _watches(session.config):
        session.config.stash[TREE_BEFORE] = work_tree()


@pytest.hookimpl(tryfirst=True)  # before the summary is written
def pytest_sessionfinish(session: pytest.Session) -> None:
    before = session.config.stash.get(TREE_BEFORE, None)
    if before is None:
        return
    session.config.stash[TREE_CHANGES] = sorted((work_tree() or set()) ^ before)
    if session.config.stash[TREE_CHANGES] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if changes := config.stash.get(TREE_CHANGES, []):
        terminalreporter.section("the tests changed the working tree (they may only write under tmp_path)", red=True)
        for line in changes[:40]:
            terminalreporter.write_line(line)
