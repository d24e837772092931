"""How to continue a prompt: fields of a body to the options of the engine's requests."""

from collections.abc import Sequence
from typing import cast

from trimix_gguf.answering.request import Options
from trimix_gguf.choosing.methods import ChosenBy, runtime_methods
from trimix_gguf.errors import WeightsError
from trimix_gguf.mixing.fusion import METHODS, Weights
from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.fields import Fields

_MOST_STOPS = 32
JSON_OBJECT: dict[str, object] = {"type": "object"}
# What other servers have and this one has not; each would change the answer.
_NOT_HERE = {
    **dict.fromkeys(
        ("grammar", "json_schema", "structured_outputs", "guided_json", "guided_regex",
         "guided_choice", "guided_grammar"),
        "give a JSON schema as response_format",
    ),
    "min_tokens": "an answer ends where the models end it",
    "ignore_eos": "an answer ends where the models end it; logit_bias can forbid a token",
    "stop_token_ids": "give their text as stop",
    "bad_words": "logit_bias can forbid tokens",
    "use_beam_search": "ask for n answers, and choose among them",
    "prompt_logprobs": "a completion with echo and logprobs has those of the prompt",
    "continue_final_message": "end with a message of the user",
}  # fmt: skip


class CallOptions(Options, total=False):
    """Options of the engine's requests, and what the server itself makes some of."""

    task: str  # whose weights answer


def options_of(fields: Fields, *, stop: str = "stop") -> CallOptions:
    """The options that all kinds of body set; absent ones keep their defaults.

    `stop` is the name of the field with the stop strings.
    """
    given: dict[str, object] = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "presence_penalty": fields.number("presence_penalty", -2, 2),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2),
        "top_k": _top_k(fields),
        "min_p": fields.number("min_p", 0, 1),
        "repeat_penalty": _repeat_penalty(fields),
        "logit_bias": _logit_bias(fields),
        "json_schema": _json_schema(fields),
    }
    for name, why in _NOT_HERE.items():
        fields.refuse(name, why, harmless=(False, 0, [], ""))
    options: CallOptions = {"stop": _stops(fields, stop)}
    options.update(present(given))
    options.update(_mix(fields))
    return options


def present(given: dict[str, object]) -> CallOptions:
    """The options that a body names."""
    return cast(CallOptions, {name: value for name, value in given.items() if value is not None})


def _stops(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.take(name)
    stops = [] if value in (None, "") else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS:
        fields.wrong(name, value, f"a string, or a list of up to {_MOST_STOPS}")
    if not all(isinstance(stop, str) and stop for stop in stops):
        fields.wrong(name, value, "strings that are not empty")
    return tuple(stops)


def _top_k(fields: Fields) -> int | None:
    value = fields.integer("top_k", -1, 2**31 - 1)
    return 0 if value == -1 else value  # both mean: no cut-off


def _repeat_penalty(fields: Fields) -> float | None:
    """llama.cpp's name, or vLLM's."""
    ours = fields.number("repeat_penalty", 0.01, 100)
    theirs = fields.number("repetition_penalty", 0.01, 100)
    if None not in (ours, theirs) and ours != theirs:
        raise RequestError(
            "repeat_penalty and repetition_penalty differ; give one of them",
            param="repetition_penalty",
        )
    return theirs if ours is None else ours


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
    form = fields.within(value, "response_format")
    kind = form_kind(form)
    schema = None
    if kind == "json_schema":
        schema = schema_of(form.within(form.take("json_schema"), "json_schema"))
    form.done()
    return JSON_OBJECT if kind == "json_object" else schema


def form_kind(form: Fields) -> str:
    """Whether a format asks for text, json_object or json_schema."""
    kind = form.one_of("type", ("text", "json_object", "json_schema"))
    if kind is None:
        form.wrong("type", None, "text, json_object or json_schema")
    return kind


def form_in(fields: Fields, name: str, *ignored: str) -> Fields | None:
    """The object {"format": {…}} of a field; None where neither is there."""
    value = fields.take(name)
    if value is None:
        return None
    inner = fields.within(value, name)
    asked = inner.take("format")
    inner.ignore(*ignored)
    inner.done()
    return None if asked is None else inner.within(asked, "format")


def schema_of(fields: Fields) -> dict[str, object]:
    """The schema among fields that also name and describe it."""
    schema = fields.take("schema")
    if not isinstance(schema, dict):
        fields.wrong("schema", schema, "an object")
    fields.ignore("name", "description", "strict")
    fields.done()
    return schema


def _mix(fields: Fields) -> CallOptions:
    """The extension `trimix`.

    {"weights": [alpha, beta] | "method": name | "task": name, "trace": bool, "score_tokens":
    "auto" | "all" | n, "top_k", "min_p", "repeat_penalty"}
    """
    value = fields.take("trimix")
    if value is None:
        return {}
    inner = Fields(
        value, fields.place("trimix")
    )  # our own: an unknown name in it is a typing error
    weights = inner.take("weights")
    method = inner.one_of("method", runtime_methods())
    task = inner.text("task")
    given: dict[str, object] = {
        "task": task,
        "trace": "mix" if inner.boolean("trace") else None,
        "score_tokens": _score_tokens(inner),
        "top_k": _top_k(inner),
        "min_p": inner.number("min_p", 0, 1),
        "repeat_penalty": inner.number("repeat_penalty", 0.01, 100),
    }
    inner.done()
    named = {"weights": weights, "method": method, "task": task}
    chosen_by = [name for name, value in named.items() if value is not None]
    if len(chosen_by) > 1:
        both = " or ".join(f"trimix.{name}" for name in chosen_by)
        raise RequestError(f"give {both}, not both", param=inner.place(chosen_by[1]))
    pair = None if weights is None else _weights(inner, weights)
    return cast(CallOptions, {**present(given), **mix_settings(method, pair)})


def _score_tokens(fields: Fields) -> object:
    value = fields.take("score_tokens")
    is_number = type(value) is int and value > 0
    if value is not None and value not in ("auto", "all") and not is_number:
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
