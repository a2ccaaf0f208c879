"""A small shop: an order is placed, charged, and answered with a receipt."""
