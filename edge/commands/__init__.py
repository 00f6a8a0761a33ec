"""The commands of ``qwedge``: one module each, with a ``register(app)`` that adds the command to the command line.

A module imports what its options need and nothing else; onnxruntime, the web framework and the MQTT client are imported
inside the commands, so that ``qwedge --help`` is quick.
"""
