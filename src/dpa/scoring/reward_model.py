"""A reward model folder: what its dpa_reward.json says, how a conversation becomes tokens, how rows become scores.
Run its tests: pytest tests/test_scorers.py tests/test_reward_training.py
"""

import json
import re
from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification
from transformers.modeling_layers import GenericForSequenceClassification

from dpa.core.errors import ConfigError, EngineError, ModelFileError
from dpa.core.records import Messages
from dpa.core.reference import Model
from dpa.models.attention import SEGMENTS, best_way, packed_attention, to_device
from dpa.models.files import REWARD_FILE, resolve_model
from dpa.models.loading import load_model, load_tokenizer
from dpa.models.memory import scoring_tokens
from dpa.models.policy import is_out_of_memory
from dpa.models.quiet import quiet_libraries
from dpa.models.template_rendering import render_chats
from dpa.scoring.row_layouts import RowsAlone, SharedPrompts
from dpa.storage.tables import write_json

PUBLISHED_CONVERSATION = (
    "[INST] You must read the following conversation carefully and rate the assistant's response from score 0-100 in "
    "these aspects: helpfulness, correctness, coherence, honesty, complexity, verbosity\n\n"
    "User: {prompt}\n\nAssistant: {response} [/INST]"
)
"""Input of RLHFlow/RewardModel-Mistral-7B-for-DPA-v1 (arXiv 2402.18571), letter for letter."""

PLAIN_CONVERSATION = "User: {prompt}\n\nAssistant: {response}"
"""Used where neither a template nor a chat template is given (encoders have none); our choice."""

CPU_TOKENS, GPU_TOKENS = 1024, 131_072
"""Most tokens in one forward pass, padding included. A CPU is fastest while a batch stays in its cache
(bench/scoring.py); a card takes fewer where its memory is small."""

BF16_TOLERANCE = 2.0
"""Largest difference from the golden scores, on 0-100, of a model in bf16, where nobody measured it."""

LEAST_KENDALL = 0.98
"""Below this agreement with the order in fp32, scorers stay in fp32."""

_PLACEHOLDER = re.compile(r"\{(prompt|response)\}")


@dataclass(frozen=True)
class Golden:
    """One example and its scores: a loaded model that does not reproduce them is not the one that was saved."""

    messages: Messages
    response: str
    scores: tuple[float, ...]
    token_ids: tuple[int, ...] | None
    """The exact input; None where only the scores are published."""
    tolerance: float
    """Largest difference of a score, on 0-100, in the precision the example was made in."""


@dataclass(frozen=True)
class Precision:
    """How scores in the half precision `dtype` compare with those in fp32, on `rows` held-out rows."""

    dtype: str
    rows: int
    largest_difference: float
    """Of a score, on 0-100."""
    kendall: float | None
    """Kendall's tau within prompts, of the attribute that agrees least; None: nothing to put in order."""

    @property
    def keeps_order(self) -> bool:
        """Whether scorers may use it."""
        return self.kendall is None or self.kendall >= LEAST_KENDALL


@dataclass(frozen=True)
class RewardSpec:
    """What a reward model rates and how it must be asked."""

    attributes: tuple[str, ...]
    scales: dict[str, tuple[float, float]]
    """Attribute -> the scale its raters used. Scores are on 0-100 whatever it was."""
    template: str | None
    """Input text with {prompt} and {response}; None: the tokenizer's chat template."""
    max_length: int
    """Longest input in tokens; longer ones are not scored."""
    golden: Golden
    precision: Precision | None = None
    """None: it was not measured."""

    def tolerance(self, dtype: torch.dtype) -> float:
        """Largest difference from the golden scores that is rounding, of a model whose weights are of this type.

        In half precision twice the largest one that was measured: another card rounds in another order.
        """
        if dtype == torch.float32:
            return self.golden.tolerance
        if self.precision is None:
            return max(self.golden.tolerance, BF16_TOLERANCE)
        return self.golden.tolerance + 2 * self.precision.largest_difference


