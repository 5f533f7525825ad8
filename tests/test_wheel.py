"""The wheel, installed outside the checkout: it captions with a downloaded model, has its vocabulary and its types."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from file_server import FileServer

from showtell.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT / "tests" / "offline"
FILE = "showtell-attend-1.safetensors"
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with no path to the checkout; other machines stay out of reach."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SHOWTELL_", "PYTHON"))}
    env |= {"PYTHONPATH": str(OFFLINE), "SHOWTELL_OFFLINE": "1", **environment}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel as `python -m build` makes it: from the source distribution, so that this one is complete too."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".*", "models", "images", "runs", "data", "docs", "tests", "build", "*.ipynb")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    name = run(sys.executable, "-c", BUILD, "build_sdist", folder, cwd=folder / "checkout").stdout.splitlines()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    source = folder / name.removesuffix(".tar.gz")
    return folder / run(sys.executable, "-c", BUILD, "build_wheel", folder, cwd=source).stdout.splitlines()[-1]


@pytest.fixture(scope="session")
def python(wheel, tmp_path_factory) -> Path:
    """The Python of a fresh environment with the wheel, which finds the other packages where these tests do."""
    folder = tmp_path_factory.mktemp("environment")
    try:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this Python makes no environments: {error}")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def test_the_wheel_holds_the_package_the_vocabulary_and_the_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
        files = (path for path in (ROOT / "showtell").rglob("*") if path.is_file() and path.suffix != ".pyc")
        assert names == {str(path.relative_to(ROOT)) for path in files} | {"showtell/vocab.pkl"}
        assert {"showtell/py.typed", "showtell/report.html", "showtell/__main__.py"} <= names
        assert archive.read("showtell/vocab.pkl") == (ROOT / "vocab.pkl").read_bytes()
    assert wheel.stat().st_size < 1_000_000


@pytest.mark.slow
def test_the_installed_package_captions_with_a_model_that_it_downloads(python, tmp_path):
    """From a server that redirects, sends a wrong file once and breaks the connection once; then from the cache."""
    photo = Path(pytest.importorskip("skimage").__file__).parent / "data" / "chelsea.png"
    golden = json.loads((ROOT / "tests" / "golden" / "released.json").read_text("utf-8"))
    caption = golden["showtell-attend-1"]["chelsea.png"]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with FileServer(**{f"files/{FILE}": ROOT / "models" / FILE}) as server:
        server.redirects[FILE] = f"/files/{FILE}"
        server.wrong[f"files/{FILE}"] = [b"<html>Please log in to this network</html>"]
        server.breaks[f"files/{FILE}"] = 50_000_000
        command = (python.with_name("showtell"), "caption", photo, "--device", "cpu")
        first = run(*command, cwd=tmp_path, SHOWTELL_MODELS=server.url, **environment)
        asked = server.asked_for(f"files/{FILE}")
    assert first.stdout.strip() == caption
    assert (asked[:2], len(asked)) == ([None, None], 3)
    assert asked[2].startswith("bytes=")
    code = f"""
import showtell
from showtell.vocabulary import default_vocab_file
print(Path(showtell.__file__).parent == default_vocab_file().parent)
print(showtell.load(device="cpu").caption({str(photo)!r})[0].text)
print(len(showtell.get_loader(dataset="synthetic", vocab_from_file=True, batch_size=2).dataset.vocab))
"""
    again = run(python, "-W", "ignore", "-c", "from pathlib import Path" + code, cwd=tmp_path, **environment)
    n_words = len(Vocabulary.load(ROOT / "vocab.pkl"))
    first, second, note, count = again.stdout.splitlines()
    assert (first, second, count) == ("True", caption, str(n_words))
    assert note.startswith(f"vocabulary of {n_words:,} words")
    assert run(python, "-m", "showtell", "--version", cwd=tmp_path).stdout.startswith("showtell ")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shell_completion_knows_commands_options_and_choices(tmp_path, shell):
    script = run(sys.executable, "-m", "showtell", "completion", shell, cwd=ROOT).stdout
    for word in ("caption", "import-legacy", "--beam-size", "coco2017", "legacy"):
        assert word in script
    if shell == "bash" and shutil.which("bash"):
        (tmp_path / "script").write_text(script, encoding="utf-8")
        code = (
            "source ./script; COMP_WORDS=(showtell download coco); COMP_CWORD=2; _shtab_showtell 2>/dev/null; "
            "echo ${COMPREPLY[*]}"
        )
        assert run("bash", "-c", code, cwd=tmp_path).stdout.split() == ["coco2014", "coco2017"]
