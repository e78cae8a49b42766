"""Nets that people write themselves in plain PyTorch, with einops or PEFT: generators, autoencoders, mixers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.coverage.example import Example
from studies.coverage.people.entry import entry, images, library


def _dcgan() -> Example:
    layers: list[nn.Module] = [nn.ConvTranspose2d(16, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for wide, narrow in ((64, 32), (32, 16)):
        layers += [nn.ConvTranspose2d(wide, narrow, 4, 2, 1, bias=False), nn.BatchNorm2d(narrow), nn.ReLU()]
    return Example(nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()), torch.randn(2, 16, 1, 1))


class Projected(nn.Module):
    """A generator that begins with a linear layer whose output becomes a map."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 32 * 4 * 4)
        self.body = nn.Sequential(
            nn.BatchNorm2d(32), nn.Upsample(scale_factor=2), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 48, 3, padding=1), nn.PixelShuffle(4),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self.project(z).view(-1, 32, 4, 4)).tanh()


class ConditionalNorm(nn.Module):
    """A batch norm whose scale and shift come from a class's embedding, as in BigGAN."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.embed = nn.Embedding(10, channels * 2)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        scale, shift = self.embed(label)[:, :, None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class Conditional(nn.Module):
    """A small BigGAN generator with spectral norms."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 32 * 4 * 4))
        self.norms = nn.ModuleList([ConditionalNorm(32), ConditionalNorm(32)])
        self.convs = nn.ModuleList([nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)])
        self.out = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        x = self.project(z).unflatten(1, (32, 4, 4))
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(F.interpolate(norm(x, label).relu(), scale_factor=1.0))
        return self.out(F.interpolate(x, scale_factor=2.0)).tanh()


class VAE(nn.Module):
    """Convolutions down to a mean and a variance, and a linear layer and convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.mean, self.variance = nn.Linear(32 * 7 * 7, 8), nn.Linear(32 * 7 * 7, 8)
        self.lift = nn.Linear(8, 32 * 7 * 7)
        self.up = nn.Sequential(nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.down(x).flatten(1)
        mean, log_variance = self.mean(h), self.variance(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
        return self.up(self.lift(z).view(len(z), 32, 7, 7)), mean, log_variance


class Mixer(nn.Module):
    """MLP-Mixer with the layers of einops."""

    def __init__(self) -> None:
        super().__init__()
        layers = library("einops.layers.torch")

        def block() -> nn.Module:
            return nn.Sequential(nn.LayerNorm(48), nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))

        rearrange = layers.Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8)
        self.patches = nn.Sequential(rearrange, nn.Linear(192, 48))
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(48), nn.Conv1d(16, 32, 1), nn.GELU(), nn.Conv1d(32, 16, 1)) for _ in range(2)
        )
        self.channels = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Sequential(layers.Reduce("b n c -> b c", "mean"), nn.Linear(48, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        for mix_tokens, mix_channels in zip(self.tokens, self.channels, strict=True):
            x = x + mix_tokens(x)
            x = x + mix_channels(x)
        return self.head(x)


class LinearAttention(nn.Module):
    """The attention of lucidrains' diffusion networks: softmax over keys and over dims, einsum between."""

    def __init__(self, width: int, heads: int = 4, head_dim: int = 8) -> None:
        super().__init__()
        self.heads, self.scale = heads, head_dim**-0.5
        self.qkv = nn.Conv2d(width, heads * head_dim * 3, 1, bias=False)
        self.out = nn.Conv2d(heads * head_dim, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        rearrange = library("einops").rearrange

        height, width = x.shape[-2:]
        parts = self.qkv(x).chunk(3, dim=1)
        q, k, v = (rearrange(part, "b (h c) x y -> b h c (x y)", h=self.heads) for part in parts)
        q, k = q.softmax(dim=-2) * self.scale, k.softmax(dim=-1)
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        out = torch.einsum("b h d e, b h d n -> b h e n", context, q)
        return self.out(rearrange(out, "b h c (x y) -> b (h c) x y", x=height, y=width))


class AttentiveUNet(nn.Module):
    """A U-Net with group norms, linear attention and sinusoidal times."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 4, 2, 1)
        self.norm, self.attention = nn.GroupNorm(4, 32), LinearAttention(32)
        self.up, self.out = nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(8, device=t.device) / 2)
        angles = t[:, None] * frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        skip = self.stem(x)
        h = self.down(skip.relu()) + time[:, :, None, None]
        h = h + self.attention(self.norm(h))
        return self.out(torch.cat([self.up(h), skip], dim=1))


class Seq2Seq(nn.Module):
    """torch's own transformer on embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.body = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.out = nn.Linear(32, 100)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.out(self.body(self.embed(source), self.embed(target)))


class Tagger(nn.Module):
    """Convolutions over characters and a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(50, 16), nn.Conv1d(16, 32, 3, padding=1)
        self.lstm = nn.LSTM(32, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(48, 9)

    def forward(self, words: Tensor) -> Tensor:
        x = self.conv(self.embed(words).transpose(1, 2)).relu().transpose(1, 2)
        return self.out(self.lstm(x)[0])


class WaveNet(nn.Module):
    """Gated dilated convolutions with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 16, 1)
        self.gates = nn.ModuleList(nn.Conv1d(16, 32, 2, dilation=2**i) for i in range(4))
        self.residuals = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(4))
        self.skips = nn.ModuleList(nn.Conv1d(16, 24, 1) for _ in range(4))
        self.out = nn.Conv1d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), torch.zeros(())
        for i, (gate, residual, skip) in enumerate(zip(self.gates, self.residuals, self.skips, strict=True)):
            h = F.glu(gate(F.pad(x, (2**i, 0))), dim=1)
            x, total = x + residual(h), total + skip(h)
        return self.out(total.relu())


