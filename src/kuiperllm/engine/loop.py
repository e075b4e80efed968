"""Step after step: what `LLM`, the benchmark and whoever else runs a model have in common."""

from __future__ import annotations

from collections.abc import Callable, Generator

from kuiperllm.engine.decode_graph import Choice
from kuiperllm.engine.runner import Runner
from kuiperllm.engine.sampler import Sampler
from kuiperllm.engine.scheduler import Scheduler, Step
from kuiperllm.engine.sequence import Sequence

_Wait = Callable[[], list[int]]


class StepLoop:
    """Schedules, runs and samples until no sequence is left.

    While the host looks at the tokens of one decode step, the device already works on the next one. If a
    sequence turns out to have ended, what that step made for it is dropped.

    Args:
        scheduler: decides what each step works on.
        runner: runs it.
        sampler: chooses tokens where the device cannot do it by itself.
        stop_ids: ids that end a text.
    """

    def __init__(
        self, scheduler: Scheduler, runner: Runner, sampler: Sampler, stop_ids: frozenset[int] = frozenset()
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.stop_ids = stop_ids

    def run(self) -> Generator[Sequence, None, None]:
        """Yields a sequence each time a token was added to its `output_ids`.

        Whoever reads sets `finish_reason` and tells the scheduler when a sequence is finished.
        """
        step = self.scheduler.schedule()
        wait = self._start(step) if step is not None else None
        while step is not None and wait is not None:
            following = self._ahead(step)
            wait_following = self._start(following) if following is not None else None
            for sequence, token_id in zip(step.sequences, wait(), strict=False):
                if sequence.finish_reason is None:
                    sequence.output_ids.append(token_id)
                    yield sequence
            if following is None:
                following = self.scheduler.schedule()
                wait_following = self._start(following) if following is not None else None
            step, wait = following, wait_following

    def _ahead(self, step: Step) -> Step | None:
        """The step after this one, if it can be queued before the tokens of this one are known."""
        if self.runner.model.device.is_host or _choice(step) is None:
            return None
        following = self.scheduler.schedule_ahead(step)
        if following is None or not self.runner.follows(following, self.scheduler.pool.num_blocks):
            return None
        return following

    def _start(self, step: Step) -> _Wait:
        """Queue a step; the result waits for its tokens: none in the middle of a prompt."""
        num_blocks = self.scheduler.pool.num_blocks
        choice = _choice(step)
        if choice is not None:
            return self.runner.decode(step, num_blocks, choice)
        logits = self.runner.run(step, num_blocks)
        if logits is None:
            return list
        chosen = self.sampler.sample(logits, step.sequences, self.stop_ids)
        return lambda: chosen


def _choice(step: Step) -> Choice | None:
    """How the device chooses the tokens of a step by itself; None: it cannot."""
    if not step.is_decode or not all(Sampler.is_plain(sequence) for sequence in step.sequences):
        return None
    return "greedy" if all(sequence.params.greedy for sequence in step.sequences) else "sample"
