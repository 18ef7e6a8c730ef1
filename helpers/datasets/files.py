"""The files of the data folder: found, verified, and read as frames.

The checksum of a file is verified whenever it is read. Nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from io import BytesIO
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

MONTHS = tuple(range(1, 13))
ORIGINS = ("EWR", "JFK", "LGA")
# fmt: off
AIRLINES = ("9E", "AA", "AS", "B6", "DL", "EV", "F9", "FL",
            "HA", "MQ", "OO", "UA", "US", "VX", "WN", "YV")
# fmt: on
STUDIES = (
    "batch",
    "compression",
    "distillation",
    "ensembles",
    "few_labels",
    "gossip",
    "gpt",
    "local",
    "multi_task",
    "mutual",
    "pipedream",
    "precision",
    "search",
    "stale",
    "stragglers",
    "vertical",
    "warm_up",
)
FILES = (
    "airlines.parquet",
    "growth/accelerators.csv",
    "growth/models.csv",
    *(f"studies/{name}.csv" for name in STUDIES),
    *(f"{kind}/2013-{month:02d}.parquet" for kind in ("flights", "weather") for month in MONTHS),
)

_HELP = "bring it back with `git checkout -- data`, or make it again with `python data/make.py`"


class DataError(RuntimeError):
    """A data file is missing or is not the one that was published."""


# --- files and checksums -------------------------------------------------------------------------


def data_folder() -> Path:
    """The folder of the data files: ``data``, beside the package ``helpers``."""
    return Path(__file__).resolve().parents[2] / "data"


def verify() -> list[str]:
    """Check every data file against its checksum.

    Returns
    -------
    list of str
        One sentence for each problem; empty when all is well.

    Examples
    --------
    >>> verify()
    []
    """
    problems = []
    for name in FILES:
        try:
            read_verified(data_folder(), name)
        except DataError as error:
            problems.append(str(error))
    # When the list of checksums itself is gone, every file says the same: say it once.
    return list(dict.fromkeys(problems))


def _read_bytes(folder: Path, name: str) -> bytes:
    """The bytes of one file of the data folder."""
    try:
        return (folder / name).read_bytes()
    except FileNotFoundError:
        raise DataError(f"The data file data/{name} is missing: {_HELP}.") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"The data file data/{name} cannot be read ({reason}): {_HELP}.") from None


def read_verified(folder: Path, name: str) -> bytes:
    """The bytes of one data file, which are known to be the published ones."""
    listed = _read_bytes(folder, "SHA256SUMS").decode("utf-8", "replace").split()
    checksum = dict(zip(listed[1::2], listed[0::2], strict=False)).get(name)
    if checksum is None:
        raise DataError(f"The list data/SHA256SUMS has no checksum for {name}: {_HELP}.")
    content = _read_bytes(folder, name)
    if hashlib.sha256(content).hexdigest() != checksum:
        # A whole Parquet file ends with these four letters.
        cut = name.endswith(".parquet") and not content.endswith(b"PAR1")
        what = "is not complete" if cut else "was altered"
        raise DataError(f"The data file data/{name} {what} (wrong checksum): {_HELP}.")
    return content


@lru_cache(maxsize=len(FILES))
def read_frame(folder: Path, name: str) -> pd.DataFrame:
    """One file as a DataFrame with narrow types. It is shared: never change it, never return it.

    All files together take about 30 MB of memory.
    """
    import pyarrow.parquet as pq

    content = BytesIO(read_verified(folder, name))
    # No threads: a worker has one core, and loading must not use those of its neighbours.
    frame = pq.ParquetFile(content).read(use_threads=False).to_pandas(use_threads=False)
    for column, labels in {"origin": ORIGINS, "carrier": AIRLINES}.items():
        if column in frame and frame[column].dtype == "category":
            # Every part gets the same categories, so that parts can be put together.
            frame[column] = frame[column].cat.set_categories(labels)
    return frame


# --- the data as it is ---------------------------------------------------------------------------


def load_flights(month=None, origin=None, airline=None) -> pd.DataFrame:
    """The flights, one row each: all 336,776, or a part.

    Parameters
    ----------
    month : int or sequence of int, optional
        Months of the scheduled departure, 1 to 12. All when not given.
    origin : str or sequence of str, optional
        Airports of departure: ``"EWR"``, ``"JFK"``, ``"LGA"``. All when not given.
    airline : str or sequence of str, optional
        Codes of airlines, such as ``"UA"``; `load_airlines` lists them. All when not given.

    Returns
    -------
    pandas.DataFrame
        18 columns, explained in ``data/README.md``. Rows are in the order of month, day,
        scheduled departure, airline and flight number, whatever order is asked for. The frame is
        the caller's own and may be changed.

    Raises
    ------
    ValueError
        When there is no such month, origin or airline.
    DataError
        When a data file is missing or altered.

    Examples
    --------
    >>> len(load_flights(month=1, origin="JFK"))
    9161
    """
    return _load_months("flights", month, origin, airline)


def load_weather(month=None, origin=None) -> pd.DataFrame:
    """The weather at the three airports of departure, one row for each hour and airport.

    Parameters
    ----------
    month, origin
        As in `load_flights`.

    Returns
    -------
    pandas.DataFrame
        15 columns, explained in ``data/README.md``, in the order of month, day, hour and origin.

    Raises
    ------
    ValueError, DataError
        As in `load_flights`.

    Examples
    --------
    >>> load_weather(month=7, origin="LGA")["temp"].max()
    np.float64(98.96)
    """
    return _load_months("weather", month, origin, None)


def load_airlines() -> pd.DataFrame:
    """The 16 airlines: ``carrier`` (the code) and ``name``.

    Examples
    --------
    >>> load_airlines().set_index("carrier").loc["UA", "name"]
    'United Air Lines Inc.'
    """
    return read_frame(data_folder(), "airlines.parquet").copy()


def load_growth() -> tuple[pd.DataFrame, pd.DataFrame]:
    """How models and accelerators have grown: published figures, each with its source.

    Returns
    -------
    models : pandas.DataFrame
        ``name``, ``published`` (date), ``parameters``, ``active`` (parameters that one token
        meets), ``tokens`` (number of tokens in training), ``source``. What was not published is
        missing.
    accelerators : pandas.DataFrame
        ``name``, ``announced`` (date), ``peak_flops`` (FLOP/s of a matrix product, without
        sparsity), ``precision``, ``memory_bytes``, ``source``.

    Raises
    ------
    DataError
        As in `load_flights`.

    Examples
    --------
    >>> models, accelerators = load_growth()
    >>> len(models), list(accelerators["name"])
    (20, ['GTX 580', 'P100', 'V100', 'A100', 'H100', 'B200'])
    """
    import pandas as pd

    tables = []
    for name, day in (("models", "published"), ("accelerators", "announced")):
        content = BytesIO(read_verified(data_folder(), f"growth/{name}.csv"))
        tables.append(pd.read_csv(content, parse_dates=[day]))
    return tuple(tables)


def chosen(what: str, value, valid: Sequence) -> tuple:
    """The values asked for, each once and in the order of `valid`; all of them for None."""
    if value is None:
        return tuple(valid)
    single = isinstance(value, (str, Integral)) or not isinstance(value, Iterable)
    values = [value] if single else list(value)
    kind = str if isinstance(valid[0], str) else Integral
    wrong = [v for v in values if isinstance(v, bool) or not isinstance(v, kind) or v not in valid]
    if wrong or not values:
        names = "a number from 1 to 12" if kind is Integral else f"one of {', '.join(valid)}"
        given = repr(wrong[0]) if wrong else "an empty list"
        raise ValueError(f"{what} must be {names}, or several of them in a list, not {given}.")
    return tuple(v for v in valid if v in values)


def rows_of(frame: pd.DataFrame, column: str, chosen: tuple, valid: tuple) -> pd.DataFrame:
    """The rows whose `column` is one of the chosen values."""
    return frame if chosen == valid else frame[frame[column].isin(chosen)]


def _wide(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy with 64-bit integers, so that no product of two columns overflows."""
    narrow = frame.select_dtypes("int16").columns
    return frame.astype(dict.fromkeys(narrow, "int64"))


def _load_months(kind: str, month, origin, airline) -> pd.DataFrame:
    """The rows of one kind of file, as the caller's own frame."""
    import pandas as pd

    months = chosen("month", month, MONTHS)
    origins = chosen("origin", origin, ORIGINS)
    airlines = chosen("airline", airline, AIRLINES)
    folder, parts = data_folder(), []
    for number in months:
        part = read_frame(folder, f"{kind}/2013-{number:02d}.parquet")
        part = rows_of(part, "origin", origins, ORIGINS)
        parts.append(part if airline is None else rows_of(part, "carrier", airlines, AIRLINES))
    return _wide(pd.concat(parts, ignore_index=True))
