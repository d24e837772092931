"""OpenAI's request bodies, checked: chat messages or prompts, and how to continue them.

A field that asks for what the models cannot do is refused by name. Fields of OpenAI that change
nothing here (user, metadata, …) are ignored. Any other field is refused, as it may be a typing
error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from trimix_gguf.answering.request import Options
from trimix_gguf.choosing.methods import ChosenBy, runtime_methods
from trimix_gguf.errors import WeightsError
from trimix_gguf.mixing.fusion import METHODS, Weights
from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.fields import Fields, describe

MOST_TOP = 20  # alternatives to a token
_MOST_TOKENS = 1 << 20
_MOST_STOPS = 32
_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "reasoning_effort", "verbosity", "parallel_tool_calls",
    "prediction",
)  # fmt: skip
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_JSON_OBJECT: dict[str, object] = {"type": "object"}

Source = str | tuple[int, ...]  # a prompt as text, or as token ids


@dataclass(frozen=True)
class Call:
    """What one HTTP request asks for; `options` make the engine's Requests of it."""

    kind: Literal["chat", "completion"]
    model: str | None = None
    messages: tuple[dict[str, str], ...] = ()
    template_variables: dict[str, object] = field(default_factory=dict)
    prompts: tuple[Source, ...] = ()
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    seed: int | None = None
    options: Options = field(default_factory=Options)

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


def parse_chat(body: object) -> Call:
    """The body of /v1/chat/completions; raises RequestError."""
    fields = Fields(body)
    messages = _messages(fields)
    options = _options(fields)
    with_logprobs, n_top = fields.boolean("logprobs"), fields.integer("top_logprobs", 0, MOST_TOP)
    if n_top is not None and not with_logprobs:
        raise RequestError("top_logprobs goes with logprobs: true", param="top_logprobs")
    if with_logprobs:
        options["n_top"] = n_top or 0
    for name in ("tools", "functions"):
        fields.refuse(name, "the models do not call functions", harmless=([],))
    for name in ("tool_choice", "function_call"):
        fields.refuse(name, "the models do not call functions", harmless=("none", "auto"))
    fields.refuse("modalities", "the models write only text", harmless=(["text"],))
    for name in ("audio", "web_search_options"):
        fields.refuse(name, "the models read and write only text")
    variables = fields.take("chat_template_kwargs")
    if not isinstance(variables, dict | None):
        fields.wrong("chat_template_kwargs", variables, "an object")
    limit = _no_limit(fields.integer("max_completion_tokens", -1, _MOST_TOKENS, but=(0,)))
    call = Call("chat", messages=messages, template_variables=variables or {}, options=options)
    return _call(fields, call, limit)


def parse_completion(body: object) -> Call:
    """The body of /v1/completions; raises RequestError."""
    fields = Fields(body)
    prompts = _prompts(fields)
    options = _options(fields)
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
    never = () if call.kind == "completion" else (0,)
    max_tokens = _no_limit(fields.integer("max_tokens", -1, _MOST_TOKENS, but=never))
    if limit is not None and max_tokens is not None and limit != max_tokens:
        raise RequestError(
            "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens"
        )
    max_tokens = max_tokens if limit is None else limit
    if max_tokens is not None:
        call = replace(call, options={**call.options, "max_tokens": max_tokens})
    stream = fields.boolean("stream")
    stream_options = fields.take("stream_options")
    include_usage = False
    if stream_options is not None:
        if not stream:
            raise RequestError("stream_options goes with stream: true", param="stream_options")
        inner = Fields(stream_options, "stream_options")
        include_usage = inner.boolean("include_usage")
        inner.ignore("include_obfuscation")
        inner.done()
    call = replace(
        call,
        model=fields.text("model"),
        n=fields.integer("n", 1, 128) or 1,
        stream=stream,
        include_usage=include_usage,
        seed=_drawn(fields.integer("seed", -(2**63), 2**63 - 1)),
    )
    fields.ignore(*_IGNORED)
    fields.done()
    return call


def _no_limit(n: int | None) -> int | None:
    return None if n == -1 else n  # as clients of llama.cpp say it


def _drawn(seed: int | None) -> int | None:
    return None if seed == -1 else seed  # as clients of llama.cpp ask for a random one


# -- what to continue -----------------------------------------------------------------------


def _messages(fields: Fields) -> tuple[dict[str, str], ...]:
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        fields.wrong("messages", value, "a list of messages, one at least")
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))


def _message(value: object, at: str) -> dict[str, str]:
    fields = Fields(value, at)
    role = fields.one_of("role", tuple(_ROLES))
    if role is None:
        fields.wrong("role", None, f"one of {', '.join(_ROLES)}")
    content = fields.take("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{at}.content[{i}]") for i, part in enumerate(content))
    if content is None and role == "assistant":  # as clients send an answer without text
        content = ""
    if not isinstance(content, str):
        fields.wrong("content", content, "a string, or a list of text parts")
    reasoning = fields.text("reasoning_content")
    for name in ("tool_calls", "function_call", "audio"):
        fields.refuse(name, "the models read only text", harmless=([],))
    fields.ignore("name", "refusal", "annotations")
    fields.done()
    message = {"role": _ROLES[role], "content": content}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


