"""The takeover of listeners: the standard library alone, no loop, no thread, no server."""
