"""Distillation without labels: some hundred steps that take a cut model towards the dense one on calibration images.

The step between the closed forms and training: few-sample distillation, as in PRACTISE (Wang and Wu, CVPR 2023). With
z and z* the logits of the cut and of the dense model on the same image, x and x* what a cut layer and its dense one
read, and K the channels of x* that are left, the cut model's weights go down the gradient of

    T² · KL(softmax(z*/T) ‖ softmax(z/T)) + w · mean over layers of E|x − x*_K|² / Var x*_K

Where a model returns something else than logits, it is the squared error of each floating-point output as a share of
its variance. Features say more of an image than its logits do: few images fit them, and hardly overfit.

Batch norms keep their statistics: a thousand images say less about them than the millions behind the old ones. No two
steps see the same pixels: crops and mirror images, and for half of a batch other colours, too, and a neighbour mixed in
or a piece of one laid over. The dense model has an answer to anything. Every `EVERY` steps held-out images judge the
model; where it is no better than the best one so far, that one is taken up again, at a quarter of the rate: a
transformer, whose layers were solved for, wants a tenth of the steps that a convolutional network does.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, device_of, floats_in, items_of, map_tensors, move_to, num_items, tensors_in
from isomorphic.observe import eval_mode, module_calls
from isomorphic.processes import distributed
from isomorphic.progress import steps as counted
from isomorphic.pruning.recovery.channel_maps import ChannelMap
from isomorphic.pruning.recovery.held_out import Judge, Kept, are_logits, item_keys

TEMPERATURE = 2.0
EVERY = 25  # steps between two looks at the held-out images
WARM_UP = 10  # steps until the learning rate is what was asked for
SLOWER = 0.25  # times the rate, where a look finds no gain
WEIGHT = 10.0  # w, of the features
SMALLEST_PART = 0.2  # whose roots are the smallest sides of a crop, as shares of the image's
COLOUR = 0.4  # the most that a channel's gain and offset change by, in units of normalised pixels
FEATURES = 2**21  # numbers of one image that are compared at most: 8 MiB
NEGLIGIBLE = 1e-8  # variance
SMALLEST_SIZE = 1e-3  # root mean square of a tensor, below which steps become no smaller: biases of nought move, too


@dataclass(frozen=True)
class DistillationRules:
    """How a cut model is distilled.

    Attributes:
        steps: of one round, those that were taken back included.
        batch_size: images of a step, over all processes.
        lr: Adam's learning rate as a share of a tensor's root mean square: what a step changes of it at most. It falls
            to nought along a cosine in each round.
        rounds: how many there may be; another one begins only if the last has taken `PAYS` of what was left.
        seed: of the order of the images, of crops and mixtures.
    """

    steps: int = 100
    batch_size: int = 32
    lr: float = 2e-3
    rounds: int = 1
    seed: int = 0


PAYS = 0.1  # share of the distance to the dense model that a round has to gain to be followed by another


class Features:
    """What some layers of two models read, while both run.

    Args:
        dense, model: with layers of the same names.
        columns: by name, which of the dense layer's channels the cut one reads, ascending (m,), or a map from them.
        images: some that the dense model is run on once, for the variances.
    """

    def __init__(
        self, dense: nn.Module, model: nn.Module, columns: Mapping[str, Tensor | ChannelMap], images: Inputs
    ) -> None:
        self._columns = columns
        self._dense = {name: dense.get_submodule(name) for name in columns}
        self._model = {name: model.get_submodule(name) for name in columns}
        self._seen: dict[str, Tensor] = {}
        self._wanted: dict[str, Tensor] = {}
        with torch.no_grad(), eval_mode(dense), module_calls(self._dense, before=self._want):
            call(dense, images)
        self._variances = {name: variance_of(wanted) for name, wanted in self._wanted.items()}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, what the layers read is kept, of each the last call."""
        with module_calls(self._dense, before=self._want), module_calls(self._model, before=self._see):
            yield

    def distance(self) -> Tensor:
        """Returns the mean over the layers of E|x − x*_K|² / Var x*_K, and forgets what was seen."""
        errors = [
            (self._seen[name] - wanted).square().mean() / self._variances[name] for name, wanted in self._wanted.items()
        ]
        self._seen.clear()
        self._wanted.clear()
        return torch.stack(errors).mean()

    def _see(self, name: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        self._seen[name] = positional[0]

    def _want(self, name: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        dim, chosen, dense = _channel_dim(self._dense[name]), self._columns[name], positional[0]
        if isinstance(chosen, ChannelMap):
            mixed = dense.movedim(dim, -1) @ chosen.factor.T.to(dense) + chosen.offset.to(dense)
            self._wanted[name] = mixed.movedim(-1, dim)
        else:
            self._wanted[name] = dense.index_select(dim, chosen.to(dense.device))


def choose_features(
    dense: nn.Module, columns: Mapping[str, Tensor | ChannelMap], images: Inputs
) -> dict[str, Tensor | ChannelMap]:
    """Returns the layers whose inputs are compared: those of the smallest inputs, up to `FEATURES` numbers an image.

    Small inputs are what blocks hand on to each other: a bottleneck's stream rather than its six times wider middle. Of
    equally large ones, as in a transformer, the deepest come first: what the logits are made of.

    Args:
        dense: run once.
        columns: the layers with cut inputs, as in `CutLayers`.
        images: some of the calibration images.
    """
    sizes: dict[str, list[int]] = {}

    def note(name: str, positional: tuple[Any, ...], keyword: dict[str, Any]) -> None:
        is_one = len(positional) == 1 and isinstance(positional[0], Tensor) and positional[0].is_floating_point()
        sizes.setdefault(name, []).append(positional[0][0].numel() if is_one else FEATURES + 1)

    layers = {name: dense.get_submodule(name) for name in columns}
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))}
    with torch.no_grad(), eval_mode(dense), module_calls(layers, before=note):
        call(dense, items_of(images, slice(1)))
    once = {name: found[0] for name, found in sizes.items() if len(found) == 1}  # one that runs twice has two inputs
    chosen, left = {}, FEATURES
    deepest_first = list(once)[::-1]
    for name in sorted(deepest_first, key=lambda name: once[name]):
        if once[name] <= left:
            chosen[name] = columns[name]
            left -= once[name]
    return chosen


