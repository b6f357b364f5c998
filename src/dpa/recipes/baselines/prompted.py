"""What a user does today for nothing: the start policy, asked in words ("Answer in about 12 words.").

Nothing is trained. A direction becomes the scores to ask for (labels.target_rule, as for Rewards-in-Context), and the
score of the objective `verbosity` the number of words that rated responses with that score have. The policy is told it
in the system message, and once more after the question, where small models heed it best.

Published: nothing; length instructions are what instruct models are trained on.
"""

from dataclasses import replace

import numpy as np

from dpa.core.errors import ConfigError
from dpa.core.records import Message, Messages, SampleRequest
from dpa.models.chat_template import with_sentence
from dpa.recipes.baselines.asking import TranslatingSampler
from dpa.recipes.baselines.lab import Lab, Method, Trained
from dpa.recipes.baselines.labels import target_rule

LENGTH = "verbosity"
"""The objective that measures length."""


def train(lab: Lab) -> list[Trained]:
    """The start policy. Raises ConfigError where no objective is a length."""
    if LENGTH not in lab.space.names:
        raise ConfigError(
            f"prompted: no objective is named `{LENGTH}`, so there is no length to ask for; leave it out."
        )
    place, scores_RK = lab.space.names.index(LENGTH), lab.rated_scores()
    known = np.flatnonzero(np.isfinite(scores_RK[:, place]))
    words_R = np.array([len(text.split()) for text in lab.rated["response"].to_pylist()], dtype=float)[known]
    order = known[np.argsort(scores_RK[known, place])]
    score_R, sorted_words_R = scores_RK[order, place], np.sort(words_R)
    targets = target_rule(scores_RK, lab.space)

    def translate(request: SampleRequest) -> SampleRequest:
        assert request.direction is not None
        target = targets(request.direction)[place]
        words = max(1, round(float(np.interp(target, score_R, sorted_words_R))))
        return replace(request, direction=None, messages=asked_for(request.messages, words))

    return [Trained("prompted", lambda: TranslatingSampler(lab.start_sampler(), translate))]


def asked_for(messages: Messages, words: int) -> Messages:
    """The messages with the wish for a length, in the last turn as well as in the system message."""
    wish = f"Answer in about {words} word{'s' if words > 1 else ''}."
    last: Message = {"role": messages[-1]["role"], "content": f"{messages[-1]['content']}\n\n{wish}"}
    told: Messages = [*messages[:-1], last]
    return with_sentence(told, wish, "system", system_role=True)


METHOD = Method(
    name="prompted",
    title="start policy, told a length",
    color=("#4d6a79", "#9fc3d6"),
    bar=0.0,
    spends_less=True,
    by_default=False,
    train=train,
)
