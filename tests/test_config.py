"""Settings from a file: TOML, YAML, JSON, run.json; which of file, flag and recipe counts; mistakes."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_captioner import save_images

from showtell import synthetic
from showtell.__main__ import COMMANDS, main
from showtell.arguments import build_parser
from showtell.config import Config, read_config
from showtell.errors import UserError
from showtell.recipes import Recipe
from showtell.run import Run

TOML = """
recipe = "demo"
dataset = "synthetic"
batch-size = 8          # as the flag, without its dashes
lr = 1
label_smoothing = 0.05
squash = true
val_images = 5
workers = 1
encoder_weights = "w.safetensors"
"""
YAML = """
recipe: demo
dataset: synthetic
batch_size: 8
lr: 1e0   # text in YAML
label_smoothing: 0.05
squash: true
val_images: 5
num_workers: 1
weights: w.safetensors
"""
EXPECTED = Config(
    "demo",
    {"batch_size": 8, "lr": 1.0, "label_smoothing": 0.05, "squash": True},
    {"dataset": "synthetic", "val_images": 5, "num_workers": 1, "weights": "w.safetensors"},
)
TINY = {
    "encoder": "tiny", "decoder": "attend", "embed_size": 8, "hidden_size": 8, "attention_size": 8, "threshold": 1,
    "resize": 20, "crop": 16, "group": "image", "batch_size": 4, "epochs": 1, "dropout": 0.3, "warmup": 2,
}  # fmt: skip


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Twelve drawn images to train on and four to validate, as the settings that name them."""
    folder = tmp_path_factory.mktemp("my")
    save_images(folder / "images", 16, size=20)
    rows = [
        f"{i:05d}.png,{sentence},{'train' if i < 12 else 'val'}"
        for i in range(16)
        for sentence in synthetic.describe(synthetic.scene(i), n=2)
    ]
    written(folder / "captions.csv", "\n".join(["image,caption,split", *rows]))
    return f'dataset = "folder"\ndata_dir = {str(folder)!r}\n'


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("showtell.train.draw_curve", lambda *_: None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("a.toml", TOML), ("a.yaml", YAML), ("a.YML", YAML)])
def test_both_formats_say_the_same(name, text, tmp_path):
    if name.lower().endswith("ml") and "y" in name.lower():
        pytest.importorskip("yaml")
    config = read_config(written(tmp_path / name, text))
    assert config == EXPECTED
    assert type(config.settings["lr"]) is float


