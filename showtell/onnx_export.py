"""Export a model for ONNX Runtime: three graphs, and `model.json` with everything else that captioning needs.

    showtell export --model M --format onnx --out DIR [--int8 --calibrate FOLDER]

`encoder.onnx` maps images `(B, 3, S, S)` to features `(B, E)` or `(B, rows, columns, E)`; `start.onnx` and `step.onnx`
are those methods of the decoder, the memory of `start` before its state. B, N and the sizes of grids and, for a
transform that keeps proportions, of images are dynamic. `showtell.onnx_engine` runs them.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from showtell import __version__
from showtell.arrays import repeat_rows
from showtell.backbones import fold_batch_norm
from showtell.checkpoint import Checkpoint
from showtell.decoders import Decoder, Memory
from showtell.decoding import DecodingOptions, beam_search
from showtell.errors import UserError
from showtell.files import atomic_path, write_json
from showtell.model import CaptionModel
from showtell.onnx_engine import FORMAT, HEADER, OnnxEngine

GRAPHS = ("encoder.onnx", "start.onnx", "step.onnx")
MAX_DIFFERENCE = 1e-3  # of features and logits from those of torch, relative to the largest value
MAX_CALIBRATION = 200  # images; more change the ranges little
# The layers of convolutional networks that ONNX Runtime computes in 8 bits.
_QUANTISED = ["Conv", "Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool", "AveragePool", "Concat", "Mul", "Sigmoid"]


def export_onnx(checkpoint: Checkpoint, out: str | os.PathLike, images: Sequence[Path] = ()) -> list[str]:
    """Write a model to the folder `out` for `showtell.load`, and compare it with torch; return the report's lines.

    Args:
        checkpoint: the model.
        out: a folder, created or updated; it is usable only once all files are in it.
        images: with these, encoder and step are quantised to 8 bits per channel, calibrated on at most 200 of them.

    Raises:
        UserError: a package is missing, or the exported model computes something else than torch does.
    """
    if missing := [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]:
        given = f"the export needs {' and '.join(missing)}"
        raise UserError(f'{given}; type pip install "showtell[onnx]"')
    if Path(out).exists() and not Path(out).is_dir():
        raise UserError(f"{out} is a file; name a folder to write")
    model = copy.deepcopy(checkpoint.model).cpu().eval().requires_grad_(False)
    fold_batch_norm(model.encoder.backbone.net)
    side = checkpoint.transform.size or checkpoint.transform.resize or 224
    inputs = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    chosen = images[:: max(1, len(images) // MAX_CALIBRATION)][:MAX_CALIBRATION]
    arrays = [checkpoint.transform.to_array(path) for path in chosen]
    header = {
        "format": FORMAT, "vocabulary": checkpoint.vocab.to_dict(), "transform": checkpoint.transform.to_dict(),
        "meta": checkpoint.meta, "versions": {"showtell": __version__, "torch": str(torch.__version__)},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of tracing: no branch depends on a value here
        header["memory"] = _write_graphs(model, inputs, Path(folder), checkpoint.transform.size is None)
        write_json(Path(folder) / HEADER, header)
        header["parity"] = _compare(checkpoint.model, OnnxEngine(folder), [*inputs.numpy(), *arrays[:8]])
        sizes = "{features:.1e} of features, {logits:.1e} of logits".format(**header["parity"])
        lines = [f"largest relative difference from torch: {sizes}"]
        if arrays:
            exact = OnnxEngine(folder)
            _quantise(Path(folder), arrays)
            captions = zip(_captions(exact, arrays), _captions(OnnxEngine(folder), arrays), strict=True)
            same = sum(one == other for one, other in captions)
            header["int8"] = {"images": len(arrays), "folder": chosen[0].parent.name, "same_captions": same}
            lines.append(f"int8, calibrated on {len(arrays)} images: {same} of their captions are unchanged")
        for name in GRAPHS:
            _separate_weights(Path(folder) / name)
        (Path(out) / HEADER).unlink(missing_ok=True)
        for path in Path(folder).glob("*.onnx*"):
            with atomic_path(Path(out) / path.name) as temporary:
                shutil.copyfile(path, temporary)
        write_json(Path(out) / HEADER, header)
    return [f"{out}: {', '.join([*GRAPHS, HEADER])}", *lines]


class _Encoder(nn.Module):
    """An encoder that keeps the rows and columns of a grid."""

    def __init__(self, model: CaptionModel) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, images: Tensor) -> Tensor:
        maps = self.encoder.backbone.net(images)
        features = self.encoder.embed(self.encoder.backbone._pool(maps))
        return features.unflatten(1, maps.shape[2:]) if features.dim() == 3 else features


class _Start(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        memory, state = self.decoder.start(features)
        return *_flat(memory), *state


class _Step(nn.Module):
    def __init__(self, decoder: Decoder, memory: Memory) -> None:
        super().__init__()
        self.decoder, self.n_memory, self.single = decoder, len(_flat(memory)), isinstance(memory, Tensor)

    def forward(self, words: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        memory, state = tensors[: self.n_memory], tensors[self.n_memory :]
        logits, state, alphas = self.decoder.step(words, memory[0] if self.single else memory, state)
        return logits, *_flat(alphas), *state


def _flat(memory: Memory) -> tuple[Tensor, ...]:
    return () if memory is None else (memory,) if isinstance(memory, Tensor) else memory


def _write_graphs(model: CaptionModel, images: Tensor, folder: Path, any_size: bool) -> int:
    """Write the three graphs; return the number of tensors of the decoder's memory."""
    decoder = model.decoder
    axes = {0: "B", 2: "height", 3: "width"} if any_size else {0: "B"}
    grid = {1: "rows", 2: "columns"} if decoder.grid else {}
    _write_graph(_Encoder(model), {"images": (images, axes)}, {"features": {0: "B"} | grid}, folder / GRAPHS[0])

    features = model.encoder(images)
    memory, state = decoder.start(features)
    cells = {1: "L"} if decoder.grid else {}
    fewer = decoder.start(features[:, 1:])[0] if decoder.grid else memory  # to see which sizes depend on L
    in_memory = {
        f"memory{i}": (tensor, {0: "B"} | _differing(tensor, other, "L"))
        for i, (tensor, other) in enumerate(zip(_flat(memory), _flat(fewer), strict=True))
    }
    words = torch.zeros(3 * len(images), dtype=torch.long)  # three rows per image
    _, state, alphas = decoder.step(words, memory, repeat_rows(state, 3))  # no size of this state is 0
    later = decoder.step(words, memory, state)[1]  # to see which sizes grow
    in_state = {
        f"state{i}": (tensor, {0: "N"} | _differing(tensor, other, "t"))
        for i, (tensor, other) in enumerate(zip(state, later, strict=True))
    }
    out_memory, out_state = ({f"new_{k}": axes for k, (_, axes) in part.items()} for part in (in_memory, in_state))
    inputs = {"features": (features, {0: "B"} | cells)}
    _write_graph(_Start(decoder), inputs, out_memory | out_state, folder / GRAPHS[1])
    outputs = {"logits": {0: "N"}} | ({} if alphas is None else {"alphas": {0: "N", 1: "L"}}) | out_state
    inputs = {"words": (words, {0: "N"})} | in_memory | in_state
    _write_graph(_Step(decoder, memory), inputs, outputs, folder / GRAPHS[2])
    return len(in_memory)


