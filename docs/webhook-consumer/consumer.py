"""Takes NanoMDM's events and prints them: WEBHOOK_KEY=... python3 consumer.py 8080"""
import base64, hashlib, hmac, http.server, os, sys, time

KEY = os.environ["WEBHOOK_KEY"]
SECRET = base64.b64decode(KEY[6:]) if KEY.startswith("whsec_") else KEY.encode()


def mac(key, *parts):
    return base64.b64encode(hmac.new(key, b".".join(parts), hashlib.sha256).digest()).decode()


def genuine(headers, body):
    """Checks both signatures; one of them is enough for most."""
    id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "0")
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > 300:
        return False  # perhaps somebody plays an old one again
    standard = "v1," + mac(SECRET, id.encode(), timestamp.encode(), body)
    signatures = headers.get("webhook-signature", "").split()  # one for each key of the server's
    # NanoMDM's own has one key only, so that it may be another one while keys are changed.
    nanomdm = hmac.compare_digest(headers.get("x-hmac-signature", ""), mac(KEY.encode(), body))
    return nanomdm and any(hmac.compare_digest(s, standard) for s in signatures)


class Consumer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        ok = genuine(self.headers, body)
        if ok:  # keep the event, once for each id, before 200 is sent: it means that it is yours
            print(self.headers["webhook-id"], body.decode(), flush=True)
        self.send_response(200 if ok else 401)
        self.send_header("content-length", "0")
        self.end_headers()


http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Consumer).serve_forever()
