"""Hot restarts for gunicorn, by its own hooks.

Without a config file of your own::

    gunicorn -c python:hotrestart_plugins.gunicorn_conf app:app

which reads ``./gunicorn.conf.py`` if there is one. In a config file of your own, anywhere in it::

    from hotrestart_plugins.gunicorn import install

    install(globals())

The options are names in that file: ``hotrestart_dir``, ``hotrestart_drain_timeout`` and so on, as
`hotrestart_plugins.settings.OPTIONS` lists them; or the environment: ``HOTRESTART_DIR``.

Exit status of the master:

====  ==========================================================================
0     it was stopped, or another instance has taken over
1     the app could not be preloaded, and other ends of gunicorn's own
3, 4  the app failed to start, or was not ready in time; fix the app
75    the takeover failed (EX_TEMPFAIL); read the last log line, then retry
78    an option or an address cannot work (EX_CONFIG): start it with another one
====  ==========================================================================
"""

from hotrestart_plugins.gunicorn.hooks import install

__all__ = ["install"]
