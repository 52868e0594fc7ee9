"""Shared by all tests: tiny settings, tiny data, a run without log files, and `python train_gpt.py`
in a process.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import sentencepiece as spm
import torch

import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
BOS = 1
THREADS = int(os.environ.get("OMP_NUM_THREADS") or 1)
VOCAB = 400  # 4 control pieces, 256 bytes, a newline, the rest characters and merges
HARD_TEXTS = (
    "日本語の文章と漢字。\n\n\n二行目\n",
    "naïve café — Ελληνικά, русский текст, עברית, العربية\n",
    "emoji 🙂 👩‍👩‍👧‍👦 🇯🇵 and a combining é ǟ\n",
    "def f(x):\n    if x:\n\t\treturn  x   \n\n\n",
    "        deeper = 1\n            deepest = 2  # 12345 67 890\n",
    " one leading space",
    "     leading and trailing spaces     ",
    "\n\n\nbare newlines\n\n",
    "literal <s> </s> <unk> <0x0A> ⁇ inside",
    "x",
)

# What all else varies.
MAIN = {name: tg.all_recipes()[name] for name in ("direct", "ar", "retrograde", "mdlm_30_70")}

# Small sizes for every preset; with 64 tokens of vocabulary it needs no tokenizer. About 11,000
# parameters.
# fmt: off
TINY: dict[str, Any] = dict(
    vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2,
    time_embed_dim=4, train_seq_len=16, train_batch_tokens=64, micro_batches=2, iterations=8,
    warmdown_iters=4, max_wallclock_seconds=0.0, muon_momentum_warmup_steps=4, warmup_steps=0,
    checkpoint_seconds=0.0, train_log_every=1, val_loss_every=0, val_batch_size=256,
    diffusion_windows="4:1,8:1,T:1", diffusion_row_frac=1.0, diffusion_span_len=2,
    diffusion_spans_per_seq=4, nelbo_windows="1,4", nelbo_samples=4, nelbo_sequences=8,
    parallel_eval_examples=2, parallel_eval_prefix_len=4, parallel_eval_span_len="4",
    parallel_eval_suffix_len=4, parallel_eval_steps="1,2", diffusion_start_frac=0.0,
    eval_stride=8, device="cpu", compile="0",
)
# fmt: on


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden from this run"
    )


@pytest.fixture(autouse=True)
def same_every_time() -> None:
    """Use one thread, unless OMP_NUM_THREADS says so, and random numbers of the test's own.

    Tiny matrices are slower on several threads.
    """
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)


def settings(recipe: str = "direct", **overrides: Any) -> dict[str, Any]:
    """A recipe's settings at tiny size; overrides win over both."""
    return {"recipe": recipe, **MAIN[recipe], **TINY, **recipe_shape(recipe), **overrides}


def recipe_shape(recipe: str) -> dict[str, Any]:
    """What TINY must not take away from a recipe: its windows and what it has no weights for."""
    kept = ("diffusion_windows", "diffusion_row_frac", "look_ahead", "time_embed_dim")
    return {name: MAIN[recipe][name] for name in kept if name in MAIN[recipe]}


def tiny(recipe: str = "direct", **overrides: Any) -> tg.Config:
    return tg.Config(**settings(recipe, **overrides))


def env_of(values: Mapping[str, Any]) -> dict[str, str]:
    """The environment that sets these settings."""
    return {k.upper(): str(int(v)) if isinstance(v, bool) else str(v) for k, v in values.items()}


class Recorder(tg.Log):
    """A log that keeps its events in memory and touches no file."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.path, self.active = Path("unwritten.txt"), True

    def write(self, text: str, suffix: str = ".txt", echo: bool = True) -> None:
        """Write nothing."""

    def event(self, name: str, /, **values: Any) -> None:
        super().event(name, **values)  # its format string must fit the values
        self.events.append((name, values))

    def of(self, name: str) -> list[dict[str, Any]]:
        return [values for event, values in self.events if event == name]


@pytest.fixture
def flex_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let windows be trained by FlexAttention on a CPU; the lengths of its queries, call by call.

    PyTorch refuses a gradient there, but its eager form, which makes a dense mask of the rule,
    computes one. What skips blocks is a kernel, which needs a GPU.
    """
    lengths, attend = list[int](), tg.flex_attention

    def counted(q: torch.Tensor, *given: Any, **more: Any) -> Any:
        if not torch.compiler.is_compiling():  # a list that grows would be a graph of its own
            lengths.append(q.shape[2])
        return attend(q, *given, **more)

    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(tg, "flex_attention", counted)
    monkeypatch.setattr(tg, "choose_device", lambda *_: CPU)
    return lengths


