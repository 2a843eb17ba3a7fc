"""The mechanisms: one file per paper, each registered under its name."""

from attention_zoo.attention.agent import AgentAttention
from attention_zoo.attention.agent_cswin import AgentCSwinAttention
from attention_zoo.attention.agent_sd import apply_agent_sd, published_schedule, remove_agent_sd
from attention_zoo.attention.auxiliary import auxiliary_loss
from attention_zoo.attention.bra import BiLevelRoutingAttention
from attention_zoo.attention.cache import cache_report
from attention_zoo.attention.cca import CoreContextAttention
from attention_zoo.attention.combiner import CombinerAttention
from attention_zoo.attention.diff import DiffAttention
from attention_zoo.attention.dtm import DeformableTokenMerging
from attention_zoo.attention.gda import GroupedDiffAttention
from attention_zoo.attention.gqa import GroupedQueryAttention
from attention_zoo.attention.grow import grow_model, grow_signal_heads
from attention_zoo.attention.halo import HaloAttention
from attention_zoo.attention.hilo import HiLoAttention
from attention_zoo.attention.kdgqa import DynamicGroupedQueryAttention, KeyDrivenGroupedQueryAttention, set_training_step
from attention_zoo.attention.lepe import LepeAttention
from attention_zoo.attention.mha import MultiHeadAttention
from attention_zoo.attention.moh import MoHAttention, set_routed_topk
from attention_zoo.attention.moh_transnext import MoHTransNeXtAggregated, MoHTransNeXtGlobal
from attention_zoo.attention.pgqa import PerturbedGroupedQueryAttention

__all__ = [
    "AgentAttention",
    "AgentCSwinAttention",
    "BiLevelRoutingAttention",
    "CombinerAttention",
    "CoreContextAttention",
    "DeformableTokenMerging",
    "DiffAttention",
    "DynamicGroupedQueryAttention",
    "GroupedDiffAttention",
    "GroupedQueryAttention",
    "HaloAttention",
    "HiLoAttention",
    "KeyDrivenGroupedQueryAttention",
    "LepeAttention",
    "MoHAttention",
    "MoHTransNeXtAggregated",
    "MoHTransNeXtGlobal",
    "MultiHeadAttention",
    "PerturbedGroupedQueryAttention",
    "apply_agent_sd",
    "auxiliary_loss",
    "cache_report",
    "grow_model",
    "grow_signal_heads",
    "published_schedule",
    "remove_agent_sd",
    "set_routed_topk",
    "set_training_step",
]
