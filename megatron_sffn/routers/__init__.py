"""The selection methods, one file each: a config and a module.

To add one: write the file, then add its config to `ROUTERS` (and its name to the tests' list).
"""

from __future__ import annotations

from megatron_sffn.config import RouterConfig
from megatron_sffn.routers.avg_k import AvgKConfig
from megatron_sffn.routers.base import Router, Routing
from megatron_sffn.routers.dense import DenseConfig
from megatron_sffn.routers.rand_hash import RandHashConfig
from megatron_sffn.routers.switch import SwitchConfig
from megatron_sffn.routers.vanilla_m import VanillaMConfig

ROUTERS: dict[str, type[RouterConfig]] = {
    config.name: config
    for config in (AvgKConfig, VanillaMConfig, RandHashConfig, SwitchConfig, DenseConfig)
}
"""Value of `--sffn-router` -> config class."""

__all__ = ["ROUTERS", "Router", "RouterConfig", "Routing"]
