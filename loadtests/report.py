"""Compares modes within a run, and runs with each other: HTML with plots, and JSON.

python -m loadtests.report OUT.html RUN.json [OVERLOAD.json]
"""

import base64
import html
import io
import json
import sys
from pathlib import Path
from typing import Any

_LATENCIES = {
    "ttft": "first token of any kind",
    "ttfot": "first answer token",
    "itl": "between answer tokens",
    "e2e": "whole answer",
}


def compare(run: dict[str, Any], mode: str = "latent", base: str = "cot") -> dict[str, float]:
    """Compute ratios of `mode` to `base`; below 1 is less time or fewer steps."""
    ours, theirs = run["modes"].get(mode), run["modes"].get(base)
    ratios: dict[str, float] = {}
    if not ours or not theirs:
        return ratios
    for name in _LATENCIES:
        if ours[name] and theirs[name]:
            ratios[f"{name}_p50"] = ours[name]["p50"] / theirs[name]["p50"]
    if ours["looked_at"] and theirs["right"]:
        share = ours["right"] / ours["looked_at"]
        ratios["right_share"] = share / (theirs["right"] / theirs["looked_at"])
    for name in ("reasoning_steps", "answer_tokens"):
        per_answer = theirs[name] / max(1, theirs["ok"])
        if per_answer:
            ratios[f"{name}_per_answer"] = ours[name] / max(1, ours["ok"]) / per_answer
    return ratios


def goodput(run: dict[str, Any], overload: dict[str, Any]) -> dict[str, float]:
    """Compare the throughput of an overloaded server with one at capacity."""
    served, offered = overload["all"], overload["all"]["requests"]
    return {
        "offered_per_second": offered / served["seconds"],
        "answered_per_second": served["requests_per_second"],
        "peak_per_second": run["all"]["requests_per_second"],
        "share_of_peak": served["requests_per_second"] / run["all"]["requests_per_second"],
        "rejected_ratio": overload["rejected"]["count"] / offered,
        "reject_p95_seconds": overload["rejected"]["e2e"].get("p95", 0.0),
    }


def plot_latencies(run: dict[str, Any]) -> bytes:
    """Plot median and p95 of each latency, by mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, len(_LATENCIES))
    for each, (name, text) in zip(axes, _LATENCIES.items(), strict=True):
        modes = [mode for mode, told in run["modes"].items() if told[name]]
        for share, width, colour in (("p95", 0.8, "#c9d6e8"), ("p50", 0.5, "#2b5c9e")):
            heights = [run["modes"][mode][name][share] * 1e3 for mode in modes]
            each.bar(modes, heights, width=width, color=colour, label=share)
        each.set_title(text, fontsize=9)
        each.set_ylabel("ms")
        each.tick_params(axis="x", rotation=30, labelsize=8)
    axes[0].legend(fontsize=8)
    return _png(figure)


def plot_timeline(run: dict[str, Any]) -> bytes:
    """Plot requests sent, answered and refused per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots()
    seconds = [row["second"] for row in run["timeline"]]
    for name, colour in (("sent", "#999999"), ("answered", "#2b9e5c"), ("refused", "#c0392b")):
        axes.plot(seconds, [row[name] for row in run["timeline"]], color=colour, label=name)
    axes.set_xlabel("second")
    axes.set_ylabel("requests/s")
    axes.legend(fontsize=8)
    return _png(figure)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def table(rows: list[list[str]]) -> str:
    """Render an HTML table; the first row is its head."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in row) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def page(run: dict[str, Any], overload: dict[str, Any] | None) -> str:
    """Render the report as one self-contained HTML file."""
    head = ["mode", "answered", "right", "steps/answer", "tokens/answer", *_LATENCIES]
    rows = [head]
    for mode, told in run["modes"].items():
        ok = max(1, told["ok"])
        medians = [f"{told[n]['p50'] * 1e3:.0f} ms" if told[n] else "-" for n in _LATENCIES]
        counts = [f"{told[n] / ok:.1f}" for n in ("reasoning_steps", "answer_tokens")]
        right = f"{told['right'] / told['looked_at']:.1%}" if told["looked_at"] else "-"
        rows.append([mode, f"{told['ok']} of {told['requests']}", right, *counts, *medians])
    told = {
        k: run["settings"][k]
        for k in ("modes", "scenarios", "max_tokens", "min_tokens", "steps", "task")
    }
    parts = ["<h1>Load test</h1>", f"<p>{html.escape(json.dumps(told))}</p>"]
    parts += ["<h2>By mode (medians)</h2>", table(rows), _image(plot_latencies(run))]
    ratios = [[name, f"{value:.2f}"] for name, value in compare(run).items()]
    parts += ["<h2>latent / cot</h2>", table([["", "ratio"], *ratios])]
    parts += ["<h2>Over time</h2>", _image(plot_timeline(run))]
    if overload is not None:
        told = [[name, f"{value:.3g}"] for name, value in goodput(run, overload).items()]
        parts += ["<h2>Overload</h2>", table([["", ""], *told]), _image(plot_timeline(overload))]
    style = (
        "body{font:14px sans-serif;max-width:1100px;margin:2em auto}td,th{padding:2px 10px;"
        "text-align:right;border-bottom:1px solid #ddd}td:first-child{text-align:left}"
    )
    body = "\n".join(parts)
    return (
        f"<!doctype html><meta charset=utf-8><title>Load test</title><style>{style}</style>{body}"
    )


def _image(data: bytes) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def main(argv: list[str]) -> int:
    """Write the HTML, and beside it the JSON and the plots as PNG files."""
    out, *files = map(Path, argv)
    run, *more = (json.loads(file.read_text()) for file in files)
    overload = more[0] if more else None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(run, overload))
    out.with_suffix(".png").write_bytes(plot_latencies(run))
    told: dict[str, Any] = {"latent_to_cot": compare(run), "modes": run["modes"], "all": run["all"]}
    if overload is not None:
        out.with_name(f"{out.stem}-overload.png").write_bytes(plot_timeline(overload))
        told["overload"] = goodput(run, overload)
    out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
