"""The drill's results as Markdown tables, and in a few lines while it runs."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks import parity
from benchmarks.table import gib, pace, seconds
from benchmarks.timing import Row, Timing
from instaflow_jax.infra.cost import peak
from instaflow_jax.infra.messages import markdown_table

SPEED = ("what", "ours", "peer", "the peer's", "ratio", "spread, ours / peer's", "ours, TFLOP/s", "MFU")
SPEED += ("peak GiB, ours / peer's", "first run, ours / peer's")
DEMO = ("model", "N", "s / image", "FD, names", "FD, kinds", "CLIP score")
Entry = dict[str, Any]


def render(results: dict[str, Any]) -> str:
    """All tables, then a line for each part that failed."""
    entries = results["parts"]
    card = entries.get("card", {})
    kind = card.get("device_kind", "")
    text = [
        f"Drill ({results['size']}), cards: {results['cards']}. {card.get('machine', '')}; {card.get('versions', '')}"
    ]
    if kind:
        text.append(
            f"{kind}: {card['matmul_flops'] / 1e12:.4g} TFLOP/s in a bf16 product, {card['copy_bytes'] / 1e9:.4g} GB/s "
            "in a copy, read and written."
        )
    found = [entry["parity"] for entry in entries.values() if "parity" in entry]
    text += table((*parity.HEAD, "agrees"), ([*parity.cells(row), "yes" if row["agrees"] else "no"] for row in found))
    rows = [row for entry in entries.values() for row in read_rows(entry)]
    text += table(SPEED, (cells(row, kind) for row in rows))
    text += table(DEMO, map(demo_cells, entries.get("demo", {}).get("demo", ())))
    text += [entry["table"].strip() for entry in entries.values() if "table" in entry]
    text += [f"{name}: {outcome(entry)}" for name, entry in entries.items() if "error" in entry]
    return "\n\n".join(text) + "\n"


def outcome(entry: Entry) -> str:
    """How a part ended."""
    took = f"after {entry['seconds']:.0f} s"
    return f"failed {took}: {entry['error']}" if "error" in entry else f"done {took}"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The table as one text, or nothing without lines."""
    lines = list(lines)
    return [markdown_table(head, lines).rstrip("\n")] if lines else []


def read_rows(entry: Entry) -> Iterator[Row]:
    """The comparisons of a part."""
    for row in entry.get("rows", ()):
        yield Row(row["title"], row["peer"], Timing(**row["ours"]), Timing(**row["theirs"]))


def cells(row: Row, device_kind: str) -> list[str]:
    """One line of the table of speed."""
    ours, theirs, best = row.ours, row.theirs, peak(device_kind)
    rate = ours.flops / ours.median
    return [
        row.title,
        pace(ours),
        row.peer,
        pace(theirs),
        f"{row.ratio:.2f}",
        f"{ours.spread:.0%} / {theirs.spread:.0%}",
        f"{rate / 1e12:.4g}",
        f"{rate / best.flops:.0%}" if best else "–",
        f"{gib(ours)} / {gib(theirs)}",
        f"{seconds(ours.first)} / {seconds(theirs.first)}",
    ]


def demo_cells(row: dict[str, Any]) -> list[str]:
    """One line of the demo's table; what was not measured is a dash."""
    digits = {"seconds": 4, "fd_emoji": 1, "fd_kinds": 1, "clip_score": 3}
    return [row["model"], str(row["N"])] + ["–" if row[k] is None else f"{row[k]:.{n}f}" for k, n in digits.items()]


def summary(entry: Entry) -> list[str]:
    """A few lines about one part."""
    lines = [f"{r.title}: {pace(r.ours)}, {r.peer} {pace(r.theirs)}, {r.ratio:.2f} ×" for r in read_rows(entry)]
    if row := entry.get("parity"):
        lines += [f"fp32: ours {row['ours64']:.1e}, PyTorch {row['torch64']:.1e} from fp64"]
        lines += [f"bf16: ours {row['ours_bf16']:.1e}, PyTorch {row['torch_bf16']:.1e} from fp64"]
    lines += entry.get("table", "").strip().splitlines()[2:]
    lines += [f"{row['model']}, {row['N']} steps: FD {row['fd_emoji']}" for row in entry.get("demo", ())]
    return [*lines, outcome(entry)]
