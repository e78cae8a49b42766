"""The model card of a checkpoint: what it was, what was cut, figures, how to repeat it, whose licence holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from isomorphic.checkpoints.structure import tensor_shapes
from isomorphic.kinds import library
from isomorphic.measure.complexity import Complexity, count_complexity, format_macs, format_params
from isomorphic.models import ModelSpec, build_skeleton, example_inputs

PROJECT = "isomorphic-pruning"
MARK = f"written by {PROJECT}"  # in every .onnx and .pt2, so that a later run knows it for one
# Figures that a checkpoint's provenance may hold, with the words for them.
FIGURES = {
    "dense_top1": "top-1 before pruning, in percent",
    "top1": "top-1, in percent",
    "top5": "top-5, in percent",
    "loss": "loss",
    "epoch": "epoch",
    "latency_ms": "latency of a batch, in ms",
}
MOST_LAYERS = 12  # of the table of widths; the others are counted


@dataclass(frozen=True)
class Sizes:
    """What a model had before it was cut, and what it has now.

    Attributes:
        before, after: MACs and params.
        shapes: weights whose shape has changed, as (name, before, after).
        weights: number of all weights.
    """

    before: Complexity
    after: Complexity
    shapes: Sequence[tuple[str, Sequence[int], Sequence[int]]]
    weights: int


def compare_sizes(model: nn.Module, spec: ModelSpec) -> Sizes:
    """Returns the sizes of a model and of the dense one that its spec builds."""
    whole = build_skeleton(dataclasses.replace(spec, kept_blocks={}))
    dense, device = build_skeleton(spec), next(whole.parameters()).device
    before = count_complexity(whole, example_inputs(spec, device))
    after = count_complexity(model, example_inputs(spec))
    was, now = tensor_shapes(dense), tensor_shapes(model)
    weights = [name for name, parameter in model.named_parameters() if parameter.dim() > 1]
    shapes = [(name, was[name], now[name]) for name in weights if name in was and was[name] != now[name]]
    return Sizes(before, after, shapes, len(weights))


def model_card(header: Mapping[str, Any], title: str, repository: str, sizes: Sizes | None) -> str:
    """Returns the text of a README.md, with the hub's metadata on its first lines.

    Args:
        header: of the checkpoint, see `checkpoints/structure.py`.
        title: the model's name.
        repository: "USER/NAME" for the lines of code that load it.
        sizes: of a model that can be built.
    """
    lines = ["---", *_metadata(header), "---", "", f"# {title}", "", _origin(header), ""]
    lines += ["## What was cut", "", *_cut(header, sizes), ""]
    lines += ["## Figures", "", *_figures(header), ""]
    lines += ["## Use", "", *_use(header, repository), ""]
    lines += ["## Repeat", "", *_repeat(header.get("provenance", {})), ""]
    lines += ["## Licence", "", licence(header)[1], ""]
    return "\n".join(lines)


def licence(header: Mapping[str, Any]) -> tuple[str | None, str]:
    """Returns the licence of the weights where it is known, in the hub's spelling, and a sentence about it."""
    builder, name = header["builder"], header["name"]
    config = library("timm").get_pretrained_cfg(name) if builder == "timm" else None
    stated = config.license if config else None
    if builder not in ("timm", "torchvision"):
        return None, "The model is its user's own: whoever publishes it says under which licence."
    if not stated:
        return None, f"{builder} states no licence for the weights of `{name}`: look where they come from."
    arguments = header.get("provenance", {}).get("arguments", {})
    if arguments.get("no_pretrained"):
        return None, f"The weights were trained from scratch, not made from those of `{name}` ({stated})."
    if arguments.get("model") == name:
        return stated, f"Made from {builder}'s weights of `{name}`, which are published under {stated}."
    return None, (
        f"{builder} publishes weights of `{name}` under {stated}. The checkpoint does not say whether it was made from "
        "these; if it was, that licence holds."
    )


def _metadata(header: Mapping[str, Any]) -> Iterator[str]:
    known, _ = licence(header)
    if known:
        yield f"license: {known}"
        yield f"base_model: {library('timm').get_pretrained_cfg(header['name']).hf_hub_id}"
    yield f"library_name: {PROJECT}"
    if header["builder"] in ("timm", "torchvision"):
        yield "pipeline_tag: image-classification"
    yield f"tags: [pruning, {PROJECT}]"


