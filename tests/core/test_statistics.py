"""Means with bootstrap intervals against a loop that draws samples one by one, and the tables made of them."""

import json
import math

import numpy as np
import pytest

from mhex_core import statistics
from mhex_core.statistics import Column, Interval, Summary, summarize


def slow_interval(values, *, confidence, resamples, seed):
    """Draws the samples themselves, and not how often each comes."""
    generator = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = [values[place] for place in generator.integers(0, len(values), len(values))]
        defined = [value for value in drawn if not math.isnan(value)]
        if defined:
            means.append(math.fsum(defined) / len(defined))
    tail = (1 - confidence) / 2
    return np.quantile(means, tail), np.quantile(means, 1 - tail)


@pytest.fixture
def values():
    generator = np.random.default_rng(3)
    found = {name: {"a": generator.random(17), "b": generator.random(17) * 300} for name in ("one", "two")}
    found["two"]["b"][[3, 8]] = math.nan
    return found


@pytest.fixture
def seconds():
    return {"one": np.array([1.0, 2.0, 9.0]), "two": np.array([])}


def test_intervals_are_those_of_a_loop(values, seconds):
    settings = {"confidence": 0.9, "resamples": 300, "seed": 4}
    one, two = summarize(values, seconds, **settings)
    for summary, name in ((one, "one"), (two, "two")):
        assert summary.method == name
        for metric in ("a", "b"):
            low, high = slow_interval(values[name][metric].tolist(), **settings)
            found = summary.scores[metric]
            assert found.mean == pytest.approx(np.nanmean(values[name][metric]))
            assert (found.low, found.high) == pytest.approx((low, high))
            assert found.count == (15 if (name, metric) == ("two", "b") else 17)
    assert one.differences == {}
    low, high = slow_interval((values["two"]["b"] - values["one"]["b"]).tolist(), **settings)
    assert (two.differences["b"].low, two.differences["b"].high) == pytest.approx((low, high))
    assert one.seconds == 2
    assert math.isnan(two.seconds)
    assert summarize(values, seconds, **settings)[0] == one


def test_the_interval_covers_the_mean_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        drawn = np.random.default_rng(seed).normal(1, 2, 60)
        (summary,) = summarize({"m": {"x": drawn}}, {"m": drawn}, resamples=200, seed=seed)
        hits += summary.scores["x"].low <= 1 <= summary.scores["x"].high
    assert 0.88 <= hits / 200 <= 0.99


def test_what_is_nowhere_defined_has_no_mean():
    nothing = np.full(4, math.nan)
    (summary,) = summarize({"m": {"x": nothing}}, {"m": np.ones(4)}, resamples=5)
    assert summary.scores["x"].count == 0
    assert math.isnan(summary.scores["x"].mean)
    none_drawn = statistics.interval(np.array([1.0, math.nan]), np.array([[0.0, 2.0]]), confidence=0.5)
    assert (none_drawn.mean, none_drawn.count) == (1.0, 1)
    assert math.isnan(none_drawn.low)
    assert summarize({}, {}) == ()
    (empty,) = summarize({"m": {"x": np.array([])}}, {"m": np.array([])})
    assert empty.scores["x"].count == 0


@pytest.mark.parametrize(
    ("values", "settings", "error", "message"),
    [
        ({"m": {"x": np.ones(3)}}, {"confidence": 1}, ValueError, r"confidence must be in \(0, 1\), got 1"),
        ({"m": {"x": np.ones(3)}}, {"confidence": "1"}, TypeError, "confidence must be a number"),
        ({"m": {"x": np.ones(3)}}, {"resamples": 0}, ValueError, "resamples must be at least 1"),
        ({"m": {"x": np.ones(3)}, "n": {"y": np.ones(3)}}, {}, ValueError, "values must have the same metrics"),
        ({"m": {"x": np.ones(3)}, "n": {"x": np.ones(4)}}, {}, ValueError, r"one shape \(N,\), got \(3,\), \(4,\)"),
        ({"m": {"x": np.ones((3, 2))}}, {}, ValueError, r"values must have one shape \(N,\), got \(3, 2\)"),
    ],
)
def test_errors_name_the_argument(values, settings, error, message):
    with pytest.raises(error, match=message):
        summarize(values, dict.fromkeys(values, np.ones(3)), **settings)


def summary(method, *means):
    scores = {
        name: Interval(mean=mean, low=mean - 1, high=mean + 1, count=5) for name, mean in zip("ab", means, strict=True)
    }
    return Summary(method=method, scores=scores, differences={}, seconds=0.1234)


COLUMNS = [
    Column(name="a", title="gain", higher_is_better=True),
    Column(name="b", title="loss", higher_is_better=False),
]


def test_tables_mark_what_is_best():
    rows = statistics.table([summary("x", 2, 1234.5), summary("yy", 3, math.nan)], COLUMNS, unit="text")
    assert rows == [
        ["method", "gain ↑", "loss ↓", "s / text"],
        ["x", "2.0000 [1.0000, 3.0000]", "1.23e+03* [1.23e+03, 1.24e+03]", "0.12"],
        ["yy", "3.0000* [2.0000, 4.0000]", "- [-, -]", "0.12"],
    ]
    text = statistics.to_text(rows).splitlines()
    assert len({line.index("[") for line in text[1:]}) <= 2
    assert text[2].startswith("yy      3.0000* [2.0000, 4.0000]")
    markdown = statistics.to_markdown(rows).splitlines()
    assert markdown[1] == "|---|---|---|---|"
    assert markdown[3] == "| yy | **3.0000** [2.0000, 4.0000] | - [-, -] | 0.12 |"
    alone = statistics.table([summary("x", 2, 1)], COLUMNS, unit="image")
    assert not any("*" in cell for cell in alone[1])


def test_records_hold_plain_numbers(values, seconds):
    record = statistics.to_record(summarize(values, seconds, resamples=10), unit="text")
    again = json.loads(json.dumps(record, allow_nan=False))
    assert list(again) == ["one", "two"]
    assert again["one"]["differences from one"] == {}
    assert again["two"]["scores"]["b"]["texts"] == 15
    assert again["two"]["seconds_per_text"] is None
    assert set(again["two"]["differences from one"]["a"]) == {"mean", "low", "high", "texts"}
