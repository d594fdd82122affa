"""Runs an objective: one process or many, whole batches or parts. The training loop sees no difference."""

from evaclip.engine.contract import Batch, EngineConfig, Objective, OptimizerBuilder
from evaclip.engine.data_parallel import Engine
from evaclip.engine.fully_sharded import FullyShardedEngine
from evaclip.engine.zero import ZeroEngine

__all__ = ["Batch", "Engine", "EngineConfig", "Objective", "build_engine"]


def build_engine(config: EngineConfig, objective: Objective, optim: OptimizerBuilder) -> Engine:
    """The engine that the configuration names; it takes the objective to its device."""
    if config.kind == "fsdp2":
        return FullyShardedEngine(config, objective, optim)
    objective.to(config.resolved_device())
    if config.kind in ("zero1", "zero2"):
        return ZeroEngine(config, objective, optim)
    optimizer = optim.build(objective.student, objective.layers(), flat=False)
    return Engine(config, objective, optimizer, optim.clip_norm)
