"""The installation script, with a stand-in for uv: what it does again, what it leaves alone, and what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "sh awk cat chmod cksum cut date df dirname grep mkdir mv printf ps rm sed sleep tail tr uname".split()

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the script is for a POSIX shell")

# `uv venv` makes an environment whose python does nothing, well; `uv pip install` writes a line where the test looks.
UV = """#!/bin/sh
if [ "$1" = venv ]; then
    mkdir -p .venv/bin && printf '#!/bin/sh\\nexit 0\\n' > .venv/bin/python && chmod +x .venv/bin/python
else
    echo install >> installations; echo "$INDEX_SAYS"; [ -z "$INDEX_SAYS" ]
fi
"""


class Checkout:
    """A copy of what the script reads, in a folder with a space in its name, with a path of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a folder with space"
        (self.folder / ".ci").mkdir(parents=True)
        for name in (".ci/bootstrap", "pyproject.toml", "requirements.txt"):
            shutil.copy(ROOT / name, self.folder / name)
        self.tools = folder / "bin"
        self.tools.mkdir()
        for name in TOOLS:
            if found := shutil.which(name):
                (self.tools / name).symlink_to(found)

    def command(self, name: str, text: str) -> None:
        """Puts a command of our own on the path, in place of the real one."""
        (self.tools / name).unlink(missing_ok=True)
        (self.tools / name).write_text(text)
        (self.tools / name).chmod(0o755)

    def bootstrap(self, index_says: str = "") -> tuple[int, str]:
        """The exit status, and what was said."""
        result = subprocess.run(
            ["/bin/sh", ".ci/bootstrap"],
            cwd=self.folder,
            env={"PATH": str(self.tools), "INDEX_SAYS": index_says},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.stdout == ""
        return result.returncode, result.stderr

    @property
    def installations(self) -> int:
        path = self.folder / "installations"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    checkout = Checkout(tmp_path)
    checkout.command("uv", UV)
    return checkout


def test_the_second_run_does_nothing(checkout: Checkout):
    status, said = checkout.bootstrap()
    assert status == 0
    assert "showtell: ready after" in said
    assert checkout.bootstrap() == (0, "")
    assert checkout.installations == 1


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml"])
def test_changed_requirements_are_installed_into_what_is_there(checkout: Checkout, name: str):
    checkout.bootstrap()
    (checkout.folder / ".venv" / "kept").touch()
    with open(checkout.folder / name, "a") as file:
        file.write("\n# one more line\n")
    assert checkout.bootstrap()[0] == 0
    assert checkout.installations == 2
    assert (checkout.folder / ".venv" / "kept").exists()


def test_a_moved_folder_gets_a_new_environment(checkout: Checkout):
    checkout.bootstrap()
    (checkout.folder / ".venv" / "old").touch()
    checkout.folder = checkout.folder.rename(checkout.folder.with_name("moved here"))
    assert checkout.bootstrap()[0] == 0
    assert checkout.installations == 2
    assert not (checkout.folder / ".venv" / "old").exists()


def test_an_interrupted_installation_is_done_again_from_nothing(checkout: Checkout):
    checkout.command("uv", UV.replace("echo install", "kill -9 $PPID; echo install"))  # the script dies half-way
    assert checkout.bootstrap()[0] != 0
    (checkout.folder / ".venv" / "half a package").touch()
    checkout.command("uv", UV)
    status, said = checkout.bootstrap()
    assert status == 0
    assert "the last installation did not finish" in said
    assert not (checkout.folder / ".venv" / "half a package").exists()
    assert checkout.bootstrap() == (0, "")


def test_an_environment_made_by_hand_is_kept(checkout: Checkout):
    python = checkout.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 0 # by hand\n")
    python.chmod(0o755)
    assert checkout.bootstrap()[0] == 0
    assert "by hand" in python.read_text()


@pytest.mark.parametrize(
    ("index_says", "sentence"),
    [
        ("error sending request for url: dns error", "the package index cannot be reached; check the network"),
        ("NewConnectionError: [Errno -3] Temporary failure in name resolution", "the package index cannot be reached"),
        ("OSError: [Errno 28] No space left on device", "the disk is full; make room"),
        ("ERROR: No matching distribution found for torch>=2.14", "use another Python, 3.10 or newer"),
        ("ERROR: a wheel is broken", "an unexpected error (ERROR: a wheel is broken); read the log"),
    ],
)
def test_a_failed_installation_is_explained_in_a_sentence(checkout: Checkout, index_says: str, sentence: str):
    status, said = checkout.bootstrap(index_says)
    assert status == 1
    last = said.splitlines()[-1]
    assert last.startswith("showtell: the installation stopped: ")
    assert sentence in last
    assert last.endswith("then run make again (log: .venv/install.log)")
    assert index_says in (checkout.folder / ".venv" / "install.log").read_text()
    assert checkout.bootstrap()[0] == 0  # and it is not taken as done


@pytest.mark.parametrize(
    ("python", "found"), [(None, "no Python"), ('[ "$1" = --version ] && echo Python 3.9.2 || exit 1', "Python 3.9.2")]
)
def test_a_missing_or_old_python_is_said(checkout: Checkout, python: str | None, found: str):
    (checkout.tools / "uv").unlink()
    if python:
        checkout.command("python3", f"#!/bin/sh\n{python}\n")
    status, said = checkout.bootstrap()
    assert status == 1
    assert said.startswith(f"showtell: Python 3.10 or newer is needed and {found} was found; install one")
    assert not (checkout.folder / ".venv").exists()


def test_a_disk_too_small_is_said_before_anything_is_written(checkout: Checkout):
    checkout.command("df", "#!/bin/sh\necho Filesystem; echo '/dev/my disk 100 10 1048576 10% /'\n")
    status, said = checkout.bootstrap()
    assert status == 1
    assert "this disk has 1 GB free; make room, then run make again" in said
    assert not (checkout.folder / ".venv").exists()
