"""An estimate in words: the lines, cells and notes that `dpa estimate` prints.
Run its tests: pytest tests/test_estimate.py
"""

from collections.abc import Sequence

from dpa.recipes.costs.stages import Inputs, StageEstimate
from dpa.recipes.costs.work import QUICK, SLOW
from dpa.recipes.estimate import run_needs, run_span

HEADINGS = ("stage", "rows", "tokens", r"time \[quick, slow]", "memory", "disk", "speed from")


def heading(inputs: Inputs) -> str:
    """What the estimate is for."""
    device = inputs.device
    many = f"{inputs.cards} x " if inputs.cards > 1 else ""
    rates = f"{device.peak / 1e12:,.3g} TFLOP/s, {device.bandwidth / 1e9:,.0f} GB/s, {device.memory / 1e9:,.0f} GB"
    lines = [f"on {many}{device.name}: {rates} ({device.source})"]
    lines.append(f"policy: {_amount(inputs.policy.parameters)} parameters, {inputs.policy.source}")
    if inputs.scorer is not None:
        lines[-1] += f"; reward model: {_amount(inputs.scorer.parameters)}, {inputs.scorer.source}"
    return "\n".join(lines)


def cells(stages: Sequence[StageEstimate]) -> list[tuple[str, ...]]:
    """A row a stage, and one for the run, under HEADINGS."""
    rows = [
        (
            stage.name,
            "unknown" if stage.rows is None else f"{stage.rows:,}",
            "unknown" if stage.tokens is None else _amount(stage.tokens),
            span(stage.seconds, stage.low, stage.high),
            f"{_bytes(stage.memory)}{'!' if stage.misfit else ''}",
            _bytes(stage.disk),
            stage.measured or "arithmetic",
        )
        for stage in stages
    ]
    seconds, memory, disk = run_needs(stages)
    total = span(seconds, *run_span(stages)) + (" and more" if any(stage.seconds is None for stage in stages) else "")
    return [*rows, ("the run", "", "", total, _bytes(memory), _bytes(disk), "")]


def notes(stages: Sequence[StageEstimate], inputs: Inputs) -> list[str]:
    """What the table cannot say: what does not fit, what is unknown, what a judge is asked, where figures come from."""
    found = []
    for misfit, names, memory in _alike(stages, "misfit"):
        has = f"needs {_bytes(memory)}; {inputs.device.name} has {_bytes(inputs.device.memory)}"
        found.append(f"! does not fit: {names} ({has}): {misfit}.")
    found += [f"unknown: {names} ({why})." for why, names, _ in _alike(stages, "unknown")]
    device = inputs.device
    if not device.card and 0 < device.mixed_peak < device.peak / 2:
        slower = f"{device.peak / device.mixed_peak:.0f} times slower in bf16 than in fp32"
        found.append(f"! this processor is {slower}: take `bf16: auto` here.")
    calls = [stage.judge for stage in stages if stage.judge is not None]
    if calls:
        asked = sum(one.requests for one in calls)
        reads, writes = sum(one.tokens_in for one in calls), sum(one.tokens_out for one in calls)
        most, why = ("at most ", " (each reply as long as it may be)") if calls[0].longest else ("", "")
        written = f"{most}{_amount(writes)} written{why}"
        found.append(f"the judge: {asked:,} requests, {_amount(reads)} tokens read, {written}.")
    if not all(stage.measured for stage in stages):
        found.append(
            "arithmetic (docs/estimate.md): an answer is as long as a rated response, or half of "
            f"rollout.max_new_tokens; {QUICK.answer:g} of that in the quick case, on a well-filled device, "
            f"{SLOW.answer:g} in the slow one. Run a small iteration and give its folder with --from."
        )
    return found


def span(seconds: float | None, low: float | None, high: float | None) -> str:
    """A likely time and between which it may lie: `7.6 h [6, 13]`."""
    if seconds is None:
        return "unknown"
    unit, size = next(
        (unit, size) for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)) if seconds >= 2 * size or size == 60
    )
    ends = "" if low is None or high is None else f" [{_two(low / size)}, {_two(high / size)}]"
    return f"{_two(seconds / size)} {unit}{ends}"


def _alike(stages: Sequence[StageEstimate], field: str) -> list[tuple[str, str, int]]:
    """Each text of a field, the stages that have it, and the most memory of them."""
    groups: dict[str, list[StageEstimate]] = {}
    for stage in stages:
        if text := getattr(stage, field):
            groups.setdefault(text, []).append(stage)
    return [(text, names(group), max(stage.memory for stage in group)) for text, group in groups.items()]


def names(stages: Sequence[StageEstimate]) -> str:
    """Their names; of many the first and how many more."""
    first = ", ".join(stage.name for stage in stages[:2])
    return first if len(stages) < 3 else f"{first} and {len(stages) - 2} more"


def _two(value: float) -> str:
    """Two digits that mean something."""
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"


def _amount(count: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:,.0f}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 9.5e9 else f"{count / 1e9:.2f} GB"
