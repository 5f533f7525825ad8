"""Models on the Hugging Face Hub, against a hub on this machine: upload, card, download, and a sentence per mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer
from safetensors.torch import save
from test_captioner import lively_checkpoint, save_images
from torch import zeros

import showtell
from showtell.__main__ import main
from showtell.captioner import find_models
from showtell.checkpoint import add_meta, load_checkpoint, save_checkpoint
from showtell.errors import UserError
from showtell.hub import FILE, fetch, model_card
from showtell.recipes import Recipe
from showtell.released import is_released

RECORD = {"epoch": 3, "scores": {"CIDEr": 0.4349, "Bleu_4": 0.1709}, "captions": {"captions": 1000, "distinct": 0.6}}
RECIPE = Recipe(decoder="transformer", epochs=5, lr=1e-3, length_penalty=0.9, max_len=20).to_dict()
FILES = "/{repo_id}/resolve/{revision}/{filename}"
RUN = {"dataset": "flickr8k,folder", "seed": 7, "subset": 600}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return lively_checkpoint(tmp_path_factory.mktemp("model") / "lively.safetensors", "transformer")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that huggingface_hub takes for the real one, a token that may write, and an empty cache."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + FILES)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own, beside plain HTTP
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("logging.raiseExceptions", False)  # its log goes to the standard error of an earlier test
        yield server


@pytest.fixture
def half(model, tmp_path) -> bytes:
    """The checkpoint as `showtell export --format half` writes it."""
    opened = load_checkpoint(model)
    save_checkpoint(tmp_path / "half.safetensors", opened.model, opened.vocab, opened.transform, opened.meta, half=True)
    return (tmp_path / "half.safetensors").read_bytes()


def refused(capsys, *arguments: object) -> str:
    """Run a command that must fail with one sentence, and return it."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("showtell: ")]
    assert (printed.out, "Traceback" in printed.err) == ("", False), printed.err
    return line


def downloads(hub: HubServer) -> list[str]:
    return [
        request.rpartition("/")[2] for request in hub.requests if request.startswith("GET") and "resolve" in request
    ]


def test_a_pushed_model_loads_and_captions_as_its_export(hub, model, half, tmp_path, capsys):
    assert main(["push", str(model), "me/tiny"]) == 0
    address = re.fullmatch(r"caption with: (.*) --model (hub:me/tiny@(\w{40}))\n", capsys.readouterr().out)
    files = hub.repos["me/tiny"]["commits"][address[3]]
    assert (set(files), files[FILE]) == ({FILE, "README.md"}, half)

    (image,) = save_images(tmp_path / "images", 1)
    expected = showtell.load(tmp_path / "half.safetensors", "cpu").caption(image)[0]
    for model_address in (address[2], "hub:me/tiny"):
        assert showtell.load(model_address, "cpu").caption(image)[0] == expected
    assert downloads(hub) == [FILE]  # that file alone, and once


def test_a_revision_pins_a_model(hub, half, model, tmp_path, capsys):
    first = hub.add("me/tiny", **{FILE.replace(".", "__"): half})
    add_meta(model, tmp_path / "other.safetensors", epoch=9)
    assert main(["push", str(tmp_path / "other.safetensors"), "me/tiny", "--revision", "v2"]) == 0
    epochs = {rev: load_checkpoint(fetch(f"hub:me/tiny{rev}")).meta.get("epoch") for rev in ("", "@main", "@v2")}
    assert epochs == {"": 1, "@main": 1, "@v2": 9}
    assert main(["push", str(tmp_path / "other.safetensors"), "me/tiny"]) == 0
    assert [load_checkpoint(fetch(f"hub:me/tiny{rev}")).meta.get("epoch") for rev in ("", "@" + first)] == [9, 1]


