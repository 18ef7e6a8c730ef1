"""Models that learn together: each module is one idea, and is loaded when it is first used."""

import importlib
import pkgutil

__all__ = sorted(module.name for module in pkgutil.iter_modules(__path__))


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"helpers.learning has no {name!r}: choose {', '.join(__all__)}.")
    return importlib.import_module(f"{__name__}.{name}")
