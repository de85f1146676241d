"""The chat template: a conversation in, one prompt string out.

The template is the operator's: from --chat-template, else the checkpoint, else one of templates/. Requests
only give values to it, never source. It runs in Jinja's immutable sandbox; its output and
its time are bounded between the pieces it writes.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import ConfigError, RequestError

_BUILT_IN = Path(__file__).parent / "templates"
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "raise_exception", "tojson"}
)
_MAX_SECONDS = 5.0


class TemplateRefusal(Exception):
    """The template itself called raise_exception: the conversation does not fit it."""


class ChatTemplate:
    """One compiled template; `origin` says where it came from."""

    def __init__(self, source: str, origin: str, special_tokens: dict[str, str] | None = None) -> None:
        self.origin = origin
        self._special_tokens = special_tokens or {}  # bos_token and the like, which templates may write
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"The chat template {origin} is not valid Jinja: {error}.") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: dict[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        max_characters: int = 1 << 24,
    ) -> str:
        """Raises RequestError if the template refuses, writes more than allowed or takes too long."""
        variables = {
            **self._special_tokens,
            **check_template_kwargs(kwargs),
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._run(variables, max_characters)
        except TemplateRefusal as refusal:
            raise RequestError(
                f"The chat template refused the messages: {refusal}", param="messages"
            ) from None
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
            # The text of such an error shows the template's inside, which is not the client's business.
            raise RequestError(
                "The chat template cannot render these messages; check roles, content and template kwargs.",
                param="messages",
            ) from None

    def _run(self, variables: dict[str, Any], max_characters: int) -> str:
        deadline = time.monotonic() + _MAX_SECONDS
        pieces, size = [], 0
        for piece in self._template.generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > max_characters:
                raise RequestError(
                    f"The rendered prompt exceeds {max_characters} characters; shorten the conversation.",
                    param="messages",
                    code="context_length_exceeded",
                )
            if time.monotonic() > deadline:
                raise RequestError(
                    f"Rendering the prompt took more than {_MAX_SECONDS:.0f} s; shorten the conversation.",
                    param="messages",
                )
        return "".join(pieces)


def load_template(chat_template: str, folder: str | Path, family: str) -> ChatTemplate:
    """The first of: `chat_template` (a file), the checkpoint's own, the built-in one of `family`."""
    folder = Path(folder)
    special_tokens = _special_tokens(folder)
    if chat_template:
        path = Path(chat_template)
        if not path.is_file():
            raise ConfigError(f"--chat-template {chat_template} is not a file.")
        return ChatTemplate(path.read_text(encoding="utf-8"), str(path), special_tokens)
    own = _checkpoint_template(folder)
    if own is not None:
        return ChatTemplate(*own, special_tokens)
    name = "ernie_vl.jinja" if family == "vl" else "ernie_text.jinja"
    return ChatTemplate((_BUILT_IN / name).read_text(encoding="utf-8"), f"built-in {name}", special_tokens)


def check_template_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Refuses names that the server sets itself."""
    for name in kwargs or {}:
        if name in _RESERVED or name.startswith("_"):
            raise RequestError(
                f"chat_template_kwargs may not set {name!r}; it is set by the server.",
                param=f"chat_template_kwargs.{name}",
            )
    return dict(kwargs or {})


def _checkpoint_template(folder: Path) -> tuple[str, str] | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8"), str(path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        source = _default_of(_read_json(folder / name).get("chat_template"))
        if source is not None:
            return source, str(folder / name)
    return None


def _default_of(value: Any) -> str | None:
    """A template, or the one named "default" in a list of {"name", "template"}."""
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _special_tokens(folder: Path) -> dict[str, str]:
    named = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    tokens = {key: value for key, value in named.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in tokens.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Download the file again.") from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = time.strftime
    environment.filters["tojson"] = _to_json
    return environment


def _raise_exception(message: str) -> None:
    raise TemplateRefusal(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
