"""Models that evaluate.py times in turns, and what each took."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isomorphic.measure.complexity import count_complexity
from isomorphic.measure.execution import ExecutionMode
from isomorphic.measure.fvcore_counter import count_fvcore
from isomorphic.measure.latency import Gain, InTurns, Latency, measure_in_turns
from isomorphic.measure.results import complexity_results
from isomorphic.models import ModelSpec, example_inputs

DENSE, MODEL = "--against", "--model"  # names of what is timed; a copy's is its --round-to


@dataclass(frozen=True)
class Subject:
    """A model to time: one image for it, and its MACs by the counter of the results."""

    model: nn.Module
    image: Tensor
    macs: float


@dataclass(frozen=True)
class Timed:
    """What models took in turns, and their MACs, by name."""

    found: InTurns
    macs: Mapping[str, float]

    def latency(self, name: str) -> Latency:
        """Returns what one model took."""
        return self.found.latencies[name]

    def gain(self, name: str, over: str) -> Gain:
        """Returns what one model gains over another."""
        return Gain(self.found.speedup(name, over), self.macs[over] / self.macs[name])


def subject_of(args: argparse.Namespace, model: nn.Module, spec: ModelSpec, device: torch.device) -> Subject:
    """Returns a model with an image of the size that it takes, and its MACs."""
    return counted(args, model, example_inputs(spec, device))


def counted(args: argparse.Namespace, model: nn.Module, image: Tensor) -> Subject:
    """Returns a model and an image for it with its MACs by the counter of the results."""
    fvcore = count_fvcore(model, image) if args.macs_counter == "fvcore" else None
    return Subject(model, image, complexity_results(count_complexity(model, image), args.macs_counter, fvcore)["macs"])


def take_turns(subjects: Mapping[str, Subject], batch_size: int, mode: ExecutionMode) -> Timed:
    """Times several models in turns, on batches of one size."""
    models = {name: (subject.model, subject.image) for name, subject in subjects.items()}
    macs = {name: subject.macs for name, subject in subjects.items()}
    return Timed(measure_in_turns(models, batch_size, mode=mode), macs)
