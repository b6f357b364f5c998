"""Arithmetic: seconds of training, scoring and sampling on a device, under assumptions that are named here.
Run its tests: pytest tests/test_estimate.py

docs/estimate.md derives the constants from figures measured on an H200, and holds them against published runs. P
weights that multiply a token (body, and the head where there is a label), L layers, h width of the model:

    training    L launches a step, and 6 P FLOP a token (4 P with adapters, which leave the rest without gradients; 2 P
                more where activations are computed twice, and for each token a reference reads), each pass taking L
                launches at the least
    scoring     2 P FLOP a token
    sampling    a step of all rows: the largest of L launches, reading the weights once, and 2 P FLOP a row; then each
                row's keys, values and logits are read. Before it each prompt is read once, as scoring would
    shares      of the device's peak that products reach, and of its bandwidth that reading keys and values does: those
                of `Assumptions` times h / (h + 720) on a card, which narrow layers fill badly

Assumptions come three times: what is likely, and a quick and a slow case, all of whose parts are good, or bad, at once.
"""

import math
from dataclasses import dataclass, replace

from dpa.recipes.costs.devices import REACHED_BY_COPIES, REACHED_BY_PRODUCTS, Device
from dpa.recipes.costs.model_sizes import Size
from dpa.recipes.costs.speeds import CardFigures


@dataclass(frozen=True)
class Assumptions:
    """`answer`: factor on the length of an answer: a rated response's where there are rated rows, else half of
    rollout.max_new_tokens. `training`, `scoring`: shares of the peak; `sampling`:
    of the bandwidth. `start`: seconds before a stage is at work. `spread`: what each further card adds to a training.
    `measured`: factor on the time that a ledger's speed gives. `reply`: tokens of a judge's reply for each attribute;
    `asked`: times it is asked for a row."""

    answer: float
    training: float
    scoring: float
    sampling: float
    start: float
    spread: float
    measured: float
    reply: float = 8
    asked: float = 1


LIKELY = Assumptions(answer=1, training=0.4, scoring=0.6, sampling=0.7, start=30, spread=0.9, measured=1)
QUICK = Assumptions(answer=0.6, training=0.55, scoring=0.8, sampling=1, start=10, spread=1, measured=0.85)
SLOW = Assumptions(
    answer=1.6, training=0.22, scoring=0.35, sampling=0.35, start=120, spread=0.7, measured=1.25, asked=2
)

NARROW, LARGE = 720, 1.5e9
"""Width at which a card reaches half of what it does in the widest layers; parameters from which a model is taken for
one like bench/card.py's of 7B."""
TRAINING_LAUNCH, PASS_LAUNCH, DECODING_LAUNCH = 2.4e-3, 0.5e-3, 0.11e-3
"""Seconds a layer takes on a card however little there is to do: of an optimizer step beside its products, of a forward
and backward pass, and of a step of decoding in recorded CUDA graphs."""
COMPILED_LAUNCH = 0.3
"""The part of TRAINING_LAUNCH that is left where layers are compiled; they reach COMPILED_GAIN of the share."""
COMPILED_GAIN = 1.3
WEIGHTS_SHARE = 0.8
"""Share of the bandwidth at which weights are read."""
PROCESSOR_LAUNCH, PROCESSOR_SAMPLING = 1e-3, 0.35
"""The same on a processor, whose products reach what was measured: seconds a layer, and the share while sampling."""
PROCESSOR_BF16 = {"training": 0.6, "scoring": 0.35}
"""Of a processor's rate in bf16, where that is above the one in fp32, what counts: what lies between the products is no
faster (two cores of an Intel Xeon with AMX, docs/estimate.md)."""
PROCESSOR_START = 0.1
"""The part of a stage's start that is left where nothing is brought to a card."""
EXACT_PRODUCTS = 0.1
"""Of a card's bf16 peak what products in fp32 reach: by datasheets 0.06 of an A100's, 0.25 of an A6000's."""
FUNCTION_ROW_S = 1e-3
"""A Python function's seconds for a row; unknown, and hardly ever what a run takes."""


@dataclass(frozen=True)
class Sampling:
    """Sampling of `rows` answers of `answer` tokens (at most `longest`) to `prompts` of `prompt` tokens: `together` are
    decoded at once, in `batches` that each wait for their longest; `copies` of the policy share the work.
    `continuous`: an engine fills a free place at once; `mixed`: in bf16; `exact`: the weights are those of a training,
    in fp32."""

    rows: float
    answer: float
    longest: float
    prompts: float
    prompt: float
    together: float
    batches: float
    copies: float = 1
    continuous: bool = False
    mixed: bool = True
    exact: bool = False

    @property
    def steps(self) -> float:
        """Steps of all rows at once; an engine that fills free places at once waits only for the last of a batch."""
        if self.continuous:
            return self.rows * self.answer / self.together + self.batches * (self.longest - self.answer)
        return self.batches * self.longest


