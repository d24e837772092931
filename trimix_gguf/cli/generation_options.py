"""What every command that lets a mix answer shares: how weights are chosen, how tokens are."""

from dataclasses import Field, fields
from typing import Any

import click

from trimix_gguf.choosing.methods import AUTO, file_methods, runtime_methods
from trimix_gguf.cli.options import (
    Decorator,
    grid_option,
    named_trio,
    option_group,
    parse_grid_options,
    parse_mix,
    whole_number,
)
from trimix_gguf.cli.task_weights import check_task
from trimix_gguf.cli.tuning_notes import say_tuning
from trimix_gguf.mixing.fusion import METHODS
from trimix_gguf.mixing.sampling import N_SEEDS, RANGES, Sampling

# By the field of Sampling; {} is its default. Its text fields are files: see cli/generate.py.
SAMPLING_HELP = {
    "temperature": "Higher: more varied. 0: greedy. Default {}.",
    "top_k": "Choose among the K most probable tokens; 0: all. Default {}.",
    "top_p": "Choose among the tokens that make up this probability. Default {}.",
    "min_p": "Drop tokens below this share of the best one's probability. Default {}.",
    "repeat_penalty": "Weaken earlier tokens by this factor. Default {}: off.",
    "frequency_penalty": "Subtract this for each earlier occurrence of a token.",
    "presence_penalty": "Subtract this once if a token occurred earlier.",
    "penalty_last_n": "How many last tokens penalties look at; -1: all. Default {}.",
    "dry_multiplier": "Strength of DRY, against repeated sequences. Default {}: off.",
    "dry_base": "How fast DRY grows with the length of a repetition. Default {}.",
    "dry_allowed_length": "Longest repetition that DRY does not weaken. Default {}.",
    "dry_last_n": "How many last tokens DRY looks at; -1: all. Default {}.",
    "xtc_probability": "Chance to drop the most probable tokens (XTC). Default {}: off.",
    "xtc_threshold": "Probability above which XTC may drop a token. Default {}.",
    "mirostat": "Mirostat version, in place of top-k, top-p and min-p; 0: off.",
    "mirostat_tau": "Mirostat's target surprise, in bits. Default {}.",
    "mirostat_eta": "Mirostat's learning rate. Default {}.",
    "seed": "The same seed gives the same text. Default: random.",
}


def _sampling_option(field: Field[Any]) -> Decorator:
    kind: Any = field.type
    if field.name == "seed":
        kind = click.IntRange(0, N_SEEDS - 1)
    elif kind is int and field.name in RANGES:
        low, high = RANGES[field.name]
        kind = click.IntRange(int(low), int(high))
    text = SAMPLING_HELP[field.name]
    if "{}" in text:
        text = text.format(f"{field.default:g}")
    return click.option(f"--{field.name.replace('_', '-')}", type=kind, help=text)


# The options that say how weights are chosen.
mix_options = option_group(
    click.option(
        "--method",
        type=click.Choice((*runtime_methods(), *file_methods())),
        help="How weights are chosen, or fixed ones; default auto. See `trimix help weights`.",
    ),
    click.option("--weights", metavar="ALPHA,BETA", help="Fixed weights in place of a method."),
    click.option(
        "--task",
        metavar="FILE",
        help="Choose the weights once, for all prompts that are like those of a file.",
    ),
    grid_option,
    click.option(
        "--last", type=click.IntRange(min=1), help="Score only the last N tokens of the prompt."
    ),
    click.option(
        "--score-tokens",
        metavar="auto|all|N",
        help="Tokens of the prompt that are scored. auto: enough for the method auto, all for "
        "the others.",
    ),
)
# The options that say how tokens are picked, and where an answer ends.
decoding_options = option_group(
    click.option(
        "-n",
        "--max-tokens",
        type=click.IntRange(min=0),
        help="At most so many tokens. Default 128; in a chat, 512.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="Stop before this text. Can be given several times.",
    ),
    click.option(
        "--plausibility-threshold",
        type=float,
        metavar="P",
        help="Drop tokens below this share of large_ins' best probability.",
    ),
    click.option(
        "--speculative",
        type=click.Choice(["auto", "on", "off"]),
        help="Draft tokens; auto (default): where it pays. The text is the same.",
    ),
    click.option("--n-draft", metavar="auto|N", help="Tokens per draft; auto: the fastest number."),
    *(_sampling_option(field) for field in fields(Sampling) if field.name in SAMPLING_HELP),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="ID=BIAS",
        help="Add BIAS to the logit of token ID. Can be given several times.",
    ),
)


