"""What the outbox costs, beside what it would cost without it, in one run."""
