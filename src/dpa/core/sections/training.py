"""`finetune`, `dpo`, `grpo`: how a policy is trained.
Run its tests: pytest tests/test_config.py
"""

from typing import Annotated, Literal, Self

from pydantic import Field

from dpa.core.sections.section import MixedBf16, Section


class AdapterConfig(Section):
    """Low-rank adapters (PEFT) instead of all weights."""

    rank: int = Field(16, ge=1, description="Rank r.")
    alpha: int = Field(32, ge=1, description="Scale alpha.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")


class TrainingConfig(Section):
    """What every training of a policy has."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak step size.")
    epochs: float = Field(1.0, gt=0, description="Passes over the rows.")
    max_length: int = Field(2048, ge=16, description="Longest example in tokens; longer ones are rejected.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of steps with rising learning rate.")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field(
        "cosine", description="Learning rate after the warm-up."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: orthogonalised momentum on the 2-D weights, AdamW on the rest."
    )
    lora: AdapterConfig | None = Field(None, description="Train adapters and merge them after every iteration.")
    save_steps: int = Field(200, ge=1, description="Optimizer steps between checkpoints.")
    replay: float = Field(
        0.0,
        ge=0,
        description="Rows selected in earlier iterations that are trained on again, drawn anew each iteration, as a "
        "share of this iteration's rows.",
    )
    bf16: MixedBf16 = False
    gradient_checkpointing: bool | None = Field(
        None, description="Compute activations twice to save memory. Default: where memory asks for it."
    )
    report_to: list[str] = Field(default_factory=list, description="Trackers, such as tensorboard, wandb, trackio.")

    def of_iteration(self, t: int) -> Self:
        """The settings of iteration t, which may have a rate of its own."""
        return self


class _SelectedRowsConfig(TrainingConfig):
    """What every training on selected rows has."""

    listening_rows: int | None = Field(
        None,
        ge=0,
        description="Selected rows kept out of training, by whole prompts, to measure on them whether the policy reads "
        "its direction (docs/learning.md). Default: 64, but at most a fiftieth of the rows, and none where that is "
        "fewer than 8.",
    )
    listening_steps: int = Field(
        250, ge=1, description="Optimizer steps between two of these measurements; the last one is after the last step."
    )
    min_listening: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Stop before any rollout when a smaller share of these rows than this is likelier under its own "
        "direction than under another. Default: warn where it may be chance.",
    )


class FinetuneConfig(_SelectedRowsConfig):
    """Finetuning on (direction, prompt, winner), completion-only loss, through TRL (`learner: sft`)."""

    online_learning_rate: float | None = Field(
        None,
        gt=0,
        repr=False,  # in the identity of a run only where there is one
        description="Peak step size of the online iterations, t >= 1, which move a policy that already reads its "
        "direction. Default: learning_rate.",
    )
    max_length: int = Field(2048, ge=16, description="Packed row length in tokens; longer examples are rejected.")
    packed_rows_per_step: int = Field(8, ge=1, description="Packed rows in one optimizer step, over all devices.")
    rows_per_device: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Packed rows in one forward pass, at most; the rest accumulates. auto: as many as fit on a card, "
        "one on a CPU and in each of several processes. Fewer where memory asks for it; the result is the same.",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile the layers (torch.compile): about twice as fast where a small model trains on a fast "
        "card, and the same but for rounding. auto: on a card, for 200 optimizer steps or more. Not where "
        "activations are computed twice, nor on several cards; where compiling fails, training goes on without.",
    )
    contrastive: float = Field(
        0.0,
        ge=0,
        description="Weight of the contrastive term: a winner must be likelier under its own direction than under "
        "others that do not choose it (docs/learning.md). 0: the paper's loss alone.",
    )
    contrastive_negatives: int = Field(
        1,
        ge=1,
        description="Other directions a winner is contrasted with. Each costs as many tokens as the row "
        "(behind the question: as its ending).",
    )

    def of_iteration(self, t: int) -> Self:
        """The same with the rate of iteration t as `learning_rate`."""
        online = self.online_learning_rate if t > 0 else None
        return self if online is None else self.model_copy(update={"learning_rate": online})


class PreferenceConfig(_SelectedRowsConfig):
    """Finetuning on (direction, prompt, chosen, rejected): DPO through TRL (`learner: dpo`)."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size (TRL's; a tenth of what SFT takes, or less).")
    beta: float = Field(
        0.1, gt=0, description="Strength of the pull to the policy that training starts from (arXiv 2305.18290)."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen responses' own loss per token, added to DPO's (arXiv 2404.19733)."
    )
    pairs_per_step: int = Field(32, ge=1, description="Pairs in one optimizer step, over all devices.")
    pairs_per_device: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Pairs in one forward pass; the rest accumulates. auto: as many as fit on a card, 4 on a CPU. In "
        "one process halved where memory runs out; on several devices they divide a step.",
    )


class GrpoConfig(TrainingConfig):
    """Learning from the policy's own answers, rewarded by v.r: GRPO through TRL (`learner: grpo`). How it samples is
    said in `rollout`: directions for each prompt, samples (a group), temperature, top_p, max_new_tokens."""

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size (TRL's; a tenth of what SFT takes, or less).")
    beta: float = Field(
        0.0, ge=0, description="Weight of the KL divergence from the policy that training starts from (TRL's: none)."
    )
    prompts_per_step: int = Field(
        8,
        ge=1,
        description="Prompts, each under one direction, in one optimizer step; what is left of a pass is not used.",
    )
    answers_per_device: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Answers in one forward pass, halved where memory runs out; the rest accumulates. auto: as many as "
        "fit on a card, 4 on a CPU.",
    )
