"""Checks the TLS files before anything is opened: Python's own errors do not name them."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import NoReturn

import uvicorn

from hotrestart_plugins.errors import ConfigurationError


def check_tls(config: uvicorn.Config) -> None:
    """Raise ConfigurationError, with the option and the file, for a TLS file that cannot be used.

    A key with a password is not checked: uvicorn asks the user for it, once.
    """
    if config.ssl_context_factory is not None:
        return
    for option in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        path = getattr(config, option)
        flag = "--" + option.replace("_", "-")
        try:
            if path:
                Path(path).open("rb").close()
        except OSError as error:
            raise ConfigurationError(f"{flag}: {path} cannot be read: {error.strerror}") from error
    key, chain = config.ssl_keyfile, config.ssl_certfile
    if chain:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(chain, key, config.ssl_keyfile_password or _ask_later)
        except ssl.SSLError as error:
            raise ConfigurationError(
                f"--ssl-certfile {chain} cannot be used{f' with --ssl-keyfile {key}' * bool(key)}: "
                f"{error}"
            ) from error
        except _AsksForPassword:
            return
    elif key:
        raise ConfigurationError("--ssl-keyfile needs a --ssl-certfile")


class _AsksForPassword(Exception):
    """OpenSSL wants the password of the key."""


def _ask_later() -> NoReturn:
    raise _AsksForPassword
