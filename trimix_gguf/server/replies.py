"""Events of the engine -> what a client gets: OpenAI's response objects, whole or in chunks.

Replies of other APIs are made of the same parts.
"""

import codecs
import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, NotRequired, TypedDict, Unpack

from trimix_gguf.answering.request import Event, Token
from trimix_gguf.choosing.methods import AUTO
from trimix_gguf.choosing.selection import Selection
from trimix_gguf.server.calls import CallFinder, FunctionCall, new_id
from trimix_gguf.server.errors import RequestError, error_json
from trimix_gguf.server.openai import Call
from trimix_gguf.trio.trio import Trio

_LOWEST = -9999.0  # what OpenAI writes for a log-probability of minus infinity
_REASONS = {"stop": "stop", "length": "length", "context": "length"}
# Some clients cut a stream into lines at these too, and JSON does not escape them.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def sent_line(value: dict[str, Any]) -> str:
    """An object as one line of JSON."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_LINE_ENDS)


def sent_event(value: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event, with a name where it has one."""
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {sent_line(value)}\n\n".encode()


class Said(TypedDict):
    """What a reply says beside its answers.

    `echoes` are the prompts' texts, for completions that give them back; else empty. `taken` is
    what the extension `trimix` says of the trio, where there are several. `began` is when the
    request came, by time.perf_counter().
    """

    model: str
    echoes: NotRequired[Sequence[str]]
    taken: NotRequired[Mapping[str, str]]
    began: NotRequired[float]


class Reply:
    """What a client gets for one call: a choice for each of its prompts, `n` times."""

    media_type = "text/event-stream"

    def __init__(self, call: Call, trio: Trio, **said: Unpack[Said]) -> None:
        echoes = said.get("echoes", ())
        self._call, self._trio, self._taken = call, trio, dict(said.get("taken", {}))
        self._ready = time.perf_counter()
        self._began = said.get("began", self._ready)
        self.schema_at = call.schema_at
        n_prompts = 1 if call.kind == "chat" else len(call.prompts)
        self.choices = [
            Choice(call, trio, echoes[i // call.n] if echoes else "")
            for i in range(n_prompts * call.n)
        ]
        chat = call.kind == "chat"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": said["model"],
            "system_fingerprint": f"trimix-gguf-{version('trimix-gguf')}",
        }

    def take(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """Keep an event of a choice; yield the chunks that tell it, if the call streams."""
        begins = self.choices[index].take(event)
        if self._call.stream:
            yield from self._tell(index, event, begins)

    def _tell(self, index: int, event: Event, begins: bool) -> Iterator[dict[str, Any]]:
        """The chunks that tell an event; it is the choice's first if it `begins`."""
        choice = self.choices[index]
        if begins:
            yield self._chunk(index, choice.opening(), self.mix(choice))
        piece = choice.piece(event)
        if piece is not None:
            yield self._chunk(index, piece, self.extension(choice, event.tokens) or None)

    def mix(self, choice: "Choice") -> dict[str, Any]:
        """The extension `trimix`, as far as the first event of a choice tells it."""
        return {**choice.mix(), **self._taken}

    def extension(self, choice: "Choice", tokens: Sequence[Token]) -> dict[str, Any]:
        """The extension `trimix`: traced tokens, and an end that OpenAI has no word for."""
        said: dict[str, Any] = {}
        if self._call.trace:
            said["tokens"] = choice.traced(tokens)
        if choice.newest.guard is not None:
            said["guard"] = choice.newest.guard
        if choice.newest.finish_reason == "context":
            said["finish_reason"] = "context"
        return said

    def _chunk(
        self, index: int, choice: dict[str, Any], mix: dict[str, Any] | None
    ) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "choices": [{"index": index, **choice}]}
        if self._call.kind == "chat":
            chunk["object"] = "chat.completion.chunk"
        if self._call.include_usage:
            chunk["usage"] = None
        if mix is not None:
            chunk["trimix"] = mix
        return chunk

    def encode(self, chunk: dict[str, Any]) -> bytes:
        """A chunk as it is sent."""
        return sent_event(chunk)

    def ending(self) -> bytes:
        """What ends a stream: the usage where it was asked for, without a choice, and a mark."""
        usage = b""
        if self._call.include_usage:
            chunk = {**self._chunk(0, {}, None), "choices": [], "usage": self.usage()}
            usage = self.encode(chunk)
        return usage + b"data: [DONE]\n\n"

    def failure(self, error: RequestError) -> bytes:
        """What ends a stream that has begun and fails."""
        return sent_event(error_json(error))

    def body(self) -> dict[str, Any]:
        """The whole reply, once every choice has ended."""
        choices, mixes = [], []
        for i, choice in enumerate(self.choices):
            choices.append({"index": i, **choice.whole()})
            extension = self.extension(choice, choice.tokens)
            mixes.append({**self.mix(choice), **extension})
        if len(choices) > 1:
            choices = [{**c, "trimix": mix} for c, mix in zip(choices, mixes, strict=True)]
        return {**self._head, "choices": choices, "usage": self.usage(), "trimix": mixes[0]}

    def n_tokens(self) -> tuple[int, int]:
        """Tokens of prompts and answers so far; a prompt with n answers counts once."""
        firsts = self.choices[:: self._call.n]
        n_prompt = sum(choice.newest.n_prompt for choice in firsts)
        return n_prompt, sum(choice.newest.n_tokens for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        """OpenAI's form of it."""
        n_prompt, n_tokens = self.n_tokens()
        firsts = [choice.newest for choice in self.choices[:: self._call.n]]
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_tokens,
            "total_tokens": n_prompt + n_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(event.n_cached for event in firsts)},
        }


