"""The command line as a user meets it. What must hold for the process is run as one; the many messages are not."""

import csv
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from mhex_text import Explanation, cli, commands

from .encoders import make_tokenizer

COMMANDS = ("train", "explain", "report", "evaluate", "batch", "demo", "info")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
MODULE = ("-m", "mhex_text.cli")
WORDS = ["[MASK]", "good", "bad", "film", "plot", "the", "a", "of", "what", "and", "long", "short", "it", "was", "by"]
TRAINING = "--epochs 5 --batch-size 8 --learning-rate 0.005 --max-length 16"


@pytest.fixture(scope="module")
def run(text_python):
    def finished(*arguments):
        return text_python.run(*MODULE, *arguments, environment=ENVIRONMENT)

    return finished


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=24,
        initializer_range=0.1,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = make_tokenizer(WORDS)
    tokenizer.mask_token = "[MASK]"
    tokenizer.model_max_length = 24
    tokenizer.save_pretrained(folder)
    return folder


def review(number):
    draw = random.Random(number)
    words = draw.choices(WORDS[3:], k=draw.randint(2, 8))
    words.insert(draw.randrange(len(words)), ("good", "bad")[number % 2])
    return " ".join(words)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A table of labelled texts, one row of which is damaged."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows([review(number), ("praise", "scorn")[number % 2]] for number in range(240))
        table.writerow(["a film without a label"])
    return path


def training(reviews, encoder, out, *more):
    return ["train", "--data", reviews, "--encoder", encoder, *TRAINING.split(), "--out", out, *more]


@pytest.fixture(scope="module")
def trained(run, reviews, encoder, tmp_path_factory):
    """The finished process of `train`, and its folder."""
    out = tmp_path_factory.mktemp("runs") / "reviews"
    return run(*training(reviews, encoder, out)), out


@pytest.fixture(scope="module")
def judge(run, reviews, encoder, tmp_path_factory):
    """A classifier without blocks."""
    out = tmp_path_factory.mktemp("runs") / "judge"
    done = run(*training(reviews, encoder, out, "--plain", "--seed", 1))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"wrote {out}; it judges: mhex-text evaluate ")
    return out


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    (commands_,) = [action for action in cli._parser()._actions if action.choices]
    for action in commands_.choices[command]._actions:
        assert action.help
        assert set(action.option_strings) <= set(text.replace(",", " ").split())


