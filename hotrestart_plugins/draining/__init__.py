"""How a draining instance ends its connections, and how it counts them."""
