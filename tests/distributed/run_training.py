"""Run one training as a run does, in a separate process that can be ended.

    python run_training.py STAGE.pickle [KIND:STEP:RANK]

The second word is a fault; see `faults.struck`. The output of the run goes to the standard output.
"""

import pickle
import signal
import sys
from pathlib import Path

from pipelines.errors import PipelineError
from pipelines.runtime import hosts

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    """Train, and print the result or the error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    stage, settings = pickle.loads(Path(sys.argv[1]).read_bytes())  # noqa: S301 - written by the test that runs this
    if len(sys.argv) > 2:
        from faults.struck import strike_launches

        strike_launches(sys.argv[2])
    try:
        print(hosts.train(stage, settings, watch=None, report=print).model_dump_json())
    except PipelineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
