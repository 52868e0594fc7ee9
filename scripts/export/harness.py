"""Evaluate an artifact by tasks of lm-evaluation-harness, in this process.

    python scripts/export/harness.py --artifact final_model.int8.ptz --tasks lambada_openai,piqa
    python scripts/export/harness.py --tasks documents.yaml --bound-window 16 --limit 20
    HF_HUB_OFFLINE=1 python scripts/export/harness.py --tasks documents.yaml

A task is a name of the harness or a YAML file. Log-likelihoods are exact; --bound-window adds the
diffusion bound of the documents of rolling tasks, under a name of its own. Which bytes and which
context count is said in scripts/export/lm_eval_model.py. The last line is one JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common import (
    Parser,
    check_outputs,
    fail,
    names,
    need,
    newest_artifact,
    run_command,
    write_result,
)

BOOTSTRAP = 1000  # resamples for the standard errors that have no formula


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    parser.artifact()
    tasks = "names or YAML files of tasks, separated by commas"
    add("--tasks", type=names, required=True, metavar="TASKS", help=tasks)
    parser.whole("--limit", None, "documents of each task (default: all)")
    parser.whole("--num-fewshot", None, "examples before each question (default: the task's)", 0)
    parser.whole("--batch-size", 8, "rows of a pass")
    mode = "how generation decodes: a mode of scripts/sample.py (default: ar)"
    add("--mode", default="ar", help=mode)
    window = "also bound the diffusion likelihood over windows of so many tokens"
    parser.whole("--bound-window", None, window)
    parser.whole("--bound-samples", 8, "Monte Carlo samples of the bound", 2)
    parser.device()
    parser.outputs()
    return parser.parse_args(argv)


def open_tasks(tasks: Sequence[str]) -> Any:
    """Return the task manager of lm_eval; UserError: a task is neither a name nor a file."""
    from lm_eval.tasks import TaskManager

    class Tasks(TaskManager):
        def load(self, task_list: Any) -> Any:
            try:
                return super().load(task_list)
            except Exception as error:  # YAML, jinja, datasets and hub fail in many ways
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                remedy = "correct the task, or make its data available"
                fail(f"--tasks={','.join(tasks)} cannot be loaded ({why}); {remedy}")

    named = [task for task in tasks if not Path(task).is_file()]
    manager = Tasks(include_defaults=bool(named))  # its own tasks take half a minute to read
    if unknown := [task for task in named if task not in manager.all_tasks]:
        near = ", ".join(difflib.get_close_matches(unknown[0], manager.all_tasks)) or "none"
        fail(f"--tasks={unknown[0]} is neither a task of lm_eval nor a YAML file; closest: {near}")
    return manager


def evaluate(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate all tasks; UserError: one is unknown, or it or its data cannot be loaded."""
    from lm_eval import simple_evaluate

    manager = open_tasks(args.tasks)
    how = dict(num_fewshot=args.num_fewshot, limit=args.limit, bootstrap_iters=BOOTSTRAP)
    found: dict[str, Any] = simple_evaluate(
        model, tasks=args.tasks, task_manager=manager, log_samples=False, **how
    )
    return found


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the numbers among the results of a task, by "metric,filter"; not finite: None."""
    found = {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, numbers.Real) and "," in name
    }
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def run(args: argparse.Namespace) -> Mapping[str, Any]:
    """Evaluate the artifact and gather what was found."""
    need("lm_eval", "harness.py", "requirements-eval.txt")
    check_outputs(args)
    from scripts.export.lm_eval_model import TextDiffusionLM

    path = args.artifact or newest_artifact()
    model = TextDiffusionLM(path, args.tokenizer or "", args.device, args.batch_size, args.mode)
    if args.bound_window is not None:
        model.check_bound(args.bound_window)
    found = evaluate(model, args)
    scores = {task: numbers_of(metrics) for task, metrics in found["results"].items()}
    counts = {task: n["effective"] for task, n in found["n-samples"].items()}
    result = {"artifact": str(path), "mode": args.mode, "results": scores, "documents": counts}
    if args.bound_window is not None:
        about = {"window": args.bound_window, "samples": args.bound_samples}
        result["bounds"] = {
            task: model.bound(texts, *about.values()).report() | about
            for task, texts in model.rolled.items()
        }
    write_result(args.out, result)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
