"""One HMAR block as a layer of Megatron-core: `layer_spec`, for mcore's `build_module` and `TransformerBlock`."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from hmar_mega.config import Config
from hmar_mega.errors import UserError
from hmar_mega.model.attention import SequenceAttention
from hmar_mega.model.initialize import Initializer
from hmar_mega.model.layer import Block
from hmar_mega.model.layers_mcore import McoreLayers
from hmar_mega.model.layers_torch import Layers, TorchLayers
from hmar_mega.plugin.sharding import Offsets, sharded_parameters

Implementation = Literal["mcore", "torch"]


class HMARLayer(MegatronModule):
    """A block with its number, called as mcore calls its `TransformerLayer`; the class condition is the `context`.

    Args:
        config: mcore's, whose sizes win over those of `run_config`.
        layer_number: from 1, within this pipeline stage.
        run_config: scales, attention, AdaLN and seed. Initial weights are those of `blocks.{number}` of the model.
        implementation: `mcore` for tensor-parallel linears, `torch` for plain ones.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        *,
        run_config: Config,
        implementation: Implementation = "mcore",
        vp_stage: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        sizes = {
            "depth": config.num_layers, "width": config.hidden_size, "heads": config.num_attention_heads,
            "ffn_ratio": config.ffn_hidden_size / config.hidden_size,
        }  # fmt: skip
        model = run_config.model.model_copy(update=sizes)
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage)
        self.shared_modulation = model.shared_aln
        schedule, attention = run_config.schedule.scales, model.attention
        self.num_tokens = schedule.num_tokens
        self.attend = SequenceAttention(schedule, attention.pattern, attention.backend)
        init = Initializer(run_config.run.seed, math.sqrt(1 / (3 * model.resolved_width)))
        layers: Layers = TorchLayers() if implementation == "torch" else McoreLayers(config.sequence_parallel)
        self.block = Block(f"blocks.{self.layer_number - 1}", model, layers, init)
        for parameter in self.parameters():
            parameter.sequence_parallel = False  # type: ignore[attr-defined]  # see StageModel

    def forward(
        self, hidden_states: Tensor, attention_mask: None = None, context: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(N, B, C) and the condition → (N, B, C) and the condition.

        Args:
            hidden_states: this rank's part of the padded sequence under sequence parallelism.
            attention_mask: None; which tokens attend to which follows from the scales.
            context: (B, C) class condition; with shared AdaLN (B, 6, C), the shared modulation.
            given: `drop_path` (2, B) residual factors; what else mcore passes its layers means nothing here.

        Raises:
            ValueError: when there is no context.
        """
        if context is None:
            raise ValueError("an HMAR layer is modulated by the class condition: pass it as context")
        shared = context if self.shared_modulation else None
        out = self.block(hidden_states, context, shared, self.attend, self.num_tokens, given.get("drop_path"))
        return out, context

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Offsets = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """See `sharded_parameters`."""
        return sharded_parameters(self, prefix, sharded_offsets)


def layer_spec(impl: Implementation = "mcore", config: Config | None = None) -> ModuleSpec:
    """The spec of an HMAR block, for `build_module(spec, config=TransformerConfig(…), layer_number=…)`.

    Sizes come from the `TransformerConfig`. In a `TransformerBlock` leave its final norm out (`post_layer_norm=False`),
    and pass the class condition as `context`.

    Args:
        impl: `mcore` for tensor-parallel linears, `torch` for plain ones.
        config: scales, attention pattern, AdaLN and seed; default those of HMAR at 256 px.

    Raises:
        UserError: for another implementation.
    """
    if impl not in get_args(Implementation):
        raise UserError(
            f"impl={impl!r} is no implementation of the layers; use {' or '.join(get_args(Implementation))}"
        )
    run_config = config if config is not None else Config()
    return ModuleSpec(module=HMARLayer, params={"run_config": run_config, "implementation": impl})
