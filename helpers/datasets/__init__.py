"""The flights that were to leave New York in 2013, cut by month, by origin airport and by airline.

`load_flights`, `load_weather` and `load_airlines` give the data as it is;
`load_table` gives numbers that are ready for a model, `load_lines` and `load_log` a text that a
model can learn to write (`helpers.datasets.text` has its alphabet and its score). The files lie in
the folder ``data`` beside this package, where ``README.md`` explains every column. The checksum of
a file is verified whenever it is read. Nothing is ever downloaded.

Every function may be called in a notebook and on a Dask worker alike, and gives the same rows in
the same order on every machine.
"""

from helpers.datasets.files import (
    AIRLINES,
    FILES,
    MONTHS,
    ORIGINS,
    DataError,
    data_folder,
    load_airlines,
    load_flights,
    load_growth,
    load_weather,
    verify,
)
from helpers.datasets.tables import TASKS, Table, load_table
from helpers.datasets.text import Log, Score, load_lines, load_log

__all__ = [
    "AIRLINES",
    "FILES",
    "MONTHS",
    "ORIGINS",
    "TASKS",
    "DataError",
    "Log",
    "Score",
    "Table",
    "data_folder",
    "load_airlines",
    "load_flights",
    "load_growth",
    "load_lines",
    "load_log",
    "load_table",
    "load_weather",
    "verify",
]
