"""Flights as numbers: features and targets for the lessons.

Only what is known when the forecast is made is among the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from helpers.datasets import files
from helpers.datasets.files import AIRLINES, MONTHS, ORIGINS

if TYPE_CHECKING:
    import pandas as pd

TASKS = ("arrival delay at take-off", "arrival delay before departure", "late")


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Flights as numbers: what a model may know of each, and what it must foretell.

    Attributes
    ----------
    X : numpy.ndarray, shape (n, d), float64, C order
        One row a flight, one column a feature, all on a similar scale.
    y : numpy.ndarray, shape (n,), float64
        The target: minutes of delay on arrival, or 1 for late and 0 for not late.
    names : list of str
        The names of the d columns of `X`.
    day : numpy.ndarray, shape (n,), int64
        The day of the year of the scheduled departure, 1 to 365.
    origin, airline : numpy.ndarray, shape (n,), str
        The airport of departure and the code of the airline.
    month : numpy.ndarray, shape (n,), int64
        The month, 1 to 12.

    Examples
    --------
    >>> table = load_table("late", month=1)
    >>> table
    Table of 26,398 flights with 36 features
    >>> len(table.select(table.origin == "JFK"))
    9031
    """

    X: np.ndarray
    y: np.ndarray
    names: list[str]
    day: np.ndarray
    origin: np.ndarray
    airline: np.ndarray
    month: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def __sizeof__(self) -> int:
        # Dask asks for this before it moves a value or counts a worker's memory.
        arrays = (self.X, self.y, self.day, self.origin, self.airline, self.month)
        return sum(array.nbytes for array in arrays)

    def __repr__(self) -> str:
        return f"Table of {len(self):,} flights with {len(self.names)} features"

    @property
    def train(self) -> Table:
        """A copy of the rows to learn from: four days of five."""
        return self.select(self.day % 5 != 0)

    @property
    def test(self) -> Table:
        """A copy of the rows to be tested on: every fifth day of the year, as whole days.

        Flights of the same hour share weather and queues. A model that has seen some of them in
        training would look better on the others than it is; so days are not divided.
        """
        return self.select(self.day % 5 == 0)

    def select(self, mask) -> Table:
        """A copy of some rows.

        Parameters
        ----------
        mask : array of bool, shape (n,), or of int
            True for each row wanted, or the numbers of the rows.

        Raises
        ------
        ValueError
            When a mask has another length than the table, or holds neither bool nor int.
        """
        mask = np.asarray(mask)
        if mask.dtype == bool and mask.shape != (len(self),):
            message = f"The mask has shape {mask.shape}; one value is needed for each of the rows"
            raise ValueError(f"{message}, so shape ({len(self)},).")
        if mask.dtype != bool and not np.issubdtype(mask.dtype, np.integer):
            raise ValueError(f"A mask must hold bool or row numbers, not {mask.dtype}.")
        labels = (self.day, self.origin, self.airline, self.month)
        return Table(self.X[mask], self.y[mask], list(self.names), *(v[mask] for v in labels))

    def sample(self, n: int, seed: int) -> Table:
        """A copy of `n` different rows, drawn at random, in random order.

        The same seed gives the same rows on every machine; a smaller sample is the beginning of a
        larger one.

        Raises
        ------
        ValueError
            When `n` is not a whole number from 1 to the number of rows.
        """
        if isinstance(n, bool) or not isinstance(n, Integral) or not 1 <= n <= len(self):
            raise ValueError(f"A sample has 1 to {len(self)} rows of this table, not {n!r}.")
        return self.select(np.random.default_rng(seed).permutation(len(self))[:n])


