"""Running a comparison: every method on every text, every metric on every score; stopped and continued at will.

The work is cut into pieces of one method and one batch, see `mhex_core.pieces`.

Letters: B batch, T tokens, K classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from mhex_core import _checks
from mhex_core.files import write_atomically
from mhex_core.pieces import Pieces, judged_by_itself
from mhex_core.specs import methods_by_name
from mhex_text.batch import TokenBatch
from mhex_text.comparison import parties
from mhex_text.comparison.results import TextComparison
from mhex_text.comparison.scores import DEFAULT_METRICS, Measure, Sample, parse_metric
from mhex_text.comparison.texts import Choice, LabelledTexts, rationale_tokens
from mhex_text.explainers import TextExplainer, parse
from mhex_text.explainers.interface import finished
from mhex_text.judge import TextJudge
from mhex_text.progress import bar


def compare(
    model: nn.Module,
    texts: datasets.Dataset,
    *,
    tokenizer: Any,
    judge: nn.Module | TextJudge,
    judge_tokenizer: Any = None,
    self_judged: bool = False,
    methods: Sequence[str] | Mapping[str, TextExplainer],
    metrics: Sequence[str] = DEFAULT_METRICS,
    out: str | Path,
    batch_size: int = 32,
    limit: int | None = None,
    choose: Choice = "first",
    seed: int = 0,
    overwrite: bool = False,
    note: Mapping[str, Any] | None = None,
    progress: bool = True,
    max_length: int | None = None,
) -> TextComparison:
    """Explain the true class of every text by every method, and let a judge say how good the scores are.

    Args:
        model: The model to explain: an `MHEXForSequenceClassification`, or any sequence classifier of transformers.
        texts: With the columns `text` and `label` (class numbers); `pair` where examples are pairs; and `rationale`, a
            list of [start, end] in characters of `text`, where people marked their reasons. A text with an empty list,
            or none, is left out of what is compared with rationales.
        tokenizer: The model's own, a fast one. Hidden tokens are replaced by its mask token.
        judge: The model that judges; an independent one, so that no method is judged by its own model.
        judge_tokenizer: The judge's own, which must have the model's vocabulary; None means that it is the model's.
        self_judged: Whether the judge may be the model itself, which the settings then say.
        methods: Names for `mhex_text.explainers.parse`, or explainers by name.
        metrics: Names of metrics with options, see `parse_metric`.
        out: A folder. Pieces of work are kept there until all are done; a call that was stopped goes on when repeated.
        batch_size: Texts at a time; those of like length go together.
        limit: How many texts to take; None means all.
        choose: Whether these are the "first" ones or a "random" choice.
        seed: Of that choice.
        overwrite: Whether another comparison's files in `out` may be replaced.
        note: More to put into the settings, such as where the models came from.
        progress: Whether a terminal shows a bar.
        max_length: The most tokens of a text or pair; what is longer is cut. None means as many as both models take.

    Returns:
        The comparison, which is also in `out`/samples.parquet.

    Raises:
        TypeError: An argument is of another type.
        ValueError: `out` holds another comparison, a name is unknown, the judge reads other tokens or knows other
            classes than the model or is the model itself without `self_judged`, there is no mask token, or a metric
            needs rationales that are not there.
    """
    explainers = methods_by_name(methods, parse)
    measures = _measures(metrics)
    _checks.positive_int("batch_size", batch_size)
    chosen_judge = parties.judge_of(judge, judge_tokenizer, tokenizer)
    num_classes = parties.count_classes(model, chosen_judge)
    chosen = LabelledTexts.read(texts, num_classes=num_classes, limit=limit, choose=choose, seed=seed)
    if any(one.score.needs_rationale for one in measures) and chosen.rationales is None:
        raise ValueError("metrics token_f1, token_iou and token_auprc need rationales, and these texts have none")
    replacement = None if all(one.score.needs_rationale for one in measures) else parties.mask_token(tokenizer)
    longest = parties.most_tokens_of_both(model, tokenizer, chosen_judge, max_length)
    identities = {"model": parties.identity(model), "judge": parties.identity(chosen_judge.model)}
    itself = judged_by_itself(**identities, self_judged=_checks.flag("self_judged", self_judged))
    settings = {
        "data": chosen.checksum(),
        "texts": len(texts),
        "compared": len(chosen),
        "choose": choose,
        **identities,
        "self_judged": itself,
        "tokenizer": parties.tokenizer_checksum(tokenizer),
        "methods": list(explainers),
        "metrics": [one.name for one in measures],
        "batch_size": batch_size,
        "max_length": longest,
        **({"note": dict(note)} if note else {}),
    }
    pieces = Pieces.claim(Path(out), settings, overwrite=overwrite)
    if not pieces.samples.is_file():
        batches = chosen.batches(batch_size)
        run = _Run(model, chosen_judge, tokenizer, measures, replacement, longest)
        _work_through(run, explainers, batches, pieces, progress=progress)
        tables = [pq.read_table(pieces.path(name, number)) for name in explainers for number in range(len(batches))]
        TextComparison(samples=_in_order(tables, list(explainers)), settings=settings).save(pieces.samples)
    pieces.clear()
    return TextComparison.load(pieces.samples)


class _Prepared:
    """One batch as it is explained and judged; the scores of any method are judged on the same."""

    def __init__(self, run: _Run, part: LabelledTexts) -> None:
        self.part = part
        batch = TokenBatch.make(part.texts, run.tokenizer, max_length=run.max_length)
        self.batch = batch.to(next(run.model.parameters()).device)
        self.judged = batch.to(run.judge.device)
        self.target = torch.tensor(part.labels, dtype=torch.int64, device=self.batch.input_ids.device)
        self.judged_target = self.target.to(run.judge.device)
        read = run.judge.reader(self.judged)
        untouched = read(self.judged.input_ids)
        # Every metric asks for the judge's belief in the texts as they are: the answer is known.
        self.predict: Callable[[Tensor], Tensor] = lambda tokens: (
            untouched if tokens is self.judged.input_ids else read(tokens)
        )
        self.probability = untouched.gather(1, self.judged_target.unsqueeze(1)).squeeze(1)
        self.rationale = None
        if part.rationales is not None:
            self.rationale = rationale_tokens(batch, part.rationales).to(run.judge.device)


class _Run:
    """What stays the same from piece to piece."""

    def __init__(
        self,
        model: nn.Module,
        judge: TextJudge,
        tokenizer: Any,
        measures: Sequence[Measure],
        replacement: int | None,
        max_length: int | None,
    ) -> None:
        self.model, self.judge, self.tokenizer, self.measures = model, judge, tokenizer, measures
        self.replacement, self.max_length = replacement, max_length
        self.warm: set[str] = set()

    def measure(self, name: str, explainer: TextExplainer, prepared: _Prepared) -> pa.Table:
        """One method on one batch."""
        batch, part = prepared.batch, prepared.part
        if name not in self.warm:
            # What happens once (imports, compilation, buffers) is not what a text costs.
            first = TokenBatch.make(part.texts[:1], self.tokenizer, max_length=self.max_length)
            explainer(self.model, first.to(batch.input_ids.device), prepared.target[:1])
            self.warm.add(name)
        start = time.perf_counter()
        raw = explainer(self.model, batch, prepared.target)
        if batch.input_ids.device.type == "cuda":
            torch.cuda.synchronize(batch.input_ids.device)
        seconds = (time.perf_counter() - start) / len(part)
        scores = finished(f"method {name!r}", raw, batch)
        sample = Sample(
            predict=prepared.predict,
            tokens=prepared.judged.input_ids,
            mask=prepared.judged.mask,
            scores=scores.to(prepared.judged.input_ids.device),
            target=prepared.judged_target,
            replacement=self.replacement,
            rationale=prepared.rationale,
        )
        columns: dict[str, Any] = {
            "method": [name] * len(part),
            "place": pa.array(part.places, pa.int64()),
            "label": pa.array(part.labels, pa.int64()),
            "probability": prepared.probability.double().cpu().numpy(),
            "tokens": batch.mask.sum(dim=1).cpu().numpy(),
            "truncated": batch.truncated.cpu().numpy(),
        }
        for one in self.measures:
            columns[one.name] = one(sample).double().cpu().numpy()
        columns["seconds"] = pa.array([seconds] * len(part), pa.float64())
        return pa.table(columns)


def _work_through(
    run: _Run,
    explainers: Mapping[str, TextExplainer],
    batches: Sequence[LabelledTexts],
    pieces: Pieces,
    *,
    progress: bool,
) -> None:
    """Do every piece that is not there yet."""
    # Batches outside, methods inside: a text is tokenized, and judged as it is, once.
    with bar(len(explainers) * len(batches), unit="batch", shown=progress) as shown:
        for number, part in enumerate(batches):
            missing = [name for name in explainers if not pieces.path(name, number).is_file()]
            shown.update(len(explainers) - len(missing))
            if not missing:
                continue
            prepared = _Prepared(run, part)
            for name in missing:
                shown.set_description(name)
                path = pieces.path(name, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, _writer(run.measure(name, explainers[name], prepared)))
                shown.update()


def _measures(metrics: Sequence[str]) -> list[Measure]:
    if isinstance(metrics, str):
        raise TypeError(f"metrics must be a sequence of names, got the text {metrics!r}")
    measures = [parse_metric(metric) for metric in metrics]
    if not measures or len({one.name for one in measures}) != len(measures):
        raise ValueError(f"metrics must be at least one, each once, got {', '.join(metrics) or 'none'}")
    return measures


def _in_order(tables: Sequence[pa.Table], methods: Sequence[str]) -> pa.Table:
    """By method, as they were asked for, and then by place."""
    whole = pa.concat_tables(tables)
    parts = [whole.filter(pa.compute.equal(whole["method"], method)).sort_by("place") for method in methods]
    return pa.concat_tables(parts)


def _writer(table: pa.Table) -> Callable[[Path], None]:
    return lambda temporary: pq.write_table(table, temporary)
