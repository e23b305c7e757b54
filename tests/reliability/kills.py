"""When the sessions of a run are killed: at places, at file events, at random times."""

import dataclasses
import random

from tests.reliability import outcome, victim

# How often a session of a fresh run comes to a phase at least, of those that come more than once.
_TIMES = {"record": 12, "save": 4, "commit": 9, "step": 9, "entry of the data cache": 4}
_TIMES |= {"evaluation": 3, "deletion": 3, "batch": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """When a session dies. Exactly one of the three, and perhaps a damage before it starts.

    Attributes:
      place: where the process kills itself.
      events: it is killed at this file event, in the checkpoint directory (`within`) or anywhere.
      seconds: it is killed so long after its start.
      damaged: a bit of the newest checkpoint is flipped before the session starts.
    """

    place: victim.Place | None = None
    events: int | None = None
    within: str | None = None
    seconds: float | None = None
    damaged: bool = False

    @property
    def needs_saves(self) -> bool:
        """Whether a session of a fresh run would not come to it."""
        return self.damaged or (self.place is not None and "arrays read" in self.place.name)

    @property
    def kind(self) -> str:
        if self.place is not None:
            return self.place.name
        if self.events is not None:
            return f"file event in {self.within or 'any folder'}"
        return "random time"


AFTER_TWO_SAVES = Kill(place=victim.Place(name="before save", count=4))


def plan(seed: int, count: int, *, seconds: float) -> list[Kill]:
    """Half of the kills at places, in turn; a quarter at file events, a quarter at random times."""
    draw = random.Random(seed)
    places = list(victim.PLACES)
    draw.shuffle(places)
    kills = []
    for number in range(count):
        if number % 2 == 0:
            name = places[(number // 2) % len(places)]
            times = draw.randint(1, _TIMES.get(name.partition(" ")[2], 1))
            place = victim.Place(name=name, count=times)
            kills.append(Kill(place=place, damaged="set aside" in name))
        elif number % 4 == 1:
            within = draw.choice((outcome.CHECKPOINTS, outcome.CHECKPOINTS, None))
            kills.append(Kill(events=draw.randint(1, 150), within=within))
        else:
            kills.append(Kill(seconds=draw.uniform(0, seconds)))
    return kills
