"""Every rated response is trained on as it is, good or bad; no direction is known.

max sum log pi(y | x) over all rated rows, as many passes as the budget allows.

Published: nothing; a toy, the whole of what a new method needs beside its line in recipes/baselines/methods.py.
"""

from dpa.recipes.baselines.lab import Lab, Method, Trained, unstated


def train(lab: Lab) -> list[Trained]:
    """One policy, one point."""
    return [lab.as_point("all rows", lab.finetune(0, lab.config.policy, unstated(lab.rated), lab.budget))]


METHOD = Method(name="toy", title="a toy", color=("#123456", "#abcdef"), point=True, bar=50.0, train=train)
