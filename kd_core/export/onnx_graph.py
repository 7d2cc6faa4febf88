"""The student as an ONNX graph: ids and mask in, logits out, without a cache of keys and values.

Axes: B rows, T positions, V vocabulary columns; B and T are free in the graph.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd_core.errors import KDError
from kd_core.export.packages import hushed
from kd_core.export.parity import Bound, Forward

__all__ = ["ONNX_BOUND", "ONNX_FILE", "ONNX_PACKAGES", "onnx_forward", "write_onnx"]

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_FILE = "onnx/model.onnx"  # its weights lie beside it, as a graph file alone may not pass 2 GB
ONNX_BOUND = Bound(mean_kl=1e-5, max_kl=1e-3)

_EXAMPLE = (2, 8)  # rows, positions: any but 1, which the exporter would take for a constant


class _Logits(nn.Module):
    """A causal model whose one output is its logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits_BTV


def write_onnx(model: PreTrainedModel, directory: Path) -> None:
    """Write onnx/model.onnx and onnx/model.onnx.data below a directory.

    Raises:
        KDError: the exporter cannot trace this architecture.
    """
    ids_BT = torch.zeros(_EXAMPLE, dtype=torch.int64)
    mask_BT = torch.ones(_EXAMPLE, dtype=torch.int64)
    mask_BT[0, -2:] = 0
    free = {0: "rows", 1: "positions"}
    file = directory / ONNX_FILE
    file.parent.mkdir()
    try:
        with hushed():
            program = torch.onnx.export(
                _Logits(model).eval(),
                (ids_BT, mask_BT),
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(free, free),
                verbose=False,
            )
            assert program is not None, "the exporter returns a program when it is given no file"
            _forget_traces(program.model)
            program.save(file, external_data=True)
    except Exception as error:  # the exporter's own tree of errors, and whatever the tracer meets
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise KDError(f"--onnx: torch cannot export this student: {reason}; export it without --onnx") from error


def _forget_traces(graph_model: Any) -> None:
    """Drop what the exporter notes of source lines and paths: a graph says what it computes, not on whose machine it was traced."""
    graphs = [graph_model.graph, *(function.graph for function in graph_model.functions.values())]
    for graph in graphs:
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        graph.metadata_props.clear()
    graph_model.metadata_props.clear()


def onnx_forward(directory: Path) -> Forward:
    """The written graph as onnxruntime runs it on the CPU."""
    with hushed():
        import onnxruntime

        session = onnxruntime.InferenceSession(str(directory / ONNX_FILE), providers=["CPUExecutionProvider"])

    def forward(ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input_ids": ids_BT.numpy(), "attention_mask": attention_BT.numpy()})[0])

    return forward
