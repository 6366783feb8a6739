"""What a client may ask: OpenAI's chat completions, with `video_url` parts, and nothing that it must not set."""

import itertools
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


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


def _check_text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair is no text") from None
    return value


Text = Annotated[str, AfterValidator(_check_text)]


class _Loose(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Address(_Loose):
    """Where a video or picture is."""

    url: Text = Field(min_length=1)


class TextPart(_Loose):
    """Words of a message."""

    type: Literal["text"]
    text: Text


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
    content: list[Part] = Field(max_length=256)
    tool_calls: None = None

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content):
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class TemplateSettings(_Loose):
    """Of `chat_template_kwargs`, what a client may set."""

    num_frames: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _are_known(cls, fields):
        return _check_names(fields, cls.model_fields)


class ChatRequest(_Loose):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=256)
    model: Text | None = None
    stream: bool | None = False
    n: Literal[1] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, gt=-1, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    chat_template_kwargs: TemplateSettings = Field(default_factory=TemplateSettings)

    @model_validator(mode="before")
    @classmethod
    def _may_be_set(cls, body):
        if not isinstance(body, dict):
            return body
        if isinstance(body.get("logit_bias"), dict) and len(body["logit_bias"]) > 300:
            raise ValueError("logit_bias: at most 300 tokens")
        for name, reason in REFUSED.items():
            if body.get(name):
                raise ValueError(f"{name} can't be set here: {reason}")
        return _check_names(body, {*cls.model_fields, *IGNORED, *REFUSED})

    @field_validator("stop")
    @classmethod
    def _are_short(cls, stop):
        stops = [stop] if isinstance(stop, str) else stop or []
        if not all(0 < len(text) <= 100 for text in stops):
            raise ValueError("at most 4 texts of 1 to 100 characters")
        return stop and stops

    @property
    def num_new_tokens(self) -> int | None:
        """How long the answer may be, where the client says."""
        return self.max_completion_tokens or self.max_tokens

    def of_kind(self, kind: type) -> list:
        """The parts of one kind, in order."""
        return [part for message in self.messages for part in message.content if isinstance(part, kind)]


def in_words(error: ValidationError) -> str:
    """What is wrong with a request, in one line and without what it holds."""
    texts = []
    for entry in error.errors(include_url=False, include_input=False, include_context=False)[:3]:
        # A part's type stands in its place twice.
        place = ".".join(name for name, _ in itertools.groupby(map(str, entry["loc"])))
        texts.append(place + ": " * bool(place) + entry["msg"].removeprefix("Value error, "))
    return "; ".join(text[:200] for text in texts)


def _check_names(fields, known):
    """What was passed, or one `ValueError` for all the fields that are not known."""
    unknown = next((name for name in fields if name not in known), None) if isinstance(fields, dict) else None
    if unknown is not None:
        raise ValueError(f"there is no field {unknown[:50]!r}")
    return fields
