"""What ``qwedge doctor`` looks at: one module for each family of checks, and the support bundle.

A check is a line of the report. It says what is, and where that is not as it should be, what to change.
"""
