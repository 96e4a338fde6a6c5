"""Damage of every kind to what is loaded, from a seed: files as bytes, as JSON, as archives.

Each function is endless: it takes what somebody saved and a `random.Random`, and yields one damaged version after
another. What a loader owes each of them is an error that names the file, or an object that is right.
"""

from __future__ import annotations

import io
import json
import zipfile

# Numbers at and beyond the edges of every type, bare constants that are no JSON, other types, deep nesting.
VALUES = (
    *("null", "true", "false", "0", "1", "-1", "-7", "99", "2147483648", "-9223372036854775809", "1" + "0" * 400),
    *("0.5", "-0.0", "1e308", "-1e308", "1e999", "1e-320", "NaN", "Infinity", "-Infinity"),
    *('""', '"abc"', '"\\ud800"', '"../../x"', "[]", "{}", "[[]]", "[null]", '{"a": 1}', "[1, 2, 3]"),
    *("[" * 50 + "]" * 50, "[" * 100_000 + "]" * 100_000, "[" * 50),
)


def of_bytes(data, chance):
    """Bits turned over, runs overwritten, ends cut off, parts doubled, moved, left out and put in."""
    kinds = (_flipped, _overwritten, _cut, _doubled, _left_out, _spliced, _put_in)
    while True:
        yield chance.choice(kinds)(data, chance) if data else chance.randbytes(chance.randrange(1, 64))


def of_json(data, chance):
    """One value of a JSON text in place of another, keys left out, doubled or renamed, items left out or doubled.

    `data`: its bytes. What comes is bytes again, and now and then no JSON any more.
    """
    document = json.loads(data)
    places = list(_places(document))
    while True:
        mark = f"mutated-{chance.randrange(10**12)}"
        whole = json.loads(data)
        path = chance.choice(places)
        if not path:
            yield chance.choice(VALUES).encode()
            continue
        parent = whole
        for step in path[:-1]:
            parent = parent[step]
        value = mark
        kind = chance.randrange(8)
        if kind == 0:
            del parent[path[-1]]
        elif kind == 1 and isinstance(parent, dict):
            parent[chance.choice(["", "x", path[-1] + "0", path[-1].upper()])] = parent.pop(path[-1])
        elif kind == 1:
            parent.insert(chance.randrange(len(parent) + 1), parent[path[-1]])
        elif kind == 2:
            parent[path[-1]] = json.loads(json.dumps(_at(whole, chance.choice(places))))
        elif kind == 3 and isinstance(parent[path[-1]], int | float):
            parent[path[-1]] *= chance.choice([-1, 0.5, 1 + 1e-9, 2, 1e6])
        else:
            parent[path[-1]] = mark
            value = chance.choice(VALUES)
        yield (
            json.dumps(whole, ensure_ascii=False)
            .encode("utf-8", "surrogatepass")
            .replace(f'"{mark}"'.encode(), value.encode())
        )


def of_archive(data, chance):
    """A zip archive whose checksums are right again after its members were damaged, or which is damaged itself."""
    outside = of_bytes(data, chance)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    while True:
        kind = chance.randrange(6)
        if kind == 0:
            yield next(outside)
            continue
        changed = dict(members)
        name = chance.choice(list(members))
        if kind == 1:
            del changed[name]
        elif kind == 2:
            changed[chance.choice(["x", name.upper(), "../" + name, name + ".npy"])] = changed.pop(name)
        elif kind == 3:
            changed[name] = members[chance.choice(list(members))]
        else:
            changed[name] = _inside(members[name], chance)
        written = io.BytesIO()
        with zipfile.ZipFile(written, "w", chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for member, held in changed.items():
                archive.writestr(member, held)
        yield written.getvalue()


def _inside(member, chance):
    """An array of NumPy's with another shape or type, or other numbers; the JSON that one of them may hold."""
    end = 10 + int.from_bytes(member[8:10], "little")
    head, body = member[:end], member[end:]
    kind = chance.randrange(4)
    if body[:1] == b"{" and kind:
        body = next(of_json(body, chance))
        return head.replace(b"(%d,)" % (len(member) - end), b"(%d,)" % len(body)) + body
    if kind == 1:
        shape = chance.choice(["(1000000000000,)", "(0,)", "()", "(-1,)", "(3,)", "(2, 2)", "(1,) * 9", "(1e9,)", "3"])
        start, stop = head.index(b"(") if b"(" in head else 10, head.index(b")") + 1 if b")" in head else 11
        return head[:start] + shape.encode() + head[stop:] + body
    if kind == 2:
        for old in (b"<f4", b"<f8", b"<i8", b"|u1"):
            new = chance.choice([b"<f8", b"<f4", b"<i8", b"<f2", b">f4", b"<c8", b"|O ", b"|b1", b"<U9", b"<M8"])
            head = head.replace(old, new, 1)
        return head + body
    if kind == 3 and len(body) >= 4:
        at = 4 * chance.randrange(len(body) // 4)
        number = chance.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\xff" * 4])
        return head + body[:at] + number + body[at + 4 :]
    return next(of_bytes(member, chance))


def _places(document, path=()):
    """The path of every value in a JSON document."""
    yield path
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield from _places(value, (*path, key))


def _at(document, path):
    for step in path:
        document = document[step]
    return document


def _flipped(data, chance):
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _span(data, chance):
    start = chance.randrange(len(data))
    return start, min(len(data), start + chance.choice([1, 2, 4, 8, 64, 512]))


def _overwritten(data, chance):
    start, end = _span(data, chance)
    run = chance.choice([b"\0", b"\xff", b"\x7f", chance.randbytes(1)]) * (end - start)
    return data[:start] + run + data[end:]


def _cut(data, chance):
    end = chance.randrange(len(data))
    return chance.choice([data[:end], data[end:], data[: len(data) - chance.randrange(1, min(64, len(data)) + 1)]])


def _doubled(data, chance):
    start, end = _span(data, chance)
    return data[:end] + data[start:end] * chance.choice([1, 1, 7]) + data[end:]


def _left_out(data, chance):
    start, end = _span(data, chance)
    return data[:start] + data[end:]


def _spliced(data, chance):
    (start, end), at = _span(data, chance), chance.randrange(len(data))
    return data[:at] + data[start:end] + data[at + end - start :]


def _put_in(data, chance):
    at = chance.randrange(len(data) + 1)
    return data[:at] + chance.randbytes(chance.choice([1, 4, 64])) + data[at:]
