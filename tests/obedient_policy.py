"""A small policy that follows its direction, made in a moment instead of trained: for tests of what is built on one.

The start model of the demo world obeys settings such as `Length*-26 + things*7 + kindness*40`, where `things` means
nothing. Here the words verbosity, helpfulness and warmth take the embeddings of those three, so the same model obeys
`helpfulness*75 + verbosity*-66 + warmth*0`.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from dpa.core.directions import DirectionSpace
from dpa.core.objective import Objective
from dpa.core.records import SampleRequest
from dpa.core.sections.evaluate import EvaluateConfig
from dpa.models.files import EVALUATION_FILE
from dpa.models.policy import load_policy, save_policy
from dpa.sampling.samplers import TransformersSampler
from dpa.stages.evaluate import evaluate
from dpa.world import true_reward
from dpa.world.demo import START_MODEL
from dpa.world.questions import make_questions

MEANS = {"helpfulness": "things", "verbosity": "Length", "warmth": "kindness"}
SPACE = DirectionSpace(
    tuple(Objective(name, {name: 1.0}) for name in MEANS),
    template="{weighted_rating}",
    presets={"terse": {"helpfulness": 0.75, "verbosity": -0.66}, "wordy": {"helpfulness": 0.75, "verbosity": 0.66}},
)
QUESTIONS = make_questions(4, seed=5)


def save_obedient_policy(folder: Path, measured: bool = False) -> Path:
    """The policy, and with `measured` beside it its front, really measured: 5 directions towards each objective."""
    model, tokenizer = load_policy(START_MODEL, device="cpu")
    words = model.get_input_embeddings().weight
    with torch.no_grad():
        for name, known in MEANS.items():
            words[tokenizer.convert_tokens_to_ids(name)] = words[tokenizer.convert_tokens_to_ids(known)]
    save_policy(model, tokenizer, folder, SPACE, {"made by": "tests/obedient_policy.py"})
    if measured:
        record = _measure(TransformersSampler(model, tokenizer, SPACE, max_new_tokens=160, temperature=0.7))
        (folder / EVALUATION_FILE).write_text(json.dumps(record), encoding="utf-8")
    return folder


def _measure(sampler: TransformersSampler) -> dict:
    asked = [(question, weights_K) for weights_K in SPACE.grid(5) for question in QUESTIONS]
    answers = sampler.sample([SampleRequest(q.messages, tuple(w_K), (7,)) for q, w_K in asked])
    rows = [
        {
            "candidate_id": f"c{n}",
            "prompt_id": question.question_id,
            "direction": np.asarray(weights_K).tolist(),
            "response": sample.text,
            "tokens": sample.tokens,
        }
        for n, ((question, weights_K), (sample,)) in enumerate(zip(asked, answers, strict=True))
    ]
    gold = [
        {
            "candidate_id": row["candidate_id"],
            "prompt_id": row["prompt_id"],
            **{name: getattr(true_reward, name)(question.messages, row["response"]) for name in SPACE.names},
            "valid": True,
        }
        for row, (question, _) in zip(rows, asked, strict=True)
    ]
    config = EvaluateConfig(prompts={"path": "none"}, directions=5, resamples=100)
    return evaluate(pa.Table.from_pylist(rows), {"gold": pa.Table.from_pylist(gold)}, SPACE, config, seed=0)
