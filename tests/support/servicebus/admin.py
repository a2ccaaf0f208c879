"""The admin REST (ATOM): create, read, change, list and delete queues."""

from __future__ import annotations

import re
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from tests.support.servicebus.queues import BrokerError, Options, Queue
from tests.support.servicebus.rights import Denied

if TYPE_CHECKING:
    from tests.support.servicebus.emulator import Emulator

__all__ = ["handle"]

_SERVICE_BUS = "http://schemas.microsoft.com/netservices/2010/10/servicebus/connect"
_ATOM = "http://www.w3.org/2005/Atom"
_COUNTS = "http://schemas.microsoft.com/netservices/2011/06/servicebus"
_FOR_EVER = "P10675199DT2H48M5.4775807S"
_LONGEST_LOCK = 300
#: Tag → the field of `Options`; durations, flags and numbers.
_DURATIONS = {
    "LockDuration": "lock_seconds",
    "DuplicateDetectionHistoryTimeWindow": "duplicate_window_seconds",
    "DefaultMessageTimeToLive": "default_ttl_seconds",
}
_FLAGS = {
    "RequiresDuplicateDetection": "duplicate_detection",
    "DeadLetteringOnMessageExpiration": "dead_letter_on_expiry",
    "RequiresSession": "requires_session",
    "EnablePartitioning": "partitioning",
}
_NUMBERS = {
    "MaxDeliveryCount": "max_delivery_count",
    "MaxMessageSizeInKilobytes": "max_message_kilobytes",
}
_FIXED = {"duplicate_detection", "requires_session", "partitioning"}


def handle(
    emulator: Emulator, method: str, target: str, headers: dict[str, str], content: bytes
) -> tuple[int, str]:
    """Answer one call with a status and a document."""
    parts = urlsplit(target)
    # kombu leaves the suffix in the endpoint when it has a token of an identity.
    path = unquote(parts.path).strip("/").removeprefix(".net/")
    fault = emulator.faults.take("admin", path)
    if fault is not None:
        return _problem(fault.status, fault.description)
    emulator.stats[f"admin {method}"] += 1
    try:
        _authorize(emulator, headers.get("authorization", ""))
    except Denied as exc:
        return _problem(401, str(exc))
    host = headers.get("host", "emulator")
    try:
        if method == "GET" and path == "$Resources/queues":
            return 200, _list(emulator, parse_qs(parts.query), host)
        return _handle_queue(emulator, method, path, headers, content, host)
    except BrokerError as exc:
        known = {"amqp:not-found": 404, "com.microsoft:entity-already-exists": 409}
        return _problem(known.get(exc.condition, 400), exc.description)
    except (ValueError, ElementTree.ParseError) as exc:
        return _problem(400, str(exc))


def _authorize(emulator: Emulator, token: str) -> None:
    policy, _ = emulator.policies.of_token(token)
    if not emulator.policies.allow(policy, "Manage"):
        raise Denied("Manage,EntityRead claims required for this operation.")


def _handle_queue(
    emulator: Emulator, method: str, path: str, headers: dict[str, str], content: bytes, host: str
) -> tuple[int, str]:
    broker = emulator.broker
    match method:
        case "GET":
            try:
                return 200, _entry(broker.find(path), host)
            except BrokerError:
                return 200, _feed("Publicly Listed Services", [], host)  # as the service does
        case "PUT" if headers.get("if-match"):
            queue, changes = broker.find(path), _options(content)
            if any(changes.get(name, old) != old for name, old in _fixed(queue).items()):
                raise BrokerError("400", "SubCode=40000. This property can't be changed.")
            for name, value in changes.items():
                setattr(queue.options, name, value)
            return 200, _entry(queue, host)
        case "PUT":
            return 201, _entry(broker.create(path, Options(**_options(content))), host)
        case "DELETE":
            emulator.drop_queue(path)
            return 200, ""
        case _:
            return _problem(405, "not emulated")


def _fixed(queue: Queue) -> dict[str, Any]:
    return {
        each.name: getattr(queue.options, each.name)
        for each in fields(Options)
        if each.name in _FIXED
    }


def _options(content: bytes) -> dict[str, Any]:
    """Return what a description says, as fields of `Options`."""
    description = ElementTree.fromstring(content).find(f".//{{{_SERVICE_BUS}}}QueueDescription")
    found: dict[str, Any] = {}
    for element in description if description is not None else ():
        tag, text = element.tag.rpartition("}")[2], (element.text or "").strip()
        if tag in _DURATIONS:
            found[_DURATIONS[tag]] = _seconds(text)
        elif tag in _FLAGS:
            found[_FLAGS[tag]] = text == "true"
        elif tag in _NUMBERS:
            found[_NUMBERS[tag]] = int(text)
        elif tag == "Status":
            found["status"] = text
    if found.get("lock_seconds", 0) > _LONGEST_LOCK:
        raise BrokerError("400", "LockDuration must not exceed PT5M.")
    return found