def test_the_card_says_what_the_checkpoint_knows(hub, model, tmp_path, capsys, monkeypatch):
    yaml = pytest.importorskip("yaml")
    add_meta(model, tmp_path / "own.safetensors", recipe=RECIPE, run=RUN, epoch=3, validation=RECORD)
    assert main(["push", str(tmp_path / "own.safetensors"), "me/tiny", "--license", "cc-by-4.0"]) == 0
    own = hub.repos["me/tiny"]
    card = own["commits"][own["branches"]["main"]]["README.md"].decode()
    _, front, text = card.split("---\n", 2)
    front = yaml.safe_load(front)
    ((results,),) = [index["results"] for index in front.pop("model-index")]
    assert front == {
        "license": "cc-by-4.0", "library_name": "showtell", "pipeline_tag": "image-to-text", "datasets": ["flickr8k"],
        "metrics": ["bleu", "cider"], "tags": ["image-captioning", "showtell", "transformer", "tiny"],
    }  # fmt: skip
    assert results["dataset"]["split"] == "validation"
    assert {(m["name"], m["value"]) for m in results["metrics"]} == {("CIDEr-D", 43.49), ("BLEU-4", 17.09)}
    for part in (
        "600 images of flickr8k and its author's own images, 3 of 5 epochs, random seed 7",
        "`lr=0.001`", "On 1,000 images of the validation split, beam 1", "| CIDEr-D | 43.5 |",
        "score / length^0.9, at most 20 words", "## Limits",
    ):  # fmt: skip
        assert part in text, part
    assert "`clip=" not in text  # a default
    (code,) = re.findall("```python\n(.*?)```", text, re.S)
    (image,) = save_images(tmp_path, 1)
    image.rename(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    (command,) = re.findall("```\nshowtell (.*)\n```", text)
    assert main(command.split()) == 0
    by_code, by_command = capsys.readouterr().out.splitlines()
    assert by_code == by_command


def test_a_card_without_metadata_says_so(model):
    pytest.importorskip("huggingface_hub")
    card = model_card(load_checkpoint(model), "me/tiny")
    assert "license: other" in card
    assert "showtell evaluate --model hub:me/tiny" in card
    assert "model-index" not in card
    assert "model_name" not in card


def test_private_repositories(hub, model, capsys, monkeypatch):
    assert main(["push", str(model), "me/secret", "--private"]) == 0
    assert hub.repos["me/secret"]["private"] is True
    assert fetch("hub:me/secret").is_file()
    hub.add("me/public")
    before = dict(hub.repos["me/public"]["commits"])
    assert "me/public exists and is public" in refused(capsys, "push", model, "me/public", "--private")
    assert hub.repos["me/public"]["commits"] == before
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "nowhere")
    for name in ("me/secret", "me/absent"):
        line = refused(capsys, "caption", __file__, "--model", f"hub:{name}")
        assert f"there is no model {name} at {hub.url}, or it is private; check the name, or log in" in line


