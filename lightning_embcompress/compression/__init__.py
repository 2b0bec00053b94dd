"""Budget, tasks, solving and applying; the plan and the report."""