def generation_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take stream_generate's options out of those above; unset flags stay out."""
    settings: dict[str, Any] = {"stop": options.pop("stop")}
    method, weights = options.pop("method"), options.pop("weights")
    if weights is not None and method is not None:
        raise click.UsageError("give --weights or --method, not both")
    check_task(options["task"], method, weights)
    mix = METHODS.get(method) if weights is None else parse_mix(weights)
    if mix is not None and (asked := _of_a_choice(options)):
        by = "--weights" if method is None else f"--method {method}"
        raise click.UsageError(f"give {asked[0]} or {by}, not both: fixed weights are not chosen")
    if method is None and mix is None:
        method, mix = _of_the_trio(options)
    if mix is not None:
        settings["weights"] = mix
    elif method is not None:
        settings["method"] = method
    if mix is None and method in (None, AUTO):
        say_tuning(options)
    settings["grid"] = parse_grid_options(options.pop("grid"))
    names = ("last", "max_tokens", "plausibility_threshold", "speculative", "n_draft")
    for name in (*names, *SAMPLING_HELP):
        if (value := options.pop(name)) is not None:
            settings[name] = value
    if (tokens := options.pop("score_tokens")) is not None:
        settings["score_tokens"] = _word_or_number("--score-tokens", tokens, "auto", "all")
    length = _word_or_number("--n-draft", settings.pop("n_draft", "auto"), "auto")
    if length != "auto":
        settings["n_draft"] = length
    biases = options.pop("logit_bias")
    if biases:
        try:
            pairs = (b.split("=") for b in biases)
            settings["logit_bias"] = {int(i): float(v) for i, v in pairs}
        except ValueError:
            raise click.UsageError("--logit-bias takes ID=BIAS, such as 42=-5") from None
    return settings


def _of_the_trio(options: dict[str, Any]) -> tuple[str | None, Any]:
    """(method, fixed Mix) of the named trio; where the user asks for a choice, not a fixed one."""
    trio_file = named_trio(options)
    if trio_file is None:
        return None, None
    if trio_file.fixed_mix is not None and (_of_a_choice(options) or options.get("task")):
        return None, None
    return trio_file.method, trio_file.fixed_mix


def _of_a_choice(options: dict[str, Any]) -> list[str]:
    """The options given that say how a prompt chooses weights; fixed ones would ignore them."""
    names = ("grid", "last", "score_tokens")
    return [f"--{name.replace('_', '-')}" for name in names if options[name]]


def _word_or_number(option: str, text: str, *words: str) -> int | str:
    if text in words:
        return text
    number = whole_number(text)
    if number is None:
        raise click.UsageError(f"{option} takes {', '.join(words)}, or a number of at least 1")
    return number


def weights_line(selection: Any) -> str:
    """The mix in words, and the prompt's perplexities where it was chosen by those."""
    ppl = selection.perplexities()
    line = f"weights: {mix_words(selection.mix)} ({selection.method})"
    if ppl:
        about = "about " if selection.score.is_estimate else ""
        line += f"; perplexity {about}" + ", ".join(f"{k} {v:.2f}" for k, v in ppl.items())
    return line


def guard_words(n_tokens: int) -> str:
    """What the collapse guard did."""
    return f"the mix repeated itself; after {n_tokens} tokens large_ins went on by itself"


def mix_words(mix: Any) -> str:
    """Its weights, and its plausibility threshold where it masks."""
    words = f"alpha {mix.weights.alpha:.3g}, beta {mix.weights.beta:.3g}"
    return words + (f", threshold {mix.plausibility_threshold:.3g}" if mix.is_masked else "")
