"""Self-check: does the cut model compute what the dense one does with the removed positions at zero?

A *masked* model is the dense one whose removed positions are zero in every tensor of their group: where units are
made, scaled and read. Cutting is then leaving zeros out, and changes nothing but rounding, with one exception:
operations that mix channels, such as a layer norm, divide by how many there are, and what forward code has made of
zeros before may count in them. So the masked model is run first and its statistics are noted, call by call; the cut
model runs on them wherever it mixes the same channels but for the removed ones (see `channel_reductions.py`).
With that the comparison is exact, to about 1e-12 in double precision, and a wrong index anywhere shows.

Three things show as a difference that need not be a mistake: products of two activations that sum over channels which
neither leaves zero (the exact tracer keeps those, see `rules/zeros.py`), sums that forward code divides by a width on
its own, and operations that sort channels.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from isomorphic.errors import UserError
from isomorphic.inputs import Inputs, call, map_tensors, named_tensors, no_fast_path, tensors_in
from isomorphic.plain_tensors import own_plain_tensors
from isomorphic.pruning.cutting.channel_reductions import StatisticsRecorder, StatisticsReplayer
from isomorphic.pruning.cutting.cut import removed_rows
from isomorphic.pruning.grouping.memory import remembering_nothing
from isomorphic.pruning.groups import ChannelGraph, Member
from isomorphic.pruning.plan import PruningPlan

# The architectures that the paper prunes, which the tests hold against two tracers: no check of each run is needed.
PAPER_FAMILIES = ("deit_", "convnext_", "resnet", "mobilenet_v2", "swin_")
# The rows whose lengths weight normalisation divides by, and what it gives them instead.
_LENGTHS = {"weight_v": "weight_g", "original1": "original0"}
TOLERANCE = 1e-4  # of an output's spread: far above rounding, even in single precision, far below a wrong channel
_ADVICE = (
    "its channels were traced wrongly, or it sums over channels in a way that zeros are no measure of: "
    "try another --graph, and please report the model"
)


class NothingToCompareError(UserError):
    """The model's answer is such that a wrong cut could not show in it."""


def check_cut(
    model: nn.Module,
    graph: ChannelGraph,
    plan: PruningPlan,
    pruned: nn.Module,
    inputs: Inputs,
    tolerance: float = TOLERANCE,
) -> float:
    """Holds a cut model against the masked dense one.

    Args:
        model: the dense model, on the device of `inputs`; it is left as it was, and so is `pruned`.
        graph: its coupled groups.
        plan: what was kept of them.
        pruned: the model that was cut by `plan`.
        inputs: a batch, or a tuple of positional arguments.
        tolerance: the largest difference that passes, as a share of an output's spread.

    Returns:
        The largest difference, as a share of the spread of the output that it is in.

    Raises:
        UserError: the cut model does not run, or computes something else; the message names the outputs.
    """
    try:
        errors = output_errors(masked_copy(model, graph, plan), pruned, inputs)
    except NothingToCompareError as error:
        raise UserError(f"self-check: {error}") from error
    except UserError as error:
        raise UserError(f"self-check: {error}; {_ADVICE}") from error
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"self-check: the cut model does not run ({error}); {_ADVICE}") from error
    wrong = {name: error for name, error in errors.items() if error > tolerance}
    if wrong:
        which = ", ".join(f"{name} by {error:.2g} of its spread" for name, error in wrong.items())
        raise UserError(f"self-check: the cut model differs from the masked dense one in {which}; {_ADVICE}")
    return max(errors.values())


def cut_error(masked: nn.Module, pruned: nn.Module, inputs: Inputs) -> float:
    """The largest difference between the two models' outputs; see `output_errors`."""
    return max(output_errors(masked, pruned, inputs).values())


