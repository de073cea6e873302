"""A fake reward worker: echoes, sleeps, dies or talks nonsense as it is told."""

import json
import os
import sys
import time

sys.stdout.write(json.dumps({"ready": True}) + "\n")
sys.stdout.flush()
for line in sys.stdin:
    request = json.loads(line)
    if request.get("die"):
        os._exit(3)
    time.sleep(request.get("sleep_s", 0))
    sys.stdout.write(json.dumps({"echo": request["value"], "pid": os.getpid()}) + "\n")
    sys.stdout.flush()
