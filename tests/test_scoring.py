"""`showtell score`: matching of images, errors, the table and the JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from showtell import java_metrics, metrics
from showtell.__main__ import main
from showtell.errors import UserError
from showtell.scoring import format_table, score_captions, score_files

ROOT = Path(__file__).resolve().parent.parent

GOLDEN = json.loads((Path(__file__).parent / "golden" / "captions.json").read_text(encoding="utf-8"))
REFERENCES = {"1": ["a dog runs", "a brown dog is running"], "2": ["a cat sleeps on a bed"], "30": ["two red buses"]}
CANDIDATES = {"1": "a dog is running", "2": "a cat on a bed", "30": "a red bus"}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def results_json(captions: dict[str, str]) -> list[dict]:
    return [{"image_id": int(image), "caption": caption} for image, caption in captions.items()]


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    return write(tmp_path / "true.json", REFERENCES), write(tmp_path / "system.json", results_json(CANDIDATES))


def test_missing_images_are_named_on_both_sides():
    candidates = {"1": "a dog", "9": "x", "8": "x", "7": "x", "6": "x"}
    with pytest.raises(UserError) as caught:
        score_captions(REFERENCES | {"6": []}, {"mine": candidates}, java=False)
    assert str(caught.value) == (
        "mine: 4 of 5 images have no references ('9', '8', '7', …) and 2 of 3 images have no candidate ('2', '30'); "
        "complete the files or score the rest with --allow-missing"
    )
    [result] = score_captions(REFERENCES, {"mine": candidates}, java=False, allow_missing=True)
    assert result.scores.ids == ["1"]
    assert result.scores.notes[0] == "Left out: 4 of 5 images have no references ('9', '8', '7', …)."
    assert result.scores.notes[1] == "Left out: 2 of 3 images have no candidate ('2', '30')."


def test_no_common_image_shows_both_ways_of_writing():
    with pytest.raises(UserError, match=r"it names 'COCO_1\.jpg', the references '1', '2', '30'; write the same"):
        score_captions(REFERENCES, {"mine": {"COCO_1.jpg": "a dog"}}, java=False, allow_missing=True)


def test_empty_candidates_score_zero_with_a_note():
    [result] = score_captions(REFERENCES, {"mine": CANDIDATES | {"2": " "}}, java=False)
    assert result.scores.per_image["CIDEr"][1] == 0
    assert result.scores.notes == ["1 candidates are empty and score 0: '2'."]


def run(capsys, *arguments: object) -> str:
    assert main(["score", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_json_is_one_document_of_the_scores(capsys, files):
    document = json.loads(run(capsys, *files, "--json", "--no-java"))
    assert list(document) == ["system.json"]
    expected = metrics.score(REFERENCES, CANDIDATES)
    got = document["system.json"]
    assert list(got)[:8] == ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE"]
    for metric in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert got[metric] == expected[metric]
        low, high = got["intervals"][metric]
        assert low <= got[metric] <= high
    assert got["METEOR"] is got["SPICE"] is None
    assert (got["n_images"], got["n_references"], got["tokenizer"]) == (3, 4, "ptb")
    assert got["health"]["distinct"] == 1
    assert got["missing"]["METEOR"] == "left out with --no-java"


def test_the_table_says_what_was_scored(capsys, files):
    out = run(capsys, *files, "--no-java")
    assert out.startswith("3 images with 4 references; tokeniser ptb; scores × 100, 95 % intervals over images\n")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert float(rows["CIDEr-D"][0]) == round(100 * metrics.score(REFERENCES, CANDIDATES)["CIDEr"], 1)
    assert rows["METEOR"] == ["-", "left", "out", "with", "--no-java"]
    out = run(capsys, *files, "--no-java", "--no-intervals")
    assert "[" not in out
    assert "interval" not in out


@pytest.fixture
def golden_files(tmp_path) -> list[Path]:
    """References, the golden candidates, and a perfect system."""
    good = {image: group[0] for image, group in GOLDEN["references"].items()}
    contents = {"true": GOLDEN["references"], "plain": GOLDEN["candidates"], "good": good}
    return [write(tmp_path / f"{name}.json", content) for name, content in contents.items()]


def test_two_systems_are_compared(capsys, golden_files):
    out = run(capsys, *golden_files, "--no-java", "--json", "--seed", 4)
    document = json.loads(out)
    paired = document["good.json"]["paired"]
    assert paired["against"] == "plain.json"
    assert "paired" not in document["plain.json"]
    cider = paired["CIDEr"]
    assert cider["difference"] == pytest.approx(document["good.json"]["CIDEr"] - document["plain.json"]["CIDEr"])
    assert 0 < cider["low"] < cider["difference"] < cider["high"]
    assert cider["p_value"] < 0.01
    assert run(capsys, *golden_files, "--no-java", "--json", "--seed", 4) == out
    table = run(capsys, *golden_files, "--no-java")
    assert "good.json minus plain.json" in table
    assert "p < 0.002" in table


def test_files_of_one_name_are_told_apart_by_their_folder(tmp_path, files):
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "system.json", results_json(CANDIDATES))
    results = score_files(files[0], [files[1], other], java=False, intervals=False)
    assert [result.name for result in results] == [str(files[1]), str(other)]
    with pytest.raises(UserError, match="is given more than once"):
        score_files(files[0], [other, other], java=False)


@pytest.mark.parametrize("tokenizer", ["ptb", "words"])
def test_training_captions_and_document_frequencies(capsys, tmp_path, files, tokenizer):
    """The frequencies are counted from any caption file, with the tokeniser of the scores."""
    training = write(tmp_path / "training.json", {"x": ["A dog is running.", "a horse"]})
    groups = [["A brown dog's bed", "a dog"], ["the dog's bus"], ["two red buses"]]
    corpus = write(tmp_path / "corpus.json", dict(enumerate(groups)))
    options = ["--json", "--no-java", "--training-captions", training, "--tokenizer", tokenizer]
    got = json.loads(run(capsys, *files, *options, "--document-frequencies", corpus))["system.json"]
    assert got["health"]["novel"] == pytest.approx(2 / 3)
    frequencies = metrics.DocumentFrequencies.build(groups, tokenizer)
    expected = metrics.score(REFERENCES, CANDIDATES, tokenizer=tokenizer, frequencies=frequencies)["CIDEr"]
    assert got["CIDEr"] == expected != metrics.score(REFERENCES, CANDIDATES, tokenizer=tokenizer)["CIDEr"]


def test_a_negative_seed_is_an_error_in_one_sentence(capsys, files):
    assert main(["score", *map(str, files), "--seed", "-5"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("showtell: argument --seed: '-5'")


def test_the_table_names_health_as_the_documentation_does(capsys, files):
    health = json.loads(run(capsys, *files, "--no-java", "--json"))["system.json"]["health"]
    shown = run(capsys, *files, "--no-java").splitlines()
    for key, value in health.items():
        if key != "captions" and value is not None:
            assert any(line.startswith(f"{metrics.HEALTH[key]}  ") for line in shown), key
    assert any(line.startswith("incomplete captions  0.0%") for line in shown)
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")  # defines them under the same names
    assert [label for label in metrics.HEALTH.values() if f"**{label}**" not in page] == []


def test_spellings_of_a_path_match(tmp_path):
    references = write(tmp_path / "true.csv", "image,caption\n./1.png,a dog\n2.png,a cat\n")
    candidates = write(
        tmp_path / "system.jsonl", '{"image": "1.png", "caption": "a dog"}\n{"image": "a/../2.png", "text": "a"}\n'
    )
    [result] = score_files(references, [candidates], java=False, intervals=False)
    assert result.scores.ids == ["1.png", "2.png"]


def test_one_image_says_why_cider_is_zero():
    [result] = score_captions({"1": REFERENCES["1"]}, {"mine": {"1": "a dog runs"}}, java=False)
    assert "CIDEr is 0 by definition" in format_table([result])


def test_without_java_the_row_says_what_to_do(monkeypatch, files):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    [result] = score_files(*[files[0], [files[1]]], spice=True)
    assert result.scores["METEOR"] is None
    assert result.scores["CIDEr"] > 0
    assert "METEOR   -" in format_table([result])
    reason = "no Java on the path; install one (on Debian: apt install default-jre-headless)"
    assert result.missing == {"METEOR": reason, "SPICE": reason}


def test_without_pycocoevalcap_the_row_says_what_to_do(monkeypatch, files):
    monkeypatch.setattr(java_metrics, "_java", lambda: "java")
    monkeypatch.setattr(java_metrics.importlib.util, "find_spec", lambda name: None)
    [result] = score_files(files[0], [files[1]])
    assert result.missing["METEOR"] == 'pycocoevalcap is not installed; pip install "showtell[java]"'


def test_a_failing_jar_leaves_the_other_scores(monkeypatch, files):
    monkeypatch.setattr(java_metrics, "missing", lambda: None)
    monkeypatch.setattr(java_metrics, "_java", lambda: "java")
    monkeypatch.setattr(java_metrics, "_package", lambda: Path("nowhere"))
    broken = subprocess.CompletedProcess([], 1, stdout="", stderr="Could not reserve enough space\n")
    monkeypatch.setattr(java_metrics.subprocess, "run", lambda *args, **options: broken)
    [result] = score_files(files[0], [files[1]])
    assert result.missing["METEOR"].startswith("METEOR's jar failed (Could not reserve enough space)")
    assert result.scores["CIDEr"] > 0


def test_spice_announces_its_download(monkeypatch, tmp_path, files):
    monkeypatch.setattr(java_metrics, "_java", lambda: "java")
    monkeypatch.setattr(java_metrics, "_package", lambda: tmp_path)  # holds neither the jars nor what fetches them
    monkeypatch.setitem(sys.modules, "pycocoevalcap.spice.get_stanford_models", None)
    announced = []
    [result] = score_files(files[0], [files[1]], spice=True, announce=announced.append)
    assert announced == ["SPICE needs Stanford CoreNLP once: fetching about 0.4 GB from nlp.stanford.edu"]
    assert "could not be fetched" in result.missing["SPICE"]


@pytest.mark.java
def test_meteor_comes_by_itself_for_every_system(capsys, golden_files):
    document = json.loads(run(capsys, *golden_files, "--json"))
    assert document["plain.json"]["METEOR"] == pytest.approx(GOLDEN["scores"]["METEOR"], abs=1e-9)
    low, high = document["plain.json"]["intervals"]["METEOR"]
    assert low < document["plain.json"]["METEOR"] < high
    assert document["good.json"]["paired"]["METEOR"]["difference"] > 0.5
    assert document["good.json"]["missing"] == {"SPICE": "ask for it with --spice"}
