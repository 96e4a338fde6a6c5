"""The command line: train, explain, report, batch, evaluate, demo, info.

Exit status: 0 all done; 1 the command failed, one line on standard error says why; 2 the command line is wrong; 3 some
texts could not be read, all others are done; 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mhex_text.recipes import RECIPES

OBJECTIVES = ("layerwise", "joint")
SPLITS = ("train", "validation", "test")
# What `Engine` and `TextJob.autocast` allow; their modules import torch, and `--help` should not wait for that.
ENGINES = ("embedded", "ray")
AUTOCAST = ("bfloat16", "float16")

SOME_UNREADABLE = 3
INTERRUPTED = 130

_EXAMPLES = """examples:
  mhex-text demo --out demo-text
  mhex-text train --data ag_news --encoder distilbert-base-uncased --out runs/news
  mhex-text train --data reviews.csv --encoder models/minilm --epochs 3 --out runs/reviews
  mhex-text explain --checkpoint runs/news --text "Stocks fall as oil climbs"
  mhex-text explain --checkpoint runs/news --input articles.jsonl --out explained
  mhex-text report --checkpoint runs/news --data ag_news --methods mhex,cdam --out report.html
  mhex-text batch --checkpoint runs/news --input archive/ --out archive-explained
  mhex-text report --archive archive-explained --doubtful --out doubtful.html
  mhex-text explain --checkpoint runs/judge --method cdam:mode=smooth --text "Stocks fall as oil climbs"
  mhex-text train --data ag_news --encoder distilbert-base-uncased --plain --seed 1 --out runs/judge
  mhex-text evaluate --checkpoint runs/news --judge runs/judge --data ag_news --limit 512 --out measured
"""

_METHODS_AND_METRICS = """methods:
  mhex, random, occlusion, cdam, gmar, attention, attention-rollout, attention-gradcam, attention-shapley, attcat,
  generic-relevance, grad-sam; from other libraries (pip install "mhex-text[bench]"): attention-flow,
  integrated-gradients, shap; or your own, as module:function, called with (model, batch, targets) and returning
  scores (B, T)
metrics:
  avg_drop, comprehensiveness, sufficiency; with rationales: token_f1, token_iou, token_auprc
options of either follow a colon:
  --methods mhex:layers=all,beta=0.5,shap:evaluations=200 --metrics avg_drop:fraction=0.2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status is returned, except for what argparse ends itself."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print(f"mhex-text: interrupted{options.when_interrupted}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, LookupError, TypeError, RuntimeError, OSError, ImportError, MemoryError) as error:
        from mhex_core.program import error_line

        print(f"mhex-text: error: {error_line(error, options)}", file=sys.stderr)
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mhex-text",
        description="Train text classifiers that explain themselves, and see which words they went by.",
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


def _add_data(group: argparse._ArgumentGroup, *, required: bool = True) -> None:
    group.add_argument(
        "--data",
        required=required,
        metavar="NAME|FILE|FOLDER",
        help="ag_news, synthetic-notes, a CSV, JSON Lines or Parquet file, or a folder of such (train, test ...)",
    )
    group.add_argument("--root", type=Path, metavar="DIR", help="for ag_news: the folder in which ag_news/ lies")
    group.add_argument("--no-download", action="store_true", help="use only data that is already there")
    _add_columns(group)
    group.add_argument("--label-column", metavar="NAME", help="the column of the labels (default: found by its name)")
    group.add_argument(
        "--rationale-column", metavar="NAME", help="the column of marked spans (default: found by its name)"
    )


