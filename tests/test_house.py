"""The house rules: layers, front doors, requirements, quick imports, names, words, links; each checker is tested."""

from __future__ import annotations

import ast
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRONT_DOORS = ("model", "data_loader", "vocabulary")
COURSE_PACKAGES = {"torch", "torchvision", "pycocotools", "nltk", "numpy", "matplotlib", "jupyter", "scikit-image"}
CORE_PACKAGES = {"safetensors", "tqdm", "pillow", "jinja2", "platformdirs", "pooch", "shtab"}
MODULES = sorted(path.stem for path in (ROOT / "showtell").glob("*.py") if path.stem != "__init__")
MAX_LINES = 500


def repository_files(*suffixes: str) -> list[Path]:
    """Return the files of the repository that git does not ignore, committed or not."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def read_toml(path: Path) -> dict:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10, where pytest installs tomli
        import tomli as tomllib
    return tomllib.loads(path.read_text("utf-8"))


PROJECT = read_toml(ROOT / "pyproject.toml")


LAYERS = [layer.split(" : ") for layer in PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]]


def lint_imports(folder: Path) -> str:
    """Check the package in `folder` against the contracts in its pyproject.toml; return the report, "" if kept."""
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command as lint; lint()"
    result = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    return result.stdout + result.stderr if result.returncode else ""


def test_imports_go_down_or_stay_on_their_layer():
    assert lint_imports(ROOT) == ""


@pytest.mark.parametrize(
    ("sources", "fault"),
    [
        ({"metrics": "def f():\n    from showtell import train"}, "showtell.metrics -> showtell.train (l.2)"),
        ({"metrics": "from showtell import model", "model": "from showtell import metrics"}, "No circular imports"),
        ({"a_new_module": ""}, "a_new_module"),
    ],
)
def test_the_contracts_find_a_fault(sources: dict[str, str], fault: str, tmp_path: Path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "showtell").mkdir()
    for module in ["__init__", *(name for layer in LAYERS for name in layer), *sources]:
        (tmp_path / "showtell" / f"{module}.py").write_text(sources.get(module, ""))
    assert fault in lint_imports(tmp_path)


def test_the_diagram_of_the_layers_is_that_of_pyproject():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    boxes = re.findall(r'\["<b>.*?</b><br>(.*?)"\]', page)
    assert [re.split(r" · |<br>", box) for box in boxes] == LAYERS


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short_enough_to_read(module: str):
    lines = len((ROOT / "showtell" / f"{module}.py").read_text("utf-8").splitlines())
    assert lines <= MAX_LINES, f"showtell/{module}.py has {lines} lines: shorten it, or split it by subject"


def front_door_faults(name: str, source: str) -> list[str]:
    """Return why `source` is no front door: at most 30 lines, a contents page, re-exports, `__all__`."""
    faults = []
    tree = ast.parse(source)
    lines = len(source.splitlines())
    if lines > 30:
        faults.append(f"{name}.py has {lines} lines, and a front door has at most 30")
    rest = tree.body[1:]  # after the docstring
    homes = {f"showtell.{home}" for home in ({name, "decoders"} if name == "model" else {name})}
    imports = [node for node in rest if isinstance(node, ast.ImportFrom) and node.module in homes]
    exported = next((ast.literal_eval(n.value) for n in rest if ast.unparse(n).startswith("__all__ = ")), [])
    imported = [alias.asname or alias.name for node in imports for alias in node.names]
    if len(rest) != len(imports) + 1 or "*" in imported:
        faults.append(f"{name}.py holds more than re-exports from showtell.{name} and __all__")
    if sorted(imported) != sorted(exported) or not exported:
        faults.append(f"{name}.py imports {imported} and exports {exported}")
    page = ast.get_docstring(tree) or ""
    faults += [f"{name}.py's contents page lacks {word}" for word in exported if not re.search(rf"(?m)^{word}\s", page)]
    return faults


@pytest.mark.parametrize("name", FRONT_DOORS)
def test_a_front_door_is_a_contents_page(name: str):
    assert front_door_faults(name, (ROOT / f"{name}.py").read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('"""X\n\nA  is a.\n"""\nfrom showtell.model import A\n__all__ = ["A"]\nA = A()\n', "holds more than"),
        ('"""X\n\nA  is a.\n"""\nfrom showtell.train import A\n__all__ = ["A"]\n', "holds more than"),
        ('"""X\n\nA  is a.\n"""\nfrom showtell.model import A, B\n__all__ = ["A"]\n', "imports ['A', 'B'] and exports"),
        ('"""X."""\nfrom showtell.model import A\n__all__ = ["A"]\n', "lacks A"),
        ('"""X\n\nA  is a.\n"""\nfrom showtell.model import A\n__all__ = ["A"]' + "\n" * 30, "has 35 lines"),
    ],
)
def test_the_front_door_checker_finds_a_fault(source: str, fault: str):
    assert any(fault in found for found in front_door_faults("model", source))


@pytest.mark.parametrize("name", FRONT_DOORS)
def test_a_front_door_opens(name: str):
    result = python(f"import {name} as door; print(*(getattr(door, name).__name__ for name in door.__all__))")
    assert result.returncode == 0, result.stderr
    exported = re.search(r"__all__ = (\[.*?\])", (ROOT / f"{name}.py").read_text("utf-8"), re.DOTALL)
    assert result.stdout.split() == ast.literal_eval(exported[1])


def front_door_users(source: str) -> set[str]:
    """Return the front doors that `source` imports, inside functions too."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return names & set(FRONT_DOORS)


