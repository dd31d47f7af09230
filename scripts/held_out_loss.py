"""Print how well a model predicts a folder of text it has not seen.

    python -m scripts.held_out_loss [--model bundled] [--texts data/austen/held_out] [--stride N]
    python -m scripts.held_out_loss --model runs/models/names --texts data/names/held_out \\
        --documents line
"""

import argparse
import sys
from pathlib import Path

from experiments.settings import ConfigError
from experiments.train.corpus import documents, read_texts, stream
from stateful_gpt.checkpoint import CheckpointError, load_checkpoint
from stateful_gpt.depth import depth_profile
from stateful_gpt.device import choose_device
from stateful_gpt.train import IGNORE, total_nats


def main() -> int:
    parser = argparse.ArgumentParser(description="Held-out loss of a model.")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--texts", default="data/austen/held_out")
    parser.add_argument(
        "--stride", type=int, help="tokens between windows; default: the block, none overlapping"
    )
    parser.add_argument(
        "--documents",
        choices=("file", "line"),
        default="file",
        help="line: every line is a text of its own, as in training with corpus.documents=line",
    )
    options = parser.parse_args()
    of_lines = options.documents == "line"
    if of_lines and options.stride is not None:
        parser.error("--stride needs --documents file: lines are read whole")
    try:
        texts = read_texts("--texts", options.texts)
        checkpoint = load_checkpoint(options.model, device=choose_device("auto"))
        model, encoding = checkpoint.model, checkpoint.tokenizer
        block = model.config.block_size
        corpus = (
            documents("--texts", texts, encoding, block_size=block)
            if of_lines
            else stream(texts, encoding, block_size=block)
        )
    except (ConfigError, CheckpointError) as error:
        print(f"held_out_loss: {error}", file=sys.stderr)
        return 1
    predicted = int((corpus.windows()[:, 1:] != IGNORE).sum())
    try:
        if of_lines:
            nats = depth_profile(model, corpus.windows(), depth=0, full=False).nll[0] * predicted
        else:
            nats = total_nats(model, corpus.tokens, stride=options.stride)
    except ValueError as error:
        print(f"held_out_loss: --{error}", file=sys.stderr)
        return 2
    characters = corpus.characters
    names = ", ".join(path.name for path in sorted(Path(options.texts).glob("*.txt")))
    print(
        f"{options.model} on {names}: {nats / characters:.4f} nats per character,"
        f" {nats / predicted:.4f} nats per token, {characters:,} characters"
    )
    if model.gate is not None:
        profile = depth_profile(model, corpus.windows(), depth=0, full=True)
        assert profile.nll_full is not None
        print(
            "with hidden states fed back, at the depth of generation:"
            f" {profile.nll_full * profile.tokens / characters:.4f} nats per character,"
            f" {profile.nll_full:.4f} nats per token"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
