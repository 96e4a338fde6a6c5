"""Which implementation runs, and how one learns of it."""

import pytest
import torch
from torch.testing import assert_close

from mhex_core import combine_maps, native, saliency_maps, signed_maps, token_saliency

MAPS = ([torch.arange(16.0).reshape(1, 1, 4, 4)], [torch.ones(1, 1)], 0)
TOKENS = ([torch.arange(4.0).reshape(1, 4, 1)], [torch.ones(1, 1)], 0)
CALLS = {
    "saliency_maps": lambda backend: saliency_maps(*MAPS, size=4, backend=backend),
    "signed_maps": lambda backend: signed_maps(*MAPS, backend=backend).positive[0],
    "combine_maps": lambda backend: combine_maps(signed_maps(*MAPS, backend="reference"), size=4, backend=backend),
    "token_saliency": lambda backend: token_saliency(*TOKENS, backend=backend),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
NOTHING_COMPILED = native.Status("reference", "this installation of mhex-core was built without compiled kernels")


@pytest.fixture
def without_kernels(monkeypatch):
    """As on a machine where nothing was compiled."""
    monkeypatch.setattr(native, "_load", lambda: NOTHING_COMPILED)


def set_wish(monkeypatch, wish):
    if wish is None:
        monkeypatch.delenv("MHEX_NATIVE", raising=False)
    else:
        monkeypatch.setenv("MHEX_NATIVE", wish)


@pytest.mark.parametrize(
    ("wish", "reason"),
    [(None, "without compiled kernels"), ("auto", "without compiled kernels"), ("0", "MHEX_NATIVE=0")],
)
def test_the_reference_runs_and_says_why(monkeypatch, without_kernels, wish, reason):
    set_wish(monkeypatch, wish)
    status = native.status()
    assert status.backend == "reference"
    assert reason in status.reason


def test_insisting_on_kernels_that_are_not_there_is_an_error(monkeypatch, without_kernels):
    set_wish(monkeypatch, "1")
    with pytest.raises(RuntimeError, match="MHEX_NATIVE=1"):
        native.status()


@every_call
def test_insisting_stops_the_automatic_choice_but_not_the_reference(monkeypatch, without_kernels, call):
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
def test_asking_for_kernels_by_name_fails_with_the_reason(monkeypatch, without_kernels, call, wish):
    set_wish(monkeypatch, wish)
    with pytest.raises(RuntimeError, match="backend") as raised:
        call("native")
    assert native.status().reason in str(raised.value)


@every_call
def test_auto_is_close_to_the_reference(monkeypatch, call):
    set_wish(monkeypatch, None)
    assert_close(call("auto"), call("reference"), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("backend", "error"), [("gpu", ValueError), ("", ValueError), (None, TypeError), (1, TypeError)]
)
def test_an_unknown_backend_is_named(backend, error):
    with pytest.raises(error, match="backend"):
        native.resolve(backend)


def test_an_instruction_set_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("MHEX_CPU", "avx1024")
    with pytest.raises(ValueError, match="MHEX_CPU must be one of 'baseline', 'avx2', 'avx512', got 'avx1024'"):
        native.status()


def test_threads_that_come_first_together_load_once(python):
    """In a process of its own: here, everything is loaded already."""
    script = """
import threading, torch
from mhex_core import native, saliency_maps
barrier, found = threading.Barrier(8), []
def run():
    barrier.wait()
    found.append(saliency_maps([torch.ones(1, 2, 3, 3)], [torch.eye(2)], 0, size=3))
threads = [threading.Thread(target=run) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 8, found
"""
    done = python.run("-c", script)
    assert done.returncode == 0, done.stderr
