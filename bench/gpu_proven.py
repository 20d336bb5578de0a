"""Write down that the machine code of the sources at hand was read: ``python -m bench.gpu_proven NETWORK:BATCH...``.

``make test-gpu-code`` does it where all its tests pass.
"""

import json
import sys

import triton

from fastens import proven
from fastens.files import write_json

if __name__ == "__main__":
    before = json.loads(proven.FILE.read_text()) if proven.FILE.exists() else None
    read = {"target": "sm_90a", "plans": sys.argv[1:]}
    write_json(proven.FILE, proven.add(before, proven.sources(), triton.__version__, read), indent=1)
    print(proven.describe())
