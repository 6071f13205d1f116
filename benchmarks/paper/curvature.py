"""Spectral norms of a Hessian that is known by its products with vectors alone."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

__all__ = ["Norms", "spectral_norms"]

Product = Callable[[Any], Any]
TOLERANCE = 1e-4  # relative: products in 32 bits are not much better
KRYLOV = 6  # vectors that Lanczos keeps: few will do, as the largest eigenvalue stands out


class Norms(NamedTuple):
    """Largest singular values, in the order of Proposition 4.2: none is above the one before it."""

    hessian: float  # of H
    of_gradient: float  # of P H: how fast the centralized gradient changes, at most
    in_hyperplane: float  # of P H P: the same, along the steps that GC leaves


def spectral_norms(hessian: Product, projection: Product, size: int) -> Norms:
    """Compute the norms of H, P H and P H P by Lanczos (ARPACK).

    Parameters
    ----------
    hessian, projection : callable
        Product of a vector (size,) with the symmetric matrix H, and with the projection P.
    """
    return Norms(
        abs(_dominant(hessian, size)),
        sqrt(_dominant(lambda v: hessian(projection(hessian(v))), size)),  # (P H)^T (P H)
        abs(_dominant(lambda v: projection(hessian(projection(v))), size)),
    )


def _dominant(product: Product, size: int) -> float:
    """Eigenvalue of the largest modulus, of a symmetric matrix."""
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    vectors = min(KRYLOV, size)
    (value,) = eigsh(operator, 1, v0=start, ncv=vectors, tol=TOLERANCE, return_eigenvectors=False)
    return float(value)
