"""Train a GPT on a folder of text: tokenizer, model, held-out loss, a model folder with its card.

    python -m experiments.train                        # the recipe of the bundled model
    python -m experiments.train training.steps=100 output=runs/models/short

Killed at any moment, the same command carries on from the last saved state.
"""

import sys

from experiments.command import run_command
from experiments.sweeps.sweep import Runner
from experiments.train.settings import TrainSettings


def main() -> int:
    runner = Runner(name="train", settings=TrainSettings, compute="experiments.train.run:train")
    return run_command(runner)


if __name__ == "__main__":
    sys.exit(main())
