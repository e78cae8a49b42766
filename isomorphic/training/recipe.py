"""The settings of a training run as plain values: a command fills them in, the engine reads them.

A field is named after the flag that sets it, so that a message about a value can name its flag; the field's default is
the flag's default, too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

import torch

from isomorphic.errors import UserError

OPTIMIZERS = ("sgd", "sgd_nesterov", "rmsprop", "adamw")
SCHEDULES = ("steplr", "multisteplr", "cosineannealinglr", "exponentiallr")
AUTO_AUGMENTS = ("ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn")  # and the strings that timm takes
# The policies of those strings, each with a pattern of the sections that may follow it after dashes. timm itself
# ignores or misreads other sections.
TIMM_POLICIES = {
    "rand": r"t(weights|3aw?)|(m|mmax)\d+|n([1-9]|1[0-4])|inc[01]|(p|mstd)\d+(\.\d+)?",
    "augmix": r"(m|d)\d+|w[1-9]\d*|b[01]|mstd\d+(\.\d+)?|a(?=[\d.]*[1-9])\d+(\.\d+)?",
    **dict.fromkeys(("v0", "v0r", "original", "originalr", "3a"), r"mstd\d+(\.\d+)?"),
}
ERASE_MODES = ("const", "pixel")
DISTILLATIONS = ("hard", "soft", "none")

# Settings that may change when a run is resumed, because none of them changes a weight.
FREE_SETTINGS = ("workers", "log_every", "checkpoint_interval", "checkpoint_steps", "checkpoint_hist", "static_graph")
# Settings that may change if an optimizer step still has the same number of images, over all processes.
LAYOUT_SETTINGS = ("batch_size", "accumulate")

T = TypeVar("T")


@dataclass(frozen=True)
class OptimizerRecipe:
    """The optimizer and its weight decays; a decay of None means `weight_decay`.

    `vector_weight_decay` applies to parameters of one dim (biases, norms, layer scales) to which none of the three
    decays before it applies. `layer_decay` multiplies the learning rate once for each layer between a parameter and
    the head.
    """

    opt: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    norm_weight_decay: float | None = None
    bias_weight_decay: float | None = None
    transformer_embedding_decay: float | None = None
    vector_weight_decay: float | None = None
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        _check_range(self, "momentum", 0, 1)
        for name in (field.name for field in dataclasses.fields(self) if field.name.endswith("decay")):
            if getattr(self, name) is not None:
                _check_range(self, name, 0, 1 if name == "layer_decay" else inf)
        if self.opt == "sgd_nesterov" and self.momentum == 0:
            raise UserError("--opt sgd_nesterov needs a --momentum above 0")


@dataclass(frozen=True)
class ScheduleRecipe:
    """The learning rate over the epochs (see `optim.learning_rate`); `lr_milestones` are those of "multisteplr"."""

    lr: float = 0.1
    epochs: int = 90
    lr_scheduler: str = "steplr"
    lr_warmup_epochs: int = 0
    lr_warmup_method: str = "constant"
    lr_warmup_decay: float = 0.01
    lr_step_size: int = 30
    lr_gamma: float = 0.1
    lr_min: float = 0.0
    lr_milestones: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("lr", "lr_warmup_decay", "lr_gamma", "lr_min"):
            _check_range(self, name, 0, inf)
        if self.lr_warmup_epochs >= self.epochs and self.lr_warmup_epochs:
            raise UserError(
                f"--lr-warmup-epochs {self.lr_warmup_epochs} leaves nothing of --epochs {self.epochs}: warm up for less"
            )
        _check_milestones(self.lr_scheduler, self.lr_milestones)


@dataclass(frozen=True)
class AugmentRecipe:
    """The augmentation of training images.

    `scale` and `ratio` are the ranges of a random crop's share of the image's area and of its aspect ratio. A
    `crop_padding` takes their place: crops are as large as the image, out of the image with so many black pixels on
    each side, as is usual for CIFAR. `hflip` and `random_erase` are probabilities. `auto_augment` is one of
    `AUTO_AUGMENTS`, a string of timm's such as "rand-m9-mstd0.5-inc1", or None. `color_jitter` is the strength in
    brightness, contrast and saturation; beside a policy it has no effect (as in timm, unless the policy's string has
    "3a"). An erased rectangle becomes the mean colour ("const") or noise ("pixel"). An alpha of 0 turns mixup or cutmix
    off. A `train_interpolation` of None is that of the evaluation transform; "random" draws bilinear or bicubic for
    each image.
    """

    train_crop_size: int = 224
    train_interpolation: str | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int | None = None
    hflip: float = 0.5
    auto_augment: str | None = None
    ra_magnitude: int = 9
    augmix_severity: int = 3
    color_jitter: float = 0.0
    random_erase: float = 0.0
    random_erase_mode: str = "const"
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("hflip", "random_erase"):
            _check_range(self, name, 0, 1)
        for name in ("mixup_alpha", "cutmix_alpha", "color_jitter"):
            _check_range(self, name, 0, inf)
        if self.auto_augment is not None and self.auto_augment not in AUTO_AUGMENTS:
            _check_timm_policy(self.auto_augment)
        _check_range(self, "ra_magnitude", 0, 30)
        _check_range(self, "augmix_severity", 1, 10)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UserError(f"--scale {self.scale[0]} {self.scale[1]}: needs 0 < LOW <= HIGH <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < inf:
            raise UserError(f"--ratio {self.ratio[0]} {self.ratio[1]}: needs 0 < LOW <= HIGH")
        if self.crop_padding is not None:
            _check_crop_padding(self)


@dataclass(frozen=True)
class LossRecipe:
    """The training loss (see `losses`); the distillation fields matter only with a teacher."""

    label_smoothing: float = 0.0
    distillation: str = "none"
    distillation_alpha: float = 0.5
    distillation_tau: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self, "label_smoothing", 0, 1)
        _check_range(self, "distillation_alpha", 0, 1)
        if not 0 < self.distillation_tau < inf:
            raise UserError(f"--distillation-tau {self.distillation_tau}: a temperature is positive")


@dataclass(frozen=True)
class LoaderRecipe:
    """Loading of training images: `batch_size` and `workers` are per process; `ra_reps` of 1 repeats no image."""

    batch_size: int = 32
    workers: int = 8
    ra_reps: int = 1
    seed: int = 0


@dataclass(frozen=True)
class EmaRecipe:
    """The moving average of the weights, updated every `model_ema_steps` steps with decay `model_ema_decay`."""

    model_ema: bool = False
    model_ema_decay: float = 0.99998
    model_ema_steps: int = 32

    def __post_init__(self) -> None:
        _check_range(self, "model_ema_decay", 0, 1)


@dataclass(frozen=True)
class NetworkRecipe:
    """How the model runs: memory format, compilation, and parallel training.

    `sync_bn` computes the statistics of batch norms over the batches of all processes. `fsdp` shards parameters,
    gradients and optimizer states over the processes. `static_graph` tells DDP that every step uses the same
    parameters.
    """

    channels_last: bool = False
    compile: bool = False
    sync_bn: bool = False
    fsdp: bool = False
    static_graph: bool = False

    def __post_init__(self) -> None:
        if self.fsdp and (self.sync_bn or self.compile or self.channels_last):
            raise UserError("--fsdp goes with none of --sync-bn, --compile and --channels-last")


@dataclass(frozen=True)
class LoopRecipe:
    """The length of training, the optimizer step, logging and checkpoints.

    `max_steps` (None: no limit) counts optimizer steps over all epochs. A step adds up the gradients of `accumulate`
    batches. An `amp_dtype` of None is fp32. Losses are checked every `log_every` steps and at the end of an epoch. The
    training state is written every `checkpoint_interval` epochs and every `checkpoint_steps` steps (None: never
    within an epoch), and the last `checkpoint_hist` states are kept.
    """

    epochs: int = ScheduleRecipe.epochs
    max_steps: int | None = None
    accumulate: int = 1
    clip_grad_norm: float | None = None
    amp_dtype: torch.dtype | None = None
    log_every: int = 50
    checkpoint_interval: int = 1
    checkpoint_steps: int | None = None
    checkpoint_hist: int = 2

    def __post_init__(self) -> None:
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise UserError(f"--clip-grad-norm {self.clip_grad_norm}: a norm to clip at is positive")


PARTS: tuple[type[Any], ...] = (  # in the order of the fields of `Recipe`
    OptimizerRecipe,
    ScheduleRecipe,
    AugmentRecipe,
    LossRecipe,
    LoaderRecipe,
    EmaRecipe,
    NetworkRecipe,
    LoopRecipe,
)


def default_values() -> dict[str, Any]:
    """Returns the default of every field of every part, by the field's name."""
    return {field.name: field.default for part in PARTS for field in dataclasses.fields(part)}


