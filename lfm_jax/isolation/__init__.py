"""Running what came from outside: programs that a model wrote, behind a wall (`run_python`)."""

from lfm_jax.isolation.wall import NoWall, Outcome, ProgramLimits, Wall, WallFailed, find_wall, run_python

__all__ = ["NoWall", "Outcome", "ProgramLimits", "Wall", "WallFailed", "find_wall", "run_python"]
