"""Registration of every dataclass and builder that a gin file may name. This module defines nothing else.

config/__init__ does not import it: it imports nearly every package.
"""

from __future__ import annotations

import gin

from rlhf_jax.data import DeskConfig, Fields, Template, record_builders
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.tokenizer_builders import byte_tokenizer, desk_tokenizer
from rlhf_jax.feedback import AnnotatorConfig
from rlhf_jax.io.source import ModelSource
from rlhf_jax.learn import DPOConfig, GRPOConfig, ImportanceConfig, OptimizerConfig, PPOConfig
from rlhf_jax.loop import LoopConfig
from rlhf_jax.loop.faults import Fault
from rlhf_jax.models import LoraConfig, ModelConfig, RopeScaling
from rlhf_jax.parallel import MeshConfig
from rlhf_jax.rewards import SentimentCorpus
from rlhf_jax.rewards import builders as reward_builders
from rlhf_jax.rollout import SamplingConfig, SlotConfig

CONFIGURABLES = (
    AnnotatorConfig,
    BatchConfig,
    DPOConfig,
    DeskConfig,
    Fault,
    Fields,
    GRPOConfig,
    ImportanceConfig,
    LoopConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    ModelSource,
    OptimizerConfig,
    PPOConfig,
    RopeScaling,
    SamplingConfig,
    SentimentCorpus,
    SlotConfig,
    Template,
    byte_tokenizer,
    desk_tokenizer,
    record_builders.comparison_file,
    record_builders.demonstration_file,
    record_builders.desk_corpus,
    record_builders.desk_demonstrations,
    record_builders.desk_prompts,
    record_builders.prompt_file,
    reward_builders.desk_gold,
    reward_builders.final_answer,
    reward_builders.in_processes,
    reward_builders.sentiment_prompts,
    reward_builders.sentiment_scores,
)
for _configurable in CONFIGURABLES:
    gin.register(_configurable, module="rlhf_jax")
