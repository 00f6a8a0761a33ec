"""A client to put into one's own programs: over MQTT or HTTP, blocking or asynchronous (docs/clients.md).

::

    from edge.client import Client

    with Client("mqtt://broker:1883", client="press-7", device="edge-1") as client:
        print(client.ask("Name a colour."))
        for text in client.stream("Tell a story."):
            print(text, end="", flush=True)

A request is sent again under the same id until it has its one outcome: over lost links, restarted brokers, full queues
and, in a pool, devices that die. Failures are the errors of :mod:`edge.errors`. The engine is not imported.
"""

from edge.client.answer import AnswerChangedError
from edge.client.client import AsyncClient, Client, Stream
from edge.client.wire import Progress

__all__ = ["AnswerChangedError", "AsyncClient", "Client", "Progress", "Stream"]