def _differing(one: Tensor, other: Tensor, name: str) -> dict[int, str]:
    return {i: name for i, sizes in enumerate(zip(one.shape, other.shape, strict=True)) if len(set(sizes)) > 1}


def _write_graph(module: nn.Module, inputs: dict, outputs: dict, path: Path) -> None:
    """Trace a module; `inputs` are `name: (tensor, dynamic axes)` and `outputs` `name: dynamic axes`."""
    tensors = tuple(tensor for tensor, _ in inputs.values())
    axes = {name: own for name, (_, own) in inputs.items()} | outputs
    # The exporter with dynamo=True takes ten times as long, and refuses the transformer (torch 2.15).
    torch.onnx.export(
        module.eval(), tensors, path, dynamo=False, input_names=list(inputs), output_names=list(outputs),
        dynamic_axes=axes,
    )  # fmt: skip


def _separate_weights(path: Path) -> None:
    """Move the weights of a graph to a file beside it, which opens in two thirds of the time and memory."""
    import onnx

    graph = onnx.load(path)
    data = path.with_name(f"{path.name}.data")
    onnx.save(graph, path, save_as_external_data=True, location=data.name)


def _compare(model: CaptionModel, engine: OnnxEngine, images: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the largest differences from torch, of features and of the logits of some steps; refuse large ones."""
    largest = {"features": 0.0, "logits": 0.0}

    def compare(name: str, found: np.ndarray, expected: Tensor) -> None:
        difference = float(np.abs(found - expected.numpy()).max() / expected.abs().max())
        largest[name] = max(largest[name], difference)
        if not difference <= MAX_DIFFERENCE:
            given = f"the {name} of the exported model differ from those of torch by {difference:.1e} of the largest"
            raise UserError(f"{given}, and at most {MAX_DIFFERENCE:.0e} is allowed; use --engine torch for this model")

    draw = torch.Generator().manual_seed(0)
    for image in images:
        features = model.encoder(torch.from_numpy(image)[None])
        compare("features", engine.encode([image])[0], features)
        memory, state = model.decoder.start(features)
        state = repeat_rows(state, 3)
        onnx_memory, onnx_state = engine.decoder.start(features.numpy())
        onnx_state = repeat_rows(onnx_state, 3)
        for _ in range(4):
            words = torch.randint(len(engine.vocab), (3,), generator=draw)
            logits, state, _ = model.decoder.step(words, memory, state)
            onnx_logits, onnx_state, _ = engine.decoder.step(words.numpy(), onnx_memory, onnx_state)
            compare("logits", onnx_logits, logits)
    return largest


def _captions(engine: OnnxEngine, images: Sequence[np.ndarray]) -> list[list[int]]:
    options = DecodingOptions.of(engine.vocab)
    return [beam_search(engine.decoder, engine.encode([image])[0], options)[0][0].ids for image in images]


def _quantise(folder: Path, images: Sequence[np.ndarray]) -> None:
    """Quantise the encoder, its ranges calibrated on images, and the decoder's step, which measures its own ranges.

    The encoder's head, of whose output captions are made, stays in single precision.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"images": image[None]}

    encoder, _, step = (folder / name for name in GRAPHS)
    prepared = folder / "prepared"
    signed, unsigned = quantization.QuantType.QInt8, quantization.QuantType.QUInt8
    logging.disable(logging.WARNING)  # its advice is followed
    try:
        quant_pre_process(encoder, prepared, skip_symbolic_shape=True)
        head = [node.name for node in onnx.load(prepared).graph.node if "/embed/" in node.name]
        quantization.quantize_static(
            prepared, encoder, Images(), per_channel=True, op_types_to_quantize=_QUANTISED, nodes_to_exclude=head,
            activation_type=unsigned, weight_type=signed,  # with signed activations, it takes three times as long
        )  # fmt: skip
        quant_pre_process(step, prepared, skip_symbolic_shape=True)
        quantization.quantize_dynamic(prepared, step, per_channel=True, weight_type=signed)
    finally:
        logging.disable(logging.NOTSET)
