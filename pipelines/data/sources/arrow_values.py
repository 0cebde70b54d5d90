"""Values of Arrow tables as JSON values.

A value that JSON does not have, such as a timestamp, becomes `{"unsupported type": "date32[day]"}`:
how it was written is not known. It is refused where it is used as text, and does not matter in a
column that is not used.
"""

import json
from collections.abc import Callable, Iterator
from math import isfinite
from typing import Any

import pyarrow
from pyarrow import types

UNSUPPORTED = "unsupported type"
Convert = Callable[[Any], Any]


def rows_of(batch: pyarrow.RecordBatch | pyarrow.Table) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch as JSON values.

    Args:
        batch: of at most a few thousand rows, all of which are converted at once.

    Raises:
        ValueError: two columns have the same name.
    """
    schema = batch.schema
    converters = {field.name: converter(field.type) for field in schema}
    if len(converters) < len(schema):
        raise ValueError("two columns have the same name")
    columns = dict[str, list[Any]]()
    for field, column in zip(schema, batch.columns, strict=True):
        convert = converters[field.name]
        columns[field.name] = [convert(value) for value in _python_values(column)]
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def converter(kind: pyarrow.DataType) -> Convert:
    """Return the function that converts the Python value of an Arrow type."""
    if isinstance(kind, pyarrow.BaseExtensionType):
        is_json = kind.extension_name == "arrow.json"
        return _optional(json.loads) if is_json else converter(kind.storage_type)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return converter(kind.value_type)
    if types.is_floating(kind):
        return _optional(_number)
    if _is_plain(kind):
        return _unchanged
    if types.is_struct(kind):
        return _struct(kind)
    if _is_list(kind):
        element = converter(kind.value_type)
        return _optional(lambda values: [element(value) for value in values])
    return _optional(lambda _: {UNSUPPORTED: str(kind)})


def _python_values(column: pyarrow.Array | pyarrow.ChunkedArray) -> list[Any]:
    if not isinstance(column.type, pyarrow.BaseExtensionType):
        return list(column.to_pylist())
    chunks = column.chunks if isinstance(column, pyarrow.ChunkedArray) else [column]
    values = list[Any]()
    for chunk in chunks:
        values += chunk.storage.to_pylist()
    return values


def _struct(kind: pyarrow.DataType) -> Convert:
    """Convert a struct; drop fields without a value, which Arrow adds from other rows."""
    fields = {field.name: converter(field.type) for field in kind}

    def convert(values: dict[str, Any]) -> dict[str, Any]:
        return {name: fields[name](value) for name, value in values.items() if value is not None}

    return _optional(convert)


def _is_plain(kind: pyarrow.DataType) -> bool:
    checks = (
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_integer,
        types.is_boolean,
        types.is_null,
    )
    return any(check(kind) for check in checks)


def _is_list(kind: pyarrow.DataType) -> bool:
    checks = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(check(kind) for check in checks)


def _optional(convert: Convert) -> Convert:
    return lambda value: None if value is None else convert(value)


def _unchanged(value: Any) -> Any:
    return value


def _number(value: float) -> Any:
    """Return a floating-point number; JSON has no NaN and no infinities."""
    return value if isfinite(value) else {UNSUPPORTED: str(value)}
