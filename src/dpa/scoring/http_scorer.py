"""A reward model behind HTTP servers that answer with a vector: vLLM's /classify, text-embeddings-inference's /predict.
Run its tests: pytest tests/test_http_scorer.py

The model's folder stands here too: it says what is rated, how a conversation becomes tokens, and what the golden
example must score. Its weights are not loaded.
"""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpa.core.errors import EngineError
from dpa.core.records import Messages, Scorer
from dpa.core.reference import ModelReference
from dpa.core.sections.reward import HttpRewardConfig
from dpa.models.files import folder_revision, resolve_model
from dpa.models.loading import load_tokenizer
from dpa.models.quiet import quiet_libraries
from dpa.remote.http_exchange import Answer, Refusal, key_in
from dpa.remote.http_pool import HttpPool
from dpa.scoring.precision import golden_ids, worst_output
from dpa.scoring.reward_model import (
    BF16_TOLERANCE,
    RELEASED_MODEL,
    RELEASED_SPEC,
    RewardSpec,
    read_spec,
    render,
    tokenise,
)
from dpa.scoring.reward_scorer import check_folder
from dpa.scoring.scorer_source import ScorerSource, absolute
from dpa.storage.rows import public_name

_PATHS = {"classify": "/classify", "predict": "/predict"}


class HttpScorer:
    """Scores by a pool of servers of one reward model. It must reproduce its golden example at every server.

    `spec` and `tokenizer` are the model's own, `model` its name there. A request of `batch` rows that is refused is
    asked again row by row; a row refused alone is NaN. Raises EngineError when a server does not answer as the model
    would.
    """

    def __init__(
        self,
        pool: HttpPool,
        spec: RewardSpec,
        tokenizer: Any,
        model: str,
        revision: str,
        api: str = "classify",
        batch: int = 16,
    ) -> None:
        self.attributes, self.revision = spec.attributes, revision
        self._pool, self._spec, self._tokenizer, self._model = pool, spec, tokenizer, model
        self._api, self._batch = api, batch
        self._self_test()

    def score(self, prompts: Sequence[Messages], responses: Sequence[str]) -> np.ndarray:
        """Return scores_NM; NaN for a row too long, refused by the template or the server, or scored not finite."""
        inputs_N = self._inputs(prompts, responses)
        rows = [row for row, item in enumerate(inputs_N) if item is not None]
        scores_NM = np.full((len(inputs_N), len(self.attributes)), np.nan)
        batches = [rows[start : start + self._batch] for start in range(0, len(rows), self._batch)]
        alone = [batch for batch in self._ask(batches, inputs_N, scores_NM) if len(batch) > 1]
        if alone:
            self._ask([[row] for batch in alone for row in batch], inputs_N, scores_NM)
        scores_NM[~np.isfinite(scores_NM).all(axis=1)] = np.nan
        return scores_NM

    def _inputs(self, prompts: Sequence[Messages], responses: Sequence[str]) -> list[Any]:
        """What stands for each row in a request; None where there is nothing to score."""
        texts_N = render(self._tokenizer, self._spec.template, prompts, responses)
        ids_N = tokenise(self._tokenizer, self._spec.template, self._spec.max_length, texts_N)
        if self._api == "classify":
            return list(ids_N)
        return [None if ids is None else [text] for ids, text in zip(ids_N, texts_N, strict=True)]

    def _body(self, inputs: list[Any]) -> dict[str, Any]:
        if self._api == "classify":
            return {"model": self._model, "input": inputs, "use_activation": False}
        return {"inputs": inputs, "raw_scores": True, "truncate": False}

    def _ask(self, batches: list[list[int]], inputs_N: list[Any], scores_NM: np.ndarray) -> list[list[int]]:
        """Fill in the scores of each batch; return the batches that were refused."""
        bodies = [self._body([inputs_N[row] for row in batch]) for batch in batches]
        answers = self._pool.ask(_PATHS[self._api], bodies)
        refused = []
        for batch, answer in zip(batches, answers, strict=True):
            if isinstance(answer, Refusal):
                refused.append(batch)
            else:
                scores_NM[batch] = self._read(answer, len(batch))
        return refused

    def _read(self, answer: Answer, rows: int) -> np.ndarray:
        """scores_NM of one answer. Raises EngineError when it is not one vector for each row."""
        try:
            if self._api == "classify":
                found = {int(item["index"]): item["probs"] for item in answer.payload["data"]}
                vectors = [found[row] for row in range(rows)]
                complete = len(answer.payload["data"]) == rows
            else:
                vectors = [self._by_label(items) for items in answer.payload]
                complete = len(vectors) == rows
            scores_NM = np.array(vectors, dtype=np.float64)
        except (KeyError, TypeError, ValueError, IndexError):
            complete, scores_NM = False, np.zeros(0)
        if not complete or scores_NM.shape != (rows, len(self.attributes)):
            raise EngineError(
                f"a server of the reward model does not answer with {len(self.attributes)} numbers for each of {rows} "
                "rows; it serves another model, or another api than reward.http.api."
            )
        return scores_NM

    def _by_label(self, items: Any) -> list[float]:
        """The numbers of one row in the order of the attributes; they come by falling score, with their labels."""
        values = {item["label"]: float(item["score"]) for item in items}
        for names in (self.attributes, [f"LABEL_{place}" for place in range(len(self.attributes))]):
            if set(values) == set(names) and len(items) == len(values):
                return [values[name] for name in names]
        raise ValueError("the labels are not the model's")

    def _self_test(self) -> None:
        """The golden example, alone and beside a longer row, at every server."""
        golden = self._spec.golden
        golden_ids(self._tokenizer, self._spec, "its folder")
        inputs = self._inputs([golden.messages] * 2, [golden.response, f"{golden.response} {golden.response}"])
        tolerance = max(self._spec.tolerance(torch.bfloat16), BF16_TOLERANCE)  # a server's head may be in bf16 too
        for rows in ([inputs[0]], [item for item in inputs if item is not None]):
            for answer in self._pool.ask_every_server(_PATHS[self._api], self._body(rows)):
                if isinstance(answer, Refusal):
                    raise EngineError(f"a server of the reward model refuses its golden example: {answer.reason}.")
                scores_M = self._read(answer, len(rows))[0]
                worst = worst_output(scores_M, golden.scores, tolerance)
                if worst is not None:
                    raise EngineError(
                        f"a server of the reward model scores its golden example {scores_M[worst]:.2f} on "
                        f"{self.attributes[worst]} instead of {golden.scores[worst]:.2f}; it serves another model, or "
                        "puts a softmax or sigmoid on the scores."
                    )
            self._pool.set_touchstone(_PATHS[self._api], self._body(rows))


