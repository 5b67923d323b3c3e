"""Runs a kernel's PTX on a CPU, and reports what a GPU would do wrong in silence.

`launch` gets PTX and launch parameters from the compiler, `program` parses, `machine` runs blocks of `warpgroup`s. They
compute by `arithmetic` and `tensor_cores`, have `registers` and `memory`, and meet at `barriers`; `transfers` is TMA.
The 128 lanes of a warpgroup go in step, warpgroups and transfers in a random order, by a seed.

Docstrings name the PTX ISA's sections by their headings, since their numbers change.
"""
