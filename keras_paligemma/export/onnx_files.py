"""A model's forward pass as ONNX, and from there as OpenVINO's files."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from keras_paligemma.export.forward import INPUTS
from keras_paligemma.export.forward import response_logits
from keras_paligemma.export.forward import shapes_and_dtypes

ENTRY = "model.onnx"
OPENVINO_ENTRY = "model.xml"
# An ONNX file is a protobuf message, which is limited to 2 GiB.
MOST_BYTES = 1_900_000_000


def write(model, folder):
    """Write `model.onnx`; weights above 1.9 GB go into `model.onnx.data`.

    Args:
        model: `PaliGemmaCausalLM` of the Torch backend, with a preprocessor.
        folder: path of an empty folder.
    """
    import torch

    class Forward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = model.backbone

        def forward(self, *inputs):
            named = dict(zip(INPUTS, inputs, strict=True))
            return response_logits(model, named)

    # Two rows: with one, the exporter would make the batch size a constant.
    arrays = tuple(
        torch.zeros((2, *shape), dtype=getattr(torch, dtype.name))
        for shape, dtype in shapes_and_dtypes(model).values()
    )
    with torch.no_grad():
        program: Any = torch.onnx.export(
            Forward().eval(),
            arrays,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=(tuple({0: "batch"} for _ in arrays),),
            verbose=False,
        )
    # Stack traces of the nodes are a tenth of a small file.
    for node in program.model.graph:
        node.metadata_props.clear()
    weights = sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.backbone.parameters()
    )
    program.save(folder / ENTRY, external_data=weights > MOST_BYTES)


def write_openvino(model, folder):
    """Write the forward pass as `model.xml` and `model.bin`, through ONNX.

    Args:
        model: as `write` takes it.
        folder: path of an empty folder.
    """
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        write(model, Path(draft))
        convert_to_openvino(Path(draft) / ENTRY, folder)


def convert_to_openvino(path, folder):
    """Convert a file of `write` to OpenVINO, without compressing to float16."""
    # Importing OpenVINO sends telemetry, unless this package is missing.
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)
    import openvino

    model = openvino.Core().read_model(path)
    # The reader gives each input a second name: that of the node it feeds.
    for port, name in zip(model.inputs, INPUTS, strict=True):
        port.get_tensor().set_names({name})
    openvino.save_model(model, folder / OPENVINO_ENTRY, compress_to_fp16=False)
