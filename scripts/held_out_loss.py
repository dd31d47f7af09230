"""Print how well a model predicts a folder of text it has not seen.

    python -m scripts.held_out_loss [--model bundled] [--texts data/austen/held_out]
    python -m scripts.held_out_loss --model runs/models/names --texts data/names/held_out \\
        --documents line
"""

import argparse
import sys

from experiments.train.corpus import read_corpus, read_texts
from scripts._command import Failure, command
from stateful_gpt.checkpoint import load_checkpoint
from stateful_gpt.depth import depth_profile
from stateful_gpt.device import choose_device


@command("held_out_loss")
def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out loss of a model.")
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--texts", default="data/austen/held_out")
    helps = "line: every line is a text of its own, as in training with corpus.documents=line"
    parser.add_argument("--documents", choices=("file", "line"), default="file", help=helps)
    options = parser.parse_args()
    try:
        texts = read_texts("--texts", options.texts)
        checkpoint = load_checkpoint(options.model, device=choose_device("auto"))
        model, encoding = checkpoint.model, checkpoint.tokenizer
        block, lines = model.config.block_size, options.documents == "line"
        corpus = read_corpus("--texts", texts.values(), encoding, block_size=block, lines=lines)
        if corpus.size < 2:  # the first token is not predicted
            raise ValueError(f"--texts must have some text, got none in {options.texts}")
    except ValueError as error:  # of the texts, the model or its tokenizer
        raise Failure(str(error).replace("corpus.documents=line", "--documents line")) from None
    profile = depth_profile(model, corpus.windows(), depth=0, full=model.gate is not None)

    def stated(nll: float) -> str:
        per_character = nll / corpus.characters_per_prediction
        return f"{per_character:.4f} nats per character, {nll:.4f} nats per token"

    counted = f"{corpus.characters:,} character{'s' * (corpus.characters != 1)}"
    print(f"{options.model} on {', '.join(texts)}: {stated(profile.nll[0])}, {counted}")
    if profile.nll_full is not None:
        full = stated(profile.nll_full)
        print(f"with hidden states fed back, at the depth of generation: {full}")


if __name__ == "__main__":
    sys.exit(main())
