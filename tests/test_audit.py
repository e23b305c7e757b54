"""The report on known vulnerabilities calls nothing audited that was not."""

from tools.audit_dependencies import report


def test_a_vulnerability_has_a_line_of_its_own():
    flaw = {"id": "CVE-1", "fix_versions": ["2.0"]}
    found = [
        {"name": "a", "version": "1.0", "vulns": [flaw]},
        {"name": "b", "version": "1.0", "vulns": []},
    ]
    lines, audited = report(found)
    assert lines[0] == "a 1.0: CVE-1, mended in 2.0"
    assert lines[1].startswith("1 known vulnerabilities in 2 audited dependencies")
    assert audited == 2


def test_what_the_service_does_not_know_is_not_clean():
    lines, audited = report([{"name": "a", "skip_reason": "not found"}])
    assert audited == 0
    assert lines == [
        "0 known vulnerabilities in 0 audited dependencies; 1 of 1 could not be audited"
    ]
