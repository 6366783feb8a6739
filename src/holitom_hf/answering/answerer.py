"""One question about one video, step by step, with what each step took."""

import contextlib
import sys
import time
from dataclasses import asdict, dataclass, field

import torch
from transformers import BatchFeature, TextStreamer
from transformers.video_utils import VideoMetadata

from ..checkpoints.hub import hub_options
from ..checkpoints.reading import load_whole
from ..configuration import HoliTomConfig
from ..models.registry import backbone_class, backbone_of
from ..models.upstream import cache_of
from .prompts import PIXELS, encode_videos, frames_of
from .savings import cache_bytes, row_savings


PIXEL_LIMITS = ("min_pixels", "max_pixels")


@dataclass
class PreparedQuestion:
    """
    A question on its way to the model.

    Attributes:
        features: What the processor made of it; its pixels are replaced by `encoded` once they went through the tower.
        num_frames: Number of frames.
        encoded: The video's features at full length.
        seconds: What each step took so far.
    """

    features: BatchFeature
    num_frames: int
    encoded: object | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Answer:
    """
    An answer, and what it took.

    Attributes:
        text: The answer.
        prompt_length: Tokens of the uncompressed prompt.
        num_frames: Frames of the video.
        num_segments: Segments that stage 1 found.
        visual_tokens_before: Video tokens of the uncompressed model, the newline included.
        visual_tokens_outer: Those left by stages 1 and 2.
        visual_tokens_inner: Those left by stage 3.
        inner_merge_layer: The layer before which stage 3 ran; `None` if it did not.
        computed_patches: Share of the patches that the vision tower computed in its later layers; `None`: it computed
            all of them.
        flops_share: Prefill operations of the decoder against the uncompressed one's, by the paper's formula.
        num_answer_tokens: Length of the answer.
        cache_bytes: Keys and values at the end.
        seconds: `decode`, `encode`, `first_token` (merging and prefill), `generate` (the tokens after the first).
    """

    text: str
    prompt_length: int
    num_frames: int
    num_segments: int
    visual_tokens_before: int
    visual_tokens_outer: int
    visual_tokens_inner: int
    inner_merge_layer: int | None
    computed_patches: float | None
    flops_share: float
    num_answer_tokens: int
    cache_bytes: int
    seconds: dict[str, float]

    def to_dict(self) -> dict:
        """All fields as a dictionary of JSON values."""
        return asdict(self)


