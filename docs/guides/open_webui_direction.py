"""
title: Direction
description: More, Default or Less of each objective, for a model served by dpa.
version: 1.0
"""

from typing import Literal

from pydantic import BaseModel, Field

Level = Literal["Less", "Default", "More"]


class Filter:
    """Writes the direction of the valves into the request's `dpa`, unless the chat states one itself."""

    class Valves(BaseModel):
        """Set by an administrator."""

        models: str = Field(default="demo", description="Models to steer: those whose name starts with this.")
        center: str = Field(default="helpfulness", description="The objective that always leads.")
        strength: float = Field(default=0.88, description="What More and Less weigh, the leading objective being 1.")

    class UserValves(BaseModel):
        """Set by each person, in the chat's controls. One field per objective of your model, but the leading one."""

        verbosity: Level = Field(default="Default", description="Length of the answer.")
        warmth: Level = Field(default="Default", description="Kindness of the answer.")

    def __init__(self) -> None:
        self.valves = self.Valves()

    def inlet(self, body: dict, __user__: dict | None = None) -> dict:
        """Called with every request before it is sent."""
        chosen = self.UserValves.model_validate(dict((__user__ or {}).get("valves") or {}))
        leaning = {
            name: self.valves.strength * {"Less": -1.0, "More": 1.0}[level]
            for name, level in chosen.model_dump().items()
            if level != "Default"
        }
        model = str(body.get("model", ""))
        if leaning and "dpa" not in body and ":" not in model and model.startswith(self.valves.models):
            body["dpa"] = {self.valves.center: 1.0, **leaning}
            body["dpa_options"] = {"outside": "clamp"}
        return body
