"""Plots: the charts of a report as SVG and PNG files, one for each chart."""

from pathlib import Path
from typing import Any

#: What is ours, what is the limit, what is another's.
_COLOURS = {"ours": "#1f77b4", "limit": "#999999", "others": "#d98c3f"}


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every chart of every table into `folder`; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "celery_outbox"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, table in report["tables"].items():
        for number, chart in enumerate(table.get("charts", ()), 1):
            files += _draw(chart, folder / f"{name}-{number}")
    return files


def _draw(chart: dict[str, Any], path: Path) -> list[Path]:
    from matplotlib import pyplot

    names = [bar["name"] for bar in chart["bars"]]
    values = [bar["value"] for bar in chart["bars"]]
    colours = [_COLOURS[bar["kind"]] for bar in chart["bars"]]
    figure, axes = pyplot.subplots(figsize=(8, 0.7 + 0.38 * len(names)), layout="constrained")
    bars = axes.barh(names, values, color=colours)
    axes.bar_label(bars, [f"{value:,.{chart['digits']}f}" for value in values], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(chart["unit"])
    axes.set_title(chart["title"], loc="left", fontsize=10)
    files = [path.with_suffix(suffix) for suffix in (".svg", ".png")]
    for file in files:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)
    return files
