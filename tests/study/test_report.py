"""report.py: what is averaged, what is not, and that tables and logs cannot drift apart unseen."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

import train_gpt as tg
from scripts.study import report, runlog
from tests.conftest import ROOT

CPU = "Some Processor, 2 cores"
FIELDS = [  # of the challenge
    *(
        "author",
        "github_id",
        "name",
        "blurb",
        "date",
        "track",
        "val_loss",
        "val_bpb",
        "val_bpb_std",
        "seeds",
    ),
    *("seed_results", "bytes_total", "bytes_code", "hardware", "pytorch_version"),
]


def events(
    *,
    recipe: str = "direct",
    seed: int = 1,
    bpb: float | None = 2.0,
    data: str = "/somewhere/data/stdlib",
    changed: dict[str, Any] | None = None,
    time: str = "2026-01-01T00:00:00+00:00",
    ranks: int = 1,
    preset: str = "cpu",
    code: str = "abc",
    total_bytes: int = 1_000_000,
) -> list[dict[str, Any]]:
    """The events of one finished run."""
    values = {
        "recipe": recipe,
        "preset": preset,
        "run_id": "",
        "seed": seed,
        "data_path": data,
        "matrix_lr": 0.04,
    }
    values |= changed or {}
    source = dict.fromkeys(values, "default") | dict.fromkeys(
        ["seed", "data_path", *(changed or {})], "env"
    )
    bound = None if bpb is None else bpb + 0.5
    decoded = {"exact_seq": 0.0, "tokens": 512, "forwards": 8}
    return [
        {"event": "header", "time": time, "commit": "none", "machine": CPU, "sha256": code},
        {"event": "kernels", "device": "cpu", "world_size": ranks},
        {"event": "config", "values": values, "source": source},
        {"event": "data", "train_tokens": 9, "val_tokens": 9},
        {"event": "train", "step": 10, "train_loss": 3.0, "tok_per_sec": 1000.0 * seed},
        {
            "event": "size",
            "total_bytes": total_bytes + seed,
            "code_bytes": 90_000,
            "model_bytes": total_bytes - 90_000,
        },
        {"event": "final", "val_loss": 1.5, "val_bpb": bpb, "tokens": 9, "bytes": 9},
        {
            "event": "nelbo",
            "window": 1,
            "nelbo_bpb": bpb,
            "standard_error": 0.0,
            "samples": 1,
            "tokens": 9,
        },
        {
            "event": "nelbo",
            "window": 16,
            "nelbo_bpb": bound,
            "standard_error": 0.0123,
            "samples": 8,
            "tokens": 9,
        },
        *(
            {
                "event": "parallel_eval",
                "task": task,
                "span": 8,
                "mode": mode,
                "steps": steps,
                **decoded,
                **scores,
            }
            for task, mode, steps, scores in (
                ("continuation", "ar_cached", 8, {"token_acc": 0.5, "tok_per_sec": 100.0}),
                ("continuation", "refine", 1, {"token_acc": 0.25, "tok_per_sec": 800.0}),
                ("infill", "refine", 1, {"token_acc": 0.375, "tok_per_sec": 700.0}),
                ("infill", "refine", 8, {"token_acc": 0.4, "tok_per_sec": 200.0}),
            )
        ),
        {"event": "done", "artifact": "a", "log": "b", "steps": 10, "peak_memory_mib": 300 + seed},
    ]


class Project:
    """A folder with logs, a README and a submission, and the command over it."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys
        (root / "logs").mkdir()
        self.readme = root / "README.md"
        self.readme.write_text(
            "# Title\n\n<!-- results -->\nold\n<!-- /results -->\n\nThe end.\n", encoding="utf-8"
        )
        self.submission, self.results = root / "submission.json", root / "logs" / "results.json"

    def log(self, name: str, lines: list[dict[str, Any]], tail: str = "") -> Path:
        path = self.root / "logs" / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
        return path

    def ladder(self, name: str, lines: list[dict[str, Any]]) -> None:
        (self.root / "logs" / "ladder").mkdir(exist_ok=True)
        self.log(f"ladder/{name}", lines)

    def mark(self) -> None:
        """Give README.md a place for the table of recipes."""
        text = self.readme.read_text(encoding="utf-8")
        self.readme.write_text(f"{text}\n<!-- recipes -->\n<!-- /recipes -->\n", encoding="utf-8")

    def record(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Log a run of the record, and give README.md a place for its table."""
        if not (folder := self.root / "logs" / "record_cpu" / "logs").exists():
            folder.mkdir(parents=True)
            with self.readme.open("a", encoding="utf-8") as file:
                file.write("\n<!-- record -->\n<!-- /record -->\n")
        self.log(f"record_cpu/logs/{name}", lines)

    def run(self, *argv: str, code: int = 0) -> str:
        """Run the command, require its exit status, and return what it printed, errors included."""
        paths = [
            "--logs",
            self.root / "logs",
            "--readme",
            self.readme,
            "--submission",
            self.submission,
        ]
        self.capsys.readouterr()
        assert report.main([str(p) for p in paths] + list(argv)) == code
        captured = self.capsys.readouterr()
        if code != 2:
            json.loads(captured.out.splitlines()[-1])
        return captured.out + captured.err

    def rows(self, out: str) -> list[list[str]]:
        lines = [line for line in out.splitlines() if line.startswith("| `")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    def entry(self) -> dict[str, Any]:
        self.run("--write")
        entry: dict[str, Any] = json.loads(self.submission.read_text(encoding="utf-8"))
        return entry

    def measured(self) -> dict[str, Any]:
        self.run("--write")
        found: dict[str, Any] = json.loads(self.results.read_text(encoding="utf-8"))
        return found


@pytest.fixture
def project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Project:
    return Project(tmp_path, capsys)


def test_seeds_are_averaged_into_one_row(project: Project) -> None:
    project.log("a", events(seed=1, bpb=2.0))
    project.log("b", events(seed=2, bpb=2.2))
    out = project.run()
    scores, continuation, infill = project.rows(out)
    expected = [
        "`direct`",
        "stdlib",
        CPU,
        "2",
        "2.1000 ± 0.1414",
        "2.1000 ± 0.1414",
        "2.6000 ± 0.1414",
    ]
    assert scores == [*expected, "1,000,002", "1,500", "302"]
    assert continuation[3:] == [
        "continuation",
        "8",
        "0.250 ± 0.000 (800/s)",
        "-",
        "0.500 ± 0.000 (100/s)",
    ]
    assert infill[3:] == ["infill", "8", "0.375 ± 0.000 (700/s)", "0.400 ± 0.000 (200/s)", "-"]
    assert "| bound, window 1 | bound, window 16 |" in out
    assert "| 1 pass | 8 passes | left to right |" in out
    assert "standard error of one run's bound: 0.0123" in out


def test_one_run_has_no_deviation(project: Project) -> None:
    project.log("a", events(bpb=2.0))
    assert project.rows(project.run())[0][3:5] == ["1", "2.0000"]


def test_an_unfinished_run_is_listed_and_never_averaged(project: Project) -> None:
    project.log("a", events(seed=1, bpb=2.0))
    project.log("cut", events(seed=2, bpb=9.0)[:-1])
    project.log(
        "failed", [*events(seed=3, bpb=9.0)[:5], {"event": "error", "reason": "loss is not finite"}]
    )
    project.log("nan", events(seed=4, bpb=None))
    out = project.run()
    assert project.rows(out)[0][3:5] == ["1", "2.0000"]
    assert "- `cut`: unfinished, last logged step 10" in out
    assert "- `failed`: loss is not finite" in out
    assert "- `nan`: its score is not a finite number" in out


def test_a_run_that_was_started_again_counts_from_its_last_header(project: Project) -> None:
    project.log("crashed", events(seed=1, bpb=5.0) + events(seed=1, bpb=6.0)[:5])
    project.log("resumed", events(seed=2, bpb=5.0)[:5] + events(seed=2, bpb=2.0))
    out = project.run()
    assert project.rows(out)[0][3:5] == ["1", "2.0000"]
    assert "`crashed`: unfinished" in out


def test_a_seed_never_counts_twice(project: Project) -> None:
    project.log("new", events(seed=1, bpb=2.0, time="2026-02-01T00:00:00+00:00"))
    project.log("old", events(seed=1, bpb=4.0, time="2026-01-01T00:00:00+00:00"))
    out = project.run()
    assert project.rows(out)[0][3:5] == ["1", "2.0000"]
    assert "- `old`: repeated later by `new`" in out


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": "ar"},
        {"data": "/elsewhere/books"},
        {"changed": {"matrix_lr": 0.02}},
        {"ranks": 2},
        {"preset": "1xgpu"},
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_rows_apart(
    project: Project, other: dict[str, Any]
) -> None:
    project.log("a", events(seed=1, bpb=2.0))
    project.log("b", events(seed=2, bpb=3.0, **other))
    rows = [row for row in project.rows(project.run()) if len(row) == 10]
    assert sorted(row[4] for row in rows) == ["2.0000", "3.0000"]


def test_changed_settings_are_named_once_if_all_rows_share_them(project: Project) -> None:
    project.log("a", events(bpb=2.0, changed={"iterations": 50}))
    project.log("b", events(bpb=3.0, changed={"iterations": 50, "matrix_lr": 0.02, "eval_seed": 7}))
    out = project.run()
    assert [row[0] for row in project.rows(out) if len(row) == 10] == [
        "`direct`",
        "`direct`, `MATRIX_LR=0.02`",
    ]
    assert "In all rows: `ITERATIONS=50`." in out


def test_mixed_versions_of_the_program_are_pointed_out(project: Project) -> None:
    project.log("a", events(seed=1, code="abc"))
    project.log("b", events(seed=2, code="def"))
    assert "averages 2 versions of train_gpt.py" in project.run()


def test_submission_without_a_ranked_run_claims_nothing(project: Project) -> None:
    project.log("a", events(seed=1, bpb=2.0))
    project.log("b", events(seed=2, bpb=2.2))
    project.log("c", events(recipe="ar", bpb=1.0))
    entry = project.entry()
    assert entry["name"] == "Text diffusion, exactly autoregressive"
    assert list(entry) == FIELDS
    assert [key for key in entry if entry[key] is not None] == ["author", "name", "blurb"]
    (measured,) = project.measured()["measured_here"]["stdlib"]
    assert measured["val_bpb_mean"] == pytest.approx(2.1)
    assert measured["val_bpb_std"] == pytest.approx(0.02**0.5, abs=1e-6)
    assert (measured["n"], measured["seeds"], measured["hardware"]) == (2, [1, 2], CPU)


def test_submission_takes_ranked_runs_from_fineweb_on_eight_ranks_only(project: Project) -> None:
    ranked: dict[str, Any] = {"data": "/x/fineweb10B_sp1024", "ranks": 8, "preset": "8xh100"}
    ranked["recipe"] = "record"
    project.log("a", events(seed=1, bpb=1.2, **ranked))
    project.log("b", events(seed=2, bpb=1.3, **ranked))
    for seed in (3, 4, 5):  # more seeds, better scores, and each not what is ranked
        project.log(f"ranks{seed}", events(seed=seed, bpb=0.1, **{**ranked, "ranks": 4}))
        project.log(f"data{seed}", events(seed=seed, bpb=0.1, **{**ranked, "data": "/x/books"}))
        project.log(f"preset{seed}", events(seed=seed, bpb=0.1, **{**ranked, "preset": "cpu"}))
        for other in ("ar", "direct"):
            run = events(seed=seed, bpb=0.1, **{**ranked, "recipe": other})
            project.log(f"{other}{seed}", run)
        project.log(f"unfinished{seed}", events(seed=seed, bpb=0.1, **ranked)[:-1])
        project.log(
            f"longer{seed}",
            events(seed=seed, bpb=0.1, changed={"max_wallclock_seconds": 601.0}, **ranked),
        )
    for seed in (1, 2):  # as many seeds, and worse; one seed fewer, and better
        project.log(
            f"worse{seed}", events(seed=seed, bpb=1.4, changed={"num_layers": 99}, **ranked)
        )
    project.log("few", events(seed=1, bpb=0.1, changed={"num_layers": 98}, **ranked))
    entry = project.entry()
    assert entry["val_bpb"] == pytest.approx(1.25)
    assert list(entry) == FIELDS
    assert {seed: row["val_bpb"] for seed, row in entry["seed_results"].items()} == {
        "1": 1.2,
        "2": 1.3,
    }
    assert entry["seeds"] == [1, 2]
    assert entry["val_bpb_std"] == pytest.approx(0.005**0.5, abs=1e-6)
    assert (entry["bytes_total"], entry["bytes_code"]) == (1_000_002, 90_000)
    assert (entry["hardware"], entry["date"], entry["track"]) == (
        f"8 x {CPU}",
        "2026-01-01",
        "10min_16mb",
    )


def test_write_then_check_agree_and_keep_the_rest_of_the_readme(project: Project) -> None:
    project.log("a", events())
    assert "differs" in project.run("--check", code=1)
    project.run("--write")
    text = project.readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- results -->\n\n| recipe |")
    assert text.endswith("\n\n<!-- /results -->\n\nThe end.\n")
    assert "differs" not in project.run("--check")
    project.run("--write")
    assert project.readme.read_text(encoding="utf-8") == text


def test_check_notices_any_change(project: Project) -> None:
    project.log("a", events(seed=1, bpb=2.0))
    project.run("--write")
    for path, old, new in (
        (project.readme, "2.0000", "1.9999"),
        (project.readme, "2.0000", "2.0000 "),
        (project.readme, "<!-- /results -->", "More.\n<!-- /results -->"),
        (project.readme, "<!-- /results -->", ""),
        (project.submission, '"val_bpb": null', '"val_bpb": 1.1'),
        (project.submission, '"github_id": null,', ""),
        (project.submission, '"github_id": null,', '"github_id": null, "more": 1,'),
        (project.submission, "{", "not json"),
        (project.results, '"val_bpb_mean": 2.0', '"val_bpb_mean": 1.9'),
        (project.results, '"decode_benchmark_here"', '"decode_benchmark"'),
        (project.results, "{", "not json"),
    ):
        good = path.read_text(encoding="utf-8")
        assert old in good
        path.write_text(good.replace(old, new, 1), encoding="utf-8")
        assert f"differs: {path}" in project.run("--check", code=1)
        path.write_text(good, encoding="utf-8")
    project.run("--check")
    project.log("b", events(seed=2, bpb=2.5))  # a new log makes both stale
    out = project.run("--check", code=1)
    assert "README.md" in out
    assert f"{project.results}: measured_here" in out


def test_no_log_is_not_an_error(project: Project) -> None:
    assert "No finished run." in project.run()
    names = ("measured_here", "decode_benchmark_here", "parallel_bpb_benchmark_here")
    assert project.measured() == dict.fromkeys(names)


def test_faults_of_files_that_are_no_logs_are_named(project: Project) -> None:
    project.readme.write_text("no markers", encoding="utf-8")
    needed = "needs the lines <!-- results --> and <!-- /results -->"
    assert needed in project.run("--write", code=2)
    project.log("a", events())
    project.readme.write_bytes(b"# \xff\n<!-- results -->\n<!-- /results -->\n")
    assert "2.0000" in project.run()  # nothing of README.md is needed
    assert f"error: {project.readme} is no UTF-8 text" in project.run("--write", code=2)
    assert not project.submission.exists()
    assert f"differs: {project.readme} is no UTF-8 text" in project.run("--check", code=1)
    project.readme.unlink()
    project.readme.mkdir()
    assert f"error: {project.readme} cannot be read" in project.run("--write", code=2)
    for text in (b"\xff", b"[" * 99_999, b"[]", b'{"a": NaN}', b'{"val_bpb": 1e999}', b""):
        project.submission.write_bytes(text)
        assert f"differs: {project.submission}" in project.run("--check", code=1)
    for path in (project.root / "logs").iterdir():
        path.unlink()
    (project.root / "logs").rmdir()
    assert "is not a folder" in project.run(code=2)


def with_line(number: int, line: bytes) -> bytes:
    """A log in which one line, from 0, is another one."""
    lines = [json.dumps(event).encode() + b"\n" for event in events(seed=2, bpb=9.0)]
    return b"".join([*lines[:number], line, *lines[number + 1 :]])


def changed(kind: str, **values: Any) -> bytes:
    """A log in which one event has other values."""
    lines = [e | values if e["event"] == kind else e for e in events(seed=2, bpb=9.0)]
    return b"".join(json.dumps(event).encode() + b"\n" for event in lines)


def without(kind: str, key: str) -> bytes:
    """A log in which one event lacks a value."""
    lines = events(seed=2, bpb=9.0)
    for event in lines:
        if event["event"] == kind:
            event.pop(key, None)
    return b"".join(json.dumps(event).encode() + b"\n" for event in lines)


TWO_RUNS = [
    *events(seed=2, bpb=9.0)[:3],
    *events(seed=3, bpb=8.0)[:3],
    *events(seed=2, bpb=9.0)[3:],
]
DAMAGED = {
    "cut": (with_line(5, b'{"event": "si\n'), "line 6: not JSON from character "),
    "joined": (with_line(5, b'{"event": "si'), "line 6: not JSON from character "),
    "cut off": (with_line(13, b'{"event": "do'), "line 14: cut off: not JSON"),
    "zeros": (with_line(4, bytes(4096) + b"\n"), "line 5: not JSON from character 1 on"),
    "no header": (with_line(0, b""), "line 1: no header before it: the first lines are lost"),
    "empty": (b"", ": it is empty"),
    "blank": (b"\n \n\n", ": it is empty"),
    "not UTF-8": (with_line(4, b'{"event": "\xff"}\n'), "line 5: 'utf-8' codec can't decode"),
    "half a character": (changed("header", machine="\ud800"), "line 1: 'utf-8' codec can't encode"),
    "nested": (with_line(4, b"[" * 99_999 + b"\n"), "line 5: nested too deeply"),
    "list": (with_line(4, b"[1]\n"), "line 5: not a JSON object"),
    "no event": (with_line(4, b'{"row": "x"}\n'), "line 5: it does not say which event it is"),
    "event is a number": (with_line(4, b'{"event": 4}\n'), "line 5: it does not say which event"),
    "name twice": (
        with_line(6, b'{"event": "final", "val_bpb": 9.0, "val_bpb": 1.0}\n'),
        "line 7: a name stands twice in it",
    ),
    "NaN": (with_line(6, b'{"event": "final", "bpb": NaN, "loss": 1}\n'), "NaN is no number"),
    "infinity": (with_line(6, b'{"event": "final", "bpb": -Infinity}\n'), "-Infinity is no number"),
    "too large": (
        with_line(6, b'{"event": "final", "bpb": 1e999, "loss": 1}\n'),
        "val_bpb of a final event is inf, not a number above 0",
    ),
    "long whole number": (
        with_line(6, b'{"event": "final", "bpb": ' + b"9" * 9999 + b"}\n"),
        "line 7",
    ),
    "text": (changed("final", val_bpb="2.0"), "line 7: val_bpb of a final event is '2.0', not"),
    "negative": (changed("final", val_bpb=-1.0), "line 7: val_bpb of a final event is -1.0"),
    "zero": (changed("final", val_bpb=0), "line 7: val_bpb of a final event is 0"),
    "true": (changed("final", val_loss=True), "line 7: val_loss of a final event is True"),
    "bound": (changed("nelbo", nelbo_bpb=-0.1), "line 8: nelbo_bpb of a nelbo event is -0.1"),
    "accuracy": (changed("parallel_eval", token_acc=1.01), "line 10: token_acc of a parallel_eval"),
    "share": (changed("parallel_eval", exact_seq=-1), "line 10: exact_seq of a parallel_eval"),
    "window": (changed("nelbo", window="T"), "line 8: window of a nelbo event is 'T'"),
    "task": (changed("parallel_eval", task=["x"]), "line 10: task of a parallel_eval event"),
    "step": (changed("train", step="10"), "line 5: step of a train event is '10'"),
    "seed": (changed("config", values={"recipe": "direct", "seed": "2"}), "line 3: values of a"),
    "source": (changed("config", source=3), "line 3: source of a config event is 3"),
    "no window": (without("nelbo", "window"), "line 8: no window in a nelbo event"),
    "no machine": (without("header", "machine"), "line 1: no machine in a header event"),
    "no settings": (without("config", "values"), "line 3: no values in a config event"),
    "no score": (without("final", "val_bpb"), "line 7: no val_bpb in a final event; another"),
    "no size": (without("size", "total_bytes"), "line 6: no total_bytes in a size event"),
    "lines of two runs": (
        b"".join(json.dumps(event).encode() + b"\n" for event in TWO_RUNS),
        "SEED=3 after 2: lines of two runs",
    ),
    "two scores": (
        with_line(7, b'{"event": "final", "val_bpb": 1.0, "val_loss": 1.0}\n'),
        "line 8: a second final event in one start: lines of two runs",
    ),
    "steps back": (
        with_line(5, b'{"event": "train", "step": 10}\n'),
        "line 6: step 10 of a train event after step 10 or the end: lines of two runs",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_log_is_named_and_left_out_and_the_rest_is_reported(
    project: Project, name: str
) -> None:
    data, said = DAMAGED[name]
    project.log("good", events(seed=1, bpb=2.0))
    project.run("--write")
    path = project.root / "logs" / "bad.jsonl"
    path.write_bytes(data)
    out = project.run()
    assert project.rows(out)[0][3:5] == ["1", "2.0000"]
    (warning,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert warning.startswith(f"warning: log {path}")
    assert said in warning
    assert "left out: copy it again, or move it away" in warning
    project.run("--write")  # also where README.md says so
    assert f"error: log {path}" in project.run("--check", code=1)
    path.unlink()
    project.run("--write")
    project.run("--check")


def test_what_is_no_file_is_named_and_left_out(project: Project) -> None:
    project.log("good", events(seed=1, bpb=2.0))
    logs = project.root / "logs"
    (logs / "folder.jsonl").mkdir()
    os.mkfifo(logs / "pipe.jsonl")
    (logs / "nowhere.jsonl").symlink_to(logs / "gone")
    (logs / "itself.jsonl").symlink_to(logs / "itself.jsonl")
    (logs / "a_decode.json").mkdir()
    out = project.run()
    assert project.rows(out)[0][3:5] == ["1", "2.0000"]
    for name in ("folder", "pipe", "nowhere", "itself"):
        assert f"warning: log {logs / name}.jsonl: it cannot be read" in out
    assert f"warning: log {logs / 'a_decode.json'}: it cannot be read" in out


def test_a_run_missing_an_event_of_a_finished_one_is_left_out(project: Project) -> None:
    for seed, kind in enumerate(("config", "size", "final"), start=2):
        lines = [event for event in events(seed=seed, bpb=9.0) if event["event"] != kind]
        project.log(f"no_{kind}", lines)
    project.log("good", events(seed=1, bpb=2.0))
    out = project.run()
    assert project.rows(out)[0][3:5] == ["1", "2.0000"]
    for kind in ("config", "size", "final"):
        assert f"- `no_{kind}`: no {kind} event: lines are lost, or another version" in out


def test_damage_before_the_last_start_of_a_resumed_run_is_only_noted(project: Project) -> None:
    first, second = (
        [json.dumps(event) + "\n" for event in events(seed=1, bpb=bpb)] for bpb in (5.0, 2.0)
    )
    path = project.root / "logs" / "a.jsonl"
    path.write_text("".join([*first[:4], '{"event": "tra\n', *second]), encoding="utf-8")
    out = project.run("--write")
    assert project.rows(out)[0][3:5] == ["1", "2.0000"]
    assert f"warning: log {path}, line 5: not JSON" in out
    project.run("--check")
    # A second header that was cut off joins its start to the first: nothing can be credited.
    path.write_text("".join([*first[:5], '{"event": "hea\n', *second[1:]]), encoding="utf-8")
    out = project.run()
    assert "No finished run." in out
    assert f"warning: log {path}, line 6: not JSON" in out


def test_a_line_cut_off_after_the_end_takes_no_result_away(project: Project) -> None:
    path = project.log("a", events(seed=1, bpb=2.0), tail='{"event": "hea')
    out = project.run("--write")
    assert project.rows(out)[0][3:5] == ["1", "2.0000"]
    assert f"warning: log {path}, line 15: cut off: not JSON" in out
    assert f"error: log {path}, line 15: cut off" in project.run("--check", code=1)


def test_a_copy_or_an_archived_log_of_a_run_never_counts_twice(project: Project) -> None:
    lines = events(seed=1, bpb=2.0)
    project.log("run", lines)
    project.log("run.1790000000", lines)
    project.log("other", events(seed=2, bpb=3.0))
    out = project.run()
    assert project.rows(out)[0][3:5] == ["2", "2.5000 ± 0.7071"]
    assert "- `run.1790000000`: the same run as `run`" in out


def of_text(lines: list[dict[str, Any]], **digests: str) -> list[dict[str, Any]]:
    """A run that says which data and tokenizer it had."""
    return [event | digests if event["event"] == "data" else event for event in lines]


def test_runs_on_different_data_of_one_name_are_rows_apart(project: Project) -> None:
    for seed, letter in enumerate("ab", start=1):
        digests = {"data_sha256": letter * 64, "tokenizer_sha256": "c" * 64}
        project.log(f"run{seed}", of_text(events(seed=seed, bpb=1.0 + seed), **digests))
    project.log("run3", events(seed=3, bpb=4.0))
    scores = [(row[1], row[4]) for row in project.rows(project.run()) if len(row) == 10]
    assert scores == [
        ("stdlib (data aaaaaaaa, tokenizer cccccccc)", "2.0000"),
        ("stdlib (data bbbbbbbb, tokenizer cccccccc)", "3.0000"),
        ("stdlib (data unknown, tokenizer unknown)", "4.0000"),
    ]


@pytest.mark.parametrize("name", ["data", "tokenizer"])
def test_runs_of_which_some_do_not_name_their_text_are_pointed_out(
    project: Project, name: str
) -> None:
    project.mark()
    for log in (project.log, project.ladder):
        log("a", of_text(events(seed=1), **{f"{name}_sha256": "a" * 64}))
        log("b", events(seed=2))
    out = project.run()
    what = {"data": "fingerprints of data", "tokenizer": "tokenizers"}[name]
    assert f"averages 2 {what} (aaaaaaaa, unknown)" in out
    assert f"- stdlib: runs on 2 {what} (aaaaaaaa, unknown)" in out
    assert f"the runs differ in {name} (SHA-256 aaaaaaaa: a; unknown: b)" in out
    project.log("b", of_text(events(seed=2), **{f"{name}_sha256": "a" * 64}))
    assert f"averages 2 {what}" not in project.run()


def test_ranked_runs_of_two_programs_are_no_submission(project: Project) -> None:
    ranked: dict[str, Any] = {"data": "/x/fineweb10B_sp1024", "ranks": 8, "preset": "8xh100"}
    for seed, code in ((1, "abc"), (2, "def")):
        project.log(f"run{seed}", events(seed=seed, recipe="record", code=code, **ranked))
    assert project.entry()["val_bpb"] is None
    project.log("run2", events(seed=2, recipe="record", code="abc", **ranked))
    assert project.entry()["val_bpb"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "text",
    [
        "[rows.direct\n", "rows = 3\n", "ladders = 3\n", "rows.x = 3\n", "a = " + "[" * 9999,
        "[rows.x]\nbase = 'nowhere'\n", "[rows.x]\nbase = 'x'\n", "[rows.x]\nbase = 3\n",
        "[rows.x]\nbase = 'ar'\npublished = 3\n", "[rows.'x|y']\nbase = 'ar'\n",
        "[rows.x]\nbase = 'ar'\npublished = {a = 'b'}\n",
        "[rows.x]\nbase = 'ar'\npublished = {a = nan}\n",
        "[rows.x]\nbase = 'ar'\nbeta1 = 1979-05-27\n",
        "[rows.x]\nbase = 'ar'\n[ladders]\na = 'x'\n", "[ladders]\na = ['y']\n",
        "[left_out]\na = 3\n", "\x00", "\udc80",
    ],
)  # fmt: skip
def test_a_damaged_ladder_takes_no_run_away(
    project: Project, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = project.root / "ladder.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    monkeypatch.setattr(tg, "LADDER_FILE", path)
    project.mark()
    project.log("a", events(seed=1, bpb=2.0))
    project.ladder("b", events(seed=2, recipe="td_span15", bpb=3.0))
    out = project.run("--write")
    assert [row[-6] for row in project.rows(out)][-1] == "3.0000"
    assert f"warning: {path}" in out
    assert f"error: {path}" in project.run("--check", code=1)


def test_a_line_cut_off_at_the_end_is_passed_over(project: Project) -> None:
    project.log("a", events(seed=1, bpb=2.0))
    project.log("b", events(seed=2, bpb=9.0)[:-1], tail='{"event": "do')
    assert project.rows(project.run())[0][3:5] == ["1", "2.0000"]


def test_short_names_of_scores_and_ranks_in_the_header_are_understood(project: Project) -> None:
    lines = events(bpb=2.0)
    lines[0]["world_size"] = 2
    del lines[1]
    for line in lines:
        for long, short in (("val_bpb", "bpb"), ("val_loss", "loss"), ("nelbo_bpb", "bpb")):
            if long in line:
                line[short] = line.pop(long)
    project.log("a", lines)
    assert project.rows(project.run())[0][2:7] == [
        f"{CPU}, 2 ranks",
        "1",
        "2.0000",
        "2.0000",
        "2.5000",
    ]


def test_the_committed_logs_agree_with_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """They lack settings that came later, and their record runs are of recipe direct."""
    record = ROOT / "logs" / "record_cpu"
    paths = {"logs": record / "logs", "readme": record / "README.md"}
    paths["submission"] = record / "submission.json"
    for argv in ([], [f"--{name}={path}" for name, path in paths.items()]):
        assert report.main(["--check", *argv]) == 0, capsys.readouterr().err
    assert "`direct`" in capsys.readouterr().out


def test_seeds_that_a_recipe_lacks_are_said(project: Project) -> None:
    for seed in (1, 2, 3):
        project.log(f"d{seed}", events(seed=seed))
    project.log("a2", events(recipe="ar", seed=2))
    project.log("other", events(recipe="ar", seed=9, data="/x/books"))
    out = project.run()
    assert (
        "note: stdlib: `ar` has no finished run of seeds 1, 3, which other recipes there have\n"
        in out
    )
    assert out.count("no finished run of") == 2  # as a note, and in the JSON line
    project.log("a1", events(recipe="ar", seed=1)[:-1])  # it died: still missing
    assert "no finished run of seeds 1, 3" in project.run()
    project.log("a1", events(recipe="ar", seed=1))
    assert "no finished run of seed 3, which" in project.run()


def test_recipes_have_a_table_of_their_own_and_are_never_averaged_with_the_results(
    project: Project,
) -> None:
    project.mark()
    project.log("a", events(seed=1, bpb=2.0))
    project.ladder("b", events(seed=2, bpb=3.0))
    project.ladder("c", events(recipe="td_span15", seed=2, bpb=4.0))
    project.ladder("d", events(recipe="td_span15", seed=3, bpb=5.0))
    project.ladder("cut", events(recipe="td_span15", seed=4, bpb=9.0)[:-1])
    (project.root / "logs" / "ladder" / "sweep.jsonl").write_text(
        '{"row": "td_span15"}\n', encoding="utf-8"
    )
    project.run("--write")
    readme = project.readme.read_text(encoding="utf-8")
    main, ladder = readme.split("<!-- recipes -->")
    assert "| 1 | 2.0000 |" in main
    assert "3.0" not in main
    head = (
        "| row | n | steps | train tok/s | peak MiB | val_bpb | bound, window 1 | bound, window 16 "
        "| infill 8, 1 pass |"
    )
    assert head in ladder
    direct, span15 = project.rows(ladder)
    bounds = ["3.0000", "3.5000"]
    assert direct == [
        "`direct`",
        "1",
        "10",
        "2,000",
        "302",
        "3.0000",
        *bounds,
        "0.375",
        "0.400",
        "1,000,002",
        "-",
    ]
    assert span15[:6] == ["`td_span15`", "2", "10", "2,500", "303", "4.5000 ± 0.7071"]
    assert span15[-2:] == ["1,000,003", "2.1725 (1)"]
    assert "- `cut`: unfinished, last logged step 10" in ladder
    assert (
        "- stdlib: `direct` has no finished run of seed 3, which other recipes there have\n"
        in ladder
    )
    assert "stdlib, Some Processor, 2 cores:" in ladder
    assert "Of equal settings" not in ladder
    project.ladder("e", events(recipe="td_control", seed=2, bpb=4.0))
    assert (
        "the same runs: `td_control` is also `ar`, `ab_control`, `mdlm_100_0`.\n" in project.run()
    )
    project.ladder("f", events(recipe="mdlm_100_0", seed=2, bpb=4.0))
    assert (
        "`td_control` is also `ar`, `ab_control`; `mdlm_100_0` is also `ar`, `ab_control`.\n"
        in project.run()
    )
    for name in "ef":
        (project.root / "logs" / "ladder" / f"{name}.jsonl").unlink()
    project.run("--check")
    project.readme.write_text(readme.replace("4.5000", "4.4000"), encoding="utf-8")
    assert "logs give '| `td_span15`" in project.run("--check", code=1)


def test_recipes_need_their_place_only_if_they_have_logs(project: Project) -> None:
    project.log("a", events())
    project.run("--write")
    project.run("--check")
    project.ladder("b", events(recipe="ar"))
    assert "needs the lines <!-- recipes --> and <!-- /recipes -->, once each" in project.run(
        "--check", code=1
    )
    before = (
        project.readme.read_text(encoding="utf-8"),
        project.submission.read_text(encoding="utf-8"),
    )
    assert "needs the lines <!-- recipes --> and <!-- /recipes -->, once each" in project.run(
        "--write", code=2
    )
    assert (
        project.readme.read_text(encoding="utf-8"),
        project.submission.read_text(encoding="utf-8"),
    ) == before
    project.mark()
    project.run("--write")
    project.run("--check")
    (project.root / "logs" / "ladder" / "b.jsonl").unlink()
    assert "no log gives '| `ar`" in project.run("--check", code=1)


def test_runs_of_a_row_with_a_setting_changed_are_apart(project: Project) -> None:
    project.mark()
    changed = {"iterations": 50}
    project.ladder("a", events(recipe="td_span15", seed=1, bpb=2.0, changed=changed))
    project.ladder("b", events(recipe="td_span15", seed=2, bpb=3.0, changed=changed))
    out = project.run()
    assert "stdlib, Some Processor, 2 cores, `ITERATIONS=50`:" in out
    assert [row[:2] for row in project.rows(out)] == [["`td_span15`", "2"]]
    assert "| 2.5000 ± 0.7071 |" in out
    other = {**changed, "diffusion_max_mask_ratio": 0.5}
    project.ladder("b", events(recipe="td_span15", seed=2, bpb=3.0, changed=other))
    out = project.run()  # its settings are not the row's: never averaged with it
    assert "2 cores, `ITERATIONS=50`, `DIFFUSION_MAX_MASK_RATIO=0.5`:" in out
    assert "±" not in out.replace("± standard", "")


def strong(recipe: str, **other: Any) -> list[dict[str, Any]]:
    """A run with the strength settings of its preset, given one by one."""
    settings = {"value_residual": True, "bigram_vocab_size": 16384, "muon_momentum": 0.9}
    settings |= {"train_batch_tokens": 2048, "micro_batches": 1}
    lines = events(recipe=recipe, changed=settings | {"iterations": 50}, **other)
    return [lines[0], {"event": "model", "model_params": 3_532_022}, *lines[1:]]


@pytest.fixture
def record(project: Project) -> Project:
    """Two naive runs, two of the record and one without its denoiser."""
    for seed, bpb in ((1, 2.0), (2, 2.2)):
        project.record(
            f"ar{seed}",
            events(recipe="ar", seed=seed, bpb=bpb, changed=dict(iterations=50, micro_batches=1)),
        )
        project.record(f"record{seed}", strong("direct", seed=seed, bpb=bpb - 0.21))
    project.record("strong", strong("ar", bpb=1.05))
    return project


def test_the_record_stands_beside_the_naive_baseline(record: Project) -> None:
    out = record.run("--write")
    page = record.readme.read_text(encoding="utf-8").split("<!-- record -->")[1]
    assert "2 cores, `MICRO_BATCHES=1`, `ITERATIONS=50`:\n" in page
    names = [line.split("|")[1:6] for line in page.splitlines() if "`" in line and "|" in line]
    rows = [[cell.strip() for cell in row] for row in names[1:]]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        ("naive `ar`", "2", "1.000"),
        ("`record`", "2", "0.900"),
        ("`ar_record`", "1", "0.500"),
    ]
    assert [row[3] for row in rows] == ["2.1000 ± 0.1414", "1.8900 ± 0.1414", "1.0500"]
    assert "infill 8, 1 pass |" in page
    assert any(line.startswith("| `ar`") for line in out.splitlines())  # of all results
    record.run("--check")
    record.readme.write_text(record.readme.read_text("utf-8").replace("0.900", "0.800"), "utf-8")
    assert "logs give '| `record` | 2 |" in record.run("--check", code=1)


def test_a_run_named_by_the_recipe_that_has_the_strength_is_the_record(project: Project) -> None:
    project.record("a", events(recipe="ar", bpb=2.0))
    project.record("b", events(recipe="record", bpb=1.5))
    assert "| `record` | 1 | - | 1.5000 | 0.750 |" in project.run()
    (project.root / "logs" / "record_cpu" / "logs" / "a.jsonl").unlink()
    assert "No finished run of the naive baseline." in project.run()


def test_a_baseline_that_was_run_faster_has_a_row_of_its_own(record: Project) -> None:
    fast = dict(iterations=50, compile="1", micro_batches=2)
    for seed in (1, 2, 3):
        record.record(f"fast{seed}", events(recipe="ar", seed=seed, bpb=2.05, changed=fast))
    page = record.run()
    assert "2 cores, `ITERATIONS=50`:\n" in page
    assert "| naive `ar`, `COMPILE=1`, `MICRO_BATCHES=2` | 3 |" in page
    assert "| 2.0500 ± 0.0000 | 0.976 |" in page
    assert "| naive `ar`, `MICRO_BATCHES=1` | 2 | - | 2.1000 ± 0.1414 | 1.000 |" in page


def test_records_of_other_budgets_have_tables_of_their_own(record: Project) -> None:
    long = dict(micro_batches=1, iterations=99)
    record.record("long", events(recipe="ar", seed=1, bpb=1.0, changed=long))
    page = record.run()
    assert "2 cores, `MICRO_BATCHES=1`, `ITERATIONS=99`:\n" in page
    assert "| naive `ar` | 1 | - | 1.0000 | 1.000 |" in page
    assert "| `record` | 2 | 3,532,022 | 1.8900 ± 0.1414 | 0.900 |" in page


def test_chance_stands_beside_the_accuracy_of_infill(record: Project) -> None:
    for name, examples, share in (("a", 8, 0.5), ("b", 64, 0.0237), ("c", 16, 0.25)):
        rows = [{"hole": 64, "most_frequent_token": 0.9}, {"span": 8, "most_frequent_token": share}]
        line = json.dumps({"examples": examples, "artifacts": [{"infill": rows}]})
        path = record.root / "logs" / f"x_infill_{name}.txt"
        path.write_text(f"| a table |\n{line}\n{{damaged\n[]\n{{}}\n", encoding="utf-8")
    (record.root / "logs" / "folder_infill.txt").mkdir()
    assert "infill 8, 1 pass (chance 0.024) | infill 8, 4 passes (chance 0.024) |" in record.run()


def test_the_record_has_columns_of_decoding_with_a_head_once_they_are_measured(
    record: Project,
) -> None:
    names = ["one pass over 8 tokens, exact, with a head", "lossless speedup, greedy"]
    assert not any(name in record.run() for name in names)
    folder = record.root / "logs" / "record_cpu" / "logs"
    for seed, chained in ((1, 2.2), (2, 2.0), (3, 9.0)):  # there is no run of the third
        found = scored(seed=seed, causal_bpb=2.0)
        found["scores"][0]["chained_bpb"] = chained
        path = folder / f"record{seed}_parallel_bpb.json"
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
        for temperature, times in ((0.8, 1.25 + seed), (0.0, 3.0 + seed)):
            found = decoded(temperature=temperature)
            found["rows"][0] |= {"mode": "speculative + head", "times_cached_ar": times}
            path = folder / f"record{seed}_decode_{temperature}.json"
            path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    out = record.run()
    assert all(name in out for name in names)
    table = out[out.index("| naive `ar`") :].splitlines()
    (line,) = (line for line in table if line.startswith("| `record` |"))
    assert "| 2.1000 ± 0.1414 (1.050 x causal) |" in line
    assert "| 4.50 / 2.75 |" in line
    (line,) = (line for line in table if line.startswith("| `ar_record` |"))
    assert line.count("| - ") >= 2
    results = record.measured()
    assert len(results["parallel_bpb_benchmark_here"]["fineweb10B_sp1024"]) == 3
    assert len(results["decode_benchmark_here"]["fineweb10B_sp1024"]) == 6
    path.write_text('{"rows": []}\n', encoding="utf-8")
    assert f"error: log {path}, line 1: not a result of bench/decode.py" in record.run(
        "--check", code=1
    )


def test_scores_of_passes_are_reported_and_damaged_ones_named(project: Project) -> None:
    path = project.root / "logs" / "x_parallel_bpb.txt"
    path.write_text(f"| a table |\n{json.dumps(scored())}\n", encoding="utf-8")
    (found,) = project.measured()["parallel_bpb_benchmark_here"]["fineweb10B_sp1024"]
    assert (found["log"], found["seed"], found["causal_bpb"]) == (path.name, 1, 2.0)
    assert found["scores"][1] == {
        **{"window": 8, "passes": 8, "factorised_bpb": 2.0, "chained_bpb": 2.0},
        "alone_bpb": None,
    }
    for changes, said in (
        ({"causal_bpb": -1.0}, "ValueError: causal_bpb is -1"),
        ({"scores": [{"window": 8}]}, "KeyError: 'factorised_bpb'"),
        ({"scores": 3}, "TypeError: "),
    ):
        path.write_text(json.dumps(scored() | changes) + "\n", encoding="utf-8")
        out = project.run()
        assert f"warning: log {path}, line 1: not a result of bench/passes.py ({said}" in out


def test_the_page_of_every_table_has_a_place_for_it() -> None:
    for block, page in report.PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [text.count(line) for line in block] == [1, 1], (page, block)


def test_tables_go_to_their_pages(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", project.root)
    (project.root / "docs").mkdir()
    project.record("a", events(recipe="ar", bpb=2.0))
    project.ladder("b", events(recipe="td_span15", bpb=3.0))
    project.log("c", events(bpb=4.0))
    for block, page in report.PAGES.items():
        with (project.root / page).open("a", encoding="utf-8") as file:
            file.write("\n".join(block) + "\n")
    project.readme.write_text("\n".join(report.RECORD), encoding="utf-8")
    paths = [f"--logs={project.root / 'logs'}", f"--submission={project.submission}"]
    assert report.main([*paths, "--write"]) == 0
    pages = {
        page: (project.root / page).read_text(encoding="utf-8") for page in report.PAGES.values()
    }
    assert ["naive `ar`" in text for text in pages.values()] == [True, False]
    assert "`td_span15`" in pages["docs/recipes.md"]
    assert "`direct`" in pages["docs/recipes.md"]
    assert report.main([*paths, "--check"]) == 0
    text = pages["docs/recipes.md"].replace("4.0000", "3.9999")
    (project.root / "docs" / "recipes.md").write_text(text, encoding="utf-8")
    assert report.main([*paths, "--check"]) == 1


def test_results_hold_what_was_measured_and_the_submission_its_fields(project: Project) -> None:
    ranked: dict[str, Any] = {"data": "/x/fineweb10B_sp1024", "ranks": 8, "preset": "8xh100"}
    ranked["recipe"] = "record"
    first = events(seed=1, bpb=1.2, **ranked)
    first[0]["torch"] = "2.13.0"
    first[-1]["train_seconds"] = 600.01
    first.insert(-1, {"event": "timing", "train_seconds": 600.01, "evaluation_seconds": 77.5})
    project.log("a", first)
    second = events(seed=2, bpb=1.3, **ranked)
    second[-2]["token_acc"] = 0.5  # infill in 8 passes
    project.log("b", second)
    entry = project.entry()
    scores = {"val_loss": 1.5, "val_bpb": 1.2, "artifact_bytes": 1_000_001, "steps": 10}
    assert entry["seed_results"]["1"] == scores | {"train_seconds": 600.01, "eval_seconds": 77.5}
    assert entry["seed_results"]["2"]["eval_seconds"] is None  # an older program
    assert entry["pytorch_version"] == "2.13.0"
    (here,) = project.measured()["measured_here"]["fineweb10B_sp1024"]
    assert here["per_seed"]["1"] == entry["seed_results"]["1"] | {"log": "a"}
    infill = {"task": "infill", "span": 8, "mode": "refine", "steps": 8}
    assert here["parallel_eval"][-1] == {
        **infill,
        "token_acc": 0.45,
        "exact_seq": 0.0,
        "tok_per_sec": 200.0,
    }
    assert (here["recipe"], here["bytes_model"]) == ("record", 910_000)


@pytest.mark.parametrize("recipe", ["record", "direct"])
def test_results_go_where_they_are_asked_to(project: Project, recipe: str) -> None:
    project.log("a", events(recipe=recipe))
    project.results = project.root / "all.json"
    project.run("--write", "--results", str(project.results))
    assert (
        json.loads(project.results.read_text(encoding="utf-8"))["measured_here"]["stdlib"][0][
            "recipe"
        ]
        == recipe
    )
    assert not (project.root / "logs" / "results.json").exists()
    project.run("--check", "--results", str(project.results))
    assert "results.json cannot be read" in project.run("--check", code=1)


def decoded(**other: Any) -> dict[str, Any]:
    """A result of bench/decode.py."""
    about: dict[str, Any] = dict.fromkeys(
        ("recipe", "artifact", "judge", "device", "threads", "python", "examples"), "x"
    )
    about |= {
        "prefix": 64,
        "target": 64,
        "temperature": 0.0,
        "repeats": 1,
        "data_path": "/x/fineweb10B_sp1024",
    }
    row: dict[str, Any] = {
        "mode": "speculative",
        "passes": None,
        "batch": 1,
        "tokens_per_forward": 2.5,
        "tokens_per_second": 100.0,
    }
    row |= {"times_cached_ar": 2.0, "identical": 1.0, "judge_nats": {"mean": 3.0, "se": 0.1}}
    return {**about, "rows": [row], **other}


def scored(**other: Any) -> dict[str, Any]:
    """A result of bench/passes.py."""
    about = {"recipe": "direct", "seed": 1, "artifact": "a.ptz", "head": "a.head", "rows": 2}
    about |= {"tokens": 9, "order": "parts", "data_path": "/x/fineweb10B_sp1024", "causal_bpb": 2.0}
    one = {"window": 8, "passes": 1, "factorised_bpb": 3.0, "chained_bpb": 2.1, "alone_bpb": 2.2}
    all_ = one | {"passes": 8, "factorised_bpb": 2.0, "chained_bpb": 2.0, "alone_bpb": None}
    return {**about, "scores": [one, all_], **other}


def test_results_take_decoding_from_the_benchmarks_own_line(project: Project) -> None:
    text = (
        f"| a table |\n\n{json.dumps(decoded())}\n{json.dumps(decoded(data_path='books'))}\nmore\n"
    )
    path = project.root / "logs" / "x_decode.txt"
    path.write_text(text, encoding="utf-8")
    benchmarks = project.measured()["decode_benchmark_here"]
    assert list(benchmarks) == ["fineweb10B_sp1024", "books"]
    (found,) = benchmarks["fineweb10B_sp1024"]
    assert (found["log"], found["rows"][0]["times_cached_ar"], found["rows"][0]["judge_nats"]) == (
        path.name,
        2.0,
        3.0,
    )
    line = text.splitlines()[2]
    for bad, said in (
        ('{"rows": []}', "KeyError: 'recipe'"),
        ("{" + "[" * 99_999, "ValueError: "),
        (line.replace("100.0", "-1"), "ValueError: tokens_per_second is -1"),
        (line.replace("100.0", '"100"'), "ValueError: tokens_per_second is '100'"),
        (line.replace('"identical": 1.0', '"identical": 2'), "ValueError: identical is 2"),
        (line.replace("100.0", "1e999"), "ValueError: tokens_per_second is inf"),
        (line.replace('"rows": [', '"rows": 3, "x": ['), "TypeError: "),
    ):
        path.write_text(f"{bad}\n", encoding="utf-8")
        out = project.run()
        assert f"warning: log {path}, line 1: not a result of bench/decode.py ({said}" in out
        assert f"error: log {path}, line 1" in project.run("--check", code=1)


def test_the_curve_of_a_resumed_run_leaves_out_what_was_done_again(tmp_path: Path) -> None:
    def train(step: int, loss: float) -> dict[str, Any]:
        return {"event": "train", "step": step, "train_ms": 1000.0 * step, "train_loss": loss}

    header = {"event": "header", "machine": CPU, "time": "2026", "sha256": "abc"}
    lines = [
        header,
        train(1, 9.0),
        train(2, 8.0),
        train(3, 0.0),
        header,
        {"event": "resume", "step": 2},
        train(3, 7.0),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert [point["train_loss"] for point in runlog.read_log(path).curve] == [9.0, 8.0, 7.0]
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, header, train(1, 5.0)]),
        encoding="utf-8",
    )
    assert [point["train_loss"] for point in runlog.read_log(path).curve] == [5.0]
