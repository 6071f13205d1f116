"""Layouts of einsum kernels."""

from __future__ import annotations


def kernel_letters(equation: str) -> str:
    """Find the layout of the kernel, the second operand: ``i`` for the axes that are summed.

    >>> kernel_letters("abc, cd -> abd")
    'io'
    """
    operands, output = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")[:2]
    return "".join(_letter(axis, inputs, output) for axis in kernel)


def _letter(axis: str, inputs: str, output: str) -> str:
    if axis not in output:
        return "i"
    return "b" if axis in inputs else "o"