def test_every_setting_and_every_flag_is_a_key(tmp_path):
    recipe, run = Recipe().to_dict(), {field.name: field.default for field in fields(Run)}
    defaults = recipe | run
    assert read_config(written(tmp_path / "all.json", json.dumps(defaults))) == Config(None, recipe, run)
    parser = build_parser(COMMANDS)
    (subparsers,) = [action for action in parser._actions if hasattr(action, "choices") and action.choices]
    flags = {flag[2:] for action in subparsers.choices["train"]._actions for flag in action.option_strings}
    about_the_command = {"", "help", "config", "resume", "dry-run", "set", "no-features", "recipe"}
    for flag in flags - about_the_command:
        name = {"workers": "num_workers", "encoder-weights": "weights"}.get(flag, flag.replace("-", "_"))
        read_config(written(tmp_path / "one.json", json.dumps({flag: defaults[name]})))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epohcs = 3", "a.toml has an unknown key 'epohcs'; did you mean epochs?"),
        ("learning-rate = 3", "unknown key 'learning-rate'; did you mean "),
        ('epochs = "3"', "a.toml: epochs is '3', which is not a whole number; give a whole number"),
        ("epochs = 3.5", "a.toml: epochs is 3.5, which is not a whole number"),
        ("epochs = true", "a.toml: epochs is True, which is not a whole number"),
        ("batch-size = []", r"a.toml: batch-size is \[\], which is not a whole number"),
        ('lr = "fast"', "a.toml: lr is 'fast', which is not a number; give a number"),
        ("squash = 1", "a.toml: squash is 1, which is not true or false"),
        ("data_dir = 3", "a.toml: data_dir is 3, which is not text or null"),
        ("recipe = 3", "a.toml has an unknown key 'recipe'"),
        ("workers = 1\nnum_workers = 1", "a.toml gives num_workers twice; give it once"),
        ("lr 3", "a.toml is not valid TOML: .*line 1.*; correct it"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_file_and_the_key(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_config(written(tmp_path / "a.toml", text))


def test_files_that_are_no_configurations(tmp_path, monkeypatch):
    yaml = pytest.importorskip("yaml")
    for name, text, message in (
        ("a.yaml", "- 1\n- 2", "a.yaml holds no settings; write NAME = VALUE"),
        ("a.yaml", "a: [1", "a.yaml is not valid YAML: .*; correct it"),
        ("a.json", "{", "a.json is not valid JSON"),
        ("a.ini", "a=1", "a.ini is no configuration; give a file named .toml, .yaml or .json"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(written(tmp_path / name, text))
    with pytest.raises(UserError, match=r"there is no configuration at nowhere\.toml; give a TOML, YAML or JSON file"):
        read_config("nowhere.toml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(UserError, match=r'reading .*a.yaml needs yaml; type pip install "showtell\[config\]"'):
        read_config(written(tmp_path / "a.yaml", "lr: 1"))
    assert yaml


def test_a_flag_counts_before_the_file_and_the_file_before_the_recipe(data, tmp_path, capsys):
    settings = 'recipe = "demo"\nout = "here"\nseed = 3\nepochs = 4\nbatch_size = 8\nsubset = 8\n'
    config = written(tmp_path / "a.toml", data + settings)
    assert main(["train", "--config", str(config), "--epochs", "2", "--set", "batch_size=4", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "tiny + transformer" in said  # of the recipe
    assert "8 images with" in said  # of the file
    assert "2 epochs of 2 steps on cpu; in here" in said  # of the flags
    assert main(["train", "--config", str(config), "--recipe", "nonesuch", "--dry-run"]) == 2
    assert main(["train", "--dry-run"]) == 2
    assert "add --out runs/NAME" in capsys.readouterr().err


def test_the_range_of_a_setting_in_a_file_is_checked(tmp_path, capsys):
    mistakes = {
        "seed = -1": "seed=-1 is out of range",
        "seed = 4294967296": "give a whole number from 0",
        "lr = -1": "lr=-1.0 must",
    }
    for text, words in mistakes.items():
        assert main(["train", "--config", str(written(tmp_path / "a.toml", text)), "--out", "run"]) == 2
        assert words in capsys.readouterr().err


def test_run_json_reproduces_a_run(data, tmp_path, capsys):
    lines = [f"{name} = {json.dumps(value)}" for name, value in TINY.items()]
    lines += ["subset = 8", "seed = 5", 'features = ""', "print_every = 1"]
    config = written(tmp_path / "a.toml", data + "\n".join(lines))
    assert main(["train", "--config", str(config), "--out", "runs/1"]) == 0
    assert main(["train", "--config", "runs/1/run.json", "--out", "runs/2"]) == 0
    one, two = (json.loads(Path(f"runs/{i}/run.json").read_text()) for i in (1, 2))
    assert one["recipe"] == two["recipe"] == Recipe(**TINY).to_dict()
    assert one["run"] | {"out": "runs/2"} == two["run"]
    assert (one["run"]["seed"], one["run"]["subset"], one["run"]["print_every"]) == (5, 8, 1)
    logs = [re.sub(r'"seconds": [\d.]+', "", Path(f"runs/{i}/training_log.jsonl").read_text()) for i in (1, 2)]
    assert logs[0] == logs[1]
    tensors = [load_file(f"runs/{i}/best.safetensors") for i in (1, 2)]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert main(["train", "--config", "runs/1/run.json", "--out", "runs/3", "--seed", "6"]) == 0
    assert Path("runs/3/training_log.jsonl").read_text() != Path("runs/1/training_log.jsonl").read_text()
    assert main(["train", "--config", "runs/1/run.json", "--resume"]) == 0  # with nothing left to do


def test_a_model_to_start_from_may_be_named_in_the_file(data, tmp_path, capsys):
    config = written(tmp_path / "a.toml", data + 'init = "showtell-classic"\nout = "run"')
    assert main(["train", "--config", str(config), "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "resnet50 + show-tell" in said  # inherited
    assert "are kept with their weights" in said


def test_the_example_of_the_documentation_is_read(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    config = read_config(written(tmp_path / "a.toml", example))
    assert config.recipe == "flickr8k-attend"
    assert config.settings["fine_tune"] == "layer4"
