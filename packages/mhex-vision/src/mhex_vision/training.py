"""Training on `accelerate`: one process, torchrun or Slurm alike; resumable to the bit; nothing half-written.

Everything random in an epoch follows from (seed, epoch, process), so a run that is continued after a kill goes through
the same batches, and on the same machine has the same losses, as one that was never interrupted.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import AdamW

from mhex_core import DeepSupervisionLoss, _checks
from mhex_core.bulk.options import at_most_processors
from mhex_core.files import remove_partials
from mhex_core.weights import read_weights
from mhex_vision import checkpoint
from mhex_vision.classifier import ClassifierOutput, MHEXClassifier
from mhex_vision.data.augment import imagenet_augmentation
from mhex_vision.data.sets import Batch, DataBundle, FolderImages, ImageSet
from mhex_vision.evaluation import IndexBatches, Metrics, Tally, batch_loader, metrics_of, tally
from mhex_vision.imbalance import chances, class_weights
from mhex_vision.plain import PlainClassifier
from mhex_vision.progress import bar
from mhex_vision.recipes import Recipe

RESUME_FILE = "resume.safetensors"
LOG_FILE = "log.csv"
RUN_FILE = "run.json"
_LOGGED = ("loss", "accuracy", "auc", "exact_match")
_WRITTEN = (checkpoint.WEIGHTS_FILE, checkpoint.CONFIG_FILE, RESUME_FILE, LOG_FILE)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of the log.

    Attributes:
        epoch: From 1.
        learning_rate: At its last step.
        train_loss: Mean over its steps.
        validation: None where there are no validation images.
        seconds: Training and validation.
    """

    epoch: int
    learning_rate: float
    train_loss: float
    validation: Metrics | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A finished run.

    Attributes:
        history: All epochs.
        best_epoch: The epoch whose weights were kept.
        test: How those do on the test images, or None where there are none.
    """

    history: tuple[Epoch, ...]
    best_epoch: int
    test: Metrics | None


class _Judge(Protocol):
    """What training asks of a loss."""

    def __call__(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor: ...


def train(
    model: nn.Module,
    data: DataBundle,
    recipe: Recipe,
    *,
    out: str | Path,
    seed: int = 0,
    workers: int = 0,
    overwrite: bool = False,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> TrainingResult:
    """Train a classifier and keep its best epoch.

    Written to `out`: `model.safetensors` (the best weights) and, for an `MHEXClassifier` or a `PlainClassifier`,
    `config.json`, so that `from_pretrained(out)` loads it; `log.csv`; `run.json`; while the run goes on,
    `resume.safetensors`. A run that was killed continues when the same call is made again.

    Args:
        model: An `MHEXClassifier`, or for comparison a `PlainClassifier` or any network whose output is (B, K) logits.
            It is trained in place and holds the best weights afterwards.
        data: Where images come from.
        recipe: How to train.
        out: A folder.
        seed: Of the order of images and of augmentation. (The weights are the caller's: seed before building them.)
        workers: Processes that decode image files.
        overwrite: Whether another run's files in `out` may be replaced.
        on_epoch: Called after each epoch, on the main process.

    Raises:
        ValueError: `out` holds a different or damaged run, or the model has another number of classes than the data.
        RuntimeError: A loss, of training, validation or test, is not finite, or no batch holds two readable images.
    """
    if isinstance(model, MHEXClassifier | PlainClassifier):
        if model.config.num_classes != data.num_classes:
            raise ValueError(f"model has {model.config.num_classes} classes and data has {data.num_classes}")
        if model.config.multi_label != data.multi_label:
            raise ValueError(f"model has multi_label={model.config.multi_label} and data {data.multi_label}")
        model.with_metadata(class_names=data.class_names, preprocessing=data.preprocessing)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number from 0, got {seed!r}")
    at_most_processors("workers", workers)
    run = _Run(model, data, recipe, Path(out), seed=seed, workers=workers, overwrite=overwrite)
    return run.finish(on_epoch)


class _Run:
    """One training run and its files."""

    def __init__(
        self,
        model: nn.Module,
        data: DataBundle,
        recipe: Recipe,
        out: Path,
        *,
        seed: int,
        workers: int,
        overwrite: bool,
    ) -> None:
        self.accelerator = _accelerator(_precision(recipe))
        self.data, self.recipe, self.out, self.seed = data, recipe, out, seed
        self.network = model
        self.class_weights = class_weights(data, recipe)
        named = "pos_weight" if data.multi_label else "weight"
        how: dict[str, Any] = {"label_smoothing": recipe.label_smoothing}
        if self.class_weights is not None:
            how[named] = torch.tensor(list(self.class_weights.values()))
        own = isinstance(model, MHEXClassifier)
        loss = cast("Any", model).loss(**how) if own else DeepSupervisionLoss(multi_label=data.multi_label, **how)
        self.loss: _Judge = loss.to(self.accelerator.device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("model has no parameter that requires a gradient")
        self.optimizer = AdamW(
            trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=_can_fuse(self.accelerator.device)
        )
        source = data.train
        if recipe.augment == "imagenet":
            if not isinstance(source, FolderImages):
                raise ValueError("augment='imagenet' works on image files, and these images are in memory")
            source = source.with_augmentation(imagenet_augmentation(data.preprocessing.size))
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        drawn = chances(data.train.labels, data.num_classes) if recipe.sampler == "balanced" else None
        self.batches = IndexBatches(len(source), recipe.batch_size, seed=seed, rank=rank, world=world, chances=drawn)
        self.loader = batch_loader(source, self.batches, workers=workers)
        self.workers = workers
        self.history: list[Epoch] = []
        self.best_epoch = 0
        out.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            remove_partials(out, (*_WRITTEN, RUN_FILE))
        self._claim(overwrite=overwrite)

    def finish(self, on_epoch: Callable[[Epoch], None] | None) -> TrainingResult:
        """Go on from where the files say, to the end."""
        if self.finished is not None:
            if self.accelerator.is_main_process:  # there after a kill between the result and the tidying up
                (self.out / RESUME_FILE).unlink(missing_ok=True)
            checkpoint.load_weights(self.network, self.out)
            self.network.eval()
            return self.finished
        resumed = self._resume()
        prepared = self.accelerator.prepare(self.network, self.optimizer)
        self.prepared, self.prepared_optimizer = prepared
        if resumed is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(resumed)
        for index in range(len(self.history), self.recipe.epochs):
            if self._is_stale():
                break
            epoch = self._train_epoch(index)
            self.history.append(epoch)
            if self._is_best(epoch):
                self.best_epoch = epoch.epoch
                self._save_best()
            self._save_progress()
            if on_epoch is not None and self.accelerator.is_main_process:
                on_epoch(epoch)
        self.accelerator.wait_for_everyone()
        # Mixed precision is for training: what is judged and handed back is the network as it will be loaded.
        self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)
        checkpoint.load_weights(self.network, self.out)
        self.network.eval()
        test = None if self.data.test is None else self._judge(self.data.test, "test")
        result = TrainingResult(history=tuple(self.history), best_epoch=self.best_epoch, test=test)
        if self.accelerator.is_main_process:
            self._write_log(result)
            (self.out / RESUME_FILE).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return result

    def _train_epoch(self, index: int) -> Epoch:
        start = time.perf_counter()
        _seed_everything(self.seed, index, self.accelerator.process_index)
        self.batches.epoch = index
        self.prepared.train()
        losses: list[Tensor] = []
        steps = self.recipe.epochs * len(self.batches)
        rate = self.recipe.learning_rate
        name = f"epoch {index + 1}/{self.recipe.epochs}"
        with bar(self.loader, desc=name, shown=self.accelerator.is_main_process) as batches:
            for step, batch in enumerate(batches):
                if len(batch.images) < 2:  # batch statistics need two
                    if self.accelerator.num_processes > 1:
                        raise RuntimeError("a whole batch of image files is unreadable; remove the files warned about")
                    continue
                rate = self.recipe.learning_rate_at(index * len(self.batches) + step, steps)
                for group in self.prepared_optimizer.param_groups:
                    group["lr"] = rate
                images, labels = self._to_device(batch)
                with self.accelerator.autocast():
                    output = self.prepared(images)
                loss = self.loss(_supervised(self.network, output), labels)
                self.prepared_optimizer.zero_grad()
                self.accelerator.backward(loss)
                self.prepared_optimizer.step()
                losses.append(loss.detach())
                last = batch
        if not losses:
            raise RuntimeError("no batch of training images holds two that can be read, and batch statistics need two")
        mean = float(self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
        _checks.finite_loss(f"epoch {index + 1}", mean)
        if self.data.validation is None:
            validation = None
            # No loss was computed after the last step yet, and that step may have been the one too far.
            self._metrics(tally(self.network, [last], self.data, self.accelerator.device), f"epoch {index + 1}")
        else:
            validation = self._judge(self.data.validation, f"{name}, validation")
        return Epoch(
            epoch=index + 1,
            learning_rate=rate,
            train_loss=mean,
            validation=validation,
            seconds=time.perf_counter() - start,
        )

    def _judge(self, images: ImageSet, name: str) -> Metrics:
        """Every process takes its share of the images, each image once; the counts are then added up."""
        batches = IndexBatches(
            len(images),
            2 * self.recipe.batch_size,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        loader = batch_loader(images, batches, workers=self.workers)
        with bar(loader, desc=name, shown=self.accelerator.is_main_process) as shown:
            found = tally(self.network, shown, self.data, self.accelerator.device)
        return self._metrics(found, name)

    def _metrics(self, found: Tally, name: str) -> Metrics:
        """Of what every process has found in its share."""
        sums = cast("Tensor", self.accelerator.reduce(found.sums, reduction="sum"))
        logits, labels = self._joined(found.logits), self._joined(found.labels)
        return metrics_of(Tally(sums, logits, labels), name)

    def _joined(self, rows: Tensor) -> Tensor:
        """The rows of every process, which may have different numbers of them."""
        if self.accelerator.num_processes == 1:
            return rows
        counts = cast("Tensor", self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)))
        padded = self.accelerator.gather(self.accelerator.pad_across_processes(rows.contiguous()))
        parts = cast("Tensor", padded).chunk(len(counts)) if int(counts.max()) else (rows,)
        return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=False)])

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        return self.data.preprocessing.normalize(batch.images.to(device, non_blocking=True)), batch.labels.to(device)

    def _is_best(self, epoch: Epoch) -> bool:
        best = next((past for past in self.history[:-1] if past.epoch == self.best_epoch), None)
        if best is None or best.validation is None or epoch.validation is None:
            return True
        new, old = epoch.validation, best.validation
        if self.recipe.monitor == "loss":
            return new.loss < old.loss
        if self.recipe.monitor == "auc":
            # Of validation images that are all of one class there is no area; the loss decides then.
            return (new.auc or 0.0, -new.loss) > (old.auc or 0.0, -old.loss)
        return (new.accuracy, -new.loss) > (old.accuracy, -old.loss)

    def _is_stale(self) -> bool:
        patience = self.recipe.patience
        return patience is not None and len(self.history) - self.best_epoch >= patience

    # Files. The best weights are written before the progress, so a kill between the two repeats one epoch and writes
    # the same weights again.

    def _save_best(self) -> None:
        if not self.accelerator.is_main_process:
            return
        if isinstance(self.network, MHEXClassifier | PlainClassifier):
            checkpoint.write(self.network, self.out)
        else:
            checkpoint.write_tensors(self.out / checkpoint.WEIGHTS_FILE, self.network.state_dict())

    def _save_progress(self) -> None:
        if not self.accelerator.is_main_process:
            return
        tensors = {f"model.{name}": value for name, value in self.network.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        scaler = self.accelerator.scaler
        progress = {
            "history": [asdict(epoch) for epoch in self.history],
            "best_epoch": self.best_epoch,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        checkpoint.write_tensors(self.out / RESUME_FILE, tensors, {"progress": json.dumps(progress)})
        self._write_log(None)

    def _resume(self) -> dict[str, Any] | None:
        path = self.out / RESUME_FILE
        if not path.is_file():
            return None
        try:
            tensors = read_weights(path)
            progress = json.loads(checkpoint.read_metadata(path)["progress"])
            self.network.load_state_dict(_below("model.", tensors))
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in _below("optimizer.", tensors).items():
                index, _, key = name.partition(".")
                state.setdefault(int(index), {})[key] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.history = [_epoch(entry) for entry in progress["history"]]
            self.best_epoch = progress["best_epoch"]
            return cast("dict[str, Any] | None", progress["scaler"])
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"the run in {self.out} cannot go on, because {path.name} is damaged or something else; delete that "
                "file, or allow to overwrite, to start from the first epoch"
            ) from error

    def _claim(self, *, overwrite: bool) -> None:
        """Make the folder this run's, or find out that it is already, or refuse."""
        self.finished: TrainingResult | None = None
        path = self.out / RUN_FILE
        settings = self._settings()
        if path.is_file() and not overwrite:
            try:
                written = json.loads(path.read_text(encoding="utf-8"))
                past = written["settings"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged or something else; choose another folder") from error
            if past != json.loads(json.dumps(settings)):
                differing = sorted(key for key in settings if past.get(key) != json.loads(json.dumps(settings[key])))
                raise ValueError(
                    f"{self.out} holds another run (it differs in {', '.join(differing)}); "
                    "choose another folder, or allow to overwrite it"
                )
            if written["result"] is not None:
                result = written["result"]
                self.finished = TrainingResult(
                    history=tuple(_epoch(entry) for entry in result["history"]),
                    best_epoch=result["best_epoch"],
                    test=_metrics_from(result["test"]),
                )
            return
        if any((self.out / name).exists() for name in _WRITTEN) and not overwrite:
            raise ValueError(f"{self.out} holds something else; choose another folder, or allow to overwrite it")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for name in _WRITTEN:
                (self.out / name).unlink(missing_ok=True)
            self._write_log(None)
        self.accelerator.wait_for_everyone()

    def _settings(self) -> dict[str, Any]:
        network = (
            json.loads(self.network.config.to_json())
            if isinstance(self.network, MHEXClassifier | PlainClassifier)
            else None
        )
        return {
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "data": {"name": self.data.name, "train": len(self.data.train), "size": self.data.preprocessing.size},
            "network": network or type(self.network).__name__,
            "processes": self.accelerator.num_processes,
        }

    def _write_log(self, result: TrainingResult | None) -> None:
        record = {
            "settings": self._settings(),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "threads": torch.get_num_threads(),
            "device": str(self.accelerator.device),
            "class_weights": self.class_weights,
            "result": None if result is None else asdict(result),
        }
        checkpoint.write_text(self.out / RUN_FILE, json.dumps(record, indent=2) + "\n")
        checkpoint.write_text(self.out / LOG_FILE, self._csv())

    def _csv(self) -> str:
        names = list(self.network.layer_names) if isinstance(self.network, MHEXClassifier) else []
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        heads = [f"accuracy {name}" for name in names]
        table.writerow(
            ["epoch", "learning_rate", "train_loss", *(f"validation_{name}" for name in _LOGGED), "seconds", *heads]
        )
        for epoch in self.history:
            judged = epoch.validation
            values = [getattr(judged, name, None) for name in _LOGGED]  # None is an empty cell
            table.writerow(
                [epoch.epoch, epoch.learning_rate, epoch.train_loss, *values, round(epoch.seconds, 2)]
                + (list(judged.head_accuracy) if judged else [])
            )
        return text.getvalue()


def _supervised(network: nn.Module, output: ClassifierOutput | Tensor) -> tuple[Tensor, ...]:
    if isinstance(network, MHEXClassifier) and isinstance(output, ClassifierOutput):
        return network.supervised_logits(output)
    if isinstance(output, Tensor):
        return (output,)
    raise TypeError(f"model must return (B, K) logits or a ClassifierOutput, got {type(output).__name__}")


def _accelerator(precision: str) -> Accelerator:
    # The precision is kept for the whole process, and accelerate refuses another one; a run chooses for itself.
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()
    # Without being told, accelerate leaves processes on CPUs alone: each would train by itself into one folder.
    several_on_cpus = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
    return Accelerator(mixed_precision=precision, cpu=several_on_cpus)


def _precision(recipe: Recipe) -> str:
    if recipe.mixed_precision != "auto":
        return recipe.mixed_precision
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def _can_fuse(device: torch.device) -> bool:
    """One pass over each parameter instead of ten: a sixth of an epoch of a ResNet-18 on small images."""
    return device.type in ("cpu", "cuda", "mps")


def _seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Dropout, augmentation and worker processes draw from these generators."""
    state = int(np.random.default_rng([seed, epoch, rank]).integers(2**31))
    random.seed(state)
    np.random.seed(state)  # noqa: NPY002 - libraries used for augmentation draw from the old generator
    torch.manual_seed(state)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _metrics_from(values: dict[str, Any] | None) -> Metrics | None:
    if values is None:
        return None
    lists = {name: tuple(values[name]) for name in ("head_accuracy", "without_auc")}
    return Metrics(**{**values, **lists})


def _epoch(values: dict[str, Any]) -> Epoch:
    return replace(Epoch(**values), validation=_metrics_from(values["validation"]))
