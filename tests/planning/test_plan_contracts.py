"""Every shipped contract is kept, and a broken one shows how, line by line.

`MOEJAX_UPDATE_CONTRACTS=1 pytest tests/planning/test_plan_contracts.py` rewrites those of simulated
devices (with the compiler's settings of the tests); read the diff. The others: `moejax plan` with
`--update-contract`, as their first line says.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os

import pytest

from moejax.errors import UserError
from moejax.planning import contract
from moejax.planning.plan import plan as make_plan
from moejax.planning.topology import parse
from moejax.planning.work import Exchange
from tests.planning import planned

ALL = sorted(planned.CONTRACTS.glob("*.txt"))
SIMULATED = [path for path in ALL if ".cpu-" in path.name]
CLUSTERS = [path for path in ALL if ".cpu-" not in path.name]


def test_there_are_some():
    assert len(SIMULATED) >= 4
    assert {path.name.partition(".")[0] for path in CLUSTERS} >= {
        "deepseek_v3",
        "gpt_oss_20b",
        "mixtral_8x7b",
        "olmoe_1b_7b",
        "qwen3_30b_a3b",
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", SIMULATED, ids=lambda path: path.stem)
def test_of_simulated_devices(path):
    if not path.name.endswith(f".jax-{planned.jax_minor()}.txt"):
        pytest.skip(f"it was compiled by another JAX, and this is {planned.jax_minor()}")
    config, overrides, topology = planned.command(path)
    found = planned.plan(config, overrides, topology)
    if os.environ.get("MOEJAX_UPDATE_CONTRACTS"):
        first = path.read_text().splitlines()[0].removeprefix("# ")
        contract.write(path, found, command=first)
    assert not contract.differences(contract.read(path), found)


@pytest.mark.aot
@pytest.mark.long
@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_of_clusters(path):
    package = "jax-cuda13-plugin" if ".h100-" in path.name else "libtpu"
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        pytest.skip(f"needs {package}")
    stated = contract.read(path)
    if f"{package} {importlib.metadata.version(package)}" not in stated[0]:
        pytest.skip(f"it was {stated[0]}")
    config, overrides, topology = planned.command(path)
    found = make_plan(planned.experiment(config, *overrides), parse(topology))
    assert not contract.differences(stated, found)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_contracts_of_clusters_are_of_configs_that_there_are(path):
    config, overrides, topology = planned.command(path)
    experiment, where = planned.experiment(config, *overrides), parse(topology)
    stated = dict(line.split(": ", 1) for line in contract.read(path))
    sizes = experiment.mesh.sizes(where.num_devices)
    assert stated["mesh"] == " ".join(f"{axis}={size}" for axis, size in sizes.items())
    assert stated["topology"] == topology
    tokens = experiment.batch_size * experiment.sequence_length
    assert stated["tokens per step"] == str(tokens)
    assert float(stated[contract.BUDGET].removesuffix(" MB")) * 1e6 <= where.chip.memory * 1.02
    assert stated["arrays of every expert on every token"] == "0"


@pytest.fixture
def plan():
    return planned.plan()


@pytest.mark.slow
class TestDifferences:
    """Of one compiled step and contracts that say something else."""

    def test_none_from_its_own_facts(self, plan):
        assert not contract.differences(contract.facts(plan), plan)

    def test_a_budget_is_an_upper_bound(self, plan):
        lines = contract.facts(plan)
        at = next(i for i, line in enumerate(lines) if line.startswith(contract.BUDGET))
        lines[at] = f"{contract.BUDGET}: 9999.0 MB"
        assert not contract.differences(lines, plan)
        lines[at] = f"{contract.BUDGET}: 0.1 MB"
        needed = f"+{contract.BUDGET}: {plan.memory.needed / 1e6:.3f} MB"
        assert contract.differences(lines, plan) == [f"-{contract.BUDGET}: 0.1 MB", needed]

    def test_one_more_collective_is_one_line(self, plan):
        lines = contract.facts(plan)
        call, count = max(plan.work.exchanges.items(), key=lambda item: item[0].num_bytes * item[1])
        more = plan.work.exchanges.copy()
        more[call] += 1
        changed = dataclasses.replace(plan, work=dataclasses.replace(plan.work, exchanges=more))
        axes = "+".join(call.axes)
        assert contract.differences(lines, changed) == [
            f"-{call.kind} over {axes} ({call.size}): {count} x {call.num_bytes} B",
            f"+{call.kind} over {axes} ({call.size}): {count + 1} x {call.num_bytes} B",
        ]

    def test_another_collective_is_one_line(self, plan):
        lines, more = contract.facts(plan), plan.work.exchanges.copy()
        more[Exchange("all-gather", ("tensor",), 2, 10**9)] = 3
        changed = dataclasses.replace(plan, work=dataclasses.replace(plan.work, exchanges=more))
        assert contract.differences(lines, changed) == [
            "+all-gather over tensor (2): 3 x 1000000000 B"
        ]

    def test_a_dense_expansion_is_one_line(self, plan):
        changed = dataclasses.replace(plan, expansions=["dot.1 [8, 64, 16]"])
        assert contract.differences(contract.facts(plan), changed) == [
            "-arrays of every expert on every token: 0",
            "+arrays of every expert on every token: 1",
        ]

    def test_another_compiler_alone_is_no_difference(self, plan):
        changed = dataclasses.replace(plan, versions={"jax": "9.9"})
        lines = contract.facts(plan)
        assert not contract.differences(lines, changed)
        # Beside another it may be its reason.
        assert len(contract.differences([*lines, "one: more"], changed)) == 3

    def test_it_is_written_and_read(self, plan, tmp_path):
        path = tmp_path / "contracts" / "a.txt"
        contract.write(path, plan, command="moejax plan a --topology cpu:8")
        assert path.read_text().startswith("# moejax plan a --topology cpu:8\n")
        assert contract.read(path) == contract.facts(plan)

    def test_a_contract_without_a_budget_is_refused(self, plan):
        with pytest.raises(UserError, match="has 0 lines 'memory budget: N MB' and needs one"):
            contract.differences(["mesh: data=1"], plan)
        with pytest.raises(UserError, match="is not 'memory budget: N MB'"):
            contract.differences(["memory budget: lots"], plan)

    def test_what_does_not_fit_has_none(self, plan):
        memory = dataclasses.replace(plan.memory, capacity=1)
        with pytest.raises(UserError, match="does not fit has no contract"):
            contract.facts(dataclasses.replace(plan, memory=memory))


def test_a_missing_contract_says_how_to_write_one(tmp_path):
    with pytest.raises(UserError, match="cannot be read .* write it with --update-contract"):
        contract.read(tmp_path / "none.txt")
