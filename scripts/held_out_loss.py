"""Print how well a model predicts a folder of text it has not seen.

python -m scripts.held_out_loss [--model bundled] [--texts data/austen/held_out] [--stride N]
"""

import argparse
import sys
from pathlib import Path

from experiments.config import ConfigError
from experiments.corpus import read_texts, stream
from stateful_gpt.checkpoint import CheckpointError, load_checkpoint
from stateful_gpt.depth import depth_profile
from stateful_gpt.device import choose_device
from stateful_gpt.train import total_nats


def main() -> int:
    parser = argparse.ArgumentParser(description="Held-out loss of a model.")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--texts", default="data/austen/held_out")
    parser.add_argument(
        "--stride", type=int, help="tokens between windows; default: the block, none overlapping"
    )
    options = parser.parse_args()
    try:
        texts = read_texts("--texts", options.texts)
        checkpoint = load_checkpoint(options.model, device=choose_device("auto"))
    except (ConfigError, CheckpointError) as error:
        print(f"held_out_loss: {error}", file=sys.stderr)
        return 1
    block = checkpoint.model.config.block_size
    corpus = stream(texts, checkpoint.tokenizer, block_size=block)
    tokens = corpus.tokens
    try:
        nats = total_nats(checkpoint.model, tokens, stride=options.stride)
    except ValueError as error:
        print(f"held_out_loss: --{error}", file=sys.stderr)
        return 2
    characters = sum(len(text) for text in texts)
    names = ", ".join(path.name for path in sorted(Path(options.texts).glob("*.txt")))
    print(
        f"{options.model} on {names}: {nats / characters:.4f} nats per character,"
        f" {nats / (len(tokens) - 1):.4f} nats per token, {characters:,} characters"
    )
    if checkpoint.model.gate is not None:
        profile = depth_profile(checkpoint.model, corpus.windows(), depth=0, full=True)
        assert profile.nll_full is not None
        print(
            "with hidden states fed back, at the depth of generation:"
            f" {profile.nll_full * profile.tokens / characters:.4f} nats per character,"
            f" {profile.nll_full:.4f} nats per token"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
