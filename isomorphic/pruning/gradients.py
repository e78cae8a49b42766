"""Gradients for the criteria that need data: summed over batches, or squared and averaged over single images.

The task is the user's: `loss(model, batch)` says how wrong the model is, and a batch is whatever that takes.

Taylor scores (Molchanov et al., CVPR 2019) take the gradient of each batch's loss, summed. Hessian scores take the
diagonal of the Fisher information, the mean of *each image's* squared gradient (LeCun et al., Optimal Brain Damage,
1989; Fang et al., DepGraph, CVPR 2023): squaring the batch's gradient instead would lose it, as (g₁ + g₂)² is not
g₁² + g₂². So every image needs a gradient of its own. Where the model allows, `torch.func` computes those of many
images in one pass.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset, IterableDataset

from isomorphic.errors import UserError, first_line
from isomorphic.inputs import call, map_tensors, move_to, tensors_in, told
from isomorphic.measure.precision import Agreement, Autocast, Precision, fast_gradients
from isomorphic.models import REFUSALS
from isomorphic.observe import modes_kept
from isomorphic.processes import distributed

Statistic = dict[str, Tensor]  # by parameter name, of the parameter's shape
Loss = Callable[[nn.Module, Any], Tensor]

# Gradients of this many numbers are held at once, 1 GiB of them: images × parameters of the model.
MOST_NUMBERS = 2**28
# On a CPU one pass pays for small models alone: on one thread, in images a second against the loop's, 3.2 times for
# an MLP of 20 K parameters, 1.3 to 1.8 for networks of 0.1 to 0.3 M, but 0.7 for 2 M and 0.2 to 0.4 for a ResNet-18.
MOST_PARAMETERS_ON_CPU = 1_000_000
# How far the vectorised gradients of the first image may be from those of a plain backward pass.
AGREEMENT = 1e-3
# How well the units of a batch have to rank in bfloat16 as they do in full precision, Spearman's correlation. Measured:
# 0.9993 for a DINOv2-S and 0.9994 to 0.9998 for a DeiT; 0.965 and 0.989 to 0.992 for an EfficientNet-Lite0, which is no
# faster in bfloat16. Two halves of the data rank as alike as 0.66, 0.68, 0.51 and 0.98.
RANKS_ALIKE = 0.99
# How far the sum of an image's soft labels may be from 1: half precision's rounding.
PROBABILITY_TOLERANCE = 1e-2
_WITHOUT_LABELS = (
    "without labels, loss=isomorphic.own_answer_loss takes the model's own answers, and l1, l2 and random need no data"
)
_PASS_A_LOSS = "pass loss=, a function of (model, batch) that returns a scalar (for prune.py: define it in the file)"


def check_loss(loss: Any) -> None:
    """Raises a UserError for a loss that cannot be called with a model and a batch."""
    if loss is None:
        return
    if not callable(loss):
        raise UserError(f"loss = {loss!r} is no function: {_PASS_A_LOSS}")
    # What compares outputs and targets has two arguments as well, so torch's own are known by their home.
    compares = isinstance(loss, (nn.modules.loss._Loss, type)) or getattr(loss, "__module__", "") == F.__name__
    if compares or not _takes_two(loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        example = "lambda model, batch: compare(model(batch[0]), batch[1])"
        raise UserError(f"{name} is no function of (model, batch), as loss= must be: write one around it, {example}")


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function.forward if isinstance(function, nn.Module) else function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # what is written in C need not have a signature
        return True
    return True


def check_data(data: Any) -> None:
    """Raises a UserError for what yields no batches: a single batch, a dataset of single items, no iterable at all."""
    kind = type(data).__name__
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise UserError(f"data= is a dataset of single items, {kind}: give a DataLoader of it, which makes batches")
    if isinstance(data, (Tensor, Mapping)):
        raise UserError(f"data= is {kind}, which is one batch at most: give a list of batches or a loader")
    if _is_one_batch(data):
        raise UserError(
            "data= is one batch, inputs and labels: give a list of them, data=[(inputs, labels)], or a loader"
        )
    iterable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if isinstance(data, (str, type)) or not (data is None or iterable):
        raise UserError(f"data = {data!r} is no list of batches and no loader")


def _is_one_batch(data: Any) -> bool:
    """True for (inputs, labels), two tensors of one length that are unlike: a list of two batches has two alike."""
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        return False
    inputs, labels = data
    if not (inputs.dim() and labels.dim()) or len(inputs) != len(labels):
        return False
    return inputs.is_floating_point() != labels.is_floating_point() or inputs.dim() != labels.dim()


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    """Returns the mean cross entropy of `model(batch[0])`, logits (N, classes, …), and the labels `batch[1]`.

    Raises:
        UserError: the batch is no pair, or the model's answer is no tensor of logits for these labels.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise UserError(f"a batch is {type(batch).__name__}, not (inputs, labels): {_PASS_A_LOSS}; {_WITHOUT_LABELS}")
    inputs, labels = batch[0], batch[1]
    answer = call(model, inputs)
    if not isinstance(answer, Tensor):
        raise UserError(f"the model returns {type(answer).__name__}, not a tensor of logits: {_PASS_A_LOSS}")
    if answer.dim() < 2:
        raise UserError(f"the model returns {tuple(answer.shape)}, not logits (N, classes, …): {_PASS_A_LOSS}")
    if _are_regression_targets(labels, answer):
        raise UserError(f"the labels are neither classes nor probabilities of classes: {_PASS_A_LOSS}")
    try:
        return F.cross_entropy(answer.float(), labels)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UserError(
            f"there is no cross entropy of outputs {tuple(answer.shape)} and these labels "
            f"({first_line(error)}): {_PASS_A_LOSS}"
        ) from error


