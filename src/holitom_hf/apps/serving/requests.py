"""What a client may ask: OpenAI's chat completions, with `video_url` parts, and nothing that it must not set."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


# Of OpenAI's, without effect here; a client that depends on one had better know.
REFUSED = {
    "audio": "sound is not answered with",
    "chat_template": "the server's is used",
    "functions": "the model calls no functions",
    "generation_config": "pass temperature, top_p, max_tokens, ...",
    "logprobs": "they are not returned",
    "response_format": "answers are plain text",
    "tools": "the model calls no functions",
    "web_search_options": "the server searches nothing",
}
IGNORED = {
    "metadata",
    "modalities",
    "parallel_tool_calls",
    "presence_penalty",
    "prediction",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "tool_choice",
    "top_logprobs",
    "user",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _Loose(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Address(_Loose):
    """Where a video or picture is."""

    url: str = Field(min_length=1)


class TextPart(_Loose):
    """Words of a message."""

    type: Literal["text"]
    text: str

    @field_validator("text")
    @classmethod
    def _is_text(cls, value: str) -> str:
        return _check_text(value)


class VideoPart(_Loose):
    """A video of a message."""

    type: Literal["video_url"]
    video_url: Address


class ImagePart(_Loose):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: Address


Part = Annotated[TextPart | VideoPart | ImagePart, Field(discriminator="type")]


class Message(_Loose):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=256)]
    tool_calls: None = None

    @field_validator("content")
    @classmethod
    def _is_text(cls, value):
        return _check_text(value) if isinstance(value, str) else value

    @property
    def parts(self) -> list[TextPart | VideoPart | ImagePart]:
        """The content, as parts in any case."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class TemplateSettings(_Strict):
    """Of `chat_template_kwargs`, what a client may set."""

    num_frames: int | None = Field(default=None, ge=1)


class ChatRequest(_Strict):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=256)
    model: str | None = None
    stream: bool | None = False
    n: Literal[1] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, gt=-1, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=300)
    chat_template_kwargs: TemplateSettings = TemplateSettings()

    @model_validator(mode="before")
    @classmethod
    def _without_what_has_no_effect(cls, body):
        if not isinstance(body, dict):
            return body
        for name, reason in REFUSED.items():
            if body.get(name):
                raise ValueError(f"{name} can't be set here: {reason}")
        return {name: value for name, value in body.items() if name not in IGNORED and name not in REFUSED}

    @field_validator("stop")
    @classmethod
    def _are_short(cls, stop):
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 4 or not all(0 < len(text) <= 100 for text in stops):
            raise ValueError("at most 4 texts of 1 to 100 characters")
        return stop and [_check_text(text) for text in stops]

    @property
    def num_new_tokens(self) -> int | None:
        """How long the answer may be, where the client says."""
        return self.max_completion_tokens or self.max_tokens

    def of_kind(self, kind: type) -> list:
        """The parts of one kind, in order."""
        return [part for message in self.messages for part in message.parts if isinstance(part, kind)]


def in_words(error: ValidationError) -> str:
    """What is wrong with a request, in one line and without what it holds."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    texts = [".".join(map(str, entry["loc"])) + ": " * bool(entry["loc"]) + entry["msg"] for entry in found[:3]]
    return "; ".join(text.removeprefix("Value error, ") for text in texts)


def _check_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair is no text") from None
    return value
