"""compare.py: tests of differences are scipy's, and our order is set beside the published one row
by row.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from scripts.study import compare, sweep
from tests.study.test_report import events

# Ours in the published order of phase 1, but for td_prog15 and td_span15.
PHASE1 = {
    "td_control": 2.0,
    "td_span15": 2.16,
    "td_prog15": 2.1,
    "td_span30": 2.2,
    "td_prog30": 2.3,
}


def write(folder: Path, recipe: str, seed: int = 1, bpb: float = 2.0, **other: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = events(recipe=recipe, seed=seed, bpb=bpb, **other)
    path = folder / f"{recipe}_{seed}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class Command:
    """The command over one folder of logs."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = root / "logs"
        self.capsys = capsys
        self.text = ""

    def __call__(self, *argv: str) -> list[dict[str, Any]]:
        """Run it, keep what it printed, and return the contexts of its JSON line."""
        assert compare.main(["--logs", str(self.folder), *argv]) == 0
        self.text = self.capsys.readouterr().out
        (found,) = json.loads(self.text.splitlines()[-1])["folders"].values()
        contexts: list[dict[str, Any]] = found["contexts"]
        return contexts

    def error(self, *argv: str) -> str:
        assert compare.main(["--logs", str(self.folder), *argv]) == 2
        return self.capsys.readouterr().err


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


OURS, THEIRS = {1: 2.0, 2: 2.3, 3: 2.1, 4: 2.6}, {1: 1.9, 2: 2.15, 3: 2.05, 5: 7.0}


def test_recipes_that_share_seeds_are_compared_seed_by_seed() -> None:
    found = compare.difference(OURS, THEIRS)
    expected = stats.ttest_rel([2.0, 2.3, 2.1], [1.9, 2.15, 2.05])
    assert (found.n, found.test) == ("3 pairs", "paired")
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(0.05 / math.sqrt(3))
    assert found.p == pytest.approx(expected.pvalue)


def test_recipes_with_other_seeds_are_compared_by_welchs_test() -> None:
    # One seed in common is no pair to test.
    theirs = {seed + 3: score for seed, score in THEIRS.items()}
    found = compare.difference(OURS, theirs)
    a, b = list(OURS.values()), list(theirs.values())
    expected = stats.ttest_ind(a, b, equal_var=False)
    assert (found.n, found.test) == ("4, 4", "Welch")
    assert found.mean == pytest.approx(sum(a) / 4 - sum(b) / 4)
    assert found.error is not None
    assert found.mean / found.error == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)


def test_one_seed_gives_no_p_value_and_nor_do_equal_differences() -> None:
    one = compare.difference({1: 2.5}, THEIRS)
    assert (one.error, one.p, one.n) == (None, None, "1, 4")
    assert one.mean == pytest.approx(2.5 - 3.275)
    assert compare.p_cell(one._asdict()) == "n = 1"
    same = compare.difference({1: 2.5, 2: 3.5}, {1: 2.0, 2: 3.0})
    assert (same.mean, same.error, same.p) == (0.5, 0.0, None)
    assert compare.p_cell(same._asdict()) == "no spread"


def test_every_recipe_is_compared_with_both_references_on_the_same_data(command: Command) -> None:
    for seed, bpb in ((1, 2.0), (2, 2.2), (3, 2.1)):
        write(command.folder, "ar", seed, bpb)
        write(command.folder, "direct", seed, bpb + 0.1 + 0.01 * seed)
    write(command.folder, "retrograde", 1, 3.0)
    write(command.folder, "mdlm_30_70", 1, 9.0, data="/x/books")
    books, main = command()
    assert books["differences"] == []
    found = {(d["row"], d["against"], d["measure"]): d for d in main["differences"]}
    assert len(found) == 2 * 2 * 3  # rows, references, val_bpb and two bounds
    direct = found["direct", "ar", "val_bpb"]
    assert (direct["mean"], direct["error"]) == (
        pytest.approx(0.12),
        pytest.approx(0.01 / math.sqrt(3)),
    )
    assert found["ar", "direct", "bound, window 16"]["mean"] == pytest.approx(-0.12)
    assert (
        f"| `direct` | val_bpb | 2.2200 ± 0.1054 | +0.1200 | 0.0058 | 3 pairs | {direct['p']:.4f} |"
        in command.text
    )
    assert "| `retrograde` | val_bpb | 3.0000 | +0.9000 | - | 1, 3 | n = 1 | - |" in command.text
    assert "No finished run of `ar` to compare with." in command.text  # of books
    assert "`retrograde` has no finished run of seeds 2, 3" in command.text


