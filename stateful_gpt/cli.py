"""The command line of ``python -m stateful_gpt.generate``: a prompt goes in, text comes out.

The text goes to standard output as it is generated, everything else to standard error. Exit codes:
0 done, 1 the model or the computation failed, 2 wrong arguments, 130 interrupted.
"""

import argparse
import codecs
import math
import os
import sys
from collections.abc import Callable

import torch

from stateful_gpt.checkpoint import CheckpointError, load_checkpoint
from stateful_gpt.device import DEVICES, DTYPES, choose_device
from stateful_gpt.feedback import KINDS, Feedback
from stateful_gpt.generate import Start, generate
from stateful_gpt.recompute import Outcome, RecomputeConfig
from stateful_gpt.solving import Sampling
from stateful_gpt.tokenizer import END_OF_TEXT, end_token, token_text
from stateful_gpt.windowed import Windowed


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stateful_gpt.generate",
        description="Continue a prompt, feeding the model's estimates of all tokens, or its hidden"
        " states, back into it.",
    )
    text = parser.add_argument_group("text")
    text.add_argument(
        "--prompt",
        required=True,
        help="the text to continue; - reads it from stdin; '' begins a text with <|endoftext|>",
    )
    text.add_argument(
        "--begin",
        action="store_true",
        help="the prompt begins a text: read <|endoftext|> before it, as an empty prompt does",
    )
    text.add_argument(
        "--samples",
        type=_count(1),
        default=1,
        metavar="N",
        help="so many texts, each from a state of its own; they are printed when all are done",
    )
    text.add_argument("--max_new_tokens", type=_count(0), default=100, metavar="N")
    text.add_argument("--greedy", action="store_true", help="always the most likely token")
    text.add_argument("--temperature", type=_positive, metavar="X", help="default 0.8")
    text.add_argument("--top_k", type=_count(1), metavar="K", help="draw from the K most likely")
    text.add_argument("--seed", type=_seed, default=0, metavar="N")
    feedback = parser.add_argument_group("feedback")
    feedback.add_argument(
        "--feedback",
        choices=KINDS,
        default="log_prob",
        help="default log_prob; hidden_state needs a model trained for it, at --strength 1",
    )
    feedback.add_argument(
        "--strength",
        type=_finite,
        default=0.0,
        metavar="X",
        help="of token feedback: above 0 attends to the expected, below 0 to the surprising; of"
        " hidden states: what they add to embeddings is multiplied by it; default 0, nothing",
    )
    feedback.add_argument(
        "--iterations", type=_count(1), default=64, metavar="N", help="most passes a token"
    )
    feedback.add_argument(
        "--tolerance",
        type=_not_negative,
        default=1e-3,
        metavar="NATS",
        help="stop passes that move no estimate by more than this;"
        " 0 stops only once none can move; default 0.001",
    )
    feedback.add_argument("--start", choices=[s.value for s in Start], default="carried")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default="bundled", help="bundled, a folder, a ckpt.pt or a hub name"
    )
    model.add_argument("--tokenizer", help="gpt2, byte or a file, instead of the model's own")
    model.add_argument("--device", choices=DEVICES, default="auto")
    model.add_argument("--dtype", choices=list(DTYPES), default="float32")
    options = parser.parse_args(_join_strength(sys.argv[1:] if arguments is None else arguments))
    if options.greedy and (options.temperature is not None or options.top_k is not None):
        parser.error("--greedy draws the most likely token: leave out --temperature and --top_k")
    if options.greedy and options.samples > 1:
        parser.error("--greedy always draws the same text: leave out --samples")
    return options


def _join_strength(arguments: list[str]) -> list[str]:
    """``--strength -1e-3`` as one word: argparse takes the second for an option."""
    joined: list[str] = []
    for word in arguments:
        if joined and joined[-1] == "--strength":
            joined[-1] = f"--strength={word}"
        else:
            joined.append(word)
    return joined


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        return _run(options)
    except (CheckpointError, ValueError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("generate: the device's memory does not hold the model and its text", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output has gone; keep Python from complaining again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    checkpoint = load_checkpoint(
        options.model, tokenizer=options.tokenizer, dtype=DTYPES[options.dtype], device=device
    )
    encoding = checkpoint.tokenizer
    tokens = encoding.encode_ordinary(prompt)
    end = end_token(encoding)
    if options.begin or not prompt:
        if end is None:
            raise ValueError(
                f"the tokenizer {encoding.name!r} has no {END_OF_TEXT} to begin a text with:"
                " give a --prompt of at least one character, without --begin"
            )
        tokens = [end, *tokens]
    feedback = Feedback.of_kind(options.feedback, options.strength)
    if feedback.of_hidden and checkpoint.model.gate is None:
        raise ValueError(
            f"--feedback hidden_state needs a model with a gate for it, such as bundled_stateful;"
            f" {options.model} has none"
        )
    decoder = codecs.getincrementaldecoder("utf-8")
    writers = [decoder(errors="replace") for _ in range(options.samples)]
    texts = [prompt] * options.samples

    def show(row: int, token: int) -> None:
        if token != end:
            try:
                raw = encoding.decode_single_token_bytes(token)
            except KeyError:
                raw = token_text(encoding, token).encode()
            piece = writers[row].decode(raw)
            texts[row] += piece
            if options.samples == 1:
                print(piece, end="", flush=True)

    if options.samples == 1:
        print(prompt, end="", flush=True)
    result = generate(
        checkpoint.model,
        [tokens] * options.samples,
        max_new_tokens=options.max_new_tokens,
        feedback=feedback,
        config=RecomputeConfig(
            # with nothing fed back the first pass is already the answer
            iterations=options.iterations if feedback.active else 1,
            tolerance=options.tolerance,
        ),
        solver=Windowed("all"),
        start=Start(options.start),
        sampling=Sampling(
            temperature=None if options.greedy else options.temperature or 0.8,
            top_k=options.top_k,
            vocab_size=encoding.n_vocab,
            end_token=end,
        ),
        generator=torch.Generator(device).manual_seed(options.seed),
        on_token=show,
    )
    for text, writer in zip(texts, writers, strict=True):
        rest = writer.decode(b"", final=True)
        print(rest if options.samples == 1 else text + rest)
    outcomes = [outcome for of_text in result.outcomes for outcome in of_text]
    unsettled = [
        outcome
        for outcome in outcomes
        if outcome not in (Outcome.SETTLED, Outcome.WITHIN_TOLERANCE)
    ]
    if feedback.active and unsettled:
        print(
            f"generate: at {len(unsettled)} of {len(outcomes)} tokens the estimates had"
            f" not settled after {options.iterations} passes (--iterations)",
            file=sys.stderr,
        )
    if Outcome.DIVERGED in unsettled:
        print("generate: the estimates diverged: try a smaller --strength", file=sys.stderr)
        return 1
    return 0


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {text}")
    return value


def _positive(text: str) -> float:
    value = _finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text} (or use --greedy)")
    return value


def _not_negative(text: str) -> float:
    value = _finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def _seed(text: str) -> int:
    value = _count(0)(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63, got {text}")
    return value


def _count(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number of at least {least}, got {text!r}"
            )
        return value

    return whole_number
