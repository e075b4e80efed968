"""The bookkeeping between two decode steps, where the tokens are: on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation

WRITES = ("input_ids", "positions", "seq_lens", "slot_mapping", "history", "step")

CONTRACT = Contract(
    "advance_step",
    writes=WRITES,
    tokens="S : int32",
    input_ids="S : int32",
    positions="S : int32",
    seq_lens="S : int32",
    slot_mapping="S : int64",
    block_table="S B : int32",
    history="R S : int32",
    step="1 : int32",
)


def advance_step(
    tokens: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_table: Tensor,
    block_size: int,
    history: Tensor,
    step: Tensor,
) -> None:
    """Make the tokens that a decode step chose the input of the next one.

    Each sequence's token becomes its input, its position and length grow by one, and its slot becomes that of
    the new position p: block_table[p // block_size] * block_size + p % block_size, or -1 where the table has
    no such block. The tokens are also written to row `step` % R of `history`, and `step` grows by one (it
    wraps to 0 behind the largest int32). A row whose slot is below -1 is padding, and nothing of it changes.

    Args:
        tokens: int32 [S].
        input_ids: int32 [S].
        positions: int32 [S], none negative.
        seq_lens: int32 [S].
        slot_mapping: int64 [S].
        block_table: int32 [S, B].
        block_size: tokens in a block.
        history: int32 [R, S] with R at least 1; may be memory of the host that the device can address.
        step: int32 [1], not negative.

    Raises:
        ShapeError: the shapes do not match, or `history` has no rows.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    sizes = CONTRACT.check(
        tokens, input_ids, positions, seq_lens, slot_mapping, block_table, history, step
    )  # fmt: skip
    if sizes["R"] == 0:
        raise ShapeError("advance_step: history has no rows")
    implementation("advance_step", tokens.device).advance_step(
        tokens, input_ids, positions, seq_lens, slot_mapping, block_table, block_size, history, step
    )


def reference(
    tokens: NDArray[Any],
    input_ids: NDArray[Any],
    positions: NDArray[Any],
    seq_lens: NDArray[Any],
    slot_mapping: NDArray[Any],
    block_table: NDArray[Any],
    block_size: int,
    history: NDArray[Any],
    step: NDArray[Any],
) -> tuple[NDArray[Any], ...]:
    """What each of `WRITES` becomes."""
    padding = slot_mapping < -1
    places = positions.astype(np.int64) + 1
    blocks, within = np.divmod(places, block_size)
    inside = blocks < block_table.shape[1]
    found = np.take_along_axis(block_table, np.where(inside, blocks, 0)[:, None], axis=1)[:, 0]
    slots = np.where(inside, found.astype(np.int64) * block_size + within, -1)
    written = history.copy()
    row = written[step[0] % len(history)]
    row[:] = np.where(padding, row, tokens)
    changed = (tokens, places.astype(np.int32), seq_lens + 1, slots)
    before = (input_ids, positions, seq_lens, slot_mapping)
    kept = (np.where(padding, old, new) for old, new in zip(before, changed, strict=True))
    return *kept, written, (step + 1) & np.int32(2**31 - 1)


def inputs(sequences: int, blocks: int, block_size: int, rows: int, step: int) -> Any:
    """Makes arguments for cases: sequences somewhere in their tables, the first at the end of its own."""

    def make(rng: np.random.Generator) -> dict[str, Any]:
        positions = rng.integers(0, blocks * block_size, sequences, np.int32)
        positions[:1] = blocks * block_size - 1  # the next position is behind the table
        slots = rng.integers(-1, 1000, sequences, np.int64)
        slots[3::4] = -2  # padding
        return {
            "tokens": rng.integers(0, 1000, sequences, np.int32),
            "input_ids": rng.integers(0, 1000, sequences, np.int32),
            "positions": positions,
            "seq_lens": positions + 1,
            "slot_mapping": slots,
            "block_table": rng.integers(0, 2**31 - 1, (sequences, blocks), np.int32),
            "block_size": block_size,
            "history": rng.integers(0, 1000, (rows, sequences), np.int32),
            "step": np.array([step], np.int32),
        }

    return make


CASES = [
    Case("one", advance_step, reference, inputs(1, 1, 1, 1, 0), writes=WRITES),
    Case("none", advance_step, reference, inputs(0, 2, 16, 2, 1), writes=WRITES),
    Case("batch", advance_step, reference, inputs(13, 7, 32, 4, 6), writes=WRITES),
    Case("many", advance_step, reference, inputs(300, 5, 16, 3, 2**31 - 1), writes=WRITES),
]