class Outputs:
    """What is learned of the outputs of two models.

    Args:
        dense: run once, for the variances of outputs that are no logits.
        images: some that it is run on.
    """

    def __init__(self, dense: nn.Module, images: Inputs) -> None:
        with torch.no_grad(), eval_mode(dense):
            outputs = floats_in(call(dense, images))
        self._are_logits = are_logits(outputs)
        self._variances = [variance_of(output) for output in outputs]

    def distance(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """T² KL of the logits where these are the only output, else the mean relative squared error, shape ()."""
        if self._are_logits:
            student, teacher = (F.log_softmax(outputs[0].float() / TEMPERATURE, dim=1) for outputs in (found, wanted))
            return TEMPERATURE**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        triples = zip(found, wanted, self._variances, strict=True)
        errors = [(a - b).square().mean() / variance for a, b, variance in triples if a.shape == b.shape and a.numel()]
        return torch.stack(errors).mean()


@dataclass(frozen=True)
class Distilled:
    """What distillation did.

    Attributes:
        steps: that were taken.
        kept: the step whose weights stayed: 0 if none was better than the start.
        before, after: distance to the dense model on held-out images; NaN without any.
    """

    steps: int
    kept: int
    before: float
    after: float


def distill(
    dense: nn.Module,
    model: nn.Module,
    images: Inputs,
    rules: DistillationRules,
    judge: Judge | None,
    *,
    columns: Mapping[str, Tensor | ChannelMap] | None = None,
) -> Distilled:
    """Trains `model` in place towards `dense`. Modes, gradients and `requires_grad` are put back.

    Several processes do what one would do with all of their images, up to rounding.

    Args:
        dense: what the model should do, on the device of `images`.
        model: the cut one, the same in all processes.
        images: this process's calibration images, without the held-out ones.
        rules: how long, how fast.
        judge: of held-out images; None: the last step's weights stay.
        columns: layers with cut inputs, and which of the dense layer's inputs these are, (m,), or a map from them:
            features to compare.
    """
    images = _all_images(images)
    first = items_of(images, slice(rules.batch_size))
    columns = choose_features(dense, columns, images) if columns else {}
    features = Features(dense, model, columns, first) if columns else None
    outputs = Outputs(dense, first)
    start = judge.loss_of(model) if judge else math.nan
    best, kept, taken = start, 0, 0
    weights = Kept(model)
    generator = torch.Generator().manual_seed(rules.seed)
    with _trainable(model) as parameters, eval_mode(model), eval_mode(dense):
        for _ in range(rules.rounds):
            begin = best
            batches = _draw_batches(images, rules, generator)
            with counted("distilling", rules.steps, unit="step") as bar:
                descent = _Descent(dense, model, parameters, rules, outputs, features)
                for step in range(1, rules.steps + 1):
                    descent.take(step, next(batches))
                    taken += 1
                    bar.update()
                    if judge and (step in (WARM_UP, rules.steps) or step % EVERY == 0):
                        if (loss := judge.loss_of(model)) < best:
                            best, kept, weights = loss, taken, Kept(model)
                        else:
                            weights.restore()
                            descent.begin_anew(SLOWER)
            if judge is None:
                return Distilled(taken, taken, start, start)
            weights.restore()
            if not best < (1 - PAYS) * begin:
                break
    return Distilled(taken, kept, start, best)


class _Descent:
    """Steps down the distance to the dense model, each tensor's as a share of its size at the start.

    Args:
        dense, model, outputs, features: as in `_loss`.
        parameters: of `model`; they have gradients.
        rules: how long, how fast.
    """

    def __init__(
        self,
        dense: nn.Module,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        rules: DistillationRules,
        outputs: Outputs,
        features: Features | None,
    ) -> None:
        self._dense, self._model, self._outputs, self._features = dense, model, outputs, features
        self._parameters, self._rules, self._rate = parameters, rules, 1.0
        self._sizes = [max(float(p.detach().square().mean().sqrt()), SMALLEST_SIZE) for p in parameters]
        self.begin_anew(1.0)

    def begin_anew(self, slower: float) -> None:
        """Goes on without momenta, at `slower` times the rate."""
        self._rate *= slower
        self._optimizer = torch.optim.Adam([{"params": [p]} for p in self._parameters], lr=self._rules.lr)

    def take(self, step: int, batch: Inputs) -> None:
        """Takes a step, counted from 1, of a round on a batch of all processes."""
        done = (step - 1) / self._rules.steps
        rate = self._rate * self._rules.lr * min(1.0, step / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
        for group, size in zip(self._optimizer.param_groups, self._sizes, strict=True):
            group["lr"] = rate * size
        own = _own_share(batch)
        share = num_items(own) / self._rules.batch_size
        self._optimizer.zero_grad()
        if num_items(own):
            (share * _loss(self._dense, self._model, own, self._outputs, self._features)).backward()
        _add_up(self._parameters)
        self._optimizer.step()


def _loss(dense: nn.Module, model: nn.Module, images: Inputs, outputs: Outputs, features: Features | None) -> Tensor:
    """The distance between both models on some images, shape ()."""
    with features.watched() if features else contextlib.nullcontext():
        with torch.no_grad():
            wanted = floats_in(call(dense, images))
        found = floats_in(call(model, images))
    loss = outputs.distance(found, wanted)
    return loss + WEIGHT * features.distance() if features else loss


def variance_of(tensor: Tensor) -> Tensor:
    """Returns the variance of all numbers of a tensor, shape (), never nought."""
    return tensor.var(correction=0).clamp_min(NEGLIGIBLE)


def _all_images(images: Inputs) -> Inputs:
    """The images of all processes, in every process, in an order that does not depend on who held which."""
    parts = distributed.gather_objects(move_to(images, torch.device("cpu")))
    tensors = zip(*(tensors_in(part) for part in parts), strict=True)
    joined = iter([_joined(some) for some in tensors])
    whole = map_tensors(parts[0], lambda tensor: next(joined))
    order = item_keys(whole).argsort(stable=True)
    return move_to(items_of(whole, order), device_of(images))


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    """One tensor of a batch, of all processes; what is no list of items, such as a scalar, is the same in all."""
    return torch.cat(parts) if parts[0].dim() else parts[0]


def _draw_batches(images: Inputs, rules: DistillationRules, generator: torch.Generator) -> Iterator[Inputs]:
    """Yields batches without end: all images in a random order, then in another one."""
    waiting = torch.zeros(0, dtype=torch.long)
    while True:
        while len(waiting) < rules.batch_size:
            waiting = torch.cat([waiting, torch.randperm(num_items(images), generator=generator)])
        chosen, waiting = waiting[: rules.batch_size], waiting[rules.batch_size :]
        batch = items_of(images, chosen.to(device_of(images)))
        tensors = tensors_in(batch)
        is_images = len(tensors) == 1 and tensors[0].dim() == 4 and tensors[0].is_floating_point()
        yield map_tensors(batch, lambda some: _channels_last(augmented(some, generator))) if is_images else batch


def _channels_last(images: Tensor) -> Tensor:
    """The same in the memory format that convolutions go backward faster in."""
    return images.contiguous(memory_format=torch.channels_last)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images (N, C, H, W), each cropped, half of them mirrored, a quarter in other colours.

    The first half stays at that. Of the third quarter each is mixed with its neighbour (Zhang et al., mixup, 2018), of
    the last a piece of a neighbour is laid over each (Yun et al., CutMix, 2019). Everything random is drawn on the CPU,
    the same for every device.
    """
    changed = []
    half, quarter = len(images) // 2, len(images) // 4
    for place, image in enumerate(images):
        cropped = _crop(image, torch.rand(4, generator=generator).tolist())
        mirror, other_colours = torch.rand(2, generator=generator).tolist()
        gain, shift = torch.rand(2, len(image), 1, 1, generator=generator).to(image) * 2 - 1
        cropped = cropped.flip(-1) if mirror < 0.5 else cropped
        is_coloured = place >= half and other_colours < 0.5
        changed.append(cropped * (1 + COLOUR * gain) + COLOUR * shift if is_coloured else cropped)
    plain, mixed, covered = torch.stack(changed).tensor_split([half, half + quarter])
    share = torch.rand(len(mixed), 1, 1, 1, generator=generator).to(images)
    mixed = share * mixed + (1 - share) * mixed.roll(1, 0)
    neighbours, covered = covered.roll(1, 0), covered.clone()
    for image, neighbour in zip(covered, neighbours, strict=True):
        rows, columns = _window(image, torch.rand(4, generator=generator).tolist())
        image[:, rows, columns] = neighbour[:, rows, columns]
    return torch.cat([plain, mixed, covered])


def _crop(image: Tensor, drawn: Sequence[float]) -> Tensor:
    """A part of an image (C, H, W), as large as the whole."""
    rows, columns = _window(image, drawn)
    return F.interpolate(image[None, :, rows, columns], image.shape[1:], mode="bilinear", align_corners=False)[0]


def _window(image: Tensor, drawn: Sequence[float]) -> tuple[slice, slice]:
    """Rows and columns of a part of an image, by four numbers of 0..1: its sides, and where it is.

    A side is the root of a share of `SMALLEST_PART` to 1: of 16 rows and numbers 0.25, 0.5, 0.5, 0: √0.4 · 16 = 10 rows
    from row 3 on.
    """
    places = []
    for size, share, place in zip(image.shape[1:], drawn[:2], drawn[2:], strict=True):
        side = max(1, round(size * math.sqrt(SMALLEST_PART + share * (1 - SMALLEST_PART))))
        start = round(place * (size - side))
        places.append(slice(start, start + side))
    return places[0], places[1]


def _own_share(batch: Inputs) -> Inputs:
    """The items of a batch that this process works on; none, where there are fewer items than processes."""
    rank, size = distributed.rank(), distributed.world_size()
    return items_of(batch, slice(rank, None, size)) if size > 1 else batch


def _add_up(parameters: Sequence[nn.Parameter]) -> None:
    """Adds the gradients of all processes, in place, in one sum; a process without images has none."""
    if distributed.world_size() == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = distributed.all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


@contextlib.contextmanager
def _trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Inside, every floating-point parameter has gradients of its own; afterwards they are as before."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        yield parameters
    finally:
        for parameter, (required, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _channel_dim(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else 1
