"""What a wall tells the supervisor."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a program is started behind a wall.

    command: what comes before the interpreter's own options. wall_processes: how many of the processes are the wall's.

    Descriptors: filter, to read the system calls' filter from; ruleset, landlock's rules, None where the command is itself the
    wall; status, on which such a command reports.
    """

    command: list[str]
    filter: int
    ruleset: int | None = None
    status: int | None = None
    wall_processes: int = 0

    @property
    def descriptors(self) -> list[int]:
        """What the supervisor inherits."""
        return [descriptor for descriptor in (self.filter, self.ruleset, self.status) if descriptor is not None]
