"""Long experiments over several seeds: their results are stored, and can be made again.

A notebook reads a result with `load_study`. ``python -m helpers.studies`` lists the studies, and
``python -m helpers.studies NAME`` runs one and writes its table to ``data/studies/NAME.csv``. Each
study is a module of this package whose first line says what it tries, with a function
``run(seeds)`` that gives the rows of the table, as dicts, and a tuple ``SEEDS``.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from io import BytesIO, StringIO
from typing import TYPE_CHECKING

from helpers.datasets.files import data_folder, read_verified

if TYPE_CHECKING:
    import pandas as pd


def names() -> list[str]:
    """The names of all studies.

    Examples
    --------
    >>> "local" in names()
    True
    """
    return [found.name for found in pkgutil.iter_modules(__path__) if found.name[0] != "_"]


def load_study(name: str) -> pd.DataFrame:
    """The stored result of a study: one row for each run.

    Parameters
    ----------
    name : str
        One of `names`.

    Returns
    -------
    pandas.DataFrame
        The columns are explained at the top of the study's module, ``helpers/studies/NAME.py``.

    Raises
    ------
    ValueError
        There is no such study.
    helpers.datasets.DataError
        The stored table is missing or altered.

    Examples
    --------
    >>> load_study("local")["every"].min()
    np.int64(1)
    """
    import pandas as pd

    _check_name(name)
    content = read_verified(data_folder(), f"studies/{name}.csv")
    return pd.read_csv(BytesIO(content), comment="#")


def run_study(name: str, seeds=None) -> pd.DataFrame:
    """Run a study now; nothing is stored.

    Parameters
    ----------
    name : str
        One of `names`.
    seeds : sequence of int, optional
        Default: those of the stored result.

    Returns
    -------
    pandas.DataFrame
        As `load_study` gives it.

    Raises
    ------
    ValueError
        There is no such study.
    """
    import pandas as pd
    from threadpoolctl import threadpool_limits

    _check_name(name)
    study = importlib.import_module(f"helpers.studies.{name}")
    with threadpool_limits(1):  # more threads only get into each other's way on small arrays
        table = pd.DataFrame(study.run(study.SEEDS if seeds is None else seeds))
    # As it will be read again: rounded, and with the same types.
    return pd.read_csv(StringIO(_text(name, table)), comment="#")


def store_study(name: str, table: pd.DataFrame) -> str:
    """Write a study's table into the data folder, with its checksum; returns the file's name."""
    _check_name(name)
    folder, file = data_folder(), f"studies/{name}.csv"
    content = _text(name, table).encode()
    (folder / "studies").mkdir(exist_ok=True)
    (folder / file).write_bytes(content)
    sums = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = {line.split()[1]: line.split()[0] for line in sums}
    listed[file] = hashlib.sha256(content).hexdigest()
    lines = [f"{listed[other]}  {other}\n" for other in sorted(listed)]
    (folder / "SHA256SUMS").write_bytes("".join(lines).encode())
    return file


def _text(name: str, table) -> str:
    """The table as a file: first how it is made, then one line a run."""
    body = table.to_csv(index=False, float_format="%.5g", lineterminator="\n")
    return f"# Made by: python -m helpers.studies {name}\n{body}"


def _check_name(name: str) -> None:
    if name not in names():
        raise ValueError(f"There is no study {name!r}: choose one of {', '.join(names())}.")
