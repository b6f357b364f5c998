"""Sampling: in process against `generate`, and vLLM in process against bare vLLM on the same requests.

What a part costs on one card with SmolLM2-135M: `decoding` three sizes of at most 128 steps, ours twice (4 to 23 ms a
step on an H200) and `generate` once (21 to 110 ms, by the processor), about 50 s. `vllm` a start of a minute or two,
then seven rollouts of at most a quarter of a million tokens, about 10 s each, and the exchange of weights.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from card_phases.common import Card, need_vllm, on_device, parameters_of, timed
from dpa.core.records import Sampler, SampleRequest
from dpa.core.sections.rollout import RolloutConfig
from dpa.models.policy import encode_prompt, end_token_ids, load_policy, save_policy
from dpa.sampling.engine import SamplingEngine
from dpa.sampling.engines import build_samplers, engine_of
from dpa.sampling.samplers import TransformersSampler

SAMPLES = 4


def requests_of(card: Card, rows: int) -> list[SampleRequest]:
    """`rows` answers asked for, SAMPLES to each prompt under one direction."""
    directions = card.space().grid(5)
    return [
        SampleRequest(
            prompt.messages, tuple(directions[place % 5]), tuple(range(place * SAMPLES, (place + 1) * SAMPLES))
        )
        for place, prompt in enumerate(card.asked(rows // SAMPLES))
    ]


def decoding(card: Card) -> None:
    """Tokens/s at 64, 256 and 1,024 rows at once; the share is of the copy rate: weights and cache read each step."""
    dtype = on_device()[1]
    model, tokenizer = load_policy(card.steerable(), dtype=dtype)
    longest = 6 if card.tiny else 128
    for rows in (4, 8) if card.tiny else (64, 256, 1024):
        sampler = TransformersSampler(model, tokenizer, card.space(), longest, batch_size=rows)
        requests = requests_of(card, rows)
        few = requests_of(card, SAMPLES)
        sampler.sample(few if card.tiny else requests)  # on a card, graphs of this shape are recorded once
        ours = timed(lambda sampler=sampler, requests=requests: sampler.sample(requests))
        lengths = [sample.tokens for samples in ours.result for sample in samples]
        card.row(f"decoding, {rows} rows", sum(lengths) / ours.seconds, "tokens/s")
        prompts = [encode_prompt(tokenizer, card.space(), one.messages, one.direction) for one in requests]
        with_generate(model, tokenizer, prompts, 2)
        plain = timed(lambda prompts=prompts: with_generate(model, tokenizer, prompts, longest))
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kept = 2 * config.num_hidden_layers * config.num_key_value_heads * width * model.dtype.itemsize
        weights = parameters_of(model) * model.dtype.itemsize
        contexts = sum(
            len(prompt) + length / 2
            for prompt, part in zip(prompts, ours.result, strict=True)
            for length in (sample.tokens for sample in part)
        )
        read = max(lengths) * weights + kept * contexts * (sum(lengths) / len(lengths))
        card.row(f"decoding, {rows} rows", sum(lengths) / ours.seconds, "tokens/s", plain.result / plain.seconds,
                 "generate", ms_a_step=1000 * ours.seconds / max(lengths), peak_bytes=ours.peak_bytes,
                 peer_peak_bytes=plain.peak_bytes, **card.share(read / ours.seconds, "copy"))  # fmt: skip


@torch.inference_mode()
def with_generate(model: Any, tokenizer: Any, prompts: list[list[int]], longest: int) -> int:
    """Tokens that transformers' `generate` writes: left padding, its own cache, SAMPLES of each prompt in one batch."""
    pad, width = tokenizer.pad_token_id, max(map(len, prompts))
    ids_BT = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    seen_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    ends = end_token_ids(model, tokenizer)
    output = model.generate(
        ids_BT, attention_mask=seen_BT, do_sample=True, top_k=0, max_new_tokens=longest, pad_token_id=pad,
        num_return_sequences=SAMPLES, eos_token_id=list(ends),
    )  # fmt: skip
    answers = output[:, width:]
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device))
    before = ended.int().cumsum(1) - ended.int()  # an end token counts, what pads the row behind it does not
    return int((before == 0).sum())


