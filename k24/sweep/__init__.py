"""Many runs: tasks × algorithms × methods × seeds, over Ray.

``plan`` writes down the runs of a grid and finds what is wrong with any of them before one starts; ``sweep`` carries them out.
"""

from k24.sweep.plan import Cell, Method, Row, plan, require_environments
from k24.sweep.run import Status, require_ray, sweep

__all__ = ["Cell", "Method", "Row", "Status", "plan", "require_environments", "require_ray", "sweep"]
