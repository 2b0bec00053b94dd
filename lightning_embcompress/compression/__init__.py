"""Budget, tasks, solving and applying; the plan and the report.

`tasks.plan` decides, `solution.solve` finds factors, `plan.apply` replaces. The format that all files record is that of
`plan.Plan` (`PLAN_VERSION`), checked by `records`.
"""
