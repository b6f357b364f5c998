"""Better answers for more tokens: of several candidates the one that the asked direction likes best.
Run its tests: pytest tests/test_best_of.py

Both classes are Samplers over a Sampler, so whatever samples (rollout, measuring, the command line, a server) can use
them. A request's seed gives candidate 0 its own seed and the others seeds derived from it: the same seed gives the
same answer, and with one candidate the answer is the plain sampler's.
"""

from collections.abc import Sequence

import numpy as np

from dpa.core.directions import DirectionSpace
from dpa.core.records import Sample, Sampler, SampleRequest, Scorer, seed_of, stable_hash
from dpa.core.selection import select
from dpa.core.target_selection import select_targets

DirectionWeights = tuple[float, ...]


class BestOfSampler:
    """argmax of v . r(x, y) over `candidates` answers y sampled under the asked direction v itself.

    r is the scorer's vector, combined into the space's objectives. Of equal candidates the first wins, and the first
    is taken where none can be scored. A request without a direction is judged by the cone's center, one for a target as
    `core.target_selection.select_targets` does. A Sample's `tokens` are those of all its candidates: what the answer
    cost.

    Raises DirectionError when the scorer lacks an attribute that an objective is made of.
    """

    def __init__(self, sampler: Sampler, scorer: Scorer, space: DirectionSpace, candidates: int) -> None:
        if candidates < 1:
            raise ValueError(f"{candidates} candidates")
        space.combine(np.empty((0, len(scorer.attributes))), scorer.attributes)
        self._sampler, self._scorer, self._space, self._candidates = sampler, scorer, space, candidates

    @property
    def revision(self) -> str:
        """Names policy, scorer and how they are used."""
        return stable_hash(type(self).__name__, *self._settings(), self._sampler.revision, self._scorer.revision)

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Sample]]:
        """One Sample per seed of each request; none where the sampler underneath does not give all candidates."""
        asked: list[SampleRequest] = []
        places: list[tuple[int, int]] = []  # (request, seed) of each of `asked`, which holds one candidate or several
        for i, request in enumerate(requests):
            for j, seed in enumerate(request.seeds):
                for direction, seeds in self._ask(request, seed):
                    asked.append(SampleRequest(request.messages, direction, seeds, request.held))
                    places.append((i, j))
        found: dict[tuple[int, int], list[Sample]] = {}
        for place, answers in zip(places, self._sampler.sample(asked), strict=True):
            found.setdefault(place, []).extend(answers)
        whole = {place: answers for place, answers in found.items() if len(answers) == self._candidates}
        chosen = self._choose(requests, whole)
        return [
            [chosen[i, j] for j in range(len(request.seeds))]
            if all((i, j) in chosen for j in range(len(request.seeds)))
            else []
            for i, request in enumerate(requests)
        ]

    def _settings(self) -> tuple[object, ...]:
        return (self._candidates,)

    def _ask(self, request: SampleRequest, seed: int) -> list[tuple[DirectionWeights | None, tuple[int, ...]]]:
        """What is sampled for one answer: directions, and the seeds under each; `candidates` seeds together."""
        return [(request.direction, self._seeds(seed))]

    def _seeds(self, seed: int) -> tuple[int, ...]:
        return (seed, *(seed_of(f"{seed}-{n}") for n in range(1, self._candidates)))

    def _choose(
        self, requests: Sequence[SampleRequest], pools: dict[tuple[int, int], list[Sample]]
    ) -> dict[tuple[int, int], Sample]:
        if not pools:
            return {}
        prompts = [requests[i].messages for i, _ in pools for _ in range(self._candidates)]
        texts = [sample.text for answers in pools.values() for sample in answers]
        scores_NM = self._scorer.score(prompts, texts)
        scores_PNK = self._space.combine(scores_NM, self._scorer.attributes).reshape(
            len(pools), self._candidates, self._space.K
        )
        center = tuple(self._space.center_K.tolist())
        directions_PDK = np.array([[requests[i].direction or center] for i, _ in pools])
        winners_P = select(scores_PNK, directions_PDK)[:, 0]
        held = [requests[i].held for i, _ in pools]
        if any(values is not None for values in held):
            held_PDK = np.array([[values or [None] * self._space.K] for values in held], dtype=np.float64)
            kept_P = select_targets(scores_PNK, directions_PDK, held_PDK)[:, 0]
            winners_P = np.where(np.isfinite(held_PDK[:, 0]).any(axis=1), kept_P, winners_P)
        return {
            place: Sample(
                answers[max(winner, 0)].text,
                sum(sample.tokens for sample in answers),
                answers[max(winner, 0)].finish_reason,
            )
            for (place, answers), winner in zip(pools.items(), winners_P.tolist(), strict=True)
        }


class RobustSampler(BestOfSampler):
    """argmax of v . r(x, y) over answers sampled under the asked direction v and under neighbours of it, one each.

    Robust preference selection (arXiv 2510.20498): a policy answers badly where it was trained little, at the ends of
    its range, and its answers to nearby directions may suit the asked one better. It costs what best-of-n does.
    Published: one answer for each of several directions within an angle of the asked one, the pick by the asked one.
    Ours: the first candidate is made under the asked direction itself, the others under `DirectionSpace.neighbours` at
    most `within` degrees away, as `dpa serve` does. Without a direction, or for a target, this is best-of-n.
    """

    def __init__(
        self, sampler: Sampler, scorer: Scorer, space: DirectionSpace, candidates: int, within: float = 20.0
    ) -> None:
        super().__init__(sampler, scorer, space, candidates)
        self._within = within

    def _settings(self) -> tuple[object, ...]:
        return (self._candidates, self._within)

    def _ask(self, request: SampleRequest, seed: int) -> list[tuple[DirectionWeights | None, tuple[int, ...]]]:
        if request.direction is None or request.held is not None:
            return super()._ask(request, seed)
        seeds = self._seeds(seed)
        near_DK = self._space.neighbours(self._space.direction(request.direction), self._within, self._candidates - 1)
        asked = [request.direction, *map(tuple, near_DK.tolist())]
        return [(near, (own,)) for near, own in zip(asked, seeds, strict=True)]
