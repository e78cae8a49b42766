"""Rotation: what a model is cut of are the weakest directions of a group rather than units, wherever nothing can tell.

Three kinds of groups may be written in another basis without a change of the function: streams that linear layers alone
write and read (`linear_streams.py`), streams that are read behind layer norms (`normed_streams.py`), and the dims of
attention heads (`head_rotation.py`). A basis of principal directions puts what matters least into units of its own.

That happens in the dense model, where the kept units are, and the ordinary cut takes the others away. Whether the basis
may change is tried on each group, by a random one: the model's outputs have to stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from isomorphic.inputs import Inputs, call, floats_in, items_of
from isomorphic.observe import eval_mode
from isomorphic.progress import steps
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery.channel_maps import ChannelMap
from isomorphic.pruning.recovery.fusion import Fusion
from isomorphic.pruning.recovery.head_rotation import HeadMoments, find_head_dims, turn_heads
from isomorphic.pruning.recovery.linear_streams import turn_linear_streams
from isomorphic.pruning.recovery.mixed_layers import MixedLayers, mixed_layers
from isomorphic.pruning.recovery.mixing import UnitMoments, mix_units, observe_all
from isomorphic.pruning.recovery.normed_streams import (
    NormedStream,
    Rewritten,
    find_normed_stream,
    normed_directions,
    rewrite,
    touched_tensors,
)
from isomorphic.pruning.recovery.principal import are_alike, put_back, random_turn
from isomorphic.pruning.recovery.watching import tied_parameters


@dataclass(frozen=True)
class Rotation:
    """Which groups were turned.

    Attributes:
        linear: A (m, n) of the linear streams that were, by the group's name, and why other groups were not.
        normed: A (m, n) of the streams behind norms that were.
        heads: the groups whose head dims were.
        outputs, inputs: what layers around the last two make and read, of what the dense ones do.
    """

    linear: Fusion
    normed: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Sequence[str] = ()
    outputs: Mapping[str, ChannelMap] = field(default_factory=dict)
    inputs: Mapping[str, ChannelMap] = field(default_factory=dict)

    @property
    def groups(self) -> list[str]:
        """Names of all that were turned."""
        return [*self.linear.merged, *self.normed, *self.heads]

    def mixed(self, dense: nn.Module, turned: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> MixedLayers:
        """Returns what all layers around turned groups make and read; see `mixed_layers`."""
        linear = mixed_layers(dense, turned, graph, plan, self.linear)
        return MixedLayers({**linear.outputs, **self.outputs}, {**linear.inputs, **self.inputs})


@torch.no_grad()
def rotate(model: nn.Module, graph: ChannelGraph, plan: PruningPlan, inputs: Inputs, images: Inputs) -> Rotation:
    """Mixes the units of groups that lose some, in place: `cut` then leaves their strongest directions.

    Args:
        model: the dense model that was traced, with its data.
        graph: its groups.
        plan: how many units of each group stay; their places take the directions.
        inputs: what the model runs on.
        images: this process's calibration images.

    Raises:
        UserError: the plan belongs to another model.
    """
    plan.check(graph)
    turned = _rotate_transformer(model, graph, plan, inputs, images)
    return replace(turned, linear=turn_linear_streams(model, graph, plan, inputs, images, beside=turned.groups))


def _rotate_transformer(
    model: nn.Module, graph: ChannelGraph, plan: PruningPlan, inputs: Inputs, images: Inputs
) -> Rotation:
    """Turns streams behind layer norms and the dims of heads; see `normed_streams.py` and `head_rotation.py`."""
    normed: dict[str, Tensor] = {}
    made: dict[str, ChannelMap] = {}
    read: dict[str, ChannelMap] = {}
    with eval_mode(model):
        streams = _find_normed(model, graph, plan, inputs)
        heads = find_head_dims(model, graph, plan, items_of(images, slice(1)))
        moments = UnitMoments([member for _, stream, _ in streams for member in stream.readers])
        of_heads = HeadMoments(heads)
        observe_all(model, images, [*([moments] if streams else []), *([of_heads] if heads else [])])
    with steps("rotating", len(heads) + len(streams), unit="group") as bar:
        for one in heads:
            made[one.layer], given = turn_heads(model, one, of_heads)
            read.update({one.reader: given} if given else {})
            bar.update()
        for group, stream, rewritten in streams:
            kept = plan.kept[group.name]
            moment = torch.stack([moments.read(member) for member in stream.readers]).mean(0)
            forth, gain = normed_directions(moment, len(kept), is_centred=stream.is_centred)
            mix_units(model, group, stream.members, torch.tensor(kept), forth, gain * forth.T)
            normed[group.name] = forth.cpu()
            made.update(rewritten.made(stream, forth.cpu(), kept))
            read.update(rewritten.read(stream, forth.cpu() / gain, kept))
            bar.update()
    return Rotation(Fusion({}, {}, {}), normed, [one.group for one in heads], made, read)


def _find_normed(
    model: nn.Module, graph: ChannelGraph, plan: PruningPlan, inputs: Inputs
) -> list[tuple[CoupledGroup, NormedStream, Rewritten]]:
    """The streams behind norms that lose channels and can be turned, already rewritten, in place."""
    tied = tied_parameters(model)
    found = []
    for group in graph.groups:
        if plan.removed(group) and len(plan.kept[group.name]) > 1:
            stream = find_normed_stream(model, group, inputs, tied)
            rewritten = _try_to_turn(model, group, stream, inputs) if stream else None
            if stream and rewritten:
                found.append((group, stream, rewritten))
    return found


def _try_to_turn(model: nn.Module, group: CoupledGroup, stream: NormedStream, inputs: Inputs) -> Rewritten | None:
    """Rewrites a stream and tries a random turn: what was rewritten, if the outputs stay, else None and nothing is."""
    touched = touched_tensors(model, stream)
    as_given = [tensor.detach().clone() for tensor in touched]
    expected = floats_in(call(model, inputs))
    rewritten, turns = rewrite(model, stream), False
    if rewritten:
        ready = [tensor.detach().clone() for tensor in touched]
        turn = random_turn(group.num_units, keeps_ones=stream.is_centred)
        mix_units(model, group, stream.members, torch.arange(group.num_units), turn, turn.T)
        turns = are_alike(floats_in(call(model, inputs)), expected)
        put_back(touched, ready)
    if not turns:
        put_back(touched, as_given)
    return rewritten if turns else None
