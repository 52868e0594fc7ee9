"""Test every recipe's scores against a reference, and compare their order with the published.

    python scripts/study/compare.py            against `ar` and `direct`, in logs/ and logs/ladder/
    python scripts/study/compare.py --against td_control --logs logs/ladder
    python scripts/study/compare.py --noise 0.002     relative noise of a row with one seed

Only runs on the same data and machine, of the same size and settings, are compared. Rows with two
seeds or more in common with the reference are compared seed by seed (paired t-test), others with
two seeds on either side by Welch's test; one seed gives a difference and no p-value. p-values are
two-sided and not adjusted for the number of tests. Folders are read one by one. The last line is
one JSON object.

tau, rho  Kendall's (tau-b, ties count as ties) and Spearman's correlation of our val_bpb with the
          published ones
beyond    pairs of rows in the other order than published whose difference exceeds two standard
          errors: those of the tests above or, where a row has one seed, those of --noise. Without
          it, noise is pooled over the rows that have several seeds; for two rows with the same
          seeds it is that of their differences, which is less
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common import NONE, ROOT, Parser, fail, in_range, markdown, need, run_command
from scripts.study import report, sweep
from scripts.study.report import Rows
from scripts.study.runlog import Group, Key, identity_notes, mean_cell, read_logs

REFERENCES = ("ar", "direct")
BEYOND = 2  # standard errors
NOISE_OF = ("over seeds", "in differences at one seed")
VAL = "val_bpb"

# The published orders of a ladder: a column each, its phases in order of preference where a row has
# several scores.
SHORT = ("1", "2", "2, corruption", "3", "3b", "3d", "3e", "4")  # 180 s on one H100
PHASES: dict[str, tuple[tuple[str, ...], ...]] = {
    "phase1": (("1",),),
    "late": (("2",),),
    "corruption": (("2, corruption", "2"),),
    "mercury": (("3",),),
    "selfcond": (("3b",),),
    "fine": (("3d",), ("3c, 600 s",)),
    "two_step": (("3e",), ("3e, again",)),
    "anchored": (("4",),),
    "all": (SHORT,),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add, share = parser.add_argument, in_range(float, 0, math.nextafter(1, 0))
    add("--logs", type=Path, action="append", help="folder of logs; may be given again")
    add("--against", action="append", metavar="ROW", help="reference; may be given again")
    noise = "standard deviation of one run's val_bpb, as a share of it, below 1"
    add("--noise", type=share, help=f"{noise} (default: pooled over rows with several seeds)")
    return parser.parse_args(argv)


# ==============================================================================
# 1  DIFFERENCES -- of one recipe from another, by seed where they share seeds
# ==============================================================================


class Difference(NamedTuple):
    """Ours less theirs."""

    mean: float
    error: float | None  # standard error; None with one seed
    p: float | None  # None with one seed, or without any spread
    n: str
    test: str


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Compare scores by seed: paired if two seeds are shared, else Welch's test, else no test."""
    from scipy import stats

    shared = sorted(ours.keys() & theirs.keys())
    a, b = list(ours.values()), list(theirs.values())
    n = f"{len(a)}, {len(b)}"
    if len(shared) > 1:
        pairs = [ours[seed] - theirs[seed] for seed in shared]
        mean, error = statistics.mean(pairs), float(stats.sem(pairs))
        p = float(stats.ttest_1samp(pairs, 0.0).pvalue) if error else None
        return Difference(mean, error, p, f"{len(pairs)} pairs", "paired")
    mean = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2:
        return Difference(mean, None, None, n, NONE)
    error = math.hypot(stats.sem(a), stats.sem(b))
    p = float(stats.ttest_ind(a, b, equal_var=False).pvalue) if error else None
    return Difference(mean, error, p, n, "Welch")


def scores(g: Group, measure: str) -> dict[int, float]:
    """One score a seed: val_bpb, or the bound at a window; without seeds that lack it."""
    if measure == VAL:
        return dict(zip(g.seeds, g.values("final", VAL), strict=True))
    found = {}
    for seed, run in zip(g.seeds, g.runs, strict=True):
        for value in report.bounds(Group(g.key, [run]), int(measure)):
            found[seed] = value
    return found