def vllm(card: Card) -> None:
    """Tokens/s of the package's vLLM sampler, and of the engine it started, asked the same requests bare; and the
    exchange of weights between two policies."""
    need_vllm()
    import vllm as module

    engines = []
    start = module.LLM

    def kept(*args: Any, **kwargs: Any) -> Any:
        engines.append(start(*args, **kwargs))
        return engines[-1]

    module.LLM = kept  # the bare engine is the one the sampler starts: one start, the same settings
    rows, longest = (8, 6) if card.tiny else (2048, 128)
    config = RolloutConfig(
        max_new_tokens=longest,
        samples=SAMPLES,
        engine={"kind": "vllm", "vllm": {"memory": 0.5}},  # type: ignore[arg-type]
    )
    requests, policy = requests_of(card, rows), card.steerable()
    begun = time.perf_counter()
    with engine_of(config) as engine:
        with build_samplers(policy, config, engine=engine) as samplers:
            start_s = time.perf_counter() - begun
            card.row("vLLM, one start", start_s, "s")
            beside_bare(card, samplers[0], module, engines[-1], requests, longest)
        exchanged(card, engine, config, start_s)


def beside_bare(
    card: Card, sampler: Sampler, module: Any, engine: Any, requests: list[SampleRequest], longest: int
) -> None:
    """Tokens/s of the sampler and of the bare engine, in turn, twice; the better of each counts. The engine is asked
    without seeds and with those the sampler sends: vLLM's older model runner draws seeded requests one by one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(card.steerable())
    prompts = [encode_prompt(tokenizer, card.space(), one.messages, one.direction) for one in requests]

    def bare(seeded: bool) -> int:
        how = [
            module.SamplingParams(n=SAMPLES, temperature=1.0, top_p=1.0, max_tokens=longest, detokenize=False,
                                  seed=one.seeds[0] if seeded else None) for one in requests
        ]  # fmt: skip
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], how, use_tqdm=False)
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    def ours() -> int:
        return sum(sample.tokens for samples in sampler.sample(requests) for sample in samples)

    ours()
    found = []
    for _ in range(2):
        found.append((timed(partial(bare, False)), timed(partial(bare, True)), timed(ours)))
        plain, seeded, best = (max(turn[side].result / turn[side].seconds for turn in found) for side in range(3))
        facts = {"requests": len(requests), "turns": len(found)}
        card.row("rollout through vLLM", best, "tokens/s", plain, "bare vLLM", **facts)
        card.row("rollout through vLLM, peer seeded", best, "tokens/s", seeded, "bare vLLM, seeded", **facts)


def exchanged(card: Card, engine: SamplingEngine, config: RolloutConfig, start_s: float) -> None:
    """Seconds until an engine that sleeps holds other weights of the same shape, against a start; and whether it does:
    its answers, nearly greedy, must be those that transformers gives with them, and after a way back the old ones.

    Raises RuntimeError where it does not.
    """
    config = config.model_copy(update={"temperature": 0.01, "max_new_tokens": 12})
    policies = {"old": card.steerable(), "new": noisy(card)}
    asked = [SampleRequest(one.messages, one.direction, one.seeds[:1]) for one in requests_of(card, 64 * SAMPLES)]
    said: dict[str, list[str]] = {}
    expected: dict[str, list[str]] = {}
    for name in ("new", "old"):
        begun = time.perf_counter()
        with build_samplers(policies[name], config, engine=engine) as samplers:
            if name == "old":  # the first exchange also tries the engine with the weights it has
                seconds = time.perf_counter() - begun
            said[name] = [samples[0].text for samples in samplers[0].sample(asked)]
    for name, policy in policies.items():
        model, tokenizer = load_policy(policy, dtype=on_device()[1])
        sampler = TransformersSampler(
            model, tokenizer, card.space(), config.max_new_tokens, temperature=config.temperature
        )
        expected[name] = [samples[0].text for samples in sampler.sample(asked)]
    share = {
        (a, b): sum(x == y for x, y in zip(said[a], expected[b], strict=True)) / len(asked) for a in said for b in said
    }
    facts = {f"{a} says what {b} would": value for (a, b), value in share.items()}
    card.row(
        "vLLM, weights exchanged in place",
        seconds,
        "s",
        start_s,
        "a start",
        starts=getattr(engine, "starts", 0),
        **facts,
    )
    if min(share["new", "new"], share["old", "old"]) <= max(share["new", "old"], share["old", "new"]):
        raise RuntimeError(f"vLLM does not hold the weights it was given: {facts}")


def noisy(card: Card) -> Path:
    """The steerable policy with other weights: each moved by a tenth of the spread of its matrix."""
    folder = card.folder / "noisy"
    if not (folder / "dpa_config.json").is_file():
        model, tokenizer = load_policy(card.steerable(), device="cpu")
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
        save_policy(model, tokenizer, folder, card.space(), {})
    return folder
