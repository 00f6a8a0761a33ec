"""qwedge runtime: a bundle goes in, answers over HTTP, MQTT and the command line come out.

Data flows one way: front end (``edge.http``, ``edge.mqtt``, ``edge.cli``) -> ``edge.service`` -> ``edge.scheduler`` ->
``edge.engine``. Nothing in this package imports ``export``, torch, transformers or onnx.
"""

__version__ = "0.1.0"
