"""The step's caller: compiled in its own phase, dumped, and profiled where that is asked for."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import pytest

from moejax.errors import UserError
from moejax.train import phases, profiler, run_step
from moejax.train.phases import Phases
from moejax.train.profiler import Profiler, Window
from moejax.train.run_step import Inspection


@pytest.fixture
def told(monkeypatch):
    """The phases that were entered."""
    lines = []
    monkeypatch.setattr(phases, "_current", Phases(lines.append))
    return lines


@pytest.fixture
def compiled_times(unchecked):
    """How often a step was compiled, and the step: an array for a state, and one for a batch."""
    traced = []

    def step(state, batch):
        traced.append(1)
        return state + batch, {"loss": state.sum()}

    return traced, jax.jit(step, donate_argnums=0)


def test_the_step_is_compiled_once_in_a_phase_of_its_own(tmp_path, told, compiled_times):
    traced, step = compiled_times
    events = []
    listen = lambda name, *_, **__: events.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    state = jnp.ones(5)
    with run_step.RunStep(step, Inspection(), tmp_path, start=7) as call:
        events.clear()
        for _ in range(3):
            state, _ = call(state, jnp.ones(5))
    assert len(traced) == 1
    assert len(events) == 1
    assert state.tolist() == [4.0] * 5
    entered = [line.split('"')[3] for line in told]
    assert entered == ["compile", "start", "first step"]
    assert '"step": 7' in told[0]


@pytest.mark.parametrize(("start", "profiled"), [(6, [6, 9]), (7, [7, 10]), (8, []), (20, [])])
def test_a_window_that_is_over_is_not_profiled_again(
    tmp_path, told, traces, compiled_times, start, profiled
):
    inspection = Inspection(profile=Window(5, 3))
    with run_step.RunStep(compiled_times[1], inspection, tmp_path, start=start) as call:
        state = jnp.ones(5)
        for _ in range(5):
            state, _ = call(state, jnp.ones(5))
    assert len(traces) == len(profiled)


def test_the_program_is_dumped_lowered_and_compiled(tmp_path, told, compiled_times):
    with run_step.RunStep(compiled_times[1], Inspection(dump_hlo=True), tmp_path, start=0) as call:
        call(jnp.ones(5), jnp.ones(5))
    assert "stablehlo.add" in (tmp_path / "hlo" / "train_step.lowered.txt").read_text()
    assert "HloModule" in (tmp_path / "hlo" / "train_step.compiled.txt").read_text()


def test_a_plain_function_is_called_as_it_is_and_cannot_be_dumped(tmp_path, told, unchecked):
    def step(state, batch):
        return state + batch, {}

    with run_step.RunStep(step, Inspection(), tmp_path, start=0) as call:
        assert call(1, 2) == (3, {})
    with (
        pytest.raises(UserError, match="plain function"),
        run_step.RunStep(step, Inspection(dump_hlo=True), tmp_path, start=0) as call,
    ):
        call(1, 2)


def test_where_the_dump_cannot_be_written_it_says_so(tmp_path, told, compiled_times):
    (tmp_path / "hlo").write_text("a file")
    with (
        pytest.raises(UserError, match="--dump-hlo"),
        run_step.RunStep(compiled_times[1], Inspection(dump_hlo=True), tmp_path, start=0) as call,
    ):
        call(jnp.ones(5), jnp.ones(5))


@pytest.fixture
def traces(monkeypatch):
    """What the profiler was told."""
    log = []
    monkeypatch.setattr(profiler.jax.profiler, "start_trace", lambda folder: log.append(folder))
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", lambda: log.append("stop"))
    return log


def steps_profiled(traces, profile, first, last):
    """[first, last) of each window, from the order of calls."""
    windows = []
    for step in range(first, last):
        before = len(traces)
        profile.before_step(step, None)
        for what in traces[before:]:
            if what == "stop":
                windows[-1].append(step)
            else:
                windows.append([step])
    return windows


def test_a_window_is_the_steps_that_were_asked_for(tmp_path, traces):
    with Profiler(tmp_path, Window.parse("5:3")) as profile:
        assert steps_profiled(traces, profile, 0, 20) == [[5, 8]]
    assert traces[0] == str(tmp_path / "process-0")


def test_a_run_that_resumes_inside_a_window_profiles_from_there(tmp_path, traces):
    with Profiler(tmp_path, Window(5, 3)) as profile:
        assert steps_profiled(traces, profile, 6, 20) == [[6, 9]]


def test_a_window_that_the_run_ends_in_is_written(tmp_path, traces):
    with Profiler(tmp_path, Window(5, 30)) as profile:
        steps_profiled(traces, profile, 0, 7)
    assert traces[-1] == "stop"
    assert len(traces) == 2


def test_a_signal_profiles_the_next_three_steps_each_time(tmp_path, traces):
    previous = signal.getsignal(signal.SIGUSR2)
    with Profiler(tmp_path) as profile:
        assert steps_profiled(traces, profile, 0, 4) == []
        os.kill(os.getpid(), signal.SIGUSR2)
        assert steps_profiled(traces, profile, 4, 9) == [[4, 7]]
        os.kill(os.getpid(), signal.SIGUSR2)
        assert steps_profiled(traces, profile, 9, 14) == [[9, 12]]
    assert signal.getsignal(signal.SIGUSR2) is previous


def test_a_profile_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(folder):
        raise RuntimeError("only one profile may be run at a time")

    monkeypatch.setattr(profiler.jax.profiler, "start_trace", fail)
    with Profiler(tmp_path, Window(1, 2)) as profile:
        assert steps_profiled([], profile, 0, 9) == []
    assert "no profile of step 1: only one profile" in caplog.text


def test_outside_the_main_thread_a_window_still_works(tmp_path, traces):
    windows = []

    def run():
        with Profiler(tmp_path, Window(1, 1)) as profile:
            windows.extend(steps_profiled(traces, profile, 0, 4))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert windows == [[1, 2]]


def test_a_real_profile_is_written(tmp_path):
    with Profiler(tmp_path, Window(1, 1)) as profile:
        state = jnp.ones(3)
        for step in range(4):
            profile.before_step(step, state)
            state = state + 1
    assert list(tmp_path.glob("process-0/plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("text", ["5", "5:", ":5", "5:0", "a:b", "-1:2", "5:2:1"])
def test_a_window_that_is_none_is_an_error(text):
    with pytest.raises(UserError, match="STEP:COUNT"):
        Window.parse(text)
