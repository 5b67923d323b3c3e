"""The version, also where the package is not installed but on the path."""

__version__ = "0.1.0"