@torch.no_grad()
def masked_copy(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """A copy of the dense `model` with what `plan` removes at zero in all members but those that are divided by."""
    masked = copy.deepcopy(model)
    for member, gone in removed_rows(graph, plan):
        module = masked.get_submodule(member.module)
        if not _is_divided_by(module, member):
            tensor = getattr(module, member.tensor)
            tensor.index_fill_(member.dim, member.index[gone].flatten().to(tensor.device), 0)
    return masked


def _is_divided_by(module: nn.Module, member: Member) -> bool:
    """Whether something divides by the member's slices: by variances, or by the length of each row on its own."""
    lengths = getattr(module, _LENGTHS.get(member.tensor, ""), None)
    is_row = lengths is not None and lengths.dim() > 0 and lengths.shape[0] > 1
    return member.dim == 0 and (member.tensor == "running_var" or is_row)


def output_errors(masked: nn.Module, pruned: nn.Module, inputs: Inputs) -> dict[str, float]:
    """The largest difference of each output tensor, as a share of the standard deviation of the masked model's.

    Both models run in eval mode and double precision, as copies; in their own precision where the dense one insists
    on it. An output of another shape, or one that is not finite, differs by infinity.

    Returns:
        By name: "output", "output[1]", "output['logits']" ….

    Raises:
        UserError: there is nothing to compare with, or the cut model takes another way through its code.
    """
    recorder, precise = StatisticsRecorder(), True
    try:
        expected = _run(masked, inputs, recorder, precise)
    except (RuntimeError, TypeError):  # forward code that names a dtype, or a device without doubles
        recorder, precise = StatisticsRecorder(), False
        expected = _run(masked, inputs, recorder, precise)
    if not expected or not all(tensor.isfinite().all() for tensor in expected.values()):
        raise UserError("the masked dense model gives no tensors, or infinite ones: nothing to compare with")
    if not any(tensor.numel() for tensor in expected.values()):
        raise NothingToCompareError(
            f"the outputs for these inputs are empty ({', '.join(expected)}): there is nothing to compare; "
            "give inputs for which the model returns something, or leave the self-check out"
        )
    replayer = StatisticsReplayer(recorder.calls)
    found = _run(pruned, inputs, replayer, precise)
    replayer.finish()
    if list(expected) != list(found):
        raise UserError(f"the outputs {', '.join(expected)} became {', '.join(found)}")
    return {name: _error(expected[name], found[name]) for name in expected}


def _error(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return math.inf
    if not expected.numel():
        return 0.0
    expected, found = (torch.view_as_real(t) if t.is_complex() else t.double() for t in (expected, found))
    error = (expected - found).abs().max().item() / (expected.std(correction=0).item() or 1.0)
    return error if math.isfinite(error) else math.inf


def _run(model: nn.Module, inputs: Inputs, mode: TorchDispatchMode, precise: bool) -> dict[str, Tensor]:
    """The output tensors of a copy of `model`, by name."""
    model = copy.deepcopy(model).eval()
    values = inputs
    if precise:
        model = model.double()
        for module in model.modules():
            for name, tensor in [*own_plain_tensors(module)]:
                setattr(module, name, tensor.double() if tensor.is_floating_point() else tensor)
        values = map_tensors(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    devices = {tensor.device for tensor in tensors_in(inputs) if tensor.is_cuda}
    with torch.random.fork_rng(devices), remembering_nothing(model) as memory, _every_operation_visible(precise), mode:
        torch.manual_seed(0)  # a forward that draws random numbers draws the same ones in both runs
        outputs = memory.outputs = call(model, values)
    return dict(named_tensors(outputs, "output"))


@contextlib.contextmanager
def _every_operation_visible(precise: bool) -> Iterator[None]:
    """Nothing fused, and new tensors in the precision of the run."""
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64 if precise else dtype)
        with (
            no_fast_path(),
            torch.no_grad(),  # not inference mode, which hides what composite operations are made of
            torch.backends.cudnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        torch.set_default_dtype(dtype)
