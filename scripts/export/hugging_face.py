"""Export an artifact with its tokenizer to a folder that transformers loads.

    python scripts/export/hugging_face.py --artifact final_model.int8.ptz --out out/hugging_face
    python scripts/export/hugging_face.py --out out/hugging_face --log logs/demo.jsonl

The folder holds weights (safetensors), settings, tokenizer, the program itself and a model card,
and is loaded by AutoModelForCausalLM and AutoTokenizer with trust_remote_code=True. The card states
scores only as they stand in the run's log, which must belong to the artifact. The last line is one
JSON object.
"""

from __future__ import annotations

import sys
from os.path import abspath, dirname

sys.path.insert(0, dirname(dirname(dirname(abspath(__file__)))))  # the repository
import scripts.process  # noqa: F401 -- first: Ctrl-C ends the imports below in one line, too

# isort: split
import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scripts.common import Artifact
    from scripts.study.runlog import RunLog

from scripts.common import (
    NONE,
    ROOT,
    Parser,
    fail,
    load_artifact,
    markdown,
    need,
    newest_artifact,
    open_tokenizer,
    pick_device,
    program_sha256,
    run_command,
)

REQUIREMENTS = "requirements-eval.txt"
CODE = ("train_gpt.py", "LICENSE")  # copied as they are
MODELING = "modeling_text_diffusion.py"
ABSOLUTE, RELATIVE = "\nfrom train_gpt import", "\nfrom .train_gpt import"  # in the folder
# Settings of the machine that trained the model, not of the model.
LOCAL = ["data_path", "tokenizer_path", "out_dir", "init_from", "run_id", "device", "compile"]
LOCAL += ["window_attention"]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 on a wrong one."""
    parser = Parser(__doc__)
    add = parser.add_argument
    parser.artifact()
    log = "log of the run that made the artifact: its scores go into the model card"
    add("--log", type=Path, metavar="FILE.jsonl", help=log)
    add("--out", type=Path, metavar="FOLDER", required=True, help="folder to make")
    return parser.parse_args(argv)


# ==============================================================================
# 1  MODEL CARD
# ==============================================================================


def read_run(path: Path, artifact: Artifact) -> RunLog:
    """Read the log of the run that made an artifact.

    Raises:
        UserError: it is damaged or unfinished, or of another run.
    """
    from scripts.study.runlog import UNKNOWN, read_whole_log

    run, remedy = read_whole_log(path), "name the log of its run"
    if run.why_left_out:
        fail(f"--log={path}: {run.why_left_out}; {remedy}, or leave --log out")
    ours, theirs = artifact.model.cfg.training_settings(), run.get("config", "values")
    differ = [f"{k.upper()}={theirs[k]!r}" for k in ours if k in theirs and theirs[k] != ours[k]]
    for name in ("program", "data", "tokenizer"):
        known = artifact.identity.get(f"{name}_sha256", "")
        if known and run.identity(name) not in (known, UNKNOWN):
            differ.append(f"{name} {run.identity(name)[:12]}")
    size, logged = artifact.path.stat().st_size, run.get("size", "model_bytes")
    differ += [f"{logged:,} bytes, not {size:,}"] * (size != logged)
    if differ:
        fail(f"--log={path} is not of {artifact.path}: {', '.join(differ[:3])}; {remedy}")
    return run


def number(event: Mapping[str, Any], name: str, digits: int = 0) -> str:
    """Write a number of an event; `-`: it was not measured, or an older program did not log it."""
    from scripts.study.runlog import is_number

    value = event.get(name)
    return f"{value:,.{digits}f}" if is_number(value) else NONE


def scores(run: RunLog | None) -> str:
    """Write the scores of a run as Markdown tables, or that there are none."""
    if run is None:
        return "Not stated: the model was exported without the log of its run.\n"
    final, rows = run.events["final"], list[list[str]]()
    split = f"whole validation split, {number(final, 'tokens')} tokens"
    rows.append(["exact, left to right", number(final, "val_bpb", 4), NONE, split])
    for window, bound in sorted(run.nelbo.items()):
        kind = "**upper bound**" if window > 1 else "exact"  # of windows of one token
        about = f"{number(bound, 'tokens')} tokens, K = {number(bound, 'samples')}"
        cells = [number(bound, "nelbo_bpb", 4), number(bound, "standard_error", 4), about]
        rows.append([f"{kind}, denoising windows of {window}", *cells])
    parts = [markdown(["score", "bits per byte", "standard error", "measured on"], rows, 1)]
    decoded = [
        [task, mode, str(span), str(steps), number(event, "token_acc", 3)]
        for (task, span, steps, mode), event in run.decode.items()
    ]
    if decoded:
        head = ["task", "decoding", "tokens", "passes", "share of tokens equal to the text"]
        parts.append(markdown(head, decoded, 2))
    parts.append("An upper bound is an estimate and no likelihood: do not compare it with val_bpb.")
    return "\n\n".join(parts) + "\n"


def training(artifact: Artifact, run: RunLog | None) -> str:
    """Write how a model was trained, as far as artifact and log say it."""
    cfg, sha256 = artifact.model.cfg, artifact.program_sha256
    lines = [
        f"Recipe `{cfg.recipe}`, seed {cfg.seed}, rows of {cfg.train_seq_len} tokens, "
        f"{cfg.train_batch_tokens:,} tokens per step.",
        f"{cfg.num_layers} layers of width {cfg.model_dim}, vocabulary of {cfg.vocab_size} tokens.",
    ]
    if run is not None:
        done, machine = run.events["done"], run.get("header", "machine")
        took = f"{number(done, 'steps')} steps in {number(done, 'train_seconds')} s"
        tokens = number(run.events.get("data", {}), "train_tokens")
        lines.append(f"{took} on {machine}; training split of {tokens} tokens.")
    lines += [f"`{name}`: `{value or 'not known'}`." for name, value in artifact.identity.items()]
    if sha256:
        same = "is that program" if sha256 == program_sha256() else "is another version of it"
        lines.append(f"`train_gpt.py` in this folder {same}.")
    return "".join(f"- {line}\n" for line in lines)


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [text-diffusion, masked-diffusion, infill]
---

# Text diffusion, exactly autoregressive

One set of weights that scores text exactly, token by token, and denoises windows of tokens in
parallel. {parameters:,} parameters, float32, rounded as in the artifact `{artifact}`.

## Use

    pip install torch numpy sentencepiece transformers safetensors

    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    ids = tokenizer("def area(radius):", return_tensors="pt").input_ids      # BOS comes first
    loss = model(ids, labels=ids).loss                                       # exact nats per token
    text = tokenizer.decode(model.generate(ids, max_new_tokens=32)[0])
{infill}
## Scores

{scores}
## Training

{training}
## Limits

- Reads at most {limit:,} tokens, BOS included.
- `generate` has no key/value cache: each token costs a pass over the whole text.
- Rows of a batch may be padded after their last token only.
- A base model: it continues text and follows no instructions.
- The tokenizer decodes to {decoded}.
- Text it writes may be wrong, or repeat what its training data say.
"""
INFILL = """\
    given = dict(add_special_tokens=False, return_tensors="pt")              # without BOS
    after = tokenizer(" return x", **given).input_ids
    filled = tokenizer.decode(model.infill(ids, after, num_tokens=8)[0])
"""
NO_INFILL = "\nTrained without a denoiser: `infill` raises an error.\n"