def make_run(cfg: tg.Config, rank: int = 0, world_size: int = 1) -> tg.Run:
    return tg.Run(cfg, rank, world_size, CPU, Recorder())


def recorded(run: tg.Run, name: str) -> list[dict[str, Any]]:
    assert isinstance(run.log, Recorder)
    return run.log.of(name)


@torch.no_grad()
def randomise(model: tg.GPT, seed: int = 0, std: float = 0.3) -> tg.GPT:
    """Give every parameter random values, whatever others there are: a fresh model's zeros would
    hide what reaches the logits.
    """
    for name, p in model.named_parameters():
        p.normal_(0, std, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed))
    return model.eval()


def rounding(*lengths: int, dtype: torch.dtype = torch.float32) -> float:
    """Bound the relative error of sums of these lengths, one computed from the other.

    Two computations of one value differ by so much on any processor: the order of a sum is not
    fixed. Equality to the bit holds only within one process and for equal shapes.
    """
    return torch.finfo(dtype).eps * sum(lengths)


def pass_rounding(cfg: tg.Config) -> float:
    """Bound the relative error of a forward pass: in each layer the sums of attention and MLP."""
    layer = 2 * cfg.model_dim + cfg.mlp_mult * cfg.model_dim + cfg.train_seq_len
    return rounding(cfg.num_layers * layer, cfg.vocab_size)


Called = tuple[int, str, str]  # of a script: status, what it printed, what it complained of


