#!/usr/bin/env python3
"""Prunes a recurrent classifier of sentences: embedding, LSTM, linear head.

    python examples/lstm_text.py --pruning-ratio 0.5

The sentences are made up: words that praise, words that blame, words that say nothing, "not", which turns the next
word of feeling round, and "very", which doubles it. The sum of the feelings decides the label: blame, balance or
praise. Only their order tells "good not bad" from "not good bad", so that a bag of words will not do.

An LSTM's hidden units sit in the four gates of `weight_ih`, `weight_hh` and the biases, in the columns of `weight_hh`
and in whatever reads the states: one coupled group. The embedding's width is another. GRU, RNN, several layers and both
directions work alike: try TextClassifier(cell=nn.GRU, num_layers=2, bidirectional=True).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import workflow
from torch import Tensor, nn

from isomorphic.commands import entry

NOT, VERY, PRAISE, BLAME, NEUTRAL = 0, 1, range(2, 12), range(12, 22), range(22, 64)  # words by number
VOCABULARY = 64
LENGTH = 20


class TextClassifier(nn.Module):
    """Embedding, recurrent layers, mean over time, linear head.

    Args:
        cell: nn.LSTM, nn.GRU or nn.RNN.
        num_layers, bidirectional: of the recurrent layers.
    """

    def __init__(
        self,
        vocabulary: int = VOCABULARY,
        width: int = 32,
        hidden: int = 64,
        num_classes: int = 3,
        *,
        cell: Callable[..., nn.RNNBase] = nn.LSTM,
        num_layers: int = 1,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.recurrent = cell(width, hidden, num_layers=num_layers, bidirectional=bidirectional, batch_first=True)
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), num_classes)

    def forward(self, words: Tensor) -> Tensor:
        """(B, length) word numbers -> (B, classes) logits."""
        states, _ = self.recurrent(self.embedding(words))  # (B, length, hidden · directions)
        return self.head(states.mean(dim=1))


def make_sentences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Word numbers (count, LENGTH) and labels (count,): 0 blame, 1 balance, 2 praise."""
    shares = torch.tensor([0.12, 0.12, 0.13, 0.13, 0.5])  # of NOT, VERY, PRAISE, BLAME, NEUTRAL
    kinds = torch.multinomial(shares, count * LENGTH, True, generator=generator)
    words = torch.empty(count * LENGTH, dtype=torch.int64)
    for kind, choice in enumerate((range(NOT, NOT + 1), range(VERY, VERY + 1), PRAISE, BLAME, NEUTRAL)):
        chosen = kinds == kind
        words[chosen] = torch.randint(choice.start, choice.stop, (int(chosen.sum()),), generator=generator)
    sentences = words.view(count, LENGTH)
    total, factor = torch.zeros(count), torch.ones(count)
    for word in sentences.T:  # all sentences at once, word by word
        feeling = torch.isin(word, torch.tensor(PRAISE)).float() - torch.isin(word, torch.tensor(BLAME)).float()
        total += factor * feeling
        factor = torch.where(feeling != 0, 1.0, factor)
        factor = torch.where(word == NOT, -factor, torch.where(word == VERY, (2 * factor).clamp(-2, 2), factor))
    return sentences, 1 + total.sign().long()


def main() -> None:
    args = workflow.parse_args(__doc__, epochs=8, sparsify_reg=3e-4)
    generator = torch.Generator().manual_seed(args.seed)
    training, validation = make_sentences(8000, generator), make_sentences(2000, generator)
    model = TextClassifier()
    report = workflow.Report(training[0][:1], validation)

    workflow.train(model, training, epochs=args.epochs, lr=1e-2)
    report.measure("dense", model)
    if args.sparsify != "none":
        workflow.sparsify(model, training, args)
        report.measure("sparse", model)
    widths = workflow.prune(model, training, args.pruning_ratio, args.pruning_type)
    report.measure("pruned", model)
    workflow.train(model, training, epochs=args.epochs, lr=5e-3)
    report.measure("finetuned", model)
    report.show(widths)


if __name__ == "__main__":
    entry.run(main)
