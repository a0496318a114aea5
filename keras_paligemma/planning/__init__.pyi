from .job import Job as Job
from .planner import Plan as Plan
from .planner import make_plan as make_plan
