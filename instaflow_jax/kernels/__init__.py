"""Attention, convolution and group norm: one function each, which picks an implementation."""

KERNELS = ("auto", "xla")  # choices of the option `kernels`; "xla" turns every hand-written kernel off
