"""PowerSGD: gradients of weight matrices travel as matrices of low rank."""

from __future__ import annotations

import numpy as np

from helpers.engine.collectives import all_reduce
from helpers.parallel.compression import Exchanged, check_count, checked


class PowerSGD:
    """Matrices of low rank: M (m, n) travels as P (m, r) and Q (n, r), and their sums add up.

    One step of a power iteration, started from the last step's Q (Vogels, Karimireddy and Jaggi
    2019, "PowerSGD: practical low-rank gradient compression", algorithm 1): P = M Q, summed over
    the ranks and made orthonormal; then Q = Mᵀ P, summed too. P Qᵀ is near M. Biases, and matrices
    of one column, travel as they are.

    Parameters
    ----------
    mlp : helpers.nn.MLP
        The network, which says where in the gradient its matrices lie.
    rank : int
        The rank r, 1 or more. Smaller matrices take the smaller of their sides.
    seed : int
        Of the first Q. The same on all ranks.

    Raises
    ------
    ValueError
        The rank is below 1, or larger than any matrix of the network allows.

    Examples
    --------
    >>> from helpers.nn import MLP
    >>> mlp = MLP((36, 64, 1))
    >>> payload = PowerSGD(mlp, rank=2).compress(mlp.initialise(seed=0))
    >>> [array.shape for array in payload]
    [(36, 2), (64, 2), (129,)]
    """

    def __init__(self, mlp, rank, seed=0):
        check_count("rank", rank, "columns of P and Q")
        matrices = [shape for shape in mlp.shapes if min(shape) > 1]
        most = max(map(min, matrices), default=0)
        if rank > most:
            raise ValueError(
                f"rank is {rank}, but no matrix of the network {mlp.widths} has more than {most}: "
                "choose a smaller rank."
            )
        random = np.random.default_rng(seed)
        self.mlp = mlp
        self._q = [random.normal(size=(n, min(rank, m, n))) for m, n in matrices]

    def compress(self, gradient, mean=None):
        """``(P, Q, P, Q, …, rest)``: two arrays a matrix, and all that is not compressed.

        Parameters
        ----------
        gradient : float array of shape (size,)
        mean : callable, optional
            Gives the mean over all ranks of an array. Default: this rank is alone.
        """
        matrices, rest = self._parts(checked(gradient))
        payload = []
        for m, q in zip(matrices, self._q):
            p = m @ q.astype(m.dtype)
            p, _ = np.linalg.qr(mean(p) if mean else p)
            payload += [p, m.T @ p]
        return (*payload, rest)

    def decompress(self, payload, size):
        """P Qᵀ for each matrix, and the rest as it is."""
        gradient = np.empty(size, payload[-1].dtype)
        start = 0
        pairs = iter(zip(payload[:-1:2], payload[1:-1:2]))
        for w, b in self.mlp.views(gradient):
            for part in (w, b):
                if min(part.shape) > 1 and part.ndim == 2:
                    p, q = next(pairs)
                    np.matmul(p, q.T, out=part)
                else:
                    part.ravel()[:] = payload[-1][start : start + part.size]
                    start += part.size
        return gradient

    def mean_gradient(self, group, gradient) -> Exchanged:
        """As the function `mean_gradient`. The next step begins with this one's Q."""

        def mean(array):
            return all_reduce(group, array) / group.size

        payload = self.compress(gradient, mean)
        # All ranks have the same P, so the mean of P Qᵀ is P times the mean of Q.
        together = [p if at % 2 == 0 else mean(p) for at, p in enumerate(payload[:-1])]
        together.append(mean(payload[-1]))
        self._q = together[1:-1:2]
        mean_of_all, sent = (self.decompress(p, gradient.size) for p in (together, payload))
        return Exchanged(mean_of_all, sent, sum(array.nbytes for array in payload))

    def _parts(self, gradient):
        """The matrices as views, and the other numbers as one array."""
        arrays = [array for layer in self.mlp.views(gradient) for array in layer]
        is_matrix = [array.ndim == 2 and min(array.shape) > 1 for array in arrays]
        rest = [array.ravel() for array, matrix in zip(arrays, is_matrix) if not matrix]
        return [a for a, matrix in zip(arrays, is_matrix) if matrix], np.concatenate(rest)
