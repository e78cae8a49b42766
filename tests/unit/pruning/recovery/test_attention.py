"""Queries and keys: found by what the model does, and matched as an independent solver would match them."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from isomorphic.pruning.grouping.trace import trace_groups
from isomorphic.pruning.groups import ChannelGraph, CoupledGroup
from isomorphic.pruning.plan import PruningPlan
from isomorphic.pruning.recovery import attention
from isomorphic.pruning.recovery.attention import QueryKey, find_query_keys, match_keys
from isomorphic.pruning.recovery.least_squares import RIDGES
from tests.unit.pruning.conftest import SWIN, VIT

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
XCIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("deit_tiny_distilled_patch16_224", VIT),
    "vit without biases": ("vit_tiny_patch16_224", VIT | {"qkv_bias": False}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "qk_norm": ("vit_tiny_patch16_224", VIT | {"qk_norm": True}),
    "swin v2": ("swinv2_tiny_window8_256", SWIN),
    "xcit": ("xcit_nano_12_p16_224", XCIT | {"eta": 1.0}),
    "rotary": ("eva02_tiny_patch14_224", VIT),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(name: str) -> Any:
    torch.manual_seed(0)
    architecture, options = MODELS[name]
    model = timm.create_model(architecture, **options).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * random(*parameter.shape, seed=seed))
    return model


def half_of_each_head(group: CoupledGroup) -> tuple[int, ...]:
    """The last half of each head's dims; of other groups everything."""
    if not group.heads:
        return tuple(range(group.num_units))
    return tuple(u for u in range(group.num_units) if u % group.section_size >= group.section_size // 2)


def traced(name: str) -> tuple[Any, ChannelGraph, PruningPlan]:
    model = build(name)
    graph = trace_groups(model, IMAGES[:2])
    return model, graph, PruningPlan({group.name: half_of_each_head(group) for group in graph.groups})


@pytest.mark.parametrize("name", ["deit", "vit without biases", "swin"])
def test_queries_and_keys_are_found_and_the_weights_stay(name: str):
    model, graph, plan = traced(name)
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = find_query_keys(model, graph, plan, IMAGES[:1])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.training
    attentions = {f"{key}.qkv": part for key, part in model.named_modules() if hasattr(part, "qkv")}
    assert set(found) == set(attentions) and attentions
    for key, rows in found.items():
        heads, width = attentions[key].num_heads, attentions[key].qkv.out_features // 3
        dims = width // heads
        assert rows.reader == f"{key.removesuffix('.qkv')}.proj"
        expected = torch.arange(width).view(heads, dims)  # timm: (q k v, heads, head dims)
        sides = [rows.query.tolist(), rows.key.tolist()]
        assert sorted(sides) == [expected.tolist(), (expected + width).tolist()]  # never the values
        kept = torch.arange(width // 2).view(heads, dims // 2)
        assert sorted([rows.kept_query.tolist(), rows.kept_key.tolist()]) == [
            kept.tolist(),
            (kept + width // 2).tolist(),
        ]


def test_heads_that_go_are_in_no_rows():
    model, graph, _ = traced("deit")
    kept = {group.name: tuple(range(group.num_units)) for group in graph.groups}
    kept |= {group.name: (12, 15, 36, 38) for group in graph.groups if group.heads}  # two dims of heads 1 and 3
    found = find_query_keys(model, graph, PruningPlan(kept), IMAGES[:1])["blocks.0.attn.qkv"]
    assert found.query.tolist() == [list(range(12, 24)), list(range(36, 48))]
    assert found.kept_query.tolist() == [[0, 1], [2, 3]] and found.kept_key.tolist() == [[4, 5], [6, 7]]


def test_where_no_dims_go_nothing_is_looked_for():
    model, graph, _ = traced("deit")
    whole = {group.name: tuple(range(group.num_units)) for group in graph.groups}
    heads = {group.name: tuple(range(12, 48)) for group in graph.groups if group.heads}
    assert find_query_keys(model, graph, PruningPlan(whole), IMAGES[:1]) == {}
    assert find_query_keys(model, graph, PruningPlan(whole | heads), IMAGES[:1]) == {}


@pytest.mark.parametrize("name", ["qk_norm", "swin v2", "xcit", "rotary"])
def test_where_more_than_a_product_is_between_none_are_found(name: str):
    model, graph, plan = traced(name)
    assert find_query_keys(model, graph, plan, IMAGES[:1]) == {}


def test_a_small_layer_scale_hides_no_norm():
    torch.manual_seed(0)
    model: Any = timm.create_model("xcit_nano_12_p16_224", **XCIT, eta=1e-5).eval()
    graph = trace_groups(model, IMAGES[:2])
    plan = PruningPlan({group.name: half_of_each_head(group) for group in graph.groups})
    assert find_query_keys(model, graph, plan, IMAGES[:1]) == {}


# Matching: three heads of six dims, of which two, four or all stay.


class Case:
    """A cut layer, its rows, what the dense layer made and what the cut one sees; both q are scaled as by the cut."""

    def __init__(self, kept: int, images: int = 12, tokens: int = 5, *, bias: bool = True, seed: int = 0) -> None:
        heads, dims = 3, 6
        torch.manual_seed(seed)
        dense = nn.Linear(10, 3 * heads * dims, bias=bias).double()
        rows = torch.arange(3 * heads * dims).view(3, heads, dims)
        new = torch.arange(3 * heads * kept).view(3, heads, kept)
        self.layer = nn.Linear(7, 3 * heads * kept, bias=bias).double()
        self.rows = QueryKey("proj", rows[0], rows[1], new[0], new[1])
        scale = math.sqrt(kept / dims)
        hidden = random(images, tokens, 5, seed=seed + 1) + random(images, 1, 5, seed=seed + 2)
        x = (hidden @ random(5, 10, seed=seed + 4) / 2 + 0.3 * random(images, tokens, 10, seed=seed + 5)).double()
        self.inputs = x[..., :7] + 0.1 * random(images, tokens, 7, seed=seed + 3).double()
        with torch.no_grad():
            self.dense = dense(x)
            stay = rows[..., :kept].flatten()
            self.layer.weight.copy_(dense.weight[stay, :7])
            if bias:
                self.layer.bias.copy_(dense.bias[stay])
            for tensor in self.layer.parameters():
                tensor[new[0]] *= scale
            self.dense[..., rows[0].flatten()] *= scale

    def parts(self, layer: nn.Linear) -> list[tuple[np.ndarray, ...]]:
        """q̃, q, k̃, k of each head, (images, tokens, dims), keys without their mean over the tokens."""
        made, found = layer(self.inputs).detach().numpy(), []
        own_query, query, own_key, key = (
            rows.numpy() for rows in (self.rows.kept_query, self.rows.query, self.rows.kept_key, self.rows.key)
        )
        for head in range(3):
            keys = made[..., own_key[head]], self.dense.numpy()[..., key[head]]
            own, dense = (k - k.mean(1, keepdims=True) for k in keys)
            found.append((made[..., own_query[head]], self.dense.numpy()[..., query[head]], own, dense))
        return found

    def match(self) -> nn.Linear:
        layer = copy.deepcopy(self.layer)
        with torch.no_grad():
            match_keys(layer, self.rows, self.dense, self.inputs)
        return layer


def logit_error(case: Case, layer: nn.Linear) -> float:
    """E |q̃ᵀ k̃ − qᵀk|² over all pairs of a query and a key, whatever images they are of."""
    total = 0.0
    for own_query, query, own_key, key in case.parts(layer):
        flat = [part.reshape(-1, part.shape[-1]) for part in (own_query, query, own_key, key)]
        total += float(((flat[0] @ flat[2].T - flat[1] @ flat[3].T) ** 2).mean())
    return total


@pytest.mark.parametrize("kept", [2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_without_a_ridge_the_keys_are_those_of_least_squares_over_all_pairs(
    kept: int, bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(attention, "RIDGES", (0.0,))
    case = Case(kept, images=40, bias=bias)
    matched = case.match()
    assert not torch.equal(matched.weight, case.layer.weight)  # not the infinite ridge
    for head, (own_query, query, own_key, key) in enumerate(case.parts(case.layer)):
        q, r, k, s = (part.reshape(-1, part.shape[-1]) for part in (own_query, query, own_key, key))
        equations = np.einsum("ti,sj->tsij", q, k).reshape(-1, kept * kept)
        answer = np.linalg.lstsq(equations, (r @ s.T).reshape(-1), rcond=None)[0]
        expected = answer.reshape(kept, kept) @ case.layer.weight.detach().numpy()[case.rows.kept_key[head]]
        found = matched.weight.detach().numpy()[case.rows.kept_key[head]]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def matrices(parts: list[tuple[np.ndarray, ...]], images: slice, ridge: float) -> list[np.ndarray]:
    """A of each head by one linear system in all of its entries."""
    found = []
    for own_query, query, own_key, key in parts:
        q, r, k, s = (part[images].reshape(-1, part.shape[-1]) for part in (own_query, query, own_key, key))
        identity = np.eye(q.shape[1])
        if ridge == math.inf:
            found.append(identity)
            continue
        left, right = q.T @ q, k.T @ k
        residual = (q.T @ r) @ (s.T @ k) - left @ right
        left, right = (c + ridge * np.diag(c).mean() * identity for c in (left, right))
        # row-major: vec(L D R) = (L ⊗ Rᵀ) vec(D)
        found.append(identity + np.linalg.solve(np.kron(left, right.T), residual.ravel()).reshape(identity.shape))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_ridge_is_the_one_that_does_best_on_the_other_half(seed: int):
    case = Case(4, images=[12, 3, 4, 40][seed], seed=10 * seed)
    parts, middle = case.parts(case.layer), (len(case.inputs) + 1) // 2
    halves = slice(0, middle), slice(middle, None)

    def held_out(ridge: float) -> float:
        """Of the logits that a softmax sees: queries and keys of one image."""
        total = 0.0
        for fit, test in (halves, halves[::-1]):
            for part, matrix in zip(parts, matrices(parts, fit, ridge), strict=True):
                for q, r, k, s in zip(*(a[test] for a in part), strict=True):
                    total += float(((q @ matrix @ k.T - r @ s.T) ** 2).sum())
        return total

    best = min((math.inf, *RIDGES), key=held_out)
    matched = case.match()
    for head, matrix in enumerate(matrices(parts, slice(None), best)):
        rows = case.rows.kept_key[head]
        expected = matrix @ case.layer.weight.detach().numpy()[rows]
        np.testing.assert_allclose(matched.weight.detach().numpy()[rows], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("kept", "images", "tokens"), [(2, 12, 5), (4, 2, 3), (5, 1, 9), (3, 7, 2), (4, 30, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_logits_never_get_further_from_the_dense_ones(kept: int, images: int, tokens: int, seed: int):
    case = Case(kept, images, tokens, seed=seed)
    matched = case.match()
    assert logit_error(case, matched) <= logit_error(case, case.layer) * (1 + 1e-9) + 1e-12
    rest = [row for row in range(len(matched.weight)) if row not in case.rows.kept_key]
    assert torch.equal(matched.weight[rest], case.layer.weight[rest])  # queries and values are as they were
    assert torch.equal(matched.bias[rest], case.layer.bias[rest])
    assert all(tensor.isfinite().all() for tensor in matched.parameters())


def own_logit_error(case: Case, layer: nn.Linear) -> float:
    """The same over the pairs that a softmax really sees: queries and keys of one image."""
    total = 0.0
    for own_query, query, own_key, key in case.parts(layer):
        logits = own_query @ own_key.swapaxes(1, 2) - query @ key.swapaxes(1, 2)
        total += float((logits**2).mean())
    return total


def dependent_case() -> Case:
    """One head of two dims that loses the second: of every image, what q and k have in it are of opposite signs."""
    case = Case(1, images=8, tokens=4)
    tokens = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    query, key = torch.ones(8, 4, 6).double(), torch.zeros(8, 4, 6).double()
    query[..., 1] = torch.tensor([3.0, -1.0] * 4, dtype=torch.float64)[:, None]
    key[..., 0] = tokens
    key[..., 1] = tokens * torch.tensor([-1.0, 3.0] * 4, dtype=torch.float64)[:, None]
    query[..., 2:] = 0
    case.dense = torch.cat([query, query, query, key, key, key, key, key, key], dim=-1)
    case.inputs = torch.stack([torch.ones(8, 4).double(), tokens.expand(8, 4)], dim=-1)
    case.layer = nn.Linear(2, 9, bias=False).double()
    with torch.no_grad():
        case.layer.weight.copy_(torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 6))
    return case


def test_the_logits_of_an_image_never_get_further_from_the_dense_ones():
    case = dependent_case()
    assert own_logit_error(case, case.match()) <= own_logit_error(case, case.layer) * (1 + 1e-9)


def test_dims_that_say_nothing_leave_everything_as_it_is():
    case = Case(4)
    with torch.no_grad():
        made = case.layer(case.inputs)
        for new, old in ((case.rows.kept_query, case.rows.query), (case.rows.kept_key, case.rows.key)):
            case.dense[..., old.flatten()] = 0
            case.dense[..., old[:, :4]] = made[..., new]
    matched = case.match()
    torch.testing.assert_close(matched.weight, case.layer.weight, rtol=1e-9, atol=1e-9)
    assert own_logit_error(case, matched) < 1e-12


def test_windows_and_further_token_dims_are_flattened():
    flat, mapped = Case(4, images=6, tokens=12), Case(4, images=6, tokens=12)
    mapped.dense, mapped.inputs = (t.view(6, 3, 4, -1) for t in (mapped.dense, mapped.inputs))
    assert torch.equal(flat.match().weight, mapped.match().weight)
