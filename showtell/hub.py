"""Models on the Hugging Face Hub: load one by `hub:org/name`, and push one with its model card.

A repository holds `showtell.safetensors`, a checkpoint in half precision, and `README.md`, the card. Downloads are kept
in the cache of huggingface_hub, whose variables `HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` apply.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from showtell import __version__
from showtell.errors import MissingFileError, UserError
from showtell.files import write_text

if TYPE_CHECKING:
    from showtell.checkpoint import Checkpoint

PREFIX = "hub:"
FILE = "showtell.safetensors"  # not model.safetensors: models of other libraries are then never downloaded
_CLIENT = {"library_name": "showtell", "library_version": __version__}  # for its statistics
_LOGIN = "log in with hf auth login, or set HF_TOKEN"


def fetch(address: str) -> Path:
    """Return the path of the checkpoint at `hub:org/name` or `hub:org/name@revision`, downloaded unless in the cache.

    A revision is a branch, a tag or the hash of a commit, which never changes. Without a connection, the file in the
    cache is used.

    Raises:
        MissingFileError: there is no such repository, it is private, or it has no checkpoint or no such revision.
        UserError: huggingface_hub is not installed, the download broke off, or the file is not a checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    repo, _, revision = address.removeprefix(PREFIX).partition("@")
    _require_repo(repo)
    with _explained(repo, revision) as library:
        path = Path(library.hf_hub_download(repo, FILE, revision=revision or None, **_CLIENT))
    try:
        with safe_open(path, framework="numpy") as file:
            known = "showtell" in (file.metadata() or {})
    except SafetensorError:
        known = False
    if not known:
        raise UserError(f"{FILE} of {address} is damaged or no checkpoint of showtell; delete {path}, and try again")
    return path


def push(model: Path, repo: str, private: bool = False, revision: str = "", license: str = "") -> str:
    """Upload a checkpoint in half precision, with its model card, in one commit; return its address, `hub:…@hash`.

    Args:
        model: the checkpoint.
        repo: `org/name`; it is created if it does not exist.
        private: whether the repository must be private.
        revision: the branch to commit to, created if it does not exist; the main branch by default.
        license: an identifier of the hub, for the card; see `model_card`.

    Raises:
        UserError: `model` is not a checkpoint, or the server refuses the upload.
    """
    from showtell.checkpoint import load_checkpoint, save_checkpoint

    _require_repo(repo)
    checkpoint = load_checkpoint(model)
    with TemporaryDirectory() as folder, _explained(repo, revision) as library:
        path = Path(folder) / FILE
        save_checkpoint(path, checkpoint.model, checkpoint.vocab, checkpoint.transform, checkpoint.meta, half=True)
        write_text(path.with_name("README.md"), model_card(checkpoint, repo, license))
        hub = library.HfApi(**_CLIENT)
        hub.create_repo(repo, private=private or None, exist_ok=True)
        if private and not hub.model_info(repo).private:
            raise UserError(f"{repo} exists and is public; make it private in its settings, or leave --private out")
        if revision:
            hub.create_branch(repo, branch=revision, exist_ok=True)
        message = f"Upload a captioner with showtell {__version__}"
        commit = hub.upload_folder(repo_id=repo, folder_path=folder, revision=revision or None, commit_message=message)
    return f"{PREFIX}{repo}@{commit.oid}"


def _require_repo(repo: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo!r} is not a repository of the hub; write ORG/NAME, or ORG/NAME@REVISION to load it")


@contextlib.contextmanager
def _explained(repo: str, revision: str) -> Iterator:
    """Yield the module `huggingface_hub`, and turn its errors into one sentence each."""
    try:
        import huggingface_hub as library
        from huggingface_hub import constants, errors
    except ImportError:
        raise UserError(f'{PREFIX}{repo} needs huggingface_hub; type pip install "showtell[hub]"') from None
    server = constants.ENDPOINT
    try:
        yield library
    except UserError:
        raise
    except errors.GatedRepoError:
        given = f"{repo} can be downloaded after its terms have been accepted"
        raise UserError(f"{given}; accept them at {server}/{repo}, and {_LOGIN}") from None
    except errors.RepositoryNotFoundError:
        given = f"there is no model {repo} at {server}, or it is private"
        raise MissingFileError(f"{given}; check the name, or {_LOGIN}") from None
    except errors.RevisionNotFoundError:
        raise MissingFileError(f"{repo} has no revision {revision}; choose one at {server}/{repo}") from None
    except errors.LocalEntryNotFoundError:
        given = f"{server} cannot be reached, or HF_HUB_OFFLINE is set, and the cache does not have {repo}"
        raise MissingFileError(f"{given}; load it once with a connection") from None
    except errors.EntryNotFoundError:
        given = f"{repo} holds no {FILE}, so it is not a model of showtell"
        raise MissingFileError(f"{given}; name one that showtell push uploaded") from None
    except Exception as error:  # no or a broken connection, no token, …: the library raises many kinds
        if getattr(error, "errno", None):  # of the disk
            raise
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            given = f"{server} refuses access to {repo} (HTTP status {status})"
            raise UserError(f"{given}; {_LOGIN}, with a token that has the permission") from None
        lines = str(error).split("\n")
        reason = next(filter(None, map(str.strip, lines)), type(error).__name__).rstrip(".")
        raise UserError(f"the transfer of {repo} failed ({reason:.200}); type the same command again") from None


