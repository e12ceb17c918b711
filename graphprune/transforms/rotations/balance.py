"""The combinations of units in which what is held and what is used of it are alike and apart."""

from __future__ import annotations

import torch
from torch import Tensor

from graphprune.calibration.damping import damped

_DAMP = 1e-6
"""What is added to the diagonal of a Gramian, as a part of its mean: bounds how far apart the
lengths of new units can be, and so what rounding makes of them."""


def balanced(held: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Return the combinations that balance two Gramians, and how much each matters.

    In the new units both Gramians are one diagonal matrix S: ``Tᵀ held T = S = T⁻¹ used T⁻ᵀ``. For
    values x with second moments ``held``, multiplied with W where ``used`` is W Wᵀ, cutting the
    last units gives the best product of that rank, by the singular value decomposition of
    held^½ W: what a cut changes of x W is, squared and in the mean, the sum of the squares of S
    that go. Linear systems are balanced so (Moore 1981); for values and outputs it is type III of
    MoDeGPT (Lin et al., 2408.09632, section 3.2).

    Parameters
    ----------
    held, used
        ``[parents, units, units]``, float64, positive semidefinite.

    Returns
    -------
    tuple
        T, ``[parents, units, units]`` (the new units are its columns), and S, ``[parents, units]``
        from the largest on.

    Examples
    --------
    >>> held, used = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 1.0]))
    >>> balanced(held[None].double(), used[None].double())[1].round(decimals=3).tolist()
    [[3.0, 2.0]]
    """
    left, right = (torch.linalg.cholesky(damped(each, _DAMP)) for each in (held, used))
    u, values, _ = torch.linalg.svd(left.mT @ right)
    mixing = torch.linalg.solve_triangular(left.mT, u * values.sqrt()[:, None, :], upper=True)
    return mixing, values


def principal(held: Tensor) -> tuple[Tensor, Tensor]:
    """Return the orthogonal combinations with the largest second moments first, and these.

    Principal components, as SliceGPT takes them (Ashkboos et al., 2401.15024, section 3.3).

    Parameters
    ----------
    held
        ``[parents, units, units]``, float64, positive semidefinite.

    Returns
    -------
    tuple
        As `balanced`; what matters is the square root of a second moment.
    """
    values, vectors = torch.linalg.eigh(held)
    return vectors.flip(-1), values.flip(-1).clamp(min=0).sqrt()
