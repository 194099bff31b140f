"""The runs to compare: modes, sweeps over a setting, and controls."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from coconut_serve.errors import StartupError

# Setting of a sweep -> the modes that use it.
_SWEPT = {"steps": ("latent", "distribution"), "top_k": ("distribution",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row of the report."""

    mode: str
    settings: dict[str, Any] = field(default_factory=dict)  # the request's `reasoning`
    label: str = ""

    @property
    def name(self) -> str:
        """The run's name in the report."""
        return self.label or self.mode


def plan_runs(modes: Iterable[str], sweeps: Iterable[str], *, has_controls: bool) -> list[Run]:
    """List the runs: each mode with its defaults, the values of each sweep, the controls.

    Args:
        modes: Modes to run.
        sweeps: `steps=0,1,2` or `top_k=1,5,full`, as in --sweep.
        has_controls: Add latents removed (steps 0) and replaced by one constant vector.

    Raises:
        StartupError: A sweep is malformed, or no mode takes its setting.
    """
    modes = list(modes)
    runs = [Run(mode=mode) for mode in modes]
    for sweep in sweeps:
        name, _, values = sweep.partition("=")
        if name not in _SWEPT or not values:
            known = ", ".join(f"{key}=..." for key in _SWEPT)
            raise StartupError(f"--sweep {sweep!r} is none of {known}", param="--sweep")
        swept = [mode for mode in _SWEPT[name] if mode in modes]
        if not swept:
            raise StartupError(
                f"--sweep {name} needs one of the modes {', '.join(_SWEPT[name])}", param="--sweep"
            )
        for mode in swept:
            runs += [_swept(mode, name, value.strip()) for value in values.split(",")]
    if has_controls and "latent" in modes:
        removed, constant = {"steps": 0}, {"source": "constant"}
        runs.append(Run(mode="latent", settings=removed, label="latent, removed"))
        runs.append(Run(mode="latent", settings=constant, label="latent, constant"))
    return runs


def _swept(mode: str, name: str, value: str) -> Run:
    label = f"{mode}, {name}={value}"
    if name == "top_k" and value == "full":
        return Run(mode=mode, settings={"mixture": {"kind": "full"}}, label=label)
    if not value.isdecimal():
        raise StartupError(f"--sweep {name}: {value!r} is no count", param="--sweep")
    number = int(value)
    settings: dict[str, Any] = {name: number} if name == "steps" else {"mixture": {name: number}}
    return Run(mode=mode, settings=settings, label=label)
