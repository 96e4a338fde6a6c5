"""A classifier on disk: config.json and model.safetensors in one folder. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mhex_core.files import write_atomically
from mhex_vision.config import MHEXConfig

if TYPE_CHECKING:
    from mhex_vision.classifier import MHEXClassifier
    from mhex_vision.plain import PlainClassifier

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}

    def write_whole(temporary: Path) -> None:
        mode = temporary.stat().st_mode
        save_file(whole, temporary, metadata=dict(metadata or {}))
        temporary.chmod(mode)  # safetensors puts a file there that nobody else may read

    write_atomically(path, write_whole)


def write(model: MHEXClassifier | PlainClassifier, folder: Path) -> None:
    """Write configuration and weights; both are complete before either replaces an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    text = model.config.to_json()

    def write_both(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        write_tensors(folder / WEIGHTS_FILE, model.state_dict())

    write_atomically(folder / CONFIG_FILE, write_both)


def locate(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint, fetched from the hub if it is the name of a repository.

    Raises:
        FileNotFoundError: There is neither such a folder nor such a repository.
    """
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    name = str(path_or_repo)
    looks_like_a_path = isinstance(path_or_repo, Path) or name.count("/") != 1 or name.startswith((".", "/", "~"))
    if looks_like_a_path or folder.exists():
        raise FileNotFoundError(
            f"a checkpoint is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}; there is no folder {name}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
            )
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"there is no folder {name}, and it could not be fetched from the hub: {reason}"
        ) from error


def read_config_text(folder: Path) -> str:
    """The text of config.json.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is no text.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: {CONFIG_FILE} is missing")
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def read_config(folder: Path) -> MHEXConfig:
    """Read config.json.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is damaged or something else.
    """
    path = folder / CONFIG_FILE
    text = read_config_text(folder)
    try:
        return MHEXConfig.from_json(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is damaged, truncated or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no checkpoint: {path.name} is missing")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged, truncated or no safetensors file ({error})") from error
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in a safetensors file's header."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model with model.safetensors; every tensor must be there, and none more.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is damaged, or belongs to another network.
    """
    path = folder / WEIGHTS_FILE
    tensors = read_tensors(path)
    wanted = model.state_dict()
    for problem, names in (
        ("lacks", sorted(wanted.keys() - tensors.keys())),
        ("has unknown", sorted(tensors.keys() - wanted.keys())),
        (
            "has another shape for",
            sorted(n for n in wanted.keys() & tensors.keys() if wanted[n].shape != tensors[n].shape),
        ),
    ):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ValueError(f"{path} belongs to another network: it {problem} {shown}")
    model.load_state_dict(tensors)
