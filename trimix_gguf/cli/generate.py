"""trimix generate: prompt -> streamed text."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from trimix_gguf.cli.options import (
    grid_option,
    named_trio,
    open_trio,
    parse_grid_options,
    parse_weights,
    read_text,
    token_progress,
    trio_options,
)

_METHODS = [
    "ppl", "ent", "large_ins", "small_cpt", "small_base", "proxy-tuning", "contrastive",
]  # fmt: skip


@click.command()
@click.argument("prompt", required=False)
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from a file; - is stdin.")
@trio_options
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    help="How weights are chosen (ppl), or a method with fixed ones.",
)
@click.option("--weights", metavar="ALPHA,BETA", help="Fixed weights instead of a method.")
@click.option("--task", metavar="FILE", help="Choose weights for the prompts of a file instead.")
@click.option("--average", type=click.Choice(["macro", "micro"]), help="Over the task's prompts.")
@grid_option
@click.option("--last", type=click.IntRange(min=1), help="Score only the last N prompt tokens.")
@click.option("--spans", nargs=2, metavar="OPEN CLOSE", help="Score only text between the marks.")
@click.option("--special", is_flag=True, help="Read control tokens in the prompt.")
@click.option("-n", "--max-tokens", type=click.IntRange(min=0), help="Default 128.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Stop before this text.")
@click.option("--plausibility-threshold", type=float, metavar="P", help="Contrastive cut-off.")
@click.option(
    "--speculative",
    type=click.Choice(["auto", "on", "off"]),
    help="Let small_cpt draft tokens; auto (default): where it pays. The text is the same.",
)
@click.option("--n-draft", metavar="auto|N", help="Tokens drafted at once; auto: what pays most.")
@click.option("--temperature", type=float, help="0 is greedy.")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--repeat-penalty", type=float)
@click.option("--frequency-penalty", type=float)
@click.option("--presence-penalty", type=float)
@click.option("--penalty-last-n", type=int)
@click.option("--dry-multiplier", type=float)
@click.option("--xtc-probability", type=float)
@click.option("--xtc-threshold", type=float)
@click.option("--mirostat", type=click.IntRange(0, 2))
@click.option("--mirostat-tau", type=float)
@click.option("--mirostat-eta", type=float)
@click.option("--seed", type=click.IntRange(0, 2**32 - 2), help="Default: another each time.")
@click.option("--grammar", metavar="FILE", help="GBNF grammar that the text must follow.")
@click.option("--json-schema", metavar="FILE", help="JSON schema that the text must follow.")
@click.option("--logit-bias", multiple=True, metavar="ID=BIAS", help="Added to a token's logit.")
@click.option("--prompt-cache", metavar="DIR", help="Keep the prompt as read, for the next run.")
@click.option("--trace", metavar="FILE", help="Write each token's probabilities, as JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def generate(prompt: str | None, file: str | None, **options: Any) -> None:
    """Continue PROMPT with the mix of three models.

    Without a trio, the small Kazakh one that ships with the package answers. The prompt is the
    argument, a file, or standard input.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    text = prompt if prompt not in (None, "-") else read_text(file or "-")
    settings = _generation_settings(options)
    with ExitStack() as stack:
        trace = options.pop("trace")
        special, spans = options.pop("special"), options.pop("spans")
        task, average = options.pop("task"), options.pop("average")
        as_json = options.pop("as_json")
        trio = stack.enter_context(open_trio(options))
        segments = trio.prompt(text, special=special, spans=spans)
        if task is not None:
            settings["weights"] = _task_weights(trio, task, average, settings)
        if trace is not None:
            out = stack.enter_context(open(trace, "w", encoding="utf-8"))
            settings["trace"] = lambda row: out.write(json.dumps(row, ensure_ascii=False) + "\n")
        _run(trio, segments, settings, as_json)


