"""The command line: train, explain, report, batch, evaluate, demo, info.

Exit status: 0 all done; 1 the command failed, one line on standard error says why; 2 the command line is wrong; 3 some
images could not be read, all others are done; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

from mhex_vision.recipes import RECIPES

# What `Placement`, `Classifier`, `Objective`, `Engine`, `Storage` and `Autocast` allow, written out because their
# modules import torch, and `--help` should not wait for that.
PLACEMENTS = ("all", "downsample", "stage")
CLASSIFIERS = ("drop", "keep")
SAMPLERS = ("shuffled", "balanced")
MONITORS = ("accuracy", "loss", "auc")
OBJECTIVES = ("layerwise", "joint")
ENGINES = ("embedded", "ray")
STORAGES = ("uint8", "float16")
AUTOCAST = ("bfloat16", "float16")

SPLITS = ("train", "validation", "test")

SOME_UNREADABLE = 3
INTERRUPTED = 130

_EXAMPLES = """examples:
  mhex-vision demo --out demo
  mhex-vision train --data bloodmnist --root DIR --backbone resnet18 --epochs 20 --out runs/blood
  mhex-vision train --data photos/ --backbone resnet50 --weights DEFAULT --recipe imagenet-finetune --out runs/photos
  mhex-vision explain --checkpoint runs/blood --input images/ --out explained
  mhex-vision report --checkpoint runs/blood --data bloodmnist --root DIR --out report.html
  mhex-vision batch --checkpoint runs/blood --input "shards/{000..099}.tar" --out archive --resolution native
  mhex-vision train --data bloodmnist --plain --backbone resnet34 --seed 1 --out runs/judge
  mhex-vision evaluate --checkpoint runs/blood --judge runs/judge --data bloodmnist --out measured
"""

_METHODS = """methods:
  the classifier's own: mhex, mhex-paper, mhex-authors; to compare with: random, centre-gaussian
  of vision transformers: cdam, gmar, attention, attention-rollout, attention-flow, attention-gradcam,
  attention-shapley, attcat, generic-relevance, grad-sam, vit-cx
  from other libraries (pip install "mhex-vision[bench]"): gradcam, gradcam++, layercam, scorecam, eigencam,
  integrated-gradients, shap
  your own: module:function, called with (model, images, targets) and returning maps (B, H, W)
  options follow a colon: mhex:beta=0.5,decay=1  cdam:mode=smooth  gradcam:layer=layer3.1
