"""The README.md of a checkpoint on the Hub."""

import os

from huggingface_hub import ModelCardData

from .configuration_holitom import HoliTomConfig


CITATION = """\
@inproceedings{shao2025holitom,
  title={HoliTom: Holistic Token Merging for Fast Video Large Language Models},
  author={Shao, Kele and Tao, Keda and Qin, Can and You, Haoxuan and Sui, Yang and Wang, Huan},
  booktitle={NeurIPS},
  year={2025}
}"""


def model_card(settings: HoliTomConfig, is_config_only: bool) -> str:
    """
    Writes a model card.

    Args:
        settings: The compression settings of the checkpoint.
        is_config_only: Whether the repository holds no weights.

    Returns:
        Markdown with YAML metadata.
    """
    base = settings.base_model_name_or_path
    metadata = ModelCardData(
        base_model=base if base is not None and not os.path.exists(base) else None,
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        tags=["holitom", "token-merging", "video", "llava-onevision"],
    )
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in settings.to_dict().items())
    weights = f"This repository holds no weights: they are loaded from `{base}`.\n\n" if is_config_only else ""
    return f"""---
{metadata.to_yaml()}
---

# LLaVA-OneVision with HoliTom

Training-free token merging for video (HoliTom, NeurIPS 2025, arXiv 2505.21334), inside `transformers`.
{weights}```python
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "this/repository"
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, device_map="auto")
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
```

| setting | value |
| --- | --- |
{rows}

```bibtex
{CITATION}
```
"""
