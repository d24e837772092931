"""OpenAI's request bodies, checked: chat messages or prompts, and how to continue them.

A field that asks for what the models cannot do is refused by name. Fields of OpenAI that change
nothing here (user, metadata, …) are ignored. Any other field goes to the list `ignored`; where
there is none it is refused, as it may be a typing error.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.fields import Fields
from trimix_gguf.server.messages import Message, messages_of
from trimix_gguf.server.settings import CallOptions, options_of
from trimix_gguf.server.tools import Function, Tools, openai_tools

MOST_TOP = 20  # alternatives to a token
MOST_TOKENS = 1 << 20
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "reasoning_effort", "verbosity", "parallel_tool_calls",
    "prediction",
)  # fmt: skip

Source = str | tuple[int, ...]  # a prompt as text, or as token ids


@dataclass(frozen=True)
class Call:
    """What one HTTP request asks for; `options` make the engine's Requests of it."""

    kind: Literal["chat", "completion"]
    model: str | None = None
    messages: tuple[Message, ...] = ()
    template_variables: dict[str, object] = field(default_factory=dict)
    prompts: tuple[Source, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    seed: int | None = None
    options: CallOptions = field(default_factory=CallOptions)
    function: str | None = None  # that the answer calls; its text is the arguments
    tools: tuple[Function, ...] = ()  # that it may call
    schema_at: str = "response_format.json_schema.schema"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to answer: Ollama's way to have a trio loaded."""
        return not (self.messages or self.prompts)

    @property
    def question(self) -> str:
        """The newest message of the user, or the prompts that are text."""
        said = [m["content"] for m in self.messages if m["role"] == "user"]
        return "\n".join([*said[-1:], *(p for p in self.prompts if isinstance(p, str))])

    @property
    def echo(self) -> bool:
        """Whether the prompt is given back before the answer."""
        return self.options.get("echo", False)

    @property
    def logprobs(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self.options.get("n_top") is not None

    @property
    def trace(self) -> bool:
        """Whether each model's probabilities are asked for."""
        return self.options.get("trace") is not None


def parse_chat(body: object, ignored: list[str] | None = None) -> Call:
    """The body of /v1/chat/completions; raises RequestError."""
    fields = Fields(body, ignored=ignored)
    messages = messages_of(fields)
    options = options_of(fields)
    with_logprobs, n_top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, MOST_TOP)
    if n_top is not None and not with_logprobs:
        raise RequestError("top_logprobs goes with logprobs: true", param="top_logprobs")
    if with_logprobs:
        options["n_top"] = n_top or 0
    tools = openai_tools(fields)
    fields.refuse("modalities", "the models write only text", harmless=(["text"],))
    for name in ("audio", "web_search_options"):
        fields.refuse(name, "the models read and write only text")
    variables = fields.take("chat_template_kwargs")
    if not isinstance(variables, dict | None):
        fields.wrong("chat_template_kwargs", variables, "an object")
    limit = token_limit(fields, "max_completion_tokens")
    call = Call(
        "chat",
        messages=messages,
        template_variables=variables or {},
        options=options,
    )
    return _call(fields, with_tools(call, tools), limit)


def with_tools(call: Call, tools: Tools) -> Call:
    """A chat whose answer calls a function, or may; raises RequestError."""
    function = tools.forced
    if function is None:
        return replace(call, tools=tools.offered)
    if "json_schema" in call.options:
        raise RequestError(
            "a format of the answer and a forced tool_choice both say what it is; give one",
            param="tool_choice",
        )
    options: CallOptions = {**call.options, "json_schema": function.schema}
    return replace(call, options=options, function=function.name, schema_at=function.schema_at)


def parse_completion(body: object, ignored: list[str] | None = None) -> Call:
    """The body of /v1/completions; raises RequestError."""
    fields = Fields(body, ignored=ignored)
    prompts = _prompts(fields)
    options = options_of(fields)
    n_top = fields.integer("logprobs", 0, MOST_TOP)
    if n_top is not None:
        options["n_top"] = n_top
    options["echo"] = fields.boolean("echo")
    best_of = fields.take("best_of")
    if best_of is not None and (type(best_of) is not int or best_of != 1):
        raise RequestError(
            "best_of is not supported: ask for n answers, and choose among them",
            param="best_of",
            code="unsupported_parameter",
        )
    fields.refuse("suffix", "the models continue a text and do not fill gaps", harmless=("",))
    return _call(fields, Call("completion", prompts=prompts, options=options), None)


def _call(fields: Fields, call: Call, limit: int | None) -> Call:
    """`call` with the fields that both kinds share, once its own are taken out."""
    max_tokens = token_limit(fields, "max_tokens", none=call.kind == "completion")
    if limit is not None and max_tokens is not None and limit != max_tokens:
        raise RequestError(
            "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens"
        )
    max_tokens = max_tokens if limit is None else limit
    if max_tokens is not None:
        call = replace(call, options={**call.options, "max_tokens": max_tokens})
    stream = fields.boolean("stream")
    call = replace(
        call,
        model=fields.text("model"),
        n=fields.integer("n", 1, 128) or 1,
        stream=stream,
        include_usage=_wants_usage(fields, stream),
        seed=seed_of(fields),
    )
    fields.ignore(*IGNORED)
    fields.done()
    return call


def _wants_usage(fields: Fields, stream: bool) -> bool:
    value = fields.take("stream_options")
    if value is None:
        return False
    if not stream:
        raise RequestError("stream_options goes with stream: true", param="stream_options")
    inner = fields.within(value, "stream_options")
    wanted = inner.boolean("include_usage")
    inner.ignore("include_obfuscation")
    inner.done()
    return wanted


def token_limit(fields: Fields, name: str, *, none: bool = False) -> int | None:
    """The most tokens of an answer; -1 is as many as the context holds, 0 only for `none`."""
    limit = fields.integer(name, -1, MOST_TOKENS, but=() if none else (0,))
    return MOST_TOKENS if limit == -1 else limit  # -1 as clients of llama.cpp say it


def seed_of(fields: Fields) -> int | None:
    """The seed; None for a random one, which clients of llama.cpp ask for by -1."""
    seed = fields.integer("seed", -(2**63), 2**63 - 1)
    return None if seed == -1 else seed


def _prompts(fields: Fields) -> tuple[Source, ...]:
    """A string, a list of strings, token ids, or a list of lists of them."""
    value = fields.take("prompt")
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if _are_ids(value):
            return (tuple(value),)
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return tuple(tuple(item) for item in value)
    fields.wrong(
        "prompt", value, "a string, a list of strings, token ids, or a list of their lists"
    )


def _are_ids(value: list[object]) -> bool:
    return all(type(item) is int for item in value)