def test_only_notebooks_and_users_import_a_front_door():
    users = {
        str(path.relative_to(ROOT)): found
        for path in repository_files(".py")
        if (found := front_door_users(path.read_text("utf-8")))
    }
    assert users == {}
    assert front_door_users("def f():\n    from model import EncoderCNN\n    import os") == {"model"}
    assert front_door_users("import json, vocabulary") == {"vocabulary"}
    assert front_door_users("from showtell.model import EncoderCNN\nfrom . import model") == set()


PAGE = "write_page(PATH, 't', '', [('a', 1)], [Table('t', ['a'], [['b']]), Gallery('g', [Card(None, '1', 'a cat')])])"
DATA = """from showtell import annotations, confidence, datasets, scoring, synthetic, tokenizer, transforms as t
t.Transform.from_dict(t.IMAGENET_TRAIN.to_dict()).evaluation().fingerprint(), t.mirror_caption("left")
datasets.load("synthetic", n=2).references(), [cut("it's a dog. a cat") for cut in tokenizer.TOKENIZERS.values()]"""
CAPTION = """import numpy, showtell.transforms
showtell.transforms._jpeg_decoder()
showtell.load(device="cpu", engine="torch").caption(numpy.zeros((40, 50, 3), "uint8"))"""


@pytest.mark.parametrize(
    ("code", "slow"),
    [
        ("import showtell", "torch torchvision numpy PIL matplotlib nltk skimage pycocotools tqdm"),
        ("import showtell.download, showtell.released", "torch requests numpy"),
        (DATA, "torch torchvision matplotlib jinja2 nltk java"),
        (f"from showtell.report import *; {PAGE}", "torch matplotlib"),
        (CAPTION, "torch._dynamo matplotlib"),  # PyTorch's compiler takes as long as all else
    ],
    ids=["package", "download", "data", "page", "caption"],
)
def test_nothing_slow_is_imported_without_need(code: str, slow: str, tmp_path: Path):
    code = code.replace("PATH", repr(str(tmp_path / "page.html")))
    result = python(f"{code}\nimport sys; print(sorted(sys.modules.keys() & set({slow.split()})))")
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_every_module_imports_without_the_optional_packages():
    """The core runs with torch, torchvision, numpy, Pillow, safetensors and tqdm."""
    optional = (
        "nltk pycocotools pycocoevalcap matplotlib jinja2 jupyter IPython skimage tensorboard timm onnx onnxruntime"
        " huggingface_hub wandb yaml tomli pytest ray pyarrow webdataset"
    ).split()
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({optional}))  # None makes an import fail
for module in {MODULES}:
    importlib.import_module("showtell." + module)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def name_faults(root_names: list[str], module_names: list[str]) -> list[str]:
    """Return the names that collide with other packages, and those that describe nothing."""
    taken = {"captioning", "datasets", "transformers", "evaluate", "torch", "numpy", "test"} | sys.stdlib_module_names
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    faults = [f"{name} at the root is the name of another package" for name in root_names if name in taken]
    for name in [*root_names, *module_names]:
        if vague & set(name.split("_")):
            faults.append(f"{name} describes nothing: name the subject")
    faults += [
        f"showtell/{name}.py has a name of the standard library"
        for name in module_names
        if name in sys.stdlib_module_names - {"__main__"}
    ]
    return faults


