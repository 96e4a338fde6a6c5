"""A trained text classifier as a bulk run sees it: whose answers these are, told without loading the weights.

Letters: K classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from mhex_core import _checks
from mhex_text.configuration import MHEXTextConfig
from mhex_text.explaining import most_tokens_of, names_in
from mhex_text.loading import load_classifier, load_config, load_tokenizer

# What a classifier and its tokenizer are loaded from; a run's log and history decide nothing.
_DECIDING = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A classifier in a folder, or in a repository on the Hugging Face hub; made by `find_checkpoint`.

    Attributes:
        place: The folder, absolute, or the repository.
        revision: The repository's commit, or None.
        digest: Of the configuration, the weights and the tokenizer; of a repository, its commit.
        class_names: K names.
        blocks: The layers that carry MHEX blocks; none in a classifier without.
        limit: The most tokens of a text, or None.
        own_types: Whether the tokenizer tells segments apart.
    """

    place: str
    revision: str | None
    digest: str
    class_names: tuple[str, ...]
    blocks: tuple[int, ...]
    limit: int | None
    own_types: bool

    def tokenizer(self) -> Any:
        """Load the tokenizer."""
        return load_tokenizer(self.place, **self._where())

    def model(self) -> Any:
        """Load the classifier, in evaluation mode.

        Raises:
            ValueError: Its weights are damaged, or not its own.
        """
        loaded: Any = load_classifier(self.place, **self._where())
        return loaded.eval()

    def target(self, wanted: str | int) -> int:
        """The number of a class, by its name or its number.

        Raises:
            TypeError: It is neither.
            ValueError: There is no such class.
        """
        return _checks.class_number("target", wanted, self.class_names, len(self.class_names))

    def _where(self) -> dict[str, str]:
        return {} if self.revision is None else {"revision": self.revision}


def find_checkpoint(place: str | Path, *, max_length: int | None = None, pairs: bool = False) -> Checkpoint:
    """Look at a checkpoint without loading its weights.

    Args:
        place: A folder, or a name on the Hugging Face hub.
        max_length: The most tokens of a text that is asked for; None means what tokenizer and encoder take.
        pairs: Whether pairs of texts will be read.

    Raises:
        TypeError: An argument is of another type, or the tokenizer does not say where a token lies in its text.
        ValueError: `max_length` leaves no room for a text.
        OSError: There is no such checkpoint.
    """
    if not isinstance(place, str | Path):
        raise TypeError(f"checkpoint must be a folder or a name on the hub, got {type(place).__name__}")
    if max_length is not None:
        _checks.positive_int("max_length", max_length)
    folder = Path(place)
    where = str(place)
    if not folder.is_dir() and isinstance(place, Path):
        raise FileNotFoundError(f"there is no folder {where}")
    if folder.is_dir():
        where = str(folder.resolve())
    config: Any = load_config(where)
    commit = None if folder.is_dir() else extract_commit_hash(cached_file(where, "config.json"), None)
    tokenizer = load_tokenizer(where, **({} if commit is None else {"revision": commit}))
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            "tokenizer must be a fast tokenizer, which says where a token lies in its text, "
            f"got {type(tokenizer).__name__}"
        )
    limit = most_tokens_of(config, tokenizer, max_length)
    least = int(tokenizer.num_special_tokens_to_add(pair=pairs)) + 1 + pairs
    if limit is not None and limit < least:
        raise ValueError(f"max_length must be at least {least}, for the tokens that every text has, got {limit}")
    return Checkpoint(
        place=where,
        revision=commit,
        digest=_digest(folder) if folder.is_dir() else f"{where}@{commit}",
        class_names=names_in(config),
        blocks=tuple(config.block_layers) if isinstance(config, MHEXTextConfig) else (),
        limit=limit,
        own_types="token_type_ids" in tokenizer.model_input_names,
    )


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _DECIDING for path in folder.glob(pattern) if path.is_file()}):
        with path.open("rb") as file:
            inner = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{inner}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
