"""Checkpoints with anything changed in them: refused with a ValueError, read as they were, or read with a warning.

Nothing else may come of them: no other exception, no hang, no code, no network, and no other answer without a word.
"""

import json
import math
import os
import random
import signal
import struct
import sys
import warnings
from collections import Counter

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from mhex_core.weights import SEAL
from mhex_text import MHEXForSequenceClassification
from mhex_text.loading import load_classifier as load_text_classifier
from mhex_text.loading import seal_checkpoint
from mhex_vision import MHEXClassifier, PlainClassifier, Preprocessing, load_classifier

COUNT = int(os.environ.get("MHEX_MUTATIONS", "10000"))
SECONDS = 20
FORBIDDEN = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec")
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 300, 10**6, 10**9, 2**63, 10**400, -(10**30), 0.5, -0.0, 1e-30, 1e308),
    *(math.nan, math.inf, "", "x", "0", "relu", "../../x", "/dev/zero", "timm/test_vit", "resnet18", "a/b", "\ud800"),
    *([], {}, [0], [1, 2], ["a", "b"], [[1]], {"a": 1}, {"model_type": "bert"}, [0] * 1000, "y" * 10_000),
]

_happened: list[str] = []
_watching = [False]


def _watch(event, _):
    if _watching[0] and event in FORBIDDEN:
        _happened.append(event)


@pytest.fixture(scope="module", autouse=True)
def watched():
    sys.addaudithook(_watch)


def places_in(value, path=()):
    """Where something can be changed in what JSON holds."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places_in(entry, (*path, key))


def change_json(values, draw):
    """One value replaced, moved, renamed or removed."""
    *parents, last = draw.choice(list(places_in(values)))
    inside = values
    for key in parents:
        inside = inside[key]
    how = draw.random()
    if how < 0.6:
        inside[last] = draw.choice(VALUES)
    elif how < 0.7 and isinstance(inside[last], int | float):
        inside[last] = draw.choice([inside[last] + 1, inside[last] * 2, -inside[last], str(inside[last])])
    elif how < 0.8 and isinstance(inside, dict):
        inside[change_text(str(last), draw)] = inside.pop(last)
    elif how < 0.9:
        del inside[last]
    elif isinstance(inside[last], str):
        inside[last] = change_text(inside[last], draw)
    else:
        inside[last] = [inside[last]]


def change_text(text, draw):
    return change_bytes(text.encode("utf-8", "surrogatepass"), draw).decode("latin-1")


def change_bytes(raw, draw):
    """A bit flipped, or some bytes cut, doubled, overwritten or put in."""
    raw = bytearray(raw)
    at, length = draw.randrange(len(raw) + 1), draw.choice([1, 1, 2, 8, 100])
    how = draw.randrange(6)
    if how < 2 and at < len(raw):
        raw[at] ^= 1 << draw.randrange(8)
    elif how == 2:
        del raw[at : at + length]
    elif how == 3:
        raw[at:at] = draw.randbytes(length)
    elif how == 4:
        raw[at : at + length] = draw.randbytes(length)
    else:
        raw = raw[:at] + raw[max(0, at - length) :]
    return bytes(raw)


def changed_config(raw, draw):
    if draw.random() < 0.2:
        return change_bytes(raw, draw)
    values = json.loads(raw)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if values:
            change_json(values, draw)
    return json.dumps(values).encode()


def changed_weights(raw, draw):
    (size,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    how = draw.random()
    if how < 0.2:
        return change_bytes(raw, draw)
    if how < 0.4:
        return raw[: 8 + size] + change_bytes(data, draw)
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    if how < 0.55:
        entry["dtype"] = draw.choice(
            ["I32", "I64", "U8", "BOOL", "I8", "BF16", "F16", "F64", "U32", "F8_E4M3", "C64", "X"]
        )
    elif how < 0.65:
        entry["shape"] = draw.choice([entry["shape"][::-1], [math.prod(entry["shape"])], [*entry["shape"], 1], [2**40]])
    elif how < 0.75:
        header[change_text(name, draw)] = header.pop(name)
    elif how < 0.85:
        other = draw.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    elif how < 0.9:
        start, end = entry["data_offsets"]
        value = draw.choice([math.nan, math.inf, 1e38])
        data = data[:start] + struct.pack("<f", value) + data[start + 4 :] if end - start >= 4 else data
    else:
        change_json(header, draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def vision(folder, kind):
    torch.manual_seed(0)
    preprocessing = Preprocessing(size=32)
    name = "timm/test_vit:img_size=32,patch_size=16,depth=1,embed_dim=8,num_heads=2"
    if kind == "plain":
        model = PlainClassifier.from_name(name, 2)
    else:
        model = MHEXClassifier.from_backbone(name, 2, image_size=32)
    model.with_metadata(class_names=("no", "yes"), preprocessing=preprocessing).save_pretrained(folder)
    images = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)

    def answer():
        with torch.no_grad():
            output = load_classifier(folder)(images)
        return output if isinstance(output, torch.Tensor) else output.logits

    return answer


def text(folder, kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=8, max_position_embeddings=8)
    if kind == "plain":
        BertForSequenceClassification(config).save_pretrained(folder)
        seal_checkpoint(folder)
    else:
        MHEXForSequenceClassification.from_encoder(BertModel(config), 2).save_pretrained(folder)

    def answer():
        with torch.no_grad():
            return load_text_classifier(str(folder))(input_ids=torch.tensor([[2, 5, 6, 3]])).logits

    return answer


def outcome(answer, wanted, *, is_sealed):
    """What comes of one changed checkpoint."""

    def too_long(*_):
        raise TimeoutError(f"no answer within {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    _watching[0] = True
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            logits = answer()
    except (ValueError, FileNotFoundError) as error:
        return "refused" if "\n" not in str(error) else "refused in several lines"
    finally:
        _watching[0] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    if any("was changed after it was saved" in str(warning.message) for warning in said):
        return "read, with a warning"
    if not is_sealed():
        return "read, digests gone as well"
    assert torch.equal(logits, wanted), "another answer without a word"
    return "read, the same answer"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["blocks", "plain"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("make", [vision, text])
def test_ten_thousand_changes_of_each_file(tmp_path, make, name, kind, capsys):
    answer = make(tmp_path, kind)
    config, path = tmp_path / "config.json", tmp_path / name
    whole, raw = config.read_bytes(), path.read_bytes()
    without = json.dumps({key: value for key, value in json.loads(whole).items() if key != SEAL}).encode()
    wanted, counts, faults = answer(), Counter(), []
    for number in range(COUNT // 2):
        draw = random.Random(f"{make.__name__} {name} {kind} {number}")
        # Without the digests more of what is behind them is reached.
        config.write_bytes(whole if number % 4 else without)
        change = changed_config if path == config else changed_weights
        path.write_bytes(change(config.read_bytes() if path == config else raw, draw))
        is_sealed = lambda: SEAL in json.loads(config.read_text("utf-8", "surrogatepass"))  # noqa: E731
        try:
            counts[outcome(answer, wanted, is_sealed=is_sealed)] += 1
        except Exception as error:  # noqa: BLE001 - all of them are counted
            faults.append(f"{number}: {type(error).__name__}: {str(error)[:300]}")
    with capsys.disabled():
        sys.stdout.write(f"\n{make.__name__}, {kind}, {name}: {dict(sorted(counts.items()))}\n")
    assert not counts["refused in several lines"]
    assert not _happened
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:20]])