"""

_METHODS_AND_METRICS = f"""{_METHODS}metrics:
  sad, avg_drop, ead, area_drop, confidence_increase, insertion, deletion, road, infidelity, sensitivity_n,
  completeness, fidelity, box_sensitivity, compactness, class_sensitivity, class_sensitivity_least; with masks:
  pointing, mass_inside, iou
  options follow a colon: sad,deletion:steps=32,baseline=mean
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status is returned, except for what argparse ends itself."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print(f"mhex-vision: interrupted{options.when_interrupted}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, LookupError, TypeError, RuntimeError, OSError, ImportError, MemoryError) as error:
        from mhex_core.program import error_line

        print(f"mhex-vision: error: {error_line(error, options)}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mhex-vision",
        description="Train image classifiers that explain themselves, and see what they looked at.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(when_interrupted="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_explain(commands)
    _add_report(commands)
    _add_batch(commands)
    _add_evaluate(commands)
    _add_demo(commands)
    _add_info(commands)
    return parser


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a classifier on images",
        description="Train a classifier that explains itself. A run that was stopped goes on when repeated.",
    )
    train.set_defaults(run=_train, when_interrupted="; the same command goes on from the last finished epoch")
    data = train.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        metavar="NAME|FOLDER",
        help="a 2D MedMNIST set such as bloodmnist, synthetic-lesions, or a folder with one sub-folder per class",
    )
    data.add_argument("--root", type=Path, metavar="DIR", help="where MedMNIST files lie or are downloaded to")
    data.add_argument("--no-download", action="store_true", help="use only MedMNIST files that are already there")
    data.add_argument("--size", type=int, metavar="PX", help="side of the images (default: 28, 64 or 224, by the data)")
    data.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode files (default: 0)")
    network = train.add_argument_group("network")
    network.add_argument(
        "--backbone",
        default="resnet18",
        metavar="NAME|RUN",
        help="torchvision name or timm/NAME, its options after a colon; or a run of train --plain, which blocks are\n"
        "attached to (default: resnet18)",
    )
    network.add_argument("--weights", metavar="NAME", help="pretrained weights to start from, such as DEFAULT")
    network.add_argument(
        "--plain", action="store_true", help="the backbone alone: it explains nothing, and judges for `evaluate`"
    )
    network.add_argument(
        "--at", choices=PLACEMENTS, help="which residual connections; without it all of them, above a dozen one a stage"
    )
    network.add_argument("--no-gate", action="store_true", help="heads only, no attention gates")
    network.add_argument("--freeze-backbone", action="store_true", help="train gates and heads alone")
    network.add_argument("--classifier", choices=CLASSIFIERS, default="drop", help="the network's own one")
    network.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="layerwise",
        help="layerwise: every head by itself; joint: their decayed sum (default: layerwise)",
    )
    training = train.add_argument_group("training")
    training.add_argument("--recipe", choices=sorted(RECIPES), default="medmnist", help="preset (default: medmnist)")
    training.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's")
    training.add_argument("--batch-size", type=int, metavar="N", help="instead of the recipe's")
    training.add_argument("--learning-rate", type=float, metavar="X", help="instead of the recipe's")
    training.add_argument("--patience", type=int, metavar="N", help="stop after N epochs without a better one")
    training.add_argument(
        "--monitor", choices=MONITORS, help="what the best epoch is judged by, instead of the recipe's"
    )
    training.add_argument(
        "--class-weights",
        metavar="balanced|FILE",
        help="weigh classes in the loss: rare ones more, or as a JSON or CSV file of names and weights says",
    )
    training.add_argument("--sampler", choices=SAMPLERS, help="balanced: draw every class as often as any other")
    training.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    training.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder for checkpoint and log")
    training.add_argument("--overwrite", action="store_true", help="replace another run in that folder")


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    explain = commands.add_parser(
        "explain",
        help="explain a classifier's predictions on image files",
        description="Write an overlay PNG per image and one explanations.json; unreadable images are named and skipped",
        epilog=_METHODS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.set_defaults(run=_explain)
    explain.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="a folder from `train`, or a hub repository"
    )
    explain.add_argument(
        "--input", type=Path, required=True, metavar="FILE|FOLDER", help="an image, or a folder of them"
    )
    explain.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for overlays and JSON")
    explain.add_argument(
        "--target", metavar="CLASS", help="name or number of the class to explain (default: predicted)"
    )
    explain.add_argument(
        "--method", default="mhex", metavar="NAME", help="another method, with options after a colon (default: mhex)"
    )
    explain.add_argument(
        "--beta", type=float, metavar="X", help="weight of negative evidence in the classifier's own maps (default: 0)"
    )
    explain.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    explain.add_argument("--maps", action="store_true", help="also write each batch's maps as an .npz explanation")


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="write one HTML page in which explanations are looked at and weighed anew",
        description="Explain images and write one HTML file without need of network or server: a gallery, the maps\n"
        "of every layer, and sliders for beta and each layer's weight. Unreadable images are named and skipped.\n"
        "With --archive it shows what `batch` stored, and needs no network.",
        epilog=_METHODS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.set_defaults(run=_report, refuse=report.error)
    report.add_argument(
        "--checkpoint", metavar="RUN", help="a folder from `train`, or a hub repository; needed without --archive"
    )
    images = report.add_mutually_exclusive_group(required=True)
    images.add_argument("--input", type=Path, metavar="FILE|FOLDER", help="an image, or a folder of them")
    images.add_argument(
        "--data", metavar="NAME|FOLDER", help="labelled images: a 2D MedMNIST set, synthetic-lesions, or a folder"
    )
    images.add_argument("--archive", type=Path, metavar="DIR", help="what `batch` wrote: maps as they are stored")
    report.add_argument("--doubtful", action="store_true", help="of --archive: the least probable predictions")
    report.add_argument("--predicted", metavar="CLASS", help="of --archive: predictions of this class alone")
    report.add_argument("--split", choices=SPLITS, help="which images of --data (default: test)")
    report.add_argument("--root", type=Path, metavar="DIR", help="where MedMNIST files lie or are downloaded to")
    report.add_argument("--no-download", action="store_true", help="use only MedMNIST files that are already there")
    report.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, such as report.html")
    report.add_argument("--methods", metavar="A,B", help="to be compared (default: mhex)")
    report.add_argument("--samples", type=int, default=200, metavar="N", help="a random choice of N (default: 200)")
    report.add_argument(
        "--targets",
        type=int,
        metavar="N",
        help="the N most probable classes are explained, and the true one (default: 3)",
    )
    report.add_argument(
        "--beta", type=float, metavar="X", help="where the slider stands in the classifier's own maps (default: 0)"
    )
    report.add_argument("--batch-size", type=int, metavar="N", help="(default: 32)")
    report.add_argument("--seed", type=int, default=0, metavar="S", help="of the data and of the choice (default: 0)")
    report.add_argument("--title", default="Explanations", metavar="T", help="of the page (default: Explanations)")
    report.add_argument(
        "--max-mb",
        type=float,
        default=30,
        metavar="X",
        help="largest size of the page; less probable classes are left out for it (default: 30)",
    )


