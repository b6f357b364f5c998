"""Robust selection against best-of-n at equal cost: utility at the ends of the cone and at its centre.

    python bench/robust.py POLICY REWARD_MODEL PROMPTS [--candidates 8] [--within 10 20 30] [--count 100]

Every prompt is asked under the centre and under each direction of the evaluation grid that lies 40 degrees or more off
it. `one` is a single sample, `best` the best of n under the asked direction, `robust D` the best of n of which n - 1
are sampled under directions up to D degrees away; all are picked by the reward model under the asked direction. The
utility v . s is given by the reward model that picked, and by the demo world's true reward. Intervals: 95%, bootstrap
over prompts, of the difference to `best`.

Demo world, development questions, t = 3 of a study (temperature 0.8, seed 0; 40 prompts, 8 candidates, `--within 20`),
true utility:

                 ends                              centre
    one          82.95  -1.48 [-2.23, -0.80]       92.07 -0.95
    best         84.43                             93.02
    robust 20    84.35  -0.08 [-0.32, +0.16]       91.96 -1.06

Where a policy has unlearned an end the neighbours help a lot: docs/findings.md.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from dpa.core.directions import DirectionSpace
from dpa.core.measures import interval
from dpa.core.records import Prompt, Sampler, SampleRequest, Scorer, candidate_id, seed_of
from dpa.models.files import folder_revision, load_space
from dpa.sampling.best_of import BestOfSampler, RobustSampler
from dpa.sampling.samplers import SamplerSpec
from dpa.scoring.function_scorer import FunctionScorer
from dpa.scoring.reward_scorer import RewardModelScorer
from dpa.stages.prompts import read_prompts

ENDS = 40.0
"""Degrees off the centre at which the ends begin."""


def asked_directions(space: DirectionSpace) -> tuple[np.ndarray, np.ndarray]:
    """directions_DK: the centre and the ends; and which of them are ends."""
    grid_DK = space.grid(3)
    away_D = space.angle_to_center(grid_DK)
    return grid_DK[(away_D < 1) | (away_D >= ENDS)], away_D[(away_D < 1) | (away_D >= ENDS)] >= ENDS


def requests_of(prompts: list[Prompt], directions_DK: np.ndarray) -> list[SampleRequest]:
    """One answer to each prompt under each direction, direction by direction."""
    return [
        SampleRequest(prompt.messages, direction, (seed_of(candidate_id(prompt.prompt_id, direction, 0, 0, "bench")),))
        for direction in map(tuple, directions_DK.tolist())
        for prompt in prompts
    ]


def utilities(
    sampler: Sampler, prompts: list[Prompt], directions_DK: np.ndarray, space: DirectionSpace, scorers: list[Scorer]
) -> tuple[list[np.ndarray], np.ndarray]:
    """utility_DP by each scorer, and tokens_DP that each answer cost."""
    requests = requests_of(prompts, directions_DK)
    answers = [samples[0] for samples in sampler.sample(requests)]
    shape = len(directions_DK), len(prompts)
    found = []
    for scorer in scorers:
        scores = scorer.score([request.messages for request in requests], [answer.text for answer in answers])
        truth = isinstance(scorer, FunctionScorer)  # of the objectives themselves
        objectives = scores if truth else space.combine(scores, scorer.attributes)
        found.append(np.einsum("dpk,dk->dp", objectives.reshape(*shape, space.K), directions_DK))
    return found, np.array([answer.tokens for answer in answers]).reshape(shape)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("policy")
    parser.add_argument("reward")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--within", type=float, nargs="+", default=[10.0, 20.0, 30.0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    space = load_space(args.policy)
    plain = SamplerSpec(args.policy, space, 160, temperature=0.7, revision=folder_revision(args.policy)).build()
    reward = RewardModelScorer(args.reward)
    truth = FunctionScorer({name: f"dpa.world.true_reward:{name}" for name in space.names})
    prompts = read_prompts(str(args.prompts), "prompt", 0.0)[0][: args.count]
    directions_DK, end_D = asked_directions(space)
    samplers: dict[str, Sampler] = {"best": BestOfSampler(plain, reward, space, args.candidates), "one": plain}
    for degrees in args.within:
        samplers[f"robust {degrees:g}"] = RobustSampler(plain, reward, space, args.candidates, degrees)
    print(f"{len(prompts)} prompts, {end_D.sum()} ends, {args.candidates} candidates, {args.policy}")
    print("ends:", "; ".join(str(space.direction(row)) for row in directions_DK[end_D]))
    print(f"{'':10s} {'':7s} {'tokens':>7s} {'true':>7s} {'true - best':>22s} {'model':>7s} {'model - best':>22s}")
    draws_RP = np.random.default_rng(0).multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=2000)
    best: list[np.ndarray] = []
    for name, sampler in samplers.items():
        utility_DP, tokens_DP = utilities(sampler, prompts, directions_DK, space, [truth, reward])
        best = best or utility_DP
        for group, chosen_D in (("ends", end_D), ("centre", ~end_D)):
            cells = [f"{tokens_DP[chosen_D].mean():7.0f}"]
            for mine_DP, best_DP in zip(utility_DP, best, strict=True):
                more_P = (mine_DP - best_DP)[chosen_D].mean(axis=0)
                difference = interval(float(more_P.mean()), draws_RP @ more_P / len(prompts))
                cells.append(f"{mine_DP[chosen_D].mean():7.2f}")
                cells.append("{value:+7.2f} [{low:+.2f}, {high:+.2f}]".format(**difference).rjust(22))
            print(f"{name:10s} {group:7s} {' '.join(cells)}", flush=True)
        print(
            f"{'':10s} true, each end:", *(f"{value:7.2f}" for value in utility_DP[0][end_D].mean(axis=1)), flush=True
        )


if __name__ == "__main__":
    main()
