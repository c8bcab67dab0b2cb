"""uvicorn with hot restarts: `run` has `uvicorn.run`'s signature, `Server` takes a Config."""

from hotrestart_plugins.uvicorn.server import Server, run

__all__ = ["Server", "run"]
