"""Takes NanoMDM's events and prints them: WEBHOOK_KEY=... python3 consumer.py 8080"""
import base64, hashlib, hmac, http.server, os, sys, time

KEY = os.environ["WEBHOOK_KEY"]
SECRET = base64.b64decode(KEY[6:]) if KEY.startswith("whsec_") else KEY.encode()


def equal(signature, key, text):
    mac = base64.b64encode(hmac.new(key, text, hashlib.sha256).digest())
    return hmac.compare_digest(signature.encode(), mac)  # in constant time


class Consumer(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        header = lambda name: self.headers.get(name, "")
        body = self.rfile.read(min(max(int(header("content-length") or 0), 0), 64 << 20))
        id, timestamp = header("webhook-id"), header("webhook-timestamp")
        signatures = header("webhook-signature").split()  # one for each key of the server's
        ok = (timestamp.isdecimal() and abs(time.time() - int(timestamp)) < 300  # or an old request is sent again
              and any(equal(s.removeprefix("v1,"), SECRET, f"{id}.{timestamp}.".encode() + body) for s in signatures)
              and equal(header("x-hmac-signature"), KEY.encode(), body))  # one of both is enough for most
        if ok:  # store the event, once for each id, before 200 is sent: the server forgets it then
            print(id, body.decode(), flush=True)
        self.send_response(200 if ok else 401)
        self.end_headers()


http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Consumer).serve_forever()
