"""Chooses the samples of the demo model's end-to-end tests; run it whenever the model has changed.

    python -m tests.e2e.choose_demo_samples [--candidates 12]

Of each skill's candidates it takes the one that is answered right in every setup and whose closest decision
has the widest margin, so that another processor's rounding does not matter. A skill without any is listed
under not_yet, with the share of right answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from models.demo_training.sample import Sample
from models.demo_training.skills import SKILLS
from tests.e2e.demo import DEMO, SAMPLES, SETUPS, ask_all, draw, is_answered, margin, model_digest
from tests.e2e.server import running_server


def choose(num_candidates: int) -> dict[str, object]:
    drawn = {(skill, index): draw(skill, index) for skill in SKILLS for index in range(num_candidates)}
    drawn = {pair: sample for pair, sample in drawn.items() if is_telling(pair[0], sample)}
    narrowest = dict.fromkeys(drawn, float("inf"))  # of those that were right so far
    most = dict.fromkeys(SKILLS, 0)
    for setup in SETUPS:
        pairs = list(narrowest)
        with (
            tempfile.TemporaryDirectory() as folder,
            running_server(Path(folder), "--model", str(DEMO), *setup.flags) as server,
        ):
            choices = ask_all(server.address, [drawn[pair] for pair in pairs])
        for pair, choice in zip(pairs, choices, strict=True):
            if is_answered(drawn[pair], choice):
                narrowest[pair] = min(narrowest[pair], margin(choice))
            else:
                del narrowest[pair]
        if setup is SETUPS[0]:
            most = {skill: sum(right == skill for right, _ in narrowest) for skill in SKILLS}
        print(f"{setup.name}: {len(narrowest)} of {len(drawn)} right so far", flush=True)
    right = {}
    for skill in SKILLS:
        of_skill = {index: gap for (name, index), gap in narrowest.items() if name == skill}
        if of_skill:
            right[skill] = max(of_skill, key=lambda index: of_skill[index])
    not_yet = {
        skill: f"{most[skill]} of {num_candidates} right in {SETUPS[0].name}, none in every setup"
        for skill in SKILLS
        if skill not in right
    }
    return {"model": model_digest(), "right": right, "not_yet": not_yet}


def is_telling(skill: str, sample: Sample) -> bool:
    """Whether the tests of the skill can use it: those of tools want a call."""
    return skill != "tools" or "<tool_call>" in sample.answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Choose the samples of the demo model's end-to-end tests.")
    parser.add_argument("--candidates", type=int, default=12, help="per skill")
    chosen = choose(parser.parse_args().candidates)
    SAMPLES.write_text(json.dumps(chosen, indent=1) + "\n")
    print(SAMPLES.read_text())


if __name__ == "__main__":
    main()
