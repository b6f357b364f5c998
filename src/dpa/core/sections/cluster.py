"""`cluster`: where the work runs.
Run its tests: pytest tests/test_config.py tests/test_ray.py
"""

from typing import Literal

from pydantic import Field

from dpa.core.sections.section import PathText, Section


class ClusterConfig(Section):
    """Where the work runs. Results do not depend on it, beyond the rounding of other devices or batch shares."""

    engine: Literal["local", "ray"] = Field(
        "local", description="Who runs rollout.workers and scorers: this machine, or a Ray cluster (`dpa[ray]`)."
    )
    address: str | None = Field(
        None, description="Ray cluster: `auto` (the one this machine is in) or HOST:PORT. Default: one of this machine."
    )
    cpus_per_worker: float = Field(1, ge=0, description="CPUs Ray sets aside for each worker; torch uses as many.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs Ray sets aside for each worker.")
    start_timeout_s: float = Field(
        300, gt=0, description="Give up when the Ray cluster has had no working worker for this long, in seconds."
    )
    scorers: int = Field(1, ge=1, description="Scoring workers of the Ray engine.")
    processes: int = Field(
        1, ge=1, description="Training processes on this machine, through `accelerate launch`; 1: no launch."
    )
    accelerate: PathText | None = Field(
        None, description="Configuration of `accelerate launch` (recipes/accelerate/*.yaml); implies a launch."
    )