@dataclass(frozen=True)
class Recipe:
    """All settings of a run, in parts."""

    optimizer: OptimizerRecipe
    schedule: ScheduleRecipe
    augment: AugmentRecipe
    loss: LossRecipe
    loader: LoaderRecipe
    ema: EmaRecipe
    network: NetworkRecipe
    loop: LoopRecipe

    def __post_init__(self) -> None:
        if self.network.static_graph and self.loop.accumulate > 1:
            raise UserError("--static-graph does not go with --accumulate above 1")

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Recipe:
        """Returns the recipe of one flat mapping that holds every field of every part."""
        return cls(*(_pick(part, values) for part in PARTS))

    def settings(self) -> dict[str, Any]:
        """Returns, flat, every value that can change a weight: a resumed run must have the same ones."""
        parts = (getattr(self, part.name) for part in dataclasses.fields(self))
        free = (*FREE_SETTINGS, *LAYOUT_SETTINGS)
        flat = {name: value for part in parts for name, value in vars(part).items() if name not in free}
        return flat | {"amp_dtype": str(self.loop.amp_dtype)}


def _pick(cls: type[T], values: Mapping[str, Any]) -> T:
    return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _check_range(recipe: Any, name: str, low: float, high: float) -> None:
    value = getattr(recipe, name)
    if not low <= value <= high or value == inf:
        upper = f" and at most {high}" if high < inf else ""
        raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {low}{upper}")


