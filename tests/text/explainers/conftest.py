"""What the tests of explainers share."""

from __future__ import annotations

import pytest

from mhex_text.explainers import explainer

LIBRARIES = {"integrated-gradients": "captum", "shap": "shap", "attention-flow": "scipy"}
# Less than the defaults, which take their time.
QUICK = {"integrated-gradients": {"steps": 6}, "shap": {"evaluations": 40, "batch_size": 8}}


@pytest.fixture(scope="session")
def make():
    """An explainer that is quick; the test is skipped where its library is missing."""

    def make(name, **options):
        if name in LIBRARIES:
            pytest.importorskip(LIBRARIES[name])
        return explainer(name, **(QUICK.get(name, {}) | options))

    return make
