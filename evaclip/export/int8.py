"""ONNX weights as 8-bit integers: a quarter of the bytes, float32 arithmetic.

Each output channel of a matrix has its own scale, its largest magnitude / 127, so no data are needed to find it and
small channels lose nothing to large ones. Activations stay float32: integers there would need calibration, and cost
more accuracy than all weights together.

    MatMul(x, W)     -> MatMul(x, DequantizeLinear(W8, scale))
    Gather(table, i) -> Gather(table8, i) as float32 * Gather(scale, i)      only the rows that are used
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Smaller tensors are biases, norms and positions: few bytes, and all of them matter.
LEAST_ELEMENTS = 1024


def to_int8(model: Any) -> None:
    """Replace the large weights of an `onnx.ModelProto`, in place."""
    from onnx import numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    axes: dict[str, set[int | None]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in weights:
                axes.setdefault(name, set()).add(_channel_axis(node, place))
    chosen: dict[str, int] = {}
    for name, found in axes.items():
        values = numpy_helper.to_array(weights[name])
        axis = found.pop() if len(found) == 1 else None
        if axis is None or values.dtype != np.float32 or values.size < LEAST_ELEMENTS:
            continue
        chosen[name] = axis
        integers, scale = quantized(values, axis)
        graph.initializer.remove(weights[name])
        graph.initializer.append(numpy_helper.from_array(integers, f"{name}.int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    nodes = _with_scales(graph.node, chosen)
    del graph.node[:]
    graph.node.extend(nodes)


def quantized(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Integers from -127 to 127, and the scale of each channel of `axis`."""
    others = tuple(other for other in range(values.ndim) if other != axis)
    largest = np.abs(values).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(values / scale).astype(np.int8), scale.reshape(-1)


def _channel_axis(node: Any, place: int) -> int | None:
    """The output channels of a weight; None where it is none."""
    if node.op_type == "MatMul" and place == 1:
        return 1
    if node.op_type == "Gemm" and place == 1:
        return 0 if any(attribute.name == "transB" and attribute.i for attribute in node.attribute) else 1
    if (node.op_type == "Conv" and place == 1) or (node.op_type == "Gather" and place == 0):
        return 0
    return None


def _with_scales(nodes: Iterable[Any], chosen: Mapping[str, int]) -> list[Any]:
    """The nodes, and those that turn integers into what the nodes expect."""
    from onnx import helper

    found: list[Any] = []
    done = set()
    for node in nodes:
        for name in [name for name in node.input if name in chosen]:
            if node.op_type == "Gather":
                found += _gathered(node, name)
                break
            if name not in done:
                found.append(
                    helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name], axis=chosen[name])
                )
                done.add(name)
        else:
            found.append(node)
    return found


def _gathered(node: Any, name: str) -> list[Any]:
    """A Gather of integers and of their scales, and the product of both."""
    from onnx import helper

    rows, result = node.input[1], node.output[0]
    column = f"{result}.last_axis"
    return [
        helper.make_node("Gather", [f"{name}.int8", rows], [f"{result}.int8"]),
        helper.make_node("Cast", [f"{result}.int8"], [f"{result}.float"], to=1),
        helper.make_node("Gather", [f"{name}.scale", rows], [f"{result}.scale"]),
        helper.make_node("Constant", [], [column], value_ints=[-1]),
        helper.make_node("Unsqueeze", [f"{result}.scale", column], [f"{result}.scales"]),
        helper.make_node("Mul", [f"{result}.float", f"{result}.scales"], [result]),
    ]
