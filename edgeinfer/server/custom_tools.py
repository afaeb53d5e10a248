"""Custom tools, which take a text: a model is told of functions that have it as their argument.

Knows nothing of endpoints.
"""

from __future__ import annotations

from edgeinfer.server.blocks import arguments_object
from edgeinfer.server.errors import Json
from edgeinfer.server.fields import Fields
from edgeinfer.server.requests import function_tool

_INPUT = "input"


def as_function(tool: Fields) -> Json:
    """A custom tool in the form that templates take. The text of a call matches its regex, if any.

    Of a grammar in Lark the model is told: inside of JSON none can be enforced.
    """
    form = tool.object("format")
    form = form.object("grammar") if "grammar" in form else form  # as chat completions have it
    syntax, definition = form.text("syntax"), form.text("definition")
    text: Json = {"type": "string"}
    told = [tool.text("description")]
    if syntax == "regex":
        text["pattern"] = f"^(?:{definition})$"
    elif definition:
        told.append(f"The input follows this grammar ({syntax or 'lark'}):\n{definition}")
    parameters = {"type": "object", "properties": {_INPUT: text}, "required": [_INPUT]}
    function = {
        "name": tool.get("name"),
        "description": "\n\n".join(filter(None, told)),
        "parameters": parameters,
        "strict": syntax == "regex",
    }
    return function_tool(Fields(function, tool.path))


def as_arguments(text: str) -> Json:
    """Those of the function that a model has been told of."""
    return {_INPUT: text}


def input_of(arguments: str) -> str:
    """The text that a call gives: whatever its argument is called, if there is one text alone."""
    given = arguments_object(arguments)
    texts = [given[_INPUT]] if _INPUT in given else [*given.values()]
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else arguments
