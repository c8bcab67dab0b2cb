"""The only files that read, write or call private or undocumented names of uvicorn.

`table` says how a name is looked for, `names` is the list of them, `connections` and `server` are
what uses them, with plain names.
"""