def test_names_do_not_collide():
    root_names = [path.stem for path in repository_files(".py") if path.parent == ROOT]
    assert name_faults(root_names, MODULES) == []


def test_the_name_checker_finds_a_fault():
    assert len(name_faults(["datasets", "utils", "random", "model"], ["image_utils", "json", "metrics"])) == 5


def requirement_faults(text: str) -> list[str]:
    """Return what is wrong with a requirements file: names, options, addresses, exact pins."""
    faults = []
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    names = set()
    for line in filter(None, lines):
        match = re.fullmatch(r"([A-Za-z0-9-]+)(>=[\d.]+)?", line)
        if match:
            names.add(match[1])
        else:
            faults.append(f"{line!r} is not a plain 'name>=version' (no index, address or exact pin)")
    if names != COURSE_PACKAGES | CORE_PACKAGES:
        faults.append(f"unexpected or missing: {sorted(names ^ (COURSE_PACKAGES | CORE_PACKAGES))}")
    return faults


def test_requirements_are_the_course_packages_and_those_of_the_core():
    text = (ROOT / "requirements.txt").read_text("utf-8")
    assert requirement_faults(text) == []
    assert {"torch>=2.14", "torchvision>=0.29"} <= set(text.splitlines())


def test_the_requirement_checker_finds_a_fault():
    good = "\n".join(COURSE_PACKAGES | CORE_PACKAGES)
    assert requirement_faults(good) == []
    assert "no index" in requirement_faults(good + "\n--extra-index-url https://example.org/cpu")[0]
    assert "no index" in requirement_faults(good.replace("nltk", "nltk==3.9"))[0]
    assert requirement_faults(good + "\npandas") == ["unexpected or missing: ['pandas']"]


