"""The command line of ``python -m stateful_gpt.generate``: a prompt goes in, text comes out.

The text goes to standard output as it is generated, everything else to standard error. Exit codes:
0 done, 1 the model or what is asked of it failed, 2 wrong arguments, 130 interrupted.
"""

import argparse
import codecs
import math
import sys
from collections.abc import Callable

from stateful_gpt.console import as_text, cut, run_command
from stateful_gpt.untrusted import require_memory

# written out, because --help need not wait for torch
KINDS = ("log_prob", "logit", "prob", "none", "hidden_state")
STARTS = ("cold", "carried")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("float32", "float64", "bfloat16")
SEPARATOR = "-" * 15  # nanoGPT's


def _number(
    allowed: str, holds: Callable[[float], bool], kind: type[float] = float
) -> Callable[[str], float]:
    """What turns a word into a finite number for which ``holds``, as ``allowed`` puts it."""

    def number(text: str) -> float:
        try:
            value = kind(text)
            if math.isfinite(value) and holds(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"must be {allowed}, got {cut(text)}")

    return number


_FINITE = _number("a finite number", lambda value: True)
_ABOVE_0 = _number("a finite number above 0", lambda value: value > 0)
_FROM_0 = _number("a finite number of at least 0", lambda value: value >= 0)
_PART = _number("above 0 and at most 1", lambda value: 0 < value <= 1)
_COUNT = _number("a whole number of at least 1", lambda value: value >= 1, int)
_COUNT_OR_0 = _number("a whole number of at least 0", lambda value: value >= 0, int)
_SEED = _number(f"a whole number of 0 to {2**63 - 1}", lambda value: 0 <= value < 2**63, int)


def _layers(text: str) -> tuple[int, ...] | None:
    if text == "all":
        return None
    if all(word.isascii() and word.isdigit() for word in text.split(",")) and len(text) < 1000:
        return tuple(map(int, text.split(",")))
    raise argparse.ArgumentTypeError(f"must be all or such as 0,1,5, got {cut(text)}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m stateful_gpt.generate",
        description="Continue a prompt, feeding the model's estimates of all tokens, or its hidden"
        " states, back into it.",
    )
    add = parser.add_argument_group("text").add_argument
    prompt = "the text to continue; - reads it from stdin; '' begins a text with <|endoftext|>"
    slide = (
        "tokens that a full window drops at once; default a quarter of the model's block, 1 is"
        " nanoGPT's cropping, and recomputes everything for every token"
    )
    add("--prompt", required=True, help=prompt)
    add("--begin", action="store_true", help="read <|endoftext|> before the prompt, as before ''")
    add("--samples", type=_COUNT, default=1, metavar="N", help="so many texts, printed at the end")
    add("--max_new_tokens", type=_COUNT_OR_0, default=100, metavar="N", help="default 100")
    add("--slide", type=_COUNT, metavar="N", help=slide)
    add("--greedy", action="store_true", help="always the most likely token")
    add("--temperature", type=_ABOVE_0, metavar="X", help="default 0.8")
    add("--top_k", type=_COUNT, metavar="K", help="draw from the K most likely")
    add("--seed", type=_SEED, default=0, metavar="N", help="default 0")
    add = parser.add_argument_group("feedback").add_argument
    kinds = "default log_prob; hidden_state needs a model trained for it, at --strength 1"
    strength = (
        "of token feedback: above 0 attends to the expected, below 0 to the surprising; of hidden"
        " states: what they add to embeddings is multiplied by it; default 0, nothing"
    )
    both = "feed hidden states back as well, at this strength; default 0"
    shift = "of hidden states: 1 (default) that of the step before, 0 the token's own"
    rest = "passes that move no estimate by more are the last; 0: only once none can; default 0.001"
    add("--feedback", choices=KINDS, default="log_prob", help=kinds)
    add("--strength", type=_FINITE, default=0.0, metavar="X", help=strength)
    add("--layers", type=_layers, metavar="LIST", help="all (default), or such as 0,1,5")
    add("--hidden_strength", type=_FINITE, default=0.0, metavar="X", help=both)
    add("--shift", type=int, choices=(0, 1), default=1, help=shift)
    add("--iterations", type=_COUNT, default=64, metavar="N", help="most passes a token")
    add("--tolerance", type=_FROM_0, default=1e-3, metavar="NATS", help=rest)
    add("--damping", type=_PART, default=1.0, metavar="X", help="part of a pass fed on; default 1")
    add("--start", choices=STARTS, default="carried")
    add = parser.add_argument_group("model").add_argument
    models = (
        "bundled, bundled_stateful, smollm2, a ckpt.pt, a folder (nanoGPT's, this project's, or any"
        " causal model of transformers) or a name on the hub"
    )
    add("--model", default="bundled", help=models)
    add("--tokenizer", help="gpt2, byte or a file, instead of the model's own")
    add("--device", choices=DEVICES, default="auto")
    add("--dtype", choices=DTYPES, default="float32")
    options = parser.parse_args(_as_options(sys.argv[1:] if arguments is None else arguments))
    alone = options.feedback == "hidden_state"
    if options.greedy and (options.temperature or options.top_k):
        parser.error("--greedy draws the most likely token: leave out --temperature and --top_k")
    if options.greedy and options.samples > 1:
        parser.error("--greedy always draws the same text: leave out --samples")
    if alone and options.layers is not None:
        parser.error("--layers are of attention, not of hidden states")
    if options.hidden_strength and options.feedback in ("none", "hidden_state"):
        parser.error("--hidden_strength adds to a feedback of tokens: leave it out")
    if options.shift == 0 and not alone and not options.hidden_strength:
        parser.error("--shift 0 is of hidden states, and none are fed back: leave it out")
    return options


