"""trimix chat: a conversation with the mix, in a terminal or through pipes."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from trimix_gguf.cli.bars import token_progress
from trimix_gguf.cli.chat_trio import ChatTrio
from trimix_gguf.cli.generation_options import (
    decoding_options,
    guard_words,
    mix_options,
    mix_words,
    weights_line,
)
from trimix_gguf.cli.options import context_shift_option, parse_mix, read_text, trio_options
from trimix_gguf.cli.streams import reader_is_gone, write_answer
from trimix_gguf.errors import PromptError, TrimixError

_WAY_OUT = "Ctrl-D or /exit leaves; /help lists the commands"
_LONG = 64  # tokens to read that are worth a bar


@click.command()
@trio_options
@click.option(
    "--system", metavar="TEXT|@FILE", help="Instruction for all answers, before the first message."
)
@click.option("--load", metavar="FILE", help="Continue a chat that /save wrote.")
@mix_options
@decoding_options
@context_shift_option("on")
def chat(system: str | None, load: str | None, **options: Any) -> None:
    """Chat with the mix of three models.

    Each line is a message. Each reply uses the whole conversation. A line that begins with / is
    a command; /help lists them. Input can be piped. Without --trio, the small Kazakh trio that
    ships in the package answers.
    """
    from trimix_gguf.answering.conversation import Conversation

    told: dict[str, Any] = {} if system is None else {"system": _text_or_file(system)}
    with closing(ChatTrio(options)) as opened:
        talk = Conversation(opened.trio, notify=_note, **opened.settings, **told)
        session = _Session(talk, opened)
        if load is not None:
            session.load(load)
            session.conversation.system = told.get("system", session.conversation.system)
        if not session.run():
            raise click.exceptions.Exit(1)


class _Session:
    """Lines in, answers out; a bad line costs one line on stderr, and the chat goes on."""

    def __init__(self, conversation: Any, opened: ChatTrio | None = None) -> None:
        self.conversation, self._opened = conversation, opened
        self.by_hand = sys.stdin.isatty()
        self.files: set[Path] = set()  # saved or loaded here, so /save may replace them
        self._stopping = False  # Ctrl-C came during an answer

    def run(self) -> bool:
        """Whether all lines were good; by hand they always are."""
        good = True
        if self.by_hand:
            signal.signal(signal.SIGTERM, _leave)  # else it would pass for Ctrl-C
            if self._opened is not None and self._opened.about:
                _note(self._opened.about)
            _note(_WAY_OUT)
        for line in _typed_lines() if self.by_hand else _piped_lines():
            try:
                if line.startswith("/") and not line.startswith("//"):
                    if not self._command(line):
                        break
                elif line.strip():
                    self.answer(self.conversation.say, line.removeprefix("/"))
            except (TrimixError, OSError) as error:
                if isinstance(error, OSError) and reader_is_gone(error):
                    raise
                good = self.by_hand
                print(f"trimix: {' '.join(str(error).split())}", file=sys.stderr)
        return good

    # -- answers ----------------------------------------------------------------------------

    def answer(self, ask: Callable[..., Any], *text: str) -> None:
        """Stream the answer of `ask`, and tell its weights and why it ended, if not of itself."""
        shown, last = "", None
        total = self.conversation.n_new(*text) if text else 0
        bar = ExitStack()
        with self._stoppable() as check, bar:
            quiet = not self.by_hand or total < _LONG
            advance = bar.enter_context(token_progress(total, "Reading", quiet=quiet))

            def progress(n: int) -> None:
                advance(n)
                check()

            try:
                with closing(ask(*text, progress=progress)) as responses:
                    for response in responses:
                        if last is None:
                            bar.close()
                            _note(weights_line(response.selection))
                        last = response
                        piece = response.text if shown else response.text.lstrip()
                        shown += piece
                        write_answer(piece)
                        check()
            except KeyboardInterrupt:
                if not self.by_hand:
                    raise
                self._stopping = True
            finally:
                if shown or last is not None:
                    print(flush=True)
        self._tell_the_end(last, shown)

    @contextmanager
    def _stoppable(self) -> Iterator[Callable[[], None]]:
        """By hand, have Ctrl-C wait for the check that this yields; a second one does not wait.

        Interrupted between tokens the caches stay as they are, amid decoding they are emptied.
        """
        self._stopping = False

        def stop(*_: Any) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping = True

        def check() -> None:
            if self._stopping:
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, stop) if self.by_hand else None
        try:
            yield check
        finally:
            if self.by_hand:
                signal.signal(signal.SIGINT, before)

    def _tell_the_end(self, last: Any, shown: str) -> None:
        if last is not None and last.guard is not None:
            _note(guard_words(last.guard))
        reason = None if last is None else last.finish_reason
        if reason is None and self._stopping:
            _note(f"stopped; {'the text so far is kept' if shown else 'the question is removed'}")
        elif reason == "length":
            _note(f"stopped after {last.n_tokens} tokens; -n raises that")
        elif reason == "context":
            _note(f"the context of {self.conversation.trio.n_ctx} tokens is full; raise --n-ctx")
        elif not shown:
            _note("the models gave an empty answer")

    # -- commands ---------------------------------------------------------------------------

    def _command(self, line: str) -> bool:
        """Obey a line such as '/save chat.json'; False where it ends the chat."""
        name, _, argument = line[1:].partition(" ")
        if name not in _COMMANDS:
            raise PromptError(
                f"unknown command /{name}; /help lists them, // begins a message with /"
            )
        usage, _, obey = _COMMANDS[name]
        argument = argument.strip()
        if not usage and argument:
            raise PromptError(f"/{name} takes no argument")
        if usage and not usage.startswith("[") and not argument:
            raise PromptError(f"/{name} needs an argument: /{name} {usage}")
        if obey is not None:
            obey(self, argument)
        return obey is not None

    def weights(self, argument: str) -> None:
        talk = self.conversation
        if argument == "auto":
            talk.weights = None
        elif argument == "hold":
            talk.hold()
        elif argument:
            talk.weights = parse_mix(argument)
        if talk.held is not None:
            print(f"weights: {mix_words(talk.held)}, held", flush=True)
        elif talk.last is None:
            print("weights: chosen for each answer", flush=True)
        else:
            last = weights_line(talk.last.selection)
            print(f"weights: chosen for each answer; the last {last}", flush=True)

    def trio(self, argument: str) -> None:
        from trimix_gguf.answering.conversation import Conversation

        assert self._opened is not None  # the command's own sessions have one
        if not argument:
            print(self._opened.names(), flush=True)
            return
        before, opened, is_switched = self.conversation, self._opened, False
        try:
            opened.switch(argument)
            is_switched = True
        finally:
            if opened.trio is not before.trio:  # also where the old one had to be opened again
                self.conversation = Conversation(opened.trio, notify=_note, **opened.settings)
                self.conversation.go_on_from(before)
                if not is_switched:
                    self.conversation.weights = before.weights
        _note(f"{argument} answers from here on")
        if before.held not in (None, self.conversation.held):  # what fits one trio may not another
            _note(f"weights {mix_words(before.held)} were of the trio before; /weights sets others")

    def why(self, _: str) -> None:
        from trimix_gguf.cli.why import print_why

        print_why(self.conversation)

    def save(self, argument: str) -> None:
        path = _named_file(argument)
        if path.exists() and path.resolve() not in self.files:
            raise PromptError(f"{path} exists already; name another file, or remove it")
        self.conversation.save(path)
        self.files.add(path.resolve())
        _note(f"saved to {path}")

    def load(self, argument: str) -> None:
        path = _named_file(argument)
        self.conversation.load(path)
        self.files.add(path.resolve())
        _note(f"loaded {len(self.conversation.exchanges)} questions and answers from {path}")

    def system(self, argument: str) -> None:
        self.conversation.system = _text_or_file(argument)

    def edit(self, argument: str) -> None:
        self.answer(self.conversation.edit, argument)

    def retry(self, _: str) -> None:
        self.answer(self.conversation.retry)

    def undo(self, _: str) -> None:
        taken = self.conversation.undo()
        _note(f"removed: {' '.join(taken.question.split())}")

    def reset(self, _: str) -> None:
        self.conversation.reset()

    def help(self, _: str) -> None:
        for name, (usage, text, _obey) in _COMMANDS.items():
            print(f"{f'/{name} {usage}':<24} {text}")
        print("Ctrl-C stops an answer, Ctrl-D leaves.", flush=True)


_COMMANDS: dict[str, tuple[str, str, Callable[[_Session, str], None] | None]] = {
    "weights": ("[auto|hold|A,B]", "choose per answer, keep the last, or fix", _Session.weights),
    "trio": ("[NAME]", "let another trio answer; the conversation stays", _Session.trio),
    "why": ("", "what each model wanted, token by token", _Session.why),
    "save": ("FILE", "write the chat as JSON", _Session.save),
    "load": ("FILE", "continue a saved chat", _Session.load),
    "system": ("[TEXT|@FILE]", "instruction for all answers", _Session.system),
    "edit": ("TEXT", "replace the last question", _Session.edit),
    "retry": ("", "another answer to the last question", _Session.retry),
    "undo": ("", "remove the last question and answer", _Session.undo),
    "reset": ("", "forget the conversation, keep /system", _Session.reset),
    "help": ("", "list the commands", _Session.help),
    "exit": ("", "leave", None),
}  # fmt: skip


def _typed_lines() -> Iterator[str]:
    from trimix_gguf.cli.typing import typed_messages

    return typed_messages(list(_COMMANDS), lambda: _note(_WAY_OUT))


def _piped_lines() -> Iterator[str]:
    """Raises PromptError where a line is not UTF-8."""
    for n, raw in enumerate(sys.stdin.buffer, 1):
        try:
            yield raw.decode("utf-8-sig" if n == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise PromptError(f"stdin is not UTF-8 (line {n}); save it as UTF-8") from None


def _named_file(text: str) -> Path:
    """The path that was typed; '~' is the home folder. Raises PromptError where there is none."""
    if "\0" in text:  # through a pipe
        raise PromptError("a file's name cannot hold a NUL character; name another file")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise PromptError(f"{text}: there is no such home folder; give the whole path") from None


def _text_or_file(text: str) -> str:
    return read_text(str(_named_file(text[1:]))).strip() if text.startswith("@") else text


def _note(text: str) -> None:
    click.secho(text, err=True, dim=True)


def _leave(*_: Any) -> NoReturn:
    raise click.Abort
