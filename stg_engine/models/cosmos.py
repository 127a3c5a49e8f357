"""Cosmos 1.0 and 2.0 (diffusers `CosmosTransformer3DModel`), by a `Denoiser`.

Every block first adds the learned positions of Cosmos 1.0 (`extra_pos_emb`) to its input. A residual skip, where the
block's output is its input, leaves that addition out, too. Of Cosmos 2.5, image tokens beside the prompt, which make
`encoder_hidden_states` a tuple, and a controlnet are not supported. The pipelines are not either: they compute with the
result for cond before they call uncond.
"""

from __future__ import annotations

from stg_engine.models.base import ModelSpec, register, value_passthrough

COSMOS = register(
    ModelSpec(
        family="Cosmos",
        transformer="CosmosTransformer3DModel",
        blocks=("transformer_blocks.*",),
        latents=("hidden_states", "timestep", "condition_mask"),
        prompt=("encoder_hidden_states", "attention_mask"),
        prompt_mask="attention_mask",
        streams=("hidden_states",),
        block_rows=("encoder_hidden_states", "embedded_timestep", "temb", "extra_pos_emb", "attention_mask"),
        self_attention=("attn1",),
        attention_rows=("hidden_states",),
        attention_skip=value_passthrough,
        shares_attention=True,
        once_per_step={"learnable_pos_embed": (0,), "patch_embed": (0,), "time_embed": (1,)},
        once_per_prompt=("crossattn_proj",),
        once_per_prompt_in_block=("attn2.to_k", "attn2.norm_k", "attn2.to_v"),
        per_row={"norm_out": (0, 1, 2), "proj_out": (0,)},
    )
)
