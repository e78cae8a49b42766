#!/usr/bin/env python3
"""Prunes a graph attention network that classifies the nodes of one graph.

    python examples/gat_graph.py --pruning-ratio 0.5

The graph is a stochastic block model: nodes of one community are linked more often than others, and a node's features
say little about its community. 20% of the nodes are labelled; the network must find the others' communities.

Features lie in heads × head dims, and a unit is one dim of all the heads of a layer. The nodes are an axis of the
adjacency matrix, which is a buffer of the model and stays as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import workflow
from torch import Tensor, nn

from isomorphic.commands import entry

NUM_COMMUNITIES, COMMUNITY_SIZE, NUM_FEATURES = 6, 80, 24
LINKS_WITHIN, LINKS_ACROSS = 0.08, 0.02  # probabilities
LABELLED = 0.2


class GraphAttention(nn.Module):
    """Multi-head attention of each node to its neighbours (Veličković et al., ICLR 2018), with a dense mask."""

    def __init__(self, in_features: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.project = nn.Linear(in_features, num_heads * head_dim, bias=False)
        self.to_source = nn.Parameter(torch.randn(num_heads, head_dim) / head_dim**0.5)
        self.to_target = nn.Parameter(torch.randn(num_heads, head_dim) / head_dim**0.5)
        self.bias = nn.Parameter(torch.zeros(num_heads * head_dim))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """(B, nodes, in_features), (nodes, nodes) -> (B, nodes, num_heads · head_dim)."""
        batch, nodes, _ = x.shape
        features = self.project(x).view(batch, nodes, self.num_heads, self.head_dim)
        source = (features * self.to_source).sum(dim=-1).transpose(1, 2)  # (B, heads, nodes)
        target = (features * self.to_target).sum(dim=-1).transpose(1, 2)
        scores = F.leaky_relu(target.unsqueeze(-1) + source.unsqueeze(-2), 0.2)  # (B, heads, nodes, nodes)
        attention = scores.masked_fill(adjacency == 0, float("-inf")).softmax(dim=-1)
        out = attention @ features.transpose(1, 2)  # (B, heads, nodes, head dim)
        return out.transpose(1, 2).reshape(batch, nodes, self.num_heads * self.head_dim) + self.bias


class GAT(nn.Module):
    """Layers of graph attention and a linear classifier of each node.

    Args:
        adjacency: (nodes, nodes), 1 where a node attends to another; every node has a neighbour.
    """

    def __init__(
        self,
        adjacency: Tensor,
        in_features: int = NUM_FEATURES,
        num_classes: int = NUM_COMMUNITIES,
        *,
        num_layers: int = 2,
        num_heads: int = 4,
        head_dim: int = 16,
    ) -> None:
        super().__init__()
        widths = [in_features] + [num_heads * head_dim] * num_layers
        self.layers = nn.ModuleList(GraphAttention(width, num_heads, head_dim) for width in widths[:-1])
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(widths[-1], num_classes)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor) -> Tensor:
        """(B, nodes, features) -> (B, classes, nodes) logits."""
        for layer in self.layers:
            x = F.elu(layer(self.dropout(x), self.adjacency))
        return self.head(x).transpose(1, 2)


def make_graph(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Adjacency with self-links (nodes, nodes), features (1, nodes, NUM_FEATURES) and communities (1, nodes)."""
    communities = torch.arange(NUM_COMMUNITIES).repeat_interleave(COMMUNITY_SIZE)
    nodes = len(communities)
    chance = torch.where(communities == communities[:, None], LINKS_WITHIN, LINKS_ACROSS)
    links = (torch.rand(nodes, nodes, generator=generator) < chance).float().triu(1)
    centres = torch.randn(NUM_COMMUNITIES, NUM_FEATURES, generator=generator)
    noise = torch.randn(nodes, NUM_FEATURES, generator=generator)
    features = 0.5 * centres[communities] + noise
    return links + links.T + torch.eye(nodes), features[None], communities[None]


def main() -> None:
    args = workflow.parse_args(__doc__, epochs=100, sparsify_reg=2e-3)
    generator = torch.Generator().manual_seed(args.seed)
    adjacency, features, communities = make_graph(generator)
    labelled = torch.rand(communities.shape, generator=generator) < LABELLED
    training = features, communities.masked_fill(~labelled, workflow.UNLABELLED)
    validation = features, communities.masked_fill(labelled, workflow.UNLABELLED)
    model = GAT(adjacency)
    report = workflow.Report(features, validation)

    workflow.train(model, training, epochs=args.epochs, lr=1e-2)
    report.measure("dense", model)
    if args.sparsify != "none":
        workflow.sparsify(model, training, args)
        report.measure("sparse", model)
    widths = workflow.prune(model, training, args.pruning_ratio, args.pruning_type)
    report.measure("pruned", model)
    workflow.train(model, training, epochs=args.epochs, lr=3e-3)
    report.measure("finetuned", model)
    report.show(widths)


if __name__ == "__main__":
    entry.run(main)
