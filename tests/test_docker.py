"""The Dockerfile: hadolint has no complaint, and its steps give a page that captions, run here without Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, with continued lines joined."""
    lines = "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in lines.splitlines() if line]


def test_hadolint_has_no_complaint():
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        pytest.skip("no hadolint on the path")
    result = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_the_container_has_what_it_needs_and_no_root():
    steps = instructions()
    last = steps[max(i for i, (name, _) in enumerate(steps) if name == "FROM") :]
    assert {"USER", "HEALTHCHECK", "EXPOSE", "CMD"} <= {name for name, _ in last}
    assert dict(last)["USER"].split(":")[0] not in ("root", "0")
    assert "torch" not in " ".join(rest for name, rest in last if name == "RUN")
    copied = {word for name, rest in steps if name == "COPY" and "--from" not in rest for word in rest.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    for name in copied:
        assert (ROOT / name).exists()


class Stage:
    """One stage of the build: a folder as its file system, and an environment that finds the packages of these tests.

    Nothing is downloaded: pip finds the requirements installed, or fails.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=True, symlinks=os.name != "nt")
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder / "venv"), "platbase": "."}))
        for old in site.glob("setuptools*"):  # that of `ensurepip`, in place of the one of these tests
            shutil.rmtree(old)
        (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        self.path = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOWTELL_")}
        self.environment |= {
            "PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}", "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "SHOWTELL_OFFLINE": "1",
            "PYTHONPATH": str(ROOT / "tests" / "offline"), "TMPDIR": str(folder),
        }  # fmt: skip

    def run(self, command: str | list[str], **options: object) -> subprocess.Popen:
        return subprocess.Popen(
            command, shell=isinstance(command, str), cwd=self.path, env=self.environment, text=True, **options
        )


@pytest.mark.slow
def test_its_steps_give_a_page_that_captions(tmp_path):
    """In two folders, with the packages that are installed here instead of downloads."""
    if not (shutil.which("sh") and os.name == "posix"):
        pytest.skip("the steps are for a POSIX shell")
    stages: dict[str, Stage] = {}
    command = health = None
    for name, rest in instructions():
        if name == "FROM":
            stage = stages[rest.rpartition(" AS ")[2]] = Stage(tmp_path / str(len(stages)))
        elif name == "WORKDIR":
            stage.path = stage.folder / rest.lstrip("/")
            stage.path.mkdir(parents=True)
        elif name == "COPY":
            *sources, target = rest.split()
            origin = ROOT
            if sources[0].startswith("--from="):
                origin = stages[sources.pop(0).partition("=")[2]].folder
            for source in (origin / source.lstrip("/") for source in sources):
                into = stage.path / target
                if source.is_dir():
                    shutil.copytree(source, into, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    into.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, into)
        elif name == "RUN":
            process = stage.run(rest, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            output = process.communicate(timeout=600)[0]
            assert process.returncode == 0, output
        elif name == "CMD":
            command = json.loads(rest)
        elif name == "HEALTHCHECK":
            health = json.loads(rest[rest.index("[") :])
        else:
            assert name in ("USER", "ENV", "EXPOSE"), name
    assert not (stage.folder / "venv" / "bin" / "torchrun").exists()
    server = stage.run([*command, "--port", "0"], stdout=subprocess.PIPE)
    try:
        port = re.search(r":(\d+) ", server.stdout.readline())[1]
        assert stage.run([part.replace("7860", port) for part in health]).wait(60) == 0
        photo = ROOT / "showtell" / "samples" / "pagoda.jpg"
        with urlopen(Request(f"http://127.0.0.1:{port}/caption", photo.read_bytes()), timeout=60) as answer:
            (row,) = json.load(answer)
    finally:
        server.terminate()
        server.wait(30)
    assert row["model"] == "showtell-attend-1"
    assert row["captions"][0]["text"] == "A clock tower with a clock on it"
    assert (server.returncode, health[0]) == (0, "python")
