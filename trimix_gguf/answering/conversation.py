"""Conversation: a chat over a Trio, whose turns go on from what its caches hold.

Answers stay the ids that were generated, so a turn's prompt begins like the last one and its
answer: only the new question is read. Weights are chosen again for each, by what was written to
the models so far; their own answers are not scored, and the sums over the prefix are kept.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

from trimix_gguf.answering.chat import PLAIN_STOPS, Message, chat_prompt, inner_ids
from trimix_gguf.answering.generation import OnSelection, Speculative, stream_generate
from trimix_gguf.answering.request import Event, Options, Request, Token
from trimix_gguf.choosing.selection import Selection
from trimix_gguf.errors import PromptError, WeightsError
from trimix_gguf.machine.files import write_text
from trimix_gguf.machine.typed_json import parse
from trimix_gguf.mixing.fusion import Mix, Weights
from trimix_gguf.mixing.sampling import N_SEEDS
from trimix_gguf.roles import ROLES, Role
from trimix_gguf.trio.model import Model
from trimix_gguf.trio.prompt import Prompt
from trimix_gguf.trio.sequences import TokenProgress
from trimix_gguf.trio.trio import Trio


@dataclass(frozen=True)
class Exchange:
    """A question and its answer, with the answer's `ids` where these models generated it."""

    question: str
    answer: str
    ids: tuple[int, ...] | None = None


class Watch(TypedDict, total=False):
    """Who is told while an answer is made: see stream_generate."""

    on_selection: OnSelection | None
    progress: TokenProgress | None


