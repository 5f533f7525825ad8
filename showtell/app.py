"""`showtell app`: a page in the browser that captions images, and its HTTP API; `docs/app.md` describes both."""

# No `from __future__ import annotations`: Gradio reads the annotations of functions that are defined in functions.
import html
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from showtell.app_results import EMPTY, SAMPLES, Result, alert, page, preview, sample_buttons
from showtell.captioner import Captioner, find_models, load
from showtell.decoding import require_strategy
from showtell.errors import UserError, explain, print_text
from showtell.transforms import open_image

MAX_UPLOAD_MB = 30  # of one file
MAX_IMAGES = 100  # of one request
DELETE_AFTER_S = 3600  # an upload whose page is still open, or that has no page
LIMITS = {
    "n_best": (1, 10), "beam_size": (1, 20), "temperature": (0.1, 3.0), "top_p": (0.05, 1.0), "seed": (0, 2**32 - 1),
}  # fmt: skip
CHOOSE = """element.addEventListener("click", (event) => {
  const sample = event.target.closest("button")?.dataset.sample;
  if (sample) trigger("click", { index: Number(sample) });
});"""


class Service:
    """The models, used by one request at a time, and the uploads, which belong to sessions."""

    def __init__(self, captioners: Mapping[str, Captioner], folder: Path) -> None:
        """Take captioners by name, and the folder of the uploads."""
        self.captioners, self.folder = captioners, folder.resolve()
        self._lock = threading.Lock()
        self._uploads: dict[str, set[Path]] = {}  # by session

    def caption(self, sources: Sequence[object], session: str = "", **options: object) -> Iterator[Result]:
        """Caption images one after the other: a file's bytes, or an upload by path or as Gradio's dictionary.

        `options` are a strategy and the names of `LIMITS`, as numbers or text.

        Raises:
            UserError: no image, too many, or an option that is not accepted. What is wrong with an image is in its
                result.
        """
        options = decoding_options(**options)
        if not isinstance(sources, (list, tuple)) or not 1 <= len(sources) <= MAX_IMAGES:
            raise UserError(
                f"the app captions a list of 1 to {MAX_IMAGES} images; for more, type showtell caption FOLDER"
            )
        sources = [source if isinstance(source, bytes) else self._path(source) for source in sources]
        if session:
            self._uploads.setdefault(session, set()).update(sources)
        return (self._caption(source, alphas=len(sources) == 1, **options) for source in sources)

    def _path(self, file: object) -> Path:
        path = Path(str(file.get("path") if isinstance(file, Mapping) else file)).resolve()
        if not path.is_relative_to(self.folder) and path not in SAMPLES:
            raise UserError(f"{path.name} is not an upload of this app; upload the file first")
        return path

    def _caption(self, source: bytes | Path, **options: object) -> Result:
        name = source.name if isinstance(source, Path) else "upload"
        try:
            if isinstance(source, Path):
                if not source.is_file():
                    raise UserError("the upload has been deleted meanwhile; add the image again")
                source = source.read_bytes()
            with self._lock:
                image = open_image(source)
                captions = {model: own.caption(image, **options) for model, own in self.captioners.items()}
            size = image.size
            return Result(name, captions, preview(image, 800 if options["alphas"] else 120), size)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if sentence := explain(error):
                return Result(name, error=sentence)
            raise

    def forget(self, session: str) -> None:
        """Delete the uploads of a session, except those that another one has, too."""
        own = self._uploads.pop(session, set())
        for path in own.difference(SAMPLES, *self._uploads.values()):
            path.unlink(missing_ok=True)


def decoding_options(strategy: str = "beam", **given: object) -> dict[str, Any]:
    """Return options of `Captioner.decode`, from numbers or text; a name or value out of `LIMITS` is a `UserError`."""
    options: dict[str, Any] = {}
    for name, value in given.items():
        if name not in LIMITS:
            raise UserError(f"there is no option {name}; give strategy, {', '.join(LIMITS)}")
        low, high = LIMITS[name]
        kind = type(low)
        try:
            options[name] = kind(value)
        except (TypeError, ValueError, OverflowError):
            options[name] = None
        if options[name] is None or not low <= options[name] <= high:
            raise UserError(f"{name}={value!r} is not accepted; give a number from {low} to {high}")
    require_strategy(strategy, options.get("n_best", 1))
    return {"strategy": strategy, **options}


