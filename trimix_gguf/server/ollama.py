"""Ollama's /api/chat and /api/generate: bodies to calls, and answers in that form."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Unpack

from trimix_gguf.answering.request import Event
from trimix_gguf.mixing.sampling import MOST_LAST_N
from trimix_gguf.server.calls import FunctionCall
from trimix_gguf.server.errors import RequestError, error_json
from trimix_gguf.server.fields import Fields
from trimix_gguf.server.messages import messages_of, with_system
from trimix_gguf.server.openai import MOST_TOKENS, Call, seed_of, with_tools
from trimix_gguf.server.replies import Choice, Reply, Said, sent_line
from trimix_gguf.server.settings import JSON_OBJECT, CallOptions, options_of, present
from trimix_gguf.server.tools import offered_tools
from trimix_gguf.trio.trio import Trio

# Routes of Ollama that this server has not.
NOT_HERE = {
    **dict.fromkeys(
        ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete"),
        "trios are set where the server starts; see trimix pull and trimix create",
    ),
    **dict.fromkeys(("/api/embed", "/api/embeddings"), "the models write only text"),
}
_PATH = "/api/"
_NO_IMAGES = "the models read only text"
_OF_THE_SERVER = "the server has settings of its own for this"
# Options that say how a model is loaded.
_LOADING = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "low_vram", "f16_kv",
    "use_mmap", "use_mlock", "numa",
)  # fmt: skip
_NS = 1_000_000_000


def parse_ollama_chat(body: object, ignored: list[str] | None = None) -> Call:
    """The body of /api/chat; raises RequestError."""
    fields = Fields(body, ignored=ignored)
    is_empty = isinstance(body, dict) and body.get("messages") in (None, [])
    messages = fields.take("messages") if is_empty else messages_of(fields)
    call = _call(fields, Call("chat", messages=tuple(messages or ())))
    call = with_tools(call, offered_tools(fields))
    fields.done()
    return call


def parse_generate(body: object, ignored: list[str] | None = None) -> Call:
    """The body of /api/generate: a chat of one question, or a text that goes on if it is `raw`."""
    fields = Fields(body, ignored=ignored)
    prompt, system = fields.text("prompt"), fields.text("system")
    is_raw = fields.boolean("raw")
    fields.refuse("images", _NO_IMAGES, harmless=([],))
    fields.refuse("suffix", "the models continue a text and do not fill gaps", harmless=("",))
    fields.refuse("template", "a trio has its own; raw is without", harmless=("",))
    fields.refuse("context", "the server keeps no answers; use /api/chat", harmless=([],))
    call = Call("chat")
    if prompt and is_raw:
        call = Call("completion", prompts=(prompt,))
    elif prompt:
        call = Call("chat", messages=with_system(system, [{"role": "user", "content": prompt}]))
    call = _call(fields, call)
    fields.done()
    return call


def _call(fields: Fields, call: Call) -> Call:
    """`call` with the fields that both kinds share."""
    inner = fields.within(fields.take("options") or {}, "options")
    options = options_of(inner)
    options.update(_own_options(inner))
    seed = seed_of(inner)
    inner.done()
    options.update(_form(fields))
    for name in ("logprobs", "top_logprobs"):
        fields.refuse(name, "/v1/chat/completions has them", harmless=(False, 0))
    think = fields.take("think")
    if think not in (None, False):
        fields.wrong("think", think, "false, as the answer is all text")
    fields.leave_out("keep_alive", _OF_THE_SERVER)
    variables: dict[str, object] = {} if think is None else {"enable_thinking": False}
    return replace(
        call,
        model=(fields.text("model") or "").removesuffix(":latest") or None,
        template_variables=variables,
        stream=fields.boolean("stream", absent=True),
        seed=seed,
        options=options,
        schema_at="format",
    )


def _own_options(inner: Fields) -> CallOptions:
    """Those of Ollama that OpenAI's clients do not have."""
    limit = inner.integer("num_predict", -2, MOST_TOKENS, but=(0,))
    last_n = inner.integer("repeat_last_n", -1, 2**31 - 1)
    given: dict[str, object] = {
        "max_tokens": MOST_TOKENS if limit in (-1, -2) else limit,
        "penalty_last_n": None if last_n is None else min(last_n, MOST_LAST_N),
        "mirostat": inner.integer("mirostat", 0, 2),
        "mirostat_tau": inner.number("mirostat_tau", 0, 100),
        "mirostat_eta": inner.number("mirostat_eta", 0, 1),
    }
    for name in _LOADING:
        inner.leave_out(name, _OF_THE_SERVER)
    return present(given)


