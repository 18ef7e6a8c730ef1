"""Studies that are run again: once for all tests that look at one, since some take minutes."""

from functools import cache

from helpers.studies import run_study

made_again = cache(run_study)
