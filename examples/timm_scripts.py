"""timm's train.py and validate.py, or any script that makes models by name, on vptm's names in timm's registry.

python examples/timm_scripts.py validate.py photos --model vptm_beitv2_base_patch16_224 --num-classes 10 \
    --model-kwargs source=beitv2_base_patch16_224_pt1k.pth --checkpoint output/train/model_best.pth.tar
"""

import runpy
import sys
from pathlib import Path

import timm

import vptm  # after timm: this registers the names

script = sys.argv[1]
print(f"vptm {vptm.__version__} in timm {timm.__version__}: {', '.join(timm.list_models('vptm_*'))}")
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(script).resolve().parent))
runpy.run_path(script, run_name="__main__")
