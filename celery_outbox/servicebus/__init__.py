"""Azure Service Bus: what its errors mean, how messages are sent, and how queues should be made.

Needs ``celery-outbox[azure]``; imported only for a broker with this transport.
"""
