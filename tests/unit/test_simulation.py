"""The simulated cluster of ``benchmarks.simulation``, small, with many faults."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.simulation import Scenario, Simulation

FAULTS: dict[str, Any] = {"lost": 0.5, "dying": 0.05, "straggling": 0.05}


@pytest.mark.parametrize("speculation", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_every_task_ends_whatever_happens(seed: int, speculation: bool) -> None:
    scenario = Scenario(nodes=6, slots=4, tasks=500, seed=seed, speculation=speculation, **FAULTS)
    simulation = Simulation(scenario)
    simulation.run()  # raises when a task is given up
    assert simulation.core.committed == 500
    assert simulation.core.kinds[0].retries > 0, "there were no faults"
    assert simulation.now >= simulation.bound_s


def test_without_faults_the_makespan_is_near_the_bound() -> None:
    quiet: dict[str, Any] = dict.fromkeys(FAULTS, 0.0)
    simulation = Simulation(Scenario(nodes=10, slots=8, tasks=2000, weight_sigma=0.0, **quiet))
    simulation.run()
    assert simulation.now <= 1.02 * simulation.bound_s


def test_same_seed_same_course() -> None:
    runs = [Simulation(Scenario(nodes=5, slots=4, tasks=200, seed=3, **FAULTS)) for _ in range(2)]
    for simulation in runs:
        simulation.run()
    assert runs[0].events == runs[1].events
    assert runs[0].ends == runs[1].ends


def test_second_attempts_shorten_a_job_with_stragglers() -> None:
    makespans = []
    for speculation in (False, True):
        scenario = Scenario(
            nodes=8, slots=4, tasks=200, lost=0, dying=0, straggling=0.02, slowdown=100.0,
            speculation=speculation,
        )  # fmt: skip
        simulation = Simulation(scenario)
        simulation.run()
        makespans.append(simulation.now)
    assert makespans[1] < makespans[0] / 5
