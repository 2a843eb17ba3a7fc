"""What the programs in `scripts/` share: recipes, data, the training loop, metrics, checkpoints of a run and its pictures.

    recipe.py       a YAML file and `key.sub=value` overrides -> one frozen `Recipe`
    data.py         images: a folder, torchvision, Hugging Face datasets, scikit-learn's digits; loaders that can be resumed
    optim.py        timm's optimizers and schedulers as a recipe asks for them
    loop.py         `Trainer`: one run, from the first step to the last, through kills and restarts
    evaluate.py     accuracy, per-class results and the confusion matrix of a model on a loader
    validate.py     a checkpoint measured on labelled images: what `scripts/validate.py` runs
    predict.py      a checkpoint asked about image files: what `scripts/predict.py` runs
    swap.py         mechanisms put into a model, from a recipe or a command line: what `attention-zoo swap` runs
    uptrain.py      mechanisms compared in up-training an image classifier: what `scripts/uptrain.py` runs
    text.py         mechanisms compared on text: what `scripts/train_text.py` runs
    finetune.py     a Hugging Face decoder swapped and trained on: what `scripts/finetune_text.py` runs
    checkpoint.py   weights with a description of their model (safetensors), the state of a run, both written atomically
    report.py       CSV, TensorBoard and progress of a run
    plots.py        pictures: curves, confusion matrix, predictions
    console.py      errors a user can act on, without a traceback

Nothing below imports this package; it needs the extra `attention-zoo[train]`.
"""
