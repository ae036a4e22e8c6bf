"""The picture of the quickstart's result in the README: `python docs/make_picture.py [outputs/quickstart]`.

Needs matplotlib (`pip install limbeck[docs]`); reads what `make quickstart` has left, and writes docs/quickstart.svg.
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

INK, QUIET, LINE = "#1f2a37", "#6b7785", "#d5dbe1"
COLOURS = {"teacher": "#8a96a3", "student kd": "#c2552d", "student ce": "#e3b59f"}
LABELS = {"teacher": "teacher", "student kd": "student, distilled (KD)", "student ce": "student, text alone (CE)"}


def bars(axes, names: list[str], values: list[float], colours: list[str], form: str, title: str) -> None:
    """Horizontal bars with their values behind them."""
    places = range(len(names))
    axes.barh(places, values, color=colours, height=0.62)
    axes.set_yticks(places, names, color=INK)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", color=INK, fontsize=11, pad=10)
    axes.set_xlim(0, max(values) * 1.18)
    axes.xaxis.set_visible(False)
    axes.tick_params(length=0)
    for spine in ("top", "right", "bottom"):
        axes.spines[spine].set_visible(False)
    axes.spines["left"].set_color(LINE)
    for place, value in zip(places, values, strict=True):
        axes.text(value + max(values) * 0.02, place, format(value, form), va="center", color=QUIET)


def main(run: Path) -> None:
    """Draw it."""
    results = json.loads((run / "evaluation" / "results.json").read_text())
    sizes = json.loads((run / "export" / "sizes.json").read_text())
    mpl.rcParams.update(
        {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "limbeck", "font.family": "sans-serif"}
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 2.5), gridspec_kw={"width_ratios": [1.15, 1.0]})
    names = [name.replace("_", " ") for name in ("teacher", "student_kd", "student_ce")]
    losses = [results[name.replace(" ", "_")]["loss"] for name in names]
    title = "held-out loss, nats a token (lower is better)"
    bars(left, [LABELS[name] for name in names], losses, [COLOURS[name] for name in names], ".2f", title)
    kinds = {"checkpoint_mb": "float32 checkpoint", "packed_mb": "packed", "gguf_mb": "GGUF for llama.cpp"}
    shades = [COLOURS["teacher"], COLOURS["student ce"], COLOURS["student kd"]]
    bars(right, list(kinds.values()), [sizes[key] for key in kinds], shades, ".1f", "the ternary student on disk, MB")
    figure.tight_layout(w_pad=3)
    figure.savefig(Path(__file__).parent / "quickstart.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/quickstart"))
