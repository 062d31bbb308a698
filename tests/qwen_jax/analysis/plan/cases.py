"""A small model whose plans are summed up on paper.

D = 256, L = 2, N = 4, K = 2, H = 64, F = 512, V = 1024, untied; rows of 512 tokens, one
a device, arithmetic in bfloat16. Elements that a layer gathers:

    q, o    2 x 256 x 256   = 131,072
    k, v    2 x 256 x 128   =  65,536
    mlp     3 x 256 x 512   = 393,216
    together                  589,824, of both layers 1,179,648

The output kernel has 256 x 1024 = 262,144.
"""

import dataclasses

from configs.data import DataConfig
from configs.hardware import topologies
from configs.models import qwen2_5
from configs.models.architecture import MoEConfig
from configs.train import TrainConfig
from partitioning import mesh as mesh_lib
from qwen_jax.analysis.plan import job

LAYERS, KERNEL = 1_179_648, 262_144
D, L = 256, 2
CFG = dataclasses.replace(
    qwen2_5.tiny_untied(),
    hidden_size=D, num_hidden_layers=L, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    intermediate_size=512, vocab_size=1024,
)  # fmt: skip
MOE = dataclasses.replace(
    CFG,
    moe=MoEConfig(
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=512,
    ),
)


def planned(mesh, topology="v5e-4", *, cfg=CFG, purpose="train", **settings):
    config = TrainConfig(
        data=DataConfig(sequence_length=512), mesh=mesh_lib.parse(mesh),
        **{"remat": "full", **settings},
    )  # fmt: skip
    return job.make(cfg, config, topologies.parse(topology), rows=1, purpose=purpose)