def own_answer_loss(model: nn.Module, batch: Any) -> Tensor:
    """Returns the mean cross entropy of a classifier's logits (N, classes) and its own top-1: for data without labels.

    Args:
        model: returns logits and nothing else.
        batch: what it takes, or a tuple or list that begins with it.

    Raises:
        UserError: the model returns something else.
    """
    logits = call(model, batch[0] if isinstance(batch, (tuple, list)) else batch)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise UserError(f"own_answer_loss is for classifiers of one output (N, classes): {_PASS_A_LOSS}")
    return F.cross_entropy(logits.float(), logits.argmax(dim=1))


def _are_regression_targets(labels: Any, answer: Tensor) -> bool:
    """True for numbers (N, outputs, …) that are no soft labels: their cross entropy would mean nothing."""
    if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.shape != answer.shape:
        return False
    if labels.shape[1] == 1:
        return False  # there is no gradient, which has a message of its own
    sums_to_one = (labels.float().sum(dim=1) - 1).abs() < PROBABILITY_TOLERANCE
    return not bool((labels >= 0).all() and sums_to_one.all())


def accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    statistic: str,
    *,
    loss: Loss | None = None,
    device: torch.device | None = None,
    amp_dtype: Precision = None,
) -> Statistic:
    """Runs batches through `model` in eval mode and adds up what a criterion needs, over all processes.

    Parameters that are frozen for training are scored like others. The model's modes, buffers, gradients and
    `requires_grad` flags, and torch's random state, are put back.

    Args:
        model: on `device`.
        batches: this process's share; tensors in them are moved to `device`.
        statistic: "gradient": the sum over batches of the gradient of the batch's loss; "squared_gradient": the mean
            over images of each image's squared gradient, where a batch's images are its tensors, in tuples, lists or
            mappings, that are as long as the first of them.
        loss: (model, batch) -> scalar; None is `classification_loss`.
        device: None is that of the first parameter.
        amp_dtype: autocast dtype of the forward pass, None for full precision; `Auto`: bfloat16 where that pays, if the
            units of one batch rank in it as they do in full precision (`RANKS_ALIKE`).

    Returns:
        float32 tensors by parameter name; zeros where no gradient arrived.

    Raises:
        UserError: no batch at all, a batch that the model does not take, a loss that is not a finite scalar that
            depends on the model, or no gradient anywhere.
    """
    device = device or next(model.parameters()).device
    gradients = _Gradients(model, loss or classification_loss, Autocast(amp_dtype, device, "scoring"))
    count = torch.zeros((), device=device)
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus, device_type="cuda"), _ready_for_gradients(model):
        for batch in batches:
            batch = move_to(batch, device)
            if statistic == "squared_gradient":
                count += gradients.add_squares(batch)
            else:
                gradients.add(batch)
                count += 1
    total = int(distributed.all_reduce_sum(count).item())
    if total == 0:
        raise UserError("there are no images to score on")
    for values in gradients.sums.values():
        distributed.all_reduce_sum(values)
        if statistic == "squared_gradient":
            values /= total
    if not any(values.any() for values in gradients.sums.values()):
        raise UserError(f"the loss has no gradient anywhere, so every score would be zero: {_PASS_A_LOSS}")
    return gradients.sums


