"""Functions that a client offers: one that must be called is a JSON schema; others are not used."""

from dataclasses import dataclass

from trimix_gguf.server.errors import RequestError
from trimix_gguf.server.fields import Fields

_WHY = "the models call a function only where tool_choice names it"


@dataclass(frozen=True)
class Function:
    """A function that the answer must call: the answer is its arguments, valid under `schema`."""

    name: str
    schema: dict[str, object]
    schema_at: str  # in the body


def forced_function(fields: Fields) -> Function | None:
    """The one function that a body says to call; None where the answer is to be text.

    Raises RequestError where it asks for a choice between several.
    """
    choice = fields.take("tool_choice")
    # The older names of the same: what is asked for by them is text.
    fields.leave_out("functions", _WHY, harmless=([],))
    fields.refuse("function_call", "use tools and tool_choice", harmless=("none", "auto"))
    if choice in (None, "none", "auto"):
        fields.leave_out("tools", _WHY, harmless=([],))
        return None
    functions = _functions(fields)
    if choice == "required":
        if len(functions) == 1:
            return functions[0]
        raise RequestError(
            "tool_choice 'required' is supported with exactly one tool; name one of them",
            param="tool_choice",
            code="unsupported_parameter",
        )
    name = _chosen(fields, choice)
    for function in functions:
        if function.name == name:
            return function
    fields.wrong("tool_choice", name, "the name of one of the tools")


def _chosen(fields: Fields, choice: object) -> str:
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


def _functions(fields: Fields) -> list[Function]:
    tools = fields.take("tools")
    if not isinstance(tools, list) or not tools:
        fields.wrong("tools", tools, "a list of functions, one at least")
    functions = []
    for i, value in enumerate(tools):
        tool = fields.within(value, f"tools[{i}]")
        if tool.one_of("type", ("function",)) is None:
            tool.wrong("type", None, "function")
        inner = tool.within(tool.take("function"), "function")
        name, schema = _named(inner), inner.take("parameters")
        if not isinstance(schema, dict | None):
            inner.wrong("parameters", schema, "a JSON schema")
        schema = {"type": "object"} if schema is None else schema
        functions.append(Function(name, schema, inner.place("parameters")))
    return functions
