"""plot.py: what is drawn is what the logs hold."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from scripts.study import plot, report, runlog
from tests.study.test_report import decoded, events, scored

STYLE = {"direct": {"color": "b", "marker": "o"}, "ar": {"color": "r", "marker": "o"}}


def lines_of(**about: Any) -> list[dict[str, Any]]:
    """A run with a curve of two losses and one score."""
    lines = events(**about)
    curve = [
        {"event": "train", "step": 1, "train_ms": 500.0, "train_loss": 6.0, "tok_per_sec": 10.0},
        {"event": "train", "step": 2, "train_ms": 1000.0, "train_loss": 5.0, "tok_per_sec": 10.0},
        {"event": "val", "step": 2, "train_ms": 1200.0, "loss": 4.0, "bpb": 2.5},
    ]
    return [*lines[:4], *curve, *lines[5:]]


def write(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two seeds of direct and a third that died, and ar, which has no bound and fills no spans."""
    folder = tmp_path / "logs"
    write(folder, "d1", lines_of(seed=1, bpb=2.0))
    second = lines_of(seed=2, bpb=2.2)
    next(line for line in second if line.get("task") == "infill" and line["steps"] == 8)[
        "token_acc"
    ] = 0.6
    write(folder, "d2", second)
    write(folder, "d3", lines_of(seed=3, bpb=9.0)[:7])
    unable = ("nelbo", "parallel_eval")
    write(
        folder,
        "a1",
        [line for line in lines_of(recipe="ar", bpb=1.9) if line["event"] not in unable],
    )
    return folder


def rows_in(logs: Path) -> report.Rows:
    ((_, rows),) = report.by_context(runlog.read_logs(logs))[0].items()
    return rows


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def test_curves_are_against_seconds_and_one_that_died_is_dotted(logs: Path) -> None:
    ((_, runs),) = plot.curves_by_context(runlog.read_logs(logs)).items()
    assert {name: len(of_row) for name, of_row in runs.items()} == {"direct": 3, "ar": 1}
    loss, bpb = Figure().subplots(2)
    plot.draw_curves(loss, bpb, {"direct": runs["direct"]}, STYLE)
    assert [points(line) for line in loss.lines] == [[(0.5, 6.0), (1.0, 5.0)]] * 3
    assert [points(line) for line in bpb.lines] == [[(1.2, 2.5)]] * 3
    assert [line.get_linestyle() for line in loss.lines] == ["-", "-", ":"]
    assert len(loss.get_legend_handles_labels()[1]) == 1


def test_infill_is_drawn_against_passes_as_mean_and_deviation(logs: Path) -> None:
    panel = Figure().subplots()
    plot.draw_infill(panel, rows_in(logs), 8, "token_acc", STYLE)
    (container,) = panel.containers  # ar has filled no hole
    line, _, (bars,) = container
    assert points(line) == [(1.0, 0.375), (8.0, 0.5)]
    low, high = bars.get_segments()[1][:, 1]
    assert (low, high) == (pytest.approx(0.5 - 0.02**0.5), pytest.approx(0.5 + 0.02**0.5))
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1", "8"]
    plot.draw_infill(panel, rows_in(logs), 64, "token_acc", STYLE)
    assert len(panel.containers) == 1


def test_a_recipe_is_one_labelled_point_over_its_bound(logs: Path) -> None:
    panel = Figure().subplots()
    plot.draw_likelihood(panel, rows_in(logs), 16, STYLE)
    (container,) = panel.containers
    assert points(container[0]) == [(pytest.approx(2.6), pytest.approx(2.1))]
    (across, along) = (bars.get_segments()[0] for bars in container[2])
    assert across[:, 0] == pytest.approx([2.6 - 0.02**0.5, 2.6 + 0.02**0.5])
    assert along[:, 1] == pytest.approx([2.1 - 0.02**0.5, 2.1 + 0.02**0.5])
    assert [text.get_text() for text in panel.texts] == ["direct"]
    assert panel.get_legend_handles_labels()[1] == ["ar (no bound)"]


def test_one_seed_has_no_bars(tmp_path: Path) -> None:
    write(tmp_path, "d1", lines_of())
    panel = Figure().subplots()
    plot.draw_likelihood(panel, rows_in(tmp_path), 16, STYLE)
    assert panel.containers[0][2] == ()


def test_many_recipes_are_told_apart_by_numbers(tmp_path: Path) -> None:
    names = [f"r{i:02}" for i in range(12)]
    for i, name in enumerate(names):
        write(tmp_path, name, lines_of(recipe=name, bpb=2 + 0.1 * i))
    panel, style = Figure().subplots(), plot.styles(names)
    assert (
        len({(s["color"], s["marker"]) for s in plot.styles([str(i) for i in range(60)]).values()})
        == 60
    )
    plot.draw_likelihood(panel, rows_in(tmp_path), 16, style)
    assert [text.get_text() for text in panel.texts] == [str(i) for i in range(1, 13)]
    assert panel.get_legend_handles_labels()[1] == [
        f"{i} {name}" for i, name in enumerate(names, start=1)
    ]


