"""Token and word scores of text classifiers that explain themselves."""

from importlib.metadata import version

from mhex_text.tokens import WordScore, score_mask, word_scores

__version__ = version("mhex-text")

__all__ = ["WordScore", "score_mask", "word_scores"]
