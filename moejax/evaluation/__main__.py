"""`lm_eval run` with models of moejax: see `lm_eval_adapter.py`."""

from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    """Runs the harness's own command line."""
    if importlib.util.find_spec("lm_eval") is None:
        print("error: lm_eval is not installed: pip install 'moejax[lm-eval]'", file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    from moejax.errors import UserError
    from moejax.evaluation import lm_eval_adapter  # noqa: F401 - makes the name known

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
