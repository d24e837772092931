"""`trimix`: one module for each command, imported only when it runs."""

import importlib
import signal
import sys
from contextlib import suppress
from typing import NoReturn

import click

COMMANDS = {  # name -> (module, and function in it where that is called otherwise; one-line help)
    "demo": ("demo", "Show what each model answers by itself, and what the mix answers."),
    "generate": ("generate", "Continue a prompt with the mix of three models."),
    "serve": ("serve", "Answer over HTTP, like OpenAI's API, many requests at once."),
    "run": ("run", "Answer a file of requests, many at once; go on after a stop."),
    "chat": ("chat", "Chat with the mix of three models."),
    "score": ("score", "Perplexity of texts under each model and over the weight grid."),
    "tune": ("tune", "Measure which mix of a trio answers best, and keep it."),
    "eval": ("evaluate", "Compare methods on labelled tasks, and report the result."),
    "bench": ("bench", "Measure the speed of a trio on this machine."),
    "pull": ("pull", "Fetch a trio from the Hugging Face hub."),
    "create": ("create", "Make a trio of files that are here, without copies."),
    "list": ("trios:list_trios", "List the trios that are here, and those to pull."),
    "show": ("trios:show", "Show a trio: settings, models, sources, files."),
    "verify": ("trios:verify", "Compare every file of a trio with its SHA-256."),
    "remove": ("trios:remove", "Delete a trio that was pulled or imported."),
    "disk": ("disk", "Show what uses space, and how to free it."),
    "export": ("trios:export_", "Write a trio to a folder or a tar, for another machine."),
    "import": ("trios:import_", "Install a trio that was exported."),
    "adapt": ("adapt", "Teach a trio's small model your language from raw text."),
    "doctor": ("doctor", "Test llama.cpp; show devices, and whether a trio fits."),
    "worker": ("worker", "Lend this machine to a trimix on another one."),
    "plan": ("plan", "Show which layers go to which device, and what to change."),
    "check": ("check", "Check whether three GGUF files make a trio."),
    "convert": ("convert", "Turn a Hugging Face checkpoint into a GGUF file."),
    "help": ("help:help_", "Show a help page, without a network."),
}


class _Group(click.Group):
    """Knows its commands by name, so that --help imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module_name, _, function = COMMANDS[name][0].partition(":")
        module = importlib.import_module(f"trimix_gguf.cli.{module_name}")
        command: click.Command = getattr(module, function or module_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="trimix-gguf", prog_name="trimix")
def trimix() -> None:
    """Answer in a low-resource language by mixing three GGUF models, offline."""


def main() -> NoReturn:
    """Entry point: one line on stderr and exit 1 for bad input, 130 for Ctrl-C."""
    from trimix_gguf.cli import streams

    streams.open_all()
    for name in ("SIGTERM", "SIGBREAK"):  # Windows has the second one: Ctrl-Break
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    code = 1
    with suppress(OSError):  # stderr may be a pipe that nobody reads any more
        code = _run()
    streams.let_go()
    sys.exit(code)


def _run() -> int:
    """Run the command that the arguments name; returns the exit code, having told of errors."""
    from trimix_gguf.cli import streams
    from trimix_gguf.errors import TrimixError

    try:
        streams.check_arguments(sys.argv[1:])
        # An Exit comes back as its code. The name: on Windows the program is trimix.exe.
        code: int = trimix(prog_name="trimix", standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except click.UsageError as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        print(file=sys.stderr)
        return 130
    except click.ClickException as error:
        text = error.message
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start : error.end])
        text = f"the input holds {half}, half of a surrogate pair and no character; take it out"
    except (TrimixError, OSError) as error:
        if isinstance(error, OSError) and streams.reader_is_gone(error):
            return 1
        text = str(error)
    print(f"trimix: {streams.printable(' '.join(text.split()))}", file=sys.stderr)
    return 1
