"""The columns of a bulk run over texts.

Letters: B batch, T tokens, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mhex_core.bulk.job import OWN_COLUMNS
from mhex_text.bulk.reading import Tokenized

_WHERE = (
    pa.field("start", pa.int32(), nullable=False),
    pa.field("end", pa.int32(), nullable=False),
    pa.field("part", pa.int8(), nullable=False),
    pa.field("word", pa.int32(), nullable=False),
    pa.field("score", pa.float32(), nullable=False),
)


def schema(*, pairs: bool, keep_text: bool) -> pa.Schema:
    """The columns after those that every bulk run has.

    - `text`, of pairs also `pair`: as they were read. Left out without `keep_text`.
    - `prediction`, `probability`: the predicted class and its probability; `target`, `target_probability`: the same of
      the class explained; `probabilities`: of all K classes.
    - `truncated`: how many characters the model did not read because the text was cut.
    - `tokens`: those that stand for something in the text: `text` (left out without `keep_text`), `start` and `end`
      (characters), `part` (0, or 1 for the second of a pair), `word` (its number; below 0 for none) and `score`, as in
      `mhex_text.Token`. What a model computes as no number stays NaN.

    Args:
        pairs: Whether the texts are pairs.
        keep_text: Whether the texts themselves are written.
    """
    token = (pa.field("text", pa.string(), nullable=False), *_WHERE) if keep_text else _WHERE
    fields = [pa.field(name, pa.string(), nullable=False) for name in ("text", "pair")[: (1 + pairs) * keep_text]]
    fields += [
        pa.field("prediction", pa.string(), nullable=False),
        pa.field("probability", pa.float32(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("target_probability", pa.float32(), nullable=False),
        pa.field("probabilities", pa.list_(pa.float32()), nullable=False),
        pa.field("truncated", pa.int32(), nullable=False),
        pa.field("tokens", pa.list_(pa.struct(token)), nullable=False),
    ]
    features = {field.name: _feature(field.type) for field in (*OWN_COLUMNS, *fields)}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def rows(
    values: Sequence[Tokenized],
    *,
    schema: pa.Schema,
    class_names: Sequence[str],
    probabilities: npt.NDArray[np.float32],
    targets: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
) -> pa.RecordBatch:
    """What a model said of a batch.

    Args:
        values: B texts.
        schema: As `schema` gives it.
        class_names: K names.
        probabilities: (B, K).
        targets: (B,), the classes explained.
        scores: (B, T); a text's own tokens come first.
    """
    batch, classes = probabilities.shape
    every = np.arange(batch)
    predicted = probabilities.argmax(axis=1)
    names = np.array(class_names, dtype=object)
    made: dict[str, Any] = {
        "prediction": pa.array(names[predicted], pa.string()),
        "probability": pa.array(probabilities[every, predicted], pa.float32()),
        "target": pa.array(names[targets], pa.string()),
        "target_probability": pa.array(probabilities[every, targets], pa.float32()),
        "probabilities": pa.ListArray.from_arrays(
            pa.array(np.arange(0, batch * classes + 1, classes, dtype=np.int32)),
            pa.array(np.ascontiguousarray(probabilities).reshape(-1), pa.float32()),
        ),
        "truncated": pa.array([value.truncated for value in values], pa.int32()),
        "tokens": _tokens(values, scores, schema.field("tokens").type),
    }
    if "text" in schema.names:
        made["text"] = pa.array([value.texts[0] for value in values], pa.string())
    if "pair" in schema.names:
        made["pair"] = pa.array([value.texts[1] for value in values], pa.string())
    return pa.RecordBatch.from_arrays([made[name] for name in schema.names], schema=schema)


def _tokens(values: Sequence[Tokenized], scores: npt.NDArray[np.float32], kind: pa.DataType) -> pa.Array:
    offsets, parts, texts = [0], [], []
    fields = list(kind.value_type)
    for value, row in zip(values, scores, strict=True):
        kept = np.flatnonzero(value.tokens[4] >= 0)
        _, _, start, end, part, word = value.tokens[:, kept]
        # A token without a word is a word of its own; numbers below zero are not the tokenizer's.
        parts.append((start, end, part, np.where(word < 0, -1 - kept, word), row[kept]))
        offsets.append(offsets[-1] + len(kept))
        if len(fields) > len(_WHERE):
            spans = zip(start.tolist(), end.tolist(), part.tolist(), strict=True)
            texts += [value.texts[which][low:high] for low, high, which in spans]
    columns: list[Any] = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if len(fields) > len(_WHERE):
        columns = [texts, *columns]
    arrays = [
        pa.array(column if isinstance(column, list) else column.astype(field.type.to_pandas_dtype()), field.type)
        for column, field in zip(columns, fields, strict=True)
    ]
    structs = pa.StructArray.from_arrays(arrays, fields=fields)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs)


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """What the library `datasets` calls a type."""
    if pa.types.is_list(kind):
        inner = kind.value_type
        fields = {field.name: _feature(field.type) for field in inner} if pa.types.is_struct(inner) else _feature(inner)
        return {"feature": fields, "_type": "List"}
    names = {pa.float32(): "float32", pa.string(): "string"}
    return {"dtype": names.get(kind, str(kind)), "_type": "Value"}
