"""A `TokenTable` to and from one Parquet file, so that its numbers can be cut anew without a model.

Public schema, version 1 (in the file's metadata as `opdkit_tokens_version`): one line a token; `row`, `index` and
`length` int32, every other column a quantity of `measure/overlap.py`, double, NaN where it is not defined. The metadata
`opdkit_tokens` is a JSON object: what was compared, and of every row its problem, sample and reward.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from opdkit.errors import UserError
from opdkit.measure.overlap import TokenTable
from opdkit.run.folder import atomic_path

VERSION = b"1"
_VERSION_KEY, _ABOUT_KEY = b"opdkit_tokens_version", b"opdkit_tokens"
_PLACES = {"row": "row_N", "index": "index_N", "length": "length_N"}


def save_tokens(path: Path, table: TokenTable, about: Mapping[str, Any]) -> None:
    """The whole file or no change."""
    columns = {name: pa.array(getattr(table, field).astype(np.int32)) for name, field in _PLACES.items()}
    columns |= {name: pa.array(values_N) for name, values_N in table.columns.items()}
    metadata = {_VERSION_KEY: VERSION, _ABOUT_KEY: json.dumps(about).encode()}
    with atomic_path(path) as unfinished:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), unfinished, compression="zstd")


def is_token_table(path: Path) -> bool:
    """Whether the file is one of these. Raises UserError if it is no complete Parquet file."""
    return _VERSION_KEY in (_schema(path).metadata or {})


def load_tokens(path: Path) -> tuple[TokenTable, dict[str, Any]]:
    """The table, and what it says it compared. Raises UserError for another file or version."""
    metadata = _schema(path).metadata or {}
    if metadata.get(_VERSION_KEY) != VERSION:
        raise UserError(f"{path} is no token table that this opdkit reads; make it anew with opdkit analyse overlap")
    data = pq.read_table(path)
    columns = {name: data.column(name).to_numpy() for name in data.column_names}
    places = {field: columns.pop(name).astype(np.int64) for name, field in _PLACES.items()}
    return TokenTable(columns=columns, **places), dict(json.loads(metadata[_ABOUT_KEY]))


def _schema(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (pa.ArrowException, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a complete Parquet file ({words}): it was cut short or changed") from None