def differences(rows: Rows, name: str) -> Iterator[dict[str, Any]]:
    """Compare every other row with a reference by val_bpb and each bound that both have."""
    reference = report.find_row(rows, name)
    if reference is None:
        return
    for row, g in rows.items():
        for measure in (VAL, *map(str, report.windows_of(rows))) if g is not reference else ():
            ours, theirs = scores(g, measure), scores(reference, measure)
            if ours and theirs:
                label = measure if measure == VAL else f"bound, window {measure}"
                found = difference(ours, theirs)._asdict()
                yield {
                    "row": row,
                    "against": name,
                    "measure": label,
                    "score": list(ours.values()),
                    **found,
                }


def p_cell(found: Mapping[str, Any]) -> str:
    if found["error"] is None:
        return "n = 1"
    if found["p"] is None:
        return "no spread"
    return "< 0.0001" if found["p"] < 0.0001 else f"{found['p']:.4f}"


def difference_table(found: Iterable[Mapping[str, Any]], name: str) -> str:
    head = ["row", "measure", "mean", f"less `{name}`", "standard error", "n", "p", "test"]
    body = []
    for line in found:
        error = NONE if line["error"] is None else f"{line['error']:.4f}"
        start = [
            f"`{line['row']}`",
            line["measure"],
            mean_cell(line["score"]),
            f"{line['mean']:+.4f}",
            error,
        ]
        body.append([*start, line["n"], p_cell(line), line["test"]])
    return markdown(head, body, 2)


# ==============================================================================
# 2  ORDERS -- ours beside the published ones
# ==============================================================================


class Noise(NamedTuple):
    """Standard deviation of one run's val_bpb, as a share of it; None without several seeds."""

    seeds: float | None  # over seeds
    paired: float | None  # in a difference of two rows at one seed


def pooled(samples: Iterable[Sequence[float]]) -> float | None:
    """Pool the standard deviation of samples of two values or more, each about its own mean."""
    parts = [
        (len(values) - 1, statistics.variance(values)) for values in samples if len(values) > 1
    ]
    return math.sqrt(sum(n * v for n, v in parts) / sum(n for n, _ in parts)) if parts else None


def pooled_noise(rows: Rows) -> Noise:
    """Measure the noise where rows have several seeds."""
    shares = [
        {seed: math.log(value) for seed, value in scores(g, VAL).items()} for g in rows.values()
    ]
    pairs = [
        [a[seed] - b[seed] for seed in a.keys() & b.keys()]
        for a, b in itertools.combinations(shares, 2)
    ]
    paired = pooled(pairs)
    return Noise(
        pooled([list(values.values()) for values in shares]),
        None if paired is None else paired / math.sqrt(2),
    )


class Ranked(NamedTuple):
    """A row that has both a published score and runs."""

    row: str
    published: float
    ours: dict[int, float]  # by seed

    @property
    def mean(self) -> float:
        return statistics.mean(self.ours.values())


def published(name: str, phases: Sequence[str]) -> float | None:
    of_row = sweep.known_ladder().rows[name].get("published", {})
    return next((of_row[phase] for phase in phases if phase in of_row), None)


def ranked_rows(
    rows: Rows, names: Iterable[str], phases: Sequence[str]
) -> tuple[list[Ranked], list[str]]:
    """Return the rows of a published order that have runs, each run once, and the names of the
    others.
    """
    found = list[Ranked]()
    lacking = list[str]()
    taken = list[Group]()
    for name in names:
        score, g = published(name, phases), report.find_row(rows, name)
        if score is None or any(g is other for other in taken):
            continue
        if g is None:
            lacking.append(name)
        else:
            taken.append(g)
            found.append(Ranked(name, score, scores(g, VAL)))
    return sorted(found, key=lambda r: r.published), lacking


def standard_error(a: Ranked, b: Ranked, noise: Noise) -> float | None:
    """Say how far the difference of two rows may be off; None if nothing tells."""
    if min(len(a.ours), len(b.ours)) > 1:
        return difference(a.ours, b.ours).error
    same = a.ours.keys() == b.ours.keys() and noise.paired is not None
    share = noise.paired if same else noise.seeds
    return (
        None
        if share is None
        else share * math.hypot(*(r.mean / math.sqrt(len(r.ours)) for r in (a, b)))
    )


