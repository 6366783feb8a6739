"""The README.md of a checkpoint on the Hub."""

from huggingface_hub import ModelCardData

from ..merging.flops import prefill_flops, tokens_by_layer
from .writing import is_local


CITATION = """\
@inproceedings{shao2025holitom,
  title={HoliTom: Holistic Token Merging for Fast Video Large Language Models},
  author={Shao, Kele and Tao, Keda and Qin, Can and You, Haoxuan and Sui, Yang and Wang, Huan},
  booktitle={NeurIPS},
  year={2025}
}"""


SAVINGS = "Of the video's tokens, by the paper's formula."


def model_card(config, is_config_only: bool, repo_id: str = "user/repo") -> str:
    """
    Writes a model card.

    Args:
        config: The checkpoint's configuration.
        is_config_only: Whether the repository holds no weights.
        repo_id: Its name, for the snippet.

    Returns:
        Markdown with YAML metadata.
    """
    settings = config.holitom_config
    base = settings.base_model_name_or_path or config._name_or_path or None
    is_on_hub = bool(base) and not is_local(base)
    source = f"`{base}`" if is_on_hub else "a folder of the machine it was made on"
    # Settings and code are ours to license; weights stay under the licence they came with.
    license_name = {"license": "apache-2.0"} if is_config_only else {"license": "other", "license_name": "base-model"}
    metadata = ModelCardData(
        base_model=base if is_on_hub and base != repo_id else None,
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        tags=["holitom", "token-merging", "video", config.model_type.replace("_", "-")],
        **license_name,
    )
    values = settings.to_dict() | {"base_model_name_or_path": base if is_config_only and is_on_hub else None}
    rows = "\n".join(f"| `{name}` | `{value}` |" for name, value in values.items())
    if is_config_only:
        plain = (
            f"This repository holds no weights: `trust_remote_code=True` loads them from {source},\n"
            "and without it nothing loads."
        )
    elif config.backbone.has_upstream:
        plain = "Without\n`trust_remote_code=True` the same repository loads as the plain, uncompressed model."
    else:
        plain = "It loads with\n`trust_remote_code=True`: transformers has no class of this model itself."
    return f"""---
{metadata.to_yaml()}
---

# {config.backbone.title} with HoliTom

Training-free token merging for video (HoliTom, NeurIPS 2025, arXiv 2505.21334), inside `transformers`. {plain}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "{repo_id}"
model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
content = [{{"type": "video"}}, {{"type": "text", "text": "What happens in the video?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(text=prompt, videos="video.mp4", return_tensors="pt").to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

{_savings(config)}## Settings

| setting | value |
| --- | --- |
{rows}

## Citation

```bibtex
{CITATION}
```
"""


def _savings(config) -> str:
    """Tokens and operations at several numbers of frames; nothing where frames have any size."""
    if config.tokens_per_frame is None:
        return ""
    settings, text = config.holitom_config, config.text_config
    sizes, depth = (text.hidden_size, text.intermediate_size), text.num_hidden_layers
    lines = ["| frames | tokens | before the decoder | after stage 3 | prefill FLOPs |", "| ---: " * 5 + "|"]
    for num_frames in (8, 16, 32, 64):
        tokens = num_frames * config.tokens_per_frame
        outer = round(tokens * settings.retention_ratio) if settings.has_outer_stage else tokens
        inner = round(outer * (1 - settings.inner_merge_ratio)) if settings.has_inner_stage else outer
        layer = settings.inner_merge_layer if settings.has_inner_stage else None
        flops = prefill_flops(tokens_by_layer(outer, inner, layer, depth), *sizes)
        share = flops / prefill_flops([tokens] * depth, *sizes)
        lines.append(f"| {num_frames} | {tokens} | {outer} | {inner} | {share:.1%} |")
    return "\n".join(["## Savings", "", SAVINGS, "", *lines, "", ""])
