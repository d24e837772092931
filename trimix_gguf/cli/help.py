"""trimix help: pages about one topic each, shown offline; `trimix help generate` is its --help."""

import sys
from difflib import get_close_matches
from pathlib import Path

import click

FOLDER = Path(__file__).parent.parent / "help"
TOPICS = (
    "install", "trios", "chat", "weights", "serve", "many-servers", "many-prompts", "your-language",
    "own-models", "evaluation", "python", "graphics-cards", "machines", "how-it-works", "measured",
    "limits",
)  # fmt: skip


@click.command("help")
@click.argument("topic", required=False, metavar="[TOPIC]")
@click.pass_context
def help_(context: click.Context, topic: str | None) -> None:
    """Show a help page. Without TOPIC, list the pages.

    No network is needed. The name of a command shows the options of that command.
    """
    if topic is None:
        click.echo(_list())
    elif topic in TOPICS:
        _show(page(topic))
    else:
        click.echo(_options_of(context, topic))


def page(topic: str) -> str:
    """The page in Markdown: a title, one line that says what it is about, and the text."""
    return (FOLDER / f"{topic}.md").read_text(encoding="utf-8")


def summary(topic: str) -> str:
    """The line below a page's title."""
    return page(topic).splitlines()[2]


def _list() -> str:
    lines = [f"  {topic:<16}{summary(topic)}" for topic in TOPICS]
    return "\n".join(["trimix help TOPIC shows one of these pages:", "", *lines])


def _show(text: str) -> None:
    """Formatted, in a pager, on a terminal; as it is written through a pipe."""
    if not sys.stdout.isatty():
        click.echo(text, nl=False)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    with console.capture() as captured:
        console.print(Markdown(text))
    click.echo_via_pager(captured.get())


def _options_of(context: click.Context, name: str) -> str:
    """The --help of a command; raises ClickException where there is no such topic or command."""
    group = context.parent
    assert group is not None and isinstance(group.command, click.Group)
    command = group.command.get_command(group, name)
    if command is not None:
        return command.get_help(click.Context(command, info_name=name, parent=group))
    near = get_close_matches(name, [*TOPICS, *group.command.list_commands(group)], 1, 0.5)
    nearest = f"did you mean {near[0]}? " if near else ""
    raise click.ClickException(f"no help page {name!r}; {nearest}Pages: {', '.join(TOPICS)}")
