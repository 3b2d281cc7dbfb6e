"""A GRU in NumPy some of whose values are held: what the step and the page are compared with."""

from __future__ import annotations

import numpy as np

__all__ = ["held_gru"]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def held_gru(cell, x, holds, *, after: bool) -> np.ndarray:
    """Return the states of one row, (steps, units), in float64.

    Arguments:
        cell: has the weights, in torch.nn's order.
        x: (steps, features).
        holds: numbers by the name of a value and the unit; or with a step from which it is held as a third.
        after: whether the reset gate acts after the product.
    """
    w_ih, w_hh, b_ih, b_hh = (value.detach().double().numpy() for value in cell.parameters())
    units = w_hh.shape[1]
    h, states = np.zeros(units), []
    for t, x_t in enumerate(x.double().numpy()):

        def held(name, value, t=t):
            for (each, unit, *begin), number in holds.items():
                if each == name and t >= sum(begin):
                    value[unit] = number
            return value

        i_r, i_z, i_n = np.split(w_ih @ x_t + b_ih, 3)
        h_r, h_z, h_n = np.split(w_hh @ h + b_hh, 3)
        r, z = held("r", sigmoid(i_r + h_r)), held("z", sigmoid(i_z + h_z))
        part = r * h_n if after else w_hh[2 * units :] @ (r * h) + b_hh[2 * units :]
        n = held("n", np.tanh(i_n + part))
        h = held("h", (1 - z) * n + z * h)
        states.append(h.copy())
    return np.stack(states)
