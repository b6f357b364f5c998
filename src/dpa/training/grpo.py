"""The learner of prompts: it samples for itself and is rewarded by v.r, through TRL's GRPOTrainer.
Run its tests: pytest tests/test_grpo.py

Group relative policy optimisation (arXiv 2402.03300). The policy that is trained gives `rollout.samples` answers y_1 ..
y_G to a prompt x under one direction v that was drawn for it. The loss is -A_i log pi(y_i | x, v), with

    A_i = (v.r(x, y_i) - mean_j v.r(x, y_j)) / std_j v.r(x, y_j)

on policy: every optimizer step samples anew. `beta` > 0 adds the KL divergence from the policy that training starts
from, which is then held beside it. Loss and optimizer are TRL's; ours are the prompt's tokens, the sampler (that of
rollouts, over the weights as they are) and the reward. A seed belongs to (training seed, step, prompt, answer): an
interrupted training goes on with the answers that an uninterrupted one gets.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from dpa.core.config import RunConfig
from dpa.core.errors import ConfigError
from dpa.core.records import Ledger, SampleRequest, score_in_full, seed_of, stable_hash
from dpa.sampling.samplers import TransformersSampler
from dpa.storage.stage_records import Reject
from dpa.training.learner import Learner, RowEncoder, TrainingRecord
from dpa.training.passes import Uncut, WeighsFigures, one_card, without_adapters
from dpa.training.ranks import in_one_process
from dpa.training.trainer_arguments import WITHOUT_BALANCING, adapters, first_passes, optimizer_class, shared_arguments
from dpa.training.trainers import StopsAtBadStep

_PAID = "paid/"
"""Before the names, in the log, of what the scorer was paid for the answers of a step."""


@dataclass(frozen=True)
class Question:
    """A prompt to be answered under a direction: its messages (JSON text) and, as the sampler shows it, its ids."""

    messages: str
    direction: tuple[float, ...]
    ids: list[int]

    @property
    def tokens(self) -> int:
        """Of the prompt alone: the answers are not there yet."""
        return len(self.ids)


class _Trainer(StopsAtBadStep, WeighsFigures, GRPOTrainer):
    """GRPOTrainer that cuts the learning of a step into passes that fit, and never takes a step from a NaN."""

    unit, field = "answers", "rollout.max_new_tokens"

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Answer the questions of a step once, and learn from the answers in passes."""
        model.train()
        answers = self._prepare_inputs(inputs)
        loss = super().training_step(model, {"rows": Uncut(range(len(answers["advantages"]))), "answers": answers})
        self._step += 1
        return loss

    def weight(self, part: Any, step: Mapping[str, Any]) -> float:
        """Tokens of answers."""
        return float(step["answers"]["completion_mask"][part.start : part.stop].sum())

    def pass_loss(self, model: Any, part: Any, step: Mapping[str, Any]) -> torch.Tensor:
        """The share of the pass's answers in the loss of the step: TRL divides by all tokens of all answers."""
        here = slice(part.start, part.stop)
        return self.compute_loss(
            model, {name: value[here] if value.dim() else value for name, value in step["answers"].items()}
        )

    def _get_per_token_logps_and_entropies(self, *args: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        """A reference reads as many answers at once as a pass does."""
        return super()._get_per_token_logps_and_entropies(*args, batch_size=batch_size and self.pass_size, **kwargs)


class GRPO(Learner[Question]):
    """Learns from its own answers to prompts under directions (columns `prompt_id, messages, direction`).

    The log has, for each optimizer step, `reward` (the mean v.r of its answers), `reward_std`, and TRL's other figures
    of answers and loss.
    """

    reads = "prompts"
    section = "grpo"

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """A group has answers to compare."""
        super().check(run)
        if run.rollout.samples < 2:
            raise ConfigError("rollout.samples: 1, but learner grpo compares the answers of a group; take 2 or more.")

    def encode(self, rows: pa.Table, encoder: RowEncoder) -> tuple[list[Question], list[Reject]]:
        """A question for each row, in an order drawn from the seed; rejected where it leaves no room for an answer."""
        questions, rejects = [], []
        columns = (rows[name].to_pylist() for name in ("prompt_id", "messages", "direction"))
        for identity, messages, direction in zip(*columns, strict=True):
            encoded = encoder.encode(messages, direction)
            if isinstance(encoded, str):
                rejects.append(Reject(identity, encoded))
            else:
                questions.append(Question(messages, tuple(direction), encoded[0]))
        order = np.random.default_rng(self.seed).permutation(len(questions))
        return [questions[place] for place in order], rejects

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Question],
        work: Path,
        start: Callable[[], PreTrainedModel] | None = None,
    ) -> GRPOTrainer:
        """The GRPOTrainer over the questions, checkpoints in `work`. Raises ConfigError.

        TRL would write the chat template itself and knows one set of its variables for all prompts, so its data set
        holds the numbers of the questions, and `_answer` (a `rollout_func`) gives it prompts and answers as tokens.
        """
        config, rollout = self.config, self.rollout
        if not in_one_process():
            raise ConfigError("cluster: learner grpo trains in one process; take processes 1 and no accelerate file.")
        if config.beta and config.lora is None and not hasattr(transformers, type(model).__name__):
            raise ConfigError("grpo.beta: TRL loads the reference and runs no model's own code; take 0, or grpo.lora.")
        shared = shared_arguments(self, work)
        longest = max(len(question.ids) for question in examples) + rollout.max_new_tokens
        answers = min(config.prompts_per_step, len(examples)) * rollout.samples
        first = first_passes(self, config.answers_per_device, model, longest, answers, shared)
        arguments = GRPOConfig(
            **shared,
            **WITHOUT_BALANCING,
            beta=config.beta,
            num_generations=rollout.samples,
            max_completion_length=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            shuffle_dataset=False,  # the questions are in the order of training
            per_device_train_batch_size=answers,
            gradient_accumulation_steps=1,
        )
        one_card(arguments)
        trainer: Any = _Trainer(
            model=model,
            reward_funcs=partial(self.utility, examples),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(examples))]}),
            processing_class=tokenizer,
            peft_config=adapters(config),
        )
        trainer.begin_with(first.units, first.recompute, config.gradient_checkpointing)
        trainer.optimizer_cls_and_kwargs = optimizer_class(config)  # unlike SFTTrainer, it takes no such argument
        sampler = TransformersSampler(
            without_adapters(trainer.model),
            tokenizer,
            self.space,
            rollout.max_new_tokens,
            rollout.temperature,
            rollout.top_p,
            rollout.batch_size,
        )
        trainer.rollout_func = partial(self._answer, sampler, examples)
        return trainer

    def _answer(
        self, sampler: TransformersSampler, questions: Sequence[Question], numbers: list[str], trainer: Any
    ) -> dict[str, Any]:
        """Prompts, answers and their texts of one optimizer step, in the order of `numbers`, a question's in a row."""
        requests = [
            SampleRequest(
                json.loads(questions[int(number)].messages),
                questions[int(number)].direction,
                tuple(
                    seed_of(stable_hash("grpo", self.seed, trainer.state.global_step, number, k))
                    for k in range(numbers.count(number))
                ),
            )
            for number in dict.fromkeys(numbers)
        ]
        trainer.model.eval()  # no dropout, and a cache where activations are computed twice
        try:
            answers = sampler.sample(requests)
        finally:
            sampler.release()  # the passes of the step need the memory
            trainer.model.train()
        samples = [sample for answer in answers for sample in answer]
        return {
            "prompt_ids": [questions[int(number)].ids for number in numbers],
            "completion_ids": [list(sample.ids) for sample in samples],
            "logprobs": None,
            "response": [sample.text for sample in samples],
        }

    def utility(
        self,
        questions: Sequence[Question],
        prompts: list[str],
        response: list[str],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None],
        **others: Any,
    ) -> list[float | None]:
        """v.r of each answer; None where it cannot be scored, which then moves nothing."""
        assert self.scorer is not None
        asked = [questions[int(number)] for number in prompts]
        given = score_in_full(self.scorer, [json.loads(question.messages) for question in asked], response)
        scores_NK = self.space.combine(given.scores_NM, self.scorer.attributes)
        utility_N = self.rewards(scores_NK, np.array([question.direction for question in asked]))
        log_metric("answers", len(asked))
        log_metric("answer_tokens", sum(map(len, completion_ids)))
        for name, amount in given.costs.items():
            log_metric(f"{_PAID}{name}", amount)
        return [float(utility) if np.isfinite(utility) else None for utility in utility_N]

    def rewards(self, scores_NK: np.ndarray, directions_NK: np.ndarray) -> np.ndarray:
        """reward_N of the answers of one optimizer step, a group's in a row; NaN where one cannot be scored."""
        return np.einsum("nk,nk->n", scores_NK, directions_NK)

    def cost(self, done: TrainingRecord) -> Ledger:
        """Each answer is scored and, with its prompt, trained on once; a reference reads the same, forward only. What
        the scorer was paid (a judge) stands in `extra`."""
        tokens = int(done.logged("num_tokens")[-1])
        extra: dict[str, float] = {"reference_tokens": tokens} if self.config.beta else {}
        for name in sorted({name for entry in done.log for name in entry if name.startswith(_PAID)}):
            extra[name.removeprefix(_PAID)] = sum(done.logged(name))
        return Ledger(
            tokens_generated=round(sum(done.logged("answer_tokens"))),
            candidates_scored=round(sum(done.logged("answers"))),
            training_tokens=tokens,
            extra=extra,
        )

    @property
    def identity(self) -> tuple[object, ...]:
        """How it samples and what scores."""
        assert self.scorer is not None
        how = self.rollout
        return how.samples, how.temperature, how.top_p, how.max_new_tokens, self.scorer.revision
