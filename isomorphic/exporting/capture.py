"""A model's graph as torch.export captures it, for every batch size; or one sentence that says why there is none.

What a captured model returns is plain: ONNX knows a row of tensors, and a .pt2 file that held somebody's classes could
not be read without them.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import re
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from isomorphic import progress
from isomorphic.code_lines import is_users_code, name_line
from isomorphic.errors import UserError, first_line
from isomorphic.exporting.answers import batch_length, make_batch
from isomorphic.inputs import Inputs, arguments, call, map_tensors, no_fast_path, tensors_in

_STANDARD_LIBRARY = f"{sysconfig.get_paths()['stdlib']}/"
_SHAPES_LOG = "torch.fx.experimental.symbolic_shapes"
Outputs = Callable[[Any, Any], Any]


def capture(model: nn.Module, inputs: Inputs, *, any_batch: bool, outputs: Outputs) -> ExportedProgram:
    """Returns the graph of a model.

    Args:
        model: in eval mode, on the CPU; may be changed by what its forward code does.
        inputs: what it takes.
        any_batch: dim 0 of the first tensor, and of those as long, may be of any length; else all sizes are fixed.
        outputs: (inputs, outputs) -> what the graph returns; see `flat_outputs` and `plain_outputs`.

    Raises:
        UserError: torch.export cannot capture it; the message names the line and what to do.
    """
    progress.stage("capturing the graph")
    failure = None
    for way in ("as it is", "forgetting", "strict"):
        if way == "forgetting" and not _forget_batches(model, inputs):
            continue
        try:
            return _export(model, inputs, any_batch, outputs, strict=way == "strict")
        except Exception as error:  # whatever the model's own code and torch's tracing raise
            failure = error if failure is None or way != "strict" else failure
        if not (any_batch and _fixes_batch(failure)):
            break
    assert failure is not None
    bound = re.search(r"Dim\('batch', max=(\d+)\)", str(failure))
    if any_batch and _fixes_batch(failure) and bound:
        raise UserError(
            f"the model's code takes another way for batches of more than {bound[1]}, and a graph holds one: let it "
            "take the same for any, or export it for one size, fixed_batch=True (--fixed-batch 1)"
        ) from failure
    if any_batch and _fixes_batch(failure):
        where = _line_that_fixes_the_batch(model, inputs, outputs)
        raise UserError(
            f"the model's code fixes the batch to the size that it is captured with{where and f' at {where}'}: "
            "let it take any, or export it for one size, fixed_batch=True (--fixed-batch 1)"
        ) from failure
    raise UserError(_explain(failure)) from failure


def _export(
    model: nn.Module, inputs: Inputs, any_batch: bool, outputs: Outputs, *, strict: bool = False, logs: bool = False
) -> ExportedProgram:
    """Captures a model once. Strictly, torch reads its bytecode, and follows the free size through `len(x)`."""
    example = map_tensors(make_batch(inputs, 2) if any_batch else inputs, torch.clone)  # one object would be one input
    shapes = _free_sizes(inputs, example) if any_batch else None
    hook = model.register_forward_hook(lambda _, args, kwargs, out: outputs((args, kwargs), out), with_kwargs=True)
    positional, keyword = arguments(example)
    try:
        with quiet(logs=logs), torch.no_grad(), no_fast_path():
            return torch.export.export(model, positional, keyword, dynamic_shapes=shapes, strict=strict)
    finally:
        hook.remove()


def _free_sizes(inputs: Inputs, example: Inputs) -> ShapesCollection:
    """Returns which dims of the example are free: where `inputs` have their batch.

    The example has two items: torch takes the sizes 0 and 1 for constants.
    """
    shapes, length, batch = ShapesCollection(), batch_length(inputs), Dim("batch", min=1)
    for given, tensor in zip(tensors_in(inputs), tensors_in(example), strict=True):
        if given.dim() and len(given) == length:
            shapes[tensor] = {0: batch}
    return shapes


def flat_outputs(inputs: Any, outputs: Any) -> tuple[Tensor, ...]:
    """Returns the tensors of a model's outputs, each a tensor of its own: ONNX gives a value one name."""
    taken = {id(tensor) for tensor in tensors_in(inputs)}
    flat = []
    for tensor in tensors_in(outputs):
        flat.append(tensor.clone() if id(tensor) in taken else tensor)
        taken.add(id(tensor))
    return tuple(flat)


def plain_outputs(inputs: Any, outputs: Any) -> Any:
    """Returns a model's outputs in tuples, lists and dicts: other mappings and objects become dicts."""
    if isinstance(outputs, (Tensor, bool, int, float, str)):
        return outputs
    if isinstance(outputs, Mapping):
        return {str(key): plain_outputs(inputs, value) for key, value in outputs.items()}
    if hasattr(outputs, "_asdict"):
        return plain_outputs(inputs, outputs._asdict())
    if isinstance(outputs, (tuple, list)):
        items = [plain_outputs(inputs, value) for value in outputs]
        return tuple(items) if isinstance(outputs, tuple) else items
    if tensors_in(outputs):
        return plain_outputs(inputs, vars(outputs))
    return None