def outcome(
    main: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> Called:
    """Run a script's `main` in this process."""
    try:
        status = main(argv)
    except SystemExit as error:  # of a wrong command line
        status = int(error.code or 0)
    return status, *capsys.readouterr()


def facts(called: Called) -> dict[str, Any]:
    assert called[0] == 0, called[2]
    found: dict[str, Any] = json.loads(called[1].splitlines()[-1])
    return found


def random_rows(batch: int, length: int, vocab: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def write_shard(
    path: Path, tokens: Sequence[int], magic: int = 20240520, version: int = 1, count: int = -1
) -> Path:
    """Write a shard byte by byte as the challenge defines it, not through our own constants."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count < 0 else count
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def train_tokenizer(path: Path, texts: Sequence[str], **options: Any) -> spm.SentencePieceProcessor:
    """Fit a SentencePiece model with byte fallback to the lines of some texts."""
    lines = [line for text in texts for line in text.split("\n") if line]
    # fmt: off
    fixed = dict(
        model_type="bpe", vocab_size=VOCAB, byte_fallback=True, split_digits=True,
        add_dummy_prefix=False,
        character_coverage=0.98, required_chars="—", pad_id=0, bos_id=1, eos_id=2, unk_id=3,
        num_threads=1,
        minloglevel=2)
    # fmt: on
    with open(path, "wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, **fixed | options
        )
    return spm.SentencePieceProcessor(model_file=str(path))


IDENTITY = dict(
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
)
NMT_NFKC = dict(normalization_rule_name="nmt_nfkc")  # the challenge's: folds white space


def program_like(count: int) -> list[str]:
    """Lines like those of a program, always the same: no test depends on the code that it tests."""
    draw = random.Random("program")
    lines = list[str]()
    known = WORDS.split()
    for i in range(count):
        # As frequent as words are.
        words = draw.choices(known, [1 / n for n in range(1, len(known) + 1)], k=8)
        form = "def {0}_{1}(self, {2}: {3}) -> {4}:" if i % 12 == 0 else draw.choice(FORMS)
        lines.append(form.format(*words, draw.randrange(100)))
    return lines


WORDS = (
    "the of and to in is for that with as not be it on by this at from or an which are if each all "
    "one than when after before token mask size text window step model value count noise shape "
    "state place share index clean score keys device tensor random weight stream settings length "
    "decode loss rows sample name path logits batch error layer number prefix suffix vocabulary "
    "probability likelihood Attention Config Iterator Café naïve"
)
FORMS = (
    "",
    "",
    '    """{0} {1} {2} {3}, {4} {5}: {6} {7}."""',
    "    {2} = {3}({4}, {5}[{8}:])  # {0} {1} {6} {7}",
    "    if {2} < {8} and not {3}.{4}:",
    "        {2}, {3} = {3} + 1, {4}_{5}",
    "    for {2} in range({8}, len({3})):",
    "        return {2} - {3} * {4}.{5}",
    '        raise ValueError(f"{{{2}}} {0} {1} {3} {4}; {5} {6} {7}")',
    "# {0} {1} {2} {3} {4} — {5} {6} {7} {8}",
    '    {2}.{3}("{4}", {5}=0.{8}, {6}={{"{7}": None}})',
    "@{2}.{3}",
)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of 40 lines, and texts that are hard to count."""
    lines = program_like(1000)
    return ["\n".join(lines[i : i + 40]) for i in range(0, len(lines), 40)] + list(HARD_TEXTS)


class Tokenizers(NamedTuple):
    """Two SentencePiece models: one that keeps all white space, one that folds it."""

    identity: Path
    nmt_nfkc: Path


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Tokenizers:
    folder = tmp_path_factory.mktemp("tokenizers")
    paths = Tokenizers(folder / "identity.model", folder / "nmt_nfkc.model")
    train_tokenizer(paths.identity, texts, **IDENTITY)
    train_tokenizer(paths.nmt_nfkc, texts, **NMT_NFKC)
    return paths


@pytest.fixture(scope="session")
def data(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizers: Tokenizers
) -> dict[str, Any]:
    """Settings that name tiny shards, two to train on and one to validate on, and tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    sp = spm.SentencePieceProcessor(model_file=str(tokenizers.identity))
    documents = [[BOS, *sp.encode(text)] for text in texts]
    flat = [token for document in documents[:-6] for token in document]
    write_shard(folder / "tiny_train_000000.bin", flat[:5000])
    write_shard(folder / "tiny_train_000001.bin", flat[5000:9000])
    write_shard(
        folder / "tiny_val_000000.bin",
        [token for document in documents[-10:] for token in document],
    )
    return {
        "data_path": str(folder),
        "tokenizer_path": str(tokenizers.identity),
        "vocab_size": VOCAB,
    }


@pytest.fixture
def launch(data: dict[str, Any], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `python train_gpt.py`, or another command, with settings as its environment; stop what
    is left after.
    """
    started = list[subprocess.Popen[str]]()

    def start(
        command: Sequence[str] = (), env: Mapping[str, str] | None = None, **values: Any
    ) -> Any:
        inherited = {
            k: v for k, v in os.environ.items() if k.lower() not in tg.Config.__dataclass_fields__
        }
        merged = (
            settings(values.pop("recipe", "direct")) | {"out_dir": tmp_path / "out"} | data | values
        )
        threads = {"OMP_NUM_THREADS": str(THREADS)}
        argv = (
            [*command, str(ROOT / "train_gpt.py")]
            if command
            else [sys.executable, str(ROOT / "train_gpt.py")]
        )
        started.append(
            subprocess.Popen(
                argv,
                env=inherited | threads | env_of(merged) | dict(env or {}),
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.terminate()  # torchrun passes it on; killed, it would leave its ranks behind
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@pytest.fixture
def run_main(
    launch: Callable[..., subprocess.Popen[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python train_gpt.py` to its end with settings as its environment."""

    def run(*args: Any, **values: Any) -> subprocess.CompletedProcess[str]:
        process = launch(*args, **values)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return run


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Events of the one .jsonl log in OUT_DIR/logs."""
    (path,) = (folder / "logs").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until a running process has brought a condition about."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def train_lines(folder: Path) -> int:
    """How many training steps the log of run `r` in OUT_DIR holds."""
    log = folder / "logs" / "r.jsonl"
    return log.read_text(encoding="utf-8").count('"train"') if log.exists() else 0
