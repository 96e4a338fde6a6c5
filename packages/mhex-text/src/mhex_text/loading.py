"""Classifiers, encoders and tokenizers as somebody saved them: read whole, or refused. None of their code is run."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.hub import cached_file

from mhex_core.weights import (
    MOST_LAYERS,
    SEAL,
    check_finite,
    check_seal,
    kind_of,
    no_larger_than,
    read_settings,
    read_weights,
    refuse,
    seal,
    unlike,
)
from mhex_text._library import quiet

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Where a checkpoint is, among all that `from_pretrained` takes.
_WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")
# What published classifiers still hold of the network that they were made from, and what older versions wrote besides.
_LEFT_OVER = re.compile(
    r"(^|\.)(pooler\.|position_ids$|inv_freq$|lm_head\.|cls\.|predictions\.|discriminator_predictions\.)"
)
_OWN_TYPE = "mhex_text"
_MOST_CLASSES, _LARGEST = 65_536, 2**31 - 1
# Attention that is computed by what is installed; other names are repositories whose code would be run.
_ATTENTION = re.compile(r"\w+", re.ASCII)
_ELSEWHERE = {
    "adapter_config.json": "an adapter of another model; merge it (merge_and_unload) and save the whole",
    "pytorch_model.bin": "a pickle, which could run code; load it where you trust it, and save it as safetensors",
    "pytorch_model.bin.index.json": "of pickles, which could run code; load them, and save safetensors",
}


def load_config(place: str, **where: Any) -> Any:
    """The settings of a checkpoint.

    Args:
        place: A folder, or a name on the Hugging Face hub.
        **where: What `from_pretrained` takes about the place, such as `revision`.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: config.json is damaged, or asks for what is not done here.
    """
    path, _ = _settings(place, where)
    importlib.import_module("mhex_text.modeling")  # makes its classifier known to transformers
    with _named(path):
        return AutoConfig.from_pretrained(place, trust_remote_code=False, **where)


def load_tokenizer(place: str, **where: Any) -> Any:
    """The tokenizer of a checkpoint; see `load_config`.

    Raises:
        OSError: There is no such checkpoint.
        ValueError: Its files are missing or damaged, or it is code of its own.
    """
    _check_place(place)
    importlib.import_module("mhex_text.modeling")
    with _named(f"the tokenizer of {place}"), quiet():
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **where)


def load_classifier(place: str, **where: Any) -> Any:
    """The classifier of a checkpoint, with blocks or without; see `load_config`.

    Raises:
        OSError: There is no such checkpoint, or a file is missing from it.
        ValueError: A file is damaged, or not what it should be.
    """
    # A classifier with blocks looks at what it loads by itself, however it is loaded.
    if load_config(place, **where).model_type == _OWN_TYPE:
        with quiet():
            return AutoModelForSequenceClassification.from_pretrained(place, trust_remote_code=False, **where)
    return checked(AutoModelForSequenceClassification.from_pretrained, place, **where)


def checked(load: Callable[..., Any], place: Any, *arguments: Any, fresh_head: bool = False, **options: Any) -> Any:
    """Load a model of transformers so that each of its weights comes from the checkpoint.

    Args:
        load: Its `from_pretrained`.
        place: The checkpoint.
        *arguments: Of `load`.
        fresh_head: Whether it is to be trained: a head may be missing then, and be drawn at random, and the encoder's
            old one be left aside.
        **options: Of `load`.

    Returns:
        What `load` returns.

    Raises:
        OSError: There is no such checkpoint, or a file is missing from it.
        ValueError: A file is damaged, or not what it should be.
    """
    wants_info = options.pop("output_loading_info", False)
    if place is None or options.get("state_dict") is not None:  # the weights are the caller's own
        return load(place, *arguments, output_loading_info=wants_info, **options)
    place = str(place)
    path, settings = _settings(place, options)
    files = _weight_files(place, options)
    where = str(files[0]) if len(files) == 1 else str(files[0].parent)
    tensors = read_weights(*files)
    check_finite(tensors, where)
    check_seal(settings, tensors, path)
    with _named(where), no_larger_than(tensors), quiet():
        safe = {"trust_remote_code": False, "use_safetensors": True}
        model, info = load(place, *arguments, **{**options, **safe}, output_loading_info=True)
    # Whoever saves it again has other weights to seal.
    vars(model.config).pop(SEAL, None)
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if fresh_head:
        missing = {name for name in missing if _of_encoder(name, model)}
        unexpected = set()
    elif model.config.model_type != _OWN_TYPE:
        unexpected = {name for name in unexpected if not _LEFT_OVER.search(name)}
    refuse("lacks", missing, where)
    refuse("has unknown", unexpected, where)
    refuse("has another shape for", (str(entry[0]) for entry in info["mismatched_keys"]), where)
    own, single = model.state_dict(), torch.empty(0)
    strange = [name for name, tensor in tensors.items() if unlike(tensor, own.get(name, single))]
    refuse("has other numbers for", (name for name in strange if not name.endswith("position_ids")), where, tensors)
    return (model, info) if wants_info else model


def seal_checkpoint(folder: Path) -> None:
    """Put digests of settings and weights into the config.json of what was saved in a folder."""
    seal(folder / CONFIG_FILE, *_weight_files(str(folder), {}))


def _of_encoder(name: str, model: Any) -> bool:
    prefix = f"{model.base_model_prefix}."
    inside = model.base_model is model or name.startswith(prefix)
    return inside and not _LEFT_OVER.search(name)


def _check_place(place: str) -> None:
    # The hub's names have one slash at most; about what is clearly a path it would say nothing helpful.
    if (place.count("/") > 1 or place.startswith((".", "/", "~"))) and not Path(place).is_dir():
        raise FileNotFoundError(f"there is no folder {place}")


def _file(place: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """A file of a checkpoint, fetched if need be; None where there is no such file."""
    where = {key: options[key] for key in _WHERE if options.get(key) is not None}
    found = cached_file(place, name, _raise_exceptions_for_missing_entries=False, **where)
    return None if found is None else Path(found)


def _settings(place: str, options: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Where config.json is, and what it holds."""
    _check_place(place)
    path = _file(place, CONFIG_FILE, options)
    if path is None:
        raise FileNotFoundError(f"{place} is no checkpoint: {CONFIG_FILE} is missing")
    settings = read_settings(path)
    if "model_type" not in settings:
        raise ValueError(f"{path} must be of a model of transformers, got {kind_of(settings)}")
    with _named(path):
        _check_settings(settings)
    return path, settings


