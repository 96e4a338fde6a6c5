"""A module's values without its gradients, for as long as somebody needs them and without touching the module."""

from __future__ import annotations

from torch import nn


def ungraded(module: nn.Module) -> nn.Module:
    """A second view of a module: the same values, no gradients for parameters, evaluation mode.

    Memory is shared, and nothing is written on the module, so other threads may use it meanwhile. The view sees later
    changes of the values and not of modes, hooks or sub-modules.
    """
    return _view(module, {})


def _view(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    view: nn.Module = object.__new__(type(module))
    seen[id(module)] = view
    own = dict(module.__dict__)
    own["training"] = False
    # What torch.compile made of the module computes with the module's own parameters.
    own["_compiled_call_impl"] = None
    own["_parameters"] = {
        name: None if parameter is None else parameter.detach() for name, parameter in module._parameters.items()
    }
    own["_buffers"] = dict(module._buffers)
    own["_modules"] = {name: None if child is None else _view(child, seen) for name, child in module._modules.items()}
    view.__dict__.update(own)
    return view