def swapped_pairs(found: Sequence[Ranked], noise: Noise) -> Iterator[dict[str, Any]]:
    """Find pairs in the other order than published, and whether more than noise."""
    for better, worse in itertools.combinations(found, 2):
        if better.published < worse.published and better.mean > worse.mean:
            apart, error = better.mean - worse.mean, standard_error(better, worse, noise)
            beyond = None if error is None else apart > BEYOND * error
            yield {
                "rows": [better.row, worse.row],
                "difference": apart,
                "error": error,
                "beyond": beyond,
            }


def correlation(kind: str, found: Sequence[Ranked]) -> float | None:
    """Kendall's tau or Spearman's rho; None for fewer than two rows, or if one side is all ties."""
    from scipy import stats

    theirs, ours = [r.published for r in found], [r.mean for r in found]
    if len(set(theirs)) < 2 or len(set(ours)) < 2:
        return None
    of = {"tau": stats.kendalltau, "rho": stats.spearmanr}[kind]
    return float(of(theirs, ours).statistic)


def order(rows: Rows, name: str, phases: Sequence[str], noise: Noise) -> dict[str, Any]:
    """Compare one ladder's order with the published one."""
    known = sweep.known_ladder()
    members = list(known.rows) if name == "all" else known.ladders.get(name, [])
    found, lacking = ranked_rows(rows, members, phases)
    pairs = sum(a.published != b.published for a, b in itertools.combinations(found, 2))
    return {
        "ladder": name,
        "phase": "180 s" if phases == SHORT else phases[0],
        "rows": [
            {"row": r.row, "published": r.published, "ours": list(r.ours.values())} for r in found
        ],
        "lacking": lacking,
        "tau": correlation("tau", found),
        "rho": correlation("rho", found),
        "pairs": pairs,
        "swapped": list(swapped_pairs(found, noise)),
    }


def ranks(values: Sequence[float]) -> list[str]:
    """Rank from 1, the lowest; equal values share the best of their ranks."""
    return [str(1 + sum(other < value for other in values)) for value in values]


def pair_cell(pair: Mapping[str, Any]) -> str:
    error = "" if pair["error"] is None else f" ± {pair['error']:.4f}"
    return f"`{pair['rows'][0]}` above `{pair['rows'][1]}` by {pair['difference']:.4f}{error}"


def order_text(found: Mapping[str, Any]) -> str:
    """One ladder: published and ours side by side, agreement, and the pairs that disagree."""
    lines, title = found["rows"], f"Ladder `{found['ladder']}`, phase {found['phase']}"
    lacking = (
        f" No finished run: {', '.join(f'`{name}`' for name in found['lacking'])}."
        if found["lacking"]
        else ""
    )
    theirs = [line["published"] for line in lines]
    ours = [statistics.mean(line["ours"]) for line in lines]
    body = [
        [
            f"`{line['row']}`",
            f"{line['published']:.4f}",
            places[0],
            mean_cell(line["ours"]),
            places[1],
            str(len(line["ours"])),
        ]
        for line, places in zip(lines, zip(ranks(theirs), ranks(ours), strict=True), strict=True)
    ]
    table = markdown(["row", "published", "rank", "ours", "rank", "n"], body, 1)
    tau, rho = (NONE if found[kind] is None else f"{found[kind]:+.3f}" for kind in ("tau", "rho"))
    said = (
        f"tau {tau}, rho {rho}, {len(lines)} rows; {len(found['swapped'])} of {found['pairs']} "
        "pairs the other way."
    )
    for beyond, label in (
        (True, "Beyond noise"),
        (None, "With one seed and no --noise, not to be judged"),
    ):
        if pairs := [pair_cell(pair) for pair in found["swapped"] if pair["beyond"] is beyond]:
            said += f" {label}: {'; '.join(pairs)}."
    return f"{title}:\n\n{table}\n\n{said}{lacking}"


