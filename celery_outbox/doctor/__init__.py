"""Doctor: what must hold for messages to get through, proved rather than assumed.

One module a subject, one function a check: it takes the `Outbox` and yields findings. `examine` runs
them all.
"""
