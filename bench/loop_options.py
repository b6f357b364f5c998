"""One iteration of a finished demo run made again, an option apart: same start policy, same candidates, same questions.

    python bench/loop_options.py RUN [--iteration 3] [--variants base,dpo,ends,replay,standardise] [--seeds 0,1]

Cheaper than whole runs, and paired: the candidates are the run's own, so only selection and training differ. A variant
serves DIRECTIONS directions for each of PROMPTS prompts, dpo half as many (a pair reads two responses), all drawn anew.
The policies are measured on the run's questions by the true reward, on a small grid; `start` is the policy before.
Results stay in OUT/VARIANT-SEED.json, and what is there is not made again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from dpa.core.config import EvaluateConfig, FinetuneConfig, PreferenceConfig
from dpa.core.directions import DirectionSpace
from dpa.core.records import SampleRequest, candidate_id, seed_of
from dpa.core.selection import select, select_pairs, spread
from dpa.models.files import load_space
from dpa.models.finetuning import finetune
from dpa.models.preference_training import preference_finetune
from dpa.models.samplers import SamplerSpec
from dpa.models.scorers import FunctionScorer, RewardModelScorer
from dpa.stages.evaluate import evaluate
from dpa.stages.finetune import with_replay
from dpa.stages.prompts import prompts_from_table
from dpa.storage.run_folder import StageFolder

PROMPTS, DIRECTIONS, QUESTIONS = 200, 8, 50
SFT = FinetuneConfig(learning_rate=4e-3, optimizer="muon", max_length=256, packed_rows_per_step=4, save_steps=50)
DPO = PreferenceConfig(
    learning_rate=1e-3, optimizer="muon", max_length=256, pairs_per_step=16, pairs_per_device=16, save_steps=25
)
VARIANTS = ("start", "base", "dpo", "dpo-random", "dpo-sft", "ends", "narrow", "wider", "replay", "standardise")


def table_of(path: Path) -> pa.Table:
    """All rows of a finished stage."""
    return pa.concat_tables(list(StageFolder(path).tables()))


def selected(run: Path, t: int, variant: str, space: DirectionSpace, seed: int) -> pa.Table:
    """Winners, or pairs where the variant is one of dpo."""
    drawn = {
        "ends": replace(space, training_ends=0.5),
        "narrow": replace(space, training_angle=space.max_angle),
        "wider": replace(space, training_angle=space.max_angle + 25),
    }.get(variant, space)
    candidates, scores = table_of(run / f"iter_{t}/rollout"), table_of(run / f"iter_{t}/score")
    names = [name for name in scores.column_names if name not in ("candidate_id", "prompt_id", "valid")]
    scores_RK = space.combine(np.array([scores[name].to_numpy() for name in names]).T, names)
    rows_of: dict[str, list[int]] = {}
    for row, prompt_id in enumerate(candidates["prompt_id"].to_pylist()):
        rows_of.setdefault(prompt_id, []).append(row)
    order = sorted(rows_of)
    asked = [order[place] for place in np.random.default_rng(seed).permutation(len(order))[:PROMPTS]]
    row_PN = np.array([rows_of[prompt_id] for prompt_id in asked])
    scores_PNK = scores_RK[row_PN] / (spread(scores_RK) if variant == "standardise" else 1.0)
    rngs = [np.random.default_rng([seed, p]) for p in range(len(asked))]
    pairs = variant.startswith("dpo")
    directions_PDK = np.array([drawn.sample(DIRECTIONS // 2 if pairs else DIRECTIONS, rng) for rng in rngs])
    valid_PN = np.isfinite(scores_PNK).all(axis=2)
    if pairs:
        how = "random" if variant == "dpo-random" else "worst"
        winners_PD, losers_PD = select_pairs(scores_PNK, directions_PDK, valid_PN, how, rngs)
    else:
        winners_PD = losers_PD = select(scores_PNK, directions_PDK, valid_PN)
    texts = {row["prompt_id"]: row["messages"] for row in table_of(run / "prompts").to_pylist()}
    responses = candidates["response"].to_pylist()
    return pa.Table.from_pylist(
        [
            {
                "prompt_id": asked[p],
                "messages": texts[asked[p]],
                "direction": directions_PDK[p, d].tolist(),
                "candidate_id": f"{p}-{d}",
                "response": responses[row_PN[p, winners_PD[p, d]]],
                "chosen": responses[row_PN[p, winners_PD[p, d]]],
                "rejected": responses[row_PN[p, losers_PD[p, d]]],
            }
            for p, d in np.ndindex(winners_PD.shape)
            if winners_PD[p, d] >= 0
        ]
    )


def trained(run: Path, t: int, variant: str, space: DirectionSpace, seed: int, out: Path) -> tuple[Path, int]:
    """The policy of a variant, and the tokens it was trained on."""
    start, policy, work = run / f"iter_{t - 1}/policy", out / f"{variant}-{seed}", out / f"work-{variant}-{seed}"
    if variant == "start":
        return start, 0
    rows = selected(run, t, variant, space, seed)
    if variant.startswith("dpo"):
        config = DPO.model_copy(update={"sft_weight": 0.2 if variant == "dpo-sft" else 0.0})
        return policy, preference_finetune(start, rows, space, policy, work, config, seed).training_tokens
    if variant == "replay":
        columns = ["prompt_id", "messages", "direction", "candidate_id", "response"]
        earlier = [table_of(run / f"iter_{before}/select").select(columns) for before in range(t)]
        rows = with_replay(rows.select(columns), earlier, 0.5, seed)
    return policy, finetune(start, rows, space, policy, work, SFT, seed).training_tokens


def measured(run: Path, policy: Path, space: DirectionSpace, seed: int) -> dict:
    """The record of stages.evaluate on the run's own questions."""
    config = EvaluateConfig(prompts={"path": "unused"}, directions=5, resamples=300)
    questions = prompts_from_table(table_of(run / "eval_prompts"))[:QUESTIONS]
    asked = [(question, tuple(direction)) for question in questions for direction in space.grid(5).tolist()]
    requests = [
        SampleRequest(
            question.messages, direction, (seed_of(candidate_id(question.prompt_id, direction, 0, seed, "")),)
        )
        for question, direction in asked
    ]
    sampler = SamplerSpec(str(policy), space, 160, temperature=0.7).build()
    answers = [samples[0] for samples in sampler.sample(requests)]
    ids = pa.array([str(place) for place in range(len(asked))])
    rollout = pa.table(
        {
            "candidate_id": ids,
            "prompt_id": [question.prompt_id for question, _ in asked],
            "direction": [list(direction) for _, direction in asked],
            "response": [answer.text for answer in answers],
            "tokens": [answer.tokens for answer in answers],
        }
    )
    gold = FunctionScorer({name: f"dpa.world.true_reward:{name}" for name in space.names})
    tables = {}
    for name, scorer in (("model", RewardModelScorer(run / "reward_model")), ("gold", gold)):
        scores_NM = scorer.score([request.messages for request in requests], [answer.text for answer in answers])
        columns = dict(zip(scorer.attributes, scores_NM.T, strict=True))
        tables[name] = pa.table({"candidate_id": ids, **columns, "valid": np.isfinite(scores_NM).all(axis=1)})
    return evaluate(rollout, tables, space, config, seed=0)