def _add_batch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    batch = commands.add_parser(
        "batch",
        help="explain archives of millions of images",
        description="Explain many images into Parquet files of predictions and maps, a manifest, and a table of what\n"
        "could not be read. What was stopped, or killed, goes on when repeated. Every value is the same\n"
        "whatever --batch-size, --workers, --lanes and --engine are.",
        epilog=_METHODS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.set_defaults(run=_batch, when_interrupted="; the same command goes on with what is missing")
    data = batch.add_argument_group("images")
    data.add_argument(
        "--input",
        required=True,
        metavar="X",
        help="an image, a folder of images, tar or Parquet files, one such file, a pattern such as "
        "'shard-{000..012}.tar', a .txt list of paths, or the name of a 2-D MedMNIST set",
    )
    data.add_argument("--split", choices=SPLITS, default="test", help="of a MedMNIST set (default: test)")
    data.add_argument("--root", type=Path, metavar="DIR", help="where MedMNIST files lie or are downloaded to")
    data.add_argument("--no-download", action="store_true", help="use only MedMNIST files that are already there")
    data.add_argument("--size", type=int, metavar="PX", help="of a MedMNIST set (default: by the network's)")
    data.add_argument("--image-column", metavar="NAME", help="of Parquet files (default: found by its name)")
    data.add_argument(
        "--id-column", metavar="NAME", help="of Parquet files: what names the images (default: their row)"
    )
    maps = batch.add_argument_group("maps")
    maps.add_argument("--checkpoint", required=True, metavar="RUN", help="a folder from `train`, or a hub repository")
    maps.add_argument("--target", metavar="CLASS", help="name or number of the class to explain (default: predicted)")
    maps.add_argument(
        "--method", default="mhex", metavar="NAME", help="another method, with options after a colon (default: mhex)"
    )
    maps.add_argument(
        "--beta", type=float, metavar="X", help="weight of negative evidence in the classifier's own maps (default: 0)"
    )
    maps.add_argument(
        "--resolution",
        default="full",
        metavar="full|native|PX",
        help="full: as the network sees images; native: the finest block's map, far smaller; or a side (default: full)",
    )
    maps.add_argument("--dtype", choices=STORAGES, default="uint8", help="of stored maps (default: uint8)")
    maps.add_argument("--overlays", action="store_true", help="also store a JPEG of each map on its image")
    running = batch.add_argument_group("running")
    running.add_argument("--autocast", choices=AUTOCAST, help="mixed precision; it changes values (default: none)")
    running.add_argument("--compile", action="store_true", help="torch.compile the network; it changes last bits")
    running.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    running.add_argument(
        "--shard-size", type=int, metavar="N", help="images of an output file (default: by their size)"
    )
    running.add_argument("--workers", type=int, metavar="N", help="processes that read (default: by the machine)")
    running.add_argument(
        "--lanes", type=int, metavar="N", help="batches explained at once on a CPU (default: one per processor)"
    )
    running.add_argument("--engine", choices=ENGINES, help="this process, or Ray (default: embedded)")
    running.add_argument("--address", metavar="ADDR", help="of a Ray cluster that is there, such as auto; implies ray")
    running.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    running.add_argument("--overwrite", action="store_true", help="replace another run in that folder")


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure explanations of labelled images, by several methods side by side",
        description="Explain the true class of every image by every method; another network judges the maps.\n"
        "Writes samples.parquet (every value of every image), summary.json and summary.md (means with\n"
        "95 % bootstrap intervals), curves.png and examples.png. What was stopped goes on when repeated.",
        epilog=_METHODS_AND_METRICS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.set_defaults(run=_evaluate, when_interrupted="; the same command goes on with what is missing")
    evaluate.add_argument("--checkpoint", required=True, metavar="RUN", help="the network that is explained")
    evaluate.add_argument(
        "--judge", required=True, metavar="RUN", help="the network that judges: another one, trained independently"
    )
    evaluate.add_argument(
        "--self-judged", action="store_true", help="let the network judge itself; else that is refused"
    )
    evaluate.add_argument(
        "--data", required=True, metavar="NAME|FOLDER", help="a 2D MedMNIST set, synthetic-lesions, or a folder"
    )
    evaluate.add_argument("--root", type=Path, metavar="DIR", help="where MedMNIST files lie or are downloaded to")
    evaluate.add_argument("--no-download", action="store_true", help="use only MedMNIST files that are already there")
    evaluate.add_argument("--split", choices=SPLITS, default="test", help="which images (default: test)")
    evaluate.add_argument("--masks", type=Path, metavar="DIR", help="masks of a folder's images, DIR/CLASS/NAME.png")
    evaluate.add_argument("--limit", type=int, metavar="N", help="a random choice of N images (default: all)")
    evaluate.add_argument(
        "--methods", default="mhex,centre-gaussian,random", metavar="A,B", help="(default: %(default)s)"
    )
    evaluate.add_argument(
        "--metrics",
        default="sad,avg_drop,ead,area_drop,insertion,deletion",
        metavar="A,B",
        help="(default: %(default)s)",
    )
    evaluate.add_argument("--batch-size", type=int, default=64, metavar="N", help="(default: 64)")
    evaluate.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the data and of --limit's choice (default: 0)"
    )
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    evaluate.add_argument("--overwrite", action="store_true", help="replace another comparison in that folder")


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train and explain on embedded images, without any download",
        description="Train on synthetic lesions, explain, compare with the known truth, and draw a figure.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="(default: demo)")
    demo.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's")
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    demo.add_argument("--overwrite", action="store_true", help="replace another run in that folder")


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    info = commands.add_parser(
        "info",
        help="show versions, what runs here, and what a checkpoint or a backbone holds",
        description="Show versions and what runs here; with --checkpoint or --backbone, what they hold.",
    )
    info.set_defaults(run=_info)
    info.add_argument("--checkpoint", metavar="RUN", help="a folder from `train`, or a hub repository")
    info.add_argument("--backbone", metavar="NAME", help="list a network's residual additions")