def _origin(header: Mapping[str, Any]) -> str:
    kwargs = ", ".join(f"{key}={value!r}" for key, value in header["kwargs"].items())
    builder = {"none": "a model of its user's", "file": "a model of its user's file"}.get(header["builder"])
    made = f"{builder}, `{header['name']}`" if builder else f"`{header['name']}` of {header['builder']}"
    size = header["preprocessing"]["input_size"]
    images = "" if header["builder"] == "none" else f", for images of {size}×{size} pixels"
    return f"Made with {PROJECT} from {made}{kwargs and f' with `{kwargs}`'}{images}."


def _cut(header: Mapping[str, Any], sizes: Sizes | None) -> Iterator[str]:
    for module, kept in header.get("kept_blocks", {}).items():
        yield f"Of the blocks of `{module}`, these remain: {', '.join(map(str, kept))}."
        yield ""
    masked = header["structure"].get("masked", [])
    if masked:
        yield f"{len(masked)} tensors have weights at zero, which stay so in training."
        yield ""
    if sizes is None:
        yield "The file holds the shapes of the dense model, which its user builds."
        return
    before, after = sizes.before, sizes.after
    yield "| | dense | this model |"
    yield "|---|---|---|"
    yield f"| MACs (paper's counter) | {format_macs(before.macs_paper)} | {format_macs(after.macs_paper)} |"
    yield f"| MACs (exact) | {format_macs(before.macs_exact)} | {format_macs(after.macs_exact)} |"
    yield f"| params | {format_params(before.params)} | {format_params(after.params)} |"
    yield ""
    if not sizes.shapes:
        yield "No layer is narrower than in the dense model."
        return
    yield f"{len(sizes.shapes)} of {sizes.weights} weights are smaller:"
    yield ""
    yield "| weight | dense | this model |"
    yield "|---|---|---|"
    for name, was, now in sizes.shapes[:MOST_LAYERS]:
        yield f"| `{name}` | {_times(was)} | {_times(now)} |"
    if len(sizes.shapes) > MOST_LAYERS:
        yield f"| and {len(sizes.shapes) - MOST_LAYERS} more | | |"


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _figures(header: Mapping[str, Any]) -> Iterator[str]:
    provenance = header.get("provenance", {})
    found = {words: provenance[key] for key, words in FIGURES.items() if isinstance(provenance.get(key), (int, float))}
    if not found:
        yield "The checkpoint holds no accuracy: measure it before you rely on it."
        return
    yield "| | |"
    yield "|---|---|"
    for words, value in found.items():
        yield f"| {words} | {value:.6g} |"
    data = provenance.get("arguments", {}).get("dataset")
    yield ""
    yield f"Measured by the run below{f' on {data}' if data else ''}."


def _use(header: Mapping[str, Any], repository: str) -> Iterator[str]:
    more = {"none": ", model=build()", "file": f', builder_file="{header["name"].partition(":")[0]}"'}
    yield "```python"
    yield "import isomorphic as iso"
    yield ""
    yield f'model = iso.load_model("hf-hub:{repository}"{more.get(header["builder"], "")})'
    yield "```"
    if header["builder"] != "none":
        p = header["preprocessing"]
        yield ""
        yield (
            f"Images: shorter side to {p['resize_size']} pixels ({p['interpolation']}), centre crop of "
            f"{p['input_size']}, mean {tuple(p['mean'])}, standard deviation {tuple(p['std'])}."
        )


def _repeat(provenance: Mapping[str, Any]) -> Iterator[str]:
    if not provenance.get("command"):
        yield "The checkpoint does not say which command made it."
        return
    yield "```"
    yield str(provenance["command"])
    yield "```"
    versions = ", ".join(f"{name} {version}" for name, version in provenance.get("versions", {}).items() if version)
    hardware = provenance.get("hardware", {})
    machine = ", ".join(map(str, filter(None, [hardware.get("cpu"), *(hardware.get("gpus") or [])])))
    told = {"Commit": provenance.get("commit"), "Versions": versions, "Hardware": machine}
    told |= {
        "SHA-256 of what it was made from": provenance.get("parent"),
        "SHA-256 of its teacher": provenance.get("teacher"),
    }
    for words, value in told.items():
        if value:
            yield ""
            yield f"{words}: {value}"
