"""`moejax` whose process 1 takes 0.2 s for each batch."""

import os
import sys
import time

from moejax.commands import main
from moejax.train import layout

if os.environ.get("MOEJAX_PROCESS_ID") == "1":
    lay_out = layout.global_batch

    def slowly(*args):
        time.sleep(0.2)
        return lay_out(*args)

    layout.global_batch = slowly

sys.exit(main(sys.argv[1:]))
