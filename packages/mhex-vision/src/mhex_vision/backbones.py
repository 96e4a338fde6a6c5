"""Building backbones by name, and giving one another number of classes."""

from __future__ import annotations

import pickle
from http.client import HTTPException
from typing import Any

from torch import nn

from mhex_core.specs import Value, parse_spec
from mhex_core.weights import MOST_LAYERS
from mhex_vision.surgery import TracedNetwork

TIMM_PREFIX = "timm/"

# What a name may say besides the name, in timm and in torchvision. Names also stand in checkpoints that somebody else
# made, and either library's functions take options that download, or open files and unpickle them: only what decides on
# the network's shape, and on what is dropped in training, is on the list.
_DEPTHS = frozenset({"depth", "num_layers", "parallel_depth", "depth_token_only", "deepen_factor"})
_OPTIONS = _DEPTHS | frozenset(
    """
    act_layer attention_dropout attn_drop_rate attn_mlp_ratio attn_ratio base_width block_reduce_first bn_size
    bottle_ratio cardinality channel_multiplier class_token conv_bias conv_mlp depth_mult dim drop_block_rate
    drop_path_rate drop_rate dropout dynamic_img_pad dynamic_img_size embed_dim expand_ratio expansion_ratio fc_norm
    final_norm global_pool groups growth_rate head_dim head_hidden_size hidden_dim image_size img_size in_chans
    init_values kernel_size layer_scale layer_scale_init_value ls_init_value mlp_dim mlp_ratio no_embed_class norm_eps
    norm_layer num_features num_heads num_init_features num_kv_heads num_reg_tokens output_stride patch_drop_rate
    patch_norm patch_size pool_size pos_drop_rate pre_norm proj_bias proj_drop_rate qk_norm qkv_bias reg_tokens se_ratio
    stem_size stem_type stem_width stochastic_depth_prob strict_img_size transform_input use_abs_pos use_grn use_pos_emb
    use_rel_pos weight_init widen_factor width width_factor width_mult width_per_group window_size zero_init_last
    zero_init_residual
    """.split()  # noqa: SIM905 - sixty lines otherwise
)
_LARGEST = 65_536

# What comes of no network, of one that breaks off, and of a file that did not arrive whole.
_FETCHING_ERRORS = (OSError, HTTPException, EOFError, RuntimeError, pickle.UnpicklingError)


def build(name: str, num_classes: int, *, weights: str | None = None) -> nn.Module:
    """Build a network by name.

    Args:
        name: A torchvision name such as "resnet18", or "timm/" and a timm name; after a colon, what the library's
            function for that network can be told about its shape: "timm/vit_tiny_patch16_224:img_size=28,patch_size=4".
        num_classes: K, for a network without pretrained weights; pretrained ones keep the number they were trained on.
        weights: None, or "DEFAULT" or another name torchvision knows; for timm any name of a pretrained tag, or
            "DEFAULT". Fetched by the library in question on first use.

    Raises:
        ValueError: No such network, no such weights, or no such option of the network.
        ImportError: timm is not installed.
        OSError: The weights could not be fetched.
    """
    asked = name
    name, options = parse_spec(name, known=())
    _check_options(asked, options)
    try:
        if name.startswith(TIMM_PREFIX):
            return _build_timm(name.removeprefix(TIMM_PREFIX), num_classes, weights=weights, **options)
        return _build_torchvision(name, num_classes, weights=weights, **options)
    except (TypeError, AssertionError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        if not options and not isinstance(error, TypeError | AssertionError):
            raise
        # Which of its arguments a network's function takes, and which values go together, only it knows.
        raise ValueError(f"backbone {asked!r} cannot be built with these options: {error}") from error


def _check_options(asked: str, options: dict[str, Value]) -> None:
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ValueError(
                f"options of a backbone must be of its shape (img_size, patch_size, depth, embed_dim, num_heads and so "
                f"on), got {name} in {asked!r}; build what needs more yourself, and pass the network"
            )
        if name in _DEPTHS and (isinstance(value, str) or not 0 < value <= MOST_LAYERS):
            raise ValueError(f"{name} must be in (0, {MOST_LAYERS}], got {value} in {asked!r}")
        if not isinstance(value, str) and not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"{name} must be at most {_LARGEST}, got {value} in {asked!r}")


def _build_torchvision(name: str, num_classes: int, *, weights: str | None, **options: Any) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        similar = [known_name for known_name in known if name and known_name.startswith(name[:4])]
        close = ", ".join(similar) or "resnet18, resnet50"
        raise ValueError(
            f"backbone must be a torchvision classification network or 'timm/NAME', got {name!r}; close: {close}"
        )
    if weights is None:
        fresh: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
        return fresh
    try:
        chosen = models.get_model_weights(name)[weights] if weights != "DEFAULT" else "DEFAULT"
    except KeyError as error:
        offered = ", ".join(models.get_model_weights(name).__members__)
        raise ValueError(f"weights must be one of {offered} for {name!r}, got {weights!r}") from error
    try:
        pretrained: nn.Module = models.get_model(name, weights=chosen, **options)
    except _FETCHING_ERRORS as error:
        raise OSError(f"the weights {weights!r} of {name!r} could not be fetched: {error}") from error
    return pretrained


def _build_timm(name: str, num_classes: int, *, weights: str | None, **options: Any) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise ImportError("backbone 'timm/...' needs timm: pip install \"mhex-vision[timm]\"") from error
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"backbone must name a timm network after 'timm/', got {name!r}; timm.list_models() has them")
    tagged = name if weights in (None, "DEFAULT") else f"{name.partition('.')[0]}.{weights}"
    classes: dict[str, Any] = {} if weights is not None else {"num_classes": num_classes}
    try:
        network: nn.Module = timm.create_model(tagged, pretrained=weights is not None, **classes, **options)
    except RuntimeError as error:
        if weights is None:
            raise
        raise ValueError(f"weights of {name!r} cannot be used: {error}") from error
    except OSError as error:
        raise OSError(f"the weights of {name!r} could not be fetched: {error}") from error
    return network


def set_num_classes(backbone: nn.Module, traced: TracedNetwork, num_classes: int) -> bool:
    """Give a traced network's last layer `num_classes` outputs; say whether it had to be replaced.

    Raises:
        ValueError: The network's output is not (B, K) or does not come from an `nn.Linear`.
    """
    if traced.output_shape in ((1,), (1, 1)) and num_classes == 2:
        return False  # one logit for two classes
    if traced.output_shape is None or len(traced.output_shape) != 2:
        raise ValueError(
            f"classifier='keep' needs a backbone that returns one (B, K) tensor, and this one returns "
            f"{traced.output_shape or 'something else'}; use classifier='drop'"
        )
    if traced.output_shape[1] == num_classes:
        return False
    last = backbone.get_submodule(traced.last_layer) if traced.last_layer is not None else None
    if not isinstance(last, nn.Linear) or last.out_features != traced.output_shape[1] or traced.last_layer is None:
        raise ValueError(
            f"classifier='keep' needs a backbone with num_classes = {num_classes} outputs or whose last layer is an "
            f"nn.Linear; this one has {traced.output_shape[1]} outputs and ends in {type(last).__name__}"
        )
    parent, _, child = traced.last_layer.rpartition(".")
    fresh = nn.Linear(last.in_features, num_classes, bias=last.bias is not None)
    setattr(backbone.get_submodule(parent), child, fresh.to(device=last.weight.device, dtype=last.weight.dtype))
    return True