def _seconds(text: str) -> float | None:
    parts = re.fullmatch(r"P(?:(\d+)D)?(?:T(?:(\d+)H)?(?:(\d+)M)?(?:([\d.]+)S)?)?", text)
    if parts is None:
        raise ValueError(f"no duration: {text}")
    days, hours, minutes, seconds = (float(part or 0) for part in parts.groups())
    total = days * 86400 + hours * 3600 + minutes * 60 + seconds
    return None if total > 10**10 else total


def _duration(seconds: float | None) -> str:
    return _FOR_EVER if seconds is None else f"PT{seconds:g}S"


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _entry(queue: Queue, host: str) -> str:
    options, counts = queue.options, queue.counts()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(queue.created))
    name = escape(queue.name)
    # In the order of the schema, which the SDK's reader insists on.
    values = {
        "LockDuration": _duration(options.lock_seconds),
        "MaxSizeInMegabytes": 1024,
        "RequiresDuplicateDetection": _flag(options.duplicate_detection),
        "RequiresSession": _flag(options.requires_session),
        "DefaultMessageTimeToLive": _duration(options.default_ttl_seconds),
        "DeadLetteringOnMessageExpiration": _flag(options.dead_letter_on_expiry),
        "DuplicateDetectionHistoryTimeWindow": _duration(options.duplicate_window_seconds),
        "MaxDeliveryCount": options.max_delivery_count,
        "EnableBatchedOperations": "true",
        "SizeInBytes": queue.size,
        "MessageCount": counts["active"] + counts["dead_letter"],
        "IsAnonymousAccessible": "false",
        "Status": options.status,
        "CreatedAt": stamp,
        "UpdatedAt": stamp,
        "AccessedAt": stamp,
        "SupportOrdering": "true",
    }
    described = "".join(f"<{tag}>{value}</{tag}>" for tag, value in values.items())
    counted = (
        f'<CountDetails xmlns:n="{_COUNTS}">'
        f"<n:ActiveMessageCount>{counts['active']}</n:ActiveMessageCount>"
        f"<n:DeadLetterMessageCount>{counts['dead_letter']}</n:DeadLetterMessageCount>"
        "<n:ScheduledMessageCount>0</n:ScheduledMessageCount>"
        "<n:TransferMessageCount>0</n:TransferMessageCount>"
        "<n:TransferDeadLetterMessageCount>0</n:TransferDeadLetterMessageCount></CountDetails>"
    )
    size = options.max_message_kilobytes
    largest = (
        "" if size is None else f"<MaxMessageSizeInKilobytes>{size}</MaxMessageSizeInKilobytes>"
    )
    return (
        f'<entry xmlns="{_ATOM}"><id>https://{host}/{name}</id><title type="text">{name}</title>'
        f"<published>{stamp}</published><updated>{stamp}</updated>"
        f"<author><name>{escape(host)}</name></author>"
        f'<link rel="self" href="https://{host}/{name}"/><content type="application/xml">'
        f'<QueueDescription xmlns="{_SERVICE_BUS}" '
        f'xmlns:i="http://www.w3.org/2001/XMLSchema-instance">{described}{counted}'
        f"<AutoDeleteOnIdle>{_FOR_EVER}</AutoDeleteOnIdle>"
        f"<EnablePartitioning>{_flag(options.partitioning)}</EnablePartitioning>"
        "<EntityAvailabilityStatus>Available</EntityAvailabilityStatus>"
        f"<EnableExpress>false</EnableExpress>{largest}</QueueDescription></content></entry>"
    )


def _list(emulator: Emulator, query: dict[str, list[str]], host: str) -> str:
    start, count = int(query.get("$skip", ["0"])[0]), int(query.get("$top", ["100"])[0])
    queues = sorted(emulator.broker.queues.values(), key=lambda queue: queue.name)
    return _feed("Queues", [_entry(queue, host) for queue in queues[start : start + count]], host)


def _feed(title: str, entries: list[str], host: str) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return (
        f'<feed xmlns="{_ATOM}"><title type="text">{title}</title><id>https://{host}/{title}</id>'
        f"<updated>{stamp}</updated>{''.join(entries)}</feed>"
    )


def _problem(code: int, detail: str) -> tuple[int, str]:
    return code, f"<Error><Code>{code}</Code><Detail>{escape(detail)}</Detail></Error>"