def model_card(checkpoint: Checkpoint, repo: str, license: str = "") -> str:
    """Return the README.md of a repository: metadata for the hub, and for people what the checkpoint's metadata tell.

    Without a `license`, it is `other`: that of the training data.
    """
    from huggingface_hub import EvalResult, ModelCardData

    from showtell.decoders import find_decoder
    from showtell.metrics import labels
    from showtell.recipes import Recipe

    meta, config, transform = checkpoint.meta, checkpoint.model.config, checkpoint.transform
    recipe, run, record = (
        value if isinstance(value := meta.get(name), dict) else {} for name in ("recipe", "run", "validation")
    )
    encoder, decoder = config["encoder"], config["decoder"]
    named = [name for name in str(run.get("dataset", "")).split(",") if name]
    trained_on = " and ".join("its author's own images" if name == "folder" else name for name in named)
    trained_on = trained_on or "data that the checkpoint does not name"
    scores = {name: value for name, value in record.get("scores", {}).items() if name in labels()}
    task = {"task_type": "image-to-text", "dataset_type": ",".join(named), "dataset_name": trained_on}
    results = [
        EvalResult(
            **task, dataset_split="validation", metric_type=name.split("_")[0].lower(), metric_name=labels()[name],
            metric_value=round(100 * value, 2),
        )
        for name, value in scores.items()
    ]  # fmt: skip
    front = ModelCardData(
        license=license or "other",
        library_name="showtell",
        pipeline_tag="image-to-text",
        tags=["image-captioning", "showtell", decoder["name"], encoder["backbone"]],
        datasets=[name for name in named if name != "folder"] or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=repo.partition("/")[2] if results else None,
        eval_results=results or None,
    )
    about = re.sub(r"^Decoder \d+[,:] ", "", (find_decoder(decoder["name"]).__doc__ or "").split("\n")[0].rstrip("."))
    parameters = sum(p.numel() for p in checkpoint.model.parameters())
    rows = {
        "encoder": f"{encoder['backbone']}, {'a grid of features' if checkpoint.model.decoder.grid else 'one vector'}",
        "decoder": f"`{decoder['name']}`: {about}",
        "settings": ", ".join(f"{name} {value}" for name, value in decoder.items() if name != "name"),
        "parameters": f"{parameters:,}; matrices and kernels are stored in half precision",
        "vocabulary": f"{len(checkpoint.vocab):,} words, tokeniser {checkpoint.vocab.tokenizer}",
        "image": f"shorter side {transform.resize} pixels, centre crop {transform.crop}"
        if transform.crop
        else f"resized to {transform.resize} pixels",
    }
    defaults = f"beam search with 5 hypotheses, score / length^{recipe.get('length_penalty', 0.7)}, at most "
    defaults += f"{recipe.get('max_len', 25)} words"
    if "confidence" in meta:
        defaults += "; captions have a calibrated confidence"
    images = f"{run['subset']:,} images" if run.get("subset") else "The training split"
    changed = {name: value for name, value in recipe.items() if value != getattr(Recipe, name, None)}
    training = f"{images} of {trained_on}, {meta.get('epoch', '?')} of {recipe.get('epochs', '?')} epochs, random seed "
    training += f"{run.get('seed', '?')}. Settings that differ from showtell's defaults: "
    training += ", ".join(f"`{name}={value}`" for name, value in changed.items()) or "none"
    if scores:
        n_images = record.get("captions", {}).get("captions")
        number = f"{n_images:,} images of the validation split" if n_images else "images of the validation split"
        scoring = f"On {number}, beam {recipe.get('beam_size', '?')}, × 100:\n\n| metric | score |\n|---|--:|\n"
        scoring += "".join(f"| {labels()[name]} | {100 * value:.1f} |\n" for name, value in scores.items())
    else:
        scoring = f"The checkpoint has no scores; `showtell evaluate --model {PREFIX}{repo}` computes them.\n"
    return f"""---
{front.to_yaml()}
---

# {repo.partition("/")[2]}

An image captioner of showtell {__version__}, trained on {trained_on}. This page was generated from the checkpoint.

```python
import showtell
captioner = showtell.load("{PREFIX}{repo}")  # pip install "showtell[hub]"
print(captioner.caption("photo.jpg")[0].text)
```

```
showtell caption photo.jpg --model {PREFIX}{repo}
```

## Architecture

| | |
|---|---|
{"".join(f"| {name} | {value} |{chr(10)}" for name, value in rows.items())}
Decoding by default: {defaults}.

## Training

{training}. If training started from another model, the data of that model are not recorded here.

## Scores

{scoring}
## Limits

The model was trained on {trained_on}, and describes anything else with the nearest words of its vocabulary, wrongly and
without a warning. Use it for teaching, comparisons and further training; not where somebody depends on a caption being
right. The terms of the training data apply to its use.
"""
