"""Backbones: one file per family, registered with timm's registry. Installed as `attention_zoo.models`."""
