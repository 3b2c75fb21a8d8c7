"""`hmar-mega serve`: options checked, the token, the socket, uvicorn, and an end that loses no request."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import secrets
import signal
import socket
from pathlib import Path
from typing import Any

from hmar_mega.errors import UserError

log = logging.getLogger(__name__)

#: Where the token may stand, since a command line can be read by everyone on a machine.
TOKEN_VARIABLE = "HMAR_MEGA_TOKEN"

#: A shorter token could be guessed.
TOKEN_LENGTH = 16

#: Connections beyond the images that may wait: idle ones, pages, probes.
SPARE_CONNECTIONS = 64

#: Names of this machine under which a service that only it can reach is addressed.
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


def serve(args: argparse.Namespace) -> int:
    """Serve until a signal comes; returns the exit status, 0 after an orderly end.

    Raises:
        UserError: for options that cannot be, an address that is taken, or a missing extra.
    """
    _check(args)
    exposed = not is_loopback(args.host)
    token, made = find_token(args.token_file, exposed)
    listener = listen(args.host, args.port)
    try:
        return _serve(args, listener, token, made, exposed)
    finally:
        listener.close()


def _serve(args: argparse.Namespace, listener: socket.socket, token: str | None, made: bool, exposed: bool) -> int:
    import uvicorn

    from hmar_mega.inference.commands import open_named
    from hmar_mega.serving.app import Limits, Service, create_app

    model, names = open_named(args)
    limits = Limits(
        args.max_batch, args.max_wait / 1e3, args.max_queue, args.max_count, int(args.max_body * 1e6), args.timeout
    )
    service = Service(model, names, limits, args.model.resolve().name)
    service.runner.warm_up()
    hosts = None if exposed else LOCAL_HOSTS | {args.host}
    config = uvicorn.Config(
        create_app(service, token, hosts), log_config=None, ws="none", lifespan="on", proxy_headers=False,
        server_header=False, limit_concurrency=args.max_queue + SPARE_CONNECTIONS,
        timeout_graceful_shutdown=args.grace,
    )  # fmt: skip
    server = uvicorn.Server(config)

    def stop(number: int, frame: Any) -> None:
        server.should_exit = True

    # uvicorn has handlers of its own while it runs and afterwards raises what it got once more, which would end the
    # process by the signal instead of with 0
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        port = listener.getsockname()[1]
        shown = f"[{args.host}]" if ":" in args.host else args.host
        print(f"serving {service.title} at http://{shown}:{port}/ (Ctrl-C stops it)", flush=True)
        if made:
            print(f"token, made for this run: {token}", flush=True)
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if server.started else 1


def _check(args: argparse.Namespace) -> None:
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {' and '.join(missing)}: pip install 'hmar-mega[serve]'")
    counts = {"max-batch": args.max_batch, "max-queue": args.max_queue, "max-count": args.max_count}
    for name, value in (counts | {"max-body": args.max_body, "timeout": args.timeout}).items():
        if not value > 0:
            raise UserError(f"--{name} {value:g}: give a number above 0")
    if not (0 <= args.max_wait <= 1e4 and args.grace >= 0 and 0 <= args.port < 2**16):
        raise UserError(
            f"--max-wait {args.max_wait:g}, --grace {args.grace}, --port {args.port}: allowed are 0 to 10000 ms, at "
            "least 0 s, and 0 to 65535"
        )
    if args.max_queue < args.max_count:
        raise UserError(
            f"--max-queue {args.max_queue} is less than --max-count {args.max_count}: the largest request would never "
            "find room; raise the one or lower the other"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name other than localhost counts as reachable from elsewhere."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_token(file: Path | None, exposed: bool) -> tuple[str | None, bool]:
    """The token that requests must bring, and whether it was made here; None where none is needed or given.

    Raises:
        UserError: when it cannot be read, is too short, or cannot stand in a header.
    """
    if file is not None:
        try:
            token, source = (file.read_text().splitlines() or [""])[0].strip(), str(file)
        except (OSError, UnicodeDecodeError) as err:
            raise UserError(f"cannot read --token-file {file} ({err}); put the token on its first line") from None
    elif TOKEN_VARIABLE in os.environ:
        token, source = os.environ[TOKEN_VARIABLE], TOKEN_VARIABLE
    else:
        return (secrets.token_urlsafe(32), True) if exposed else (None, False)
    if len(token) < TOKEN_LENGTH or not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(
            f"the token of {source} has {len(token)} characters; give at least {TOKEN_LENGTH} of ASCII without spaces, "
            "as `openssl rand -hex 32` does"
        )
    return token, False


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which uvicorn listens at later; UserError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as err:
        raise UserError(f"cannot listen at {host}, port {port} ({err}); choose another --host or --port") from None
    return listener
