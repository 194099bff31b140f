"""Which reasoning modes exist. Importing this loads no torch.

A new mode is one file in modes/ and one line here.
"""

import functools
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coconut_serve.reasoning.mode import ReasoningMode

_MODES = {
    "none": "coconut_serve.reasoning.modes.none:NoneMode",
    "cot": "coconut_serve.reasoning.modes.cot:CotMode",
    "latent": "coconut_serve.reasoning.modes.latent:LatentMode",
    "distribution": "coconut_serve.reasoning.modes.distribution:DistributionMode",
    "auto": "coconut_serve.reasoning.modes.auto:AutoMode",
}


def mode_names() -> tuple[str, ...]:
    """Name every mode, in the order users see."""
    return tuple(_MODES)


@functools.cache
def load_mode(name: str) -> "type[ReasoningMode]":
    """Import the class of a mode.

    Raises:
        KeyError: No mode has this name.
    """
    module, _, attribute = _MODES[name].partition(":")
    loaded: type[ReasoningMode] = getattr(importlib.import_module(module), attribute)
    return loaded
