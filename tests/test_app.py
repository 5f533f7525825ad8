"""The page and the API of `showtell app`: a server of its own, used by a browser, by clients and by curl."""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image
from test_captioner import lively_checkpoint, save_images

from showtell import app_results
from showtell.__main__ import main
from showtell.app import LIMITS, MAX_IMAGES, MAX_UPLOAD_MB, decoding_options
from showtell.app_results import SAMPLES, Result, alt_attribute, csv_text, page
from showtell.captioner import Caption, load
from showtell.errors import UserError
from showtell.transforms import IMAGENET, SQUASHED, Transform

pytest.importorskip("gradio")
ROOT = Path(__file__).resolve().parent.parent
WIDTHS = (1280, 820, 390)


class Server:
    """`showtell app` in a process of its own, with its temporary files in `folder`; no other machine can be reached."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder = folder
        folder.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "showtell", "app", "--port", "0", *map(str, arguments)],
            cwd=ROOT, env=os.environ | {"TMPDIR": str(folder)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        line = self.process.stdout.readline()
        found = re.search(r"http://[\d.]+:\d+", line)
        assert found, line + self.process.communicate()[1]
        self.url = found[0]

    def uploads(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def stop(self, number: int) -> tuple[int, str]:
        """Return the exit code, and what was written to standard error."""
        self.process.send_signal(number)
        errors = self.process.communicate(timeout=120)[1]
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: lively_checkpoint(folder / f"{name}.safetensors", name) for name in ("attend", "show-tell")}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    return save_images(tmp_path_factory.mktemp("images"), 9, size=64)


@pytest.fixture(scope="module")
def captioner(models):
    return load(models["attend"], "cpu")


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "t"
    server = Server(folder, "--model", models["attend"], "--compare", models["show-tell"])
    yield server
    code, errors = server.stop(signal.SIGTERM)
    assert code == 0
    assert list(folder.iterdir()) == []
    tracebacks = errors.split("Traceback")[1:]  # Gradio prints one where a request names a file that is no upload
    assert [text for text in tracebacks if "InvalidPathError" not in text] == []


def post(server: Server, data: bytes, query: str = "") -> tuple[int, list | dict]:
    try:
        with urlopen(Request(f"{server.url}/caption?{query}", data, method="POST"), timeout=60) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def open_page(browser, server):
    """Open the page; check that nothing was requested elsewhere, and that no error was logged."""
    requests, problems, contexts = [], [], []

    def opened(**options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(server.url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []
    assert requests
    assert [url for url in requests if not url.startswith((f"{server.url}/", "data:", "blob:"))] == []


def upload(page, *files: Path) -> None:
    field = page.locator("#st-images input[type=file]").first
    field.wait_for(state="attached")
    field.set_input_files([str(file) for file in files])


def darkness(page) -> list[int] | None:
    """The opacity of the cells of the map over the image; None if there is no map."""
    return page.evaluate("""() => {
        const canvas = document.querySelector(".st-image canvas");
        if (canvas.hidden) return null;
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        return [...data].filter((_, i) => i % 4 === 3);
    }""")


def test_upload_caption_click_a_word_and_see_the_map(open_page, images, captioner):
    """The map is dark where the model did not look; a model without attention gets a sentence."""
    page = open_page()
    upload(page, images[0])
    first = page.locator("section").nth(0).locator(".st-word")
    first.first.wait_for()
    (caption,) = captioner.caption(Image.open(images[0]), alphas=True)
    assert first.locator("span").all_inner_texts() == [piece.strip() for piece in caption.pieces]
    assert first.locator("small").all_inner_texts() == [f"{100 * p:.0f} %" for p in caption.word_probs]
    assert page.locator("h3").all_inner_texts() == ["Examples", "attend", "show-tell"]
    assert darkness(page) is None
    for i in (0, 1):
        first.nth(i).click()
        expected = 0.7 * 255 * (1 - np.asarray(caption.alphas[i]) / float(caption.alphas[i].max()))
        assert darkness(page) == pytest.approx(expected.flatten().tolist(), abs=2)
        assert page.locator(".st-word[aria-pressed=true]").count() == 1
    assert "where the model looked" in page.locator("figcaption").inner_text()
    image, canvas = (page.locator(f".st-image {name}").bounding_box() for name in ("img", "canvas"))
    assert canvas == pytest.approx(image, abs=1)
    first.nth(1).click()
    assert darkness(page) is None
    page.locator("section").nth(1).locator(".st-word").first.click()
    assert darkness(page) is None
    assert "no attention map" in page.locator("figcaption").inner_text()


def test_everything_is_reached_and_used_by_keyboard(open_page):
    from playwright.sync_api import TimeoutError

    page = open_page()
    page.locator("[data-sample]").first.wait_for()
    page.locator("#st-images button").first.wait_for()
    seen = []

    def tab_to(selector: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent.trim()"))
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"Tab does not reach {selector}: {seen}")

    tab_to("[data-sample]")
    for _ in range(5):  # the script of the examples may start later than they appear
        page.keyboard.press("Enter")
        with contextlib.suppress(TimeoutError):
            page.locator(".st-word").first.wait_for(timeout=6000)
            break
    tab_to(".st-word")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    page.keyboard.press("Enter")
    assert outline == "solid"
    assert darkness(page)
    tab_to("[data-copy]")
    assert "Caption" in seen
    assert any("upload" in name.lower() for name in seen)


def test_a_bad_file_gets_a_sentence(open_page, tmp_path):
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7")
    page = open_page()
    upload(page, tmp_path / "paper.pdf")
    text = page.locator(".st-error").inner_text()
    assert text.startswith("The image cannot be read: it is a PDF; give a JPEG, PNG")


def test_several_images_give_a_table_and_csv(open_page, images, tmp_path, captioner):
    """With bad files among them, and a name that is HTML."""
    odd = tmp_path / "<b>1&.png"
    odd.write_bytes(images[1].read_bytes())
    (tmp_path / "notes.jpg").write_bytes(b"these are notes")
    (tmp_path / "empty.png").touch()
    page = open_page(viewport={"width": 390, "height": 800})
    upload(page, images[0], odd, tmp_path / "notes.jpg", tmp_path / "empty.png")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download csv").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text("utf-8"))))
    assert [row["model"] for row in rows] == ["attend", "show-tell"] * 2
    assert rows[0]["image"] == images[0].name
    assert rows[2]["caption"] == captioner.caption(images[1])[0].text
    cells = page.locator(".st tbody tr").all_inner_texts()
    for cell, text in zip(cells, [rows[0]["caption"], rows[2]["caption"], "it holds text", "it is empty"], strict=True):
        assert text in cell
    assert page.locator(".st b").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_options_change_the_captions(open_page, images, captioner):
    from playwright.sync_api import TimeoutError

    expected = [caption.text for caption in captioner.caption(Image.open(images[0]), "sample", n_best=3, seed=7)]
    page = open_page()
    upload(page, images[0])
    page.locator(".st-word").first.wait_for()
    page.get_by_role("button", name="Options").click()
    copies = page.locator("section").nth(0).locator("li:has(.st-words) [data-copy]")
    for _ in range(5):  # a field that has just appeared may lose what is typed
        page.get_by_role("radio", name="Sampling").click()
        page.get_by_label("number input for Captions per image").fill("3")
        page.get_by_label("Random seed").fill("7")
        page.get_by_label("Random seed").press("Tab")
        page.get_by_role("button", name="Caption", exact=True).click()
        with contextlib.suppress(TimeoutError):
            copies.nth(5).wait_for(timeout=5000)
            texts = copies.evaluate_all("buttons => buttons.map((button) => button.dataset.copy)")
            if texts[::2] == expected:
                break
    assert texts[::2] == expected
    assert texts[1::2] == [alt_attribute(text) for text in expected]


@pytest.mark.slow
def test_copying_needs_no_https(open_page, images):
    """The clipboard of a page without https is not available to scripts; the button works all the same."""
    page = open_page()
    page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.evaluate("document.addEventListener('copy', () => { window.copied = String(document.activeElement.value); })")
    upload(page, images[0])
    button = page.locator("[data-copy]").first
    text = button.get_attribute("data-copy")
    button.click()
    page.get_by_text("Copied").wait_for()
    assert page.evaluate("window.copied") == text


def luminance(rgb: list[float]) -> float:
    """The relative luminance of WCAG 2."""
    linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


PAINT = """element => {  // text and background as they are painted, from back to front
    const context = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    const read = (colors) => {
        for (const color of colors) { context.fillStyle = color; context.fillRect(0, 0, 1, 1); }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const behind = [];
    for (let node = element; node; node = node.parentElement) behind.unshift(getComputedStyle(node).backgroundColor);
    return [read([...behind, getComputedStyle(element).color]), read(behind)];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_is_that_of_wcag_aa_and_no_width_scrolls_sideways(open_page, images, tmp_path, scheme):
    """4.5 to 1 at least, for words of every probability; screenshots are left in the temporary folder, to be seen."""
    page = open_page(color_scheme=scheme)
    page.locator(".st-note").wait_for()
    upload(page, images[0])
    page.locator(".st-word").first.click()
    assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
    parts = {name: page.locator(name).first for name in ("figcaption", ".st-facts", ".st-copy", "h3", "button.primary")}
    for p in (0, 0.25, 0.5, 0.75, 1):
        page.locator(".st-word").first.evaluate("(word, p) => word.style.setProperty('--p', p)", p)
        for name, part in {**parts, "word": page.locator(".st-word small").first}.items():
            light, dark = sorted(map(luminance, part.evaluate(PAINT)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, p)


@pytest.mark.slow
def test_the_page_loads_without_a_network(open_page, server, images):
    """Requests to any other address fail here, and the page's own policy forbids them."""
    page = open_page()
    page.context.route("**/*", lambda route: route.continue_() if server.url in route.request.url else route.abort())
    page.reload()
    upload(page, images[0])
    page.locator(".st-word").first.wait_for()
    assert "default-src 'self'" in page.locator("meta[http-equiv]").first.get_attribute("content")
    fonts = page.evaluate("[...document.fonts].filter((font) => font.status === 'loaded').length")
    assert fonts == 0


def test_uploads_are_deleted_with_their_session(open_page, server, images):
    page = open_page()
    upload(page, images[8])
    page.locator(".st-word").first.wait_for()
    assert any(path.name == images[8].name for path in server.uploads())
    page.context.close()
    deadline = time.monotonic() + 15
    while any(path.name == images[8].name for path in server.uploads()):
        assert time.monotonic() < deadline, "the upload is still there"
        time.sleep(0.1)


def test_users_at_the_same_time_get_their_own_captions(server, images, captioner):
    """Half of them over HTTP, half with Gradio's client."""
    from gradio_client import Client, handle_file

    def ask(i: int) -> list:
        if i % 2:
            return post(server, images[i].read_bytes())[1]
        client = Client(server.url, verbose=False, download_files=False, analytics_enabled=False)
        return client.predict([handle_file(str(images[i]))], api_name="/caption")

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    expected = [captions[0].text for _, captions in captioner.caption_files(images[:8])]
    assert len(set(expected)) > 3
    assert [rows[0]["captions"][0]["text"] for rows in answers] == expected
    assert [row["model"] for row in answers[0]] == ["attend", "show-tell"]


def test_the_api_answers_mistakes_with_a_sentence(server, images):
    image = images[0].read_bytes()
    assert post(server, b"text")[0] == 400
    assert "it holds text" in post(server, b"text")[1][0]["error"]
    for query, sentence in [
        ("n_best=99", "n_best='99' is not accepted; give a number from 1 to 10"),
        ("temperature=nan", "temperature='nan' is not accepted; give a number from 0.1 to 3.0"),
        ("colour=red", "there is no option colour; give strategy, n_best"),
        ("strategy=guess", "there is no decoding strategy 'guess'"),
    ]:
        status, answer = post(server, image, query)
        assert (status, answer["error"][: len(sentence)]) == (400, sentence)
    status, answer = post(server, bytes(MAX_UPLOAD_MB * 2**20 + 1))
    assert (status, answer["error"]) == (413, "the image has more than 30 MB; make a smaller copy first")
    rows = post(server, image, "n_best=2&strategy=sample&seed=3")[1]
    assert [len(row["captions"]) for row in rows] == [2, 2]


def test_a_request_names_neither_other_files_nor_links(server, images):
    def run(images: object) -> str:
        data = json.dumps({"data": [images, 1, "beam", 5, 1, 1, 0]}).encode()
        request = Request(f"{server.url}/gradio_api/run/caption", data, {"Content-Type": "application/json"})
        with pytest.raises(HTTPError) as refused:
            urlopen(request, timeout=30)
        return json.load(refused.value)["error"]

    file = {"meta": {"_type": "gradio.FileData"}}
    assert "is not an upload" in run([str(images[0])])
    assert run([file | {"path": str(images[0])}])
    assert run([file | {"path": "http://127.0.0.1:9/x.jpg"}]) == "this app opens no link; upload the image"
    assert f"1 to {MAX_IMAGES} images" in run([])
    boundary = b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.jpg"\r\n\r\n%b\r\n--b--\r\n'
    large = boundary % bytes(MAX_UPLOAD_MB * 10**6 + 2**21)
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    with pytest.raises(HTTPError, match="413"):
        urlopen(Request(f"{server.url}/gradio_api/upload", large, kind), timeout=30)


def documented(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", (ROOT / "docs" / "app.md").read_text("utf-8"), re.DOTALL)[1]


def test_the_documented_curl_line_runs(server, tmp_path, images, captioner):
    if not shutil.which("curl"):
        pytest.skip("no curl on the path")
    shutil.copy(images[0], tmp_path / "photo.jpg")
    (line,) = re.findall("(?m)^curl .*", documented("sh"))
    result = subprocess.run(
        line.replace("http://127.0.0.1:7860", server.url), shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert len(json.loads(result.stdout)[0]["captions"]) == 3


def test_the_documented_python_lines_run(server, tmp_path, images, captioner, monkeypatch, capsys):
    shutil.copy(images[0], tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(documented("python").replace("http://127.0.0.1:7860", server.url), {})
    assert captioner.caption(images[0])[0].text in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_ends_it_and_nothing_is_left(models, tmp_path):
    server = Server(tmp_path / "t", "--model", models["attend"])
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="../../x.png"\r\n\r\ndata\r\n--b--\r\n'
    urlopen(Request(f"{server.url}/gradio_api/upload", body, kind), timeout=30).close()
    assert [path.name for path in server.uploads()] == ["x.png"]
    assert server.stop(signal.SIGINT) == (130, "showtell: stopped\n")
    assert list(server.folder.iterdir()) == []


def test_a_port_that_is_taken_and_other_wrong_addresses_are_one_sentence(models, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["app", "--model", str(models["attend"]), "--port", port]) == 2
    assert f"showtell: cannot listen on 127.0.0.1, port {port}: " in capsys.readouterr().err
    assert main(["app", "--port", "70000"]) == 2
    assert capsys.readouterr().err == "showtell: port 70000 does not exist; give one from 1024 to 65535\n"
    assert main(["app", "--host", "192.0.2.1", "--port", "0"]) == 2
    assert "cannot listen on 192.0.2.1" in capsys.readouterr().err


def test_without_gradio_a_sentence_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app"]) == 2
    assert capsys.readouterr().err == 'showtell: showtell app needs Gradio; type pip install "showtell[app]"\n'


def test_the_app_runs_without_torch(models, images, tmp_path):
    """With an exported model: the page of the container has no torch."""
    pytest.importorskip("onnxruntime")
    from showtell.checkpoint import load_checkpoint
    from showtell.onnx_export import export_onnx

    export_onnx(load_checkpoint(models["attend"]), tmp_path / "onnx")
    code = f"""
import sys
for name in "torch torchvision matplotlib nltk skimage pycocotools shtab safetensors".split():  # not in the container
    sys.modules[name] = None
from pathlib import Path
from showtell.app import Service
from showtell.captioner import load
service = Service({{"m": load({str(tmp_path / "onnx")!r}, engine="auto")}}, Path("."))
(result,) = service.caption([Path({str(images[0])!r}).read_bytes()])
from showtell.app_results import page
print("data-map" in page([result], service.captioners, 1), result.rows()[0]["captions"][0]["text"])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    expected = load(tmp_path / "onnx").caption(images[0])[0].text
    assert (result.stdout, result.stderr) == (f"True {expected}\n", "")


@pytest.mark.parametrize(
    ("transform", "size", "region"),
    [
        (SQUASHED, (400, 100), {"left": 0, "width": 100, "top": 0, "height": 100}),
        (IMAGENET, (256, 256), {"left": 6.25, "width": 87.5, "top": 6.25, "height": 87.5}),
        (IMAGENET, (512, 256), {"left": 28.12, "width": 43.75, "top": 6.25, "height": 87.5}),
        (Transform(resize=None), (400, 100), {"left": 0, "width": 100, "top": 0, "height": 100}),
    ],
)
def test_the_map_lies_where_the_network_saw_the_image(transform, size, region):
    found = dict(part.split(":") for part in app_results._region(transform, *size).rstrip(";").split(";"))
    assert {name: float(value.rstrip("%")) for name, value in found.items()} == pytest.approx(region, abs=0.01)


def test_texts_are_escaped_and_names_are_no_formulas():
    text = '<script>"&'
    words = Caption(text, -0.5, [text], [0.25], np.full((1, 2, 2), 0.25), 0.875)
    result = Result("=1+2.png", {text: [words]}, "data:,", (10, 10))

    class Stub:
        transform = SQUASHED

    for results in ([result], [result, result]):
        shown = page(results, {text: Stub()}, len(results))
        assert "<script>" not in shown
        assert "confidence 88 %" in shown
        assert html.escape(text) in shown
    assert alt_attribute(text) == 'alt="&lt;script&gt;&quot;&amp;"'
    assert csv_text([result]).splitlines()[1].startswith("'=1+2.png,")


def test_options_are_checked():
    assert decoding_options() == {"strategy": "beam"}
    assert decoding_options("sample", n_best="3", top_p=1, seed=0.0) == {
        "strategy": "sample", "n_best": 3, "top_p": 1.0, "seed": 0,
    }  # fmt: skip
    for name, (low, high) in LIMITS.items():
        for value in (low - 1, high + 1, "x", None, [1], float("nan"), float("inf")):
            with pytest.raises(UserError, match=f"{name}=.* is not accepted; give a number from"):
                decoding_options(**{name: value})


def test_there_are_examples():
    assert [path.stem for path in SAMPLES] == ["dahlia", "pagoda", "raccoon", "stairs"]