class Conversation:
    """Questions and answers so far, and how the next one is answered.

    `options` are those of a Request, for all answers; `max_tokens` is 512 where it is not among
    them. `weights`, or a whole Mix, are held; None chooses weights for each answer. A
    `plausibility_threshold` stays, whatever weights come. Where the context is full the oldest
    exchanges are no longer read, and `notify` is told. With `context_shift` what is left then stays
    in the caches, where the models can: it is not read again, and still holds what it took from
    the exchanges that are gone.
    """

    def __init__(
        self,
        trio: Trio,
        *,
        system: str = "",
        notify: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
        speculative: Speculative = "auto",
        n_draft: int | None = None,
        context_shift: bool = True,
        **options: Unpack[Options],
    ) -> None:
        self.trio, self.system, self._notify = trio, system, notify
        self._context_shift = context_shift
        request = Request.of(Request("", max_tokens=512, trace="mix"), **options)
        self._request = Request.of(request, stop=(*PLAIN_STOPS, *request.stop))
        self._speculative, self._n_draft = speculative, n_draft
        self.weights = request.weights
        self.exchanges: list[Exchange] = []
        self.n_dropped = 0  # exchanges that are no longer read
        self.last: Event | None = None  # the end of the newest answer
        self.trace: list[Token] = []  # its tokens, the end-of-generation token included

    @property
    def messages(self) -> list[Message]:
        """All messages so far, the system message first."""
        return self._messages(self.exchanges)

    # -- turns ------------------------------------------------------------------------------

    def say(self, text: str, *, seed: int | None = None, **watch: Unpack[Watch]) -> Iterator[Event]:
        """Answer `text`, streaming; what was said is kept, also where this is stopped.

        A question without an answer is not kept, unless the models chose to say nothing. Raises
        PromptError where the question alone does not fit.
        """
        if not text.strip():
            raise PromptError("the message is empty; say something")
        n_dropped, events = self.n_dropped, list[Event]()
        request = replace(self._request, prompt=self._fitted(text), weights=self.weights)
        if seed is not None:
            request = Request.of(request, seed=seed)
        try:
            stream = stream_generate(
                self.trio, request, speculative=self._speculative, n_draft=self._n_draft, **watch
            )
            with closing(stream):
                for event in stream:
                    events.append(event)
                    yield event
        finally:
            answer = "".join(event.text for event in events)
            if events and (answer or events[-1].finish_reason):
                self._keep(text, answer, events)
            else:
                self.n_dropped = n_dropped

    def _keep(self, text: str, answer: str, events: Sequence[Event]) -> None:
        tokens = [token for event in events for token in event.tokens]
        ids = _ids_of_text(self.trio.models[ROLES[0]], [token.id for token in tokens], answer)
        self.exchanges.append(Exchange(text, answer.strip(), ids))
        self.last, end = events[-1], events[-1].end
        self.trace = tokens if end is None else [*tokens, end]

    def retry(self, **watch: Unpack[Watch]) -> Iterator[Event]:
        """Answer the last question again, with another seed."""
        question = self._newest().question
        seed = None if self.last is None else (self.last.seed + 1) % N_SEEDS
        return self._instead(question, seed, **watch)

    def edit(self, text: str, **watch: Unpack[Watch]) -> Iterator[Event]:
        """Answer `text` in place of the last question."""
        self._newest()
        return self._instead(text, None, **watch)

    def undo(self) -> Exchange:
        """Remove the last question and its answer; the caches follow with the next question."""
        taken = self._newest()
        self.exchanges.pop()
        self.last, self.trace = None, []
        if self.n_dropped > len(self.exchanges):
            self.n_dropped = 0
        return taken

    def reset(self) -> None:
        """Forget everything except the system message."""
        self.exchanges, self.n_dropped, self.last, self.trace = [], 0, None, []

    def go_on_from(self, other: "Conversation") -> None:
        """Take over what was said in another conversation, whose answers are read as text."""
        self.reset()
        self.system = other.system
        self.exchanges = [replace(exchange, ids=None) for exchange in other.exchanges]

    def hold(self) -> Selection:
        """Keep the last weights for all answers. Raises WeightsError where there are none."""
        if self.last is None or self.last.selection is None:
            raise WeightsError("no weights were chosen yet; say something first, or give a pair")
        self.weights = self.last.selection
        return self.last.selection

    @property
    def held(self) -> Mix | None:
        """The mix of all answers; None where weights are chosen for each."""
        if self.weights is None:
            return None
        return self.weights.mix if isinstance(self.weights, Selection) else Mix.of(self.weights)

    def prompt(self, text: str) -> Prompt:
        """The whole prompt for `text`, with what the caches hold of it."""
        exchanges = self.exchanges[self.n_dropped :]
        messages = [*self._messages(exchanges), {"role": "user", "content": text}]
        first = len(messages) - 2 * len(exchanges)  # the first answer
        answers = {first + 2 * i: e.ids for i, e in enumerate(exchanges)}
        return chat_prompt(self.trio, messages, answers=answers)

    def n_new(self, text: str) -> int:
        """How many tokens of the prompt for `text` large_ins has not read yet."""
        units = self.prompt(text).units
        return sum(len(ids[0]) for ids, _ in units[self.trio.n_kept(units) :])

    def _messages(self, exchanges: Sequence[Exchange]) -> list[Message]:
        said = [{"role": "system", "content": self.system}] if self.system else []
        for exchange in exchanges:
            said.append({"role": "user", "content": exchange.question})
            said.append({"role": "assistant", "content": exchange.answer})
        return said

    def _newest(self) -> Exchange:
        if not self.exchanges:
            raise PromptError("nothing was said yet; say something first")
        return self.exchanges[-1]

    def _instead(self, text: str, seed: int | None, **watch: Unpack[Watch]) -> Iterator[Event]:
        """Say `text` in place of the last exchange, which comes back if nothing is said."""
        before = (self.n_dropped, self.last, self.trace)
        taken, n = self.undo(), len(self.exchanges)
        try:
            yield from self.say(text, seed=seed, **watch)
        finally:
            if len(self.exchanges) == n:
                self.exchanges.append(taken)
                self.n_dropped, self.last, self.trace = before

    def _fitted(self, text: str) -> Prompt:
        """The prompt for `text`, without the oldest exchanges where it leaves no room to answer.

        They are dropped until half of the context is free, as the rest is then read again, or
        shifted and so no longer exact.
        """
        prompt, n_ctx = self.prompt(text), self.trio.n_ctx
        whole = prompt
        n_before, most = self.n_dropped, n_ctx - min(self._request.max_tokens, n_ctx // 4)
        if _longest(prompt) <= most:
            return prompt
        while self.n_dropped < len(self.exchanges) and _longest(prompt) > n_ctx // 2:
            self.n_dropped += 1
            prompt = self.prompt(text)
        if self._context_shift:
            self.trio.shift(whole.units, prompt.units)
        if n := self.n_dropped - n_before:
            oldest = "question and its answer are" if n == 1 else f"{n} questions and answers are"
            self._notify(
                f"the context of {n_ctx} tokens is full: the oldest {oldest} no longer read; "
                "raise --n-ctx for more"
            )
        return prompt

    # -- files ------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write messages, ids of answers, weights and the names of the models as JSON. OSError."""
        messages: list[dict[str, Any]] = [dict(m) for m in self.messages]
        answers = [m for m in messages if m["role"] == "assistant"]
        for message, exchange in zip(answers, self.exchanges, strict=True):
            if exchange.ids is not None:
                message["ids"] = list(exchange.ids)
        held = self.held
        contents = {
            "messages": messages,
            "weights": None if held is None else held.to_json(),
            "models": {role: model.path.name for role, model in self.trio.models.items()},
            "vocabulary": _vocabulary_digest(self.trio),
        }
        write_text(path, json.dumps(contents, ensure_ascii=False, indent=1) + "\n")

    def load(self, path: Path) -> None:
        """Replace this conversation by a saved one, and the weights if it held some.

        If other models saved it, its answers are tokenized again, and `notify` is told. Raises
        PromptError where the file holds none, OSError; this conversation is then as before.
        """
        try:
            saved = parse(path.read_text(encoding="utf-8-sig"), object)
            own = saved.get("vocabulary") == _vocabulary_digest(self.trio)
            system, exchanges = _exchanges(saved["messages"], self.trio.n_vocab if own else 0)
            held = saved.get("weights")
            weights = None if held is None else _saved_mix(held)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            raise PromptError(
                f"{path} holds no conversation; expected JSON as `/save` writes it"
            ) from None
        self.reset()
        if not self.trio.sequences.is_exact(0):
            self.trio.forget()  # the file says what to read, and nothing of what was shifted
        self.system, self.exchanges = system, exchanges
        self.weights = self.weights if weights is None else weights
        if not own and exchanges:
            self._notify(f"{path.name} was saved with other models; its answers are read as text")


def pulls(probabilities: Mapping[str, float], weights: Weights, n_vocab: int) -> dict[Role, float]:
    """How far each model that the mix reads drew it to a token, in nats.

    `probabilities` are a traced token's. A pull is a model's coefficient times its log-probability
    over that of chance, ln(p · n_vocab).
    """
    return {
        role: c * math.log(max(probabilities[role], 1e-30) * n_vocab)
        for role, c in weights.coefficients.items()
        if c and role in probabilities
    }


def _longest(prompt: Prompt) -> int:
    return max(prompt.n_tokens(role) for role in ROLES)


def _ids_of_text(model: Model, ids: Sequence[int], text: str) -> tuple[int, ...]:
    """The first of `ids` that spell `text`; what is left of it is tokenized again.

    A stop string, or a break, can end the text inside a token.
    """
    pieces = [model.piece(i) for i in ids]
    for n in range(len(ids), 0, -1):
        begun = b"".join(pieces[:n]).decode("utf-8", "replace")
        if text.startswith(begun):
            return (*ids[:n], *inner_ids(model, text[len(begun) :]))
    return tuple(inner_ids(model, text))


def _vocabulary_digest(trio: Trio) -> str:
    """A digest of the tokens; two quantizations of one model have the same."""
    tokens = trio.models[ROLES[0]].file.array("tokenizer.ggml.tokens") or []
    return hashlib.sha256(b"\0".join(tokens[: trio.n_vocab])).hexdigest()


def _saved_mix(saved: Mapping[str, Any]) -> Mix:
    weights = Weights(float(saved["alpha"]), float(saved["beta"]))
    return Mix(weights, float(saved.get("plausibility_threshold", 0.0)))


def _exchanges(messages: list[dict[str, Any]], n_vocab: int) -> tuple[str, list[Exchange]]:
    """The system's message and the exchanges of a file; ids below `n_vocab` are kept."""
    system = ""
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    roles = [message["role"] for message in messages]
    contents = [message["content"] for message in messages]
    expected = ["user", "assistant"] * (len(messages) // 2)
    if roles != expected or not all(isinstance(c, str) for c in (system, *contents)):
        raise ValueError("messages that are no questions and answers")
    "".join((system, *contents)).encode()  # UnicodeEncodeError, a ValueError, for half a pair
    exchanges = []
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        ids = answer.get("ids") if n_vocab else None
        if ids is not None and not all(type(i) is int and 0 <= i < n_vocab for i in ids):
            raise ValueError("ids beyond the vocabulary")
        own = None if ids is None else tuple(ids)
        exchanges.append(Exchange(question["content"], answer["content"], own))
    return system, exchanges