def _form(fields: Fields) -> CallOptions:
    form = fields.take("format")
    if form in (None, ""):
        return {}
    if form == "json":
        return {"json_schema": JSON_OBJECT}
    if not isinstance(form, dict):
        fields.wrong("format", form, "json, or a JSON schema")
    return {"json_schema": form}


class OllamaReply(Reply):
    """What a client of Ollama gets: an object, or one per line; the last one has the counts."""

    media_type = "application/x-ndjson"

    def __init__(self, call: Call, trio: Trio, **said: Unpack[Said]) -> None:
        super().__init__(call, trio, **said)
        self._first: float | None = None  # when the first token came

    def take(self, index: int, event: Event) -> Iterator[dict[str, Any]]:
        """Keep an event of the answer; yield the lines that tell it, if the call streams."""
        if self._first is None:
            self._first = time.perf_counter()
        return super().take(index, event)

    def _tell(self, index: int, event: Event, begins: bool) -> Iterator[dict[str, Any]]:
        choice = self.choices[index]
        said = {**(self.mix(choice) if begins else {}), **self.extension(choice, event.tokens)}
        if choice.shown or said:
            yield {**self._line(choice.shown), "done": False, **({"trimix": said} if said else {})}
        if event.finish_reason is not None:
            if choice.calls:
                yield {**self._line("", choice.calls), "done": False}
            yield {**self._line(""), **self._end(choice)}

    def body(self) -> dict[str, Any]:
        """The whole answer; of an empty call, that the trio is loaded."""
        choice = self.choices[0]
        line = self._line(choice.text, choice.calls)
        if self._call.is_empty:
            return {**line, "done": True, "done_reason": "load"}
        said = {**self.mix(choice), **self.extension(choice, choice.tokens)}
        return {**line, **self._end(choice), "trimix": said}

    def encode(self, chunk: dict[str, Any]) -> bytes:
        """A line as it is sent."""
        return f"{sent_line(chunk)}\n".encode()

    def ending(self) -> bytes:
        """Nothing: the last line tells the end."""
        return b""

    def failure(self, error: RequestError) -> bytes:
        """The line that ends a stream which fails."""
        return self.encode(error_json(error, _PATH))

    def _line(self, text: str, calls: Sequence[FunctionCall] = ()) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"model": self._head["model"], "created_at": now, **self._answer(text, calls)}

    def _answer(self, text: str, calls: Sequence[FunctionCall]) -> dict[str, Any]:
        """A piece of an answer as /api/chat has it."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            called = [{"name": call.name, "arguments": call.values} for call in calls]
            message["tool_calls"] = [{"function": function} for function in called]
        return {"message": message}

    def _end(self, choice: Choice) -> dict[str, Any]:
        """The counts, and nanoseconds by the clock: until it was loaded, had a token, had all."""
        now = time.perf_counter()
        first = now if self._first is None else self._first
        spans = {
            "total_duration": now - self._began,
            "load_duration": self._ready - self._began,
            "prompt_eval_duration": first - self._ready,
            "eval_duration": now - first,
        }
        n_prompt, n_tokens = self.n_tokens()
        return {
            "done": True,
            "done_reason": "stop" if choice.newest.finish_reason == "stop" else "length",
            "prompt_eval_count": n_prompt,
            "eval_count": n_tokens,
            **{name: int(seconds * _NS) for name, seconds in spans.items()},
        }


class GenerateReply(OllamaReply):
    """The same for /api/generate."""

    def _answer(self, text: str, calls: Sequence[FunctionCall]) -> dict[str, Any]:
        return {"response": text}
