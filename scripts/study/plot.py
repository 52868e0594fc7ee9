"""Draw run logs: loss against time, infill against passes, exact score against the bound.

    python scripts/study/plot.py --plots out/plots
    python scripts/study/plot.py --plots out/plots --logs logs/ladder --rows late,direct

Reads logs/ and logs/ladder/, each into pictures of its own: FOLDER_DATA_training.png, .._infill.png
and .._likelihood.png, one of each for runs on the same data and machine, of the same size and
settings. A colour and a marker are a recipe. Curves are single runs (dotted: it did not finish);
points are means over seeds, bars their standard deviation where there are several. Of a run that
did not finish nothing else is drawn. FOLDER_DATA_growth.png shows what grows with the tokens that
runs of different MAX_WALLCLOCK_SECONDS were trained on, and results of record.py beside their logs.
The last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

from scripts.common import Parser, fail, names, need, run_command
from scripts.study import report
from scripts.study.report import Rows
from scripts.study.runlog import (
    REFINE,
    Group,
    Key,
    RunLog,
    group_runs,
    key_of,
    numbers,
    read_logs,
    spread,
)
from scripts.study.sweep import known_ladder

NEAR_T = 16  # the window beside T at which bounds are drawn
FEW = 10  # recipes that can be named within a panel


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, plots = parser.add_argument, "folder to draw into; made if needed"
    add("--plots", type=Path, required=True, metavar="DIR", help=plots)
    add("--logs", type=Path, action="append", help="folder of logs; may be given again")
    add("--rows", type=names, help="only these recipes or ladders, with commas")
    return parser.parse_args(argv)


# ==============================================================================
# 1  PANELS -- each draws what the logs of one context hold
# ==============================================================================


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give every recipe a colour and a marker, the same in all pictures of a context."""
    import matplotlib as mpl

    colours = mpl.color_sequences["tab10" if len(names) <= 10 else "tab20"]
    return {
        n: {"color": colours[i % len(colours)], "marker": "osD^vP*X"[i // len(colours) % 8]}
        for i, n in enumerate(names)
    }


def draw_curves(
    loss: Axes, bpb: Axes, runs: Mapping[str, Sequence[RunLog]], style: Mapping[str, Any]
) -> None:
    """Draw training loss and val_bpb against seconds of training, one line per run."""
    for name, of_row in runs.items():
        for i, run in enumerate(of_row):
            label = name if i == 0 else None
            line = {"ls": ":" if run.why_left_out else "-", "lw": 1.2, "alpha": 0.8, **style[name]}
            for panel, event in ((loss, "train"), (bpb, "val")):
                key = {"train": "train_loss", "val": "val_bpb"}[event]
                found = [
                    p
                    for p in run.curve
                    if p["event"] == event and numbers([p.get("train_ms"), p.get(key)])
                ]
                times, values = [p["train_ms"] / 1e3 for p in found], [p[key] for p in found]
                marks = {"marker": None} if event == "train" else {"ms": 5}
                panel.plot(times, values, label=label, **line | marks)
    loss.set(ylabel="train loss, nats per token")
    bpb.set(ylabel="val_bpb, exact, before export", xlabel="seconds of training")


def point(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; 0 for one seed."""
    return statistics.mean(values), spread(values) or 0.0


def draw_infill(panel: Axes, rows: Rows, span: int, key: str, style: Mapping[str, Any]) -> None:
    """Draw one measure of infill by refinement against passes, one line per recipe."""
    for name, g in rows.items():
        steps = sorted(
            {
                k[2]
                for run in g.runs
                for k in run.decode
                if (k[0], k[1], k[3]) == ("infill", span, REFINE)
            }
        )
        found = [(n, point(values)) for n in steps if (values := report.scored(g, n, key, span))]
        if found:
            means, bars = [at[0] for _, at in found], [at[1] for _, at in found]
            passes = [n for n, _ in found]
            panel.errorbar(
                passes,
                means,
                yerr=bars if any(bars) else None,
                label=name,
                capsize=2,
                ms=4,
                **style[name],
            )
    panel.set(xscale="log")
    ticks = sorted(
        {k[2] for g in rows.values() for run in g.runs for k in run.decode if k[0] == "infill"}
    )
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()


def draw_likelihood(panel: Axes, rows: Rows, window: int, style: Mapping[str, Any]) -> None:
    """Draw exact val_bpb against the bound, a labelled point a recipe; one without a bound is a
    line.

    Where there are many, points are labelled by numbers, which the legend explains.
    """
    crowded = len(rows) > FEW
    for name, g in rows.items():
        number = list(rows).index(name) + 1
        exact, bound = g.values("final", "val_bpb"), report.bounds(g, window)
        label = f"{number} {name}" if crowded else name
        if not bound:
            panel.axhline(
                point(exact)[0],
                color=style[name]["color"],
                ls="--",
                lw=1,
                label=f"{label} (no bound)",
            )
            continue
        x, x_bar = point(bound)
        y, y_bar = point(exact)
        bars: dict[str, Any] = {"xerr": x_bar, "yerr": y_bar} if len(exact) > 1 else {}
        panel.errorbar(
            x, y, **bars, label=label if crowded else None, capsize=2, ms=5, ls="", **style[name]
        )
        text = str(number) if crowded else name
        panel.annotate(text, (x, y), textcoords="offset points", xytext=(5, 4), size=7)
    panel.margins(x=0.1 if crowded else 0.2)  # for the names
    panel.set(xlabel=f"bound, window {window}, bits per byte")


# ==============================================================================
# 2  PICTURES -- one context each
# ==============================================================================


def new_figure(about: str, height: int, width: int, **grid: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 5 * width, 1 + 3.2 * height), layout="constrained")
    figure.suptitle(about, size=10)
    return figure, figure.subplots(height, width, squeeze=False, **grid)


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Name every line once, below the panels if there are many."""
    named: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if len(named) > FEW:
        columns = int(figure.get_figwidth() // 2)
        figure.set_figheight(figure.get_figheight() + 0.3 + 0.17 * -(-len(named) // columns))
        figure.legend(
            named.values(), named.keys(), loc="outside lower center", fontsize=7, ncols=columns
        )
    elif named:
        columns = 1 + (len(named) > FEW // 2)
        panels[0].legend(named.values(), named.keys(), fontsize=8, ncols=columns)


def training(about: str, runs: Mapping[str, Sequence[RunLog]], style: Mapping[str, Any]) -> Figure:
    figure, panels = new_figure(about, 2, 1, sharex=True)
    draw_curves(panels[0, 0], panels[1, 0], runs, style)
    legend(figure, list(panels[:, 0]))
    return figure


def infill(about: str, rows: Rows, style: Mapping[str, Any]) -> Figure | None:
    """Draw accuracy and speed, a column a span length; None if no run has filled spans."""
    spans = sorted(
        {
            key[1]
            for g in rows.values()
            for run in g.runs
            for key in run.decode
            if key[0] == "infill"
        }
    )
    if not spans:
        return None
    figure, panels = new_figure(about, 2, len(spans), sharex=True, sharey="row")
    for column, span in enumerate(spans):
        draw_infill(panels[0, column], rows, span, "token_acc", style)
        draw_infill(panels[1, column], rows, span, "tok_per_sec", style)
        panels[0, column].set(title=f"spans of {span} tokens")
        panels[1, column].set(xlabel="passes", yscale="log")
    panels[0, 0].set(ylabel="infill: tokens equal to the text", ylim=(0, None))
    panels[1, 0].set(ylabel="infill: tokens/s")
    legend(figure, list(panels[0]))
    return figure


def likelihood(about: str, rows: Rows, style: Mapping[str, Any]) -> Figure | None:
    """Draw val_bpb against the bounds at 16 and at T; None if no run has one."""
    windows = [window for window in report.windows_of(rows) if window > 1]
    chosen = sorted({window for window in (NEAR_T, *windows[-1:]) if window in windows})
    if not chosen:
        return None
    figure, panels = new_figure(about, 1, len(chosen), sharey=True)
    for panel, window in zip(panels[0], chosen, strict=True):
        draw_likelihood(panel, rows, window, style)
    panels[0, 0].set(ylabel="val_bpb, exact, causal")
    legend(figure, list(panels[0]))
    return figure


Lines = dict[str, list[tuple[float, float]]]  # (tokens trained on, value) by label
GROWTH = (
    "val_bpb, ratio to the best naive `ar` in equal time",
    "bits per byte, ratio to its own causal score",
    "8 tokens in one pass: equal to the text",
    "lossless, no lookup: tokens per pass",
)
TASKS = {"infill": "text after it", "continuation": "none after it"}
SPAN, BOUND = 8, 16  # of infill; window of the bound
NO_LOOKUP = "speculative + head, no lookup"
TIME = "max_wallclock_seconds"


def growth_points(
    g: Group, naive: float | None, results: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, str, list[float]]]:
    """Yield panel, label and values over seeds of what runs of one recipe and length scored.
    `naive`: the lowest val_bpb of naive `ar` in equal time, however fast its settings made it.
    """
    name, exact = report.speed_name(g), g.values("final", "val_bpb")
    ratio, own, accuracy, drafts = GROWTH
    if naive is not None:
        yield ratio, name, [bpb / naive for bpb in exact]
    if len(bound := report.bounds(g, BOUND)) == len(exact):
        yield own, f"{name}, bound at {BOUND}", [b / e for b, e in zip(bound, exact, strict=True)]
    for task, label in TASKS.items():
        yield accuracy, f"{name}, {label}", report.scored(g, 1, "token_acc", SPAN, task)
    one_pass = report.ONE_PASS_WINDOW, 1
    kinds = {"chained_bpb": f"one pass of {one_pass[0]}", "alone_bpb": "head alone"}
    for found in report.of_group(g, results):
        for row in found.get("scores", ()):
            if (row["window"], row["passes"]) == one_pass:
                for kind, label in kinds.items():
                    values = [row[kind] / found["causal_bpb"]] if row[kind] else []
                    yield own, f"{name}, {label}", values
        temperature = found.get("temperature")
        for row in found["rows"] if temperature is not None else ():  # of bench/decode.py
            if row["mode"] == NO_LOOKUP:
                how = f"temperature {temperature}" if temperature else "greedy"
                yield drafts, f"{name}, {how}", [row["tokens_per_forward"]]


def time_of(g: Group) -> float:
    """Return the time limit of a group's runs in seconds."""
    return float(g.runs[0].setting(TIME))


def growth_lines(folder: Path, groups: Sequence[Group]) -> dict[str, Lines]:
    """Gather what grows with the length of runs, by panel of GROWTH: means over seeds."""
    results = [one for b in report.BENCHES for one in report.read_benchmarks(folder, b)[0]]
    naive = dict[float, float]()
    for g in groups:
        if report.strong_name(g) == report.NAIVE:
            naive[time_of(g)] = min(report.point_of(g), naive.get(time_of(g), math.inf))
    found: dict[tuple[str, str, float], list[float]] = {}
    for g in sorted(groups, key=time_of):
        steps = statistics.mean(g.values("done", "steps"))
        tokens = steps * g.runs[0].setting("train_batch_tokens")
        for panel, label, values in growth_points(g, naive.get(time_of(g)), results):
            found.setdefault((panel, label, tokens), []).extend(values)
    lines: dict[str, Lines] = {panel: {} for panel in GROWTH}
    for (panel, label, tokens), values in found.items():
        if values:
            lines[panel].setdefault(label, []).append((tokens, statistics.mean(values)))
    return lines


def growth(about: str, lines: Mapping[str, Lines], only: Sequence[str] | None) -> Figure:
    """Draw growth_lines, of some recipes or all."""
    figure, panels = new_figure(about, 2, 2, sharex=True)
    for (title, of_panel), panel in zip(lines.items(), panels.flat, strict=True):
        for label, points in of_panel.items():
            if kept({label.partition(",")[0]: label}, only):
                panel.plot(*zip(*points, strict=True), "o-", ms=4, label=label)
        panel.set(title=title, xscale="log")
        panel.title.set_size(9)
        panel.margins(y=0.35)  # room for the legend
        if title == GROWTH[2]:
            panel.set_ylim(0, None)  # a share of few tokens
        legend(figure, [panel])
    for panel in panels[1]:
        panel.set(xlabel="tokens trained on")
    return figure


def curves_by_context(runs: Sequence[RunLog]) -> dict[Key, dict[str, list[RunLog]]]:
    """Gather all runs that have begun, finished or not, by context and row."""
    found: dict[Key, dict[str, list[RunLog]]] = {}
    for run in runs:
        if run.curve and {"header", "config"} <= run.events.keys():
            key = key_of(run)
            found.setdefault(key._replace(recipe=""), {}).setdefault(key.recipe, []).append(run)
    return found


def members(name: str) -> Sequence[str]:
    """Return the rows of a ladder, or the name of a single recipe."""
    known = known_ladder()
    return list(known.rows) if name == "all" else known.ladders.get(name, [name])


def kept(found: Mapping[str, Any], only: Sequence[str] | None) -> dict[str, Any]:
    names = None if only is None else {row for name in only for row in members(name)}
    return {name: value for name, value in found.items() if names is None or name in names}


def draw_growth(folder: Path, args: argparse.Namespace, runs: Sequence[RunLog]) -> list[Path]:
    """Draw growth with the length of runs: a picture for each data set, machine and number of ranks
    that has runs of several lengths.
    """
    contexts, files = dict[Key, list[Group]](), list[Path]()
    for g in group_runs(runs)[0]:
        if g.runs[0].get("config", "values").get(TIME):
            contexts.setdefault(g.key._replace(recipe="", changes=()), []).append(g)
    for key, groups in contexts.items():
        if len({time_of(g) for g in groups}) > 1:
            start = re.sub(r"[^\w.-]+", "_", f"{folder.resolve().name}_{key.data}")
            number = f"_{len(files) + 1}" if files else ""
            files.append(args.plots / f"{start}{number}_growth.png")
            lines = growth_lines(folder, groups)
            save(growth(report.context_name(key), lines, args.rows), files[-1])
    return files


def draw_folder(folder: Path, args: argparse.Namespace) -> tuple[list[Path], set[str]]:
    """Draw what one folder holds; return the files, and the recipes it has."""
    runs = read_logs(folder)
    files = draw_growth(folder, args, runs)
    seen = set[str]()
    finished, notes = report.by_context(runs)
    curves, used = curves_by_context(runs), Counter[str]()
    for note in notes:
        print(f"note: {folder}: {note}", file=sys.stderr)
    for key in sorted(curves.keys() | finished.keys()):
        of_row: dict[str, Group] = kept(finished.get(key, {}), args.rows)
        begun: dict[str, list[RunLog]] = kept(curves.get(key, {}), args.rows)
        names = list(dict.fromkeys([*of_row, *sorted(begun)]))
        seen.update(names)
        if not names:
            continue
        style, about = styles(names), f"{report.context_name(key).replace('`', '')}"
        start = re.sub(r"[^\w.-]+", "_", f"{folder.resolve().name}_{key.data}")
        used[start] += 1
        start += f"_{used[start]}" if used[start] > 1 else ""
        pictures: dict[str, Figure | None]
        pictures = {"training": training(about, {n: begun[n] for n in names if n in begun}, style)}
        pictures |= {
            "infill": infill(about, of_row, style),
            "likelihood": likelihood(about, of_row, style),
        }
        for name, figure in pictures.items():
            if figure is not None:
                files.append(args.plots / f"{start}_{name}.png")
                save(figure, files[-1])
    return files, seen


def save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")
    except OSError as error:
        fail(f"--plots: {path} was not written ({error.strerror}); name another folder")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw every folder; UserError: it cannot be drawn, or a row of --rows has no run."""
    need("matplotlib", "plot.py")
    report.warn_of_ladder()
    files, seen = list[Path](), set[str]()
    for folder in args.logs or report.log_folders():
        drawn, recipes = draw_folder(folder, args)
        files += drawn
        seen |= recipes
    lacking = [name for name in args.rows or () if seen.isdisjoint(members(name))]
    if lacking:
        fail(f"--rows={','.join(lacking)}: no run of it in the logs; leave it out")
    return {"plots": [str(path) for path in files]}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
