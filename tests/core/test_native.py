"""Which implementation runs, and how one learns of it."""

import pytest
import torch
from torch.testing import assert_close

from mhex_core import native, saliency_maps, token_saliency

MAPS = ([torch.arange(16.0).reshape(1, 1, 4, 4)], [torch.ones(1, 1)], 0)
TOKENS = ([torch.arange(4.0).reshape(1, 4, 1)], [torch.ones(1, 1)], 0)
CALLS = {
    "saliency_maps": lambda backend: saliency_maps(*MAPS, size=4, backend=backend),
    "token_saliency": lambda backend: token_saliency(*TOKENS, backend=backend),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def set_wish(monkeypatch, wish):
    if wish is None:
        monkeypatch.delenv("MHEX_NATIVE", raising=False)
    else:
        monkeypatch.setenv("MHEX_NATIVE", wish)


@pytest.mark.parametrize(
    ("wish", "reason"),
    [(None, "without compiled kernels"), ("auto", "without compiled kernels"), ("0", "MHEX_NATIVE=0")],
)
def test_the_reference_runs_and_says_why(monkeypatch, wish, reason):
    set_wish(monkeypatch, wish)
    status = native.status()
    assert status.backend == "reference"
    assert reason in status.reason


def test_insisting_on_kernels_that_are_not_there_is_an_error(monkeypatch):
    set_wish(monkeypatch, "1")
    with pytest.raises(RuntimeError, match="MHEX_NATIVE=1"):
        native.status()


@every_call
def test_insisting_stops_the_automatic_choice_but_not_the_reference(monkeypatch, call):
    set_wish(monkeypatch, "1")
    for backend in ("auto", "native"):
        with pytest.raises(RuntimeError, match="MHEX_NATIVE=1"):
            call(backend)
    assert call("reference").isfinite().all()


@pytest.mark.parametrize("wish", ["", "yes", "2", "AUTO", " 1"])
def test_an_unknown_wish_is_a_value_error_that_quotes_it(monkeypatch, wish):
    set_wish(monkeypatch, wish)
    with pytest.raises(ValueError, match=f"MHEX_NATIVE.*'{wish}'"):
        native.status()


@every_call
@pytest.mark.parametrize("wish", [None, "auto", "0"])
def test_asking_for_kernels_by_name_fails_with_the_reason(monkeypatch, call, wish):
    set_wish(monkeypatch, wish)
    with pytest.raises(RuntimeError, match="backend") as raised:
        call("native")
    assert native.status().reason in str(raised.value)


@every_call
def test_auto_and_reference_are_the_same_here(monkeypatch, call):
    set_wish(monkeypatch, None)
    assert_close(call("auto"), call("reference"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("backend", "error"), [("gpu", ValueError), ("", ValueError), (None, TypeError), (1, TypeError)]
)
def test_an_unknown_backend_is_named(backend, error):
    with pytest.raises(error, match="backend"):
        native.resolve(backend)
