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
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from mhex_core import _checks
from mhex_core.weights import read_weights
from mhex_text import explaining
from mhex_text._library import quiet
from mhex_text.accuracy import accuracies
from mhex_text.batching import LengthGroups, TokenizedTexts
from mhex_text.data import TextBundle
from mhex_text.history import TextEpoch, TextMetrics, TextTrainingResult, best_epoch
from mhex_text.loading import seal_checkpoint
from mhex_text.modeling import MHEXForSequenceClassification
from mhex_text.progress import bar
from mhex_text.recipes import TextRecipe
from mhex_text.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    HISTORY_FILE,
    LOG_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    Checkpoints,
    claim,
    write_text,
)

_FINAL = "final"
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_LIBRARIES = ("mhex-text", "torch", "transformers", "tokenizers", "accelerate", "datasets")


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    bundle: TextBundle,
    recipe: TextRecipe,
    *,
    out: str | Path,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    on_epoch: Callable[[TextEpoch], None] | None = None,
) -> TextTrainingResult:
    """Train a classifier and keep its best epoch.

    Written to `out`: `model.safetensors` and `config.json` of the best epoch with the tokenizer's files, so that
    `AutoModelForSequenceClassification.from_pretrained(out)` loads it; `log.csv`; `run.json`; while the run goes on,
    `.checkpoints`. A run that was killed goes on from its last whole epoch when the same call is made again, to the
    same bits on the same machine. One that is finished is not trained again.

    Args:
        model: An `MHEXForSequenceClassification`; or another text classifier of transformers, which explains nothing
            and serves as what ours is compared with, and as a judge of explanations. It is trained in place, takes the
            names of the classes over, and holds the best weights afterwards, in evaluation mode. What is frozen stays
            so.
        tokenizer: The encoder's own, a fast one.
        bundle: The texts.
        recipe: How to train.
        out: A folder.
        seed: Of the order of texts and of dropout. (The weights are the caller's: seed before building them.)
        overwrite: Whether another run in `out` may be replaced.
        progress: Whether a terminal shows a bar per epoch. Elsewhere there is none.
        on_epoch: Called after each epoch, on the main process, when its checkpoint is whole.

    Raises:
        TypeError: An argument is of another type.
        ValueError: `out` holds another run or something else, or model, tokenizer and texts do not go together.
        RuntimeError: A loss, of training, validation or test, is not finite.
    """
    if not (isinstance(model, MHEXForSequenceClassification) or _is_text_classifier(model)):
        raise TypeError(
            "model must be an MHEXForSequenceClassification or another ...ForSequenceClassification of transformers, "
            f"got {type(model).__name__}"
        )
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
    _checks.flag("overwrite", overwrite)
    _checks.flag("progress", progress)
    if not callable(tokenizer) or not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer must be a fast tokenizer, got {type(tokenizer).__name__}")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer must have a padding token, got one without: texts of a batch differ in length")
    if model.config.problem_type not in (None, "single_label_classification"):
        raise ValueError("model must have one label per text, as the bundle has, got one for another problem")
    if model.config.num_labels != bundle.num_classes:
        raise ValueError(f"model must have the bundle's {bundle.num_classes} classes, got {model.config.num_labels}")
    with quiet(reports=True):
        run = _Run(model, tokenizer, bundle, recipe, Path(out), seed, progress=progress)
        return run.finish(on_epoch, overwrite=overwrite)


def _is_text_classifier(model: object) -> bool:
    # The names only: asking for the classes would import every architecture there is.
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    return isinstance(model, PreTrainedModel) and type(model).__name__ in known


# ----------------------------------------------------------------------------------------------------------- one run


