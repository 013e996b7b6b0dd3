"""When things happen: closed forms where there are some, and laws where there are none."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain import diloco, every_step, local_sgd, streaming_diloco
from dtrain.comm.clock.channel import Machine
from dtrain.comm.clock.clock import Clock, Engine
from dtrain.comm.clock.failures import Failures
from dtrain.comm.clock.network import Level, Link, Network
from dtrain.comm.clock.speeds import Speeds
from dtrain.comm.clock.step import Layer, Parameter, Step
from dtrain.comm.runtime.method import Sync

MIB = 1 << 20
WHOLE = {"w": (1 << 16,)}


def between(rate: float, latency: float = 0.0, count: int = 2) -> Network:
    return Network((Level("nodes", count, Link(rate, rate, latency, latency)),), "ring")


def quiet(every_steps: int) -> Sync:
    return local_sgd(every_steps=every_steps, verify_every=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(1, 6), st.floats(1e4, 1e9), st.floats(0, 0.5), st.floats(0.01, 2))
def test_rounds_that_are_not_overlapped_take_the_steps_and_the_exchange(
    world: int, steps: int, rate: float, latency: float, seconds: float
) -> None:
    """benchmarks.md section 7: u = H T / (H T + T_comm), with v = 2 (n - 1) / n and 1 + (n - 1) hops in two phases."""
    clock = Clock(quiet(every_steps=steps), Step.even(WHOLE, seconds), between(rate, latency, world))
    walked = clock.train(3 * steps)
    chunk = 4 * -(-(1 << 16) // world)
    exchange = (world - 1) * (chunk + 4) / rate + (world - 1) * (chunk + 1) / rate + world * latency
    assert walked.seconds == pytest.approx(3 * (steps * seconds + exchange), rel=1e-9)
    assert walked.utilization == pytest.approx(steps * seconds / (steps * seconds + exchange), rel=1e-9)
    assert walked.exposed_seconds == pytest.approx(3 * exchange, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(0, 4), st.floats(1e4, 1e7))
def test_an_overlap_hides_as_many_steps_of_an_exchange(steps: int, overlap: int, rate: float) -> None:
    """U = H T / (H T + max(0, T_comm - tau T)), where one exchange ends before the next begins."""
    steps += overlap
    sync = streaming_diloco(every_steps=steps, layers_per_fragment=1, overlap_steps=overlap, verify_every=0)
    shapes = {"layers.0.w": (1 << 16,)}
    clock = Clock(sync, Step.even(shapes, 0.5), between(rate))
    clock.train(steps + overlap)
    walked = clock.train(4 * steps)
    exchange = sum(span[1] - span[0] for span in [(0.0, (count.bytes / count.messages) / rate)
                   for (_, label, _), count in clock.meter.by.items() if label == "round"])  # fmt: skip
    assert walked.seconds == pytest.approx(4 * (steps * 0.5 + max(0.0, exchange - overlap * 0.5)), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.floats(1e3, 1e7), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0, 0.2))
def test_data_parallelism_hides_what_the_backward_pass_hides(
    rate: float, forward: float, backward: float, optimizer: float
) -> None:
    """DDP: T_fwd + max(T_bwd, T_comm) + T_opt, the exchange of one layer's gradients with the pass of the other."""
    layers = [Layer((Parameter(f"layers.{n}.w", (4096,)),), forward / 2, backward / 2) for n in range(2)]
    clock = Clock(
        every_step(verify_every=0, route="all_reduce"), Step(tuple(layers), optimizer), between(rate),
        engine=Engine("ddp", bucket_mib=4096 * 4 / MIB),
    )  # fmt: skip
    clock.train(1)  # in its first step DDP has one bucket
    walked = clock.train(3)
    one = 4096 * 4 / rate
    expected = forward + backward / 2 + max(backward / 2, one) + one + optimizer
    assert walked.seconds == pytest.approx(3 * expected, rel=1e-9)


def test_replicas_wait_for_the_slowest_at_each_exchange_only() -> None:
    step = Step.even(WHOLE, 1.0)
    slow = Speeds(slow=((1, 2.0),))
    assert Clock(quiet(every_steps=5), step, between(math.inf, count=4), speeds=slow).train(10).seconds == 20
    jitter = Speeds(jitter=0.3, seed=3)
    often, seldom = (
        Clock(quiet(every_steps=h), step, between(math.inf, count=64), speeds=jitter).train(40) for h in (1, 20)
    )
    assert seldom.seconds < 0.8 * often.seconds
    assert often.compute_seconds == pytest.approx(seldom.compute_seconds)


