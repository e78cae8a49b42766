"""Graph networks of PyTorch Geometric, and its networks for points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from studies.coverage.example import Example
from studies.coverage.people.entry import Entry, entry, library

NODES, EDGES = 24, 80


def _graph() -> dict[str, Tensor]:
    return {"x": torch.randn(NODES, 8), "edge_index": torch.randint(NODES, (2, EDGES))}


def _basic(name: str, kind: str, heads: int = 0, **options: Any) -> Entry:
    """A network of several equal layers."""

    def example() -> Example:
        pyg = library("torch_geometric.nn")

        sizes = {"in_channels": 8, "hidden_channels": 32, "num_layers": 3, "out_channels": 5}
        return Example(getattr(pyg, kind)(**sizes, **options), _graph(), heads=heads)

    return entry("pyg", name, example)


class Stack(nn.Module):
    """Three convolutions on a graph with ELU between, as its users write them."""

    def __init__(self, make: Callable[[int, int, int], nn.Module], heads: int = 1) -> None:
        super().__init__()
        widths = ((8, 16, heads), (16 * heads, 16, heads), (16 * heads, 5, 1))
        self.layers = nn.ModuleList(make(*width) for width in widths)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for position, layer in enumerate(self.layers):
            x = layer(x, edge_index)
            x = x.relu() if position < 2 else x
        return x


def _stack(name: str, kind: str, heads: int = 1, **options: Any) -> Entry:
    """Three convolutions of one kind, with heads side by side if there are several."""

    def example() -> Example:
        pyg = library("torch_geometric.nn")

        convolution = getattr(pyg, kind)

        def make(inputs: int, outputs: int, number: int) -> nn.Module:
            several = {"heads": number} if heads > 1 else {}
            return convolution(inputs, outputs, **several, **options)

        return Example(Stack(make, heads), _graph(), heads=2 * heads if heads > 1 else 0)

    return entry("pyg", name, example)


class Points(nn.Module):
    """PointNet on given neighbours, pooled over the cloud."""

    def __init__(self) -> None:
        super().__init__()
        pyg = library("torch_geometric.nn")

        self.first = pyg.PointNetConv(pyg.MLP([3, 16, 32]), pyg.MLP([32, 32]))
        self.second = pyg.PointNetConv(pyg.MLP([35, 32, 64]), pyg.MLP([64, 64]))
        self.classifier = pyg.MLP([64, 32, 10], norm=None)
        self.pool = pyg.global_max_pool

    def forward(self, pos: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        x = self.first(None, pos, edge_index)
        x = self.second(x.relu(), pos, edge_index)
        return self.classifier(self.pool(x, batch, 2))


def _points() -> Example:
    inputs = {"pos": torch.randn(NODES, 3), "edge_index": torch.randint(NODES, (2, EDGES))}
    return Example(Points(), {**inputs, "batch": torch.arange(NODES) // (NODES // 2)}, heads=0)


class Edges(nn.Module):
    """Edge convolutions with a graph's mean at the end."""

    def __init__(self) -> None:
        super().__init__()
        pyg = library("torch_geometric.nn")

        self.first = pyg.EdgeConv(pyg.MLP([16, 32, 32]), aggr="max")
        self.second = pyg.EdgeConv(pyg.MLP([64, 32]), aggr="max")
        self.out = nn.Linear(64, 5)
        self.pool = pyg.global_mean_pool

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        first = self.first(x, edge_index)
        second = self.second(first, edge_index)
        return self.out(self.pool(torch.cat([first, second], dim=1), batch, 2))


def _edges() -> Example:
    return Example(Edges(), {**_graph(), "batch": torch.arange(NODES) // (NODES // 2)}, heads=0)


def _gps() -> Example:
    pyg = library("torch_geometric.nn")

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 32)
            self.layers = nn.ModuleList(pyg.GPSConv(32, pyg.GCNConv(32, 32), heads=4) for _ in range(2))
            self.out = nn.Linear(32, 5)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            x = self.embed(x)
            for layer in self.layers:
                x = layer(x, edge_index)
            return self.out(x)

    return Example(Graph(), _graph())


ENTRIES = [
    _basic("gcn", "GCN"),
    _basic("gcn-jumping", "GCN", jk="cat", norm="batch_norm"),
    _basic("gat", "GAT", heads=6),
    _basic("graphsage", "GraphSAGE"),
    _basic("gin", "GIN"),
    _basic("pna", "PNA", aggregators=["mean", "max", "std"], scalers=["identity", "amplification"],
           deg=torch.bincount(torch.randint(1, 8, (NODES,), generator=torch.Generator().manual_seed(0)))),
    _basic("edge-cnn", "EdgeCNN"),
    _stack("gat-conv", "GATConv", heads=4),
    _stack("gatv2-conv", "GATv2Conv", heads=4),
    _stack("transformer-conv", "TransformerConv", heads=4),
    _stack("sage-conv-max", "SAGEConv", aggr="max"),
    _stack("graph-conv", "GraphConv"),
    _stack("cheb-conv", "ChebConv", K=3),
    _stack("tag-conv", "TAGConv", K=2),
    _stack("arma-conv", "ARMAConv"),
    _stack("gen-conv", "GENConv"),
    entry("pyg", "point-net", _points),
    entry("pyg", "edge-conv", _edges),
    entry("pyg", "gps", _gps),
]  # fmt: skip
