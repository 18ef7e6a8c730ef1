"""Run one of the long experiments and store its table; without a name, list them."""

import argparse
import importlib
import sys

from helpers.studies import names, run_study, store_study


def main(arguments=None) -> int:
    """Run the study named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m helpers.studies", description=__doc__)
    parser.add_argument("name", nargs="?", help=f"one of: {', '.join(names())}")
    name = parser.parse_args(arguments).name
    if name is None:
        for each in names():
            first = importlib.import_module(f"helpers.studies.{each}").__doc__.split("\n")[0]
            print(f"{each:12} {first}")
        return 0
    try:
        file = store_study(name, run_study(name))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"written: data/{file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
