"""Functions that a client offers, for the answer to call.

One that must be called is a JSON schema: the answer is its arguments. Others are offered to a
chat template that has a section for them, and writes calls as Qwen's and Hermes' do; else they are
not used.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.fields import Fields

OPENS, CLOSES = "<tool_call>", "</tool_call>"
WHY_LEFT_OUT = (
    "the chat template of this trio offers no functions; one that tool_choice names is called"
)


@dataclass(frozen=True)
class Function:
    """A function that an answer may call, with arguments that are valid under `schema`."""

    name: str
    schema: dict[str, object]
    schema_at: str  # in the body
    description: str = ""


@dataclass(frozen=True)
class Tools:
    """The function that must be called, or those that may be."""

    forced: Function | None = None
    offered: tuple[Function, ...] = ()


def openai_tools(fields: Fields) -> Tools:
    """The fields `tools` and `tool_choice` as OpenAI has them; raises RequestError."""
    choice = fields.take("tool_choice")
    # The older names of the same: what is asked for by them is text.
    fields.leave_out("functions", "use tools and tool_choice", harmless=([],))
    fields.refuse("function_call", "use tools and tool_choice", harmless=("none", "auto"))
    if choice in (None, "none", "auto"):
        return _offered(fields, _openai_function, used=choice != "none")
    name = None if choice == "required" else _openai_choice(fields, choice)
    return Tools(forced=_forced(fields, name, _openai_function))


def anthropic_tools(fields: Fields) -> Tools:
    """The same as Anthropic has them."""
    value = fields.take("tool_choice")
    choice = fields.within({"type": "auto"} if value is None else value, "tool_choice")
    kind = choice.one_of("type", ("auto", "any", "none", "tool"))
    if kind is None:
        choice.wrong("type", None, "auto, any, none or tool")
    name = _named(choice) if kind == "tool" else None
    choice.ignore("disable_parallel_tool_use")
    choice.done()
    if kind in ("auto", "none"):
        return _offered(fields, _anthropic_function, used=kind == "auto")
    return Tools(forced=_forced(fields, name, _anthropic_function))


def offered_tools(fields: Fields) -> Tools:
    """The field `tools` as Ollama has it: OpenAI's, without a choice."""
    return _offered(fields, _openai_function, used=True)


def template_tools(tools: Sequence[Function]) -> list[dict[str, object]]:
    """Functions as chat templates expect them."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.schema,
            },
        }
        for tool in tools
    ]


def takes_tools(template: str | None) -> bool:
    """Whether a chat template offers functions, and has calls in the form that is read here."""
    return template is not None and "tools" in template and OPENS in template


def call_text(name: str, arguments: str) -> str:
    """An earlier call, its arguments as JSON, as these templates write it."""
    named = json.dumps(name, ensure_ascii=False)
    return f'{OPENS}\n{{"name": {named}, "arguments": {arguments}}}\n{CLOSES}'


def result_text(text: str) -> str:
    """What a function gave, as these templates write it."""
    return f"<tool_response>\n{text}\n</tool_response>"


# -- one field ------------------------------------------------------------------------------


def _offered(fields: Fields, read: Callable[[Fields], Function], *, used: bool) -> Tools:
    """Functions that may be called; none where `tools` holds something else, or is not `used`."""
    value = fields.take("tools")
    if value in (None, []):
        return Tools()
    try:
        found = _functions(fields, value, read) if used else []
    except RequestError:
        found = []
    if not found:
        fields.left_out("tools", WHY_LEFT_OUT)
    return Tools(offered=tuple(found))


def _forced(fields: Fields, name: str | None, read: Callable[[Fields], Function]) -> Function:
    """The function of that name; without a name, the only one."""
    functions = _functions(fields, fields.take("tools"), read)
    if name is None:
        if len(functions) == 1:
            return functions[0]
        raise RequestError(
            "that some tool must be called is supported with exactly one; name it in tool_choice",
            param="tool_choice",
            code="unsupported_parameter",
        )
    for function in functions:
        if function.name == name:
            return function
    fields.wrong("tool_choice", name, "the name of one of the tools")


def _functions(fields: Fields, value: object, read: Callable[[Fields], Function]) -> list[Function]:
    if not isinstance(value, list) or not value:
        fields.wrong("tools", value, "a list of functions, one at least")
    return [read(fields.within(item, f"tools[{i}]")) for i, item in enumerate(value)]


def _openai_function(tool: Fields) -> Function:
    if tool.one_of("type", ("function",)) is None:
        tool.wrong("type", None, "function")
    return _function(tool.within(tool.take("function"), "function"), "parameters")


def _anthropic_function(tool: Fields) -> Function:
    tool.one_of("type", ("custom",))
    return _function(tool, "input_schema")


def _function(fields: Fields, schema_name: str) -> Function:
    name, schema = _named(fields), fields.take(schema_name)
    if not isinstance(schema, dict | None):
        fields.wrong(schema_name, schema, "a JSON schema")
    schema = {"type": "object"} if schema is None else schema
    return Function(
        name, schema, fields.place(schema_name), description=fields.text("description") or ""
    )


def _openai_choice(fields: Fields, choice: object) -> str:
    """The name in {"type": "function", "function": {"name": …}}."""
    if not isinstance(choice, dict):
        fields.wrong("tool_choice", choice, "none, auto, required, or an object with a function")
    named = fields.within(choice, "tool_choice")
    if named.one_of("type", ("function",)) is None:
        named.wrong("type", None, "function")
    return _named(named.within(named.take("function"), "function"))


def _named(fields: Fields) -> str:
    name = fields.text("name")
    if not name:
        fields.wrong("name", name, "a function's name")
    return name