def _part(value: object, at: str) -> str:
    fields = Fields(value, at)
    kind = fields.take("type")
    if kind != "text":
        raise RequestError(
            f"{at} is of type {describe(kind)}; the models read only text",
            param=at,
            code="unsupported_parameter",
        )
    text = fields.text("text")
    if text is None:
        fields.wrong("text", None, "a string")
    fields.ignore("cache_control")  # what was read is kept anyway
    fields.done()
    return text


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


# -- how to continue it ---------------------------------------------------------------------


def _options(fields: Fields) -> Options:
    """The options that both kinds of body set; absent ones keep their defaults."""
    given: dict[str, object] = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "top_k": _top_k(fields),
        "min_p": fields.number("min_p", 0, 1),
        "repeat_penalty": fields.number("repeat_penalty", 0.01, 100),
        "logit_bias": _logit_bias(fields),
        "json_schema": _json_schema(fields),
    }
    options: Options = {"stop": _stops(fields)}
    options.update(_present(given))
    options.update(_mix(fields))
    return options


def _present(given: dict[str, object]) -> Options:
    """The options that a body names."""
    return cast(Options, {name: value for name, value in given.items() if value is not None})


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        fields.wrong("stop", value, f"a string, or a list of up to {_MOST_STOPS}")
    if not all(isinstance(stop, str) and stop for stop in stops):
        fields.wrong("stop", value, "strings that are not empty")
    return tuple(stops)


def _top_k(fields: Fields) -> int | None:
    value = fields.integer("top_k", -1, 2**31 - 1)
    return 0 if value == -1 else value  # both mean: no cut-off


def _logit_bias(fields: Fields) -> dict[int, float] | None:
    value = fields.take("logit_bias")
    if value is None:
        return None
    if not isinstance(value, dict):
        fields.wrong("logit_bias", value, "an object of token ids and biases")
    biases: dict[int, float] = {}
    for name, bias in value.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10):
            fields.wrong("logit_bias", name, "token ids as names")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            fields.wrong("logit_bias", bias, "biases from -100 to 100")
        biases[int(name)] = float(bias)
    return biases


def _json_schema(fields: Fields) -> dict[str, object] | None:
    value = fields.take("response_format")
    if value is None:
        return None
    form = Fields(value, "response_format")
    kind = form.one_of("type", ("text", "json_object", "json_schema"))
    if kind is None:
        form.wrong("type", None, "text, json_object or json_schema")
    schema = None
    if kind == "json_schema":
        inner = Fields(form.take("json_schema"), "response_format.json_schema")
        schema = inner.take("schema")
        if not isinstance(schema, dict):
            inner.wrong("schema", schema, "an object")
        inner.ignore("name", "description", "strict")
        inner.done()
    form.done()
    return _JSON_OBJECT if kind == "json_object" else schema


def _mix(fields: Fields) -> Options:
    """The extension `trimix`.

    {"weights": [alpha, beta] | "method": name, "trace": bool, "score_tokens": "auto" |
    "all" | n, "top_k", "min_p", "repeat_penalty"}
    """
    value = fields.take("trimix")
    if value is None:
        return {}
    inner = Fields(value, "trimix")
    weights = inner.take("weights")
    method = inner.one_of("method", runtime_methods())
    given: dict[str, object] = {
        "trace": "mix" if inner.boolean("trace") else None,
        "score_tokens": _score_tokens(inner),
        "top_k": _top_k(inner),
        "min_p": inner.number("min_p", 0, 1),
        "repeat_penalty": inner.number("repeat_penalty", 0.01, 100),
    }
    inner.done()
    if weights is not None and method is not None:
        raise RequestError("give trimix.weights or trimix.method, not both", param="trimix.method")
    pair = None if weights is None else _weights(inner, weights)
    return {**_present(given), **mix_settings(method, pair)}


def _score_tokens(fields: Fields) -> object:
    value = fields.take("score_tokens")
    if (
        value is not None
        and value not in ("auto", "all")
        and not (type(value) is int and value > 0)
    ):
        fields.wrong("score_tokens", value, "auto, all, or a number of tokens")
    return value


def mix_settings(method: str | None, weights: Weights | None) -> Options:
    """The options for fixed weights or a method's name; none for neither."""
    if weights is not None:
        return {"weights": weights}
    if method in METHODS:
        return {"weights": METHODS[method]}
    if method is not None:
        return {"weights": None, "method": cast(ChosenBy, method)}
    return {}


def _weights(fields: Fields, value: object) -> Weights:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        fields.wrong("weights", value, "two numbers, alpha and beta")
    if not all(type(weight) in (int, float) for weight in value):
        fields.wrong("weights", value, "two numbers, alpha and beta")
    try:
        return Weights(*(float(weight) for weight in value))
    except (WeightsError, OverflowError):
        fields.wrong("weights", value, "two numbers within ±1e6")
