"""The table of which families of timm take blocks; `tables.py` writes it."""

from __future__ import annotations

import common


def attach() -> list[str]:
    """Which families of timm take blocks, and why the others do not."""
    record = common.result("attach")
    layouts = {"first": "(B, C, H, W)", "last": "(B, H, W, C)", "both": "both", "tokens": "tokens"}
    causes = {
        "of tokens or windows": "adds to tokens or windows only",
        "no residual addition": "adds nothing residually",
        "cannot be traced": "torch.fx cannot trace it",
        "nothing tells": "nothing tells where channels are",
        "does not take images": "its first convolution does not read the images",
        "took longer": "given up, it takes long",
    }
    lines = [
        "| family | network | parameters, M | px | blocks | maps | predictions |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in record["networks"]:
        cells = [
            one["family"],
            one["name"] or "-",
            f"{one.get('parameters', 0) / 1e6:.1f}",
            str(one.get("image_size", "-")),
        ]
        if one["attached"]:
            kept = "the same bits" if one["same_bits"] else f"off by {one['off']:.1g}"
            cells += [str(one["blocks"]), layouts[one["layout"]], kept]
        else:
            why = next((said for words, said in causes.items() if words in one["why"]), None)
            cells += ["-", "-", f"refused: {why or one['why'].partition(';')[0]}"]
        lines.append(f"| {' | '.join(cells)} |")
    taken = [one for one in record["networks"] if one["attached"]]
    same = sum(one["same_bits"] for one in taken)
    total = f"{len(taken)} of {len(record['networks'])} families take blocks, {same} of them with the same bits."
    return [total, "", *lines, "", f"`{record['command']}` ({common.shape(record)}, timm {record['timm']})"]
