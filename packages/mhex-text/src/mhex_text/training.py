"""Training text classifiers on `transformers.Trainer`: resumable to the bit, nothing half-written, no output unasked.

Letters: N texts, T tokens, L heads.
Source: Sun and Liò, "Multi-Head Explainer" (arXiv 2501.01311), the AG News runs.

After every epoch there is a checkpoint: weights, optimizer, schedule and random states from the library, and as its
last file the history so far. One without a history was cut short and does not count. Which texts make up a batch
follows from (seed, epoch) alone.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging as library_logging

from mhex_core import _checks
from mhex_core.files import write_atomically
from mhex_text import explaining
from mhex_text.data import TextBundle
from mhex_text.modeling import MHEXForSequenceClassification

Schedule = Literal["linear", "cosine", "constant"]
MixedPrecision = Literal["auto", "no", "bf16"]

CHECKPOINTS = ".checkpoints"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
LOG_FILE = "log.csv"
RUN_FILE = "run.json"
_HISTORY_FILE = "history.json"
_FINAL = "final"

_GROUP = 50  # batches whose texts are sorted by length
_LIBRARIES = ("mhex-text", "torch", "transformers", "tokenizers", "accelerate", "datasets")


@dataclass(frozen=True, kw_only=True)
class TextRecipe:
    """How a text classifier is trained, with AdamW and gradients cut to norm 1.

    Attributes:
        epochs: Passes over the training texts.
        batch_size: Texts per step and process.
        learning_rate: The highest.
        weight_decay: Of AdamW; biases and normalisations are exempt.
        max_length: Tokens of a text, beyond which it is cut. Never more than tokenizer and encoder take.
        warmup_ratio: The share of all steps in which the learning rate rises to its highest.
        schedule: From there on "linear" or "cosine" down to 0, or "constant".
        patience: Epochs without a lower validation loss before training stops; None never stops early.
        mixed_precision: "auto" means bf16 on an accelerator that has it, and nothing on a CPU.
        gradient_checkpointing: Whether layers are computed again instead of kept: less memory, more time.
    """

    epochs: int = 5
    batch_size: int = 32
    learning_rate: float = 2e-5
    weight_decay: float = 0.01
    max_length: int = 71
    warmup_ratio: float = 0.0
    schedule: Schedule = "linear"
    patience: int | None = 2
    mixed_precision: MixedPrecision = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_length", "patience"):
            value = getattr(self, name)
            if name != "patience" or value is not None:
                _checks.positive_int(name, value)
        for name in ("learning_rate", "weight_decay"):
            _checks.number(name, getattr(self, name), low=0)
        _checks.number("warmup_ratio", self.warmup_ratio, low=0, high=1)
        _checks.choice("schedule", self.schedule, get_args(Schedule))
        _checks.choice("mixed_precision", self.mixed_precision, get_args(MixedPrecision))
        _checks.flag("gradient_checkpointing", self.gradient_checkpointing)


RECIPES: dict[str, TextRecipe] = {
    # The paper's AG News runs: bert-base-uncased, early stopping on the validation loss. It names no patience.
    "ag-news": TextRecipe(),
}


@dataclass(frozen=True, kw_only=True)
class TextMetrics:
    """How a classifier does on N texts.

    Attributes:
        loss: What training minimises, the mean over texts.
        accuracy: Of the prediction.
        head_accuracy: Of each of the L heads alone, shallow to deep.
    """

    loss: float
    accuracy: float
    head_accuracy: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TextEpoch:
    """One line of the log.

    Attributes:
        epoch: From 1.
        learning_rate: At its last step.
        train_loss: Mean over its steps.
        validation: None where there are no validation texts.
        seconds: Training and validation.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    validation: TextMetrics | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TextTrainingResult:
    """A finished run.

    Attributes:
        history: All epochs.
        best_epoch: The epoch whose weights were kept: that of the lowest validation loss; the last without validation.
        test: How those do on the test texts, or None where there are none.
        max_length: The most tokens a text had, by the recipe and by what tokenizer and encoder take.
        truncated: The share of texts that were cut, by split.
    """

    history: tuple[TextEpoch, ...]
    best_epoch: int
    test: TextMetrics | None
    max_length: int
    truncated: dict[str, float]


