"""Mosaic GPU kernels and the tile schedule that they share with the XLA path."""