def _check_milestones(scheduler: str, milestones: tuple[int, ...]) -> None:
    if scheduler == "multisteplr" and not milestones:
        raise UserError("--lr-scheduler multisteplr drops at --lr-milestones: name the epochs, such as 120 150 180")
    if scheduler != "multisteplr" and milestones:
        raise UserError(f"--lr-milestones belongs to --lr-scheduler multisteplr, and this is {scheduler}")
    if list(milestones) != sorted(set(milestones)):
        raise UserError(f"--lr-milestones {' '.join(map(str, milestones))}: needs epochs in ascending order")


def _check_crop_padding(recipe: AugmentRecipe) -> None:
    if (recipe.scale, recipe.ratio) != (AugmentRecipe.scale, AugmentRecipe.ratio):
        raise UserError("--crop-padding takes the place of a resized crop: leave out --scale and --ratio")
    if recipe.train_interpolation == "random":
        raise UserError("--crop-padding does not resize at random: leave out --train-interpolation random")
    if recipe.crop_padding is None or recipe.crop_padding < 0:
        raise UserError(f"--crop-padding {recipe.crop_padding}: must be at least 0")


def _check_timm_policy(text: str) -> None:
    name, *sections = text.split("-")
    if name not in TIMM_POLICIES:
        known = ", ".join((*AUTO_AUGMENTS, *TIMM_POLICIES))
        raise UserError(f"--auto-augment {text}: unknown policy {name!r}: choose one of {known}")
    for section in sections:
        if not re.fullmatch(TIMM_POLICIES[name], section):
            raise UserError(
                f"--auto-augment {text}: timm's {name!r} has no section {section!r}: "
                "write a string such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original-mstd0.5"
            )
