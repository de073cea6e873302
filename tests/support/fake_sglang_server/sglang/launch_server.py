"""The server: meets its other parts, then answers GET requests."""

import argparse
import json
import socket
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def meet(args: argparse.Namespace) -> list[socket.socket]:
    """Connections to the other parts, once all are there; they stay open and are not read."""
    host, _, port = args.dist_init_addr.rpartition(":")
    address = (host, int(port))
    if args.node_rank == 0:
        listener = socket.create_server(address)
        return [listener.accept()[0] for _ in range(args.nnodes - 1)]
    while True:
        with suppress(ConnectionRefusedError):
            return [socket.create_connection(address)]
        time.sleep(0.05)


class Handler(BaseHTTPRequestHandler):
    """Says that all is well."""

    def do_GET(self) -> None:
        data = json.dumps({"status": "fake"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    """Serve until ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--model-path", type=Path)
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--dist-init-addr")
    args, _ = parser.parse_known_args()
    if (args.model_path / f"fails-on-node-{args.node_rank}").exists():
        sys.exit(f"the fake part {args.node_rank} was told to fail")
    connections = meet(args) if args.nnodes > 1 else []
    sys.stdout.write(f"part {args.node_rank} of {args.nnodes} met {len(connections)} others\n")
    sys.stdout.flush()
    ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
