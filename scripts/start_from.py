"""What INIT_FROM does: training starts from the weights of an artifact. train_gpt.py runs this file, beside itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE = (
    *("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult"),
    *("tie_embeddings", "value_residual", "bigram_vocab_size"),
)
ADDED = ("time_embed_dim", "look_ahead")  # weights that only a denoiser has, and not every one


def adopt(state: Any, sha256: str, load: Callable[..., Any], error: type[Exception]) -> None:
    """Start from the weights of the artifact INIT_FROM that have names of ours; the others stay as they are.

    Args:
        state: train_gpt.TrainState, before its first step.
        sha256: of the tokenizer here.
        load: train_gpt.load_artifact.
        error: what is raised.

    Raises:
        error: the artifact is missing or damaged, read with another tokenizer, or of another shape (settings named).
    """
    cfg, run = state.cfg, state.run
    try:
        model, other = load(Path(cfg.init_from), run.device)
    except error as fault:
        raise error(f"INIT_FROM: {fault}; or make one: RECIPE=ar python train_gpt.py") from fault
    there, shared = vars(model.cfg), SHAPE + ADDED * model.cfg.diffusion * cfg.diffusion
    pairs = [(n.upper(), there[n], getattr(cfg, n)) for n in shared if n in SHAPE or there[n] * getattr(cfg, n)]
    pairs += [("SHA-256 of TOKENIZER_PATH", other[:12], sha256[:12])]
    if differ := [f"{name} is {a} there and {b} here" for name, a, b in pairs if a != b]:
        raise error(f"INIT_FROM={cfg.init_from!r} does not fit: {'; '.join(differ)}; set here what holds there")
    fresh = state.model.load_state_dict(model.state_dict(), strict=False).missing_keys
    state.ema = [p.detach().clone() for p in state.model.parameters()] if state.ema else []
    run.log.event("init_from", artifact=cfg.init_from, fresh=len(fresh))
