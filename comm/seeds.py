"""Seeds that depend on what is drawn and not on when: a private generator for each (seed, step, rank, FQN, phase).

No global generator is used, so a method never changes a model's dropout, and a resumed run draws the same numbers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch

FIRST_PHASE, SECOND_PHASE = "send", "answer"
"""The phases of the two-phase route. Seeds are digests of these texts, so other texts would change the draws."""


@dataclass(frozen=True)
class Key:
    """Identifies a random draw. ``rank``: on the replicate axis; -1 for a draw that all peers share.

    ``phase``: the purpose, where one FQN has several draws in a step; `FIRST_PHASE` and `SECOND_PHASE` for what
    a compressor encodes.
    ``again``: how many exchanges this step has made for the same FQN before, one for each earlier backward pass.
    """

    seed: int
    step: int
    rank: int = -1
    fqn: str = ""
    phase: str = ""
    again: int = 0

    @property
    def shared(self) -> Key:
        """The key of the draw that all peers share for this FQN in this step, in both phases."""
        return replace(self, rank=-1, phase="")

    @property
    def second_phase(self) -> bool:
        """Whether what is encoded is the mean of what all ranks sent in the first phase."""
        return self.phase == SECOND_PHASE

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator on ``device``, seeded by the 63-bit BLAKE2b digest of this key."""
        fields = [str(self.seed), str(self.step), str(self.rank), self.fqn, self.phase]
        text = "\0".join(fields if not self.again else [*fields, str(self.again)])
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)
