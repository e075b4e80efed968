"""What tests of the engine check in several places."""

from __future__ import annotations

from kuiperllm.engine.core import Engine


def check_idle(engine: Engine) -> None:
    """No request is there, and every block is free."""
    pool, scheduler = engine.pool, engine.scheduler
    assert pool.num_free == pool.max_blocks
    assert sorted([*pool._free, *pool._kept]) == list(range(pool.num_blocks))
    assert set(pool._users) <= {0}
    assert not engine.has_work
    assert (scheduler.running, scheduler.num_waiting) == ([], 0)
    assert sorted(scheduler._rows) == list(range(scheduler.max_num_seqs))
    assert (engine._outputs, engine._streams) == ({}, {})
