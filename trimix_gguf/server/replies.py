"""Events of the engine -> what a client gets: OpenAI's response objects, whole or in chunks."""

import codecs
import json
import math
import secrets
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from trimix_gguf.answering.request import Event, Token
from trimix_gguf.choosing.methods import AUTO
from trimix_gguf.choosing.selection import Selection
from trimix_gguf.server.errors import RequestError, error_json
from trimix_gguf.server.openai import Call
from trimix_gguf.trio.trio import Trio

_LOWEST = -9999.0  # what OpenAI writes for a log-probability of minus infinity
_REASONS = {"stop": "stop", "length": "length", "context": "length"}
# Some clients cut a stream into lines at these too, and JSON does not escape them.
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def sent_event(value: dict[str, Any], name: str | None = None) -> bytes:
    """A server-sent event, with a name where it has one."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    named = "" if name is None else f"event: {name}\n"
    return f"{named}data: {text.translate(_LINE_ENDS)}\n\n".encode()


class Reply:
    """What a client gets for one call: a choice for each of its prompts, `n` times.

    `echoes` are the prompts' texts, for completions that give them back; else empty.
    """

    def __init__(self, call: Call, trio: Trio, *, model: str, echoes: Sequence[str] = ()) -> None:
        self._call, self._trio = call, trio
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
            "model": model,
            "system_fingerprint": f"trimix-gguf-{version('trimix-gguf')}",
        }

    def take(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """Keep an event of a choice; yield the chunks that tell it, if the call streams."""
        choice = self.choices[index]
        begins = choice.take(event)
        if not self._call.stream:
            return
        if begins:
            yield self._chunk(index, choice.opening(), choice.mix())
        piece = choice.piece(event)
        if piece is not None:
            yield self._chunk(index, piece, self.extension(choice, event.tokens) or None)

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
            mixes.append({**choice.mix(), **self.extension(choice, choice.tokens)})
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
        self._function = call.function
        self._call_id = f"call_{secrets.token_hex(12)}"
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
        self._text.append(event.text)
        self.tokens += event.tokens
        self.newest = event
        return begins

    def opening(self) -> dict[str, Any]:
        """The first chunk: who speaks, or the prompt that is given back."""
        if self._chat:
            delta: dict[str, Any] = {"role": "assistant", "content": ""}
            if self._function is not None:
                delta = {"role": "assistant", "content": None}
                delta["tool_calls"] = [{"index": 0, **self._called("")}]
            return {"delta": delta, "logprobs": None, "finish_reason": None}
        logprobs = self._logprobs_of(self._prompt_tokens) if self._gives_back else None
        return {"text": self._echo, "logprobs": logprobs, "finish_reason": None}

    def piece(self, event: Event) -> dict[str, Any] | None:
        """The chunk of an event; None where there is nothing to tell yet."""
        reason = self._reason(event)
        if not (event.text or event.tokens or reason):
            return None
        said: dict[str, Any] = {"logprobs": self._logprobs_of(event.tokens)}
        if self._chat:
            said["delta"] = self._delta(event.text) if event.text else {}
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
            if self._function is not None:
                message |= {"content": None, "tool_calls": [self._called(text)]}
            said["message"] = message
        else:
            said["text"] = text
        return {**said, "finish_reason": self._reason(self.newest)}

    @property
    def text(self) -> str:
        """What has been answered so far."""
        return "".join(self._text)

    def _reason(self, event: Event) -> str | None:
        reason = _REASONS.get(event.finish_reason or "")
        return "tool_calls" if reason == "stop" and self._function is not None else reason

    def _called(self, arguments: str) -> dict[str, Any]:
        function = {"name": self._function, "arguments": arguments}
        return {"id": self._call_id, "type": "function", "function": function}

    def _delta(self, text: str) -> dict[str, Any]:
        if self._function is None:
            return {"content": text}
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}

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
