"""What ends a decode step, replayed from a graph: each replay follows the one before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kuiperllm.core import Device
from kuiperllm.errors import ShapeError
from kuiperllm.ops import advance_step, greedy_step, sample_step
from kuiperllm.ops.cases import Case, to_tensors

CASES = {case.id: case for module in (advance_step, greedy_step, sample_step) for case in module.CASES}
REPLAYS = 5


def follow(case: Case, device: Device) -> None:
    arguments = case.arguments()
    case.function(**to_tensors(arguments, device))  # compiles the kernels
    tensors = to_tensors(arguments, device)
    with device.capture() as graph:
        case.function(**tensors)
    for name in case.writes:
        tensors[name].copy_(to_tensors({name: arguments[name]}, device)[name])
    truth: dict[str, Any] = dict(arguments)
    for _ in range(REPLAYS):
        graph.replay()
        truth.update(zip(case.writes, case.expected(truth), strict=True))
    for name in case.writes:
        np.testing.assert_array_equal(tensors[name].numpy(), truth[name], err_msg=name)


@pytest.mark.parametrize(
    "name",
    [
        "advance_step-batch",
        "greedy_step-batch",
        "greedy_step-long-rows",
        "sample_step-batch",
        "sample_step-long-rows",
    ],
)
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_replays_follow_each_other(name: str, where: str, request: pytest.FixtureRequest) -> None:
    follow(CASES[name], Device("cpu") if where == "cpu" else request.getfixturevalue("cuda"))


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_tokens_arrive_in_memory_of_the_host(where: str, request: pytest.FixtureRequest) -> None:
    device = Device("cpu") if where == "cpu" else request.getfixturevalue("cuda")
    arguments = CASES["greedy_step-batch"].arguments()
    history, tensor = device.backend.pinned(arguments["history"].shape, "int32")
    state = to_tensors({k: v for k, v in arguments.items() if k != "history"}, device)
    greedy_step.greedy_step(**state, history=tensor)
    greedy_step.greedy_step(**state, history=tensor)
    device.backend.record().wait()
    row, is_padding = int(arguments["step"][0]), arguments["slot_mapping"] < -1
    tokens = np.where(is_padding, 0, arguments["logits"].argmax(axis=1))
    for offset in range(len(history)):
        np.testing.assert_array_equal(history[(row + offset) % len(history)], tokens if offset < 2 else 0)


@pytest.mark.parametrize("step", [greedy_step.greedy_step, sample_step.sample_step])
@pytest.mark.parametrize(
    "change", [{"history": np.zeros((0, 37), np.int32)}, {"logits": np.zeros((37, 0), np.float32)}]
)
def test_nothing_to_choose_from_or_write_to(change: dict[str, Any], step: Any) -> None:
    arguments = {**CASES[f"{step.__name__}-batch"].arguments(), **change}
    with pytest.raises(ShapeError, match=rf"{step.__name__}: .*(no rows|no token)"):
        step(**to_tensors(arguments))
