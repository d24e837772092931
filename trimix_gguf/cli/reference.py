"""REFERENCE.md: every command with all its options, from what --help says.

`python -m trimix_gguf.cli.reference` writes it again.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from trimix_gguf.cli import trimix
from trimix_gguf.cli.options import trio_options

PATH = Path(__file__).parent / "REFERENCE.md"
_HEAD = """# Commands

Generated from `--help` by `make reference`. Results go to standard output, all other text to
standard error. Exit codes: 0; 1 for bad input, in one line; 2 for a wrong option; 130 for Ctrl-C.
"""
_TRIO = """## Options of a trio

Every command that runs a trio takes these. Without them the trio is `nano`, which ships in the
package.
"""


def reference() -> str:
    """The page in Markdown."""
    top = click.Context(trimix, info_name="trimix", terminal_width=80)
    shared = click.command("trio")(trio_options(lambda **_: None)).params
    parts = [_HEAD, _TRIO + "\n" + _options(shared, top)]
    names = {str(parameter.name) for parameter in shared}
    return "\n".join([*parts, *(_section(context, names) for context in _commands(top))])


def _commands(context: click.Context) -> Iterator[click.Context]:
    """Each command's own context; after that of a group, those of its commands."""
    command = context.command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None  # it is listed
            inner = click.Context(child, info_name=name, parent=context)
            yield inner
            yield from _commands(inner)


def _section(context: click.Context, of_a_trio: set[str]) -> str:
    command = context.command
    runs_a_trio = of_a_trio <= {p.name for p in command.params}
    params = [p for p in command.params if not (runs_a_trio and p.name in of_a_trio)]
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    lines = [f"## {context.command_path}\n", f"    {usage}\n", f"{_text(command.help)}\n"]
    if runs_a_trio:
        lines.append("Takes the options of a trio.\n")
    return "\n".join(lines) + "\n" + _options(params, context)


def _options(parameters: Sequence[click.Parameter], context: click.Context) -> str:
    records = [p.get_help_record(context) for p in parameters if isinstance(p, click.Option)]
    return "".join(
        f"* `{names}`{f': {_text(text)}' if text else ''}\n"
        for names, text in filter(None, records)
    )


def _text(text: str | None) -> str:
    """One paragraph a line, as Markdown shows it."""
    paragraphs = (" ".join(part.split()) for part in (text or "").split("\n\n"))
    return "\n\n".join(part for part in paragraphs if part)


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
