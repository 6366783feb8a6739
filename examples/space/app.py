"""A Hugging Face Space: the page of `holitom-hf demo`, for the model that the setting HOLITOM_MODEL names."""

import os

from holitom_hf.answering.answerer import Answerer
from holitom_hf.apps.web_page import LAUNCH_OPTIONS, build_app
from holitom_hf.bundled import BUNDLED_ABOUT, BUNDLED_NAME, model_name


name = os.environ.get("HOLITOM_MODEL", BUNDLED_NAME)
answerer = Answerer(model_name(name))
answerer.load_model()
app = build_app(answerer, BUNDLED_ABOUT if name == BUNDLED_NAME else "")

if __name__ == "__main__":
    app.launch(**LAUNCH_OPTIONS)