def test_help_lists_the_commands_and_how_to_begin(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert "mhex-text demo --out demo-text" in text


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["train"],
        ["train", "--data", "x", "--out", "y", "--epochs", "many"],
        ["train", "--data", "x", "--out", "y", "--recipe", "soup"],
        ["explain", "--text", "x"],
        ["evaluate", "--checkpoint", "x"],
        ["info", "--colour"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_ends_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("usage: mhex-text")


# --------------------------------------------------------------------------------------------------------------- train


def test_train_reports_each_epoch_and_names_the_row_it_left_out(trained):
    done, out = trained
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "reviews: 192 training texts, 2 classes"
    assert lines[1].endswith("blocks in the layers 0, 1")
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == [f"epoch {n}/5" for n in range(1, 6)]
    assert float(next(line for line in lines if line.startswith("test accuracy ")).split()[2]) > 90
    assert lines[-1] == f'wrote {out}; next: mhex-text explain --checkpoint {out} --text "..."'
    (complaint,) = done.stderr.splitlines()
    assert complaint.startswith("mhex-text: warning: ")
    assert "left out 1 of 241 rows" in complaint
    assert {"config.json", "log.csv", "model.safetensors", "run.json"} <= {path.name for path in out.iterdir()}


@pytest.mark.filterwarnings("ignore::mhex_text.UnreadableTextWarning")
def test_a_finished_run_is_not_trained_again(trained, reviews, encoder, capsys):
    done, out = trained
    assert cli.main([str(word) for word in training(reviews, encoder, out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("epoch")]
    assert lines[-2:] == done.stdout.splitlines()[-2:]  # the test accuracy and what to do next


def test_ctrl_c_ends_with_one_line_and_the_same_command_goes_on(text_python, run, reviews, encoder, tmp_path):
    clean = tmp_path / "clean.csv"
    clean.write_text("\n".join(reviews.read_text().splitlines()[:-1]) + "\n")
    command = training(clean, encoder, tmp_path / "run", "--epochs", 12, "--patience", 12)
    process = text_python.start(*MODULE, *command, environment=ENVIRONMENT)
    while "epoch 1/12" not in process.output():
        assert process.poll() is None, process.output("stderr")
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["mhex-text: interrupted; the same command goes on from the last finished epoch"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/12" not in done.stdout
    assert "epoch 12/12" in done.stdout


def test_two_processes_train_one_model(text_python, reviews, encoder, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What torchrun tells each of its processes.
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = training(reviews, encoder, tmp_path / "run", "--batch-size", 4)
    processes = [
        text_python.start(*MODULE, *command, environment=ENVIRONMENT | shared | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    first, second = [process.wait() for process in processes]
    assert first.returncode == 0, first.stderr
    assert second.returncode == 0, second.stderr
    lines = first.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("epoch")] == [f"epoch {n}/5" for n in range(1, 6)]
    assert float(next(line for line in lines if line.startswith("test accuracy ")).split()[2]) > 90
    assert second.stdout == ""
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert not (tmp_path / "run" / ".checkpoints").exists()


@pytest.mark.filterwarnings("ignore::mhex_text.UnreadableTextWarning")
def test_options_reach_the_network_and_the_recipe(reviews, encoder, tmp_path, monkeypatch, capsys):
    seen = {}

    def record(model, tokenizer, bundle, recipe, **rest):
        seen.update(model=model, bundle=bundle, recipe=recipe, **rest)
        raise RuntimeError("enough seen")

    monkeypatch.setattr(commands, "train_model", record)
    options = "--layers 1 --no-gate --freeze-backbone --objective joint --patience 3 --seed 7 --overwrite"
    assert cli.main([str(word) for word in training(reviews, encoder, tmp_path, *options.split())]) == 1
    capsys.readouterr()
    config = seen["model"].config
    assert (config.block_layers, config.gate, config.freeze_backbone, config.objective) == ((1,), False, True, "joint")
    recipe = seen["recipe"]
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.max_length) == (5, 8, 0.005, 16)
    assert (recipe.patience, seen["seed"], seen["overwrite"]) == (3, 7, True)
    assert seen["bundle"].class_names == ("praise", "scorn")


# ------------------------------------------------------------------------------------------------------------- explain


def test_a_text_is_explained_in_the_terminal(run, trained):
    done = run("explain", "--checkpoint", trained[1], "--text", "the plot was bad", "--text", "a good film")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, second = done.stdout.split("\n\n")[:2] if done.stdout.count("\n\n") else (done.stdout, "")
    assert "the plot was bad" in first
    assert "scorn" in first
    assert "praise" in second
    assert "\x1b[" not in done.stdout  # no colours where no terminal is


def test_pairs_and_the_standard_input(trained, capsys, monkeypatch):
    command = ["explain", "--checkpoint", str(trained[1])]
    assert cli.main([*command, "--text", "a film", "--pair", "it was good"]) == 0
    assert "it was good" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("good plot\n\nbad plot\n"))
    assert cli.main([*command, "--input", "-"]) == 0
    text = capsys.readouterr().out
    assert text.index("good plot") < text.index("bad plot")
    assert "next: " not in text  # for a program
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main([*command, "--text", "a film"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"next: mhex-text report --checkpoint {trained[1]} ")


def test_a_file_becomes_a_page_and_json_and_what_cannot_be_read_is_named(trained, tmp_path, capsys):
    path = tmp_path / "new.jsonl"
    rows = ['{"text": "a <b>good</b> film"}', "{not json", '{"text": " "}', '{"text": "' + "long " * 40 + '"}']
    path.write_text("\n".join(rows) + "\n")
    out = tmp_path / "not" / "there yet"
    options = ["--input", str(path), "--out", str(out), "--beta", "0.5", "--layers", "all", "--batch-size", "1"]
    assert cli.main(["explain", "--checkpoint", str(trained[1]), *options]) == 3
    shown = capsys.readouterr()
    assert shown.out.startswith("explained 2 of 4 texts")
    assert shown.out.splitlines()[-1] == f"next: open '{out / 'explanations.html'}' in a browser"
    lines = shown.err.splitlines()
    for line, number in zip(lines, (2, 3), strict=False):
        assert line.startswith(f"mhex-text: skipped: {path}: line {number}: ")
    assert lines[2] == "mhex-text: 1 of 2 texts were longer than the model takes; the rest was not read"
    assert {file.name for file in out.iterdir()} == {"explanations.json", "explanations.html"}
    assert "<b>good</b>" not in (out / "explanations.html").read_text()
    explanation = Explanation.from_json(out / "explanations.json")
    assert (len(explanation), explanation.settings.beta) == (2, 0.5)


@pytest.mark.parametrize("target", ["scorn", "1"])
def test_the_target_is_a_name_or_a_number(trained, tmp_path, capsys, target):
    (tmp_path / "a.txt").write_text("a good film\n")
    options = ["--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--target", target]
    assert cli.main(["explain", "--checkpoint", str(trained[1]), *options]) == 0
    capsys.readouterr()
    assert Explanation.from_json(tmp_path / "out" / "explanations.json")[0].target_name == "scorn"


@pytest.mark.parametrize("method", ["cdam", "attention-shapley:game=cls,gradient=false", "mhex:beta=0.25,layers=all"])
def test_other_methods_explain_too(trained, tmp_path, capsys, method):
    options = ["--text", "a good film", "--method", method, "--out", str(tmp_path)]
    assert cli.main(["explain", "--checkpoint", str(trained[1]), *options]) == 0
    capsys.readouterr()
    settings = Explanation.from_json(tmp_path / "explanations.json").settings
    if method.startswith("mhex"):
        assert (settings.beta, len(settings.layer_names)) == (0.25, 2)
    else:
        assert (settings.beta, settings.layer_names) == (1.0, (method,))


def test_plain_classifiers_are_explained_by_other_methods(judge, capsys):
    command = ["explain", "--checkpoint", str(judge), "--text", "a good film", "--method"]
    for method in ("gmar", "occlusion"):
        assert cli.main([*command, method]) == 0
        shown = capsys.readouterr()
        assert "a good film" in shown.out
        assert shown.err == ""
    assert cli.main([*command, "mhex:beta=0.5"]) == 1
    assert "--checkpoint must hold an MHEX classifier for --method mhex" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ evaluate


@pytest.mark.filterwarnings("ignore::mhex_text.UnreadableTextWarning")
def test_methods_are_measured_side_by_side(trained, judge, reviews, tmp_path, capsys):
    out = tmp_path / "measured"
    options = ["--checkpoint", trained[1], "--judge", judge, "--data", reviews, "--limit", 16, "--out", out]
    options += ["--methods", "mhex,mhex:layers=all,beta=0.5,occlusion,random", "--metrics", "avg_drop,sufficiency"]
    command = [str(word) for word in ["evaluate", *options]]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    record = json.loads((out / "summary.json").read_text())
    methods = ["mhex", "mhex:layers=all,beta=0.5", "occlusion", "random"]
    assert list(record["methods"]) == methods
    drops = {name: found["scores"]["avg_drop"]["mean"] for name, found in record["methods"].items()}
    assert drops["occlusion"] > drops["random"] + 0.05
    assert drops["mhex"] > drops["random"] + 0.05
    assert all(name in shown and f"| {name} " in (out / "summary.md").read_text() for name in methods)
    assert (out / "samples.parquet").is_file()
    assert shown.splitlines()[-1].startswith(f"next: mhex-text report --checkpoint {trained[1]} --data {reviews} ")
    assert record["settings"]["note"]["checkpoint"] == str(trained[1])
    assert cli.main(command) == 0  # again, from what is there
    assert capsys.readouterr().out == shown
    assert cli.main([*command, "--metrics", "avg_drop"]) == 1
    assert "holds another comparison" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- info


def test_info_shows_what_runs_and_what_a_checkpoint_holds(trained, judge, capsys):
    assert cli.main(["info", "--checkpoint", str(trained[1])]) == 0
    text = capsys.readouterr().out
    for expected in (
        "transformers ",
        "saliency: ",
        "modernbert",
        "classes: praise, scorn",
        "blocks in the layers 0, 1",
    ):
        assert expected in text
    assert cli.main(["info", "--checkpoint", str(judge)]) == 0
    text = capsys.readouterr().out
    assert "BertForSequenceClassification" in text
    assert text.splitlines()[-1] == f'next: mhex-text explain --checkpoint {judge} --method occlusion --text "..."'


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def places(trained, judge, reviews, encoder, tmp_path):
    """Names for folders and files in command lines that go wrong."""
    made = {"run": trained[1], "judge": judge, "data": reviews, "encoder": encoder, "tmp": tmp_path}
    for name in ("file", "nothing", "damaged", "text", "empty", "others"):
        made[name] = tmp_path / name
    made["file"].write_text("in the way")
    made["nothing"].mkdir()
    shutil.copytree(trained[1], made["damaged"])
    os.truncate(made["damaged"] / "model.safetensors", 1000)
    made["text"] = tmp_path / "text.txt"
    made["text"].write_text("a film\n")
    made["empty"] = tmp_path / "empty.txt"
    made["empty"].write_text("\n\n")
    made["others"] = tmp_path / "others.csv"
    made["others"].write_text("text,label\n" + "a film,x\na plot,y\n" * 20)
    return made


TRAIN = "train --data {data} --encoder {encoder} --out {tmp}/run"
EXPLAIN = "explain --checkpoint {run} --input {text}"
EVALUATE = "evaluate --checkpoint {run} --judge {judge} --data {data} --out {tmp}/out"
ERRORS = [
    ("train --data nowhere --encoder {encoder} --out {tmp}/run", "there is no nowhere"),
    ("train --data ag_news --root {tmp} --encoder {encoder} --out {tmp}/run", "root must hold ag_news/train.csv"),
    ("train --data {data} --encoder {tmp}/none --out {tmp}/run", "{tmp}/none"),
    ("train --data {data} --encoder {encoder} --out {file}", "--out: Not a directory: {file}"),
    (f"{TRAIN} --text-column words", "--text-column must be one of the columns text, label"),
    (f"{TRAIN} --epochs 0", "--epochs must be at least 1, got 0"),
    (f"{TRAIN} --learning-rate nan", "--learning-rate must be at least 0, got nan"),
    (f"{TRAIN} --seed -1", "--seed must be at least 0, got -1"),
    (f"{TRAIN} --layers 0,9", "layers[1] must lie in [0, 1], got 9"),
    (f"{TRAIN} --layers first", "--layers must be all, or whole numbers"),
    (f"{TRAIN} --plain --no-gate", "--no-gate is about blocks"),
    ("train --data {data} --encoder {encoder} --seed 5 --out {run}", "with another one (data.sha256"),
    ("explain --checkpoint {tmp}/none --input {text}", "there is no folder {tmp}/none"),
    ("explain --checkpoint {nothing} --input {text}", "{nothing}"),
    ("explain --checkpoint {damaged} --input {text}", "{damaged}/model.safetensors is damaged"),
    ("explain --checkpoint {judge} --input {text}", "--checkpoint must hold an MHEX classifier"),
    ("explain --checkpoint {run}", "give texts with --text, or a file of them with --input"),
    ("explain --checkpoint {run} --input {tmp}/none.txt", "there is no {tmp}/none.txt"),
    ("explain --checkpoint {run} --input {empty}", "--input must hold at least one text"),
    ("explain --checkpoint {run} --input {file}", "path must have one of the endings .txt, .csv"),
    ("explain --checkpoint {run} --text a --text b --pair c", "--pair must come once for each --text, got 1 for 2"),
    ("explain --checkpoint {run} --text a --text-column b", "go with --input"),
    (f"{EXPLAIN} --pair a", "--pair goes with --text"),
    (f"{EXPLAIN} --out {{file}}/below", "{file}/below"),
    (f"{EXPLAIN} --target grey", "--target must be one of the classes (praise, scorn) or its number, got 'grey'"),
    (f"{EXPLAIN} --target 2", "--target must be one of the classes"),
    (f"{EXPLAIN} --beta 2", "beta"),
    (f"{EXPLAIN} --layers 0,7", "layers"),
    (f"{EXPLAIN} --method gmar --beta 0.5", "--beta must go with --method mhex, got --method gmar"),
    (f"{EXPLAIN} --method cdam --layers 1 --attention", "--layers, --attention must go with --method mhex"),
    (f"{EXPLAIN} --method soup", "--method must be one of mhex, random, cdam"),
    (f"{EXPLAIN} --method cdam:concept=sport", "concept must be a torch.Tensor, got str"),
    (f"{EXPLAIN} --method gmar:stepps=3", "options of gmar must be among: norm, residual; got stepps"),
    (f"{EXPLAIN} --layers many", "--layers must be all, or whole numbers"),
    (f"{EXPLAIN} --max-length 0", "--max-length must be at least 1, got 0"),
    (f"{EXPLAIN} --batch-size 0", "--batch-size must be at least 1, got 0"),
    (f"{EVALUATE} --methods soup", "soup"),
    (f"{EVALUATE} --metrics soup", "soup"),
    (f"{EVALUATE} --limit 0", "--limit must be at least 1, got 0"),
    (
        "evaluate --checkpoint {run} --judge {judge} --data {others} --out {tmp}/out",
        "--checkpoint must know the classes",
    ),
    ("info --checkpoint {tmp}/none", "{tmp}/none"),
    ("demo --epochs 0 --out {tmp}/demo", "--epochs must be at least 1, got 0"),
]


@pytest.mark.parametrize(("line", "expected"), ERRORS, ids=[line for line, _ in ERRORS])
@pytest.mark.filterwarnings("ignore::mhex_text.UnreadableTextWarning")
def test_an_error_is_one_line_that_names_its_cause(places, capsys, monkeypatch, line, expected):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.main([part.format(**places) for part in line.split()]) == 1
    (complaint,) = capsys.readouterr().err.splitlines()
    assert complaint.startswith("mhex-text: error: ")
    assert expected.format(**places) in complaint


def test_the_installed_script_ends_an_error_with_status_1_and_one_line(tmp_path):
    found = shutil.which("mhex-text", path=Path(sys.executable).parent)
    script = [found] if found else [sys.executable, *MODULE]
    command = [*script, "explain", "--checkpoint", tmp_path / "none", "--text", "a film"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (complaint,) = done.stderr.splitlines()
    assert complaint.startswith("mhex-text: error: ")
