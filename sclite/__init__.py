"""sclite: teach a small model to reason in steps and to correct itself, on one consumer GPU."""

__version__ = "0.1.0"
