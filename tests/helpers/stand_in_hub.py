"""A stand-in for the Hugging Face hub: what creating a repository and uploading a folder asks for."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_right"
LARGE = (".safetensors", ".data", ".onnx", ".bin")


class Hub:
    """Repositories by name: file -> bytes, as far as they are committed."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.private: dict[str, bool] = {}
        self.calls: list[str] = []


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline().strip(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def answer(self, content, status: int = 200, code: str = "") -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        @property
        def here(self) -> str:
            return f"http://{self.headers['Host']}"

        def do_PUT(self):
            hub.calls.append("PUT")
            data = self.body()
            hub.objects[hashlib.sha256(data).hexdigest()] = data
            self.answer({})

        def do_GET(self):
            path = self.path.partition("?")[0]
            hub.calls.append(f"GET {path}")
            if self.headers.get("Authorization", f"Bearer {TOKEN}") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid username or password."}, 401)
            name = path.removeprefix("/api/models/").partition("/revision/")[0]
            if name in hub.repositories:
                files = [{"rfilename": file} for file in hub.repositories[name]]
                return self.answer({"id": name, "siblings": files, "sha": "0" * 40})
            return self.answer({"error": "not found"}, 404, "RepoNotFound")

        do_HEAD = do_GET

        def do_POST(self):
            path, data = self.path.partition("?")[0], self.body()
            hub.calls.append(f"POST {path}")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid credentials"}, 401)
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                wanted = json.loads(data)
                name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                if not name.startswith("me/"):
                    return self.answer({"error": "no rights under this namespace"}, 403)
                hub.repositories.setdefault(name, {})
                hub.private[name] = bool(
                    wanted.get("private") or wanted.get("visibility") == "private"
                )
                return self.answer({"url": f"{self.here}/{name}", "name": name})
            if not path.startswith("/api/models/me/") and "/preupload/" in path:
                return self.answer({"error": "no rights to write to it"}, 403)
            if "/preupload/" in path:
                files = json.loads(data)["files"]
                modes = ["lfs" if f["path"].endswith(LARGE) else "regular" for f in files]
                found = [
                    {"path": f["path"], "uploadMode": mode, "shouldIgnore": False}
                    for f, mode in zip(files, modes, strict=True)
                ]
                return self.answer({"files": found})
            if path.endswith("/info/lfs/objects/batch"):
                objects = []
                for each in json.loads(data)["objects"]:
                    upload = {"href": f"{self.here}/lfs/{each['oid']}"}
                    objects.append({**each, "actions": {"upload": upload}})
                return self.answer({"transfer": "basic", "objects": objects})
            if "/commit/" in path:
                return self.commit(path, data)
            return self.answer({"error": f"unknown {path}"}, 404)

        def commit(self, path: str, data: bytes) -> None:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in data.decode().splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    hub.repositories[name][value["path"]] = hub.objects[value["oid"]]
            address = f"{self.here}/{name}/commit/{'0' * 40}"
            self.answer({"success": True, "commitUrl": address, "commitOid": "0" * 40})

    return Handler


@contextmanager
def stand_in_hub():
    """(address, Hub) of a server on this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()