@pytest.mark.parametrize("token", ["", "hf_reader", TOKEN])
def test_an_upload_without_permission_is_one_sentence(token, hub, model, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    line = refused(capsys, "push", model, "others/tiny" if token == TOKEN else "me/tiny")
    assert "refuses access" in line
    assert "log in with hf auth login, or set HF_TOKEN" in line
    assert not hub.repos


def test_what_cannot_be_loaded_is_one_sentence(hub, half, capsys):
    name = FILE.replace(".", "__")
    hub.add("me/gated", **{name: half})
    hub.repos["me/gated"]["gated"] = True
    hub.add("me/other", model__safetensors=half)
    hub.add("me/foreign", **{name: save({"a": zeros(1)})})
    hub.add("me/damaged", **{name: half[:1000]})
    for address, words in {
        "hub:me/none": "there is no model me/none",
        "hub:me/gated": f"accept them at {hub.url}/me/gated",
        "hub:me/other": f"me/other holds no {FILE}, so it is not a model of showtell",
        "hub:me/other@v9": "me/other has no revision v9",
        "hub:me/foreign": "no checkpoint of showtell",
        "hub:me/damaged": "damaged",
        "hub:tiny": "'tiny' is not a repository of the hub; write ORG/NAME",
        "hub:": "is not a repository of the hub",
    }.items():
        assert words in refused(capsys, "caption", __file__, "--model", address), address
    assert downloads(hub) == [FILE, FILE]  # model.safetensors of another library is left alone


def test_without_a_connection_the_cache_is_used(hub, half, capsys, monkeypatch):
    hub.add("me/tiny", **{FILE.replace(".", "__"): half})
    path = fetch("hub:me/tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert fetch("hub:me/tiny") == path
    line = refused(capsys, "caption", __file__, "--model", "hub:me/new")
    assert "the cache does not have me/new; load it once" in line
    assert hub.requests == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9" + FILES)
    assert fetch("hub:me/tiny") == path


def test_a_broken_download_continues_or_is_one_sentence(hub, half, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.add("me/tiny", **{FILE.replace(".", "__"): half})
    hub.breaks = [5000] * 99
    line = refused(capsys, "caption", __file__, "--model", "hub:me/tiny")
    assert re.search(r"the transfer of me/tiny failed \(.+\); type the same command again", line)
    hub.breaks = [1000, 2000]
    assert fetch("hub:me/tiny").read_bytes() == half


def test_models_of_the_hub_are_models_everywhere(hub, half):
    for repo in ("me/a", "me/b"):
        hub.add(repo, **{FILE.replace(".", "__"): half})
    paths = find_models("hub:me/a,hub:me/b")
    assert [path.read_bytes() for path in paths] == [half, half]
    assert is_released(paths[0])  # evaluate and calibrate write nothing beside it


def test_the_environment_names_the_hub(hub, half, tmp_path):
    hub.add("me/tiny", **{FILE.replace(".", "__"): half})
    (image,) = save_images(tmp_path / "images", 1)
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "showtell", "caption", str(image), "--model", "hub:me/tiny"]
    path = os.pathsep.join([str(Path(showtell.__file__).parent.parent), os.environ["PYTHONPATH"]])
    result = subprocess.run(command, env={**os.environ, **own, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = showtell.load(tmp_path / "half.safetensors", "cpu").caption(image)[0].text
    assert result.stdout.strip() == expected


def test_huggingface_hub_that_is_not_installed(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: fetch("hub:me/tiny"), lambda: showtell.hub.push(model, "me/tiny")):
        with pytest.raises(UserError, match=r'needs huggingface_hub; type pip install "showtell\[hub\]"'):
            call()


HUBCONF = """
import sys
sys.modules.update(dict.fromkeys(OPTIONAL))  # None makes an import fail
import torch
for name in ("showtell_attend", "showtell_classic"):
    captioner = torch.hub.load(ROOT, name, source="local", device="cpu", precision="float32")
    print(captioner.model.config["decoder"]["name"], captioner.caption(IMAGE)[0].text, sep=": ")
"""


def test_torch_hub_loads_the_released_models_from_a_checkout(tmp_path):
    root = Path(showtell.__file__).parent.parent
    (image,) = save_images(tmp_path / "images", 1)
    optional = "matplotlib jinja2 nltk skimage pycocotools jupyter shtab huggingface_hub timm".split()
    values = f"ROOT, IMAGE, OPTIONAL = {str(root)!r}, {str(image)!r}, {optional!r}\n"
    offline = str(Path(__file__).parent / "offline")  # and not the checkout
    command = [sys.executable, "-c", values + HUBCONF]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": offline}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    expected = {
        decoder: showtell.load(f"showtell-{name}", "cpu", "float32").caption(image)[0].text
        for decoder, name in (("top-down", "attend"), ("show-tell", "classic"))
    }
    assert result.stdout.splitlines() == [f"{decoder}: {text}" for decoder, text in expected.items()]
