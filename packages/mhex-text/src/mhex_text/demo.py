"""The main job on made-up notes: train, explain, measure against the known rationales, draw.

Letters: N texts, T tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import ModernBertConfig, ModernBertModel, PreTrainedTokenizerFast

from mhex_core import _checks
from mhex_text.data import TextBundle, notes_bundle
from mhex_text.explanation import Explanation
from mhex_text.history import TextEpoch
from mhex_text.modeling import MHEXForSequenceClassification
from mhex_text.plausibility import token_auprc, token_f1, token_iou
from mhex_text.recipes import TextRecipe
from mhex_text.rendering import colour_depth, terminal_text
from mhex_text.training import train

HTML_FILE = "demo.html"
EXPLANATIONS_FILE = "explanations.json"

# For a small encoder with fresh weights, which takes a far higher learning rate than a pretrained one.
RECIPE = TextRecipe(
    epochs=3,
    batch_size=16,
    learning_rate=1e-3,
    max_length=128,
    warmup_ratio=0.1,
    schedule="linear",
    patience=None,
    mixed_precision="no",
)

_POSITIONS = 128
_SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
_SPECIAL |= {"mask_token": "[MASK]"}


def run_demo(
    out: Path,
    *,
    bundle: TextBundle | None = None,
    epochs: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> None:
    """Train on made-up notes, explain those of the test, and write what a user would look at first.

    Args:
        out: A folder: the checkpoint, `demo.html` and `explanations.json` with an explanation of each class.
        bundle: Notes from `mhex_text.data.notes_bundle`; None makes them by `seed`.
        epochs: None for the recipe's.
        seed: Of weights, order and notes.
        overwrite: Whether another run in `out` may be replaced.
        say: Where lines for the user go.
    """
    start = time.perf_counter()
    recipe = RECIPE if epochs is None else replace(RECIPE, epochs=epochs)
    data = notes_bundle(seed=seed) if bundle is None else bundle
    test = data.test
    if test is None or "rationale" not in test.column_names:
        raise ValueError("bundle must have test texts with a rationale, got one without")
    say(
        f"{len(data.train)} made-up clinical notes; the complaint that is present is the class: "
        f"{', '.join(data.class_names)}"
    )
    tokenizer = wordpiece_tokenizer(data.train["text"])
    torch.manual_seed(seed)
    model = MHEXForSequenceClassification.from_encoder(
        small_encoder(tokenizer), data.num_classes, labels=data.class_names
    )
    say(
        f"a ModernBERT of {len(model.blocks)} layers with fresh weights, a gate and a head in each; "
        f"{len(tokenizer)} word pieces"
    )

    def report(epoch: TextEpoch) -> None:
        accuracy = f"{100 * epoch.validation.accuracy:.1f} %" if epoch.validation else "-"
        say(f"  epoch {epoch.epoch:2d}: loss {epoch.train_loss:6.3f}, validation {accuracy}, {epoch.seconds:.1f} s")

    result = train(model, tokenizer, data, recipe, out=out, seed=seed, overwrite=overwrite, on_epoch=report)
    if result.test is None:
        raise RuntimeError("a run with test texts ends with their metrics")
    say(f"test accuracy {100 * result.test.accuracy:.1f} % on {len(test)} notes")

    explanation = model.explain(list(test["text"]), tokenizer=tokenizer, progress=True)
    say("do the highest scores lie on the words that make the class? (token F1, IoU, AUPRC)")
    for name, scores in _rivals(explanation, seed):
        f1, iou, auprc = (100 * value for value in agreement(explanation, list(test["rationale"]), scores))
        say(f"  {name:16s} {f1:5.1f} %  {iou:5.1f} %  {auprc:5.1f} %")
    chosen = _one_of_each_class(explanation, list(test["label"]))
    shown = replace(explanation, items=tuple(explanation[place] for place in chosen))
    say(terminal_text(shown[:1], depth=colour_depth(sys.stdout)))
    labels = [int(test["label"][place]) for place in chosen]
    shown.save_html(out / HTML_FILE, labels=labels, title="Made-up clinical notes")
    shown.to_json(out / EXPLANATIONS_FILE)
    say(f"wrote {out / HTML_FILE}, {out / EXPLANATIONS_FILE} and the checkpoint in {out}")
    say(f"done in {time.perf_counter() - start:.0f} s; next, with a text of your own:")
    say(f'  mhex-text explain --checkpoint {out} --text "Complains of palpitations since Monday. No sign of wheezing."')


def wordpiece_tokenizer(texts: Iterable[str], *, vocabulary: int = 600) -> PreTrainedTokenizerFast:
    """Learn word pieces from texts, lower-cased, with BERT's special tokens.

    The same texts give the same vocabulary in the same order in every process.

    Args:
        texts: To learn from.
        vocabulary: How many word pieces at most, special tokens among them. (No fewer than there are letters.)

    Raises:
        TypeError: `vocabulary` is not an int.
        ValueError: `vocabulary` is less than 1.
    """
    _checks.positive_int("vocabulary", vocabulary)
    texts = list(texts)
    core = _wordpiece({})
    # The library numbers letters inside words as it comes upon them in a hash table, whose order is another each
    # time, and breaks ties by these numbers. Given as special tokens they have theirs from the start.
    letters = sorted({letter for text in texts for letter in core.normalizer.normalize_str(text)} - {" "})
    fixed = [*_SPECIAL.values(), *letters, *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=fixed, show_progress=False)
    core.train_from_iterator(texts, trainer)
    pieces = sorted(core.get_vocab().items(), key=lambda entry: entry[1])
    # Built anew, since letters are special to the one that was trained.
    core = _wordpiece({piece: number for number, (piece, _) in enumerate(pieces)})
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    make: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = make(tokenizer_object=core, model_max_length=_POSITIONS, **_SPECIAL)
    return made


def small_encoder(tokenizer: PreTrainedTokenizerFast) -> ModernBertModel:
    """A ModernBERT of 4 layers and width 128 with fresh weights, in which a token looks 4 to either side.

    It knows distances from the start, which BERT has to learn: in as many epochs BERT learns which words count, and
    not yet what a denied finding is. (In transformers 4 tokens of the first layer look everywhere.)
    """
    layers = 4
    older: dict[str, Any] = {"global_attn_every_n_layers": layers}  # what transformers 4 reads instead of layer_types
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=_POSITIONS,
        local_attention=8,
        layer_types=["sliding_attention"] * layers,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        cls_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        **older,
    )
    return ModernBertModel(config)


def agreement(
    explanation: Explanation, rationales: Sequence[Sequence[Sequence[int]]], scores: Sequence[Sequence[float]]
) -> tuple[float, float, float]:
    """Token F1, IoU and AUPRC of scores against rationales, means over texts; see `mhex_text.plausibility`.

    Args:
        explanation: Of N texts; it says which tokens there are and where.
        rationales: For each text its spans [start, end], in characters. A token is in it that shares a character.
        scores: For each text a score per token.
    """
    length = max((len(item.tokens) for item in explanation), default=0)
    values = torch.zeros(len(explanation), length, dtype=torch.float64)
    marked, mask = torch.zeros_like(values, dtype=torch.bool), torch.zeros_like(values, dtype=torch.bool)
    for row, (item, spans, found) in enumerate(zip(explanation, rationales, scores, strict=True)):
        count = len(item.tokens)
        values[row, :count] = torch.tensor(found, dtype=torch.float64)
        inside = [any(token.start < end and start < token.end for start, end in spans) for token in item.tokens]
        marked[row, :count] = torch.tensor(inside, dtype=torch.bool)
        mask[row, :count] = True
    f1, iou, auprc = (float(measure(values, marked, mask).nanmean()) for measure in (token_f1, token_iou, token_auprc))
    return f1, iou, auprc


def _rivals(explanation: Explanation, seed: int) -> list[tuple[str, list[list[float]]]]:
    """The scores of several weighings of the layers, and such that know nothing."""
    weighed = [("first 3 layers", explanation), ("all layers", explanation.reweighted(layers="all"))]
    weighed += [("layer 0 alone", explanation.reweighted(layers=[0]))]
    found = [(name, [[token.score for token in item.tokens] for item in part]) for name, part in weighed]
    generator = torch.Generator().manual_seed(seed)
    random: list[Tensor] = [torch.rand(len(item.tokens), generator=generator) for item in explanation]
    return [*found, ("random", [scores.tolist() for scores in random])]


def _one_of_each_class(explanation: Explanation, labels: Sequence[int]) -> list[int]:
    """The place of the first rightly classified text of each class; the first of all where a class has none."""
    chosen = []
    for label in sorted(set(labels)):
        of_class = [index for index, other in enumerate(labels) if other == label]
        right = [index for index in of_class if explanation[index].prediction == label]
        chosen.append((right or of_class)[0])
    return chosen


def _wordpiece(pieces: dict[str, int]) -> Tokenizer:
    """BERT's tokenizer with these word pieces."""
    core = Tokenizer(models.WordPiece(pieces, unk_token=_SPECIAL["unk_token"]))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core
