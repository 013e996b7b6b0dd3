"""The methods that some examples take by name: `--sync diloco`, `--sync streaming` or `--sync int8`.

In a program of your own the method stands where it is used, `attach(model, optimizer, diloco(every_steps=50))`, and is
imported with `attach`.
"""

import argparse

from dtrain import diloco, every_step, streaming_diloco
from dtrain.compress import error_feedback, quantize

METHODS = {
    "diloco": diloco(every_steps=10),
    "streaming": streaming_diloco(every_steps=10, overlap_steps=2, layers_per_fragment=1),
    "int8": every_step(compress=error_feedback(quantize(bits=8))),
}


def chosen():
    """The method that `--sync` names; DiLoCo without it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sync", choices=METHODS, default="diloco")
    return METHODS[parser.parse_known_args()[0].sync]
