"""A web server of shards, in a process of its own: ``server.py FOLDER LOG FAULT``.

It writes its port, then a line a request, to LOG. FAULT is what the first request of each tar file
meets: none, cut (the connection ends in the middle), flip (a byte is wrong) or 503.
"""

import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

folder, log, fault = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
seen = set()


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with log.open("a") as file:
            file.write(f"{self.path}\n")
        path = folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data = bytearray(path.read_bytes())
        length = len(data)
        if path.suffix == ".tar" and self.path not in seen:
            seen.add(self.path)
            if fault == "503":
                return self.send_error(503)
            if fault == "cut":
                del data[length // 2 :]
                self.close_connection = True
            if fault == "flip":
                data[length // 2] ^= 0xFF
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
log.write_text(f"{server.server_port}\n")
server.serve_forever()
