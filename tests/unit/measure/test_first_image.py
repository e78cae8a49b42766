"""What is one image of a model's inputs, and what is counted as it is given: lists, graphs, matrices of neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isomorphic.errors import UserError
from isomorphic.measure.complexity import Complexity, count_complexity
from isomorphic.measure.first_image import first_image
from isomorphic.measure.fvcore_counter import count_fvcore
from isomorphic.measure.latency import measure_latency


class Stacked(nn.Module):
    """Takes a list of images (3, H, W), as detectors do, and targets as many."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Tensor:
        return self.head(self.stem(torch.stack(images)).relu())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_images_of_a_list_are_counted_one_by_one(count: int):
    images = [torch.rand(3, 4, 4) for _ in range(count)]
    targets = [{"boxes": torch.rand(number, 4)} for number in range(count)]
    for inputs in ((images,), (images, targets), {"images": images, "targets": targets}):
        first: Any = first_image(inputs)
        found = first["images"] if isinstance(first, dict) else first[0]
        assert len(found) == 1 and found[0] is images[0] and found[0].shape == (3, 4, 4)
        assert count_complexity(Stacked(), inputs).macs_paper == 16 * (3 * 16 + 16 + 16 * 4 + 4)
    assert len(first_image((images,), copies=4)[0]) == 4  # type: ignore[index]


class GraphNet(nn.Module):
    """Messages (E, C) of the edges' sources, added up at their targets, between two linear layers on the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.edge, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.embed(x).relu()
        source, target = edge_index
        x = torch.zeros_like(x).index_add(0, target, self.edge(x[source]))
        return self.out(x)


class OnAdjacency(nn.Module):
    """A graph as a matrix, its own or one that comes with the nodes."""

    def __init__(self, nodes: int, own: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4, bias=False)
        self.adjacency = torch.eye(nodes) if own else None

    def forward(self, x: Tensor, adjacency: Tensor | None = None) -> Tensor:
        return (self.adjacency if adjacency is None else adjacency) @ self.layer(x)


def graph(nodes: int = 24, edges: int = 80) -> dict[str, Tensor]:
    return {"x": torch.randn(nodes, 8), "edge_index": torch.arange(2 * edges).reshape(2, edges) % nodes}


def test_a_graph_is_counted_whole():
    counted = count_complexity(GraphNet(), graph())
    products = 24 * 8 * 16 + 80 * 16 * 16 + 24 * 16 * 5
    assert counted == Complexity(
        products + 16 + 16 + 5,  # the relu is called as a function
        products + 24 * 16 + 16 + 16 + 5,
        8 * 16 + 16 + 16 * 16 + 16 + 16 * 5 + 5,
        as_given=True,
    )
    assert counted.figures() == {**vars(counted), "as_given": True}
    assert count_fvcore(GraphNet(), graph()).macs == products


@pytest.mark.parametrize("own", [False, True])
def test_an_adjacency_matrix_makes_one_item_of_its_nodes(own: bool):
    nodes = torch.randn(6, 8)
    inputs = (nodes,) if own else (nodes, torch.eye(6))
    counted = count_complexity(OnAdjacency(6, own), inputs)
    assert (counted.macs_exact, counted.as_given) == (6 * 8 * 4 + 6 * 6 * 4, True)


def test_tensors_that_stay_whole_beside_a_batch_do_not_make_it_one_item():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.out = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 3, bias=False)

        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            return self.out(self.words(ids) + self.places(positions))

    counted = count_complexity(Positions(), (torch.zeros(4, 5, dtype=torch.long), torch.arange(5)))
    assert counted.macs_exact == 5 * 4 * 3
    assert counted.figures() == {"macs_paper": 60, "macs_exact": 60, "params": 36 + 20 + 12}


def test_what_no_item_runs_on_raises_what_the_model_raises():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_complexity(GraphNet(), {"x": torch.randn(24, 7), "edge_index": torch.zeros(2, 8, dtype=torch.long)})


def test_a_graphs_latency_is_that_of_the_whole():
    latency = measure_latency(GraphNet(), graph(2, 3))
    assert latency.batch_size == 1
    with pytest.raises(UserError, match="no batch of 4"):
        measure_latency(GraphNet(), graph(2, 3), batch_size=4)
