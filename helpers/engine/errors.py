"""What can go wrong between ranks, each with a sentence for the reader."""

from __future__ import annotations


class RankError(RuntimeError):
    """A run has failed. The message names the rank and the cause, with that rank's traceback."""


class CommunicationError(RuntimeError):
    """An exchange between ranks has failed."""


class Mismatch(CommunicationError):
    """Two ranks are not in the same exchange, or bring arrays that do not fit."""


class Unanswered(CommunicationError):
    """A rank waited too long for another one."""


class PeerLost(CommunicationError):
    """The other rank has gone while it was still needed."""


class RunEnded(CommunicationError):
    """This rank was told to stop, because the run has failed elsewhere or was interrupted."""
