"""From request fields to SamplingParams: ranges, defaults, and what this server does not do.

Everything wrong here is a RequestError that names its field. What the text-level options mean while tokens
arrive (stop strings, log-probabilities) is in answer.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from api.schema import ChatRequest, CompletionRequest, GenerationRequest
from engine.errors import RequestError
from engine.messages import Guide, SamplingParams
from engine.model_config import read_json_object

MAX_CHOICES = 128  # sequences of one request: n times the number of prompts
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 16_384  # of all stop strings together: bounds the automaton to about 2 MB
MAX_STOP_TOKENS = 1024
MAX_PRIORITY = 1000
MAX_TIMEOUT = 604_800.0  # a week
MAX_NAME_CHARACTERS = 512  # of `user` and `cache_salt`
COMPLETION_MAX_TOKENS = 16  # OpenAI's default for text completions; chat fills the context
GREEDY_TEMPERATURE = 1e-5  # below it dividing logits by the temperature only loses precision
_INT64 = 1 << 63


@dataclass(frozen=True)
class Defaults:
    """What a request gets when it does not say: the checkpoint's generation config, else OpenAI's values."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def read_defaults(model_folder: Path) -> Defaults:
    """Defaults of generation_config.json in `model_folder`; `do_sample: false` means greedy."""
    file = model_folder / "generation_config.json"
    stated = read_json_object(file) if file.is_file() else {}
    known = {field: stated[field] for field in Defaults.__dataclass_fields__ if _is_number(stated.get(field))}
    if stated.get("do_sample") is False:
        known["temperature"] = 0.0
    return Defaults(**known)


def read_sampling(request: GenerationRequest, defaults: Defaults, vocab_size: int) -> SamplingParams:
    """Validated parameters; `max_tokens` is as asked, 0 where the context is the only bound."""
    temperature = _number(request, "temperature", 0.0, 2.0, defaults.temperature)
    top_p = _number(request, "top_p", 0.0, 1.0, defaults.top_p)
    if temperature < GREEDY_TEMPERATURE or top_p == 0.0:
        temperature, top_p = 0.0, 1.0
    max_tokens = _read_max_tokens(request)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_read_min_tokens(request, max_tokens),
        temperature=temperature,
        top_p=top_p,
        top_k=_read_top_k(request, defaults.top_k, vocab_size),
        min_p=_number(request, "min_p", 0.0, 1.0, defaults.min_p),
        repetition_penalty=_number(request, "repetition_penalty", 0.01, 10.0, defaults.repetition_penalty),
        presence_penalty=_number(request, "presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=_number(request, "frequency_penalty", -2.0, 2.0, 0.0),
        seed=_read_seed(request),
        stop_token_ids=_read_stop_token_ids(request, vocab_size),
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=_read_num_logprobs(request),
    )


def fit_to_context(
    sampling: SamplingParams, num_prompt_tokens: int, max_model_len: int, param: str
) -> SamplingParams:
    """Clip `max_tokens` to what the prompt leaves; RequestError when it leaves nothing."""
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise RequestError(
            f"The prompt has {num_prompt_tokens} tokens, but the context of this server holds "
            f"{max_model_len} for prompt and answer together. Shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )
    max_tokens = min(sampling.max_tokens or room, room)
    return msgspec.structs.replace(
        sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens)
    )


