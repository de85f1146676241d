"""What a chat request says about tools: which are offered, whether one must be called, how many times.

Everything wrong here is a RequestError that names its field. How calls are found in an answer is in
tool_calls.py, how they are made sure of in guides.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from api.schema import ChatRequest
from engine.errors import RequestError

MAX_TOOLS = 128
_MAX_NAME = 64  # characters
_HAS_A_TYPE = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"})


@dataclass(frozen=True)
class Function:
    """One function; `parameters` is the JSON schema of its arguments, an object."""

    name: str
    parameters: dict[str, Any]
    is_strict: bool = False


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request."""

    offered: dict[str, Function] = field(default_factory=dict)  # that answers may call
    must_call: bool = False
    only_one: bool = False  # at most one call
    for_prompt: list[dict[str, Any]] | None = None  # what the template shows to the model

    @property
    def is_on(self) -> bool:
        return bool(self.offered)


NO_TOOLS = ToolUse()


def read_tools(request: ChatRequest) -> ToolUse:
    """Checks tools, tool_choice and parallel_tool_calls."""
    functions = _read_functions(request.tools or [])
    choice = _read_choice(request.tool_choice, functions)
    if choice == "none" or not functions:
        return NO_TOOLS
    named = choice not in ("auto", "required")
    return ToolUse(
        offered={choice: functions[choice]} if named else functions,
        must_call=choice != "auto",
        only_one=named or request.parallel_tool_calls is False,
        for_prompt=request.tools,
    )


def _read_functions(tools: list[dict[str, Any]]) -> dict[str, Function]:
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"At most {MAX_TOOLS} tools, got {len(tools)}.", param="tools")
    functions: dict[str, Function] = {}
    for index, tool in enumerate(tools):
        function = _read_function(tool, f"tools[{index}]")
        if function.name in functions:
            raise RequestError(
                f"Two tools are named {function.name!r}.", param=f"tools[{index}].function.name"
            )
        functions[function.name] = function
    return functions


def _read_function(tool: dict[str, Any], param: str) -> Function:
    if tool.get("type") != "function":
        raise RequestError('Only tools of type "function" can be called.', param=f"{param}.type")
    function = _expect(tool.get("function"), dict, f"{param}.function", "an object")
    name = _expect(function.get("name"), str, f"{param}.function.name", "a string")
    if not 0 < len(name) <= _MAX_NAME:
        raise RequestError(
            f"A function's name has 1 to {_MAX_NAME} characters.", param=f"{param}.function.name"
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    _expect(parameters, dict, f"{param}.function.parameters", "a JSON schema, which is an object")
    if not _HAS_A_TYPE & parameters.keys():
        parameters = {"type": "object", **parameters}
    return Function(name, parameters, function.get("strict") is True)


def _read_choice(
    choice: str | dict[str, Any] | None, functions: dict[str, Function]
) -> Literal["auto", "none", "required"] | str:
    """One of the three words, or the name of the one function to call."""
    if choice is None or choice in ("auto", "none"):
        return choice or "auto"
    if isinstance(choice, str) and choice != "required":
        raise RequestError(
            f'tool_choice is {choice[:40]!r}; it must be "auto", "none", "required" or name a function.',
            param="tool_choice",
            code="unsupported_value",
        )
    if not functions:
        raise RequestError("tool_choice asks for a call, but there are no tools.", param="tool_choice")
    if isinstance(choice, str):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("function"), dict):
        raise RequestError(
            'tool_choice must look like {"type": "function", "function": {"name": ...}}.', param="tool_choice"
        )
    name = choice["function"].get("name")
    if name not in functions:
        raise RequestError(
            f"tool_choice names {str(name)[:80]!r}, which is not among the tools.",
            param="tool_choice.function.name",
        )
    return str(name)


def _expect(value: Any, kind: type, param: str, what: str) -> Any:
    if not isinstance(value, kind):
        raise RequestError(f"Expected {what} at {param}.", param=param, code="invalid_type")
    return value
