"""`showtell score`: the files it reads, the mistakes it names, the table and the document it prints."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import pytest

from showtell import java_metrics, metrics, scoring
from showtell.errors import MissingFileError, UserError
from showtell.scoring import format_table, read_candidates, read_captions, score_captions, score_files

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


# ---- reading ----


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a dog", "id": 7},
                                                           {"image_id": 2, "caption": "one, two"},
                                                           {"image_id": 1, "caption": "the dog"}]}),
        ("a.json", [{"image_id": 1, "caption": "a dog"}, {"image_id": "1", "caption": "the dog"},
                    {"image_id": 2, "caption": "one, two"}]),
        ("a.json", {"1": ["a dog", "the dog"], "2": "one, two"}),
        ("a.csv", 'image,caption\n1,a dog\n1,the dog\n2,"one, two"\n'),
        ("a.csv", '\ufeffid;x,caption,image_id\nz,a dog,1\nz,the dog,1\nz,"one, two",2\n'),
        ("a.csv", '1,a dog\r\n1,the dog\r\n\r\n2,"one, two"\r\n'),
        ("a.tsv", "1\ta dog\n1\tthe dog\n2\tone, two\n"),
        ("a.txt", "file_name\tcaption\n1\ta dog\n1\tthe dog\n2\tone, two\n"),
    ],
)  # fmt: skip
def test_every_form_gives_the_same_captions(tmp_path, name, content):
    assert read_captions(write(tmp_path / name, content)) == {"1": ["a dog", "the dog"], "2": ["one, two"]}


def test_ids_stay_as_they_are_written(tmp_path):
    ids = ["139", "COCO_val2014_000000000139.jpg", "000139"]
    assert list(read_captions(write(tmp_path / "a.json", {image: ["x"] for image in ids}))) == ids


def test_a_caption_of_ten_thousand_words_and_stray_quotation_marks(tmp_path):
    long = "word " * 100_000
    assert read_captions(write(tmp_path / "a.csv", f'image,caption\n1,"{long}"\n')) == {"1": [long]}
    assert read_captions(write(tmp_path / "a.tsv", '1\tsays "no\n2\ta\n')) == {"1": ['says "no'], "2": ["a"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is not json"),
        ("a.json", "3", "holds a json int; give COCO annotation json"),
        ("a.json", [], "holds no captions; give COCO annotation json"),
        ("a.json", [{"image_id": 1}], "entry 1 of .* has no image_id and caption"),
        ("a.json", [{"image_id": 1, "caption": None}], "image 1 of .* has the caption null; write captions as text"),
        ("a.json", [{"image_id": 1.5, "caption": "a"}], "names an image 1.5; write image ids as numbers or text"),
        ("a.json", [{"image_id": True, "caption": "a"}], "names an image True"),
        ("a.json", {"1": ["a", 5]}, "image 1 of .* has the caption 5"),
        ("a.json", {"1": {"caption": "a"}}, "holds an object under '1'"),
        ("a.csv", "image,caption\n1,a dog, and a cat\n", "line 2 of .* has 3 columns, not 2"),
        ("a.csv", 'image,caption\n1,"a dog\n', "line 2 of .* is no csv row"),
        ("a.csv", "", "holds no captions"),
    ],
)
def test_a_bad_file_is_named_with_the_place(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_captions(write(tmp_path / name, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingFileError, match=r"there is no file .*none\.json"):
        read_captions(tmp_path / "none.json")
    (tmp_path / "latin.csv").write_bytes("image,caption\n1,café\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_captions(tmp_path / "latin.csv")


def test_one_caption_an_image(tmp_path):
    twice = write(tmp_path / "a.json", [{"image_id": 1, "caption": "a dog"}] * 2)
    assert read_candidates(twice) == {"1": "a dog"}
    with pytest.raises(UserError, match="has 2 captions for image 1; give each image exactly one"):
        read_candidates(write(tmp_path / "b.json", {"1": ["a dog", "a cat"]}))
    with pytest.raises(UserError, match="has 0 captions for image 1"):
        read_candidates(write(tmp_path / "c.json", {"1": []}))


# ---- matching ----


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
    assert result.scores.notes[0].startswith("4 candidates without references were left out")
    assert result.scores.notes[1].startswith("2 images with references have no candidate")


def test_no_common_image_shows_both_ways_of_writing():
    with pytest.raises(UserError, match=r"it names 'COCO_1\.jpg', the references '1', '2', '30'; write the same"):
        score_captions(REFERENCES, {"mine": {"COCO_1.jpg": "a dog"}}, java=False, allow_missing=True)


def test_empty_candidates_score_nothing_and_are_said():
    [result] = score_captions(REFERENCES, {"mine": CANDIDATES | {"2": " "}}, java=False)
    assert result.scores.per_image["CIDEr"][1] == 0
    assert result.scores.notes == ["1 candidates are empty and score 0: '2'."]


# ---- the whole command ----


def run(capsys, *arguments: object) -> tuple[list[scoring.Result], str]:
    parser = argparse.ArgumentParser()
    scoring.add_arguments(parser)
    results = scoring.run(parser.parse_args([str(argument) for argument in arguments]))
    return results, capsys.readouterr().out


def test_json_is_one_document_of_the_scores(capsys, files):
    results, out = run(capsys, *files, "--json", "--no-java")
    document = json.loads(out)
    assert [result.name for result in results] == ["system.json"]
    assert list(document) == ["system.json"]
    expected = metrics.score(REFERENCES, CANDIDATES)
    got = document["system.json"]
    assert list(got)[:8] == list(metrics.METRICS)
    for metric in ("Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert got[metric] == expected[metric]
        low, high = got["intervals"][metric]
        assert low <= got[metric] <= high
    assert got["METEOR"] is None
    assert got["SPICE"] is None
    assert got["n_images"] == 3
    assert got["n_references"] == 4
    assert got["tokenizer"] == "ptb"
    assert got["health"]["distinct"] == 1
    assert got["missing"]["METEOR"] == "left out with --no-java"


def test_the_table_says_what_was_scored(capsys, files):
    _, out = run(capsys, *files, "--no-java")
    assert out.startswith("3 images with 4 references; tokeniser ptb; scores × 100, 95 % intervals over images\n")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert float(rows["CIDEr-D"][0]) == round(100 * metrics.score(REFERENCES, CANDIDATES)["CIDEr"], 1)
    assert rows["METEOR"] == ["-", "left", "out", "with", "--no-java"]
    _, out = run(capsys, *files, "--no-java", "--no-intervals")
    assert "[" not in out
    assert "interval" not in out


def test_two_systems_are_compared(capsys, tmp_path):
    references = write(tmp_path / "true.json", GOLDEN["references"])
    good = write(tmp_path / "good.json", {image: group[0] for image, group in GOLDEN["references"].items()})
    plain = write(tmp_path / "plain.json", GOLDEN["candidates"])
    _, out = run(capsys, references, plain, good, "--no-java", "--json", "--seed", 4)
    document = json.loads(out)
    paired = document["good.json"]["paired"]
    assert paired["against"] == "plain.json"
    assert "paired" not in document["plain.json"]
    cider = paired["CIDEr"]
    assert cider["difference"] == pytest.approx(document["good.json"]["CIDEr"] - document["plain.json"]["CIDEr"])
    assert 0 < cider["low"] < cider["difference"] < cider["high"]
    assert cider["p_value"] < 0.01
    assert run(capsys, references, plain, good, "--no-java", "--json", "--seed", 4)[1] == out
    _, table = run(capsys, references, plain, good, "--no-java")
    assert "good.json minus plain.json" in table
    assert "p < 0.002" in table


def test_files_of_one_name_are_told_apart_by_their_folder(tmp_path, files):
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "system.json", results_json(CANDIDATES))
    results = score_files(files[0], [files[1], other], java=False, intervals=False)
    assert [result.name for result in results] == [str(files[1]), str(other)]
    with pytest.raises(UserError, match="is given more than once"):
        score_files(files[0], [other, other], java=False)


def test_training_captions_and_a_frequency_table(capsys, tmp_path, files):
    training = write(tmp_path / "training.json", {"x": ["A dog is running.", "a horse"]})
    table = tmp_path / "table.json.gz"
    metrics.DocumentFrequencies.build(GOLDEN["references"].values()).save(table)
    options = ("--json", "--no-java", "--training-captions", training, "--document-frequencies", table)
    got = json.loads(run(capsys, *files, *options)[1])["system.json"]
    assert got["health"]["novel"] == pytest.approx(2 / 3)
    assert got["CIDEr"] != metrics.score(REFERENCES, CANDIDATES)["CIDEr"]


def test_one_image_says_why_cider_is_zero():
    [result] = score_captions({"1": REFERENCES["1"]}, {"mine": {"1": "a dog runs"}}, java=False)
    assert "CIDEr is 0 by its definition" in format_table([result])


# ---- Java, there or not ----


def test_without_java_the_row_says_what_to_do(monkeypatch, files):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    [result] = score_files(*[files[0], [files[1]]], spice=True)
    assert result.scores["METEOR"] is None
    assert result.scores["CIDEr"] > 0
    assert "METEOR   -" in format_table([result])
    assert result.missing["METEOR"] == (
        "no Java on the path; install one (on Debian: apt install default-jre-headless)"
    )
    assert result.missing["SPICE"] == result.missing["METEOR"]


def test_without_pycocoevalcap_the_row_says_what_to_do(monkeypatch, files):
    monkeypatch.setattr(java_metrics, "_java", lambda: "java")
    monkeypatch.setattr(java_metrics.importlib.util, "find_spec", lambda name: None)
    [result] = score_files(files[0], [files[1]])
    assert result.missing["METEOR"] == 'pycocoevalcap is not installed; pip install "showtell[java]"'


def test_a_failing_jar_is_no_failure_of_the_rest(monkeypatch, files):
    monkeypatch.setattr(java_metrics, "missing", lambda: None)
    monkeypatch.setattr(java_metrics, "_java", lambda: "java")
    monkeypatch.setattr(java_metrics, "_package", lambda: Path("nowhere"))
    broken = subprocess.CompletedProcess([], 1, stdout="", stderr="Could not reserve enough space\n")
    monkeypatch.setattr(java_metrics.subprocess, "run", lambda *args, **options: broken)
    [result] = score_files(files[0], [files[1]])
    assert result.missing["METEOR"].startswith("METEOR's jar failed (Could not reserve enough space)")
    assert result.scores["CIDEr"] > 0


def test_spice_says_before_it_fetches(monkeypatch, tmp_path, files):
    monkeypatch.setattr(java_metrics, "_java", lambda: "java")
    monkeypatch.setattr(java_metrics, "_package", lambda: tmp_path)  # holds neither the jars nor what fetches them
    monkeypatch.setitem(__import__("sys").modules, "pycocoevalcap.spice.get_stanford_models", None)
    said = []
    [result] = score_files(files[0], [files[1]], spice=True, announce=said.append)
    assert said == ["SPICE needs Stanford CoreNLP once: fetching about 0.4 GB from nlp.stanford.edu"]
    assert "could not be fetched" in result.missing["SPICE"]


@pytest.mark.java
def test_meteor_comes_by_itself_for_every_system(capsys, tmp_path):
    references = write(tmp_path / "true.json", GOLDEN["references"])
    plain = write(tmp_path / "plain.json", GOLDEN["candidates"])
    good = write(tmp_path / "good.json", {image: group[0] for image, group in GOLDEN["references"].items()})
    document = json.loads(run(capsys, references, plain, good, "--json")[1])
    assert document["plain.json"]["METEOR"] == pytest.approx(GOLDEN["scores"]["METEOR"], abs=1e-9)
    low, high = document["plain.json"]["intervals"]["METEOR"]
    assert low < document["plain.json"]["METEOR"] < high
    assert document["good.json"]["paired"]["METEOR"]["difference"] > 0.5
    assert document["good.json"]["missing"] == {"SPICE": "ask for it with --spice"}


def test_the_file_of_2500_coco_images_scores_in_seconds(capsys, shared_data, tmp_path):
    import gzip

    path = shared_data.parent / "reference" / "metrics" / "coco_val2017_a.json.gz"
    if not path.is_file():
        pytest.skip(f"no {path.name} beside the data")
    golden = json.loads(gzip.decompress(path.read_bytes()))
    rows = [{"image_id": int(i), "caption": c} for i, group in golden["references"].items() for c in group]
    references = write(tmp_path / "captions_val2017.json", {"images": [], "annotations": rows})
    candidates = write(tmp_path / "results.json", results_json(golden["candidates"]))
    got = json.loads(run(capsys, references, candidates, "--json", "--no-java")[1])["results.json"]
    for metric in ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"):
        assert got[metric] == pytest.approx(golden["scores"][metric], abs=1e-9)
