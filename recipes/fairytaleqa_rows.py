"""Rated rows, prompts and development questions for recipes/fairytaleqa*.yaml, made from the experts' answers.
Run its tests: pytest tests/test_fairytaleqa.py

    python recipes/fairytaleqa_rows.py --policy models/smollm2-135m-instruct --out runs/fairytaleqa-data

Of the 228 stories 24 are kept for development and never trained on (`development.jsonl`). From the others come
`prompts.jsonl` and, for `--questions` of them (0: all), `experts.jsonl` (all that the experts answered) and
`rated.jsonl`: for every question its pool of true answers

    word       the longest word of an expert's answer that the section has too
    clause     the clause of the section that holds most of an expert's answer
    sentence   the sentence it stands in
    passage    that sentence with those after (or before) it, at least PASSAGE_WORDS together
    expert     what the experts answered, for a share of the questions (`--experts`). With all of them one answer wins
               under most directions; what is in between the policy finds by itself at t >= 1 (docs/fairytaleqa.md)
    quoted     an expert's answer, then the sentence (where there is `expert`)
    start      `--samples` answers of the start policy itself, which is told no direction, for a share of the questions
               (`--sampled`)

each marked by fairytaleqa_reward.py. The validation file is not read.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fairytaleqa_reward as reward

from dpa.core.directions import DirectionSpace, Objective
from dpa.core.records import Sampler, SampleRequest, seed_of, stable_hash
from dpa.sampling.samplers import SamplerSpec

DEVELOPMENT_STORIES = 24
PASSAGE_WORDS = 50
MAX_NEW_TOKENS = 64

Row = dict[str, Any]


def main() -> None:
    """Write the four files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(reward.FOLDER), help="folder of train.jsonl")
    parser.add_argument("--policy", required=True, help="the start policy, which answers too")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=0, help="how many are rated; 0: all")
    parser.add_argument("--experts", type=float, default=1.0, help="share of the questions with experts' answers")
    parser.add_argument("--samples", type=int, default=1, help="answers of the start policy to each")
    parser.add_argument("--sampled", type=float, default=1.0, help="share of the questions that it answers")
    parser.add_argument("--batch", type=int, default=256, help="answers sampled together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with (args.data / "train.jsonl").open(encoding="utf-8") as lines:  # no splitlines, as in fairytaleqa_reward.py
        rows = list(map(json.loads, lines))
    training, development = split(rows)
    asked = draw(training, args.questions, args.seed)
    answered: dict[str, list[str]] = {}
    sampled = [row for row in asked if chance("sampled", row) < args.sampled]
    if args.samples and sampled:
        space = DirectionSpace(tuple(Objective(name, {name: 1.0}) for name in ("helpfulness", "verbosity")))
        spec = SamplerSpec(args.policy, space, max_new_tokens=MAX_NEW_TOKENS, batch_size=args.batch, bf16="auto")
        own = start_answers(spec.build(), sampled, args.samples, args.seed)
        answered = {row["id"]: texts for row, texts in zip(sampled, own, strict=True)}
    args.out.mkdir(parents=True, exist_ok=True)
    pools = (row for question in asked for row in rated(question, answered.get(question["id"], []), args.experts))
    counts = {
        "rated.jsonl": write(args.out / "rated.jsonl", pools),
        "experts.jsonl": write(
            args.out / "experts.jsonl",
            (marked(question, answer, "expert") for question in asked for answer in expert_answers(question)),
        ),
        "prompts.jsonl": write(args.out / "prompts.jsonl", map(prompt, training)),
        "development.jsonl": write(args.out / "development.jsonl", map(prompt, development)),
    }
    print(", ".join(f"{count} rows in {args.out / name}" for name, count in counts.items()))


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Questions to train on, and those of the stories kept for development; which stories depends on their names."""
    stories = sorted({row["story"] for row in rows}, key=lambda story: stable_hash("development", story))
    kept = set(stories[:DEVELOPMENT_STORIES])
    return [row for row in rows if row["story"] not in kept], [row for row in rows if row["story"] in kept]


def draw(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` rows (0: all) in the order of the file."""
    if not 0 < count < len(rows):
        return list(rows)
    return [rows[place] for place in sorted(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())]


def chance(what: str, row: Row) -> float:
    """A number in [0, 1) that a question always has."""
    return seed_of(stable_hash(what, row["id"])) % 1000 / 1000


def start_answers(sampler: Sampler, rows: Sequence[Row], samples: int, seed: int) -> list[list[str]]:
    """What the start policy answers to each question, told no direction. Empty ones and those that hold a NUL, which
    `dpa` does not read, are left out."""
    requests = [
        SampleRequest(
            messages=[{"role": "user", "content": row["prompt"]}],
            direction=None,
            seeds=tuple(seed_of(stable_hash(seed, row["id"], k)) for k in range(samples)),
        )
        for row in rows
    ]
    texts = ([one.text.strip() for one in found] for found in sampler.sample(requests))
    return [[text for text in found if text and "\0" not in text] for found in texts]


def rated(row: Row, own: Sequence[str], experts: float) -> Iterator[Row]:
    """The pool of a question, each response once, marked by the two functions."""
    true = true_answers(row, with_experts=chance("experts", row) < experts)
    seen = set()
    for source, response in [*true, *(("start", text) for text in own)]:
        if response in seen:
            continue
        seen.add(response)
        yield marked(row, response, source)


def marked(row: Row, response: str, source: str) -> Row:
    """A rated row."""
    return {
        "prompt": row["prompt"],
        "response": response,
        "helpfulness": reward.share_held(row["answers"], response),
        "verbosity": reward.verbosity([{"role": "user", "content": row["prompt"]}], response),
        "source": source,
    }


def expert_answers(row: Row) -> list[str]:
    """What the experts answered, each answer once."""
    return [answer.strip() for answer in dict.fromkeys(row["answers"])]


def true_answers(row: Row, with_experts: bool) -> Iterator[tuple[str, str]]:
    """(source, response) of what the experts answered and of what the section says about it."""
    experts = expert_answers(row)
    if with_experts:
        yield from (("expert", answer) for answer in experts)
    sentences = sentences_of(section(row["prompt"]))
    place = best_of(sentences, row["answers"])
    clause = clauses_of(sentences[place])[best_of(clauses_of(sentences[place]), row["answers"])]
    words = [word for word in reward.content_words(clause) if reward.share_held(row["answers"], word) > 0]
    if not words:
        return  # nothing in the section holds any of it: there is nothing to quote
    yield "word", max(words, key=len)
    yield "clause", clause
    yield "sentence", sentences[place]
    yield "passage", passage(sentences, place)
    if with_experts:
        longest = max(experts, key=lambda answer: len(answer.split()))
        yield "quoted", f"{longest[0].upper()}{longest[1:].rstrip('.')}. {sentences[place]}"


def best_of(texts: Sequence[str], experts: list[str]) -> int:
    """Place of the text that holds most of an expert's answer; of equal ones the shortest."""
    return max(range(len(texts)), key=lambda place: (reward.share_held(experts, texts[place]), -len(texts[place])))


def section(prompt_text: str) -> str:
    """The part of the story in a prompt."""
    return prompt_text.split("\n\n", 1)[1].rsplit("\n\nQuestion:", 1)[0]


def sentences_of(text: str) -> list[str]:
    """Sentences, a closing quotation mark kept with its own; at least one."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"'])\s+", text) if part.strip()] or [text]


def clauses_of(sentence: str) -> list[str]:
    """Parts of a sentence, cut after commas and before conjunctions."""
    joints = r"(?<=[,;:])\s+|\s+(?=(?:and|but|that|who|which|because|when|so|to)\b)"
    return [part.strip() for part in re.split(joints, sentence) if part.strip()] or [sentence]


def passage(sentences: Sequence[str], place: int) -> str:
    """The sentence at `place`, with those after it, then before it, until it has PASSAGE_WORDS words."""
    first, last = place, place + 1
    while sum(len(sentence.split()) for sentence in sentences[first:last]) < PASSAGE_WORDS:
        if last < len(sentences):
            last += 1
        elif first > 0:
            first -= 1
        else:
            break
    return " ".join(sentences[first:last])


def prompt(row: Row) -> Row:
    """A question as `dpa` reads prompts."""
    return {"id": row["id"], "prompt": row["prompt"]}


def write(file: Path, rows: Iterable[Row]) -> int:
    """Write JSON lines; returns how many."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


if __name__ == "__main__":
    main()