def _generation_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take stream_generate's own arguments out of the options; unset flags stay out."""
    from trimix_gguf.fusion import METHODS

    settings: dict[str, Any] = {"stop": options.pop("stop")}
    method, weights = options.pop("method"), options.pop("weights")
    if weights is not None and method is not None:
        raise click.UsageError("give --weights or --method, not both")
    weights = None if weights is None else parse_weights(weights)
    if method is None and weights is None:
        method, weights = _own_mix(options)
    if weights is not None:
        settings["weights"] = weights
    elif method in METHODS:
        settings["weights"] = METHODS[method].weights
        settings["plausibility_threshold"] = METHODS[method].plausibility_threshold
    elif method is not None:
        settings["method"] = method
    settings["grid"] = parse_grid_options(options.pop("grid"))
    for name in ("last", "max_tokens", "plausibility_threshold", "speculative", "n_draft"):
        if (value := options.pop(name)) is not None:
            settings[name] = value
    if settings.get("n_draft") is not None:
        settings["n_draft"] = _draft_length(settings["n_draft"])
    biases = options.pop("logit_bias")
    if biases:
        try:
            pairs = (b.split("=") for b in biases)
            settings["logit_bias"] = {int(i): float(v) for i, v in pairs}
        except ValueError:
            raise click.UsageError("--logit-bias takes ID=BIAS, such as 42=-5") from None
    if (folder := options.pop("prompt_cache")) is not None:
        settings["prompt_cache"] = Path(folder)
    for name in ("grammar", "json_schema"):
        if (path := options.pop(name)) is not None:
            settings[name] = read_text(path)
    for name in (
        "temperature", "top_k", "top_p", "min_p", "repeat_penalty", "frequency_penalty",
        "presence_penalty", "penalty_last_n", "dry_multiplier", "xtc_probability",
        "xtc_threshold", "mirostat", "mirostat_tau", "mirostat_eta", "seed",
    ):  # fmt: skip
        if (value := options.pop(name)) is not None:
            settings[name] = value
    return settings


def _own_mix(options: dict[str, Any]) -> tuple[str | None, Any]:
    """(method, weights) of the named trio; where the user asks for a choice, not fixed ones."""
    trio_file = named_trio(options)
    if trio_file is None:
        return None, None
    if trio_file.fixed_weights is not None and (options["grid"] or options["task"]):
        return None, None
    return trio_file.method, trio_file.weights


def _draft_length(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise click.UsageError("--n-draft takes auto, or a number of at least 1")
    return int(text)


def _task_weights(trio: Any, task: str, average: Any, settings: dict[str, Any]) -> Any:
    from trimix_gguf.cli.score import split_texts
    from trimix_gguf.selection import select_weights

    prompts = [trio.prompt(t) for t in split_texts(read_text(task))]
    total = sum(p.n_tokens() for p in prompts)
    chosen = {k: settings.pop(k) for k in ("method", "grid", "last") if k in settings}
    with token_progress(total, f"Scoring {len(prompts)} prompts") as progress:
        return select_weights(
            trio, prompts, average=average or "macro", progress=progress, **chosen
        )


def _run(trio: Any, prompt: Any, settings: dict[str, Any], as_json: bool) -> None:
    from trimix_gguf.generation import stream_generate

    parts: list[str] = []
    last = None
    bar = ExitStack()
    progress = bar.enter_context(token_progress(prompt.n_tokens(), "Reading the prompt"))

    def announce(selection: Any) -> None:
        w, ppl = selection.weights, selection.perplexities()
        line = f"weights: alpha {w.alpha:.3g}, beta {w.beta:.3g} ({selection.method})"
        if ppl:
            line += "; perplexity " + ", ".join(f"{k} {v:.2f}" for k, v in ppl.items())
        bar.close()
        print(line, file=sys.stderr)

    interrupted = False
    try:
        for last in stream_generate(
            trio, prompt, on_selection=announce, progress=progress, **settings
        ):
            parts.append(last.text)
            if not as_json:
                sys.stdout.write(last.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    if as_json and last is not None:
        print(json.dumps(_report(last, "".join(parts), interrupted), ensure_ascii=False))
    elif parts:
        print()
    if interrupted:
        raise KeyboardInterrupt
    if last is not None and last.finish_reason == "context":
        message = f"the context of {trio.n_ctx} tokens is full; what came is whole up to there"
        print(f"note: {message}; raise --n-ctx for more", file=sys.stderr)


def _report(last: Any, text: str, interrupted: bool) -> dict[str, Any]:
    w = last.selection.weights
    return {
        "text": text,
        "finish_reason": "interrupt" if interrupted else last.finish_reason,
        "weights": {"alpha": w.alpha, "beta": w.beta, "method": last.selection.method},
        "n_prompt_tokens": last.n_prompt_tokens,
        "n_tokens": last.n_tokens,
        "perplexity": last.selection.perplexities(),
        "speed": last.speed,
        "seed": last.seed,
    }
