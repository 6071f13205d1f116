"""The two public functions: they check their arguments, and call a backend once."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from numbers import Real
from operator import index
from typing import Any, NamedTuple, TypeVar

from gcx._dispatch import backend_for, find_call, reshape
from gcx._memory import find_shared
from gcx._names import Layouts, flatten, layouts_for, leaves_like, naming, rebuild
from gcx.backends import Backend
from gcx.layout import Layout, LayoutLike, as_layout

OUTPUT_FIRST = Layout("o...")

ArrayT = TypeVar("ArrayT")
TreeT = TypeVar("TreeT")


def centralize(
    grad: ArrayT,
    /,
    *,
    layout: LayoutLike = OUTPUT_FIRST,
    axis: int | Sequence[int] | None = None,
    out: ArrayT | None = None,
    strength: float = 1.0,
    reproducible: bool = False,
) -> ArrayT:
    r"""Subtract from a gradient its mean over the fan-in, for each output unit.

    This is the projection :math:`P = I - e e^T` of Gradient Centralization, where all :math:`M`
    elements of :math:`e` are :math:`1/\sqrt{M}`, for a fan-in of :math:`M` elements.

    Parameters
    ----------
    grad : array
        Gradient of a weight: from NumPy, CuPy, torch, JAX or a library with the array API; of any
        shape and real or complex floating dtype.
    layout : Layout or str, optional
        One letter an axis: ``o`` output unit, ``i`` fan-in, ``b`` stack, ``...`` all other axes, as
        fan-in. torch and Equinox weights are ``"o..."``, the default; Flax, Haiku and Keras
        kernels are ``"...o"``. See `gcx.Layout`.
    axis : int or sequence of int, optional
        The fan-in axes, instead of a layout; may be negative.
    out : array, optional
        Array for the result, like `grad`; ``out=grad`` works in place. JAX arrays are immutable.
    strength : float, optional
        From 0 to 1: the part of the mean to subtract.
    reproducible : bool, optional
        Sum in one fixed order. The bits are then equal on NumPy, torch (CPU and CUDA), CuPy, and
        JAX on a CPU, for float16 to float64 and bfloat16. It takes twice the time or more.

    Returns
    -------
    array
        Of the same library, dtype, shape and device; `out` if given. If there is nothing to
        centralize (a bias, or a fan-in of 1, whose weight would freeze), `grad`, not copied.

    Raises
    ------
    TypeError
        If `grad` is not a dense floating array, `strength` is an array, both `layout` and `axis`
        are given, `out` cannot be written to, or `reproducible` does not support the dtype,
        library, device or a sharded fan-in.
    ValueError
        If the layout or the axes do not fit the shape, `out` does not match `grad`, or `strength`
        is not between 0 and 1.

    Notes
    -----
    Dtypes below 32 bits are computed in float32 and rounded once. NaN and infinity stay in their
    own output unit. If a sum of finite numbers overflows, its unit is right, infinite or NaN, by
    the order of summation. JAX on a CPU takes subnormal numbers for zero. In `jax.jit`, XLA may
    round the operations around a reproducible call in its own way; in `torch.compile` the call is
    a graph break.

    References
    ----------
    Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural Networks",
    ECCV 2020, equations (1) and (2). https://arxiv.org/abs/2004.01461

    Examples
    --------
    >>> import numpy as np
    >>> import gcx
    >>> gcx.centralize(np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    array([[-2., -1.,  3.],
           [-1., -1.,  2.]])
    """
    backend = backend_for(grad)
    seen, axes = see_fan_in(grad, layout, axis, reproducible=reproducible)
    if type(strength) is not float or strength != 1.0:
        strength = check_strength(strength)
    if out is not None:
        _check_out(out, grad, backend)
    if not axes:
        return _write(grad, out)
    if seen is grad:
        return backend.centralize(grad, axes, strength, out, reproducible)
    result = backend.centralize(seen, axes, strength, None, reproducible)
    return _write(reshape(result, grad.shape), out)  # type: ignore[attr-defined]


def centralize_many(
    grads: TreeT,
    /,
    *,
    layouts: Layouts = OUTPUT_FIRST,
    out: TreeT | None = None,
    strength: float = 1.0,
    reproducible: bool = False,
) -> TreeT:
    """Centralize the gradients in a list, tuple or dict, which may be nested.

    Parameters
    ----------
    grads : list, tuple or dict of arrays
        They may mix libraries. None, for no gradient, stays None.
    layouts : Layout, str, Plan, mapping or sequence, optional
        One layout for all; a plan; a list or tuple built like `grads`; or a mapping from paths
        (``"encoder/0/kernel"``) or globs (``"*/kernel"``) to layouts, where the first match counts.
        None leaves a gradient alone. `torch.compile` can trace one layout or a list.
    out : list, tuple or dict of arrays, optional
        Arrays for the results; ``out=grads`` works in place.
    strength, reproducible : optional
        As in `gcx.centralize`.

    Returns
    -------
    list, tuple or dict of arrays
        Built like `grads`.

    Raises
    ------
    TypeError, ValueError
        As in `gcx.centralize`, before any result is written; also if `layouts` or `out` are not
        built like `grads`, or an array of `out` overlaps another array.

    Examples
    --------
    >>> import numpy as np
    >>> import gcx
    >>> grads = {"dense": {"kernel": np.array([[1.0, 0.0], [3.0, 0.0]]), "bias": np.ones(2)}}
    >>> gcx.centralize_many(grads, layouts={"*kernel": "...o", "*bias": None})
    {'dense': {'kernel': array([[-1.,  0.],
           [ 1.,  0.]]), 'bias': array([1., 1.])}}
    """
    if not isinstance(grads, (list, tuple, dict)):
        raise TypeError(
            f"gcx.centralize_many takes a list, tuple or dict of arrays, not "
            f"{type(grads).__name__}; for one array use gcx.centralize"
        )
    strength = check_strength(strength)
    call = find_call(grads, layouts, out, reproducible)
    if call is not None and (repeated := call.repeat(strength)) is not None:
        return repeated  # type: ignore[no-any-return]
    named = flatten(grads)
    chosen = layouts_for(named, layouts, like=grads)
    outs = [None if out is None else grad for _, grad in named]
    if out is not None and out is not grads:
        outs = leaves_like(grads, out, what="out")
    # Every job is checked before the first one is run, so an error leaves `out` as it was.
    jobs = [
        _make_job(name, grad, layout, target, writes=out is not None, reproducible=reproducible)
        for (name, grad), layout, target in zip(named, chosen, outs, strict=True)
    ]
    if out is not None:
        _check_apart(jobs)
    results = _run(jobs, strength, reproducible)
    if call is not None and all(job.seen is job.grad for job in jobs):
        call.remember([job.axes for job in jobs])
    return rebuild(grads, results)  # type: ignore[no-any-return]


def see_fan_in(
    grad: ArrayT,
    layout: LayoutLike,
    axis: int | Sequence[int] | None = None,
    *,
    reproducible: bool = False,
) -> tuple[ArrayT, tuple[int, ...]]:
    """Check a gradient as `centralize` does; return it with its axes split, and its fan-in axes.

    There are none if the fan-in has one element: to subtract its mean would freeze the weight.
    """
    backend = backend_for(grad)
    backend.check_dtype(grad)
    shape = view = grad.shape  # type: ignore[attr-defined]
    if axis is not None:
        if layout is not OUTPUT_FIRST:
            raise TypeError("give layout or axis, not both: each says which axes are fan-in")
        axes = _check_axes(tuple(shape), axis)
    else:
        try:
            if (layout := as_layout(layout)).is_split:
                view, axes = layout.split(shape)
            else:  # the usual case, and quick
                axes = layout.fan_in_axes(len(shape))
        except ValueError as error:
            raise ValueError(f"{error} (gradient of shape {tuple(shape)})") from None
    # A size may be unknown in a lazy array, and is a symbol in a JAX export.
    size: float = 1
    for a in axes:
        size *= view[a] if isinstance(view[a], int) else nan
    if size < 2:
        axes = ()
    seen = grad if len(view) == len(shape) else reshape(grad, view)
    if reproducible and axes:
        backend.check_reproducible(seen, axes)
    return seen, axes


def _check_axes(shape: tuple[int, ...], axis: int | Sequence[int]) -> tuple[int, ...]:
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    try:
        axes = [index(a) for a in given]
    except TypeError:
        raise TypeError(f"axis is an integer or a sequence of integers, not {axis!r}") from None
    ndim = len(shape)
    found = sorted({a % ndim for a in axes if -ndim <= a < ndim})
    if len(found) < len(axes):
        raise ValueError(
            f"axis {axis} is out of range or named twice, for a gradient of shape {shape}"
        )
    return tuple(found)


def check_strength(strength: float) -> float:
    """Return `strength` as a Python float; a ValueError unless it is from 0 to 1."""
    if not isinstance(strength, (float, Real)) and hasattr(strength, "shape"):
        kind = type(strength).__name__
        raise TypeError(
            f"strength is a Python number, not a {kind}: give float(strength), static in jax.jit"
        )
    if not (isinstance(strength, (float, Real)) and 0.0 <= strength <= 1.0):
        raise ValueError(
            f"strength is the part of the mean to subtract, from 0 to 1, not {strength!r}"
        )
    return float(strength)


class _Job(NamedTuple):
    """A gradient, once checked."""

    name: str
    backend: Backend | None  # None without a gradient
    grad: Any
    seen: Any  # the gradient, reshaped if its layout splits an axis
    axes: tuple[int, ...]
    out: Any


def _make_job(
    name: str, grad: Any, layout: Layout | None, out: Any, *, writes: bool, reproducible: bool
) -> _Job:
    if grad is None:
        return _Job(name, None, None, None, (), None)
    seen: Any = grad
    axes: tuple[int, ...] = ()
    with naming(name):
        backend = backend_for(grad)
        if layout is not None:
            seen, axes = see_fan_in(grad, layout, reproducible=reproducible)
        if writes:
            _check_out(out, grad, backend)
    return _Job(name, backend, grad, seen, axes, out)


def _check_out(out: Any, grad: Any, backend: Backend) -> None:
    if out is not grad:
        with naming("out"):
            found = backend_for(out)
            if found is backend:
                backend.check_dtype(out)
        if found is not backend:
            raise TypeError(f"out is a {type(out).__name__}, the gradient a {type(grad).__name__}")
    if not backend.is_writable(out, grad):
        raise TypeError(
            f"out cannot be written to: this {type(out).__name__} is immutable, read-only, an "
            "inference tensor, expanded or with elements that share memory; or autograd or "
            "torch.func watches (then use torch.no_grad(), or no out)"
        )
    if out is not grad:
        check_traits("out", out, "the gradient", grad, ("shape", "dtype", "device"))


def check_traits(what: str, x: Any, whose: str, model: Any, traits: Sequence[str]) -> None:
    for trait in traits:
        found: list[Any] = [getattr(array, trait, None) for array in (x, model)]
        if found[0] != found[1]:
            mine, theirs = [tuple(size) for size in found] if trait == "shape" else found
            raise ValueError(f"{what} has {trait} {mine}, {whose} {theirs}")


def _check_apart(jobs: Sequence[_Job]) -> None:
    """Raise a ValueError if a result would be written over another array of the list."""
    uses = [
        (job.backend.find_memory(array), owner, array is job.out)
        for owner, job in enumerate(jobs)
        if job.backend is not None
        for array in ((job.out,) if job.out is job.grad else (job.grad, job.out))
    ]
    for one, other in find_shared(uses):
        raise ValueError(
            f"the out of {jobs[one].name} or {jobs[other].name} is in the memory of the other; "
            "give each result an array of its own"
        )


def _run(jobs: Sequence[_Job], strength: float, reproducible: bool) -> list[Any]:
    """Call each backend once, with all of its arrays; return the results in the order of `jobs`."""
    results = [None if job.axes else _write(job.grad, job.out) for job in jobs]
    left = [k for k, job in enumerate(jobs) if job.axes]
    while left:
        backend = jobs[left[0]].backend
        assert backend is not None
        mine = [k for k in left if jobs[k].backend is backend]
        left = [k for k in left if jobs[k].backend is not backend]
        here = [jobs[k] for k in mine]
        outs = [job.out if job.seen is job.grad else None for job in here]
        seen, axes = [job.seen for job in here], [job.axes for job in here]
        done = backend.centralize_many(seen, axes, strength, outs, reproducible)
        for k, (_, _, grad, x, _, out), result in zip(mine, here, done, strict=True):
            results[k] = result if x is grad else _write(reshape(result, grad.shape), out)
    return results


def _write(result: ArrayT, out: ArrayT | None) -> ArrayT:
    if out is None or out is result:
        return result
    out[...] = result  # type: ignore[index]
    return out