def _check_settings(settings: object, key: str = "") -> None:
    """Refuse what would take memory or time without bound, or have code of somebody else's run."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            _check_settings(value, str(name))
    elif isinstance(settings, list):
        for value in settings:
            _check_settings(value, key)
    elif isinstance(settings, int) and not isinstance(settings, bool):
        most = MOST_LAYERS if "layer" in key else _MOST_CLASSES if key == "num_labels" else _LARGEST
        if abs(settings) > most:
            raise ValueError(f"{key} must be at most {most}, got {settings}")
    elif isinstance(settings, str) and "attn_implementation" in key and not _ATTENTION.fullmatch(settings):
        raise ValueError(f"{key} must be an attention that is installed, such as 'sdpa', got {settings!r}")
    if key == "quantization_config" and settings:
        raise ValueError("quantization_config must not be there: quantised weights are not read")


def _weight_files(place: str, options: Mapping[str, Any]) -> list[Path]:
    adapter = _file(place, "adapter_config.json", options)
    whole, index = (_file(place, name, options) for name in (WEIGHTS_FILE, INDEX_FILE))
    if whole is not None and adapter is None:
        return [whole]
    if index is not None and adapter is None:
        listed = read_settings(index).get("weight_map")
        names = sorted(set(listed.values())) if isinstance(listed, dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{index} is damaged: weight_map must say in which file beside it each tensor is")
        return [_there(place, name, options) for name in names]
    for name, what in _ELSEWHERE.items():
        if _file(place, name, options) is not None:
            raise ValueError(f"{place} cannot be used: {name} is {what}")
    raise FileNotFoundError(f"{place} is no checkpoint: {WEIGHTS_FILE} is missing")


def _there(place: str, name: str, options: Mapping[str, Any]) -> Path:
    found = _file(place, name, options)
    if found is None:
        raise FileNotFoundError(f"{place} is no checkpoint: {name} is missing")
    return found


@contextmanager
def _named(what: str | Path) -> Iterator[None]:
    """Whatever the library raises about a damaged file, it is one sentence that names the file."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:400]
        reason = said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"
        raise ValueError(f"{what} cannot be used: {reason}") from error
