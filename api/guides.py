"""From what a request asks of its answer's form to the grammar that holds the answer to it.

`response_format` and the reference server's `guided_*` fields give the form of the answer, `tool_choice`
makes a call sure, `strict` tools make arguments sure. All become one grammar, checked here so that mistakes
are a 400 that names the field; rank 0 follows it (workers/guides.py).
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from api.reasoning import END_OF_THINKING
from api.schema import GenerationRequest
from api.tokenizer import Tokenizer
from api.tool_calls import CLOSE, OPEN
from api.tools import NO_TOOLS, ToolUse
from engine.errors import RequestError
from engine.grammar import HEADER, grammar_error, open_tokens
from engine.messages import Guide

MAX_CHARACTERS = 256 << 10  # of a grammar
MAX_CHOICES = 1024
# A blank, or a new line and its indentation: more would let an answer go on for ever without saying anything.
_BLANKS = r"(\x20|\x0A[\x20\x09]{0,40})"
_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag")


@dataclass(frozen=True)
class Form:
    """What the answer must look like: a rule named `answer`, or a grammar of the client's own."""

    param: str  # the field that asked for it
    rule: str = ""
    grammar: str = ""


def read_form(request: GenerationRequest) -> Form | None:
    """The one form that the request asks for; None if the answer is free."""
    asked = [name for name in _FIELDS if getattr(request, name) is not None]
    response_format = request.response_format
    if response_format is not None and response_format.get("type") != "text":
        asked.insert(0, "response_format")
    if not asked:
        return None
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} exclude each other. Keep one.", param=asked[1])
    if request.ignore_eos:
        raise RequestError(
            f"ignore_eos and {asked[0]} contradict each other: an answer of a given form ends with it.",
            param="ignore_eos",
        )
    return _READERS[asked[0]](request)


def make_grammar(form: Form | None, tools: ToolUse, tag: Callable[[str], str]) -> str:
    """The grammar of the whole answer, "" if anything may come.

    `tag` writes a tag of the answer as a grammar names it, since it may be one token or plain text.
    """
    must_hold = tools.must_call or any(function.is_strict for function in tools.offered.values())
    if form is None and not must_hold:
        return ""
    if form is not None and form.grammar:
        if tools.is_on:
            raise RequestError("guided_grammar and tools exclude each other.", param=form.param)
        return HEADER + form.grammar
    rules = [] if form is None or tools.must_call else [form.rule]
    if not tools.is_on:
        rules.append("start: answer")
    elif tools.must_call:
        rules.append("start: calls")
    elif form is not None:
        rules.append("start: calls | answer")
    else:
        rules += ["start: free calls?", r"free: /(.|\n)*/"]
    return HEADER + "\n".join([*rules, *_call_rules(tools, tag)]) + "\n"


def _call_rules(tools: ToolUse, tag: Callable[[str], str]) -> list[str]:
    """Calls as the model writes them, one line between two."""
    if not tools.is_on:
        return []
    functions = list(tools.offered.values())
    rules = [
        "calls: call" if tools.only_one else r'calls: call ("\n" call)*',
        "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
    ]
    for i, function in enumerate(functions):
        name = json.dumps(function.name, ensure_ascii=False)
        head, tail = _literal(f'\n{{"name": {name}, "arguments": '), _literal("}\n")
        rules.append(f"call_{i}: {tag(OPEN)} {head} arguments_{i} {tail} {tag(CLOSE)}")
        rules.append(_json_rule(f"arguments_{i}", function.parameters))
    return rules


