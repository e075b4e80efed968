"""Which tokens a text holds, and how often: what penalties depend on."""

from __future__ import annotations

from collections.abc import Sequence as List

import numpy as np
from numpy.typing import NDArray

_ROOM = 64  # for tokens yet to come, at first


class SeenTokens:
    """The different tokens of one text, in arrays that grow as it does.

    Args:
        prompt_ids: the prompt.
    """

    def __init__(self, prompt_ids: List[int]) -> None:
        distinct = dict.fromkeys(prompt_ids)
        self._places = {token_id: place for place, token_id in enumerate(distinct)}
        self._ids = np.zeros(len(distinct) + _ROOM, np.int32)
        self._ids[: len(distinct)] = list(distinct)
        self._counts = np.zeros(len(self._ids), np.int32)
        self._num_outputs = 0

    def update(self, output_ids: List[int]) -> None:
        """Take in the tokens that have been added to the output."""
        for token_id in output_ids[self._num_outputs :]:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._ids):
                self._ids, self._counts = (np.resize(a, 2 * len(a)) for a in (self._ids, self._counts))
                self._counts[place:] = 0
            self._ids[place] = token_id
            self._counts[place] += 1
        self._num_outputs = len(output_ids)

    @property
    def ids(self) -> NDArray[np.int32]:
        """Each token once."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.int32]:
        """How often the output holds each of `ids`; 0: only the prompt does."""
        return self._counts[: len(self._places)]
