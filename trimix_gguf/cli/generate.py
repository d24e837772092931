"""trimix generate: prompt -> streamed text."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import click

from trimix_gguf.cli.bars import token_progress
from trimix_gguf.cli.generation_options import (
    decoding_options,
    generation_settings,
    guard_words,
    mix_options,
    weights_line,
)
from trimix_gguf.cli.options import open_trio, read_text, trio_options
from trimix_gguf.cli.streams import write_answer
from trimix_gguf.cli.task_weights import task_weights


@click.command()
@click.argument("prompt", required=False)
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from a file; - is stdin.")
@trio_options
@mix_options
@click.option(
    "--average",
    type=click.Choice(["macro", "micro"]),
    help="How --task averages over its prompts. Default: macro.",
)
@click.option("--spans", nargs=2, metavar="OPEN CLOSE", help="Score only text between the marks.")
@click.option("--special", is_flag=True, help="Treat control tokens in the prompt as such.")
@decoding_options
@click.option("--grammar", metavar="FILE", help="The text follows this GBNF grammar.")
@click.option("--json-schema", metavar="FILE", help="The text follows this JSON schema.")
@click.option(
    "--prompt-cache", metavar="DIR", help="Keep the prompt as it was read, for the next run."
)
@click.option("--trace", metavar="FILE", help="Write each token's probabilities, as JSON lines.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def generate(prompt: str | None, file: str | None, **options: Any) -> None:
    """Continue PROMPT with the mix of three models.

    The prompt is the argument, a file, or standard input; the newline at the end of these two is
    not part of it. Without --trio, the small Kazakh trio
    that ships in the package answers.
    """
    if prompt is not None and file is not None:
        raise click.UsageError("give PROMPT or --file, not both")
    if options["average"] is not None and options["task"] is None:
        raise click.UsageError("--average goes with --task FILE")
    text = prompt
    if text in (None, "-"):  # a text file ends with a newline that is none of the prompt's
        text = read_text(file or "-").removesuffix("\n").removesuffix("\r")
    settings = generation_settings(options)
    settings |= _own_settings(options)
    with ExitStack() as stack:
        trace = options.pop("trace")
        special, spans = options.pop("special"), options.pop("spans")
        task, average = options.pop("task"), options.pop("average")
        as_json = options.pop("as_json")
        trio = stack.enter_context(open_trio(options))
        segments = trio.prompt(text, special=special, spans=spans)
        if task is not None:
            settings["weights"] = task_weights(trio, task, settings, average)
        out = None
        if trace is not None:
            out = stack.enter_context(open(trace, "w", encoding="utf-8"))
            settings["trace"] = "all"
        _run(trio, segments, settings, as_json, out)


def _own_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Take out what only this command has for stream_generate."""
    settings: dict[str, Any] = {}
    if (folder := options.pop("prompt_cache")) is not None:
        settings["prompt_cache"] = Path(folder)
    for name in ("grammar", "json_schema"):
        if (path := options.pop(name)) is not None:
            settings[name] = read_text(path)
    return settings


def _run(
    trio: Any, prompt: Any, settings: dict[str, Any], as_json: bool, trace: TextIO | None
) -> None:
    from trimix_gguf.answering.generation import stream_generate
    from trimix_gguf.answering.request import join_events

    events: list[Any] = []
    bar = ExitStack()
    progress = bar.enter_context(token_progress(prompt.n_tokens(), "Reading the prompt"))

    def announce(selection: Any) -> None:
        bar.close()
        print(weights_line(selection), file=sys.stderr)

    interrupted = False
    try:
        for event in stream_generate(
            trio, prompt, on_selection=announce, progress=progress, **settings
        ):
            events.append(event)
            if trace is not None:
                _write_trace(trio, event, trace)
            if not as_json:
                write_answer(event.text)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        bar.close()
    if as_json and events:
        print(json.dumps(_report(join_events(events), interrupted), ensure_ascii=False))
    elif events:
        print()
    if interrupted:
        raise KeyboardInterrupt
    if events and events[-1].guard is not None:
        print(f"note: {guard_words(events[-1].guard)}", file=sys.stderr)
    if events and events[-1].finish_reason == "context":
        message = f"the context of {trio.n_ctx} tokens is full; the text is correct up to there"
        print(f"note: {message}; raise --n-ctx for more", file=sys.stderr)


def _write_trace(trio: Any, event: Any, file: TextIO) -> None:
    """A line for each token, and for the one that ended the text."""
    tokens = event.tokens if event.end is None else (*event.tokens, event.end)
    for token in tokens:
        piece = trio.models["large_ins"].piece(token.id, special=True)
        row = {
            "id": token.id,
            "piece": piece.decode("utf-8", "replace"),
            "probabilities": token.probabilities,
            "weights": token.mix.to_json(),
            "from_draft": token.from_draft,
        }
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _report(whole: Any, interrupted: bool) -> dict[str, Any]:
    return {
        "text": whole.text,
        "finish_reason": "interrupt" if interrupted else whole.finish_reason,
        "weights": whole.selection.to_json(),
        "n_prompt_tokens": whole.n_prompt,
        "n_tokens": whole.n_tokens,
        "perplexity": whole.selection.perplexities(),
        "guard": whole.guard,
        "speed": whole.speed,
        "seed": whole.seed,
    }
