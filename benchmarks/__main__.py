"""Run one benchmark: a table, and a last line of JSON."""

import argparse
import importlib
import sys

from benchmarks import names
from benchmarks.measure import as_json, as_table


def main(arguments=None):
    """Run the benchmark named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="?", help=f"one of: {', '.join(names())}")
    parser.add_argument("--rounds", type=int, help="how often each case is measured")
    options = parser.parse_args(arguments)
    if options.name is None:
        for name in names():
            first = importlib.import_module(f"benchmarks.{name}").__doc__.split("\n")[0]
            print(f"{name:10} {first}")
        return 0
    if options.name not in names():
        known = ", ".join(names())
        print(f"There is no benchmark {options.name!r}: choose one of {known}.", file=sys.stderr)
        return 2
    if options.rounds is not None and options.rounds < 1:
        print(f"--rounds must be 1 or more, not {options.rounds}.", file=sys.stderr)
        return 2
    module = importlib.import_module(f"benchmarks.{options.name}")
    try:
        cases = module.run(options.rounds or module.ROUNDS)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(as_table(cases))
    print(as_json(options.name, cases))
    return 0


if __name__ == "__main__":
    sys.exit(main())
