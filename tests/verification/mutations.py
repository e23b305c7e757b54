"""Bugs of MoE trainers, as patches to this one; `moejax verify` has to find each of them.

Most are bugs that users of some trainer have met; where a line of ours stands for several of
theirs, the story says what they have in common.
"""

from tests.verification.mesh_bugs import MESH
from tests.verification.step_bugs import STEP
from tests.verification.transport_bugs import TRANSPORTS

MUTATIONS = TRANSPORTS + MESH + STEP
