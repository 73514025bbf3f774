"""The Reformer as a library: needs torch and nothing else of this project."""

from reformer.config import ConfigError, ReformerConfig, StrictConfig

__all__ = ["ConfigError", "ReformerConfig", "StrictConfig"]
