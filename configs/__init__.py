"""YAML recipes: training, fine-tuning, swapping and benchmarks. Installed as `attention_zoo.configs`."""
