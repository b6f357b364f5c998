"""Rollout: ask every prompt under D directions, N samples each, shard by shard, with any number of samplers.
Run its tests: pytest tests/test_rollout.py tests/test_faults_rollout.py
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dpa.core.directions import DirectionSpace
from dpa.core.errors import DpaError, RejectRateError
from dpa.core.records import (
    Ledger,
    Prompt,
    Sample,
    Sampler,
    SampleRequest,
    candidate_id,
    messages_text,
    seed_of,
    stable_hash,
)
from dpa.core.sections.rollout import RolloutConfig
from dpa.core.targets import Held
from dpa.storage.memory import peak_memory
from dpa.storage.progress import ProgressBar
from dpa.storage.run_folder import StageFolder
from dpa.storage.schemas import ASKED, CANDIDATES, with_held
from dpa.storage.stage_records import Reject, count_reasons
from dpa.storage.stopping import StopOnSignal


class ShardResult(NamedTuple):
    """The rows of one shard, what was rejected, and how many tokens were generated."""

    table: pa.Table
    rejects: list[Reject]
    tokens: int


def rollout(
    stage: StageFolder,
    prompts: Sequence[Prompt],
    space: DirectionSpace,
    samplers: Sequence[Sampler],
    config: RolloutConfig,
    seed: int,
    directions_DK: np.ndarray | None = None,
    held_DK: Sequence[Held] | None = None,
) -> Ledger:
    """Sample N responses to each prompt under each of its D directions; return what the stage cost.

    Directions: `directions_DK` for every prompt (measuring; with `held_DK` they are those of targets), or
    `config.directions` drawn for each prompt from the space, with a generator keyed by (seed, stage, prompt) (training;
    step 3 of arXiv 2402.18571). Shards are a fixed partition of `prompts`, seeds derive from candidate ids, so rows
    depend on neither the number of samplers nor interruptions. A prompt is kept whole (D x N rows, direction by
    direction) or rejected with a reason.

    A finished stage is left as it is and calls no sampler. A stage that is shared between processes (StageFolder.share)
    is finished by the last of them; the others return what their own shards cost. All samplers must hold the same
    weights (`revision`).
    Raises RejectRateError above `config.max_reject_rate`, Interrupted on SIGTERM or SIGINT, and what a sampler raises
    on purpose (a DpaError, such as EngineError); any other exception of a sampler costs only the prompts it is about.
    """
    if stage.done:
        return stage.ledger
    revisions = {sampler.revision for sampler in samplers}
    if len(revisions) != 1:
        raise ValueError(f"samplers of one rollout must hold one revision, not {sorted(revisions)}")
    if len({prompt.prompt_id for prompt in prompts}) < len(prompts):
        raise ValueError("prompt ids must be distinct")
    (revision,) = revisions
    size = config.prompts_per_shard
    shards = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    # The batch size changes no result; it stands here as it did in the first versions, whose shards stay good.
    settings = config.model_copy(update={"batch_size": 256}).model_dump_json(
        exclude={"workers", "bf16", "max_reject_rate", "engine"}
    )
    grid = None if directions_DK is None else directions_DK.tolist()
    targets = [] if held_DK is None else [held_DK]
    made_from = [
        stable_hash(revision, seed, space.to_dict(), settings, grid, *targets, *(prompt.prompt_id for prompt in shard))
        for shard in shards
    ]
    missing, own = stage.missing(made_from), [number for number in range(len(shards)) if stage.mine(number)]
    finished = sorted(set(own) - set(missing))
    rejects = [reject for number in finished for reject in stage.shard_rejects(number)]
    asked = sum(len(shards[number]) for number in finished)

    def check_rejects(among: int) -> None:
        if len(rejects) > config.max_reject_rate * among:
            raise RejectRateError(
                f"{stage.name}: {len(rejects)} of {among} prompts were rejected, more than max_reject_rate "
                f"{config.max_reject_rate:.0%} ({count_reasons(rejects)}); mend the prompts or raise "
                "rollout.max_reject_rate."
            )

    def sample_shard(sampler: Sampler, number: int) -> ShardResult:
        return _sample_prompts(sampler, shards[number], directions_of, config.samples, seed, held_DK)

    def directions_of(prompt: Prompt) -> np.ndarray:
        if directions_DK is not None:
            return directions_DK
        return _drawn(stage, prompt, space, config, seed)

    to_ask = sum(len(shards[number]) for number in own)  # a share is held to its own: others are asked elsewhere
    check_rejects(to_ask)
    started = time.monotonic()
    with (
        StopOnSignal() as stop,
        ProgressBar(stage.name, to_ask, "prompts", "tokens", done=asked) as progress,
    ):
        for number, result in stop.work_through(missing, samplers, sample_shard):
            now = time.monotonic()
            ledger = Ledger(
                tokens_generated=result.tokens,
                rows=result.table.num_rows,
                rejects=len(result.rejects),
                wall_s=now - started,
                peak_memory=peak_memory(),
            )
            started = now  # a shard is charged the time since the shard before it, so the sum is the clock's time
            rejects += result.rejects
            check_rejects(to_ask)  # before it is kept: what a broken server rejected is asked anew once that is mended
            stage.write_shard(number, result.table, ledger, result.rejects, made_from[number])
            finished.append(number)
            progress.advance(len(shards[number]), result.tokens)
        whole = len(finished) == len(own) and stage.may_finish(made_from)
        if whole:
            rejects = [reject for number in range(len(shards)) for reject in stage.shard_rejects(number)]
            check_rejects(len(prompts))
            stage.finish(shards=len(shards))
        if stop.requested:
            raise stop.interrupted(stage.name, len(finished), len(own), "shards")
    return stage.ledger if whole else stage.ledger_of(own)


def ask(
    stage: StageFolder, prompts: Sequence[Prompt], space: DirectionSpace, config: RolloutConfig, seed: int
) -> Ledger:
    """Write the prompts and directions that `rollout` would sample (columns ASKED), for a learner that samples."""
    made_from = stable_hash(seed, space.to_dict(), config.directions, *(prompt.prompt_id for prompt in prompts))
    for number in stage.missing([made_from]):
        rows = [
            {"prompt_id": prompt.prompt_id, "messages": messages_text(prompt.messages), "direction": v}
            for prompt in prompts
            for v in _drawn(stage, prompt, space, config, seed).tolist()
        ]
        stage.write_shard(number, pa.Table.from_pylist(rows, ASKED), Ledger(rows=len(rows)), made_from=made_from)
    if not stage.done and stage.may_finish([made_from]):
        stage.finish(shards=1)
    return stage.ledger if stage.done else Ledger()  # another share finishes it


def _drawn(stage: StageFolder, prompt: Prompt, space: DirectionSpace, config: RolloutConfig, seed: int) -> np.ndarray:
    """directions_DK of a prompt."""
    key = stable_hash("directions", seed, stage.name, prompt.prompt_id)
    return space.sample(config.directions, np.random.default_rng(int(key, 16)))


def _sample_prompts(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    directions_of: Callable[[Prompt], np.ndarray],
    samples: int,
    seed: int,
    held_DK: Sequence[Held] | None,
) -> ShardResult:
    """Sample one shard; a prompt any of whose requests cannot be served is rejected whole."""
    requests: list[SampleRequest] = []
    ids: list[list[str]] = []
    for prompt in prompts:
        directions_DK = directions_of(prompt).tolist()
        values_DK: Sequence[Held | None] = held_DK or [None] * len(directions_DK)
        for direction_K, held_K in zip(directions_DK, values_DK, strict=True):
            direction, held = tuple(direction_K), None if held_K is None else tuple(held_K)
            named = [(prompt.prompt_id, direction, k, seed, sampler.revision, held) for k in range(samples)]
            ids.append([candidate_id(*parts) for parts in named])
            requests.append(SampleRequest(prompt.messages, direction, tuple(map(seed_of, ids[-1])), held))
    answers = _answers(sampler, requests)
    rows: list[dict] = []
    rejects: list[Reject] = []
    per_prompt = len(requests) // len(prompts)
    for place, prompt in enumerate(prompts):
        own = range(place * per_prompt, (place + 1) * per_prompt)
        reasons = [answer for answer in (answers[i] for i in own) if isinstance(answer, str)]
        if reasons:
            rejects.append(Reject(prompt.prompt_id, reasons[0]))
            continue
        for i in own:
            for k, sample in enumerate(answers[i]):
                assert isinstance(sample, Sample)
                rows.append(
                    {
                        "candidate_id": ids[i][k],
                        "prompt_id": prompt.prompt_id,
                        "direction": requests[i].direction,
                        "k": k,
                        "seed": requests[i].seeds[k],
                        "response": sample.text,
                        "tokens": sample.tokens,
                        "finish_reason": sample.finish_reason,
                        "held": requests[i].held,
                    }
                )
    tokens = sum(sample.tokens for answer in answers if not isinstance(answer, str) for sample in answer)
    schema = CANDIDATES if held_DK is None else with_held(CANDIDATES)
    return ShardResult(pa.Table.from_pylist(rows, schema), rejects, tokens)


def _answers(sampler: Sampler, requests: Sequence[SampleRequest]) -> list[list[Sample] | str]:
    """For each request its samples, or the reason why there are none.

    When a batch raises, its halves are tried apart, down to the single requests that are to blame; a request alone is
    tried twice, and then its neighbours are served and it is not.
    """
    answers = _attempt(sampler, requests)
    if isinstance(answers, str) and len(requests) > 1:
        half = len(requests) // 2
        return _answers(sampler, requests[:half]) + _answers(sampler, requests[half:])
    checked: list[list[Sample] | str] = []
    for i, request in enumerate(requests):
        answer = answers if isinstance(answers, str) else _checked(request, answers[i])
        if isinstance(answer, str):
            again = _attempt(sampler, [request])
            answer = again if isinstance(again, str) else _checked(request, again[0])
        checked.append(answer)
    return checked


def _attempt(sampler: Sampler, requests: Sequence[SampleRequest]) -> list[list[Sample]] | str:
    """The sampler's answers, one list for each request, or what went wrong with the call as a whole."""
    try:
        answers = sampler.sample(requests)
    except DpaError:
        raise
    except Exception as error:
        return f"the sampler raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if len(answers) != len(requests):
        return f"the sampler answered {len(answers)} of {len(requests)} requests"
    return answers


def _checked(request: SampleRequest, answer: list[Sample]) -> list[Sample] | str:
    """The samples of one request when they are all there and are text; else the reason."""
    if not answer:
        return "no answer (longer than the policy's context, or refused by the sampler)"
    if len(answer) != len(request.seeds):
        return f"{len(answer)} of {len(request.seeds)} samples came back"
    try:
        for sample in answer:
            sample.text.encode("utf-8")
    except UnicodeEncodeError:
        return "a response is not valid Unicode"
    return answer
