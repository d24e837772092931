"""Messages typed at a terminal: edited by letters, with a history, over one line or several."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence

# Windows' and other terminals are asked nothing: some answer late, into the next line.
os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")


def typed_messages(commands: Sequence[str], say_way_out: Callable[[], None]) -> Iterator[str]:
    """What is typed, until Ctrl-D; Ctrl-C only empties the message, and says the way out.

    Enter sends a message; Alt-Enter begins a new line in it. Pasted text may have several lines.
    The prompt goes to stderr, so that stdout holds the answers only. Tab completes `commands`.
    """
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
        complete_while_typing=False,
        output=create_output(sys.stderr),
    )
    while True:
        try:
            text = session.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            say_way_out()
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # bytes that were not UTF-8 come as half surrogate pairs
            print("trimix: that line is not UTF-8; set the terminal to UTF-8", file=sys.stderr)
            continue
        yield text
