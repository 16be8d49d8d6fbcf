"""Everything `fit` can be told, checked before any work.

A configuration is a frozen value, and JSON that holds no code.
"""

from fnlight.config.fit_config import FitConfig

__all__ = ["FitConfig"]
