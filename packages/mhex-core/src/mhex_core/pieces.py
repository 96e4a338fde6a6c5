"""The folder of a comparison: pieces of work that are done, and whose they are.

A comparison is cut into pieces of one method and one batch. A finished piece is a file; whoever repeats the call goes
on with the pieces that are missing, and whoever asks for another comparison is refused.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mhex_core.files import remove_partials, write_atomically
from mhex_core.weights import weights_digest

SETTINGS_FILE = "comparison.json"
SAMPLES_FILE = "samples.parquet"
PIECES_FOLDER = "pieces"


@dataclass(frozen=True)
class Pieces:
    """The files of one comparison. Make one with `claim`.

    Attributes:
        folder: Where they are.
    """

    folder: Path

    @classmethod
    def claim(cls, folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Pieces:
        """Make the folder this comparison's, or find out that it is already, or refuse.

        Args:
            folder: The folder; it is made where there is none.
            settings: What tells this comparison from others, as JSON can hold it. A `note` may change.
            overwrite: Whether another comparison's files may be replaced.

        Raises:
            ValueError: The folder holds another comparison, or something else.
        """
        pieces = cls(folder)
        path = folder / SETTINGS_FILE
        wanted = json.loads(json.dumps(settings))
        remove_partials(folder, (SETTINGS_FILE, SAMPLES_FILE))
        if overwrite:
            for file in (path, pieces.samples):
                file.unlink(missing_ok=True)
            pieces.clear()
        if path.is_file():
            try:
                past = json.loads(path.read_text(encoding="utf-8"))
                # A note says where the networks lay, which may change; what they are is in their checksums.
                known = (wanted.keys() | past.keys()) - {"note"}
                differing = sorted(key for key in known if past.get(key) != wanted.get(key))
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path} is damaged or something else; choose another folder") from error
            if differing:
                raise ValueError(
                    f"{folder} holds another comparison (it differs in {', '.join(differing)}); choose another "
                    "folder, or allow to overwrite it"
                )
            return pieces
        if pieces.samples.exists():
            raise ValueError(f"{folder} holds a {SAMPLES_FILE} of something else; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(wanted, indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return pieces

    @property
    def samples(self) -> Path:
        """The file of all samples, there once every piece is done."""
        return self.folder / SAMPLES_FILE

    def path(self, method: str, number: int) -> Path:
        """The file of one piece: batch `number` of a method, whose name may hold anything."""
        plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", method)
        return self.folder / PIECES_FOLDER / f"{plain}-{zlib.crc32(method.encode()):08x}" / f"{number:06d}.parquet"

    def clear(self) -> None:
        """Remove all pieces."""
        shutil.rmtree(self.folder / PIECES_FOLDER, ignore_errors=True)


def weights_checksum(network: nn.Module) -> str:
    """Enough to notice that a call is repeated with other weights: 16 hexadecimal digits."""
    return weights_digest(network.state_dict())[:16]


def judged_by_itself(model: Mapping[str, Any], judge: Mapping[str, Any], *, self_judged: bool) -> bool:
    """Whether a network and the one that judges it are the same, by the checksums of their weights.

    Args:
        model: What is known of the network that is explained, `weights` among it.
        judge: The same of the judge.
        self_judged: Whether that is meant.

    Raises:
        ValueError: They are, and it is not meant.
    """
    same = bool(model["weights"] == judge["weights"])
    if same and not self_judged:
        raise ValueError(
            "judge must be another network than the one explained, trained independently, got the same weights; "
            "a network that judges itself finds its own explanations good (if it is meant, say self_judged)"
        )
    return same