# Weather: column in the files, name as a feature, value taken when unknown, centre, scale. The
# scale is about one standard deviation of the year. The numbers are fixed: were they computed from
# the rows at hand, a part would get other numbers than the whole.
_WEATHER = (
    ("temp", "temperature", 55.0, 55.0, 18.0),
    ("dewp", "dew point", 41.0, 41.0, 19.0),
    ("humid", "humidity", 60.0, 60.0, 20.0),
    ("wind_speed", "wind speed", 10.0, 10.0, 6.0),
    ("precip", "precipitation", 0.0, 0.0, 1.0),
    ("pressure", "pressure", 1018.0, 1018.0, 7.5),
    ("visib", "visibility", 10.0, 10.0, 2.0),
)
# One category of each kind is left out (Monday, 9E, EWR): with all of them the columns of a kind
# would add up to 1, which is the constant column of a line's intercept once more.
_WEEKDAYS = ("Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FEATURES = (
    "day of year (sine)",
    "day of year (cosine)",
    *_WEEKDAYS,
    "scheduled hour",
    "scheduled minute",
    "distance",
    *(f"airline {code}" for code in AIRLINES[1:]),
    *(f"origin {code}" for code in ORIGINS[1:]),
    *(name for _, name, *_ in _WEATHER),
    "pressure unknown",
)


def load_table(task: str, month=None, origin=None, airline=None) -> Table:
    """Features and target of the flights that arrived (327,346 in all), ready for a model.

    Only what is known when the forecast is made is among the features. The weather is that of the
    scheduled hour at the airport of departure; it stands in for a weather forecast.

    Parameters
    ----------
    task : str
        ``"arrival delay at take-off"``: minutes of delay on arrival, when the departure delay is
        known. ``"arrival delay before departure"``: the same, when it is not known yet.
        ``"late"``: 1 for a flight that arrives more than 15 minutes late, else 0; the departure
        delay is not known.
    month, origin, airline
        The part wanted, as in `load_flights`.

    Returns
    -------
    Table
        36 features (37 with the departure delay). Each is scaled with fixed numbers, so a part
        holds exactly the rows of the whole. `X` of the whole year takes about 95 MB.

    Raises
    ------
    ValueError
        When there is no such task, month, origin or airline.
    DataError
        When a data file is missing or altered.

    Notes
    -----
    The features, in minutes, miles, degrees Fahrenheit, per cent, miles an hour, inches and hPa:

    - sine and cosine of 2 pi day / 365; the weekday, six columns of 0 and 1 (Monday has none);
    - (scheduled hour - 13) / 5; (scheduled minute - 26) / 20; (distance - 1050) / 740;
    - the airline, 15 columns of 0 and 1 (9E has none); the origin, two columns (EWR has none);
    - (temperature - 55) / 18; (dew point - 41) / 19; (humidity - 60) / 20; (wind - 10) / 6;
      log(1 + precipitation / 0.01); (pressure - 1018) / 7.5; (visibility - 10) / 2;
    - 1 where the pressure is unknown, else 0. An unknown value is taken as the number that is
      subtracted here, an unknown precipitation as 0. A wind above 100 miles an hour, which is an
      error of the source, counts as unknown;
    - with the departure delay: (departure delay - 12) / 40.

    Examples
    --------
    >>> table = load_table("arrival delay at take-off", month=[1, 2], airline="UA")
    >>> table.X.shape
    (8747, 37)
    """
    if not isinstance(task, str) or task not in TASKS:
        names = ", ".join(f'"{name}"' for name in TASKS)
        raise ValueError(f"task must be one of {names}, not {task!r}.")
    months = files.chosen("month", month, MONTHS)
    origins = files.chosen("origin", origin, ORIGINS)
    airlines = files.chosen("airline", airline, AIRLINES)
    folder = files.data_folder()
    names = list(_FEATURES) + ["departure delay"] * (task == TASKS[0])
    flights = {m: _arrived(folder, m, origins, airlines) for m in months}
    table = _empty_table(sum(map(len, flights.values())), names)
    start = 0
    for number, part in flights.items():
        weather = files.read_frame(folder, f"weather/2013-{number:02d}.parquet")
        _fill(table, slice(start, start + len(part)), part, weather, number)
        start += len(part)
    if task == "late":
        table.y[:] = table.y > 15
    return table


