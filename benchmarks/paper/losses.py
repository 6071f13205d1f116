"""Losses along training: their running mean, and how many steps it takes to a level."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["half_way_loss", "running_mean", "steps_to", "window_for"]

# The running mean of the loss is taken over this part of training.
_WINDOWS_IN_TRAINING = 50


def window_for(loss: Any) -> int:
    """How many steps the running mean of losses of shape (seeds, steps) is taken over."""
    return max(1, int(np.shape(loss)[1]) // _WINDOWS_IN_TRAINING)


def running_mean(loss: Any) -> tuple[Any, Any]:
    """Mean of the last losses, at each step that has a full window of them behind it.

    Parameters
    ----------
    loss : array, shape (seeds, steps)
        NaN counts as inf: it is of a run that diverged.

    Returns
    -------
    steps : array, shape (steps - window + 1,)
        After how many steps.
    means : array, shape (seeds, steps - window + 1)
        Over the last `window_for` losses.
    """
    loss = np.asarray(loss, dtype=np.float64)
    window = window_for(loss)
    finite = np.where(np.isnan(loss), np.inf, loss)
    means = np.lib.stride_tricks.sliding_window_view(finite, window, axis=1).mean(axis=-1)
    return np.arange(window, loss.shape[1] + 1), means


def half_way_loss(loss: Any) -> float:
    """Median over the runs of the running mean, where half of training is done."""
    steps, means = running_mean(loss)
    return float(np.median(means[:, np.searchsorted(steps, np.shape(loss)[1] // 2)]))


def steps_to(loss: Any, level: float) -> Any:
    """First step of each run at which the running mean is not above `level`; inf if none is."""
    steps, means = running_mean(loss)
    reached = np.isfinite(level) & (means <= level)
    return np.where(reached.any(axis=1), steps[reached.argmax(axis=1)], np.inf)
