"""What stands behind the programs: files, data, optimisers, speed, the machine and reports. Imports no model."""
import os
import sys

# Before torch: threads that spin long starve where a core is shared; those that never do sleep between small products.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.update({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "1000"} | os.environ)
