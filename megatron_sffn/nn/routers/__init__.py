"""The selection methods. Each file has one method: its config, its module, its costs, test numbers.

To add a method, write its file, then add its config to `ROUTERS`.
"""

from __future__ import annotations

from megatron_sffn.nn.config import RouterConfig
from megatron_sffn.nn.routers.avg_k import AvgKConfig
from megatron_sffn.nn.routers.base import Router, Routing
from megatron_sffn.nn.routers.dense import DenseConfig
from megatron_sffn.nn.routers.lorkm import LoRKMConfig
from megatron_sffn.nn.routers.memory_plus import MemoryPlusConfig
from megatron_sffn.nn.routers.noisy_top_k import NoisyTopKConfig
from megatron_sffn.nn.routers.peer import PeerConfig
from megatron_sffn.nn.routers.pkm import PKMConfig
from megatron_sffn.nn.routers.pkm_ffn import PKMFFNConfig
from megatron_sffn.nn.routers.pkm_relu import PKMReLUConfig
from megatron_sffn.nn.routers.rand_hash import RandHashConfig
from megatron_sffn.nn.routers.remoe import ReMoEConfig
from megatron_sffn.nn.routers.s_base import SBaseConfig
from megatron_sffn.nn.routers.sigma_moe import SigmaMoEConfig
from megatron_sffn.nn.routers.softmax_after import SoftmaxAfterConfig
from megatron_sffn.nn.routers.softmax_before import SoftmaxBeforeConfig
from megatron_sffn.nn.routers.switch import SwitchConfig
from megatron_sffn.nn.routers.top_k_act import TopKActConfig
from megatron_sffn.nn.routers.vanilla_m import VanillaMConfig

ROUTERS: dict[str, type[RouterConfig]] = {
    config.name: config
    for config in (
        AvgKConfig,
        VanillaMConfig,
        LoRKMConfig,
        RandHashConfig,
        SwitchConfig,
        SigmaMoEConfig,
        SoftmaxBeforeConfig,
        SoftmaxAfterConfig,
        NoisyTopKConfig,
        SBaseConfig,
        ReMoEConfig,
        TopKActConfig,
        PKMConfig,
        PKMReLUConfig,
        PKMFFNConfig,
        PeerConfig,
        MemoryPlusConfig,
        DenseConfig,
    )
}
"""Value of `--sffn-router` -> config class."""

__all__ = ["ROUTERS", "Router", "RouterConfig", "Routing"]