def _train(options: argparse.Namespace) -> int:
    from mhex_vision.commands import train

    _one_line_warnings()
    return train(options, _say)


def _explain(options: argparse.Namespace) -> int:
    from mhex_vision.commands import explain

    _one_line_warnings()
    return SOME_UNREADABLE if explain(options, _say, _complain) else 0


def _report(options: argparse.Namespace) -> int:
    from mhex_vision.report_command import report

    _one_line_warnings()
    return SOME_UNREADABLE if report(options, _say, _complain) else 0


def _batch(options: argparse.Namespace) -> int:
    from mhex_vision.bulk.command import batch

    _one_line_warnings()
    summary = batch(options, _say, _complain)
    if summary.interrupted:
        return INTERRUPTED
    return SOME_UNREADABLE if summary.rejected else 0


def _evaluate(options: argparse.Namespace) -> int:
    from mhex_vision.commands import evaluate

    _one_line_warnings()
    return SOME_UNREADABLE if evaluate(options, _say) else 0


def _demo(options: argparse.Namespace) -> int:
    from mhex_vision.demo import run_demo

    run_demo(options.out, epochs=options.epochs, seed=options.seed, overwrite=options.overwrite, say=_say)
    return 0


def _info(options: argparse.Namespace) -> int:
    from mhex_vision.commands import info

    info(options, _say)
    return 0


def _say(line: str) -> None:
    # Flushed: whoever pipes the output wants to see an epoch when it is done. Of several processes one speaks.
    if os.environ.get("RANK", "0") == "0":
        with _bars_aside():
            print(line, flush=True)


def _complain(line: str) -> None:
    with _bars_aside():
        print(f"mhex-vision: {line}", file=sys.stderr, flush=True)


def _bars_aside() -> AbstractContextManager[None]:
    # Imported late: `--help` comes through here.
    from mhex_vision.progress import aside

    return aside()


def _one_line_warnings() -> None:
    """An unreadable file is worth one line, not the line of our source that found it."""

    def show(message: Warning | str, *_: object) -> None:
        _complain(f"warning: {' '.join(str(message).split())}")

    warnings.showwarning = show  # type: ignore[assignment]  # the arguments that are dropped are of no use here


def entry_point() -> NoReturn:
    """What the installed script calls."""
    sys.exit(main())


if __name__ == "__main__":
    # `python -m` looks for modules in the current folder first, where somebody else's may lie beside the images.
    if not sys.flags.safe_path and sys.path[:1] == [str(Path.cwd())]:
        del sys.path[0]
    entry_point()
