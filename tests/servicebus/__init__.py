"""Azure Service Bus: the stand-in itself, and what speaks to it."""
