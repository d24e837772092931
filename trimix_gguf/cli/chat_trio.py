"""The trio of a chat, and another one in its place."""

from typing import Any

import click

from trimix_gguf.cli.generation_options import generation_settings
from trimix_gguf.cli.options import FILES, about_trio, named_trio, open_trio, trio_arguments
from trimix_gguf.cli.plan import trio_files
from trimix_gguf.cli.task_weights import task_weights
from trimix_gguf.errors import TrimixError


class ChatTrio:
    """An open trio, and the settings that the command's options give with it."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options, self._trio_file = options, named_trio(options)
        self.trio, self.settings = _opened(options)

    def switch(self, name: str) -> None:
        """Open the trio of that name instead; raises TrimixError, and keeps the one that is open.

        Weights that both have stay where they are. Else the old trio makes room first; where it
        cannot be opened again either, the command ends.
        """
        options = {**self._options, "trio": name, **dict.fromkeys(FILES)}
        trio_file = named_trio(options)  # before anything is closed
        files, asked, _ = trio_files(trio_arguments(dict(options)))
        if self.trio.shared({role: file.path for role, file in files.items()}, asked):
            old, (self.trio, self.settings) = self.trio, _opened(options, self.trio)
            old.close()
        else:
            self.close()
            try:
                self.trio, self.settings = _opened(options)
            except (TrimixError, OSError):
                self._open_again()
                raise
        self._options, self._trio_file = options, trio_file

    def _open_again(self) -> None:
        """Open the trio that was closed: asked while it is closed, llama.cpp would crash."""
        try:
            self.trio, self.settings = _opened(self._options)
        except (TrimixError, OSError) as error:
            why = " ".join(str(error).split())
            raise click.ClickException(f"the old trio cannot be opened again: {why}") from None

    @property
    def about(self) -> str:
        """What the trio that is open says of itself; empty for one of files."""
        return "" if self._trio_file is None else about_trio(self._trio_file)

    def names(self) -> str:
        """In a line, the trio that is open and those that could be."""
        from trimix_gguf.trios.store import SHIPPED, installed

        own = "of files" if self._trio_file is None else self._trio_file.name
        others = [name for name in (SHIPPED, *installed()) if name != own]
        return f"trio: {own}; others here: {', '.join(others) or 'none'}"

    def close(self) -> None:
        """Free the trio."""
        self.trio.close()


def _opened(options: dict[str, Any], beside: Any = None) -> tuple[Any, dict[str, Any]]:
    given = dict(options)
    settings = generation_settings(given)
    if (context_shift := given.pop("context_shift")) is not None:
        settings["context_shift"] = context_shift
    task = given.pop("task")
    trio = open_trio(given, beside)
    try:
        if task is not None:
            settings["weights"] = task_weights(trio, task, settings)
    except BaseException:
        trio.close()
        raise
    return trio, settings