def http_scorer(config: HttpRewardConfig, code_revision: str | None = None, released: bool = False) -> HttpScorer:
    """The scorer a configuration describes (`released`: its folder is a copy of the published model, which says nothing
    of itself). Its connections close when it is no longer used, or at exit.

    Raises ModelFileError, ConfigError, EngineError.
    """
    safe = resolve_model(ModelReference(config.folder, code_revision))
    spec = RELEASED_SPEC if released or config.folder == RELEASED_MODEL else read_spec(Path(safe.path))
    with quiet_libraries():
        tokenizer = load_tokenizer(safe, "reward model")
    pool = HttpPool(
        [server.rstrip("/").removesuffix("/v1") for server in config.servers],
        in_flight=config.in_flight,
        request_s=config.request_s,
        attempts=config.attempts,
        key=key_in(config.api_key_env, "reward.http.api_key_env"),
    )
    try:
        scorer = HttpScorer(
            pool,
            spec,
            tokenizer,
            config.model or config.folder,
            folder_revision(safe.path),
            config.api,
            config.batch,
        )
    except BaseException:
        pool.close()
        raise
    weakref.finalize(scorer, pool.close)
    return scorer


class HttpSource(ScorerSource):
    """`reward.http`: a finished reward model behind servers."""

    def check(self) -> None:
        """Its folder holds its files, and the key is there; no server is asked."""
        check_folder(self, folder=self.given.folder)
        key_in(self.given.api_key_env, "reward.http.api_key_env")

    def open(self) -> Scorer:
        return http_scorer(self.given, self.code_revision, released=self.reward.preset == "dpa-v1")

    def described(self) -> str:
        return f"the reward model `{public_name(self.given.folder)}` behind servers"

    def on_every_node(self) -> HttpRewardConfig:
        """The servers know the model by the name given here."""
        folder, model = absolute(self.given.folder), self.given.model or self.given.folder
        return self.given.model_copy(update={"folder": folder, "model": model})