def _as_options(arguments: list[str]) -> list[str]:
    """``--max-new-tokens`` as spelled here; ``--strength -1e-3``, ``--prompt -x`` as one word."""
    words: list[str] = []
    for word in arguments:
        name, equals, value = word.partition("=")
        dashed = ("--strength", "--hidden_strength", "--prompt")  # what may begin with a dash
        if words and words[-1] in dashed and not name.startswith("--"):
            words[-1] += f"={word}"
        elif name.startswith("--") and " " not in name:  # else it is a text, to argparse too
            words.append(f"--{name[2:].replace('-', '_')}{equals}{value}")
        else:
            words.append(word)
    return words


def main(arguments: list[str] | None = None) -> int:
    def body() -> int:
        try:
            return _run(parse_arguments(arguments))
        except ValueError as error:  # CheckpointError too
            return _tell(str(error), 1)

    less = "ask for fewer --samples, a shorter text, or a smaller --model"
    too_large = f"the model and its text: {less}"
    return run_command("generate", body, verbatim=True, too_large=too_large)


def _tell(sentence: str, code: int = 0) -> int:
    print(f"generate: {sentence}", file=sys.stderr)
    return code


def _run(options: argparse.Namespace) -> int:
    import torch

    from stateful_gpt.checkpoint import load_model
    from stateful_gpt.device import DTYPES, choose_device
    from stateful_gpt.feedback import Feedback
    from stateful_gpt.generate import Sampling, Start, Window, generate
    from stateful_gpt.recompute import Outcome, RecomputeConfig
    from stateful_gpt.tokenizer import END_OF_TEXT, decode, end_token, token_bytes

    device = choose_device(options.device)
    prompt = as_text(options.prompt)
    if prompt == "-":  # without the line feed that echo adds
        prompt = as_text(sys.stdin.read()).removesuffix("\n") if sys.stdin is not None else ""
    checkpoint = load_model(
        options.model, tokenizer=options.tokenizer, dtype=DTYPES[options.dtype], device=device
    )
    model, encoding = checkpoint.model, checkpoint.tokenizer
    tokens = encoding.encode_ordinary(prompt)
    if not tokens or (options.begin and not encoding.encode_ordinary("")):
        end = end_token(encoding)
        if end is None:
            raise ValueError(
                f"the tokenizer {encoding.name!r} has no {END_OF_TEXT} to begin a text with:"
                " give a --prompt of at least one character, without --begin"
            )
        tokens = [end, *tokens]
    feedback = Feedback.of_kind(
        options.feedback,
        options.strength,
        layers=options.layers,
        hidden_strength=options.hidden_strength,
        shift=options.shift,
    )
    if feedback.of_hidden and not model.takes_hidden_states:
        raise ValueError(
            "hidden states can be fed back only to a model with a gate for them, such as"
            f" bundled_stateful; {options.model} has none"
        )
    largest = max(options.layers or (0,))
    if largest >= model.n_layer:
        raise ValueError(f"--layers must be from 0 to {model.n_layer - 1}, got {largest}")
    count, alone = options.samples, options.samples == 1
    length = len(tokens) + options.max_new_tokens
    needed = 8 * count * length * (3 + (model.width if feedback.of_hidden else 0))
    require_memory(needed, f"{count} texts of up to {length:,} tokens need")
    if options.feedback != "none" and not feedback.active:
        _tell("at --strength 0 nothing is fed back: this is the plain model")
    slide = min(options.slide or max(1, model.block_size // 4), model.block_size)
    writer = codecs.getincrementaldecoder("utf-8")("replace")
    outgrown = False

    def say_once_if_outgrown(window: Window) -> None:
        nonlocal outgrown
        if max(window.starts) > 0 and not outgrown:
            outgrown = True
            costs = "every token costs" if slide == 1 else f"one token in {slide} costs"
            if alone and sys.stdout.isatty():
                print(file=sys.stderr)  # the text stands there
            _tell(
                f"the text has outgrown the model's block of {model.block_size} tokens: from here"
                f" on {costs} a recompute of the whole block (--slide)"
            )

    def take(row: int, token: int) -> None:
        if alone and token not in encoding.end_tokens:
            print(writer.decode(token_bytes(encoding, token)), end="", flush=True)
            if getattr(sys.stdout, "lost", None) is not None:
                sys.exit(0)  # nobody is there to go on for

    if alone:
        print(prompt, end="", flush=True)
    undamped = feedback.triangular and options.damping == 1.0
    result = generate(
        model,
        [tokens] * count,
        max_new_tokens=options.max_new_tokens,
        feedback=feedback,
        config=RecomputeConfig(
            # with nothing fed back the first pass is already the answer
            iterations=options.iterations if feedback.active else 1,
            tolerance=options.tolerance,
            damping=options.damping,
            window="all" if undamped else None,
        ),
        start=Start(options.start),
        sampling=Sampling(
            temperature=None if options.greedy else options.temperature or 0.8,
            top_k=options.top_k,
            vocab_size=encoding.n_vocab,
            end_tokens=encoding.end_tokens,
        ),
        slide=slide,
        generators=torch.Generator(device).manual_seed(options.seed),
        watch=say_once_if_outgrown,
        on_token=take,
    )
    if alone:
        print(writer.decode(b"", final=True))
    else:
        ends = set(encoding.end_tokens)
        drawn = ([t for t in text[len(tokens) :] if t not in ends] for text in result.tokens)
        print(f"\n{SEPARATOR}\n".join(prompt + decode(encoding, ids) for ids in drawn))
    outcomes = [outcome for of_text in result.outcomes for outcome in of_text]
    good = (Outcome.SETTLED, Outcome.WITHIN_TOLERANCE)
    unsettled = [outcome for outcome in outcomes if outcome not in good]
    if feedback.active and unsettled:
        _tell(
            f"at {len(unsettled)} of {len(outcomes)} tokens the estimates had not settled after"
            f" {options.iterations} passes (--iterations)"
        )
    if Outcome.DIVERGED in unsettled:
        fed = "the estimates diverged: try a smaller --strength"
        own = "the model's own outputs are not finite: its weights are damaged, or too large"
        return _tell(fed if feedback.active else own, 1)
    return 0
