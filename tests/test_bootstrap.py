"""The installation script, run with stand-ins for uv and Python: when it installs, what it keeps, what it reports."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "sh cat chmod cksum cp dirname grep mkdir ps rm sleep tail".split()

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the script is for a POSIX shell")

# uv and Python in one: makes an environment with a copy of itself, or appends a line to the file `installations`.
INSTALLER = """#!/bin/sh
case "$*" in
"-c "*) ;;
*install*) echo x >> installations; {then} echo "$INDEX_SAYS"; [ -z "$INDEX_SAYS" ] ;;
*venv*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
"""


class Checkout:
    """A copy of what the script reads, in a folder with a space in its name, and a PATH with fake installers."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tools = folder / "a folder", folder / "bin"
        (self.folder / ".ci").mkdir(parents=True)
        self.tools.mkdir()
        for name in (".ci/bootstrap", "pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, self.folder / name)
        for name in TOOLS:
            (self.tools / name).symlink_to(shutil.which(name))
        self.command("uv", INSTALLER.format(then=""))

    def command(self, name: str, text: str) -> None:
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def bootstrap(self, index_says: str = "") -> tuple[int, str]:
        """Return the exit status and what was printed."""
        options = {"capture_output": True, "text": True, "timeout": 60}
        environment = {"PATH": str(self.tools), "INDEX_SAYS": index_says}
        result = subprocess.run(["/bin/sh", ".ci/bootstrap"], cwd=self.folder, env=environment, **options)
        assert result.stdout == ""
        return result.returncode, result.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("installer", ["uv", "python3"])
def test_the_second_run_does_nothing_and_changed_requirements_are_installed(checkout: Checkout, installer: str):
    (checkout.tools / "uv").rename(checkout.tools / installer)
    status, printed = checkout.bootstrap()
    assert (status, printed.splitlines()[-1]) == (0, "showtell: installed")
    (checkout.folder / ".venv" / "kept").touch()
    assert checkout.bootstrap() == (0, "")
    for n, name in enumerate(["requirements.txt", "pyproject.toml"], 2):
        with open(checkout.folder / name, "a") as file:
            file.write("\n# one more line\n")
        assert checkout.bootstrap()[0] == 0
        assert (checkout.folder / "installations").read_text() == n * "x\n"
    assert (checkout.folder / ".venv" / "kept").exists()


def test_a_moved_folder_gets_a_new_environment(checkout: Checkout):
    checkout.bootstrap()
    (checkout.folder / ".venv" / "old").touch()
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved here"))
    assert checkout.bootstrap()[0] == 0
    assert not (checkout.folder / ".venv" / "old").exists()


def test_an_interrupted_installation_starts_again_from_nothing(checkout: Checkout):
    checkout.command("uv", INSTALLER.format(then="kill -9 $PPID;"))
    assert checkout.bootstrap()[0] != 0
    (checkout.folder / ".venv" / "half a package").touch()
    checkout.command("uv", INSTALLER.format(then=""))
    assert checkout.bootstrap()[0] == 0
    assert not (checkout.folder / ".venv" / "half a package").exists()
    assert checkout.bootstrap() == (0, "")


def test_a_second_make_waits_for_the_first_installation(checkout: Checkout):
    other = subprocess.Popen(["/bin/sh", "-c", "sleep 60; : bootstrap"])
    try:
        (checkout.folder / ".venv").mkdir()
        (checkout.folder / ".venv" / "showtell-installing").write_text(f"{other.pid}\n")
        status, printed = checkout.bootstrap()
    finally:
        other.kill()
        other.wait()
    assert status == 1
    assert printed.startswith(f"showtell: process {other.pid} is installing into .venv; wait")


@pytest.mark.parametrize(
    ("index_says", "hint", "keeps_environment"),
    [
        ("error sending request for url: dns error", "the package index cannot be reached: check the network", True),
        ("[Errno -3] Temporary failure in name resolution", "cannot be reached: check the network", True),
        ("OSError: [Errno 28] No space left on device", "the disk is full: free about 9 GB", False),
        ("ERROR: No matching distribution found for torch>=2.14", "see the messages above", False),
    ],
)
def test_a_failed_installation_shows_the_installers_words(
    checkout: Checkout, index_says: str, hint: str, keeps_environment: bool
):
    status, printed = checkout.bootstrap(index_says)
    assert status == 1
    *_, words, last = printed.splitlines()
    assert words == index_says
    assert last.startswith("showtell: the installation failed; ")
    assert last.endswith(f"{hint}, then run make again (log: .venv/install.log)")
    (checkout.folder / ".venv" / "old").touch()
    assert checkout.bootstrap()[0] == 0  # a failure is not taken for done
    assert (checkout.folder / ".venv" / "old").exists() == keeps_environment


@pytest.mark.parametrize(
    ("python", "found"), [(None, "no Python"), ('[ "$1" = --version ] && echo Python 3.9.2 || exit 1', "Python 3.9.2")]
)
def test_a_missing_or_old_python_is_reported(checkout: Checkout, python: str | None, found: str):
    (checkout.tools / "uv").unlink()
    if python:
        checkout.command("python3", f"#!/bin/sh\n{python}\n")
    status, printed = checkout.bootstrap()
    assert status == 1
    assert printed.startswith(f"showtell: Python 3.10 or newer is required, found {found}; install it")
    assert not (checkout.folder / ".venv").exists()