def summary(orders: Sequence[Mapping[str, Any]]) -> str:
    head = ["ladder", "phase", "rows", "of", "tau", "rho", "pairs", "the other way", "beyond noise"]
    body = []
    for found in orders:
        tau, rho = (
            NONE if found[kind] is None else f"{found[kind]:+.3f}" for kind in ("tau", "rho")
        )
        n, beyond = len(found["rows"]), sum(pair["beyond"] is True for pair in found["swapped"])
        undecided = any(pair["beyond"] is None for pair in found["swapped"])
        counts = [
            str(found["pairs"]),
            str(len(found["swapped"])),
            NONE if undecided else str(beyond),
        ]
        body.append(
            [
                f"`{found['ladder']}`",
                found["phase"],
                str(n),
                str(n + len(found["lacking"])),
                tau,
                rho,
                *counts,
            ]
        )
    return markdown(head, body, 2)


# ==============================================================================
# 3  REPORT -- a folder, and in it a data set, machine and settings, at a time
# ==============================================================================


def compare(
    rows: Rows, references: Sequence[str], given: float | None
) -> tuple[list[str], dict[str, Any]]:
    """Compare the rows of one context; return text and data."""
    parts, tests = list[str](), list[dict[str, Any]]()
    for name in references:
        found = list(differences(rows, name))
        if found:
            parts.append(difference_table(found, name))
        elif report.find_row(rows, name) is None:
            parts.append(f"No finished run of `{name}` to compare with.")
        tests += found
    noise = pooled_noise(rows) if given is None else Noise(given, given)
    orders = [
        order(rows, name, phases, noise) for name, columns in PHASES.items() for phases in columns
    ]
    orders = [found for found in orders if len(found["rows"]) > 1]
    if orders:
        said = [
            f"{share:.2%} {of}"
            for share, of in zip(noise, NOISE_OF, strict=True)
            if share is not None
        ]
        known = "; ".join(said) or "not known, no row has two seeds and --noise is not given"
        heading = (
            f"Order of val_bpb against the published one. Noise of one run's val_bpb: {known}."
        )
        parts += [heading, summary(orders), *map(order_text, orders)]
    else:
        parts.append("No ladder has two published rows with finished runs: no order to compare.")
    return parts, {"noise": noise._asdict(), "differences": tests, "orders": orders}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare what every folder holds; UserError: it cannot be, or a reference of --against has
    no run.
    """
    need("scipy", "compare.py")
    report.warn_of_ladder()
    held = {
        folder: report.by_context(read_logs(folder)) for folder in args.logs or report.log_folders()
    }
    tables = [rows for contexts, _ in held.values() for rows in contexts.values()]
    for name in args.against or ():
        if not any(report.find_row(rows, name) for rows in tables):
            have = ", ".join(dict.fromkeys(row for rows in tables for row in rows)) or "none"
            fail(
                f"--against={name}: no finished run of that row; there are: {have}; name one of "
                "them"
            )
    found: dict[str, Any] = {}
    for folder, read in held.items():
        contexts, notes = read
        parts = [f"## {shown(folder)}", *([] if contexts else ["No finished run."])]
        data = list[dict[str, Any]]()
        for key, rows in contexts.items():
            notes = [*notes, *(f"{report.context_name(key)}: {n}" for n in differing(rows))]
            texts, compared = compare(rows, args.against or REFERENCES, args.noise)
            parts += [f"### {report.context_name(key)}", *texts]
            data.append({**context_data(key), **compared})
        if notes:
            parts.append(
                "Not compared, or to be read with care:\n\n"
                + "\n".join(f"- {note}" for note in notes)
            )
        print("\n\n".join(parts) + "\n")
        found[shown(folder)] = {"contexts": data, "notes": notes}
    return found


def differing(rows: Rows) -> list[str]:
    """Say which of the runs compared are of another program, data or tokenizer."""
    return identity_notes([run for g in rows.values() for run in g.runs])


def shown(folder: Path) -> str:
    return str(folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder)


def context_data(key: Key) -> dict[str, Any]:
    return {
        "data": key.data,
        "machine": key.machine,
        "ranks": key.ranks,
        "changed_settings": list(key.changes),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: {"folders": run(args)})


if __name__ == "__main__":
    sys.exit(main())
