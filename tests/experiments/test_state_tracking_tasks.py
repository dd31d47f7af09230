"""The tasks ask what they say they ask, checked by playing them out by hand."""

from itertools import combinations

import pytest
import torch

from experiments.state_tracking.tasks import (
    QUIET,
    Task,
    lay_out,
    make_task,
    word_batch,
)
from stateful_gpt.train import IGNORE


def words_of(task: Task, count: int = 200, level: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(task.symbols, (count, level), generator=generator)


def test_the_ball_is_where_it_lies_after_the_cups_were_swapped() -> None:
    task = make_task("cups", "state")
    pairs = list(combinations(range(5), 2))
    words = words_of(task)
    states = task.states_of(words)
    for word, said in zip(words.tolist(), states.tolist(), strict=True):
        cups = ["ball", "", "", "", ""]
        for symbol, state in zip(word, said, strict=True):
            i, j = pairs[symbol]
            cups[i], cups[j] = cups[j], cups[i]
            assert cups.index("ball") == state


def test_the_symbols_of_the_cups_reach_every_permutation() -> None:
    transitions = make_task("cups", "state").transitions.T.tolist()  # a permutation a symbol
    reached = {tuple(range(5))}
    fresh = set(reached)
    while fresh:
        fresh = {tuple(p[s] for s in seen) for seen in fresh for p in transitions} - reached
        reached |= fresh
    assert len(reached) == 120


def test_sums_are_sums_modulo_five() -> None:
    task = make_task("modulo", "state")
    words = words_of(task)
    for word, said in zip(words.tolist(), task.states_of(words).tolist(), strict=True):
        assert said == [sum(word[: n + 1]) % 5 for n in range(len(word))]


@pytest.mark.parametrize("name", ["cups", "modulo"])
def test_half_of_the_state_is_not_enough_to_go_on_from(name: str) -> None:
    half = make_task(name, "half")
    states = make_task(name, "state").states_of(words_of(half))
    assert half.answers[states].tolist() == (states > 1).long().tolist()
    assert (len(half.answers.unique()), half.chance) == (2, 3 / 5)
    after = {  # answers that may follow an answer and a symbol
        (int(half.answers[state]), symbol): {
            int(half.answers[half.transitions[other, symbol]])
            for other in range(5)
            if half.answers[other] == half.answers[state]
        }
        for state in range(5)
        for symbol in range(half.symbols)
    }
    assert sum(len(answers) == 2 for answers in after.values()) > len(after) / 4


@pytest.mark.parametrize("name", ["cups", "modulo"])
@pytest.mark.parametrize("target", ["state", "half"])
def test_a_word_lies_in_a_quiet_window_with_its_answers_below_it(name: str, target: str) -> None:
    task = make_task(name, target)
    words = words_of(task, 3, 4)
    tokens, targets = lay_out(task, words, torch.tensor([0, 2, 5]), length=9)
    for row, start in enumerate((0, 2, 5)):
        inside = slice(start, start + 4)
        assert tokens[row, inside].tolist() == (words[row] + 1).tolist()
        answers = task.answers[task.states_of(words[row : row + 1])][0]
        said = (answers + 1 + task.symbols).tolist()
        assert targets[row, inside].tolist() == said
        assert max(said) < task.vocab_size
        outside = [t for t in range(9) if not start <= t < start + 4]
        assert set(tokens[row, outside].tolist()) == {QUIET}
        assert set(targets[row, outside].tolist()) == {IGNORE}


def test_training_words_depend_on_the_seed_alone_and_reach_every_position() -> None:
    task = make_task("cups", "state")

    def batch(seed: int) -> torch.Tensor:
        tokens, targets = word_batch(task, seed=seed, size=32, level=8, length=16)
        assert ((targets != IGNORE).sum(dim=1) == 8).all()
        assert ((tokens != QUIET) == (targets != IGNORE)).all()
        return tokens

    assert torch.equal(batch(5), batch(5))
    assert not torch.equal(batch(5), batch(6))
    many = torch.cat([batch(seed) for seed in range(8)])
    assert (many != QUIET).any(dim=0).all()


def test_words_as_long_as_their_windows_fill_them() -> None:
    task = make_task("modulo", "half")
    tokens, targets = word_batch(task, seed=0, size=64, level=16, length=16)
    assert (tokens != QUIET).all()
    assert (targets != IGNORE).all()
