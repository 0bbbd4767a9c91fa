"""Faults to plant, as data: what is broken, where, which name is right, and which explanation would be true.

A family's faults are the ``FAULTS`` of the module that has them; whatever module lies here is found.
``python -m align.selftest`` plants each and runs the real pipeline. Nothing here is shared with whatever explains a
divergence.
"""

from importlib import import_module
from pkgutil import iter_modules

from .fault import EXPLANATIONS, GENERIC, Fault, NotPlanted
from .planting import in_config, in_net

MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
FAULTS: tuple[Fault, ...] = tuple(fault for module in MODULES for fault in getattr(module, "FAULTS", ()))

__all__ = ["EXPLANATIONS", "FAULTS", "GENERIC", "Fault", "NotPlanted", "in_config", "in_net"]