class Choice:
    """One answer as it comes, in the shape of its kind of request."""

    def __init__(self, call: Call, trio: Trio, echo: str) -> None:
        self._chat, self._logprobs, self._echo = call.kind == "chat", call.logprobs, echo
        self._function, self._call_id = call.function, new_id("call")
        self._finder = CallFinder({tool.name for tool in call.tools}) if call.tools else None
        self.shown = ""  # the text that the newest event shows
        self._gives_back = call.echo
        self._trio = trio
        self._text: list[str] = []
        self.tokens: list[Token] = []
        self._prompt_tokens: tuple[Token, ...] = ()
        self.newest = Event()
        self._selection: Selection | None = None
        self._offsets, self._traced = _Characters(), _Characters()

    def take(self, event: Event) -> bool:
        """Keep an event; True if it is the first."""
        begins = self._selection is None
        if begins:
            self._selection, self._prompt_tokens = event.selection, event.prompt_tokens
        self.shown = event.text
        if self._finder is not None:
            ends = event.finish_reason is not None
            self.shown = self._finder.push(event.text, ends=ends)
        self._text.append(self.shown)
        self.tokens += event.tokens
        self.newest = event
        return begins

    def opening(self) -> dict[str, Any]:
        """The first chunk: who speaks, or the prompt that is given back."""
        if self._chat:
            delta: dict[str, Any] = {"role": "assistant", "content": ""}
            if self._function is not None:
                delta = {"role": "assistant", "content": None}
                delta["tool_calls"] = [
                    {"index": 0, **_called(replace(self.calls[0], arguments=""))}
                ]
            return {"delta": delta, "logprobs": None, "finish_reason": None}
        logprobs = self._logprobs_of(self._prompt_tokens) if self._gives_back else None
        return {"text": self._echo, "logprobs": logprobs, "finish_reason": None}

    def piece(self, event: Event) -> dict[str, Any] | None:
        """The chunk of an event; None where there is nothing to tell yet."""
        reason = self._reason(event)
        if not (self.shown or event.tokens or reason):
            return None
        said: dict[str, Any] = {"logprobs": self._logprobs_of(event.tokens)}
        if self._chat:
            said["delta"] = self._delta(ends=reason is not None)
        else:
            said["text"] = event.text
        return {**said, "finish_reason": reason}

    def whole(self) -> dict[str, Any]:
        """The choice with all of its text."""
        text = self._echo + self.text
        tokens = [*self._prompt_tokens, *self.tokens]
        said: dict[str, Any] = {"logprobs": self._logprobs_of(tokens)}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if self.calls:
                message["content"] = None if self._function is not None else text or None
                message["tool_calls"] = [_called(call) for call in self.calls]
            said["message"] = message
        else:
            said["text"] = text
        return {**said, "finish_reason": self._reason(self.newest)}

    @property
    def text(self) -> str:
        """What has been answered so far, without calls; of a forced call its arguments."""
        return "".join(self._text)

    @property
    def calls(self) -> list[FunctionCall]:
        """The function that the answer calls, or those that it called at its end."""
        if self._function is not None:
            return [FunctionCall(self._function, self.text, self._call_id)]
        return [] if self._finder is None else self._finder.calls

    def _reason(self, event: Event) -> str | None:
        reason = _REASONS.get(event.finish_reason or "")
        return "tool_calls" if reason == "stop" and self.calls else reason

    def _delta(self, *, ends: bool) -> dict[str, Any]:
        if self._function is not None:
            function = {"arguments": self.shown}
            return {"tool_calls": [{"index": 0, "function": function}]} if self.shown else {}
        delta: dict[str, Any] = {"content": self.shown} if self.shown else {}
        if ends and self.calls:
            delta["tool_calls"] = [{"index": i, **_called(c)} for i, c in enumerate(self.calls)]
        return delta

    def mix(self) -> dict[str, Any]:
        """The extension `trimix`: the chosen weights, and what they were chosen by."""
        assert self._selection is not None  # the first event brings it
        return mix_json(self._selection)

    def traced(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Each token's characters, as they become whole, and its probabilities."""
        return [
            {"text": self._traced.push(t.piece)[1], "probabilities": dict(t.probabilities)}
            for t in tokens
        ]

    def _logprobs_of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return self._chat_logprobs(tokens) if self._chat else self._completion_logprobs(tokens)

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            {
                **_chat_token(token.piece, token.logprob),
                "top_logprobs": [_chat_token(self._piece(i), value) for i, value in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _completion_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Lists over the tokens; offsets count characters of this choice's text."""
        top: list[dict[str, float] | None] = []
        for token in tokens:
            named = {_name(self._piece(i)): _finite(value) for i, value in reversed(token.top)}
            if token.logprob is not None and token.top:
                named.setdefault(_name(token.piece), _finite(token.logprob))
            top.append(named if token.logprob is not None else None)
        return {
            "tokens": [_name(token.piece) for token in tokens],
            "token_logprobs": [
                None if token.logprob is None else _finite(token.logprob) for token in tokens
            ],
            "top_logprobs": top,
            "text_offset": [self._offsets.push(token.piece)[0] for token in tokens],
        }

    def _piece(self, token: int) -> bytes:
        return self._trio.models["large_ins"].piece(token, special=True)


class _Characters:
    """Bytes of tokens -> where each begins in the text, and the characters that it completes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n = 0

    def push(self, piece: bytes) -> tuple[int, str]:
        """Where the next token begins, and the characters that it completes."""
        at, whole = self._n, self._decoder.decode(piece)
        self._n += len(whole)
        return at, whole


def mix_json(selection: Selection) -> dict[str, Any]:
    """Weights and how they were chosen; perplexities and the grid where the prompt was scored."""
    score = selection.score
    perplexities, grid = selection.perplexities(), None
    if score is not None:
        alphas, betas, nll = score.surface(corners=selection.method == AUTO)
        mean = [[_or_none(value) for value in row] for row in nll.tolist()]
        grid = {"alphas": alphas, "betas": betas, "mean_nll": mean}
    if perplexities is not None:
        perplexities = {name: _or_none(value) for name, value in perplexities.items()}
    return {
        "weights": selection.to_json(),
        "perplexity": perplexities,
        "grid": grid,
    }


def _called(call: FunctionCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _or_none(value: float) -> Any:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _finite(value: float) -> float:
    return max(value, _LOWEST)


def _name(piece: bytes) -> str:
    """A token as a string; bytes that are not whole characters are written in hexadecimal."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _chat_token(piece: bytes, logprob: float | None) -> dict[str, Any]:
    value = _LOWEST if logprob is None else _finite(logprob)
    return {"token": _name(piece), "logprob": value, "bytes": list(piece)}