def _add_columns(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--text-column", metavar="NAME", help="the column of the texts (default: found by its name)")
    group.add_argument("--pair-column", metavar="NAME", help="the column of second texts (default: found by its name)")


def _add_own(command: argparse.ArgumentParser) -> None:
    own = command.add_argument_group("of --method mhex")
    own.add_argument(
        "--layers", default="3", metavar="N|all|A,B", help="the first N blocks, all, or their places (default: 3)"
    )
    own.add_argument("--beta", type=float, default=1.0, metavar="X", help="weight of negative evidence (default: 1)")
    own.add_argument(
        "--attention", action="store_true", help="multiply evidence by the attention that a token receives"
    )


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = commands.add_parser(
        "train",
        help="train a classifier on texts",
        description="Train a classifier that explains itself. A run that was stopped goes on when repeated.",
    )
    train.set_defaults(run=_train, when_interrupted="; the same command goes on from the last finished epoch")
    _add_data(train.add_argument_group("data"))
    network = train.add_argument_group("network")
    network.add_argument(
        "--encoder",
        default="bert-base-uncased",
        metavar="NAME|FOLDER",
        help="a pretrained encoder with its tokenizer, on the Hugging Face hub or in a folder (default: %(default)s)",
    )
    network.add_argument(
        "--plain", action="store_true", help="the encoder alone: it judges for `evaluate`, and other methods explain it"
    )
    network.add_argument(
        "--layers", default="all", metavar="A,B", help="which layers carry a block, from 0 (default: all)"
    )
    network.add_argument("--no-gate", action="store_true", help="heads only, no attention gates")
    network.add_argument("--freeze-backbone", action="store_true", help="train gates and heads alone")
    network.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="layerwise",
        help="layerwise: every head by itself; joint: their decayed sum (default: layerwise)",
    )
    training = train.add_argument_group("training")
    training.add_argument("--recipe", choices=sorted(RECIPES), default="ag-news", help="preset (default: ag-news)")
    training.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's")
    training.add_argument("--batch-size", type=int, metavar="N", help="instead of the recipe's")
    training.add_argument("--learning-rate", type=float, metavar="X", help="instead of the recipe's")
    training.add_argument("--max-length", type=int, metavar="N", help="tokens of a text, instead of the recipe's")
    training.add_argument("--patience", type=int, metavar="N", help="stop after N epochs without a better one")
    training.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of weights, order and the split-off texts (default: 0)"
    )
    training.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder for checkpoint and log")
    training.add_argument("--overwrite", action="store_true", help="replace another run in that folder")


def _add_explain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    explain = commands.add_parser(
        "explain",
        help="explain a classifier's predictions on texts",
        description="Show the evidence word by word: in the terminal, or with --out as explanations.html and "
        "explanations.json.\nTexts that cannot be read are named and skipped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.set_defaults(run=_explain)
    explain.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="a folder from `train`, or a hub repository"
    )
    given = explain.add_argument_group("texts")
    _add_texts(given)
    _add_columns(given)
    explain.add_argument("--out", type=Path, metavar="DIR", help="folder for a page and JSON, instead of the terminal")
    explain.add_argument(
        "--target", metavar="CLASS", help="name or number of the class to explain (default: predicted)"
    )
    explain.add_argument(
        "--method",
        default="mhex",
        metavar="NAME[:OPTIONS]",
        help="mhex, the classifier's own evidence, or one of those that `evaluate --help` lists, such as cdam, "
        "gmar or attention-shapley:game=cls, also for classifiers without blocks (default: mhex)",
    )
    _add_own(explain)
    explain.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (default: what the model takes)")
    explain.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")


