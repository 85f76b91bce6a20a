"""The two times of a call on a GPU, on a simulated one: its queue, its clock and the host's."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_times

CUDA = torch.device("cuda")
CYCLES_PER_SECOND = 1.7e9


class Gpu:
    """A queue of launches that the GPU takes one by one, and that the host waits for when full."""

    def __init__(self, places=1000):
        self.now, self.idle_from, self.places = 0.0, 0.0, places
        self.pending, self.spins = [], 0

    def launch(self, host, seconds):
        self.now += host
        self.pending = [end for end in self.pending if end > self.now]
        if len(self.pending) >= self.places:
            self.now = self.pending[-self.places]
        self.idle_from = max(self.now, self.idle_from) + seconds
        self.pending.append(self.idle_from)

    def spin(self, cycles):
        self.spins += 1
        self.launch(5e-6, cycles / CYCLES_PER_SECOND)

    def wait(self, *_):
        self.now = max(self.now, self.idle_from)

    def event(gpu, enable_timing):
        class Event:
            def record(self):
                gpu.launch(1e-6, 0)
                self.at = gpu.idle_from

            def query(self):
                return self.at <= gpu.now

            def synchronize(self):
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        return Event()


@pytest.fixture
def gpu(monkeypatch):
    simulated = Gpu()
    monkeypatch.setattr(torch.cuda, "_sleep", simulated.spin)
    monkeypatch.setattr(torch.cuda, "Event", simulated.event)
    monkeypatch.setattr(torch.cuda, "synchronize", simulated.wait)
    monkeypatch.setattr(gpu_times.time, "perf_counter", lambda: simulated.now)
    return simulated


def interleave(runs, launches, rounds=5):
    return gpu_times.interleave(runs, launches, CUDA, rounds=rounds, sample_seconds=0.02)


def work(gpu, host, seconds, launches=1):
    """A call of this time on the host and on the GPU."""

    def run():
        for _ in range(launches):
            gpu.launch(host / launches, seconds / launches)

    return run


@pytest.mark.parametrize(
    ("host", "seconds", "launches"),
    [(1e-3, 350e-6, 6), (8e-4, 2e-5, 5), (1e-5, 2e-4, 1), (4e-3, 1e-2, 592), (9e-4, 15e-3, 20)],
)
def test_both_times_are_those_of_the_call(gpu, host, seconds, launches):
    run = work(gpu, host, seconds, launches)
    times = interleave({"a": run}, {"a": launches})["a"]
    assert times.median("device_s") == pytest.approx(seconds, rel=1e-3)
    assert times.median("call_s") == pytest.approx(max(host, seconds), rel=0.05)
    assert len(times.device_s) == len(times.call_s) == 5


@pytest.mark.parametrize(
    ("host", "seconds", "launches"),
    [(1e-3, 350e-6, 6), (8e-4, 2e-5, 5), (1e-5, 2e-4, 1), (4e-3, 1e-2, 592), (9e-4, 15e-3, 20)],
)
def test_the_time_on_the_gpu_takes_no_longer_to_measure_than_the_call(gpu, host, seconds, launches):
    ahead = gpu_times.HostAhead(
        work(gpu, host, seconds, launches), launches, CUDA, CYCLES_PER_SECOND, 0.02
    )
    begin = gpu.now
    ahead.sample()
    assert gpu.now - begin <= 0.0225


def test_a_call_of_many_launches_leaves_room_in_the_queue(gpu):
    run = work(gpu, 3e-4, 3e-4, launches=300)
    ahead = gpu_times.HostAhead(run, 300, CUDA, CYCLES_PER_SECOND, 0.02)
    before = gpu.spins
    assert ahead.sample() == pytest.approx(3e-4)
    assert gpu.spins == before + 1


def test_a_call_whose_launches_are_unknown_is_tried_with_fewer_calls(gpu):
    run = work(gpu, 3e-4, 2e-5, launches=250)
    times = interleave({"a": run}, {"a": None})["a"]
    assert times.median("device_s") == pytest.approx(2e-5, rel=1e-3)


def test_a_call_that_waits_for_the_gpu_has_no_time_there_and_soon_is_not_tried_again(gpu):
    def waits():
        gpu.launch(1e-5, 1e-4)
        gpu.wait()

    times = interleave({"waits": waits, "fine": work(gpu, 1e-5, 1e-4)}, {"waits": 1, "fine": 1})
    assert times["waits"].device_s == [] and times["waits"].median("device_s") is None
    assert times["waits"].median("call_s") == pytest.approx(1.1e-4, rel=0.05)
    assert times["fine"].median("device_s") == pytest.approx(1e-4, rel=1e-3)
    assert gpu.spins <= 20


def test_more_launches_than_the_queue_takes_give_no_time(gpu):
    run = work(gpu, 4e-3, 1e-3, launches=2130)
    times = interleave({"loop": run}, {"loop": 2130})["loop"]
    assert times.median("device_s") is None
    assert times.median("call_s") == pytest.approx(4e-3, rel=0.05)


def test_a_host_that_is_held_up_spoils_no_sample(gpu):
    calls = iter(range(10**6))

    def run():
        held_up = next(calls) % 97 == 0
        gpu.launch(3e-2 if held_up else 5e-4, 1e-4)

    times = interleave({"a": run}, {"a": 1}, rounds=20)["a"]
    assert len(times.device_s) == 20
    assert times.device_s == pytest.approx([1e-4] * 20, rel=1e-3)


def test_a_clock_that_speeds_up_after_it_was_measured_gives_no_wrong_time(gpu):
    run = work(gpu, 1e-3, 1e-4)
    ahead = gpu_times.HostAhead(run, 1, CUDA, CYCLES_PER_SECOND / 3, 0.02)
    assert ahead.sample() == pytest.approx(1e-4)


def test_the_speed_of_the_spin_is_measured(gpu):
    assert gpu_times.cycles_per_second() == pytest.approx(CYCLES_PER_SECOND, rel=1e-2)


def test_blocks_that_do_not_fit_are_told_in_their_line_and_stop_nothing(gpu, capsys):
    pytest.importorskip("triton")
    from benchmarks.gpu_choice.run import Timer

    def fails():
        raise RuntimeError("out of resource: shared memory\nin detail")

    timer = Timer(CUDA)
    timer("wide", fails, 1)
    timer("copy", work(gpu, 1e-5, 1e-4), 10**8)
    wide, copy = capsys.readouterr().out.splitlines()
    assert " ".join(wide.split()) == "wide RuntimeError: out of resource: shared memory"
    assert " ".join(copy.split()) == "copy 100.0 us 1000 GB/s"
