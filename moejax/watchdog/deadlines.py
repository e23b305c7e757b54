"""How long a training process may stay in each phase before its watchdog ends it."""

from __future__ import annotations

from moejax.errors import UserError

ON, OFF = "on", "off"

# Seconds without news. Within a phase each evaluated batch and each step is news.
DEADLINES = {
    "start": 1800.0,  # imports, joining the other processes (300 s), checking the config
    "prepare": 43200.0,  # tokenising and packing, once per corpus
    "data": 900.0,  # one batch
    "restore": 3600.0,
    "compile": 3600.0,
    "first step": 1800.0,
    "step": 900.0,
    "evaluate": 3600.0,  # its compilation included
    "save": 1800.0,
    "exit": 1800.0,  # the report, and leaving together
}


def parse(text: str) -> dict[str, float]:
    """The deadlines that `text` asks for, in seconds by phase: "on", or "step=120,compile=7200".

    A blank in a phase's name is written as "_". Phases that are not named keep their defaults.
    Raises UserError for an unknown phase or a time that is not positive.
    """
    changed = {}
    for part in [] if text == ON else text.split(","):
        name, _, seconds = part.partition("=")
        phase = name.strip().replace("_", " ")
        if phase not in DEADLINES:
            raise UserError(
                f"MOEJAX_WATCHDOG={text}: {phase!r} is no phase; write {ON}, {OFF} or "
                f"PHASE=SECONDS,... with phases {', '.join(DEADLINES)}"
            )
        try:
            changed[phase] = float(seconds)
        except ValueError:
            changed[phase] = 0.0
        if not changed[phase] > 0:
            raise UserError(f"MOEJAX_WATCHDOG={text}: {seconds!r} is no number of seconds above 0")
    return DEADLINES | changed
