"""ONNX by torch's exporter, and its check: the file is read back and run by onnxruntime."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from isomorphic import progress
from isomorphic.errors import UserError, first_line
from isomorphic.exporting.answers import Answer, Difference, difference
from isomorphic.exporting.capture import capture, flat_outputs, output_names, quiet, stack_line
from isomorphic.inputs import Inputs, tensors_in

REQUIRED = ("onnx", "onnxscript", "onnxruntime")
OLDEST_OPSET = 18  # what torch's exporter is written in; it cannot go further back for most models
MOST_BYTES = 1_500_000_000  # of one file: beyond, torch puts the weights into a second one


def check_libraries(opset: int | None) -> None:
    """Finds out early whether ONNX can be written here.

    Raises:
        UserError: a library is missing, or the opset does not exist.
    """
    for name in REQUIRED:
        _required(name)
    newest = _required("onnx").defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise UserError(f"there is no opset {opset} to write: choose one of {OLDEST_OPSET} to {newest}")


def check_model(model: nn.Module, dtype: torch.dtype) -> None:
    """Finds out early whether a model can be written in the precision `dtype`.

    Raises:
        UserError: it is too large for one file, or in bfloat16.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > MOST_BYTES:
        raise UserError(f"{size / 1e9:.1f} GB of weights are more than one ONNX file holds: export a .pt2, or in half")
    if dtype == torch.bfloat16:
        raise UserError("onnxruntime does not run bfloat16 on a CPU: export model.float(), or in half (--half)")


def write_onnx(
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    *,
    any_batch: bool,
    outputs: Iterable[str],
    opset: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes a model and returns its opset.

    Args:
        model, inputs, any_batch: as for `capture`.
        path: the file.
        outputs: places of the tensors that the model returns.
        opset: of the file; None is torch's own choice.
        metadata: JSON values that the file holds beside the model, by name.

    Raises:
        UserError: torch cannot capture the model, or has no ONNX for one of its operators, or not in this opset.
    """
    program = capture(model, inputs, any_batch=any_batch, outputs=flat_outputs)
    taken = [str(name) for name in program.graph_signature.user_inputs]
    names = output_names(outputs, taken)
    progress.stage("translating it to ONNX")
    try:
        # Where the exporter takes attention apart, it has seen the result of a kernel that lies in memory otherwise
        # than its parts' does, and takes a view where it has to copy: with the plain kernel, both lie alike.
        with quiet(), sdpa_kernel(SDPBackend.MATH):
            written = torch.onnx.export(program, output_names=names, opset_version=opset, verbose=False)
    except Exception as error:  # the exporter's own errors are of all kinds
        raise UserError(_explain(error, program)) from error
    assert written is not None
    found = written.model.opset_imports[""]
    if opset not in (None, found):
        raise UserError(f"torch cannot write this model in opset {opset}, only in {found}: leave out the opset")
    written.rename_axes({str(symbol): "batch" for symbol in program.range_constraints} if any_batch else {})
    written.model.metadata_props.update({key: json.dumps(value) for key, value in (metadata or {}).items()})
    with quiet():
        written.save(path, external_data=False)
    return found


def check_onnx(path: Path, answers: Iterable[Answer]) -> Difference:
    """Reads a file back, runs it, and returns the largest difference to what the original answers.

    Raises:
        UserError: onnxruntime does not take the file or the batches, or returns something else.
    """
    session = open_session(path)
    found = Difference()
    for answer in answers:
        run = runner(session, answer.inputs)
        try:
            outputs = [torch.from_numpy(output) for output in run()]
        except Exception as error:  # onnxruntime's errors have no common parent
            raise UserError(f"onnxruntime fails on a batch of {answer.size}: {first_line(error)}") from error
        found = max(found, difference(answer, outputs), key=lambda d: d.value)
    return found


def open_session(path: Path) -> Any:
    """Returns onnxruntime's session of a file, on the CPU and with as many threads as torch takes.

    Raises:
        UserError: onnxruntime does not take it.
    """
    runtime = _required("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common parent
        raise UserError(f"onnxruntime does not take what torch has written: {first_line(error)}") from error


def runner(session: Any, inputs: Inputs) -> Callable[[], list[Any]]:
    """Returns a function that runs a session on the tensors of some inputs."""
    names = [given.name for given in session.get_inputs()]
    tensors: list[Tensor] = tensors_in(inputs)
    if len(names) != len(tensors):
        raise UserError(f"the written graph takes {len(names)} tensors, {', '.join(names)}, not {len(tensors)}")
    feed = {name: tensor.numpy(force=True) for name, tensor in zip(names, tensors, strict=True)}
    return lambda: session.run(None, feed)


def _required(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name} is not installed, and ONNX needs it: pip install {' '.join(REQUIRED)}") from error


def _explain(error: Exception, program: ExportedProgram) -> str:
    """Says in one line which operator torch has no ONNX for, where the model's code calls it, and what to do."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", texts[-1])
    node = re.search(r"translating node %?(\w+)", "\n".join(texts))
    where = _line_of(node.group(1), program) if node else ""
    reason = (texts[-1].strip() or type(error).__name__).splitlines()[0]
    what = f"the operator {operator.group(1)}" if operator else f"the model ({reason})"
    return (
        f"torch has no ONNX for {what}{where and f' at {where}'}; rewrite that line with other operators, or export "
        "a .pt2, which holds any of torch's"
    )


def _line_of(node: str, program: ExportedProgram) -> str:
    """Returns the line of the model's code that a node of the graph comes from, before or after decomposition."""
    with quiet():
        graphs = (program.graph, program.run_decompositions().graph)
    stacks = (found.stack_trace for graph in graphs for found in graph.nodes if found.name == node)
    return next((line for stack in stacks if stack and (line := stack_line(stack))), "")