def _add_texts(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--text", action="append", metavar="TEXT", help="a text; may be given several times")
    group.add_argument("--pair", action="append", metavar="TEXT", help="the second text of each pair")
    group.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="one text per line of a .txt file or of the standard input (-), or of a CSV, JSON Lines or Parquet file",
    )


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="write a page in which a reader weighs explanations anew",
        description="Write one HTML file with many texts, several classes of each and several methods side by side.\n"
        "Layers and beta are moved in the browser, exactly and without a network. Texts that cannot be read\n"
        "are named and skipped. With --archive the page shows what `batch` stored, and no model is loaded.",
        epilog="methods:\n  mhex, the classifier's own evidence, and those that `evaluate --help` lists",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.set_defaults(run=_report, refuse=report.error)
    report.add_argument(
        "--checkpoint", metavar="RUN", help="a folder from `train`, or a hub repository; needed without --archive"
    )
    given = report.add_argument_group("texts", "one of --text, --input, --data and --archive")
    _add_texts(given)
    _add_data(given, required=False)
    given.add_argument("--split", choices=SPLITS, help="which of the labelled texts (default: test)")
    given.add_argument(
        "--archive", type=Path, metavar="DIR", help="what `batch` wrote: its rows as they are stored, without the model"
    )
    given.add_argument(
        "--doubtful", action="store_true", help="with --archive: the rows whose prediction is least probable"
    )
    given.add_argument("--predicted", metavar="CLASS", help="with --archive: only rows predicted to be of this class")
    given.add_argument("--samples", type=int, default=200, metavar="N", help="texts, by chance if more (default: 200)")
    shown = report.add_argument_group("what is shown")
    # What belongs to explaining has no default here: beside --archive it is refused, if only it was given.
    shown.add_argument("--methods", metavar="A,B", help="side by side (default: mhex)")
    shown.add_argument(
        "--targets",
        type=int,
        metavar="N",
        help="classes of each text: the predicted one, the true one, the most probable others (default: 3)",
    )
    shown.add_argument("--title", default="Explanations", metavar="TEXT", help="of the page (default: %(default)s)")
    shown.add_argument(
        "--max-mb", type=float, default=30.0, metavar="X", help="of the file; classes are left out to fit (default: 30)"
    )
    own = report.add_argument_group("of the method mhex")
    own.add_argument("--layers", metavar="N|all|A,B", help="the first N blocks, all, or their places (default: 3)")
    own.add_argument("--beta", type=float, metavar="X", help="weight of negative evidence (default: 1)")
    own.add_argument(
        "--attention", action="store_true", help="multiply evidence by the attention that a token receives"
    )
    report.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (default: what the model takes)")
    report.add_argument("--batch-size", type=int, metavar="N", help="(default: 32)")
    report.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the choice of texts and the split-off ones (default: 0)"
    )
    report.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, such as report.html")


def _add_batch(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    batch = commands.add_parser(
        "batch",
        help="explain archives of millions of texts",
        description="Explain many texts into Parquet files of predictions and token scores, a manifest, and a table\n"
        "of what could not be read. What was stopped, or killed, goes on when repeated. Every value is the\n"
        "same whatever --batch-size, --workers, --lanes and --engine are.",
        epilog="methods:\n  mhex, the classifier's own evidence, or one of those that `evaluate --help` lists",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.set_defaults(run=_batch, when_interrupted="; the same command goes on with what is missing")
    data = batch.add_argument_group("texts")
    data.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE|FOLDER",
        help="a .txt file with one text per line, a CSV, JSON Lines or Parquet file, or a folder of files of one kind",
    )
    _add_columns(data)
    data.add_argument("--id-column", metavar="NAME", help="what names the texts (default: their file and line)")
    scores = batch.add_argument_group("scores")
    scores.add_argument("--checkpoint", required=True, metavar="RUN", help="a folder from `train`, or a hub repository")
    scores.add_argument("--target", metavar="CLASS", help="name or number of the class to explain (default: predicted)")
    scores.add_argument(
        "--method",
        default="mhex",
        metavar="NAME[:OPTIONS]",
        help="another method, with options after a colon (default: mhex)",
    )
    _add_own(batch)
    scores.add_argument("--max-length", type=int, metavar="N", help="tokens of a text (default: what the model takes)")
    scores.add_argument("--no-text", action="store_true", help="store no texts, only where their tokens lie")
    running = batch.add_argument_group("running")
    running.add_argument("--autocast", choices=AUTOCAST, help="mixed precision; it changes values (default: none)")
    running.add_argument("--compile", action="store_true", help="torch.compile the network; it changes last bits")
    running.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    running.add_argument("--shard-size", type=int, metavar="N", help="texts of a file (default: 4096)")
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
        help="measure explanations of labelled texts, by several methods side by side",
        description="Explain the true class of every text by every method; another classifier judges the scores.\n"
        "Writes samples.parquet (every value of every text), summary.json and summary.md (means with\n"
        "95 % bootstrap intervals). What was stopped goes on when repeated.",
        epilog=_METHODS_AND_METRICS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.set_defaults(run=_evaluate, when_interrupted="; the same command goes on with what is missing")
    evaluate.add_argument("--checkpoint", required=True, metavar="RUN", help="the classifier that is explained")
    evaluate.add_argument(
        "--judge", required=True, metavar="RUN", help="the classifier that judges: another one, trained independently"
    )
    evaluate.add_argument(
        "--self-judged", action="store_true", help="let the classifier judge itself; else that is refused"
    )
    _add_data(evaluate.add_argument_group("data"))
    evaluate.add_argument("--split", choices=SPLITS, default="test", help="which texts (default: test)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N texts (default: all)")
    evaluate.add_argument("--methods", default="mhex,occlusion,random", metavar="A,B", help="(default: %(default)s)")
    evaluate.add_argument(
        "--metrics", default="avg_drop,comprehensiveness,sufficiency", metavar="A,B", help="(default: %(default)s)"
    )
    evaluate.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a text (default: what both models take)"
    )
    evaluate.add_argument("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    evaluate.add_argument("--seed", type=int, default=0, metavar="S", help="of the split-off texts (default: 0)")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    evaluate.add_argument("--overwrite", action="store_true", help="replace another comparison in that folder")


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train and explain on embedded texts, without any download",
        description="Train on synthetic texts, explain, compare with the known rationales, and write a page.",
    )
    demo.set_defaults(run=_demo)
    demo.add_argument("--out", type=Path, default=Path("demo-text"), metavar="DIR", help="(default: demo-text)")
    demo.add_argument("--epochs", type=int, metavar="N", help="instead of the recipe's")
    demo.add_argument("--seed", type=int, default=0, metavar="S", help="(default: 0)")
    demo.add_argument("--overwrite", action="store_true", help="replace another run in that folder")


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    info = commands.add_parser(
        "info",
        help="show versions, what runs here, and what a checkpoint holds",
        description="Show versions and what runs here; with --checkpoint, what it holds.",
    )
    info.set_defaults(run=_info)
    info.add_argument("--checkpoint", metavar="RUN", help="a folder from `train`, or a hub repository")


