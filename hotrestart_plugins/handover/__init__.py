"""The handover of established connections from one process to another."""
