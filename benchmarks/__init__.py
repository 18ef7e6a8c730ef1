"""Benchmarks of the course: ``python -m benchmarks NAME``; without a name, the names are listed.

Each module here but `measure` is one benchmark: its docstring says what is measured and against
what, and its function ``run(rounds)`` returns the cases.
"""

import pkgutil


def names():
    """The names of all benchmarks, sorted."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(set(modules) - {"__main__", "measure"})
