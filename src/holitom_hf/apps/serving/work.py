"""What is known of one request while it is served."""

import re
import threading
import time
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass, field


# What a client may call its request: it stands in log lines and headers.
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass
class Work:
    """
    One request.

    Attributes:
        max_seconds: How long it may take.
        request_id: What logs and answers call it.
        seconds: What each stage took.
        tokens: Visual tokens `before`, after stages 1 and 2 (`outer`) and after stage 3 (`inner`), and those of the
            `prompt` and the `answer`.
        held: What is given back when the request is over.
    """

    max_seconds: float
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    held: AsyncExitStack = field(default_factory=AsyncExitStack)
    started: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds_left(self) -> float:
        return self.started + self.max_seconds - time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled.is_set() or self.seconds_left <= 0

    def note(self, stage: str, start: float) -> None:
        """Adds the time since `start`, of `time.monotonic()`, to a stage."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start