def test_knobs_that_are_auto_are_chosen_by_the_clocks_own_time() -> None:
    chosen = []
    for rate in (1e5, 1e9):
        clock = Clock(diloco(every_steps="auto"), Step.even(WHOLE, 0.1), between(rate))
        clock.train(30)
        chosen += [decision for decision in clock.attached.decisions if "every_steps" in decision]
    assert len(chosen) == 2 and chosen[0] != chosen[1]


def test_arithmetic_takes_time_where_memory_has_a_rate() -> None:
    def seconds(rate: float) -> float:
        clock = Clock(quiet(every_steps=1), Step.even(WHOLE, 1.0), between(1e6), machine=Machine(bytes_per_second=rate))
        return clock.train(4).seconds

    assert seconds(1e9) > seconds(math.inf)
    assert seconds(1e9) - seconds(math.inf) == pytest.approx((seconds(5e8) - seconds(math.inf)) / 2, rel=1e-6)


def test_a_thread_on_the_programs_core_takes_its_time_from_it() -> None:
    sync = streaming_diloco(every_steps=2, layers_per_fragment=1, overlap_steps=1, verify_every=0)
    shapes = {"layers.0.w": (1 << 16,)}

    def seconds(one_core: bool, rate: float) -> float:
        machine = Machine(bytes_per_second=1e7, one_core=one_core)
        return Clock(sync, Step.even(shapes, 1.0), between(rate), machine=machine).train(20).seconds

    assert seconds(True, 1e9) > seconds(False, 1e9) + 0.5
    slow = 1e5  # the program waits for the link, and the thread has the core
    assert seconds(True, slow) - seconds(False, slow) < seconds(True, 1e9) - seconds(False, 1e9)


def test_a_failure_costs_the_steps_since_the_checkpoint_and_the_restart() -> None:
    step = Step.even(WHOLE, 1.0)
    failures = Failures(60, checkpoint_every_steps=10, detect_seconds=0, restart_seconds=5, seed=1)
    moment = next(failures.moments())
    clock = Clock(quiet(every_steps=10), step, between(math.inf), failures=failures)
    steps = math.ceil(moment)
    walked = clock.train(steps)
    assert walked.failures == 1
    assert walked.seconds == pytest.approx(steps + moment % 10 + 5)
    assert walked.goodput == pytest.approx(steps / walked.seconds)


def test_members_lose_one_replica_for_a_while_and_no_step() -> None:
    step = Step.even(WHOLE, 1.0)

    def walk(policy: str) -> tuple[float, float, int]:
        failures = Failures(30, policy=policy, detect_seconds=2, restart_seconds=60, seed=2)  # type: ignore[arg-type]
        clock = Clock(diloco(every_steps=10), step, between(1e7, 0.01, 16), failures=failures)
        walked = clock.train(400)
        return walked.seconds, walked.goodput, walked.failures

    (restart, good, failed), (members, better, lost) = walk("restart"), walk("members")
    assert failed > 0 and lost > 0
    assert members < restart and better > good
    with pytest.raises(ValueError, match="policy=restart"):
        Clock(every_step(), step, between(1e7), failures=Failures(1, policy="members"))


def test_ten_thousand_replicas_of_a_hundred_layers() -> None:
    """Issue 25, line 6, with room for a busy machine: benchmarks/simulation.py measures it."""
    shapes = {f"layers.{layer}.{name}.weight": (1 << 20,) for layer in range(100) for name in ("attention", "mlp")}
    started = time.process_time()
    clock = Clock(
        streaming_diloco(every_steps=100, layers_per_fragment=3), Step.even(shapes, 60.0),
        Network.of("link=10gbit,10ms nodes=10000 backend=doubling"), failures=Failures(1, policy="members"),
    )  # fmt: skip
    walked = clock.train(210)
    assert time.process_time() - started < 30
    assert walked.failures > 0 and 0.99 < walked.goodput < 1


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Step(()), "without parameters"),
        (lambda: Step.even({"w": (2,)}, -1.0), "takes -"),
        (lambda: Failures(0), "above 0"),
        (lambda: Failures(1, restart_seconds=-1), "0 or more"),
        (lambda: Speeds(slow=((1, 0.0),)), "above 0"),
        (lambda: Speeds(slow=((5, 2.0),)).of_step(0, 2), "5 ranks are slow"),
        (lambda: Clock(diloco(), Step.even(WHOLE, 1.0), between(1e6), engine=Engine("horovod")), "choose module, ddp"),
    ],
)
def test_what_cannot_be_is_refused_in_words(make: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()  # type: ignore[operator]