def build(captioners: Mapping[str, Captioner], folder: Path) -> Any:
    """Return the ASGI application, the page and the API; `folder` is that of Gradio's uploads."""
    import fastapi
    import gradio as gr
    from gradio import processing_utils

    service = Service(captioners, folder)
    gr.set_static_paths(SAMPLES)  # served from where they are, not copied

    async def refuse(url: str, cache_dir: str) -> str:
        raise gr.Error("this app opens no link; upload the image", print_exception=False)

    processing_utils.async_ssrf_protected_download = refuse  # a request may name a link, which Gradio would open

    def show(request: gr.Request, images: list | None, *values: object) -> Iterator[str]:
        results: list[Result] = []
        try:
            options = dict(zip(("strategy", *LIMITS), values, strict=True))
            paths = [path for path, _ in images or ()]
            for result in service.caption(paths, request.session_hash or "", **options) if paths else ():
                results.append(result)
                if len(results) in (1, len(paths)) or len(results) % 10 == 0:
                    yield page(results, captioners, len(paths))
            if not paths:
                yield EMPTY
        except UserError as error:
            yield alert(str(error))

    def caption(
        images: list, n_best: int = 1, strategy: str = "beam", beam_size: int = 5, temperature: float = 1.0,
        top_p: float = 1.0, seed: int = 0,
    ) -> list:  # fmt: skip
        """Caption uploads; return a row per image and model, with its captions, best first, or what is wrong."""
        options = {"n_best": n_best, "beam_size": beam_size, "temperature": temperature, "top_p": top_p, "seed": seed}
        try:
            return [row for result in service.caption(images, strategy=strategy, **options) for row in result.rows()]
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def chosen(event: gr.EventData) -> list[str]:
        return [str(SAMPLES[event.index])]

    def forget(request: gr.Request) -> None:
        service.forget(request.session_hash or "")

    def shown(strategy: str) -> list[dict]:
        return [gr.update(visible=strategy == "beam"), gr.update(visible=strategy == "sample")]

    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="showtell", analytics_enabled=False, delete_cache=(60, DELETE_AFTER_S)) as demo:
        gr.HTML(f'<div class="st"><h1>showtell</h1><p>Captions by {html.escape(" and ".join(captioners))}</p></div>')
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                images = gr.Gallery(
                    label="Images", sources=["upload", "clipboard", "webcam"], file_types=["file"], interactive=True,
                    columns=3, fit_columns=False, object_fit="cover", buttons=[], elem_id="st-images",
                )  # fmt: skip
                samples = gr.HTML(sample_buttons(), js_on_load=CHOOSE, apply_default_css=False)
                with gr.Accordion("Options", open=False):
                    n_best = gr.Slider(*LIMITS["n_best"], value=1, step=1, label="Captions per image")
                    choices = [("Beam search", "beam"), ("Sampling", "sample")]
                    strategy = gr.Radio(choices, value="beam", label="Strategy")
                    beam_size = gr.Slider(*LIMITS["beam_size"], value=5, step=1, label="Beam size")
                    with gr.Column(visible=False) as sampled:
                        temperature = gr.Slider(*LIMITS["temperature"], value=1, step=0.1, label="Temperature")
                        top_p = gr.Slider(*LIMITS["top_p"], value=1, step=0.05, label="Top-p")
                        seed = gr.Number(0, precision=0, label="Random seed")
                button = gr.Button("Caption", variant="primary")
            with gr.Column(scale=3, min_width=300):
                output = gr.HTML(EMPTY, apply_default_css=False)
        strategy.change(shown, strategy, [beam_size, sampled], **quiet)
        inputs = [images, strategy, n_best, beam_size, temperature, top_p, seed]
        gr.on([images.change, button.click], show, inputs, output, trigger_mode="always_last", api_visibility="private")
        # `then`, as the gallery does not report its first change if it comes from here.
        samples.click(chosen, None, images, **quiet).then(show, inputs, output, api_visibility="private")
        demo.unload(forget)
        gr.api(caption, api_name="caption")

    app = fastapi.FastAPI(openapi_url=None)

    @app.post("/caption")
    async def post(request: fastapi.Request) -> fastapi.responses.JSONResponse:
        """Caption the image in the body, with options from the query: for `curl`."""
        data, limit = bytearray(), MAX_UPLOAD_MB * 2**20
        async for chunk in request.stream():
            data += chunk
            if len(data) > limit:
                answer = {"error": f"the image has more than {MAX_UPLOAD_MB} MB; make a smaller copy first"}
                return fastapi.responses.JSONResponse(answer, 413)
        try:
            results = service.caption([bytes(data)], **request.query_params)
            (result,) = await fastapi.concurrency.run_in_threadpool(list, results)
            return fastapi.responses.JSONResponse(result.rows(), 400 if result.error else 200)
        except UserError as error:
            return fastapi.responses.JSONResponse({"error": str(error)}, 400)

    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    shades = {"button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700"}
    theme.set(**shades, **{f"{name}_dark": shade for name, shade in shades.items()})
    demo.has_launched = True  # otherwise Gradio does not check that a file is an upload: this is not `demo.launch`
    return gr.mount_gradio_app(
        app, demo, "/", max_file_size=f"{MAX_UPLOAD_MB}mb", theme=theme, footer_links=[], run_history=False,
        enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
        head=resources.files("showtell").joinpath("app.html").read_text("utf-8"),
    )  # fmt: skip


def serve(model: str | None = None, compare: str | None = None, host: str = "127.0.0.1", port: int = 7860) -> int:
    """Serve the page until Ctrl-C; `compare` is a second model, and port 0 any free port.

    Raises:
        UserError: Gradio is not installed, or the address cannot be used.
    """
    if find_spec("gradio") is None:
        raise UserError('showtell app needs Gradio; type pip install "showtell[app]"')
    with _listen(host, port) as line, tempfile.TemporaryDirectory(prefix="showtell-app-") as folder:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is deleted
        captioners = {_name(given): load(given, engine="auto") for given in ([model, compare] if compare else [model])}
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        import uvicorn

        app = build(captioners, Path(folder))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        host = f"[{host}]" if ":" in host else host
        print_text(f"showtell app: http://{host}:{line.getsockname()[1]} (Ctrl-C stops it)")
        server.run(sockets=[line])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OverflowError:
        raise UserError(f"port {port} does not exist; give one from 1024 to 65535") from None
    except OSError as error:
        problem = f"cannot listen on {host}, port {port}: {error.strerror or error}"
        raise UserError(f"{problem}; choose another with --port or --host, or stop the program that uses it") from None


def _name(model: str | None) -> str:
    return Path(model or find_models()[0]).name.removesuffix(".safetensors")
