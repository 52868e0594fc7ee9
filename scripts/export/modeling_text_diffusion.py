"""A text-diffusion model in the classes of transformers: exact likelihood, generation, infill.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model(ids, labels=ids).loss                       exact nats per token
    model.generate(ids, max_new_tokens=64)            every option of transformers' generate
    model.infill(prefix, suffix, num_tokens=16)       fill the span between two texts

`scripts/export/hugging_face.py` writes this file into a folder with `train_gpt.py`, which holds
the model itself, beside it. Needs torch, numpy, sentencepiece and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from train_gpt import GPT, Config, decode_refine


class TextDiffusionConfig(PretrainedConfig):
    """Settings of a model as `train_gpt.py` names them, and their usual names beside them.

    Args:
        settings: fields of `train_gpt.Config`; the others have their defaults.
        kwargs: of PretrainedConfig.
    """

    model_type = "text_diffusion"

    def __init__(self, settings: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**{"tie_word_embeddings": False, **kwargs})
        self.settings = dict(settings or {})
        cfg = self.program_config()
        self.vocab_size, self.hidden_size = cfg.vocab_size, cfg.model_dim
        self.num_hidden_layers, self.num_attention_heads = cfg.num_layers, cfg.num_heads
        self.max_position_embeddings = cfg.train_seq_len
        self.use_cache = False

    def program_config(self) -> Config:
        """Return the settings as the model takes them; UserError (train_gpt): they are invalid."""
        return Config(**self.settings)


class TextDiffusionForCausalLM(PreTrainedModel, GenerationMixin):
    """One set of weights that predicts the next token exactly and denoises windows of tokens."""

    config_class = TextDiffusionConfig
    base_model_prefix = "gpt"
    main_input_name = "input_ids"

    def __init__(self, config: TextDiffusionConfig) -> None:
        super().__init__(config)
        self.gpt = GPT(config.program_config())
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Keep the values that GPT draws itself."""

    def check_inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Raise ValueError if rows are longer than the model was trained to read, or padded in
        front of their last token: positions count from the first token of a row.
        """
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            rule = f"this model was trained to read at most {limit} (train_seq_len)"
            raise ValueError(f"input_ids has {length} tokens; {rule}; shorten it")
        if attention_mask is not None and bool((attention_mask.long().diff(dim=1) > 0).any()):
            rule = "only padding after the last token of a row is supported"
            raise ValueError(f"attention_mask hides tokens before others; {rule}")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Read tokens causally.

        Args:
            input_ids: (B, T) int64; documents begin with BOS.
            attention_mask: (B, T) 1 for tokens, 0 for padding, which follows a row's last token.
            labels: (B, T) int64, usually input_ids; -100 where no loss is wanted.
            return_dict: false: a tuple in place of a CausalLMOutput.
            kwargs: num_items_in_batch divides the loss; others have no effect.
        Returns:
            logits (B, T, V) float32, of which position i predicts token i + 1, and the loss: exact
            nats per token, mean over labels but each row's first.
        Raises:
            ValueError: rows are too long, or padding precedes a token.
        """
        self.check_inputs(input_ids, attention_mask)
        logits, _ = self.gpt.forward_causal(input_ids)
        loss = None
        if labels is not None:
            size, count = self.config.vocab_size, kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, size, num_items_in_batch=count)
        output = CausalLMOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Give every pass all tokens (B, T): there is no cache, so a token costs a whole pass."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Continue tokens (B, P) as transformers does, up to BOS, which begins another document.

        Without an attention mask all tokens count: transformers would take some for padding.
        """
        ids = kwargs.get("input_ids", inputs)
        if ids is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(ids)
        return super().generate(inputs, **kwargs)

    @torch.no_grad()
    def infill(
        self, input_ids: Tensor, suffix_ids: Tensor, num_tokens: int, num_steps: int = 8
    ) -> Tensor:
        """Fill the span between two texts by denoising (arXiv:1904.09324).

        Args:
            input_ids: (B, P) int64 tokens before the span, of which BOS is one at least.
            suffix_ids: (B, Q) int64 tokens after it; Q may be 0.
            num_tokens: tokens of the span.
            num_steps: most denoising passes; each unmasks the most confident tokens.
        Returns:
            (B, P + num_tokens + Q) int64, the three parts in order.
        Raises:
            ValueError: no denoiser, an empty prefix or span, no pass, or too many tokens.
        """
        if self.gpt.mask_emb is None:
            why = "this model was trained without a denoiser (DIFFUSION_LOSS_WEIGHT=0)"
            raise ValueError(f"infill needs a denoiser, and {why}; use generate")
        for name, value in (("num_tokens", num_tokens), ("num_steps", num_steps)):
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        if input_ids.shape[1] < 1:
            raise ValueError("input_ids is empty; begin it with BOS")
        span = input_ids.new_zeros(len(input_ids), num_tokens)
        ids = torch.cat((input_ids, span, suffix_ids), dim=1)
        self.check_inputs(ids, None)
        start = input_ids.shape[1]
        return decode_refine(self.gpt, ids, start, start + num_tokens, num_steps)