RELEASED_MODEL = "RLHFlow/RewardModel-Mistral-7B-for-DPA-v1"
RELEASED_SPEC = RewardSpec(
    attributes=(
        *(f"helpsteer-{name}" for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")),
        *(
            f"ultrafeedback-{name}"
            for name in ("overall_score", "instruction_following", "truthfulness", "honesty", "helpfulness")
        ),
    ),
    scales={},
    template=PUBLISHED_CONVERSATION,
    max_length=4096,
    golden=Golden(
        messages=[{"role": "user", "content": 'What are some synonyms for the word "beautiful"?'}],
        response="Nicely, Beautifully, Handsome, Stunning, Wonderful, Gorgeous, Pretty, Stunning, Elegant",
        scores=(68.99, 69.63, 76.23, 33.49, 35.85, 63.83, 55.59, 68.72, 59.55, 46.47),
        token_ids=None,
        tolerance=2.0,
    ),
)
"""The published reward model has no dpa_reward.json: order, template and golden vector are from its model card."""


def read_spec(folder: Path) -> RewardSpec:
    """Read dpa_reward.json. Raises ModelFileError."""
    try:
        record = json.loads((folder / REWARD_FILE).read_text(encoding="utf-8"))
        golden, precision = record["golden"], record.get("precision")
        return RewardSpec(
            attributes=tuple(record["attributes"]),
            scales={name: (low, high) for name, (low, high) in record["scales"].items()},
            template=record["template"],
            max_length=record["max_length"],
            golden=Golden(
                messages=golden["messages"],
                response=golden["response"],
                scores=tuple(golden["scores"]),
                token_ids=None if golden["token_ids"] is None else tuple(golden["token_ids"]),
                tolerance=golden["tolerance"],
            ),
            precision=None if precision is None else Precision(**precision),
        )
    except FileNotFoundError:
        raise ModelFileError(
            f"reward model: {folder} has no {REWARD_FILE}; train one with `dpa train-reward`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(f"reward model: {folder / REWARD_FILE} is damaged ({error!r}); train it again.") from None


def write_spec(folder: Path, spec: RewardSpec, facts: dict[str, Any]) -> None:
    """Write dpa_reward.json: the spec, and facts about the training that no reader depends on."""
    write_json(folder / REWARD_FILE, {**asdict(spec), **facts})


def load_classifier(model: Model, dtype: torch.dtype, **fields: Any) -> tuple[Any, Any, Path]:
    """A sequence classifier, its tokenizer, and the checked folder they came from. `fields` go to its configuration.

    A head of another width is made anew; in bf16 the head alone stays in fp32 (`exact_head`). Raises ModelFileError.
    """
    safe = resolve_model(model)
    with quiet_libraries():
        classifier = load_model(AutoModelForSequenceClassification, safe, dtype, "reward model", bool(fields), **fields)
        tokenizer = load_tokenizer(safe, "reward model")
    if dtype != torch.float32:
        exact_head(classifier)
    return classifier, tokenizer, Path(safe.path)


def find_head(model: torch.nn.Module, outputs: int) -> tuple[str, torch.nn.Linear] | None:
    """Name and module of the last linear layer with that many outputs, whatever the architecture calls it."""
    named = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.out_features == outputs
    ]
    return named[-1] if named else None


def exact_head(model: Any) -> None:
    """Let the last layer of a bf16 classifier compute in fp32: bf16 has steps of 0.5 at a score of 70."""
    found = find_head(model, model.config.num_labels)
    if found is not None:
        found[1].float().register_forward_pre_hook(_in_fp32)


def _in_fp32(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.float() for value in inputs)


def check_template(template: str) -> None:
    """A template must show both the prompt and the response. Raises ConfigError."""
    missing = {"prompt", "response"} - set(_PLACEHOLDER.findall(template))
    if missing:
        raise ConfigError(f"reward.train.template: it lacks {{{sorted(missing)[0]}}}; add it where that text belongs.")


def check_pad_token(tokenizer: Any, model_pad_token_id: int | None, name: str | Path) -> None:
    """Pooling takes the last token that is not padding, so padding must be known and must not be EOS."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelFileError(
            f"reward model: {name} pads with its EOS token or with none; give it a pad token of its own."
        )
    if model_pad_token_id != tokenizer.pad_token_id:
        raise ModelFileError(
            f"reward model: {name} has pad_token_id {model_pad_token_id} in config.json but {tokenizer.pad_token_id} "
            "in its tokenizer; make them the same."
        )


def encode(
    tokenizer: Any, template: str | None, max_length: int, prompts: Sequence[Messages], responses: Sequence[str]
) -> list[list[int] | None]:
    """Token ids of each conversation, or None where the template refuses it or it is longer than `max_length`."""
    return tokenise(tokenizer, template, max_length, render(tokenizer, template, prompts, responses))


def tokenise(
    tokenizer: Any, template: str | None, max_length: int, texts: Sequence[str | None]
) -> list[list[int] | None]:
    """Token ids of rendered conversations, or None where there is none or it is longer than `max_length`."""
    shown = [text for text in texts if text is not None]
    # A chat template writes its own special tokens; a plain template leaves them (BOS, [CLS]) to the tokenizer.
    encoded = iter(_ids(tokenizer, shown, template is not None))
    ids_N = [None if text is None else next(encoded) for text in texts]
    return [ids if ids is not None and 0 < len(ids) <= max_length else None for ids in ids_N]


def _ids(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    """What `tokenizer(texts, add_special_tokens=special)` has as `input_ids`. Of a fast tokenizer the ids alone,
    without the masks and the rest that a call makes of every row in Python."""
    if not texts:
        return []
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return tokenizer(texts, add_special_tokens=special)["input_ids"]
    fast.no_truncation()  # as a call does, whatever tokenizer.json says
    fast.no_padding()
    return [one.ids for one in fast.encode_batch_fast(texts, add_special_tokens=special)]


def render(
    tokenizer: Any, template: str | None, prompts: Sequence[Messages], responses: Sequence[str]
) -> list[str | None]:
    """Text of each conversation, or None where the template refuses it."""
    rows = zip(prompts, responses, strict=True)
    if template is None:  # one without a system role, for example, refuses some
        return render_chats(tokenizer, [[*messages, {"role": "assistant", "content": said}] for messages, said in rows])
    return [_fill(template, *row) for row in rows]


def forward(
    model: torch.nn.Module,
    ids_N: Sequence[Sequence[int]],
    pad_token_id: int,
    token_budget: int | None = None,
    packed: bool | None = None,
) -> np.ndarray:
    """The model's logits for each row, float64 (N, outputs), in batches of rows of like length.

    `token_budget` bounds a batch, padding included (default: what suits the model's device). On an out-of-memory error
    the batch is halved, and those after it; scores do not depend on the batch beyond rounding. `packed`: rows behind
    each other instead of padded ones (default: on a card that can). Raises EngineError when a single row does not fit.
    """
    return Logits(model, pad_token_id, token_budget, packed).add(ids_N).collect()


class Logits:
    """The logits of rows that come in parts: a card works on the last part while the next is made ready, and its
    results are fetched once. The arguments are those of `forward`. On a CPU rows of the same prompt are read behind one
    copy of it (scoring/row_layouts.py)."""

    def __init__(
        self, model: Any, pad_token_id: int, token_budget: int | None = None, packed: bool | None = None
    ) -> None:
        self._model, self._pad = model, pad_token_id
        self._device = next(model.parameters()).device
        card = self._device.type == "cuda"
        way = best_way(model) if pools_last_token(model) else None
        self._packed = way is not None and (card if packed is None else packed)
        self.may_share = way == SEGMENTS and packed is None
        self._limit = token_budget or (
            scoring_tokens(model.config.get_text_config(), model.dtype, self._device, GPU_TOKENS)
            if card
            else CPU_TOKENS
        )
        self._order: list[int] = []
        self._logits: list[torch.Tensor] = []

    def add(self, ids_N: Sequence[Sequence[int]], prompts_N: Sequence[Hashable] | None = None) -> "Logits":
        """Start on further rows; `prompts_N` names the prompt of each, where that is known and they `may_share` it."""
        first, layout = len(self._order), self._layout(ids_N, prompts_N)
        with packed_attention(self._model) if layout.packed else nullcontext():
            waiting = list(layout.batches(self._limit))[::-1]
            while waiting:
                rows = waiting.pop()
                tokens = layout.tokens(rows)
                if tokens <= self._limit or len(rows) == 1:
                    logits_B = self._try_forward(layout, rows)
                    if logits_B is not None:
                        self._order += [first + row for row in rows]
                        self._logits.append(logits_B)
                        continue
                    if len(rows) == 1:
                        raise EngineError(
                            f"scorer: one row of {tokens:,} tokens does not fit in memory; lower max_length."
                        )
                    self._limit = tokens // 2
                middle = len(rows) // 2
                waiting += [rows[middle:], rows[:middle]]
        return self

    def collect(self) -> np.ndarray:
        """The logits of all rows in the order they came, float64 (N, outputs)."""
        logits_NM = torch.cat(self._logits).cpu().double().numpy()
        in_order_NM = np.empty_like(logits_NM)
        in_order_NM[self._order] = logits_NM
        return in_order_NM

    def _layout(
        self, ids_N: Sequence[Sequence[int]], prompts_N: Sequence[Hashable] | None
    ) -> RowsAlone | SharedPrompts:
        if prompts_N is not None and self.may_share:
            shared = SharedPrompts(ids_N, prompts_N)
            if shared.worth_it:
                return shared
        return RowsAlone(ids_N, self._pad, self._packed)

    def _try_forward(self, layout: RowsAlone | SharedPrompts, rows: Sequence[int]) -> torch.Tensor | None:
        """Logits (B, outputs) on the model's device, or None when memory ran out."""
        try:
            with torch.inference_mode():
                inputs, ends_B = layout.inputs(rows)
                inputs = to_device(inputs, self._device)
                if layout.packed:
                    return last_token_logits(self._model, inputs, ends_B)
                return self._model(**inputs).logits
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, a plain RuntimeError on a CPU
            if not is_out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def pools_last_token(model: Any) -> bool:
    """Whether a classifier is a decoder of transformers whose head reads the last token that is not padding."""
    return isinstance(model, GenericForSequenceClassification)


def last_token_logits(model: Any, inputs: dict[str, Any], ends_N: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (N, outputs) of the N sequences of `pack_inputs`, or of those that end at the places `ends_N`: what the
    classifier gives for each of them alone."""
    hidden_TH = getattr(model, model.base_model_prefix)(**inputs, use_cache=False).last_hidden_state[0]
    return model.score(hidden_TH.index_select(0, inputs["cu_seq_lens_q"][1:] - 1 if ends_N is None else ends_N))


def conversation_text(messages: Messages) -> str:
    """The prompt of a plain template: one turn as it is, later turns as the published template would go on."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    first, *later = [message for message in messages if message["role"] != "system"]
    turns = "".join(f"\n\n{message['role'].capitalize()}: {message['content']}" for message in later)
    return "\n\n".join([*system, first["content"]]) + turns


def _fill(template: str, messages: Messages, response: str) -> str:
    parts = {"prompt": conversation_text(messages), "response": response}
    return _PLACEHOLDER.sub(lambda match: parts[match[1]], template)
