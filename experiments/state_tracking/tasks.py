"""Tasks with a state that every symbol changes, as batches that a seed makes.

A task is a finite automaton. A word of n symbols takes it from state 0 through n states, and the
model says after each symbol where it is (target ``state``), or only in which half of the states
(``half``): then the state has to be kept without ever being said. Level n is the answer after n
symbols.

A batch is (B, T) ids to read, and (B, T) ids to say at each of them, IGNORE where nothing is asked.
Ids: 0 is the quiet token, which stands before and behind a word; then the G symbols; then the
answers.

Shapes: B batch, T positions, N symbols of a word, S states, G symbols there are.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from stateful_gpt.train import IGNORE

QUIET = 0
SIZE = 5  # states of both tasks: cups, or the modulus


@dataclass(frozen=True)
class Task:
    """A finite automaton, and what is asked about it."""

    transitions: Tensor  # (S, G), the state after each symbol in each state
    answers: Tensor  # (S,), from 0, that each state calls for

    @property
    def symbols(self) -> int:
        return self.transitions.size(1)

    @property
    def vocab_size(self) -> int:
        return 1 + self.symbols + len(self.answers.unique())

    @property
    def chance(self) -> float:
        """The accuracy of always giving the most frequent answer, all states being as likely."""
        return self.answers.bincount().max().item() / len(self.answers)

    def states_of(self, words: Tensor) -> Tensor:
        """(B, N) states after each symbol of (B, N) words; symbols count from 0."""
        state = torch.zeros(len(words), dtype=torch.long)
        states = []
        for symbol in words.unbind(dim=1):
            state = self.transitions[state, symbol]
            states.append(state)
        return torch.stack(states, dim=1)


_SWAPS = list(combinations(range(SIZE), 2))
TASKS = {
    # A ball lies under one of five cups, and each symbol swaps two of them: where is the ball? The
    # symbols are the ten transpositions, which generate S5, and the ball is a pointer that is
    # chased through the product of all permutations so far. No solvable group contains S5, so a
    # transformer of fixed depth is not expected to do it at every length (arXiv 2404.08819).
    "cups": [[{i: j, j: i}.get(ball, ball) for i, j in _SWAPS] for ball in range(SIZE)],
    # The running sum of numbers modulo five. The order of the symbols does not matter.
    "modulo": [[(state + symbol) % SIZE for symbol in range(SIZE)] for state in range(SIZE)],
}


def make_task(name: str, target: str) -> Task:
    states = torch.arange(SIZE)
    answers = states if target == "state" else (states >= SIZE // 2).long()
    return Task(torch.tensor(TASKS[name]), answers)


def lay_out(task: Task, words: Tensor, starts: Tensor, *, length: int) -> tuple[Tensor, Tensor]:
    """Put (B, N) words at (B,) starts into windows of ``length`` tokens, quiet around them."""
    places = starts[:, None] + torch.arange(words.size(1))  # (B, N)
    tokens = torch.full((len(words), length), QUIET)
    tokens.scatter_(1, places, 1 + words)
    targets = torch.full((len(words), length), IGNORE)
    targets.scatter_(1, places, 1 + task.symbols + task.answers[task.states_of(words)])
    return tokens, targets


def word_batch(
    task: Task, *, seed: int, size: int, level: int, length: int
) -> tuple[Tensor, Tensor]:
    """Words of ``level`` symbols, all as likely, each at a random place of its window.

    A function of the seed alone. Every position of a window is trained that way, though no word
    fills it.
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(task.symbols, (size, level), generator=generator)
    starts = torch.randint(length - level + 1, (size,), generator=generator)
    return lay_out(task, words, starts, length=length)