def train(
    model: MHEXForSequenceClassification,
    tokenizer: Any,
    bundle: TextBundle,
    recipe: TextRecipe,
    *,
    out: str | Path,
    seed: int = 0,
    progress: bool = True,
    on_epoch: Callable[[TextEpoch], None] | None = None,
) -> TextTrainingResult:
    """Train a classifier and keep its best epoch.

    Written to `out`: `model.safetensors` and `config.json` of the best epoch with the tokenizer's files, so that
    `MHEXForSequenceClassification.from_pretrained(out)` loads it; `log.csv`; `run.json`; while the run goes on,
    `.checkpoints`. A run that was killed goes on from its last whole epoch when the same call is made again, to the
    same bits on the same machine. One that is finished is not trained again.

    Args:
        model: It is trained in place, takes the names of the classes over, and holds the best weights afterwards, in
            evaluation mode. What is frozen stays so.
        tokenizer: The encoder's own, a fast one.
        bundle: The texts.
        recipe: How to train.
        out: A folder.
        seed: Of the order of texts and of dropout. (The weights are the caller's: seed before building them.)
        progress: Whether a terminal shows a bar per epoch. Elsewhere there is none.
        on_epoch: Called after each epoch, on the main process, when its checkpoint is whole.

    Raises:
        TypeError: An argument is of another type.
        ValueError: `out` holds another run or something else, or model, tokenizer and texts do not go together.
        RuntimeError: The loss is no longer finite.
    """
    if not isinstance(model, MHEXForSequenceClassification):
        raise TypeError(f"model must be an MHEXForSequenceClassification, got {type(model).__name__}")
    if not isinstance(bundle, TextBundle):
        raise TypeError(f"bundle must be a TextBundle, got {type(bundle).__name__}")
    if not isinstance(recipe, TextRecipe):
        raise TypeError(f"recipe must be a TextRecipe, got {type(recipe).__name__}")
    if not isinstance(out, str | Path):
        raise TypeError(f"out must be a path, got {type(out).__name__}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32 - 1], got {seed}")
    _checks.flag("progress", progress)
    if not callable(tokenizer) or not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer must be a fast tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer must have a padding token, got one without: texts of a batch differ in length")
    if model.config.multi_label:
        raise ValueError("model must have one label per text, as the bundle has, got one with independent classes")
    if model.config.num_labels != bundle.num_classes:
        raise ValueError(f"model must have the bundle's {bundle.num_classes} classes, got {model.config.num_labels}")
    with _quiet():
        return _Run(model, tokenizer, bundle, recipe, Path(out), seed, progress=progress).finish(on_epoch)


# --------------------------------------------------------------------------------------------------------------- texts


class _Tokens(Dataset[dict[str, Any]]):
    """The tokens of N texts, one after another in one tensor: lists of lists would take ten times the memory."""

    def __init__(self, tokenizer: Any, texts: Any, max_length: int) -> None:
        first = list(texts["text"])
        second = list(texts["pair"]) if "pair" in texts.column_names else None
        self.labels = [int(label) for label in texts["label"]]
        lengths: list[int] = []
        ids: list[Tensor] = []
        types: list[Tensor] = []
        cut = 0
        for start in range(0, len(first), 1000):
            part = slice(start, start + 1000)
            found = tokenizer(
                first[part], None if second is None else second[part], truncation=True, max_length=max_length
            )
            for encoding in found.encodings:
                cut += bool(encoding.overflowing)
            for row in found["input_ids"]:
                lengths.append(len(row))
                ids.append(torch.tensor(row, dtype=torch.int32))
            types += [torch.tensor(row, dtype=torch.int8) for row in found.get("token_type_ids", ())]
        self.lengths = np.asarray(lengths)
        self.truncated = cut / len(first)
        self._ends = np.cumsum(self.lengths)
        self.ids = torch.cat(ids)
        self.types = torch.cat(types) if types else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        end, length = int(self._ends[index]), int(self.lengths[index])
        item = {"input_ids": self.ids[end - length : end].tolist(), "attention_mask": [1] * length}
        if self.types is not None:
            item["token_type_ids"] = self.types[end - length : end].tolist()
        return {**item, "labels": self.labels[index]}


