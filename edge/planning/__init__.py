"""What a model will take and reach on a machine, before it is there: memory, time to load, tokens a second, joules.

``docs/planning.md`` has the formulas, where their constants come from, and how far they have been checked.
"""
