"""A stand-in for Azure Service Bus on loopback: AMQP 1.0 and the admin REST, on one port, in memory.

Its clients are real and unmodified: azure-servicebus, kombu with Celery's workers, Qpid Proton. It is
written from the OASIS specification of AMQP 1.0 and from Microsoft's public documents, and shares no
code with a client. It was never compared with a real namespace: what a test shows with it is how the
clients behave with a broker that behaves as documented.

It has queues with peek-lock, lock renewal, dead-lettering, duplicate detection, time to live and
quotas, rights by policy, and faults at the places where an outbox hurts. It has no topics, sessions,
transactions, deferred or scheduled messages, and no AMQP over WebSockets.
"""

from tests.support.servicebus.emulator import Emulator
from tests.support.servicebus.faults import Fault
from tests.support.servicebus.server import ServiceBus
from tests.support.servicebus.trust import Trust

__all__ = ["Emulator", "Fault", "ServiceBus", "Trust"]