def main() -> None:
    """Print a row for each variant and seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--iteration", type=int, default=3)
    parser.add_argument("--variants", default="start,base,dpo,ends,narrow,replay,standardise", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--out", type=Path, default=Path("runs/loop_options"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    space = load_space(args.run / f"iter_{args.iteration - 1}/policy")
    for seed in map(int, args.seeds.split(",")):
        for variant in args.variants.split(","):
            file = args.out / f"{variant}-{seed}.json"
            if not file.exists():
                policy, tokens = trained(args.run, args.iteration, variant, space, seed, args.out)
                found = measured(args.run, policy, space, seed) | {"training_tokens": tokens}
                file.write_text(json.dumps(found))
            print(_row(variant, seed, json.loads(file.read_text())), flush=True)


def _row(variant: str, seed: int, found: dict) -> str:
    gold, model = (found["measures"][name] for name in ("gold", "model"))
    utility = "{value:.2f} [{low:.2f}, {high:.2f}]".format(**gold["expected_utility"])
    coverage = " ".join(f"{name} {value['value']:.2f}" for name, value in gold["end_coverage"].items())
    words = [direction["words"]["value"] for direction in found["directions"]]
    return (
        f"{variant:12s} seed {seed}  true utility {utility}  model {model['expected_utility']['value']:.2f}  "
        f"hypervolume {gold['hypervolume']['value']:,.0f}  coverage {coverage}  "
        f"words {min(words):.1f} to {max(words):.1f}  "
        f"regret {gold['projection_regret']['value']:.2f}  trained on {found['training_tokens']:,} tokens"
    )


if __name__ == "__main__":
    main()