class _Gradients:
    """Sums of gradients, or of their squares, by parameter name."""

    def __init__(self, model: nn.Module, loss: Loss, autocast: Autocast) -> None:
        self.sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
        self._model, self._loss, self._autocast = model, loss, autocast
        self._numbers = sum(values.numel() for values in self.sums.values())
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._vectorised: bool | None = None  # None: not tried yet

    def add(self, batch: Any) -> None:
        """Adds the gradient of the batch's loss; autograd adds it to a float32 sum in place."""
        self._autocast.before(next(iter(_lengths(batch)), 1), lambda: self._ranks_alike(batch))
        for name, parameter in self._model.named_parameters():
            laid_out_anew = parameter.dim() == 4 and self._autocast.dtype is not None
            if parameter.dtype == torch.float32 and not laid_out_anew:
                parameter.grad = self.sums[name]
        self._backward(batch)
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None and parameter.grad is not self.sums[name]:
                self.sums[name] += parameter.grad.float()
            parameter.grad = None

    def add_squares(self, batch: Any) -> int:
        """Adds every image's squared gradient; returns how many images there are."""
        images = split_batch(batch)
        if not images:
            return 0
        self._autocast.before(len(images), lambda: self._ranks_alike(images[0]))
        chunk = max(min(MOST_NUMBERS // max(self._numbers, 1), len(images)), 1)
        if self._vectorised is None:
            self._vectorised = chunk > 1 and self._pays() and self._can_be_vectorised(batch, images[0])
        squares = self._squares_in_passes(batch, len(images), chunk) if self._vectorised else None
        if squares is not None:
            for name, values in squares.items():
                self.sums[name] += values
        else:
            self._vectorised = False
            for image in images:
                self._backward(image)
                for name, gradient in self._collected():
                    self.sums[name] += gradient.square()
        return len(images)

    def _squares_in_passes(self, batch: Any, length: int, chunk: int) -> Statistic | None:
        """The sum over a batch's images of their squared gradients, `chunk` images a pass.

        None where vmap refuses a later batch than the one it was tried on, or memory is short: as the sum is the
        batch's own, nothing of it has been counted then.
        """
        squares = {name: torch.zeros_like(values) for name, values in self.sums.items()}
        try:
            for first in range(0, length, chunk):
                for name, gradient in self._of_images(batch, length, slice(first, first + chunk)).items():
                    squares[name] += gradient.float().square().sum(dim=0)  # (chunk, *shape) -> (*shape)
        except UserError:
            raise
        except Exception:  # whatever forward code raises where tensors are vmap's
            return None
        return squares

    def _pays(self) -> bool:
        on_cpu = next(self._model.parameters()).device.type == "cpu"
        return not self._recurrent and not (on_cpu and self._numbers > MOST_PARAMETERS_ON_CPU)

    def _can_be_vectorised(self, batch: Any, image: Any) -> bool:
        """Tries the first image both ways: what vmap cannot run, or runs otherwise, takes the loop."""
        self._backward(image)
        expected = dict(self._collected())
        try:
            found = self._of_images(batch, len(split_batch(batch)), slice(0, 1))
        except Exception:  # whatever forward code raises where tensors are vmap's
            return False
        largest = max((gradient.abs().max().item() for gradient in expected.values()), default=0.0)
        return all(
            torch.allclose(found[name][0].float(), gradient, rtol=AGREEMENT, atol=AGREEMENT * largest)
            for name, gradient in expected.items()
        )

    def _backward(self, batch: Any) -> None:
        """One plain backward pass."""
        cudnn = _without_cudnn() if self._recurrent else contextlib.nullcontext()
        with cudnn, fast_gradients(self._model, self._autocast.dtype, self._autocast.device):
            try:
                loss = self._loss_of(batch)
            except REFUSALS as error:
                _tell_refusal(self._model, batch, error)
                raise
            _check_loss(loss)
            loss.backward()

    def _loss_of(self, batch: Any) -> Tensor:
        with self._autocast():
            return self._loss(self._model, batch)

    def _ranks_alike(self, batch: Any) -> Agreement:
        """Compares the rankings of units by |weight · gradient| on a batch, in bfloat16 and in full precision."""

        def saliency() -> dict[str, Tensor]:
            self._backward(batch)
            parameters = dict(self._model.named_parameters())
            products = {name: parameters[name].detach() * gradient for name, gradient in self._collected()}
            return {name: values.abs().flatten(1).sum(dim=1) for name, values in products.items() if values.dim() > 1}

        correlation = rank_correlation(*self._autocast.both_ways(saliency))
        told = f"the units of a batch rank as in fp32 (Spearman {correlation:.4f})"
        return Agreement(correlation >= RANKS_ALIKE, told)

    def _collected(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients that a backward pass has left, in float32; they are cleared."""
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                yield name, parameter.grad.float()
        self._model.zero_grad(set_to_none=True)

    def _of_images(self, batch: Any, length: int, part: slice) -> dict[str, Tensor]:
        """The gradients of some images of a batch, (images, *shape) by parameter name, in one pass.

        vmap runs the loss of one image over all of them: what is as long as the batch is split, the rest is shared.
        """
        split = [tensor[part] for tensor in tensors_in(batch) if _is_split(tensor, length)]

        def loss_of_one(parameters: dict[str, Tensor], pieces: tuple[Tensor, ...]) -> Tensor:
            left = iter(pieces)
            one = map_tensors(batch, lambda tensor: next(left).unsqueeze(0) if _is_split(tensor, length) else tensor)
            return functional_call(self._as_module(), parameters, (one,))

        parameters = {f"model.{name}": parameter.detach() for name, parameter in self._model.named_parameters()}
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels would be run image by image
            gradients, losses = vmap(grad_and_value(loss_of_one), in_dims=(None, 0))(parameters, tuple(split))
        if not losses.isfinite().all():
            _check_loss(losses[~losses.isfinite()][0])
        return {name.removeprefix("model."): gradient for name, gradient in gradients.items()}

    def _as_module(self) -> nn.Module:
        """The loss as a module that holds the model, so that `functional_call` can give it other parameters."""
        return _LossModule(self._model, self._loss_of)


class _LossModule(nn.Module):
    def __init__(self, model: nn.Module, loss_of: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self._loss_of = model, loss_of

    def forward(self, batch: Any) -> Tensor:
        return self._loss_of(batch)


def _tell_refusal(model: nn.Module, batch: Any, error: Exception) -> None:
    """Raises a UserError if it was the model that raised `error` on a batch, and not the loss around it."""
    if isinstance(error, (UserError, torch.cuda.OutOfMemoryError)):
        return
    if is_raised_by(model, error):
        shapes = f", {told(batch)}," if tensors_in(batch) else ""
        raise UserError(f"the model does not take a batch of the data{shapes} as it is: {first_line(error)}") from error


def is_raised_by(model: nn.Module, error: Exception) -> bool:
    """Returns True if a module of `model` was running when `error` was raised."""
    modules = {id(module) for module in model.modules()}
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(id(frame.f_locals.get("self")) in modules for frame in frames)


def rank_correlation(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Returns Spearman's correlation of the scores (n,) of two mappings with the same names, its mean over all scores.

    Names whose first scores are all alike say nothing, and are left out; 0 where there are no others.
    """
    from scipy.stats import spearmanr  # here, since it takes seconds to import

    total, weighted = 0, 0.0
    for name, scores in first.items():
        other = second[name]
        if _differ(scores):
            total += len(scores)
            found: Any = spearmanr(scores.cpu(), other.cpu()) if _differ(other) else (0.0,)
            weighted += len(scores) * float(found[0])
    return weighted / total if total else 0.0


def _differ(scores: Tensor) -> bool:
    return bool((scores != scores[0]).any())


def split_batch(batch: Any) -> list[Any]:
    """Returns the single images of a batch, each as a batch of one.

    The tensors in it that are as long as the first one are split along dim 0, everything else goes to each. Of
    ({"pixels": (8, 3, 32, 32)}, labels (8,), weights (10,)) that makes eight ({"pixels": (1, 3, 32, 32)}, (1,), (10,)).
    """
    lengths = _lengths(batch)
    if not lengths:
        raise UserError("a batch holds no tensors that could be split into single images")
    length = lengths[0]
    return [
        map_tensors(batch, lambda tensor, i=i: tensor[i : i + 1] if _is_split(tensor, length) else tensor)
        for i in range(length)
    ]


def _lengths(batch: Any) -> list[int]:
    """How long the tensors in a batch are; it has as many images as the first one is long."""
    return [len(tensor) for tensor in tensors_in(batch) if tensor.dim()]


def _is_split(tensor: Tensor, length: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == length


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise UserError(f"the loss is {type(loss).__name__}, not a tensor: {_PASS_A_LOSS}")
    if loss.dim() or loss.is_complex():
        raise UserError(f"the loss has shape {tuple(loss.shape)}, it is no scalar: {_PASS_A_LOSS}")
    if not torch.isfinite(loss):
        raise UserError(f"the loss on the scoring images is {loss.item()}: check the weights and the images")
    if not loss.requires_grad:
        raise UserError("the loss does not depend on the model's parameters: compute it without no_grad() or detach()")


@contextlib.contextmanager
def _ready_for_gradients(model: nn.Module) -> Iterator[None]:
    """Eval mode, every floating parameter with a gradient to come; everything is put back, buffers too."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    with modes_kept(model):
        try:
            model.eval()
            for parameter in before:
                parameter.grad = None
                if parameter.is_floating_point() or parameter.is_complex():
                    parameter.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter, (wanted, gradient) in before.items():
                parameter.requires_grad_(wanted)
                parameter.grad = gradient
            model.train()  # drops what some keep of an eval run, such as indexed bias tables: it hangs on the graph
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):  # few change in eval mode, and some cannot be written to
                        buffer.copy_(value)


def _without_cudnn() -> contextlib.AbstractContextManager[None]:
    """Its recurrent layers have no backward pass in eval mode."""
    return torch.backends.cudnn.flags(enabled=False)
