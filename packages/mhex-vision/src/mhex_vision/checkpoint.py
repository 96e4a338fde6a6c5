"""A classifier on disk: config.json and model.safetensors in one folder. Nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mhex_core.files import write_atomically
from mhex_core.weights import check_seal, check_weights, no_larger_than, read_settings, read_weights, sealed

if TYPE_CHECKING:
    from mhex_vision.classifier import MHEXClassifier
    from mhex_vision.plain import PlainClassifier

Model = TypeVar("Model", bound=nn.Module)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    write_atomically(path, lambda temporary: _save(tensors, temporary, metadata))


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    mode = path.stat().st_mode
    whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(whole, path, metadata=dict(metadata or {}))
    path.chmod(mode)  # safetensors puts a file there that nobody else may read


def write(model: MHEXClassifier | PlainClassifier, folder: Path) -> None:
    """Write configuration and weights; both are complete before either replaces an older one."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, tensors = json.loads(model.config.to_json()), model.state_dict()
    plain, whole = (_as_text(values) for values in (settings, sealed(settings, tensors)))

    def write_both(temporary: Path) -> None:
        _save(tensors, temporary)
        # Without its seal: whoever is killed before the weights are in place leaves a pair that can be loaded.
        write_text(folder / CONFIG_FILE, plain)

    write_atomically(folder / WEIGHTS_FILE, write_both)
    write_text(folder / CONFIG_FILE, whole)


def _as_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, sort_keys=True) + "\n"


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


def restore(folder: Path, build: Callable[[str], Model]) -> Model:
    """Build a network as config.json says, and fill it with model.safetensors.

    Args:
        folder: The checkpoint.
        build: Makes the network of the text of config.json.

    Returns:
        The network, in evaluation mode.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or not what it should be.
    """
    path = folder / CONFIG_FILE
    settings = read_settings(path)
    tensors = read_weights(folder / WEIGHTS_FILE)
    try:
        with no_larger_than(tensors):
            model = build(json.dumps(settings))
    except ImportError:
        raise
    # Settings of somebody else's may ask a network's own constructor for anything, and it may say no in any way.
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} cannot be used: {' '.join(reason.split())}") from error
    _fill(model, tensors, folder)
    check_seal(settings, tensors, path)
    return model.eval()


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
    _fill(model, read_weights(folder / WEIGHTS_FILE), folder)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    check_weights(tensors, model.state_dict(), str(folder / WEIGHTS_FILE))
    model.load_state_dict(tensors)
