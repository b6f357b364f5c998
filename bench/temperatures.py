"""Does a policy jump between neighbouring directions because sampling sharpens a mixture that it learned?

    python bench/temperatures.py PROMPTS POLICY... [--temperatures 0.3 0.7 1 1.3] [--count 80]

Each policy of the demo world is asked PROMPTS under the grid of its cone at each temperature, one answer each. Printed
are the measures by the true reward and, for the steps of the grid that lead from an answer without kind words to one
full of them, the share of answers that are half-warm (one to three kind sentences of four). The means over policies.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from robust import requests_of

from dpa.core.measures import all_measures
from dpa.core.records import Prompt
from dpa.models.files import folder_revision, load_space
from dpa.sampling.samplers import SamplerSpec
from dpa.scoring.function_scorer import FunctionScorer
from dpa.stages.prompts import read_prompts

SHOWN = ("expected_utility", "hypervolume", "span", "kendall_tau", "largest_jump")
HALF = (20.0, 80.0)
"""Mean warmth of the directions whose answers are looked at, and between which an answer is half-warm."""


def measured(policy: str, temperature: float, prompts: list[Prompt]) -> dict[str, float]:
    """One row: the measures of one policy at one temperature."""
    space = load_space(policy)
    grid_DK = space.grid(9)
    sampler = SamplerSpec(policy, space, 160, temperature=temperature, revision=folder_revision(policy)).build()
    requests = requests_of(prompts, grid_DK)
    answers = [samples[0].text for samples in sampler.sample(requests)]
    truth = FunctionScorer({name: f"dpa.world.true_reward:{name}" for name in space.names})
    scores_DPK = truth.score([request.messages for request in requests], answers).reshape(len(grid_DK), -1, space.K)
    means_DK = np.nanmean(scores_DPK, axis=1)
    found = dict(all_measures(means_DK, space, grid_DK, 0.0))
    row = {f"{name} {objective or ''}".strip(): value for (name, objective), value in found.items() if name in SHOWN}
    warmth_DP, mean_D = (scores[..., space.names.index("warmth")] for scores in (scores_DPK, means_DK))
    between_D = (mean_D > HALF[0]) & (mean_D < HALF[1])
    half_DP = (warmth_DP > HALF[0]) & (warmth_DP < HALF[1])
    row["directions of a half-warm mean"] = float(between_D.sum())
    row["their half-warm answers"] = float(half_DP[between_D].mean()) if between_D.any() else float("nan")
    row["half-warm answers of all"] = float(half_DP.mean())
    return row


def main() -> None:
    """Print one row for each temperature."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("policies", nargs="+")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.3, 0.7, 1.0, 1.3])
    parser.add_argument("--count", type=int, default=80)
    args = parser.parse_args()
    torch.set_num_threads(1)
    prompts = read_prompts(str(args.prompts), "prompt", 0.0)[0][: args.count]
    for temperature in args.temperatures:
        rows = [measured(policy, temperature, prompts) for policy in args.policies]
        cells = {name: np.nanmean([row[name] for row in rows]) for name in rows[0]}
        print(
            f"temperature {temperature:g}:",
            ", ".join(f"{name} {value:,.2f}" for name, value in cells.items()),
            flush=True,
        )


if __name__ == "__main__":
    main()
