"""A function as a rank's program: ``python -m dtrain.launchers.call FOLDER`` calls what was submitted.

The return value is left in FOLDER/results/rank-K.pkl; an exception ends the rank as it would end any program.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from dtrain.launchers import trust as trusted
from dtrain.launchers.environment import Environment


def main(folder: Path) -> None:
    """Load, call, and store the result, atomically."""
    with trusted.opened(folder / "function.pkl") as file:
        sys.path += [path for path in pickle.load(file) if path not in sys.path]
        function = pickle.load(file)  # cloudpickle writes what pickle reads
    result = function()
    path = folder / "results" / f"rank-{Environment.read().rank}.pkl"
    trusted.make_folder(path.parent)
    new = path.with_suffix(".new")
    trusted.write_private(new, pickle.dumps(result))
    os.replace(new, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
