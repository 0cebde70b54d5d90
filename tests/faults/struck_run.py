"""Run `lora` with a fault inside the trainings that it launches.

python struck_run.py KIND:STEP:RANK run RECIPE
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from faults.struck import strike_launches
from pipelines import cli

if __name__ == "__main__":
    strike_launches(sys.argv.pop(1))
    cli.main()