class _Trainer(Trainer):
    """The library's trainer with our batches; it keeps the losses of an epoch."""

    def __init__(self, *arguments: Any, sampler: LengthGroups, **settings: Any) -> None:
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
        self.bar = bar(
            math.ceil(state.max_steps / self.run.recipe.epochs),
            description=f"epoch {self.trainer.sampler.epoch + 1}/{self.run.recipe.epochs}",
            unit="batch",
            shown=self.run.progress,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Move the bar."""
        self.bar.update()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Judge, before the checkpoint is made."""
        self.bar.close()
        run, trainer = self.run, self.trainer
        number, mean = len(run.history) + 1, torch.stack(trainer.losses).mean()
        loss = _checks.finite_loss(f"epoch {number}", float(trainer.accelerator.reduce(mean, reduction="mean")))
        validation = run.judge("validation")
        if validation is None:
            run.judge("train", limit=run.recipe.batch_size)  # the last step may have been the one too far
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
            write_text(path / HISTORY_FILE, json.dumps([asdict(epoch) for epoch in run.history]))
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
        model: PreTrainedModel,
        tokenizer: Any,
        bundle: TextBundle,
        recipe: TextRecipe,
        out: Path,
        seed: int,
        *,
        progress: bool,
    ) -> None:
        self.model: Any = model
        self.tokenizer, self.recipe = tokenizer, recipe
        self.out, self.seed = out, seed
        self.progress = progress and os.environ.get("RANK", "0") == "0"
        longest = explaining.most_tokens(model, tokenizer, recipe.max_length)
        self.max_length = recipe.max_length if longest is None else longest
        self.bundle = bundle
        self.settings = self._settings()
        self.history: tuple[TextEpoch, ...] = ()
        self.checkpoints = Checkpoints(out / CHECKPOINTS)
        self.tokens: dict[str, TokenizedTexts] = {}
        self.collate = DataCollatorWithPadding(tokenizer)
        self.processes = 1
        model.config.id2label = dict(enumerate(bundle.class_names))
        model.config.label2id = {name: index for index, name in enumerate(bundle.class_names)}

    def finish(self, on_epoch: Callable[[TextEpoch], None] | None, *, overwrite: bool) -> TextTrainingResult:
        """Go on from where the files say, to the end."""
        finished = claim(self.out, self.settings, overwrite=overwrite)
        if finished is not None:
            self.model.load_state_dict(read_weights(self.out / WEIGHTS_FILE))
            self._close()
            return finished
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError("model must have a parameter that is trained, got one that is wholly frozen")
        self.tokens = {
            name: TokenizedTexts(self.tokenizer, texts, self.max_length, name=name, progress=self.progress)
            for name, texts in self.bundle.splits().items()
        }
        highest = max(int(tokens.ids.max()) for tokens in self.tokens.values())
        if highest >= self.model.config.vocab_size:
            raise ValueError(
                f"tokenizer must be the encoder's own: the encoder knows {self.model.config.vocab_size} tokens, "
                f"got token {highest}"
            )
        with _precision_forgotten():
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
        best = best_epoch(self.history)
        self.model.load_state_dict(read_weights(self.checkpoints.whole[best] / WEIGHTS_FILE))
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
            patience is not None and done > 0 and done - best_epoch(self.history) >= patience
        )

    def judge(self, split: str, *, limit: int | None = None) -> TextMetrics | None:
        """How the classifier does on the texts of a split, or some of them; None where there are none."""
        tokens = self.tokens.get(split)
        if tokens is None:
            return None
        size = 2 * self.recipe.batch_size
        return accuracies(self.model, tokens, self.collate, size, name=split, progress=self.progress, limit=limit)

    def write_log(self) -> None:
        """One row per epoch."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        own = isinstance(self.model, MHEXForSequenceClassification)
        heads = [f"accuracy {name}" for name in explaining.layer_names(self.model)] if own else []
        names = ["epoch", "learning_rate", "train_loss", "validation_loss", "validation_accuracy", "seconds"]
        table.writerow(names + (heads if "validation" in self.tokens else []))
        for epoch in self.history:
            judged = epoch.validation
            values = [judged.loss, judged.accuracy] if judged else ["", ""]
            row = [epoch.epoch, epoch.learning_rate, epoch.train_loss, *values, round(epoch.seconds, 2)]
            table.writerow(row + (list(judged.head_accuracy) if judged else []))
        write_text(self.out / LOG_FILE, text.getvalue())

    def _trainer(self) -> _Trainer:
        recipe = self.recipe
        cuda = torch.cuda.is_available()
        bf16 = recipe.mixed_precision == "bf16" or (
            recipe.mixed_precision == "auto" and cuda and torch.cuda.is_bf16_supported()
        )
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        arguments = TrainingArguments(
            output_dir=str(self.checkpoints.folder),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule,
            optim="adamw_torch_fused",  # one pass over each parameter instead of ten
            bf16=bf16,
            # Else the library refuses bf16, and lets several processes train each a model of its own.
            use_cpu=not torch.accelerator.is_available(),
            ddp_backend="gloo" if not alone and not torch.accelerator.is_available() else None,
            seed=self.seed,
            save_strategy="epoch",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            # The normalisation behind the last block, which no head reads, has no gradient to wait for.
            ddp_find_unused_parameters=isinstance(self.model, MHEXForSequenceClassification),
            dataloader_pin_memory=cuda,
        )
        # Several devices take several processes; one process would quietly multiply the batch.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        self.processes = arguments.world_size
        texts = self.tokens["train"]
        steps = math.ceil(len(texts) / (recipe.batch_size * arguments.world_size)) * recipe.epochs
        arguments.warmup_steps = math.ceil(recipe.warmup_ratio * steps)
        settings = dict(vars(self.model.config))
        trainer = _Trainer(
            model=self.model,
            args=arguments,
            train_dataset=texts,
            data_collator=self.collate,
            sampler=LengthGroups(texts.lengths, recipe.batch_size, self.seed),
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
        model = self.model
        already = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        checkpointed = self.recipe.gradient_checkpointing and not already
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
        if not isinstance(self.model, MHEXForSequenceClassification):  # which does so by itself
            seal_checkpoint(folder)
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

    def _settings(self) -> dict[str, Any]:
        config = self.model.config
        digest = hashlib.sha256()
        for texts in self.bundle.splits().values():
            for name in sorted({"text", "pair", "label"} & set(texts.column_names)):
                digest.update(json.dumps(list(texts[name])).encode())
        network = {
            **(_blocks(config) if isinstance(self.model, MHEXForSequenceClassification) else _plain(self.model)),
            "width": config.hidden_size,
            "vocabulary": config.vocab_size,
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
            "processes": self.processes,
            "device": str(next(self.model.parameters()).device),
            "result": None if result is None else asdict(result),
        }
        write_text(self.out / RUN_FILE, json.dumps(record, indent=2) + "\n")


def _blocks(config: Any) -> dict[str, Any]:
    return {
        "encoder": config.encoder.model_type,
        "layers": list(config.block_layers),
        "gate": config.gate,
        "objective": config.objective,
        "decay": config.decay,
        "freeze_backbone": config.freeze_backbone,
    }


def _plain(model: PreTrainedModel) -> dict[str, Any]:
    return {"encoder": model.config.model_type, "plain": type(model).__name__}


@contextlib.contextmanager
def _precision_forgotten() -> Iterator[None]:
    """Transformers 4 tells accelerate of bf16 by a variable of the environment, and leaves it to the next run."""
    past = os.environ.pop(_PRECISION, None)
    try:
        yield
    finally:
        os.environ.pop(_PRECISION, None)
        if past is not None:
            os.environ[_PRECISION] = past
