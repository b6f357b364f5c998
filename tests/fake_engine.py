"""An engine process for tests/test_supervisor.py: it says that it is ready, and otherwise does as it is told."""

import json
import signal
import sys
import time

from dpa.serve.child import leave_with_parent

leave_with_parent()
if "--refuse" in sys.argv:
    print(json.dumps({"error": "model: it is no model; give one.", "exit_code": 2}), flush=True)
    sys.exit(2)
if "--deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("some library says hello", flush=True)
print(json.dumps({"ready": "yes"}), flush=True)
if "--die" in sys.argv:
    sys.exit(3)
time.sleep(600)
