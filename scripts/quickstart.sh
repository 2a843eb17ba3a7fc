#!/usr/bin/env bash
# Trains a small LITv2 (HiLo attention) on scikit-learn's handwritten digits, saves it, loads it again, and shows what it learned.
# Minutes on two cores, once everything is installed. Further arguments are overrides of the recipe: schedule.epochs=5
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/scripts/_venv.sh"
use_venv train "$root"

# on a busy machine, threads that spin while they wait cost the small operations of this model several times their own work
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

run="$root/runs/quickstart"
rm -rf "$run"
started=$SECONDS
python "$root/scripts/train.py" train/litv2_digits --output "$run" "$@"
trained=$((SECONDS - started))

# model.safetensors goes back through create_model(checkpoint_path=...), and must say exactly what training said
python "$root/scripts/validate.py" "$run/model.safetensors" --output "$run/validation"
python - "$run" <<'PYTHON'
import json
import sys
from pathlib import Path

from attention_zoo.training.checkpoint import read_description

run = Path(sys.argv[1])
trained = read_description(run / "model.safetensors").metrics["top1"]
loaded = json.loads((run / "validation" / "results.json").read_text())["top1"]
if abs(trained - loaded) > 1e-6:
    sys.exit(f"error: {trained} % in training, {loaded} % after loading")
print(f"the saved model, loaded again: {loaded:.2f} % of the held-out digits, the same as in training")
PYTHON

cat <<END

trained in $trained s. Everything is in $run/:
  model.safetensors           the weights, with what is needed to build the model again
  curves.png, log.csv         loss and accuracy over the epochs (tensorboard --logdir $run/tensorboard)
  validation/validation.png   confusion matrix, and some digits with what the model says
  validation/                 results.json, per_class.csv, confusion_matrix.csv
END
