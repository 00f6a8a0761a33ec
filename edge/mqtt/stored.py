"""What the journal holds of an MQTT request: where the answer goes, and the message to run it again from."""

from __future__ import annotations

import base64
import json
import time

from edge.journal import Entry
from edge.mqtt.ledger import OWNER, Job, Reply
from edge.mqtt.packets import Incoming
from edge.mqtt.topics import Layout, ReplyTopics, RequestId


def pack(job: Job, message: Incoming) -> Entry:
    """A request to be stored."""
    head = json.dumps({"expiry_s": message.expiry_s}).encode()
    return Entry(
        key=job.key,
        fingerprint=job.fingerprint,
        reply=pack_reply(job.reply),
        request=head + b"\n" + (message.payload or b""),
    )


def pack_reply(reply: Reply) -> bytes:
    """Where an answer goes, to be stored."""
    correlation = None if reply.correlation is None else base64.b64encode(reply.correlation).decode()
    topics = reply.topics
    value = {"done": topics.done, "base": topics.base, "plain": reply.plain, "correlation": correlation}
    return json.dumps(value, separators=(",", ":")).encode()


def unpack_reply(request_id: str, stored: bytes) -> Reply:
    """Where a stored request's answer goes."""
    value = json.loads(stored)
    correlation = None if value["correlation"] is None else base64.b64decode(value["correlation"])
    return Reply(request_id, ReplyTopics(value["done"], value["base"]), value["plain"], correlation)


def unpack_job(entry: Entry) -> Job:
    """A stored request as a job that does not run yet."""
    request = RequestId(entry.key.owner.removeprefix(OWNER), entry.key.id)
    return Job(request, entry.fingerprint, unpack_reply(request.id, entry.reply), stream=False, held=None)


def unpack_message(entry: Entry, job: Job, layout: Layout) -> Incoming:
    """A stored request as it was received, and as long ago."""
    assert entry.request is not None
    head, _, payload = entry.request.partition(b"\n")
    return Incoming(
        topic=layout.request(job.request),
        payload=payload,
        retain=False,
        expiry_s=json.loads(head)["expiry_s"],
        received_at=time.monotonic() - entry.age_s,
    )


def is_ours(entry: Entry) -> bool:
    """Whether a stored request came over MQTT."""
    return entry.key.owner.startswith(OWNER)