def _arrived(folder: Path, month: int, origins: tuple, airlines: tuple) -> pd.DataFrame:
    """The chosen flights of one month that arrived: their delay on arrival is known."""
    flights = files.read_frame(folder, f"flights/2013-{month:02d}.parquet")
    flights = files.rows_of(flights, "origin", origins, ORIGINS)
    flights = files.rows_of(flights, "carrier", airlines, AIRLINES)
    return flights[flights["arr_delay"].notna()]


def _empty_table(n: int, names: list[str]) -> Table:
    """A Table of n rows, still to be filled: at no time is there a second copy of X."""
    day, month = np.empty(n, np.int64), np.empty(n, np.int64)
    origin, airline = np.empty(n, np.array(ORIGINS).dtype), np.empty(n, np.array(AIRLINES).dtype)
    return Table(np.empty((n, len(names))), np.empty(n), names, day, origin, airline, month)


def _fill(table: Table, rows: slice, flights, weather, month: int) -> None:
    """Fill the given rows of a table with the flights of one month."""
    first = date(2013, month, 1)
    day = flights["day"].to_numpy().astype(np.int64)
    table.month[rows] = month
    table.day[rows] = first.timetuple().tm_yday - 1 + day
    table.origin[rows] = np.array(ORIGINS)[flights["origin"].cat.codes]
    table.airline[rows] = np.array(AIRLINES)[flights["carrier"].cat.codes]
    table.y[rows] = flights["arr_delay"]
    weekday = (first.weekday() + day - 1) % 7
    columns = _features(flights, weather, table.day[rows], weekday)
    # Column after column straight into X would go through the whole of its memory 37 times.
    table.X[rows] = np.array([columns[name] for name in table.names]).T


def _features(flights, weather, day_of_year, weekday) -> dict[str, np.ndarray]:
    """The columns of X by name; weekday 0 is Monday. Touches nothing that is known only later."""
    season = 2 * np.pi * np.arange(366) / 365
    carrier = flights["carrier"].cat.codes.to_numpy()
    origin = flights["origin"].cat.codes.to_numpy()
    hour, minute = np.divmod(flights["sched_dep_time"].to_numpy(np.int64), 100)
    columns = {
        # Taken from a list of all days, a day has the same sine to the last bit in every part.
        "day of year (sine)": np.sin(season)[day_of_year],
        "day of year (cosine)": np.cos(season)[day_of_year],
        "scheduled hour": (hour - 13) / 5,
        "scheduled minute": (minute - 26) / 20,
        "distance": (flights["distance"].to_numpy(float) - 1050) / 740,
        "departure delay": (flights["dep_delay"].to_numpy(float) - 12) / 40,
    }
    columns |= {name: weekday == i for i, name in enumerate(_WEEKDAYS, start=1)}
    columns |= {f"airline {code}": carrier == i for i, code in enumerate(AIRLINES)}
    columns |= {f"origin {code}": origin == i for i, code in enumerate(ORIGINS)}
    place = (origin, flights["day"].to_numpy(), hour)
    return columns | {name: grid[place] for name, grid in _weather_grids(weather).items()}


def _weather_grids(weather) -> dict[str, np.ndarray]:
    """The weather features of one month by name, each of shape (origin, day, hour): (3, 32, 24)."""
    # One night has the hour from 1 to 2 twice. No flight leaves then; the first is taken.
    weather = weather.drop_duplicates(["origin", "day", "hour"])
    place = (weather["origin"].cat.codes.to_numpy(), weather["day"], weather["hour"])
    grids = {}
    for column, name, unknown, centre, scale in _WEATHER:
        grid = np.full((len(ORIGINS), 32, 24), np.nan)
        grid[place] = weather[column].to_numpy(float)
        if column == "wind_speed":
            grid[grid > 100] = np.nan
        if column == "pressure":
            grids["pressure unknown"] = np.isnan(grid)
        grid[np.isnan(grid)] = unknown
        # Rain has a long tail: its logarithm tells a drizzle from none, and a storm is no giant.
        grids[name] = (np.log1p(grid / 0.01) if column == "precip" else grid - centre) / scale
    return grids
