"""How the connections of an instance that drains end, and what became of them."""