def _train(options: argparse.Namespace) -> int:
    from mhex_text.commands import train

    _one_line_warnings()
    return train(options, _say)


def _explain(options: argparse.Namespace) -> int:
    from mhex_text.commands import explain

    _one_line_warnings()
    return SOME_UNREADABLE if explain(options, _say, _complain) else 0


def _report(options: argparse.Namespace) -> int:
    from mhex_text.report_command import write_report

    _one_line_warnings()
    return SOME_UNREADABLE if write_report(options, _say, _complain) else 0


def _batch(options: argparse.Namespace) -> int:
    from mhex_text.bulk.command import batch

    _one_line_warnings()
    summary = batch(options, _say, _complain)
    if summary.interrupted:
        return INTERRUPTED
    return SOME_UNREADABLE if summary.rejected else 0


def _evaluate(options: argparse.Namespace) -> int:
    from mhex_text.commands import evaluate

    _one_line_warnings()
    evaluate(options, _say)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from mhex_text.demo import run_demo

    _one_line_warnings()
    run_demo(options.out, epochs=options.epochs, seed=options.seed, overwrite=options.overwrite, say=_say)
    return 0


def _info(options: argparse.Namespace) -> int:
    from mhex_text.commands import info

    info(options, _say)
    return 0


def _say(line: str) -> None:
    # Flushed: whoever pipes the output wants to see an epoch when it is done. Of several processes one speaks.
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


def _complain(line: str) -> None:
    print(f"mhex-text: {line}", file=sys.stderr, flush=True)


def _one_line_warnings() -> None:
    """A damaged row is worth one line, not the line of our source that found it."""

    def show(message: Warning | str, *_: object) -> None:
        _complain(f"warning: {' '.join(str(message).split())}")

    warnings.showwarning = show  # type: ignore[assignment]  # the arguments that are dropped are of no use here


def entry_point() -> NoReturn:
    """What the installed script calls."""
    sys.exit(main())


if __name__ == "__main__":
    # `python -m` looks for modules in the current folder first, where somebody else's may lie beside the texts.
    if not sys.flags.safe_path and sys.path[:1] == [str(Path.cwd())]:
        del sys.path[0]
    entry_point()