def output_names(outputs: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Returns names for the outputs of a graph, from their places in what the model returns.

    "output" -> "output"    "output[0]" -> "output_0"    "output['logits']" -> "logits"
    """
    names: list[str] = []
    for place in outputs:
        inner = place.removeprefix("output") if re.match(r"output(\['|\.)", place) else place
        name = re.sub(r"\W+", "_", inner).strip("_") or "output"
        while name in names or name in taken:
            name += "_out"
        names.append(name)
    return names


@contextlib.contextmanager
def quiet(*, logs: bool = False) -> Iterator[None]:
    """Inside, nothing is warned about, printed or, unless `logs`, logged: exporters tell about every step of theirs."""
    disabled = logging.root.manager.disable
    logging.disable(disabled if logs else logging.CRITICAL)
    try:
        nowhere = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def stack_line(stack: str) -> str:
    """Returns the innermost line of the model's code in the text of a stack trace; "" where there is none."""
    found = re.findall(r'File "([^"]+)", line (\d+)', stack)
    return _innermost((path, int(number)) for path, number in found)


def _innermost(frames: Iterable[tuple[str, int]]) -> str:
    """Returns the last line that a model's authors have written, with its code: "net.py:8, `if x.sum() > 0:`"."""
    own = [frame for frame in frames if _is_model_code(frame[0])]
    if not own:
        return ""
    path, number = own[-1]
    return f"{name_line(path, number)}, `{linecache.getline(path, number).strip():.120}`"


def _is_model_code(path: str) -> bool:
    in_library = path.startswith(_STANDARD_LIBRARY) and "-packages/" not in path
    return is_users_code(path) and not path.startswith("<") and not in_library


def _fixes_batch(error: Exception) -> bool:
    return "onstraints violated" in str(error)


def _explain(error: Exception) -> str:
    """Says in one line where torch.export stops, why, and what to do."""
    where = _forward_line_of(error)
    if type(error).__name__.startswith("GuardOnDataDependent"):
        why = "it decides by numbers that are only known when the model runs"
        advice = "rewrite that line (torch.where, torch.cond), or export the part of the model before it"
    else:
        why = first_line(error)
        advice = "rewrite that line, or export a part of the model without it"
    return f"torch.export cannot capture the model{where and f' at {where}'}: {why}; {advice}"


def _forward_line_of(error: Exception) -> str:
    """Returns the innermost line of the model's code that an exception went through."""
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    entered = [index for index, (path, _) in enumerate(frames) if path == __file__]
    return _innermost(frames[entered[-1] :] if entered else frames)


def _forget_batches(model: nn.Module, inputs: Inputs) -> bool:
    """Lets modules forget what they remember of the last batch, in place; returns False if there is nothing.

    A detector that keeps its anchors, and makes them anew when `self.shape` differs from the shape at hand, compares
    the free size with a number, which fixes it. Such attributes depend on the batch size, and are set on the instance
    in place of the class's own; without them, modules are as before their first batch.
    """
    found = False
    small, large = (_attributes_after(model, make_batch(inputs, size)) for size in (1, 2))
    for (module, name), value in small.items():
        if hasattr(type(module), name) and not _same(value, large.get((module, name))):
            delattr(module, name)
            found = True
    return found


def _attributes_after(model: nn.Module, inputs: Inputs) -> dict[tuple[nn.Module, str], Any]:
    """Returns the plain attributes of all modules after they have run."""
    with torch.no_grad():
        call(model, inputs)
    named = ((module, name, value) for module in model.modules() for name, value in vars(module).items())
    return {(module, name): value for module, name, value in named if not name.startswith("_")}


def _same(value: Any, other: Any) -> bool:
    if value is other or type(value) is not type(other):
        return value is other
    if isinstance(value, Tensor):
        return torch.equal(value, other)
    with contextlib.suppress(RuntimeError, ValueError):  # of lists of tensors or arrays
        return bool(value == other)
    return True


class _Listener(logging.Handler):
    """Notes which line of a model's code runs when torch first replaces a size by a number, or last asks about one."""

    replaced, asked = "", ""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if self.replaced or not (message.startswith("set_replacement") or "[guard added]" in message):
            return
        frames = []
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not _export.__code__:
            frames.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        self.asked = _innermost(reversed(frames)) or self.asked
        if message.startswith("set_replacement"):
            self.replaced = self.asked


def _line_that_fixes_the_batch(model: nn.Module, inputs: Inputs, outputs: Outputs) -> str:
    """Captures once more and listens to what torch logs of its sizes: its error does not name the line."""
    log, listener = logging.getLogger(_SHAPES_LOG), _Listener()
    level, others, propagate = log.level, log.handlers, log.propagate
    log.handlers, log.propagate = [listener], False
    log.setLevel(logging.INFO)
    try:
        with contextlib.suppress(Exception):
            _export(model, inputs, True, outputs, logs=True)
    finally:
        log.handlers, log.propagate = others, propagate
        log.setLevel(level)
    return listener.replaced or listener.asked
