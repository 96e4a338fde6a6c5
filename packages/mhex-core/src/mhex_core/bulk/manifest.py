"""The file that says what a run is, and the table of what it could not read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from mhex_core import native
from mhex_core.bulk.job import BulkJob
from mhex_core.bulk.plan import DATA_FOLDER, MANIFEST_FILE, REJECTED_FILE, RunPlan
from mhex_core.bulk.shards import Reject, ShardRecord, full_schema
from mhex_core.files import as_cell, write_atomically

FORMAT = "mhex-bulk"
FORMAT_VERSION = 1


_FIELDS: dict[str, tuple[Any, int | None]] = {
    "program": (str, None),
    "complete": (bool, None),
    "settings": (dict, None),
    "about": (dict, None),
    "versions": (dict, None),
    "shard_size": (int, 1),
    "inputs": (int | None, 1),
    "digest": (str | None, None),
    "rows": (int, 0),
    "rejected": (int, 0),
    "columns": (dict, None),
    "shards": (list, None),
}
"""What a manifest holds: the type of each value, and the least of a number."""


def _named(kinds: Any) -> str:
    return kinds.__name__ if isinstance(kinds, type) else str(kinds)


def _check_about(about: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
    """Raise unless names are texts: pages show them, and commands compare them."""
    names = about.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"about.class_names must be a list of texts, got {str(names)[:40]!r}")
    if not all(isinstance(kind, str) for kind in columns.values()):
        raise ValueError(f"columns must name types, got {str(dict(columns))[:40]!r}")


def versions() -> dict[str, str]:
    """Of what decides a file's last digits, besides the settings."""
    found = {name: metadata.version(name) for name in ("mhex-core", "torch", "pyarrow")}
    return found | {"saliency": native.status().backend}


def read_manifest(out: Path) -> dict[str, Any] | None:
    """What the manifest says, or None if there is none.

    Raises:
        ValueError: The file is something else.
    """
    path = out / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or found["version"] != FORMAT_VERSION:
            raise ValueError(f"format {found['format']!r}, version {found['version']!r}")
        for name, (kinds, least) in _FIELDS.items():
            value = found[name]
            if not isinstance(value, kinds) or isinstance(value, bool) is not (kinds is bool):
                raise ValueError(f"{name} must be {_named(kinds)}, got {str(value)[:40]!r}")
            if least is not None and value is not None and not least <= value < 1 << 53:
                raise ValueError(f"{name} must be at least {least}, got {str(value)[:40]}")
        _check_about(found["about"], found["columns"])
    except KeyError as error:
        raise ValueError(f"{path} is no manifest of such a run ({error} is missing); choose another folder") from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of such a run ({error}); choose another folder") from error
    return dict(found)


def write_manifest(
    job: BulkJob, out: Path, shard_size: int, plan: RunPlan | None, done: Mapping[int, ShardRecord]
) -> None:
    """Write the manifest. Two runs over the same inputs write the same bytes; versions are those at the beginning."""
    before = read_manifest(out)
    records = [done[number] for number in sorted(done)]
    text = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "program": job.program,
        "complete": plan is not None and len(records) == plan.shards(),
        "settings": dict(job.settings),
        "about": dict(job.about),
        "versions": versions() if before is None else before["versions"],
        "shard_size": shard_size,
        "inputs": None if plan is None else plan.inputs,
        "digest": None if plan is None else plan.digest,
        "rows": sum(record.rows for record in records),
        "rejected": sum(record.rejected for record in records),
        "columns": {field.name: str(field.type) for field in full_schema(job.schema)},
        "shards": [
            {
                "file": f"{DATA_FOLDER}/{plan.path(record.number).name}",
                "rows": record.rows,
                "rejected": record.rejected,
                "bytes": record.bytes,
            }
            for record in records
            if plan is not None
        ],
    }
    write_atomically(
        out / MANIFEST_FILE,
        lambda path: path.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"),
    )


def write_rejected(out: Path, rejects: Iterable[Reject]) -> None:
    """Write the table of inputs that could not be read."""

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            table = csv.writer(file)
            table.writerow(["index", "id", "source", "reason"])
            table.writerows(
                [reject.index, *map(as_cell, (reject.id, reject.source, reject.reason))] for reject in rejects
            )

    write_atomically(out / REJECTED_FILE, write)