@dataclass(frozen=True)
class Training:
    """Training on `tokens`, a share `labels` of which have one, in `steps` of `passes` each; `reference`: tokens that a
    reference reads."""

    tokens: float
    labels: float
    steps: float
    passes: float
    adapters: bool = False
    recompute: bool = False
    compiled: bool = False
    mixed: bool = True
    reference: float = 0


@dataclass(frozen=True)
class Clock:
    """Seconds of work on `cards` devices."""

    device: Device
    cards: int
    assume: Assumptions
    figures: CardFigures | None = None

    def training(self, size: Size, work: Training) -> float:
        """Of a training without its start."""
        assume = self.assume
        flop = (4 if work.adapters else 6) + (2 if work.recompute else 0)
        weights = size.body + work.labels * size.head
        total = weights * (flop * work.tokens + 2 * work.reference)
        launch = TRAINING_LAUNCH if self.device.card else 3 * PROCESSOR_LAUNCH
        share = self._share("training", size)
        if work.compiled:
            launch, share = launch * COMPILED_LAUNCH, min(1.0, share * COMPILED_GAIN)
        peak = self._peak("training", work.mixed)
        cards = 1 + (self.cards - 1) * assume.spread
        layers = work.steps * size.num_hidden_layers
        products = max(total / (share * peak) / cards, layers * work.passes * PASS_LAUNCH)
        return layers * launch + products

    def scoring(self, size: Size, tokens: float, mixed: bool = False) -> float:
        """Of reading so many tokens without gradients; `mixed`: on a processor in bf16."""
        return 2 * size.body * tokens / (self._share("scoring", size) * self._peak("scoring", mixed))

    def sampling(self, size: Size, work: Sampling) -> float:
        """Of a rollout without its start."""
        device, wide = self.device, 2 if work.mixed and not work.exact else 4
        launch = (DECODING_LAUNCH if device.card else PROCESSOR_LAUNCH) * size.num_hidden_layers
        products = self._share("scoring", size) if device.card else PROCESSOR_SAMPLING
        products *= EXACT_PRODUCTS if device.card and work.exact else 1
        tokens = work.rows * work.answer
        steps = max(work.steps, 1e-9)
        weights = wide * (size.body + size.head) / (WEIGHTS_SHARE * device.bandwidth)
        arithmetic = 2 * (size.body + size.head) * tokens / steps / (products * self._peak("scoring", work.mixed))
        read = wide * size.cache_bytes * (work.prompt + work.answer / 2) + 16 * size.vocab_size
        rows = read * tokens / (self._share("sampling", size) * device.bandwidth)
        prompts = self.scoring(size, work.prompts * work.prompt, work.mixed)
        return (steps * max(launch, weights, arithmetic) + rows + prompts) / work.copies

    def _peak(self, kind: str, mixed: bool) -> float:
        """FLOP/s of products; `mixed`: on a processor what counts of those in bf16 in that kind of work."""
        exact, in_bf16 = self.device.peak, self.device.mixed_peak
        if not mixed or self.device.card:
            return exact
        return max(PROCESSOR_BF16[kind] * in_bf16, min(exact, in_bf16))

    def _share(self, kind: str, size: Size) -> float:
        """Share of peak or bandwidth: assumed, or moved by what bench/card.py measured on a model of like size."""
        share = getattr(self.assume, kind)
        if not self.device.card:
            return min(1.0, share)
        known = {} if self.figures is None else self.figures.shares
        found = known.get((kind, size.parameters > LARGE))
        if found is None:
            return min(1.0, share * size.hidden_size / (size.hidden_size + NARROW))
        reached = REACHED_BY_COPIES if kind == "sampling" else REACHED_BY_PRODUCTS
        return min(1.0, found * reached * share / getattr(LIKELY, kind))


def on_card(device: Device, figures: CardFigures | None) -> Device:
    """The device with the products and copies that bench/card.py measured on it."""
    if figures is None or not {"matrix", "copy"} <= figures.rates.keys():
        return device
    peak, bandwidth = figures.rates["matrix"] / REACHED_BY_PRODUCTS, figures.rates["copy"] / REACHED_BY_COPIES
    return replace(device, peak=peak, bandwidth=bandwidth, card=True, source=f"measured in {figures.folder}")


def passes_of(tokens: float, fitting: float) -> float:
    """Passes that so many tokens of a step are cut into."""
    return max(1.0, math.ceil(tokens / max(fitting, 1.0)))
