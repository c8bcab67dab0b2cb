"""Established connections, from a process of one instance to a process of another."""
