"""Every message that crosses a process border, in the order a request meets them.

All are frozen msgspec structs, sent as MessagePack (channels.py has the sockets). New fields go last with
a default, so that two versions can talk. Nothing here computes; positions and token types are
derived by the workers (workers/positions.py) from token ids and media.

    api     -> engine   AddRequest, AbortRequest, Ping, RequestObserved
    engine  -> api      TokenBatch, Pong, EngineState
    engine  -> workers  StartServing, StepPlan, StopServing
    workers -> engine   RankHello, RankLoaded, RankReady, StepResult (rank 0), RankFailed
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Guide(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an answer must match, token by token; the api has checked that it compiles."""

    grammar: str  # Lark as llguidance reads it, see engine/grammar.py
    after: str = ""  # it begins behind the first such text that is generated, "</think>"; "": at once


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to choose the next token of one sequence; validated by the api, trusted by the rest."""

    max_tokens: int  # generated tokens at most; the api has clipped it to the context
    min_tokens: int = 0  # end tokens are masked before this many
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 means no limit
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    seed: int = 0  # with the token's index it is the counter of the noise; the api draws one if absent
    stop_token_ids: tuple[int, ...] = ()  # besides the model's end tokens
    ignore_eos: bool = False  # the model's end tokens do not stop, stop_token_ids still do
    num_logprobs: int = -1  # -1 none, 0 the chosen token's, n also the n most likely
    guide: Guide | None = None  # with one, end tokens come when it accepts, whatever min_tokens says


class MediaItem(msgspec.Struct, frozen=True, omit_defaults=True):
    """One image or video of a prompt: uint8 patches in a file that every rank maps (design D8)."""

    kind: Literal["image", "video"]
    content_hash: str  # sha256 hex over pixels, shape and options
    grid: tuple[int, int, int]  # frames, patch rows, patch columns
    offset: int  # index of its first placeholder in the prompt
    num_tokens: int  # placeholders: rows * columns / 4 per image, per frame pair of a video
    file: str  # name inside RunDirectory.media; [frames*rows*columns, 3*14*14] uint8


# api -> engine ------------------------------------------------------------------------------------


class AddRequest(msgspec.Struct, frozen=True, tag="add", omit_defaults=True):
    """Start generating. The engine owns the media files from here on and deletes them at the end."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    media: list[MediaItem] = []
    arrival: float = 0.0  # time.monotonic() when the HTTP request came in
    priority: int = 0  # smaller runs earlier
    tenant: str = ""
    cache_salt: str = ""  # the prefix cache is shared only among requests with the same one
    timeout: float = 0.0  # seconds after arrival when it ends, finished or not; 0: never


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """The client left, or a stop string was found: free everything within one step."""

    request_id: str


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Asks for a round trip through every rank; answered by Pong."""

    ping_id: int


class RequestObserved(msgspec.Struct, frozen=True, tag="observed", omit_defaults=True):
    """What the api saw of one finished HTTP request, for the metrics the engine owns."""

    route: str  # the route's pattern, never the raw path: label values stay bounded
    status: int
    seconds: float
    error_type: str = ""
    num_images: int = 0
    num_videos: int = 0
    media_seconds: float = 0.0  # fetch, decode and resize
    stream_seconds: float = 0.0  # until the client of a stream took the text; 0.0: not streamed


ToEngine = AddRequest | AbortRequest | Ping | RequestObserved


# engine -> api ------------------------------------------------------------------------------------


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural log-probabilities of one generated token, before penalties and temperature."""

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Timings(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where the time of a finished request went, in seconds. Fetching and decoding media comes before."""

    queue_seconds: float = 0.0  # arrival to first scheduled
    prefill_seconds: float = 0.0  # first scheduled to first token; encoding is part of it
    decode_seconds: float = 0.0  # first token to last; waiting after a preemption is part of one or the other
    encode_seconds: float = 0.0  # in the vision tower, in steps that encoded media of this request
    preempted_seconds: float = 0.0  # without blocks, between preemption and return


class RequestOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """The new tokens of one request; the last one has a finish_reason."""

    request_id: str
    token_ids: list[int] = []  # an end token that stopped the sequence is not among them
    logprobs: list[TokenLogprobs] = []  # one per token id, if asked for
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_token_id: int | None = None  # which end token stopped it
    error: str | None = None  # with finish_reason "error": a sentence for the client
    error_status: int = 500  # 429 when the queue is full, 503 when a worker died, 504 after its timeout
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache; in the first output
    queue_seconds: float = 0.0  # arrival to first scheduled, in the first output
    timings: Timings | None = None  # in the last output of a request that got a token


class TokenBatch(msgspec.Struct, frozen=True, tag="tokens", omit_defaults=True):
    """All outputs of one step for one api process; a gap in `sequence` means a lost message.

    Nearly all of a busy step are one further token of a request, and nothing else to say: those are columns,
    and come before `outputs`.
    """

    sequence: int
    outputs: list[RequestOutput] = []
    decoded: list[str] = []  # request ids
    token_ids: list[int] = []  # the new token of each


class Pong(msgspec.Struct, frozen=True, tag="pong", omit_defaults=True):
    ping_id: int
    healthy: bool
    detail: str = ""  # which rank is missing


class EngineState(msgspec.Struct, frozen=True, tag="state", omit_defaults=True):
    """Sent when an api subscribes and at every change. `starting` has progress in `detail`."""

    state: Literal["starting", "ready", "failed", "stopping"]
    detail: str = ""
    sequence: int = 0  # of the next TokenBatch
    num_blocks: int = 0
    block_size: int = 0


ToApi = TokenBatch | Pong | EngineState


# engine -> workers --------------------------------------------------------------------------------


class StartServing(msgspec.Struct, frozen=True, tag="start", omit_defaults=True):
    """Allocate this many KV blocks, the same on every rank, then answer RankReady."""

    num_blocks: int
    num_host_blocks: int = 0  # places in host memory for blocks that had to leave


class NewSequence(msgspec.Struct, frozen=True, omit_defaults=True):
    """A sequence the ranks do not know yet, or know no more (after preemption or a restart)."""

    seq_id: int
    token_ids: list[int]  # the prompt, then what was already generated
    num_prompt_tokens: int
    sampling: SamplingParams
    media: list[MediaItem] = []
    num_computed_tokens: int = 0  # KV already in the blocks given with its first chunk


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Compute the next `num_tokens` tokens of a sequence."""

    seq_id: int
    num_tokens: int
    new_block_ids: list[int]  # appended to its block table before computing; cached ones first
    samples: bool  # the chunk ends at the sequence's last token: sample the next one


class StepPlan(msgspec.Struct, frozen=True, tag="plan", omit_defaults=True):
    """One step, as changes to the ranks' mirror: drop, add, copy blocks, give new blocks, then compute.

    Nearly all of a busy step are decodes: sequences that compute their last token and sample the next. They
    are columns, as is what the ranks answer, so a step costs the engine little however many they are. They
    come first in the batch, then `chunks` in order.
    All blocks go out to host memory before any comes in, and all copies are made before the step computes:
    a block may go out and be overwritten in one step. Why no other order is needed is in engine/swap_tier.py.
    A plan without work is a health probe: ranks meet at a barrier and rank 0 answers.
    """

    step: int
    chunks: list[Chunk] = []
    added: list[NewSequence] = []
    dropped: list[int] = []  # finished, aborted or preempted
    swap_out: list[tuple[int, int]] = []  # KV block, place in host memory
    swap_in: list[tuple[int, int]] = []  # place in host memory, KV block
    decoding: bytes = b""  # int64 [n]: seq_ids
    new_blocks: bytes = b""  # int64 [m, 2]: a seq_id of `decoding`, a block id for the end of its table

    @property
    def has_work(self) -> bool:
        return bool(self.decoding or self.chunks)


class StopServing(msgspec.Struct, frozen=True, tag="stop"):
    """Leave cleanly."""


ToWorker = StartServing | StepPlan | StopServing


# workers -> engine --------------------------------------------------------------------------------


class RankHello(msgspec.Struct, frozen=True, tag="hello"):
    rank: int
    pid: int


class RankLoaded(msgspec.Struct, frozen=True, tag="loaded", omit_defaults=True):
    """Weights are in place; how many KV blocks this rank could hold."""

    rank: int
    max_blocks: int
    weight_bytes: int
    load_seconds: float
    device: str
    max_host_blocks: int = 0  # that --swap-space has room for


class RankReady(msgspec.Struct, frozen=True, tag="ready"):
    rank: int


class StepResult(msgspec.Struct, frozen=True, tag="result", omit_defaults=True):
    """Sampled tokens in the order of the plan: `decoding`, then those of `chunks` that sample."""

    step: int
    token_ids: bytes = b""  # int32 [n]
    logprobs: dict[int, TokenLogprobs] = {}  # by index in `token_ids`, where asked for
    compute_seconds: float = 0.0
    encode_seconds: float = 0.0
    num_encoded_patches: int = 0
    num_cached_patches: int = 0  # of media whose features were there already
    num_swapped_blocks: int = 0  # copied, out and in
    swap_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) // 4


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    rank: int
    step: int
    message: str
    traceback: str


FromWorker = RankHello | RankLoaded | RankReady | StepResult | RankFailed
