"""What clients of a whole server see under load: latencies, throughput, cache hits, fairness.

Method
    Conversations are drawn from one seed: log-normal lengths as in ShareGPT, system prompts that several
    share, several turns whose prompts contain the earlier answers, pictures that come again, tenants
    (`user`). They are played against the real server over HTTP streams, as a closed loop (--clients) or with
    Poisson arrivals (--rate, conversations per second). Every answer has its drawn length (ignore_eos) and is
    greedy. With --off the same load is played again on servers that each lack one feature, and the answers
    are checked: they must be those of the full server, text for text. --flood N adds a tenant that begins N
    conversations at once, and plays the load without it as well.
Bytes and flops
    None of its own: those of the model, see bench_ops.py. Tokens are what the server's usage counts.
How to read it
    first: from sending a request to its first text. gap: between two chunks of text of one stream, which are
    tokens unless the server was late and joined several. The flooding tenant is left out of both.
    cached: share of prompt tokens found in the prefix cache. reused: share of patches whose features were
    there already; with the prefix cache on, most pictures that come again are not even looked up.
    fairness: Jain's index over the tenants' tokens per second of open requests, 1 is even, without the
    flood. Ratios are "without" over "with": above 1 for times means that a feature helps; 0.5 without the
    flood means that it doubled the others' time. On a busy machine look at counts, and at long runs.
Reference
    tests/bench/results/serving-*.json
Run
    ./run.sh bench serving [--clients 4 | --rate 2] [--conversations 32] [--off prefix-cache,image-cache]
                            [--save]
    ./run.sh bench serving -- --tp 2 --quant wint4      flags behind -- go to the server
    ./run.sh bench serving --address http://host:8000   a server that runs already
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.bench.result_files import save, save_option
from tests.bench.serving_client import Client, Record
from tests.bench.serving_load import FLOOD, Conversation, Shape, Turn, make_load
from tests.e2e.server import Server, running_server

OFF = {
    "prefix-cache": ("--no-enable-prefix-caching",),
    "image-cache": ("--image-cache", "0"),
    "both-caches": ("--no-enable-prefix-caching", "--image-cache", "0"),
    "chunked-prefill": ("--no-enable-chunked-prefill",),
    "overlap": ("--no-overlap",),
    "swap": ("--swap-space", "0"),  # for comparison with what the flags behind -- give
    "pacing": ("--target-itl-ms", "0"),
}
RESULTS = Path(__file__).parent / "results"
RATIOS = ("first_p50", "first_p95", "gap_p50", "gap_p99", "output_tokens_per_second")


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def fairness(records: Sequence[Record]) -> float:
    """Jain's index over what each tenant got per second that it had a request open."""
    tokens: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for record in records:
        tokens[record.tenant] += record.num_prompt_tokens + record.num_output_tokens
        seconds[record.tenant] += record.ended - record.sent
    rates = [tokens[tenant] / seconds[tenant] for tenant in tokens]
    return sum(rates) ** 2 / (len(rates) * sum(rate**2 for rate in rates)) if rates else float("nan")


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Times in milliseconds; `records` of all tenants, latencies of those that do not flood."""
    good = [record for record in records if not record.error]
    calm = [record for record in good if record.tenant != FLOOD]
    firsts = [record.first_token * 1e3 for record in calm if record.arrivals]
    gaps = [gap * 1e3 for record in calm for gap in record.gaps]
    num_output = sum(record.num_output_tokens for record in good)
    num_prompt = sum(record.num_prompt_tokens for record in good)
    seconds = max((record.ended for record in records), default=0.0)
    summary: dict[str, Any] = {
        "requests": len(records),
        "errors": len(records) - len(good),
        "first_error": next((record.error for record in records if record.error), ""),
        "seconds": seconds,
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "output_tokens_per_second": num_output / seconds if seconds else 0.0,
        "cached_share": sum(record.num_cached_tokens for record in good) / max(num_prompt, 1),
        "fairness": fairness(calm),
    }
    for name, values in (("first", firsts), ("gap", gaps)):
        for share in (50, 95, 99):
            summary[f"{name}_p{share}"] = percentile(values, share / 100)
    for phase in ("prepare_ms", "queue_ms", "prefill_ms", "decode_ms"):
        spent = [record.timings[phase] for record in calm if phase in record.timings]
        summary[f"mean_{phase}"] = statistics.fmean(spent) if spent else float("nan")
    return summary


def play(address: str, api_key: str, load: Sequence[Conversation], num_clients: int) -> list[Record]:
    """A short conversation to warm up, then the load."""
    warm_up = [Conversation("warm-up", "warm-up", 0.0, "Be brief.", [Turn("Say hello.", 8)])]
    asyncio.run(Client(address, api_key).play(warm_up, 1))
    return asyncio.run(Client(address, api_key).play(load, num_clients))


def patches(server: Server | None) -> tuple[float, float]:
    """Encoded and reused so far."""
    if server is None:
        return 0.0, 0.0
    return server.metric("octet:encoded_patches_total"), server.metric("octet:cached_patches_total")


@contextlib.contextmanager
def server_for(address: str, flags: Sequence[str]) -> Iterator[tuple[str, Server | None]]:
    if address:
        yield address, None
        return
    with (
        tempfile.TemporaryDirectory(prefix="octet-bench-") as folder,
        running_server(Path(folder), *flags) as server,
    ):
        yield server.address, server


def run(arguments: argparse.Namespace, shape: Shape, flags: Sequence[str]) -> tuple[dict[str, Any], dict]:
    """One play of the load: its summary, and the answers by conversation and turn."""
    load = make_load(shape, arguments.rate, arguments.seed)
    with server_for(arguments.address, flags) as (address, server):
        encoded, reused = patches(server)
        num_clients = 0 if arguments.rate else arguments.clients
        records = play(address, arguments.api_key, load, num_clients)
        encoded, reused = (after - before for after, before in zip(patches(server), (encoded, reused)))  # noqa: B905
    summary = summarize(records)
    summary["reused_share"] = reused / (encoded + reused) if encoded + reused else float("nan")
    answers = {(record.conversation, record.turn): record.text for record in records if not record.error}
    return summary, answers


def compare(base: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    return {name: other[name] / base[name] if base[name] else float("nan") for name in RATIOS}


def show(name: str, summary: dict[str, Any]) -> None:
    print(
        f"\n{name}: {summary['requests']} requests, {summary['errors']} errors, {summary['seconds']:.1f} s, "
        f"{summary['output_tokens_per_second']:.1f} output tokens/s, {summary['prompt_tokens']} prompt tokens"
    )
    if summary["first_error"]:
        print(f"  first error: {summary['first_error']}")
    print("                    p50       p95       p99")
    for kind in ("first", "gap"):
        cells = " ".join(f"{summary[f'{kind}_p{share}']:9.1f}" for share in (50, 95, 99))
        print(f"  {kind + ' ms':11} {cells}")
    print(
        f"  cached {summary['cached_share']:.0%} of prompt tokens, "
        f"reused {percent(summary['reused_share'])} of patches, fairness {summary['fairness']:.3f}"
    )
    means = [
        f"{phase} {summary[f'mean_{phase}_ms']:.0f}" for phase in ("prepare", "queue", "prefill", "decode")
    ]
    print(f"  mean ms: {', '.join(means)}", flush=True)


def percent(share: float) -> str:
    return "an unknown part" if math.isnan(share) else f"{share:.0%}"


def report_ratios(name: str, base: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    ratios = compare(base, other)
    print(f"  ratio without {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    return ratios


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", default="", help="of a running server; otherwise one is started")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--clients", type=int, default=4, help="of the closed loop")
    parser.add_argument("--rate", type=float, default=0.0, help="conversations per second; 0: closed loop")
    parser.add_argument("--off", default="", help=f"comma-separated, of {', '.join(OFF)}")
    parser.add_argument("--seed", type=int, default=0)
    defaults = asdict(Shape())
    for name, kind in (
        ("conversations", int), ("question-words", float), ("answer-tokens", float), ("turns", int),
        ("prefix-words", int), ("picture-share", float), ("tenants", int), ("flood", int),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=defaults[shape_field(name)])
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAGS", help="of the server")
    save_option(parser)
    arguments = parser.parse_args()
    arguments.off = [name for name in arguments.off.split(",") if name]
    if unknown := set(arguments.off) - set(OFF):
        parser.error(f"--off knows {', '.join(OFF)}, not {', '.join(sorted(unknown))}")
    if arguments.address and (arguments.off or arguments.server_flags):
        parser.error("--off and server flags need a server of our own; leave out --address")
    return arguments


def shape_field(option: str) -> str:
    name = option.replace("-", "_")
    return f"num_{name}" if name in ("conversations", "tenants") else name


def main() -> None:
    arguments = parse_arguments()
    options = {name: getattr(arguments, name.removeprefix("num_"), None) for name in asdict(Shape())}
    shape = Shape(**{name: value for name, value in options.items() if value is not None})
    flags = arguments.server_flags
    figures: dict[str, dict[str, Any]] = {}
    base, answers = run(arguments, shape, flags)
    whole = "that server" if arguments.address else "everything on"
    show(whole, base)
    figures[whole] = base
    differing = []
    variants = [(name, shape, [*flags, *OFF[name]]) for name in arguments.off]
    if shape.flood:
        variants.append(("the flood", replace(shape, flood=0), flags))
    for name, its_shape, its_flags in variants:
        summary, its_answers = run(arguments, its_shape, its_flags)
        differing += [(name, *key) for key in its_answers if its_answers[key] != answers.get(key)]
        show(f"without {name}", summary)
        figures[f"without {name}"] = summary | {"ratios": report_ratios(name, base, summary)}
    if arguments.save:
        settings = {"shape": asdict(shape), "flags": flags}
        settings |= {name: getattr(arguments, name) for name in ("rate", "clients", "seed")}
        save("serving", figures, settings)
    if differing:
        raise SystemExit(
            f"{len(differing)} answers differ from those of the full server, first: {differing[0]}"
        )
    if any(summary["errors"] for summary in figures.values()):
        raise SystemExit("some requests failed; see the first error of each run above")


if __name__ == "__main__":
    main()
