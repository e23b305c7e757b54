"""Where the routing traces of a run lie: RUN/traces/NAME.npz."""

TRACES = "traces"
SUFFIX = ".npz"
HELD_OUT = "held_out"  # NAME of the trace of the run's evaluation rows
