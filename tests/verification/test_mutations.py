"""`moejax verify` finds every planted bug, and nothing in the code without it.

The command is the unmodified one, in a process of its own, on a copy of the package with one patch.
"""

import pytest

from tests.verification.mutations import MUTATIONS
from tests.verification.planting import (
    Mutation,
    copy_package,
    first_wrong,
    plant,
    run,
    verify_command,
)

QUICKEST = ("padding-in-z-loss",)


def _marked(mutation: Mutation):
    mark = pytest.mark.slow if mutation.name in QUICKEST else pytest.mark.long
    return pytest.param(mutation, id=mutation.name, marks=mark)


@pytest.mark.parametrize("mutation", [_marked(m) for m in MUTATIONS])
def test_verify_catches(mutation, tmp_path):
    copy_package(tmp_path)
    plant(mutation, tmp_path)
    done = run(mutation.command(), tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    line = first_wrong(done.stdout)
    assert line.startswith(f"{mutation.variant} in float64"), done.stdout
    assert f"first wrong tensor: {mutation.caught}" in line, done.stdout
    print(f"{mutation.story}: {line}")


def _settings() -> dict[tuple, list[str]]:
    """{(config, overrides): the variants that mutations are looked for in}."""
    found: dict[tuple, list[str]] = {}
    for mutation in MUTATIONS:
        chosen = found.setdefault((mutation.config, mutation.overrides), [])
        if mutation.variant not in chosen:
            chosen.append(mutation.variant)
    return found


@pytest.mark.long
@pytest.mark.parametrize("config, overrides", list(_settings()))
def test_verify_passes_without_a_mutation(config, overrides, tmp_path):
    copy_package(tmp_path)
    done = run(verify_command(config, overrides, _settings()[config, overrides]), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "comparisons agree" in done.stdout
    assert "not possible" not in done.stdout


def test_every_mutation_fits_the_code(tmp_path):
    for mutation in MUTATIONS:
        folder = tmp_path / mutation.name
        copy_package(folder)
        plant(mutation, folder)
    assert len(MUTATIONS) >= 20


def test_a_mutation_whose_text_is_gone_is_an_error(tmp_path):
    copy_package(tmp_path)
    plant(MUTATIONS[0], tmp_path)
    with pytest.raises(ValueError, match="0 times, not once"):
        plant(MUTATIONS[0], tmp_path)