class Siamese(nn.Module):
    """One encoder for two images, and their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(128, 32),
        )  # fmt: skip
        self.out = nn.Linear(32, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.out((self.encoder(first) - self.encoder(second)).abs())


class Experts(nn.Module):
    """A soft mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(4))
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return self.out((weights.unsqueeze(-1) * outputs).sum(dim=1))


def _lora() -> Example:
    peft = library("peft")
    transformers = library("transformers")

    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = transformers.BertForSequenceClassification(config)
    lora = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, lora)
    for parameter in adapted.parameters():
        parameter.requires_grad_(True)
    return Example(adapted, {"input_ids": torch.randint(3, 100, (2, 12))})


def _merged_lora() -> Example:
    example = _lora()
    adapted: Any = example.model
    return Example(adapted.merge_and_unload(), example.inputs)


ENTRIES = [
    entry("plain", "dcgan", _dcgan),
    entry("plain", "projected-generator", lambda: Example(Projected(), {"z": torch.randn(2, 16)})),
    entry("plain", "conditional-generator",
          lambda: Example(Conditional(), {"z": torch.randn(2, 16), "label": torch.tensor([1, 2])})),
    entry("plain", "vae", lambda: Example(VAE(), {"x": images(28, 1)})),
    entry("plain", "siamese",
          lambda: Example(Siamese(), {"first": images(28, 1), "second": images(28, 1)})),
    entry("plain", "experts", lambda: Example(Experts(), {"x": torch.randn(2, 16)})),
    entry("plain", "wavenet", lambda: Example(WaveNet(), {"x": torch.randn(2, 1, 32)})),
    entry("plain", "tagger", lambda: Example(Tagger(), {"words": torch.randint(50, (2, 9))})),
    entry("plain", "transformer",
          lambda: Example(Seq2Seq(), {"source": torch.randint(100, (2, 9)), "target": torch.randint(100, (2, 7))})),
    entry("einops", "mixer", lambda: Example(Mixer(), images(32))),
    entry("einops", "attentive-unet",
          lambda: Example(AttentiveUNet(), {"x": images(32), "t": torch.tensor([3.0, 7.0])}, heads=4)),
    entry("peft", "bert-lora", _lora),
    entry("peft", "bert-lora-merged", _merged_lora),
]  # fmt: skip
