"""open-unlearning's train.py with the trainer MIPEditor. Start it in a clone of github.com/locuslab/open-unlearning;
the arguments are train.py's own:

    python .../mipfast/examples/open_unlearning.py --config-name=unlearn.yaml experiment=unlearn/tofu/default \
        trainer=MIPEditor task_name=mip trainer.args.learning_rate=3e-3

docs/open_unlearning.md has the settings and the versions.
"""

import runpy
import sys
from pathlib import Path

from mipfast.integrations import open_unlearning

if __name__ == "__main__":
    src = Path("src").resolve()
    sys.path.insert(0, str(src))
    open_unlearning.register()  # and writes configs/trainer/MIPEditor.yaml, where there is none
    runpy.run_path(str(src / "train.py"), run_name="__main__")