def card(artifact: Artifact, run: RunLog | None, round_trip: bool) -> str:
    """Write the model card.

    Args:
        artifact: what is exported.
        run: log of its run, if given.
        round_trip: whether the tokenizer keeps white space and letters as they are.
    """
    model = artifact.model
    kept = "the text that it encoded" if round_trip else "a text with folded white space or letters"
    return CARD.format(
        parameters=sum(p.numel() for p in model.parameters()),
        artifact=artifact.path.name,
        infill=NO_INFILL if model.mask_emb is None else INFILL,
        scores=scores(run),
        training=training(artifact, run),
        limit=model.cfg.train_seq_len,
        decoded=kept,
    )


# ==============================================================================
# 2  FOLDER
# ==============================================================================


def check_folder(out: Path) -> None:
    """Raise UserError if the folder cannot be made, or holds files."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        fail(f"--out={out} exists and is not an empty folder; name another folder, or remove it")
    if not out.absolute().parent.is_dir():
        fail(f"--out={out}: there is no folder {out.absolute().parent}; make it")


def relative_import(source: str) -> str:
    """Let the modeling file import the program that stands beside it, as transformers asks for."""
    assert source.count(ABSOLUTE) == 1
    return source.replace(ABSOLUTE, RELATIVE)


def write_model(artifact: Artifact, tokenizer: Path, folder: Path) -> None:
    """Write weights, settings, tokenizer and their code to a folder."""
    from transformers import GenerationConfig

    from scripts.export.modeling_text_diffusion import TextDiffusionConfig, TextDiffusionForCausalLM
    from scripts.export.tokenization_text_diffusion import TextDiffusionTokenizer

    settings = vars(artifact.model.cfg).items()
    config = TextDiffusionConfig({k: v for k, v in settings if k not in LOCAL})
    model = TextDiffusionForCausalLM(config)
    model.gpt.load_state_dict(artifact.model.state_dict())
    length = artifact.model.cfg.train_seq_len
    converted = TextDiffusionTokenizer(str(tokenizer), model_max_length=length)
    # BOS separates documents: where the model begins another one, its text ends.
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), converted.bos_token_id)
    ends["pad_token_id"] = converted.pad_token_id
    model.generation_config = GenerationConfig(use_cache=False, **ends)
    TextDiffusionConfig.register_for_auto_class()
    TextDiffusionForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    TextDiffusionTokenizer.register_for_auto_class()
    model.save_pretrained(folder)
    converted.save_pretrained(folder)
    source = Path(__file__).with_name(MODELING).read_text("utf-8")
    (folder / MODELING).write_text(relative_import(source), "utf-8")
    for name in CODE:
        shutil.copyfile(ROOT / name, folder / name)


def run(args: argparse.Namespace) -> Mapping[str, Any]:
    """Export the artifact; UserError: something is missing, damaged, or does not belong to it."""
    for module in ("transformers", "safetensors"):
        need(module, "hugging_face.py", REQUIREMENTS)
    check_folder(args.out)
    artifact = load_artifact(args.artifact or newest_artifact(), pick_device("cpu"))
    path = args.tokenizer or Path(artifact.model.cfg.tokenizer_path)
    counter = open_tokenizer(artifact, path, "tokenizer ", "name that one: --tokenizer MODEL")
    log = None if args.log is None else read_run(args.log, artifact)
    probe = "def f():\n    return  'ﬁ x²'\n"
    round_trip = counter.tokenizer.decode(counter.tokenizer.encode(probe)) == probe
    with tempfile.TemporaryDirectory(dir=args.out.absolute().parent) as made:
        folder = Path(made, "model")
        folder.mkdir()
        write_model(artifact, path, folder)
        (folder / "README.md").write_text(card(artifact, log, round_trip), "utf-8")
        folder.replace(args.out)  # all of it, or nothing
    files = {path.name: path.stat().st_size for path in sorted(args.out.iterdir())}
    parameters = sum(p.numel() for p in artifact.model.parameters())
    return {"folder": str(args.out), "parameters": parameters, "files": files}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    args = parse_args(argv)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