def run(capsys: pytest.CaptureFixture[str], *argv: Any, code: int = 0) -> str:
    assert plot.main([str(arg) for arg in argv]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


@pytest.mark.slow
def test_growth_is_drawn_where_runs_differ_in_their_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "grown"
    for seconds, ar, bpb, bound in ((60.0, 2.0, 1.75, 3.5), (240.0, 1.5, 0.75, 2.25)):
        changed = {"max_wallclock_seconds": seconds, "train_batch_tokens": 64}
        for name, value in (("ar", ar), ("record", bpb)):
            lines = lines_of(recipe=name, bpb=value, changed=changed)
            for line in lines:
                if line["event"] == "done":
                    line |= {"steps": int(seconds), "train_seconds": seconds}
                if line["event"] == "nelbo":
                    line["nelbo_bpb"] = bound
            kept = ("nelbo", "parallel_eval") if name == "ar" else ()
            lines = [line for line in lines if line["event"] not in kept]
            write(logs, f"{name}_{seconds:.0f}", lines)
        found = scored(recipe="record", causal_bpb=bpb)
        found["scores"][0] |= {"chained_bpb": 2 * bpb - 0.25, "alone_bpb": None}
        (logs / f"record_{seconds:.0f}_parallel_bpb.json").write_text(json.dumps(found) + "\n")
        found = decoded(recipe="record", temperature=0.8)
        row = found["rows"][0] | {"mode": plot.NO_LOOKUP, "tokens_per_forward": seconds / 60}
        found["rows"].append(row)
        (logs / f"record_{seconds:.0f}_decode_0.8.json").write_text(json.dumps(found) + "\n")
    slower = {"max_wallclock_seconds": 60.0, "train_batch_tokens": 64, "compile": True}
    slow = lines_of(recipe="ar", bpb=2.5, changed=slower)
    slow = [line for line in slow if line["event"] not in ("nelbo", "parallel_eval")]
    write(logs, "ar_slow", slow)
    runs = runlog.read_logs(logs)
    x = [60 * 64, 240 * 64]
    groups = runlog.group_runs(runs)[0]
    ratio, own, accuracy, drafts = plot.growth_lines(logs, groups).values()
    known = {"ar": [(n, 1.0) for n in x], "record": [(x[0], 0.875), (x[1], 0.5)]}
    known["ar, COMPILE=True"] = [(10 * 64, 1.25)]  # the best `ar` of equal time is what counts
    assert ratio == known
    assert own.keys() == {"record, bound at 16", "record, one pass of 8"}
    assert [y for _, y in own["record, bound at 16"]] == [2.0, 3.0]
    assert [y for _, y in own["record, one pass of 8"]] == [2 - 0.25 / 1.75, 2 - 0.25 / 0.75]
    assert accuracy.keys() == {"record, text after it", "record, none after it"}
    assert drafts == {"record, temperature 0.8": [(x[0], 1.0), (x[1], 4.0)]}
    argv = ["--plots", str(tmp_path / "plots"), "--logs", str(logs)]
    assert plot.main(argv) == 0
    assert (tmp_path / "plots" / "grown_stdlib_growth.png").stat().st_size > 10_000
    assert plot.main([*argv, "--rows", "ar"]) == 0
    for path in logs.glob("*_240*"):
        path.unlink()
    (tmp_path / "plots" / "grown_stdlib_growth.png").unlink()
    assert plot.main(argv) == 0
    assert not (tmp_path / "plots" / "grown_stdlib_growth.png").exists()
    capsys.readouterr()


@pytest.mark.slow
def test_every_context_of_a_folder_has_its_pictures(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(logs, "more", lines_of(changed={"iterations": 50}))
    write(
        logs,
        "books",
        [line for line in lines_of(data="/x/books") if line["event"] != "parallel_eval"],
    )
    out = run(capsys, "--logs", logs, "--plots", tmp_path / "new" / "plots")
    files = json.loads(out.splitlines()[-1])["plots"]
    three = ["training", "infill", "likelihood"]
    expected = {f"logs_{data}_{kind}.png" for data in ("stdlib", "stdlib_2") for kind in three}
    assert {Path(file).name for file in files} == expected | {
        "logs_books_training.png",
        "logs_books_likelihood.png",
    }
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in files)
    # A ladder: ar, retrograde, direct.
    out = run(capsys, "--logs", logs, "--plots", tmp_path, "--rows", "main")
    assert len(json.loads(out.splitlines()[-1])["plots"]) == len(files)
    out = run(capsys, "--logs", logs, "--plots", tmp_path, "--rows", "ar")
    assert [Path(file).name for file in json.loads(out.splitlines()[-1])["plots"]] == [
        "logs_stdlib_training.png"
    ]


def test_faults_are_named(
    logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--rows=late: no run of it" in run(
        capsys, "--logs", logs, "--plots", tmp_path, "--rows", "ar,late", code=2
    )
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "name another folder" in run(
        capsys, "--logs", logs, "--plots", tmp_path / "file", code=2
    )
    assert "is not a folder" in run(
        capsys, "--logs", tmp_path / "none", "--plots", tmp_path, code=2
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in run(capsys, "--logs", logs, "--plots", tmp_path, code=2)
