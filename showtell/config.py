"""Training settings from a file, for `showtell train --config`: TOML, YAML or JSON, such as the `run.json` of a run."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import typing
from pathlib import Path

from showtell.errors import UserError
from showtell.files import require_regular_file
from showtell.recipes import Recipe

_FLAGS = {"workers": "num_workers", "encoder_weights": "weights"}  # whose names are not those of the settings
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}


class Config(typing.NamedTuple):
    """The settings of a file: the name of a recipe, if any, what differs from it, and those of the run."""

    recipe: str | None
    settings: dict[str, object]
    run: dict[str, object]


def read_config(path: str | os.PathLike) -> Config:
    """Read settings of `Recipe` and `Run`, or flags of `showtell train` without the dashes, and check their types.

    They may be in tables named `recipe` and `run`, as in `run.json`; otherwise, `recipe` is a name.

    Raises:
        UserError: the file cannot be parsed, or a key is unknown, given twice or of another type.
    """
    from showtell.run import Run

    path = Path(path)
    content = _parse(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings; write NAME = VALUE (TOML) or NAME: VALUE (YAML), one per line")
    name = content.get("recipe")
    tables = [content.pop(key) for key in ("recipe", "run") if isinstance(content.get(key), dict)]
    kinds = {half: typing.get_type_hints(half) for half in (Recipe, Run)}
    known = [*kinds[Recipe], *kinds[Run], *_FLAGS, "recipe"]
    found: dict[type, dict[str, object]] = {Recipe: {}, Run: {}}
    for key, value in (pair for table in (content, *tables) for pair in table.items()):
        setting = str(key).replace("-", "_")
        setting = _FLAGS.get(setting, setting)
        if setting == "recipe" and isinstance(value, str):
            continue
        half = next((half for half in kinds if setting in kinds[half]), None)
        if half is None:
            nearest = difflib.get_close_matches(str(key), known, 1, 0)[0]
            raise UserError(f"{path} has an unknown key {key!r}; did you mean {nearest}?")
        if setting in found[half]:
            raise UserError(f"{path} gives {setting} twice; give it once")
        found[half][setting] = _checked(value, kinds[half][setting], f"{path}: {key}")
    return Config(name if isinstance(name, str) else None, found[Recipe], found[Run])


def _checked(value: object, kind: type, where: str) -> object:
    accepted = typing.get_args(kind) or (kind,)
    if float in accepted and type(value) in (int, str):  # YAML reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) not in accepted:
        what = " or ".join(_KINDS[one] for one in accepted)
        raise UserError(f"{where} is {value!r}, which is not {what}; give {what}")
    return value


def _parse(path: Path) -> object:
    require_regular_file(path, "configuration", "give a TOML, YAML or JSON file, such as the run.json of a run")
    kind = path.suffix.lower()
    try:
        text = path.read_text("utf-8-sig")
        if kind == ".json":
            return json.loads(text)
        if kind == ".toml":
            try:
                import tomllib
            except ImportError:  # Python 3.10
                import tomli as tomllib
            return tomllib.loads(text)
        if kind in (".yaml", ".yml"):
            import yaml

            try:
                return yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise ValueError(error) from None
    except ImportError as error:
        raise UserError(f'reading {path} needs {error.name}; type pip install "showtell[config]"') from None
    except ValueError as error:
        raise UserError(f"{path} is not valid {kind[1:].upper()}: {' '.join(str(error).split())}; correct it") from None
    raise UserError(f"{path} is no configuration; give a file named .toml, .yaml or .json")
