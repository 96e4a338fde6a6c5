"""Images in Parquet files: a column of encoded images, of Hugging Face's Image structs, or of paths."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from mhex_core.bulk.names import repeated
from mhex_vision.bulk.archives import Archives
from mhex_vision.bulk.decoding import decode_bytes, decode_file
from mhex_vision.bulk.listing import Entry, Found, KeptOpen
from mhex_vision.data.preprocessing import UnreadableImageError

ENDING = ".parquet"
COLUMN_NAMES = ("image", "img", "bytes", "image_bytes", "jpg", "jpeg", "png", "webp", "picture", "image_path", "path")

_ROWS = 64  # decoded at once: bounds memory where a row group is gigabytes
_BUFFER = 1 << 20  # bytes read at once, for the same reason
_ERRORS = (pa.ArrowException, OSError, ValueError)


@dataclass(frozen=True)
class ParquetImages:
    """The rows of Parquet files that have a column of images.

    Attributes:
        archives: The files.
        image_column: The column; None finds one by its name, the first of `COLUMN_NAMES`.
        id_column: A column of texts or integers that names the rows. None names them "file.parquet/12", and so does a
            row without a value; where a value occurs again, that is added to it.
    """

    archives: Archives
    image_column: str | None = None
    id_column: str | None = None

    @property
    def description(self) -> str:
        """What it is."""
        return f"the images in Parquet files, {self.archives.place}"

    @property
    def reading(self) -> Mapping[str, str | None]:
        """How its entries are read again."""
        return {"kind": "parquet", "image_column": self.image_column}

    def listed(self) -> Iterator[Entry]:
        """The rows, file by file."""
        suspects = set() if self.id_column is None else repeated(self._ids())
        met: set[str] = set()
        for found in self.archives.files():
            try:
                yield from self._rows(found, suspects, met)
            except _ERRORS as error:
                yield Entry(found.name, found.path, problem=_one_line(error))

    def reader(self) -> ParquetReader:
        """A reader of them."""
        return ParquetReader(self.image_column)

    def _rows(self, found: Found, suspects: set[int], met: set[str]) -> Iterator[Entry]:
        if found.problem is not None:
            raise ValueError(found.problem)
        with parquet.ParquetFile(found.path) as file:
            _image_column(file.schema_arrow, self.image_column)
            if self.id_column is None:
                for row in range(file.metadata.num_rows):
                    yield Entry(f"{found.name}/{row}", found.path, row)
                return
            for row, value in enumerate(self._values(file)):
                name = f"{found.name}/{row}"
                if value is not None:
                    name = f"{value} ({name})" if value in met else value
                    if hash(value) in suspects:
                        met.add(value)
                yield Entry(name, found.path, row)

    def _ids(self) -> Iterator[str]:
        for found in self.archives.files():
            try:
                with parquet.ParquetFile(found.path) as file:
                    yield from (value for value in self._values(file) if value is not None)
            except _ERRORS:
                continue  # listing it says what is wrong

    def _values(self, file: parquet.ParquetFile) -> Iterator[str | None]:
        column = self.id_column
        schema = file.schema_arrow
        if column not in schema.names:
            raise ValueError(f"has no column {column} for names, only {', '.join(schema.names)}")
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            raise ValueError(f"column {column} must hold texts or integers to be names, got {kind}")
        for batch in file.iter_batches(columns=[column], use_threads=False):
            for value in batch.column(0).to_pylist():
                yield None if value is None else str(value)


class ParquetReader:
    """Reads rows of Parquet files. It keeps the last file open, and the rows around the last one in memory.

    Args:
        column: The column of images; None finds it by its name.
    """

    def __init__(self, column: str | None) -> None:
        self._column = column
        self._files: KeptOpen[_Rows] = KeptOpen(_Rows)

    def __call__(self, source: str, place: int, length: int) -> Image.Image:  # noqa: ARG002 - a row is not measured
        """Read a row."""
        try:
            value = self._files(source).at(place, self._column)
        except _ERRORS as error:
            raise UnreadableImageError(_one_line(error)) from error
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise UnreadableImageError("the image is missing (null)")
        if isinstance(value, str):
            return decode_file(os.path.join(os.path.dirname(source), value))  # noqa: PTH118, PTH120
        return decode_bytes(value)

    def close(self) -> None:
        """Close the file."""
        self._files.close()


class _Rows:
    """A Parquet file, read forward: a row behind the last one is the cheapest to get."""

    def __init__(self, path: str) -> None:
        self._file = parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
        counts = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._starts = list(accumulate(counts, initial=0))
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._first = 0  # row of the file that the batch begins with
        self._failed: dict[int, tuple[int, str]] = {}  # row group -> first row that cannot be read, and why

    def at(self, row: int, column: str | None) -> Any:
        group = bisect_right(self._starts, row) - 1
        if group >= len(self._starts) - 1:
            raise ValueError("the Parquet file is shorter than when it was listed")
        failed = self._failed.get(group)
        if failed is not None and row >= failed[0]:
            raise ValueError(failed[1])
        if group != self._group or self._batch is None or row < self._first:
            self._begin(group, _image_column(self._file.schema_arrow, column))
        while row >= self._first + self._held:
            self._first += self._held
            try:
                self._batch = next(self._batches, None)
            except _ERRORS as error:
                self._batch = None
                self._failed[group] = self._first, _one_line(error)
                raise
            if self._batch is None:
                raise ValueError("the row group ends early")
        assert self._batch is not None  # noqa: S101 - for the type checker
        return self._batch.column(0)[row - self._first].as_py()

    @property
    def _held(self) -> int:
        return 0 if self._batch is None else self._batch.num_rows

    def _begin(self, group: int, column: str) -> None:
        self._group, self._first, self._batch = group, self._starts[group], None
        self._batches = self._file.iter_batches(
            batch_size=_ROWS, row_groups=[group], columns=[column], use_threads=False
        )

    def close(self) -> None:
        self._batches, self._batch = iter(()), None
        self._file.close()


def _image_column(schema: pa.Schema, asked: str | None) -> str:
    """The column of images.

    Raises:
        ValueError: There is none.
    """
    if asked is not None:
        if asked not in schema.names:
            raise ValueError(f"has no column {asked}, only {', '.join(schema.names)}")
        if not _holds_images(schema.field(asked).type):
            raise ValueError(
                f"column {asked} must hold encoded images, structs of bytes and path, or paths, got "
                f"{schema.field(asked).type}"
            )
        return asked
    lower = {name.lower(): name for name in reversed(schema.names) if _holds_images(schema.field(name).type)}
    for name in COLUMN_NAMES:
        if name in lower:
            return str(lower[name])
    raise ValueError(f"has no column of images, only {', '.join(schema.names)}; name it with image_column")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        return "bytes" in fields and _is_bytes(fields["bytes"])
    return _is_bytes(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