def test_pyproject_agrees_with_the_rest():
    project, tools = PROJECT["project"], PROJECT["tool"]
    setuptools = tools["setuptools"]
    assert setuptools["packages"] == ["showtell"]
    assert setuptools["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    assert set(project["dynamic"]) == {"version", "dependencies"}
    assert project["scripts"] == {"showtell": "showtell.__main__:main"}
    assert project["requires-python"] == ">=3.10"
    banned = tools["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == set(FRONT_DOORS)


# In pieces, so that this file does not match.
PRIVATE_PATH = re.compile(r"/wor" + r"k/|/tm" + r"p/|/roo" + r"t/|/hom" + r"e/[a-z]|\.\./sha" + r"red|[A-Z]:\\\\Users")
OPEN_MARK = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
TEXTS = (".py", ".md", ".toml", ".txt", ".cff", ".ipynb", ".sh", ".html", ".svg", "")


def text_faults(name: str, text: str) -> list[str]:
    """Return the lines with a path of one machine or an open task; `.ci/run` may look beside the checkout."""
    patterns = [OPEN_MARK] if name == ".ci/run" else [OPEN_MARK, PRIVATE_PATH]
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for number, line in enumerate(text.splitlines(), 1)
        if any(pattern.search(line) for pattern in patterns)
    ]


def test_no_text_has_a_path_of_one_machine_or_an_open_task():
    faults = []
    for path in repository_files(*TEXTS):
        faults += text_faults(path.relative_to(ROOT).as_posix(), path.read_text("utf-8", errors="replace"))
    assert faults == []


def test_the_text_checker_finds_a_fault():
    assert text_faults("a.py", "x = 1\n# FIX" + "ME later\nopen('/ho" + "me/me/x')") == [
        "a.py:2: # FIX" + "ME later",
        "a.py:3: open('/ho" + "me/me/x')",
    ]
    assert text_faults("a.md", "the folder data/flickr8k, and templates/work") == []


# Phrases that documentation in plain English does not need, and what to write instead.
PLAIN = {
    r"\bso many\b": "the number: n images, k epochs",
    r"\blikeliest\b": "most likely",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bthe system refuses\b": "cannot write …",
    r"\b(is|are|was) told\b": "receives, is given",
    r"\bancestors?\b": "other repositories, the Udacity course, legacy",
    r"\bof everything random\b": "random seed",
    r"\b(is|was|be|makes? a \w+) worth\b": "what it gives",
    r"\bcould not be had\b": "could not be downloaded",
    r"\b(by|with|has no) chance\b": "at random",
    r"\bpictures?\b(?! of)": "image",
}


def wordings(text: str) -> list[str]:
    """The phrases of `PLAIN` in `text`, with what to write instead."""
    return [f"{match[0]}: {instead}" for phrase, instead in PLAIN.items() for match in re.finditer(phrase, text, re.I)]


@pytest.mark.parametrize("folder", [".", "showtell", "docs", "models", "benchmarks", "tools"])
def test_texts_are_plain_english(folder: str):
    faults = {
        path.name: found
        for path in repository_files(".py", ".md", ".html")
        if path.parent == ROOT / folder and (found := wordings(path.read_text("utf-8")))
    }
    assert faults == {}


def test_the_wording_checker_finds_a_fault():
    assert wordings("Draws from the so many likeliest words") == [
        "so many: the number: n images, k epochs",
        "likeliest: most likely",
    ]
    assert wordings("a picture of a dog; amend it") == []


def broken_links(page: Path, text: str) -> list[str]:
    """Return the links of a Markdown page, and its paths in backquotes, that lead to no file."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose) if "://" not in link and ":" not in link]
    paths = re.findall(r"`((?:showtell|tests|benchmarks|docs|tools|images|\.ci)/[\w./-]+)`", prose)
    broken = [link for link in links if not (page.parent / link).exists()]
    return broken + [path for path in paths if not (ROOT / path).exists()]


def test_links_and_paths_in_the_pages_exist():
    pages = repository_files(".md")
    assert pages
    broken = {p.relative_to(ROOT).as_posix(): found for p in pages if (found := broken_links(p, p.read_text("utf-8")))}
    assert broken == {}
    assert broken_links(ROOT / "x.md", "[a](gone.md) `showtell/gone.py` [b](https://x.org) `showtell/errors.py`") == [
        "gone.md",
        "showtell/gone.py",
    ]


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=["rules", "format"])
def test_ruff_passes(arguments: list[str]):
    pytest.importorskip("ruff")
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *arguments, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


BLOCKED = "tests run offline, and this one tried to reach"


def test_other_machines_cannot_be_reached():
    with pytest.raises(OSError, match=BLOCKED):
        socket.create_connection(("example.org", 80), timeout=1)
    for family, address in ((socket.AF_INET, ("192.0.2.1", 80)), (socket.AF_INET6, ("2001:db8::1", 80))):
        with socket.socket(family, socket.SOCK_STREAM) as line, pytest.raises(OSError, match=BLOCKED):
            line.connect(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line, pytest.raises(OSError, match=BLOCKED):
        line.sendto(b"x", ("192.0.2.1", 53))
    with pytest.raises(OSError, match=BLOCKED):
        socket.gethostbyname("example.org")


def test_a_process_that_a_test_starts_cannot_reach_other_machines_either():
    result = python("import urllib.request as r; r.urlopen('http://192.0.2.1/', timeout=1)")
    assert result.returncode == 1
    assert BLOCKED in result.stderr


def test_this_machine_can_be_reached():
    for host in ("localhost", "127.0.0.1"):
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection((host, server.getsockname()[1]), timeout=5),
        ):
            server.accept()[0].close()
    if hasattr(socket, "AF_UNIX"):
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        with ours, theirs:
            ours.sendall(b"x")
            assert theirs.recv(1) == b"x"
