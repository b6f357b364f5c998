"""A reward model as a scorer, in process: trained by this run (`reward.train`) or finished (`reward.folder`).
Run its tests: pytest tests/test_scorers.py
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from dpa.core.errors import ConfigError, ModelFileError
from dpa.core.records import Messages, Scorer, messages_text
from dpa.core.reference import Model, ModelReference
from dpa.models.compiling import SCORED_ROWS, Choice, CompiledLayers, worth_compiling
from dpa.models.files import folder_revision, resolve_model
from dpa.models.half_precision import computes_in_bf16
from dpa.models.loading import check_weights, load_tokenizer
from dpa.models.policy import default_device, ensure_pad_token
from dpa.models.quiet import quiet_libraries
from dpa.scoring.precision import say_fp32, self_test
from dpa.scoring.reward_model import (
    RELEASED_MODEL,
    RELEASED_SPEC,
    Logits,
    RewardSpec,
    load_classifier,
    read_spec,
    render,
    tokenise,
)
from dpa.scoring.scorer_source import ScorerSource, absolute
from dpa.storage.rows import public_name
from dpa.storage.seals import check_in_run


class RewardModelScorer:
    """A trained reward model. On loading it must reproduce its golden example, alone and beside a longer row.

    `spec` is for a model without a dpa_reward.json. `dtype`: bf16 by default on a GPU that has it, fp32 elsewhere and
    where bf16 would change the order of scores (see scoring/precision.py). `compile`: the layers (models/compiling.py);
    auto: on a card, once SCORED_ROWS are asked for, and only if they pass the self-test so.

    Raises ModelFileError when the folder is unsafe, or when the self-test fails: a wrong template, pad or EOS token
    scores plausibly and wrongly, so it must not pass quietly.
    """

    rows_ahead = 512
    """Rows that become tokens while a card scores the ones before."""

    def __init__(
        self,
        model: Model,
        spec: RewardSpec | None = None,
        device: str | None = None,
        token_budget: int | None = None,
        dtype: torch.dtype | None = None,
        compile: Choice = "auto",
    ) -> None:
        device = device or default_device()
        if dtype is None:
            dtype = torch.bfloat16 if computes_in_bf16(False, device) else torch.float32
        with quiet_libraries():
            self.model, self.tokenizer, path = load_classifier(model, dtype)
        self.spec = spec or read_spec(path)
        measured = self.spec.precision
        if dtype != torch.float32 and measured is not None and not measured.keeps_order:
            say_fp32(path, f"in bf16 Kendall's tau within prompts is {measured.kendall:.3f} of what it is in fp32")
            self._stay_in_fp32(model)
        self.model.to(device).eval()
        if spec is not None:  # a model from elsewhere may pad with EOS; its golden example says whether this is right
            ensure_pad_token(self.tokenizer)
            self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.attributes = self.spec.attributes
        self.revision = folder_revision(path)
        self._token_budget = token_budget
        self._path, self._compile, self._asked, self._compiled = path, compile, 0, False
        try:
            self_test(self.model, self.tokenizer, self.spec, path, token_budget)
        except ModelFileError:
            # Where nobody measured what bf16 costs, it may be that; fp32 tells it from damage.
            if self.model.dtype == torch.float32 or measured is not None:
                raise
            self._stay_in_fp32(model)
            self.model.to(device).eval()
            self_test(self.model, self.tokenizer, self.spec, path, token_budget)
            say_fp32(path, "in bf16 it is further from its golden scores than rounding should be")

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """Return scores_NM; NaN for a row too long for the model, refused by its template, or scored not finite."""
        count = len(responses)
        self._asked += count
        if not self._compiled and worth_compiling(self._compile, self.model.device, self._asked, SCORED_ROWS):
            self._compiled = True
            self._compile_layers()
        at_once = self.rows_ahead if self.model.device.type == "cuda" else max(1, count)
        logits, usable = Logits(self.model, self.tokenizer.pad_token_id, self._token_budget), []

        def shown(first: int) -> list[str | None]:
            rows = slice(first, first + at_once)
            return render(self.tokenizer, self.spec.template, prompts[rows], responses[rows])

        def tokens(texts: "Future[list[str | None]]") -> list[list[int] | None]:
            return tokenise(self.tokenizer, self.spec.template, self.spec.max_length, texts.result())

        # A card works on one part while the next becomes tokens, and the one after it text.
        with ThreadPoolExecutor(1) as rendering, ThreadPoolExecutor(1) as encoding:
            parts = [
                (first, encoding.submit(tokens, rendering.submit(shown, first))) for first in range(0, count, at_once)
            ]
            for first, part in parts:
                kept = [(first + row, ids) for row, ids in enumerate(part.result()) if ids is not None]
                usable += [row for row, _ in kept]
                names = [messages_text(prompts[row]) for row, _ in kept] if logits.may_share else None
                logits.add([ids for _, ids in kept], names)
        scores_NM = np.full((count, len(self.attributes)), np.nan)
        if usable:
            scores_NM[usable] = logits.collect()
        scores_NM[~np.isfinite(scores_NM).all(axis=1)] = np.nan
        return scores_NM

    def _compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the layers, if they still give the golden scores."""
        compiled = CompiledLayers(self.model, False, backend)
        try:
            self_test(self.model, self.tokenizer, self.spec, self._path, self._token_budget)
        except ModelFileError as error:
            compiled.give_up(error)

    def _stay_in_fp32(self, model: Model) -> None:
        pad = self.model.config.get_text_config().pad_token_id
        with quiet_libraries():
            self.model, _, _ = load_classifier(model, torch.float32)
        self.model.config.get_text_config().pad_token_id = pad


