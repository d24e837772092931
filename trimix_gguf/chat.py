"""Chat: messages -> text, by the template that a GGUF brings."""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trimix_gguf.errors import PromptError
from trimix_gguf.model import Model

Message = dict[str, str]  # role, content
_HERE = "<the message goes on here>"


def template_of(model: Model) -> str:
    """The chat template in a model's file; raises PromptError where it has none."""
    template = model.file.metadata.get("tokenizer.chat_template")
    if template is None:
        raise PromptError(f"{model.path.name} has no chat template; use plain prompts")
    return str(template)


def apply_template(
    model: Model, messages: Sequence[Message], add_generation_prompt: bool = True
) -> str:
    """Messages by the model's own template; without the generation prompt the last stays open.

    Raises PromptError where the template refuses them.
    """
    metadata, tokens = model.file.metadata, {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (token := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            tokens[f"{name}_token"] = model.piece(token, special=True).decode()
    try:
        return render_chat(
            template_of(model),
            list(messages),
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
    except TemplateError as error:
        reason = " ".join(str(error).split())
        raise PromptError(
            f"the chat template of {model.path.name} refuses the messages: {reason}"
        ) from None


def around_message(model: Model) -> tuple[list[int], list[int]]:
    """Ids that the template puts before a user's message, without BOS, and after it."""
    text = apply_template(model, [{"role": "user", "content": _HERE}])
    before, _, after = text.partition(_HERE)
    begin = model.tokenize(before, special=True)
    return begin[len(model.bos) :] if begin[:1] == model.bos else begin, model.tokenize(
        after, special=True
    )


def render_chat(
    template: str, messages: list[Message], *, add_generation_prompt: bool, **tokens: str
) -> str:
    """Messages by a chat template, in the sandbox and with the helpers that transformers gives it.

    Without the generation prompt the last message is left open, for its continuation. Raises
    jinja2.TemplateError. Source: transformers, utils/chat_template_utils.py.
    """
    messages = [dict(m) for m in messages]
    end = "" if add_generation_prompt else f"{_HERE} "
    messages[-1]["content"] += end
    text = _compile(template).render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **tokens,
    )
    if not end:
        return str(text)
    before, mark, after = text.rpartition(end.strip())
    if not mark:
        raise TemplateError("it leaves the last message out")
    # A template that strips its messages has taken the space after the mark.
    return str(before if after.startswith(" ") else before.rstrip())


class _Generation(Extension):
    """{% generation %}, which marks what to train on, and says nothing here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})  # jinja's own escapes HTML


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
