"""Agreement between processes, here threads on a coordination service in memory."""

import concurrent.futures
import itertools
import signal
import threading

import jax
import pytest

from moejax.errors import UserError
from moejax.train import processes, sameness
from moejax.train.signals import AgreedStop, StopSignal


class Service:
    """What JAX's coordination service does, for threads."""

    def __init__(self, count):
        self._values, self._arrived = {}, threading.Condition()
        self._barriers, self._count = {}, count

    def key_value_set(self, key, value):
        with self._arrived:
            assert key not in self._values, f"{key} is set twice"
            self._values[key] = value
            self._arrived.notify_all()

    def blocking_key_value_get(self, key, timeout_in_ms):
        with self._arrived:
            assert self._arrived.wait_for(lambda: key in self._values, 10), f"{key} never came"
            return self._values[key]

    def key_value_dir_get(self, key):
        with self._arrived:
            return [(k, v) for k, v in self._values.items() if k.startswith(key)]

    def key_value_delete(self, key):
        assert key.endswith("/")
        with self._arrived:
            self._values = {k: v for k, v in self._values.items() if not k.startswith(key)}

    def wait_at_barrier(self, name, timeout_in_ms):
        with self._arrived:
            barrier = self._barriers.setdefault(name, threading.Barrier(self._count))
        barrier.wait(10)


class State(threading.local):
    """What JAX knows of a process; here each thread is one."""

    client, num_processes, process_id = None, 1, 0


@pytest.fixture
def run(monkeypatch):
    """Runs a function of the process's number in several processes; returns what each did."""
    state, numbers = State(), threading.local()
    monkeypatch.setattr(processes, "_state", lambda: state)
    monkeypatch.setattr(processes, "_next_exchange", lambda: next(numbers.exchange))
    monkeypatch.setattr(processes, "_next_barrier", lambda: next(numbers.barrier))

    def start(count, action):
        service = Service(count)

        def one(number):
            state.client, state.num_processes, state.process_id = service, count, number
            numbers.exchange, numbers.barrier = itertools.count(), itertools.count()
            try:
                return action(number)
            except UserError as error:
                return f"error: {error}"

        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))

    return start


def test_all_agree_only_if_all_do(run):
    assert run(3, lambda i: processes.all_agree(True)) == [True] * 3
    assert run(3, lambda i: processes.all_agree(i != 2)) == [False] * 3
    assert run(3, lambda i: processes.all_agree(i != 0)) == [False] * 3


def test_the_first_ones_values_count(run):
    assert run(3, lambda i: processes.from_first([i, 2**40, -1])) == [[0, 2**40, -1]] * 3
    assert run(2, lambda i: processes.from_first([] if i == 0 else [1])) == [[], []]


def test_calls_follow_each_other_and_are_not_mixed_up(run):
    def several(i):
        processes.barrier("a")
        return [processes.from_first([10 * n + i]) for n in range(5)]

    assert run(2, several) == [[[0], [10], [20], [30], [40]]] * 2


def test_the_first_acts_alone_and_before_the_others(run):
    order = []
    assert run(3, lambda i: processes.by_first(lambda: i + 5)) == [5, None, None]
    assert run(3, lambda i: processes.first_then_others(lambda: order.append(i) or i)) == [0, 1, 2]
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


@pytest.mark.parametrize("error", [UserError("the disk is full"), OSError("the disk is full")])
def test_an_error_of_the_first_stops_all(run, error):
    def fail():
        raise error

    def act(i):
        try:
            processes.by_first(fail)
        except (UserError, OSError) as raised:
            return str(raised)

    assert run(2, act) == ["the disk is full", "in process 0: the disk is full"]


SAME = "model.d_model = 32\nsteps = {}\nworkdir = 'runs/a'\n"


def test_equal_configs_pass(run):
    assert run(3, lambda i: sameness.check_same("the config", SAME.format(3))) == [None] * 3


def test_a_difference_names_process_host_and_path_everywhere(run, monkeypatch):
    monkeypatch.setattr(sameness.socket, "gethostname", lambda: f"host{processes.index()}")
    steps = [3, 3, 5]
    found = run(3, lambda i: sameness.check_same("the config", SAME.format(steps[i])))
    assert found[0] == found[1] == found[2]
    assert "process 2 (on host2) and process 0 (on host0) differ in the config" in found[0]
    assert "steps is 3 in process 0 and 5 in process 2:" in found[0]
    assert "d_model" not in found[0]


def test_a_difference_names_paths_that_one_lacks_and_cuts_long_lists(run):
    lines = ["", "".join(f"path{n} = {n}\n" for n in range(7))]
    found = run(2, lambda i: sameness.check_same("the config", lines[i]))[0]
    assert "path0 is (none) in process 0 and 0 in process 1" in found
    assert "path4" in found
    assert "path5" not in found
    assert "and 2 more" in found


def test_a_process_on_its_own_agrees_with_itself():
    assert processes.is_first()
    assert processes.num_processes() == 1
    assert processes.all_agree(True)
    assert not processes.all_agree(False)
    assert processes.from_first([1, 2]) == [1, 2]
    assert processes.first_then_others(lambda: 3) == 3
    processes.barrier("alone")
    sameness.check_same("the config", "a = 1\n")
    with pytest.raises(UserError, match="no space"):
        processes.by_first(lambda: (_ for _ in ()).throw(UserError("no space")))


ALL = {
    processes.COORDINATOR: "10.0.0.1:1234",
    processes.NUM_PROCESSES: "2",
    processes.PROCESS_ID: "1",
}


def test_the_environment_says_which_process_this_is():
    assert processes._settings({}) is None
    assert processes._settings({processes.COORDINATOR: "auto"}) == {}
    settings = processes._settings(ALL)
    assert settings["coordinator_address"] == "10.0.0.1:1234"
    assert (settings["num_processes"], settings["process_id"]) == (2, 1)


@pytest.mark.parametrize("missing", ALL)
def test_an_incomplete_environment_is_an_error(missing):
    given = {name: value for name, value in ALL.items() if name != missing}
    with pytest.raises(UserError, match=f"{missing} is not set"):
        processes._settings(given)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (processes.PROCESS_ID, "2", "MOEJAX_PROCESS_ID=2 must be"),
        (processes.PROCESS_ID, "-1", "MOEJAX_PROCESS_ID=-1 must be"),
        (processes.NUM_PROCESSES, "two", "MOEJAX_NUM_PROCESSES='two' must be a whole number"),
    ],
)
def test_a_wrong_environment_is_an_error(name, value, message):
    with pytest.raises(UserError, match=message):
        processes._settings(ALL | {name: value})


def test_a_process_on_its_own_stops_at_once():
    mesh = jax.make_mesh((8,), ("data",))
    with StopSignal() as stop:
        agreed = AgreedStop(stop, mesh)
        assert agreed.poll() is None
        signal.raise_signal(signal.SIGTERM)
        assert agreed.poll() == "SIGTERM"
        assert agreed.poll() == "SIGTERM"


def test_what_is_published_can_be_taken_once_and_nobody_waits(run):
    def action(number):
        if number:
            processes.publish("pace/1", f"from {number}")
        processes.barrier("published")
        if number:
            return None
        return processes.take_published("pace/1"), processes.take_published("pace/1")

    assert run(3, action)[0] == ({1: "from 1", 2: "from 2"}, {})


def test_a_process_on_its_own_publishes_nothing():
    processes.publish("pace/1", "mine")
    assert processes.take_published("pace/1") == {}
