"""Old name of `gcx._names`."""

from gcx._names import flatten, leaves_like, naming, rebuild

__all__ = ["flatten", "leaves_like", "naming", "rebuild"]
