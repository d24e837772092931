"""From a call to the requests of the engine: their prompts, settings and seeds."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from trimix_gguf.answering.chat import PLAIN_STOPS, chat_prompt
from trimix_gguf.answering.request import Options, Request
from trimix_gguf.choosing.selection import Selection
from trimix_gguf.errors import PromptError
from trimix_gguf.mixing.sampling import N_SEEDS
from trimix_gguf.roles import ROLES
from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.messages import as_read
from trimix_gguf.server.openai import Call, Source
from trimix_gguf.server.tools import WHY_LEFT_OUT, takes_tools, template_tools
from trimix_gguf.trio.prompt import Prompt, Segment
from trimix_gguf.trio.trio import Trio


def make_requests(
    trio: Trio, call: Call, *, defaults: Request, tasks: Mapping[str, Selection]
) -> list[Request]:
    """`n` for each prompt; a seed counts up from one to the next. Raises RequestError.

    `tasks` are the choices that a call can name.
    """
    call = with_usable_tools(trio, call, None)
    for token in call.options.get("logit_bias") or ():
        _check_id(trio, token, "logit_bias")
    if call.kind == "chat":
        prompts = [_chat(trio, call)]
    else:
        prompts = [_plain(trio, source) for source in call.prompts]
    base = Request.of(defaults, **_options(call, tasks))
    if call.kind == "chat":
        base = Request.of(base, stop=(*base.stop, *PLAIN_STOPS))
    base = Request.of(base, echo=call.echo and call.logprobs)  # else only the text is given back
    requests: list[Request] = []
    for prompt in prompts:
        _check_length(trio, prompt, "messages" if call.kind == "chat" else "prompt")
        for _ in range(call.n):
            request = replace(base, prompt=prompt)
            if call.seed is not None:
                request = Request.of(request, seed=(call.seed + len(requests)) % N_SEEDS)
            requests.append(request)
    return requests


def _options(call: Call, tasks: Mapping[str, Selection]) -> Options:
    """Those of a call, with the weights of the task that it names."""
    options: dict[str, Any] = {**call.options}
    task = options.pop("task", None)
    if task is not None and task not in tasks:
        here = f"the one here is {', '.join(map(repr, tasks))}"
        raise RequestError(
            f"task {task[:80]!r} is not here; {here if tasks else 'trimix serve --task has one'}",
            status=404,
            param="trimix.task",
            code="task_not_found",
        )
    return cast(Options, options if task is None else {**options, "weights": tasks[task]})


def count_prompt(trio: Trio, call: Call) -> int:
    """How many tokens of large_ins a chat is; raises RequestError."""
    return _chat(trio, call).n_tokens(ROLES[0])


def with_usable_tools(trio: Trio, call: Call, ignored: list[str] | None) -> Call:
    """A call without the tools that it offers, where the chat template does not take them.

    They are named in `ignored`; without that list it raises RequestError.
    """
    if not call.tools or takes_tools(trio.models[ROLES[0]].chat_template):
        return call
    if ignored is None:
        raise RequestError(
            f"tools is not supported: {WHY_LEFT_OUT}", param="tools", code="unsupported_parameter"
        )
    ignored.append("tools")
    return replace(call, tools=())


def check_model(name: str | None, own: str) -> None:
    """Refuse a model's name other than `own` and "default"; a call may leave it out."""
    if name not in (None, "", "default", own):
        raise no_model(name, own)


def no_model(name: str, *here: str) -> RequestError:
    """What is said of a model's name that is not one of those that are here."""
    names = ", ".join(map(repr, here))
    return RequestError(
        f"model {name[:80]!r} is not here; {names} {'is' if len(here) == 1 else 'are'}",
        status=404,
        param="model",
        code="model_not_found",
    )


def prompt_texts(trio: Trio, call: Call) -> list[str]:
    """The prompts as text, where a completion gives them back; else an empty list."""
    if not call.echo:
        return []
    for source in call.prompts:
        if not isinstance(source, str) and len(source) >= trio.n_ctx:  # before all are read
            raise _too_long(len(source), "the smallest", trio.n_ctx, "prompt")
    return [source if isinstance(source, str) else _text(trio, source) for source in call.prompts]


def _text(trio: Trio, ids: tuple[int, ...]) -> str:
    for token in ids:
        _check_id(trio, token, "prompt")
    return trio.text(ids)


def _chat(trio: Trio, call: Call) -> Prompt:
    try:
        return chat_prompt(
            trio,
            as_read(call.messages, with_calls=bool(call.tools)),
            variables=call.template_variables,
            tools=template_tools(call.tools),
        )
    except PromptError as error:
        raise RequestError(str(error), param="messages", code="invalid_prompt") from None


def _plain(trio: Trio, source: Source) -> Prompt:
    """Text as Trio.prompt reads it, or ids as they are, with BOS if they have it."""
    if isinstance(source, str):
        try:
            return trio.prompt(source)
        except PromptError as error:
            raise RequestError(str(error), param="prompt", code="invalid_prompt") from None
    for token in source:
        _check_id(trio, token, "prompt")
    n_begin = len(trio.models[ROLES[0]].bos)
    begin = list(source[:n_begin])
    if begin and begin == trio.models[ROLES[0]].bos:  # as in a text, so that it is found again
        rest = (Segment.of(source[n_begin:]),) if source[n_begin:] else ()
        return Prompt((Segment.of(begin, scored=False), *rest))
    return Prompt((Segment.of(source),))


def _check_id(trio: Trio, token: int, param: str) -> None:
    if not 0 <= token < trio.n_vocab or (trio.unused is not None and trio.unused[token]):
        raise RequestError(
            f"{param}: {token} is not a token; ids are 0 to {trio.n_vocab - 1}",
            param=param,
            code="invalid_value",
        )


def _check_length(trio: Trio, prompt: Prompt, param: str) -> None:
    for role, model in trio.models.items():
        if prompt.n_tokens(role) >= model.n_ctx:
            raise _too_long(prompt.n_tokens(role), f"{role}'s", model.n_ctx, param)


def _too_long(n: int, whose: str, n_ctx: int, param: str) -> RequestError:
    return RequestError(
        f"the prompt is {n} tokens, and {whose} context holds {n_ctx}; shorten it, or raise "
        "--n-ctx",
        param=param,
        code="context_length_exceeded",
    )
