"""Texts in a real browser: scores of words and tokens are those of the evidence, whatever a reader sets."""

import re

import numpy as np
import pytest

from mhex_core.explorer import Method, explorer_page

from .pages import MOVED, text_sample

LAYERS = ("layer.0", "layer.1", "layer.2")
NAMES = ("world", "sports", "business", "science")
CLOSE = 1e-3


@pytest.fixture
def news(write_page, open_page):
    """A page of three texts, the second a pair, with the evidence of each by class."""
    method = Method(
        name="mhex", layer_names=LAYERS, layer_weights=(1, 0.5, 1), beta=0.3, normalize=False, unit="logits"
    )
    samples, found = zip(*(text_sample(seed, pair=seed == 1) for seed in range(3)), strict=True)
    page = open_page(write_page(explorer_page(samples, methods=[method], class_names=NAMES, title="News")))
    return page, samples, found


def scores(evidence, beta, weights):
    positive, negative = evidence
    return (np.array(weights)[:, None] * (positive + beta * negative)).sum(axis=0)


def shown(page, what="values"):
    page.evaluate("() => mhexExplorer.settled()")
    return np.array(page.evaluate(f"() => mhexExplorer.{what}()"))


def pane(page):
    page.evaluate("() => mhexExplorer.settled()")
    return page.evaluate("() => mhexExplorer.state().panes[0]")


def words_of(sample):
    return [piece for pieces in sample.texts for piece in pieces if piece.tokens]


def test_scores_follow_the_sliders(news):
    page, samples, found = news
    target = samples[0].evidence[0].target
    np.testing.assert_allclose(shown(page), scores(found[0][target], 0.3, (1, 0.5, 1)), atol=CLOSE)
    slider = page.get_by_role("slider", name="layer.1", exact=True)
    slider.focus()
    page.keyboard.press("End")
    for _ in range(5):
        page.keyboard.press("B")
    now = pane(page)
    assert (now["beta"], now["weights"]) == (pytest.approx(0.05), [1, 2, 1])
    expected = scores(found[0][target], now["beta"], now["weights"])
    np.testing.assert_allclose(shown(page), expected, atol=CLOSE)
    words = [expected[list(word.tokens)].sum() for word in words_of(samples[0])]
    np.testing.assert_allclose(shown(page, "pieces"), words, atol=CLOSE)
    second = samples[0].evidence[1].target
    page.get_by_label("Class explained").first.select_option(str(second))
    np.testing.assert_allclose(shown(page), scores(found[0][second], now["beta"], now["weights"]), atol=CLOSE)


def test_a_word_is_as_strong_as_its_share_of_the_strongest(news):
    page, samples, _ = news
    words = shown(page, "pieces")
    spans = page.locator(".text .piece")
    assert spans.count() == len(words)
    read = "(spans) => spans.map((s) => [s.className, Number(s.style.getPropertyValue('--s')), s.textContent])"
    for (kind, strength, text), score, word in zip(spans.evaluate_all(read), words, words_of(samples[0]), strict=True):
        assert text == word.text
        assert kind == ("piece for" if score >= 0 else "piece against")
        assert strength == pytest.approx(abs(score) / np.abs(words).max(), abs=1e-3)
    line = "(s) => { const style = getComputedStyle(s); return [style.borderBottomStyle, style.backgroundColor] }"
    strongest = int(np.argmax(np.where(words > 0, words, 0)))
    assert spans.nth(strongest).evaluate(line)[0] == "solid"
    numbers = [float(part) for part in re.findall(r"[\d.]+", spans.nth(strongest).evaluate(line)[1])]
    assert numbers[:3] == [86, 160, 220]
    against = int(np.argmin(words))
    assert words[against] < 0
    assert spans.nth(against).evaluate(line)[0] == "dotted"
    whole = "".join(piece.text for piece in samples[0].texts[0])
    assert page.locator(".text").evaluate("(text) => text.textContent") == whole
    assert page.locator(".text .unseen").inner_text().strip() == "and what was cut"


def test_numbers_of_a_word_for_pointer_and_keys(news):
    page, samples, found = news
    target = samples[0].evidence[0].target
    words = words_of(samples[0])
    double = next(index for index, word in enumerate(words) if len(word.tokens) == 2)
    page.locator(".text .piece").nth(double).hover()
    tip = page.get_by_role("tooltip")
    shares = np.array((1, 0.5, 1))[:, None] * (found[0][target][0] + 0.3 * found[0][target][1])
    of_word = shares[:, list(words[double].tokens)].sum(axis=1)
    rows = [float(text.replace("\N{MINUS SIGN}", "-")) for text in tip.locator("td.number").all_inner_texts()]
    np.testing.assert_allclose(rows, of_word, rtol=5e-3, atol=CLOSE)
    total = tip.locator("p .number").first.inner_text().replace("\N{MINUS SIGN}", "-")
    assert float(total) == pytest.approx(of_word.sum(), rel=5e-3, abs=CLOSE)
    for token in words[double].tokens:
        assert samples[0].tokens[token] in tip.locator(".tokens").inner_text()
    page.mouse.move(2, 2)
    page.locator(".text .piece").first.focus()
    page.keyboard.press("ArrowRight")
    tip.wait_for()
    here = "document.activeElement"
    focused = page.evaluate(f"() => [{here}.textContent, {here}.getAttribute('aria-describedby')]")
    assert focused == [words[1].text, "tooltip"]
    page.keyboard.press("Escape")
    tip.wait_for(state="hidden")


def test_tokens_instead_of_words_and_pairs(news):
    page, samples, _ = news
    page.get_by_role("button", name="text 1").click()
    page.get_by_role("heading", name="Second text").wait_for()
    page.get_by_role("radio", name="Tokens").check()
    tokens = shown(page)
    np.testing.assert_allclose(shown(page, "pieces"), tokens)
    assert tuple(page.locator(".text .piece").all_inner_texts()) == samples[1].tokens
    first = page.locator(".text").first.locator(".piece").count()
    assert first == 1 + max(token for piece in samples[1].texts[0] for token in piece.tokens)


def test_the_strongest_words_are_listed_and_layers_shown_alone(news):
    page, samples, found = news
    words = shown(page, "pieces")
    order = sorted(range(len(words)), key=lambda index: -abs(words[index]))[:10]
    assert page.locator(".strongest bdi").all_inner_texts() == [words_of(samples[0])[index].text for index in order]
    page.get_by_role("button", name="Only layer.2").first.click()
    target = samples[0].evidence[0].target
    np.testing.assert_allclose(shown(page), scores(found[0][target], 0.3, (0, 0, 1)), atol=CLOSE)


def test_a_long_text_stays_fluid(write_page, open_page):
    layers = tuple(f"layer.{index}" for index in range(12))
    method = Method(name="mhex", layer_names=layers, layer_weights=(1,) * 12, normalize=False)
    sample, _ = text_sample(5, words=440, layers=12)
    assert len(sample.tokens) >= 512
    page = open_page(write_page(explorer_page([sample], methods=[method])))
    page.evaluate(MOVED)
    milliseconds = page.evaluate(MOVED)
    print(f"{len(sample.tokens)} tokens, 12 layers: {milliseconds:.0f} ms per movement")  # noqa: T201
    assert milliseconds < 200
