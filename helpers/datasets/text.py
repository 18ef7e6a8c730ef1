"""The flight log as text: one line a flight, for a small model that reads and writes characters.

Lines such as ``UA1545 EWR IAH 0515 +2 +11`` hold, one space apart,

- the airline and the number of the flight: two characters, then 1 to 9999 without leading zeros;
- the airports from which and to which it flies, three letters each;
- the scheduled departure as hour and minute, 0000 to 2359, in local time;
- the delay of departure and the delay of arrival in whole minutes with a sign: ``-3``, ``+0``,
  ``+11``.

``X`` stands where there is no delay, and ends the line. So ``US1632 EWR LGA 0106 X`` never left (it
was cancelled), and ``UA1228 EWR SAN 1738 +29 X`` left, but no delay of arrival is known (it was
sent to another airport, or its arrival was not recorded).

A token is the place of a character in `ALPHABET`. The end mark is a character too, the line break,
token 0. It ends every line, fills what is left of a row, and stands before the first character: a
line begins where another one has ended.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from helpers.datasets import files
from helpers.datasets.files import AIRLINES, MONTHS, ORIGINS

if TYPE_CHECKING:
    import pandas as pd

END = "\n"
ALPHABET = END + " ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-"
# The longest line has 31 characters, 1234 and +1234 being the longest numbers; one for the end.
LENGTH = 32
NO_DELAY = "X"
IGNORE = -1
# The smallest and the largest of 2013, in minutes.
DEPARTURE_DELAYS = (-43, 1301)
ARRIVAL_DELAYS = (-86, 1272)


# --- lines ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Log:
    """Lines of the flight log as tokens, and the day of each.

    Attributes
    ----------
    codes : numpy.ndarray, shape (n, 32), uint8
        One row a line, as `encode` gives it.
    day : numpy.ndarray, shape (n,), int64
        The day of the year of the scheduled departure, 1 to 365.

    Examples
    --------
    >>> log = load_log(month=1)
    >>> log
    Log of 27,004 flights
    >>> log.test.lines[0]
    'US1030 EWR CLT 0500 -2 -10'
    """

    codes: np.ndarray
    day: np.ndarray

    def __len__(self) -> int:
        return len(self.day)

    def __sizeof__(self) -> int:
        # Dask asks for this before it moves a value or counts a worker's memory.
        return self.codes.nbytes + self.day.nbytes

    def __repr__(self) -> str:
        return f"Log of {len(self):,} flights"

    @property
    def lines(self) -> list[str]:
        """The lines as text."""
        return decode(self.codes)

    @property
    def train(self) -> Log:
        """A copy of the lines to learn from: the days of `Table.train`, four of five."""
        rows = self.day % 5 != 0
        return Log(self.codes[rows], self.day[rows])

    @property
    def test(self) -> Log:
        """A copy of the lines to be tested on: the days of `Table.test`, every fifth, whole."""
        rows = self.day % 5 == 0
        return Log(self.codes[rows], self.day[rows])


def load_lines(month=None) -> list[str]:
    """The flight log, one line a flight: all 336,776, or those of some months.

    Parameters
    ----------
    month : int or sequence of int, optional
        Months of the scheduled departure, 1 to 12. All when not given.

    Returns
    -------
    list of str
        In the order of `load_flights`: month, day, scheduled departure, airline, number.

    Raises
    ------
    ValueError
        When there is no such month.
    DataError
        When a data file is missing or altered.

    Examples
    --------
    >>> load_lines(month=1)[:2]
    ['UA1545 EWR IAH 0515 +2 +11', 'UA1714 LGA IAH 0529 +4 +20']
    """
    folder, months = files.data_folder(), files.chosen("month", month, MONTHS)
    return [line for number in months for line in _lines_of(_flights(folder, number))]


def load_log(month=None, origin=None, airline=None) -> Log:
    """The flight log as tokens, with its days: ready to be cut into training and test.

    Parameters
    ----------
    month, origin, airline
        The part wanted, as in `load_flights`.

    Returns
    -------
    Log
        In the order of `load_flights`. The whole year takes 13.5 MB.

    Raises
    ------
    ValueError
        When there is no such month, origin or airline.
    DataError
        When a data file is missing or altered.

    Examples
    --------
    >>> log = load_log(month=[1, 2], airline="UA")
    >>> log.codes.shape, log.codes.dtype
    ((8983, 32), dtype('uint8'))
    >>> len(log.train), len(log.test)
    (7336, 1647)
    """
    months = files.chosen("month", month, MONTHS)
    origins = files.chosen("origin", origin, ORIGINS)
    airlines = files.chosen("airline", airline, AIRLINES)
    folder, codes, days = files.data_folder(), [], []
    for number in months:
        flights = files.rows_of(_flights(folder, number), "origin", origins, ORIGINS)
        flights = files.rows_of(flights, "carrier", airlines, AIRLINES)
        codes.append(encode(_lines_of(flights)))
        before = date(2013, number, 1).timetuple().tm_yday - 1
        days.append(before + flights["day"].to_numpy().astype(np.int64))
    return Log(np.concatenate(codes), np.concatenate(days))


def _flights(folder: Path, month: int) -> pd.DataFrame:
    """The flights of one month. The frame is shared: never change it."""
    return files.read_frame(folder, f"flights/2013-{month:02d}.parquet")


def _lines_of(flights: pd.DataFrame) -> list[str]:
    """One line for each row of a frame."""
    columns = (
        np.array(AIRLINES)[flights["carrier"].cat.codes].tolist(),
        flights["flight"].tolist(),
        np.array(ORIGINS)[flights["origin"].cat.codes].tolist(),
        flights["dest"].tolist(),
        flights["sched_dep_time"].tolist(),
        _delays(flights),
    )
    return [f"{a}{n} {o} {d} {time:04d} {delays}" for a, n, o, d, time, delays in zip(*columns)]


def _delays(flights: pd.DataFrame) -> list[str]:
    """How each line ends."""
    both = (_signed(flights[name]) for name in ("dep_delay", "arr_delay"))
    return [left if left == NO_DELAY else f"{left} {came}" for left, came in zip(*both)]


def _signed(minutes: pd.Series) -> list[str]:
    """Whole numbers with their signs, and a mark where a number is missing."""
    missing = minutes.isna()
    numbers = minutes.fillna(0).astype(np.int64)
    return [NO_DELAY if gone else f"{n:+d}" for gone, n in zip(missing.tolist(), numbers.tolist())]


# --- tokens --------------------------------------------------------------------------------------

_UNKNOWN = 255
_CHARACTER_OF = np.frombuffer(ALPHABET.encode("ascii"), np.uint8)
_TOKEN_OF = np.full(256, _UNKNOWN, np.uint8)
_TOKEN_OF[_CHARACTER_OF] = np.arange(len(ALPHABET))


def encode(lines, length: int = LENGTH) -> np.ndarray:
    """Lines as tokens: the characters, the end mark, and end marks to the end of the row.

    Parameters
    ----------
    lines : sequence of str
        Lines without the end mark, of at most ``length - 1`` characters of `ALPHABET`.
    length : int
        Tokens of a row.

    Returns
    -------
    numpy.ndarray, shape (n, length), uint8
        Places in `ALPHABET`, 0 to 39.

    Raises
    ------
    ValueError
        When a line is too long or has a character that is not in the alphabet.
    TypeError
        When `lines` is one str, or holds something else than str, or `length` is not whole.

    Examples
    --------
    >>> encode(["AB 01", "Z"], length=8).tolist()
    [[2, 3, 1, 28, 29, 0, 0, 0], [27, 0, 0, 0, 0, 0, 0, 0]]
    """
    lines, length = _listed(lines), operator.index(length)
    # A character outside Latin-1 becomes a question mark, which is outside the alphabet too.
    characters = END.join([*lines, ""]).encode("latin-1", "replace") if lines else b""
    tokens = _TOKEN_OF[np.frombuffer(characters, np.uint8)]
    ends = np.flatnonzero(tokens == 0)
    lengths = np.diff(ends, prepend=-1) - 1
    too_long = length < 1 or lengths.max(initial=0) >= length
    if len(ends) != len(lines) or too_long or (tokens == _UNKNOWN).any():
        raise ValueError(_first_fault(lines, length))
    codes = np.zeros((len(lines), length), np.uint8)
    codes[np.arange(length) < lengths[:, None]] = tokens[tokens != 0]
    return codes


def decode(codes) -> list[str]:
    """The lines that rows of tokens stand for: each row up to its first end mark.

    Parameters
    ----------
    codes : integer array of shape (n, length)
        Tokens, 0 to 39. What stands behind the first end mark of a row is not looked at; a row
        without one is read to its end. `IGNORE` counts as an end mark, so that targets may be
        read too; the tokens of `inputs_and_targets` begin with an end mark: read ``tokens[:, 1:]``.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        When the array has no two axes, or a number is no token.
    TypeError
        When the array does not hold integers.

    Examples
    --------
    >>> decode([[2, 3, 1, 28, 29, 0, 0, 0], [27, 0, 5, 5, 5, 5, 5, 5]])
    ['AB 01', 'Z']
    """
    codes = _tokens(codes)
    # With one more end mark each row has a first one, which is the line break behind it.
    codes = np.pad(codes, ((0, 0), (0, 1)))
    text = _CHARACTER_OF[codes[~_behind_end(codes)]].tobytes().decode("ascii")
    return text.split(END)[:-1]


def inputs_and_targets(codes) -> tuple[np.ndarray, np.ndarray]:
    """What a model is shown of each line, and what it must foretell: the next character.

    Parameters
    ----------
    codes : integer array of shape (n, length)
        Lines as `encode` gives them.

    Returns
    -------
    tokens : numpy.ndarray, shape (n, length), uint8
        The end mark, with which every line begins, and all of the row but its last token.
    targets : numpy.ndarray, shape (n, length), int8
        The row itself: to ``tokens[:, :t + 1]`` the answer is ``targets[:, t]``. Behind the first
        end mark there is nothing to learn; there they are `IGNORE`, -1.

    Raises
    ------
    ValueError, TypeError
        As in `decode`.

    Notes
    -----
    For batches that are the same on any number of ranks, give both arrays to
    `helpers.parallel.training.Batches`. The loss takes ``targets >= 0`` only; lines are of unequal
    length, so the parts of a batch have unequal numbers of targets: divide by that of the whole
    (``counted=gpt.counted``). PyTorch needs both as ``int64``.

    Examples
    --------
    >>> tokens, targets = inputs_and_targets(encode(["AB"], length=5))
    >>> tokens.tolist(), targets.tolist()
    ([[0, 2, 3, 0, 0]], [[2, 3, 0, -1, -1]])
    """
    codes = _tokens(codes)
    tokens = np.zeros_like(codes)
    tokens[:, 1:] = codes[:, :-1]
    targets = codes.astype(np.int8)
    targets[_behind_end(codes)] = IGNORE
    return tokens, targets


def _behind_end(codes: np.ndarray) -> np.ndarray:
    """Where a row has had its first end mark already."""
    behind = np.zeros(codes.shape, bool)
    np.logical_or.accumulate(codes[:, :-1] == 0, axis=1, out=behind[:, 1:])
    return behind


def _tokens(codes) -> np.ndarray:
    """An array that is known to hold tokens, as uint8."""
    codes = np.asarray(codes)
    if codes.dtype.kind not in "iu":
        raise TypeError(f"Tokens are whole numbers: give an integer array, not {codes.dtype}.")
    if codes.ndim != 2 or not codes.shape[1]:
        shape = codes.shape
        raise ValueError(f"Give tokens of shape (lines, length), not {shape}; one row is [row].")
    if codes.size and not (codes.min() >= IGNORE and codes.max() < len(ALPHABET)):
        wrong = codes[(codes < IGNORE) | (codes >= len(ALPHABET))][0]
        raise ValueError(f"{wrong} is no token: they are 0 to {len(ALPHABET) - 1}.")
    return np.where(codes == IGNORE, 0, codes).astype(np.uint8)


def _listed(lines) -> list[str]:
    """The lines as a list that is known to hold nothing but str."""
    if isinstance(lines, str) or not isinstance(lines, Iterable):
        raise TypeError(f"Give a list of lines, for example [{lines!r}], not {lines!r} itself.")
    lines = list(lines)
    for line in lines:
        if not isinstance(line, str):
            raise TypeError(f"A line must be a str, not {type(line).__name__}; decode gives str.")
    return lines


def _first_fault(lines: list[str], length: int) -> str:
    """Why lines cannot be encoded, with the first of them that cannot."""
    for number, line in enumerate(lines):
        if problem := _wrong_character(line):
            return f"Line {number} cannot be encoded: {problem}"
        if len(line) >= length:
            needed = len(line) + 1
            return f"Line {number} and its end mark are {needed} tokens: give length={needed}."
    return f"A row has at least 1 token, for the end mark: length={length} is too short."


def _wrong_character(line: str) -> str | None:
    """One sentence when a character is not in the alphabet, or is the end mark."""
    for character in line:
        if character not in ALPHABET[1:]:
            return f"a line has only capital letters, digits, spaces, + and -, not {character!r}."
    return None


# --- score ---------------------------------------------------------------------------------------

_DELAY = r"\+0|[+-][1-9][0-9]{0,3}|X"
_DELAY_FORM = "whole minutes with a sign, such as +11 or +0, or X for none"
_AIRPORT_FORM = "an airport's three letters, such as EWR"
# The parts of a line: name, regular expression, and what it asks for in words.
_PARTS = tuple(
    (name, re.compile(pattern), form)
    for name, pattern, form in (
        (
            "airline and number",
            "[A-Z0-9]{2}[1-9][0-9]{0,3}",
            "two characters and a number from 1 to 9999, such as UA1545",
        ),
        ("origin", "[A-Z]{3}", _AIRPORT_FORM),
        ("destination", "[A-Z]{3}", _AIRPORT_FORM),
        ("time", "([01][0-9]|2[0-3])[0-5][0-9]", "hour and minute, from 0000 to 2359"),
        ("departure delay", _DELAY, _DELAY_FORM),
        ("arrival delay", _DELAY, _DELAY_FORM),
    )
)


class Score(NamedTuple):
    """How good lines are. Each share is one of all lines, and includes the next.

    Attributes
    ----------
    lines : int
        How many were judged.
    well_formed : float
        Share of lines that have the form of the log: all parts are there, the time exists, and no
        delay is smaller or larger than those of 2013.
    routes : float
        Share of well-formed lines from an airport of New York to one to which it had flights.
    real : float
        Share of well-formed lines whose airline flew from this origin to this destination.
    """

    lines: int
    well_formed: float
    routes: float
    real: float


def score(lines) -> Score:
    """How many of the lines could stand in the flight log.

    Parameters
    ----------
    lines : sequence of str
        For example lines that a model has written.

    Returns
    -------
    Score
        Shares from 0 to 1. A line of the true log always counts as real. That a line counts as
        real does not mean that there was this flight.

    Raises
    ------
    ValueError
        When there is no line.
    TypeError
        When `lines` is one str, or holds something else than str.
    DataError
        When a data file is missing or altered.

    Examples
    --------
    >>> score(["UA1545 EWR IAH 0515 +2 +11", "UA1545 EWR LGA 0515 X", "UA15 EWR LAX 1", "+ Q"])
    Score(lines=4, well_formed=0.5, routes=0.5, real=0.25)
    """
    lines, triples = _listed(lines), routes()
    if not lines:
        raise ValueError("Without lines there is no score: give at least one.")
    pairs = {triple[1:] for triple in triples}
    counts = [0, 0, 0]
    for line in lines:
        if _malformed(line):
            continue
        airline, *pair = _triple(line)
        counts[0] += 1
        counts[1] += tuple(pair) in pairs
        counts[2] += (airline, *pair) in triples
    return Score(len(lines), *(count / len(lines) for count in counts))


def explain(line: str) -> str | None:
    """What is wrong with a line.

    Parameters
    ----------
    line : str

    Returns
    -------
    str or None
        One sentence on the first fault, or None for a line that `score` counts as real.

    Raises
    ------
    TypeError
        When the line is no str.
    DataError
        When a data file is missing or altered.

    Examples
    --------
    >>> explain("UA1545 EWR IAH 2515 +2 +11")
    "The time must be hour and minute, from 0000 to 2359, not '2515'."
    >>> explain("HA1545 EWR IAH 0515 +2 +11")
    'HA did not fly from EWR to IAH in 2013.'
    >>> explain("UA1545 EWR IAH 0515 +2 +11")
    """
    if not isinstance(line, str):
        raise TypeError(f"A line must be a str, not {type(line).__name__}; decode gives str.")
    return _malformed(line) or _unreal(*_triple(line))


def routes() -> frozenset[tuple[str, str, str]]:
    """Who flew where in 2013: the 439 different triples of airline, origin and destination.

    Cancelled flights count. All months are read at the first call.

    Raises
    ------
    DataError
        When a data file is missing or altered.

    Examples
    --------
    >>> ("UA", "EWR", "IAH") in routes(), ("UA", "EWR", "JFK") in routes()
    (True, False)
    """
    return _routes(files.data_folder())


@lru_cache(maxsize=2)
def _routes(folder: Path) -> frozenset[tuple[str, str, str]]:
    """The triples of airline, origin and destination in the files of a folder."""
    found = set()
    for month in MONTHS:
        columns = _flights(folder, month)[["carrier", "origin", "dest"]]
        found.update(columns.drop_duplicates().itertuples(index=False, name=None))
    return frozenset(found)


def _triple(line: str) -> tuple[str, str, str]:
    """Airline, origin and destination of a well-formed line."""
    flight, origin, destination = line.split(" ")[:3]
    return flight[:2], origin, destination


def _malformed(line: str) -> str | None:
    """One sentence when a line has not the form of the log."""
    parts = line.split(" ")
    needed = 5 if parts[4:5] == [NO_DELAY] else 6
    for part, (name, pattern, form) in zip(parts[:needed], _PARTS):
        if not pattern.fullmatch(part):
            wrong = _wrong_character(part)
            reason = f"The {name} must be {form}, not {part!r}."
            return f"The {name} cannot be read: {wrong}" if wrong else reason
    return _wrong_number(parts, needed) or _wrong_delay(parts)


def _wrong_number(parts: list[str], needed: int) -> str | None:
    """One sentence when a line of good parts has too few or too many of them."""
    if len(parts) < needed:
        return f"The {_PARTS[len(parts)][0]} is missing: the line ends too early."
    if len(parts) > needed:
        last = "an X as departure delay" if needed == 5 else "the arrival delay"
        return f"Nothing may follow {last}, not even a space."
    return None


def _wrong_delay(parts: list[str]) -> str | None:
    """One sentence when a delay is outside what occurred in 2013."""
    for place, (least, most) in ((4, DEPARTURE_DELAYS), (5, ARRIVAL_DELAYS)):
        for delay in parts[place : place + 1]:
            if delay != NO_DELAY and not least <= int(delay) <= most:
                name = _PARTS[place][0]
                return f"The {name} must be from {least:+d} to {most:+d} minutes, not {delay}."
    return None


def _unreal(airline: str, origin: str, destination: str) -> str | None:
    """One sentence when no flight of 2013 had these three together."""
    triples = routes()
    if (airline, origin, destination) in triples:
        return None
    if origin not in ORIGINS:
        return f"The flights of the log leave from {', '.join(ORIGINS)}, not from {origin}."
    if not any(triple[1:] == (origin, destination) for triple in triples):
        return f"Nobody flew from {origin} to {destination} in 2013."
    if airline not in AIRLINES:
        return f"There is no airline {airline}: load_airlines() lists all."
    return f"{airline} did not fly from {origin} to {destination} in 2013."
