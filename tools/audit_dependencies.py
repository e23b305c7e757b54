"""Known vulnerabilities of the pinned dependencies, as `pip-audit` finds them.

    make audit

Prints one line for every vulnerability, and how many versions the service knows nothing about:
those were not audited, which `pip-audit` itself counts as clean. Exits with 1 where a
vulnerability is known, and with 3 where nothing could be audited.
"""

from __future__ import annotations

import json
import subprocess
import sys

_COMMAND = ["-r", "constraints.txt", "--no-deps", "--disable-pip", "--progress-spinner", "off"]


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", *_COMMAND, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"pip-audit gave no report: {done.stderr.strip()[-400:]}")
        return 3
    lines, audited = report(found)
    print("\n".join(lines))
    return 1 if len(lines) > 1 else 0 if audited else 3


def report(found: list[dict]) -> tuple[list[str], int]:
    """Lines for a list of pip-audit's dependencies, and how many of these were audited."""
    audited = [entry for entry in found if "skip_reason" not in entry]
    lines = [
        f"{entry['name']} {entry['version']}: {flaw['id']}, mended in "
        f"{', '.join(flaw['fix_versions']) or 'no version yet'}"
        for entry in audited
        for flaw in entry["vulns"]
    ]
    lines.append(
        f"{len(lines)} known vulnerabilities in {len(audited)} audited dependencies; "
        f"{len(found) - len(audited)} of {len(found)} could not be audited"
    )
    return lines, len(audited)


if __name__ == "__main__":
    sys.exit(main())
