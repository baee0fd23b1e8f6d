"""An experiment each of whose steps lasts a little longer: python run_slowly.py SECONDS SCRIPT ARGUMENT..."""

import os
import runpy
import sys
from pathlib import Path

_, os.environ["SECONDS_A_STEP"], *sys.argv[:] = sys.argv
runpy.run_path(str(Path(__file__).with_name("sitecustomize.py")))
runpy.run_path(sys.argv[0], run_name="__main__")
