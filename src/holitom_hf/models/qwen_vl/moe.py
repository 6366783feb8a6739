"""Models whose decoders have mixtures of experts: logits of their routers, and the loss that balances them."""

from dataclasses import dataclass

import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func
from transformers.utils import ModelOutput

from ...sequence.inner_stage import InnerStage
from ..decoder import HoliTomDecoderMixin
from ..outputs import CompressedOutput
from .forward import QwenHeadMixin
from .outputs import QwenCausalLMOutput, QwenModelOutput


@dataclass
class QwenMoeModelOutput(QwenModelOutput):
    """
    [`QwenModelOutput`] with what the routers say.

    Attributes:
        router_logits: For each layer with experts (tokens, experts), of the tokens that the layer sees; where
            compressed, without padding.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None


@dataclass
class QwenMoeCausalLMOutput(QwenCausalLMOutput):
    """
    [`QwenCausalLMOutput`] with what the routers say.

    Attributes:
        router_logits: As in [`QwenMoeModelOutput`].
        aux_loss: Of load balancing, over these logits; `None` where they were not asked for.
    """

    router_logits: tuple[torch.Tensor, ...] | None = None
    aux_loss: torch.Tensor | None = None


class MoeDecoderMixin(HoliTomDecoderMixin):
    """[`HoliTomDecoderMixin`] whose layers may have experts: their routers' logits are those of real tokens."""

    needs_stage = True

    def forward(self, *args, inner_stage: InnerStage | None = None, **kwargs) -> ModelOutput:
        """Overrides HoliTomDecoderMixin.forward: layers differ in length, so that no one mask fits their logits."""
        outputs = super().forward(*args, inner_stage=inner_stage, **kwargs)
        router_logits = outputs.get("router_logits")
        if inner_stage is None or router_logits is None:
            return outputs
        mask, num_new = kwargs.get("attention_mask"), kwargs["inputs_embeds"].shape[1]
        outer = mask[:, -num_new:] if isinstance(mask, torch.Tensor) else None
        inner = outputs.survivors.mask if outputs.survivors is not None else outer
        layers = [index for index, layer in enumerate(self.layers) if hasattr(layer.mlp, "experts")]
        masks = [inner if inner_stage.layer is not None and index >= inner_stage.layer else outer for index in layers]
        outputs["router_logits"] = tuple(
            logits if mask is None or len(logits) < mask.numel() else logits[mask.flatten().to(logits.device)]
            for logits, mask in zip(router_logits, masks, strict=True)
        )
        return outputs


class QwenMoeHeadMixin(QwenHeadMixin):
    """[`QwenHeadMixin`] of a model whose decoder has experts."""

    output_class = QwenMoeCausalLMOutput

    def finished(
        self, output: QwenMoeCausalLMOutput, inside: ModelOutput, attention_mask: torch.Tensor | None
    ) -> QwenMoeCausalLMOutput:
        """Overrides QwenHeadMixin.finished: the loss of load balancing, over the tokens that the layers saw."""
        if output.router_logits is not None:
            config = self.config.text_config
            mask = None if isinstance(inside, CompressedOutput) else attention_mask
            output.aux_loss = load_balancing_loss_func(
                output.router_logits, config.num_experts, config.num_experts_per_tok, mask
            )
            if output.loss is not None:
                output.loss = output.loss + config.router_aux_loss_coef * output.aux_loss.to(output.loss.device)
        return output
