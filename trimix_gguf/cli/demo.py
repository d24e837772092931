"""trimix demo: what each model answers to a text and to a question, and what the mix answers."""

import json
import shlex
import sys
from typing import Any

import click

from trimix_gguf.cli.generation_options import guard_words, mix_words
from trimix_gguf.cli.options import about_trio, named_trio, open_trio, trio_options
from trimix_gguf.cli.streams import printable

_LANGUAGE = "kk"  # of the prompts
_TEXT = "Қазақ халқының ұлы ақыны Абай Құнанбайұлы"
# In the form of the instructions that nano's large model learned.
_QUESTION = (
    "Translate the following Kazakh text into English.\n\nText: Үкімет отырысы өтті.\nAnswer:"
)
_N_TOKENS = 24  # of an answer
_WIDTH = 200  # of a table that is no terminal's: its lines stay whole
_NEXT = {
    "trimix chat": "talk with the mix; /why shows which model decided each word",
    "trimix list": "trios that are here, and larger ones to pull",
    "trimix plan": "what a trio needs, and whether it fits this machine",
    "trimix help": "the pages: your language, evaluation, Python and more",
}
_OF_A_TRIO = ("trimix chat", "trimix plan")


@click.command()
@trio_options
@click.option("--text", metavar="TEXT", help="Continue this text. Default: a Kazakh one.")
@click.option(
    "--question",
    metavar="TEXT",
    help="Answer this question. Default: one in English, about a Kazakh text.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def demo(text: str | None, question: str | None, as_json: bool, **options: Any) -> None:
    """Show what each model answers by itself, and what the mix answers.

    A text and a question are answered by large_ins, small_cpt, small_base and the mix, always with
    the most probable token, and only in part. The table shows the perplexity of the prompt under
    each of them: how well it predicts the prompt; lower is better. No network is needed.
    """
    from trimix_gguf.choosing.methods import ANSWERS
    from trimix_gguf.server.settings import mix_settings

    name, trio_file = options["trio"], named_trio(options)
    mix: Any = {} if trio_file is None else mix_settings(trio_file.method, trio_file.weights)
    if mix.get("method") == ANSWERS:  # these prompts have no exemplars
        mix = {}
    if trio_file is not None and text is None and _LANGUAGE not in trio_file.languages:
        languages = ", ".join(trio_file.languages) or "none that it names"
        note = f"this trio's language is {languages}; --text and --question take texts in it"
        print(f"note: {note}", file=sys.stderr)
    prompts = {"text": text or _TEXT, "question": question or _QUESTION}
    shown: dict[str, Any] = {}
    with open_trio(options) as trio:
        if trio_file is not None and not as_json:
            print(about_trio(trio_file), end="\n\n")
        for kind, prompt in prompts.items():
            shown[kind] = _answers(trio, prompt, mix)
            if not as_json:
                _print(kind, shown[kind])
    if as_json:
        own = {} if trio_file is None else {"trio": trio_file.name, "about": trio_file.description}
        print(json.dumps({**own, **shown}, ensure_ascii=False))
    else:
        print(_next(name))


def _answers(trio: Any, text: str, mix: dict[str, Any]) -> dict[str, Any]:
    """The weights of a prompt, and each model's and the mix's answer, with the perplexities."""
    from trimix_gguf import generate, score
    from trimix_gguf.choosing.selection import SINGLE

    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": _N_TOKENS}
    said = {role: generate(trio, text, weights=w, **settings) for role, w in SINGLE.items()}
    said["fused"] = fused = generate(trio, text, **settings, **mix, score_tokens="all")
    selection = fused.selection
    assert selection is not None
    scored = score(trio, trio.prompt(text), also=[selection.weights])
    perplexities = {r: scored.perplexity(w) for r, w in SINGLE.items()}
    if not selection.mix.is_masked:  # else some tokens of the prompt may be impossible
        perplexities["fused"] = scored.perplexity(selection.weights)
    return {
        "prompt": text,
        "answers": {
            name: {
                "perplexity": perplexities.get(name),
                "text": event.text,
                "finish_reason": event.finish_reason,
            }
            for name, event in said.items()
        },
        "weights": selection.to_json(),
        "why": f"{mix_words(selection.mix)}; {_reason(selection)}",
        "guard": fused.guard,
    }


def _reason(selection: Any) -> str:
    from trimix_gguf.choosing.methods import CHOOSING

    if selection.method in CHOOSING:
        return str(selection.reason or CHOOSING[selection.method].by)
    return "fixed by the trio"


def _print(kind: str, shown: dict[str, Any]) -> None:
    """A prompt, a table of its answers, and why the mix has these weights."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(kind, "perplexity", "answer", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    for name, answer in shown["answers"].items():
        perplexity = answer["perplexity"]
        value = "–" if perplexity is None else f"{perplexity:.2f}"
        words = [*answer["text"].split(), *["…"] * (answer["finish_reason"] != "stop")]
        who = "mix" if name == "fused" else name
        table.add_row(who, value, Text(printable(" ".join(words))))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    with console.capture() as captured:
        console.print(table)
    lines = [f"> {printable(line)}".rstrip() for line in shown["prompt"].splitlines()]
    lines += ["", *(line.rstrip() for line in captured.get().splitlines())]
    lines.append(f"weights: {printable(shown['why'])}")
    if shown["guard"] is not None:
        lines.append(guard_words(shown["guard"]))
    print("\n".join(lines), end="\n\n", flush=True)


def _next(name: str | None) -> str:
    """Commands to try now, with the trio that was named."""
    named = "" if name is None else f" --trio {shlex.quote(name)}"
    commands = {c + named * (c in _OF_A_TRIO): text for c, text in _NEXT.items()}
    width = max(map(len, commands))
    return "\n".join(["next:", *(f"  {c:<{width}}  {text}" for c, text in commands.items())])
