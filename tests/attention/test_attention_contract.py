"""What every attention method promises; found by walking the package."""

import pytest

import moejax.attention
from moejax.verification.contracts.attention import CHECKS, Case
from tests.contract import methods


@pytest.fixture(scope="module", params=methods(moejax.attention))
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_promise(case, check):
    check(case)