class GuideMaker:
    """Checks grammars against the served model's tokens."""

    def __init__(self, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> None:
        self.vocabulary = tokenizer.vocabulary(end_ids)
        self._tokenizer = tokenizer

    async def make(
        self, form: Form | None, tools: ToolUse = NO_TOOLS, *, thinking_open: bool = False
    ) -> Guide | None:
        """The guide of one request's choices; RequestError if its grammar cannot be followed."""
        grammar = make_grammar(form, tools, self._tag)
        if not grammar:
            return None
        param = "tools" if form is None or tools.must_call else form.param
        if len(grammar) > MAX_CHARACTERS:
            raise RequestError(
                f"The grammar has {len(grammar)} characters; at most {MAX_CHARACTERS} are possible.",
                param=param,
            )
        error = await asyncio.to_thread(self._error, grammar)
        if error:
            raise RequestError(
                f"The answer cannot be held to this: {error}.", param=param, code="invalid_grammar"
            )
        return Guide(grammar, END_OF_THINKING if thinking_open else "")

    def _tag(self, name: str) -> str:
        token_id = self._tokenizer.token_id(name)
        return _literal(name) if token_id is None else f"<[{token_id}]>"

    def _error(self, grammar: str) -> str:
        return grammar_error(self._tokens, grammar)

    @functools.cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        return open_tokens(self.vocabulary)


# the fields ---------------------------------------------------------------------------------------


def _read_response_format(request: GenerationRequest) -> Form:
    asked = request.response_format or {}
    kind = asked.get("type")
    if kind == "json_object":
        return Form("response_format", _json_rule("answer", {"type": "object"}))
    if kind != "json_schema":
        raise RequestError(
            f"response_format: the type {str(kind)[:40]!r} is not supported; use text, json_object or "
            "json_schema.",
            param="response_format",
            code="unsupported_value",
        )
    described = asked.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        param = "response_format.json_schema" + (".schema" if isinstance(described, dict) else "")
        raise RequestError(f"Expected an object at {param}.", param=param, code="invalid_type")
    return Form("response_format.json_schema.schema", _json_rule("answer", schema))


def _read_json(request: GenerationRequest) -> Form:
    schema: Any = request.guided_json
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"guided_json is not valid JSON: {error}.", param="guided_json") from None
    if not isinstance(schema, dict):
        raise RequestError("guided_json must be a JSON schema.", param="guided_json", code="invalid_type")
    return Form("guided_json", _json_rule("answer", schema))


def _read_regex(request: GenerationRequest) -> Form:
    regex = llguidance.regex_to_lark(request.guided_regex or "")
    return Form("guided_regex", f"answer: /{regex}/" if regex else 'answer: ""')


def _read_choice(request: GenerationRequest) -> Form:
    choices = request.guided_choice or []
    if not 0 < len(choices) <= MAX_CHOICES:
        raise RequestError(f"guided_choice must have 1 to {MAX_CHOICES} texts.", param="guided_choice")
    return Form("guided_choice", "answer: " + " | ".join(_literal(choice) for choice in choices))


def _read_grammar(request: GenerationRequest) -> Form:
    try:
        grammar = any_to_lark(request.guided_grammar or "")
    except Exception as error:  # the library raises whatever its parser meets
        raise RequestError(f"guided_grammar cannot be read: {error}.", param="guided_grammar") from None
    return Form("guided_grammar", grammar=grammar)


def _read_structural_tag(request: GenerationRequest) -> Form:
    raise RequestError(
        "structural_tag: structural tags are not supported; use strict tools or guided_grammar.",
        param="structural_tag",
        code="unsupported_value",
    )


_READERS: dict[str, Callable[[GenerationRequest], Form]] = {
    "response_format": _read_response_format,
    "guided_json": _read_json,
    "guided_regex": _read_regex,
    "guided_choice": _read_choice,
    "guided_grammar": _read_grammar,
    "structural_tag": _read_structural_tag,
}


def _json_rule(name: str, schema: dict[str, Any]) -> str:
    own = schema.get("x-guidance")
    options = {"whitespace_pattern": _BLANKS, **(own if isinstance(own, dict) else {})}
    try:
        return f"{name}: %json {json.dumps({**schema, 'x-guidance': options})}"
    except RecursionError:
        raise RequestError("The JSON schema is nested too deeply.", code="invalid_grammar") from None


def _literal(text: str) -> str:
    """As a string of a grammar."""
    return json.dumps(text, ensure_ascii=False)
