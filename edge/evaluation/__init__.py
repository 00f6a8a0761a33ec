"""Evaluation in the product's context: suites of questions with assertions, against a bundle or a server.

::

    suite = load_suite("factory")
    with service_target(load_service(bundle, manifest, settings), settings.engine.slots) as target:
        report = evaluate(suite, target)
    print(report.score)

The format of suites is a part of promptfoo's (docs/evaluation.md). :class:`Report` has the results and their JSON,
:func:`compare` tells two reports apart, :func:`page` makes an HTML page of both.
"""

from edge.evaluation.compare import Comparison, check_comparable, compare
from edge.evaluation.html import page
from edge.evaluation.record import check_recordable, record, recorded_score
from edge.evaluation.report import Report, Result
from edge.evaluation.run import ResultLog, evaluate
from edge.evaluation.suite import Suite, built_in_suites, load_suite
from edge.evaluation.target import ServiceTarget, Target, service_target, url_target

__all__ = [
    "Comparison",
    "Report",
    "Result",
    "ResultLog",
    "ServiceTarget",
    "Suite",
    "Target",
    "built_in_suites",
    "check_comparable",
    "check_recordable",
    "compare",
    "evaluate",
    "load_suite",
    "page",
    "record",
    "recorded_score",
    "service_target",
    "url_target",
]