def test_a_bound_that_a_recipe_lacks_is_not_compared(command: Command) -> None:
    write(command.folder, "direct")
    lines = [line for line in events(recipe="ar", bpb=2.5) if line["event"] != "nelbo"]
    (command.folder / "ar.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    (main,) = command()
    assert {d["measure"] for d in main["differences"]} == {"val_bpb"}


def test_the_order_is_set_beside_the_published_one(command: Command) -> None:
    for row, bpb in PHASE1.items():
        write(command.folder, row, 1, bpb)
        write(command.folder, row, 2, bpb + 0.02)
    (main,) = command()
    phase1 = next(found for found in main["orders"] if found["ladder"] == "phase1")
    published = [2.0027, 2.1725, 2.1752, 2.1831, 2.1893]
    ours = [[2.0, 2.02], [2.16, 2.18], [2.1, 2.12], [2.2, 2.22], [2.3, 2.32]]
    assert [row["published"] for row in phase1["rows"]] == published
    assert [row["ours"] for row in phase1["rows"]] == ours
    means = [sum(pair) / 2 for pair in ours]
    assert (
        phase1["tau"]
        == pytest.approx(stats.kendalltau(published, means).statistic)
        == pytest.approx(0.8)
    )
    assert (
        phase1["rho"]
        == pytest.approx(stats.spearmanr(published, means).statistic)
        == pytest.approx(0.9)
    )
    (pair,) = phase1["swapped"]
    assert pair["rows"] == ["td_span15", "td_prog15"]
    assert (pair["difference"], phase1["pairs"], phase1["lacking"]) == (pytest.approx(0.06), 10, [])
    assert pair["beyond"]
    assert "| `phase1` | 1 | 5 | 5 | +0.800 | +0.900 | 10 | 1 | 1 |" in command.text
    assert "| `td_span15` | 2.1725 | 2 | 2.1700 ± 0.0141 | 3 | 2 |" in command.text
    assert "Beyond noise: `td_span15` above `td_prog15` by 0.0600" in command.text


def test_a_subset_of_a_ladder_is_enough_and_the_rest_is_named(command: Command) -> None:
    write(command.folder, "ar", 1, 2.0)  # td_control and ab_control by other names
    write(command.folder, "td_span30", 1, 1.9)
    write(command.folder, "td_late02", 1, 2.1)
    (main,) = command()
    orders = {found["ladder"]: found for found in main["orders"]}
    assert [row["row"] for row in orders["phase1"]["rows"]] == ["td_control", "td_span30"]
    assert orders["phase1"]["lacking"] == ["td_span15", "td_prog15", "td_prog30"]
    assert (orders["phase1"]["tau"], orders["late"]["tau"]) == (pytest.approx(-1), pytest.approx(1))
    assert "anchored" not in orders  # it has one row, by its other name
    # A run once.
    assert [row["row"] for row in orders["all"]["rows"]] == [
        "td_control",
        "td_late02",
        "td_span30",
    ]
    assert orders["phase1"]["swapped"][0]["beyond"] is None
    assert (
        "With one seed and no --noise, not to be judged: `td_control` above `td_span30` by 0.1000."
        in command.text
    )
    assert "Noise of one run's val_bpb: not known" in command.text


@pytest.mark.parametrize(("noise", "beyond"), [("0.01", True), ("0.03", False)])
def test_noise_that_is_given_decides_where_rows_have_one_seed(
    command: Command, noise: str, beyond: bool
) -> None:
    write(command.folder, "ar", 1, 2.0)
    write(command.folder, "td_span30", 1, 1.9)
    (main,) = command("--noise", noise)
    (pair,) = main["orders"][0]["swapped"]
    assert pair["error"] == pytest.approx(float(noise) * math.hypot(2.0, 1.9))
    assert pair["beyond"] is beyond


def test_noise_is_pooled_over_rows_with_several_seeds(command: Command) -> None:
    for seed, bpb in ((1, 2.0), (2, 2.2)):
        write(command.folder, "direct", seed, bpb)
        write(command.folder, "retrograde", seed, bpb * (1 + 0.01 * seed))
    write(command.folder, "td_span30", 1, 1.9)
    write(command.folder, "td_control", 1, 2.0)
    (main,) = command()
    share = math.log(1.1) / math.sqrt(2), math.log(2.2 * 1.02 / 2.0 / 1.01) / math.sqrt(2)
    assert main["noise"]["seeds"] == pytest.approx(math.sqrt(sum(s**2 for s in share) / 2))
    assert main["noise"]["paired"] == pytest.approx(math.log(1.02 / 1.01) / 2)
    phase1 = next(found for found in main["orders"] if found["ladder"] == "phase1")
    assert phase1["swapped"][0]["error"] == pytest.approx(
        main["noise"]["paired"] * math.hypot(1.9, 2.0)
    )
    assert phase1["swapped"][0]["beyond"]


def test_equal_scores_are_in_no_order() -> None:
    rows = [
        compare.Ranked("a", 1.0, {1: 2.0}),
        compare.Ranked("b", 2.0, {1: 2.0}),
        compare.Ranked("c", 2.0, {1: 1.0}),
    ]
    assert compare.ranks([2.0, 2.0, 1.0]) == ["2", "2", "1"]
    assert [pair["rows"] for pair in compare.swapped_pairs(rows, compare.Noise(None, None))] == [
        ["a", "c"]
    ]
    assert compare.correlation("tau", rows[:2]) is None


def test_every_published_order_of_a_ladder_is_compared() -> None:
    for name, rows in sweep.ladders().items():
        scored = [set(scores) for row in rows if (scores := sweep.rows()[row].get("published"))]
        columns = [set(column) for column in compare.PHASES.get(name, ())]
        covered = set[str]().union(*columns)
        # Two rows make an order.
        assert all(sum(bool(of & column) for of in scored) > 1 for column in columns), name
        if len(scored) > 1 and name != "all":
            assert all(of & covered for of in scored), name
    assert compare.PHASES.keys() <= sweep.ladders().keys()


def test_runs_that_died_are_named_and_not_compared(command: Command) -> None:
    write(command.folder, "ar", 1, 2.0)
    lines = events(recipe="direct", seed=1, bpb=9.0)[:-1]
    (command.folder / "d.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    (main,) = command()
    assert main["differences"] == []
    assert "- `d`: unfinished, last logged step 10" in command.text


def test_faults_are_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not a folder" in command.error()
    write(command.folder, "ar")
    write(command.folder, "direct")
    said = command.error("--against", "td_late02")
    assert (
        "--against=td_late02: no finished run of that row; there are: direct, ar; name one of them"
        in said
    )
    assert command("--against", "td_control")  # the row of `ar` by another name
    with pytest.raises(SystemExit):
        compare.main(["--noise", "2"])
    assert "argument --noise: 2 must be between 0 and 1" in command.capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "compare.py needs scipy: pip install scipy" in command.error()


def test_folders_are_never_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "logs", "ar", 1, 2.0)
    write(tmp_path / "logs" / "ladder", "direct", 1, 3.0)
    folders = [str(tmp_path / "logs"), str(tmp_path / "logs" / "ladder")]
    assert compare.main(["--logs", folders[0], "--logs", folders[1]]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["folders"]
    assert list(found) == folders
    assert all(
        context["differences"] == [] for folder in found.values() for context in folder["contexts"]
    )