class TrainedSource(ScorerSource):
    """`reward.train`: the reward model that this run trains on its ratings."""

    def attributes(self, rated: Sequence[str]) -> tuple[str, ...]:
        """Those to be trained; refuses one that nobody rates."""
        names = list(dict.fromkeys(rated)) if self.given.attributes is None else self.given.attributes
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"reward.train.attributes: {name!r} is there twice; name it once.")
            if name not in rated:
                known = f"rated are: {', '.join(dict.fromkeys(rated))}" if rated else "nothing is rated"
                raise ConfigError(f"reward.train.attributes: nobody rates {name!r}; {known}.")
        return tuple(names)

    def open(self) -> Scorer:
        """The model as it was saved."""
        if self.trained is None:
            raise ValueError("reward.train needs the folder its model was saved in")
        return RewardModelScorer(self.trained, compile=self.given.compile)

    def described(self) -> str:
        return f"a reward model trained on `{public_name(self.given.backbone)}`"


class FolderSource(ScorerSource):
    """`reward.folder`: a finished reward model. The published one, named by its Hub id, is read by RELEASED_SPEC."""

    def check(self) -> None:
        """Its files are there and fit each other; weights are compared by name and shape."""
        check_folder(self, AutoModelForSequenceClassification)

    def attributes(self, rated: Sequence[str]) -> tuple[str, ...] | None:
        """Those of its record, where it has one and lies here. A damaged one is refused by `check` and `open`: a run
        that scores nothing more needs none."""
        if self.reward.preset is not None or not Path(self.given).is_dir():
            return None
        try:
            return read_spec(Path(self.given)).attributes
        except ModelFileError:
            return None

    def open(self) -> Scorer:
        spec = RELEASED_SPEC if self.given == RELEASED_MODEL or self.reward.preset == "dpa-v1" else None
        return RewardModelScorer(ModelReference(self.given, self.code_revision), spec)

    def described(self) -> str:
        return f"the reward model `{public_name(str(self.given))}`"

    def on_every_node(self) -> str:
        return absolute(self.given)


def check_folder(source: ScorerSource, weights: Any = None, folder: str | None = None) -> None:
    """A reward model's folder holds its files; `weights`: the class whose weights they must be."""
    folder = source.given if folder is None else folder
    safe = resolve_model(ModelReference(folder, source.code_revision))
    check_in_run(safe.path)
    with quiet_libraries():
        load_tokenizer(safe, "reward model")
        if weights is not None:
            check_weights(weights, safe, "reward model")
    if folder != RELEASED_MODEL and source.reward.preset != "dpa-v1":
        read_spec(Path(safe.path))
