"""Bodies of requests, as clients of OpenAI, Mistral, Mercury and llama.cpp send them.

Fields that a base model cannot honour and that change the output are refused; unknown ones are
ignored, because editors send settings of samplers that not every server has.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    AllowInfNan,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)

MOST_TOKENS = 100_000  # more is a mistake, not a wish; the context cuts what is less
MOST_STOPS = 16
MOST_EXTRA = 64  # other files that an editor sends
EFFORTS = {"instant": 1, "low": 4, "medium": 12, "high": 30}  # passes
MODE_NAMES = Literal["ar", "refine", "block", "threshold", "speculative"]


def check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold the character NUL; remove it")
    return text


Text = Annotated[str, AfterValidator(check_text)]
Share = Annotated[float, Field(ge=0, le=1), AllowInfNan(False)]
Token = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(ge=0, le=MOST_TOKENS)]
Stops = Text | list[Text] | None
Milliseconds = Annotated[float, Field(gt=0, le=3_600_000), AllowInfNan(False)]
Number = Annotated[float, AllowInfNan(False)]


class Body(BaseModel):
    """What all requests share.

    mode, steps, window, threshold, redo, deadline_ms, guard, reasoning_effort, `hole`, diffusing
    are extensions.
    """

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)

    model: Text | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AllowInfNan(False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1), AllowInfNan(False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] | None = None
    seed: Annotated[int, Field(ge=-1, le=2**63 - 1)] | None = None
    stop: Stops = None
    stream: bool | None = False
    mode: MODE_NAMES | None = None
    steps: Annotated[int, Field(ge=1, le=4096)] | None = None
    window: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    threshold: Share | None = None
    redo: Share | None = None
    deadline_ms: Milliseconds | None = None
    guard: bool = True
    reasoning_effort: Literal["instant", "low", "medium", "high"] | None = None
    hole: Literal["auto"] | Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    diffusing: bool = False

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings, empty ones left out."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(word for word in given if word)

    @model_validator(mode="after")
    def check_stops(self) -> Any:
        if len(self.stops()) > MOST_STOPS or max(map(len, self.stops()), default=0) > 256:
            raise ValueError(f"stop: at most {MOST_STOPS} strings of 256 characters; shorten it")
        return self


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class OpenAI(Body):
    """Fields of OpenAI's interface that both of its routes have."""

    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    max_tokens: Annotated[
        Count | None,
        Field(validation_alias=AliasChoices("max_tokens", "max_completion_tokens")),
    ] = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: dict[str, Number] | None = None

    @model_validator(mode="after")
    def check_unsupported(self) -> Any:
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported; leave it out")
        return self


class Completion(OpenAI):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]] | None = None
    messages: list[Any] | None = None  # to refuse it by name
    suffix: Text | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


class Fim(OpenAI):
    """POST /v1/fim/completions, of Mistral and Mercury."""

    prompt: Text
    suffix: Text | None = None
    random_seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None


class Part(BaseModel):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class Chat(OpenAI):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    prompt: Any = None  # to refuse it by name
    suffix: Any = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None


class Edit(OpenAI):
    """POST /v1/edit/completions: `redo` is the probability below which a token is redone."""

    input: Text
    suffix: Text | None = None


class Extra(BaseModel):
    """Another file that an editor sends."""

    filename: Text = ""
    text: Text = ""


class Llama(Body):
    """POST /completion, of llama.cpp."""

    prompt: Text | list[Token] | None = None
    n_predict: Annotated[int, Field(ge=-2, le=MOST_TOKENS)] | None = None
    t_max_predict_ms: Annotated[float, Field(le=3_600_000), AllowInfNan(False)] | None = None
    n_probs: Annotated[int, Field(ge=0, le=20)] | None = 0
    cache_prompt: bool | None = True
    response_fields: Annotated[list[Text], Field(max_length=64)] | None = None


class Infill(Llama):
    """POST /infill, of llama.cpp."""

    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: Annotated[list[Extra], Field(max_length=MOST_EXTRA)] | None = None
    prompt: Text | None = None


class Tokenize(BaseModel):
    """POST /tokenize: `content` of llama.cpp, `prompt` of vLLM."""

    content: Text | None = None
    prompt: Text | None = None
    add_special: bool = False
    add_special_tokens: bool = False
    with_pieces: bool = False


class Detokenize(BaseModel):
    """POST /detokenize."""

    tokens: Annotated[list[Token], Field(max_length=MOST_TOKENS)]
