"""From a command line and the environment to a ServerConfig, or one sentence that says what is wrong.

The table of flags is flag_table.py, what their values may be is flag_values.py. What depends on the
model (context, divisible widths) is settled later, in settle.py.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.flag_table import GROUPS, IGNORED, Flag, Ignored, Switch
from engine.flag_values import did_you_mean

_DESCRIPTION = (
    "Serve an ERNIE-4.5 model behind an OpenAI-compatible API. Sizes take K, M, G (powers of 1024)."
)
_V1_SCHEDULER = "ENABLE_V1_KVCACHE_SCHEDULER"


@dataclass(frozen=True)
class CommandLine:
    """What the operator typed. `notes` are log lines about flags without effect."""

    config: ServerConfig
    print_config: bool = False
    notes: list[str] = field(default_factory=list)


def parse_command_line(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> CommandLine:
    """Raises ConfigError with one sentence; `--help` prints and raises SystemExit(0)."""
    parser = _make_parser()
    given, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(_about_unknown(unknown[0], parser))
    settings = vars(given)
    print_config = settings.pop("print_config")
    notes = [_about_ignored(one) for one in IGNORED if settings.pop(_key(one.name), None) is not None]
    if _V1_SCHEDULER in environment:
        notes.append(f"{_V1_SCHEDULER} has no effect: blocks are always given on demand, with preemption")
    keys = settings.pop("api_keys", None) or _keys_from(environment)
    config = ServerConfig(api_keys=tuple(keys), **settings)
    _check(config)
    return CommandLine(config, print_config, notes)


def check_ports_are_free(config: ServerConfig) -> None:
    """Raise ConfigError naming the port that something else already listens on."""
    for flag, port in (("--port", config.port), ("--metrics-port", config.metrics_port)):
        try:
            found = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except socket.gaierror as error:
            raise ConfigError(
                f"--host {config.host} is not an address of this machine: {error.strerror}"
            ) from None
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise ConfigError(
                    f"{flag} {port} cannot be used on {config.host}: {error.strerror}; choose another one"
                ) from None


def describe_config(config: ServerConfig) -> str:
    """The effective settings as JSON, keys hidden."""
    settings = msgspec.to_builtins(config) | {
        name: getattr(config, name) for name in config.__struct_fields__
    }
    settings["api_keys"] = ["***"] * len(config.api_keys)
    return msgspec.json.format(msgspec.json.encode(settings), indent=2).decode()


class _Parser(argparse.ArgumentParser):
    """Errors are raised as sentences instead of printed with a usage."""

    def error(self, message: str) -> NoReturn:
        flag, _, what = message.removeprefix("argument ").partition(": ")
        flag = flag.split("/")[0]
        raise ConfigError(
            f"{flag} needs a value" if what.startswith("expected one argument") else f"{flag}: {what}"
        )


def _make_parser() -> _Parser:
    parser = _Parser(
        prog="octet",
        usage="octet [--model NAME] [--tp N] [--quant wint4|wint4-all|wint8|bfloat16] [flags]",
        description=_DESCRIPTION,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for flag in flags:
            _add_flag(group, flag)
    other = parser.add_argument_group("other")
    other.add_argument(
        "--print-config", action="store_true", default=False, help="print the effective settings and exit"
    )
    for ignored in IGNORED:
        _add_ignored(parser, ignored)
    return parser


def _add_flag(group: argparse._ArgumentGroup, flag: Flag | Switch) -> None:
    default = _default_text(flag)
    if isinstance(flag, Switch):
        action = argparse.BooleanOptionalAction
        group.add_argument(
            *flag.names, dest=flag.field, action=action, help=f"{flag.help} (default: {default})"
        )
        return
    group.add_argument(
        *flag.names,
        dest=flag.field,
        type=_explaining(flag),
        action="append" if flag.repeat else "store",
        metavar=flag.metavar,
        help=f"{flag.help} (default: {default})".replace("%", "%%"),
    )


def _explaining(flag: Flag) -> Any:
    """The flag's parser with the offending text put into its message."""

    def parse(value: str) -> Any:
        try:
            return flag.parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{value!r}: {error}") from None

    return parse


def _add_ignored(parser: _Parser, ignored: Ignored) -> None:
    if ignored.takes_value:
        parser.add_argument(ignored.name, help=argparse.SUPPRESS)
    else:
        action = argparse.BooleanOptionalAction
        parser.add_argument(ignored.name, action=action, help=argparse.SUPPRESS)


def _default_text(flag: Flag | Switch) -> str:
    if isinstance(flag, Flag) and flag.default_text:
        return flag.default_text
    default = getattr(ServerConfig(), flag.field)
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(flag, Flag) and flag.metavar == "SIZE":
        return f"{default >> 20}MiB"
    if isinstance(default, dict):
        return msgspec.json.encode(default).decode()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _check(config: ServerConfig) -> None:
    """What only two flags together can get wrong."""
    if config.port == config.metrics_port:
        raise ConfigError(f"--port and --metrics-port are both {config.port}; they have to differ")


def _keys_from(environment: Mapping[str, str]) -> list[str]:
    listed = environment.get("OCTET_API_KEY") or environment.get("FD_API_KEY") or ""
    return [key.strip() for key in listed.split(",") if key.strip()]


def _about_unknown(argument: str, parser: _Parser) -> str:
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        return f"{argument!r} is not a flag and no flag takes it as its value; see --help"
    known = [option for option in parser._option_string_actions if option.startswith("--")]
    return f"there is no flag {name}{did_you_mean(name, known) or '; see --help'}"


def _about_ignored(ignored: Ignored) -> str:
    return f"{ignored.name} has no effect: {ignored.why}"


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_")