class _LengthGroups(Sampler[int]):
    """A new order per epoch in which texts of a batch are about equally long, which saves padding."""

    def __init__(self, lengths: np.ndarray[Any, Any], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        order = generator.permutation(len(self.lengths))
        batches: list[np.ndarray[Any, Any]] = []
        for start in range(0, len(order), _GROUP * self.batch_size):
            part = order[start : start + _GROUP * self.batch_size]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            batches += [part[place : place + self.batch_size] for place in range(0, len(part), self.batch_size)]
        # One that is not full stays at the end, or it would shift the bounds of those after it.
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []
        shuffled = [batches[place] for place in generator.permutation(len(batches))]
        yield from np.concatenate(shuffled + rest).tolist()


def _judge(model: MHEXForSequenceClassification, tokens: _Tokens, collate: Any, batch_size: int) -> TextMetrics:
    """Loss and accuracies. Draws no random number."""
    device = next(model.parameters()).device
    order = np.argsort(-tokens.lengths, kind="stable").tolist()
    total, right, heads = 0.0, 0, np.zeros(len(model.blocks))
    mode = model.training
    model.train(mode=False)
    try:
        for start in range(0, len(order), batch_size):
            batch = collate([tokens[index] for index in order[start : start + batch_size]]).to(device)
            with torch.no_grad():
                output = model(**batch, output_heads=True, return_dict=True)
            labels = batch["labels"]
            total += float(output.loss) * len(labels)
            right += int((output.logits.argmax(dim=1) == labels).sum())
            heads += [int((logits.argmax(dim=1) == labels).sum()) for logits in output.head_logits]
    finally:
        model.train(mode=mode)
    count = len(order)
    return TextMetrics(loss=total / count, accuracy=right / count, head_accuracy=tuple((heads / count).tolist()))


# ----------------------------------------------------------------------------------------------------------- one run


class _Trainer(Trainer):
    """The library's trainer with our batches; it keeps the losses of an epoch."""

    def __init__(self, *arguments: Any, sampler: _LengthGroups, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.sampler = sampler
        self.losses: list[Tensor] = []
        self.learning_rate = 0.0

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in the order of our sampler."""
        arguments: Any = self.args
        loader: DataLoader[Any] = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]  # the library allows for none at all
            batch_size=arguments.per_device_train_batch_size,
            sampler=self.sampler,
            collate_fn=self.data_collator,
            pin_memory=arguments.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(self, *arguments: Any, **settings: Any) -> Tensor:
        """One step, whose loss and learning rate are kept."""
        assert self.optimizer is not None  # noqa: S101  # there is one while the library trains
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        loss: Tensor = super().training_step(*arguments, **settings)
        self.losses.append(loss.detach())
        return loss


@dataclass
class _Checkpoints:
    """The checkpoints of a run: of its last epoch, and of its best."""

    folder: Path
    whole: dict[int, Path] = field(default_factory=dict)
    history: tuple[TextEpoch, ...] = ()

    def scan(self) -> None:
        """Find those that are whole."""
        self.whole, self.history = {}, ()
        for path in self.folder.glob("checkpoint-*"):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                values = json.loads((path / _HISTORY_FILE).read_text(encoding="utf-8"))
                history = tuple(map(_epoch, values))
                self.whole[len(history)] = path
                if len(history) > len(self.history):
                    self.history = history

    def tidy(self) -> None:
        """Remove what is no longer needed, and what was cut short."""
        kept = {self.whole.get(len(self.history)), self.whole.get(_best(self.history))}
        for path in self.folder.glob("checkpoint-*"):
            if path not in kept:
                shutil.rmtree(path)
        self.whole = {epoch: path for epoch, path in self.whole.items() if path in kept}


class _Keeper(TrainerCallback):
    """Judges, writes down, shows and stops."""

    def __init__(self, run: _Run, trainer: _Trainer, on_epoch: Callable[[TextEpoch], None] | None) -> None:
        self.run, self.trainer, self.on_epoch = run, trainer, on_epoch
        self.bar: Any = None
        self.start = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Texts in the order of this epoch."""
        # Of a run that goes on, too: no loader has counted its epochs.
        self.trainer.sampler.epoch = round(state.epoch or 0)
        self.trainer.losses = []
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=math.ceil(state.max_steps / self.run.recipe.epochs),
            desc=f"epoch {self.trainer.sampler.epoch + 1}/{self.run.recipe.epochs}",
            unit="batch",
            leave=False,
            # None: a bar on a terminal, nothing where the output is piped.
            disable=None if self.run.progress and state.is_world_process_zero else True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Move the bar."""
        self.bar.update()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Judge, before the checkpoint is made."""
        self.bar.close()
        run, trainer = self.run, self.trainer
        loss = float(trainer.accelerator.reduce(torch.stack(trainer.losses).mean(), reduction="mean"))
        number = len(run.history) + 1
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss of epoch {number} is {loss}; lower the learning rate")
        validation = run.judge("validation")
        run.history = (
            *run.history,
            TextEpoch(
                epoch=number,
                learning_rate=trainer.learning_rate,
                train_loss=loss,
                validation=validation,
                seconds=time.perf_counter() - self.start,
            ),
        )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Make the checkpoint count, and the ones before it go."""
        run = self.run
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            path = run.checkpoints.folder / f"checkpoint-{state.global_step}"
            _write_text(path / _HISTORY_FILE, json.dumps([asdict(epoch) for epoch in run.history]))
            run.checkpoints.scan()
            run.checkpoints.tidy()
            run.write_log()
            if self.on_epoch is not None:
                self.on_epoch(run.history[-1])
        self.trainer.accelerator.wait_for_everyone()
        control.should_training_stop = control.should_training_stop or run.is_over()


class _Run:
    """One training run and its files."""

    def __init__(
        self,
        model: MHEXForSequenceClassification,
        tokenizer: Any,
        bundle: TextBundle,
        recipe: TextRecipe,
        out: Path,
        seed: int,
        *,
        progress: bool,
    ) -> None:
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self.out, self.seed, self.progress = out, seed, progress
        longest = explaining.most_tokens(model, tokenizer, recipe.max_length)
        self.max_length = recipe.max_length if longest is None else longest
        self.bundle = bundle
        self.settings = self._settings()
        self.history: tuple[TextEpoch, ...] = ()
        self.checkpoints = _Checkpoints(out / CHECKPOINTS)
        self.tokens: dict[str, _Tokens] = {}
        self.collate = DataCollatorWithPadding(tokenizer)
        model.config.id2label = dict(enumerate(bundle.class_names))
        model.config.label2id = {name: index for index, name in enumerate(bundle.class_names)}

    def finish(self, on_epoch: Callable[[TextEpoch], None] | None) -> TextTrainingResult:
        """Go on from where the files say, to the end."""
        finished = self._claim()
        if finished is not None:
            _load_weights(self.model, self.out / WEIGHTS_FILE)
            self._close()
            return finished
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("model must have a parameter that is trained, got one that is wholly frozen")
        self.tokens = {
            name: _Tokens(self.tokenizer, texts, self.max_length) for name, texts in self.bundle.splits().items()
        }
        highest = max(int(tokens.ids.max()) for tokens in self.tokens.values())
        if highest >= self.model.config.vocab_size:
            raise ValueError(
                f"tokenizer must be the encoder's own: the encoder knows {self.model.config.vocab_size} tokens, "
                f"got token {highest}"
            )
        trainer = self._trainer()
        if trainer.is_world_process_zero():
            self._write_record(None)
        self.checkpoints.scan()
        self.history = self.checkpoints.history
        if trainer.is_world_process_zero():
            self.checkpoints.tidy()
        if not self.is_over():
            self._train(trainer, on_epoch)
        trainer.accelerator.wait_for_everyone()
        self.checkpoints.scan()
        best = _best(self.history)
        _load_weights(self.model, self.checkpoints.whole[best] / WEIGHTS_FILE)
        result = TextTrainingResult(
            history=self.history,
            best_epoch=best,
            test=self.judge("test"),
            max_length=self.max_length,
            truncated={name: tokens.truncated for name, tokens in self.tokens.items()},
        )
        if trainer.is_world_process_zero():
            self._write_model()
            self.write_log()
            # With its result, the last file to be written, the run is finished.
            self._write_record(result)
            shutil.rmtree(self.checkpoints.folder)
        trainer.accelerator.wait_for_everyone()
        self._close()
        return result

    def is_over(self) -> bool:
        """Whether all epochs are done, or too many were no better than one before them."""
        done, patience = len(self.history), self.recipe.patience
        return done >= self.recipe.epochs or (
            patience is not None and done > 0 and done - _best(self.history) >= patience
        )

    def judge(self, split: str) -> TextMetrics | None:
        """How the classifier does on the texts of a split; None where there are none."""
        tokens = self.tokens.get(split)
        return None if tokens is None else _judge(self.model, tokens, self.collate, 2 * self.recipe.batch_size)

    def write_log(self) -> None:
        """One row per epoch."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        heads = [f"accuracy {name}" for name in explaining.layer_names(self.model)]
        names = ["epoch", "learning_rate", "train_loss", "validation_loss", "validation_accuracy", "seconds"]
        table.writerow(names + (heads if "validation" in self.tokens else []))
        for epoch in self.history:
            judged = epoch.validation
            values = [judged.loss, judged.accuracy] if judged else ["", ""]
            row = [epoch.epoch, epoch.learning_rate, epoch.train_loss, *values, round(epoch.seconds, 2)]
            table.writerow(row + (list(judged.head_accuracy) if judged else []))
        _write_text(self.out / LOG_FILE, text.getvalue())

    def _trainer(self) -> _Trainer:
        recipe = self.recipe
        cuda = torch.cuda.is_available()
        bf16 = recipe.mixed_precision == "bf16" or (
            recipe.mixed_precision == "auto" and cuda and torch.cuda.is_bf16_supported()
        )
        arguments = TrainingArguments(
            output_dir=str(self.checkpoints.folder),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
            optim="adamw_torch_fused",  # one pass over each parameter instead of ten
            bf16=bf16,
            use_cpu=bf16 and not torch.accelerator.is_available(),  # or the library refuses
            seed=self.seed,
            save_strategy="epoch",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=cuda,
        )
        # Several devices take several processes; one process would quietly multiply the batch.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        texts = self.tokens["train"]
        steps = math.ceil(len(texts) / (recipe.batch_size * arguments.world_size)) * recipe.epochs
        arguments.warmup_steps = math.ceil(recipe.warmup_ratio * steps)
        settings = dict(vars(self.model.config))
        trainer = _Trainer(
            model=self.model,
            args=arguments,
            train_dataset=texts,
            data_collator=self.collate,
            sampler=_LengthGroups(texts.lengths, recipe.batch_size, self.seed),
        )
        # The library puts settings of its own there, which do not belong to the model.
        for name in set(vars(self.model.config)) - set(settings):
            delattr(self.model.config, name)
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback", "NotebookProgressCallback"):
                trainer.remove_callback(callback)
        return trainer

    def _train(self, trainer: _Trainer, on_epoch: Callable[[TextEpoch], None] | None) -> None:
        trainer.add_callback(_Keeper(self, trainer, on_epoch))
        last = self.checkpoints.whole.get(len(self.history))
        model: Any = self.model
        checkpointed = self.recipe.gradient_checkpointing and not model.gradient_checkpointing
        if checkpointed:
            # transformers 5 gives it another name, and warns of the old one.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            # Mixed precision is for training: what is judged and handed back is the network as it will be loaded.
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
            trainer.accelerator.free_memory()
            if checkpointed:
                disable = getattr(model, "activation_checkpointing_disable", None)
                (disable or model.gradient_checkpointing_disable)()

    def _write_model(self) -> None:
        folder = self.checkpoints.folder / _FINAL
        shutil.rmtree(folder, ignore_errors=True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        mode = (folder / CONFIG_FILE).stat().st_mode
        for path in sorted(folder.iterdir()):
            path.chmod(mode)  # safetensors puts a file there that nobody else may read
            path.replace(self.out / path.name)

    def _close(self) -> None:
        """As the library loads it: in evaluation mode, and with the place where its tokenizer is found."""
        self.model.train(mode=False)
        self.model.config._name_or_path = str(self.out)
        # After a kill between the result and the tidying up they are still there.
        shutil.rmtree(self.checkpoints.folder, ignore_errors=True)

    def _claim(self) -> TextTrainingResult | None:
        """Make the folder this run's, or find out that it is already, or refuse. The result, if it is finished."""
        path = self.out / RUN_FILE
        if path.is_file():
            try:
                written = json.loads(path.read_text(encoding="utf-8"))
                past, result = written["settings"], written["result"]
                finished = None if result is None else _result(result)
                if not isinstance(past, dict):
                    raise TypeError("settings are no dictionary")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged or something else; choose another folder") from error
            there, here = _flat(past), _flat(self.settings)
            differing = [
                f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
                for name in sorted(there.keys() | here.keys())
                if there.get(name) != here.get(name)
            ]
            if differing:
                raise ValueError(
                    f"out must be a folder of this run, got {self.out} with another one ({'; '.join(differing)}); "
                    "choose another folder"
                )
            return finished
        other = [name for name in (WEIGHTS_FILE, CONFIG_FILE, LOG_FILE) if (self.out / name).exists()]
        # The library makes the folder of checkpoints, empty, a moment before the first record is written.
        other += [CHECKPOINTS] if any((self.out / CHECKPOINTS).glob("*")) else []
        if other:
            raise ValueError(f"out must be empty or a folder of this run, got {self.out} with {', '.join(other)}")
        return None

    def _settings(self) -> dict[str, Any]:
        config = self.model.config
        digest = hashlib.sha256()
        for texts in self.bundle.splits().values():
            for name in sorted({"text", "pair", "label"} & set(texts.column_names)):
                digest.update(json.dumps(list(texts[name])).encode())
        network = {
            "encoder": config.encoder.model_type,
            "layers": list(config.block_layers),
            "width": config.hidden_size,
            "vocabulary": config.vocab_size,
            "gate": config.gate,
            "objective": config.objective,
            "decay": config.decay,
            "freeze_backbone": config.freeze_backbone,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }
        data = {name: len(texts) for name, texts in self.bundle.splits().items()}
        found = {
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "data": {
                "name": self.bundle.name,
                "classes": list(self.bundle.class_names),
                **data,
                "sha256": digest.hexdigest()[:16],
            },
            "network": network,
            "tokenizer": {"kind": type(self.tokenizer).__name__, "vocabulary": len(self.tokenizer)},
        }
        read: dict[str, Any] = json.loads(json.dumps(found))
        return read

    def _write_record(self, result: TextTrainingResult | None) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        record = {
            "settings": self.settings,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            "threads": torch.get_num_threads(),
            "device": str(next(self.model.parameters()).device),
            "result": None if result is None else asdict(result),
        }
        _write_text(self.out / RUN_FILE, json.dumps(record, indent=2) + "\n")


def _best(history: tuple[TextEpoch, ...]) -> int:
    """The number of the epoch with the lowest validation loss, the first of equals; the last without validation."""
    judged = [
        (epoch.validation.loss if math.isfinite(epoch.validation.loss) else math.inf, epoch.epoch)
        for epoch in history
        if epoch.validation is not None
    ]
    return min(judged)[1] if judged else len(history)


def _load_weights(model: MHEXForSequenceClassification, path: Path) -> None:
    model.load_state_dict(load_file(path))


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings as `outer.inner`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _metrics(values: dict[str, Any] | None) -> TextMetrics | None:
    return None if values is None else TextMetrics(**{**values, "head_accuracy": tuple(values["head_accuracy"])})


def _epoch(values: dict[str, Any]) -> TextEpoch:
    return replace(TextEpoch(**values), validation=_metrics(values["validation"]))


def _result(values: dict[str, Any]) -> TextTrainingResult:
    return TextTrainingResult(
        **{**values, "history": tuple(map(_epoch, values["history"])), "test": _metrics(values["test"])}
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own bars, which saving a model brings up."""
    shown = library_logging.is_progress_bar_enabled()
    library_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            library_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