def with_seed_of_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The same parameters with the seed of the `choice`-th sequence of a request."""
    return msgspec.structs.replace(sampling, seed=(sampling.seed + choice) % _INT64)


def with_guide(sampling: SamplingParams, guide: Guide | None) -> SamplingParams:
    """The same parameters for answers that are held to a grammar."""
    return msgspec.structs.replace(sampling, guide=guide)


@dataclass(frozen=True)
class Scheduling:
    """What the engine needs to know of a request besides its tokens."""

    priority: int = 0  # smaller runs earlier
    timeout: float = 0.0  # seconds after arrival; 0: none
    tenant: str = ""  # who shares fairly with others
    cache_salt: str = ""  # nothing computed is shared with requests of another one


def read_scheduling(request: GenerationRequest, api_key: str) -> Scheduling:
    """`api_key` is the one that let the request in, "" without keys; with one, nobody chooses the tenant."""
    user = _name(request, "user")
    return Scheduling(
        priority=_integer(request, "priority", -MAX_PRIORITY, MAX_PRIORITY, 0),
        timeout=_number(request, "timeout", 1e-3, MAX_TIMEOUT, 0.0),
        tenant=api_key or user,
        cache_salt=_name(request, "cache_salt"),
    )


def read_num_choices(request: GenerationRequest, num_prompts: int = 1) -> int:
    """`n`, so that all prompts together stay under MAX_CHOICES sequences."""
    n = _integer(request, "n", 1, MAX_CHOICES, 1)
    if n * num_prompts > MAX_CHOICES:
        raise RequestError(
            f"n = {n} for {num_prompts} prompts makes {n * num_prompts} sequences; one request may have "
            f"{MAX_CHOICES}. Send several requests.",
            param="n",
        )
    return n


def read_stop_strings(request: GenerationRequest) -> list[str]:
    """The stop strings, without duplicates; bounded in number and total length."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if "" in stops:
        raise RequestError("A stop string must not be empty.", param="stop")
    if len(stops) > MAX_STOP_STRINGS:
        raise RequestError(f"At most {MAX_STOP_STRINGS} stop strings, got {len(stops)}.", param="stop")
    if sum(map(len, stops)) > MAX_STOP_CHARACTERS:
        raise RequestError(f"Stop strings must have at most {MAX_STOP_CHARACTERS} characters.", param="stop")
    return list(dict.fromkeys(stops))


def read_thinking(request: ChatRequest) -> bool | None:
    """Whether to think, from any spelling in use; None when the request does not say."""
    kwargs, metadata = request.chat_template_kwargs or {}, request.metadata or {}
    said: dict[str, Any] = {
        "enable_thinking": request.enable_thinking,
        "chat_template_kwargs.enable_thinking": kwargs.get("enable_thinking"),
        "metadata.enable_thinking": metadata.get("enable_thinking"),
        "reasoning_effort": None if request.reasoning_effort is None else request.reasoning_effort != "none",
    }
    said = {param: value for param, value in said.items() if value is not None}
    for param, value in said.items():
        if not isinstance(value, bool):
            raise RequestError(f"Expected true or false at {param}.", param=param, code="invalid_type")
    if len(set(said.values())) > 1:
        params = " and ".join(said)
        raise RequestError(f"{params} contradict each other. Keep one.", param=next(iter(said)))
    return next(iter(said.values()), None)


def check_supported(request: GenerationRequest) -> None:
    """Refuse, by name, what would change the answer and is not implemented."""
    if request.logit_bias:
        raise _unsupported("logit_bias", "logit_bias is not supported; leave it out")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options need stream: true.", param="stream_options")
    if isinstance(request, ChatRequest):
        _check_chat_supported(request)
    if isinstance(request, CompletionRequest):
        _check_completion_supported(request)


def _check_chat_supported(request: ChatRequest) -> None:
    if request.chat_template is not None:
        raise _unsupported("chat_template", "templates are the operator's choice (--chat-template)")
    if any(modality != "text" for modality in request.modalities or []):
        raise _unsupported("modalities", "this model answers in text only")


def _check_completion_supported(request: CompletionRequest) -> None:
    if request.suffix:
        raise _unsupported("suffix", "this model cannot fill in before a suffix")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise _unsupported("best_of", "best_of must equal n; ask for n choices and pick one")
    if request.echo and request.logprobs is not None:
        raise _unsupported("echo", "log-probabilities of the prompt are not computed; drop echo or logprobs")


def _read_max_tokens(request: GenerationRequest) -> int:
    name = "max_tokens"
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        name = "max_completion_tokens"
    default = COMPLETION_MAX_TOKENS if isinstance(request, CompletionRequest) else 0
    value = getattr(request, name)
    return default if value is None else _integer(request, name, 1, _INT64 - 1, 0)


