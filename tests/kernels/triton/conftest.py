"""These tests run the kernels in Triton's interpreter, which a process chooses before it first imports Triton.

`TRITON_INTERPRET=1 pytest tests/kernels/triton` runs them; without the variable they are not collected, and
`tests/kernels/test_triton_interpreted.py` runs them in a process of their own.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
