"""The Reformer as a library: needs torch and nothing else of this project."""

from reformer.config import ConfigError, ReformerConfig, StrictConfig
from reformer.lsh.dispatch import lsh_attention
from reformer.model import Reformer
from reformer.weights import load_model, save_model

__all__ = ["ConfigError", "Reformer", "ReformerConfig", "StrictConfig", "load_model", "lsh_attention", "save_model"]