def _read_min_tokens(request: GenerationRequest, max_tokens: int) -> int:
    param, value = "min_tokens", request.min_tokens
    if value is None and request.metadata and "min_tokens" in request.metadata:
        param, value = "metadata.min_tokens", request.metadata["min_tokens"]
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestError(f"Expected an integer at {param}.", param=param, code="invalid_type")
    if value < 0 or (max_tokens and value > max_tokens):
        raise _out_of_range(param, value, f"between 0 and max_tokens ({max_tokens or 'the context'})")
    return min(value, _INT64 - 1)


def _read_top_k(request: GenerationRequest, default: int, vocab_size: int) -> int:
    """0 and -1 both mean no limit, as in other servers; so does more than there are tokens."""
    top_k = _integer(request, "top_k", -1, _INT64 - 1, default)
    return top_k if 0 < top_k < vocab_size else 0


def _read_seed(request: GenerationRequest) -> int:
    """A seed in [0, 2**63), drawn when the request has none."""
    if request.seed is None:
        return int.from_bytes(os.urandom(8), "little") % _INT64
    return _integer(request, "seed", -_INT64, _INT64 - 1, 0) % _INT64


def _read_stop_token_ids(request: GenerationRequest, vocab_size: int) -> tuple[int, ...]:
    ids = request.stop_token_ids or []
    if len(ids) > MAX_STOP_TOKENS:
        raise RequestError(f"At most {MAX_STOP_TOKENS} stop tokens, got {len(ids)}.", param="stop_token_ids")
    check_token_ids(ids, vocab_size, "stop_token_ids")
    return tuple(dict.fromkeys(ids))


def check_token_ids(ids: list[int], vocab_size: int, param: str) -> None:
    """RequestError with the index of the first id outside the vocabulary."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    index = next(i for i, token in enumerate(ids) if not 0 <= token < vocab_size)
    raise _out_of_range(f"{param}[{index}]", ids[index], f"a token id between 0 and {vocab_size - 1}")


def _read_num_logprobs(request: GenerationRequest) -> int:
    """-1 for none, 0 for the chosen token's alone, k for the k most likely too."""
    if isinstance(request, CompletionRequest):
        return -1 if request.logprobs is None else _integer(request, "logprobs", 0, MAX_LOGPROBS, 0)
    top = _integer(request, "top_logprobs", 0, MAX_LOGPROBS, 0)
    asked = isinstance(request, ChatRequest) and request.logprobs
    if top and not asked:
        raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    return top if asked else -1


def _number(request: GenerationRequest, name: str, low: float, high: float, default: float) -> float:
    value = getattr(request, name)
    if value is None:
        return default
    if not low <= value <= high:
        raise _out_of_range(name, value, f"between {low:g} and {high:g}")
    return float(value)


def _integer(request: GenerationRequest, name: str, low: int, high: int, default: int) -> int:
    value = getattr(request, name)
    if value is None:
        return int(default)
    if not low <= value <= high:
        raise _out_of_range(name, value, f"at least {low}" if high == _INT64 - 1 else f"in [{low}, {high}]")
    return int(value)


def _name(request: GenerationRequest, name: str) -> str:
    value: str = getattr(request, name) or ""
    if len(value) > MAX_NAME_CHARACTERS:
        raise RequestError(
            f"{name} has {len(value)} characters; at most {MAX_NAME_CHARACTERS} are possible.",
            param=name,
            code="out_of_range",
        )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _out_of_range(param: str, value: object, expected: str) -> RequestError:
    shown = str(value) if len(str(value)) <= 40 else f"{str(value)[:40]}..."
    return RequestError(f"{param} is {shown}; it must be {expected}.", param=param, code="out_of_range")


def _unsupported(param: str, reason: str) -> RequestError:
    return RequestError(f"{param}: {reason}.", param=param, code="unsupported_value")
