"""What others use instead of the outbox, as their own documentation says to use them."""
