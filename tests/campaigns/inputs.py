"""What every campaign starts from, made once by the program itself: data, runs, artifacts."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train_gpt as tg
from scripts import prepare_data
from tests.campaigns.processes import Outcome, fork, spawn
from tests.conftest import HARD_TEXTS, ROOT, env_of, program_like, settings

RUN_ID = "run"
VOCAB_SIZE = 400


class Inputs:
    """Folders with data and finished runs; each is made when it is first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def done(self, body: Callable[[], int | None], name: str, env: dict[str, str]) -> Outcome:
        """Run a command that must succeed."""
        outcome = fork(body, self.folder / name, env)
        if outcome.status:
            raise RuntimeError(f"{name}: status {outcome.status}: {outcome.err[-2000:]}")
        return outcome

    def prepare(self, name: str, lines: list[str], *options: str) -> Path:
        """Shards, tokenizer and manifest of documents of 40 lines and of texts hard to count."""
        out, source = self.folder / name, self.folder / f"{name}.jsonl"
        texts = ["\n".join(lines[i : i + 40]) for i in range(0, len(lines), 40)]
        source.parent.mkdir(parents=True, exist_ok=True)
        documents = [json.dumps({"text": text}) for text in (*texts, *HARD_TEXTS)]
        source.write_text("\n".join(documents), "utf-8")
        argv = ["--source", "files", str(source), "--out", str(out), "--val-percent", "20"]
        argv += ["--shard-tokens", "6000", "--vocab-size", str(VOCAB_SIZE), *options]
        self.done(lambda: prepare_data.main(argv), f"{name}.prepared", {})
        return out

    @functools.cached_property
    def data(self) -> Path:
        return self.prepare("data", program_like(1000))

    @functools.cached_property
    def other_data(self) -> Path:
        """The same size and another text, so also another tokenizer."""
        return self.prepare("other_data", [line[::-1] for line in program_like(1000)])

    @functools.cached_property
    def start_seconds(self) -> float:
        """What `python train_gpt.py` takes to import its libraries."""
        argv = [sys.executable, str(ROOT / "train_gpt.py")]
        return spawn(argv, self.folder / "start", {"DEVICE": "none"}).seconds

    def env(self, **changed: Any) -> dict[str, str]:
        """Settings of a tiny run; files of the run are found by names below its own folder."""
        data = changed.pop("data", self.data)
        fixed = {"preset": "cpu", "out_dir": "out", "run_id": RUN_ID, "vocab_size": VOCAB_SIZE}
        fixed |= {"data_path": data, "tokenizer_path": data / "tokenizer.model"}
        fixed |= {"eval_stride": 0, "nelbo_sequences": 2}
        return env_of(settings(changed.pop("recipe", "direct"), **fixed | changed))

    def checkpoints(self) -> list[Path]:
        """The last checkpoint and the one before it, below the folder of a run."""
        return tg.Config.from_env(self.env())[0].checkpoints

    @functools.cache  # noqa: B019
    def run(self, name: str = "run", **changed: Any) -> tuple[Path, Outcome]:
        """An undisturbed run: its folder, and what it took."""
        return self.folder / name, self.done(tg.main, name, self.env(**changed))

    def local(self, name: str = "local", **changed: Any) -> tuple[Path, Outcome]:
        """An undisturbed run on a copy of the data in the run's own folder."""
        copy_tree(self.data, self.folder / name / "data")
        return self.run(name, data=Path("data"), **changed)

    @functools.cache  # noqa: B019
    def interrupted(self, name: str = "interrupted", saves: int = 4, **changed: Any) -> Path:
        """The folder of a run that ended right after its checkpoint number `saves`."""

        def body() -> int:
            save, left = tg.TrainState.save, iter(range(saves, 0, -1))

            def save_and_stop(state: tg.TrainState) -> None:
                save(state)
                if next(left) == 1:
                    raise SystemExit(0)

            setattr(tg.TrainState, "save", save_and_stop)  # noqa: B010
            return tg.main()

        self.done(body, name, self.env(**changed))
        return self.folder / name


def copy_tree(source: Path, target: Path) -> Path:
    """Copy a folder over another one."""
    shutil.copytree(source, target, dirs_exist_ok=True, symlinks=True)
    return target
