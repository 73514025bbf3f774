"""The Reformer as a library: needs torch and nothing else of this project."""

from reformer.config import ConfigError, ReformerConfig, StrictConfig
from reformer.lsh import lsh_attention
from reformer.model import Reformer

__all__ = ["ConfigError", "Reformer", "ReformerConfig", "StrictConfig", "lsh_attention"]