class TextPrinter(TextStreamer):
    """Prints an answer to stdout as its tokens come."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False):
        """Overrides TextStreamer.on_finalized_text: to stdout at once."""
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()


class _Stopwatch(TextStreamer):
    """Notes when the first token came, and passes everything on."""

    def __init__(self, tokenizer, streamer: TextStreamer | None):
        super().__init__(tokenizer)
        self.streamer, self.num_puts, self.first_token_at = streamer, 0, None

    def put(self, value):
        """Overrides TextStreamer.put: the first call brings the prompt, the second the first token."""
        self.num_puts += 1
        if self.num_puts == 2:
            self.first_token_at = time.perf_counter()
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self):
        """Overrides TextStreamer.end."""
        if self.streamer is not None:
            self.streamer.end()


class Answerer:
    """A model and its processor, asked one question at a time."""

    def __init__(
        self,
        model: str,
        settings: HoliTomConfig | dict | None = None,
        retention_ratio: float | None = None,
        device: str = "auto",
        dtype: str = "auto",
        hub: dict | None = None,
    ):
        """
        Loads the processor; the weights follow with `load_model`, so that a bad video is found out before.

        Args:
            model: Folder or Hub repository.
            settings: Compression settings in place of the checkpoint's, or a dictionary of those to change.
            retention_ratio: Replaces that of the settings.
            device: `"cpu"`, `"cuda"`, ..., or `"auto"`.
            dtype: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
            hub: What [`hub_options`] said of the model; `None`: it is asked here.

        Raises:
            OSError, ValueError: If the checkpoint can't be read (a Hub that does not answer is asked once), or the
                device or dtype is not known.
        """
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
        try:
            self.device_map = device if device == "auto" else {"": torch.device(device)}
        except RuntimeError as error:
            raise ValueError(f"there is no device {device!r}: pass auto, cpu, cuda, cuda:1, mps, ...") from error
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device is {device!r}, but torch finds no CUDA GPU here: pass --device cpu")
        self.name, self.dtype = model, dtype
        kwargs = {} if settings is None else {"holitom_config": settings}
        with self._naming_the_model():
            self.hub_options = hub_options(model) if hub is None else hub
            self.backbone = backbone_of(model, **self.hub_options)
            self.config = backbone_class(self.backbone, "config").from_pretrained(model, **kwargs, **self.hub_options)
            self.processor = backbone_class(self.backbone, "processor").from_pretrained(model, **self.hub_options)
        if retention_ratio is not None:
            self.config.holitom_config = {"retention_ratio": retention_ratio}
        self.config.holitom_config.check_decoder_depth(self.config.text_config.num_hidden_layers)
        self.model = None

    def load_model(self) -> None:
        """
        Loads the weights.

        Raises:
            OSError: If some are missing or damaged.
        """
        with self._naming_the_model():
            self.model = load_whole(
                backbone_class(self.backbone, "generation"),
                self.name,
                config=self.config,
                dtype=self.dtype,
                device_map=self.device_map,
                **self.hub_options,
            )
            self.model.eval()

    @contextlib.contextmanager
    def _naming_the_model(self):
        try:
            yield
        except OSError as error:
            raise OSError(f"the model {self.name!r} can't be loaded: {error}") from error

    def prepare(
        self,
        video: str | torch.Tensor,
        question: str,
        num_frames: int | None = None,
        metadata: VideoMetadata | None = None,
        **limits: float | None,
    ) -> PreparedQuestion:
        """
        Decodes the video and writes the prompt.

        Args:
            video: Path, URL, or (F, 3, H, W) frames, which are all taken.
            question: The question.
            num_frames: Frames to take of a file; `None`: at most the processor's.
            metadata: Of the video that frames are of, for a model that is told their times; `None`: not known.
            limits: What the processor takes besides: `fps` of a file, in place of `num_frames`; where frames may have
                several sizes `min_pixels` and `max_pixels`, of what the backbone's video processor says. `None`: its
                own.

        Raises:
            OSError, ValueError: If the video can't be read or has fewer frames, or limits don't fit the backbone.
        """
        limits = self.given_limits(limits)
        content = [{"type": "video"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        start = time.perf_counter()
        if isinstance(video, torch.Tensor):
            options = {"do_sample_frames": False, "video_metadata": None if metadata is None else [metadata]}
        else:
            options = {"num_frames": num_frames}
        features = self.processor(
            text=text, videos=video, device=self._preprocessing_device(), return_tensors="pt", **options | limits
        )
        seconds = {"decode": time.perf_counter() - start}
        return PreparedQuestion(features, frames_of(features, self.processor)[0], seconds=seconds)

    def given_limits(self, limits: dict[str, float | None]) -> dict[str, float]:
        """
        Those of the limits of [`prepare`] that are given.

        Raises:
            ValueError: If one of them is of pixels, and the backbone's frames have one size.
        """
        given = {name: value for name, value in limits.items() if value is not None}
        if self.config.tokens_per_frame is not None and not given.keys().isdisjoint(PIXEL_LIMITS):
            raise ValueError(f"frames of {self.backbone.title} have one size: leave out {' and '.join(PIXEL_LIMITS)}")
        return given

    def _preprocessing_device(self) -> str | None:
        """A GPU resizes and normalizes frames, too; the weights may follow later, so the options tell."""
        device = "cuda" if self.device_map == "auto" else str(self.device_map[""])
        return device if device.startswith("cuda") and torch.cuda.is_available() else None

    @torch.inference_mode()
    def encode(self, question: PreparedQuestion) -> None:
        """Sends the frames through the vision tower."""
        start = time.perf_counter()
        self.model.check_videos(question.features["input_ids"], question.features)
        question.encoded = encode_videos(self.model, question.features)
        del question.features[PIXELS]
        question.features = question.features.to(self.model.device)
        self._wait()
        question.seconds["encode"] = time.perf_counter() - start

    def generate(
        self,
        question: PreparedQuestion,
        max_new_tokens: int = 256,
        streamer: TextStreamer | None = None,
        settings: HoliTomConfig | dict | None = None,
    ) -> Answer:
        """
        Merges, runs the decoder and collects the figures.

        Args:
            question: Prepared and encoded.
            max_new_tokens: Longest answer.
            streamer: Gets the tokens as they come.
            settings: For this answer in place of the model's, or a dictionary of those to change.
        """
        start = time.perf_counter()
        stopwatch = _Stopwatch(self.processor.tokenizer, streamer)
        features = question.features
        outputs = self.model.generate(
            **features,
            mm_encoder_outputs={"video": question.encoded},
            holitom_config=settings,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=stopwatch,
            return_dict_in_generate=True,
        )
        end = time.perf_counter()
        prompt_length = features["input_ids"].shape[1]
        tokens = outputs.sequences[0, prompt_length:]
        seconds = question.seconds | {
            "first_token": stopwatch.first_token_at - start,
            "generate": end - stopwatch.first_token_at,
        }
        [savings] = row_savings(
            cache_of(outputs),
            features["attention_mask"],
            [sum(map(len, question.encoded.pooler_output))],
            self.model.config.text_config,
        )
        figures = asdict(savings) | {"num_segments": savings.num_segments or question.num_frames}
        figures.pop("flops")
        computed = question.encoded.computed_patches
        return Answer(
            text=self.processor.decode(tokens, skip_special_tokens=True).strip(),
            prompt_length=prompt_length,
            num_frames=question.num_frames,
            num_answer_tokens=len(tokens),
            cache_bytes=cache_bytes(cache_of(outputs)),
            seconds=seconds,
            computed_patches=float(torch.cat(computed).float().mean()) if computed is not None else None,
            **figures,
        )

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
