"""What tests of models share."""

import pytest

from .subjects import SUBJECTS, LlavaSubject, LlavaVideoSubject, QwenSubject


@pytest.fixture(scope="session", params=SUBJECTS)
def subject(request, model, plain) -> LlavaSubject | QwenSubject:
    """A small model of each backbone."""
    if request.param == "llava_video":
        return LlavaVideoSubject()
    return LlavaSubject(model, plain) if request.param == "llava_onevision" else QwenSubject(request.param)
